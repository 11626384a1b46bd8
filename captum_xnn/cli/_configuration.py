"""Configuration of a run on the command line: every setting, as a TOML file holds it.

Settings missing from a file keep their defaults. Options of the command line override the file. Relative paths in a
file count from the file's own folder. A run saves its complete configuration beside its results. All paths in it are
absolute except the results' own folder, so the file repeats the run from anywhere.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from captum_xnn._files import replace_file
from captum_xnn.cli._inputs import as_channels, as_size
from captum_xnn.layers._logits import LOGITS_OF
from captum_xnn.training._recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["CONFIGURATION_FILE", "Configuration", "settings_in", "targets_of"]

CONFIGURATION_FILE = "config.toml"
"""Name of a run's configuration in the folder of its results."""


@dataclass(frozen=True)
class Configuration:
    """All settings of a run.

    Raises:
        ValueError: If a setting has the wrong type or is out of range; the message names the setting and its range.

    Example:
        >>> configuration = Configuration.of({"layer": "relu6", "targets": [46, "10-12"], "recipe": {"steps": 500}})
        >>> configuration.n_features, configuration.recipe.steps, targets_of(configuration.targets)
        (5, 500, [46, 10, 11, 12])
    """

    model: str | None = None
    """``FILE.py``, ``FILE.py:function`` or ``package.module:function``."""
    torchvision: str | None = None
    """Name of a torchvision model, instead of ``model``."""
    weights: str | None = None
    """Weights file of the torchvision model."""
    classes: int | str | None = None
    """The model's classes: their number, a text file with a name on each line, or a folder whose sub-folders are the
    classes, in the order of torchvision's ImageFolder. If None, those of the model's file."""
    layer: str | None = None
    """Dotted name of the layer to explain."""
    data: str | None = None
    """Folder of images, one image, or a file with an array of inputs."""
    size: tuple[int, int] | None = None
    """Height and width that images are resized to. A file may give one number for both. If None, the size from the
    model's file."""
    mean: tuple[float, ...] | None = None
    """Number to subtract from each channel. If None, the mean from the model's file."""
    std: tuple[float, ...] | None = None
    """Number to divide each channel by. If None, the standard deviation from the model's file."""
    batch_size: int = 64
    """Number of inputs in a batch."""
    workers: int = 0
    """Number of processes that read images. With 0, the main process reads them."""
    skip_damaged: bool = False
    """Whether to skip damaged images instead of raising an error."""
    targets: str | tuple[int | str, ...] | None = None
    """``"all"``, or whole numbers, ranges such as ``"10-19"`` (19 included), and names of classes. None for a model
    with one output."""
    probabilities: str | None = None
    """``"softmax"``, ``"log_softmax"`` or ``"sigmoid"`` if the model ends with this function: its logits are explained.
    None if the model's outputs are logits or quantities."""
    joint: bool = False
    """Whether one set of x-features explains all targets."""
    n_features: int = 5
    """Number of x-features K of each explainer."""
    form: str = "groups"
    """``"groups"`` for groups of contributions, which add up exactly, ``"drsa"`` for subspaces, which do as well, or
    ``"srae"`` for the paper's learned network."""
    seed: int = 0
    """Seed of every fit."""
    device: str = "auto"
    """Device in torch's notation; ``auto`` is the GPU if there is one, else the CPU."""
    out: str | None = None
    """Folder for the results."""
    store: str | None = None
    """Folder for a store of activations, for data that do not fit in memory or activations to be used again."""
    checkpoint: str | None = None
    """Folder for checkpoints, from which an interrupted fit resumes. If None, a folder inside ``out`` that is removed
    when the fit is done."""
    tensorboard: str | None = None
    """Folder for loss curves in TensorBoard's format."""
    recipe: Recipe = field(default_factory=Recipe)
    """Settings of gradient descent."""

    def __post_init__(self) -> None:
        for name, convert in _SETTINGS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, convert(name, value))
        if isinstance(self.targets, tuple):  # names are looked up once the model is there
            numbers = [t for t in self.targets if not _is_name(t)]
            if numbers or not self.targets:
                targets_of(numbers)

    @classmethod
    def of(cls, settings: Mapping[str, Any], source: str = "the settings") -> Configuration:
        """Make a configuration from settings by name; missing settings keep their defaults.

        Args:
            settings: Settings as TOML gives them; ``recipe`` is a mapping.
            source: Origin of the settings, for error messages.

        Raises:
            ValueError: If a name is unknown or a value is wrong. For an unknown name, the message lists near names.
        """
        recipe = settings.get("recipe", {})
        if not isinstance(recipe, Mapping):
            raise ValueError(
                f"the recipe in {source} is {recipe!r}, not a table; write [recipe], and steps = 500 below it"
            )
        _check_names(settings, _names(cls), source, "settings")
        _check_names(recipe, _names(Recipe), f"[recipe] of {source}", "settings of the recipe")
        try:
            return cls(**{**settings, "recipe": Recipe(**recipe)})
        except TypeError as error:  # a recipe compares its values with numbers
            raise ValueError(
                f"the recipe of {source} is {dict(recipe)!r}, and holds no numbers ({error}); see captum_xnn.Recipe"
            ) from error
        except ValueError as error:
            raise ValueError(f"{error} (in {source})") from error

    @classmethod
    def read(cls, path: str | os.PathLike[str] | None, overriding: Mapping[str, Any] | None = None) -> Configuration:
        r"""Read a configuration from a file, and override some of its settings.

        Args:
            path: Path of a TOML file, or None for the defaults.
            overriding: Settings by name. Relative paths count from the working directory. Settings inside ``recipe``
                override one by one. A ``model`` overrides the file's ``torchvision`` model too, and the other way
                round.

        Raises:
            ValueError: If the file cannot be read, is not TOML, or holds an unknown setting or a wrong value.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     written = Path(folder, "run.toml").write_text('layer = "relu6"\n[recipe]\nsteps = 500')
            ...     both = Configuration.read(Path(folder, "run.toml"), {"seed": 3, "recipe": {"beta": 0.5}})
            >>> both.layer, both.seed, both.recipe.steps, both.recipe.beta
            ('relu6', 3, 500, 0.5)
        """
        over = _with_absolute_paths(overriding or {}, Path.cwd())
        if path is None:
            return cls.of(over, "the options")
        settings = _read_toml(Path(path))
        cls.of(settings, str(path))  # so that errors in the file name the file
        settings = _with_absolute_paths(settings, Path(path).absolute().parent)
        if {"model", "torchvision"} & set(over):
            settings = {name: value for name, value in settings.items() if name not in _MODEL}
        recipe = {**settings.get("recipe", {}), **over.get("recipe", {})}
        return cls.of({**settings, **over, "recipe": recipe}, f"{path} and the options")

    def text(self) -> str:
        """Format the configuration as TOML. Reading it gives an equal configuration.

        Example:
            >>> print(Configuration(layer="relu6", targets="all").text().splitlines()[0])
            layer = "relu6"
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recipe"}
        recipe = {f.name: getattr(self.recipe, f.name) for f in fields(self.recipe)}
        return "\n".join([*_lines(plain), "", "[recipe]", *_lines(recipe), ""])

    def write(self, folder: Path) -> Path:
        """Write the configuration atomically into the folder of the results, and return the file's path.

        Args:
            folder: Existing folder of the results. The written file has it as ``out``.
        """
        path = folder / CONFIGURATION_FILE
        replace_file(path, replace(self, out=".").text().encode())
        return path


def settings_in(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that are settings of a configuration.

    Args:
        arguments: Arguments of a command; None leaves a setting open.
    """
    given = {f.name: value for f in fields(Configuration) if (value := getattr(arguments, f.name, None)) is not None}
    if "recipe" in given:
        given["recipe"] = dict(given["recipe"])
    return given


