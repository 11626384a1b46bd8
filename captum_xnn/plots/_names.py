"""Names of x-features, given by users who looked at their maps on many examples.

Names come as a list, as a mapping from the x-feature's index, or as the JSON file that a report exports::

    {"captum_xnn": "names", "version": 1, "layer": "relu6",
     "names": {"46": {"0": "golden feather", "1": "red forehead"}}}

Its keys are the target, written by ``str``, and the x-feature's index.

Conventions:
    K x-features. Arguments and files count them from 0, pictures and sentences from 1. The x-feature with index 0 is
    called "x-feature 1" if it has no name.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from captum_xnn._files import Format, replace_file
from captum_xnn.errors import NamesFileError
from captum_xnn.layers._targets import Target

__all__ = [
    "VERSION",
    "Names",
    "NamesFile",
    "by_index",
    "check_class_names",
    "names_by_target",
    "read_names",
    "resolve_names",
    "write_names",
]

Numbered: TypeAlias = Mapping[int, str] | Mapping[str, str] | Mapping[int | str, str]
Names: TypeAlias = Sequence[str] | Numbered | str | os.PathLike[str]
"""Names in any form: a list, a mapping from the x-feature's index, or the path of a JSON file."""

VERSION = 1
"""Version of the JSON file."""

_REMEDY = "export names from a report, write them with captum_xnn.plots.write_names, or pass a list of names"
_FORMAT = Format("names", {"captum_xnn": "names"}, ("version", VERSION), ("layer", "names"), NamesFileError, _REMEDY)


class NamesFile(NamedTuple):
    """Contents of a JSON file of names."""

    layer: str
    """Dotted name of the layer whose x-features have these names."""
    names: dict[str, dict[int, str]]
    """For each target, written by ``str``, names by the x-feature's index."""


def resolve_names(
    names: Names | None, n_features: int, *, target: Target = None, layer: str | None = None
) -> list[str]:
    """List a name for each x-feature, in the numbering of the explainer.

    x-features without a name, or with an empty name, are called "x-feature 1", "x-feature 2" and so on. Line breaks and
    runs of spaces in names become single spaces.

    Args:
        names: A list, possibly shorter than K; a mapping from the x-feature's index; or the path of a JSON file with
            names of the target.
        n_features: Number of x-features K.
        target: The explained output. With None a file must hold names of one target only.
        layer: The explained layer. A file must be of the same layer; not compared if None.

    Raises:
        ValueError: If a name belongs to an x-feature that does not exist.
        TypeError: If a name is not a string.
        NamesFileError: If the file is missing, holds something else, or was made for another layer or target.

    Example:
        >>> resolve_names(["golden feather"], 2)
        ['golden feather', 'x-feature 2']
        >>> resolve_names({1: "red forehead"}, 2)
        ['x-feature 1', 'red forehead']
    """
    given = {} if names is None else by_index(names, target, layer)
    beyond = [k for k in given if not 0 <= k < n_features]
    if beyond:
        raise ValueError(
            f"name {given[beyond[0]]!r} is for number {beyond[0]}, and the x-features are 0 to {n_features - 1}; pass "
            "at most one name for each x-feature, counted from 0 in the numbering of the explainer"
        )
    return [given.get(k) or f"x-feature {k + 1}" for k in range(n_features)]


