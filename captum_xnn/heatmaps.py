"""Heatmap backends: how one attribution map per x-feature is drawn.

A backend is a callable ``backend(network, inputs, features, ...)``; :class:`FromCaptum` makes one of any Captum class.
All maps of one call are computed together, by repeating each input once per x-feature with targets 0..K-1; this equals
a loop over the x-features to rounding, because every row of a batch is attributed on its own.

Conventions:
    N examples, K x-features asked for. Maps are (N, K, ...), detached, contiguous, of the input's dtype and device.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from captum.attr import (
    Attribution,
    FeaturePermutation,
    IntegratedGradients,
    LayerActivation,
    LayerAttribution,
    NoiseTunnel,
)
from torch import Tensor, nn
from torch.nn import functional as F

from captum_xnn._compat import format_tensors
from captum_xnn.host import find_layer, rows_of, untouched
from captum_xnn.network import ExplanationNetwork

__all__ = ["FromCaptum", "Heatmap", "as_heatmap", "rows_of_settings"]

# Arguments of Captum's attribute methods that the backend fills in itself.
_RESERVED = frozenset({"self", "inputs", "target", "additional_forward_args", "return_convergence_delta"})

# Captum says these of every call; both are what the backend intends, and undone afterwards.
_EXPECTED_WARNINGS = ("Setting forward, backward hooks", "Setting backward hooks on ReLU", "Input Tensor")


_UNFIT = {
    NoiseTunnel: "wraps a method and not a model; wrap the XNNAttribution: NoiseTunnel(xnn).attribute(inputs, ...)",
    FeaturePermutation: "mixes the examples of a batch; use FeatureAblation",
    LayerActivation: "is the same for every x-feature; use LayerGradientXActivation",
}


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
        """Returns one tensor (N, K, ...) of maps per input tensor, for the K x-features asked for."""
        ...


class FromCaptum:
    """A heatmap backend made of a Captum attribution class and its settings.

    Each setting goes to the class's constructor or to its ``attribute`` method, whichever names it. A class that
    explains layers takes ``layer=`` by dotted name; without one it takes the last layer with feature maps that runs
    before the explained layer.

    Args:
        method: A class of ``captum.attr``, or your own subclass of its ``Attribution``.
        settings: Constructor and call settings, such as ``n_steps=32``.

    Raises:
        TypeError: If the method is no attribution class, explains neurons only, or names no such setting.

    Example:
        >>> from captum.attr import IntegratedGradients
        >>> FromCaptum(IntegratedGradients, n_steps=32)
        FromCaptum(IntegratedGradients, n_steps=32)
    """

    def __init__(self, method: type[Attribution], /, **settings: Any) -> None:
        if not (isinstance(method, type) and issubclass(method, Attribution)):
            raise TypeError(
                f"expected a class derived from captum.attr.Attribution, got {method!r}; pass the class itself, "
                "such as FromCaptum(captum.attr.DeepLift)"
            )
        self.method = method
        self.settings = settings
        self._constructor = list(inspect.signature(method).parameters)[1:]
        self._call = inspect.signature(method.attribute).parameters
        # These sample from baselines, which need not be as many as the examples.
        self._distribution = method.__name__.removeprefix("Layer") in ("DeepLiftShap", "GradientShap")
        # Captum's DeepLift can be wrong without a word; its delta tells.
        self._checking = {"return_convergence_delta": True} if method.__name__.startswith("DeepLift") else {}
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
        return f"FromCaptum({', '.join([self.method.__name__, *(f'{k}={v!r}' for k, v in self.settings.items())])})"

    def __getstate__(self) -> tuple[type[Attribution], dict[str, Any]]:
        return self.method, self.settings

    def __setstate__(self, state: tuple[type[Attribution], dict[str, Any]]) -> None:
        self.__init__(state[0], **state[1])  # type: ignore[misc]

    def _sort(self, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the settings of the constructor and those of the call."""
        open_call = any(p.kind is p.VAR_KEYWORD for p in self._call.values())
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
        """Returns one tensor (N, K, ...) of maps per input; layer methods on images give (N, K, 1, H, W).

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
        layered = issubclass(self.method, LayerAttribution)
        if not layered:
            _refuse_integers(inputs, self.method.__name__)
        if "layer" in self._constructor:
            construct["layer"] = self._layer(network, construct.get("layer"))
        if internal_batch_size is not None and "internal_batch_size" in self._call:
            call["internal_batch_size"] = internal_batch_size
        if "target" in self._call:
            call["target"] = None  # replaced in every chunk
        rows = torch.arange(len(inputs[0])).repeat_interleave(len(features))
        wanted = torch.tensor(list(features)).repeat(len(inputs[0]))
        size = internal_batch_size or len(rows)
        chunks = []
        for i in range(0, len(rows), size):
            if "target" in call:
                call["target"] = wanted[i : i + size].to(inputs[0].device)
            own = call if self._distribution else rows_of_settings(call, len(inputs[0]), rows[i : i + size].tolist())
            leaves = _leaves(inputs, additional_forward_args, rows[i : i + size])
            with untouched(network):
                chunks.append(self._attribute(network, construct, own, leaves))
        maps = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
        likes = [inputs[0]] * len(maps) if layered else inputs
        return tuple(_finished(m, like, len(features), layered) for m, like in zip(maps, likes, strict=True))

    def _attribute(
        self, network: ExplanationNetwork, construct: dict[str, Any], call: dict[str, Any], arguments: tuple[Any, Any]
    ) -> tuple[Tensor, ...]:
        """Returns the attributions of one chunk, detached."""
        inputs, additional = arguments
        attribution = self.method(network, **construct)
        attribute = getattr(type(attribution).attribute, "__wrapped__", type(attribution).attribute)
        with warnings.catch_warnings():
            for text in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", text, UserWarning)
            given = attribute(attribution, inputs, additional_forward_args=additional, **call, **self._checking)
        if self._checking:
            given, delta = given
            _warn_of_delta(self.method.__name__, given, delta)
        return tuple(a.detach() for a in format_tensors(given))

    def _layer(self, network: ExplanationNetwork, layer: str | nn.Module | None) -> nn.Module:
        """Returns the module that a layer method is to explain."""
        if layer is None:
            layer = network.spatial_layer_name
        if layer is None:
            raise ValueError(
                f"expected a layer with feature maps (N, C, H, W) before {network.layer_name!r} for "
                f"{self.method.__name__}, found none; name one, as in FromCaptum({self.method.__name__}, layer='...')"
            )
        return find_layer(network.model, layer)[1]


def _refuse_integers(inputs: tuple[Tensor, ...], method: str) -> None:
    for i, x in enumerate(inputs):
        if not (x.is_floating_point() or x.is_complex()):
            raise TypeError(
                f"expected floating-point inputs for {method}, got {x.dtype} as input {i}; convert them with .float(), "
                "or, where they are token ids, draw the maps at the embedding: "
                "heatmap=FromCaptum(LayerIntegratedGradients, layer='name.of.the.embedding')"
            )


def _warn_of_delta(method: str, attributions: Any, delta: Tensor) -> None:
    """Warns where attributions do not sum to what the x-feature differs from its value at the baselines."""
    summed = torch.stack([a.detach().flatten(1).sum(1) for a in format_tensors(attributions)]).sum(0)
    off, size = float(delta.detach().abs().mean()), float(summed.abs().mean())
    if off > 0.01 * (off + size):
        warnings.warn(
            f"expected attributions of {method} that sum to the x-feature's difference from the baseline, got "
            f"{off / (off + size):.0%} off: non-linearities of the model are functions, are used twice, or touch "
            "each other (Conv-ReLU-MaxPool), which Captum's DeepLift does not handle. Use IntegratedGradients instead",
            stacklevel=2,
        )


def rows_of_settings(settings: dict[str, Any], n: int, rows: Sequence[int]) -> dict[str, Any]:
    """Returns the settings for some of the examples: baselines and feature masks that have a row for each, by row.

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
        has_rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) == n > 1
        return value[index.to(value.device)] if has_rows else value

    return {k: pick(v) if k in ("baselines", "feature_mask") else v for k, v in settings.items()}


