"""
A table instead of images
=========================

An explanation network does not need images. Here a multilayer perceptron reads a table of 24 columns. There is a
column for each part of a drawn figure (:mod:`captum_xnn.datasets`) and each look: does the part have the
look? The classes are conjunctions of looks, so the true reasons are known.
"""

import torch
from torch import nn
from torch.nn import functional as F

from captum_xnn.datasets import LOOKS, PARTS, draw_figures


def table_of(figures):
    """Make a column for each look of each part, (N, 24). An invisible part has zeros."""
    return F.one_hot(figures.looks + 1, len(LOOKS) + 1)[:, :, 1:].flatten(1).float()


columns = [f"{part} {look}" for part in PARTS for look in LOOKS]
train, test = draw_figures(3000), draw_figures(500, seed=1)
x, x_test = table_of(train), table_of(test)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 7))
optimiser = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(12):
    for rows in torch.randperm(len(x)).split(64):
        loss = F.cross_entropy(model(x[rows]), train.labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
print(f"{(model(x_test).argmax(1) == test.labels).float().mean():.1%} of the test rows are classified correctly")

# %%
# Explain
# -------
# The maps have the shape of the input: a number for each column. Integrated Gradients compares with a row of zeros, a
# figure without visible parts.

from captum.attr import IntegratedGradients

from captum_xnn import XNNAttribution
from captum_xnn.heatmaps import FromCaptum

xnn = XNNAttribution(model, "3", n_features=3, heatmap=FromCaptum(IntegratedGradients, n_steps=32))
xnn.fit(x, target=0)
print(xnn.score(x_test, target=0))
members = x_test[test.labels == 0][:8]
why = xnn.explain(members, target=0)
print(why.maps.shape)

# %%
# The columns of each x-feature
# -----------------------------
# The figure shows the mean map of each x-feature over members of the class. The reasons of the class are the plain
# orange head, the striped orange wing and the plain orange belly.

from matplotlib import pyplot as plt

mean = why.directed_maps().mean(0)
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
limit = float(mean.abs().max())
axes.imshow(mean, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
axes.set_xticks(range(24), columns, rotation=60, ha="right", fontsize=8)
axes.set_yticks(range(3), [f"x-feature {k + 1}" for k in range(3)])
figure

# %%
# The waterfall
# -------------
# Without images, ``show`` draws only the sum: from the bias over each x-feature to the model's output. The column
# with the largest mean gives each x-feature its name.

names = [columns[k] for k in mean.argmax(1).tolist()]
print(why.sentence(names, target_name="class 0"))
why.show(0, names=names, title="Why class 0?")

# %%
# A near miss
# -----------
# This row lacks one reason of the class: its head has another look. If an x-feature stands for the head, it contributes
# nothing here, and the sum stays below the sum of a member.

lacking = (x_test[:, 4 * 1] == 0) & (x_test[:, 4 * 2 + 1] == 1) & (x_test[:, 4 * 3] == 1)
near = xnn.explain(x_test[lacking][:1], target=0)
print(near.sentence(names, target_name="class 0"))
near.show(0, names=names, title="A head of another look")
