r"""The 1-Heatmap: one map of the model's own output, drawn by the same backends as the maps of x-features.

The 1-Heatmap is the paper's baseline. It shows where the model looked, and does not divide this into x-features.

Conventions:
    N examples, C outputs of the model, K maps of each example; here K = 1.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from typing import Any, Literal

from captum.attr import Attribution
from torch import Tensor, nn

from captum_xnn.heatmaps._excitation_maps import ExcitationMaps
from captum_xnn.heatmaps._from_captum import as_heatmap
from captum_xnn.heatmaps._heatmap import DefaultMaps, Heatmap
from captum_xnn.heatmaps._output_maps import OutputMaps
from captum_xnn.layers._forward_args import log_usage
from captum_xnn.layers._lookup import unwrap
from captum_xnn.layers._read import OutputTransform

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
        >>> import torch
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
        backend = heatmap.of_networks if isinstance(heatmap, DefaultMaps) else heatmap
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
        return OutputMaps(unwrap(self.model), self.heatmap, self.prediction_transform, self.before).attribute(
            inputs,
            target,
            additional_forward_args,
            against=against,
            feature=feature,
            internal_batch_size=internal_batch_size,
            settings=heatmap_kwargs,
        )

    def attribute_future(self, *_args: Any, **_kwargs: Any) -> None:
        """Raise NotImplementedError, as Captum's classes without futures do."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")
