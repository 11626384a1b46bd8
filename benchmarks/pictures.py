"""Pictures of the tables of docs/evaluation: one for each finding, drawn from the tables themselves.

Other scripts write the tables. Nothing is measured here.

    python -m benchmarks.pictures --tables docs/tables --pictures docs/_static
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.runs import save

METHOD, CONTROL, OTHER = "#0072b2", "#d55e00", "0.6"


class Dot(NamedTuple):
    """A row of a picture."""

    name: str
    value: float
    half: float = 0.0
    """Half of the interval."""
    control: bool = False
    chance: float | None = None


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of a list-table."""
    head, *rows = [[cell.strip() for cell in re.split(r"\n +-", row)] for row in path.read_text().split("   * - ")[1:]]
    return head, rows


def dots(path: Path, column: str, names: Sequence[str] = (), *, chance: bool = False) -> list[Dot]:
    """Returns a column of a table, without empty cells.

    Args:
        path: Of the table. Names of controls are in italics there.
        column: Its title.
        names: Rows to show; all if not given.
        chance: Whether the next column holds the chance.
    """
    head, rows = read_table(path)
    at, found = head.index(column), []
    for row in rows:
        name = row[0].strip("*")
        if row[at] and (not names or name in names):
            value, _, half = row[at].strip("*").partition(" ± ")
            by_chance = float(row[at + 1].partition(" ± ")[0]) if chance else None
            found.append(Dot(name, float(value), float(half or 0), row[0].startswith("*"), by_chance))
    return found


def figure_of(width: float, height: float, panels: int = 1, *, share: bool = False) -> tuple[Any, list[Any]]:
    """Returns an empty figure and its panels, side by side."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.fonttype"], mpl.rcParams["svg.hashsalt"] = "none", "scoreboard"
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=share)[0])


def save_svg(figure: Any, path: Path) -> None:
    """Writes a figure, the same bytes for the same figure."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    save(path, content.getvalue())


def dot_plot(panels: dict[str, list[Dot]], label: str, *, least: float | None = 0.0, mark: float | None = None) -> Any:
    """Returns a figure with a panel for each table: values with their intervals, hollow diamonds at chance.

    Args:
        panels: Dots by title. All panels have the same rows, those of the first.
        label: Of the values.
        least: Left end of the axis.
        mark: Value of a dashed line.
    """
    rows = [dot.name for dot in next(iter(panels.values()))][::-1]
    figure, axes = figure_of(2.3 + 2.6 * len(panels), 0.3 * len(rows) + 1.1, len(panels), share=True)
    for axis, (title, found) in zip(axes, panels.items(), strict=True):
        for dot in found:
            color, y = CONTROL if dot.control else METHOD, rows.index(dot.name)
            axis.plot([dot.value - dot.half, dot.value + dot.half], [y, y], color=color, linewidth=4, alpha=0.3)
            axis.plot([dot.value], [y], "s" if dot.control else "o", color=color, markersize=6, clip_on=False)
            if dot.chance is not None:
                axis.plot([dot.chance], [y], "D", color="0.3", markersize=5, fillstyle="none")
        if mark is not None:
            axis.axvline(mark, color="0.4", linestyle="--", linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(label, fontsize=8)
        axis.set_xlim(left=least)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].set_ylim(-0.6, len(rows) - 0.4)
    return figure


def pictures(tables: Path) -> dict[str, Any]:
    """Returns the figures of the findings, by name."""
    parts = dots(tables / "contributions_parts.inc", "selectivity", ("groups", "SRAE", "random groups"))
    limits = [dot._replace(control=True) for dot in dots(tables / "contributions_limits.inc", "selectivity")]
    twice = 2 * next(dot.value for dot in parts if dot.name == "random groups")
    pairs = {"figures by hand": "by_hand", "figures, trained": "trained", "FunnyBirds": "funnybirds"}
    shares = {title: dots(tables / f"pairs_{name}.inc", "share", chance=True) for title, name in pairs.items()}
    effects = {
        title: dots(tables / "part_effects.inc", column)
        for title, column in {"over the parts of a bird": "SD", "within each part, over birds": "within"}.items()
    }
    unexplained = {
        title: dots(tables / f"scoreboard_{name}.inc", "F_reg")
        for title, name in {"FunnyBirds": "funnybirds", "birds": "birds"}.items()
    }
    return {
        "evaluation_unexplained": dot_plot(unexplained, "F_reg, in logits"),
        "evaluation_selectivity": dot_plot({"FunnyBirds": [*parts, *limits]}, "selectivity", mark=twice),
        "evaluation_pairs": dot_plot(shares, "share of the part's own x-feature"),
        "evaluation_parts": dot_plot(effects, "rank correlation with the true effect", least=None),
    }


def main(given: argparse.Namespace) -> None:
    """Draws all pictures."""
    for name, figure in pictures(given.tables).items():
        save_svg(figure, given.pictures / f"{name}.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=Path("docs/tables"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/_static"))
    main(parser.parse_args())
