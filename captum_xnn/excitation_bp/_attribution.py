r"""Excitation backprop as Captum's classes: to the inputs, to a layer, and from a neuron.

Excitation backprop asks which neurons, and in the end which pixels, make the target win. The target starts with
probability 1 and divides it among its children, the neurons it is computed from, in proportion to their excitatory
share: a positive activation times a positive weight. The children do the same, and so on. The probability of a neuron
is its *marginal winning probability* (MWP). At every layer that all paths cross, the MWPs sum to 1.

An MWP map shows the neurons that excite the target. Many of them excite every other output as well. The *contrastive*
MWP (c-MWP), the default, subtracts the MWP of the target's opposite, an output with the negative weights -W in the last
layer. c-MWP is positive where the evidence speaks for the target rather than against it, and sums to 0.

:mod:`captum_xnn.excitation_bp._rules` has the rule of each operation, and our choices where no rule is accepted. An
operation without a rule passes on its gradient. One warning names it; with ``strict`` an error does.

Conventions:
    N examples, K targets. Attributions are signed and have the shape of the inputs, or of the layer's output. For a
    map, sum over channels first. Then, for c-MWP, clamp at 0: ``attributions.sum(1, keepdim=True).clamp(min=0)``.

Reference:
    Zhang, Bargal, Lin, Brandt, Shen, Sclaroff, "Top-Down Neural Attention by Excitation Backprop", International
    Journal of Computer Vision, 2018.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from captum.attr import GradientAttribution, LayerAttribution, NeuronAttribution
from torch import Tensor, nn

from captum_xnn.excitation_bp._propagation import Stop, Winners, one_hot, propagate, refuse_scripted
from captum_xnn.excitation_bp._settings import SettingNames, Settings, takes_settings
from captum_xnn.layers._forward_args import format_forward_args, format_tensors, log_usage, select_neuron
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._read import not_reached

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ExcitationBP", "LayerExcitationBP", "NeuronExcitationBP", "total_mass"]


def total_mass(attributions: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Sum winning probabilities over all neurons, (N,). The sum is 1 for MWP and 0 for c-MWP if nothing is lost.

    Args:
        attributions: Result of ``attribute`` of a class in this module.

    Example:
        >>> total_mass(torch.tensor([[0.25, 0.75], [0.5, 0.25]]))
        tensor([1.0000, 0.7500])
    """
    parts = format_tensors(attributions)
    return torch.stack([p.unsqueeze(-1).flatten(1).sum(1) for p in parts]).sum(0)


class _Excitation(GradientAttribution):  # type: ignore[misc]
    """Base of the three classes: their settings, and one run of the model for all targets."""

    forward_func: Callable[..., Any]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = Settings().replaced(settings, owner=type(self).__name__)
        refuse_scripted(self.forward_func)

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: the probability of a neuron is its activation times a sum."""
        return True

    @classmethod
    def get_name(cls) -> str:
        """Return the name that progress bars show."""
        return cls.__name__.replace("ExcitationBP", " Excitation BP").strip()

    def has_convergence_delta(self) -> bool:
        """Return True: the convergence delta is the lost probability."""
        return True

    def attribute_future(self, *_args: Any, **_kwargs: Any) -> None:
        """Raise NotImplementedError, as Captum's classes without futures do."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def compute_convergence_delta(
        self, attributions: Tensor | tuple[Tensor, ...], *_args: Any, **_kwargs: Any
    ) -> Tensor:
        """Compute the lost probability, (N,): 1, or 0 if contrastive, minus the sum of the attributions.

        Args:
            attributions: Result of ``attribute``.
        """
        return (0 if self.settings.contrastive else 1) - total_mass(attributions)

    def _winners(
        self,
        inputs: Any,
        additional_forward_args: Any,
        prior: Callable[[Tensor], Tensor],
        *,
        forward: Callable[..., Any] | None = None,
        stop: Stop | None = None,
    ) -> tuple[Winners, tuple[Tensor, ...]]:
        """Compute the winning probabilities for a prior on the output; return them with their leaves."""
        given = format_forward_args(additional_forward_args) or ()
        module = unwrap(self.forward_func) if isinstance(self.forward_func, nn.Module) else None
        done, winners = propagate(
            forward or module or self.forward_func,
            format_tensors(inputs),
            given,
            self.settings,
            prior,
            module=module,
            stop=stop,
        )
        return winners, done.leaves


