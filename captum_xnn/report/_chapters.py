"""Chapters of a report: verdict, figures, cards and scatter plot of one target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from captum_xnn.report._examples import TargetContent, decimals
from captum_xnn.report._typicality import mark_usual
from captum_xnn.report._verdict import Stability, on_maps, on_stability, on_unexplained, stability, verdict

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.explainer import Explainer

__all__ = ["chapter"]

_FINE = 0.01
_DOTS = 400


def chapter(
    found: TargetContent, shown: Sequence[Mapping[str, Any]], training: Explainer, *, kind: str, unit: str
) -> dict[str, Any]:
    """Make the chapter of a target, as the template takes it. Marks usual and unusual examples in the rows.

    Args:
        found: Rows, cards and figures of the target.
        shown: The examples of the page, with captions.
        training: The target's explainer.
        kind: Inputs of the page: "images", "texts" or "table".
        unit: Unit of the output.
    """
    score, deviation = found.faithfulness.compute(), found.faithfulness.mean_deviation()
    unusual = mark_usual(found.rows, found.positive_contributions)
    reasons = (
        on_unexplained(score.f_reg, deviation, score.examples, exact=training.is_exact, unit=unit),
        on_stability(_stability(found.contributions)),
        on_maps(found.patches, kind=kind),
    )
    return {
        "key": str(found.target),
        "label": found.label,
        "score": {**score._asdict(), "deviation": deviation},
        "training": _training(training),
        "cards": found.cards,
        "scatter": _scatter(found.rows, shown),
        "mean_outputs": _mean_outputs(found.rows),
        "unusual": None if unusual is None else _fields(unusual),
        "decimals": decimals(found.rows),
        "classes": found.classes,
        "patches": None if found.patches is None else _fields(found.patches),
        "verdict": _fields(verdict(*reasons)),
    }


def _stability(pairs: Sequence[tuple[Tensor, Tensor]]) -> Stability | None:
    """Compare the contributions of two fits, batch by batch; return None without a second fit."""
    if sum(len(first) for first, _ in pairs) < 2:
        return None
    return stability(*(torch.cat(some) for some in zip(*pairs, strict=True)))


def _training(explainer: Any) -> dict[str, Any]:
    """Return the facts of an explainer's fit that the page shows."""
    return {
        name: getattr(explainer, name) for name in ("is_exact", "f_reg", "examples", "positives", "floor", "shortfall")
    }


def _fields(value: Any) -> Any:
    """Convert named tuples to dicts."""
    if hasattr(value, "_asdict"):
        return {name: _fields(field) for name, field in value._asdict().items()}
    return [_fields(each) for each in value] if isinstance(value, tuple) else value


def _mean_outputs(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Compute the mean outputs for positives and for other images; None if either group is empty."""
    own, others = ([row["prediction"] for row in rows if row["is_positive"] is wanted] for wanted in (True, False))
    return (sum(own) / len(own), sum(others) / len(others)) if own and others else None


def _scatter(rows: Sequence[Mapping[str, Any]], images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay out dots of unexplained parts against predictions, and ticks, in the coordinates of a 480 x 240 drawing."""
    left, right, top, bottom = 52.0, 468.0, 12.0, 200.0
    x, y = [row["prediction"] for row in rows], [row["prediction"] - row["sum"] for row in rows]
    # Errors below a percent of the outputs' range look small, as they are.
    reach = max(*(abs(v) for v in y), _FINE * (max(x) - min(x)), 1e-9)
    x_ticks, y_ticks = _ticks(min(x), max(x), 6), _ticks(-reach, reach, 5)
    low, high = min(x_ticks[0], *x), max(x_ticks[-1], *x)
    size = max(-y_ticks[0], y_ticks[-1], reach)

    def across(v: float) -> float:
        return float(round(left + (right - left) * (v - low) / (high - low), 1))

    def up(v: float) -> float:
        return float(round((top + bottom) / 2 - (bottom - top) / 2 * v / size, 1))

    step = -(-len(rows) // _DOTS)
    return {
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "x": [(across(v), f"{v:g}".replace("-", "\N{MINUS SIGN}")) for v in x_ticks],
        "y": [(up(v), f"{v:g}".replace("-", "\N{MINUS SIGN}")) for v in y_ticks],
        "dots": [
            (across(x[i]), up(y[i]), rows[i]["is_positive"], images[i]["caption"], y[i]) for i in range(0, len(x), step)
        ],
        "left_out": step > 1,
    }


def _ticks(low: float, high: float, bins: int) -> list[float]:
    """Return round numbers that cover a range."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return [float(v) for v in MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
