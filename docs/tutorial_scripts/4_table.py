"""
A tabular regression
====================

You have a table, and a network that predicts a number from a row. This tutorial explains the number: which groups of
columns push it up or down, and by how much, in the number's own unit.
"""

# %%
# The table
# ---------
# Use your own table here. This one is made: houses with eight columns, and a price in thousands. Size and rooms go
# together; distance and noise lower the price; a garden counts only outside the centre. A network learns better from
# columns with mean 0 and standard deviation 1, so ``mean`` and ``std`` turn the table into these numbers and back.

import torch
from torch import nn

columns = (
    "size (m²)",
    "rooms",
    "age (years)",
    "repairs",
    "distance (km)",
    "noise (dB)",
    "garden",
    "floor",
)
mean = torch.tensor([95.0, 3.5, 40.0, 3.0, 9.0, 55.0, 0.5, 2.0])
std = torch.tensor([22.0, 1.0, 12.0, 1.0, 3.0, 6.0, 0.5, 0.7])
torch.manual_seed(0)
raw = torch.randn(1500, 8)
raw[:, 1] = 0.8 * raw[:, 0] + 0.6 * raw[:, 1]
raw[:, 6] = torch.where(raw[:, 6] > 0, 1.0, -1.0)
size, rooms, age, repairs, distance, noise, garden, floor = raw.T
price = (
    300
    + 60 * size
    + 15 * rooms
    - 25 * age.relu() * (repairs < 0)
    - 30 * distance
    - 15 * noise.relu()
)
price = price + 40 * (garden > 0) * (distance > 0) + 5 * torch.randn(len(raw))
x, x_test, y, y_test = raw[:1200], raw[1200:], price[:1200], price[1200:]

# %%
# The model
# ---------
# The model predicts the price itself, in thousands: its output is one number.


class Prices(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()
        )
        self.head = nn.Linear(32, 1)

    def forward(self, rows):
        return 300 + 100 * self.head(self.hidden(rows))


model = Prices()
optimiser = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(60):
    for rows in torch.randperm(len(x)).split(64):
        loss = nn.functional.mse_loss(model(x[rows])[:, 0] / 100, y[rows] / 100)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
with torch.no_grad():
    error = (model(x_test)[:, 0] - y_test).abs().mean()
print(f"mean error {error:.0f}, standard deviation of prices {y_test.std():.0f}")

# %%
# Fit and explain
# ---------------
# A model with one output needs no target. A price has no classes, so every example counts alike: say so by
# ``positives``. Leave ``positives`` out if the output is a logit, such as that of a risk: its positives are above 0.
# Any hidden layer after its ReLU will do, here the first. The maps have a number for each column. Integrated Gradients
# compares a row with a baseline, here the mean house.

from captum.attr import IntegratedGradients

from captum_xnn import XNNAttribution
from captum_xnn.heatmaps import FromCaptum

against_mean = FromCaptum(
    IntegratedGradients, baselines=x.mean(0, keepdim=True), n_steps=32
)
xnn = XNNAttribution(model, layer="hidden.1", n_features=4, heatmap=against_mean)
xnn.fit(x, positives=torch.ones(len(x), dtype=torch.bool))
print(xnn.score(x_test))

why = xnn.explain(x_test[:200])
print(why.describe(0))

# %%
# F_reg and all contributions are in thousands, the unit of the price. F_cls is None, because there are no classes.
#
# The columns of each x-feature
# -----------------------------
# The figure shows how far each column moves each x-feature, on average over 200 houses.

from matplotlib import pyplot as plt

strength = why.maps.abs().mean(0)
figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
picture = axes.imshow(strength, cmap="Oranges")
axes.set_xticks(range(8), columns)
axes.set_yticks(
    range(len(strength)), [f"x-feature {k + 1}" for k in range(len(strength))]
)
figure.colorbar(picture, label="thousands")
figure

# %%
# Name each x-feature by its two strongest columns.

short = [name.split(" (")[0] for name in columns]
names = [" & ".join(short[i] for i in row.topk(2).indices) for row in strength]
print(names)

# %%
# One house
# ---------
# The sum begins at the bias, the price at the mean activation, and ends at the prediction. ``why.contributions`` holds the
# numbers of all houses, (N, K), for your own tables and plots.

print(why.sentence(names=names, target_name="a high price"))
why.show(0, names=names, title="Why this price?", unit="thousands")

# %%
# Report
# ------
# Write one HTML page for readers who do not program. With ``patches=10`` the page also checks the maps: it sets one
# column after the other of ten houses to its mean, and compares the loss of each x-feature with its map. ``display``
# turns the rows back into values that a reader knows. ``unit`` is the unit of the output: with ``unit="log-odds"``, the
# logit of a risk also stands as a probability. A printed page holds three rows. The cards
# are about ``data``, and say whether higher values of a column raise or lower the output.

import tempfile
from pathlib import Path

report = xnn.report(
    x_test[:12],
    Path(tempfile.mkdtemp()) / "table.html",
    data=x_test,
    input_names=columns,
    display=lambda rows: rows * std + mean,
    class_names=["a high price"],
    names={None: names},
    patches=10,
    unit="thousands",
    title="Why this price?",
)
report
