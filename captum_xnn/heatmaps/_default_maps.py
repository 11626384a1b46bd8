"""The default heatmap backend, and the conversion of the argument ``heatmap=`` to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from captum.attr import Attribution
from torch import Tensor

from captum_xnn.heatmaps._contribution_network import ContributionNetwork
from captum_xnn.heatmaps._excitation_maps import ExcitationMaps
from captum_xnn.heatmaps._from_captum import FromCaptum
from captum_xnn.heatmaps._gradient_maps import GradientMaps
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.heatmaps._network import ExplanationNetwork

__all__ = ["DefaultMaps", "as_heatmap"]


class DefaultMaps:
    """:class:`GradientMaps` for groups of contributions, :class:`ExcitationMaps` for learned networks and outputs.

    Example:
        >>> DefaultMaps()
        DefaultMaps()
    """

    def __init__(self) -> None:
        self.of_groups, self.of_networks = GradientMaps(), ExcitationMaps()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __call__(
        self, network: ExplanationNetwork, inputs: tuple[Tensor, ...], features: Sequence[int], **options: Any
    ) -> tuple[Tensor, ...]:
        """Draw maps (N, K, ...) for each input; layers of images give (N, K, 1, H, W).

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            features: The K x-features to draw, 0-based.
            options: Further arguments, as :class:`GradientMaps` or :class:`ExcitationMaps` takes them.
        """
        backend: Heatmap = self.of_groups if isinstance(network, ContributionNetwork) else self.of_networks
        return backend(network, inputs, features, **options)


def as_heatmap(heatmap: type[Attribution] | Heatmap | None) -> Heatmap:
    """Turn the argument ``heatmap=`` into a backend.

    Args:
        heatmap: A Captum attribution class, a backend object, or None for :class:`DefaultMaps`.

    Raises:
        TypeError: If ``heatmap`` is neither a class of Captum nor callable.

    Example:
        >>> from captum.attr import IntegratedGradients
        >>> as_heatmap(IntegratedGradients)
        FromCaptum(IntegratedGradients)
    """
    if heatmap is None:
        return DefaultMaps()
    if isinstance(heatmap, type):
        return FromCaptum(heatmap)
    if isinstance(heatmap, Attribution) or not callable(heatmap):
        raise TypeError(
            f"heatmap is an object of type {type(heatmap).__name__}, neither a Captum class nor a heatmap backend; "
            "pass the class and its settings as FromCaptum(Class, setting=...), since the backend builds the object"
        )
    return heatmap
