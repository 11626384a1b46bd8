"""Scales: bring maps to [-1, 1] and images to [0, 1], so that pictures can show them.

Conventions:
    K x-features, C channels, H and W pixels. Contributions are in logits. A scale is a function of maps (K, H, W) and
    contributions (K,), and returns maps in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from captum_xnn.plots._numbers import Array, Numbers, as_array, finite

__all__ = [
    "Channels",
    "Scale",
    "checked_contributions",
    "checked_maps",
    "displayable",
    "own_scale",
    "scaled",
    "shared_scale",
]

Channels: TypeAlias = float | Sequence[float]
Scale: TypeAlias = Callable[[Array, Array], Array]

# A few extreme pixels are common in backpropagated maps. They must not decide the brightness of all others.
_CLIP_QUANTILE = 0.995


def checked_contributions(contributions: Numbers) -> Array:
    """Check the contributions of one example, and return them as an array (K,).

    Args:
        contributions: The contributions.
    """
    array = finite(contributions, "contributions")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"contributions are {array.shape}, not (K,) of one example; pick one example, as in contributions[0], or "
            "use show_gallery for several examples"
        )
    return array


def checked_maps(maps: Numbers, n_features: int) -> Array:
    """Check the maps of one example and sum them over channels, (K, H, W).

    Args:
        maps: (K, H, W) or (K, C, H, W).
        n_features: Number K of contributions.
    """
    array = finite(maps, "maps")
    if array.ndim not in (3, 4) or len(array) != n_features or array.size == 0:
        raise ValueError(
            f"maps are {array.shape}, not (K, H, W) or (K, C, H, W) for K = {n_features} contributions; pick one "
            "example, as in maps[0], and give one map for each contribution"
        )
    return array if array.ndim == 3 else array.sum(1)


def displayable(image: Numbers, mean: Channels | None, std: Channels | None) -> Array:
    """Turn an image into (H, W, 3) in [0, 1]; bytes and values in [0, 1] keep their range, others are stretched.

    Args:
        image: (H, W), (1, H, W) or (3, H, W).
        mean: Mean of each channel with which the image was normalised; None if it was not.
        std: Standard deviation of each channel.
    """
    array = finite(image, "pixels of the image")
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or len(array) not in (1, 3) or array.size == 0:
        raise ValueError(
            f"image is {array.shape}, not (H, W), (1, H, W) or (3, H, W); pick one example and put the channels first"
        )
    if mean is not None or std is not None:
        array = _denormalised(array, mean, std)
    elif as_array(image).dtype == np.uint8:
        array = array / 255
    low, high = array.min(), array.max()
    if low < 0 or high > 1:
        # One stretch for all channels, because a stretch for each would change the hues. A constant image becomes grey.
        array = (array - low) / (high - low) if high > low else np.full_like(array, 0.5)
    return np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0)


def _denormalised(array: Array, mean: Channels | None, std: Channels | None) -> Array:
    """Undo the normalisation of an image (C, H, W); the result is in [0, 1]."""
    if mean is None or std is None:
        raise ValueError(
            "mean and std go together, but one of them is None; pass both as they were used to normalise the image"
        )
    middle, deviation = (np.asarray(value, dtype=np.float64).reshape(-1) for value in (mean, std))
    if middle.size not in (1, len(array)) or deviation.size not in (1, len(array)) or not (deviation > 0).all():
        raise ValueError(
            f"mean is {mean} and std is {std} for {len(array)} channels; pass both as they were used to normalise the "
            "image, each as one number or one for each channel, with std > 0"
        )
    true = array * deviation[:, None, None] + middle[:, None, None]
    # Half a range of tolerance allows for noise that was added after normalising.
    if true.min() < -0.5 or true.max() > 1.5:
        raise ValueError(
            f"mean and std bring the image to values from {true.min():.3g} to {true.max():.3g}, not to [0, 1]; pass "
            "mean and std for images in [0, 1]: divide the ones for bytes by 255"
        )
    return np.asarray(true.clip(0, 1))


def scaled(scale: Scale, maps: Array, contributions: Array) -> Array:
    """Apply a scale to maps (K, H, W), and check that the result can be drawn.

    Args:
        scale: The scale.
        maps: The maps.
        contributions: Contributions (K,).
    """
    shown = finite(scale(maps, contributions), "values from scale")
    if shown.shape != maps.shape or np.abs(shown).max() > 1 + 1e-6:
        raise ValueError(
            f"scale returns shape {shown.shape} with values up to {np.abs(shown).max():.3g} in size, not maps "
            f"{maps.shape} in [-1, 1]; divide by one level and clip, as own_scale does"
        )
    return shown


def _levels(maps: Array) -> Array:
    """Compute for each map the absolute value (K,) that gets full colour; 0 for an empty map.

    The quantile leaves out zeros, so a map of few pixels keeps a positive level.
    """
    sizes = [np.abs(m[m != 0]) for m in maps]
    return np.array([np.quantile(s, _CLIP_QUANTILE, method="higher") if s.size else 0.0 for s in sizes])


def _divided(maps: Array, levels: Array) -> Array:
    """Divide the maps by their levels (K,) and clip them to [-1, 1]; a level of 0 gives zeros."""
    safe = np.where(levels > 0, levels, 1.0)[:, None, None]
    return np.asarray(np.clip(maps / safe, -1.0, 1.0) * (levels > 0)[:, None, None])


def shared_scale(maps: Numbers, contributions: Numbers) -> Array:
    r"""Put the maps (K, H, W) on one common scale in [-1, 1], each as strong as its contribution.

    .. math:: \frac{v_i E_i}{\sum_{hw} |m_{ihw}|} \, m_{ihw}

    This spreads each contribution over its pixels, in logits per pixel. All maps are then divided by the largest of
    their 99.5 % quantiles, and clipped. An x-feature with a small contribution looks faint. So does an x-feature with a
    widely spread map: use :func:`own_scale` to see where such a map lies.

    Args:
        maps: Attribution maps (K, H, W), or (K, C, H, W) to sum over channels.
        contributions: Contributions (K,) in logits. The maps take their signs.

    Raises:
        ValueError: If the shapes do not fit or a value is not finite.

    Example:
        >>> shared_scale([[[1.0, 3.0]], [[2.0, 2.0]]], [8.0, -4.0])
        array([[[ 0.33333333,  1.        ]],
        <BLANKLINE>
               [[-0.33333333, -0.33333333]]])
    """
    weights = checked_contributions(contributions)
    flat = checked_maps(maps, len(weights))
    totals = np.abs(flat).sum((1, 2))
    density = flat * (weights / np.where(totals > 0, totals, 1.0))[:, None, None]
    return _divided(density, np.full(len(flat), _levels(density).max()))


def own_scale(maps: Numbers, contributions: Numbers) -> Array:
    """Stretch each map (K, H, W) to [-1, 1] by itself, so that only places can be compared between maps.

    Each map is divided by the 99.5 % quantile of its absolute values and clipped. If an x-feature contributes exactly
    0, its map is empty on every scale, because it says nothing about the output.

    Args:
        maps: Attribution maps (K, H, W), or (K, C, H, W) to sum over channels.
        contributions: Contributions (K,) in logits. The maps take their signs.

    Raises:
        ValueError: If the shapes do not fit or a value is not finite.

    Example:
        >>> own_scale([[[1.0, 4.0]], [[2.0, 2.0]]], [8.0, -4.0])
        array([[[ 0.25,  1.  ]],
        <BLANKLINE>
               [[-1.  , -1.  ]]])
    """
    weights = checked_contributions(contributions)
    flat = checked_maps(maps, len(weights)) * np.sign(weights)[:, None, None]
    return _divided(flat, _levels(flat))