def check_class_names(names: Mapping[Any, str] | Sequence[str], outputs: Sequence[int]) -> None:
    """Raise unless the names of classes fit the outputs of a model.

    Args:
        names: A name for each output in order, or a mapping from some outputs to their names.
        outputs: Shape of the model's output for one example: () or (C,), (C, ...) or (..., C).

    Raises:
        TypeError: If the names are a single text.
        ValueError: If there are more or fewer names than outputs, or a key of the mapping is no output.

    Example:
        >>> check_class_names(["crow", "finch"], (3,))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: 2 class names (crow, finch) were given for a model with 3 outputs; give one name for each output...
    """
    if isinstance(names, str):
        raise TypeError(f"class names are {names!r}, a single text; pass a list, such as [{names!r}]")
    counts = dict.fromkeys([outputs[0], outputs[-1]] if outputs else [1])
    if isinstance(names, Mapping):
        beyond = [k for k in names if isinstance(k, int) and not 0 <= k < max(counts)]
        if beyond:
            raise ValueError(
                f"the class name {names[beyond[0]]!r} is for output {beyond[0]}, and the model's outputs are 0 to "
                f"{max(counts) - 1}; name outputs of this model only"
            )
    elif len(names) not in counts:
        some = ", ".join(map(str, names[:3])) + ", ..." * (len(names) > 3)
        many = " or ".join(map(str, counts))
        raise ValueError(
            f"{len(names)} class name{'s' * (len(names) != 1)} ({some}) were given for a model with {many} "
            f"output{'s' * (many != '1')}; give one name for each output, in the order of the outputs, or no names"
        )


def names_by_target(
    names: str | os.PathLike[str] | Mapping[Any, Names] | None, layer: str, targets: Sequence[Target]
) -> dict[str, dict[int, str]]:
    """Read names by target and x-feature, from a mapping or from a file that a report on this layer exported.

    Args:
        names: A mapping from targets to names, or the path of a JSON file.
        layer: Dotted name of the explained layer.
        targets: The explained outputs.

    Raises:
        NamesFileError: If the file is of another layer, missing or damaged.
        TypeError: If the names are neither.

    Example:
        >>> names_by_target({46: ["golden feather"]}, "relu6", [46])
        {'46': {0: 'golden feather'}}
    """
    if names is None:
        return {}
    if isinstance(names, Mapping):
        _refuse_bare(names, targets[0] if targets else 0)
        by_target = {str(target): by_index(given, target, layer) for target, given in names.items()}
    elif isinstance(names, (str, os.PathLike)):
        file = read_names(names)
        if file.layer != layer:
            raise NamesFileError(
                f"the names are of x-features of layer {file.layer!r}, but the explained layer is {layer!r}; pass the "
                "file that a report on this explainer exported"
            )
        by_target = file.names
    else:
        raise TypeError(
            f"names are a {type(names).__name__}, and a report takes names of x-features by target; "
            f"write {{{targets[0]}: ['golden feather']}}, or pass the file that a report exported"
        )
    # For a model with one output, target None and target 0 are the same.
    for key, same in (("None", "0"), ("0", "None")):
        if key in map(str, targets) and key not in by_target and same in by_target:
            by_target[key] = by_target.pop(same)
    return by_target


def read_names(path: str | os.PathLike[str]) -> NamesFile:
    """Read the names from a JSON file that a report exported or :func:`write_names` wrote.

    Args:
        path: The file.

    Raises:
        NamesFileError: If the file is missing, cut short, from another program or of another version.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_names(f"{folder}/names.json", {46: ["golden feather"]}, layer="relu6")
        ...     read_names(path)
        NamesFile(layer='relu6', names={'46': {0: 'golden feather'}})
    """
    if not os.path.exists(path):  # never raises: names given as one long string are no path; a pipe is a file, too
        raise NamesFileError(f"there is no JSON file of names at {os.fspath(path)!r}; {_REMEDY}")
    return NamesFile(*_contents(_FORMAT.read(Path(path)), repr(os.fspath(path))))


def write_names(path: str | os.PathLike[str], names: Mapping[Any, Names], *, layer: str) -> Path:
    """Write a JSON file of names, overwriting an older one, and return its path.

    Args:
        path: The file to write; missing folders are created.
        names: Names of the x-features of each target, in any form; empty names are left out.
        layer: Dotted name of the layer whose x-features have these names.

    Raises:
        ValueError: If the index of an x-feature is not a whole number.
        TypeError: If a name is not a string.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_names(f"{folder}/names.json", {46: {1: "red forehead"}}, layer="relu6")
        ...     resolve_names(path, 2, target=46, layer="relu6")
        ['x-feature 1', 'red forehead']
    """
    _refuse_bare(names, next(iter(names), 0))
    kept = {
        str(target): {str(k): name for k, name in sorted(by_index(some, target, layer).items()) if name}
        for target, some in names.items()
    }
    described = {"captum_xnn": "names", "version": VERSION, "layer": layer, "names": kept}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(described, ensure_ascii=False, indent=1).encode())
    return file


