"""A model whose outputs can be computed by hand, and images for it, as files in a folder."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Every channel of the layers is positive and linear in the image's, so that logits are a matrix times mean pixels.
NET = """
import torch
from torch import nn

MEAN, STD, SIZE, CLASSES = (-0.1, 0.0, -0.1), (0.5, 0.25, 0.2), 6, ("red", "green", "blue")
FIRST = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]
LAST = [[1.0, 0.0, 0.0, 0.0, -0.5, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, -0.5], [0.0, 0.0, 1.0, -0.5, 0.0, 0.0]]


def load():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(FIRST)[:, :, None, None])
        net[0].bias.zero_()
        net[4].weight.copy_(torch.tensor(LAST))
        net[4].bias.zero_()
    return net
"""
MEAN, STD = np.array([-0.1, 0.0, -0.1]), np.array([0.5, 0.25, 0.2])
# LAST times FIRST.
MIXED = np.array([[1, -0.25, -0.25], [-0.25, 1, -0.25], [-0.25, -0.25, 1]])


def pixels(seed):
    """Returns an image (6, 6, 3) in which one channel is likely the brightest to the model."""
    generator = np.random.default_rng(seed)
    level = MEAN + STD * generator.uniform(1, 2, 3)
    level[seed % 3] += 0.8 * STD[seed % 3]
    return (255 * (level + generator.normal(0, 0.1, (6, 6, 3))).clip(0, 1)).astype(np.uint8)


def logits(seed):
    """Returns what the model gives for an image, (3,)."""
    return MIXED @ ((pixels(seed) / 255 - MEAN) / STD).mean((0, 1))


def write(folder, count=60, first=0):
    """Returns a folder with the model in net.py and images/, of which image n is made from seed n."""
    (folder / "net.py").write_text(NET)
    for seed in range(first, first + count):
        place = folder / "images" / ("even" if seed % 2 == 0 else "odd")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed)).save(place / f"{seed:03d}.png")
    return folder


def seed_of(name):
    """Returns the seed of an image by its name."""
    return int(name.rpartition("/")[2].removesuffix(".png"))
