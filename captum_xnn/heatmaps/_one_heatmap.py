r"""The 1-Heatmap: one map of the model's own output, drawn by the same backends as the maps of x-features.

The 1-Heatmap is the paper's baseline. It shows where the model looked, and does not divide this into x-features.

Conventions:
    N examples, C outputs of the model, K maps of each example; here K = 1.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_xnn._targets import Target, grouped, per_example, select
from captum_xnn.heatmaps._batching import Part, copied, draw, in_shape_of, like
from captum_xnn.heatmaps._default_maps import as_heatmap
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.heatmaps._network import ExplanationNetwork, Outputs
from captum_xnn.layers._arguments import refuse_too_many
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._forward_args import log_usage
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._read import OutputTransform
from captum_xnn.layers._state import untouched
from captum_xnn.layers._trace import trace

__all__ = ["OneHeatmap"]


class OneHeatmap(Attribution):  # type: ignore[misc]
    """Attribution maps of the model's own outputs, by any heatmap backend: the baseline of XNNAttribution.

    Args:
        model: Any trained module that runs as Python code. It stays unchanged.
        heatmap: A Captum class, or a backend such as ``FromCaptum(DeepLift, baselines=...)``. Contrastive
            excitation backprop by default.
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
        heatmap: type[Attribution] | Heatmap | None = None,
        *,
        prediction_transform: OutputTransform | None = None,
        before: str | nn.Module | None = None,
    ) -> None:
        unwrap(model)
        Attribution.__init__(self, model)
        self.model = model
        self.heatmap = as_heatmap(heatmap)
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
        feature: Literal[0] | None = None,
        internal_batch_size: int | None = None,
        **heatmap_kwargs: Any,
    ) -> Any:
        """Draw one attribution map of each example.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: The output to explain, for all examples or for each, as everywhere in Captum.
            additional_forward_args: Further positional arguments of the model; they get no attribution.
            feature: 0 for maps in exactly the input's shape.
            internal_batch_size: Number of maps computed at once, to bound the memory.
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
        tensors, additional = copied(inputs, additional_forward_args)
        targets, model = per_example(target, len(tensors[0])), unwrap(self.model)
        with torch.inference_mode(False), untouched(model):
            network, shape = self._network(model, tensors, additional)
            parts = [Part(network, [_column(shape, t)], rows) for t, rows in grouped(targets)]
            maps = draw(self.heatmap, parts, tensors, additional, internal_batch_size, heatmap_kwargs)
        return like(inputs, maps if feature is None else in_shape_of(tensors, maps))

    def attribute_future(self, *_args: Any, **_kwargs: Any) -> None:
        """Raise NotImplementedError, as Captum's classes without futures do."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _network(
        self, model: nn.Module, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None
    ) -> tuple[ExplanationNetwork, torch.Size]:
        """Build the network from the inputs to all outputs, flattened; also return their shape for one example."""
        (x, more) = rows_of(inputs, additional, torch.tensor([0]))
        ran = trace(model, model, (*x, *(more or ())), name="model")
        if self.before is not None:
            (x, more) = rows_of(inputs, additional, torch.tensor([0]))  # again, because a model may work in place
            name, layer = find_layer(model, self.before)
            ran = ran._replace(spatial=trace(model, layer, (*x, *(more or ())), name=name).spatial)
        network = ExplanationNetwork(model, model, Outputs(), trace=ran, output_transform=self._in_a_row)
        (x, more) = rows_of(inputs, additional, torch.tensor([0]))  # again, because a model may work in place
        with torch.no_grad():
            return network, self._predicted(model(*x, *(more or ()))).shape[1:]

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


def _column(shape: torch.Size, target: Target) -> int:
    """Return the position of an output among all outputs, flattened."""
    return int(select(torch.arange(shape.numel()).reshape(1, *shape), target))
