"""Controls: random maps and random partitions, to print beside every figure.

A metric is informative only if a control scores badly. Draw a few seeds and print their mean beside the method.

Conventions:
    N examples, K x-features, D dimensions of the layer. All draws happen on the CPU, so a seed gives the same draw on
    every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["random_maps", "random_partition"]


def random_maps(maps: Tensor, *, seed: int, cells: int = 7) -> Tensor:
    """Draw a random map in place of every map, not negative, in the maps' shape and dtype.

    Maps of images are smooth: each enlarges uniform random numbers bilinearly from a grid of cells x cells points. Maps
    of tokens or columns are uniform random numbers. All maps are independent, within an example and between examples.

    Args:
        maps: (N, K, H, W) of images, or (N, K, L) of tokens or columns; only shape, dtype and device count.
        seed: Seeds the draw.
        cells: Points of the coarse grid along each side of an image; fewer make smoother maps.

    Raises:
        ValueError: If maps do not have three or four dimensions, or are not floating point.

    Example:
        >>> drawn = random_maps(torch.zeros(2, 3, 8, 8), seed=0)
        >>> drawn.shape, bool((drawn >= 0).all())
        (torch.Size([2, 3, 8, 8]), True)
    """
    if maps.dim() not in (3, 4) or not maps.is_floating_point():
        raise ValueError(
            f"maps are {tuple(maps.shape)} of {maps.dtype}, not floating-point (N, K, H, W) or (N, K, L); sum maps "
            "(N, K, C, H, W) over their channels with maps.sum(2)"
        )
    generator = torch.Generator().manual_seed(seed)
    if maps.dim() == 3:
        return torch.rand(maps.shape, generator=generator, dtype=torch.float64, device="cpu").to(maps)
    coarse = torch.rand(*maps.shape[:2], cells, cells, generator=generator, dtype=torch.float64, device="cpu")
    return F.interpolate(coarse, maps.shape[2:], mode="bilinear", align_corners=True).to(maps)


def random_partition(dimensions: int, groups: int, generator: torch.Generator) -> Tensor:
    """Draw random groups of dimensions, as one-hot rows (D, K), float32; their sizes differ by at most 1.

    Args:
        dimensions: D.
        groups: K, at most D.
        generator: A generator on the CPU.

    Raises:
        ValueError: If there are fewer dimensions than groups, or no group.

    Example:
        >>> a = random_partition(7, 3, torch.Generator().manual_seed(0))
        >>> a.sum(0).sort().values, bool((a.sum(1) == 1).all())
        (tensor([2., 2., 3.]), True)
    """
    if not 1 <= groups <= dimensions:
        raise ValueError(f"cannot split {dimensions} dimensions into {groups} groups; ask for 1 to {dimensions} groups")
    chosen = torch.randperm(dimensions, generator=generator, device="cpu") % groups
    return F.one_hot(chosen, groups).float()
