"""Try a model on two examples before all data run through it, to find models that cannot be explained correctly.

An explanation assumes that an example's output depends on no other row of the batch. It also assumes that the model
computes the same with and without gradients. A model that breaks an assumption gives numbers that look right but are
wrong. The first batch reveals it, for the cost of two more passes on two examples.

Conventions:
    N examples in a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._stacklevel import levels_up

__all__ = ["probe", "refuse_whole_arguments"]

Read = Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Tensor, Tensor]]


def probe(
    read: Read,
    inputs: tuple[Any, ...],
    additional: tuple[Any, ...],
    Z: Tensor,
    y_hat: Tensor,
    *,
    quantised: Sequence[str] = (),
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Try a model on one or two examples; return their inputs and additional arguments, or raise where it is unfit.

    Args:
        read: Computes the layer's output and the model's output from inputs and additional arguments.
        inputs: A batch, whose first value is a tensor (N, ...).
        additional: Additional arguments.
        Z: The layer's output on the batch, (N, ...).
        y_hat: The model's output on the batch, (N, ...).
        quantised: Names of the model's quantised modules.

    Raises:
        ValueError: If an example's row depends on other rows, or on whether gradients are taken, or if the model's own
            code runs in inference mode.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [4.0]])
        >>> probe(lambda inputs, _: (inputs[0], inputs[0]), (x,), (), x, x)
        ((tensor([[1.],
                [4.]]),), ())
        >>> def centred(inputs, _):
        ...     return inputs[0], inputs[0] - inputs[0].mean(0)
        >>> probe(centred, (x,), (), *centred((x,), ()))
        Traceback (most recent call last):
        ...
        ValueError: an example's output depends on other examples of the batch: 2 of 3 examples have other values than
        all 3 together; the usual causes are batch norm without running statistics, a graph over the batch, and
        normalisation over the batch. Explain a module that takes one such batch as one example (N = 1), or give the
        layer running statistics
    """
    _refuse_inference_mode(Z, y_hat)
    n = len(inputs[0])
    if n < 2:
        return inputs, additional
    rows = torch.tensor([0, n - 1] if n > 2 else [0], device="cpu")
    (some, more) = rows_of(inputs, additional, rows)
    try:
        alone = read(some, more or ())
    except Exception as error:
        if n == 2:
            return inputs, additional  # some models do not take a single example
        if _is_whole(read, inputs, additional, Z, y_hat):
            return some, additional
        raise ValueError(
            f"the model fails on two of {n} examples with {type(error).__name__} "
            f"({' '.join(str(error).split())[:200]}); an output must depend on its own example only, and additional "
            "arguments must have a row for each example, or no rows"
        ) from error
    _refuse_without_rows(alone[0], len(rows), Z)
    if not _agree(alone, rows, Z, y_hat):
        if _is_whole(read, inputs, additional, Z, y_hat):
            return some, additional  # arguments are not cut while activations are collected
        if not _is_random(read, inputs, additional):
            _refuse_dependence(len(rows), n, quantised)
        _warn_of_random_numbers()
        return some, more or ()
    _refuse_other_values_with_gradients(read, some, more or (), alone)
    return some, more or ()


def _refuse_inference_mode(Z: Tensor, y_hat: Tensor) -> None:
    """Raise if the model's own code runs in inference mode."""
    if Z.is_inference() or y_hat.is_inference():
        raise ValueError(
            "the model's forward pass runs under torch.inference_mode, and its values take no part in gradients; take "
            "the decorator or context off the model, and call the model within it instead"
        )


def _refuse_without_rows(some: Tensor, examples: int, Z: Tensor) -> None:
    """Raise if the layer's output on some examples has no row for each of them."""
    if len(some) != examples:
        raise ValueError(
            f"the layer gives shape {tuple(some.shape)} for {examples} examples and {tuple(Z.shape)} for {len(Z)}, so "
            "it has no row for each example; put examples first in output_transform=, such as `lambda output: "
            "output.transpose(0, 1)`"
        )


def _refuse_dependence(examples: int, n: int, quantised: Sequence[str]) -> NoReturn:
    """Raise because some of n examples have other values alone than in the batch."""
    if quantised:
        raise ValueError(
            f"layer {quantised[0]!r} is quantised dynamically, by the extremes of the whole batch: {examples} of "
            f"{n} examples have other values than all {n} together, and quantised layers have no gradients; "
            "explain the float model that was quantised"
        )
    raise ValueError(
        f"an example's output depends on other examples of the batch: {examples} of {n} examples have other "
        f"values than all {n} together; the usual causes are batch norm without running statistics, a graph over "
        "the batch, and normalisation over the batch. Explain a module that takes one such batch as one example "
        "(N = 1), or give the layer running statistics"
    )


