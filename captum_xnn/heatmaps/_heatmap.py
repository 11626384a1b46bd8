"""The protocol of heatmap backends, one attribution map per x-feature, and the pair of default backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from captum_xnn.heatmaps._network import ExplanationNetwork

__all__ = ["DefaultMaps", "Heatmap"]


class Heatmap(Protocol):
    """A heatmap backend: a callable that draws the maps of x-features.

    Maps are detached, contiguous, of the dtype of the inputs and on their device.

    A backend may have further attributes. A missing attribute counts as False:

    - ``takes_pass``: the backend can draw groups of contributions from a forward pass that has run already.
    - ``runs_once``: one forward pass draws all maps of a learned network, and also reads the layer and the outputs.
    - ``draws_winners``: maps show the evidence for one output, so a difference of outputs needs two maps.
    - ``replaces_inputs``: the backend runs the network on changed inputs and takes no gradients.
    - ``is_at_baseline(inputs, settings)``: whether the inputs equal the backend's baseline, so that all maps are 0.

    Example:
        >>> import torch
        >>> from captum_xnn import XNNAttribution
        >>> class Sensitivity:  # the size of the gradient
        ...     def __call__(self, network, inputs, features, *, additional_forward_args=None, **settings):
        ...         inputs = tuple(x.detach().requires_grad_() for x in inputs)
        ...         with torch.enable_grad():
        ...             E = network(*inputs, *(additional_forward_args or ()))
        ...         maps = [torch.autograd.grad(E[:, k].sum(), inputs, retain_graph=True) for k in features]
        ...         return tuple(torch.stack(of_input, 1).abs() for of_input in zip(*maps))
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> data = torch.randn(300, 6)
        >>> xnn = XNNAttribution(model, "1", n_features=2, heatmap=Sensitivity()).fit(data, target=0, progress=False)
        >>> xnn.attribute(data[:4], target=0).shape
        torch.Size([4, 2, 6])
    """

    def __call__(
        self,
        network: ExplanationNetwork,
        inputs: tuple[Tensor, ...],
        features: Sequence[int],
        *,
        additional_forward_args: tuple[Any, ...] | None = None,
        internal_batch_size: int | None = None,
        **settings: Any,
    ) -> tuple[Tensor, ...]:
        """Draw the maps of K x-features, (N, K, ...) for each input tensor.

        Args:
            network: Module from the model's inputs to the x-features, (N, n).
            inputs: Input tensors (N, ...).
            features: Indices of the K x-features to draw.
            additional_forward_args: Further arguments of the network, after the inputs.
            internal_batch_size: Number of maps computed at once. All maps, if None.
            settings: Settings for this call, as a user passes them to ``attribute``.
        """
        ...


class DefaultMaps:
    """The backends that an attribution uses without the argument ``heatmap=``.

    Args:
        of_groups: Draws groups of contributions.
        of_networks: Draws learned networks, and the model's own outputs.
    """

    def __init__(self, of_groups: Heatmap, of_networks: Heatmap) -> None:
        self.of_groups, self.of_networks = of_groups, of_networks

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
