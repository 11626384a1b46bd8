"""Bring the maps of a layer to the size of the input.

Conventions:
    N examples, K maps of each example, h and w cells of a layer, H and W pixels of an image.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["has_pixels", "image_among", "summed_over_channels", "with_size_of"]

# How to enlarge maps of images (N, C, H, W) and of volumes (N, C, D, H, W).
_MODES = {4: "bilinear", 5: "trilinear"}


def has_pixels(tensor: Tensor) -> bool:
    """Whether a tensor has the dimensions of images (N, C, H, W) or volumes (N, C, D, H, W).

    Args:
        tensor: An input, or the output of a layer.
    """
    return tensor.dim() in _MODES


def image_among(inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the input whose size the maps of a layer get: the first image or volume, else the first input.

    Args:
        inputs: Input tensors (N, ...).
    """
    return next((x for x in inputs if has_pixels(x)), inputs[0])


def with_size_of(like: Tensor, maps: Tensor, *, is_layer: bool) -> Tensor:
    """Enlarge maps (N, K, 1, h, w) of a layer to the size of the input, and take its dtype.

    Args:
        like: The input (N, ...).
        maps: Maps (N, K, ...). Maps of the input, and of a layer without cells, keep their size.
        is_layer: Whether the maps are those of a layer.
    """
    if is_layer and maps.dim() == like.dim() + 1 and has_pixels(like):
        one = _resized(maps.flatten(0, 1), like)
        maps = one.reshape(*maps.shape[:2], *one.shape[1:])
    return _of_dtype(maps, like)


def summed_over_channels(maps: Tensor, like: Tensor, channels: int | None, *, is_layer: bool) -> Tensor:
    """Sum the feature maps of a layer over channels and enlarge them to (R, 1, H, W) or (R, 1, D, H, W).

    Args:
        maps: Attributions (R, ...) for R pairs of example and x-feature.
        like: The input (N, ...).
        channels: Dimension of the attributions that holds channels; 1 if None.
        is_layer: Whether the attributions are those of a layer. Those of the input keep their shape.
    """
    if is_layer and maps.dim() == like.dim() and has_pixels(like):
        maps = _resized(maps.sum(channels or 1)[:, None], like)
    return _of_dtype(maps, like)


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    """Enlarge maps (R, 1, ...) to the size of an image or a volume."""
    return F.interpolate(maps, like.shape[2:], mode=_MODES[like.dim()], align_corners=False)


def _of_dtype(maps: Tensor, like: Tensor) -> Tensor:
    """Convert maps to the dtype of a floating-point input."""
    return maps.to(like.dtype if like.is_floating_point() else maps.dtype).contiguous()
