r"""Groups of contributions as a module from the model's inputs to x-features, for heatmap backends.

Per example an x-feature is a linear read-out of the layer's output, :math:`E_k = \sum_d a_{dk} G_d (Z_d - Z_{0,d})`.
What the slopes G are depends on what a backend does with the network:

- ``"gradient"``: backends that take gradients (input x gradient, integrated gradients, Grad-CAM, ...) get the model's
  own gradient where they stand. The maps of all x-features then sum to the map that the same backend gives the model's
  output, place by place, as long as nothing crosses the layer.
- ``"held"``: backends that need a network of known modules (excitation backprop, DeepLift, LRP, guided methods) get the
  slopes of the example's path integral, and keep them for its baseline.
- ``"recomputed"``: backends that replace parts of the input (occlusion, ablation, Shapley values) get the x-feature of
  the changed input itself, by a path integral of its own.

Conventions:
    N examples, K x-features. The slopes are the last argument of the forward pass, with a row for each example.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn

from captum_xnn._targets import Target
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._tail import Tail
from captum_xnn.models._contribution_groups import ContributionGroups

__all__ = ["ContributionNetwork", "ReadOut", "Slopes"]

Slopes = Literal["gradient", "held", "recomputed"]


class ContributionNetwork(ExplanationNetwork):
    """A module from the model's inputs, and slopes of each example, to the x-features (N, K).

    Args:
        form: Groups of contributions.
        tail: The model's rest behind the explained layer.
        target: The explained output.
        options: Further arguments of :class:`~captum_xnn.heatmaps._network.ExplanationNetwork`.
    """

    form: ContributionGroups
    tail: Tail
    xnn_encoder: ReadOut

    def __init__(self, form: ContributionGroups, tail: Tail, target: Target, **options: Any) -> None:
        super().__init__(tail.model, tail.layer, form, output_transform=tail.output_transform, **options)
        # Past the registry, where Captum's methods would meet them.
        object.__setattr__(self, "form", form)
        object.__setattr__(self, "tail", tail)
        self.target = target
        self.slopes: Slopes = "held"

    def _encoder(self, xnn: Any) -> ReadOut:
        return ReadOut(xnn)

    def hold(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the model's own arguments, after handing the slopes to the read-out.

        Args:
            inputs: All positional arguments of the model, then slopes (N, ...Z).
        """
        self.xnn_encoder.slopes = inputs[-1]
        return inputs[:-1]

    def forward(self, *inputs: Any) -> Tensor:
        """Return the x-features, (N, K).

        Args:
            inputs: All positional arguments of the model, then slopes (N, ...Z).
        """
        given = self.hold(inputs)
        if self.slopes == "recomputed":
            return self._recomputed(given)
        if self.slopes == "gradient":  # first, as Captum's hooks keep what the last run gave
            self.xnn_encoder.slopes = self._gradient(given)
        Z = self.activations(*given)
        return self.xnn_encoder(Z)  # type: ignore[no-any-return]

    def _gradient(self, given: tuple[Any, ...]) -> Tensor:
        """Return the gradient of the output at the layer's own output, (N, ...)."""
        inputs, additional = _divided(given)
        one, targets = torch.ones(1, dtype=torch.float32), [[self.target] * len(inputs[0])]
        return self.tail.along(inputs, additional, self.form.base, one, one, targets).gradient[0]

    def _recomputed(self, given: tuple[Any, ...]) -> Tensor:
        inputs, additional = _divided(given)
        made = self.form.integral(self.tail, inputs, additional, [[self.target] * len(inputs[0])], scale=self.scale)
        return self.form.features(self.form.contributions(made)[0])

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the output, (1,)."""
        return self.form.scale.amin(0, keepdim=True)


class ReadOut(nn.Module):
    """Linear read-out of a layer, with slopes of each example that are handed to it before it is called.

    Args:
        form: Groups of contributions.
    """

    form: ContributionGroups
    linear = True
    """Whether it is linear in its input, but for a constant."""

    def __init__(self, form: ContributionGroups) -> None:
        super().__init__()
        object.__setattr__(self, "form", form)
        self.slopes: Tensor | None = None
        self.rule = EpsilonRule()  # of LRP

    def forward(self, Z: Tensor) -> Tensor:
        """Return the x-features, (N, K).

        Args:
            Z: The layer's output, (N, ...).
        """
        assert self.slopes is not None
        with torch.autocast(Z.device.type, enabled=False):
            return self.form.read_out(Z, self.slopes)


def _divided(given: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return the leading tensors with a row for each example, cut off from their graph, and what follows."""
    n = len(given[0])
    many = 1
    while many < len(given) and isinstance(given[many], Tensor) and given[many].dim() and len(given[many]) == n:
        many += 1
    return tuple(x.detach() for x in given[:many]), given[many:]
