"""Comparison of methods: means with intervals, as a table in several formats and as a figure.

Conventions:
    A measure has one value for each method, target and repeat. Intervals are Student's 95 % intervals of the mean over
    targets and repeats. A measure with fewer than two values has no interval.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from captum_xnn._files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MEASURES", "Estimate", "Measure", "MethodComparison"]


class Measure(NamedTuple):
    """A column of the table."""

    key: str
    """Name in :attr:`MethodComparison.table`."""
    title: str
    """Heading of the column."""
    best: str
    """"low" or "high" where such values are best; empty for controls and counts."""
    is_sampled: bool = True
    """Whether the mean has an interval. Controls, counts and costs have none."""


MEASURES = (
    Measure("x_features", "x-features", "", False),
    Measure("f_reg", "F_reg", "low"),
    Measure("f_cls", "F_cls", "high"),
    Measure("agreement", "patch agreement", "high"),
    Measure("agreement_random_groups", "agreement, random groups", "", False),
    Measure("agreement_random_maps", "agreement, noise", "", False),
    Measure("identified", "identified maps", "high"),
    Measure("identified_random_groups", "identified, random groups", "", False),
    Measure("movement", "movement", ""),
    Measure("drops_o1", "O1 of drops", "low"),
    Measure("drops_o1_random_groups", "O1 of drops, random groups", "", False),
    Measure("maps_o1", "O1 of maps", "low"),
    Measure("selectivity", "selectivity", "high"),
    Measure("selectivity_whole", "selectivity of the output", "", False),
    Measure("locality", "locality", "low"),
    Measure("stability", "stability", "high"),
    Measure("fit_seconds", "fit, s", "low", False),
    Measure("explain_seconds", "explain, s", "low", False),
)
"""All columns, in their order."""


class Estimate(NamedTuple):
    """A mean with its interval."""

    mean: float
    half: float | None
    """Half the width of the 95 % interval; None with fewer than two values."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate the mean of some values; there must be at least one.

        Args:
            values: One value for each target and repeat.

        Example:
            >>> found = Estimate.of([1.0, 2.0, 3.0])
            >>> found.mean, round(found.half, 3)
            (2.0, 2.484)
        """
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return cls(fmean(values), None)
        from scipy.stats import t

        return cls(fmean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values)))

    def below(self, other: Estimate) -> bool:
        """Whether the whole interval lies below that of another estimate; False without intervals.

        Args:
            other: Another estimate.

        Example:
            >>> Estimate(1.0, 0.1).below(Estimate(2.0, 0.5)), Estimate(1.0, None).below(Estimate(2.0, None))
            (True, False)
        """
        if self.half is None or other.half is None:
            return False
        return self.mean + self.half < other.mean - other.half

    def __str__(self) -> str:
        return f"{self.mean:.3g}" if self.half is None else f"{self.mean:.3g} ± {self.half:.2g}"


@dataclass(frozen=True)
class MethodComparison:
    """Methods of explanation on the same model, layer and data, measured on held-out examples.

    Example:
        >>> values = {"groups": {"f_reg": (0.0, 0.0)}, "SRAE": {"f_reg": (0.5, 0.7)}}
        >>> print(MethodComparison("fc", (0, 1), 5, 80, 20, 1, values).to_markdown())
        | method |     F_reg |
        |:-------|----------:|
        | groups |     0 ± 0 |
        | SRAE   | 0.6 ± 1.3 |
    """

    layer: str
    """Dotted name of the explained layer."""
    targets: tuple[Any, ...]
    """The explained outputs."""
    n_features: int
    """Number of x-features K that each method may use."""
    train: int
    """Number of examples that methods are fitted on."""
    test: int
    """Number of held-out examples."""
    repeats: int
    """Number of repeats, each with another seed and other held-out examples."""
    values: Mapping[str, Mapping[str, tuple[float, ...]]] = field(repr=False)
    """For each method and measure one value for each repeat and target; a measure that was not taken has none."""
    selected: tuple[str, ...] | None = field(default=None, repr=False)
    """Keys of the columns in their order, from :meth:`select`; None for all columns."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order of the rows."""
        return tuple(self.values)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Columns in which at least one method has a value, or those that were selected."""
        taken = {m.key: m for m in MEASURES if any(of.get(m.key) for of in self.values.values())}
        return tuple(taken.values() if self.selected is None else (taken[key] for key in self.selected))

    def select(self, *columns: str) -> MethodComparison:
        """Return the comparison with some of its columns, in the order given, for a table that fits a page.

        Args:
            columns: Keys such as ``"f_reg"``, or headings such as ``"patch agreement"``.

        Raises:
            ValueError: If there is no column, no such column, or one is named twice. The message lists the columns.

        Example:
            >>> values = {"groups": {"f_reg": (0.0,), "f_cls": (1.0,), "stability": (0.9,)}}
            >>> print(MethodComparison("fc", (0,), 5, 80, 20, 1, values).select("stability", "F_reg").to_markdown())
            | method | stability | F_reg |
            |:-------|----------:|------:|
            | groups |       0.9 |     0 |
        """
        keys_by_name = {name: m.key for m in self.measures for name in (m.title, m.key)}
        keys = []
        for column in columns:
            if column not in keys_by_name:
                raise ValueError(
                    f"the comparison has no column {column!r}; its columns are "
                    f"{', '.join(m.key for m in self.measures)}"
                )
            keys.append(keys_by_name[column])
        if not keys or len(set(keys)) < len(keys):
            raise ValueError(
                f"the columns are {', '.join(columns) or 'none'}; name at least one, and each of them once"
            )
        return replace(self, selected=tuple(keys))

    def estimate(self, method: str, measure: str) -> Estimate | None:
        """Estimate the mean of a measure for a method; None if it was not measured.

        Args:
            method: Name of the method.
            measure: Key of the measure, such as ``"f_reg"``.
        """
        values = self.values[method].get(measure)
        return Estimate.of(values) if values else None

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row for each method: its name, and for each measure the mean and the interval (``_low`` and ``_high``).

        A missing value is None.
        """
        rows = []
        for method in self.methods:
            row: dict[str, Any] = {"method": method}
            for m in self.measures:
                found = self.estimate(method, m.key)
                row[m.key] = None if found is None else found.mean
                if m.is_sampled:
                    half = None if found is None else found.half
                    row[f"{m.key}_low"], row[f"{m.key}_high"] = (
                        (None, None) if found is None or half is None else (found.mean - half, found.mean + half)
                    )
            rows.append(row)
        return rows

    def _cells(self) -> list[list[str]]:
        """Format header and rows."""
        cells = [["method", *(m.title for m in self.measures)]]
        for method in self.methods:
            found = [(m, self.estimate(method, m.key)) for m in self.measures]
            cells.append([method, *("-" if e is None else str(e if m.is_sampled else Estimate(e.mean, None))
                                    for m, e in found)])  # fmt: skip
        return cells

    @property
    def caption(self) -> str:
        """Settings of the comparison, in a sentence."""
        many = (
            f"target{'s' * (len(self.targets) > 1)} {', '.join(map(str, self.targets))}"
            if self.targets != (None,)
            else "the output"
        )
        repeats = f"{self.repeats} repeat{'s' * (self.repeats > 1)}"
        made = (
            f"Layer {self.layer}, {many}, {self.n_features} x-features asked for; fitted on {self.train:,} examples "
            f"and measured on {self.test:,} others"
        )
        if len(self.targets) * self.repeats == 1:
            return (
                f"{made}; one value each. For 95 % intervals, and a warning where another method is clearly more "
                "faithful, pass repeats=3 (--repeats 3) or several targets."
            )
        targets = f"{len(self.targets)} target{'s' * (len(self.targets) > 1)}"
        return f"{made}; means with 95 % intervals over {targets} and {repeats}."

    def to_markdown(self) -> str:
        """Format the table in Markdown; :meth:`select` makes it narrower."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self._cells()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rule = [f":{'-' * (widths[0] + 1)}", *(f"{'-' * (width + 1)}:" for width in widths[1:])]
        lines = [f"| {row} |" for row in map(lambda row: " | ".join(_aligned(row, widths)), cells)]
        return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])

    def to_latex(self) -> str:
        r"""Format the table as a ``tabular`` of LaTeX that needs no package; :meth:`select` makes it narrower."""
        head, *body = self._cells()
        rows = [list(map(_latex, head)), *([_latex(row[0]), *map(_latex_number, row[1:])] for row in body)]
        lines = [" & ".join(row) + r" \\" for row in rows]
        columns = "l" + "r" * (len(rows[0]) - 1)
        inner = [lines[0], r"\hline", *lines[1:]]
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\hline", *inner, r"\hline", r"\end{tabular}"])

    def csv(self) -> str:
        """Format :attr:`table` as comma-separated values; missing values are empty."""
        rows, text = self.table, io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write :attr:`table` as comma-separated values, and return the path.

        Args:
            path: The file.
        """
        replace_file(Path(path), self.csv().encode())
        return Path(path)

    def to_pandas(self) -> Any:
        """Return :attr:`table` as a ``pandas.DataFrame``.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas, which is not installed; run pip install pandas, or use .table or .to_csv(path)"
            ) from error
        return pandas.DataFrame(self.table)

    def show(self) -> Figure:
        """Draw a panel for each measure: a point and its interval for each method, and the controls as dashed lines."""
        from captum_xnn.plots._comparison import draw_comparison

        return draw_comparison(self)

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(_aligned(row, widths)) for row in cells]
        return "\n".join([*lines, self.caption])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Pad the cells of a row: the first to the right, numbers to the left."""
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _latex(text: str) -> str:
    r"""Escape text for LaTeX.

    Example:
        >>> print(_latex("F_reg 1 ± 2 %"))
        F\_reg 1 $\pm$ 2 \%
    """
    replaced = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(replaced.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)


def _latex_number(text: str) -> str:
    r"""Write a number, with an interval or not, for LaTeX; powers of ten are set as such.

    Example:
        >>> print(_latex_number("4.84e-07 ± 0.1"))
        4.84$\cdot 10^{-7}$ $\pm$ 0.1
    """
    return re.sub(r"e([+-]\d+)", lambda power: rf"$\cdot 10^{{{int(power[1])}}}$", text).replace("±", r"$\pm$")
