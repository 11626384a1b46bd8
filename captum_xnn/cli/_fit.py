"""The command ``fit``: explainers of a user's own model, from the user's own files. Every file is written whole."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_xnn._distributed import ALONE, Ranks, launched
from captum_xnn._files import made_folder, replace_file
from captum_xnn.activations._activations import Activations
from captum_xnn.activations._collecting import collect_together
from captum_xnn.activations._memmap import Rows, chunks
from captum_xnn.attribution import XNNAttribution
from captum_xnn.cli._configuration import CONFIGURATION_FILE, Configuration, settings_in, targets_of
from captum_xnn.cli._model_and_inputs import ModelAndInputs, needed
from captum_xnn.cli._tables import aligned, shortfalls, targets_cells, targets_header
from captum_xnn.layers._targets import select
from captum_xnn.models._srae import by_shape
from captum_xnn.models.baselines import DRSA
from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._history import Record
from captum_xnn.training._logs import JSONLines, TensorBoard, line
from captum_xnn.training._recipe import Recipe

__all__ = ["HISTORY_FILE", "fit", "given_classes", "requested_targets", "run_fit"]

HISTORY_FILE = "history.jsonl"
"""Name of the file of the fits' history, in the explainers' folder: one line of JSON for each record and target."""

_log = logging.getLogger(__name__)


def run_fit(arguments: argparse.Namespace) -> str:
    """Fit explainers, and return the text to print.

    Args:
        arguments: Arguments of the command.
    """
    configuration = Configuration.read(arguments.config, settings_in(arguments))
    opened, xnn = fit(configuration, progress=not arguments.quiet)
    rows = [
        [
            *targets_cells(opened, e.targets),
            f"{e.f_reg:.4f}",
            str(e.form.n_features),
            "" if e.positives is None else str(e.positives),
        ]
        for e in xnn.explainers_.values()
    ]
    table = aligned([*targets_header(opened), "F_reg, training", "x-features", "positives"], rows)
    written = f"Written: {configuration.out} (explainers, history, and {CONFIGURATION_FILE} to fit them again)"
    return "\n".join([table, "", *shortfalls(opened, xnn.explainers_.values()), written])


def fit(configuration: Configuration, *, progress: bool = True) -> tuple[ModelAndInputs, XNNAttribution]:
    """Fit explainers and save them with the configuration and the history; return model and explainers.

    If a fit is interrupted, the same call resumes it from the last checkpoint. Processes started by torchrun share one
    fit; the first process saves.

    Args:
        configuration: Settings with at least a model, ``layer``, ``data`` and ``out``.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If a setting is missing or wrong, or nothing can be learned from the data.
    """
    layer = needed(configuration, "layer", "--layer NAME")
    # First, so that it fails before hours of work.
    folder = made_folder(needed(configuration, "out", "--out DIR"))
    learned = configuration.form == "srae"
    _warn_of_unused(configuration)
    with launched() as many:
        ranks = Ranks.here() if many else ALONE
        opened = ModelAndInputs.of(configuration)
        xnn = _attribution(opened, layer)
        kept = Checkpoint(configuration.checkpoint or folder / "checkpoint")
        growing = kept.folder / HISTORY_FILE  # watched during the fit; holds all fits with these checkpoints
        log = _logging(configuration, growing) if ranks.first else None
        requested = requested_targets(opened)
        found = _collected(opened, layer, ranks, progress)
        if isinstance(requested, list):
            _check_given(opened, requested, configuration.joint, found.y_hat)
        xnn.fit(
            found,
            given_classes(found.y_hat, ranks) if requested == "all" else requested,
            joint=configuration.joint,
            checkpoint=kept,
            log=log if learned else None,
            distributed=many,
            progress=progress,
        )
        if ranks.first:
            xnn.save(folder)
            opened.configuration.write(folder)
            replace_file(folder / HISTORY_FILE, _history(xnn).encode())
            if configuration.checkpoint is None:
                growing.unlink(missing_ok=True)
                kept.clear()
    return opened, xnn


def _attribution(opened: ModelAndInputs, layer: str) -> XNNAttribution:
    """Make an attribution of the layer, with the settings of the configuration."""
    configuration = opened.configuration
    return XNNAttribution(
        opened.model,
        layer,
        configuration.n_features,
        autoencoder={"groups": None, "drsa": DRSA, "srae": by_shape}[configuration.form],
        recipe=configuration.recipe,
        seed=configuration.seed,
        prediction_transform=opened.prediction_transform,
    )


def _collected(opened: ModelAndInputs, layer: str, ranks: Ranks, progress: bool) -> Activations:
    """Collect activations and outputs on the opened inputs."""
    inputs = opened.inputs
    # Damaged images are found only by reading them. To skip them, every process must read all images.
    independent: dict[str, Any] = {}
    if not opened.configuration.skip_damaged:
        independent = {"unpack": lambda rows: (inputs.batch(rows).inputs, None)}
    return collect_together(
        opened.model,
        layer,
        inputs.loader() if independent else inputs,
        ranks=ranks,
        store=opened.configuration.store,
        progress=progress,
        prediction_transform=opened.prediction_transform,
        **independent,
    )


def _check_given(opened: ModelAndInputs, targets: Sequence[int], joint: bool, y_hat: Tensor | Rows) -> None:
    """Raise if the model gives a requested class to none of the inputs."""
    if len(y_hat.shape) != 2 or y_hat.shape[1] < 2:
        return  # these outputs are not classes
    counts = Counter(c for chunk in chunks(y_hat) for c in chunk.argmax(1).tolist())
    without = [t for t in targets if not counts[t]]
    if not without or (joint and len(without) < len(targets)):
        return
    named = [f"{t} ({opened.name_of(t)})" if opened.model_file.classes else str(t) for t in without[:3]]
    given = [
        f"{t} ({opened.name_of(t)}) to {n}" if opened.model_file.classes else f"{t} to {n}"
        for t, n in counts.most_common(3)
    ]
    raise ValueError(
        f"the model gives class {', '.join(named)} to none of the {len(y_hat)} inputs; it gives {', '.join(given)}. "
        "Add inputs of the class to --data, name another --target, or check --size, --mean and --std. If the outputs "
        "are no classes, let load() return a module with the one output to explain"
    )


def _warn_of_unused(configuration: Configuration) -> None:
    """Warn about settings that exact forms do not use."""
    idle = [] if configuration.tensorboard is None else ["tensorboard"]
    idle += ["recipe"] if configuration.recipe != Recipe() else []
    if configuration.form != "srae" and idle:
        _log.warning("%s: not used, because only the learned network trains by it; pass --form srae", ", ".join(idle))


def _history(xnn: XNNAttribution) -> str:
    """Write every record of every explainer as a line of JSON, one explainer after the other."""
    return "".join(
        line(e.targets if len(e.targets) > 1 else e.targets[0], record)
        for e in xnn.explainers_.values()
        for record in e.history
    )


def _logging(configuration: Configuration, history: Path) -> Callable[[Any, Record], None]:
    """Return the callback that receives the records of the fits."""
    logs: list[Callable[[Any, Record], None]] = [JSONLines(history)]
    if configuration.tensorboard is not None:
        logs.append(TensorBoard(configuration.tensorboard))

    def log(target: Any, record: Record) -> None:
        for one in logs:
            one(target, record)

    return log


def requested_targets(opened: ModelAndInputs) -> list[int] | str | None:
    """Return the targets to fit, or "all", after checking them before the data are read."""
    targets = targets_of(opened.configuration.targets, opened.model_file.classes)
    shape = opened.output_shape
    if len(shape) > 1:
        raise ValueError(
            f"the model's output for one input has shape {shape}, and commands explain outputs (N,) or (N, C); let "
            "load() return a module that picks such outputs, as those of one pixel, or pass a tuple as target in Python"
        )
    if targets == "all" and (len(shape) != 1 or shape[0] < 2):
        fix = "leave --target out" if shape in ((), (1,)) else "name the targets"
        raise ValueError(f"the model's outputs are {shape}, and --target all needs classes; {fix}")
    if targets is None and shape not in ((), (1,)):
        raise ValueError(f"no targets given for a model with outputs {shape}; pass --target 46 112, or --target all")
    for target in targets if isinstance(targets, list) else ():
        select(torch.zeros(1, *shape), target)
    return targets


def given_classes(y_hat: Tensor | Rows, ranks: Ranks) -> list[int]:
    """Return the classes that the model gives to at least one example, from its outputs (M, C)."""
    given = sorted({c for chunk in chunks(y_hat) for c in chunk.argmax(1).tolist()})
    if ranks.first and len(given) < y_hat.shape[1]:
        _log.warning(
            "explaining %d of %d classes; the model gives the other classes to none of the data",
            len(given),
            y_hat.shape[1],
        )
    return given
