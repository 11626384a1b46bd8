"""Targets: the explained output of a model, in every form that Captum accepts.

A target is None (for models with one output), an int, or a tuple of ints that indexes the dimensions after the batch.
Inside the package it may also be the difference of two such outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Difference",
    "Target",
    "are_positive",
    "grouped",
    "one_target",
    "per_example",
    "positives_of",
    "predicted_classes",
    "select",
    "select_each",
    "single_target",
    "targets_by_explainer",
]


@dataclass(frozen=True)
class Difference:
    """The difference of two outputs of a model: why one output rather than another.

    Raises:
        ValueError: If both outputs are the same, or one is missing.

    Example:
        >>> import torch
        >>> select(torch.tensor([[1.0, 5.0, 2.0]]), Difference(1, against=2))
        tensor([3.])
        >>> str(Difference(1, against=2))
        '1 rather than 2'
    """

    target: int | tuple[int, ...]
    """The explained output."""
    against: int | tuple[int, ...]
    """The output that is subtracted."""

    def __post_init__(self) -> None:
        if self.target is None or self.against is None:
            raise ValueError(f"the difference {self} lacks an output; pass both target= and against=")
        if self.target == self.against:
            raise ValueError(
                f"target and against are both {self.target}, and their difference is always 0; pass two outputs"
            )

    def __str__(self) -> str:
        return f"{self.target} rather than {self.against}"


Target = int | tuple[int, ...] | Difference | None


def single_target(target: Any) -> Target:
    """Convert one target to a plain int, a tuple of ints, or None. A tuple of one int is that int, as in Captum."""
    if target is None:
        return None
    if isinstance(target, (list, tuple)):
        many = tuple(map(_index, target))
        return many[0] if len(many) == 1 else many
    return _index(target)


def _index(target: Any) -> int:
    """Convert the index of an output to an int."""
    if isinstance(target, Tensor) and (target.numel() != 1 or target.is_floating_point()):
        raise ValueError(f"a {target.dtype} tensor {tuple(target.shape)} is not one target; pass an int")
    try:
        return operator.index(target)
    except TypeError as error:
        raise ValueError(
            f"the target {target!r} is not an int, a tuple of ints or None; pass the index of the output"
        ) from error


def one_target(target: Any, against: Any) -> Target:
    """Convert one target for all examples, or its difference from another output.

    Args:
        target: The output, as Captum takes it.
        against: The output to subtract; None subtracts nothing.
    """
    one = single_target(target)
    return one if against is None else Difference(one, single_target(against))  # type: ignore[arg-type]


def targets_by_explainer(target: Any, joint: bool) -> list[tuple[Target, ...]]:
    """List the targets of each explainer that a fit makes: one target, or all targets of a joint fit."""
    if isinstance(target, range):
        target = list(target)
    target = _as_tensor(target)
    if joint:
        members = target.tolist() if isinstance(target, Tensor) else target
        if not isinstance(members, (list, tuple)) or len(members) < 2:
            raise ValueError(f"target is {target!r}, and a joint explainer needs several; pass a tuple of ints")
        together = tuple(single_target(t) for t in members)
        if len({*together}) < len(together):
            raise ValueError(f"target is {target!r}, and a joint explainer needs different ones; pass each target once")
        return [together]
    if isinstance(target, Tensor) and target.dim() > 0:
        target = target.tolist()
    several = target if isinstance(target, list) else [target]
    if not several:
        raise ValueError("the list of targets to fit is empty; pass an int or a list of ints")
    return [(t,) for t in dict.fromkeys(map(single_target, several))]


def per_example(target: Any, n: int, against: Any = None) -> list[Target]:
    """Return one target for each of n examples, from any form that Captum accepts.

    Args:
        target: One target, or a list or tensor of one for each example.
        n: Number of examples.
        against: Outputs to subtract, in the same forms; None subtracts nothing.

    Example:
        >>> [str(t) for t in per_example([4, 7], 2, against=1)]
        ['4 rather than 1', '7 rather than 1']
    """
    if against is not None:
        pairs = zip(per_example(target, n), per_example(against, n), strict=True)
        return [t if other is None else Difference(t, other) for t, other in pairs]  # type: ignore[arg-type]
    target = _as_tensor(target)
    if (isinstance(target, Tensor) and target.numel() > 1) or isinstance(target, list):
        each = [single_target(t) for t in target]
        if len(each) != n:
            raise ValueError(
                f"there are {len(each)} targets for {n} examples; pass one for each example, or a single int for all"
            )
        return each
    return [single_target(target)] * n


def _as_tensor(target: Any) -> Any:
    """Turn an array of targets into a tensor, and return everything else."""
    return torch.as_tensor(target, device="cpu") if isinstance(target, np.ndarray) else target


def predicted_classes(y_hat: Tensor) -> Tensor | None:
    """Return the class with the highest output of each example, (M,); None unless outputs are (M, C) with C > 1.

    Args:
        y_hat: Outputs of the model.

    Example:
        >>> import torch
        >>> predicted_classes(torch.tensor([[1.0, 3.0], [2.0, 0.0]])), predicted_classes(torch.zeros(2, 1))
        (tensor([1, 0]), None)
    """
    return y_hat.argmax(1) if y_hat.dim() == 2 and y_hat.shape[1] > 1 else None


def positives_of(classes: Tensor | None, targets: Sequence[Target]) -> Tensor | None:
    """Mark the examples to which the model gives one of the targets, (M,); None if outputs or targets are not classes.

    Args:
        classes: The class of each example, from :func:`predicted_classes`.
        targets: The explained outputs.

    Example:
        >>> positives_of(torch.tensor([1, 0, 2]), [1, 2]), positives_of(torch.tensor([1, 0]), [None])
        (tensor([ True, False,  True]), None)
    """
    if classes is None or not all(isinstance(target, int) for target in targets):
        return None
    return torch.isin(classes, torch.tensor(targets, device=classes.device))


def are_positive(y_hat: Tensor, targets: Sequence[Target]) -> tuple[bool, ...] | None:
    """Whether the model gives each example its own target; None unless all outputs and targets are classes.

    Args:
        y_hat: Outputs of the model, (N, ...).
        targets: The explained output of each example.

    Example:
        >>> import torch
        >>> are_positive(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), [1, 1]), are_positive(torch.zeros(2, 1), [None, None])
        ((True, False), None)
    """
    classes = predicted_classes(y_hat)
    if classes is None or len(classes) != len(targets) or not all(isinstance(t, int) for t in targets):
        return None
    return tuple(c == t for c, t in zip(classes.tolist(), targets, strict=True))


def select(y_hat: Tensor, target: Target) -> Tensor:
    """Select one output of every example, (M,), as Captum selects targets."""
    if isinstance(target, Difference):
        return select(y_hat, target.target) - select(y_hat, target.against)
    if y_hat.dim() == 1 or (target is None and y_hat[0].numel() == 1):
        if target is not None:
            raise ValueError(
                f"target is {target}, and a model with outputs (N,) or (N, 1) takes no target; leave target out"
            )
        return y_hat.reshape(len(y_hat))
    shape = tuple(y_hat.shape[1:])
    index: tuple[int, ...] = () if target is None else (target,) if isinstance(target, int) else target
    if len(index) != len(shape):
        raise ValueError(
            f"target {target} does not pick one of the model's outputs {shape} per example; pass "
            f"{'an int' if len(shape) == 1 else f'a tuple of {len(shape)} ints'}"
        )
    if any(not 0 <= i < size for i, size in zip(index, shape, strict=True)):
        raise ValueError(f"target {target} is outside the model's outputs {shape}; targets count from 0")
    chosen = y_hat
    for i in index:
        chosen = chosen[:, i]
    return chosen


def select_each(y_hat: Tensor, targets: list[Target]) -> Tensor:
    """Select the output of each example's own target, (N,)."""
    chosen = y_hat.new_empty(len(targets))
    for t, rows in grouped(targets):
        chosen[rows] = select(y_hat[rows], t)
    return chosen


def grouped(items: Iterable[Any]) -> list[tuple[Any, list[int]]]:
    """Group equal items: list each distinct item with its positions, in order of first appearance."""
    found: list[tuple[Any, list[int]]] = []
    for i, item in enumerate(items):
        for group, rows in found:
            if group == item:
                rows.append(i)
                break
        else:
            found.append((item, [i]))
    return found
