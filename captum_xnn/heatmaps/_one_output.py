"""Layers that return several tensors: the one of them by which the explained layer depends on such a layer.

Recurrent layers return their outputs and states, attention its outputs and weights, backbones a dict. Captum's layer
methods take one tensor, or a tuple of which every tensor counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._nested import at, put_in, tensors_in
from captum_xnn.layers._state import untouched

__all__ = ["OneOutput", "one_output"]

# More than states usually have layers and directions in their first dimension.
_ROWS = 11


class OneOutput(nn.Module):
    """One tensor of a layer's output as a module of its own, for methods that explain modules with one tensor.

    Args:
        path: Where the tensor is, as :func:`captum_xnn.layers._nested.tensors_in` yields it.

    Example:
        >>> import torch
        >>> one, layer = OneOutput((0,)), nn.LSTM(2, 3)
        >>> with one.after(layer):
        ...     _ = one.register_forward_hook(lambda _module, _inputs, output: output * 0)
        ...     output, states = layer(torch.ones(1, 2))
        >>> bool(output.any()), bool(states[0].any())
        (False, True)
    """

    def __init__(self, path: tuple[Any, ...]) -> None:
        super().__init__()
        self.path = path

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it is.

        Args:
            tensor: What the layer returned in this place.
        """
        return tensor

    def pick(self, raw: Any) -> Tensor:
        """Return the tensor of a layer's output.

        Args:
            raw: The output.
        """
        found: Tensor = at(raw, self.path)
        return found

    @contextmanager
    def after(self, layer: nn.Module) -> Iterator[None]:
        """Return a context in which the tensor goes through this module.

        Args:
            layer: The layer.
        """
        handle = layer.register_forward_hook(lambda _module, _inputs, raw: put_in(raw, self.path, self(self.pick(raw))))
        try:
            yield
        finally:
            handle.remove()


def one_output(
    network: ExplanationNetwork, name: str, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None
) -> OneOutput | None:
    """Return the tensor of a layer's output that the explained layer depends on; None where Captum takes the output.

    Args:
        network: From the model's inputs to its x-features.
        name: The layer, by its dotted name.
        inputs: Input tensors (N, ...).
        additional: Further arguments of the network.

    Raises:
        ValueError: If several tensors of a nested output count, or none, or one without a row for each example.
    """
    found: dict[tuple[Any, ...], Tensor] = {}
    raw: Any = None

    def open_up(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal raw
        raw = output
        if isinstance(output, Tensor):
            return None
        found.clear()
        for path, tensor in tensors_in(output):
            if tensor.is_floating_point():
                found[path] = tensor.detach().clone().requires_grad_()
                output = put_in(output, path, found[path].clone())
        return output

    x, more = rows_of(inputs, additional, torch.zeros(_ROWS, dtype=torch.long))
    with untouched(network.model), torch.inference_mode(False), torch.enable_grad():
        handle = find_layer(network.model, name)[1].register_forward_hook(open_up)
        try:
            Z = network.activations(*network.hold((*x, *(more or ()))))
        finally:
            handle.remove()
        if raw is None or isinstance(raw, Tensor):
            return None
        gradients = (
            torch.autograd.grad(Z.sum(), list(found.values()), allow_unused=True) if found and Z.requires_grad else ()
        )
    used = [path for path, g in zip(found, gradients, strict=False) if g is not None]
    if isinstance(raw, tuple) and 1 < len(raw) == len(used) and all(len(path) == 1 for path in used):
        return None
    kind, shapes = type(raw).__name__, ", ".join(f"{_shown(p)} {tuple(found[p].shape)}" for p in used)
    if len(used) != 1:
        raise ValueError(
            f"layer {name!r} returns a {kind} of which {shapes or 'no tensor'} reaches the explained layer, and a map "
            "is of one tensor; name a layer that returns the one to draw, or draw at the inputs"
        )
    if found[used[0]].dim() == 0 or len(found[used[0]]) != _ROWS:
        raise ValueError(
            f"layer {name!r} returns a {kind} of which {shapes} reaches the explained layer for {_ROWS} examples, and "
            "a map has a row for each; name another layer, or draw at the inputs, as with heatmap=IntegratedGradients"
        )
    return OneOutput(used[0])


def _shown(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path)
