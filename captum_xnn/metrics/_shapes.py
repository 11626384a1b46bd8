"""Shapes of maps: metrics take maps as :meth:`captum_xnn.XNNAttribution.explain` gives them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["over_channels"]


def over_channels(maps: Tensor) -> Tensor:
    """Sum the maps of images (N, K, C, H, W) over their channels; return maps of another shape unchanged.

    Args:
        maps: (N, K, C, H, W), or maps without channels.

    Example:
        >>> import torch
        >>> over_channels(torch.ones(2, 5, 3, 8, 8)).shape, over_channels(torch.ones(2, 5, 8, 8)).shape
        (torch.Size([2, 5, 8, 8]), torch.Size([2, 5, 8, 8]))
    """
    return maps.sum(2) if maps.dim() == 5 else maps