def _leaves(
    inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, rows: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """Returns the rows with the inputs cut off from the user's own, as leaves that take gradients where they can."""
    picked, more = rows_of(tuple(x.detach() for x in inputs), additional, rows)
    return tuple(x.requires_grad_(x.is_floating_point()) for x in picked), more


def _finished(maps: Tensor, like: Tensor, K: int, layered: bool) -> Tensor:
    """Returns maps (N*K, ...) as (N, K, ...) in the input's dtype; a layer's feature maps as (N, K, 1, H, W)."""
    if layered and maps.dim() == 4 and like.dim() == 4:
        maps = F.interpolate(maps.sum(1, keepdim=True), like.shape[2:], mode="bilinear", align_corners=False)
    maps = maps.reshape(-1, K, *maps.shape[1:])
    return maps.to(like.dtype if like.is_floating_point() else maps.dtype).contiguous()


def as_heatmap(heatmap: type[Attribution] | Heatmap | None) -> Heatmap:
    """Returns a backend from a Captum class or a backend; the default one from None.

    Args:
        heatmap: A Captum attribution class, a backend object, or None.

    Raises:
        TypeError: If it is neither.

    Example:
        >>> as_heatmap(IntegratedGradients)
        FromCaptum(IntegratedGradients)
    """
    if heatmap is None:
        return FromCaptum(IntegratedGradients, n_steps=32)
    if isinstance(heatmap, type):
        return FromCaptum(heatmap)
    if isinstance(heatmap, Attribution) or not callable(heatmap):
        raise TypeError(
            f"expected a Captum class or a heatmap backend, got {type(heatmap).__name__}; pass the class "
            "and its settings as FromCaptum(Class, setting=...), since the backend builds the object itself"
        )
    return heatmap
