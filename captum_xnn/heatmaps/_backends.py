"""Heatmap backends: how one attribution map per x-feature is drawn.

A backend is a callable ``backend(network, inputs, features, ...)``. :class:`ExcitationMaps` is the default;
:class:`FromCaptum` makes one of any Captum class.
All maps of one call are computed together, by repeating each input once per x-feature with targets 0..K-1; this equals
a loop over the x-features to rounding, because every row of a batch is attributed on its own.

Conventions:
    N examples, K x-features asked for. Maps are (N, K, ...), detached, contiguous, of the input's dtype and device.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from captum.attr import (
    Attribution,
    DataLoaderAttribution,
    DeepLift,
    DeepLiftShap,
    FeaturePermutation,
    InputXGradient,
    LayerActivation,
    LayerAttribution,
    LayerDeepLift,
    LayerFeaturePermutation,
    LayerGradientXActivation,
    NoiseTunnel,
    PerturbationAttribution,
)
from torch import Tensor, nn
from torch.nn import functional as F

from captum_xnn.errors import LayerNotReachedError, UnsupportedOperationError
from captum_xnn.excitation_bp._propagation import Stop, one_hot, propagate, refuse_scripted
from captum_xnn.excitation_bp._shares import Negative
from captum_xnn.excitation_bp._signals import Settings
from captum_xnn.excitation_bp._stopping import stopping_layer
from captum_xnn.heatmaps._canonical import CanonicalNetwork, Twins, needs_modules, refuse_unfit
from captum_xnn.heatmaps._contribution_network import ContributionNetwork
from captum_xnn.heatmaps._network import ExplanationNetwork, cut_off
from captum_xnn.heatmaps._one_output import OneOutput, one_output
from captum_xnn.heatmaps._shared_pass import gradients_of_groups
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._forward_args import format_tensors
from captum_xnn.layers._grid import channels_by_numbers
from captum_xnn.layers._integers import refuse_integers, replacing
from captum_xnn.layers._layout import (
    Cells,
    channel_dimension,
    refuse_examples_second,
    token_cells,
)
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._nested import tensors_in
from captum_xnn.layers._pixels import first_image, image_channels
from captum_xnn.layers._read import OutputTransform, read_layer
from captum_xnn.layers._state import untouched

__all__ = [
    "TOKENS",
    "DefaultMaps",
    "ExcitationMaps",
    "FromCaptum",
    "GradientMaps",
    "Heatmap",
    "TokenGrid",
    "as_heatmap",
    "rows_of_settings",
]

# Arguments of Captum's attribute methods that the backend fills in itself.
_RESERVED = frozenset({"self", "inputs", "target", "additional_forward_args", "return_convergence_delta"})

# Captum says these of every call; they are what the backend intends, and undone afterwards.
_EXPECTED_WARNINGS = (
    "Setting forward, backward hooks",
    "Setting backward hooks on ReLU",
    "Input Tensor",
    "You are providing multiple inputs for Lime",
    "This method computes finite differences between evaluations",
)

_UNFIT = {
    DataLoaderAttribution: "wraps an attribution; pass that one's class, and call attribute for each batch",
    FeaturePermutation: "mixes the examples of a batch; use FeatureAblation",
    LayerFeaturePermutation: "mixes the examples of a batch; use LayerFeatureAblation",
    LayerActivation: "is the same for every x-feature; use LayerGradientXActivation",
}

# Settings of a call with which x-features can share a forward pass.
_SHARED = frozenset({"additional_forward_args", "internal_batch_size", "layer"})
# Methods for layers that all the same move the inputs, from a baseline or by noise.
_BETWEEN_INPUTS = ("InternalInfluence", "LayerConductance", "LayerGradientShap")

# Roundings of the largest output that a difference of two outputs may be off by.
_ROUNDINGS = 64

_AT_EMBEDDING = (
    "draw the maps at the embedding: heatmap=FromCaptum(LayerIntegratedGradients, layer='name.of.the.embedding')"
)

# Lost probability that changes a map visibly. Neurons that only their bias excites, as small networks have, lose less.
_VISIBLE = 0.05


class Heatmap(Protocol):
    """What XNNAttribution asks of a backend."""

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
        """Return one tensor (N, K, ...) of maps per input tensor, for the K x-features asked for."""
        ...


class FromCaptum:
    """A heatmap backend made of a Captum attribution class and its settings.

    Each setting goes to the class's constructor or to its ``attribute`` method, whichever names it. A class that
    explains layers takes ``layer=`` by dotted name; without one it takes the last layer with feature maps that runs
    before the explained layer. ``NoiseTunnel`` takes the method that it averages as ``attribution_method=``, a class or
    another ``FromCaptum``; every x-feature's map has noise of its own. Layers of transformers give tokens: with
    ``tokens="vit"``, ``"swin"`` or ``"sequence"`` these are taken for feature maps, see :class:`TokenGrid`. The grid of
    ``"vit"`` is read from the patch embedding (:func:`captum_xnn.layers._layout.token_cells`), or given as
    ``grid=(height, width)``.

    Of a layer that returns a tuple or a dict, as recurrent layers and attention do, the one tensor that the explained
    layer depends on is drawn.

    DeepLift, LRP and the guided methods work on a twin of the model made of modules, see
    :mod:`captum_xnn.heatmaps._canonical`, and refuse what they have no rule for.

    Args:
        method: A class of ``captum.attr``, or your own subclass of its ``Attribution``.
        settings: Constructor and call settings, such as ``n_steps=32``.

    Raises:
        TypeError: If the method is no attribution class, explains neurons only, or names no such setting.
        ValueError: If tokens lie in no known way.

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
                f"expected a class derived from captum.attr.Attribution, got {method!r}; pass the class itself, "
                "such as FromCaptum(captum.attr.DeepLift)"
            )
        self._given = method, settings
        self._twins = Twins()
        settings = dict(settings)
        self._tokens = _checked_tokens(settings.pop("tokens", None))
        self._grid = _checked_grid(settings.pop("grid", None), self._tokens)
        self._layouts = _Layouts()
        self._noise: dict[str, inspect.Parameter] = {}
        if issubclass(method, NoiseTunnel):
            self._noise = {
                name: p
                for name, p in inspect.signature(method.attribute).parameters.items()
                if p.kind is not p.VAR_KEYWORD
            }
            around, settings = _around(settings)
            method, settings = around.method, {**around.settings, **settings}
            if self._tokens is None:
                self._tokens, self._grid = around._tokens, around._grid
        self.method = method
        self.settings = settings
        self._constructor = list(inspect.signature(method).parameters)[1:]
        self._call = {**inspect.signature(method.attribute).parameters, **self._noise}
        # These sample from baselines, which need not be as many as the examples.
        self._distribution = method.__name__.removeprefix("Layer") in ("DeepLiftShap", "GradientShap")
        # DeepLift takes what it does not know for linear without a word; its delta tells. Of other forms it does not:
        # at a layer there are ways around, and what a noise tunnel or a subclass makes of them need not sum to it.
        self._checking = method in (DeepLift, DeepLiftShap) and not self._noise
        if method in _UNFIT:
            raise TypeError(
                f"expected a class that attributes each x-feature, got {method.__name__}, which {_UNFIT[method]}"
            )
        if "neuron_selector" in self._call:
            raise TypeError(
                f"expected a class that attributes outputs, got {method.__name__}, which attributes hidden neurons; "
                "an x-feature is an output here, so pass the class without 'Neuron' in its name"
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
        """Whether the method runs the network on other inputs, and takes no gradient."""
        return issubclass(self.method, PerturbationAttribution) and not issubclass(self.method, LayerAttribution)

    def is_at_baseline(self, inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> bool:
        """Return whether inputs are the ones that the method compares them with, so that all maps are 0.

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

    def _sort(self, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the settings of the constructor and those of the call."""
        open_call = self._takes("")
        call = [name for name, p in self._call.items() if name not in _RESERVED and p.kind is not p.VAR_KEYWORD]
        unknown = [name for name in settings if name not in self._constructor and name not in call]
        if unknown and not open_call:
            raise TypeError(
                f"expected settings of {self.method.__name__}, got {', '.join(map(repr, unknown))}; "
                f"it takes: {', '.join(sorted({*self._constructor, *call}))}"
            )
        construct = {k: v for k, v in settings.items() if k in self._constructor}
        return construct, {k: v for k, v in settings.items() if k not in construct}

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
        """Return one tensor (N, K, ...) of maps per input; layer methods on images give (N, K, 1, H, W).

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            features: The K x-features to draw, 0-based.
            additional_forward_args: Further arguments of the model, repeated where they have one row per example.
            internal_batch_size: Maps computed at once; bounds the memory. All of them, if None.
            settings: Settings for this call, which go before those given at construction.

        Raises:
            TypeError: If inputs are integers, through which only layer methods go, or a setting is unknown.
            ValueError: If a layer method finds no layer to explain.
        """
        construct, call = self._sort({**self.settings, **settings})
        checking = self._checking and bool(construct.get("multiply_by_inputs", True))
        attributed = self._attributed(network, inputs, additional_forward_args, checking)
        layered = issubclass(self.method, LayerAttribution)
        moves = not (layered or issubclass(self.method, PerturbationAttribution))
        if moves or self.method.__name__ in _BETWEEN_INPUTS:
            refuse_integers(inputs, self.method.__name__, _AT_EMBEDDING)
        name, grid, several = "", None, None
        module: nn.Module | None = None
        if "layer" in self._constructor:
            name, module = self._layer(network, attributed, construct.get("layer"))
            construct["layer"], given = module, (network, name, inputs, additional_forward_args)
            if attributed is network and (picked := self._layouts.one_output(*given)) is not None:
                several, module = module, picked
                construct["layer"] = picked
            if self._tokens is not None:
                grid = construct["layer"] = self._layouts.tokens(*given, self._tokens, self._grid)
        if isinstance(attributed, CanonicalNetwork) and issubclass(self.method, LayerDeepLift):
            refuse_unfit(self.method, attributed, module)
        if "eps" in self._constructor and any(x.dtype == torch.float16 for x in inputs):
            construct.setdefault("eps", torch.finfo(torch.float16).tiny)  # Captum's own is 0 there
        if internal_batch_size is not None and "internal_batch_size" in self._call:
            call["internal_batch_size"] = internal_batch_size
        if internal_batch_size is not None and self._noise:
            call["nt_samples_batch_size"] = 1
        if "target" in self._call:
            call["target"] = None  # replaced in every chunk
        self._refuse_missing(call)
        n, K = len(inputs[0]), len(features)
        rows, wanted = torch.arange(n).repeat_interleave(K), torch.tensor(list(features)).repeat(n)

        def drawn() -> Iterator[tuple[list[int], list[Tensor]]]:
            for some in torch.split(torch.arange(n * K), internal_batch_size or n * K):
                if "target" in call:
                    call["target"] = wanted[some].to(inputs[0].device)
                own = call if self._distribution else rows_of_settings(call, n, rows[some].tolist())
                leaves = _leaves(inputs, additional_forward_args, rows[some])
                with (
                    untouched(attributed),
                    module.after(several) if several is not None and isinstance(module, OneOutput) else nullcontext(),
                    _shapes(module, name, network.layer_name) as seen,
                    grid.after(module) if grid is not None and module is not None else nullcontext(),
                ):
                    made = self._attributed_to(network, attributed, construct, own, leaves, checking)
                if module is not None and grid is None and made[0].numel():  # GuidedGradCam may return nothing
                    asked = network, name, inputs, additional_forward_args
                    self._layouts.refuse_examples_second(*asked, (seen or [made[0].shape])[-1], made[0], len(some))
                channels = None
                if grid is None and module is not None and made[0].dim() > 2:
                    channels = self._layouts.channels(
                        network, name, inputs, additional_forward_args, (seen or [made[0].shape])[-1]
                    )
                if grid is None and module is not None and self.method.__name__ in ("LayerGradCam", "GuidedGradCam"):
                    self._refuse_tokens(several or module, channels)
                if not layered:
                    yield some.tolist(), [_of_dtype(m, x) for m, x in zip(made, inputs, strict=True)]
                    continue
                image = self._layouts.image(network, inputs, additional_forward_args)
                yield some.tolist(), [image.finished(m, channels) for m in made]

        return tuple(m.reshape(n, K, *m.shape[1:]) for m in gathered(drawn(), n * K))

    def _attributed(
        self,
        network: ExplanationNetwork,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        checking: bool,
    ) -> nn.Module:
        """Return the network that the method works on: its twin made of modules, where the method needs them."""
        modules = needs_modules(self.method)
        if isinstance(network, ContributionNetwork):
            moves = issubclass(self.method, PerturbationAttribution)
            network.slopes = "recomputed" if moves else "held" if modules else "gradient"
        if not modules:
            return network
        (x, more) = rows_of(inputs, additional, torch.tensor([0]))
        try:
            with untouched(network):
                twin = self._twins.of(network, (*x, *(more or ())))
        except UnsupportedOperationError:
            if checking:
                return network  # what is wrong shows in the delta
            raise
        if not (checking or issubclass(self.method, LayerDeepLift)):
            refuse_unfit(self.method, twin)
        return twin

    def _attributed_to(
        self,
        network: ExplanationNetwork,
        attributed: nn.Module,
        construct: dict[str, Any],
        call: dict[str, Any],
        arguments: tuple[Any, Any],
        checking: bool,
    ) -> tuple[Tensor, ...]:
        """Return the attributions of one chunk; says so where a gradient is missing."""
        try:
            return self._attribute(attributed, construct, call, arguments, checking)
        except (AttributeError, RuntimeError) as error:
            reason = None
            if not self.replaces_inputs:
                with suppress(Exception):  # which the error at hand goes before
                    reason = cut_off(network, *arguments)
            if reason is None:
                raise
            raise ValueError(reason) from error

    def _attribute(
        self,
        network: nn.Module,
        construct: dict[str, Any],
        call: dict[str, Any],
        arguments: tuple[Any, Any],
        checking: bool,
    ) -> tuple[Tensor, ...]:
        """Return the attributions of one chunk, detached."""
        inputs, additional = arguments
        if self._takes("additional_forward_args"):
            call = {**call, "additional_forward_args": additional}
        elif additional is not None:
            raise TypeError(
                f"expected a method that takes additional_forward_args, got {self.method.__name__} without; add that "
                "argument to its attribute, or wrap the model in one that needs no further arguments"
            )
        attribution = self.method(network, **construct)
        if self._noise:
            attribution = NoiseTunnel(_decorated(attribution))
        attribute = getattr(type(attribution).attribute, "__wrapped__", type(attribution).attribute)
        with warnings.catch_warnings():
            for text in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", text, UserWarning)
            alone = inputs[0] if len(inputs) == 1 else inputs
            moved = replacing(inputs, self.method.__name__) if self.replaces_inputs else nullcontext()
            with moved, _of_dtypes(network, inputs), _outputs(network) as outputs:
                given = attribute(attribution, alone, **call)
        if checking:
            _refuse_delta(self.method.__name__, given, outputs[-1], call["target"])
        return tuple(a.detach() for a in format_tensors(given))

    def _layer(
        self, network: ExplanationNetwork, attributed: nn.Module, layer: str | nn.Module | None
    ) -> tuple[str, nn.Module]:
        """Return the name of the layer that a method is to explain, and the module."""
        if layer is None and self._tokens is not None:
            raise ValueError(
                f"expected a layer whose tokens lie as tokens={self._tokens!r} says, got none; name it, as in "
                f"FromCaptum({self.method.__name__}, layer='...', tokens={self._tokens!r})"
            )
        if layer is None:
            layer = network.spatial_layer_name
        if layer is None:
            raise ValueError(
                f"expected a layer with feature maps (N, C, H, W) before {network.layer_name!r} for "
                f"{self.method.__name__}, found none; name one, as in FromCaptum({self.method.__name__}, layer='...')"
            )
        name, module = find_layer(network.model, layer)
        if self.method.__name__ == "LayerLRP" and isinstance(module, (nn.ReLU, nn.Tanh)):
            raise ValueError(
                f"expected a layer with weights or a pooling for LayerLRP, got {type(module).__name__} "
                f"{name!r}, through which relevance passes as it is; name the layer before it"
            )
        if not isinstance(attributed, CanonicalNetwork):
            return name, module
        if network.ran.isdisjoint(module.modules()):
            raise _not_before(name, network.layer_name)
        return name, attributed.layer(name)

    def _refuse_tokens(self, layer: nn.Module, channels: int | None) -> None:
        """Raise where Grad-CAM has taken tokens, cells, or single numbers, for channels."""
        if channels != 1:
            raise ValueError(
                f"expected a layer with feature maps (N, C, H, W) for {self.method.__name__}, got "
                f"{type(layer).__name__} without; where it gives tokens, say how they lie: "
                f"FromCaptum({self.method.__name__}, layer='...', tokens='vit'), 'swin' or 'sequence'"
            )


class TokenGrid(nn.Module):
    """Tokens as feature maps, for methods that want channels first.

    Args:
        kind: ``"vit"`` for (N, tokens, C), of which some are the cells of an image; ``"swin"`` for (N, H, W, C);
            ``"sequence"`` for (N, tokens, C) without an image.
        cells: Which tokens are which cells, for ``"vit"``. A height and width mean the last tokens, row by row.

    Example:
        >>> TokenGrid("vit", (4, 4))(torch.zeros(2, 17, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, kind: str, cells: Cells | tuple[int, int] | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.cells = cells

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens as feature maps (N, C, H, W), or (N, C, tokens) of sequences.

        Args:
            tokens: The layer's output.

        Raises:
            ValueError: If they do not lie so.
        """
        if tokens.dim() != TOKENS[self.kind]:
            raise ValueError(
                f"expected tokens of {TOKENS[self.kind]} dimensions for tokens={self.kind!r}, got {tuple(tokens.shape)}"
            )
        if self.kind == "swin":
            return tokens.permute(0, 3, 1, 2)
        if self.kind == "sequence":
            return tokens.transpose(1, 2)
        height, width, own = self._of(tokens)
        return tokens[:, own].transpose(1, 2).reshape(len(tokens), -1, height, width)

    def back(self, maps: Tensor, tokens: Tensor) -> Tensor:
        """Return feature maps as tokens.

        Args:
            maps: What :meth:`forward` returned.
            tokens: What it was given.
        """
        if self.kind == "swin":
            return maps.permute(0, 2, 3, 1)
        if self.kind == "sequence":
            return maps.transpose(1, 2)
        return tokens.index_copy(1, self._of(tokens)[2], maps.flatten(2).transpose(1, 2))

    def _of(self, tokens: Tensor) -> Cells:
        """Return which of some tokens are which cells."""
        assert self.cells is not None
        count = tokens.shape[1]
        cells = self.cells if isinstance(self.cells, Cells) else _last(*self.cells, count)
        return cells._replace(tokens=cells.tokens.to(tokens.device))

    @contextmanager
    def after(self, layer: nn.Module) -> Iterator[None]:
        """Return a context in which a layer's output goes through this module.

        Args:
            layer: A layer that gives tokens.
        """
        handle = layer.register_forward_hook(lambda _module, _inputs, tokens: self.back(self(tokens), tokens))
        try:
            yield
        finally:
            handle.remove()


def _last(height: int, width: int, count: int) -> Cells:
    """Return the last of some tokens as cells, row by row."""
    return Cells(height, width, torch.arange(count - height * width, count))


TOKENS = {"vit": 3, "swin": 4, "sequence": 3}
"""How tokens may lie, and the dimensions of such a layer's output."""


def _checked_tokens(tokens: str | None) -> str | None:
    if tokens is not None and tokens not in TOKENS:
        raise ValueError(f"expected tokens to be one of {', '.join(map(repr, TOKENS))}, got {tokens!r}")
    return tokens


def _checked_grid(grid: Any, tokens: str | None) -> tuple[int, int] | None:
    if grid is None:
        return None
    if tokens != "vit":
        raise ValueError(f"grid={grid!r} is for tokens='vit', and tokens is {tokens!r}; pass both, or leave grid out")
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)):
        raise ValueError(f"grid is {grid!r}; pass cells along height and width, such as grid=(14, 14)")
    return grid[0], grid[1]


