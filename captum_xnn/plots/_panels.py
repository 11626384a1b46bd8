"""Single panels of a picture, drawn into matplotlib axes: an image, and a map over it in one of several styles.

A style is a function of axes, image and map. :func:`overlay` and :func:`contours` are styles; write your own if needed.

Conventions:
    An image is (H, W, 3) in [0, 1], a map (h, w) in [-1, 1]. The map may be coarser than the image, and is stretched
    over it. Orange raises the output, blue lowers it; the pair is safe for colour-blind readers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from captum_xnn.plots._colours import BLUES, FRAME, INK, LOWERS, NEUTRAL, ORANGES, RAISES
from captum_xnn.plots._numbers import Array

__all__ = [
    "Style",
    "caption",
    "colour_of",
    "contours",
    "draw_image",
    "note",
    "overlay",
    "wrapped",
]

Style: TypeAlias = Callable[[Axes, Array, Array], None]

# Contours are drawn at these absolute values; lines are wider and darker at higher values. The maps are smoothed by
# this share of the image's longer side, because the maps of many methods change from pixel to pixel.
_CONTOURS = (0.25, 0.5, 0.75)
_SMOOTHING = 0.015


def overlay(axes: Axes, image: Array, shown: Array) -> None:
    """Draw a map in colours over the image in pale greys; weaker values are more transparent.

    In grey print stronger values are darker, but positive and negative values look alike: see :func:`contours`.

    Args:
        axes: Where to draw.
        image: (H, W, 3) in [0, 1].
        shown: Map (h, w) in [-1, 1].

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().subplots()
        >>> overlay(axes, np.zeros((4, 4, 3)), np.eye(2))
        >>> len(axes.images)
        2
    """
    draw_image(axes, _faded(image))
    if not shown.any():
        return
    height, width = image.shape[:2]
    coarse = shown.shape[0] < height or shown.shape[1] < width
    axes.imshow(_coloured(shown), extent=(0, width, height, 0), interpolation="bilinear" if coarse else "auto")


def contours(axes: Axes, image: Array, shown: Array) -> None:
    """Draw a map as contours at 25, 50 and 75 % of the full scale over the image in its own colours.

    Lines are solid for values that raise the output and dashed for values that lower it, so both differ in grey print.
    The map is smoothed a little.

    Args:
        axes: Where to draw.
        image: (H, W, 3) in [0, 1].
        shown: Map (h, w) in [-1, 1].

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().subplots()
        >>> contours(axes, np.zeros((8, 8, 3)), np.outer(np.hanning(8), np.hanning(8)))
        >>> len(axes.images), len(axes.collections)
        (1, 1)
    """
    draw_image(axes, image)
    height, width = image.shape[:2]
    # Pad with zeros beyond the image's edge, so that contours close there.
    smooth = np.pad(_smooth(shown, height, width), 1)
    at = [np.array([0, *np.arange(size) + 0.5, size]) for size in (width, height)]
    found = False
    for sign, colours, style in ((1, ORANGES, "solid"), (-1, BLUES, "dashed")):
        levels = [level for level in _CONTOURS if level < (sign * smooth).max()]
        if levels:
            lines = axes.contour(
                *at,
                sign * smooth,
                levels=levels,
                colors=[colours(level) for level in levels],
                linewidths=[0.7 + 1.4 * level for level in levels],
                linestyles=style,
            )
            # A light rim, because the lines cross light and dark parts of the image.
            lines.set_path_effects([withStroke(linewidth=3.2, foreground="white", alpha=0.75)])
            found = True
    if shown.any() and not found:
        note(axes, f"below {_CONTOURS[0]:.0%}")


def _smooth(shown: Array, height: int, width: int) -> Array:
    """Enlarge the map to the image's size (H, W), and smooth it."""
    from scipy import ndimage

    factors = (height / shown.shape[0], width / shown.shape[1])
    full = ndimage.zoom(shown, factors, order=1, mode="nearest", grid_mode=True)
    return np.asarray(ndimage.gaussian_filter(full, _SMOOTHING * max(height, width), mode="nearest"))


def draw_image(axes: Axes, image: Array) -> None:
    """Draw an image without ticks.

    Args:
        axes: Where to draw.
        image: (H, W, 3) in [0, 1].
    """
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    # Anchored at the top, an image keeps its distance to the text above if the layout shrinks it.
    axes.set_anchor("N")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=FRAME, linewidth=0.6)


def note(axes: Axes, text: str) -> None:
    """Write a few words at the lower end of a panel.

    Args:
        axes: The panel.
        text: The words.
    """
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "boxstyle": "round,pad=0.3"}
    axes.text(0.5, 0.06, text, transform=axes.transAxes, ha="center", va="bottom", fontsize=8.5, color=INK, bbox=box)


def caption(axes: Axes, name: str, number: str, *, colour: str = INK, size: float = 11) -> None:
    """Write a name and a number above a panel, the number below the name.

    Args:
        axes: The panel.
        name: Text of one or two lines; dollar signs in it do not start mathematics.
        number: Text of one line.
        colour: Colour of the number.
        size: Font size of the number, in points.
    """
    axes.set_title(name, fontsize=9, color=INK, pad=19, parse_math=False)
    axes.annotate(
        number,
        (0.5, 1.0),
        (0, 3),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=size,
        fontweight="bold" if size > 9 else "normal",
        color=colour,
        parse_math=False,
    )


def colour_of(value: float) -> str:
    """Choose the colour of a contribution's sign.

    Args:
        value: The contribution.

    Example:
        >>> colour_of(2.0) == RAISES, colour_of(0.0) == NEUTRAL
        (True, True)
    """
    return RAISES if value > 0 else LOWERS if value < 0 else NEUTRAL


def wrapped(name: str, width: int, lines: int = 2) -> str:
    """Wrap a name to a number of lines, and shorten it with an ellipsis if it is longer.

    Args:
        name: Any text.
        width: Characters on a line.
        lines: Largest number of lines.

    Example:
        >>> wrapped("a rather long name", 10, lines=1)
        'a rather …'
    """
    rows = textwrap.wrap(name, width)
    if len(rows) > lines:
        last = rows[lines - 1]
        if len(last) + 2 > width:  # drop the last word, or cut the only one
            last = last.rsplit(" ", 1)[0][: width - 2]
        rows = [*rows[: lines - 1], f"{last} \N{HORIZONTAL ELLIPSIS}"]
    return "\n".join(rows) or name


def _faded(image: Array) -> Array:
    """Turn the image (H, W, 3) into pale greys, still recognisable and lighter than any colour on top."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    return np.repeat((0.70 + 0.29 * grey)[:, :, None], 3, axis=2)


def _coloured(shown: Array) -> NDArray[Any]:
    """Colour a map in [-1, 1] as (H, W, 4); weaker values are more transparent."""
    size = np.abs(shown)
    colours = np.where((shown >= 0)[:, :, None], ORANGES(size), BLUES(size))
    colours[:, :, 3] = np.minimum(1.0, 1.15 * size**0.65)
    return colours
