r"""The heatmap backend that draws groups of contributions by gradients, all x-features from one forward pass.

Let Z be the layer's output, :math:`g = \partial y / \partial Z` the gradient of the explained output, and :math:`a_k`
a group. The gradient of x-feature k at feature maps or inputs F is

.. math:: \frac{\partial E_k}{\partial F} = \Bigl(\frac{\partial Z}{\partial F}\Bigr)^\top (a_k \odot g).

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

__all__ = ["GradientMaps"]

# Settings of a call with which x-features can share a forward pass.
_SHARED = frozenset({"additional_forward_args", "internal_batch_size", "layer"})


class GradientMaps:
    """Gradient x activation at the last layer with feature maps, or input x gradient without such a layer.

    Maps of fewer than 4 x 4 cells, as pooling leaves them, are drawn only if there are no finer ones.

    This is the default for groups of contributions. At every place, the maps of all x-features sum to the map that the
    same backend gives the model's own output.

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
