"""Check before a model runs whether tensors can be its arguments, with errors that speak of the data.

Conventions:
    N examples in every input.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["refuse_too_many", "refuse_uneven"]


def refuse_too_many(model: nn.Module, inputs: Any, join: str) -> None:
    """Raise where a tuple has more tensors than a model takes; it may be a tuple of batches.

    Args:
        model: A plain module.
        inputs: Inputs of the model as the user gives them; a tuple holds several inputs.
        join: How to pass batches of one input instead, for the error.

    Raises:
        TypeError: If ``forward`` takes fewer arguments.

    Example:
        >>> import torch
        >>> refuse_too_many(nn.Linear(2, 1), torch.zeros(6, 2).split(2), "pass them as a list")
        Traceback (most recent call last):
        ...
        TypeError: a tuple of 3 tensors is 3 inputs of the model, and forward of Linear takes 1; if they are batches of
        one input, pass them as a list. If all but the first are labels, pass only the first
    """
    if not isinstance(inputs, tuple) or len(inputs) < 2:
        return
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes = sum(p.kind in kinds for p in signature.parameters.values())
    some = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values())
    if some or len(inputs) <= takes:
        return
    n = len(inputs)
    raise TypeError(
        f"a tuple of {n} tensors is {n} inputs of the model, and forward of {type(model).__name__} takes "
        f"{takes}; if they are batches of one input, {join}. If all but the first are labels, pass only the first"
    )


def refuse_uneven(inputs: Sequence[Tensor]) -> None:
    """Raise where inputs of one model have different numbers of examples.

    Args:
        inputs: Tensors (N, ...).

    Raises:
        ValueError: If an input has no rows, or not as many rows as the first.

    Example:
        >>> import torch
        >>> refuse_uneven((torch.zeros(3, 2), torch.zeros(3)))
    """
    if any(x.dim() == 0 for x in inputs) or len({len(x) for x in inputs}) > 1:
        raise ValueError(
            f"inputs differ in their number of examples, with shapes {[tuple(x.shape) for x in inputs]}; pass as many "
            "examples of every input"
        )
