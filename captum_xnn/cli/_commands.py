"""Commands that explain a user's own model and files: ``fit`` writes explainers, ``explain`` writes explanations.

Every file is written whole or not at all.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captum_xnn._distributed import ALONE, Ranks, launched
from captum_xnn._files import made_folder, replace_file
from captum_xnn.activations._collecting import collect_together
from captum_xnn.activations._memmap import Rows, chunks
from captum_xnn.attribution import XNNAttribution
from captum_xnn.cli._configuration import Configuration, targets_of
from captum_xnn.cli._inputs import Batch
from captum_xnn.cli._kept_explanations import KeptExplanations, described
from captum_xnn.cli._model_and_inputs import ModelAndInputs, needed
from captum_xnn.explanation import Explanation
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._targets import Difference, Target, select
from captum_xnn.models._srae import by_shape
from captum_xnn.models.baselines import DRSA
from captum_xnn.plots._names import Names, names_by_target
from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._history import Step
from captum_xnn.training._logs import JSONLines, TensorBoard, line
from captum_xnn.training._recipe import Recipe

__all__ = [
    "EXPLANATIONS_FILE",
    "HISTORY_FILE",
    "compared",
    "explain",
    "fit",
    "given_classes",
    "requested_targets",
]

EXPLANATIONS_FILE = "explanations.jsonl"
"""Name of the file of numbers in the folder that :func:`explain` writes: one line of JSON for each input."""

HISTORY_FILE = "history.jsonl"
"""Name of the file of the fits' history, in the explainers' folder: one line of JSON for each record and target."""

_log = logging.getLogger(__name__)


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
        xnn = XNNAttribution(
            opened.model,
            layer,
            configuration.n_features,
            autoencoder={"groups": None, "drsa": DRSA, "srae": by_shape}[configuration.form],
            recipe=configuration.recipe,
            seed=configuration.seed,
        )
        kept = Checkpoint(configuration.checkpoint or folder / "checkpoint")
        growing = kept.folder / HISTORY_FILE  # watched during the fit; holds all fits with these checkpoints
        log = _logging(configuration, growing) if ranks.first else None
        requested = requested_targets(opened)
        inputs = opened.inputs
        # Damaged images are found only by reading them. To skip them, every process must read all images.
        independent: dict[str, Any] = {}
        if not configuration.skip_damaged:
            independent = {"unpack": lambda rows: (inputs.batch(rows).inputs, None)}
        found = collect_together(
            opened.model,
            layer,
            inputs.loader() if independent else inputs,
            ranks=ranks,
            store=configuration.store,
            progress=progress,
            **independent,
        )
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
        "Add inputs of the class to --data, name another --target, or check --size, --mean and --std"
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
        line(e.targets if len(e.targets) > 1 else e.targets[0], step)
        for e in xnn.explainers_.values()
        for step in e.history
    )


def _logging(configuration: Configuration, history: Path) -> Callable[[Any, Step], None]:
    """Return the callback that receives the records of the fits."""
    logs: list[Callable[[Any, Step], None]] = [JSONLines(history)]
    if configuration.tensorboard is not None:
        logs.append(TensorBoard(configuration.tensorboard))

    def log(target: Any, step: Step) -> None:
        for one in logs:
            one(target, step)

    return log


def explain(
    opened: ModelAndInputs,
    xnn: XNNAttribution,
    targets: Sequence[Target],
    folder: Path,
    *,
    names: str | os.PathLike[str] | None = None,
    against: str | None = None,
    progress: bool = True,
) -> int:
    """Write a picture and the maps of each input, and one file of all numbers; return the number of inputs.

    If the folder holds the same explanations already, only the pictures are drawn anew, as with other names.

    Args:
        opened: The model and its inputs.
        xnn: The explainers.
        targets: Fitted targets. For each input, the target with the highest output is explained.
        folder: Folder to write to; created if missing.
        names: File of x-feature names that a report exported. Targets without names in it keep their numbers.
        against: Number or name of the output to compare with: explains why the target rather than this output.
        progress: Whether to show a progress bar.

    Raises:
        NamesFileError: If the file is missing or damaged, or of another layer.
        ValueError: If there is no such output to compare with, or it is the only target.
    """
    other = None if against is None else compared(opened, targets, against)
    targets = [t for t in targets if other is None or t != other]
    known = names_by_target(names, find_layer(opened.model, xnn.layer)[0], targets)
    made_folder(folder)
    stems = _stems(opened.inputs.names)
    kept = KeptExplanations(folder, described(xnn, targets, other), EXPLANATIONS_FILE)
    lines: list[str] = []
    try:
        with tqdm(total=len(opened.inputs.names), desc="explaining", disable=not progress, leave=False) as bar:
            for batch in opened.inputs:
                for line in _explained(opened, xnn, targets, other, batch, folder, known, stems, kept):
                    lines.append(line)
                    bar.update()
    finally:  # after an interruption, the pictures already written have their numbers
        if lines:
            replace_file(folder / EXPLANATIONS_FILE, "".join(lines).encode())
            kept.write()
    return len(lines)


def compared(opened: ModelAndInputs, targets: Sequence[Target], against: str) -> int:
    """Return the output to compare with.

    Args:
        opened: The model and its inputs.
        targets: Fitted targets.
        against: Number or name of the output.

    Raises:
        ValueError: If there is no such output, or it is the only target.
    """
    asked = targets_of(against, opened.model_file.classes)
    if not isinstance(asked, list) or len(asked) != 1:
        raise ValueError(f"--against is {against!r}, and not one output; pass the index of an output, or its name")
    select(torch.zeros(1, *opened.output_shape), asked[0])
    if list(targets) == asked:
        name = opened.name_of(asked[0])
        raise ValueError(f"the only target is --against {against} itself ({name}); pass another --target, or fit one")
    return asked[0]


def requested_targets(opened: ModelAndInputs) -> list[int] | str | None:
    """Return the targets to fit, or "all", after checking them before the data are read."""
    targets = targets_of(opened.configuration.targets, opened.model_file.classes)
    shape = opened.output_shape
    if targets == "all" and (len(shape) != 1 or shape[0] < 2):
        raise ValueError(f"the model's outputs are {shape}, and --target all needs classes; name the targets")
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


def _explained(
    opened: ModelAndInputs,
    xnn: XNNAttribution,
    targets: Sequence[Target],
    against: int | None,
    batch: Batch,
    folder: Path,
    known: Mapping[str, dict[int, str]],
    stems: Mapping[str, str],
    kept: KeptExplanations,
) -> Iterator[str]:
    """Write the maps and the picture of each input of a batch, and yield its line of JSON."""
    why = kept.explanation(batch, find_layer(opened.model, xnn.layer)[0], opened.outputs(batch.inputs[:1]))
    if why is None:
        why = xnn.explain(
            batch.inputs.to(opened.device),
            opened.highest(batch.inputs, targets),
            against=against,
            internal_batch_size=opened.configuration.batch_size,
        )
    shown = why if batch.images is None else replace(why, inputs=batch.images)
    for i, name in enumerate(batch.names):
        maps, picture = folder / "maps" / f"{stems[name]}.npy", folder / "pictures" / f"{stems[name]}.png"
        said = why.target[i]
        target, compared = (said.target, {"against": said.against}) if isinstance(said, Difference) else (said, {})
        called, names = opened.name_of(said), known.get(str(target), {})
        _write_maps(maps, why.maps[i])
        _write_picture(picture, shown, i, f"{name}: {called}", names)
        tokens = opened.inputs.preparation.tokens
        numbers = {
            "name": name,
            **({} if tokens is None else {"tokens": list(tokens(batch.inputs[i]))}),
            "target": target,
            **compared,
            "sentence": why.sentence(i, names, target_name=called),
            "prediction": float(why.prediction[i]),
            "surrogate": float(why.surrogate[i]),
            "bias": float(why.bias[i]),
            "contributions": why.contributions[i].tolist(),
            "features": why.features[i].tolist(),
            "maps": maps.relative_to(folder).as_posix(),
            "picture": picture.relative_to(folder).as_posix(),
        }
        yield json.dumps(numbers) + "\n"


def _stems(names: Sequence[str]) -> dict[str, str]:
    """Return the names of output files without extension; equal ones keep the extension of their input."""
    stems = {name: name.removesuffix(Path(name).suffix) for name in names}
    shared = Counter(stem.lower() for stem in stems.values())
    made = {name: stem if shared[stem.lower()] == 1 else name for name, stem in stems.items()}
    # A kept name may be the stem of a third input, such as a.jpg of a.jpg.png.
    return made if len({*map(str.lower, made.values())}) == len(made) else {name: name for name in names}


def _write_maps(path: Path, maps: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, maps.detach().cpu().float().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def _write_picture(path: Path, why: Explanation, index: int, title: str, names: Names) -> None:
    buffer = io.BytesIO()
    title = title.encode(errors="replace").decode()  # file names may hold bytes that are not valid text
    # matplotlib would write its version into the file: without it, equal pictures are equal files.
    why.show(index, names=names, title=title).savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())
