"""
A vision transformer
====================

You have a vision transformer. Its layers hold tokens, not feature maps. This tutorial explains it from its last layer
with places, and lays the tokens out as a grid, so that the maps are images again.
"""

# %%
# The images and the model
# ------------------------
# Use your own here. The drawings stand for photographs of three invented birds. The model is torchvision's
# ``VisionTransformer``, small enough to train in seconds; ``vit_b_16`` has the same names of layers.

import torch
from torch import nn
from torchvision.models import VisionTransformer

from captum_xnn.datasets import Figures

birds = ("ember", "lagoon", "thistle")
looks = (
    {"head": "plain orange", "belly": "plain orange"},
    {"head": "plain blue", "belly": "plain blue"},
    {"head": "striped blue", "belly": "striped orange"},
)
drawn = Figures.draw(800, reasons=looks, members=1, near_misses=0)
mean, std = 0.5, 0.25
images, labels = (drawn.images - mean) / std, drawn.labels

torch.manual_seed(0)
model = VisionTransformer(
    image_size=48,
    patch_size=6,
    num_layers=2,
    num_heads=4,
    hidden_dim=64,
    mlp_dim=128,
    num_classes=len(birds),
)
nn.init.xavier_uniform_(model.heads.head.weight)  # torchvision starts the head at zero
epochs, count = 8, 640
optimiser = torch.optim.Adam(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimiser, 3e-3, total_steps=epochs * count // 32
)
for _ in range(epochs):
    for rows in torch.randperm(count).split(32):
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

model.eval()
with torch.no_grad():
    predicted = model(images).argmax(1)
correct = (predicted == labels)[count:].float().mean()
print(f"{correct:.1%} of the test images are classified correctly")

# %%
# Choose the layer
# ----------------
# The classifier reads only the class token of the last block. So the last layer in which the places of the image still
# decide is the block before: its tokens go through the attention of the last block into the class token. In a
# ``vit_b_16`` that is ``encoder.layers.encoder_layer_10``.
#
# Fit
# ---
# Tokens (N, T, D) are grouped by dimension D. The maps are drawn at the same layer. ``tokens="vit"`` says which tokens
# are which cells of the image; the grid is read from the patch embedding.

from captum.attr import LayerGradientXActivation

from captum_xnn import XNNAttribution
from captum_xnn.heatmaps import FromCaptum

layer = "encoder.layers.encoder_layer_0"
on_grid = FromCaptum(LayerGradientXActivation, layer=layer, tokens="vit")
xnn = XNNAttribution(model, layer, n_features=3, heatmap=on_grid).fit(
    images[:count], target=0
)
print(xnn.score(images[count:], target=0))

# %%
# Explain
# -------
# The maps have the size of the image, and pictures, galleries and reports work as for a convolutional network.

embers = images[count:][predicted[count:] == 0][:4]
why = xnn.explain(embers, target=0, one_heatmap=True)
print(tuple(why.maps.shape))
print(why.sentence(target_name="Ember"))
why.gallery(mean=mean, std=std)

# %%
# Other models with tokens
# ------------------------
# - Swin: ``tokens="swin"``; its feature maps are channels last.
# - A text transformer: ``tokens="sequence"``, see :ref:`sphx_glr_tutorials_3_text_classifier.py`.
# - A model that cuts its patches by a reshape: pass ``grid=(height, width)`` beside ``tokens="vit"``.
# - A model that returns a dict or a dataclass: ``prediction_transform=lambda output: output["logits"]``.
#
# :doc:`/models_that_need_care` lists more.
