"""
Names and the sentence
======================

x-features have no names until you name them. This page names the x-features of the digit 7 and uses the names in
sentences.
"""

import torch

from captum_xnn import ConvSRAE, Recipe, XNNAttribution
from captum_xnn.datasets import load_digits

digits = load_digits()
model = digits.trained_network(epochs=2)
xnn = XNNAttribution(model, "relu3").fit(digits.train_images, target=7)
sevens = digits.test_images[digits.test_labels == 7][:6]
why = xnn.explain(sevens, target=7)

# %%
# Look down the columns
# ---------------------
# Each column shows one x-feature. ``feature_order`` keeps the explainer's order; lists of names have the same order.

why.gallery(feature_order=range(why.features.shape[1]))

# %%
# Give names
# ----------
# Give names as a list in that order; the list may be shorter. Or give names by number, counted from 0. x-features
# without a name keep their number, counted from 1. People name x-features after a look at them. The code of this page
# names three of them by the average place of their maps.


def place(heatmap):
    y, x = (float((heatmap.sum(1 - d) * torch.arange(28.0)).sum() / heatmap.sum()) for d in (0, 1))
    return f"{('top', 'middle', 'bottom')[int(y >= 12) + int(y >= 16)]} {'left' if x < 14 else 'right'}"


mean = why.maps.mean((0, 2))
names = {k: f"{place(mean[k])} stroke" for k in range(3)}
print(names)
print(why.sentence(names=names, target_name="seven"))

# %%
# Names in pictures
# -----------------

why.show(0, names=names, target_name="a seven")

# %%
# x-features in the sentence
# --------------------------
# The sentence names the largest x-features, until they reach ``share`` of all evidence for the output, by default
# 0.9. It names the evidence against the output where this evidence is more than the rest.

for share in (0.5, 0.9, 1.0):
    print(f"{share}: {why.sentence(names=names, target_name='seven', share=share)}")

# %%
# One sentence for each example, with the names of the outputs:

words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
for sentence in why.sentences(names, target_names=words):
    print(sentence)

# %%
# The unexplained part
# --------------------
# By default x-features miss only the error of an integral. The paper's learned form imitates the network, and at an
# early layer a few x-features cannot explain the whole output. The sentence states the unexplained part where it is
# more than ``unexplained_share`` of the contributions, by default 0.1.

early = XNNAttribution(model, "pool2", autoencoder=ConvSRAE, recipe=Recipe(steps=200))
early.fit(digits.train_images, target=7)
for sentence in early.explain(sevens, target=7).sentences(target_names=words):
    print(sentence)

# %%
# Keep the names
# --------------
# ``write_names`` writes the same file that a report's page exports. Wherever you can pass names, you can pass its
# path. The file belongs to a layer and a target; with another layer or target it raises an error.

import tempfile
from pathlib import Path

from captum_xnn.plots import write_names

with tempfile.TemporaryDirectory() as folder:
    file = write_names(Path(folder) / "names.json", {7: names}, layer="relu3")
    print(file.read_text())
    figure = why.gallery([0, 1], names=file)
figure
