"""
Other heatmaps: any of Captum's methods
=======================================

x-features and contributions come from the explainer. Maps come from a backend, and any Captum class can be the
backend. This page draws the same explanation by several backends. :doc:`/captum_users` compares their uses and
errors.
"""

from captum.attr import DeepLift, IntegratedGradients, LayerGradCam, NoiseTunnel, Occlusion, Saliency

from captum_xnn import XNNAttribution
from captum_xnn.cli.demo import train_cnn
from captum_xnn.datasets import load_digits
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.plots import own_scale

digits = load_digits()
model = train_cnn(digits.train_images, digits.train_labels, epochs=2)
xnn = XNNAttribution(model, "relu3").fit(digits.train_images, target=3)
three = digits.test_images[digits.test_labels == 3][:1]


def shown(name, heatmap):
    why = xnn.with_heatmap(heatmap).explain(three, target=3, one_heatmap=True)
    return why.show(0, title=name, scale=own_scale)


# %%
# The default
# -----------
# The default is contrastive excitation backprop. Its maps show the evidence for an x-feature rather than for its
# opposite. The maps are never negative. An x-feature with a negative contribution has a blue map.

shown("Excitation backprop", None)

# %%
# Gradients along a path
# ----------------------
# Pass settings of a method to :class:`~captum_xnn.heatmaps.FromCaptum`. The maps are signed. The maps of all x-features
# add up to the map of the output, place by place, relative to a baseline. The baseline here is a black image.

shown("Integrated Gradients", FromCaptum(IntegratedGradients, n_steps=32))

# %%
# Differences from a reference
# ----------------------------
# Without settings, pass the class itself.

shown("DeepLift", DeepLift)

# %%
# The effect of covering a region
# -------------------------------

shown("Occlusion", FromCaptum(Occlusion, sliding_window_shapes=(1, 7, 7), strides=(1, 3, 3)))

# %%
# A layer's own map
# -----------------
# Coarse maps are enlarged to the image.

shown("Grad-CAM at relu2", FromCaptum(LayerGradCam, layer="relu2"))

# %%
# Any of them, averaged over noise
# --------------------------------

shown("Saliency, averaged", FromCaptum(NoiseTunnel, attribution_method=Saliency, nt_samples=16, stdevs=0.2))

# %%
# One x-feature in Captum's own pictures
# --------------------------------------
# ``feature=`` gives the map of one x-feature in the shape of the input. All of Captum's tools for attributions take it.

from captum.attr import visualization

maps = xnn.attribute(three, target=3, feature=0)
figure, _ = visualization.visualize_image_attr(
    maps[0].permute(1, 2, 0).numpy(),
    three[0].permute(1, 2, 0).numpy(),
    method="blended_heat_map",
    use_pyplot=False,
)
figure
