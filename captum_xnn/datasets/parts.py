"""The sample of a data set with annotated parts: an image, its class, where its parts are, and its box.

Conventions:
    N images (3, H, W), P parts. Coordinates are x, y in pixels from the upper left corner of the image, so that the
    centre of the first pixel is at (0.5, 0.5); they scale with the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PartsSample", "collate", "resized"]


class PartsSample(NamedTuple):
    """One image with its annotations, or, from :func:`collate`, several along a first dimension N."""

    image: Tensor
    """(3, H, W) in [0, 1], or what the data set's transform makes of it."""
    label: Tensor
    """0-based class, int64, ()."""
    points: Tensor
    """Parts (P, 2), x and y in pixels, NaN where invisible."""
    box: Tensor
    """(4,), x0, y0, x1, y1 in pixels."""
    number: Tensor
    """Number of the image in its data set, which has its name, int64, ()."""


def collate(samples: Sequence[PartsSample]) -> PartsSample:
    """Returns samples as one with a first dimension N; to be a DataLoader's ``collate_fn``.

    Args:
        samples: With images of one size.

    Raises:
        ValueError: If images differ in size.

    Example:
        >>> one = PartsSample(torch.zeros(3, 4, 4), torch.tensor(7), torch.zeros(2, 2), torch.zeros(4), torch.tensor(0))
        >>> collate([one, one]).image.shape, collate([one, one]).label
        (torch.Size([2, 3, 4, 4]), tensor([7, 7]))
    """
    sizes = {tuple(s.image.shape) for s in samples}
    if len(sizes) > 1:
        raise ValueError(f"expected images of one size, got {sorted(sizes)}; pass size=(H, W) to the data set")
    return PartsSample(*(torch.stack(values) for values in zip(*samples, strict=True)))


def resized(sample: PartsSample, size: tuple[int, int]) -> PartsSample:
    """Returns a sample in another size, squashed if need be: the image bilinearly, with points and box.

    Args:
        sample: With an image (C, H, W).
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
