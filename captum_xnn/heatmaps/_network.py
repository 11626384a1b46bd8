r"""The explained model up to a layer, continued by an explanation network: inputs -> Z -> x-features.

An x-feature is an output neuron of this module, so every class of Captum explains it with ``target=k``.

Captum 0.9 gives right maps only if the module keeps these rules:
    ``forward`` registers the hook that reads the layer, and an exception at the layer's last call ends the model's run.
    The module registry holds only the leaf modules that run, once each, and the encoder; the model itself stays outside
    of it. The output is one tensor (N, n).

For groups of contributions, an x-feature is a linear read-out of the layer's output,
:math:`E_k = \sum_d a_{dk} G_d (Z_d - Z_{0,d})`, with slopes G of each example. They depend on the kind of backend:

- ``"gradient"``: backends that take gradients (input x gradient, integrated gradients, Grad-CAM, ...) get the model's
  own gradient at the input that they run. At every place, the maps of all x-features then sum to the map that the same
  backend gives the model's output, as long as no path bypasses the layer.
- ``"held"``: backends that need a network of known modules (excitation backprop, DeepLift, LRP, guided methods) get the
  slopes of the example's path integral. The same slopes serve for the example's baseline.
- ``"recomputed"``: backends that replace parts of the input (occlusion, ablation, Shapley values) get the x-feature of
  the changed input, computed by its own path integral.

Conventions:
    N examples, n or K x-features. Networks of groups take the slopes as the last argument of their forward pass, with a
    row for each example.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._hooks import hooked
from captum_xnn.layers._lookup import find_layer, hookable, quantised, unwrap
from captum_xnn.layers._read import OutputTransform, WithGraph, read_with_graph, run_to_layer
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Target

if TYPE_CHECKING:  # a network gets its form, the model's rest and a trace, and makes none
    from captum_xnn.layers._tail import Tail
    from captum_xnn.layers._trace import Trace
    from captum_xnn.models._base import Autoencoder
    from captum_xnn.models._contribution_groups import ContributionGroups

__all__ = [
    "ContributionNetwork",
    "ExplanationNetwork",
    "ModelOutputs",
    "ReadOut",
    "Slopes",
    "cut_off",
    "with_every_input",
]

Slopes = Literal["gradient", "held", "recomputed"]
"""How groups of contributions get their slopes, see the head of this module."""


class ExplanationNetwork(nn.Module):
    """A module from the model's inputs to the x-features, shape (N, n).

    Args:
        model: The explained model. Its weights are used as they are, not copied.
        layer: The explained layer, by dotted name or as a module.
        xnn: The explanation network on that layer, usually a fitted :class:`~captum_xnn.models.SRAE`.
        trace: The modules that the model executes, from :func:`captum_xnn.layers._trace.trace`. Without a trace the
            network assumes one call of the layer and registers no leaf modules, so LRP, DeepLift and guided methods
            cannot be used.
        output_transform: Turns the layer's raw output into one tensor (N, ...).

    Raises:
        LayerNotFoundError: If the model does not have the layer.

    Example:
        >>> import torch
        >>> from captum_xnn.models._srae import SRAE
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> ExplanationNetwork(model, "1", SRAE(8, n_features=2, hidden=()))(torch.rand(6, 4)).shape
        torch.Size([6, 2])

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 2.1, Fig. 1(b).
    """

    model: nn.Module
    layer: nn.Module
    centred: bool
    """Whether a value below 0 means the opposite of a value above 0: true for x-features, false for logits."""
    readings: list[WithGraph] | None
    """If it is a list, every pass is appended to it, and the model runs to its output. The layer must return one tensor
    and run once."""
    runs_past_layer = False
    """Whether a pass always runs the whole model."""

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module,
        xnn: Any,
        *,
        trace: Trace | None = None,
        output_transform: OutputTransform | None = None,
    ) -> None:
        super().__init__()
        model = unwrap(model)
        self.layer_name, module = find_layer(model, layer)
        # Past the registry: Captum's methods walk registered modules and must see each executed module exactly once.
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "layer", module)
        self.calls = trace.calls if trace else 1
        self.spatial_layer_name = find_layer(model, trace.spatial)[0] if trace and trace.spatial else None
        self.executed = nn.ModuleList(trace.leaves if trace else ())
        self.ran = trace.ran if trace else frozenset()
        self.centred = not isinstance(xnn, ModelOutputs)
        # Plain outputs have no encoder module, because Captum would look for a rule of that module.
        self.xnn_encoder: Callable[[Tensor], Tensor] = (
            xnn.encode if isinstance(xnn, ModelOutputs) else self._encoder(xnn)
        )
        self.output_transform = output_transform
        self.readings = None
        self.training = False

    def _encoder(self, xnn: Any) -> Callable[[Tensor], Tensor]:
        return _Encoder(xnn)

    def activations(self, *inputs: Any) -> Tensor:
        """Compute the layer's output Z, (N, ...), with its graph.

        Args:
            inputs: All positional arguments of the model.
        """
        if self.readings is not None:
            self.readings.append(read_with_graph(self.model, self.layer, inputs, name=self.layer_name))
            return self.readings[-1].Z
        return run_to_layer(
            self.model,
            self.layer,
            inputs,
            calls=self.calls,
            name=self.layer_name,
            output_transform=self.output_transform,
        )

    def hold(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Keep the arguments that belong to this network, and return those of the model.

        Args:
            inputs: All positional arguments of this network.
        """
        return inputs

    def use_slopes(self, slopes: Slopes) -> None:
        """Choose the slopes of contributions. Networks without contributions ignore the choice.

        Args:
            slopes: The slopes that suit the backend at work.
        """

    def forward(self, *inputs: Any) -> Tensor:
        """Compute the x-features, (N, n).

        Args:
            inputs: All positional arguments of the model.
        """
        return self.xnn_encoder(with_every_input(self.activations(*inputs), inputs))


