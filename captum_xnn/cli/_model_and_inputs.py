"""The model and the inputs that a configuration names.

Every command on files begins like this::

    opened = ModelAndInputs.of(configuration)
    xnn = XNNAttribution.load(
        folder, opened.model, heatmap=opened.heatmap_or_default(), prediction_transform=opened.prediction_transform
    )
    targets = opened.targets(xnn)
    for batch in opened.inputs:  # .inputs for the model, .images to show, .names
        why = xnn.explain(batch.inputs.to(opened.device), opened.highest(batch.inputs, targets))
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import captum.attr
import torch
from captum.attr import Attribution, LayerIntegratedGradients
from torch import Tensor, nn

from captum_xnn.cli._configuration import Configuration, targets_of
from captum_xnn.cli._inputs import ARRAY_FILES, Inputs
from captum_xnn.cli._model_files import ModelFile, load_model, load_torchvision, read_classes
from captum_xnn.errors import NotFittedError
from captum_xnn.heatmaps._excitation_maps import ExcitationMaps
from captum_xnn.heatmaps._from_captum import FromCaptum
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.layers._embeddings import embedding_of
from captum_xnn.layers._logits import LOGITS_OF
from captum_xnn.layers._outputs import one_tensor, outputs_of, run_model
from captum_xnn.layers._read import OutputTransform
from captum_xnn.layers._targets import Difference, Target, select
from captum_xnn.plots._names import check_class_names

if TYPE_CHECKING:  # a command hands its explainers in
    from captum_xnn.attribution import XNNAttribution

__all__ = ["ModelAndInputs", "heatmap_named", "needed", "number_of"]


@dataclass(frozen=True)
class ModelAndInputs:
    """A model with its inputs. The first input has run through the model as a check.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = Path(folder, "net.py").write_text("from torch import nn; load = lambda: nn.Linear(4, 3)")
        ...     torch.save(torch.zeros(10, 4), Path(folder, "inputs.pt"))
        ...     settings = Configuration(model=f"{folder}/net.py", data=f"{folder}/inputs.pt", device="cpu")
        ...     opened = ModelAndInputs.of(settings)
        >>> len(opened.inputs.names), opened.output_shape
        (10, (3,))
    """

    configuration: Configuration
    """The configuration. Size, mean and std that it left open are filled in from the model's file."""
    model_file: ModelFile
    """The model, on the configured device, and the names of its classes."""
    inputs: Inputs
    """Batches of inputs for the model, with images for display and names."""
    output_shape: tuple[int, ...]
    """Shape of the model's output for one input."""

    @classmethod
    def of(cls, configuration: Configuration) -> ModelAndInputs:
        """Load the model and open the inputs of a configuration.

        Args:
            configuration: Settings with at least a model and data.

        Raises:
            TypeError: If the model's output is not one tensor.
            ValueError: If the model or data are missing or unreadable, the model does not accept the inputs, or it has
                more or fewer outputs than there are names of classes.
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
        prepared = replace(configuration, size=preparation.size, mean=preparation.mean, std=preparation.std)
        shape = _output_shape(model, inputs)
        if file.classes is not None:
            check_class_names(file.classes, shape)
        return cls(prepared, replace(file, model=model, preparation=preparation), inputs, shape)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.model_file.model

    @property
    def prediction_transform(self) -> OutputTransform | None:
        """Function that turns the model's probabilities into logits; None if it gives logits."""
        name = self.configuration.probabilities
        return None if name is None else LOGITS_OF[name]

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def heatmap_or_default(
        self, heatmap: type[Attribution] | Heatmap | None = None
    ) -> type[Attribution] | Heatmap | None:
        """Return the backend that draws maps, or None for the default of each form.

        Args:
            heatmap: A backend. If None, ids of tokens get integrated gradients at the embedding.
        """
        if heatmap is None and not (ids := next(iter(self.inputs)).inputs[:1]).is_floating_point():
            name = embedding_of(self.model, (ids.to(self.device),))
            return None if name is None else FromCaptum(LayerIntegratedGradients, layer=name)
        return heatmap

    def targets(self, xnn: XNNAttribution) -> list[Target]:
        """Return the targets in the configuration, or all fitted targets if it names none or says "all".

        Args:
            xnn: The explainers.

        Raises:
            NotFittedError: If a target in the configuration was not fitted.
        """
        asked = targets_of(self.configuration.targets, self.model_file.classes)
        if not isinstance(asked, list):
            return list(dict.fromkeys(t for explainer in xnn.explainers_.values() for t in explainer.targets))
        fitted = {t for explainer in xnn.explainers_.values() for t in explainer.targets}
        for target in asked:
            if target not in fitted:
                have = ", ".join(f"{t} ({self.name_of(t)})" for t in sorted(fitted, key=str))
                raise NotFittedError(
                    f"target {target} has no explainer ({self.name_of(target)}; fitted: {have}); fit it first, by "
                    f"captum-xnn fit --target {target} ..., into another folder or together with the others"
                )
        return list(asked)

    def outputs(self, inputs: Tensor) -> Tensor:
        """Compute the model's outputs, (N, ...), without gradients.

        Args:
            inputs: Inputs (N, ...), on any device.
        """
        return outputs_of(self.model, (inputs,), self.prediction_transform)

    def highest(self, inputs: Tensor, targets: Sequence[Target]) -> list[Target] | None:
        """Find the target with the highest output for each input, in the form that ``explain`` takes.

        Args:
            inputs: Inputs (N, ...), on any device.
            targets: Targets to choose from.

        Returns:
            N targets, or None for a model with a single output.
        """
        if list(targets) == [None]:
            return None
        outputs = self.outputs(inputs)
        best = torch.stack([select(outputs, target) for target in targets], 1).argmax(1)
        return [targets[i] for i in best.tolist()]

    def name_of(self, target: Target) -> str:
        """Return the name of an output of the model, for pictures and tables.

        Args:
            target: None, int, tuple of ints, or a difference.
        """
        if isinstance(target, Difference):
            return f"{self.name_of(target.target)} rather than {self.name_of(target.against)}"
        classes = self.model_file.classes or ()
        if isinstance(target, int) and target < len(classes):
            return classes[target]
        return "the output" if target is None else f"target {target}"


