"""The command ``explain``: a picture, the maps and the numbers of each input. Every file is written whole."""

from __future__ import annotations

import argparse
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from captum_xnn._files import made_folder, replace_file
from captum_xnn.attribution import XNNAttribution
from captum_xnn.cli._inputs import Batch
from captum_xnn.cli._kept_explanations import KeptExplanations, described
from captum_xnn.cli._model_and_inputs import ModelAndInputs
from captum_xnn.cli._saved_explainers import model_and_explainers, output_to_compare
from captum_xnn.explanation import Explanation
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._targets import Difference, Target
from captum_xnn.plots._names import Names, names_by_target

__all__ = ["EXPLANATIONS_FILE", "explain", "run_explain"]

EXPLANATIONS_FILE = "explanations.jsonl"
"""Name of the file of numbers in the folder that :func:`explain` writes: one line of JSON for each input."""


def run_explain(arguments: argparse.Namespace) -> str:
    """Explain inputs, and return the text to print.

    Args:
        arguments: Arguments of the command.
    """
    opened, xnn = model_and_explainers(arguments)
    folder = Path(arguments.out)
    explained = explain(
        opened,
        xnn,
        opened.targets(xnn),
        folder,
        names=arguments.names,
        against=arguments.against,
        progress=not arguments.quiet,
    )
    return f"{explained} inputs explained. Written: {folder / EXPLANATIONS_FILE}, with pictures/ and maps/"


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
    other = None if against is None else output_to_compare(opened, targets, against)
    targets = [t for t in targets if other is None or t != other]
    all_names = names_by_target(names, find_layer(opened.model, xnn.layer)[0], targets)
    made_folder(folder)
    stems = _stems(opened.inputs.names)
    kept = KeptExplanations(folder, described(xnn, targets, other), EXPLANATIONS_FILE)
    lines: list[str] = []
    try:
        with tqdm(total=len(opened.inputs.names), desc="explaining", disable=not progress, leave=False) as bar:
            for batch in opened.inputs:
                for line in _explained(opened, xnn, targets, other, batch, folder, all_names, stems, kept):
                    lines.append(line)
                    bar.update()
    finally:  # after an interruption, the pictures already written have their numbers
        if lines:
            replace_file(folder / EXPLANATIONS_FILE, "".join(lines).encode())
            kept.write()
    return len(lines)


def _explained(
    opened: ModelAndInputs,
    xnn: XNNAttribution,
    targets: Sequence[Target],
    against: int | None,
    batch: Batch,
    folder: Path,
    all_names: Mapping[str, dict[int, str]],
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
        called, names = opened.name_of(said), all_names.get(str(target), {})
        _write_maps(maps, why.maps[i])
        _write_picture(picture, shown, i, f"{name}: {called}", names)
        tokens = opened.inputs.preparation.tokens
        numbers = {
            "name": name,
            **({} if tokens is None else {"tokens": list(tokens(batch.inputs[i]))}),
            "target": target,
            **compared,
            "sentence": why.sentence(i, names, target_name=called),
            **({} if why.is_positive is None else {"is_positive": why.is_positive[i]}),
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
    unique = {name: stem if shared[stem.lower()] == 1 else name for name, stem in stems.items()}
    # A kept name may be the stem of a third input, such as a.jpg of a.jpg.png.
    return unique if len({*map(str.lower, unique.values())}) == len(unique) else {name: name for name in names}


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
