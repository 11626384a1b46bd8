r"""Pictures of explanations, drawn with matplotlib from plain tensors or arrays.

Conventions:
    K x-features, N examples, C channels, H and W pixels; the maps may be coarser than the image.
    Contributions are :math:`v_i E_i`, in logits; with the bias they sum to what the x-features give, the
    *surrogate*. x-features are numbered from 1 in pictures and from 0 in arguments.
    A map is positive where the input drives its x-feature to the value it has. Its positive part is drawn in
    the colour of the contribution's sign (orange raises the output, blue lowers it), its negative part in the
    other one. A backend with signed maps (DeepLift, gradients) therefore hands in maps times the sign of
    :math:`E_i`.

Nothing here touches pyplot: the figures need no display, no backend and no closing, and a notebook shows them
as they are.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021,
    Fig. 8-10.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = ["Scale", "own_scale", "shared_scale", "show_contributions", "show_explanation", "show_gallery"]

Array: TypeAlias = NDArray[np.float64]
Numbers: TypeAlias = Tensor | ArrayLike
Scale: TypeAlias = Callable[[Array, Array], Array]

# A few extreme pixels, common in backpropagated maps, must not decide how bright everything else is.
CLIP_QUANTILE = 0.995
PANELS_PER_ROW = 5

# The colour-blind tell orange from blue. As text on white, each has a contrast above 4.5.
RAISES, LOWERS, NEUTRAL = "#b84300", "#0b5fa5", "#5c5c5c"
INK = "#222222"
_ORANGES = LinearSegmentedColormap.from_list("raises", ["#f98f2f", "#e8590c", "#a32f00"])
_BLUES = LinearSegmentedColormap.from_list("lowers", ["#5aaeea", "#1f7ac4", "#063f7c"])


@final
class _Picture(Figure):
    """A Figure that a notebook shows although pyplot, which would register it, was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def _numpy(values: Numbers) -> NDArray[Any]:
    """Returns the values as an array; floats as float64, because numpy has no bfloat16."""
    if isinstance(values, Tensor):
        values = (values.double() if values.is_floating_point() else values).detach().cpu().numpy()
    return np.asarray(values)


def _array(values: Numbers, noun: str) -> Array:
    """Returns the values as a float64 array, after refusing what is not finite."""
    array = _numpy(values).astype(np.float64)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"expected finite {noun}, got {bad} of {array.size} values NaN or infinite; "
            "look for the overflow in the model or the heatmap backend, half precision is the usual cause"
        )
    return array


def _contributions(contributions: Numbers) -> Array:
    """Returns the contributions (K,) checked."""
    array = _array(contributions, "contributions")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"expected contributions (K,) of one example with K >= 1, got shape {array.shape}; "
            "pick one example, as in contributions[0], or use show_gallery for several"
        )
    return array


def _maps(maps: Numbers, n_features: int) -> Array:
    """Returns the maps of one example summed over channels, (K, H, W)."""
    array = _array(maps, "maps")
    if array.ndim not in (3, 4) or len(array) != n_features or array.size == 0:
        raise ValueError(
            f"expected maps (K, H, W) or (K, C, H, W) for K = {n_features} contributions, got shape "
            f"{array.shape}; pick one example, as in maps[0], and give one map for each contribution"
        )
    return array if array.ndim == 3 else array.sum(1)


def _displayable(image: Numbers) -> Array:
    """Returns the image as (H, W, 3) in [0, 1]: bytes and [0, 1] as they are, other ranges stretched."""
    array = _array(image, "pixels of the image")
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or len(array) not in (1, 3) or array.size == 0:
        raise ValueError(
            f"expected an image (H, W), (1, H, W) or (3, H, W), got shape {array.shape}; "
            "pick one example and put the channels first"
        )
    if _numpy(image).dtype == np.uint8:
        array = array / 255
    low, high = array.min(), array.max()
    if low < 0 or high > 1:
        # One stretch for all channels: one for each would change the hues. A constant image becomes grey.
        array = (array - low) / (high - low) if high > low else np.full_like(array, 0.5)
    return np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0)


