r"""The heatmap backends that draw groups of contributions: by the places of the layer, or by gradients.

*By place.* Feature maps Z have places p. The contribution of an x-feature is a sum over them, and its terms are the
map:

.. math:: E_k = \sum_p M_{kp}, \qquad M_{kp} = \sum_d a_{dk} G_{dp} (Z_{dp} - Z_{0,d}),

with the slopes G of the path integral (:mod:`captum_xnn.models._contribution_groups`). No gradient is taken again.

*By gradients.* Let :math:`g = \partial y / \partial Z` be the gradient of the explained output, and :math:`a_k` a
group. The gradient of x-feature k at feature maps or inputs F is taken as

.. math:: g_k(F) = \Bigl(\frac{\partial Z}{\partial F}\Bigr)^\top (a_k \odot g),

with the example's own g in place of the path's slopes. Over all x-features it sums to the gradient of the output.

One pass gives Z, y and g. Each x-feature then takes a backward pass from Z to F, which is short where F is close to Z.

Conventions:
    N examples, K x-features to draw. Maps are (N, K, ...), detached, contiguous, of the input's dtype and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from captum.attr import InputXGradient, LayerGradientXActivation
from torch import Tensor, nn

from captum_xnn.heatmaps._from_captum import FromCaptum
from captum_xnn.heatmaps._layouts import LayerCall, Layouts, has_images, of_dtype
from captum_xnn.heatmaps._network import ContributionNetwork, ExplanationNetwork
from captum_xnn.heatmaps._one_pass import Pass
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._trace import CELLS

__all__ = ["ContributionMaps", "GradientMaps"]

# Settings of a call with which x-features can share a forward pass.
_SHARED = frozenset({"additional_forward_args", "internal_batch_size", "layer"})
# Those with which the maps are at the explained layer.
_OF_PLACES = _SHARED - {"layer"}


class GradientMaps:
    """Gradient x activation at the last layer with feature maps, or input x gradient without such a layer.

    Maps of fewer than 4 x 4 cells, as pooling leaves them, are drawn only if there are no finer ones.

    At every place, the maps of all x-features sum to the map that the same backend gives the model's own output, if
    everything passes through the layer.

    Example:
        >>> GradientMaps()
        GradientMaps()
    """

    takes_pass = True
    """Whether this backend draws groups from a forward pass with a graph that has been taken already."""

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
            features: Indices of the K x-features to draw.
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
        call, start_layer = LayerCall(network, "", inputs, additional_forward_args), None
        if at_layer:
            layer = network.spatial_layer_name if layer is None else layer
            if layer is None:
                return None
            name, start_layer = find_layer(network.model, layer)
            call = call._replace(name=name)
        given = (additional_forward_args or ())[:-1]  # the last argument is the slopes of the path
        n, K, chunks = len(inputs[0]), len(features), []
        for rows in torch.split(torch.arange(n, device="cpu"), internal_batch_size or n):
            x, more = rows_of(inputs, given, rows)
            graph_pass = network.graph_pass if len(rows) == n else None
            if graph_pass is None or graph_pass.start_layer is not start_layer:
                graph_pass = Pass.of(network.tail, x, more or (), start_layer)
            at_leaves = None if graph_pass is None else graph_pass.gradients(network.form, network.target, features)
            if at_leaves is None:
                return None
            maps = [values[:, None] * gradients for values, gradients in at_leaves]
            if start_layer is None:
                chunks.append([of_dtype(m, x) for m, x in zip(maps, inputs, strict=True)])
                continue
            values = at_leaves[0][0]
            self._layouts.refuse_examples_second(call, values.shape, values, len(rows))
            channels = self._layouts.channels(call, values.shape) if values.dim() > 2 else None
            done = self._layouts.image(call).summed_over_channels(maps[0].flatten(0, 1), channels)
            chunks.append([done.reshape(len(rows), K, *done.shape[1:])])
        return tuple(torch.cat(parts).contiguous() for parts in zip(*chunks, strict=True))


class ContributionMaps:
    """Contributions of each place of the explained layer, or :class:`GradientMaps` where the layer has no places.

    A layer has places if its values are feature maps of at least 4 x 4 cells over the image. To find out, the first
    call runs the layer on images that differ in one half. The contribution of each cell is spread over its pixels, so
    the pixels of a map sum to the x-feature's contribution, in logits. Unlike a gradient, the map also shows
    contributions of numbers below the base, such as inactive ReLUs. This is the default for groups of contributions.
    :class:`GradientMaps` draws learned networks, a model's own outputs, and calls that name another ``layer``.

    Example:
        >>> from captum_xnn import XNNAttribution
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 3)
        ... )
        >>> images = torch.rand(200, 1, 8, 8)
        >>> target = int(model(images).argmax(1).mode().values)
        >>> xnn = XNNAttribution(model, "1", n_features=2).fit(images, target=target, progress=False)
        >>> why = xnn.explain(images[:4], target=target)
        >>> why.maps.shape, torch.allclose(why.maps.sum((2, 3, 4)), why.contributions, atol=1e-5)
        (torch.Size([4, 2, 1, 8, 8]), True)
    """

    takes_pass = True
    """Whether this backend draws groups from a forward pass with a graph that has been taken already."""

    def __init__(self) -> None:
        self._elsewhere, self._layouts = GradientMaps(), Layouts()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __call__(
        self, network: ExplanationNetwork, inputs: tuple[Tensor, ...], features: Sequence[int], **options: Any
    ) -> tuple[Tensor, ...]:
        """Draw maps (N, K, ...) for each input; layers of images give (N, K, 1, H, W).

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            features: Indices of the K x-features to draw.
            options: Further arguments, as :class:`GradientMaps` takes them.
        """
        if isinstance(network, ContributionNetwork) and not {*options} - _OF_PLACES:
            call = LayerCall(network, network.layer_name, inputs, options.get("additional_forward_args"))
            if self._has_places(call, network.form.channels):
                return (self._by_place(call, network, features, options.get("internal_batch_size")),)
        return self._elsewhere(network, inputs, features, **options)

    def _has_places(self, call: LayerCall, channels: int) -> bool:
        """Whether the values of the explained layer in this call are feature maps over an image, with enough cells."""
        shape = call.additional[-1].shape if call.additional else ()  # of the slopes, which is that of Z
        cells = [size for at, size in enumerate(shape) if at not in (0, channels)]
        enough = len(cells) == 2 and min(cells) >= CELLS
        return enough and has_images(call.inputs) and self._layouts.is_over_image(call, channels)

    def _by_place(
        self, call: LayerCall, network: ContributionNetwork, features: Sequence[int], internal_batch_size: int | None
    ) -> Tensor:
        """Draw the contributions of places, spread over the pixels of the image."""
        form, n = network.form, len(call.inputs[0])
        *given, slopes = call.additional or ()
        chunks = []
        for rows in torch.split(torch.arange(n, device="cpu"), internal_batch_size or n):
            taken = network.graph_pass if len(rows) == n else None
            if taken is None:
                x, more = rows_of(call.inputs, tuple(given), rows)
                with torch.no_grad():
                    Z = network.activations(*x, *(more or ()))
            else:
                Z = taken.Z.detach()
            G = slopes[rows.to(slopes.device)]
            moved = Z.to(G) - form.base.to(G)
            cells = torch.stack([(form.slopes_of(G, k) * moved).sum(form.channels) for k in features], 1)
            chunks.append(self._layouts.image(call).spread(cells))
        return torch.cat(chunks).contiguous()
