"""Thumbnails: small pictures of images and of their maps as data URIs, for pages that load nothing.

Conventions:
    C channels, H and W pixels. A map drawn on top of an image is a PNG with few colours; its opacity shows its
    strength, and the browser enlarges it smoothly. The colours are those of :mod:`captum_xnn.plots._explanation`:
    orange raises the output, blue lowers it. The pair is safe for colour-blind readers; the paper uses red and blue.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from captum_xnn.plots._colours import BLUES, ORANGES

__all__ = ["crop_box", "displayable", "overlay", "photo", "shown"]

# Photographs compress well as JPEG. Digits and drawings of a few pixels are kept without loss, as PNG.
_SMALL = 64
_QUALITY = 82
# A smaller crop, in pixels, cannot be recognised.
_LEAST = 18

# Number of strengths that a map distinguishes. With both signs and zero, its palette has 63 colours.
_STEPS = 31


def displayable(image: Tensor) -> Tensor:
    """Convert an image (C, H, W) to float32 in [0, 1]: divide bytes by 255, stretch values outside [0, 1].

    Args:
        image: Image (C, H, W) with C = 1 or 3, as the model takes it.

    Raises:
        ValueError: If it is not an image, or not finite.

    Example:
        >>> displayable(torch.tensor([[[-2.0, 0.0, 2.0]]]))
        tensor([[[0.0000, 0.5000, 1.0000]]])
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise ValueError(f"an image is {tuple(image.shape)}, not (1, H, W) or (3, H, W); put the channels first")
    pixels = image.detach().float().cpu() / (255 if image.dtype == torch.uint8 else 1)
    if not bool(pixels.isfinite().all()):
        raise ValueError("the image contains NaN or infinity; check how it was read and normalised")
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 1:
        # All channels are stretched alike: separate stretches would change the hues. A constant image becomes grey.
        pixels = (pixels - low) / (high - low) if high > low else torch.full_like(pixels, 0.5)
    return pixels


def shown(display: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Apply the user's display function to an image (C, H, W), and check the result.

    Args:
        display: Turns the image into one in [0, 1].
        image: The image as the model takes it.
    """
    return displayable(display(image.detach().cpu()))


def photo(image: Tensor, *, size: int = 200) -> str:
    """Encode an image as a data URI: PNG up to 64 pixels, JPEG for larger pictures.

    Args:
        image: Image (C, H, W) in [0, 1] with C = 1 or 3.
        size: Largest length of the longer side in pixels; smaller images keep their size.

    Example:
        >>> photo(torch.zeros(3, 100, 100))[:27], photo(torch.zeros(1, 28, 28))[:26]
        ('data:image/jpeg;base64,/9j/', 'data:image/png;base64,iVBO')
    """
    from PIL import Image

    height, width = image.shape[1:]
    scale = min(1.0, size / max(height, width))
    if scale < 1:
        wanted = (max(1, round(height * scale)), max(1, round(width * scale)))
        image = F.interpolate(image[None], wanted, mode="bilinear", align_corners=False, antialias=True)[0]
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if max(picture.size) <= _SMALL:
        return _data_uri(picture, "png", optimize=True)
    return _data_uri(picture, "jpeg", quality=_QUALITY, optimize=True)


def overlay(shown: Tensor, *, size: int = 64) -> str:
    """Encode a map as a data URI, a PNG to lay over the image: coloured by sign, transparent where it is weak.

    Args:
        shown: Map (H, W) in [-1, 1], from :func:`captum_xnn.plots.own_scale`.
        size: Largest length of the longer side in pixels.

    Raises:
        ValueError: If the map is not (H, W) or has values outside [-1, 1].

    Example:
        >>> overlay(torch.eye(4))[:26]
        'data:image/png;base64,iVBO'
    """
    from PIL import Image

    if shown.dim() != 2 or not shown.numel() or not bool((shown.abs() <= 1 + 1e-6).all()):
        raise ValueError(
            f"the map, shape {tuple(shown.shape)}, is not (H, W) in [-1, 1]; divide it by its largest absolute value"
        )
    height, width = shown.shape
    scale = min(1.0, size / max(height, width))
    if scale < 1:
        wanted = (max(1, round(height * scale)), max(1, round(width * scale)))
        shown = F.interpolate(shown[None, None].float(), wanted, mode="area")[0, 0]
    steps = (shown * _STEPS).round().clamp(-_STEPS, _STEPS).to(torch.int64) + _STEPS
    picture = Image.fromarray(steps.to(torch.uint8).cpu().numpy())
    colours = _palette()
    picture.putpalette(colours[:, :3].tobytes())
    return _data_uri(picture, "png", optimize=True, transparency=colours[:, 3].tobytes())


def _palette() -> NDArray[np.uint8]:
    """Compute red, green, blue and opacity of each step from -1 to 1, as :mod:`captum_xnn.plots._explanation` does."""
    sizes = np.linspace(0, 1, _STEPS + 1)
    opacity = np.minimum(1, 1.15 * sizes**0.65)
    halves = [255 * np.column_stack([colours(sizes)[:, :3], opacity]) for colours in (BLUES, ORANGES)]
    colours: NDArray[np.uint8] = np.rint(np.concatenate([halves[0][:0:-1], halves[1]])).astype(np.uint8)
    return colours


def _data_uri(picture: Any, form: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def crop_box(heat: Tensor, size: tuple[int, int], *, share: float = 0.6, least: float = 0.35) -> tuple[int, ...]:
    """Compute a square around the middle of a map's mass: x0, y0, x1, y1 in pixels of the image.

    On each axis, an interval leaves out (1 - share) / 2 of the mass at either end. The side of the square is the longer
    interval plus a tenth for the surroundings. It is at least 18 pixels and at most the image's shorter side. A map of
    zeros gives the whole image, square or not.

    Args:
        heat: Map (h, w); only its positive part counts. It may be coarser than the image.
        size: Height and width of the image.
        share: Share of the mass inside the interval on each axis, in (0, 1].
        least: Shortest side, as a share of the image's shorter side.

    Example:
        >>> heat = torch.zeros(10, 10)
        >>> heat[2:4, 6:8] = 1
        >>> crop_box(heat, (100, 100))
        (52, 12, 87, 47)
    """
    height, width = size
    mass = heat.detach().double().clamp(min=0)
    if not bool(mass.sum() > 0):
        return (0, 0, width, height)
    (x0, x1), (y0, y1) = (_middle(mass.sum(0), share, width), _middle(mass.sum(1), share, height))
    side = min(max(1.1 * max(x1 - x0, y1 - y0), least * min(size), _LEAST), min(size))
    pixels = max(1, round(side))
    left = min(max(round((x0 + x1 - pixels) / 2), 0), width - pixels)
    top = min(max(round((y0 + y1 - pixels) / 2), 0), height - pixels)
    return (left, top, left + pixels, top + pixels)


def _middle(mass: Tensor, share: float, length: int) -> tuple[float, float]:
    """Find the interval that holds the middle share of a mass along an axis, in pixels of an axis of this length."""
    total = mass.cumsum(0) / mass.sum()
    edges = torch.cat([total.new_zeros(1), total])
    at = torch.arange(len(edges), dtype=total.dtype, device="cpu") * length / len(mass)
    low, high = (float(np.interp(q, edges.numpy(), at.numpy())) for q in ((1 - share) / 2, (1 + share) / 2))
    return low, high
