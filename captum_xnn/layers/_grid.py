"""The grid over an image that a layer's output may be.

The sizes alone are ambiguous: attention weights (N, heads, 196, 196) are as square as the image. :func:`is_over_image`
therefore changes one half of an image and looks for the places of the layer's output that move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Cells", "channels_by_numbers", "halves", "has_channels_last", "is_grid", "is_over_image"]

# Distance of the places that two halves of the image move, from 0 (the same places) to 1 (none in common), which tells.
_TELLING = 0.1


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


def channels_by_numbers(shape: Sequence[int], image: Tensor) -> int | None:
    """Find the dimension with channels from the sizes of a layer's output and of the image; None if both may hold them.

    Cells are as high as they are wide in pixels, up to one cell more or less at the borders.

    Args:
        shape: Shape of the layer's output, four dimensions.
        image: Images (N, C, H, W).

    Example:
        >>> import torch
        >>> image = torch.zeros(1, 3, 224, 224)
        >>> channels_by_numbers((1, 768, 7, 7), image), channels_by_numbers((1, 7, 7, 768), image)
        (1, 3)
        >>> channels_by_numbers((1, 8, 7, 7), image) is None
        True
    """
    first, last = (_may_be_cells(shape[i], shape[i + 1], image) for i in (2, 1))
    return None if first == last else 1 if first else 3


def _may_be_cells(height: int, width: int, image: Tensor) -> bool:
    """Whether square cells of some size in pixels would fill the image with this many rows and columns."""
    sides = ((image.shape[2], height), (image.shape[3], width))
    least = max(pixels / (cells + 1.5) for pixels, cells in sides)
    most = min(pixels / max(cells - 1.5, 0.5) for pixels, cells in sides)
    return least <= most


def halves(image: Tensor, channels: int = 1) -> Tensor:
    """Make noise like an image, and copies with new noise in the top, bottom, left and right half, (5, ...).

    Args:
        image: One image (1, C, H, W) or (1, H, W, C), of floating-point numbers or bytes.
        channels: The dimension with channels.

    Example:
        >>> made = halves(torch.rand(1, 1, 4, 4))
        >>> (made[1:] != made[:1])[:, 0].int().amax(2)  # the rows that move
        tensor([[1, 1, 0, 0],
                [0, 0, 1, 1],
                [1, 1, 1, 1],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    first = image.movedim(channels, 1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *first.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
    values = first.detach().double().cpu()
    std = values.std(correction=0)
    noise = values.mean() + torch.where(std > 0, std, 1) * noise
    noise = noise.round().clamp(0, 255) if image.dtype == torch.uint8 else noise
    H, W = first.shape[2:]
    made = noise[:1].repeat(5, 1, 1, 1)
    made[1, :, : H // 2], made[2, :, H // 2 :] = noise[1, :, : H // 2], noise[1, :, H // 2 :]
    made[3, :, :, : W // 2], made[4, :, :, W // 2 :] = noise[1, :, :, : W // 2], noise[1, :, :, W // 2 :]
    return made.movedim(1, channels).to(image)


def is_over_image(output: Tensor) -> bool | None:
    """Whether a layer's output (N, C, H, W) is a grid over the image, by its values; None if they do not tell.

    The top and the bottom half of the image should move other rows of the output, and the same columns. An output that
    the image does not move is no grid over it.

    Args:
        output: The layer's output on the five images that :func:`halves` makes.

    Example:
        >>> made = halves(torch.rand(1, 2, 16, 16))
        >>> is_over_image(made), is_over_image(made.permute(0, 2, 3, 1))
        (True, False)
        >>> tokens = made.flatten(2).mT
        >>> is_over_image((tokens @ tokens.mT)[:, None])  # (N, 1, T, T)
        False
    """
    off = (output[1:].float() - output[:1].float()).abs()
    if len(output) != 5 or not bool(off.any()):
        return False
    if not bool(off.isfinite().all()) or not bool(off.flatten(1).any(1).all()):
        return None
    off = off / off.flatten(1).sum(1).reshape(4, 1, 1, 1)
    apart = torch.zeros(2, 3, device="cpu")  # down and across the image, by dimension of the output
    for i in range(3):
        moved = off.movedim(i + 1, 1).flatten(2).sum(2)
        apart[:, i] = (moved[0::2] - moved[1::2]).abs().sum(1) / 2
    if bool((apart.amax(1) < _TELLING).any()):
        return None
    down, across = apart
    rows, columns = int(down.argmax()) == 1, int(across.argmax()) == 2
    return rows and columns and bool(down[2] <= down[1] / 2 and across[1] <= across[2] / 2)
