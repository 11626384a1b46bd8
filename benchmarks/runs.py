"""Runs that go on where they were cut off: a line of JSON for every job, then a table of means with their intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats
from tqdm import tqdm

Line = dict[str, Any]


class Column(NamedTuple):
    """A figure in a table."""

    key: str
    title: str
    digits: int = 3


def measured(out: Path, jobs: Iterable[Line], measure: Callable[[Line], Line], *, title: str = "jobs") -> list[Line]:
    """Returns all lines of OUT/results.jsonl after measuring what it lacks.

    Args:
        out: Folder, made if need be.
        jobs: What tells one job from another, such as its method, class and seed.
        measure: Gives the figures of a job.
        title: Of the progress bar.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "results.jsonl"
    lines = list(_lines(log))
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))  # less the line that a crash cut short
    left = [job for job in jobs if not any(job.items() <= line.items() for line in lines)]
    for job in tqdm(left, title):
        lines.append({**job, **measure(job)})
        with log.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    return lines


def _lines(log: Path) -> Iterable[Line]:
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def interval(values: Iterable[float | None]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95 % confidence interval by Student's t; numbers only."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return math.nan, math.nan
    mean = math.fsum(known) / len(known)
    if len(known) < 2:
        return mean, math.nan
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1) / len(known))
    return mean, float(stats.t.ppf(0.975, len(known) - 1)) * error


def summary(lines: Iterable[Line], by: str, columns: Sequence[Column]) -> dict[str, Line]:
    """Returns how many lines each group has, with mean and half interval of every figure."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(str(line[by]), []).append(line)
    return {
        name: {"fits": len(of)} | {c.key: interval(line.get(c.key) for line in of) for c in columns}
        for name, of in groups.items()
    }


def table(
    lines: Iterable[Line],
    by: str,
    columns: Sequence[Column],
    *,
    paper: Mapping[str, Mapping[str, float]] | None = None,
    order: Sequence[str] = (),
) -> str:
    """Returns mean ± half interval of every group in Markdown, the paper's value in brackets.

    Args:
        lines: Of one or more groups.
        by: Key of what tells the groups apart.
        columns: What to show.
        paper: The paper's values, by group and column.
        order: Groups to come first.
    """
    found = summary(lines, by, columns)
    out = [f"| {by} | fits | {' | '.join(c.title for c in columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order)):
        known = (paper or {}).get(name, {})
        cells = [_cell(*found[name][c.key], c.digits, known.get(c.key)) for c in columns]
        out.append(f"| {name} | {found[name]['fits']} | {' | '.join(cells)} |")
    return "\n".join(out)


def _cell(mean: float, half: float, digits: int, paper: float | None) -> str:
    if math.isnan(mean):
        return ""
    shown = f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
    return shown + ("" if paper is None else f" ({paper:g})")


def write(out: Path, text: str, figures: Mapping[str, Any]) -> None:
    """Prints a table and writes it to OUT/table.md, with its figures in OUT/table.json."""
    (out / "table.md").write_text(text + "\n")
    (out / "table.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text)
