"""Cover patches of images, to measure the drops of contributions.

Conventions:
    N images (N, C, H, W); a grid of g x g patches of nearly the same size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

__all__ = ["covered", "patch_bounds"]


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


def covered(inputs: tuple[Tensor, ...], patches: int) -> Iterator[tuple[Tensor, ...]] | None:
    """Iterate over copies of the inputs with one patch of the images covered at a time; None without images.

    A covered patch has the mean colour of its image. The images are the first floating-point input with four dimensions
    and at least 2 x 2 pixels. Other inputs stay unchanged.

    Args:
        inputs: Tensors (N, ...).
        patches: Patches along each side.

    Example:
        >>> import torch
        >>> made = list(covered((torch.arange(4.0).reshape(1, 1, 2, 2),), 2))
        >>> len(made), made[0][0].flatten()
        (4, tensor([1.5000, 1.0000, 2.0000, 3.0000]))
    """
    found = [i for i, x in enumerate(inputs) if x.dim() == 4 and x.is_floating_point() and min(x.shape[2:]) > 1]
    if not found:
        return None
    return _covered(inputs, found[0], patches)


def _covered(inputs: tuple[Tensor, ...], at: int, patches: int) -> Iterator[tuple[Tensor, ...]]:
    images = inputs[at]
    mean = images.mean((2, 3), keepdim=True)
    for top, bottom in patch_bounds(images.shape[2], patches):
        for left, right in patch_bounds(images.shape[3], patches):
            hidden = images.clone()
            hidden[:, :, top:bottom, left:right] = mean
            yield (*inputs[:at], hidden, *inputs[at + 1 :])
