"""Thumbnails: small pictures of images and of their maps as data URIs, for pages that load nothing.

Conventions:
    C channels, H and W pixels. A map drawn on top of an image is a PNG of few colours whose strength is in its opacity;
    a browser enlarges it smoothly. Colours are those of :mod:`captum_xnn.plots.explanation`: orange raises the output,
    blue lowers it, which the colour-blind tell apart. The paper has red and blue.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

__all__ = ["crop_box", "displayable", "overlay", "photo"]

# Photographs compress well as JPEG; drawings and digits of a few pixels keep every one of theirs as PNG.
_SMALL = 64
_QUALITY = 82
# Nobody sees what a crop of fewer pixels is of.
_LEAST = 18

# Sizes of a map told apart; with both signs and zero these are the 63 colours of its palette.
_STEPS = 31
_RAISES = ((0xF9, 0x8F, 0x2F), (0xE8, 0x59, 0x0C), (0xA3, 0x2F, 0x00))
_LOWERS = ((0x5A, 0xAE, 0xEA), (0x1F, 0x7A, 0xC4), (0x06, 0x3F, 0x7C))


def displayable(image: Tensor) -> Tensor:
    """Returns an image (C, H, W) as float32 in [0, 1]: bytes and [0, 1] as they are, other ranges stretched.

    Args:
        image: (C, H, W) with C = 1 or 3, as the model takes it.

    Raises:
        ValueError: If it is no image, or not finite.

    Example:
        >>> displayable(torch.tensor([[[-2.0, 0.0, 2.0]]]))
        tensor([[[0.0000, 0.5000, 1.0000]]])
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise ValueError(f"expected an image (1, H, W) or (3, H, W), got {tuple(image.shape)}; put the channels first")
    pixels = image.detach().float().cpu() / (255 if image.dtype == torch.uint8 else 1)
    if not bool(pixels.isfinite().all()):
        raise ValueError("expected a finite image, got NaN or infinity; look at how it was read and normalised")
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 1:
        # One stretch for all channels: one for each would change the hues. A constant image becomes grey.
        pixels = (pixels - low) / (high - low) if high > low else torch.full_like(pixels, 0.5)
    return pixels


def photo(image: Tensor, *, size: int = 200) -> str:
    """Returns an image as a data URI, JPEG, or PNG where it is small.

    Args:
        image: (C, H, W) in [0, 1] with C = 1 or 3.
        size: Pixels of the longer side at most; smaller images stay as they are.

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
    """Returns a map as a data URI, a PNG to lie on the image: coloured by sign, transparent where it is weak.

    Args:
        shown: A map (H, W) in [-1, 1], from :func:`captum_xnn.plots.explanation.own_scale`.
        size: Pixels of the longer side at most.

    Raises:
        ValueError: If it is no map in [-1, 1].

    Example:
        >>> overlay(torch.eye(4))[:26]
        'data:image/png;base64,iVBO'
    """
    from PIL import Image

    if shown.dim() != 2 or not shown.numel() or not bool((shown.abs() <= 1 + 1e-6).all()):
        raise ValueError(
            f"expected a map (H, W) in [-1, 1], got shape {tuple(shown.shape)}; divide it by its largest value first"
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
    """Returns red, green, blue and opacity of each step from -1 to 1, as visualize draws it."""
    sizes = np.linspace(0, 1, _STEPS + 1)
    opacity = np.minimum(1, 1.15 * sizes**0.65)
    halves = [
        np.stack([*(np.interp(sizes, (0, 0.5, 1), stops) for stops in zip(*colours, strict=True)), 255 * opacity], 1)
        for colours in (_LOWERS, _RAISES)
    ]
    colours: NDArray[np.uint8] = np.rint(np.concatenate([halves[0][:0:-1], halves[1]])).astype(np.uint8)
    return colours


def _data_uri(picture: Any, form: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def crop_box(heat: Tensor, size: tuple[int, int], *, share: float = 0.6, least: float = 0.35) -> tuple[int, ...]:
    """Returns a square around the middle of a map's mass: x0, y0, x1, y1 in pixels of the image.

    On each axis it reaches from where (1 - share) / 2 of the mass lies before it to where as much lies behind it; the
    longer of the two, and a tenth for the surroundings, is the side, and 18 pixels at least. A map of zeros gives the
    whole image, square or not.

    Args:
        heat: (h, w), of which the positive part counts; it may be coarser than the image.
        size: Height and width of the image.
        share: Of the mass on each axis, in (0, 1].
        least: Shortest side, as a share of the image's shorter one.

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
    """Returns from where to where the middle share of a mass along an axis lies, in pixels of an axis so long."""
    total = mass.cumsum(0) / mass.sum()
    edges = torch.cat([total.new_zeros(1), total])
    at = torch.arange(len(edges), dtype=total.dtype) * length / len(mass)
    low, high = (float(np.interp(q, edges.numpy(), at.numpy())) for q in ((1 - share) / 2, (1 + share) / 2))
    return low, high
