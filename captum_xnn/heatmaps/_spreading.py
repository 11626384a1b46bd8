r"""Spread the map of a layer over the cells that strided operations skip.

A convolution with a kernel of 1 and a stride of 2 reads one cell of each 2 x 2, as the shortcuts of ResNets do. The
cells that it reads win more. So the map of a layer before such a convolution shows a lattice of the stride.

This module divides the mass of each cell among the cells less than a stride away. Along a dimension with stride s, a
cell at distance d gets a part in proportion to :math:`s - d`. Between the cells of a lattice this is linear
interpolation. The sum of the map stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["spread"]


def spread(maps: Tensor, strides: Sequence[int]) -> Tensor:
    """Divide the mass of each cell among the cells less than a stride away.

    Args:
        maps: Maps (..., h, w), or (..., d, h, w).
        strides: Stride along each of the last dimensions; 1 changes nothing.

    Example:
        >>> spread(torch.tensor([0.0, 0.0, 4.0, 0.0, 0.0]), (2,))
        tensor([0., 1., 2., 1., 0.])
    """
    for dim, stride in zip(range(-len(strides), 0), strides, strict=True):
        if stride > 1:
            at = torch.arange(maps.shape[dim], dtype=maps.dtype, device=maps.device)
            parts = (stride - (at[:, None] - at).abs()).clamp(min=0)
            parts = parts / parts.sum(1, keepdim=True)
            maps = (maps.transpose(dim, -1) @ parts).transpose(dim, -1)
    return maps
