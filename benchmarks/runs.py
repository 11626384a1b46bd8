"""Runs that go on where they were cut off: a line of JSON for every job, then a table of means with their intervals."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

Line = dict[str, Any]


class Column(NamedTuple):
    """A figure in a table."""

    key: str
    title: str
    digits: int = 3


# Options that choose jobs, which tell themselves apart, or say where things lie.
_FREE = {
    "out", "activations", "workers", "classes", "methods", "rooms", "layers", "seed", "seeds", "alphas", "networks",
    "x_features", "tried_classes", "tried_seeds", "funnybirds", "birds", "classes_funnybirds", "tables",
    "quick", "halves", "pictures", "report", "again", "limits",
}  # fmt: skip


def settings(given: argparse.Namespace) -> Line:
    """Returns those options of a benchmark that figures depend on, paths in full."""
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(given).items()
        if name not in _FREE
    }


def measured(
    out: Path,
    jobs: Iterable[Line],
    measure: Callable[[Line], Line],
    *,
    title: str = "jobs",
    under: Line | None = None,
    again: Sequence[str] = (),
) -> list[Line]:
    """Returns all lines of OUT/results.jsonl after measuring what it lacks.

    Args:
        out: Folder, made if need be.
        jobs: What tells one job from another, such as its method, class and seed.
        measure: Gives the figures of a job.
        title: Of the progress bar.
        under: Settings that hold for all jobs (:func:`settings`), kept in OUT/settings.json. A run under others stops.
        again: Methods whose jobs are measured anew.
    """
    out.mkdir(parents=True, exist_ok=True)
    if under is not None:
        _hold(out / "settings.json", under)
    log, jobs = out / "results.jsonl", list(jobs)
    old = [job for job in jobs if job.get("method") in again]
    lines = [line for line in read_lines(log) if not any(job.items() <= line.items() for job in old)]
    save(log, "".join(json.dumps(line) + "\n" for line in lines).encode())  # less the line that a crash cut short
    left = [job for job in jobs if not any(job.items() <= line.items() for line in lines)]
    for job in tqdm(left, title):
        lines.append({**job, **measure(job)})
        with log.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    return lines


def _hold(file: Path, under: Line) -> None:
    """Stops if earlier results were measured under other settings."""
    if file.exists():
        known = json.loads(file.read_text())
        other = sorted(name for name in known.keys() | under.keys() if known.get(name) != under.get(name))
        if other:
            raise SystemExit(
                f"expected the settings of the results in {file.parent}, got another --{other[0].replace('_', '-')}: "
                f"{under.get(other[0])!r}, where it was {known.get(other[0])!r}; take another --out, or that setting"
            )
    save(file, json.dumps(under, indent=1).encode() + b"\n")


def save(file: Path, content: bytes) -> None:
    """Writes a file that is whole, or as it was, after a kill."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_bytes(content)
    os.replace(part, file)


def kept(cache: Path | None, of: Line, make: Callable[[], Any]) -> dict[str, Tensor]:
    """Returns activations Z and outputs y_hat from a file, or makes and keeps them.

    Args:
        cache: The file; nothing is kept without. One that a kill cut short does not exist.
        of: What they are of: network, layer and images. A file of others stops the run.
        make: Gives something with ``Z`` and ``y_hat``.
    """
    if cache is not None and cache.exists():
        found = torch.load(cache, weights_only=True)
        known = found.pop("of", of)  # files of earlier versions do not tell
        if known != of:
            raise SystemExit(
                f"expected activations of {of} in {cache}, got those of {known}; take another --out or --activations, "
                "or delete the file"
            )
        return {name: found[name] for name in ("Z", "y_hat")}
    made = make()
    found = {"Z": made.Z, "y_hat": made.y_hat}
    if cache is not None:
        content = io.BytesIO()
        torch.save({**found, "of": of}, content)
        save(cache, content.getvalue())
    return found


def read_lines(log: Path) -> Iterable[Line]:
    """Yields the lines of a log, without one that a kill cut short; none without a log."""
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
    """Returns how many lines each group has, with mean and half interval of every figure.

    Means are of what is finite; ``infinite`` says of each figure how many lines have infinity, if any: O2 of x-features
    of which one is a combination of others.
    """
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(str(line[by]), []).append(line)
    return {
        name: {"fits": len(of)}
        | {c.key: interval(line.get(c.key) for line in of) for c in columns}
        | {"infinite": {c.key: n for c in columns if (n := sum(_infinite(line.get(c.key)) for line in of))}}
        for name, of in groups.items()
    }


def _infinite(value: float | None) -> bool:
    return value is not None and math.isinf(value)


def table(
    lines: Iterable[Line],
    by: str,
    columns: Sequence[Column],
    *,
    paper: Mapping[str, Mapping[str, float]] | None = None,
    order: Sequence[str] = (),
) -> str:
    """Returns mean ± half interval of every group in Markdown, the paper's value in brackets.

    Infinite figures are not in the mean but counted after it, as "2 inf".

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
        cells = [
            _cell(*found[name][c.key], c.digits, known.get(c.key), found[name]["infinite"].get(c.key, 0))
            for c in columns
        ]
        out.append(f"| {name} | {found[name]['fits']} | {' | '.join(cells)} |")
    return "\n".join(out)


def _cell(mean: float, half: float, digits: int, paper: float | None, infinite: int) -> str:
    if math.isnan(mean) and not infinite:
        return ""
    shown = "" if math.isnan(mean) else f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
    counted = [shown] * bool(shown) + [f"{infinite} inf"] * bool(infinite)
    return ", ".join(counted) + ("" if paper is None else f" ({paper:g})")


def write(out: Path, text: str, figures: Mapping[str, Any]) -> None:
    """Prints a table and writes it to OUT/table.md, with its figures in OUT/table.json; null is no number."""
    save(out / "table.md", (text + "\n").encode())
    save(out / "table.json", json.dumps(_plain(figures), indent=1, allow_nan=False).encode() + b"\n")
    print(text)


def _plain(value: Any) -> Any:
    """Returns figures with None for NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
