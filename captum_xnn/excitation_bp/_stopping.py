"""Choose the layer to stop at on images: its winning probabilities make the map.

At the pixels maps are grainy, and inputs of either sign need the setting ``negative``. At the last layers maps are
coarse. The method's authors stop where 224 x 224 pixels have become 14 x 14 cells: at VGG16's fourth pooling layer, at
the first block of ResNet-50's third stage. :func:`stopping_layer` generalises this. It considers layers

- that every path crosses, so that the probabilities of the map sum to 1,
- whose output is not negative, after a ReLU or a pooling of its output, so that the setting ``negative`` has no effect,
- with at least 14 cells along the shorter side, and at most 16 x 16 pixels to a cell.

It takes the first of these layers with the fewest cells. If there is no such layer, it drops the condition on cells,
then the condition on the sign, as in models without ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.excitation_bp._graph import cuts, last_weighted, topological
from captum_xnn.excitation_bp._propagation import run, signals
from captum_xnn.excitation_bp._settings import Settings
from captum_xnn.layers._grid import is_grid
from captum_xnn.layers._lookup import hookable
from captum_xnn.layers._state import eager, untouched

__all__ = ["stopping_layer"]

CELLS = 14
"""Smallest number of cells along the shorter side of a map."""
PIXELS = 16
"""Largest number of pixels of a cell along each side."""


class _Layer(NamedTuple):
    name: str
    node: Any
    height: int
    width: int
    is_positive: bool

    @property
    def cells(self) -> int:
        return self.height * self.width


def stopping_layer(
    model: nn.Module,
    forward: Callable[..., Any],
    image: Tensor,
    additional: tuple[Any, ...] = (),
    *,
    channels: int = 1,
) -> str | None:
    """Choose the layer to stop at on images, by name; None if no layer has feature maps.

    Args:
        model: A plain module, whose layers are candidates.
        forward: The model, or a function that runs it and returns one tensor.
        image: One example (1, C, H, W).
        additional: Further arguments of ``forward``.
        channels: The dimension of the image that holds channels.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3), nn.ReLU(),
        ...                       nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> stopping_layer(model, model, torch.rand(1, 1, 32, 32))  # 15 x 15 cells; layer 4 has 13 x 13
        '2'
    """
    seen: dict[str, _Layer] = {}
    mode = signals(Settings())

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output.grad_fn is not None:
                height, width = output.shape[2:]
                # On a black image any layer may be all zeros.
                is_positive = mode.is_positive(output) or (float(output.detach().amin()) >= 0 and bool(output.any()))
                seen.pop(name, None)  # the last call of a layer counts, also for the order
                seen[name] = _Layer(name, output.grad_fn, height, width, is_positive)

        return note

    with torch.inference_mode(False), untouched(model), eager():
        taking = {*hookable(model)}
        named = [(name, m) for name, m in model.named_modules() if name and m in taking]
        handles = [m.register_forward_hook(noting(name)) for name, m in named]
        try:
            done = run(forward, (image.detach().clone(),), additional, mode)
        finally:
            for handle in handles:
                handle.remove()
    first = image.movedim(channels, 1)
    crossed = cuts(done.graph.nodes, done.leaves)
    layers = [
        layer
        for layer in seen.values()
        if layer.node in crossed
        and is_grid(layer.height, layer.width, first)
        and last_weighted(topological([layer.node]))  # without weights before it, the layer only rearranges the image
    ]
    return _choice(layers, first)


def _choice(layers: list[_Layer], image: Tensor) -> str | None:
    positive = [layer for layer in layers if layer.is_positive]
    fine = [
        layer
        for layer in positive or layers
        if min(layer.height, layer.width) >= CELLS
        and image.shape[2] <= PIXELS * layer.height
        and image.shape[3] <= PIXELS * layer.width
    ]
    if fine:
        return min(fine, key=lambda layer: layer.cells).name
    return max(positive or layers, key=lambda layer: layer.cells).name if layers else None