def targets_of(
    targets: str | Iterable[int | str] | None, classes: Sequence[str] | None = None
) -> list[int] | str | None:
    """Expand targets to a list of numbers. "all" and None are returned unchanged.

    Args:
        targets: "all", or numbers, ranges such as "10-19" (19 included) and names of classes. A name may leave out
            words, as long as one class only has those given; case and underscores do not count.
        classes: Names of the model's outputs, in order.

    Raises:
        ValueError: If an entry is neither a number nor a range nor one class, or the list is empty.

    Example:
        >>> targets_of(["3", "10-12", 11, "goldfinch"], ["American_Crow", "European_Goldfinch"])
        [3, 10, 11, 12, 1]
    """
    if targets is None or targets == "all":
        return targets
    found: list[int] = []
    for part in [targets] if isinstance(targets, str) else targets:
        first, dash, last = str(part).partition("-")
        whole = first.isdecimal() and (last.isdecimal() if dash else True)
        if not whole and not isinstance(part, int) and _is_name(part):
            found.append(_class_named(part, classes))
            continue
        if isinstance(part, bool) or not whole or (dash and int(last) < int(first)):
            raise ValueError(
                f"target {part!r} is not a whole number from 0, a range such as 10-19, or all; a number is the index "
                "of a model output, and other text the name of a class"
            )
        found += range(int(first), int(last if dash else first) + 1)
    if not found:
        raise ValueError('the list of targets is empty; name one, such as 46, or write "all"')
    return list(dict.fromkeys(found))


