"""The command ``compare``: methods on a user's own model and files, as a table."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from captum_xnn._distributed import ALONE
from captum_xnn._files import file_to_write, replace_file
from captum_xnn.cli._configuration import Configuration, settings_in
from captum_xnn.cli._fit import given_classes, requested_targets
from captum_xnn.cli._inputs import read_tensor
from captum_xnn.cli._model_and_inputs import ModelAndInputs, heatmap_named, needed
from captum_xnn.comparison._compare import DEFAULT_METHODS, compare
from captum_xnn.comparison._table import MEASURES, MethodComparison

__all__ = ["FORMATS", "run_comparison"]

_log = logging.getLogger(__name__)

FORMATS: Mapping[str, Callable[[MethodComparison], str]] = {
    ".md": lambda found: f"{found.to_markdown()}\n\n{found.caption}\n",
    ".tex": lambda found: f"{found.to_latex()}\n% {found.caption}\n",
    ".csv": MethodComparison.csv,
}
"""Writes a table, by the ending of its file."""
FIGURES = (".png", ".pdf", ".svg")
"""Endings of figures."""


def run_comparison(arguments: argparse.Namespace) -> str:
    """Compare methods, write the table, and return the text to print.

    Args:
        arguments: Arguments of the command.

    Raises:
        ValueError: If a setting is missing or wrong, or the file of the table has another ending.
    """
    settings = settings_in(arguments)
    settings.pop("out")  # there the folder of a fit, here the file of the table
    configuration = Configuration.read(None, settings)
    path = Path(arguments.out)
    if path.suffix not in FORMATS:
        raise ValueError(f"{arguments.out!r} has an unknown ending; end the table's name in {', '.join(FORMATS)}")
    _check_columns(arguments.columns)
    # First, so that they fail before the work.
    file_to_write(path)
    figure = None if arguments.figure is None else _figure_file(arguments.figure)
    opened = ModelAndInputs.of(configuration)
    test = None if arguments.test is None else ModelAndInputs.of(replace(configuration, data=arguments.test)).inputs
    targets = requested_targets(opened)
    if targets == "all":
        outputs = torch.cat([opened.outputs(batch.inputs).cpu() for batch in opened.inputs])
        targets = given_classes(outputs, ALONE)
    found = compare(
        opened.model,
        needed(configuration, "layer", "--layer NAME"),
        opened.inputs,
        targets,
        arguments.methods or DEFAULT_METHODS,
        test=test,
        n_features=configuration.n_features,
        heatmap=opened.heatmap_or_default(None if arguments.heatmap is None else heatmap_named(arguments.heatmap)),
        repeats=arguments.repeats,
        images=arguments.images,
        masks=None if arguments.masks is None else read_tensor(arguments.masks),
        recipe=configuration.recipe,
        prediction_transform=opened.prediction_transform,
        seed=configuration.seed,
        progress=not arguments.quiet,
    )
    if arguments.columns:
        found = _selected(found, arguments.columns)
    replace_file(path, FORMATS[path.suffix](found).encode())
    written = [str(path)]
    if figure is not None:
        drawn = io.BytesIO()
        found.show().savefig(drawn, format=figure.suffix.lstrip("."), dpi=150)
        replace_file(figure, drawn.getvalue())
        written.append(str(figure))
    return f"{found!r}\n\nWritten: {', '.join(written)}"


def _figure_file(name: str) -> Path:
    """Return the path of the figure, after a check of its ending."""
    path = Path(name)
    if path.suffix not in FIGURES:
        raise ValueError(f"{name!r} has an unknown ending; end the figure's name in {', '.join(FIGURES)}")
    return file_to_write(path)


def _selected(found: MethodComparison, columns: Sequence[str]) -> MethodComparison:
    """Keep some columns; warn about those that were not measured, so that the work is not lost."""
    taken = {name for m in found.measures for name in (m.key, m.title)}
    missing = [column for column in columns if column not in taken]
    if missing:
        _log.warning("left out %s, which the comparison did not measure", ", ".join(missing))
    kept = [column for column in columns if column in taken]
    return found.select(*kept) if kept else found


def _check_columns(columns: Sequence[str] | None) -> None:
    """Raise for an unknown column before the work."""
    names = {name for m in MEASURES for name in (m.key, m.title)}
    for column in columns or ():
        if column not in names:
            near = difflib.get_close_matches(column, names, n=3, cutoff=0.5) or [m.key for m in MEASURES]
            raise ValueError(f"{column!r} in --columns is no column; names are {', '.join(near)}")
