"""Pick the one tensor to draw from a layer that returns several.

Recurrent layers return outputs and states, attention returns outputs and weights, backbones return a dict. Captum's
layer methods take one tensor, or a tuple in which every tensor counts. This module finds the tensor that the explained
layer depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._nested import at, put_in, tensors_in
from captum_xnn.layers._state import untouched

__all__ = ["OneOutput", "one_output"]

# Number of examples to test with. It is larger than the first dimension of most states, layers times directions.
_ROWS = 11


class OneOutput(nn.Module):
    """One tensor of a layer's output as a module, for methods that explain modules with one tensor.

    Args:
        path: Keys that lead to the tensor, as :func:`captum_xnn.layers._nested.tensors_in` yields them.

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
        """Return the tensor unchanged.

        Args:
            tensor: The tensor that the layer returned at the path.
        """
        return tensor

    def pick(self, raw: Any) -> Tensor:
        """Return the tensor at the path.

        Args:
            raw: Output of the layer.
        """
        found: Tensor = at(raw, self.path)
        return found

    @contextmanager
    def after(self, layer: nn.Module) -> Iterator[None]:
        """Send the tensor through this module while the context is open.

        Args:
            layer: The layer that returns the tensor.
        """
        handle = layer.register_forward_hook(lambda _module, _inputs, raw: put_in(raw, self.path, self(self.pick(raw))))
        try:
            yield
        finally:
            handle.remove()


def one_output(
    model: nn.Module,
    activations: Callable[..., Tensor],
    name: str,
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
) -> OneOutput | None:
    """Find the tensor of a layer's output that the explained layer depends on.

    Args:
        model: The explained model.
        activations: Function from inputs and further arguments to the output of the explained layer.
        name: Dotted name of the layer that returns several tensors.
        inputs: Input tensors (N, ...).
        additional: Further arguments.

    Returns:
        The tensor. None where Captum can take the whole output: one tensor, or a tuple in which every tensor counts.

    Raises:
        ValueError: If the explained layer depends on several tensors of a nested output, on none, or on a tensor
            without a row for each example.
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

    x, more = rows_of(inputs, additional, torch.zeros(_ROWS, dtype=torch.long, device="cpu"))
    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        handle = find_layer(model, name)[1].register_forward_hook(open_up)
        try:
            Z = activations(*x, *(more or ()))
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
            f"layer {name!r} returns a {kind}, and the explained layer depends on {len(used)} of its tensors"
            f"{f' ({shapes})' if shapes else ''}, but a map shows one; name a layer that returns the tensor to draw, "
            "or draw at the inputs"
        )
    if found[used[0]].dim() == 0 or len(found[used[0]]) != _ROWS:
        raise ValueError(
            f"layer {name!r} returns a {kind}, and its tensor {shapes} for {_ROWS} examples has no row for each "
            "example, as a map needs; name another layer, or draw at the inputs, as with heatmap=IntegratedGradients"
        )
    return OneOutput(used[0])


def _shown(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path)
