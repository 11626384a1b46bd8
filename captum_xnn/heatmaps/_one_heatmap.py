r"""The 1-Heatmap: one map of the model's own output, drawn by the same backends as the maps of x-features.

The 1-Heatmap is the paper's baseline. It shows where the model looked, and does not divide this into x-features.

Conventions:
    N examples, C outputs of the model, K maps of each example; here K = 1.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_xnn.heatmaps._excitation_maps import ExcitationMaps
from captum_xnn.heatmaps._feature_maps import Part, draw
from captum_xnn.heatmaps._from_captum import as_heatmap
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.heatmaps._layouts import in_shape_of
from captum_xnn.heatmaps._network import ExplanationNetwork, Outputs
from captum_xnn.layers._arguments import batch_size, copied, like, refuse_too_many
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._forward_args import log_usage
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._read import OutputTransform
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Difference, Target, grouped, per_example, select
from captum_xnn.layers._trace import trace

if TYPE_CHECKING:  # the default backends stand above this module
    from captum_xnn.heatmaps._defaults import DefaultMaps

__all__ = ["OneHeatmap"]


class OneHeatmap(Attribution):  # type: ignore[misc]
    """Attribution maps of the model's own outputs, by any heatmap backend: the baseline of XNNAttribution.

    Args:
        model: Any trained module that runs as Python code. It stays unchanged.
        heatmap: A Captum class, a backend such as ``FromCaptum(DeepLift, baselines=...)``, or the ``heatmap`` of an
            XNNAttribution. Contrastive excitation backprop by default.
        prediction_transform: Turns the model's raw output, such as a tuple or dict, into one tensor.
        before: A layer, by name or as a module. A backend that chooses the layer of maps itself then takes the last
            one before it, as for x-features at this layer. The default is the last one of the model.

    Raises:
        TypeError: If the model is not a module, or is scripted.

    Example:
        >>> from captum.attr import Saliency
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 6)
        >>> maps = OneHeatmap(model, Saliency).attribute(x, target=2)
        >>> maps.shape, torch.allclose(maps[:, 0], Saliency(model).attribute(x.requires_grad_(), target=2))
        (torch.Size([4, 1, 6]), True)

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2.
    """

    def __init__(
        self,
        model: nn.Module,
        heatmap: type[Attribution] | Heatmap | DefaultMaps | None = None,
        *,
        prediction_transform: OutputTransform | None = None,
        before: str | nn.Module | None = None,
    ) -> None:
        unwrap(model)
        Attribution.__init__(self, model)
        self.model = model
        backend: Any = getattr(heatmap, "of_networks", heatmap)  # the one of an attribution's default backends
        self.heatmap = ExcitationMaps() if backend is None else as_heatmap(backend)
        self.prediction_transform = prediction_transform
        self.before = before

    @classmethod
    def get_name(cls) -> str:
        """Return the name that progress bars show."""
        return "1-Heatmap"

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        against: Any = None,
        feature: Literal[0] | None = None,
        internal_batch_size: int | None = None,
        **heatmap_kwargs: Any,
    ) -> Any:
        """Draw one attribution map of each example.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: The output to explain: one for all examples, or one for each, as in Captum.
            additional_forward_args: Further positional arguments of the model; they get no attribution.
            against: The output that is subtracted, for all examples or for each: the map shows why the target rather
                than this output.
            feature: 0 for maps in exactly the input's shape.
            internal_batch_size: Number of maps computed at once; smaller values need less memory.
            heatmap_kwargs: Settings for this call of the heatmap backend, such as ``n_steps=64``.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:

            - **attributions**: (N, 1, ...) for each input, as :meth:`captum_xnn.XNNAttribution.attribute` gives for one
              x-feature, or exactly the input's shape with ``feature=0``. ExcitationMaps shows the evidence for the
              output, even if the output is below 0.

        Raises:
            ValueError: If a target is out of range, or missing where the model has several outputs.
        """
        refuse_too_many(unwrap(self.model), inputs, "join them, torch.cat(batches)")
        internal_batch_size = batch_size(internal_batch_size)
        tensors, additional = copied(inputs, additional_forward_args)
        targets, model = per_example(target, len(tensors[0]), against), unwrap(self.model)
        with torch.inference_mode(False), untouched(model):
            draw_maps = self._winners if isinstance(self.heatmap, ExcitationMaps) else self._drawn
            maps = draw_maps(_Inputs(model, tensors, additional, internal_batch_size), targets, heatmap_kwargs)
        return like(inputs, maps if feature is None else in_shape_of(tensors, maps))

    def attribute_future(self, *_args: Any, **_kwargs: Any) -> None:
        """Raise NotImplementedError, as Captum's classes without futures do."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _drawn(self, given: _Inputs, targets: list[Target], settings: dict[str, Any]) -> tuple[Tensor, ...]:
        """Draw the map of each example's target."""
        network, columns = self._network(given, list(dict.fromkeys(targets)))
        parts = [Part(self.heatmap, network, [columns[t]], rows) for t, rows in grouped(targets)]
        return draw(parts, given.tensors, given.additional, given.batch_size, settings)

    def _winners(self, given: _Inputs, targets: list[Target], settings: dict[str, Any]) -> tuple[Tensor, ...]:
        """Draw by excitation backprop. A difference has the winners of one output in contrast to those of the other.

        Excitation backprop follows evidence for one output, whatever its sign. So a difference is that of two maps
        without the contrast to all other outputs, where it is positive.
        """

        def drawn() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
            for two, rows in grouped(isinstance(t, Difference) for t in targets):
                x, more = rows_of(given.tensors, given.additional, torch.tensor(rows))
                some, own = given._replace(tensors=x, additional=more), [targets[i] for i in rows]
                if not two:
                    yield rows, self._drawn(some, own, settings)
                    continue
                alone = {**settings, "contrastive": False}
                ours = self._drawn(some, [t.target for t in own if isinstance(t, Difference)], alone)
                others = self._drawn(some, [t.against for t in own if isinstance(t, Difference)], alone)
                yield rows, tuple((a - b).clamp(min=0) for a, b in zip(ours, others, strict=True))

        return gathered(drawn(), len(targets))

    def _network(self, given: _Inputs, targets: list[Target]) -> tuple[ExplanationNetwork, dict[Target, int]]:
        """Build the network from the inputs to all outputs, flattened; also return the column of each target."""
        model = given.model
        (x, more) = rows_of(given.tensors, given.additional, torch.tensor([0]))
        ran = trace(model, model, (*x, *(more or ())), name="model")
        # Inputs anew for each pass, because a model may work in place.
        if self.before is not None:
            (x, more) = rows_of(given.tensors, given.additional, torch.tensor([0]))
            name, layer = find_layer(model, self.before)
            ran = ran._replace(spatial=trace(model, layer, (*x, *(more or ())), name=name).spatial)
        (x, more) = rows_of(given.tensors, given.additional, torch.tensor([0]))
        with torch.no_grad():
            y_hat = self._predicted(model(*x, *(more or ())))
        if any(isinstance(t, Difference) for t in targets):
            outputs, columns = Outputs(_differences(y_hat, targets)), {t: i for i, t in enumerate(targets)}
        else:
            outputs = Outputs()
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
    """The model and its arguments."""

    model: nn.Module
    tensors: tuple[Tensor, ...]
    additional: tuple[Any, ...] | None
    batch_size: int | None


def _column(shape: torch.Size, target: Target) -> int:
    """Return the position of an output among all outputs, flattened."""
    return int(select(torch.arange(shape.numel()).reshape(1, *shape), target))


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