class _Layouts:
    """How layers' outputs are laid out, each read once for inputs of a size."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()

    def _read(
        self,
        what: Any,
        network: ExplanationNetwork,
        name: str,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
    ) -> Any:
        """Return what a function reads of a layer, from the first example."""
        known = self._known.setdefault(network.model, {})
        key = what, name, *(tuple(x.shape[1:]) for x in inputs)
        if key not in known:
            x, more = rows_of(inputs, additional, torch.tensor([0]))
            given = tuple(a.detach() if isinstance(a, Tensor) else a for a in network.hold((*x, *(more or ()))))
            one = known.get((network.layer_name, name))
            layer = network.layer if name == network.layer_name else find_layer(network.model, name)[1]
            known[key] = what(network.model, layer, given, name, one and one.pick)
        return known[key]

    def one_output(
        self,
        network: ExplanationNetwork,
        name: str,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
    ) -> OneOutput | None:
        """Return the tensor to draw of a layer that returns several; None where it returns one."""
        known, key = self._known.setdefault(network.model, {}), (network.layer_name, name)
        if key not in known:
            known[key] = one_output(network, name, inputs, additional)
        found: OneOutput | None = known[key]
        return found

    def channels(
        self,
        network: ExplanationNetwork,
        name: str,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        shape: Sequence[int],
    ) -> int:
        """Return the dimension of a layer's output that holds channels, counted with the examples as 0.

        The model is asked where the numbers of its shape leave that open.
        """
        image = self.image(network, inputs, additional).first
        by_numbers = channels_by_numbers(shape, image) if len(shape) == image.dim() == 4 else None
        if by_numbers is not None:
            return by_numbers
        found: int = self._read(_channels, network, name, inputs, additional)
        return found

    def image(
        self, network: ExplanationNetwork, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None
    ) -> _Image:
        """Return the input whose size maps of a layer have: the first of images or volumes, if there are any."""
        at = first_image(inputs)
        if at is None:
            return _Image(inputs[0], 1)
        return _Image(inputs[at], self._read(_channels_of_image, network, network.layer_name, inputs, additional))

    def refuse_examples_second(
        self,
        network: ExplanationNetwork,
        name: str,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        shape: Sequence[int],
        maps: Tensor,
        rows: int,
    ) -> None:
        """Raise where a layer has no row for each example, as (T, N, D); asks the model where T is N by chance."""
        refuse_examples_second(maps, rows, name)
        if len(shape) > 2 and shape[0] == shape[1]:
            one = self._read(_shape, network, name, inputs, additional)
            refuse_examples_second(torch.empty(one, device="meta"), 1, name)

    def tokens(
        self,
        network: ExplanationNetwork,
        name: str,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        kind: str,
        grid: tuple[int, int] | None,
    ) -> TokenGrid:
        """Return how the tokens of a layer lie; raises where that is unknown or contradicts the grid given."""
        shape = self._read(_shape, network, name, inputs, additional)
        refuse_examples_second(torch.empty(shape, device="meta"), 1, name)
        if kind != "vit" or len(shape) != TOKENS[kind]:
            return TokenGrid(kind)  # which tells of other dimensions
        count = shape[1]
        found: Cells | None = self._read(_cells, network, name, inputs, additional)
        if found is not None and grid in (None, (found.height, found.width)):
            return TokenGrid(kind, found)
        if grid is None:
            raise ValueError(
                f"layer {name!r} gives {count} tokens, and no convolution before it makes one of each of its cells, so "
                f"the grid is unknown; pass it, as in layer={name!r}, tokens='vit', grid=(height, width), or "
                "tokens='sequence' if these are no cells of an image"
            )
        if found is not None:
            raise ValueError(
                f"grid is {grid}, and the {count} tokens of layer {name!r} are {found.height} x {found.width} cells of "
                f"the patch embedding with {count - len(found.tokens)} class or register tokens; leave grid out"
            )
        if grid[0] * grid[1] > count:
            raise ValueError(
                f"grid is {grid}, {grid[0] * grid[1]} cells, and layer {name!r} gives {count} tokens; pass a grid of "
                "the cells that are left in this layer"
            )
        return TokenGrid(kind, grid)


def _first(raw: Any) -> Any:
    """Return the first floating-point tensor of a layer's output."""
    return next((tensor for _, tensor in tensors_in(raw) if tensor.is_floating_point()), raw)


