"""The commands of the command line on a user's files: fit, explain and evaluate.

Each takes a :class:`~captum_xnn.configuration.Configuration`, writes files whole or not at all, and returns what it
found. :class:`Opened` holds what they all begin with, a model with its inputs; with :meth:`Opened.explainers` a command
on saved explainers has all that it needs.
"""

from __future__ import annotations

import difflib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import captum.attr
import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor
from tqdm import tqdm

from captum_xnn.activations import collect
from captum_xnn.attribution import XNNAttribution
from captum_xnn.configuration import Configuration, targets_of
from captum_xnn.explainer import Explainer
from captum_xnn.explanation import Explanation
from captum_xnn.files import replace_file
from captum_xnn.heatmaps import ExcitationMaps, Heatmap
from captum_xnn.host import untouched
from captum_xnn.inputs import Batch, Inputs
from captum_xnn.metrics.faithfulness import classification_faithfulness, regression_faithfulness
from captum_xnn.metrics.orthogonality import OrthogonalityStream
from captum_xnn.metrics.sparsity import effective_number
from captum_xnn.model_files import ModelFile, load_model, load_torchvision
from captum_xnn.targets import Target, select
from captum_xnn.training import encode_all

__all__ = ["EXPLANATIONS_FILE", "Evaluation", "Opened", "evaluate", "explain", "fit", "heatmap_named"]

EXPLANATIONS_FILE = "explanations.jsonl"
"""Name of the numbers in the folder that :func:`explain` writes: one line of JSON for each input."""


@dataclass(frozen=True)
class Opened:
    """A model with its inputs, as a configuration names them, tried on the first of the inputs."""

    configuration: Configuration
    """With size, mean and std as the model's file has them, where the configuration left them open."""
    model_file: ModelFile
    """The model, on the configured device, with the names of its classes."""
    inputs: Inputs
    """Batches of inputs for the model, with images to show and names."""
    output_shape: tuple[int, ...]
    """Shape of the model's output for one input."""

    @classmethod
    def of(cls, configuration: Configuration) -> Opened:
        """Returns what a configuration names, opened.

        Args:
            configuration: With a model and data.

        Raises:
            ValueError: If anything is missing or unreadable, or the model does not take the inputs.
        """
        data = _needed(configuration, "data", "--data FOLDER")
        file = _model_file(configuration)
        preparation = replace(
            file.preparation,
            **{name: value for name in ("size", "mean", "std") if (value := getattr(configuration, name)) is not None},
        )
        model = file.model.to(_device(configuration.device))
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        inputs = Inputs(
            data,
            preparation,
            batch_size=configuration.batch_size,
            workers=configuration.workers,
            skip_damaged=configuration.skip_damaged,
            dtype=dtype,
        )
        known = replace(configuration, size=preparation.size, mean=preparation.mean, std=preparation.std)
        return cls(known, replace(file, model=model, preparation=preparation), inputs, _tried(model, inputs))

    def explainers(self, folder: str | Path, heatmap: type[Attribution] | Heatmap | None = None) -> XNNAttribution:
        """Returns saved explainers, on the model.

        Args:
            folder: Where they were saved.
            heatmap: What draws the maps; the default, if None.

        Raises:
            ExplainerFileError: If there are none.
            ModelMismatchError: If they were fitted to another model.
        """
        return XNNAttribution.load(folder, self.model_file.model, heatmap=heatmap)

    def name_of(self, target: Target) -> str:
        """Returns what to call an output in pictures and tables.

        Args:
            target: None, int, or tuple of ints.
        """
        classes = self.model_file.classes
        known = classes is not None and isinstance(target, int) and target < len(classes)
        return classes[target] if known and classes is not None and isinstance(target, int) else f"target {target}"


