"""A trained model as the command line names it: made by a Python file or module, or one of torchvision with weights.

A Python file offers a function ``load()`` that returns the trained model, and, as it likes, how images become inputs:

- ``MEAN`` and ``STD``, one number for each of 1 or 3 channels, of values in [0, 1]; one number means grey images;
- ``SIZE``, the height and width in pixels, or one number for both, that images are resized to;
- or ``transform``, a function from a PIL image in RGB to a tensor (C, H, W), in place of all of that; ``MEAN`` and
  ``STD``, where given, then only tell how to show the tensor as an image;
- ``CLASSES``, the names of the model's outputs.

Naming a file runs it, with all that it may do: name those that you trust.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.cli.inputs import Preparation, as_channels, as_size

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ModelFile", "load_model", "load_torchvision"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of the channels that torchvision's models were trained with."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their standard deviation."""


@dataclass(frozen=True)
class ModelFile:
    """A trained model, in evaluation mode, and how images become its inputs."""

    model: nn.Module
    preparation: Preparation = field(default_factory=Preparation)
    """How images become inputs."""
    classes: tuple[str, ...] | None = None
    """Names of the model's outputs."""


def load_model(source: str) -> ModelFile:
    r"""Returns the model that a Python file or module makes.

    Args:
        source: ``FILE.py``, ``FILE.py:function`` or ``package.module:function``; the function is ``load`` unless named.
            The file's folder and the working directory are importable meanwhile.

    Raises:
        ValueError: If there is no such file, module or function, or the function fails or returns no module.

    Example:
        >>> import tempfile
        >>> code = "import torch\nSIZE = 32\ndef load():\n    return torch.nn.Linear(2, 3)"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = Path(folder, "net.py").write_text(code)
        ...     made = load_model(f"{folder}/net.py")
        >>> made.model, made.preparation.size
        (Linear(in_features=2, out_features=3, bias=True), (32, 32))
    """
    place, colon, name = (source, "", "load") if source.endswith(".py") else source.rpartition(":")
    if not colon and not source.endswith(".py"):
        raise ValueError(
            f"expected a model as FILE.py, FILE.py:function or package.module:function, got {source!r}; write a file "
            "with a function load() that returns the trained model"
        )
    with _importable(Path(place).absolute().parent if place.endswith(".py") else Path.cwd()):
        module = _ran(lambda: _module(place), f"{place!r} to run")
        load = getattr(module, name, None)
        if not callable(load):
            raise ValueError(
                f"expected a function {name}() in {place!r}, got {'none' if load is None else type(load).__name__}; "
                "define it to return the trained model, or name another after a colon"
            )
        model = load if isinstance(load, nn.Module) else _ran(load, f"{name}() of {place!r} to return a model")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"expected {name}() of {place!r} to return a torch.nn.Module, got {type(model).__name__}; return the model "
            "itself, with its weights loaded"
        )
    classes = getattr(module, "CLASSES", None)
    return ModelFile(model.eval(), _preparation(module, place), None if classes is None else tuple(map(str, classes)))


def load_torchvision(name: str, weights: str | os.PathLike[str]) -> ModelFile:
    """Returns a model of torchvision with weights from a file, for ImageNet's normalisation and 224 x 224 pixels.

    Args:
        name: As in ``torchvision.models.list_models()``.
        weights: A state dict saved by torch, or as safetensors. Nothing is downloaded.

    Raises:
        ImportError: If torchvision is missing or does not fit the installed torch.
        ValueError: If there is no such model, or the weights cannot be read or do not fit it.
    """
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch
        raise ImportError(
            f"expected torchvision, which {name!r} is from, got {type(error).__name__} ({error}); run "
            "`pip install captum-xnn[vision]`, with the version that belongs to the installed torch"
        ) from error
    if name not in models.list_models(module=models):
        raise ValueError(
            f"expected the name of an image classifier of torchvision, got {name!r}; see torchvision.models.list_models"
        )
    model: nn.Module = models.get_model(name, weights=None)
    path = Path(weights)
    hint = f"pass the file with the state dict of torchvision's {name}; for another form of it write a FILE.py"
    try:
        model.load_state_dict(_state(path))
    except OSError as error:
        raise ValueError(
            f"expected weights in {str(path)!r}, could not read them ({error.strerror}); {hint}"
        ) from error
    except Exception as error:  # torch and safetensors raise errors of their own for foreign and truncated files
        told = " ".join(str(error).split())
        raise ValueError(f"expected weights of {name} in {str(path)!r}, got others ({told[:200]}); {hint}") from error
    return ModelFile(model.eval(), Preparation((224, 224), IMAGENET_MEAN, IMAGENET_STD))


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load

        return load(path.read_bytes())
    with path.open("rb") as file:
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Returns a context in which modules beside a file are found, as when Python runs the file."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _module(place: str) -> ModuleType:
    """Returns the module of a file or of a dotted name."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).absolute()
    # Under a name of its own: the file may be called like a package that it imports.
    spec = importlib.util.spec_from_file_location(f"captum_xnn_model_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {place}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _ran(run: Callable[[], Any], what: str) -> Any:
    """Returns what the user's code returns; where it fails, the error says in which line."""
    try:
        return run()
    except Exception as error:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and f.filename[0] != "<"
        ]
        at = f", line {frames[-1].lineno} of {frames[-1].filename}" if frames else ""
        told = " ".join(str(error).split())
        raise ValueError(
            f"expected {what}, got {type(error).__name__} ({told}{at}); see that it runs in Python by itself"
        ) from error


def _preparation(module: ModuleType, place: str) -> Preparation:
    """Returns how images become inputs, by what a module says of it."""
    size, mean, std, transform = (getattr(module, name, None) for name in ("SIZE", "MEAN", "STD", "transform"))
    if transform is not None and not callable(transform):
        raise ValueError(f"expected transform in {place!r} as a function, got {transform!r}; rename it or make it one")
    try:
        return Preparation(
            None if size is None else as_size("SIZE", size),
            None if mean is None else as_channels("MEAN", mean),
            None if std is None else as_channels("STD", std),
            transform,
        )
    except ValueError as error:
        raise ValueError(f"{error} (in {place})") from error
