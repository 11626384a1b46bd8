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

__all__ = ["Covers", "covers", "patch_bounds"]


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


class Covers:
    """Images with some of their patches covered, one at a time.

    A covered patch has the mean colour of its image. With ``thinning=2`` a quarter of the patches of each image is
    covered, every second row and column, and the next image has the next quarter: four images cover every patch.

    Args:
        inputs: Tensors (N, ...).
        at: Number of the input that holds the images.
        patches: Patches along each side.
        thinning: Distance of covered rows and columns; 1 covers all patches of each image.
        numbers: Number of each image among the positives, which tells the place of its first patch; None covers all
            its patches.
        channels: The dimension of the images that holds channels.
    """

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        at: int,
        patches: int,
        thinning: int,
        numbers: Sequence[int | None],
        *,
        channels: int = 1,
    ) -> None:
        self.inputs, self.at, self.channels = inputs, at, channels
        images = inputs[at].movedim(channels, 1)
        rows, columns = (patch_bounds(side, patches) for side in images.shape[2:])
        self.regions = [(row, column) for row in rows for column in columns]
        own = [_lattice(len(rows), len(columns), thinning, number) for number in numbers]
        self.pairs = [(i, p) for i, some in enumerate(own) for p in some]
        """Image and patch of each cover, image by image."""
        self.most = max(map(len, own))
        """Covers of an image, at most."""

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
            (top, bottom), (left, right) = self.regions[p]
            images[n, :, top:bottom, left:right] = mean[n, :, None, None]
        return tuple(made)


def covers(
    inputs: tuple[Tensor, ...],
    patches: int,
    thinning: int,
    numbers: Sequence[int | None],
    *,
    channels: int = 1,
) -> Covers | None:
    """Return the covers of images; None without images.

    Images are the first input of four dimensions with floating-point numbers and several pixels; other inputs stay.

    Args:
        inputs: Tensors (N, ...).
        patches: Patches along each side.
        thinning: Distance of covered rows and columns.
        numbers: Number of each image among the positives; None covers all its patches.
        channels: The dimension of channels in the first image or volume; other images have channels first.

    Example:
        >>> image = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> made = covers((image,), 2, 1, [0])
        >>> made.pairs, made.covered(made.pairs[:1])[0].flatten()
        ([(0, 0), (0, 1), (0, 2), (0, 3)], tensor([1.5000, 1.0000, 2.0000, 3.0000]))
        >>> [covers((image,), 2, 2, [number]).pairs for number in range(4)]
        [[(0, 0)], [(0, 1)], [(0, 2)], [(0, 3)]]
    """
    image = first_image(inputs)
    for i, x in enumerate(inputs):
        own = channels if i == image else 1
        if x.dim() == 4 and x.is_floating_point() and min(x.movedim(own, 1).shape[2:]) > 1:
            return Covers(inputs, i, patches, thinning, numbers, channels=own)
    return None


def _lattice(rows: int, columns: int, thinning: int, number: int | None) -> list[int]:
    """Return the patches on every thinning-th row and column, from where a number says on; all of them for None."""
    step = 1 if number is None else thinning
    down, right = (0, 0) if number is None else (number // step % step, number % step)
    return [r * columns + c for r in range(down, rows, step) for c in range(right, columns, step)] or [0]
