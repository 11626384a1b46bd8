"""
Names and the sentence
======================

x-features have no names until someone looks at them. This page names those of the digit 7 and lets the names speak.
"""

import torch

from captum_xnn import ConvSRAE, Recipe, XNNAttribution
from captum_xnn.cli.demo import train_cnn
from captum_xnn.datasets.digits import load_digits

digits = load_digits()
model = train_cnn(digits.train_images, digits.train_labels, epochs=2)
xnn = XNNAttribution(model, "relu3").fit(digits.train_images, target=7)
sevens = digits.test_images[digits.test_labels == 7][:6]
why = xnn.explain(sevens, target=7)

# %%
# Look down the columns
# ---------------------
# A column is one x-feature. ``feature_order`` keeps the order of the explainer, in which names are given.

why.gallery(feature_order=range(why.features.shape[1]))

# %%
# Give names
# ----------
# As a list in that order, which may be shorter, or by number, counted from 0. x-features without a name keep their
# number, counted from 1. People name by looking; this page, which nobody looks at while it is built, names three of
# them by where their maps are on average.


def place(heatmap):
    y, x = (float((heatmap.sum(1 - d) * torch.arange(28.0)).sum() / heatmap.sum()) for d in (0, 1))
    return f"{('top', 'middle', 'bottom')[int(y >= 12) + int(y >= 16)]} {'left' if x < 14 else 'right'}"


mean = why.maps.mean((0, 2))
names = {k: f"{place(mean[k])} stroke" for k in range(3)}
print(names)
print(why.sentence(names, target_name="seven"))

# %%
# Names in pictures
# -----------------

why.show(0, names=names, target_name="a seven")

# %%
# Which x-features are said
# -------------------------
# The largest, until they reach ``share`` of all that speaks for the output, by default 0.9. What speaks against it is
# said where it is more than the rest.

for share in (0.5, 0.9, 1.0):
    print(f"{share}: {why.sentence(names, target_name='seven', share=share)}")

# %%
# One sentence for each example, with the names of the outputs:

words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
for sentence in why.sentences(names, target_names=words):
    print(sentence)

# %%
# What the x-features miss
# ------------------------
# By default x-features miss nothing but the error of an integral. The paper's learned form imitates the network, and at
# an early layer a few x-features cannot say everything. Where the residual is more than ``residual_share`` of the
# contributions, by default 0.1, the sentence says so.

early = XNNAttribution(model, "pool2", autoencoder=ConvSRAE, recipe=Recipe(steps=200))
early.fit(digits.train_images, target=7)
for sentence in early.explain(sevens, target=7).sentences(target_names=words):
    print(sentence)

# %%
# Keep the names
# --------------
# The file is the one that the page of a report exports, and everything that takes names takes its path. It belongs
# to a layer and a target; used with others it is an error.

import tempfile
from pathlib import Path

from captum_xnn.plots.names import write_names

with tempfile.TemporaryDirectory() as folder:
    file = write_names(Path(folder) / "names.json", {7: names}, layer="relu3")
    print(file.read_text())
    figure = why.gallery([0, 1], names=file)
figure
