r"""Keep-top accuracy: does the model still recognise an image from the strongest pixels of a heatmap?

Keep the n strongest pixels of each image, inpaint all others from them, and let the model classify again.

Conventions:
    N images of C channels and H x W pixels; K x-features. ``kept`` is True where a pixel stays. Images may be
    normalised. Inpainting scales each channel by the range of its kept pixels, so the normalisation makes no
    difference. Accuracies are in [0, 1].

A *fill* is a callable ``fill(image, kept)``. It takes an image (C, H, W) and its kept pixels (H, W), and returns a
whole image (C, H, W). :func:`biharmonic`, the default, :func:`telea` and :func:`mean_colour` are fills. In place of a
fill, users pass ``"biharmonic"``, ``"telea"``, or a colour: one number, or one for each channel.

Left open by the paper, and decided here:
    The inpainting algorithm is biharmonic; Telea's is available too. :func:`combined` joins the maps of several
    x-features. The accuracy is the mean over images, not first over categories.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, appendix II.3,
    Table .5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from captum_xnn.layers._state import untouched
from captum_xnn.metrics._patches import refuse_channels_last
from captum_xnn.metrics._shapes import over_channels

__all__ = [
    "biharmonic",
    "combined",
    "constant",
    "keep_top",
    "keep_top_accuracy",
    "mean_colour",
    "telea",
    "top_pixels",
]

Fill = Callable[[Tensor, Tensor], Tensor]
FillOrColour = Literal["biharmonic", "telea"] | Fill | float | Sequence[float]
_Array = np.ndarray[Any, np.dtype[Any]]


def combined(maps: Tensor, contributions: Tensor) -> Tensor:
    r"""Mix the maps of each image's x-features into one map, (N, H, W), in proportion to their contributions.

    .. math:: \sum_i \max(v_i E_i, 0) \; S^i, \qquad S^i = \frac{\max(C^i, 0)}{\sum_{jk} \max(C^i_{jk}, 0)}

    The paper says which pixels to keep ("top n pixels that have the highest response in the heatmap"), but not how to
    join several heatmaps. Here each map becomes a distribution over pixels, as in the paper's section 4.2, so the scale
    of a heatmap method does not count. An x-feature with a negative contribution is no reason for the class, and does
    not count. If no contribution of an image is positive, all its x-features count equally. A map without positive
    values adds nothing.

    Args:
        maps: (N, K, H, W), or (N, K, C, H, W) to sum over channels. Reverse the sign of a signed map if
            its x-feature has a negative value, as ``Explanation.directed_maps`` does.
        contributions: v_i E_i, (N, K).

    Raises:
        ValueError: If the shapes do not fit each other, or contributions are not finite.

    Example:
        >>> maps = torch.tensor([[[[8.0, 0.0]], [[1.0, 1.0]], [[0.0, 5.0]]]])
        >>> combined(maps, torch.tensor([[2.0, 2.0, -1.0]]))
        tensor([[[3., 1.]]])
    """
    maps = over_channels(maps)
    if maps.dim() != 4 or maps.shape[:2] != contributions.shape:
        raise ValueError(
            f"maps are {tuple(maps.shape)} and contributions {tuple(contributions.shape)}, not (N, K, H, W) and (N, "
            "K); pass both from one explanation"
        )
    if not bool(contributions.isfinite().all()):
        raise ValueError("contributions are NaN or infinite; check whether the fit diverged")
    weight = contributions.double().clamp_min(0)
    weight = torch.where((weight > 0).any(1, keepdim=True), weight, 1.0)
    positive = maps.double().clamp_min(0)
    mass = positive.sum((2, 3))
    share = torch.where(mass > 0, weight / torch.where(mass > 0, mass, 1), 0)
    return torch.einsum("nk,nkhw->nhw", share, positive).to(maps.dtype)


def top_pixels(maps: Tensor, n: int) -> Tensor:
    """Mark the n strongest pixels of each map, in a mask (N, H, W) with exactly n True for each image.

    Among equally strong pixels, the first in reading order win: rows from the top, each from the left.

    Args:
        maps: (N, H, W), finite; the larger, the stronger.
        n: How many pixels, 0 to H W.

    Raises:
        ValueError: If the maps have another shape or are not finite, or n is out of range.

    Example:
        >>> top_pixels(torch.tensor([[[1.0, 3.0], [3.0, 3.0]]]), 2).int()
        tensor([[[0, 1],
                 [1, 0]]], dtype=torch.int32)
    """
    if maps.dim() != 3 or not bool(maps.isfinite().all()):
        raise ValueError(
            f"maps are {tuple(maps.shape)}, finite: {bool(maps.isfinite().all())}; pass finite maps (N, H, W), or the "
            "maps (N, K, H, W) of several x-features with their contributions"
        )
    H, W = maps.shape[1:]
    if not 0 <= n <= H * W:
        raise ValueError(f"n is {n}, and maps of {H} x {W} have {H * W} pixels; pass 0 to {H * W}")
    order = maps.flatten(1).sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros(order.shape, dtype=torch.bool, device=maps.device)
    return kept.scatter_(1, order[:, :n], True).reshape(maps.shape)


def constant(value: float | Sequence[float]) -> Fill:
    """Build a fill that paints lost pixels in one colour. The paper paints them black before it inpaints.

    Args:
        value: One number, or one for each channel, in the images' own scale: black in images normalised by mean and
            std is ``-mean / std``.

    Example:
        >>> constant(0.5)(torch.ones(1, 1, 2), torch.tensor([[True, False]]))
        tensor([[[1.0000, 0.5000]]])
    """

    def fill(image: Tensor, kept: Tensor) -> Tensor:
        colour = torch.as_tensor(value, dtype=image.dtype, device=image.device)
        return torch.where(kept, image, colour.reshape(-1, 1, 1))

    return fill


def mean_colour(image: Tensor, kept: Tensor) -> Tensor:
    """Paint the lost pixels in the mean colour of the kept ones; return zeros if no pixel is kept.

    Args:
        image: (C, H, W).
        kept: The pixels that stay, (H, W), boolean.

    Example:
        >>> mean_colour(torch.tensor([[[1.0, 3.0, 9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[[1., 3., 2.]]])
    """
    if not bool(kept.any()):
        return torch.zeros_like(image)
    mean = image[:, kept].double().mean(1).to(image.dtype)
    return torch.where(kept, image, mean[:, None, None])


def biharmonic(image: Tensor, kept: Tensor) -> Tensor:
    """Inpaint the lost pixels so that their bilaplacian vanishes; return zeros if no pixel is kept.

    Values stay in the range of each channel's kept pixels. One image of 224 x 224 pixels with 1,000 kept takes about a
    second.

    Args:
        image: (C, H, W).
        kept: The pixels that stay, (H, W), boolean.

    Example:
        >>> image, kept = torch.arange(25.0).reshape(1, 5, 5), torch.ones(5, 5, dtype=torch.bool)
        >>> kept[2, 2] = False
        >>> round(float(biharmonic(image, kept)[0, 2, 2]), 4)
        12.0

    Reference:
        Damelin, Hoang, "On Surface Completion and Image Inpainting by Biharmonic Functions", 2018; as implemented in
        :func:`skimage.restoration.inpaint_biharmonic`.
    """
    from skimage.restoration import inpaint_biharmonic

    return _inpainted(image, kept, lambda unit, lost: inpaint_biharmonic(unit, lost, channel_axis=0))


def telea(image: Tensor, kept: Tensor) -> Tensor:
    """Inpaint the lost pixels by fast marching with a radius of 3 pixels; return zeros if no pixel is kept.

    It is some ten times faster than :func:`biharmonic`. It needs OpenCV, and rounds to steps of 1/65535 of a channel's
    range.

    Args:
        image: (C, H, W).
        kept: The pixels that stay, (H, W), boolean.

    Raises:
        ImportError: If OpenCV is not installed.

    Reference:
        Telea, "An Image Inpainting Technique Based on the Fast Marching Method", 2004; as implemented in OpenCV.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "Telea's inpainting needs OpenCV, but the module cv2 is not installed; run "
            "`pip install captum-xnn[inpainting]`, or leave fill out"
        ) from error

    def march(unit: _Array, lost: _Array) -> _Array:
        # One 16-bit channel at a time: OpenCV accepts three channels in 8 bits only, and floats in [0, 1] come out far
        # off.
        channels = (np.round(unit * 65535)).astype(np.uint16)
        mask = lost.astype(np.uint8)
        return np.stack([cv2.inpaint(channel, mask, 3, cv2.INPAINT_TELEA) for channel in channels]) / 65535

    return _inpainted(image, kept, march)


def _inpainted(image: Tensor, kept: Tensor, inpaint: Callable[[_Array, _Array], _Array]) -> Tensor:
    """Scale channels to [0, 1], run an inpainting algorithm, and scale the image back to its own range."""
    if not bool(kept.any()):
        return torch.zeros_like(image)
    kept_pixels = image[:, kept].double()
    low = kept_pixels.amin(1)[:, None, None]
    span = kept_pixels.amax(1)[:, None, None] - low
    unit = (image.double() - low) / torch.where(span > 0, span, 1)
    known_only = torch.where(kept, unit, 0).cpu().numpy()
    filled = torch.from_numpy(inpaint(known_only, (~kept).cpu().numpy())).to(low)
    return torch.where(kept, image, (filled * span + low).to(image.dtype))


def keep_top(images: Tensor, masks: Tensor, fill: FillOrColour = "biharmonic") -> Tensor:
    """Keep the masked pixels of each image and replace all others by the fill, (N, C, H, W).

    Args:
        images: (N, C, H, W).
        masks: The pixels that stay, (N, H, W), boolean.
        fill: Replaces lost pixels: the name of a fill, a fill, or a colour in the images' own scale.

    Raises:
        ValueError: If the shapes do not fit each other, the masks are not boolean, or the fill has another name.

    Example:
        >>> masks = torch.tensor([[[True, False]]])
        >>> keep_top(torch.tensor([[[[5.0, 7.0]]]]), masks, 0.0)
        tensor([[[[5., 0.]]]])
    """
    refuse_channels_last(images)
    fitting = images.dim() == 4 and masks.shape == (len(images), *images.shape[2:])
    if not fitting or masks.dtype != torch.bool:
        raise ValueError(
            f"images are {tuple(images.shape)} and masks {tuple(masks.shape)} of {masks.dtype}; pass images (N, C, H, "
            "W), and boolean masks (N, H, W) made by top_pixels from maps of the images' size"
        )
    paint = _fill(fill)
    masks = masks.to(images.device)
    made = images.clone()
    for i in range(len(images)):
        made[i] = torch.where(masks[i], images[i], paint(images[i], masks[i]))
    return made


def _fill(fill: FillOrColour) -> Fill:
    """Look up a fill by name, or make one of a colour."""
    if isinstance(fill, str):
        fills: dict[str, Fill] = {"biharmonic": biharmonic, "telea": telea}
        if fill not in fills:
            raise ValueError(f"fill {fill!r} does not exist; pass 'biharmonic', 'telea', a colour or a function")
        return fills[fill]
    return fill if callable(fill) else constant(fill)


def keep_top_accuracy(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    labels: Tensor,
    n_pixels: int,
    *,
    contributions: Tensor | None = None,
    fill: FillOrColour = "biharmonic",
    batch_size: int = 32,
) -> float:
    """Compute the share of images that the model classifies correctly from their n strongest pixels, in [0, 1].

    A module runs in eval mode and gets its mode back afterwards. With all pixels kept, the result is the model's
    ordinary accuracy.

    Args:
        model: Computes outputs (N, classes) from images.
        images: (N, C, H, W), as the model takes them.
        maps: One map per image, (N, H, W), such as the 1-Heatmap. With ``contributions``, the maps of all x-features,
            (N, K, H, W) or (N, K, C, H, W).
        labels: The correct classes, (N,). Pass the model's own predictions to measure the share that stays the same.
        n_pixels: How many pixels to keep, 0 to H W; the paper keeps 300, 500 and 1,000 of 224 x 224.
        contributions: v_i E_i, (N, K). The maps of an image are then mixed in proportion to its positive contributions.
        fill: Replaces lost pixels: ``"biharmonic"`` inpainting, ``"telea"``, which is ten times faster and needs
            OpenCV, a function ``fill(image, kept)`` of an image (C, H, W) and its kept pixels (H, W), or a colour in
            the images' own scale: one number, or one for each channel.
        batch_size: How many images run through the model together.

    Raises:
        ValueError: If the shapes do not fit each other, there are no images, or the fill has another name.

    Example:
        >>> images = torch.tensor([[[[9.0, 0.0, 0.0]]], [[[0.0, 0.0, 9.0]]]])
        >>> def model(x):
        ...     return x[:, 0, 0]
        >>> labels = torch.tensor([0, 2])
        >>> keep_top_accuracy(model, images, images[:, 0], labels, 1, fill=0.0)
        1.0

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, Table .5.
    """
    if not len(images) or not len(images) == len(maps) == len(labels) or labels.dim() != 1:
        raise ValueError(
            f"images are {tuple(images.shape)}, maps {tuple(maps.shape)} and labels {tuple(labels.shape)}; pass "
            "one map (N, H, W) and one label (N,) for each of N > 0 images"
        )
    masks = top_pixels(maps if contributions is None else combined(maps, contributions), n_pixels)
    right = 0
    with untouched(model) if isinstance(model, nn.Module) else nullcontext(), torch.no_grad():
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            classes = model(keep_top(images[rows], masks[rows], fill)).argmax(1)
            right += int((classes == labels[rows].to(classes.device)).sum())
    return right / len(images)
