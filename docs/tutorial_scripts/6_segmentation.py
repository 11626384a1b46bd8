"""
Segmentation and other outputs
==============================

Your model does not return one number for each class: it returns a mask, a dict, or several tensors. This tutorial shows
how to name the number that you want explained.
"""

# %%
# A segmentation network
# ----------------------
# Use your own here. This network colours each pixel of a drawn figure by its part. Its output is (N, 7, H, W): six
# parts and the background.

import torch
from torch import nn

from captum_xnn.datasets import Figures

drawn = Figures.draw(360)
images, masks = drawn.images, drawn.masks
labels = torch.where(masks.any(1), masks.int().argmax(1), len(Figures.PARTS))

torch.manual_seed(0)
model = nn.Sequential()
for name, module in {
    "conv1": nn.Conv2d(3, 16, 3, padding=1, stride=2),
    "relu1": nn.ReLU(),
    "conv2": nn.Conv2d(16, 32, 3, padding=1, stride=2),
    "relu2": nn.ReLU(),
    "conv3": nn.Conv2d(32, 32, 3, padding=2, dilation=2),
    "relu3": nn.ReLU(),
    "head": nn.Conv2d(32, len(Figures.PARTS) + 1, 3, padding=1),
    "enlarge": nn.Upsample(scale_factor=4, mode="bilinear"),
}.items():
    model.add_module(name, module)
optimiser = torch.optim.Adam(model.parameters(), 5e-3)
for _ in range(18):
    for rows in torch.randperm(300).split(30):
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
with torch.no_grad():
    predicted = model(images).argmax(1)
wing = Figures.PARTS.index("wing")
overlap = ((predicted == wing) & masks[:, wing])[300:].sum() / (
    (predicted == wing) | masks[:, wing]
)[300:].sum()
print(f"intersection over union of the wing: {overlap:.2f}")

# %%
# One pixel
# ---------
# A tuple names one number of the output: class, row and column, as everywhere in Captum. Every example counts alike.

from captum_xnn import XNNAttribution

everything = torch.ones(300, dtype=torch.bool)
pixel = XNNAttribution(model, "relu3", n_features=3).fit(
    images[:300], target=(wing, 14, 24), positives=everything
)
print(pixel.score(images[300:], target=(wing, 14, 24)))

# %%
# One object
# ----------
# More often you ask: why is there a wing at all? Turn the output into one number for each class by
# ``prediction_transform``. Here it is the mean logit of the 50 pixels that look most like the class.


def of_objects(output):
    """Turn (N, C, H, W) into the mean logit of the 50 strongest pixels of each class, (N, C)."""
    return output.flatten(2).topk(50).values.mean(2)


xnn = XNNAttribution(model, "relu3", n_features=3, prediction_transform=of_objects)
xnn.fit(images[:300], target=wing, positives=everything)
print(xnn.score(images[300:], target=wing))

some = images[300:][(predicted == wing)[300:].flatten(1).any(1)][:4]
why = xnn.explain(some, target=wing, one_heatmap=True)
print(why.sentence(target_name="A wing"))
why.gallery(mean=0, std=1)

# %%
# Other outputs
# -------------
# .. list-table::
#    :header-rows: 1
#    :widths: 34 66
#
#    * - your model returns
#      - write
#    * - a dict or dataclass with ``logits``
#      - ``prediction_transform=lambda output: output["logits"]``
#    * - a tuple, such as (logits, features)
#      - ``prediction_transform=lambda output: output[0]``
#    * - one number
#      - leave ``target`` out (:ref:`sphx_glr_tutorials_4_table.py`)
#    * - boxes and scores of a detector
#      - a module that returns the scores of fixed anchors, before any selection: a selection has no gradient
#    * - an embedding to compare with another
#      - a module that returns the similarity to the one you ask about
#
# Give ``positives`` where outputs are no classes. All True counts every example alike.
#
# The number must not jump when the layer's output changes a little. The mean over the pixels that the model *assigns*
# to the wing jumps with every pixel that changes sides, and the integral then misses the output; ``fit`` warns of it.
# The mean over the strongest pixels does not jump.
#
# If the layer returns a tuple or dict, ``output_transform=`` picks the tensor.

# %%
# A model that returns a dict, for example:


class Named(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return {"logits": of_objects(self.model(images)), "mask": None}


named = XNNAttribution(
    Named(model), "model.relu3", 3, prediction_transform=lambda output: output["logits"]
)
named.fit(images[:100], target=wing, positives=everything[:100])
print(named.score(images[300:], target=wing))
