"""Take some rows of a batch, and join results of parts of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["gathered", "pieces", "rows_of"]

# Bytes of images in one pass on a CPU. The feature maps of more images leave the cache: on a SqueezeNet of 227 x 227
# pixels, 4 images at once take 31 ms each, 64 at once 49 ms.
_CPU_BYTES = 5 << 19


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


def pieces(inputs: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    """Split rows of inputs into the pieces that a model runs fastest: few large images at once on a CPU.

    Args:
        inputs: Tensors (N, ...).
        rows: Row indices (R,).

    Returns:
        Row indices of each piece. Without images, or on another device, all rows are one piece.

    Example:
        >>> [len(some) for some in pieces((torch.zeros(9, 3, 224, 224),), torch.arange(9))]
        [4, 4, 1]
        >>> [len(some) for some in pieces((torch.zeros(9, 100_000),), torch.arange(9))]
        [9]
    """
    sizes = [x[0].numel() * x.element_size() for x in inputs if x.dim() in (4, 5) and len(x) and x.device.type == "cpu"]
    return torch.split(rows, max(1, _CPU_BYTES // max(1, max(sizes)))) if sizes else (rows,)


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
        index = torch.tensor(list(rows), device="cpu")
        for all_rows, some in zip(whole, made, strict=True):
            all_rows[index.to(all_rows.device)] = some
        del made, some  # before the next part is made
    return whole
