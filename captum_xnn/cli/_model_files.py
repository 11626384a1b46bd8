"""Model files: a trained model from a Python file or module, or a torchvision model with a file of weights.

A Python file defines a function ``load()`` that returns the trained model. It may also define:

- ``MEAN`` and ``STD``: one number for each of 1 or 3 channels, for values in [0, 1]; one number means grey images;
- ``SIZE``: the height and width in pixels that images are resized to, or one number for both;
- ``transform``: a function from a PIL image in RGB to a tensor (C, H, W). It replaces resizing and normalisation;
  ``MEAN`` and ``STD``, if given, then only serve to convert the tensor back to an image for display;
- ``CLASSES``: the names of the model's outputs;
- ``encode``: for models that read texts, a function from a text to the ids of its tokens (L,), padded to one length;
- ``tokens``: a function from these ids to the tokens, without padding. Reports and pictures show them.

The command line runs the file as Python code. Pass only files that you trust.
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

from captum_xnn.cli._inputs import Preparation, as_channels, as_size

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ModelFile",
    "load_model",
    "load_torchvision",
    "read_classes",
    "torchvision_models",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of each channel that torchvision's models were trained with."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of each channel that torchvision's models were trained with."""


@dataclass(frozen=True)
class ModelFile:
    """A trained model in evaluation mode, with the conversion of images and texts to its inputs."""

    model: nn.Module
    """The model."""
    preparation: Preparation = field(default_factory=Preparation)
    """Conversion of images and texts to inputs."""
    classes: tuple[str, ...] | None = None
    """Names of the model's outputs."""


def load_model(source: str) -> ModelFile:
    r"""Load the model from a Python file or module.

    Args:
        source: ``FILE.py``, ``FILE.py:function`` or ``package.module:function``. Without a function, ``load`` is
            called. The file can import modules from its own folder; a module can import from the working directory.

    Raises:
        ValueError: If the file, module or function does not exist, or the function fails or does not return a
            ``torch.nn.Module``.

    Example:
        >>> import tempfile
        >>> code = "import torch\nSIZE = 32\ndef load():\n    return torch.nn.Linear(2, 3)"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = Path(folder, "net.py").write_text(code)
        ...     made = load_model(f"{folder}/net.py")
        >>> made.model, made.preparation.size
        (Linear(in_features=2, out_features=3, bias=True), (32, 32))
    """
    origin, colon, name = (source, "", "load") if source.endswith(".py") else source.rpartition(":")
    if not colon and not source.endswith(".py"):
        raise ValueError(
            f"the model {source!r} is not FILE.py, FILE.py:function or package.module:function; write a file with a "
            "function load() that returns the trained model"
        )
    with _importable(Path(origin).absolute().parent if origin.endswith(".py") else Path.cwd()):
        module = _run_user_code(lambda: _module(origin), repr(origin))
        load = getattr(module, name, None)
        if not callable(load):
            raise ValueError(
                f"{name} in {origin!r} is {'missing' if load is None else f'{type(load).__name__}, not a function'}; "
                f"define {name}() to return the trained model, or name another function after a colon"
            )
        model = load if isinstance(load, nn.Module) else _run_user_code(load, f"{name}() of {origin!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name}() of {origin!r} returned {type(model).__name__} instead of a torch.nn.Module; return the model "
            "itself, with its weights loaded"
        )
    classes = getattr(module, "CLASSES", None)
    return ModelFile(model.eval(), _preparation(module, origin), None if classes is None else tuple(map(str, classes)))


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read the names of classes.

    Args:
        path: A text file with a name on each line, or a folder whose sub-folders are the classes, in the order of
            torchvision's ImageFolder.

    Raises:
        ValueError: If there is no such file or folder, or it has no names.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "finch").mkdir(), Path(folder, "crow").mkdir()
        ...     read_classes(folder)
        (None, None)
        ('crow', 'finch')
    """
    file = Path(path)
    try:
        if file.is_dir():
            found = sorted(entry.name for entry in file.iterdir() if entry.is_dir() and entry.name[0] != ".")
        else:
            found = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the classes {str(path)!r} ({error}); pass a number, a text file with a name on each line, or "
            "a folder with a sub-folder for each class"
        ) from error
    if not found:
        raise ValueError(f"{str(path)!r} has no names of classes; write one on each line, in the order of the outputs")
    return tuple(found)


def load_torchvision(name: str, weights: str | os.PathLike[str], classes: int | None = None) -> ModelFile:
    """Load a torchvision model with weights from a file. Its inputs are 224 x 224 pixels in ImageNet's normalisation.

    A model with torchvision's own number of outputs has the names of ImageNet's classes.

    Args:
        name: Name in ``torchvision.models.list_models()``.
        weights: File with the state dict, saved by torch or as safetensors. Nothing is downloaded.
        classes: Number of outputs of a model whose last layer was replaced; torchvision's own number if None.

    Raises:
        ImportError: If torchvision is missing or does not match the installed torch.
        ValueError: If the model does not exist, or the weights cannot be read or do not fit the model.
    """
    models = torchvision_models(name)
    model: nn.Module = models.get_model(name, weights=None, **({} if classes is None else {"num_classes": classes}))
    path = Path(weights)
    hint = (
        f"pass the file with the state dict of torchvision's {name}, and --classes N if it has N classes; for another "
        "change, write a FILE.py"
    )
    try:
        model.load_state_dict(_state(path))
    except OSError as error:
        raise ValueError(f"cannot read the weights {str(path)!r} ({error.strerror}); {hint}") from error
    except Exception as error:  # torch and safetensors each raise their own errors for damaged or foreign files
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} does not hold weights of {name} ({reason[:200]}); {hint}") from error
    names = _imagenet_classes(models, name) if classes is None else None
    return ModelFile(model.eval(), Preparation((224, 224), IMAGENET_MEAN, IMAGENET_STD), names)


def _imagenet_classes(models: Any, name: str) -> tuple[str, ...] | None:
    """Return the names of the classes that torchvision's own weights were trained on; None if there are none."""
    weights = list(models.get_model_weights(name))
    return tuple(weights[0].meta["categories"]) if weights else None