def fit(configuration: Configuration, *, progress: bool = True) -> XNNAttribution:
    """Returns explainers that it has fitted and saved, with the configuration beside them.

    Args:
        configuration: With a model, layer, data and out.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If a setting is missing or wrong, or the data cannot be learned from.
    """
    layer = _needed(configuration, "layer", "--layer NAME")
    folder = Path(_needed(configuration, "out", "--out DIR"))
    folder.mkdir(parents=True, exist_ok=True)  # before hours of work, if it cannot be made
    opened = Opened.of(configuration)
    opened.configuration.text().encode()
    targets = _chosen(opened, progress)
    xnn = XNNAttribution(
        opened.model_file.model,
        layer,
        configuration.n_features,
        recipe=configuration.recipe,
        seed=configuration.seed,
    )
    xnn.fit(opened.inputs, targets, joint=configuration.joint, progress=progress)
    _tell_skipped(opened.inputs)
    xnn.save(folder)
    replace(opened.configuration, out=str(folder.absolute())).write(folder)
    return xnn


def explain(
    configuration: Configuration,
    explainer: str | Path,
    *,
    heatmap: type[Attribution] | Heatmap | None = None,
    progress: bool = True,
) -> int:
    """Returns how many inputs it has explained in files: a picture and maps of each, and all numbers together.

    Args:
        configuration: With a model, data and out. Of targets, the one among them to which the model gives the highest
            output is explained, for each input its own; all fitted ones take part, if None.
        explainer: Folder of saved explainers.
        heatmap: What draws the maps.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a setting is missing or wrong, or a target was not fitted.
    """
    folder = Path(_needed(configuration, "out", "--out DIR"))
    folder.mkdir(parents=True, exist_ok=True)
    opened = Opened.of(configuration)
    xnn = opened.explainers(explainer, heatmap)
    candidates = _candidates(xnn, configuration)
    lines: list[str] = []
    try:
        with tqdm(total=len(opened.inputs.names), desc="explaining", disable=not progress, leave=False) as bar:
            for batch in opened.inputs:
                for line in _explained(opened, xnn, candidates, batch, folder):
                    lines.append(line)
                    bar.update()
    finally:  # where it is interrupted, the pictures that are there have their numbers
        if lines:
            replace_file(folder / EXPLANATIONS_FILE, "".join(lines).encode())
    _tell_skipped(opened.inputs)
    return len(lines)


class Evaluation(NamedTuple):
    """How good the explainer of one target is on some data."""

    target: Target
    name: str
    """What the target is called."""
    f_reg: float
    """Mean absolute difference between surrogate and prediction, in logits."""
    f_cls: float | None
    """Share of inputs whose predicted class stays; None where outputs are no classes."""
    effective: float | None
    """Effective number of x-features, by their mean contributions to the inputs that the model gives the class (all
    inputs, where outputs are no classes); None where there are none."""
    positives: int
    """Those inputs."""
    inputs: int
    """All inputs."""
    o1: float | None = None
    """Orthogonality O1 of the maps of some of the positives; 0 is best. None where no maps were asked for."""
    o2: float | None = None
    """Orthogonality O2; infinite where a map is made of others."""


def evaluate(
    configuration: Configuration,
    explainer: str | Path,
    *,
    maps: int = 0,
    heatmap: type[Attribution] | Heatmap | None = None,
    progress: bool = True,
) -> list[Evaluation]:
    """Returns how good saved explainers are on some data, each target for itself.

    Args:
        configuration: With a model and data, and targets if not all that were fitted.
        explainer: Folder of saved explainers.
        maps: Of how many positives of every target, at most, to draw maps for O1 and O2.
        heatmap: What draws the maps.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If a setting is missing or wrong, or a target was not fitted.
    """
    opened = Opened.of(configuration)
    xnn = opened.explainers(explainer, heatmap)
    targets = _candidates(xnn, configuration)
    found = collect(opened.model_file.model, xnn.layer, opened.inputs, progress=progress)
    _tell_skipped(opened.inputs)
    results, rows = [], {}
    for target in targets:
        result, rows[target] = _evaluated(opened, xnn.explainer(target), target, found.Z, found.y_hat)
        results.append(result)
    if maps < 1:
        return results
    streams = _streams(opened, xnn, {target: rows[target][:maps] for target in targets}, progress)
    return [r._replace(o1=o.o1, o2=o.o2) if (o := streams.get(r.target)) else r for r in results]


