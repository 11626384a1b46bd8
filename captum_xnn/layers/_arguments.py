"""The arguments of a model: check them before the model runs, copy them, and give results in their form.

Conventions:
    N examples in every input.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_xnn.layers._forward_args import format_forward_args, format_tensors

__all__ = ["as_int", "batch_size", "copied", "like", "refuse_too_many", "refuse_uncallable", "refuse_uneven"]


def as_int(name: str, value: Any, least: int | None, example: str) -> int:
    """Return a setting as an int; raise where it is no int, or too small.

    Args:
        name: Name of the setting.
        value: The user's value.
        least: The smallest value; None for any.
        example: A value to pass, in words.

    Raises:
        TypeError: If the value is no int.
        ValueError: If the value is below the smallest.

    Example:
        >>> as_int("seed", 0.5, 0, "0")
        Traceback (most recent call last):
        ...
        TypeError: seed is 0.5, a float; pass an int, such as 0
    """
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; pass an int, such as {example}")
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}; pass at least {least}, such as {example}")
    return operator.index(value)


def batch_size(given: Any) -> int | None:
    """Check ``internal_batch_size``; return an int, or None for no limit.

    Args:
        given: The user's value.

    Example:
        >>> batch_size(16), batch_size(None)
        (16, None)
    """
    return None if given is None else as_int("internal_batch_size", given, 1, "16")


def refuse_uncallable(name: str, value: Any, example: str) -> None:
    """Raise where a setting should be a function, and cannot be called.

    Args:
        name: Name of the setting.
        value: The user's value; None stands for no function.
        example: A function to pass.

    Raises:
        TypeError: If the value cannot be called.
    """
    if value is not None and not callable(value):
        raise TypeError(
            f"{name} is {value!r}, a {type(value).__name__}, and cannot be called; pass a function, such as {example}"
        )


def refuse_too_many(model: nn.Module, inputs: Any, join: str) -> None:
    """Raise where a tuple has more tensors than a model takes; it may be a tuple of batches.

    Args:
        model: A plain module.
        inputs: Inputs of the model as the user gives them; a tuple holds several inputs.
        join: How to pass batches of one input instead, for the error.

    Raises:
        TypeError: If ``forward`` takes fewer arguments.

    Example:
        >>> refuse_too_many(nn.Linear(2, 1), torch.zeros(6, 2).split(2), "pass them as a list")
        Traceback (most recent call last):
        ...
        TypeError: a tuple of 3 tensors is 3 inputs of the model, and forward of Linear takes 1; if they are batches of
        one input, pass them as a list. If all but the first are labels, pass only the first. If forward takes a list of
        tensors, explain a module whose forward(self, *tensors) makes the list
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
        f"{takes}; if they are batches of one input, {join}. If all but the first are labels, pass only the first. "
        "If forward takes a list of tensors, explain a module whose forward(self, *tensors) makes the list"
    )


def refuse_uneven(inputs: Sequence[Tensor]) -> None:
    """Raise where inputs of one model have different numbers of examples.

    Args:
        inputs: Tensors (N, ...).

    Raises:
        ValueError: If an input has no rows, or not as many rows as the first.

    Example:
        >>> refuse_uneven((torch.zeros(3, 2), torch.zeros(3)))
    """
    if any(x.dim() == 0 for x in inputs) or len({len(x) for x in inputs}) > 1:
        raise ValueError(
            f"inputs differ in their number of examples, with shapes {[tuple(x.shape) for x in inputs]}; pass as many "
            "examples of every input"
        )


def copied(
    inputs: Tensor | tuple[Tensor, ...], additional_forward_args: Any
) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """Copy the inputs and further arguments into tuples, and check that all inputs have the same number of examples.

    The model gets copies because it may work in place, and because inference tensors take no gradients.

    Args:
        inputs: A tensor or a tuple of tensors.
        additional_forward_args: None, one argument, or a tuple of them.

    Raises:
        TypeError: If an input is not a tensor.
        ValueError: If there is no example, or the inputs differ in the number of examples.
    """
    if not isinstance(inputs, (Tensor, tuple)):
        # Captum's words, and the fix.
        raise TypeError(
            f"`inputs` must be a torch.Tensor or a tuple[torch.Tensor] but found: {type(inputs)}; {_instead(inputs)}"
        )
    tensors: tuple[Tensor, ...] = format_tensors(inputs)
    if not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(
            f"inputs are a tuple of {', '.join(type(x).__name__ for x in tensors)}; pass one tensor, or a tuple of "
            "tensors in the order of forward, and everything else as additional_forward_args"
        )
    if not tensors or any(x.dim() == 0 or len(x) == 0 or len(x) != len(tensors[0]) for x in tensors):
        raise ValueError(
            f"inputs need examples in dimension 0, at least one and equally many, and their shapes are "
            f"{[tuple(x.shape) for x in tensors]}; add the batch dimension with x[None]"
        )
    given = format_forward_args(additional_forward_args)
    with torch.inference_mode(False):
        more = given and tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in given)
        return tuple(x.detach().clone() for x in tensors), more


def _instead(inputs: Any) -> str:
    """Say how to pass the tensors of a batch, of a loader or of an array."""
    if isinstance(inputs, Mapping):
        first, *others = (repr(key) for key in inputs) if inputs else ("'ids'",)
        rest = "".join(f"batch[{key}], " for key in others)
        more = (
            f", and what else forward takes, in its order, as in additional_forward_args=({rest.strip()})"
            if rest
            else ""
        )
        return f"pass the entry that gets maps, such as batch[{first}]{more}"
    if isinstance(inputs, np.ndarray):
        return "pass torch.from_numpy(inputs) in the dtype of the model"
    if hasattr(inputs, "to_numpy"):
        return "pass torch.tensor(inputs.to_numpy(), dtype=torch.float32) of a table"
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return "pass batch[0] of a batch [images, labels], or torch.stack(images) of single images"
    return "pass the images of a batch, such as next(iter(loader))[0]; fit, score and report also take a DataLoader"


def like(inputs: Any, maps: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Return the maps as the inputs are given: one tensor, or a tuple. Several maps are always a tuple.

    Args:
        inputs: A tensor or a tuple of tensors.
        maps: Maps of each input, or of each tensor of a layer.
    """
    return maps if len(maps) > 1 or (isinstance(inputs, tuple) and len(inputs) == 1) else maps[0]
