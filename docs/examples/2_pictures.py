"""
Pictures: scales, styles and composed figures
=============================================

:meth:`Explanation.show <captum_xnn.Explanation.show>` returns a plain matplotlib figure. This page goes through what
can be chosen.
"""

from captum_xnn import XNNAttribution
from captum_xnn.cli.demo import train_cnn
from captum_xnn.datasets.digits import load_digits

digits = load_digits()
model = train_cnn(digits.train_images, digits.train_labels, epochs=2)
xnn = XNNAttribution(model, "relu3").fit(digits.train_images, target=7)
sevens = digits.test_images[digits.test_labels == 7][:3]
why = xnn.explain(sevens, target=7)

# %%
# A shared scale or one for each map
# ----------------------------------
# On the shared scale, the default, every map is as strong as its contribution: an x-feature that hardly matters is
# pale.

from captum_xnn.plots.explanation import contours, own_scale, shared_scale

why.show(0, title="shared_scale", scale=shared_scale)

# %%
# On its own scale each map is stretched to full strength, to see where a weak one lies. Only the numbers then tell
# how much it matters.

why.show(0, title="own_scale", scale=own_scale)

# %%
# A scale is a function of maps (K, H, W) and contributions (K,). This one shows only the strongest half of each map:


def strongest_half(maps, contributions):
    shown = own_scale(maps, contributions)
    return shown * (abs(shown) > 0.5)


why.show(0, title="strongest_half", scale=strongest_half)

# %%
# An overlay or contours
# ----------------------
# Contours leave the image its own colours. They are solid where the output is raised and dashed where it is
# lowered, so that a print in grey can still be read. Signed maps, here by Integrated Gradients, have both.

from captum.attr import IntegratedGradients

from captum_xnn.heatmaps import FromCaptum

signed = xnn.with_heatmap(FromCaptum(IntegratedGradients, n_steps=16)).explain(sevens, target=7, one_heatmap=True)
signed.show(0, scale=own_scale, style=contours)

# %%
# The same as an overlay. The 1-Heatmap, the map of the whole output, is there because ``explain`` was asked for it.

signed.show(0, scale=own_scale)

# %%
# A style is a function that draws an image (H, W, 3) and a map (h, w) into axes:


def side_by_side(axes, image, shown):
    axes.imshow(shown, cmap="PuOr_r", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])


why.show(0, style=side_by_side)

# %%
# Inputs that were normalised get their colours back from ``mean=`` and ``std=``: see
# :ref:`sphx_glr_gallery_5_known_reasons.py`.

# %%
# Many x-features
# ---------------
# ``largest`` shows those that contribute most. The others are one step of the sum, which still ends at the real
# number.

many = XNNAttribution(model, "relu3", n_features=12).fit(digits.train_images, target=7)
many.explain(sevens, target=7).show(0, largest=4)

# %%
# Figures that compose
# --------------------
# ``axes=`` puts an explanation where axes of your own were, or fills a subfigure.

from matplotlib import pyplot as plt

figure, places = plt.subplots(3, 1, figsize=(12, 7.5), layout="constrained")
for i, place in enumerate(places):
    why.show(i, axes=place)
figure

# %%
# The sum alone is drawn into the axes themselves:

from captum_xnn.plots.explanation import show_contributions

figure, places = plt.subplots(1, 3, figsize=(13, 2.8), layout="constrained")
for i, place in enumerate(places):
    show_contributions(
        why.contributions[i],
        bias=why.bias[i],
        surrogate=why.surrogate[i],
        prediction=why.prediction[i],
        title=f"digit {i}",
        axes=place,
    )
figure
