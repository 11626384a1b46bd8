"""
In a Captum script you already have
===================================

You have a script that draws attributions with Captum. One changed line turns its map into a map for each x-feature,
with numbers that add up to the output.
"""

# %%
# The script
# ----------
# This is a usual script: a model, an image, Integrated Gradients, and Captum's own picture. Yours may use another
# class; keep it.

from captum.attr import IntegratedGradients, visualization

from captum_xnn.datasets import load_digits

digits = load_digits()
model = digits.trained_network(epochs=2)
x, target = digits.test_images[digits.test_labels == 3][:4], 3

attribution = IntegratedGradients(model)
maps = attribution.attribute(x, target=target, n_steps=32)
print(tuple(maps.shape))


def captum_picture(attributions, image):
    figure, _ = visualization.visualize_image_attr(
        attributions.permute(1, 2, 0).numpy(),
        image.permute(1, 2, 0).numpy(),
        "heat_map",
        "all",
        use_pyplot=False,
    )
    figure.set_size_inches(2.4, 2.4)
    return figure


captum_picture(maps[0], x[0])

# %%
# The change
# ----------
# Replace the construction. Name a layer, give data to learn x-features from, and pass your Captum class as the heatmap.
# The call of ``attribute`` stays as it is, with its own arguments.

from captum_xnn import XNNAttribution

attribution = XNNAttribution(
    model,
    "relu3",
    n_features=4,
    train_data=digits.train_images,
    heatmap=IntegratedGradients,
)
maps = attribution.attribute(x, target=target, n_steps=32)
print(tuple(maps.shape), "one map for each x-feature")

# %%
# Pass one x-feature to the tools that expect the shape of the input:

one = attribution.attribute(x, target=target, feature=0, n_steps=32)
captum_picture(one[0], x[0])

# %%
# Nothing is lost: with Integrated Gradients the maps of the x-features sum to the map that you had.

import torch

before = IntegratedGradients(model).attribute(x, target=target, n_steps=32)
print(float((maps.sum(1) - before).abs().max()))
assert torch.allclose(maps.sum(1), before, atol=1e-4)

# %%
# What you gain
# -------------
# Each x-feature has a contribution in logits. Bias and contributions sum to the output; Captum's convergence delta is
# the part that they miss.

why = attribution.explain(x, target=target)
print(why.describe(0))
maps, delta = attribution.attribute(x, target=target, return_convergence_delta=True)
print("delta:", [f"{value:+.4f}" for value in delta.tolist()])
why.show(0, target_name="a three")

# %%
# Your other tools
# ----------------
# ``NoiseTunnel``, ``captum.metrics`` and ``visualization`` take ``XNNAttribution`` as one of Captum's own classes.

from captum.metrics import infidelity


def noisy(inputs):
    noise = 0.02 * torch.randn_like(inputs)
    return noise, inputs - noise


torch.manual_seed(0)
print(
    [
        f"{value:.1e}"
        for value in infidelity(model, noisy, x, one, target=target).tolist()
    ]
)

# %%
# :doc:`/captum_users` lists every argument, every backend, and Captum's errors with their causes.