def _warn_of_random_numbers() -> None:
    """Warn of a model that gives other values in each pass."""
    warnings.warn(
        "the model draws random numbers in evaluation mode, so contributions and maps come from different "
        "draws; look for F.dropout(x) without training=self.training, the usual cause",
        stacklevel=levels_up(),
    )


def _refuse_other_values_with_gradients(
    read: Read, inputs: tuple[Any, ...], additional: tuple[Any, ...], alone: tuple[Tensor, Tensor]
) -> None:
    """Raise if a pass with gradients gives other values than the pass without."""
    with torch.enable_grad():
        traced = read(inputs, additional)
    if not all(_is_near(a.detach(), b.detach()) for a, b in zip(traced, alone, strict=True)):
        raise ValueError(
            "the model computes other values with gradients than without, and an explanation takes its numbers without "
            "gradients but its maps with gradients; remove the switch on torch.is_grad_enabled() or the fused kernel "
            "from the model"
        )


def refuse_whole_arguments(read: Read, inputs: tuple[Any, ...], additional: tuple[Any, ...]) -> None:
    """Raise where an additional argument has as many rows as the batch by chance, and would be cut with the batch.

    Args:
        read: As in :func:`probe`.
        inputs: A batch, whose first value is a tensor (N, ...).
        additional: Additional arguments.

    Raises:
        ValueError: If the model gives an example other values with one row of such an argument than with all rows.

    Example:
        >>> def remembers(inputs, additional):
        ...     return inputs[0], inputs[0] @ additional[0].mT  # similarity to each of some memories
        >>> refuse_whole_arguments(remembers, (torch.ones(3, 2),), (torch.rand(5, 2),))
    """
    n = len(inputs[0])
    ambiguous = [i for i, a in enumerate(additional) if isinstance(a, Tensor) and a.dim() and len(a) == n]
    if n < 2 or not ambiguous:
        return
    rows = torch.tensor([0, n - 1] if n > 2 else [0], device="cpu")
    some, more = rows_of(inputs, additional, rows)
    try:
        whole = read(some, additional)
    except Exception:
        return  # the model wants a row for each example
    told = ""
    try:
        cut = read(some, more or ())
        if any(a.shape != b.shape for a, b in zip(whole, cut, strict=True)) or all(map(_is_near, whole, cut)):
            return
        if _agree(cut, rows, *read(inputs, additional)) or _is_random(read, inputs, additional):
            return
    except Exception as error:
        told = f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    raise ValueError(
        f"additional argument {', '.join(map(str, ambiguous))} has as many rows as the batch, {n}, but its rows belong "
        f"to no example: the model gives other outputs with some of them than with all{told}; pass a batch of another "
        "size, or hold the argument in the model, as a buffer"
    )


def _is_whole(read: Read, inputs: tuple[Any, ...], additional: tuple[Any, ...], Z: Tensor, y_hat: Tensor) -> bool:
    """Whether rows are right with the additional arguments left whole."""
    n = len(inputs[0])
    if not any(isinstance(a, Tensor) and a.dim() and len(a) == n for a in additional):
        return False
    rows = torch.tensor([0, n - 1] if n > 2 else [0], device="cpu")
    some, _ = rows_of(inputs, None, rows)
    try:
        return _agree(read(some, additional), rows, Z, y_hat)
    except Exception:
        return False


def _is_random(read: Read, inputs: tuple[Any, ...], additional: tuple[Any, ...]) -> bool:
    """Whether two passes on the same inputs differ."""
    one, other = (read(inputs, additional) for _ in range(2))
    return not all(_is_near(a, b) for a, b in zip(one, other, strict=True))


def _agree(alone: tuple[Tensor, Tensor], rows: Tensor, Z: Tensor, y_hat: Tensor) -> bool:
    """Whether some rows, read by themselves, have the same values as in the whole batch."""
    return all(
        len(a) == len(rows) and _is_near(a, b[rows.to(b.device)], b) for a, b in zip(alone, (Z, y_hat), strict=True)
    )


def _is_near(a: Tensor, b: Tensor, among: Tensor | None = None) -> bool:
    """Whether values are the same but for rounding, which differs between batches of different size.

    Args:
        a: Some values.
        b: Other values.
        among: All rows. A hundredth of their deviation passes for rounding.
    """
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a.to(b.device), b)
    among = (b if among is None else among).double()
    half = a.dtype in (torch.float16, torch.bfloat16)
    deviation = float((among - among.mean(0)).abs().amax()) if among.numel() else 0.0
    size = float(among.abs().amax()) if among.numel() else 0.0
    allowed = (0.1 * deviation + 0.02 * size) if half else (0.01 * deviation + 1e-4 * size)
    return bool(((a.to(b.device).double() - b.double()).abs() <= allowed).all())
