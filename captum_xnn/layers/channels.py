"""Tell which dimension of a layer's output holds channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from captum_xnn.layers.grid import has_channels_last
from captum_xnn.layers.state import untouched
from captum_xnn.layers.trace import trace

__all__ = ["channel_dimension"]

_CHANNELS_FIRST = (
    nn.Conv1d,
    nn.ConvTranspose1d,
    nn.BatchNorm1d,
    nn.InstanceNorm1d,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool1d,
)

_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)


def channel_dimension(
    model: nn.Module,
    layer: nn.Module,
    shape: Sequence[int],
    inputs: tuple[Any, ...],
    *,
    name: str = "layer",
) -> int:
    """Return the dimension of a layer's output that holds channels, counted with the examples as 0.

    Of three dimensions per example it is the last where the first two have the image's ratio, and else the first. Of
    two it is the first where the last 1-D convolution, pooling or batch norm before the end of the layer comes after
    all modules that have channels last, such as linear ones and layer norm; and else the second.

    Args:
        model: A plain module.
        layer: One of its submodules.
        shape: Shape (...) of one example of its output.
        inputs: All positional arguments of the model.
        name: What to call the layer in errors.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU())
        >>> channel_dimension(model, model[1], (6, 10), (torch.zeros(1, 2, 12),))
        1
    """
    if len(shape) == 3:
        image = next((x for x in inputs if isinstance(x, Tensor) and x.dim() == 4), None)
        return 3 if has_channels_last((1, *shape), image) else 1
    if len(shape) != 2:
        return 1
    with untouched(model):
        ran = trace(model, layer, inputs, name=name).leaves
    telling = [leaf for leaf in ran if isinstance(leaf, (*_CHANNELS_FIRST, *_CHANNELS_LAST))]
    return 1 if telling and isinstance(telling[-1], _CHANNELS_FIRST) else 2
