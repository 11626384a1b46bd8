"""Draw the maps of a model's own outputs: the 1-Heatmap, by the same backends as the maps of x-features.

Conventions:
    N examples, C outputs of the model. There is one map of each example.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.heatmaps._feature_maps import Portion, draw
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.heatmaps._layouts import in_shape_of
from captum_xnn.heatmaps._network import ExplanationNetwork, ModelOutputs
from captum_xnn.layers._arguments import batch_size, copied, like, refuse_too_many
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._read import OutputTransform
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Difference, Target, grouped, per_example, select
from captum_xnn.layers._trace import trace

__all__ = ["OutputMaps"]


class OutputMaps(NamedTuple):
    """Draws the maps of a model's own outputs by any backend."""

    model: nn.Module
    """A plain module."""
    heatmap: Heatmap
    """The backend."""
    prediction_transform: OutputTransform | None = None
    """Turns the model's raw output into one tensor."""
    before: str | nn.Module | None = None
    """A layer, as :class:`captum_xnn.OneHeatmap` takes it."""

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any,
        additional_forward_args: Any,
        *,
        against: Any,
        feature: Literal[0] | None,
        internal_batch_size: int | None,
        settings: dict[str, Any],
    ) -> Any:
        """Draw one map of each example.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: The output to explain: one for all examples, or one for each.
            additional_forward_args: Further positional arguments of the model.
            against: The output that is subtracted, for all examples or for each.
            feature: 0 for maps in exactly the input's shape.
            internal_batch_size: Number of maps computed at once.
            settings: Settings of the backend for this call.

        Raises:
            ValueError: If a target is out of range, or missing where the model has several outputs.
        """
        refuse_too_many(self.model, inputs, "join them, torch.cat(batches)")
        size = batch_size(internal_batch_size)
        tensors, additional = copied(inputs, additional_forward_args)
        targets = per_example(target, len(tensors[0]), against)
        with torch.inference_mode(False), untouched(self.model):
            draw_maps = self._winners if getattr(self.heatmap, "draws_winners", False) else self._draw
            maps = draw_maps(_Inputs(tensors, additional, size), targets, settings)
        return like(inputs, maps if feature is None else in_shape_of(tensors, maps))

    def _draw(self, given: _Inputs, targets: list[Target], settings: dict[str, Any]) -> tuple[Tensor, ...]:
        """Draw the map of each example's target."""
        network, columns = self._network(given, list(dict.fromkeys(targets)))
        portions = [Portion(self.heatmap, network, [columns[t]], rows) for t, rows in grouped(targets)]
        return draw(portions, given.tensors, given.additional, given.batch_size, settings)

    def _winners(self, given: _Inputs, targets: list[Target], settings: dict[str, Any]) -> tuple[Tensor, ...]:
        """Draw by excitation backprop. A difference of outputs gets the difference of two maps, where it is positive.

        Excitation backprop follows the evidence for one output, whatever its sign. The two maps therefore have no
        contrast to all other outputs: each is the contrast of the other.
        """

        def drawn() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
            for is_difference, rows in grouped(isinstance(t, Difference) for t in targets):
                x, more = rows_of(given.tensors, given.additional, torch.tensor(rows, device="cpu"))
                some, own = given._replace(tensors=x, additional=more), [targets[i] for i in rows]
                if not is_difference:
                    yield rows, self._draw(some, own, settings)
                    continue
                alone = {**settings, "contrastive": False}
                ours = self._draw(some, [t.target for t in own if isinstance(t, Difference)], alone)
                others = self._draw(some, [t.against for t in own if isinstance(t, Difference)], alone)
                yield rows, tuple((a - b).clamp(min=0) for a, b in zip(ours, others, strict=True))

        return gathered(drawn(), len(targets))

    def _network(self, given: _Inputs, targets: list[Target]) -> tuple[ExplanationNetwork, dict[Target, int]]:
        """Build the network from the inputs to all outputs, flattened; also return the column of each target."""
        model = self.model
        (x, more) = rows_of(given.tensors, given.additional, torch.tensor([0], device="cpu"))
        ran = trace(model, model, (*x, *(more or ())), name="model")
        # Inputs anew for each pass, because a model may work in place.
        if self.before is not None:
            (x, more) = rows_of(given.tensors, given.additional, torch.tensor([0], device="cpu"))
            name, layer = find_layer(model, self.before)
            ran = ran._replace(spatial=trace(model, layer, (*x, *(more or ())), name=name).spatial)
        (x, more) = rows_of(given.tensors, given.additional, torch.tensor([0], device="cpu"))
        with torch.no_grad():
            y_hat = self._predicted(model(*x, *(more or ())))
        if any(isinstance(t, Difference) for t in targets):
            outputs, columns = ModelOutputs(_differences(y_hat, targets)), {t: i for i, t in enumerate(targets)}
        else:
            outputs = ModelOutputs()
            columns = {t: _column(y_hat.shape[1:], t) for t in targets}
        network = ExplanationNetwork(model, model, outputs, trace=ran, output_transform=self._in_a_row)
        return network, columns

    def _in_a_row(self, output: Any) -> Tensor:
        y_hat = self._predicted(output)
        return y_hat.reshape(len(y_hat), -1)

    def _predicted(self, output: Any) -> Tensor:
        y_hat = output if self.prediction_transform is None else self.prediction_transform(output)
        if not isinstance(y_hat, Tensor):
            raise TypeError(
                f"the model's output is a {type(y_hat).__name__} instead of one tensor; pass prediction_transform=, a "
                "function that picks or builds the tensor"
            )
        return y_hat


class _Inputs(NamedTuple):
    """The arguments of the model."""

    tensors: tuple[Tensor, ...]
    additional: tuple[Any, ...] | None
    batch_size: int | None


def _column(shape: torch.Size, target: Target) -> int:
    """Return the position of an output among all outputs, flattened."""
    return int(select(torch.arange(shape.numel(), device="cpu").reshape(1, *shape), target))


def _differences(y_hat: Tensor, targets: list[Target]) -> nn.Linear:
    """Make a linear layer from all outputs, flattened, to targets; every backend has a rule for linear layers."""
    size = y_hat[0].numel()
    layer = nn.Linear(size, len(targets), bias=False, dtype=y_hat.dtype, device=y_hat.device)
    layer.requires_grad_(False).weight.zero_()
    for row, target in zip(layer.weight, targets, strict=True):
        own = (target.target, target.against) if isinstance(target, Difference) else (target,)
        for t, sign in zip(own, (1, -1), strict=False):
            row[_column(y_hat.shape[1:], t)] += sign
    return layer
