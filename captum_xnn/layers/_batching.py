"""Take some rows of a batch, and join results of parts of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["gathered", "rows_of"]


def rows_of(
    inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, rows: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """Copy some rows of the inputs, and of the additional arguments that have a row for each example.

    Args:
        inputs: Tensors (N, ...).
        additional: Further arguments of the model. Only tensors of N rows are cut; all others stay as they are.
        rows: Row indices (R,), which may repeat.

    Example:
        >>> rows_of((torch.tensor([[1.0], [2.0]]),), (torch.tensor([5, 6]), "mean"), torch.tensor([1, 1]))
        ((tensor([[2.],
                [2.]]),), (tensor([6, 6]), 'mean'))
    """
    n = len(inputs[0])

    def pick(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) == n
        return value[rows.to(value.device)] if has_rows else value

    return tuple(pick(x) for x in inputs), None if additional is None else tuple(pick(x) for x in additional)


def gathered(parts: Iterable[tuple[Sequence[int], Sequence[Tensor]]], n: int) -> tuple[Tensor, ...]:
    """Join parts to tensors of n rows; free each part before the next is made.

    Args:
        parts: Row indices (R,) with tensors (R, ...); together they hold each of the n rows once.
        n: Number of rows.

    Example:
        >>> gathered([([0, 2], [torch.tensor([1.0, 3.0])]), ([1], [torch.tensor([2.0])])], 3)
        (tensor([1., 2., 3.]),)
    """
    whole: tuple[Tensor, ...] = ()
    for rows, made in parts:
        if list(rows) == list(range(n)):
            return tuple(made)
        if not whole:
            whole = tuple(m.new_empty(n, *m.shape[1:]) for m in made)
        index = torch.tensor(list(rows))
        for all_rows, some in zip(whole, made, strict=True):
            all_rows[index.to(all_rows.device)] = some
        del made, some  # before the next part is made
    return whole
