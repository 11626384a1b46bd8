"""Find out once per layer and input size how the output of a layer is laid out, and remember it.

The shape of an output may be ambiguous. :mod:`captum_xnn.layers._layout` and :mod:`captum_xnn.heatmaps._one_output`
then test the model. The test takes some forward passes, so backends keep its result.

Conventions:
    N examples, T tokens, C channels, (H, W) pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_xnn.heatmaps._map_size import Image
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.heatmaps._one_output import OneOutput, one_output
from captum_xnn.heatmaps._token_grid import TOKENS, TokenGrid
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._grid import Cells, channels_by_numbers
from captum_xnn.layers._layout import channel_dimension, refuse_examples_second, token_cells
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._nested import tensors_in
from captum_xnn.layers._pixels import first_image, image_channels
from captum_xnn.layers._read import OutputTransform, read_layer
from captum_xnn.layers._state import untouched

__all__ = ["LayerCall", "Layouts"]


class LayerCall(NamedTuple):
    """A layer of a network, and inputs that reach it."""

    network: ExplanationNetwork
    """From the model's inputs to its x-features."""
    name: str
    """Dotted name of the layer."""
    inputs: tuple[Tensor, ...]
    """Input tensors (N, ...)."""
    additional: tuple[Any, ...] | None
    """Further arguments of the network."""


class Layouts:
    """The layouts of layers' outputs. Each layout is read once per model, layer and input size."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Layouts], tuple[()]]:
        return Layouts, ()  # a copy reads anew

    def one_output(self, call: LayerCall) -> OneOutput | None:
        """Find the tensor to draw of a layer that returns several tensors; None for a layer that returns one.

        Args:
            call: The layer.
        """
        network = call.network
        known, key = self._known.setdefault(network.model, {}), (network.layer_name, call.name)
        if key not in known:
            known[key] = one_output(
                network.model,
                lambda *arguments: network.activations(*network.hold(arguments)),
                call.name,
                call.inputs,
                call.additional,
            )
        found: OneOutput | None = known[key]
        return found

    def channels(self, call: LayerCall, shape: Sequence[int]) -> int:
        """Find the dimension of a layer's output that holds channels, counted with the examples as 0.

        The shape decides where it can. Otherwise the model is tested.

        Args:
            call: The layer.
            shape: Shape of its output.
        """
        image = self.image(call).first
        by_numbers = channels_by_numbers(shape, image) if len(shape) == image.dim() == 4 else None
        if by_numbers is not None:
            return by_numbers
        found: int = self._read(_channels, call)
        return found

    def image(self, call: LayerCall) -> Image:
        """Find the input whose size the maps of a layer get, and the dimension of its channels.

        Args:
            call: The layer, or any call with the same inputs.
        """
        at = first_image(call.inputs)
        if at is None:
            return Image(call.inputs[0], 1)
        channels = self._read(_channels_of_image, call._replace(name=call.network.layer_name))
        return Image(call.inputs[at], channels)

    def refuse_examples_second(self, call: LayerCall, shape: Sequence[int], maps: Tensor, rows: int) -> None:
        """Raise where the output of a layer has no row for each example, as with (T, N, C).

        Where T happens to equal N, the model runs on one example to tell the two apart.

        Args:
            call: The layer.
            shape: Shape of its output.
            maps: Attributions of the output.
            rows: Number of rows that the attributions should have.

        Raises:
            ValueError: If examples do not come first.
        """
        refuse_examples_second(maps, rows, call.name)
        if len(shape) > 2 and shape[0] == shape[1]:
            one = self._read(_shape, call)
            refuse_examples_second(torch.empty(one, device="meta"), 1, call.name)

    def tokens(self, call: LayerCall, kind: str, grid: tuple[int, int] | None) -> TokenGrid:
        """Find out how the tokens of a layer form a grid.

        Args:
            call: The layer.
            kind: One of :data:`TOKENS`.
            grid: Height and width that the user gave.

        Raises:
            ValueError: If the grid is unknown, or contradicts the one given.
        """
        shape = self._read(_shape, call)
        refuse_examples_second(torch.empty(shape, device="meta"), 1, call.name)
        if kind != "vit" or len(shape) != TOKENS[kind]:
            return TokenGrid(kind)  # it raises for another number of dimensions
        name, count = call.name, shape[1]
        found: Cells | None = self._read(_cells, call)
        if found is not None and grid in (None, (found.height, found.width)):
            return TokenGrid(kind, found)
        if grid is None:
            raise ValueError(
                f"layer {name!r} gives {count} tokens, and no convolution before it makes one of each of its cells, so "
                f"the grid is unknown; pass it, as in layer={name!r}, tokens='vit', grid=(height, width), or "
                "tokens='sequence' if the tokens are not cells of an image"
            )
        if found is not None:
            raise ValueError(
                f"grid is {grid}, and the {count} tokens of layer {name!r} are {found.height} x {found.width} cells of "
                f"the patch embedding with {count - len(found.tokens)} class or register tokens; leave grid out"
            )
        if grid[0] * grid[1] > count:
            raise ValueError(
                f"grid is {grid}, {grid[0] * grid[1]} cells, and layer {name!r} gives {count} tokens; pass a grid of "
                "the cells that are left in this layer"
            )
        return TokenGrid(kind, grid)

    def _read(self, read: Any, call: LayerCall) -> Any:
        """Call a function that reads the layout from the first example, once for each input size."""
        model = call.network.model
        known = self._known.setdefault(model, {})
        key = read, call.name, *(tuple(x.shape[1:]) for x in call.inputs)
        if key not in known:
            x, more = rows_of(call.inputs, call.additional, torch.tensor([0]))
            given = tuple(a.detach() if isinstance(a, Tensor) else a for a in call.network.hold((*x, *(more or ()))))
            one = known.get((call.network.layer_name, call.name))
            network = call.network
            layer = network.layer if call.name == network.layer_name else find_layer(model, call.name)[1]
            known[key] = read(model, layer, given, call.name, one and one.pick)
        return known[key]


def _first(raw: Any) -> Any:
    """Return the first floating-point tensor of a layer's output."""
    return next((tensor for _, tensor in tensors_in(raw) if tensor.is_floating_point()), raw)


def _channels(
    model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], name: str, pick: OutputTransform | None
) -> int:
    return channel_dimension(model, layer, inputs, name=name, output_transform=pick or _first)


def _channels_of_image(
    model: nn.Module, _layer: nn.Module, inputs: tuple[Any, ...], _name: str, _pick: OutputTransform | None
) -> int:
    return image_channels(model, inputs)


def _cells(
    model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], name: str, _pick: OutputTransform | None
) -> Cells | None:
    return token_cells(model, layer, inputs, name=name)


def _shape(
    model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], name: str, pick: OutputTransform | None
) -> tuple[int, ...]:
    """Read the shape of a layer's output."""
    with torch.inference_mode(False), untouched(model), torch.no_grad():
        return tuple(read_layer(model, layer, inputs, name=name, output_transform=pick or _first)[0].shape)