def _names(names: Sequence[str] | None, n_features: int) -> list[str]:
    """Returns K names, by default the numbers of the x-features counted from 1."""
    if names is None:
        return [f"x-feature {k + 1}" for k in range(n_features)]
    if isinstance(names, str) or len(names) != n_features:
        raise ValueError(
            f"expected one name for each of K = {n_features} x-features, got {names!r}; "
            "give a list in the numbering of the explainer, not in the order of the picture"
        )
    return [str(name) for name in names]


def _scaled(scale: Scale, maps: Array, contributions: Array) -> Array:
    """Returns what a scale makes of the maps, after checking that it can be drawn."""
    shown = _array(scale(maps, contributions), "values from scale")
    if shown.shape != maps.shape or np.abs(shown).max() > 1 + 1e-6:
        raise ValueError(
            f"expected scale to return maps {maps.shape} in [-1, 1], got shape {shown.shape} with values "
            f"up to {np.abs(shown).max():.3g} in size; divide by one level and clip, as shared_scale does"
        )
    return shown


def _levels(maps: Array) -> Array:
    """Returns for each map the size (K,) that is drawn in full colour; 0 for an empty map.

    Zeros are left out of the quantile, so that a map of few pixels keeps a positive level.
    """
    sizes = [np.abs(m[m != 0]) for m in maps]
    return np.array([np.quantile(s, CLIP_QUANTILE, method="higher") if s.size else 0.0 for s in sizes])


def _divided(maps: Array, levels: Array) -> Array:
    """Returns the maps divided by their levels (K,) and clipped to [-1, 1]; a level of 0 gives zeros."""
    safe = np.where(levels > 0, levels, 1.0)[:, None, None]
    return np.asarray(np.clip(maps / safe, -1.0, 1.0) * (levels > 0)[:, None, None])


def shared_scale(maps: Numbers, contributions: Numbers) -> Array:
    r"""Returns the maps (K, H, W) on one common scale in [-1, 1], each as strong as its contribution.

    .. math:: \frac{|v_i E_i|}{\sum_{hw} |m_{ihw}|} \, m_{ihw}

    spreads the size of each contribution over its pixels, in logits per pixel; all maps are then divided by
    the largest of their 99.5 % quantiles and clipped. An x-feature that contributes little looks faint. So
    does one whose map is spread widely: use :func:`own_scale` to see where such a map lies.

    Args:
        maps: Attribution maps (K, H, W), or (K, C, H, W) to be summed over channels.
        contributions: Contributions (K,) in logits. The maps take their signs.

    Raises:
        ValueError: If the shapes do not fit or a value is not finite.

    Example:
        >>> shared_scale([[[1.0, 3.0]], [[2.0, 2.0]]], [8.0, -4.0])
        array([[[ 0.33333333,  1.        ]],
        <BLANKLINE>
               [[-0.33333333, -0.33333333]]])
    """
    weights = _contributions(contributions)
    flat = _maps(maps, len(weights))
    totals = np.abs(flat).sum((1, 2))
    density = flat * (weights / np.where(totals > 0, totals, 1.0))[:, None, None]
    return _divided(density, np.full(len(flat), _levels(density).max()))


def own_scale(maps: Numbers, contributions: Numbers) -> Array:
    """Returns the maps (K, H, W), each stretched to [-1, 1] by itself, so that only places can be compared.

    Each map is divided by the 99.5 % quantile of its sizes and clipped. An x-feature that contributes exactly
    0 is empty on every scale: it is off, and its map says nothing about the output.

    Args:
        maps: Attribution maps (K, H, W), or (K, C, H, W) to be summed over channels.
        contributions: Contributions (K,) in logits. The maps take their signs.

    Raises:
        ValueError: If the shapes do not fit or a value is not finite.

    Example:
        >>> own_scale([[[1.0, 4.0]], [[2.0, 2.0]]], [8.0, -4.0])
        array([[[ 0.25,  1.  ]],
        <BLANKLINE>
               [[-1.  , -1.  ]]])
    """
    weights = _contributions(contributions)
    flat = _maps(maps, len(weights)) * np.sign(weights)[:, None, None]
    return _divided(flat, _levels(flat))