def _refuse_bare(names: Mapping[Any, Names], target: Target) -> None:
    """Raise where names are given by x-feature only, not by target: a name is then where a list or mapping belongs."""
    for name in names.values():
        if isinstance(name, str) and not name.endswith(".json") and not Path(name).is_file():
            raise TypeError(
                f"names are given by target here, and {name!r} is no list, mapping or file of names; write "
                f"{{{target}: {{0: {name!r}}}}}, where 0 is x-feature 1"
            )


def by_index(names: Names, target: Target = None, layer: str | None = None) -> dict[int, str]:
    """Collect the given names by the x-feature's index.

    Args:
        names: Names in any form.
        target: The explained output, for names in a file.
        layer: Dotted name of the layer. A file of names must be of the same layer; not compared if None.

    Example:
        >>> by_index(["beak", "  red  crown"])
        {0: 'beak', 1: 'red crown'}
    """
    if isinstance(names, (str, os.PathLike)):
        return _of_target(read_names(names), target, layer, repr(os.fspath(names)))
    if isinstance(names, Mapping):
        return {_number(k): _tidy(name) for k, name in names.items()}
    return {k: _tidy(name) for k, name in enumerate(names)}


def _of_target(file: NamesFile, target: Target, layer: str | None, where: str) -> dict[int, str]:
    """Select the names of a target in a file; raise if the file is for another layer or target."""
    if layer is not None and layer != file.layer:
        raise NamesFileError(
            f"{where} has names of layer {file.layer!r}, and the x-features are of layer {layer!r}; pass the file of "
            "this layer"
        )
    # For a model with one output, targets None and 0 are the same.
    keys = ("None", "0") if target in (None, 0) else (str(target),)
    for key in keys:
        if key in file.names:
            return file.names[key]
    if target is None and len(file.names) == 1:
        return next(iter(file.names.values()))
    raise NamesFileError(
        f"{where} has names of {', '.join(file.names) or 'no target'}, and the x-features are of target {target}; name "
        "them in a report of this target, or pass a list"
    )


def _contents(data: dict[str, Any], where: str) -> tuple[str, dict[str, dict[int, str]]]:
    """Check a file's JSON, and read its layer and names."""
    layer, targets = data.get("layer"), data.get("names")
    if not isinstance(layer, str) or not isinstance(targets, dict):
        raise NamesFileError(
            f"{where} has the layer {layer!r} and names {targets!r:.40}, and not names by target; {_REMEDY}"
        )
    found: dict[str, dict[int, str]] = {}
    for target, some in targets.items():
        if not isinstance(some, dict) or not all(isinstance(name, str) for name in some.values()):
            raise NamesFileError(
                f"target {target} in {where} has {some!r:.80}, and not names by the index of the x-feature; {_REMEDY}"
            )
        try:
            found[target] = {_number(k): _tidy(name) for k, name in some.items()}
        except ValueError as error:
            raise NamesFileError(f"{error}; check target {target} in {where}") from error
    return layer, found


def _number(key: Any) -> int:
    """Convert an x-feature's index to an integer; JSON holds it as a string."""
    if isinstance(key, str) and key.isascii() and key.isdigit():
        return int(key)
    try:
        return operator.index(key)
    except TypeError as error:
        raise ValueError(
            f"{key!r} is not the index of an x-feature, counted from 0; write for example {{0: 'golden feather'}}"
        ) from error


def _tidy(name: Any) -> str:
    """Put a name on one line."""
    if not isinstance(name, str):
        raise TypeError(f"the name {name!r} is not a string; write '' for an x-feature without a name")
    return " ".join(name.split())
