r"""Gradients of the x-features of groups of contributions, all from one forward pass.

Let Z be the layer's output, :math:`g = \partial y / \partial Z` the gradient of the explained output, and :math:`a_k`
a group. The gradient of x-feature k at feature maps or inputs F is

.. math:: \frac{\partial E_k}{\partial F} = \Bigl(\frac{\partial Z}{\partial F}\Bigr)^\top (a_k \odot g).

One pass gives Z, y and g. Each x-feature then takes a backward pass from Z to F, which is short where F is close to Z.

Conventions:
    N examples, K x-features.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._state import eager, untouched
from captum_xnn.layers._tail import Tail, frozen
from captum_xnn.layers._targets import Target, select_each
from captum_xnn.models._contribution_groups import ContributionGroups

__all__ = ["gradients_of_groups"]


class _Unfit(Exception):
    """Ends a pass in which a layer runs twice, also in a backward pass, or returns no tensor."""


def gradients_of_groups(
    form: ContributionGroups,
    tail: Tail,
    target: Target,
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...],
    features: Sequence[int],
    place: nn.Module | None,
) -> list[tuple[Tensor, Tensor]] | None:
    """Compute the gradients of x-features at a layer's output, or at all inputs.

    Args:
        form: The groups.
        tail: The rest of the model behind the explained layer.
        target: The explained output.
        inputs: Tensors (N, ...).
        additional: Further arguments of the model.
        features: The K x-features, 0-based.
        place: The layer; None for the inputs.

    Returns:
        For each input, or for the layer: values F (N, ...) and gradients (N, K, ...). None where one pass does not
        suffice: with an ``output_transform``, with integer inputs, or for a layer that runs several times or returns no
        tensor.
    """
    if tail.output_transform is not None:
        return None
    if place is None and not all(x.is_floating_point() for x in inputs):
        return None
    x, more = rows_of(inputs, additional, torch.arange(len(inputs[0])))  # copies, because a model may work in place
    leaves = [] if place is not None else [value.detach().requires_grad_() for value in x]
    given = tuple(leaf.clone() for leaf in leaves) if place is None else tuple(value.detach() for value in x)
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for context in (untouched(tail.model), frozen(tail.model), torch.enable_grad(), eager()):
            stack.enter_context(context)
        if place is not None:
            stack.enter_context(_cut(place, leaves))
        stack.enter_context(_kept(tail.layer, seen))
        try:
            output = tail.model(*given, *(more or ()))
        except _Unfit:
            return None
        if len(seen) != 1 or not leaves:
            return None
        y_hat = output if tail.prediction_transform is None else tail.prediction_transform(output)
        try:
            return _gradients(form, select_each(y_hat, [target] * len(inputs[0])), seen[0], leaves, features)
        except _Unfit:
            return None  # a checkpoint ran a layer again


def _gradients(
    form: ContributionGroups, y: Tensor, Z: Tensor, leaves: list[Tensor], features: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Take a backward pass to Z, and one from Z to the leaves for each x-feature: the formula in the module's head."""
    g = torch.autograd.grad(y.sum(), Z, retain_graph=True, allow_unused=True)[0]
    g = torch.zeros_like(Z) if g is None else g
    groups, channels = form.groups, form.channels
    found: list[list[Tensor]] = [[] for _ in leaves]
    for k in features:
        shape = [-1 if d == channels else 1 for d in range(Z.dim())]
        a = groups[:, k].to(torch.promote_types(Z.dtype, groups.dtype)).reshape(shape)
        grads = torch.autograd.grad(Z, leaves, (g * a).to(Z), retain_graph=True, allow_unused=True)
        for own, grad, leaf in zip(found, grads, leaves, strict=True):
            own.append(torch.zeros_like(leaf) if grad is None else grad)
    return [(leaf.detach(), torch.stack(own, 1)) for leaf, own in zip(leaves, found, strict=True)]


@contextmanager
def _cut(place: nn.Module, leaves: list[Tensor]) -> Iterator[None]:
    """Cut the graph behind a layer, and add its output to the leaves."""
    thread = threading.get_ident()

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        if leaves or not isinstance(output, Tensor) or not output.is_floating_point():
            raise _Unfit
        leaves.append(output.detach().requires_grad_())
        return leaves[0].clone()  # a model may work in place, and a leaf forbids that

    handle = place.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _kept(layer: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Keep the output of the explained layer, and give the model a copy."""
    thread = threading.get_ident()

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        if seen or not isinstance(output, Tensor) or not output.requires_grad:
            raise _Unfit
        seen.append(output)
        return output.clone()

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
