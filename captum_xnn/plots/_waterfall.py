r"""The sum of an explanation as a waterfall: bias, contributions, surrogate, unexplained part and prediction.

.. math:: b + \sum_i v_i E_i = \bar y, \qquad \bar y + (\hat y - \bar y) = \hat y

The bias begins at zero. Every following term begins at the end of the term before it. The last, unexplained term ends
at the model's output.

Conventions:
    K x-features; all numbers are in one unit, logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from captum_xnn.plots._colours import BARS, BLUES, FRAME, INK, LINE, NEUTRAL, ORANGES
from captum_xnn.plots._numbers import Array
from captum_xnn.plots._panels import colour_of
from captum_xnn.plots._sentence import decimals

__all__ = ["Sum", "draw_waterfall", "plain", "signed"]


@dataclass(frozen=True)
class Sum:
    """The terms of one explanation, all in one unit.

    Example:
        >>> total = Sum(np.array([-0.5, 0.1, 2.0]), bias=1.0, surrogate=2.6, prediction=2.7, largest=2)
        >>> total.order, float(total.others)
        ([2, 0], 0.1)
    """

    contributions: Array
    """(K,)."""
    bias: float
    surrogate: float
    """Bias plus contributions."""
    prediction: float
    """The model's output."""
    largest: int | None = None
    """How many x-features to show, chosen by the size of their contributions; all x-features if None."""

    @property
    def order(self) -> list[int]:
        """The x-features to show, by falling contribution."""
        by_size = np.argsort(-np.abs(self.contributions), kind="stable")
        shown = set(by_size[: self.largest].tolist())
        return [int(k) for k in np.argsort(-self.contributions, kind="stable") if int(k) in shown]

    @property
    def n_others(self) -> int:
        """Number of x-features that are not shown."""
        return len(self.contributions) - len(self.order)

    @property
    def others(self) -> float:
        """Sum of the contributions that are not shown."""
        return float(np.delete(self.contributions, self.order).sum())

    @property
    def decimals(self) -> int:
        """Number of decimals for all numbers of one picture, so that a reader can add them up."""
        return decimals([*self.contributions.tolist(), self.bias, self.surrogate, self.prediction])


class _Row(NamedTuple):
    label: str
    start: float
    step: float
    colour: object
    hatch: str | None
    text: str
    text_colour: str
    bold: bool = False


def draw_waterfall(axes: Axes, total: Sum, labels: Sequence[str], unit: str) -> None:
    """Draw the sum from top to bottom, with a dashed line at the model's own output.

    Args:
        axes: Where to draw.
        total: The terms.
        labels: K names in the numbering of the explainer, short enough to stand beside a row.
        unit: Unit of all numbers, written at the axis.

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().subplots()
        >>> draw_waterfall(axes, Sum(np.array([2.0]), bias=1.0, surrogate=3.0, prediction=2.5), ["beak"], "logits")
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['bias', 'beak', 'x-features', 'unexplained', 'model']
    """
    rows = _rows(total, labels)
    for at, row in enumerate(rows):
        axes.barh(
            at, row.step, left=row.start, height=0.66, color=row.colour, hatch=row.hatch, edgecolor="white", linewidth=0
        )
    # A line joins each bar's end to the next bar. A total begins at zero, so the line meets its end instead.
    for at, row in enumerate(rows[:-1]):
        axes.plot([row.start + row.step] * 2, [at - 0.33, at + 1.33], color=LINE, linewidth=0.7)
    axes.axvline(0, color=LINE, linewidth=0.8, zorder=0)
    axes.axvline(total.prediction, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0.5)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8, color=INK, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    _draw_frame(axes, unit)
    _draw_numbers(axes, rows)


def _rows(total: Sum, labels: Sequence[str]) -> list[_Row]:
    """List the bars from top to bottom."""
    unexplained = total.prediction - total.surrogate
    steps = [(labels[k], float(total.contributions[k])) for k in total.order]
    if total.n_others:
        steps.append((f"{total.n_others} others", total.others))

    def number(value: float) -> str:
        return signed(value, total.decimals)

    def shown(value: float) -> str:
        return plain(value, total.decimals)

    rows = [_Row("bias", 0.0, total.bias, BARS["bias"], None, number(total.bias), NEUTRAL)]
    end = total.bias
    for name, step in steps:
        # Bars that lower the output are hatched, so that they differ in grey print, too.
        colour, hatch = (ORANGES(0.6), None) if step > 0 else (BLUES(0.6), "////")
        rows.append(_Row(name, end, step, colour, hatch, number(step), colour_of(step)))
        end += step
    return [
        *rows,
        _Row("x-features", 0.0, total.surrogate, BARS["x-features"], None, shown(total.surrogate), INK, True),
        _Row("unexplained", total.surrogate, unexplained, BARS["unexplained"], "xxxx", number(unexplained), NEUTRAL),
        _Row("model", 0.0, total.prediction, BARS["model"], None, shown(total.prediction), INK, True),
    ]


def _draw_frame(axes: Axes, unit: str) -> None:
    """Reduce the frame to the axis that is needed to read numbers off."""
    axes.use_sticky_edges = False
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(unit, fontsize=8, color=NEUTRAL, labelpad=2, parse_math=False)
    axes.tick_params(axis="x", labelsize=8, color=FRAME, labelcolor=NEUTRAL)
    axes.tick_params(axis="y", length=0)
    axes.set_facecolor("white")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FRAME)


def _draw_numbers(axes: Axes, rows: Sequence[_Row]) -> None:
    """Write the numbers in a column on the right, where no bar can overlap them."""
    longest = max(len(row.text) for row in rows)
    for at, row in enumerate(rows):
        axes.annotate(
            row.text,
            (1.0, at),
            # Right-aligned, at the width of a digit at this font size, so that the decimal points align.
            (4 + 5.6 * longest, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            fontweight="bold" if row.bold else "normal",
            color=row.text_colour,
        )


def plain(value: float, digits: int) -> str:
    """Format a number with a true minus sign, because a hyphen is harder to see.

    Args:
        value: The number.
        digits: Number of decimals.

    Example:
        >>> plain(-0.04, 1), plain(2.0, 2)
        ('0.0', '2.00')
    """
    text = f"{value:.{digits}f}"
    return (text if float(text) else text.lstrip("-")).replace("-", "\N{MINUS SIGN}")


def signed(value: float, digits: int) -> str:
    """Format a number with its sign; a number that rounds to zero has no sign.

    Args:
        value: The number.
        digits: Number of decimals.

    Example:
        >>> signed(2.0, 1), signed(0.04, 1)
        ('+2.0', '0.0')
    """
    text = plain(value, digits)
    return f"+{text}" if value > 0 and float(text) else text
