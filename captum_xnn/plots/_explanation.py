r"""Pictures of explanations, drawn with matplotlib from plain tensors or arrays.

Conventions:
    K x-features, N examples, C channels, H and W pixels; the maps may be coarser than the image.
    Contributions are :math:`v_i E_i`, in logits. Their sum with the bias is the *surrogate*. x-features have numbers
    from 1 in pictures and from 0 in arguments.
    A map is positive where the input drives its x-feature towards the sign of its value. Its positive part has the
    colour of the contribution's sign: orange raises the output, blue lowers it. Its negative part has the other colour.
    A backend with signed maps (DeepLift, gradients) must therefore pass maps times the sign of :math:`E_i`.

This module does not use pyplot. Its figures need no display, no matplotlib backend and no closing, and a notebook shows
them directly.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021,
    Fig. 8-10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from captum_xnn.plots._colours import BLUES, INK, NEUTRAL, ORANGES
from captum_xnn.plots._names import Names, resolve_names
from captum_xnn.plots._numbers import Array, Numbers, examples_of, finite, table_of
from captum_xnn.plots._panels import (
    Style,
    caption,
    colour_of,
    draw_image,
    note,
    overlay,
    wrapped,
)
from captum_xnn.plots._picture import Picture
from captum_xnn.plots._scales import (
    Channels,
    Scale,
    checked_contributions,
    checked_maps,
    displayable,
    own_scale,
    scaled,
    shared_scale,
)
from captum_xnn.plots._sentence import decimals
from captum_xnn.plots._waterfall import Sum, draw_waterfall, plain, signed

__all__ = ["show_contributions", "show_explanation", "show_gallery"]

PANELS_PER_ROW = 5


def _sum(contributions: Numbers, *, bias: Numbers, surrogate: Numbers, prediction: Numbers, largest: int | None) -> Sum:
    """Collect the terms of one explanation, and check that they add up."""
    weights = checked_contributions(contributions)
    offset, given = _scalar(bias, "bias"), _scalar(surrogate, "surrogate")
    found = weights.sum() + offset
    # Sums in bfloat16 may lose one part in a hundred of the terms' sizes.
    if abs(found - given) > 0.01 * (np.abs(weights).sum() + abs(offset)) + 1e-6:
        raise ValueError(
            f"bias and contributions sum to {offset:g} + {weights.sum():g} = {found:g}, and the surrogate is "
            f"{given:g}; pass all three from one example and one target"
        )
    if largest is not None and largest < 1:
        raise ValueError(f"largest is {largest}; pass at least 1, or leave it out to show all x-features")
    return Sum(weights, offset, given, _scalar(prediction, "prediction"), largest)


def _scalar(value: Numbers, noun: str) -> float:
    """Turn a single number into a float."""
    array = finite(value, noun)
    if array.size != 1:
        raise ValueError(
            f"{noun} has shape {array.shape}, and is not one number; pick one example and one target, as in {noun}[0]"
        )
    return float(array.item())


def _canvas(
    axes: Axes | Figure | SubFigure | None, width: float, height: float, title: str | None
) -> Figure | SubFigure:
    """Prepare an empty white figure to draw in: the given one, or a new one with a size in inches."""
    if axes is None:
        figure = Picture(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        canvas: Figure | SubFigure = figure
    elif isinstance(axes, Axes):
        canvas = _in_place_of(axes)
    elif isinstance(axes, (Figure, SubFigure)):
        canvas = axes
    else:
        raise TypeError(
            f"axes is a {type(axes).__name__}; pass an Axes, a Figure or a SubFigure, and of several pick one, as in "
            "axes[0]"
        )
    # Always white, against the user's style sheet: the colours of the maps fade to a light background.
    canvas.set_facecolor("white")
    if canvas.figure.get_layout_engine() is None:
        canvas.figure.set_layout_engine("constrained")
    if title is not None:
        canvas.suptitle(title, fontsize=12, fontweight="bold", color=INK, parse_math=False)
    return canvas


def _in_place_of(axes: Axes) -> SubFigure:
    """Remove axes and put a subfigure in their place."""
    spec, parent = axes.get_subplotspec(), axes.figure
    if spec is None or not isinstance(parent, (Figure, SubFigure)):
        raise ValueError(
            "several panels can replace axes only in a grid, but these axes belong to no grid; make them with "
            "subplots, or pass a SubFigure"
        )
    axes.remove()
    return parent.add_subfigure(spec)


def _draw_map(axes: Axes, image: Array, shown: Array, contribution: float, style: Style) -> None:
    """Draw a map (h, w) in [-1, 1] over the image (H, W, 3), or note why there is nothing to see."""
    style(axes, image, shown)
    if not shown.any():
        # An x-feature can contribute with an empty map, for instance through the encoder's biases.
        note(axes, "empty map" if contribution else "no contribution")


def _draw_one_heatmap(axes: Axes, image: Array, one: Array, style: Style) -> None:
    """Draw the single map of the model's output on a scale of its own."""
    shown = own_scale(one[None], [1.0])[0]
    style(axes, image, shown)
    if not shown.any():
        note(axes, "empty map")


