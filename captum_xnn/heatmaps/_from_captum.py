"""The heatmap backend made of an attribution class of Captum.

The maps of all x-features are computed together: each input is repeated once per x-feature, with targets 0..K-1. The
result equals a loop over the x-features up to rounding, because a method attributes each row of a batch on its own.

Conventions:
    N examples, K x-features to draw, R = N K rows. Maps are (N, K, ...), detached, contiguous, of the input's dtype
    and device.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import (
    Attribution,
    DataLoaderAttribution,
    DeepLift,
    DeepLiftShap,
    FeaturePermutation,
    LayerActivation,
    LayerAttribution,
    LayerDeepLift,
    LayerFeaturePermutation,
    NoiseTunnel,
    PerturbationAttribution,
)
from torch import Tensor, nn

from captum_xnn.errors import LayerNotReachedError, UnsupportedOperationError
from captum_xnn.heatmaps._canonical import CanonicalNetwork, Twins
from captum_xnn.heatmaps._completeness import refuse_incomplete
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.heatmaps._hooks import dtypes_restored, outputs_noted, shapes_noted
from captum_xnn.heatmaps._layouts import LayerCall, Layouts, of_dtype
from captum_xnn.heatmaps._missing_rules import needs_modules, refuse_unfit
from captum_xnn.heatmaps._network import ExplanationNetwork, cut_off
from captum_xnn.heatmaps._one_output import OneOutput
from captum_xnn.heatmaps._rows_of_settings import rows_of_settings
from captum_xnn.heatmaps._token_grid import TokenGrid, checked_grid, checked_tokens
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._forward_args import format_tensors
from captum_xnn.layers._integers import refuse_integers, replacing
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._state import untouched

__all__ = ["FromCaptum"]

# Arguments of Captum's attribute methods that the backend fills in itself.
_RESERVED = frozenset({"self", "inputs", "target", "additional_forward_args", "return_convergence_delta"})

# Captum gives these warnings in every call. They describe what the backend intends and undoes afterwards.
_EXPECTED_WARNINGS = (
    "Setting forward, backward hooks",
    "Setting backward hooks on ReLU",
    "Input Tensor",
    "You are providing multiple inputs for Lime",
    "This method computes finite differences between evaluations",
)

# Classes that cannot draw a map for each x-feature: the reason, and the class to use.
_UNFIT = {
    DataLoaderAttribution: "wraps an attribution; pass the wrapped class, and call attribute for each batch",
    FeaturePermutation: "mixes the examples of a batch; use FeatureAblation",
    LayerFeaturePermutation: "mixes the examples of a batch; use LayerFeatureAblation",
    LayerActivation: "is the same for every x-feature; use LayerGradientXActivation",
}

# Methods for layers that still change the inputs, from a baseline or by noise.
_BETWEEN_INPUTS = ("InternalInfluence", "LayerConductance", "LayerGradientShap")

_GRAD_CAM = ("LayerGradCam", "GuidedGradCam")


def _at_embedding(model: nn.Module) -> str:
    """Say how to draw maps of token ids, with the name of the model's first embedding."""
    names = (name for name, module in model.named_modules() if name and isinstance(module, nn.Embedding))
    layer = next(names, "name.of.the.embedding")
    return f"draw the maps at the embedding: heatmap=FromCaptum(LayerIntegratedGradients, layer={layer!r})"


@dataclass(frozen=True)
class _DrawnLayer:
    """The layer whose output a method attributes to."""

    call: LayerCall
    module: nn.Module
    """The layer itself, or its counterpart in the canonical network."""
    one_output: OneOutput | None = None
    """The tensor to draw, of a layer that returns several."""
    grid: TokenGrid | None = None
    """The grid of the layer's tokens."""

    @property
    def watched(self) -> nn.Module:
        """The module whose output has the shape of the layer's maps before channels are summed."""
        return self.one_output or self.module

    @property
    def given(self) -> nn.Module:
        """The module that the method gets as its layer."""
        return self.grid or self.watched

    @contextmanager
    def hooked(self) -> Iterator[list[torch.Size]]:
        """Send the layer's output through the tensor to draw and the grid; note its shapes."""
        with ExitStack() as stack:
            if self.one_output is not None:
                stack.enter_context(self.one_output.after(self.module))
            seen = stack.enter_context(shapes_noted(self.watched))
            if self.grid is not None:
                stack.enter_context(self.grid.after(self.watched))
            yield seen


