"""Tensors in outputs that are tuples, lists, dicts or dataclasses, as recurrent layers and backbones return."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["at", "picks", "put_in", "tensors_in"]


def tensors_in(raw: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield the tensors in an output with their paths: keys of dicts, indices of tuples and lists, names of fields.

    Args:
        raw: A tensor, or nested dicts, tuples, lists and dataclasses of tensors.
        path: Path of ``raw`` itself in an outer output.

    Example:
        >>> import torch
        >>> [path for path, _ in tensors_in((torch.zeros(1), {"a": torch.zeros(1), "b": None}))]
        [(0,), (1, 'a')]
    """
    if isinstance(raw, Tensor):
        yield path, raw
    elif isinstance(raw, dict):
        for key, value in raw.items():
            yield from tensors_in(value, (*path, key))
    elif isinstance(raw, (tuple, list)):
        for i, value in enumerate(raw):
            yield from tensors_in(value, (*path, i))
    elif _has_fields(raw):
        for field in dataclasses.fields(raw):
            yield from tensors_in(getattr(raw, field.name), (*path, field.name))


def put_in(raw: Any, path: tuple[Any, ...], tensor: Tensor) -> Any:
    """Replace the tensor at one path; return the new output.

    Args:
        raw: The output.
        path: The path, as :func:`tensors_in` yields it.
        tensor: The new tensor.

    Example:
        >>> import torch
        >>> put_in((None, {"a": torch.zeros(1)}), (1, "a"), torch.ones(1))
        (None, {'a': tensor([1.])})
    """
    if not path:
        return tensor
    first, rest = path[0], path[1:]
    if isinstance(raw, dict):
        changed = dict(raw)
        changed[first] = put_in(raw[first], rest, tensor)
        return type(raw)(**changed) if type(raw) is not dict and all(isinstance(k, str) for k in raw) else changed
    if _has_fields(raw):
        made = copy.copy(raw)
        object.__setattr__(made, first, put_in(getattr(raw, first), rest, tensor))  # also of frozen ones
        return made
    items = [put_in(value, rest, tensor) if i == first else value for i, value in enumerate(raw)]
    return type(raw)(*items) if hasattr(raw, "_fields") else type(raw)(items)


def at(raw: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at one path of an output.

    Args:
        raw: The output.
        path: The path, as :func:`tensors_in` yields it.

    Example:
        >>> import torch
        >>> at((None, {"a": torch.ones(1)}), (1, "a"))
        tensor([1.])
    """
    for key in path:
        raw = getattr(raw, key) if _has_fields(raw) else raw[key]
    return raw


def picks(raw: Any) -> str:
    """Write a function that picks a tensor of an output: its logits, or else the first real one with rows.

    Args:
        raw: The output.

    Example:
        >>> import torch
        >>> picks((None, {"loss": torch.tensor(1.0), "a": torch.zeros(2, 3)}))
        "lambda output: output[1]['a']"
    """
    paths = [path for path, tensor in tensors_in(raw) if tensor.is_floating_point() and tensor.dim() > 1]
    path = next((p for p in paths if p[-1:] == ("logits",)), paths[0] if paths else (0,))
    made, value = "output", raw
    for key in path:
        if isinstance(value, PackedSequence):
            return f"lambda output: torch.nn.utils.rnn.pad_packed_sequence({made}, batch_first=True)[0]"
        made += f".{key}" if _has_fields(value) else f"[{key!r}]"
        value = at(value, (key,)) if paths else None
    return f"lambda output: {made}"


def _has_fields(raw: Any) -> bool:
    """Whether an output is a dataclass and nothing else; outputs of Hugging Face are dicts as well."""
    return dataclasses.is_dataclass(raw) and not isinstance(raw, (type, dict))
