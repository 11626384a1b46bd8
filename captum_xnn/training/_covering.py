"""Cover patches of images, to measure the drops of contributions.

Conventions:
    N images (N, C, H, W), or (N, H, W, C) where channels are last; a grid of g x g patches of nearly the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from captum_xnn.layers._pixels import first_image

__all__ = ["Grid", "ImageCovers", "channels_of", "images_among", "patch_bounds"]


def patch_bounds(size: int, patches: int) -> list[tuple[int, int]]:
    """Compute the start and end of each patch along one side, in pixels.

    Args:
        size: Pixels along the side.
        patches: Patches along the side, at most one per pixel.

    Example:
        >>> patch_bounds(10, 3)
        [(0, 3), (3, 6), (6, 10)]
    """
    patches = min(patches, size)
    edges = [size * i // patches for i in range(patches + 1)]
    return list(pairwise(edges))


class Grid:
    """Patches of an image or of feature maps, row by row.

    Args:
        height: Rows of pixels or cells.
        width: Columns.
        patches: Patches along each side, at most one for each pixel or cell.

    Example:
        >>> Grid(2, 3, 8).regions[-1]
        ((1, 2), (2, 3))
        >>> Grid(1, 2, 8).pairs(2)
        [(0, 0), (0, 1), (1, 0), (1, 1)]
    """

    def __init__(self, height: int, width: int, patches: int) -> None:
        rows, columns = patch_bounds(height, patches), patch_bounds(width, patches)
        self.regions = [(row, column) for row in rows for column in columns]
        """Start and end along the rows and along the columns of each patch."""

    def pairs(self, n: int) -> list[tuple[int, int]]:
        """Return example and patch of each cover, example by example.

        Args:
            n: Number of examples.
        """
        return [(i, p) for i in range(n) for p in range(len(self.regions))]


class ImageCovers:
    """Images with one patch covered at a time, in the mean colour of the image.

    Args:
        inputs: Tensors (N, ...).
        at: Number of the input that holds the images.
        patches: Patches along each side.
        channels: The dimension of the images that holds channels.
    """

    def __init__(self, inputs: tuple[Tensor, ...], at: int, patches: int, *, channels: int = 1) -> None:
        self.inputs, self.at, self.channels = inputs, at, channels
        height, width = inputs[at].movedim(channels, 1).shape[2:]
        self.grid = Grid(height, width, patches)

    def covered(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Return the inputs of some covers, with the patches covered.

        Args:
            pairs: Image and patch of each.
        """
        rows = torch.tensor([i for i, _ in pairs])
        made = [x[rows.to(x.device)] for x in self.inputs]
        images = made[self.at].movedim(self.channels, 1)  # a view
        mean = images.mean((2, 3))
        for n, (_, p) in enumerate(pairs):
            (top, bottom), (left, right) = self.grid.regions[p]
            images[n, :, top:bottom, left:right] = mean[n, :, None, None]
        return tuple(made)


def images_among(inputs: tuple[Tensor, ...], *, channels: int = 1) -> int | None:
    """Return the number of the input that holds images; None without images.

    Images are the first input of four dimensions with floating-point numbers and several pixels along both sides.

    Args:
        inputs: Tensors (N, ...).
        channels: The dimension of channels in the first image or volume; other images have channels first.

    Example:
        >>> images_among((torch.zeros(2, 7), torch.zeros(2, 3, 4, 4)))
        1
    """
    for i, x in enumerate(inputs):
        own = channels_of(inputs, i, channels)
        if x.dim() == 4 and x.is_floating_point() and min(x.movedim(own, 1).shape[2:]) > 1:
            return i
    return None


def channels_of(inputs: tuple[Tensor, ...], at: int, channels: int) -> int:
    """Return the dimension that holds the channels of one input.

    Args:
        inputs: Tensors (N, ...).
        at: Number of the input.
        channels: The dimension of channels in the first image or volume; other images have channels first.

    Example:
        >>> inputs = (torch.zeros(1, 9, 9, 3), torch.zeros(1, 3, 9, 9))
        >>> channels_of(inputs, 0, 3), channels_of(inputs, 1, 3)
        (3, 1)
    """
    return channels if at == first_image(inputs) else 1
