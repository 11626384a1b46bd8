"""The real birds: images, labels and a trained network in the official CUB-200-2011 layout, for benchmarks only."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from captum_xnn.activations import collect

LAYER = "relu6"


def network(data: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns the trained network with the mean and standard deviation (3, 1, 1) of its inputs."""
    spec = importlib.util.spec_from_file_location("cubnet", data / "cubnet" / "cubnet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(), torch.tensor(module.MEAN)[:, None, None], torch.tensor(module.STD)[:, None, None]


def _column(path: Path) -> dict[int, str]:
    return {int(key): value for key, value in (line.split(maxsplit=1) for line in path.read_text().splitlines())}


class BirdImages(Dataset[tuple[Tensor, int]]):
    """Normalised images (3, 227, 227) and 0-based labels, in the order of images.txt."""

    def __init__(self, data: Path, mean: Tensor, std: Tensor) -> None:
        root = data / "cub_200_2011_even"
        names, labels = _column(root / "images.txt"), _column(root / "image_class_labels.txt")
        self.paths = [root / "images" / name for name in names.values()]
        self.labels = [int(labels[key]) - 1 for key in names]
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = np.array(Image.open(self.paths[index]).convert("RGB"))
        image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        return (image - self.mean) / self.std, self.labels[index]


class Birds(NamedTuple):
    """Activations and outputs of the network on all images."""

    Z: Tensor
    y_hat: Tensor
    labels: Tensor

    @classmethod
    def read(cls, data: Path, cache: Path | None = None) -> Birds:
        """Returns all activations of the layer, from one pass over the images (minutes on two cores) or a cache."""
        if cache is not None and cache.exists():
            return cls(**torch.load(cache, weights_only=True))
        model, mean, std = network(data)
        images = BirdImages(data, mean, std)
        found = collect(model, LAYER, DataLoader(images, batch_size=32), progress=True)
        birds = cls(found.Z, found.y_hat, torch.tensor(images.labels))
        if cache is not None:
            torch.save(birds._asdict(), cache)
        return birds
