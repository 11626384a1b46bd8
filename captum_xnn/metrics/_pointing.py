"""Pointing accuracy: how often the strongest pixel of an x-feature's map lies on a given part.

Conventions:
    N images, K x-features, maps of H x W pixels, P annotated parts. Points are (x, y) in the maps' pixels, x to the
    right, y down, as in :mod:`captum_xnn.metrics._localisation` and the data sets. The origin is the corner of the
    image, so the centre of the first pixel is at (0.5, 0.5). A part with a NaN is invisible.

Reference:
    Zhang et al., "Top-down Neural Attention by Excitation Backprop", 2018, section 4.1 (the pointing game).
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_xnn.metrics._shapes import over_channels

__all__ = ["pointing_accuracy"]


def pointing_accuracy(maps: Tensor, points: Tensor, tolerance: float = 15.0) -> Tensor:
    """Compute how often map k peaks at part p, as a share of the images that show p, (K, P) in [0, 1], float64.

    A map peaks at its first largest pixel in reading order. A constant map has no peak and misses every part. A part
    that no image shows has NaN. Parts may lie closer together than the tolerance, so rows need not sum to 1.

    Args:
        maps: (N, K, H, W) or (N, K, C, H, W), finite; enlarge a layer's maps to the size of the annotated images.
        points: (N, P, 2), in pixels.
        tolerance: Largest distance from the peak to the part that counts as a hit, in pixels. The pointing game has 15,
            in images of about 500 x 400.

    Raises:
        ValueError: If the shapes do not fit each other, maps are not finite or the tolerance is negative.

    Example:
        >>> maps = torch.zeros(1, 1, 5, 5)
        >>> maps[0, 0, 1, 3] = 1.0
        >>> pointing_accuracy(maps, torch.tensor([[[3.5, 2.5], [0.5, 4.5], [torch.nan, torch.nan]]]), tolerance=1)
        tensor([[1., 0., nan]], dtype=torch.float64)
    """
    maps = over_channels(maps)
    if maps.dim() != 4 or points.dim() != 3 or points.shape[2] != 2 or len(points) != len(maps):
        raise ValueError(
            f"maps are {tuple(maps.shape)} and points {tuple(points.shape)}, not (N, K, H, W) and (N, P, 2) of the "
            "same images; enlarge a layer's maps to the size of the images"
        )
    if not bool(maps.isfinite().all()) or tolerance < 0:
        raise ValueError(
            f"maps are finite: {bool(maps.isfinite().all())}, and tolerance is {tolerance} pixels; check the images "
            "whose maps are not finite, and pass a tolerance >= 0"
        )
    flat = maps.flatten(2)
    peak = flat.argmax(2)
    width = maps.shape[3]
    xy = torch.stack([peak % width, peak.div(width, rounding_mode="floor")], 2).double() + 0.5  # pixel centre
    distance = (xy[:, :, None] - points.to(maps.device).double()[:, None]).square().sum(3).sqrt()
    peaked = flat.amax(2) > flat.amin(2)
    hits = (distance <= tolerance) & peaked[:, :, None]
    seen = points.isfinite().all(2).sum(0).to(maps.device)
    return hits.double().sum(0) / seen.double()  # 0 / 0 gives the NaN of a part that no image shows
