"""The configuration of a run on the command line: every setting, as a TOML file holds it.

A file sets what it names and leaves the rest at its default; options of the command line override it. Relative paths in
a file count from the file's own folder. What a run saves beside its results has every setting, with absolute paths but
for its own folder, so that it gives the same run again from anywhere.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from captum_xnn.cli.inputs import as_channels, as_size
from captum_xnn.serialization import replace_file
from captum_xnn.training.problem import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["CONFIGURATION_FILE", "Configuration", "targets_of"]

CONFIGURATION_FILE = "config.toml"
"""Name of a run's configuration in the folder of its results."""


@dataclass(frozen=True)
class Configuration:
    """All settings of a run.

    Raises:
        ValueError: If a setting has the wrong type or is out of range; the message names it and what it should be.

    Example:
        >>> configuration = Configuration.of({"layer": "relu6", "targets": [46, "10-12"], "recipe": {"steps": 500}})
        >>> configuration.n_features, configuration.recipe.steps, targets_of(configuration.targets)
        (5, 500, [46, 10, 11, 12])
    """

    model: str | None = None
    """``FILE.py``, ``FILE.py:function`` or ``package.module:function``."""
    torchvision: str | None = None
    """Name of a model of torchvision, in place of ``model``."""
    weights: str | None = None
    """Weights file of the torchvision model."""
    layer: str | None = None
    """Dotted name of the layer to explain."""
    data: str | None = None
    """Folder of images, one image, or a file with an array of inputs."""
    size: tuple[int, int] | None = None
    """Height and width that images are resized to; one number in a file for both. The model file's, if None."""
    mean: tuple[float, ...] | None = None
    """What is subtracted from each channel. The model file's, if None."""
    std: tuple[float, ...] | None = None
    """What each channel is divided by. The model file's, if None."""
    batch_size: int = 64
    """Inputs that go through the model at once."""
    workers: int = 0
    """Processes that read images; 0 reads in the process of the run."""
    skip_damaged: bool = False
    """Whether damaged images are left out rather than an error."""
    targets: str | tuple[int | str, ...] | None = None
    """``"all"``, or whole numbers and ranges such as ``"10-19"``, the last included. None for a model of one output."""
    joint: bool = False
    """Whether one set of x-features explains all targets."""
    n_features: int = 5
    """x-features K for each explainer."""
    form: str = "groups"
    """``"groups"`` of contributions, which are exact, or ``"srae"``, the paper's learned network."""
    seed: int = 0
    """Seeds every fit."""
    device: str = "auto"
    """A device as torch names it; ``auto`` is the GPU if there is one."""
    out: str | None = None
    """Folder of the results."""
    store: str | None = None
    """Folder to keep activations in, where they do not fit in memory or are to be used again."""
    checkpoint: str | None = None
    """Folder to keep checkpoints in, and to go on from. One in the folder of the results, until the fit is done, if
    None."""
    tensorboard: str | None = None
    """Folder to write curves of the loss into, for TensorBoard."""
    recipe: Recipe = field(default_factory=Recipe)
    """Settings of the training."""

    def __post_init__(self) -> None:
        for name, convert in _SETTINGS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, convert(name, value))
        targets_of(self.targets)

    @classmethod
    def of(cls, settings: Mapping[str, Any], source: str = "the settings") -> Configuration:
        """Returns the configuration that has some settings, by name, and else the defaults.

        Args:
            settings: As TOML gives them; ``recipe`` is a mapping.
            source: Where they come from, for errors.

        Raises:
            ValueError: If a name is unknown; near names are listed. If a value is wrong.
        """
        recipe = settings.get("recipe", {})
        if not isinstance(recipe, Mapping):
            raise ValueError(f"expected a table [recipe] in {source}, got {recipe!r}; write steps = 500 below [recipe]")
        _check_names(settings, _names(cls), source, "settings")
        _check_names(recipe, _names(Recipe), f"[recipe] of {source}", "settings of the recipe")
        try:
            return cls(**{**settings, "recipe": Recipe(**recipe)})
        except TypeError as error:  # a recipe compares its values with numbers
            raise ValueError(
                f"expected numbers in the recipe of {source}, got {dict(recipe)!r} ({error}); see captum_xnn.Recipe"
            ) from error
        except ValueError as error:
            raise ValueError(f"{error} (in {source})") from error

    @classmethod
    def read(cls, path: str | os.PathLike[str] | None, overriding: Mapping[str, Any] | None = None) -> Configuration:
        r"""Returns the configuration of a file, with some settings replaced.

        Args:
            path: A TOML file, or None for the defaults.
            overriding: Settings by name, with relative paths that count from the working directory. Those of
                ``recipe`` replace one by one. A model takes the place of the file's model, of either kind.

        Raises:
            ValueError: If the file cannot be read, is no TOML, or holds what is no setting.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     written = Path(folder, "run.toml").write_text('layer = "relu6"\n[recipe]\nsteps = 500')
            ...     both = Configuration.read(Path(folder, "run.toml"), {"seed": 3, "recipe": {"beta": 0.5}})
            >>> both.layer, both.seed, both.recipe.steps, both.recipe.beta
            ('relu6', 3, 500, 0.5)
        """
        over = _located(overriding or {}, Path.cwd())
        if path is None:
            return cls.of(over, "the options")
        settings = _parsed(Path(path))
        cls.of(settings, str(path))  # what is wrong with the file itself is told of the file
        settings = _located(settings, Path(path).absolute().parent)
        if {"model", "torchvision"} & set(over):
            settings = {name: value for name, value in settings.items() if name not in _MODEL}
        recipe = {**settings.get("recipe", {}), **over.get("recipe", {})}
        return cls.of({**settings, **over, "recipe": recipe}, f"{path} and the options")

    def text(self) -> str:
        """Returns the configuration as TOML, which gives an equal one when it is read.

        Example:
            >>> print(Configuration(layer="relu6", targets="all").text().splitlines()[0])
            layer = "relu6"
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recipe"}
        recipe = {f.name: getattr(self.recipe, f.name) for f in fields(self.recipe)}
        return "\n".join([*_lines(plain), "", "[recipe]", *_lines(recipe), ""])

    def write(self, folder: Path) -> Path:
        """Returns the file that it has written into the folder of the results, in one step.

        Args:
            folder: Exists already. It is ``out`` of what is written.
        """
        path = folder / CONFIGURATION_FILE
        replace_file(path, replace(self, out=".").text().encode())
        return path


def targets_of(targets: str | Iterable[int | str] | None) -> list[int] | str | None:
    """Returns targets as numbers, with ranges written out; "all" and None as they are.

    Args:
        targets: "all", numbers, and ranges such as "10-19", the last included.

    Raises:
        ValueError: If something else is among them.

    Example:
        >>> targets_of(["3", "10-12", 11])
        [3, 10, 11, 12]
    """
    if targets is None or targets == "all":
        return targets
    found: list[int] = []
    for part in [targets] if isinstance(targets, str) else targets:
        first, dash, last = str(part).partition("-")
        whole = first.isdecimal() and (last.isdecimal() if dash else True)
        if isinstance(part, bool) or not whole or (dash and int(last) < int(first)):
            raise ValueError(
                f"expected targets as whole numbers from 0 and ranges such as 10-19, or all, got {part!r}; the target "
                "is the index of the model's output"
            )
        found += range(int(first), int(last if dash else first) + 1)
    if not found:
        raise ValueError('expected targets, got an empty list; name one, such as 46, or write "all"')
    return list(dict.fromkeys(found))


_MODEL = ("model", "torchvision", "weights")


def _names(form: type[Any]) -> list[str]:
    return [f.name for f in fields(form)]


def _check_names(given: Mapping[str, Any], known: list[str], source: str, what: str) -> None:
    """Raises ValueError for the first name that is not known, with those near it."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"near names: {', '.join(near)}" if near else f"the {what} are {', '.join(known)}"
            raise ValueError(f"expected names of {what} in {source}, got {name!r}; {hint}")


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"expected {name} as {expected}, got {value!r}; correct it")


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
        raise _wrong(name, value, f"a whole number from {least}")
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