def heatmap_named(name: str) -> type[Attribution] | Heatmap:
    """Returns the heatmap backend of a name.

    Args:
        name: ``ExcitationMaps``, or that of a class in ``captum.attr`` such as ``DeepLift``.

    Raises:
        ValueError: If there is none; near names are listed.

    Example:
        >>> heatmap_named("DeepLift").__name__
        'DeepLift'
    """
    if name == "ExcitationMaps":
        return ExcitationMaps()
    known = {
        key: value
        for key, value in vars(captum.attr).items()
        if isinstance(value, type) and issubclass(value, Attribution)
    }
    if name not in known:
        names = ["ExcitationMaps", *known]
        near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:4]
        raise ValueError(
            f"expected a heatmap, ExcitationMaps or the name of a class in captum.attr, got {name!r}; near names: "
            f"{', '.join(near)}"
        )
    return known[name]


def _needed(configuration: Configuration, name: str, option: str) -> str:
    value: str | None = getattr(configuration, name)
    if value is None:
        raise ValueError(f"expected {name}, got none; pass {option}, or set {name} in the configuration")
    return value


def _model_file(configuration: Configuration) -> ModelFile:
    if (configuration.model is None) == (configuration.torchvision is None):
        raise ValueError(
            f"expected one model, got {'none' if configuration.model is None else 'two'}; pass either --model FILE.py "
            "or --torchvision NAME --weights FILE, or set them in the configuration"
        )
    if configuration.model is not None:
        return load_model(configuration.model)
    weights = _needed(configuration, "weights", "--weights FILE")
    return load_torchvision(str(configuration.torchvision), weights)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (AssertionError, RuntimeError) as error:  # torch built without CUDA raises the former
        told = " ".join(str(error).split())[:120]
        raise ValueError(f"expected a device that is here, got {name!r} ({told}); use cpu or auto") from error
    return torch.device(name)


def _tried(model: torch.nn.Module, inputs: Inputs) -> tuple[int, ...]:
    """Returns the shape of the model's output for one input, after trying it."""
    first = next(iter(inputs)).inputs[:1]
    try:
        output = _outputs(model, first)
    except Exception as error:  # the model's own code may raise anything
        told = " ".join(str(error).split())[:300]
        raise ValueError(
            f"expected inputs that the model takes, got {first.dtype} {tuple(first.shape)} ({type(error).__name__}: "
            f"{told}); see the size (--size) and the channels (MEAN and STD) of the images"
        ) from error
    if not isinstance(output, Tensor):
        raise ValueError(
            f"expected the model to return one tensor, got {type(output).__name__}; let load() return a module that "
            "picks the logits"
        )
    return tuple(output.shape[1:])


def _outputs(model: torch.nn.Module, inputs: Tensor) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with untouched(model), torch.no_grad():
        return model(inputs.to(device, copy=True))


def _chosen(opened: Opened, progress: bool) -> list[int] | None:
    """Returns the targets to fit; of all classes, those that the model gives to an input."""
    targets = targets_of(opened.configuration.targets)
    if isinstance(targets, list):
        return targets
    shape = opened.output_shape
    if targets is None:
        if shape not in ((), (1,)):
            raise ValueError(
                f"expected targets, got none for a model with outputs {shape}; pass such as --target 46 112, or "
                "--target all"
            )
        return None
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"expected a model with classes for --target all, got outputs {shape}; name the targets")
    given: set[int] = set()
    for batch in tqdm(opened.inputs, "classes", disable=not progress, leave=False):
        given.update(_outputs(opened.model_file.model, batch.inputs).argmax(1).tolist())
    if len(given) < shape[0]:
        warnings.warn(
            f"explaining {len(given)} of {shape[0]} classes; the model gives the others to none of the data",
            stacklevel=3,
        )
    return sorted(given)


def _candidates(xnn: XNNAttribution, configuration: Configuration) -> list[Target]:
    """Returns which of the fitted targets a configuration asks for, in order."""
    fitted = list(dict.fromkeys(t for explainer in xnn.explainers_.values() for t in explainer.targets))
    asked = targets_of(configuration.targets)
    if not isinstance(asked, list):
        return fitted
    for target in asked:
        xnn.explainer(target)
    return list(asked)


