"""
Pictures: scales, styles and composed figures
=============================================

:meth:`Explanation.show <captum_xnn.Explanation.show>` returns a plain matplotlib figure. This page shows its options.
"""

from captum_xnn import XNNAttribution
from captum_xnn.datasets import load_digits

digits = load_digits()
model = digits.trained_network(epochs=2)
xnn = XNNAttribution(model, "relu3").fit(digits.train_images, target=7)
sevens = digits.test_images[digits.test_labels == 7][:3]
why = xnn.explain(sevens, target=7)

# %%
# A shared scale or one for each map
# ----------------------------------
# On the shared scale, the default, every map is as strong as its contribution: an x-feature that hardly matters is
# pale.

from captum_xnn.plots import contours, own_scale

why.show(0, title="shared scale")

# %%
# On its own scale each map is stretched to full strength, so weak maps become visible. Only the numbers then show the
# importance of a map.

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
# Contours keep the colours of the image. They are solid where a map raises the output and dashed where it lowers the
# output, so a grey print is readable too. Signed maps, here by Integrated Gradients, have both kinds.

from captum.attr import IntegratedGradients

from captum_xnn.heatmaps import FromCaptum

signed = xnn.with_heatmap(FromCaptum(IntegratedGradients, n_steps=16)).explain(sevens, target=7, one_heatmap=True)
signed.show(0, scale=own_scale, style=contours)

# %%
# The next figure shows the same maps as an overlay. It has the 1-Heatmap, the map of the whole output, because
# ``explain`` was called with ``one_heatmap=True``.

signed.show(0, scale=own_scale)

# %%
# A style is a function that draws an image (H, W, 3) and a map (h, w) on axes:


def side_by_side(axes, image, shown):
    axes.imshow(shown, cmap="PuOr_r", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])


why.show(0, style=side_by_side)

# %%
# ``mean=`` and ``std=`` restore the colours of normalised inputs: see :ref:`sphx_glr_gallery_5_known_reasons.py`.

# %%
# Many x-features
# ---------------
# ``largest`` shows the x-features with the largest contributions. The others become one step of the sum, so the sum
# still ends at the network's output.

many = XNNAttribution(model, "relu3", n_features=12).fit(digits.train_images, target=7)
many.explain(sevens, target=7).show(0, largest=4)

# %%
# Figures that compose
# --------------------
# ``axes=`` draws an explanation in place of your own axes, or fills a subfigure.

from matplotlib import pyplot as plt

figure, places = plt.subplots(3, 1, figsize=(12, 7.5), layout="constrained")
for i, place in enumerate(places):
    why.show(i, axes=place)
figure

# %%
# ``show_contributions`` draws only the sum, on the axes themselves:

from captum_xnn.plots import show_contributions

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
