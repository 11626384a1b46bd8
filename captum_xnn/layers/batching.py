"""Take some examples of a batch, and put what was made of parts of it together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["gathered", "rows_of"]


def rows_of(
    inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, rows: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """Returns copies of some rows of the inputs, and of those additional arguments that have a row for each example.

    Args:
        inputs: Tensors (N, ...).
        additional: Further arguments of the model; others than tensors of N rows are passed on as they are.
        rows: Row numbers (R,), which may repeat.

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
    """Returns tensors of n rows from parts as they come, none of which is held any longer.

    Args:
        parts: Row numbers R, with tensors (R, ...); together each of the n rows once.
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
