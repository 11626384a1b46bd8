r"""The heatmap backend that draws groups of contributions by gradients, all x-features from one forward pass.

Let Z be the layer's output, :math:`g = \partial y / \partial Z` the gradient of the explained output, and :math:`a_k`
a group. The gradient of x-feature k at feature maps or inputs F is

.. math:: \frac{\partial E_k}{\partial F} = \Bigl(\frac{\partial Z}{\partial F}\Bigr)^\top (a_k \odot g).

One pass gives Z, y and g. Each x-feature then takes a backward pass from Z to F, which is short where F is close to Z.

Conventions:
    N examples, K x-features to draw. Maps are (N, K, ...), detached, contiguous, of the input's dtype and device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from captum.attr import InputXGradient, LayerGradientXActivation
from torch import Tensor, nn

from captum_xnn.heatmaps._contribution_network import ContributionNetwork
from captum_xnn.heatmaps._from_captum import FromCaptum
from captum_xnn.heatmaps._layouts import LayerCall, Layouts
from captum_xnn.heatmaps._map_size import has_images, of_dtype
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._state import eager, untouched
from captum_xnn.layers._tail import Tail, frozen
from captum_xnn.layers._targets import Target, select_each
from captum_xnn.models._contribution_groups import ContributionGroups

__all__ = ["GradientMaps"]

# Settings of a call with which x-features can share a forward pass.
_SHARED = frozenset({"additional_forward_args", "internal_batch_size", "layer"})


class GradientMaps:
    """Gradient x activation at the last layer with feature maps, or input x gradient without such a layer.

    This is the default for groups of contributions. At every place, the maps of all x-features sum to the map that the
    same backend gives the model's own output.

    Example:
        >>> GradientMaps()
        GradientMaps()
    """

    def __init__(self) -> None:
        self._at_layer, self._at_inputs = FromCaptum(LayerGradientXActivation), FromCaptum(InputXGradient)
        self._layouts = Layouts()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __call__(
        self, network: ExplanationNetwork, inputs: tuple[Tensor, ...], features: Sequence[int], **options: Any
    ) -> tuple[Tensor, ...]:
        """Draw maps (N, K, ...) for each input; layers of images give (N, K, 1, H, W).

        Groups of contributions share one forward pass.

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            features: The K x-features to draw, 0-based.
            options: Further arguments, as :class:`FromCaptum` takes them; ``layer`` names a layer.
        """
        has_maps = network.spatial_layer_name is not None and has_images(inputs)
        at_layer = "layer" in options or has_maps
        if isinstance(network, ContributionNetwork) and not {*options} - _SHARED:
            found = self._from_one_pass(network, inputs, features, at_layer=at_layer, **options)
            if found is not None:
                return found
        return (self._at_layer if at_layer else self._at_inputs)(network, inputs, features, **options)

    def _from_one_pass(
        self,
        network: ContributionNetwork,
        inputs: tuple[Tensor, ...],
        features: Sequence[int],
        *,
        at_layer: bool,
        additional_forward_args: tuple[Any, ...] | None = None,
        internal_batch_size: int | None = None,
        layer: str | nn.Module | None = None,
    ) -> tuple[Tensor, ...] | None:
        """Draw the maps of all x-features from one forward pass per chunk; None where one pass does not suffice."""
        call, place = LayerCall(network, "", inputs, additional_forward_args), None
        if at_layer:
            layer = network.spatial_layer_name if layer is None else layer
            if layer is None:
                return None
            name, place = find_layer(network.model, layer)
            call = call._replace(name=name)
        given = (additional_forward_args or ())[:-1]  # the last argument is the slopes of the path
        n, K, chunks = len(inputs[0]), len(features), []
        for rows in torch.split(torch.arange(n), internal_batch_size or n):
            x, more = rows_of(inputs, given, rows)
            made = _gradients_of_groups(network.form, network.tail, network.target, x, more or (), features, place)
            if made is None:
                return None
            maps = [values[:, None] * gradients for values, gradients in made]
            if place is None:
                chunks.append([of_dtype(m, x) for m, x in zip(maps, inputs, strict=True)])
                continue
            shape, values = made[0][0].shape, made[0][0]
            self._layouts.refuse_examples_second(call, shape, values, len(rows))
            channels = self._layouts.channels(call, shape) if values.dim() > 2 else None
            done = self._layouts.image(call).summed_over_channels(maps[0].flatten(0, 1), channels)
            chunks.append([done.reshape(len(rows), K, *done.shape[1:])])
        return tuple(torch.cat(parts).contiguous() for parts in zip(*chunks, strict=True))


class _Unfit(Exception):
    """Ends a pass in which the explained layer runs twice, any layer runs in a backward pass, or returns no tensor."""


def _gradients_of_groups(
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
        suffice: with an ``output_transform``, with integer inputs, for an explained layer that runs several times, or
        for a layer that returns no tensor. Of the calls of any other layer the last one before the explained layer
        counts, as in Captum.
    """
    if tail.output_transform is not None:
        return None
    if place is None and not all(x.is_floating_point() for x in inputs):
        return None
    x, more = rows_of(inputs, additional, torch.arange(len(inputs[0])))  # copies, because a model may work in place
    leaves = [] if place is not None else [value.detach().requires_grad_() for value in x]
    given = tuple(leaf.clone() for leaf in leaves) if place is None else tuple(value.detach() for value in x)
    seen: list[Tensor] = []
    cut = _Cut(leaves, seen)
    with ExitStack() as stack:
        for context in (untouched(tail.model), frozen(tail.model), torch.enable_grad(), eager()):
            stack.enter_context(context)
        if place is not None:
            stack.enter_context(cut.at(place))
        stack.enter_context(_kept(tail.layer, seen))
        try:
            output = tail.model(*given, *(more or ()))
        except _Unfit:
            return None
        cut.is_over = True
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
    """Take a backward pass to Z, and one from Z to the leaves for each x-feature: the formula of this module."""
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


class _Cut:
    """Cuts the graph behind each call of a layer, and keeps the output of the last one as the only leaf.

    Args:
        leaves: Takes the leaf.
        seen: Outputs of the explained layer. Calls behind it do not count.
    """

    def __init__(self, leaves: list[Tensor], seen: list[Tensor]) -> None:
        self.leaves, self.seen = leaves, seen
        self.is_over = False
        """Whether the forward pass is over. Checkpoints run layers again in the backward pass."""

    @contextmanager
    def at(self, place: nn.Module) -> Iterator[None]:
        """Cut the graph behind a layer in this context."""
        thread = threading.get_ident()

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            if self.is_over or not isinstance(output, Tensor) or not output.is_floating_point():
                raise _Unfit
            if self.seen:
                return None
            self.leaves[:] = [output.detach().requires_grad_()]
            return self.leaves[0].clone()  # a model may work in place, and a leaf forbids that

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
