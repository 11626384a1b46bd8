"""Refuse inputs of integers or booleans, as they have no gradients, and say how to pass them instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

__all__ = ["refuse_integers", "replacing"]


def refuse_integers(inputs: Sequence[Tensor], method: str, otherwise: str) -> None:
    """Raise where an input has no gradients, and say how to pass it.

    Args:
        inputs: Inputs to which the method attributes.
        method: Name of the method.
        otherwise: How to explain token ids instead, for the error.

    Raises:
        TypeError: If an input holds integers or booleans.

    Example:
        >>> import torch
        >>> refuse_integers((torch.ones(2, 3), torch.tensor([3, 1])), "Saliency", "explain the embedding")
        Traceback (most recent call last):
        ...
        TypeError: Saliency needs floating-point inputs, and input 1 is torch.int64; if it says how to read the
        other inputs, such as lengths, a mask or indices, pass it as additional_forward_args: attribute(x, target,
        lengths). If it holds token ids, explain the embedding
    """
    for i, x in enumerate(inputs):
        if x.is_floating_point() or x.is_complex():
            continue
        fix = f"convert them with .float(), or, where they are token ids, {otherwise}"
        if any(other.is_floating_point() for other in inputs):
            fix = f"{_AS_ARGUMENT}. If it holds token ids, {otherwise}"
        raise TypeError(f"{method} needs floating-point inputs, and input {i} is {x.dtype}; {fix}")


_AS_ARGUMENT = (
    "if it says how to read the other inputs, such as lengths, a mask or indices, pass it as additional_forward_args: "
    "attribute(x, target, lengths)"
)


@contextmanager
def replacing(inputs: Sequence[Tensor], method: str) -> Iterator[None]:
    """Wrap a method that runs a model on replaced inputs; where the model fails on integers, say how to pass them.

    Args:
        inputs: Inputs whose numbers the method replaces.
        method: Name of the method.

    Raises:
        ValueError: If the model fails, and integers beside floating-point inputs may be the cause.
    """
    integers = [i for i, x in enumerate(inputs) if not x.is_floating_point()]
    try:
        yield
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if not integers or len(integers) == len(inputs):
            raise
        raise ValueError(
            f"{method} replaces numbers of every input, and the model fails on them ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Input {integers[0]} is {inputs[integers[0]].dtype}: {_AS_ARGUMENT}"
        ) from error
