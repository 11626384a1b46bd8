"""Bring the maps of a layer to the size, or to the shape, of the input.

Conventions:
    N examples, K maps of each example, h and w cells of a layer, H and W pixels of an image, R pairs of example and
    x-feature.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from captum_xnn.layers._pixels import first_image

__all__ = ["Image", "has_images", "has_pixels", "in_shape_of", "of_dtype"]

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


def in_shape_of(inputs: tuple[Tensor, ...], maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Bring maps (N, 1, ...) to the shape of the inputs.

    The map of a layer is divided equally among the channels of an image or a volume. The map of an embedding is summed
    over its dimensions.

    Args:
        inputs: Tensors (N, ...).
        maps: Maps of each input, or of each tensor of a layer.

    Raises:
        ValueError: If the maps of a layer have another shape.
    """
    image = next((x for x in inputs if x.dim() in (4, 5)), inputs[0])
    likes = inputs if len(maps) == len(inputs) else (image,) * len(maps)
    return tuple(_shaped(m[:, 0], x).contiguous() for m, x in zip(maps, likes, strict=True))


def _shaped(m: Tensor, x: Tensor) -> Tensor:
    """Bring the map of one input to its shape."""
    if m.shape == x.shape:
        return m
    if m.dim() == x.dim() > 2:
        differing = [d for d in range(m.dim()) if m.shape[d] != x.shape[d]]
        if len(differing) == 1 and m.shape[differing[0]] == 1:  # the channels, first or last
            return m.expand_as(x) / x.shape[differing[0]]
    if m.shape[: x.dim()] == x.shape:  # an embedding of token ids
        return m.flatten(x.dim()).sum(-1)
    raise ValueError(
        f"feature= needs maps in the input's shape {tuple(x.shape)}, and the method gives {tuple(m.shape)}, the shape "
        "of its layer; leave feature out for such maps, or draw at the inputs, as with heatmap=InputXGradient"
    )
