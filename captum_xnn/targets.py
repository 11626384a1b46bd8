"""Targets: which output of a model is explained, in every form that Captum takes.

A target is None for models with one output, an int, or a tuple of ints that indexes the dimensions after the batch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["Target", "grouped", "per_example", "select", "select_each", "single_target", "target_groups"]

Target = int | tuple[int, ...] | None


def single_target(target: Any) -> Target:
    """Returns one target as a plain int, tuple of ints, or None."""
    if target is None:
        return None
    if isinstance(target, (list, tuple)):
        return tuple(int(t) for t in target)
    if isinstance(target, Tensor) and (target.numel() != 1 or target.is_floating_point()):
        raise ValueError(f"expected one target, got a {target.dtype} tensor {tuple(target.shape)}; pass an int")
    try:
        return operator.index(target)
    except TypeError as error:
        raise ValueError(
            f"expected a target that is None, an int or a tuple of ints, got {target!r}; pass the index of the output"
        ) from error


def target_groups(target: Any, joint: bool) -> list[tuple[Target, ...]]:
    """Returns the outputs that each explainer is to cover."""
    if isinstance(target, range):
        target = list(target)
    if joint:
        members = target.tolist() if isinstance(target, Tensor) else target
        if not isinstance(members, (list, tuple)) or len(members) < 2:
            raise ValueError(f"expected several targets for a joint explainer, got {target!r}; pass a tuple of ints")
        return [tuple(single_target(t) for t in members)]
    if isinstance(target, Tensor) and target.dim() > 0:
        target = target.tolist()
    several = target if isinstance(target, list) else [target]
    if not several:
        raise ValueError("expected targets to fit, got an empty list; pass an int or a list of ints")
    return [(t,) for t in dict.fromkeys(map(single_target, several))]


def per_example(target: Any, n: int) -> list[Target]:
    """Returns the target of every example, from any form that Captum takes."""
    if (isinstance(target, Tensor) and target.numel() > 1) or isinstance(target, list):
        each = [single_target(t) for t in target]
        if len(each) != n:
            raise ValueError(f"expected one target for each of {n} examples, got {len(each)}; pass an int for all")
        return each
    return [single_target(target)] * n


def select(y_hat: Tensor, target: Target) -> Tensor:
    """Returns one output of every example, (M,), as Captum selects targets."""
    if y_hat.dim() == 1 or (target is None and y_hat[0].numel() == 1):
        if target is not None:
            raise ValueError(
                f"expected no target for a model whose outputs are (N,) or (N, 1), got {target}; leave target out"
            )
        return y_hat.reshape(len(y_hat))
    shape = tuple(y_hat.shape[1:])
    index: tuple[int, ...] = () if target is None else (target,) if isinstance(target, int) else target
    if len(index) != len(shape):
        raise ValueError(
            f"expected a target that picks one of the model's outputs {shape} per example, got {target}; pass "
            f"{'an int' if len(shape) == 1 else f'a tuple of {len(shape)} ints'}"
        )
    if any(not 0 <= i < size for i, size in zip(index, shape, strict=True)):
        raise ValueError(f"expected a target within the model's outputs {shape}, got {target}; they count from 0")
    chosen = y_hat
    for i in index:
        chosen = chosen[:, i]
    return chosen


def select_each(y_hat: Tensor, targets: list[Target]) -> Tensor:
    """Returns each example's own target output, (N,)."""
    chosen = y_hat.new_empty(len(targets))
    for t, rows in grouped(targets):
        chosen[rows] = select(y_hat[rows], t)
    return chosen


def grouped(items: Iterable[Any]) -> list[tuple[Any, list[int]]]:
    """Returns the different items and the positions of each, in order of first appearance."""
    found: list[tuple[Any, list[int]]] = []
    for i, item in enumerate(items):
        for known, rows in found:
            if known == item:
                rows.append(i)
                break
        else:
            found.append((item, [i]))
    return found