def _class_named(name: str, classes: Sequence[str] | None) -> int:
    """Find the index of a class by its name; raise if no class or several have it."""
    if not classes:
        raise ValueError(
            f"target {name!r} is a name, and the names of the model's classes are not known; pass the class's number, "
            "or the names by --classes FILE, --classes DIR with a folder for each class, or CLASSES in the model's file"
        )
    plain = [" ".join(c.replace("_", " ").split()).lower() for c in classes]
    wanted = " ".join(name.replace("_", " ").split()).lower()
    alike = [i for i, c in enumerate(plain) if c == wanted] or [
        i for i, c in enumerate(plain) if f" {wanted} " in f" {c} "
    ]
    if len(alike) == 1:
        return alike[0]
    if alike:
        some = ", ".join(f"{classes[i]} ({i})" for i in alike[:4])
        raise ValueError(f"target {name!r} may be any of {some}; write more of the name, or the number")
    near = difflib.get_close_matches(wanted, plain, n=3, cutoff=0.5)
    hint = f"near names: {', '.join(classes[plain.index(c)] for c in near)}" if near else "pass a class's number"
    raise ValueError(f"the model has no class {name!r} among its {len(classes)} classes; {hint}")


_MODEL = ("model", "torchvision", "weights", "classes")


def _names(form: type[Any]) -> list[str]:
    return [f.name for f in fields(form)]


def _check_names(given: Mapping[str, Any], allowed: list[str], source: str, what: str) -> None:
    """Raise ValueError for the first unknown name, listing near names."""
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
            hint = f"near names: {', '.join(near)}" if near else f"the {what} are {', '.join(allowed)}"
            raise ValueError(f"{name!r} in {source} is not one of the {what}; {hint}")


def _wrong(name: str, value: Any, right: str) -> ValueError:
    return ValueError(f"{name} is {value!r}; give {right}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(name, value, "text")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _whole(name: str, value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _wrong(name, value, f"a whole number of at least {least}")
    return value


def _count(name: str, value: Any) -> int:
    return _whole(name, value, 1)


def _targets(name: str, value: Any) -> str | tuple[int | str, ...]:
    if isinstance(value, (list, tuple)):
        numbers = tuple(int(v) if isinstance(v, str) and v.isdecimal() else v for v in value)
        return "all" if numbers == ("all",) else numbers
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _wrong(name, value, 'a list of whole numbers and ranges such as "10-19", or "all"')
    return "all" if value == "all" else (value,)


def _is_name(target: int | str) -> bool:
    return isinstance(target, str) and target != "all" and re.search("[^0-9. -]", target) is not None


def _classes(name: str, value: Any) -> int | str:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, str) and value:
        return value
    return _whole(name, value, 1)


def _form(name: str, value: Any) -> str:
    if value not in ("groups", "drsa", "srae"):
        raise _wrong(name, value, '"groups", "drsa" or "srae"')
    return str(value)


def _probabilities(name: str, value: Any) -> str:
    if value not in LOGITS_OF:
        raise _wrong(name, value, '"softmax", "log_softmax" or "sigmoid"')
    return str(value)


_SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("model", "torchvision", "weights", "layer", "data", "device", "out"), _text),
    **dict.fromkeys(("store", "checkpoint", "tensorboard"), _text),
    **dict.fromkeys(("mean", "std"), as_channels),
    **dict.fromkeys(("batch_size", "n_features"), _count),
    **dict.fromkeys(("workers", "seed"), _whole),
    **dict.fromkeys(("skip_damaged", "joint"), _flag),
    "classes": _classes,
    "form": _form,
    "probabilities": _probabilities,
    "size": as_size,
    "targets": _targets,
}


def _read_toml(path: Path) -> dict[str, Any]:
    """Read the settings of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows may put a mark in front
    except OSError as error:
        raise ValueError(
            f"cannot read the configuration {str(path)!r} ({error.strerror}); pass an existing TOML file"
        ) from error
    except ValueError as error:  # also raised for bytes that are not UTF-8
        raise ValueError(f"{str(path)!r} is not valid TOML ({error}); correct that line") from error


def _with_absolute_paths(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Make all paths in the settings absolute."""
    found = dict(settings)
    for name in ("weights", "data", "out", "store", "checkpoint", "tensorboard"):
        if found.get(name) is not None:
            found[name] = os.path.normpath(folder / Path(found[name]).expanduser())
    classes = found.get("classes")
    if isinstance(classes, str) and not classes.isdecimal():
        found["classes"] = os.path.normpath(folder / Path(classes).expanduser())
    source = found.get("model")
    if source is not None:
        file, colon, function = source.rpartition(":") if not source.endswith(".py") else (source, "", "")
        if file.endswith(".py"):
            found["model"] = os.path.normpath(folder / Path(file).expanduser()) + colon + function
    return found


def _lines(settings: Mapping[str, Any]) -> list[str]:
    """Format settings as lines of TOML. Skip settings that are None, because TOML has no such value."""
    return [f"{name} = {_value(value)}" for name, value in settings.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    # JSON writes texts, numbers, true and false as TOML does, except for one character that TOML requires escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
