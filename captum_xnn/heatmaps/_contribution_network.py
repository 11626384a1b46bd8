r"""Groups of contributions as a module from the model's inputs to x-features, for heatmap backends.

An x-feature is a linear read-out of the layer's output, :math:`E_k = \sum_d a_{dk} G_d (Z_d - Z_{0,d})`, with slopes G
of each example. The slopes G depend on the kind of backend:

- ``"gradient"``: backends that take gradients (input x gradient, integrated gradients, Grad-CAM, ...) get the model's
  own gradient at the input that they run. At every place, the maps of all x-features then sum to the map that the same
  backend gives the model's output, as long as no path bypasses the layer.
- ``"held"``: backends that need a network of known modules (excitation backprop, DeepLift, LRP, guided methods) get the
  slopes of the example's path integral. The same slopes serve for the example's baseline.
- ``"recomputed"``: backends that replace parts of the input (occlusion, ablation, Shapley values) get the x-feature of
  the changed input, computed by its own path integral.

Conventions:
    N examples, K x-features. The slopes are the last argument of the forward pass, with a row for each example.
"""

from __future__ import annotations

from typing import Any

import torch
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn

from captum_xnn.heatmaps._network import ExplanationNetwork, Slopes
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._targets import Target
from captum_xnn.models._contribution_groups import ContributionGroups

__all__ = ["ContributionNetwork", "ReadOut"]


class ContributionNetwork(ExplanationNetwork):
    """A module from the model's inputs, and slopes of each example, to the x-features (N, K).

    Args:
        form: Groups of contributions.
        tail: The rest of the model behind the explained layer.
        target: The explained output.
        options: Further arguments of :class:`~captum_xnn.heatmaps._network.ExplanationNetwork`.
    """

    form: ContributionGroups
    tail: Tail
    xnn_encoder: ReadOut
    runs_past_layer = True

    def __init__(self, form: ContributionGroups, tail: Tail, target: Target, **options: Any) -> None:
        super().__init__(tail.model, tail.layer, form, output_transform=tail.output_transform, **options)
        # Assign outside of the registry of submodules, because Captum's methods walk it.
        object.__setattr__(self, "form", form)
        object.__setattr__(self, "tail", tail)
        self.target = target
        self.slopes: Slopes = "held"
        self.taken: Any = None
        """A :class:`~captum_xnn.heatmaps._one_pass.Pass` over all examples whose maps are drawn, if one was taken."""

    def _encoder(self, xnn: Any) -> ReadOut:
        return ReadOut(xnn)

    def hold(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the slopes to the read-out, and return the arguments of the model.

        Args:
            inputs: All positional arguments of the model, then slopes (N, ...Z).
        """
        self.xnn_encoder.slopes = inputs[-1]
        return inputs[:-1]

    def use_slopes(self, slopes: Slopes) -> None:
        """Choose the slopes of contributions.

        Args:
            slopes: One of the three kinds in the docstring of the module.
        """
        self.slopes = slopes

    def forward(self, *inputs: Any) -> Tensor:
        """Compute the x-features, (N, K).

        Args:
            inputs: All positional arguments of the model, then slopes (N, ...Z).
        """
        given = self.hold(inputs)
        if self.slopes == "recomputed":
            return self._recomputed(given)
        if self.slopes == "gradient":  # before the run that Captum's hooks watch
            self.xnn_encoder.slopes = self._gradient(given)
        Z = self.activations(*given)
        return self.xnn_encoder(Z)  # type: ignore[no-any-return]

    def _gradient(self, given: tuple[Any, ...]) -> Tensor:
        """Compute the gradient of the model's output at the layer's output, (N, ...)."""
        inputs, additional = _divided(given)
        one, targets = torch.ones(1, dtype=torch.float32), [[self.target] * len(inputs[0])]
        return self.tail.along(inputs, additional, self.form.base, one, one, targets).gradient[0]

    def _recomputed(self, given: tuple[Any, ...]) -> Tensor:
        """Compute the x-features of inputs, by a path integral of each input."""
        inputs, additional = _divided(given)
        made = self.form.integral(self.tail, inputs, additional, [[self.target] * len(inputs[0])], scale=self.scale)
        return self.form.features(self.form.contributions(made)[0])

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the output, (1,)."""
        return self.form.scale.amin(0, keepdim=True)


class ReadOut(nn.Module):
    """Linear read-out of a layer. The slopes of each example are set before the call.

    Args:
        form: Groups of contributions.
    """

    form: ContributionGroups
    linear = True
    """Whether the module is linear in its input, up to a constant."""

    def __init__(self, form: ContributionGroups) -> None:
        super().__init__()
        object.__setattr__(self, "form", form)
        self.slopes: Tensor | None = None
        self.rule = EpsilonRule()  # read by LRP

    def forward(self, Z: Tensor) -> Tensor:
        """Compute the x-features, (N, K).

        Args:
            Z: The layer's output, (N, ...).
        """
        assert self.slopes is not None
        with torch.autocast(Z.device.type, enabled=False):
            return self.form.read_out(Z, self.slopes)


def _divided(given: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Divide arguments into leading tensors with a row for each example, detached, and the rest."""
    n = len(given[0])
    many = 1
    while many < len(given) and isinstance(given[many], Tensor) and given[many].dim() and len(given[many]) == n:
        many += 1
    return tuple(x.detach() for x in given[:many]), given[many:]
