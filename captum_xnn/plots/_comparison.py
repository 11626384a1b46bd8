"""Figure of a comparison of methods: one panel for each measure, one line for each method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from captum_xnn.plots._colours import CONTROL, INK, POINT

if TYPE_CHECKING:
    from captum_xnn.comparison._table import MethodComparison

__all__ = ["draw_comparison"]

# Most panels beside each other.
_COLUMNS = 4


def draw_comparison(found: MethodComparison) -> Figure:
    """Draw the mean and the interval of each method in a panel for each measure; a control is a small hollow point.

    Args:
        found: The comparison.

    Raises:
        ValueError: If its columns are controls and counts only.
    """
    panels = [m for m in found.measures if m.best]
    if not panels:
        raise ValueError(
            "the selected columns are controls only, or counts, which have no panels; select a measure beside them"
        )
    controls = [m for m in found.measures if not m.best and m.key.startswith(tuple(f"{p.key}_" for p in panels))]
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    size = (1.5 + 2.3 * columns, 0.3 + rows * (0.8 + 0.32 * len(found.methods)))
    figure = Figure(figsize=size, layout="constrained")
    heights = range(len(found.methods))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes, measure in zip(grid, [*panels, *[None] * (rows * columns - len(panels))], strict=True):
        if measure is None:
            axes.remove()
            continue
        for height, method in zip(heights, found.methods, strict=True):
            for control in controls:
                chance = found.estimate(method, control.key) if control.key.startswith(f"{measure.key}_") else None
                if chance is not None:
                    axes.plot(chance.mean, height, "o", markersize=5, fillstyle="none", color=CONTROL)
            own = found.estimate(method, measure.key)
            if own is not None:
                half = (own.half or 0.0) if measure.is_sampled else 0.0
                axes.errorbar(own.mean, height, xerr=half, fmt="o", markersize=5, capsize=3, color=POINT)
        axes.set_title(f"{measure.title}\n({measure.best} is best)", fontsize=9, color=INK)
        axes.grid(axis="x", alpha=0.3)
        if measure.best == "low":  # distances to 0 can then be compared by eye
            axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.tick_params(labelsize=8)
        axes.set_yticks(list(heights), found.methods)
        axes.set_ylim(len(found.methods) - 0.5, -0.5)
    if controls:
        figure.supxlabel("Hollow points are controls: random groups, and maps of noise.", fontsize=8, color=INK)
    return figure