class FromCaptum:
    """A heatmap backend made of an attribution class of Captum and its settings.

    Each setting goes to the constructor of the class or to its ``attribute`` method, whichever names it. A class that
    explains layers takes ``layer=`` by dotted name. Without a name it takes the last layer with feature maps of at
    least 4 x 4 cells that runs before the explained layer, or of fewer cells if there are no finer ones.
    ``NoiseTunnel`` takes the method that it averages as ``attribution_method=``, a class or another ``FromCaptum``; the
    map of each x-feature has its own noise.

    Layers of transformers give tokens. With ``tokens=`` the backend treats tokens as feature maps: ``"vit"`` is for
    (N, tokens, C), where some tokens are the cells of an image, ``"swin"`` for (N, H, W, C), and ``"sequence"`` for
    (N, tokens, C) without an image. The backend reads the grid of ``"vit"`` from the patch embedding
    (``layers._layout.token_cells``), or takes ``grid=(height, width)``.

    Recurrent layers and attention return a tuple or a dict. The backend then draws the one tensor that the explained
    layer depends on.

    DeepLift, LRP and the guided methods work on a twin of the model made of modules, see
    :mod:`captum_xnn.heatmaps._canonical`. An operation without a rule raises an error.

    Args:
        method: A class of ``captum.attr``, or your own subclass of its ``Attribution``.
        settings: Settings of the constructor and of the call, such as ``n_steps=32``.

    Raises:
        TypeError: If the method is no attribution class, explains only neurons, or has no setting of a given name.
        ValueError: If ``tokens`` or ``grid`` is unknown.

    Example:
        >>> from captum.attr import IntegratedGradients
        >>> FromCaptum(IntegratedGradients, n_steps=32)
        FromCaptum(IntegratedGradients, n_steps=32)
        >>> from captum.attr import NoiseTunnel
        >>> FromCaptum(NoiseTunnel, attribution_method=IntegratedGradients, nt_samples=8, n_steps=32)
        FromCaptum(NoiseTunnel, attribution_method=IntegratedGradients, nt_samples=8, n_steps=32)
    """

    method: type[Attribution]
    settings: dict[str, Any]

    def __init__(self, method: type[Attribution], /, **settings: Any) -> None:
        attributes = isinstance(method, type) and issubclass(method, Attribution) and hasattr(method, "attribute")
        if not attributes:
            raise TypeError(
                f"{method!r} is not a class derived from captum.attr.Attribution; pass the class itself, such as "
                "FromCaptum(captum.attr.DeepLift)"
            )
        self._given = method, settings
        self._twins = Twins()
        self._layouts = Layouts()
        settings = dict(settings)
        self._tokens = checked_tokens(settings.pop("tokens", None))
        self._grid = checked_grid(settings.pop("grid", None), self._tokens)
        self._noise: dict[str, inspect.Parameter] = {}
        if issubclass(method, NoiseTunnel):
            self._noise = {
                name: p
                for name, p in inspect.signature(method.attribute).parameters.items()
                if p.kind is not p.VAR_KEYWORD
            }
            averaged, settings = _averaged(settings)
            method, settings = averaged.method, {**averaged.settings, **settings}
            if self._tokens is None:
                self._tokens, self._grid = averaged._tokens, averaged._grid
        self.method = method
        self.settings = settings
        self._constructor = list(inspect.signature(method).parameters)[1:]
        self._call = {**inspect.signature(method.attribute).parameters, **self._noise}
        # These methods sample from baselines, so baselines need not be as many as the examples.
        self._distribution = method.__name__.removeprefix("Layer") in ("DeepLiftShap", "GradientShap")
        # DeepLift silently treats unknown operations as linear. Its completeness reveals this at the inputs. At a
        # layer there are paths around the layer, and averages over noise and subclasses need not be complete.
        self._checks_completeness = method in (DeepLift, DeepLiftShap) and not self._noise
        if method in _UNFIT:
            raise TypeError(f"{method.__name__} cannot draw a map for each x-feature: it {_UNFIT[method]}")
        if "neuron_selector" in self._call:
            raise TypeError(
                f"{method.__name__} attributes hidden neurons, and an x-feature is an output; pass the class without "
                "'Neuron' in its name"
            )
        self._sort(settings)

    def __repr__(self) -> str:
        method, settings = self._given
        shown = (f"{k}={v.__name__ if isinstance(v, type) else repr(v)}" for k, v in settings.items())
        return f"FromCaptum({', '.join([method.__name__, *shown])})"

    def __getstate__(self) -> tuple[type[Attribution], dict[str, Any]]:
        return self._given

    def __setstate__(self, state: tuple[type[Attribution], dict[str, Any]]) -> None:
        self.__init__(state[0], **state[1])  # type: ignore[misc]

    @property
    def replaces_inputs(self) -> bool:
        """Whether the method runs the network on other inputs instead of taking gradients."""
        return self._perturbs and not self._is_layered

    @property
    def _is_layered(self) -> bool:
        """Whether the method attributes to a layer."""
        return issubclass(self.method, LayerAttribution)

    @property
    def _perturbs(self) -> bool:
        """Whether the method replaces numbers and takes no gradient."""
        return issubclass(self.method, PerturbationAttribution)

    def is_at_baseline(self, inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> bool:
        """Whether the inputs equal the baseline of the method, so that all maps are 0.

        Args:
            inputs: Input tensors (N, ...).
            settings: Settings for this call.
        """
        if "baselines" not in self._call:
            return self.method.__name__ in ("InputXGradient", "LRP") and not any(map(torch.any, inputs))
        given = {**self.settings, **settings}.get("baselines")
        each = given if isinstance(given, tuple) else [given] * len(inputs)
        if len(each) != len(inputs) or not all(b is None or isinstance(b, (int, float, Tensor)) for b in each):
            return False
        own = [0 if b is None else b[None] if self._distribution and isinstance(b, Tensor) else b for b in each]
        rows = [x[:, None] if self._distribution else x for x in inputs]  # each example has all baselines
        return not any(bool((x != b).any()) for x, b in zip(rows, own, strict=True))

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
        """Draw maps (N, K, ...) for each input; layer methods on images give (N, K, 1, H, W).

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            features: Indices of the K x-features to draw.
            additional_forward_args: Further arguments of the model, repeated where they have one row per example.
            internal_batch_size: Number of maps computed at once, to bound the memory. All maps, if None.
            settings: Settings for this call; they override those of the constructor.

        Raises:
            TypeError: If inputs are integers and the method needs gradients of the inputs, or a setting is unknown.
            ValueError: If a layer method finds no layer to explain.
        """
        construct, call = self._sort({**self.settings, **settings})
        checks = self._checks_completeness and bool(construct.get("multiply_by_inputs", True))
        attributed = self._attributed_network(network, inputs, additional_forward_args, checks)
        moves_inputs = not (self._is_layered or self._perturbs)
        if moves_inputs or self.method.__name__ in _BETWEEN_INPUTS:
            refuse_integers(inputs, self.method.__name__, _at_embedding(network.model))
        layer: _DrawnLayer | None = None
        if "layer" in self._constructor:
            layer = self._drawn_layer(network, attributed, inputs, additional_forward_args, construct.get("layer"))
            construct["layer"] = layer.given
        if "eps" in self._constructor and any(x.dtype == torch.float16 for x in inputs):
            construct.setdefault("eps", torch.finfo(torch.float16).tiny)  # Captum's own value is 0 in float16
        if internal_batch_size is not None and "internal_batch_size" in self._call:
            call["internal_batch_size"] = internal_batch_size
        if internal_batch_size is not None and self._noise:
            call["nt_samples_batch_size"] = 1
        self._refuse_missing(call)
        n, K = len(inputs[0]), len(features)
        rows = torch.arange(n, device="cpu").repeat_interleave(K)
        wanted = torch.tensor(list(features), device="cpu").repeat(n)

        def drawn() -> Iterator[tuple[list[int], list[Tensor]]]:
            for some in torch.split(torch.arange(n * K, device="cpu"), internal_batch_size or n * K):
                if "target" in self._call:
                    call["target"] = wanted[some].to(inputs[0].device)
                own = call if self._distribution else rows_of_settings(call, n, rows[some].tolist())
                leaves = _leaves(inputs, additional_forward_args, rows[some])
                with ExitStack() as stack:
                    stack.enter_context(untouched(attributed))
                    shapes = [] if layer is None else stack.enter_context(layer.hooked())
                    attributions = self._attributions(network, attributed, construct, own, leaves, checks, layer)
                yield some.tolist(), self._finished(attributions, inputs, layer, shapes, len(some))

        return tuple(m.reshape(n, K, *m.shape[1:]) for m in gathered(drawn(), n * K))

    def _sort(self, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Divide settings into those of the constructor and those of the call; raise on unknown names."""
        call = [name for name, p in self._call.items() if name not in _RESERVED and p.kind is not p.VAR_KEYWORD]
        unknown = [name for name in settings if name not in self._constructor and name not in call]
        if unknown and not self._takes(""):
            raise TypeError(
                f"{self.method.__name__} has no setting {', '.join(map(repr, unknown))}; "
                f"it takes: {', '.join(sorted({*self._constructor, *call}))}"
            )
        construct = {k: v for k, v in settings.items() if k in self._constructor}
        return construct, {k: v for k, v in settings.items() if k not in construct}

    def _takes(self, name: str) -> bool:
        """Whether the method's call takes an argument of this name."""
        return name in self._call or any(p.kind is p.VAR_KEYWORD for p in self._call.values())

    def _refuse_missing(self, call: dict[str, Any]) -> None:
        """Raise where a call lacks a setting that the method has no default for."""
        open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        needed = [name for name, p in self._call.items() if p.default is p.empty and p.kind not in open_ended]
        missing = [name for name in needed if name not in call and name not in _RESERVED]
        if missing:
            name = self.method.__name__
            raise TypeError(
                f"{name} needs {' and '.join(missing)}, which have no default; pass them to attribute or explain, or "
                f"with the method, as in FromCaptum({name}, {missing[0]}=...)"
            )

    def _attributed_network(
        self,
        network: ExplanationNetwork,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        checks_completeness: bool,
    ) -> nn.Module:
        """Return the network that the method works on: a twin made of modules, if the method needs modules."""
        modules = needs_modules(self.method)
        network.use_slopes("recomputed" if self._perturbs else "held" if modules else "gradient")
        if not modules:
            return network
        (x, more) = rows_of(inputs, additional, torch.tensor([0], device="cpu"))
        try:
            with untouched(network):
                twin = self._twins.of(network, (*x, *(more or ())))
        except UnsupportedOperationError:
            if checks_completeness:
                return network  # the check finds errors
            raise
        if not (checks_completeness or issubclass(self.method, LayerDeepLift)):
            refuse_unfit(self.method, twin.operations(), twin.encoder_modules())
        return twin

    def _drawn_layer(
        self,
        network: ExplanationNetwork,
        attributed: nn.Module,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        layer: str | nn.Module | None,
    ) -> _DrawnLayer:
        """Find the layer that the method attributes to."""
        name, module = self._named_layer(network, attributed, layer)
        call = LayerCall(network, name, inputs, additional)
        if isinstance(attributed, CanonicalNetwork) and issubclass(self.method, LayerDeepLift):
            refuse_unfit(self.method, attributed.operations(module), attributed.encoder_modules())
        one_output = self._layouts.one_output(call) if attributed is network else None
        grid = None if self._tokens is None else self._layouts.tokens(call, self._tokens, self._grid)
        return _DrawnLayer(call, module, one_output, grid)

    def _named_layer(
        self, network: ExplanationNetwork, attributed: nn.Module, layer: str | nn.Module | None
    ) -> tuple[str, nn.Module]:
        """Return the name of the layer, and its module in the network that the method works on."""
        method = self.method.__name__
        if layer is None and self._tokens is not None:
            raise ValueError(
                f"tokens={self._tokens!r} needs a layer; name it, as in "
                f"FromCaptum({method}, layer='...', tokens={self._tokens!r})"
            )
        if layer is None:
            layer = network.spatial_layer_name
        if layer is None:
            raise ValueError(
                f"{method} needs a layer with feature maps (N, C, H, W), and no layer before {network.layer_name!r} "
                f"has any; name a layer, as in FromCaptum({method}, layer='...')"
            )
        name, module = find_layer(network.model, layer)
        if method == "LayerLRP" and isinstance(module, (nn.ReLU, nn.Tanh)):
            raise ValueError(
                f"LayerLRP cannot stop at layer {name!r}, a {type(module).__name__}, through which relevance passes "
                "unchanged; name the layer before it, with weights or a pooling"
            )
        if network.runs_past_layer and network.ran and module not in network.ran:
            raise _not_before(name, network.layer_name)  # this layer runs all the same, but is no part of the way
        if not isinstance(attributed, CanonicalNetwork):
            return name, module
        if network.ran.isdisjoint(module.modules()):
            raise _not_before(name, network.layer_name)
        return name, attributed.layer(name)

    def _attributions(
        self,
        network: ExplanationNetwork,
        attributed: nn.Module,
        construct: dict[str, Any],
        call: dict[str, Any],
        arguments: tuple[Any, Any],
        checks_completeness: bool,
        layer: _DrawnLayer | None,
    ) -> tuple[Tensor, ...]:
        """Attribute one batch of rows; raise where the layer does not run, or no gradient reaches the inputs."""
        try:
            return self._run(attributed, construct, call, arguments, checks_completeness)
        except AssertionError as error:
            if layer is not None and "Forward hook did not obtain" in str(error):
                raise _not_before(layer.call.name, network.layer_name) from error
            raise
        except (AttributeError, RuntimeError) as error:
            reason = None
            if not self.replaces_inputs:
                with suppress(Exception):  # the first error is the one to report
                    reason = cut_off(network, *arguments)
            if reason is None and layer is not None and "not have been used in the graph" in str(error):
                reason = (
                    f"layer {layer.call.name!r}, where the maps would be drawn, does not lead to the explained layer "
                    f"{network.layer_name!r}, as in another branch of a model with several images; name a layer that "
                    "does, as in attribute(..., layer='...')"
                )
            if reason is None:
                raise
            raise ValueError(reason) from error

    def _run(
        self,
        network: nn.Module,
        construct: dict[str, Any],
        call: dict[str, Any],
        arguments: tuple[Any, Any],
        checks_completeness: bool,
    ) -> tuple[Tensor, ...]:
        """Run the method on one batch of rows."""
        inputs, additional = arguments
        name = self.method.__name__
        if self._takes("additional_forward_args"):
            call = {**call, "additional_forward_args": additional}
        elif additional is not None:
            raise TypeError(
                f"{name}.attribute takes no additional_forward_args; add that argument to it, or wrap the model in a "
                "module that needs no further arguments"
            )
        attribution = self.method(network, **construct)
        if self._noise:
            attribution = NoiseTunnel(_with_wrapped(attribution))
        attribute = getattr(type(attribution).attribute, "__wrapped__", type(attribution).attribute)
        with warnings.catch_warnings():
            for text in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", text, UserWarning)
            alone = inputs[0] if len(inputs) == 1 else inputs
            replaced = replacing(inputs, name) if self.replaces_inputs else nullcontext()
            with replaced, dtypes_restored(network, inputs), outputs_noted(network) as outputs:
                given = attribute(attribution, alone, **call)
        if checks_completeness:
            refuse_incomplete(name, given, outputs[-1], call["target"])
        return tuple(a.detach() for a in format_tensors(given))

    def _finished(
        self,
        attributions: tuple[Tensor, ...],
        inputs: tuple[Tensor, ...],
        layer: _DrawnLayer | None,
        shapes: Sequence[torch.Size],
        rows: int,
    ) -> list[Tensor]:
        """Sum the feature maps of a layer over channels, in the size and dtype of the inputs."""
        channels = None
        if layer is not None and layer.grid is None:
            shape = (shapes or [attributions[0].shape])[-1]
            if attributions[0].numel():  # GuidedGradCam may return nothing
                self._layouts.refuse_examples_second(layer.call, shape, attributions[0], rows)
            if attributions[0].dim() > 2:
                channels = self._layouts.channels(layer.call, shape)
            if self.method.__name__ in _GRAD_CAM and channels != 1:
                raise self._no_feature_maps(layer.module)
        if layer is None or not self._is_layered:
            return [of_dtype(m, x) for m, x in zip(attributions, inputs, strict=True)]
        image = self._layouts.image(layer.call)
        return [image.summed_over_channels(m, channels) for m in attributions]

    def _no_feature_maps(self, layer: nn.Module) -> ValueError:
        """Return the error where Grad-CAM would treat tokens, cells, or single numbers as channels."""
        method = self.method.__name__
        return ValueError(
            f"{method} needs a layer with feature maps (N, C, H, W), and the output of this {type(layer).__name__} has "
            f"none; if it gives tokens, say how they lie: FromCaptum({method}, layer='...', tokens='vit'), 'swin' or "
            "'sequence'"
        )


def as_heatmap(heatmap: type[Attribution] | Heatmap) -> Heatmap:
    """Turn a class of Captum into a backend, and return a backend unchanged.

    Args:
        heatmap: A Captum attribution class, or a backend object.

    Raises:
        TypeError: If ``heatmap`` is neither a class of Captum nor callable.

    Example:
        >>> from captum.attr import IntegratedGradients
        >>> as_heatmap(IntegratedGradients)
        FromCaptum(IntegratedGradients)
    """
    if isinstance(heatmap, type):
        return FromCaptum(heatmap)
    if isinstance(heatmap, Attribution) or not callable(heatmap):
        raise TypeError(
            f"heatmap is an object of type {type(heatmap).__name__}, neither a Captum class nor a heatmap backend; "
            "pass the class and its settings as FromCaptum(Class, setting=...), since the backend builds the object"
        )
    return heatmap


def _not_before(name: str, explained: str) -> LayerNotReachedError:
    return LayerNotReachedError(
        f"layer {name!r} does not run before the explained layer {explained!r}, where the x-features' network ends; "
        "choose a layer that does"
    )


def _leaves(
    inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, rows: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """Copy rows of the inputs as leaves; floating-point leaves require gradients."""
    picked, more = rows_of(tuple(x.detach() for x in inputs), additional, rows)
    return tuple(x.requires_grad_(x.is_floating_point()) for x in picked), more


def _with_wrapped(attribution: Attribution) -> Attribution:
    """Add ``__wrapped__`` to the attribute method, as NoiseTunnel expects; Captum's decorator sets it."""
    method = type(attribution).attribute
    if not hasattr(method, "__wrapped__"):
        attribution.attribute = functools.wraps(method)(functools.partial(method, attribution))
    return attribution


def _averaged(settings: dict[str, Any]) -> tuple[FromCaptum, dict[str, Any]]:
    """Take the method that a NoiseTunnel averages out of the settings; return both."""
    rest = dict(settings)
    method = rest.pop("attribution_method", None)
    if method is None:
        raise TypeError(
            "NoiseTunnel needs the method that it averages; pass it as in FromCaptum(NoiseTunnel, "
            "attribution_method=Saliency, nt_samples=8), or wrap the XNNAttribution in a NoiseTunnel"
        )
    return method if isinstance(method, FromCaptum) else FromCaptum(method), rest