def torchvision_models(name: str) -> Any:
    """Import ``torchvision.models``, and check that it has an image classifier of this name.

    Args:
        name: Name in ``torchvision.models.list_models()``.

    Raises:
        ImportError: If torchvision is missing or does not match the installed torch.
        ValueError: If the model does not exist.
    """
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # RuntimeError if torchvision was built for another torch
        raise ImportError(
            f"{name!r} needs torchvision, whose import raised {type(error).__name__} ({error}); run "
            "`pip install captum-xnn[vision]`, with the version that matches the installed torch"
        ) from error
    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no image classifier {name!r}; see torchvision.models.list_models")
    return models


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load

        return load(path.read_bytes())
    with path.open("rb") as file:
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make the modules in a folder importable inside the context, as Python does for the folder of a script."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _module(origin: str) -> ModuleType:
    """Import a module from a file or by its dotted name."""
    if not origin.endswith(".py"):
        return importlib.import_module(origin)
    path = Path(origin).absolute()
    # The module gets a name of its own, because the file may share its name with a package that it imports.
    spec = importlib.util.spec_from_file_location(f"captum_xnn_model_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {origin}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def _run_user_code(run: Callable[[], Any], what: str) -> Any:
    """Run the user's code and return its result. If it fails, raise an error that names the line."""
    try:
        return run()
    except (Exception, SystemExit) as error:  # a script may read arguments of its own, and exit
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and f.filename[0] != "<"
        ]
        at = f", line {frames[-1].lineno} of {frames[-1].filename}" if frames else ""
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot run {what}: {type(error).__name__} ({reason}{at}); check that it runs in Python by itself"
        ) from error


def _preparation(module: ModuleType, origin: str) -> Preparation:
    """Read the conversion of images to inputs from a module's SIZE, MEAN, STD and transform."""
    size, mean, std = (getattr(module, name, None) for name in ("SIZE", "MEAN", "STD"))
    functions = {name: getattr(module, name, None) for name in ("transform", "encode", "tokens")}
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ValueError(f"{name} in {origin!r} is {function!r}, not a function; rename it or make it a function")
    try:
        return Preparation(
            None if size is None else as_size("SIZE", size),
            None if mean is None else as_channels("MEAN", mean),
            None if std is None else as_channels("STD", std),
            **functions,
        )
    except ValueError as error:
        raise ValueError(f"{error} (in {origin})") from error
