"""Draw the maps of x-features with a backend, by one network for each form.

Examples with the same number of x-features are drawn together (:mod:`captum_xnn.heatmaps._batching`).

Conventions:
    N examples, K x-features.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.heatmaps._batching import Part, draw, in_shape_of
from captum_xnn.heatmaps._contribution_network import ContributionNetwork
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.heatmaps._rows_of_settings import rows_of_settings
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._targets import grouped
from captum_xnn.layers._trace import Trace, trace
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._numbers import Choice

__all__ = ["FeatureMaps"]


class FeatureMaps(NamedTuple):
    """Draws the maps of x-features."""

    heatmap: Heatmap
    """The backend."""
    reader: Reader
    """Reader of the explained layer."""

    def draw(
        self,
        choices: Sequence[Choice],
        slopes: Tensor,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        *,
        feature: int | None = None,
        internal_batch_size: int | None = None,
        settings: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """Draw the maps of all examples, (N, K, ...) for each input; maps of x-features that a form lacks are zero.

        Args:
            choices: The choice of each example.
            slopes: Slopes of each example, (N, ...) as Z, or (N, 0).
            inputs: Tensors (N, ...).
            additional: Further arguments of the model.
            feature: The one x-feature to draw, in the inputs' shape; all of them, if None.
            internal_batch_size: Maps computed at once.
            settings: Settings of the backend for this call.

        Raises:
            ValueError: If the x-feature is out of range, or a layer's maps do not fit in the input's shape.
        """
        widths = [choice.form.n_features for choice in choices]
        features = _features(feature, max(widths))
        model, name, layer = self.reader.model, self.reader.name, self.reader.layer
        first = rows_of(inputs, additional, torch.tensor([0]))
        ran = trace(model, layer, (*first[0], *(first[1] or ())), name=name)

        def drawn() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
            for width, rows in grouped(widths):  # examples with the same number of maps
                own = [k for k in features if k < width]
                x, more = rows_of(inputs, additional, torch.tensor(rows))
                some = slopes[torch.tensor(rows).to(slopes.device)]
                parts = list(self._parts([choices[i] for i in rows], own or [0], some, ran))
                every = len(rows) == len(choices)
                of_rows = settings if every else rows_of_settings(settings, len(choices), rows)
                maps = draw(self.heatmap, parts, x, more, internal_batch_size, of_rows)
                yield rows, tuple(_padded(m if own else m[:, :0], len(features)) for m in maps)

        maps = gathered(drawn(), len(choices))
        return maps if feature is None else in_shape_of(inputs, maps)

    def _parts(self, choices: Sequence[Choice], features: list[int], slopes: Tensor, ran: Trace) -> Iterator[Part]:
        """Yield the networks that draw the maps of some examples."""
        reader = self.reader
        for (form, _, target, _), rows in grouped(choices):
            if isinstance(form, ContributionGroups):
                groups = ContributionNetwork(form, reader.tail(), target, trace=ran)
                yield Part(groups, features, rows, slopes[rows])
            else:
                transform = reader.output_transform
                network = ExplanationNetwork(reader.model, reader.layer, form, trace=ran, output_transform=transform)
                yield Part(network, features, rows)


def _features(feature: int | None, K: int) -> list[int]:
    """List the x-features to draw."""
    if feature is None:
        return list(range(K))
    if not 0 <= operator.index(feature) < K:
        raise ValueError(f"expected an x-feature from 0 to {K - 1}, got {feature}; leave feature out for all of them")
    return [operator.index(feature)]


def _padded(maps: Tensor, most: int) -> Tensor:
    """Append empty maps to (N, K, ...) for x-features that a form lacks; return (N, most, ...)."""
    missing = most - maps.shape[1]
    return torch.cat([maps, maps.new_zeros(len(maps), missing, *maps.shape[2:])], 1) if missing else maps
