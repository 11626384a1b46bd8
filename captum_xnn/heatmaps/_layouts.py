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
from captum_xnn.layers._grid import Cells, channels_by_numbers, halves, is_grid, is_over_image
from captum_xnn.layers._hooks import hooked
from captum_xnn.layers._layout import channel_dimension, refuse_examples_second, token_cells
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._nested import tensors_in
from captum_xnn.layers._pixels import first_image, image_channels, repeated
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
        """Bring cells (N, K, h, w) to the size of the image, and keep their sums; (N, K, 1, H, W) in its dtype.

        Each cell is divided among pixels by the weights of bilinear interpolation, or of area averages if there are
        more cells than pixels.

        Args:
            cells: Values of the cells of an image.
        """
        down, across = (_shares(cells, at, size) for at, size in ((2, self.first.shape[2]), (3, self.first.shape[3])))
        maps = torch.einsum("hi,nkij,wj->nkhw", down, cells, across)[:, :, None]
        return of_dtype(maps.movedim(2, self.channels + 1), self.values)

    def _resized(self, maps: Tensor) -> Tensor:
        """Enlarge maps (R, 1, ...) to the image, and move the one channel to where the image has its channels."""
        size = self.first.shape[2:]
        maps = F.interpolate(maps, size, mode=_MODES[self.values.dim()], align_corners=False)
        return maps.movedim(1, self.channels)


def _shares(cells: Tensor, at: int, pixels: int) -> Tensor:
    """Compute which share of each cell each pixel along one side gets, (pixels, cells); columns sum to 1."""
    count = cells.shape[at]
    one = torch.eye(count, dtype=cells.dtype, device=cells.device)[:, None]
    linear = {"mode": "linear", "align_corners": False} if count <= pixels else {"mode": "area"}
    weights = F.interpolate(one, pixels, **linear)[:, 0]
    return (weights / weights.sum(1, keepdim=True)).T


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

    def is_over_image(self, call: LayerCall, channels: int) -> bool:
        """Whether the values that the network reads of the explained layer form a grid over the image.

        The layer runs on images that differ in one half, once for each input size. If that does not tell, as where each
        cell sees the whole image, feature maps have the shape of those of the last module known to give any. With
        channels last, sizes decide.

        Args:
            call: The explained layer, whose values have four dimensions.
            channels: Dimension of its values that holds channels.
        """
        answers = self._answers.setdefault(call.network.model, {})
        key = "is_over_image", call.name, channels, *(tuple(x.shape[1:]) for x in call.inputs)
        if key not in answers:
            answers[key] = _is_over_image(call, channels, self.image(call))
        found: bool = answers[key]
        return found

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


def _is_over_image(call: LayerCall, channels: int, image: Image) -> bool:
    """Run the explained layer on images that differ in one half, see :meth:`Layouts.is_over_image`."""
    network, at = call.network, first_image(call.inputs)
    x, more = rows_of(call.inputs, call.additional, torch.tensor([0], device="cpu"))
    given = network.hold((*x, *(more or ())))
    if at is None or not (x[at].is_floating_point() or x[at].dtype == torch.uint8):
        return False
    seen: list[torch.Size] = []
    known = [] if network.spatial_layer_name is None else [find_layer(network.model, network.spatial_layer_name)[1]]
    halved = list(repeated(given, 5))
    halved[at] = halves(x[at], image.channels)
    try:
        with untouched(network.model), torch.no_grad(), hooked(known, lambda _m, _i, output: seen.append(output.shape)):
            Z = network.activations(*halved)
    except Exception:
        return False  # the model's own code may fail on noise
    told = is_over_image(Z.movedim(channels, 1))
    if told is None:
        return is_grid(Z.shape[1], Z.shape[2], image.first) if channels == 3 else seen[-1:] == [Z.shape]
    return told


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