def _layer(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    """Find a layer by its name. A module need not be registered, as long as the model calls it."""
    plain = unwrap(model)  # refuses functions
    return unwrap(layer) if isinstance(layer, nn.Module) else find_layer(plain, layer)[1]


def _name(attribution: LayerExcitationBP | NeuronExcitationBP) -> str:
    """Return the dotted name of the layer, or its type if the layer is not registered."""
    model = unwrap(cast(nn.Module, attribution.forward_func))
    names = (name for name, module in model.named_modules() if module is attribution.layer)
    return next(names, type(attribution.layer).__name__)


def _one_hots(targets: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Return a function from the output to the priors (K, N, ...) of K targets."""
    return lambda output: torch.stack([one_hot(output, t) for t in targets])


def _formatted(winners: Winners, like: Sequence[Tensor], is_tuple: bool, k: int | None) -> Any:
    """Return attributions of target k, or of all targets along dimension 1, in the dtypes of their leaves."""
    p = (x[k] if k is not None else x.transpose(0, 1) for x in winners.p)
    parts = tuple(x.to(leaf.dtype).contiguous() for x, leaf in zip(p, like, strict=True))
    return parts if is_tuple else parts[0]


class ExcitationBP(_Excitation):
    r"""Excitation backprop to the inputs: signed winning probabilities of every pixel.

    Inputs have either sign. The setting ``negative`` says how they count: by default every positive product of an input
    and a weight, :math:`\max(a_j w_{ij}, 0)`. Maps at the pixels are grainy. The method's authors stop at a pooling
    layer and enlarge the map; use :class:`LayerExcitationBP` for that.

    Args:
        forward_func: The model, or any function of tensors.
        contrastive: Whether to subtract the probabilities of the target's opposite (c-MWP), or not (MWP).
        negative: How negative activations count: "excitatory", "clamp" or "raw". See
            :mod:`captum_xnn.excitation_bp._shares`.
        add: Whether residual branches share in proportion to their values ("signed") or to their positive parts
            ("excitatory").
        batch_norm: Whether a negative scale after an affine layer flips the sign of that layer's weights ("sign", as
            folding the batch norm into the layer does) or is ignored ("pass").
        strict: Whether an operation without a rule raises an error instead of a warning.

    Raises:
        TypeError: If the model, or a part of it, is scripted or traced, or a setting is unknown.
        ValueError: If a setting has an unknown value.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = model[0].weight.data.fill_(1), model[2].weight.data.fill_(1)
        >>> ExcitationBP(model, contrastive=False).attribute(torch.tensor([[1.0, 1.0, 2.0]]), target=0)
        tensor([[0.2500, 0.2500, 0.5000]])

    Reference:
        "Top-Down Neural Attention by Excitation Backprop", IJCV 2018.
    """

    @takes_settings
    def __init__(self, forward_func: Callable[..., Any], **settings: Unpack[SettingNames]) -> None:
        GradientAttribution.__init__(self, forward_func)
        _Excitation.__init__(self, settings)

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Compute the winning probabilities of the inputs.

        Args:
            inputs: A floating-point tensor (N, ...) or a tuple of them.
            target: The output that wins, for all examples or for each, as everywhere in Captum.
            additional_forward_args: Further positional arguments of the model; they get no share.
            return_convergence_delta: Whether to also return the lost probability.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, or 2-element tuple of **attributions**, **delta**:

            - **attributions**: in the shapes of the inputs, signed, detached.
            - **delta** (N,): 1, or 0 if contrastive, minus the sum of the attributions.

        Raises:
            UnsupportedOperationError: If an operation cannot be seen, or has no rule and ``strict`` is set.
            ValueError: If a target is out of range, or no layer has weights to contrast.
        """
        winners, leaves = self._winners(inputs, additional_forward_args, _one_hots([target]))
        attributions = _formatted(winners, leaves, isinstance(inputs, tuple), 0)
        return (attributions, winners.delta[0]) if return_convergence_delta else attributions

    def attribute_targets(
        self, inputs: Tensor | tuple[Tensor, ...], targets: Sequence[Any], additional_forward_args: Any = None
    ) -> Any:
        """Compute winning probabilities for K targets, (N, K, ...), in one forward and one batched backward pass.

        Args:
            inputs: A floating-point tensor (N, ...) or a tuple of them.
            targets: K targets, each as :meth:`attribute` takes it.
            additional_forward_args: Further positional arguments of the model; they get no share.

        Raises:
            UnsupportedOperationError: If an operation cannot be seen, or has no rule and ``strict`` is set.
            ValueError: If a target is out of range, or no layer has weights to contrast.

        Example:
            >>> x = torch.tensor([[1.0, 3.0]])
            >>> ebp = ExcitationBP(nn.Linear(2, 2).requires_grad_(False), contrastive=False)
            >>> _ = ebp.forward_func.weight.copy_(torch.eye(2))
            >>> ebp.attribute_targets(x, [0, 1])
            tensor([[[1., 0.],
                     [0., 1.]]])
        """
        winners, leaves = self._winners(inputs, additional_forward_args, _one_hots(targets))
        return _formatted(winners, leaves, isinstance(inputs, tuple), None)


class LayerExcitationBP(LayerAttribution, _Excitation):  # type: ignore[misc]
    r"""Excitation backprop to a layer: signed winning probabilities of every neuron in it.

    Stop where activations are not negative, after a ReLU, or after a pooling of its output. There the formula holds as
    it stands, and the setting ``negative`` does not matter. The method's authors take the 14 x 14 maps of VGG16's last
    pooling layer but one, or of ResNet-50's third stage, sum over channels, and enlarge.

    In a layer that runs several times, probability stops at the last call. The probabilities of a layer in a branch of
    the model sum to the share of that branch.

    Args:
        forward_func: The model.
        layer: The layer, by dotted name or as a module. Pass None to set the object's ``layer`` later, as Captum's
            ``TCAV`` does.
        device_ids: As in Captum; not needed.
        settings: The settings of :class:`ExcitationBP`.

    Raises:
        LayerNotFoundError: If the model does not have the layer.
        TypeError: If the model is not a module, or a part of it is scripted or traced, or a setting is unknown.
        ValueError: If a setting has an unknown value.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
        ...                       nn.Linear(4 * 4 * 4, 10))
        >>> P = LayerExcitationBP(model, "1", contrastive=False).attribute(torch.rand(2, 1, 8, 8), target=3)
        >>> P.shape, bool(((total_mass(P) - 1).abs() < 1e-5).all())
        (torch.Size([2, 4, 6, 6]), True)

    Reference:
        "Top-Down Neural Attention by Excitation Backprop", IJCV 2018.
    """

    layer: nn.Module | None

    @takes_settings
    def __init__(
        self,
        forward_func: nn.Module,
        layer: str | nn.Module | None,
        device_ids: list[int] | None = None,
        **settings: Unpack[SettingNames],
    ) -> None:
        module = None if layer is None else _layer(forward_func, layer)
        LayerAttribution.__init__(self, forward_func, module, device_ids)
        _Excitation.__init__(self, settings)

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Compute the winning probabilities of the layer's output.

        Args:
            inputs: A tensor (N, ...) or a tuple of them, of any dtype.
            target: The output that wins, for all examples or for each, as everywhere in Captum.
            additional_forward_args: Further positional arguments of the model; they get no share.
            attribute_to_layer_input: Whether to stop at the layer's input instead.
            return_convergence_delta: Whether to also return the lost probability.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, or 2-element tuple of **attributions**, **delta**:

            - **attributions**: in the shape of the layer's output; a tuple if the layer returns several tensors.
            - **delta** (N,): 1, or 0 if contrastive, minus the sum of the attributions. For a layer in a branch, this
              includes the share of the other branches.

        Raises:
            LayerNotReachedError: If the forward pass never calls the layer.
            UnsupportedOperationError: If an operation cannot be seen, or has no rule and ``strict`` is set.
            ValueError: If a target is out of range, the target does not depend on the layer, no layer has weights to
                contrast, or ``layer`` is None.
        """
        stop = self._stop(attribute_to_layer_input)
        winners, leaves = self._winners(inputs, additional_forward_args, _one_hots([target]), stop=stop)
        attributions = _formatted(winners, leaves, len(leaves) > 1, 0)
        return (attributions, winners.delta[0]) if return_convergence_delta else attributions

    def attribute_targets(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Sequence[Any],
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Compute winning probabilities for K targets, (N, K, ...), in one forward and one batched backward pass.

        Args:
            inputs: A tensor (N, ...) or a tuple of them, of any dtype.
            targets: K targets, each as :meth:`attribute` takes it.
            additional_forward_args: Further positional arguments of the model; they get no share.
            attribute_to_layer_input: Whether to stop at the layer's input instead.

        Raises:
            LayerNotReachedError: If the forward pass never calls the layer.
            UnsupportedOperationError: If an operation cannot be seen, or has no rule and ``strict`` is set.
            ValueError: If a target is out of range, the target does not depend on the layer, no layer has weights to
                contrast, or ``layer`` is None.
        """
        stop = self._stop(attribute_to_layer_input)
        winners, leaves = self._winners(inputs, additional_forward_args, _one_hots(targets), stop=stop)
        return _formatted(winners, leaves, len(leaves) > 1, None)

    def _stop(self, at_input: bool) -> Stop:
        if self.layer is None:
            raise ValueError("the layer to stop at is None; set the object's layer to a module of the model")
        return Stop(self.layer, _name(self), at_input)


class NeuronExcitationBP(NeuronAttribution, _Excitation):  # type: ignore[misc]
    """Excitation backprop from a neuron of a layer to the inputs: the pixels that make this neuron win.

    Args:
        forward_func: The model.
        layer: The neuron's layer, by dotted name or as a module.
        device_ids: As in Captum; not needed.
        settings: The settings of :class:`ExcitationBP`. For ``contrastive``, the last layer is the last layer with
            weights up to the neuron.

    Raises:
        LayerNotFoundError: If the model does not have the layer.
        TypeError: If the model is not a module, or a part of it is scripted or traced, or a setting is unknown.
        ValueError: If a setting has an unknown value.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10))
        >>> neuron = NeuronExcitationBP(model, "0", contrastive=False)
        >>> P = neuron.attribute(torch.rand(2, 1, 8, 8), (3, 0, 0))
        >>> bool((P[:, :, 3:] == 0).all())  # outside its receptive field
        True

    Reference:
        "Top-Down Neural Attention by Excitation Backprop", IJCV 2018.
    """

    layer: nn.Module

    @takes_settings
    def __init__(
        self,
        forward_func: nn.Module,
        layer: str | nn.Module,
        device_ids: list[int] | None = None,
        **settings: Unpack[SettingNames],
    ) -> None:
        NeuronAttribution.__init__(self, forward_func, _layer(forward_func, layer), device_ids)
        _Excitation.__init__(self, settings)

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: Any,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """Compute the winning probabilities of the inputs, given that the neuron wins.

        Args:
            inputs: A floating-point tensor (N, ...) or a tuple of them.
            neuron_selector: As in Captum: an int, a tuple of ints and slices that indexes the layer's output after the
                batch, or a function of that output that returns one number for each example. Several neurons divide
                the probability 1 equally.
            additional_forward_args: Further positional arguments of the model; they get no share.
            attribute_to_neuron_input: Whether the neuron belongs to the layer's input instead of its output.

        Raises:
            LayerNotReachedError: If the forward pass never calls the layer.
            UnsupportedOperationError: If an operation cannot be seen, or has no rule and ``strict`` is set.
            ValueError: If no layer has weights to contrast.
        """

        def prior(output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            with torch.enable_grad():
                chosen = select_neuron((leaf,), neuron_selector)
            p = torch.autograd.grad(chosen.sum(), leaf)[0]
            total = p.unsqueeze(-1).flatten(1).sum(1).reshape(-1, *[1] * (p.dim() - 1))
            return (p / total)[None]

        model = unwrap(cast(nn.Module, self.forward_func))
        forward = _reader(model, self.layer, _name(self), attribute_to_neuron_input)
        winners, leaves = self._winners(inputs, additional_forward_args, prior, forward=forward)
        return _formatted(winners, leaves, isinstance(inputs, tuple), 0)


def _reader(model: nn.Module, layer: nn.Module, name: str, at_input: bool) -> Callable[..., Tensor]:
    """Return a function from the model's arguments to a layer's output, or input, at its last call."""
    thread = threading.get_ident()

    def forward(*args: Any) -> Tensor:
        seen: list[Tensor] = []

        def keep(_module: nn.Module, inputs: Any, output: Any = None) -> None:
            if threading.get_ident() == thread:
                (value,) = format_tensors(inputs if at_input else output)
                seen[:] = [value.clone()]  # the next operation may work in place

        register = layer.register_forward_pre_hook if at_input else layer.register_forward_hook
        handle = register(keep)
        try:
            model(*args)
        finally:
            handle.remove()
        if not seen:
            raise not_reached(model, name)
        return seen[0]

    return forward
