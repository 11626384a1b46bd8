"""The protocol of heatmap backends: one attribution map per x-feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from captum_xnn.heatmaps._network import ExplanationNetwork

__all__ = ["Heatmap"]


class Heatmap(Protocol):
    """A heatmap backend: a callable that draws the maps of x-features.

    Maps are detached, contiguous, of the dtype of the inputs and on their device.
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
        """Draw the maps of K x-features, (N, K, ...) for each input tensor."""
        ...
