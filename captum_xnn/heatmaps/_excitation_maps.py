r"""The heatmap backend that draws x-features by excitation backprop.

Conventions:
    N examples, K x-features to draw. Maps are (N, K, ...), never negative, detached, contiguous, of the input's dtype
    and device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_xnn.excitation_bp._propagation import Stop, one_hot, propagate, refuse_scripted
from captum_xnn.excitation_bp._settings import SettingNames, Settings, takes_settings
from captum_xnn.excitation_bp._stopping import stopping_layer
from captum_xnn.heatmaps._layouts import LayerCall, Layouts, has_pixels, of_dtype
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.heatmaps._spreading import spread
from captum_xnn.heatmaps._token_grid import TokenGrid, checked_grid, checked_tokens
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._lookup import find_layer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ExcitationMaps"]

# Lost probability that visibly changes a map. Neurons that only their bias excites, as in small networks, lose less.
_VISIBLE = 0.05

# Settings of the backend itself.
_OWN = ("layer", "tokens", "grid")


class ExcitationMaps:
    r"""Contrastive winning probabilities of every x-feature, by excitation backprop: the default of learned networks.

    On images the backend sums the probabilities of one layer over channels and enlarges them to the input.
    It chooses this layer (:mod:`captum_xnn.excitation_bp._stopping`): after a ReLU, on every path, with at least
    14 x 14 cells. Other inputs get probabilities of their own shape. Integer inputs need a layer. The maps of all
    x-features come from one forward pass and one backward pass.

    A map shows the evidence for the side of 0 on which the x-feature is: :math:`\max(\pm D, 0)` with the sign of
    :math:`E_k`, after the sum over channels. A map sums to at most 1 over the cells of the layer.

    If a strided convolution skips cells of this layer, as the shortcuts of ResNets do, the mass of each cell is divided
    among its neighbours (:mod:`captum_xnn.heatmaps._spreading`). Otherwise the map would show a lattice.

    Differs from the paper:
        The paper's x-features are never negative, so its maps are :math:`\max(D, 0)` of the same D. They are not
        spread over skipped cells. VGG, which the paper explains, has no convolutions that skip cells.

    Args:
        layer: The layer to stop at, by dotted name or as a module.
        tokens: How a transformer's tokens lie in that layer: ``"vit"`` for (N, tokens, C), where some tokens are the
            cells of an image, or ``"swin"`` for (N, H, W, C). The backend sums their probabilities over channels and
            enlarges them to the image, without that of a class token. Without this setting maps have the layer's own
            shape.
        grid: Cells along height and width, for ``"vit"``, if the patch embedding does not show them.
        settings: The settings of :class:`captum_xnn.ExcitationBP`, such as ``contrastive=False`` for MWP.

    Raises:
        TypeError: If a setting is unknown.
        ValueError: If a setting has an unknown value.

    Example:
        >>> ExcitationMaps(layer="layer3")
        ExcitationMaps(layer='layer3')

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 2.3.
    """

    runs_once = True
    """Whether one forward pass draws all maps, so that the pass can also read the layer and the outputs."""
    draws_winners = True
    """Whether maps are the evidence for one output, whatever its sign, so that a difference of outputs needs two."""

    @takes_settings
    def __init__(
        self,
        layer: str | nn.Module | None = None,
        *,
        tokens: str | None = None,
        grid: tuple[int, int] | None = None,
        **settings: Unpack[SettingNames],
    ) -> None:
        self.layer = layer
        self.tokens = checked_tokens(tokens)
        self.grid = checked_grid(grid, self.tokens)
        self.settings = Settings().replaced(settings, owner="ExcitationMaps", others=_OWN)
        self._chosen: WeakKeyDictionary[nn.Module, dict[Any, str | None]] = WeakKeyDictionary()
        self._layouts = Layouts()

    def __repr__(self) -> str:
        named = (("layer", self.layer), ("tokens", self.tokens), ("grid", self.grid))
        given: dict[str, Any] = {k: v for k, v in named if v is not None}
        given |= {k: v for k, v in asdict(self.settings).items() if v != getattr(Settings(), k)}
        return f"ExcitationMaps({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_chosen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _chosen=WeakKeyDictionary())

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
        """Draw maps (N, K, 1, H, W) of images, or (N, K, ...) for each other input; no map is negative.

        A model without a layer to stop at gets maps at the pixels, (N, K, C, H, W).

        Args:
            network: From the model's inputs to its x-features.
            inputs: Input tensors (N, ...).
            features: Indices of the K x-features to draw.
            additional_forward_args: Further arguments of the model.
            internal_batch_size: Number of maps computed at once, to bound the memory. All maps, if None.
            settings: Settings for this call; they override those of the constructor.

        Raises:
            LayerNotFoundError: If the model has no layer of that name.
            TypeError: If a setting is unknown, or the inputs are integers and there is no layer to stop at.
            UnsupportedOperationError: If an operation cannot be seen, or has no rule and ``strict`` is set.
            ValueError: If there are no x-features to draw, or ``internal_batch_size`` is below 1.
        """
        refuse_scripted(network.model)
        layer, tokens = settings.pop("layer", self.layer), checked_tokens(settings.pop("tokens", self.tokens))
        cells = checked_grid(settings.pop("grid", self.grid), tokens)
        chosen = self.settings.replaced(settings, owner="ExcitationMaps", others=_OWN)
        if tokens and layer is None:
            raise ValueError(
                f"tokens={tokens!r} needs a layer; name it, as in ExcitationMaps(layer='...', tokens={tokens!r})"
            )
        n, K = len(inputs[0]), len(features)
        if not K:
            raise ValueError("features is empty; pass the index of at least one x-feature, such as [0, 1]")
        if internal_batch_size is not None and internal_batch_size < 1:
            raise ValueError(f"internal_batch_size is {internal_batch_size}; pass at least 1, or None for all maps")
        stop = self._stop(network, layer, inputs, additional_forward_args)
        call = LayerCall(network, "" if stop is None else stop.name, inputs, additional_forward_args)
        grid = self._layouts.tokens(call, tokens, cells) if tokens else None
        drawing = _Drawing(chosen, stop, grid, call, self._layouts)
        examples, at_once = max(1, (internal_batch_size or n * K) // K), min(K, internal_batch_size or K)
        image = None if stop is None else self._layouts.image(call)

        def drawn() -> Iterator[tuple[list[int], list[Tensor]]]:
            for some in torch.split(torch.arange(n, device="cpu"), examples):
                x, additional = rows_of(inputs, additional_forward_args, some)
                parts = [
                    drawing.maps(x, additional or (), list(features[i : i + at_once])) for i in range(0, K, at_once)
                ]
                all_maps = [torch.cat(each, 1) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)]
                if image is None:
                    yield some.tolist(), [of_dtype(m, x) for m, x in zip(all_maps, inputs, strict=True)]
                else:
                    yield some.tolist(), [image.enlarged(m) for m in all_maps]

        return gathered(drawn(), n)

    def _stop(
        self,
        network: ExplanationNetwork,
        layer: str | nn.Module | None,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
    ) -> Stop | None:
        """Return the layer to stop at. On images it is chosen once per image size, if the user names none."""
        if layer is None and len(inputs) == 1 and inputs[0].dim() == 4 and inputs[0].is_floating_point():
            chosen = self._chosen.setdefault(network.model, {})
            key = network.layer_name, inputs[0].shape[1:]
            if key not in chosen:
                (image,), more = rows_of(inputs, additional, torch.tensor([0], device="cpu"))
                call = LayerCall(network, network.layer_name, inputs, additional)
                channels = self._layouts.image(call).channels
                chosen[key] = stopping_layer(network.model, network, image, more or (), channels=channels)
            layer = chosen[key]
        if layer is None:
            return None
        name, module = find_layer(network.model, layer)
        return Stop(module, name)


@dataclass(frozen=True)
class _Drawing:
    """All that one call of the backend draws with."""

    settings: Settings
    stop: Stop | None
    grid: TokenGrid | None
    call: LayerCall
    """The layer to stop at, with all inputs."""
    layouts: Layouts

    def maps(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...], features: list[int]) -> list[Tensor]:
        """Draw the maps of some x-features for some examples, (N, K, ...) for each input or tensor of the layer."""
        network = self.call.network
        run, winners = propagate(
            network,
            inputs,
            additional,
            self.settings,
            lambda E: torch.stack([one_hot(E, k) for k in features]),
            module=network.model,
            stop=self.stop,
            tolerance=_VISIBLE,
        )
        maps = []
        for p, leaf, is_reached in zip(winners.p, run.leaves, winners.reached, strict=True):
            if self.stop is not None and any(winners.reached) and not is_reached:
                continue  # a tensor of the layer that goes nowhere, such as attention weights
            if self.stop is not None and self.grid is None:
                self.layouts.refuse_examples_second(self.call, p.shape[1:], p[0], len(inputs[0]))
            p = self._over_channels(p.transpose(0, 1), leaf)
            if self.settings.contrastive:
                p = p * self._sides(run.output[:, features], p)
            p = p.detach().clamp(min=0)
            strides = run.skipped.get(tuple(p.shape[3:])) if self._has_cells(leaf) else None
            maps.append(p if strides is None else spread(p, strides))
        return maps

    def _over_channels(self, p: Tensor, leaf: Tensor) -> Tensor:
        """Sum probabilities (N, K, ...) of a layer over channels, to (N, K, 1, h, w) where it has cells."""
        if self.grid is not None:
            cells: Tensor = self.grid(p.flatten(0, 1))
            return cells.sum(1).reshape(*p.shape[:2], 1, *cells.shape[2:])
        if self._has_cells(leaf):
            shape = p.shape[:1] + p.shape[2:]
            return p.sum(self.layouts.channels(self.call, shape) + 1).unsqueeze(2)
        return p

    def _has_cells(self, leaf: Tensor) -> bool:
        """Whether the maps of a leaf are those of a layer's cells, (N, K, 1, h, w)."""
        return self.grid is not None or (self.stop is not None and has_pixels(leaf))

    def _sides(self, E: Tensor, p: Tensor) -> Tensor:
        """Return -1 for x-features (N, K) below 0, and 1 for all others, in a shape that multiplies p."""
        opposite = (E < 0) & self.call.network.centred
        side = torch.where(opposite, -1, 1).to(p.dtype)
        return side.reshape(*side.shape, *[1] * (p.dim() - 2))