def _channels(
    model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], name: str, pick: OutputTransform | None
) -> int:
    return channel_dimension(model, layer, inputs, name=name, output_transform=pick or _first)


def _channels_of_image(
    model: nn.Module, _layer: nn.Module, inputs: tuple[Any, ...], _name: str, _pick: OutputTransform | None
) -> int:
    return image_channels(model, inputs)


def _cells(
    model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], name: str, _pick: OutputTransform | None
) -> Cells | None:
    return token_cells(model, layer, inputs, name=name)


def _shape(
    model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], name: str, pick: OutputTransform | None
) -> tuple[int, ...]:
    """Return the shape of a layer's output."""
    with torch.inference_mode(False), untouched(model), torch.no_grad():
        return tuple(read_layer(model, layer, inputs, name=name, output_transform=pick or _first)[0].shape)


class ExcitationMaps:
    r"""The default backend: contrastive winning probabilities of every x-feature, by excitation backprop.

    On images the probabilities of one layer are summed over channels and enlarged to the input. That layer is chosen by
    :func:`captum_xnn.excitation_bp.stopping_layer`: post-ReLU, on every path, of at least 14 x 14 cells. Other
    inputs get probabilities of their own shape, and integer inputs need a layer. The maps of all x-features come from
    one forward pass, and one backward pass of them together.

    A map shows what speaks for the x-feature's being on its side of 0: it is :math:`\max(\pm D, 0)` with the sign of
    :math:`E_i`, after the sum over channels. A map sums to at most 1, in cells of the layer.

    Differs from the paper:
        The paper's x-features are never negative, and so its maps are :math:`\max(D, 0)` of the same D.

    Args:
        layer: Where to stop, by dotted name or as a module.
        tokens: How a transformer's tokens lie in that layer, ``"vit"`` or ``"swin"``, see :class:`TokenGrid`. Their
            probabilities are summed over channels and enlarged to the image; that of a class token is left out.
            Without it maps are of the layer's own shape.
        grid: Cells along height and width, for ``"vit"``, where they cannot be read from the patch embedding.
        contrastive: Whether to draw c-MWP, or MWP. See :class:`captum_xnn.ExcitationBP` for this and what follows.
        negative: What negative activations count.
        add: Shares of residual branches.
        batch_norm: What a negative scale after an affine layer does.
        strict: Whether an operation without a rule is an error.

    Raises:
        ValueError: If a setting is unknown.

    Example:
        >>> ExcitationMaps(layer="layer3")
        ExcitationMaps(layer='layer3')

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 2.3.
    """

    def __init__(
        self,
        layer: str | nn.Module | None = None,
        *,
        tokens: str | None = None,
        grid: tuple[int, int] | None = None,
        contrastive: bool = True,
        negative: Negative = "excitatory",
        add: Literal["signed", "excitatory"] = "signed",
        batch_norm: Literal["sign", "pass"] = "sign",
        strict: bool = False,
    ) -> None:
        self.layer = layer
        self.tokens = _checked_tokens(tokens)
        self.grid = _checked_grid(grid, self.tokens)
        self.settings = Settings(contrastive, negative, add, batch_norm, strict).checked()
        self._chosen: WeakKeyDictionary[nn.Module, dict[Any, str | None]] = WeakKeyDictionary()
        self._layouts = _Layouts()

    def __repr__(self) -> str:
        named = (("layer", self.layer), ("tokens", self.tokens), ("grid", self.grid))
        given: dict[str, Any] = {k: v for k, v in named if v is not None}
        given |= {k: v for k, v in asdict(self.settings).items() if v != getattr(Settings(), k)}
        return f"ExcitationMaps({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_chosen": None, "_layouts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _chosen=WeakKeyDictionary(), _layouts=_Layouts())

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
        """Return maps (N, K, 1, H, W) of images, or one tensor (N, K, ...) per input; never negative.

        Images of a model without a layer to stop at have maps at the pixels, (N, K, C, H, W).

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            features: The K x-features to draw, 0-based.
            additional_forward_args: Further arguments of the model.
            internal_batch_size: Maps computed at once; bounds the memory. All of them, if None.
            settings: Settings for this call, which go before those given at construction.

        Raises:
            LayerNotFoundError: If the model has no layer of that name.
            TypeError: If a setting is unknown, or there is no layer to stop at and the inputs are integers.
            UnsupportedOperationError: If an operation cannot be seen, or has no rule where rules are strict.
            ValueError: If there is nothing to draw, or no number of maps to draw at once.
        """
        refuse_scripted(network.model)
        layer, tokens = settings.pop("layer", self.layer), _checked_tokens(settings.pop("tokens", self.tokens))
        cells = _checked_grid(settings.pop("grid", self.grid), tokens)
        known = asdict(self.settings)
        if unknown := settings.keys() - known.keys():
            raise TypeError(
                f"expected settings of ExcitationMaps, got {', '.join(map(repr, sorted(unknown)))}; it takes: "
                f"{', '.join(sorted({'grid', 'layer', 'tokens', *known}))}"
            )
        chosen = replace(self.settings, **settings).checked()
        if tokens and layer is None:
            raise ValueError(
                f"expected a layer whose tokens lie as tokens={tokens!r} says, got none; name it, as in "
                f"ExcitationMaps('...', tokens={tokens!r})"
            )
        stop = self._stop(network, layer, inputs, additional_forward_args)
        given = network, "" if stop is None else stop.name, inputs, additional_forward_args
        grid = self._layouts.tokens(*given, tokens, cells) if tokens else None
        channels = partial(self._layouts.channels, *given)
        check = partial(self._layouts.refuse_examples_second, *given)
        n, K = len(inputs[0]), len(features)
        if not K:
            raise ValueError("expected at least one x-feature to draw, got none; pass their numbers, such as [0, 1]")
        if internal_batch_size is not None and internal_batch_size < 1:
            raise ValueError(f"expected an internal_batch_size of at least 1, got {internal_batch_size}")
        at_once = max(1, (internal_batch_size or n * K) // K), min(K, internal_batch_size or K)
        image = None if stop is None else self._layouts.image(network, inputs, additional_forward_args)

        def drawn() -> Iterator[tuple[list[int], list[Tensor]]]:
            for some in torch.split(torch.arange(n), at_once[0]):
                x, additional = rows_of(inputs, additional_forward_args, some)
                parts = [
                    _winning(
                        network,
                        x,
                        additional or (),
                        chosen,
                        list(features[i : i + at_once[1]]),
                        stop,
                        channels,
                        check,
                        grid,
                    )
                    for i in range(0, K, at_once[1])
                ]
                made = [torch.cat(each, 1) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)]
                if image is None:
                    yield some.tolist(), [_of_dtype(m, x) for m, x in zip(made, inputs, strict=True)]
                else:
                    yield some.tolist(), [image.enlarged(m) for m in made]

        return gathered(drawn(), n)

    def _stop(
        self,
        network: ExplanationNetwork,
        layer: str | nn.Module | None,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
    ) -> Stop | None:
        """Return the layer to stop at: the given one, or on images one that is chosen once for each size of them."""
        if layer is None and len(inputs) == 1 and inputs[0].dim() == 4 and inputs[0].is_floating_point():
            known = self._chosen.setdefault(network.model, {})
            key = network.layer_name, inputs[0].shape[1:]
            if key not in known:
                (image,), more = rows_of(inputs, additional, torch.tensor([0]))
                channels = self._layouts.image(network, inputs, additional).channels
                known[key] = stopping_layer(network.model, network, image, more or (), channels=channels)
            layer = known[key]
        if layer is None:
            return None
        name, module = find_layer(network.model, layer)
        return Stop(module, name)


