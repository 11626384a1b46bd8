"""The sample of a data set with annotated parts: an image, its class, the places of its parts, and its box.

Conventions:
    N images (3, H, W), P parts. Coordinates are x, y in pixels from the upper left corner of the image, so the centre
    of the first pixel is at (0.5, 0.5). They scale with the image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PartsSample", "resized"]


class PartsSample(NamedTuple):
    """One image with its annotations, or several along a first dimension N, joined by a DataLoader."""

    image: Tensor
    """(3, H, W) in [0, 1], or the result of the data set's transform."""
    label: Tensor
    """0-based class, int64, ()."""
    points: Tensor
    """Parts (P, 2), x and y in pixels, NaN where invisible."""
    box: Tensor
    """(4,), x0, y0, x1, y1 in pixels."""
    number: Tensor
    """Row of the image in its data set, int64, (); ``names`` there has its file."""


def resized(sample: PartsSample, size: tuple[int, int]) -> PartsSample:
    """Resize a sample with its points and box, stretching the image bilinearly if the aspect ratio changes.

    Args:
        sample: A sample with an image (C, H, W).
        size: New height and width in pixels.

    Example:
        >>> one = PartsSample(torch.zeros(3, 2, 4), torch.tensor(7), torch.tensor([[3.0, 1.0]]),
        ...                   torch.tensor([0.0, 0.0, 4.0, 2.0]), torch.tensor(0))
        >>> resized(one, (4, 4)).points, resized(one, (4, 4)).box
        (tensor([[3., 2.]]), tensor([0., 0., 4., 4.]))
    """
    height, width = sample.image.shape[1:]
    scale = torch.tensor([size[1] / width, size[0] / height])
    image = torch.nn.functional.interpolate(
        sample.image[None], size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    return sample._replace(image=image, points=sample.points * scale, box=sample.box * scale.repeat(2))