def _one(one_heatmap: Numbers) -> Array:
    """Check the map of one example's output and sum it over channels, (H, W)."""
    array = finite(one_heatmap, "values of one_heatmap")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"one_heatmap is {array.shape}, not (H, W) or (C, H, W); pick one example, as in one_heatmap[0]"
        )
    return array if array.ndim == 2 else array.sum(0)


def _draw_key(figure: Figure | SubFigure) -> None:
    """Draw the legend of the two colours below the maps."""
    handles = [
        Patch(color=ORANGES(0.6), label="raises the output"),
        Patch(color=BLUES(0.6), label="lowers it"),
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


def show_contributions(
    contributions: Numbers,
    *,
    bias: Numbers,
    surrogate: Numbers,
    prediction: Numbers,
    names: Names | None = None,
    title: str | None = None,
    unit: str = "logits",
    largest: int | None = None,
    axes: Axes | Figure | SubFigure | None = None,
) -> Figure:
    """Draw a waterfall: bias and contributions sum to the surrogate; the unexplained rest leads to the prediction.

    The contribution that raises the output most comes first. Use this picture for tables and text, where there is no
    image.

    Args:
        contributions: Contributions (K,) in logits.
        bias: The explainer's bias, one number in logits.
        surrogate: Bias plus contributions, one number in logits.
        prediction: The model's output, one number in logits.
        names: Names of the x-features: a list, a mapping from their numbers, or the file that a report exports.
        title: Text above the picture.
        unit: Unit of all numbers, written at the axis.
        largest: How many x-features to show, chosen by the size of their contributions; the others share one bar. All
            x-features if None.
        axes: Where to draw: axes, or a figure or subfigure to fill; a new figure if None.

    Raises:
        ValueError: If a shape does not fit, a value is not finite, or the terms do not add up.

    Example:
        >>> figure = show_contributions([-0.5, 2.0], bias=1.0, surrogate=2.5, prediction=2.6)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['bias', 'x-feature 2', 'x-feature 1', 'x-features', 'unexplained', 'model']
    """
    total = _sum(contributions, bias=bias, surrogate=surrogate, prediction=prediction, largest=largest)
    labels = [wrapped(name, 26) for name in resolve_names(names, len(total.contributions))]
    if isinstance(axes, Axes):
        draw_waterfall(axes, total, labels, unit)
        if title is not None:
            axes.set_title(title, fontsize=10, fontweight="bold", color=INK, parse_math=False)
        return _root(axes)
    canvas = _canvas(axes, 5.5, 1.0 + 0.3 * (len(total.order) + 4 + bool(total.n_others)), title)
    draw_waterfall(canvas.subplots(), total, labels, unit)
    return canvas.figure


def _root(axes: Axes) -> Figure:
    """Find the figure of axes, also through subfigures."""
    canvas: Any = axes.figure
    return cast(Figure, canvas.figure)


def show_explanation(
    image: Numbers,
    maps: Numbers,
    contributions: Numbers,
    *,
    bias: Numbers,
    surrogate: Numbers,
    prediction: Numbers,
    names: Names | None = None,
    title: str | None = None,
    target_name: str | None = None,
    one_heatmap: Numbers | None = None,
    scale: Scale = shared_scale,
    style: Style = overlay,
    mean: Channels | None = None,
    std: Channels | None = None,
    unit: str = "logits",
    largest: int | None = None,
    axes: Axes | Figure | SubFigure | None = None,
) -> Figure:
    """Draw one example's explanation: the image, the maps in order of contribution, and the waterfall of the sum.

    The x-feature's name and its contribution stand above each map. The x-feature that raises the output most comes
    first.

    Args:
        image: Image (C, H, W) or (H, W) with C = 1 or 3. Bytes and values within [0, 1] are shown unchanged. Any other
            range, such as a normalised image's, is stretched to [0, 1] unless mean and std are given.
        maps: Attribution maps (K, C, H, W), (K, 1, H, W) or (K, H, W); channels are summed. Maps of another height and
            width than the image are stretched over it.
        contributions: Contributions (K,) in logits.
        bias: The explainer's bias, one number in logits.
        surrogate: Bias plus contributions, one number in logits.
        prediction: The model's output, one number in logits.
        names: Names of the x-features: a list, a mapping from their numbers, or the file that a report exports.
        title: Text above the picture.
        target_name: Name of the explained output, written above the image.
        one_heatmap: Map (C, H, W) or (H, W) of the model's own output, drawn beside the image on a scale of its own.
        scale: Any function of maps (K, H, W) and contributions (K,) that returns maps to draw (K, H, W) in [-1, 1]. The
            default makes each map as strong as its contribution. :func:`own_scale` shows where a faint map lies.
        style: Any function that draws an image (H, W, 3) and a map (h, w) in [-1, 1] into axes. The default lays the
            map over the image. :func:`~captum_xnn.plots.contours` draws lines.
        mean: Mean that normalisation subtracted from each channel of an image in [0, 1], a number or C of them.
        std: Standard deviation by which normalisation then divided each channel, a number or C of them.
        unit: Unit of all numbers, written at the axis.
        largest: How many x-features to show, chosen by the size of their contributions; all x-features if None.
        axes: Where to draw: a figure or subfigure to fill, or axes from ``subplots`` to replace; a new figure if None.

    Raises:
        ValueError: If a shape does not fit, a value is not finite, or the terms do not add up.

    Example:
        >>> image, maps = np.eye(4), np.ones((2, 4, 4))
        >>> figure = show_explanation(image, maps, [-0.5, 2.0], bias=1.0, surrogate=2.5, prediction=2.6)
        >>> [axes.get_title() for axes in figure.axes]
        ['image', 'x-feature 2', 'x-feature 1', 'bias + contributions']
    """
    total = _sum(contributions, bias=bias, surrogate=surrogate, prediction=prediction, largest=largest)
    pixels = displayable(image, mean, std)
    shown = scaled(scale, checked_maps(maps, len(total.contributions)), total.contributions)
    one = None if one_heatmap is None else _one(one_heatmap)
    labels = resolve_names(names, len(total.contributions))
    grid = _explanation_grid(len(total.order), pixels.shape[0] / pixels.shape[1], one is not None, title, axes)
    draw_image(grid.image, pixels)
    caption(grid.image, wrapped(target_name or "image", 24), _both(total), size=8)
    if grid.one is not None and one is not None:
        _draw_one_heatmap(grid.one, pixels, one, style)
        caption(grid.one, "1-Heatmap", "the whole output", size=8)
    for panel, k in zip(grid.maps, total.order, strict=True):
        value = float(total.contributions[k])
        _draw_map(panel, pixels, shown[k], value, style)
        caption(panel, wrapped(labels[k], 20), signed(value, total.decimals), colour=colour_of(value))
    draw_waterfall(grid.total, total, [wrapped(name, 20, lines=1) for name in labels], unit)
    grid.total.set_title("bias + contributions", fontsize=9, color=INK, pad=4)
    _draw_key(grid.pictures)
    return grid.pictures.figure


def _both(total: Sum) -> str:
    """Write prediction and surrogate as one text, or the prediction alone if both are wider than an image."""
    model, x_features = (plain(value, total.decimals) for value in (total.prediction, total.surrogate))
    both = f"model {model}, x-features {x_features}"
    return both if len(both) <= 28 else f"model {model}"


class _Grid(NamedTuple):
    """Places of an explanation's panels."""

    pictures: SubFigure
    image: Axes
    one: Axes | None
    maps: list[Axes]
    total: Axes


def _explanation_grid(
    n_maps: int, aspect: float, one: bool, title: str | None, axes: Axes | Figure | SubFigure | None
) -> _Grid:
    """Make places for the image, the 1-Heatmap, the maps in even rows, and the waterfall of the sum."""
    n_rows = math.ceil(n_maps / PANELS_PER_ROW)
    n_columns = math.ceil(n_maps / n_rows)
    n_big, big = 1 + one, min(n_rows, 2)
    aspect = min(max(aspect, 0.5), 2.0)
    cell, right = 1.6, 3.3
    height = max(n_rows * (cell * aspect + 0.5) + 0.3, 0.24 * (n_maps + 4)) + (0.35 if title else 0)
    left = cell * (big * n_big + n_columns)
    canvas = _canvas(axes, left + right, max(height, 2.3), title)
    # Separate subfigures, so that the axis below the waterfall takes no room from the maps.
    halves = canvas.add_gridspec(1, 2, width_ratios=[left, right])
    pictures, total = canvas.add_subfigure(halves[0]), canvas.add_subfigure(halves[1])
    grid = pictures.add_gridspec(n_rows, n_big + n_columns, width_ratios=[*[big] * n_big, *[1] * n_columns])
    image, *ones = (pictures.add_subplot(grid[:big, i]) for i in range(n_big))
    maps = [pictures.add_subplot(grid[k // n_columns, n_big + k % n_columns]) for k in range(n_maps)]
    return _Grid(pictures, image, ones[0] if ones else None, maps, total.subplots())


def show_gallery(
    images: Numbers,
    maps: Numbers,
    contributions: Numbers,
    *,
    feature_order: Sequence[int] | None = None,
    names: Names | None = None,
    title: str | None = None,
    row_names: Sequence[str] | None = None,
    one_heatmaps: Numbers | None = None,
    scale: Scale = shared_scale,
    style: Style = overlay,
    mean: Channels | None = None,
    std: Channels | None = None,
    axes: Axes | Figure | SubFigure | None = None,
) -> Figure:
    """Draw several examples as rows: the image, then one x-feature in each column, so that it can be named.

    Colours are comparable within a row. The contribution stands above each map.

    Args:
        images: Images (N, C, H, W) or (N, H, W) with C = 1 or 3, of any range; see :func:`show_explanation`.
        maps: Attribution maps (N, K, C, H, W) or (N, K, H, W); channels are summed.
        contributions: Contributions (N, K) in logits.
        feature_order: The x-features to show from left to right, counted from 0; all of them by falling mean
            contribution if None.
        names: Names of the x-features: a list, a mapping from their numbers, or the file that a report exports.
        title: Text above the picture.
        row_names: N texts written beside the images.
        one_heatmaps: Maps (N, C, H, W), (N, 1, C, H, W) or (N, H, W) of the model's own output, drawn beside the
            images, each on a scale of its own.
        scale: As in :func:`show_explanation`, applied to each row.
        style: As in :func:`show_explanation`.
        mean: As in :func:`show_explanation`.
        std: As in :func:`show_explanation`.
        axes: As in :func:`show_explanation`.

    Raises:
        ValueError: If a shape does not fit, a value is not finite, or an x-feature does not exist.

    Example:
        >>> images, maps = np.zeros((2, 4, 4)), np.ones((2, 3, 4, 4))
        >>> figure = show_gallery(images, maps, [[1.0, 5.0, 3.0], [0.0, 4.0, 1.0]])
        >>> [axes.get_title() for axes in figure.axes[:4]]
        ['image', 'x-feature 2', 'x-feature 3', 'x-feature 1']
    """
    table = table_of(contributions)
    columns = _columns(feature_order, table)
    labels, digits = resolve_names(names, table.shape[1]), decimals(table.ravel().tolist())
    pixels = [displayable(image, mean, std) for image in examples_of(images, len(table), "images")]
    shown = [
        scaled(scale, checked_maps(row_maps, len(row)), row)
        for row_maps, row in zip(examples_of(maps, len(table), "maps"), table, strict=True)
    ]
    ones = [] if one_heatmaps is None else [_one(m) for m in examples_of(one_heatmaps, len(table), "one_heatmaps")]
    heads = ["image", *(["1-Heatmap"] if ones else []), *(labels[k] for k in columns)]
    texts = _row_names(row_names, len(table))
    grid = _gallery_grid(len(table), len(heads), pixels[0].shape[0] / pixels[0].shape[1], title, axes)
    for i, row in enumerate(grid):
        draw_image(row[0], pixels[i])
        row[0].set_ylabel(wrapped(texts[i], 18), fontsize=8, color=INK, parse_math=False)
        if ones:
            _draw_one_heatmap(row[1], pixels[i], ones[i], style)
        for panel, k in zip(row[-len(columns) :], columns, strict=True):
            value = float(table[i, k])
            _draw_map(panel, pixels[i], shown[i][k], value, style)
            caption(panel, "", signed(value, digits), colour=colour_of(value))
    for panel, name in zip(grid[0], heads, strict=True):
        panel.set_title(wrapped(name, 18), fontsize=9, color=INK, pad=19, parse_math=False)
    canvas: Any = grid[0][0].figure
    _draw_key(canvas)
    return _root(grid[0][0])


def _columns(feature_order: Sequence[int] | None, table: Array) -> list[int]:
    """List the x-features to show from left to right, by falling mean contribution if None."""
    n_features = table.shape[1]
    if feature_order is None:
        return [int(k) for k in np.argsort(-table.mean(0), kind="stable")]
    columns = [int(k) for k in feature_order]
    if not columns or not all(0 <= k < n_features for k in columns):
        raise ValueError(
            f"feature_order is {columns}; list x-features from 0 to {n_features - 1}. Arguments count them from 0, "
            "pictures from 1"
        )
    return columns


def _row_names(row_names: Sequence[str] | None, n_examples: int) -> list[str]:
    """Check the N texts beside the images; empty texts by default."""
    if row_names is None:
        return [""] * n_examples
    if isinstance(row_names, str) or len(row_names) != n_examples:
        raise ValueError(
            f"row_names is {row_names!r} for N = {n_examples} examples; pass a list with one text for each"
        )
    return [str(name) for name in row_names]


def _gallery_grid(
    n_rows: int, n_columns: int, aspect: float, title: str | None, axes: Axes | Figure | SubFigure | None
) -> list[list[Axes]]:
    """Make rows of places, each for an image and its maps."""
    aspect = min(max(aspect, 0.5), 2.0)
    cell = 1.45
    height = n_rows * (cell * aspect + 0.25) + 0.5 + (0.35 if title else 0)
    grid = _canvas(axes, cell * n_columns + 0.3, height, title).subplots(n_rows, n_columns, squeeze=False)
    return [list(row) for row in grid]
