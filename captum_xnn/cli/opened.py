"""A model with its inputs, opened as a configuration names them, and the explainers saved for it.

Every command on files begins with it::

    opened = Opened.of(configuration)
    xnn = opened.explainers(folder)
    targets = opened.targets(xnn)
    for batch in opened.inputs:  # .inputs for the model, .images to show, .names
        why = xnn.explain(batch.inputs.to(opened.device), opened.highest(batch.inputs, targets))
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import captum.attr
import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_xnn.attribution import XNNAttribution
from captum_xnn.cli.configuration import Configuration, targets_of
from captum_xnn.cli.inputs import Inputs
from captum_xnn.cli.model_files import ModelFile, load_model, load_torchvision
from captum_xnn.heatmaps import ExcitationMaps, Heatmap
from captum_xnn.layers.state import untouched
from captum_xnn.targets import Target, select

__all__ = ["Opened", "heatmap_named", "needed"]


@dataclass(frozen=True)
class Opened:
    """A model with its inputs, which was tried on the first of them.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = Path(folder, "net.py").write_text("from torch import nn; load = lambda: nn.Linear(4, 3)")
        ...     torch.save(torch.zeros(10, 4), Path(folder, "inputs.pt"))
        ...     opened = Opened.of(Configuration(model=f"{folder}/net.py", data=f"{folder}/inputs.pt", device="cpu"))
        >>> len(opened.inputs.names), opened.output_shape
        (10, (3,))
    """

    configuration: Configuration
    """With size, mean and std of the model's file, where the configuration left them open."""
    model_file: ModelFile
    """The model, on the configured device, and the names of its classes."""
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
        data = needed(configuration, "data", "--data FOLDER")
        file = _model_file(configuration)
        asked = {name: getattr(configuration, name) for name in ("size", "mean", "std")}
        preparation = replace(file.preparation, **{name: value for name, value in asked.items() if value is not None})
        model = file.model.to(_device(configuration.device))
        inputs = Inputs(
            data,
            preparation,
            batch_size=configuration.batch_size,
            workers=configuration.workers,
            skip_damaged=configuration.skip_damaged,
            dtype=next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
        )
        known = replace(configuration, size=preparation.size, mean=preparation.mean, std=preparation.std)
        return cls(known, replace(file, model=model, preparation=preparation), inputs, _tried(model, inputs))

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.model_file.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return _device_of(self.model)

    def explainers(
        self, folder: str | os.PathLike[str], heatmap: type[Attribution] | Heatmap | None = None
    ) -> XNNAttribution:
        """Returns saved explainers, on the model.

        Args:
            folder: Where they were saved.
            heatmap: What draws the maps; the default, if None.

        Raises:
            ExplainerFileError: If there are none.
            ModelMismatchError: If they were fitted to another model.
        """
        return XNNAttribution.load(folder, self.model, heatmap=heatmap)

    def targets(self, xnn: XNNAttribution) -> list[Target]:
        """Returns the targets that the configuration asks for, or else all that were fitted.

        Args:
            xnn: The explainers.

        Raises:
            NotFittedError: If one that it asks for was not fitted.
        """
        asked = targets_of(self.configuration.targets)
        if not isinstance(asked, list):
            return list(dict.fromkeys(t for explainer in xnn.explainers_.values() for t in explainer.targets))
        for target in asked:
            xnn.explainer(target)
        return list(asked)

    def outputs(self, inputs: Tensor) -> Tensor:
        """Returns what the model gives, (N, ...), without gradients.

        Args:
            inputs: (N, ...), on any device.
        """
        outputs: Tensor = _outputs(self.model, inputs)
        return outputs

    def highest(self, inputs: Tensor, targets: Sequence[Target]) -> list[Target] | None:
        """Returns for each input the target that the model gives the highest output, as ``explain`` takes them.

        Args:
            inputs: (N, ...), on any device.
            targets: To choose from.

        Returns:
            N targets, or None for a model with a single output.
        """
        if list(targets) == [None]:
            return None
        outputs = self.outputs(inputs)
        best = torch.stack([select(outputs, target) for target in targets], 1).argmax(1)
        return [targets[i] for i in best.tolist()]

    def name_of(self, target: Target) -> str:
        """Returns what to call an output of the model in pictures and tables.

        Args:
            target: None, int, or tuple of ints.
        """
        classes = self.model_file.classes or ()
        if isinstance(target, int) and target < len(classes):
            return classes[target]
        return "the output" if target is None else f"target {target}"


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
    found: dict[str, type[Attribution] | Heatmap] = {"ExcitationMaps": ExcitationMaps()}
    for key, value in vars(captum.attr).items():
        if isinstance(value, type) and issubclass(value, Attribution):
            found[key] = value
    known = list(found)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.3) or known[:4]
        raise ValueError(
            f"expected a heatmap, ExcitationMaps or the name of a class in captum.attr, got {name!r}; near names: "
            f"{', '.join(near)}"
        )
    return found[name]


def needed(configuration: Configuration, name: str, option: str) -> str:
    """Returns a setting that a command cannot do without.

    Args:
        configuration: Where it is looked up.
        name: The setting.
        option: The option of the command line that sets it, for the error.

    Raises:
        ValueError: If it is not set.

    Example:
        >>> needed(Configuration(layer="relu6"), "layer", "--layer NAME")
        'relu6'
    """
    value: str | None = getattr(configuration, name)
    if value is None:
        raise ValueError(f"expected {name}, got none; pass {option}, or set {name} in the configuration")
    return value


def _model_file(configuration: Configuration) -> ModelFile:
    """Returns the one model that a configuration names."""
    if (configuration.model is None) == (configuration.torchvision is None):
        raise ValueError(
            f"expected one model, got {'none' if configuration.model is None else 'two'}; pass either --model FILE.py "
            "or --torchvision NAME --weights FILE, or set them in the configuration"
        )
    if configuration.model is not None:
        return load_model(configuration.model)
    weights = needed(configuration, "weights", "--weights FILE")
    return load_torchvision(needed(configuration, "torchvision", "--torchvision NAME"), weights)


def _device(name: str) -> torch.device:
    """Returns a device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, RuntimeError) as error:  # torch built without CUDA raises the former
        told = " ".join(str(error).split())[:120]
        raise ValueError(f"expected a device that is here, got {name!r} ({told}); use cpu or auto") from error


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _outputs(model: nn.Module, inputs: Tensor) -> Any:
    with untouched(model), torch.no_grad():
        return model(inputs.to(_device_of(model), copy=True))


def _tried(model: nn.Module, inputs: Inputs) -> tuple[int, ...]:
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