def _decimals(values: Array) -> int:
    """Returns how many decimals show three digits of the largest value."""
    largest = float(np.abs(values).max())
    return min(max(2 - math.floor(math.log10(largest)), 1), 6) if largest > 0 else 1


def _plain(value: float, decimals: int) -> str:
    """Returns the number with a true minus sign, which is easier to see than a hyphen."""
    text = f"{value:.{decimals}f}"
    return (text if float(text) else text.lstrip("-")).replace("-", "\N{MINUS SIGN}")


def _signed(value: float, decimals: int) -> str:
    """Returns the number with its sign; what rounds to zero has none."""
    text = _plain(value, decimals)
    return f"+{text}" if value > 0 and float(text) else text


def _colour(value: float) -> str:
    """Returns the colour of a contribution's sign."""
    return RAISES if value > 0 else LOWERS if value < 0 else NEUTRAL


def _wrapped(name: str, width: int, lines: int = 2) -> str:
    """Returns a name on at most so many lines, shortened with an ellipsis."""
    return "\n".join(textwrap.wrap(name, width, max_lines=lines, placeholder=" \N{HORIZONTAL ELLIPSIS}")) or name


@dataclass(frozen=True)
class _Sum:
    """One explanation's terms in one unit: contributions (K,), bias, their sum, and the model's output."""

    contributions: Array
    bias: float
    surrogate: float
    prediction: float

    @property
    def order(self) -> list[int]:
        """Returns the x-features by contribution, the one that raises the output most first."""
        return [int(k) for k in np.argsort(-self.contributions, kind="stable")]

    @property
    def decimals(self) -> int:
        """Returns the decimals that all numbers of one picture share, so that a reader can add them up."""
        return _decimals(np.array([*self.contributions, self.bias, self.surrogate, self.prediction]))


def _sum(contributions: Numbers, *, bias: Numbers, surrogate: Numbers, prediction: Numbers) -> _Sum:
    """Returns the terms of one explanation, after checking that they add up."""
    weights = _contributions(contributions)
    offset, given = _scalar(bias, "bias"), _scalar(surrogate, "surrogate")
    found = weights.sum() + offset
    # One part in a hundred of the terms' sizes is what sums in bfloat16 may lose.
    if abs(found - given) > 0.01 * (np.abs(weights).sum() + abs(offset)) + 1e-6:
        raise ValueError(
            f"expected bias + contributions = surrogate, got {offset:g} + {weights.sum():g} = {found:g} "
            f"beside a surrogate of {given:g}; pass all three from one example and one target"
        )
    return _Sum(weights, offset, given, _scalar(prediction, "prediction"))


def _scalar(value: Numbers, noun: str) -> float:
    """Returns one number as a float."""
    array = _array(value, noun)
    if array.size != 1:
        raise ValueError(
            f"expected one number as {noun}, got shape {array.shape}; pick one example and one target, as in {noun}[0]"
        )
    return float(array.item())


def _figure(width: float, height: float, title: str | None) -> Figure:
    """Returns an empty white figure of a size in inches, laid out so that no text is cut off."""
    # White whatever the user's style sheet says, because the colours of the maps fade to a light background.
    figure = _Picture(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if title is not None:
        figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, parse_math=False)
    return figure


def _caption(axes: Axes, name: str, number: str, *, colour: str = INK, size: float = 11) -> None:
    """Writes the name and, below it, the number above a panel."""
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


def _draw_image(axes: Axes, image: Array) -> None:
    """Draws an image (H, W, 3) without ticks."""
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    # At the top of its place an image keeps its distance to the text above when the layout shrinks it.
    axes.set_anchor("N")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color="#bbbbbb", linewidth=0.6)


