"""Write the results of a study: one self-contained HTML page, and a CSV file of every figure and table."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from captum_xnn._files import replace_file
from captum_xnn.study._analysis import Difference, Effect, Results, analyse, read_export
from captum_xnn.study._export import guarded, unguarded
from captum_xnn.study._figures import (
    box_statistics,
    called,
    confidence_figure,
    histogram,
    performance_figure,
    scores_figure,
    svg,
)

__all__ = ["PAGE", "write_findings"]

PAGE = "findings.html"
"""Name of the page."""

_MEASURES = {
    "purity": "Clustering purity",
    "agreement": "Right about the model's answer",
    "distinction": "Found the model's answer",
    "prediction": "Predicted the model's answer",
    "confidence": "Confidence (0 to 6)",
    "performance": "Rated performance of the agents (0 to 6)",
}


def write_findings(
    exported: str | os.PathLike[str], out: str | os.PathLike[str], *, seed: int = 0, resamples: int = 9999
) -> Results:
    """Analyse an exported study, write the page and the tables, and return the results.

    Args:
        exported: Folder that :func:`captum_xnn.study._export.export` wrote.
        out: Folder to write.
        seed: Seed of the resampling.
        resamples: Number of resamples of each test.

    Raises:
        ValueError: If the export is damaged, or no participant completed a batch.
    """
    results = analyse(read_export(exported), seed=seed, resamples=resamples)
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    tables = _tables(results)
    for name, (columns, rows) in tables.items():
        replace_file(root / f"{name}.csv", _csv(columns, rows))
    figures = {}
    for task in dict.fromkeys(t.task for t in results.trials):
        figures[f"figure4_{task}"] = svg(scores_figure(results, task))
    for task in results.confidence:
        figures[f"figure5_confidence_{task}"] = svg(confidence_figure(results, task))
    for task in results.performance:
        figures[f"figure5_performance_{task}"] = svg(performance_figure(results, task))
    for name, picture in figures.items():
        replace_file(root / f"{name}.svg", picture.encode())
    replace_file(root / PAGE, _render(results, figures, list(tables)).encode(errors="replace"))
    return results


Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


def _tables(results: Results) -> dict[str, Table]:
    """Make all tables, by the names of their files."""
    boxes = []
    points = []
    for task in dict.fromkeys(t.task for t in results.trials):
        for dataset in dict.fromkeys(t.dataset for t in results.trials):
            for condition in results.conditions(task):
                scores = [
                    t.score for t in results.trials if (t.task, t.dataset, t.condition) == (task, dataset, condition)
                ]
                if scores:
                    boxes.append([task, dataset, condition, *box_statistics(scores).values()])
    for t in results.trials:
        points.append(
            [t.task, t.dataset, t.condition, t.participant, t.arm, t.batch, t.part, t.seconds, t.score, t.chance]
        )
    scale = results.design["scales"]
    confidence = [
        [task, dataset, condition, point, said, counts[point], histogram(counts)[point]]
        for task, by_dataset in results.confidence.items()
        for dataset, by_condition in by_dataset.items()
        for condition, counts in by_condition.items()
        for point, said in enumerate(scale["confidence"])
    ]
    performance = [
        [task, condition, point, said, counts[point], histogram(counts)[point]]
        for task, by_condition in results.performance.items()
        for condition, counts in by_condition.items()
        for point, said in enumerate(scale["performance"])
    ]
    variances = [[task, name, value] for task, found in results.variances.items() for name, value in found.items()]
    excluded = [[participant, "; ".join(reasons)] for participant, reasons in results.excluded.items()]
    columns = ["task", "dataset", "condition"]
    return {
        "figure4_points": ([*columns, "participant", "arm", "batch", "part", "seconds", "score", "chance"], points),
        "figure4_boxes": ([*columns, "n", "mean", "sd", "low", "q1", "median", "q3", "high"], boxes),
        "figure5_confidence": ([*columns, "point", "said", "answers", "share"], confidence),
        "figure5_performance": (["task", "condition", "point", "said", "answers", "share"], performance),
        "comparisons": (Difference._fields, list(results.comparisons)),
        "comparisons_without_exclusions": (Difference._fields, list(results.comparisons_of_all)),
        "mixed_model": (Effect._fields, list(results.effects)),
        "mixed_model_variances": (["task", "component", "variance"], variances),
        "exclusions": (["participant", "reasons"], excluded),
    }


def _csv(columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"{v:.9g}" if isinstance(v, float) else guarded(v) if isinstance(v, str) else v for v in row])
    return buffer.getvalue().encode(errors="replace")


def _render(results: Results, figures: Mapping[str, str], tables: Sequence[str]) -> str:
    """Render the whole page. Every text in it is escaped, and the page loads no other file."""
    import jinja2
    from markupsafe import Markup

    templates = resources.files("captum_xnn.study") / "templates"
    style = (templates / "findings.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    environment.filters["p"] = _p
    environment.globals["called"] = lambda condition: called(condition).replace("\n", " ")
    begun = len(results.participants)
    reasons = Counter(reason for found in results.excluded.values() for reason in found)
    return environment.from_string((templates / "findings.html").read_text(encoding="utf-8")).render(
        style=Markup(style),
        policy=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        results=results,
        design=results.design,
        titles={d["name"]: d["title"] for d in results.design["datasets"]},
        figures={name: _data_uri(picture) for name, picture in figures.items()},
        flow=[
            ("links made", results.design["invited"]),
            ("began", begun),
            ("finished", sum(p["finished"] == "1" for p in results.participants)),
            ("withdrew", results.design["withdrawn"]),
            ("left out", len(results.excluded)),
            ("analysed", begun - len(results.excluded)),
        ],
        reasons=reasons,
        sentences=_sentences(results),
        measures=_MEASURES,
        many_tasks=len({t.task for t in results.trials}) > 1,
        boxes=_boxes(results),
        comments=[(p["participant"], unguarded(p["comments"])) for p in results.participants if p["comments"].strip()],
        tables=tables,
    )


def _boxes(results: Results) -> list[tuple[str, str, str, dict[str, float]]]:
    found = []
    for task in dict.fromkeys(t.task for t in results.trials):
        for dataset in dict.fromkeys(d["name"] for d in results.design["datasets"]):
            for c in results.conditions(task):
                scores = [t.score for t in results.trials if (t.task, t.dataset, t.condition) == (task, dataset, c)]
                if scores:
                    found.append((task, dataset, c, box_statistics(scores)))
    return found


def _sentences(results: Results) -> list[str]:
    """Write the main findings in words: x-features against each other condition, by data set."""
    titles = {d["name"]: d["title"] for d in results.design["datasets"]}
    found = []
    for one in results.comparisons:
        if one.a != "xnn" or one.measure in ("confidence", "performance"):
            continue
        against = called(one.b).replace("\n", " ")
        sure = "told apart" if one.holm_p < 0.05 else "not told apart"
        found.append(
            f"{titles.get(one.dataset, one.dataset)}, {_MEASURES[one.measure].lower()}: {_number(one.mean_a)} with "
            f"x-features, {_number(one.mean_b)} with {against}; difference {_number(one.difference, True)} "
            f"[{_number(one.low, True)}, {_number(one.high, True)}], corrected p {_p(one.holm_p)}, {sure}."
        )
    return found


def _number(value: float, signed: bool = False, digits: int = 2) -> str:
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    text = text if float(text) else text[-digits - 2 :]  # no signed zeros
    return text.replace("-", "\N{MINUS SIGN}")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _data_uri(picture: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()}"
