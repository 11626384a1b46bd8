"""Trace the modules that run before a layer, in their order, and the last one with spatial outputs."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.layers._grid import has_channels_last
from captum_xnn.layers._read import not_reached
from captum_xnn.layers._state import eager

__all__ = ["Trace", "trace"]


class Trace(NamedTuple):
    """The modules that one forward pass up to the layer executed."""

    leaves: tuple[nn.Module, ...]
    """Modules without children, each once, in the order of their first call."""
    calls: int
    """How often the layer was called."""
    spatial: nn.Module | None
    """The last module before the layer whose output was (N, C, H, W) with several cells, or None.

    Where a block returns the output of its last leaf, this is the leaf. Dropout and identities are skipped, as they
    change nothing.
    """


_IDLE = (nn.Identity, nn.modules.dropout._DropoutNd)


def trace(model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], *, name: str = "layer", cells: int = 1) -> Trace:
    """Trace the leaf modules that a forward pass executes up to the layer, and count its calls of the layer.

    Captum's DeepLift and LRP walk the registered modules, not the executed ones. A network composed of this model must
    therefore register exactly these leaves.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model.
        name: Name of the layer in errors.
        cells: Cells along the shorter side that spatial outputs need at least.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> trace(model, model[1], (torch.zeros(1, 2),)).leaves
        (Linear(in_features=2, out_features=3, bias=True), ReLU())
    """
    order: list[nn.Module] = []
    grids: list[tuple[nn.Module, Tensor, int]] = []
    ends: list[tuple[int, nn.Module | None]] = []
    thread = threading.get_ident()
    image = next((x for x in inputs if isinstance(x, Tensor) and x.dim() in (4, 5)), None)

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        is_block = any(True for _ in module.children())
        if not is_block:
            order.append(module)
        if module is not model and _is_spatial(output, image, cells):
            same = bool(grids) and (isinstance(module, _IDLE) or (is_block and _is_unchanged(output, *grids[0][1:])))
            grids[:] = [(grids[0][0] if same else module, output, _version(output))]
        if module is layer:
            ends.append((len(order), grids[0][0] if grids else None))

    handles = [module.register_forward_hook(note) for module in dict.fromkeys([*model.modules(), *layer.modules()])]
    try:
        with torch.no_grad(), eager():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not ends:
        raise not_reached(model, name)
    count, spatial = ends[-1]
    return Trace(tuple(dict.fromkeys(order[:count])), len(ends), spatial)


def _is_spatial(output: Any, image: Tensor | None, cells: int) -> bool:
    """Whether a layer's output holds feature maps of several cells, (N, C, H, W), or (N, C, D, H, W) for volumes."""
    dimensions = 5 if image is not None and image.dim() == 5 else 4
    several = isinstance(output, Tensor) and output.dim() == dimensions and output[0, :1].numel() > 1
    return several and min(output.shape[2:]) >= cells and not has_channels_last(output.shape, image)


def _is_unchanged(output: Tensor, before: Tensor, version: int) -> bool:
    """Whether two outputs are the same tensor, not overwritten in between."""
    return output is before and _version(output) == version


def _version(x: Tensor) -> int:
    """Count the in-place changes of a tensor; 0 for inference tensors, which have no such count."""
    return 0 if x.is_inference() else x._version
