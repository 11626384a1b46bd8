"""The grid over an image that a layer's output may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Cells", "has_channels_last", "is_grid"]


class Cells(NamedTuple):
    """Positions of the tokens that are the cells of an image."""

    height: int
    """Cells along the image's height."""
    width: int
    """Cells along its width."""
    tokens: Tensor
    """Position of each cell's token, row by row, (height * width,)."""


def is_grid(height: int, width: int, image: Tensor) -> bool:
    """Whether two dimensions of a layer's output are cells of an image, by their ratio.

    Args:
        height: Size of the first dimension.
        width: Size of the second.
        image: Images (N, C, H, W).

    Example:
        >>> import torch
        >>> is_grid(14, 14, torch.zeros(1, 3, 224, 224)), is_grid(14, 96, torch.zeros(1, 3, 224, 224))
        (True, False)
    """
    return min(height, width) > 1 and 0.8 <= (height / image.shape[2]) / (width / image.shape[3]) <= 1.25


def has_channels_last(shape: Sequence[int], image: Tensor | None) -> bool:
    """Whether a layer's output of this shape is (N, H, W, C), as in Swin and ConvNeXt, by the image's ratio.

    Args:
        shape: Shape of the layer's output.
        image: Images (N, C, H, W), or another input, or None.

    Example:
        >>> import torch
        >>> image = torch.zeros(1, 3, 224, 224)
        >>> has_channels_last((1, 7, 7, 768), image), has_channels_last((1, 768, 7, 7), image)
        (True, False)
    """
    if image is None or image.dim() != 4 or len(shape) != 4:
        return False
    return is_grid(shape[1], shape[2], image) and not is_grid(shape[2], shape[3], image)