def _explained(
    opened: Opened, xnn: XNNAttribution, candidates: Sequence[Target], batch: Batch, folder: Path
) -> Iterator[str]:
    """Yields a line of JSON for each input of a batch, after writing its picture and its maps."""
    device = next((p.device for p in opened.model_file.model.parameters()), torch.device("cpu"))
    outputs = _outputs(opened.model_file.model, batch.inputs)
    each = torch.stack([select(outputs, t) for t in candidates], 1).argmax(1).tolist()
    targets = [candidates[i] for i in each]
    why = xnn.explain(batch.inputs.to(device), targets if targets[0] is not None else None)
    shown = why if batch.images is None else replace(why, inputs=batch.images)
    for i, name in enumerate(batch.names):
        maps, picture = folder / "maps" / f"{name}.npy", folder / "pictures" / f"{name}.png"
        _write_maps(maps, why.maps[i])
        _write_picture(picture, shown, i, f"{name}: {opened.name_of(targets[i])}")
        yield _line(name, why, i, maps.relative_to(folder), picture.relative_to(folder))


def _line(name: str, why: Explanation, i: int, maps: Path, picture: Path) -> str:
    numbers = {
        "name": name,
        "target": why.target[i],
        "prediction": float(why.prediction[i]),
        "surrogate": float(why.surrogate[i]),
        "bias": float(why.bias[i]),
        "contributions": why.contributions[i].tolist(),
        "features": why.features[i].tolist(),
        "maps": maps.as_posix(),
        "picture": picture.as_posix(),
    }
    return json.dumps(numbers) + "\n"


def _write_maps(path: Path, maps: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, maps.detach().cpu().float().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def _write_picture(path: Path, why: Explanation, index: int, title: str) -> None:
    buffer = io.BytesIO()
    # Without the program's name, equal pictures are equal files.
    why.show(index, title=title).savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def _evaluated(
    opened: Opened, explainer: Explainer, target: Target, Z: Tensor, y_hat: Tensor
) -> tuple[Evaluation, list[int]]:
    """Returns the numbers of one target, and the rows of its positives."""
    srae, c = explainer.srae, explainer.output(target)
    weight = srae.head.weight
    with torch.no_grad():
        E = encode_all(srae, Z.to(weight.device, weight.dtype))
        y_bar, contributions = srae.head(E)[:, c].cpu(), srae.contributions(E, c).cpu()
    classes = y_hat.dim() == 2 and y_hat.shape[1] > 1 and isinstance(target, int)
    rows = torch.arange(len(y_hat))
    if classes:
        rows = (y_hat.argmax(1) == target).nonzero()[:, 0]
    result = Evaluation(
        target,
        opened.name_of(target),
        regression_faithfulness(y_bar, select(y_hat, target).to(y_bar.dtype)),
        classification_faithfulness(y_hat, y_bar, target) if classes and isinstance(target, int) else None,
        float(effective_number(contributions[rows].abs().mean(0, keepdim=True))) if len(rows) else None,
        len(rows),
        len(y_hat),
    )
    return result, rows.tolist()


def _streams(opened: Opened, xnn: XNNAttribution, rows: dict[Target, list[int]], progress: bool) -> dict[Target, Any]:
    """Returns O1 and O2 of each target that has maps."""
    device = next((p.device for p in opened.model_file.model.parameters()), torch.device("cpu"))
    streams: dict[Target, OrthogonalityStream] = {}
    first = 0
    for batch in tqdm(opened.inputs, "maps", disable=not progress, leave=False):
        for target, wanted in rows.items():
            own = [row - first for row in wanted if first <= row < first + len(batch.names)]
            if own:
                maps = xnn.attribute(batch.inputs[own].to(device), target)
                if maps.dim() != 5:
                    raise ValueError(
                        f"expected maps of images for O1 and O2, got {tuple(maps.shape)}; leave out --maps"
                    )
                streams.setdefault(target, OrthogonalityStream()).update(maps.sum(2))
        first += len(batch.names)
    return {target: stream.compute() for target, stream in streams.items()}
