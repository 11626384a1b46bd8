"""How the output of a layer is laid out, and how its maps get the size or the shape of the input.

The shape of an output may be ambiguous. :mod:`captum_xnn.layers._layout` and :mod:`captum_xnn.heatmaps._one_output`
then test the model. The test takes some forward passes, so backends run it once per layer and input size, and keep its
result.

Conventions:
    N examples, K maps of each example, R pairs of example and x-feature, T tokens, C channels, h and w cells of a
    layer, (H, W) pixels of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

__all__ = ["Image", "LayerCall", "Layouts", "has_images", "has_pixels", "in_shape_of", "of_dtype"]

# How to enlarge maps of images (N, C, H, W) and of volumes (N, C, D, H, W).
_MODES = {4: "bilinear", 5: "trilinear"}


class Image(NamedTuple):
    """The input whose size the maps of a layer get: the first image or volume, else the first input."""

    values: Tensor
    """An image (N, C, H, W), a volume, one of these with channels elsewhere, or any other input."""
    channels: int
    """The dimension of its channels."""

    @property
    def first(self) -> Tensor:
        """The image with its channels first."""
        return self.values.movedim(self.channels, 1) if has_pixels(self.values) else self.values

    def summed_over_channels(self, maps: Tensor, channels: int | None) -> Tensor:
        """Sum the feature maps of a layer over channels and enlarge them to the image, with one channel.

        Args:
            maps: Attributions (R, ...) of a layer.
            channels: Dimension of the attributions that holds channels; 1 if None.
        """
        if maps.dim() == self.values.dim() and has_pixels(self.values):
            maps = self._resized(maps.sum(channels or 1)[:, None])
        return of_dtype(maps, self.values)

    def enlarged(self, maps: Tensor) -> Tensor:
        """Enlarge maps (N, K, 1, h, w) of a layer to the size of the image, and take its dtype.

        Args:
            maps: Maps (N, K, ...). Those of a layer without cells keep their size.
        """
        if maps.dim() == self.values.dim() + 1 and has_pixels(self.values):
            one = self._resized(maps.flatten(0, 1))
            maps = one.reshape(*maps.shape[:2], *one.shape[1:])
        return of_dtype(maps, self.values)

    def spread(self, cells: Tensor) -> Tensor:
        """Enlarge cells (N, K, h, w) to the size of the image, and keep their sums; (N, K, 1, H, W) in its dtype.

        Bilinear interpolation counts a cell as often as its weights in all pixels sum to. Each cell is divided by that.

        Args:
            cells: Values of the cells of an image.
        """
        H, W = self.first.shape[2:]
        for at, size in ((2, H), (3, W)):
            one = torch.eye(cells.shape[at], dtype=cells.dtype, device=cells.device)[:, None]
            counted = F.interpolate(one, size, mode="linear", align_corners=False).sum((1, 2))
            cells = cells / counted.reshape([-1 if d == at else 1 for d in range(4)])
        return self.enlarged(cells[:, :, None])

    def _resized(self, maps: Tensor) -> Tensor:
        """Enlarge maps (R, 1, ...) to the image, and move the one channel to where the image has its channels."""
        size = self.first.shape[2:]
        maps = F.interpolate(maps, size, mode=_MODES[self.values.dim()], align_corners=False)
        return maps.movedim(1, self.channels)


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
        self._answers: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Layouts], tuple[()]]:
        return Layouts, ()  # a copy reads anew

    def one_output(self, call: LayerCall) -> OneOutput | None:
        """Find the tensor to draw of a layer that returns several tensors; None for a layer that returns one.

        Args:
            call: The layer.
        """
        network = call.network
        answers, key = self._answers.setdefault(network.model, {}), (network.layer_name, call.name)
        if key not in answers:
            answers[key] = one_output(
                network.model,
                lambda *arguments: network.activations(*network.hold(arguments)),
                call.name,
                call.inputs,
                call.additional,
            )
        found: OneOutput | None = answers[key]
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
        answers = self._answers.setdefault(model, {})
        key = read, call.name, *(tuple(x.shape[1:]) for x in call.inputs)
        if key not in answers:
            x, more = rows_of(call.inputs, call.additional, torch.tensor([0], device="cpu"))
            given = tuple(a.detach() if isinstance(a, Tensor) else a for a in call.network.hold((*x, *(more or ()))))
            one = answers.get((call.network.layer_name, call.name))
            network = call.network
            layer = network.layer if call.name == network.layer_name else find_layer(model, call.name)[1]
            answers[key] = read(model, layer, given, call.name, one and one.pick)
        return answers[key]


def has_pixels(tensor: Tensor) -> bool:
    """Whether a tensor has the dimensions of images (N, C, H, W) or volumes (N, C, D, H, W).

    Args:
        tensor: An input, or the output of a layer.
    """
    return tensor.dim() in _MODES


def has_images(inputs: tuple[Tensor, ...]) -> bool:
    """Whether the first input with the dimensions of images or volumes holds images.

    Args:
        inputs: Input tensors (N, ...).
    """
    at = first_image(inputs)
    return at is not None and inputs[at].dim() == 4


def of_dtype(maps: Tensor, like: Tensor) -> Tensor:
    """Convert maps to the dtype of a floating-point input.

    Args:
        maps: Maps (N, ...).
        like: The input (N, ...).
    """
    return maps.to(like.dtype if like.is_floating_point() else maps.dtype).contiguous()


def in_shape_of(inputs: tuple[Tensor, ...], maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Bring maps (N, 1, ...) to the shape of the inputs.

    The map of a layer is divided equally among the channels of an image or a volume. The map of an embedding is summed
    over its dimensions.

    Args:
        inputs: Tensors (N, ...).
        maps: Maps of each input, or of each tensor of a layer.

    Raises:
        ValueError: If the maps of a layer have another shape.
    """
    image = next((x for x in inputs if x.dim() in (4, 5)), inputs[0])
    likes = inputs if len(maps) == len(inputs) else (image,) * len(maps)
    return tuple(_shaped(m[:, 0], x).contiguous() for m, x in zip(maps, likes, strict=True))


def _shaped(m: Tensor, x: Tensor) -> Tensor:
    """Bring the map of one input to its shape."""
    if m.shape == x.shape:
        return m
    if m.dim() == x.dim() > 2:
        differing = [d for d in range(m.dim()) if m.shape[d] != x.shape[d]]
        if len(differing) == 1 and m.shape[differing[0]] == 1:  # the channels, first or last
            return m.expand_as(x) / x.shape[differing[0]]
    if m.shape[: x.dim()] == x.shape:  # an embedding of token ids
        return m.flatten(x.dim()).sum(-1)
    raise ValueError(
        f"feature= needs maps in the input's shape {tuple(x.shape)}, and the method gives {tuple(m.shape)}, the shape "
        "of its layer; leave feature out for such maps, or draw at the inputs, as with heatmap=InputXGradient"
    )


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