def heatmap_named(name: str) -> type[Attribution] | Heatmap:
    """Look up a heatmap backend by name.

    Args:
        name: ``ExcitationMaps``, or the name of a class in ``captum.attr`` such as ``DeepLift``. A method of a layer
            takes the layer after a colon, as ``LayerGradCam:layer4``.

    Raises:
        ValueError: If the name is unknown; the message lists near names.

    Example:
        >>> heatmap_named("DeepLift").__name__, heatmap_named("LayerGradCam:layer4")
        ('DeepLift', FromCaptum(LayerGradCam, layer='layer4'))
    """
    name, colon, layer = name.partition(":")
    backends: dict[str, type[Attribution] | Heatmap] = {"ExcitationMaps": ExcitationMaps()}
    for key, value in vars(captum.attr).items():
        if isinstance(value, type) and issubclass(value, Attribution):
            backends[key] = value
    names = list(backends)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:4]
        raise ValueError(
            f"heatmap {name!r} does not exist; pass ExcitationMaps or a class in captum.attr (near names: "
            f"{', '.join(near)})"
        )
    backend = backends[name]
    if not colon:
        return backend
    if not isinstance(backend, type):
        return ExcitationMaps(layer)
    return FromCaptum(backend, layer=layer)


def needed(configuration: Configuration, name: str, option: str) -> str:
    """Return a required setting of a configuration.

    Args:
        configuration: The configuration to look in.
        name: Name of the setting.
        option: Option of the command line that sets it, for the error message.

    Raises:
        ValueError: If the setting is missing.

    Example:
        >>> needed(Configuration(layer="relu6"), "layer", "--layer NAME")
        'relu6'
    """
    value: str | None = getattr(configuration, name)
    if value is None:
        raise ValueError(f"the setting {name!r} is missing; pass {option}, or set {name} in the configuration")
    return value


def _model_file(configuration: Configuration) -> ModelFile:
    """Load the one model that a configuration names, with the names of its classes."""
    if (configuration.model is None) == (configuration.torchvision is None):
        raise ValueError(
            f"{'no model is' if configuration.model is None else 'two models are'} given; pass either --model FILE.py "
            "or --torchvision NAME --weights FILE, or set one of them in the configuration"
        )
    classes = configuration.classes
    names = None if classes is None or isinstance(classes, int) else read_classes(classes)
    if configuration.model is not None:
        file = load_model(configuration.model)
        if isinstance(classes, int):
            raise ValueError(
                f"classes={classes} is a number, which is for --torchvision; pass a file or folder of names to "
                "--classes, or leave it out"
            )
    else:
        weights = needed(configuration, "weights", "--weights FILE")
        name = needed(configuration, "torchvision", "--torchvision NAME")
        file = load_torchvision(name, weights, number_of(classes))
    return file if names is None else replace(file, classes=names)


def number_of(classes: int | str | None) -> int | None:
    """Return the number of a model's classes; None if the setting leaves it open.

    Args:
        classes: Their number, or a file or folder of names.
    """
    return len(read_classes(classes)) if isinstance(classes, str) else classes


def _device(name: str) -> torch.device:
    """Convert a name to a device; raise if the device is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, RuntimeError) as error:  # torch built without CUDA raises AssertionError
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"device {name!r} is not available ({reason}); use cpu or auto") from error


def _fix(first: Tensor, inputs: Inputs) -> str:
    """Say what to change in inputs on which a model fails."""
    if inputs.path.suffix.lower() not in ARRAY_FILES:
        return "check the size (--size) and the channels (MEAN and STD) of images, or encode() of texts"
    if not first.is_floating_point():
        return "save the array as the model takes it, such as array.astype('float32') / 255 for the bytes of images"
    return "save the array in the shape (M, ...) that the model takes"


def _output_shape(model: nn.Module, inputs: Inputs) -> tuple[int, ...]:
    """Run the model on one input, and return the shape of its output."""
    first = next(iter(inputs)).inputs[:1]
    try:
        output = run_model(model, (first,))
    except Exception as error:  # the model's own code may raise anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the model fails on inputs {first.dtype} {tuple(first.shape)} ({type(error).__name__}: {reason}); "
            f"{_fix(first, inputs)}"
        ) from error
    shape = one_tensor(output, "let load() return a module that picks the logits").shape
    if len(shape) and shape[0] != 1:
        raise ValueError(
            f"the model's output for 1 input has shape {tuple(shape)}, without a row for the input; return (N, ...) "
            "for any N, as with squeeze(1) in place of squeeze()"
        )
    return tuple(shape[1:])
