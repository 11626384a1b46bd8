"""Bring the maps of a layer to the size of the input.

Conventions:
    N examples, K maps of each example, h and w cells of a layer, H and W pixels of an image, R pairs of example and
    x-feature.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from captum_xnn.layers._pixels import first_image

__all__ = ["Image", "has_images", "has_pixels", "of_dtype"]

# How to enlarge maps of images (N, C, H, W) and of volumes (N, C, D, H, W).
_MODES = {4: "bilinear", 5: "trilinear"}


def has_pixels(tensor: Tensor) -> bool:
    """Whether a tensor has the dimensions of images (N, C, H, W) or volumes (N, C, D, H, W).

    Args:
        tensor: An input, or the output of a layer.
    """
    return tensor.dim() in _MODES


def has_images(inputs: tuple[Tensor, ...]) -> bool:
    """Whether the first input with the dimensions of images or volumes holds images.

    Args:
        inputs: Input tensors (N, ...).
    """
    at = first_image(inputs)
    return at is not None and inputs[at].dim() == 4


class Image(NamedTuple):
    """The input whose size the maps of a layer get: the first image or volume, else the first input."""

    values: Tensor
    """An image (N, C, H, W), a volume, one of these with channels elsewhere, or any other input."""
    channels: int
    """The dimension of its channels."""

    @property
    def first(self) -> Tensor:
        """The image with its channels first."""
        return self.values.movedim(self.channels, 1) if has_pixels(self.values) else self.values

    def summed_over_channels(self, maps: Tensor, channels: int | None) -> Tensor:
        """Sum the feature maps of a layer over channels and enlarge them to the image, with one channel.

        Args:
            maps: Attributions (R, ...) of a layer.
            channels: Dimension of the attributions that holds channels; 1 if None.
        """
        if maps.dim() == self.values.dim() and has_pixels(self.values):
            maps = self._resized(maps.sum(channels or 1)[:, None])
        return of_dtype(maps, self.values)

    def enlarged(self, maps: Tensor) -> Tensor:
        """Enlarge maps (N, K, 1, h, w) of a layer to the size of the image, and take its dtype.

        Args:
            maps: Maps (N, K, ...). Those of a layer without cells keep their size.
        """
        if maps.dim() == self.values.dim() + 1 and has_pixels(self.values):
            one = self._resized(maps.flatten(0, 1))
            maps = one.reshape(*maps.shape[:2], *one.shape[1:])
        return of_dtype(maps, self.values)

    def _resized(self, maps: Tensor) -> Tensor:
        """Enlarge maps (R, 1, ...) to the image, and move the one channel to where the image has its channels."""
        size = self.first.shape[2:]
        maps = F.interpolate(maps, size, mode=_MODES[self.values.dim()], align_corners=False)
        return maps.movedim(1, self.channels)


def of_dtype(maps: Tensor, like: Tensor) -> Tensor:
    """Convert maps to the dtype of a floating-point input.

    Args:
        maps: Maps (N, ...).
        like: The input (N, ...).
    """
    return maps.to(like.dtype if like.is_floating_point() else maps.dtype).contiguous()
