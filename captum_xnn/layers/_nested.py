"""Tensors in outputs that are tuples, lists or dicts, as recurrent layers, attention and backbones return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["at", "put_in", "tensors_in"]


def tensors_in(raw: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield the tensors in an output with their paths: keys of dicts, indices of tuples and lists.

    Args:
        raw: A tensor, or nested dicts, tuples and lists of tensors.
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
        raw = raw[key]
    return raw
