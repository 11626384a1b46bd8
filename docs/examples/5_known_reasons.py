"""
Figures with known reasons
==========================

Does an explanation find the reasons? Photographs cannot answer this, because their reasons are unknown. In the drawn
figures of :mod:`captum_xnn.datasets` a class *is* the looks of two or three parts, and the masks of all
parts are known.
"""

from dataclasses import replace

import numpy as np
import torch

from captum_xnn import XNNAttribution
from captum_xnn.datasets import Figures

figures = Figures.draw(2500)
parts = figures.reason_parts(0)
for part in parts:
    print(f"class 0 needs the {Figures.PARTS[part]} {Figures.LOOKS[figures.reasons[0, part]]}")

# %%
# The figure shows six members of class 0, with the masks of its reasons. Crest, foot and tail can have any look or be
# absent.

from matplotlib import pyplot as plt

test = Figures.draw(400, seed=1)
members = (test.labels == 0).nonzero()[:6, 0]
figure, axes = plt.subplots(2, 6, figsize=(11, 3.8), layout="constrained")
for (image, mask), row in zip(axes.T, members, strict=True):
    image.imshow(test.images[row].permute(1, 2, 0))
    mask.imshow((test.masks[row, parts] * torch.arange(1, 4)[:, None, None]).sum(0), cmap="viridis")
    image.set(xticks=[], yticks=[])
    mask.set(xticks=[], yticks=[])
figure

# %%
# A network with a known inside
# -----------------------------
# This network is set by hand. Its layer ``Z`` has a unit for each look of each part. The output of a class is the
# number of its visible reasons, less two and a half. The fit groups the units of Z into at most three x-features. It
# knows nothing about the reasons.

exact = figures.exact_network()
xnn = XNNAttribution(exact, "Z", n_features=3).fit(figures.images[:1200], target=0)
print(xnn.score(test.images, target=0))
why = xnn.explain(test.images[members], target=0, one_heatmap=True)
why.gallery(range(3))


# %%
# How much of each map lies on each reason? If an x-feature is one reason, its row has a single large number.


def on_reasons(why, rows):
    maps = why.maps.sum(2).clamp(min=0)
    masks = test.masks[rows][:, parts].float()
    return torch.einsum("nkhw,nrhw->nkr", maps, masks).mean(0) / maps.sum((2, 3)).mean(0)[:, None]


def table(shares):
    figure, axes = plt.subplots(figsize=(4, 2.6), layout="constrained")
    axes.imshow(shares, cmap="Oranges", vmin=0, vmax=1)
    axes.set_xticks(range(len(parts)), [Figures.PARTS[p] for p in parts])
    axes.set_yticks(range(len(shares)), [f"x-feature {k + 1}" for k in range(len(shares))])
    for (k, r), share in np.ndenumerate(shares):
        axes.text(r, k, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.6 else "black")
    return figure


table(on_reasons(why, members).numpy())

# %%
# A network that learned
# ----------------------
# This network learned from labels, and its inside is unknown. It takes normalised images; ``mean`` and ``std``
# restore their colours in the pictures. Without the two, the range of each image is stretched. That is right only for
# images with both black and white in them.

mean, std = 0.475, 0.25
cnn = replace(figures, images=(figures.images - mean) / std).trained_network(epochs=5)
learned = XNNAttribution(cnn, "relu4", n_features=3).fit((figures.images - mean) / std, target=0)
normalised = (test.images[members] - mean) / std
why = learned.explain(normalised, target=0, one_heatmap=True)
why.show(0, mean=mean, std=std, target_name="class 0")

# %%
# Its x-features need not be the reasons one by one. The table shows how closely they match.

table(on_reasons(why, members).numpy())

# %%
print(learned.score((test.images - mean) / std, target=0))
for sentence in why.sentences(target_names=[f"class {c}" for c in range(6)] + ["none of them"]):
    print(sentence)
