"""
The same on the command line
============================

You prefer a terminal. This tutorial fits, measures and explains a model of your own by commands, from a folder of
images to a report, without writing a script.
"""

# %%
# Your model in a file
# --------------------
# A fine-tuned model of torchvision needs no file of its own, only its weights: ``torch.save(net.state_dict(),
# "weights.pt")``. In ``layers`` and ``fit`` below, write ``--torchvision resnet18 --classes images/train --weights
# weights.pt --size 224`` in place of ``--model net.py``, and continue at "Choose the layer". The sub-folders of
# ``images/train`` are its classes.
#
# For any other model, write a Python file with a function ``load()``. It also says how you normalise images. Below, a
# cell of Python writes the file, the weights and a folder of images. Skip it if you have yours. The images are those of
# :ref:`sphx_glr_tutorials_1_your_resnet.py`, the model is small.

import os
import runpy
import tempfile
from pathlib import Path

import torch
from PIL import Image

from captum_xnn.datasets import Figures

folder = Path(tempfile.mkdtemp())
code = """
from pathlib import Path

import torch
from torch import nn

MEAN, STD, SIZE = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 48
CLASSES = ("ember", "lagoon", "thistle")


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 81, 64), nn.ReLU(), nn.Linear(64, 3),
    )


def load():
    net = network()
    net.load_state_dict(torch.load(Path(__file__).with_name("weights.pt"), weights_only=True))
    return net
"""
(folder / "net.py").write_text(code)
print(code)

# %%

net = runpy.run_path(str(folder / "net.py"))
looks = (
    {"head": "plain orange", "belly": "striped orange"},
    {"head": "plain blue", "belly": "plain blue"},
    {"head": "striped blue", "wing": "striped blue"},
)
train, test = (
    Figures.draw(n, seed=n, reasons=looks, members=1, near_misses=0) for n in (500, 12)
)
for part, drawn in (("train", train), ("test", test)):
    for i, (image, label) in enumerate(
        zip(drawn.images, drawn.labels.tolist(), strict=True)
    ):
        path = folder / "images" / part / net["CLASSES"][label] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image.permute(1, 2, 0)).byte().numpy()).save(path)

torch.manual_seed(0)
model = net["network"]()
optimiser = torch.optim.Adam(model.parameters(), 2e-3)
for _ in range(10):
    for rows in torch.randperm(len(train.labels)).split(32):
        loss = torch.nn.functional.cross_entropy(
            model((train.images[rows] - 0.5) / 0.25), train.labels[rows]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
torch.save(model.state_dict(), folder / "weights.pt")

# %%
# From here on, type each line after ``$`` into your terminal. This page runs the commands in the same way:

import shlex

from captum_xnn.__main__ import main


def terminal(command):
    print(f"$ {command}")
    os.chdir(folder)
    assert main(shlex.split(command)[1:]) == 0


# %%
# Choose the layer
# ----------------
# ``layers`` lists the layers of your model and marks those to explain first.

terminal("captum-xnn layers --model net.py")

# %%
# Fit
# ---
# ``fit`` learns x-features of the classes that you name, and writes them to a folder. ``--target`` takes names from
# ``CLASSES`` or numbers from 0; ``--target all`` takes every class. No labels are used. The table counts the images that
# the model gives to the class: its *positives*.

terminal(
    "captum-xnn fit --model net.py --layer 4 --n-features 3 --data images/train --target ember --out explainers"
)

# %%
# Measure
# -------
# ``evaluate`` measures on images that the fit has not seen. F_reg is the mean difference between the model's output and
# the sum of bias and contributions, in logits; F_cls is the share of images whose class the sum does not change. The
# patches tell whether maps are true: compare ``agreement`` with its controls (:doc:`/read_metrics`).

terminal("captum-xnn evaluate --explainer explainers --data images/test --patches 4")

# %%
# Explain
# -------
# ``explain`` writes a picture, the maps and the numbers of each image.

terminal("captum-xnn explain --explainer explainers --data images/test/ember --out why")
print(
    *sorted(str(path.relative_to(folder)) for path in (folder / "why").rglob("*.*")),
    sep="\n",
)

# %%

from matplotlib import pyplot as plt

figure = plt.figure(figsize=(11, 3.2))
axes = figure.add_axes((0, 0, 1, 1))
axes.imshow(plt.imread(sorted((folder / "why" / "pictures").glob("*.png"))[0]))
axes.axis("off")
figure

# %%
# Report
# ------
# ``report`` writes one HTML page that opens anywhere, without a network connection. Print it, or save it as PDF, from the
# browser. ``--patches`` adds the check of the maps. Names that a reader types into the page are downloaded as a file:
# pass it to ``explain`` and to the next ``report`` by ``--names names.json``.

terminal(
    "captum-xnn report --explainer explainers --data images/test --title 'Why an ember?' --out report.html"
)

# %%
# :doc:`/command_line` describes every option, settings in a file, and how to resume an interrupted fit.