class ModelOutputs:
    """Takes the place of an explanation network when the model's own outputs are drawn, or sums of them.

    Args:
        weighted: Turns the outputs (N, C) into weighted sums; None draws the outputs themselves.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> x = torch.rand(6, 4)
        >>> torch.equal(ExplanationNetwork(model, model, ModelOutputs())(x), model(x))
        True
    """

    def __init__(self, weighted: nn.Linear | None = None) -> None:
        self.encode: Callable[[Tensor], Tensor] = _unchanged if weighted is None else weighted


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
        self.graph_pass: Any = None
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
        Z = with_every_input(self.activations(*given), given)
        return self.xnn_encoder(Z)  # type: ignore[no-any-return]

    def _gradient(self, given: tuple[Any, ...]) -> Tensor:
        """Compute the gradient of the model's output at the layer's output, (N, ...)."""
        inputs, additional = _divided(given)
        one, targets = torch.ones(1, dtype=torch.float32, device="cpu"), [[self.target] * len(inputs[0])]
        return self.tail.along(inputs, additional, self.form.base, one, one, targets).gradient[0]

    def _recomputed(self, given: tuple[Any, ...]) -> Tensor:
        """Compute the x-features of inputs, by a path integral of each input."""
        inputs, additional = _divided(given)
        integral = self.form.integral(self.tail, inputs, additional, [[self.target] * len(inputs[0])], scale=self.scale)
        return self.form.features(self.form.contributions(integral)[0])

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


def cut_off(network: ExplanationNetwork, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None) -> str | None:
    """Explain why no gradient of the explained layer reaches the inputs; return None if one does, even if it is 0.

    Args:
        network: From the model's inputs to its x-features.
        inputs: Tensors (N, ...). The result is None without floating-point inputs.
        additional: Further arguments of the network.
    """
    (x, more) = rows_of(inputs, additional, torch.tensor([0], device="cpu"))
    given = tuple(a.detach().clone() for a in x)
    leaves = [a for a in given if a.is_floating_point()]
    carrying: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            carrying.append(module)

    with untouched(network.model), torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for p in network.model.parameters():
            p.requires_grad_(False)
        for leaf in leaves:
            leaf.requires_grad_()
        with hooked(hookable(network.model), note):
            Z = network.activations(*network.hold((*given, *(more or ()))))
            found = torch.autograd.grad(Z.sum(), leaves, allow_unused=True) if leaves and Z.requires_grad else ()
    if not leaves or any(g is not None for g in found):
        return None
    instead = "draw with a method that replaces inputs, as FromCaptum(FeatureAblation)"
    if names := quantised(network.model):
        return (
            f"no gradient reaches the inputs from layer {network.layer_name!r}: {names[0]!r} is quantised, and "
            f"quantised layers have no gradient; explain the float model that was quantised, or {instead}"
        )
    names = [name for name, module in network.model.named_modules() if carrying and module is carrying[-1]]
    return (
        f"no gradient reaches the inputs from layer {network.layer_name!r}: it is cut off "
        f"{f'behind {names[0]!r}' if names else 'at the inputs'}; remove torch.no_grad, detach or numpy there, or "
        f"{instead}"
    )


def with_every_input(Z: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """Add a zero of every input to Z, so that inputs that join the model behind the layer have a gradient, of zero.

    Args:
        Z: The layer's output, (N, ...).
        inputs: All positional arguments of the model.

    Example:
        >>> x, table = torch.ones(2, 3, requires_grad=True), torch.ones(2, 4, requires_grad=True)
        >>> torch.autograd.grad(with_every_input(2 * x, (x, table)).sum(), (x, table))[1].abs().sum()
        tensor(0.)
    """
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if len(leaves) > 1 and Z.requires_grad:
        for x in leaves:
            Z = Z + x.reshape(-1)[:0].sum().to(Z)
    return Z


def _divided(given: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Divide arguments into leading tensors with a row for each example, detached, and the rest."""
    n = len(given[0])
    many = 1
    while many < len(given) and isinstance(given[many], Tensor) and given[many].dim() and len(given[many]) == n:
        many += 1
    return tuple(x.detach() for x in given[:many]), given[many:]


def _unchanged(Z: Tensor) -> Tensor:
    return Z


class _Encoder(nn.Module):
    """The encoder of an autoencoder, without decoder and head, as both never run here."""

    xnn: Autoencoder

    def __init__(self, xnn: Autoencoder) -> None:
        super().__init__()
        object.__setattr__(self, "xnn", xnn)
        self.layers = nn.ModuleList(m for name, m in xnn.named_children() if name not in ("decoder", "head"))

    def forward(self, Z: Tensor) -> Tensor:
        weight = next(self.parameters())
        with torch.autocast(Z.device.type, enabled=False):
            return self.xnn.encode(Z.to(weight.dtype))