def _form(name: str, value: Any) -> str:
    if value not in ("groups", "srae"):
        raise _wrong(name, value, '"groups" or "srae"')
    return str(value)


_SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("model", "torchvision", "weights", "layer", "data", "device", "out"), _text),
    **dict.fromkeys(("store", "checkpoint", "tensorboard"), _text),
    **dict.fromkeys(("mean", "std"), as_channels),
    **dict.fromkeys(("batch_size", "n_features"), _count),
    **dict.fromkeys(("workers", "seed"), _whole),
    **dict.fromkeys(("skip_damaged", "joint"), _flag),
    "form": _form,
    "size": as_size,
    "targets": _targets,
}


def _parsed(path: Path) -> dict[str, Any]:
    """Returns what a TOML file holds."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"expected a configuration in {str(path)!r}, could not read it ({error.strerror}); pass a TOML file"
        ) from error
    except ValueError as error:  # also of bytes that are no UTF-8
        raise ValueError(f"expected TOML in {str(path)!r}, got something else ({error}); correct that line") from error


def _located(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns settings with all paths absolute."""
    found = dict(settings)
    for name in ("weights", "data", "out", "store", "checkpoint", "tensorboard"):
        if found.get(name) is not None:
            found[name] = os.path.normpath(folder / Path(found[name]).expanduser())
    source = found.get("model")
    if source is not None:
        file, colon, function = source.rpartition(":") if not source.endswith(".py") else (source, "", "")
        if file.endswith(".py"):
            found["model"] = os.path.normpath(folder / Path(file).expanduser()) + colon + function
    return found


def _lines(settings: Mapping[str, Any]) -> list[str]:
    """Returns the lines of TOML for settings; those that are None are left out, as TOML has no such value."""
    return [f"{name} = {_value(value)}" for name, value in settings.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    # JSON writes texts, numbers, true and false as TOML does, but for one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
