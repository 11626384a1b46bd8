"""Hooks that watch a network, or change its inputs, while a method of Captum runs it.

Each function is a context manager that removes its hook at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dtypes_restored", "outputs_noted", "shapes_noted"]


@contextmanager
def shapes_noted(layer: nn.Module | None) -> Iterator[list[torch.Size]]:
    """Note the shape of each tensor that a layer returns.

    Args:
        layer: The layer; with None the list stays empty.
    """
    seen: list[torch.Size] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(output.shape)

    handle = None if layer is None else layer.register_forward_hook(note)
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def outputs_noted(network: nn.Module) -> Iterator[list[Tensor]]:
    """Note the outputs of a network before the hooks of a method see them.

    Args:
        network: Any module that returns one tensor.
    """
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def dtypes_restored(network: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """Convert the inputs of a network back to their dtypes: Captum draws noise in torch's default dtype.

    Args:
        network: Any module.
        inputs: Tensors of the wanted dtypes.
    """

    def cast(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        dtypes = {i: x.dtype for i, x in enumerate(inputs) if x.is_floating_point()}
        return tuple(a.to(dtypes[i]) if i in dtypes and isinstance(a, Tensor) else a for i, a in enumerate(arguments))

    handle = network.register_forward_pre_hook(cast)
    try:
        yield
    finally:
        handle.remove()