class _Choice(ABC):
    """Base of backends that leave each call to one of several others."""

    @abstractmethod
    def choose(self, network: ExplanationNetwork, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> Heatmap:
        """Return the backend for a call.

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            options: Keyword arguments of the call.
        """

    def __call__(
        self, network: ExplanationNetwork, inputs: tuple[Tensor, ...], features: Sequence[int], **options: Any
    ) -> tuple[Tensor, ...]:
        """Return one tensor (N, K, ...) of maps per input; layer methods on images give (N, K, 1, H, W).

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            features: The K x-features to draw, 0-based.
            options: Further arguments, as :class:`FromCaptum` takes them.
        """
        return self.choose(network, inputs, options)(network, inputs, features, **options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class GradientMaps(_Choice):
    """Gradient x activation at the last layer with feature maps, or input x gradient where there is none.

    The default for groups of contributions. The maps of their x-features sum to the map that this backend gives the
    model's own output, place by place.

    Example:
        >>> GradientMaps()
        GradientMaps()
    """

    def __init__(self) -> None:
        self._at_layer, self._at_inputs = FromCaptum(LayerGradientXActivation), FromCaptum(InputXGradient)

    def choose(self, network: ExplanationNetwork, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> Heatmap:
        """Return gradient x activation for images of a network with feature maps, else input x gradient.

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            options: Keyword arguments of the call; ``layer`` names a layer.
        """
        layered = "layer" in options or (network.spatial_layer_name is not None and _has_images(inputs))
        return self._at_layer if layered else self._at_inputs

    def __call__(
        self, network: ExplanationNetwork, inputs: tuple[Tensor, ...], features: Sequence[int], **options: Any
    ) -> tuple[Tensor, ...]:
        """Return one tensor (N, K, ...) of maps per input; layer methods on images give (N, K, 1, H, W).

        Groups of contributions share one forward pass (:mod:`captum_xnn.heatmaps._shared_pass`).

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            features: The K x-features to draw, 0-based.
            options: Further arguments, as :class:`FromCaptum` takes them.
        """
        chosen = self.choose(network, inputs, options)
        if isinstance(network, ContributionNetwork) and not {*options} - _SHARED:
            found = self._together(network, inputs, features, layered=chosen is self._at_layer, **options)
            if found is not None:
                return found
        return chosen(network, inputs, features, **options)

    def _together(
        self,
        network: ContributionNetwork,
        inputs: tuple[Tensor, ...],
        features: Sequence[int],
        *,
        layered: bool,
        additional_forward_args: tuple[Any, ...] | None = None,
        internal_batch_size: int | None = None,
        layer: str | nn.Module | None = None,
    ) -> tuple[Tensor, ...] | None:
        """Return the maps of all x-features from one forward pass for each chunk; None where that cannot be."""
        given = (additional_forward_args or ())[:-1]  # the last ones are the slopes of the path
        name, place = self._at_layer._layer(network, network, layer) if layered else ("", None)
        n, K, chunks = len(inputs[0]), len(features), []
        for rows in torch.split(torch.arange(n), internal_batch_size or n):
            x, more = rows_of(inputs, given, rows)
            made = gradients_of_groups(network.form, network.tail, network.target, x, more or (), features, place)
            if made is None:
                return None
            maps = [values[:, None] * gradients for values, gradients in made]
            if place is None:
                chunks.append([_of_dtype(m, like) for m, like in zip(maps, inputs, strict=True)])
                continue
            values, layouts = made[0][0], self._at_layer._layouts
            asked = network, name, inputs, additional_forward_args
            layouts.refuse_examples_second(*asked, values.shape, values, len(rows))
            channels = layouts.channels(*asked, values.shape) if values.dim() > 2 else None
            done = layouts.image(network, inputs, additional_forward_args).finished(maps[0].flatten(0, 1), channels)
            chunks.append([done.reshape(len(rows), K, *done.shape[1:])])
        return tuple(torch.cat(parts).contiguous() for parts in zip(*chunks, strict=True))


class DefaultMaps(_Choice):
    """:class:`GradientMaps` for groups of contributions, :class:`ExcitationMaps` for learned networks and outputs.

    Example:
        >>> DefaultMaps()
        DefaultMaps()
    """

    def __init__(self) -> None:
        self.of_groups, self.of_networks = GradientMaps(), ExcitationMaps()

    def choose(self, network: ExplanationNetwork, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> Heatmap:
        """Return the backend for the form of the network.

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            options: Keyword arguments of the call.
        """
        return self.of_groups if isinstance(network, ContributionNetwork) else self.of_networks


def _winning(
    network: ExplanationNetwork,
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...],
    settings: Settings,
    features: list[int],
    stop: Stop | None,
    channels: Callable[[Sequence[int]], int],
    check: Callable[[Sequence[int], Tensor, int], None],
    grid: TokenGrid | None,
) -> list[Tensor]:
    """Return the maps of some x-features, (N, K, ...) for each leaf, never negative.

    Feature maps of a layer to stop at are summed over channels, which are in the dimension that ``channels`` returns.
    ``check`` raises where such a layer has no row for each example.
    """
    done, winners = propagate(
        network,
        inputs,
        additional,
        settings,
        lambda E: torch.stack([one_hot(E, k) for k in features]),
        module=network.model,
        stop=stop,
        tolerance=_VISIBLE,
    )
    maps = []
    for p, leaf, is_reached in zip(winners.p, done.leaves, winners.reached, strict=True):
        if stop is not None and any(winners.reached) and not is_reached:
            continue  # of a layer that returns several tensors, one that goes nowhere, such as attention weights
        if stop is not None and grid is None:
            check(p.shape[1:], p[0], len(inputs[0]))
        p = p.transpose(0, 1)
        if grid is not None:
            p = grid(p.flatten(0, 1)).sum(1, keepdim=True).unflatten(0, p.shape[:2])
        elif stop is not None and leaf.dim() in _MODES:
            p = p.sum(channels(p.shape[1:]) + 1).unsqueeze(2)
        if settings.contrastive:
            opposite = (done.output[:, features] < 0) & network.centred
            side = torch.where(opposite, -1, 1).to(p.dtype)
            p = p * side.reshape(*side.shape, *[1] * (p.dim() - 2))
        maps.append(p.detach().clamp(min=0))
    return maps


def _has_images(inputs: tuple[Tensor, ...]) -> bool:
    """Whether the first input of many dimensions holds images, not volumes."""
    at = first_image(inputs)
    return at is not None and inputs[at].dim() == 4


class _Image(NamedTuple):
    """The input whose size maps of a layer have."""

    values: Tensor
    """An image (N, C, H, W), a volume, one of these with channels elsewhere, or any other input."""
    channels: int
    """The dimension of its channels."""

    @property
    def first(self) -> Tensor:
        """The image with its channels first."""
        return self.values.movedim(self.channels, 1) if self.values.dim() in _MODES else self.values

    def finished(self, maps: Tensor, channels: int | None) -> Tensor:
        """Return a layer's maps (R, ...) in the dtype of the image; feature maps in its size, with one channel.

        Args:
            maps: Maps of the layer's own shape.
            channels: The dimension of their channels, over which they are summed.
        """
        if maps.dim() == self.values.dim() and self.values.dim() in _MODES:
            maps = self._resized(maps.sum(channels or 1)[:, None])
        return _of_dtype(maps, self.values)

    def enlarged(self, maps: Tensor) -> Tensor:
        """Return a layer's maps (N, K, 1, h, w) in the size and the dtype of the image."""
        if maps.dim() == self.values.dim() + 1 and self.values.dim() in _MODES:
            one = self._resized(maps.flatten(0, 1))
            maps = one.reshape(*maps.shape[:2], *one.shape[1:])
        return _of_dtype(maps, self.values)

    def _resized(self, maps: Tensor) -> Tensor:
        """Return maps (R, 1, ...) in the size of the image, with the one channel where the image has its channels."""
        size = self.first.shape[2:]
        maps = F.interpolate(maps, size, mode=_MODES[self.values.dim()], align_corners=False)
        return maps.movedim(1, self.channels)


def _of_dtype(maps: Tensor, like: Tensor) -> Tensor:
    return maps.to(like.dtype if like.is_floating_point() else maps.dtype).contiguous()


@contextmanager
def _shapes(layer: nn.Module | None, name: str, explained: str) -> Iterator[list[torch.Size]]:
    """Notes the shapes of what a layer returns, and tells where it never ran before the explained one."""
    seen: list[torch.Size] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(output.shape)

    handle = None if layer is None else layer.register_forward_hook(note)
    try:
        yield seen
    except AssertionError as error:
        if "Forward hook did not obtain" in str(error):
            raise _not_before(name, explained) from error
        raise
    finally:
        if handle is not None:
            handle.remove()


def _not_before(name: str, explained: str) -> LayerNotReachedError:
    return LayerNotReachedError(
        f"expected layer {name!r} to run before the explained layer {explained!r}, where the x-features' network ends, "
        "but it does not; choose one that does"
    )


@contextmanager
def _of_dtypes(network: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """Has the network take its inputs in the dtypes given: Captum draws noise in torch's default dtype."""

    def cast(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        dtypes = {i: x.dtype for i, x in enumerate(inputs) if x.is_floating_point()}
        return tuple(a.to(dtypes[i]) if i in dtypes and isinstance(a, Tensor) else a for i, a in enumerate(arguments))

    handle = network.register_forward_pre_hook(cast)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _outputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Return a list to which the network's outputs are added, before a method's own hooks see them."""
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    try:
        yield seen
    finally:
        handle.remove()


def _refuse_delta(method: str, attributions: Any, outputs: Tensor, target: Tensor) -> None:
    """Raise where attributions do not sum to what the x-feature differs from its value at the baselines.

    DeepLift runs inputs and baselines as one batch; the Shap forms run each input with all baselines, and average.
    """
    rows = len(target)
    at_inputs, at_baselines = outputs.double().reshape(2, rows, -1, outputs.shape[1]).mean(2)
    wanted = (at_inputs - at_baselines).gather(1, target[:, None])[:, 0]
    each = torch.cat([a.detach().double().reshape(rows, -1) for a in format_tensors(attributions)], 1)
    if not bool(each.isfinite().all()):
        return  # the caller warns about this
    off, size = float((each.sum(1) - wanted).abs().mean()), float(each.sum(1).abs().mean())
    # Where attributions cancel, or inputs are close to their baselines, rounding alone is as large as their sum.
    rounding = _ROUNDINGS * torch.finfo(outputs.dtype).eps * float(outputs.abs().amax())
    if off > 0.01 * (off + size) and off > max(rounding, 1e-4 * float(each.abs().sum(1).mean())):
        raise UnsupportedOperationError(
            f"expected attributions of {method} that sum to the x-feature's difference from the baseline, got "
            f"{off / (off + size):.0%} off: it takes non-linearities that it has no rule for, such as GELU, attention "
            "and layer norm, for linear, and also functions such as x.relu() where torch.fx cannot follow the model. "
            "Use IntegratedGradients or the default heatmap"
        )


def _decorated(attribution: Attribution) -> Attribution:
    """Return an attribution whose method has what Captum's decorator leaves, which a noise tunnel calls."""
    method = type(attribution).attribute
    if not hasattr(method, "__wrapped__"):
        attribution.attribute = functools.wraps(method)(functools.partial(method, attribution))
    return attribution


def _around(settings: dict[str, Any]) -> tuple[FromCaptum, dict[str, Any]]:
    """Return the method that a noise tunnel averages, and the other settings."""
    rest = dict(settings)
    method = rest.pop("attribution_method", None)
    if method is None:
        raise TypeError(
            "expected the method to average, got none; pass it as in FromCaptum(NoiseTunnel, "
            "attribution_method=Saliency, nt_samples=8), or wrap the XNNAttribution in a NoiseTunnel"
        )
    return method if isinstance(method, FromCaptum) else FromCaptum(method), rest


def rows_of_settings(settings: dict[str, Any], n: int, rows: Sequence[int]) -> dict[str, Any]:
    """Return the settings for some of the examples: baselines and feature masks that have a row for each, by row.

    Args:
        settings: Settings of an attribution method's call.
        n: Number of examples N.
        rows: Which of them, 0-based; they may repeat.

    Example:
        >>> rows_of_settings({"baselines": torch.tensor([[1.0], [2.0]]), "n_steps": 8}, 2, [1])
        {'baselines': tensor([[2.]]), 'n_steps': 8}
    """
    index = torch.tensor(list(rows))

    def pick(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(pick(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        has_rows = value.dim() > 0 and len(value) == n > 1
        # Captum views masks as rows, for which those that were expanded are not laid out.
        return (value[index.to(value.device)] if has_rows else value).contiguous()

    return {k: pick(v) if k in ("baselines", "feature_mask") else v for k, v in settings.items()}


def _leaves(
    inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, rows: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """Return the rows with the inputs cut off from the user's own, as leaves that take gradients where they can."""
    picked, more = rows_of(tuple(x.detach() for x in inputs), additional, rows)
    return tuple(x.requires_grad_(x.is_floating_point()) for x in picked), more


_MODES = {4: "bilinear", 5: "trilinear"}
"""How maps of images, and of volumes, are enlarged."""


def as_heatmap(heatmap: type[Attribution] | Heatmap | None) -> Heatmap:
    """Return a backend from a Captum class or a backend; the default one from None.

    Args:
        heatmap: A Captum attribution class, a backend object, or None for :class:`DefaultMaps`.

    Raises:
        TypeError: If it is neither.

    Example:
        >>> from captum.attr import IntegratedGradients
        >>> as_heatmap(IntegratedGradients)
        FromCaptum(IntegratedGradients)
    """
    if heatmap is None:
        return DefaultMaps()
    if isinstance(heatmap, type):
        return FromCaptum(heatmap)
    if isinstance(heatmap, Attribution) or not callable(heatmap):
        raise TypeError(
            f"expected a Captum class or a heatmap backend, got {type(heatmap).__name__}; pass the class "
            "and its settings as FromCaptum(Class, setting=...), since the backend builds the object itself"
        )
    return heatmap
