"""Tables that commands print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from captum_xnn.explanation import middle_cut
from captum_xnn.layers._targets import Target

if TYPE_CHECKING:
    from captum_xnn.cli._model_and_inputs import ModelAndInputs
    from captum_xnn.explainer import Explainer

__all__ = ["aligned", "number", "shortfalls", "targets_cells", "targets_header"]

_WIDEST = 40
"""Characters of the outputs of a joint explainer, or of a class's name."""


def targets_header(opened: ModelAndInputs) -> list[str]:
    """Return the headings of the columns that say which outputs are explained."""
    return ["target"] if opened.model_file.classes is None else ["target", "class"]


def targets_cells(opened: ModelAndInputs, targets: Sequence[Target]) -> list[str]:
    """Return the indices of some outputs, and their names if the model's classes have names."""
    cells = [", ".join(map(str, targets))]
    if opened.model_file.classes is not None:
        cells.append(", ".join(map(opened.name_of, targets)))
    return [middle_cut(cell, _WIDEST) for cell in cells]


def shortfalls(opened: ModelAndInputs, explainers: Iterable[Explainer]) -> list[str]:
    """Return a sentence for each explainer that has fewer x-features than the fit was asked for."""
    some = list(explainers)
    return [
        e.shortfall
        if len(some) == 1
        else f"{middle_cut(', '.join(map(opened.name_of, e.targets)), _WIDEST)}: {e.shortfall}"
        for e in some
        if e.shortfall
    ]


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows under a header, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, *rows]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def number(value: float | None) -> str:
    """Format a figure with four decimals, a count without, and a missing one as a dash."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