def _faded(image: Array) -> Array:
    """Returns the image (H, W, 3) in pale greys, still recognisable, with colours to go on top."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    return np.repeat((0.64 + 0.34 * grey)[:, :, None], 3, axis=2)


def _coloured(shown: Array) -> Array:
    """Returns colours (H, W, 4) for a map in [-1, 1]; the weaker, the more transparent."""
    size = np.abs(shown)
    colours = np.where((shown >= 0)[:, :, None], _ORANGES(size), _BLUES(size))
    colours[:, :, 3] = np.minimum(1.0, 1.15 * size**0.65)
    return colours


def _draw_map(axes: Axes, image: Array, shown: Array, contribution: float) -> None:
    """Draws a map (h, w) in [-1, 1] over the pale image (H, W, 3), or says why there is nothing to see."""
    _draw_image(axes, _faded(image))
    if shown.any():
        height, width = image.shape[:2]
        coarse = shown.shape[0] < height or shown.shape[1] < width
        axes.imshow(_coloured(shown), extent=(0, width, height, 0), interpolation="bilinear" if coarse else "auto")
        return
    # A feature may well contribute although its map is empty, e.g. through the encoder's biases.
    note = "empty map" if contribution else "no contribution"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "boxstyle": "round,pad=0.3"}
    axes.text(0.5, 0.06, note, transform=axes.transAxes, ha="center", va="bottom", fontsize=8.5, color=INK, bbox=box)


def _draw_key(figure: Figure | SubFigure) -> None:
    """Writes below the maps what the two colours mean."""
    handles = [
        Patch(color=_ORANGES(0.6), label="raises the output"),
        Patch(color=_BLUES(0.6), label="lowers it"),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=2,
        fontsize=8,
        frameon=False,
        labelcolor=NEUTRAL,
        handlelength=0.9,
        handleheight=0.9,
        borderpad=0,
    )


def _draw_steps(axes: Axes, total: _Sum) -> None:
    """Draws the bias, each contribution from where the last one ended, and their sum, from top to bottom."""
    steps = np.array([total.bias, *total.contributions[total.order]])
    ends = np.cumsum(steps)
    starts = ends - steps
    colours = ["#a8a8a8", *(_ORANGES(0.6) if step > 0 else _BLUES(0.6) for step in steps[1:])]
    axes.barh(range(len(steps)), steps, left=starts, height=0.66, color=colours)
    axes.barh(len(steps), total.surrogate, height=0.66, color="#444444")
    for row, end in enumerate(ends):
        axes.plot([end, end], [row - 0.33, row + 1.33], color="#888888", linewidth=0.7)


def _draw_waterfall(axes: Axes, total: _Sum, labels: Sequence[str], unit: str) -> None:
    """Draws the sum as a waterfall, with a diamond where the model's own prediction lies.

    The labels (K,) are in the numbering of the explainer and short enough to stand beside a row.
    """
    _draw_steps(axes, total)
    n_rows = len(total.order) + 3
    axes.axvline(0, color="#888888", linewidth=0.8, zorder=0)
    axes.plot(
        [total.prediction] * 2,
        [-0.5, n_rows - 1],
        color=INK,
        linewidth=0.9,
        linestyle=(0, (2, 2)),
        zorder=0.5,
    )
    axes.plot(total.prediction, n_rows - 1, marker="D", markersize=6, color=INK, linestyle="none")
    rows = ["bias", *(labels[k] for k in total.order), "x-features", "model"]
    axes.set_yticks(range(n_rows), rows, fontsize=8, color=INK, parse_math=False)
    axes.set_ylim(n_rows - 0.4, -0.6)
    axes.use_sticky_edges = False
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(unit, fontsize=8, color=NEUTRAL, labelpad=2, parse_math=False)
    axes.tick_params(axis="x", labelsize=8, color="#bbbbbb", labelcolor=NEUTRAL)
    axes.tick_params(axis="y", length=0)
    axes.set_facecolor("white")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    _draw_numbers(axes, total)


def _draw_numbers(axes: Axes, total: _Sum) -> None:
    """Writes the numbers of a waterfall as a column on its right, where no bar can run into them."""
    steps = [total.bias, *total.contributions[total.order]]
    numbers = [(_signed(step, total.decimals), _colour(step)) for step in steps]
    numbers[0] = (numbers[0][0], NEUTRAL)
    numbers += [(_plain(value, total.decimals), INK) for value in (total.surrogate, total.prediction)]
    longest = max(len(text) for text, _ in numbers)
    for row, (text, colour) in enumerate(numbers):
        axes.annotate(
            text,
            (1.0, row),
            # Right-aligned by the width of a digit at this size, so that the decimal points stand in line.
            (4 + 5.6 * longest, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            fontweight="bold" if row >= len(steps) else "normal",
            color=colour,
        )


def show_contributions(
    contributions: Numbers,
    *,
    bias: Numbers,
    surrogate: Numbers,
    prediction: Numbers,
    names: Sequence[str] | None = None,
    title: str | None = None,
    unit: str = "logits",
) -> Figure:
    """Returns a waterfall: bias and contributions add up to the x-features' output, beside the model's.

    The contribution that raises the output most comes first. Use it where there is no image,
    for tables and text.

    Args:
        contributions: Contributions (K,) in logits.
        bias: The explainer's bias, one number in logits.
        surrogate: What the x-features give, one number in logits: bias + contributions.
        prediction: What the model gives, one number in logits.
        names: K names in the numbering of the explainer, to replace "x-feature 1", ...
        title: Text above the picture.
        unit: Unit of all numbers, written at the axis.

    Raises:
        ValueError: If a shape does not fit, a value is not finite, or the terms do not add up.

    Example:
        >>> figure = show_contributions([-0.5, 2.0], bias=1.0, surrogate=2.5, prediction=2.6)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['bias', 'x-feature 2', 'x-feature 1', 'x-features', 'model']
    """
    total = _sum(contributions, bias=bias, surrogate=surrogate, prediction=prediction)
    figure = _figure(5.5, 1.0 + 0.3 * (len(total.order) + 3), title)
    labels = [_wrapped(name, 26) for name in _names(names, len(total.order))]
    _draw_waterfall(figure.subplots(), total, labels, unit)
    return figure


def show_explanation(
    image: Numbers,
    maps: Numbers,
    contributions: Numbers,
    *,
    bias: Numbers,
    surrogate: Numbers,
    prediction: Numbers,
    names: Sequence[str] | None = None,
    title: str | None = None,
    target_name: str | None = None,
    scale: Scale = shared_scale,
    unit: str = "logits",
) -> Figure:
    """Returns one example's explanation: the image, the maps in order of contribution, and the sum.

    Above each map stand the x-feature's name and its contribution; the one that raises the output most comes
    first.

    Args:
        image: Image (C, H, W) or (H, W) with C = 1 or 3. Bytes and values within [0, 1] are shown as they
            are; any other range, as of a normalised image, is stretched to [0, 1].
        maps: Attribution maps (K, C, H, W), (K, 1, H, W) or (K, H, W); channels are summed. Maps of other
            height and width than the image are stretched over it.
        contributions: Contributions (K,) in logits.
        bias: The explainer's bias, one number in logits.
        surrogate: What the x-features give, one number in logits: bias + contributions.
        prediction: What the model gives, one number in logits.
        names: K names in the numbering of the explainer, to replace "x-feature 1", ...
        title: Text above the picture.
        target_name: Name of the explained output, written above the image.
        scale: :func:`shared_scale`, :func:`own_scale`, or any function of maps (K, H, W) and contributions
            (K,) that returns what to draw (K, H, W) in [-1, 1].
        unit: Unit of all numbers, written at the axis.

    Raises:
        ValueError: If a shape does not fit, a value is not finite, or the terms do not add up.

    Example:
        >>> image, maps = np.eye(4), np.ones((2, 4, 4))
        >>> figure = show_explanation(image, maps, [-0.5, 2.0], bias=1.0, surrogate=2.5, prediction=2.6)
        >>> [axes.get_title() for axes in figure.axes]
        ['image', 'x-feature 2', 'x-feature 1', 'bias + contributions']
    """
    total = _sum(contributions, bias=bias, surrogate=surrogate, prediction=prediction)
    pixels = _displayable(image)
    shown = _scaled(scale, _maps(maps, len(total.order)), total.contributions)
    labels = _names(names, len(total.order))
    figure, image_axes, map_axes, sum_axes = _explanation_grid(
        len(total.order), pixels.shape[0] / pixels.shape[1], title
    )
    _draw_image(image_axes, pixels)
    model, x_features = (_plain(value, total.decimals) for value in (total.prediction, total.surrogate))
    _caption(image_axes, _wrapped(target_name or "image", 24), f"model {model}, x-features {x_features}", size=8)
    for axes, k in zip(map_axes, total.order, strict=True):
        value = float(total.contributions[k])
        _draw_map(axes, pixels, shown[k], value)
        _caption(axes, _wrapped(labels[k], 20), _signed(value, total.decimals), colour=_colour(value))
    _draw_waterfall(sum_axes, total, [_wrapped(name, 20, lines=1) for name in labels], unit)
    sum_axes.set_title("bias + contributions", fontsize=9, color=INK, pad=4)
    _draw_key(image_axes.figure)
    return figure


def _explanation_grid(n_maps: int, aspect: float, title: str | None) -> tuple[Figure, Axes, list[Axes], Axes]:
    """Returns a figure with places for the image, for each map, wrapped into even rows, and for the sum."""
    n_rows = math.ceil(n_maps / PANELS_PER_ROW)
    n_columns = math.ceil(n_maps / n_rows)
    big = min(n_rows, 2)
    aspect = min(max(aspect, 0.5), 2.0)
    cell, right = 1.6, 3.3
    height = n_rows * (cell * aspect + 0.5) + 0.3 + (0.35 if title else 0)
    left = cell * (big + n_columns)
    figure = _figure(left + right, max(height, 2.3), title)
    # Apart, so that the axis below the sum takes no room from the maps.
    halves = figure.add_gridspec(1, 2, width_ratios=[left, right])
    pictures, total = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    grid = pictures.add_gridspec(n_rows, 1 + n_columns, width_ratios=[big, *[1] * n_columns])
    image_axes = pictures.add_subplot(grid[:big, 0])
    map_axes = [pictures.add_subplot(grid[k // n_columns, 1 + k % n_columns]) for k in range(n_maps)]
    return figure, image_axes, map_axes, total.subplots()


def show_gallery(
    images: Numbers,
    maps: Numbers,
    contributions: Numbers,
    *,
    feature_order: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
    row_names: Sequence[str] | None = None,
    scale: Scale = shared_scale,
) -> Figure:
    """Returns several examples as rows: the image, then the same x-feature in each column, to name it by.

    Colours are comparable within a row. The contribution stands above each map.

    Args:
        images: Images (N, C, H, W) or (N, H, W) with C = 1 or 3, of any range, see :func:`show_explanation`.
        maps: Attribution maps (N, K, C, H, W) or (N, K, H, W); channels are summed.
        contributions: Contributions (N, K) in logits.
        feature_order: Which x-features to show from left to right, counted from 0. Where it is not given, all
            of them by their mean contribution, largest first.
        names: K names in the numbering of the explainer, to replace "x-feature 1", ...
        title: Text above the picture.
        row_names: N texts written beside the images.
        scale: :func:`shared_scale`, :func:`own_scale`, or a function like them, applied to each row.

    Raises:
        ValueError: If a shape does not fit, a value is not finite, or there is no such x-feature.

    Example:
        >>> images, maps = np.zeros((2, 4, 4)), np.ones((2, 3, 4, 4))
        >>> figure = show_gallery(images, maps, [[1.0, 5.0, 3.0], [0.0, 4.0, 1.0]])
        >>> [axes.get_title() for axes in figure.axes[:4]]
        ['image', 'x-feature 2', 'x-feature 3', 'x-feature 1']
    """
    table = _table(contributions)
    columns = _columns(feature_order, table)
    labels, decimals = _names(names, table.shape[1]), _decimals(table)
    pixels = [_displayable(image) for image in _examples(images, len(table), "images")]
    rows = zip(pixels, _examples(maps, len(table), "maps"), table, strict=True)
    figure, grid = _gallery_grid(table[:, columns].shape, pixels[0].shape[0] / pixels[0].shape[1], title)
    for axes, (image, row_maps, row) in zip(grid, rows, strict=True):
        shown = _scaled(scale, _maps(row_maps, len(row)), row)
        _draw_image(axes[0], image)
        for panel, k in zip(axes[1:], columns, strict=True):
            _draw_map(panel, image, shown[k], float(row[k]))
            _caption(panel, "", _signed(row[k], decimals), colour=_colour(row[k]))
    for panel, name in zip(grid[0], ["image", *(labels[k] for k in columns)], strict=True):
        panel.set_title(_wrapped(name, 18), fontsize=9, color=INK, pad=19, parse_math=False)
    for axes, name in zip(grid, _row_names(row_names, len(table)), strict=True):
        axes[0].set_ylabel(_wrapped(name, 18), fontsize=8, color=INK, parse_math=False)
    _draw_key(figure)
    return figure


def _table(contributions: Numbers) -> Array:
    """Returns the contributions of several examples (N, K) checked."""
    array = _array(contributions, "contributions")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"expected contributions (N, K) of N examples, got shape {array.shape}; "
            "give every example a row, or use show_explanation for a single one"
        )
    return array


def _examples(values: Numbers, n_examples: int, noun: str) -> NDArray[Any]:
    """Returns images or maps of N examples as an array."""
    array = _numpy(values)
    if array.ndim < 3 or len(array) != n_examples:
        raise ValueError(
            f"expected {noun} of the N = {n_examples} examples that have contributions, got shape "
            f"{array.shape}; put the examples first and give {noun} for the same ones"
        )
    return array


def _columns(feature_order: Sequence[int] | None, table: Array) -> list[int]:
    """Returns the x-features to show from left to right, by mean contribution unless told otherwise."""
    n_features = table.shape[1]
    if feature_order is None:
        return [int(k) for k in np.argsort(-table.mean(0), kind="stable")]
    columns = [int(k) for k in feature_order]
    if not columns or not all(0 <= k < n_features for k in columns):
        raise ValueError(
            f"expected feature_order to list x-features from 0 to {n_features - 1}, got {columns}; "
            "in arguments they are counted from 0, in pictures from 1"
        )
    return columns


def _row_names(row_names: Sequence[str] | None, n_examples: int) -> list[str]:
    """Returns N texts, empty ones by default."""
    if row_names is None:
        return [""] * n_examples
    if isinstance(row_names, str) or len(row_names) != n_examples:
        raise ValueError(
            f"expected one text for each of N = {n_examples} examples, got {row_names!r}; give a list of N row_names"
        )
    return [str(name) for name in row_names]


def _gallery_grid(shape: tuple[int, ...], aspect: float, title: str | None) -> tuple[Figure, list[list[Axes]]]:
    """Returns a figure with N rows of places for an image and its maps; shape is (N, maps per row)."""
    n_rows, n_columns = shape[0], shape[1] + 1
    aspect = min(max(aspect, 0.5), 2.0)
    cell = 1.45
    figure = _figure(cell * n_columns + 0.3, n_rows * (cell * aspect + 0.25) + 0.5 + (0.35 if title else 0), title)
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    return figure, [list(row) for row in grid]
