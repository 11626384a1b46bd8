"""Trace the modules that run before a layer, in their order, and the last one with spatial outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.layers._grid import channels_by_numbers, halves, has_channels_last, is_over_image
from captum_xnn.layers._hooks import hooked
from captum_xnn.layers._lookup import hookable
from captum_xnn.layers._pixels import first_image, image_channels, repeated
from captum_xnn.layers._read import not_reached
from captum_xnn.layers._state import eager, untouched

__all__ = ["CELLS", "Trace", "Tracer", "Trials", "trace"]

Trials = dict[Any, nn.Module | None]
"""The last module with feature maps, by the modules that a trace considered and the shapes of their outputs."""

CELLS = 4
"""Cells along the shorter side of feature maps that are worth drawing. Some networks pool to fewer.

On FunnyBirds, maps of 4 x 4 cells agree with what covered patches take as well as maps of 7 x 7 cells. Maps of 15 x 15
cells of an earlier layer agree less.
"""


class Trace(NamedTuple):
    """The modules that one forward pass up to the layer executed."""

    leaves: tuple[nn.Module, ...]
    """Modules without children, each once, in the order of their first call."""
    calls: int
    """How often the layer was called."""
    spatial: nn.Module | None
    """The last module before the layer whose output was feature maps (N, C, H, W) of the image, or None.

    Maps with enough cells along each side come first, then maps of several cells. Where a block returns
    the output of its last leaf, this is the leaf. Dropout and identities are skipped, as they change nothing.
    """
    ran: frozenset[nn.Module]
    """All modules that ran to their end before the layer's last output, and it."""


_IDLE = (nn.Identity, nn.modules.dropout._DropoutNd)
# Modules whose output is a grid over that of their input.
_LOCAL = (
    *(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d, nn.PixelShuffle, nn.PixelUnshuffle),
)


def trace(
    model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], *, name: str = "layer", cells: int = CELLS
) -> Trace:
    """Trace the leaf modules that a forward pass executes up to the layer, and count its calls of the layer.

    Captum's DeepLift and LRP walk the registered modules, not the executed ones. A network composed of this model must
    therefore register exactly these leaves.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model.
        name: Name of the layer in errors.
        cells: Cells along the shorter side of the feature maps to prefer.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> trace(model, model[1], (torch.zeros(1, 2),)).leaves
        (Linear(in_features=2, out_features=3, bias=True), ReLU())
    """
    tracer = Tracer(model, layer, inputs, name=name, cells=cells)
    with tracer.noting(), torch.no_grad(), eager():
        model(*inputs)
    return tracer.trace()


class Tracer:
    """Traces a forward pass that runs for another purpose as well.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model, of the pass to trace.
        name: Name of the layer in errors.
        cells: Cells along the shorter side of the feature maps to prefer.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> tracer = Tracer(model, model[1], (torch.zeros(1, 2),))
        >>> with tracer.noting():
        ...     y = model(torch.zeros(1, 2))
        >>> tracer.trace().leaves
        (Linear(in_features=2, out_features=3, bias=True), ReLU())
    """

    def __init__(
        self, model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], *, name: str = "layer", cells: int = CELLS
    ) -> None:
        self.model, self.layer, self.inputs, self.name, self.cells = model, layer, inputs, name, cells
        self._order: list[nn.Module] = []
        self._grids: dict[nn.Module, _Grid] = {}
        """The last output of each module, in the order of the calls."""
        self._ends: list[tuple[int, list[_Grid], frozenset[nn.Module]]] = []
        self._ran: set[nn.Module] = set()
        self._at = at = first_image(inputs)
        self._sizes: set[tuple[int, ...]] = set()
        self._tokens: set[int] = set()
        if at is not None:
            self._sizes = {tuple(inputs[at].shape[2:]), tuple(inputs[at].shape[1:-1])}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the modules of the forward pass in this context."""
        try:
            with hooked(hookable(self.model, self.layer), self._note):
                yield
        finally:
            self._grids.clear()  # their memory is free
            for _, seen, _ in self._ends:
                seen[:] = [g._replace(output=None) for g in seen]

    def _note(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._ran.add(module)
        is_block = any(child is not None for child in module._modules.values())
        if not is_block:
            self._order.append(module)
        self._tokens |= {x.shape[1] for x in (*_first(arguments), output) if isinstance(x, Tensor) and x.dim() == 3}
        image = None if self._at is None else self.inputs[self._at]
        if module is not self.model and _is_spatial(output, image):
            is_attention = output.shape[2] in self._tokens and len({*output.shape[2:]}) == 1  # or may be
            if not is_attention and _keeps_sizes(module, arguments, self._sizes):
                self._sizes.add(tuple(output.shape[2:]))
            last = next(reversed(self._grids.values()), None)
            own = module, not is_attention and tuple(output.shape[2:]) in self._sizes
            if last is not None:
                if isinstance(module, _IDLE) or (is_block and _is_unchanged(output, last)):
                    own = last.module, last.is_sure
                self._grids[last.module] = last._replace(output=None)  # its memory is free
            self._grids.pop(own[0], None)
            self._grids[own[0]] = _Grid(*own, tuple(output.shape), output, _version(output))
        else:
            self._grids.pop(module, None)  # maps would be drawn at this call, which gives no feature maps
        if module is self.layer:
            self._ends.append((len(self._order), list(self._grids.values()), frozenset(self._ran)))

    def trace(self, trials: Trials | None = None) -> Trace:
        """Return the trace. The model runs again where its modules do not show whether their outputs are feature maps.

        Args:
            trials: Results of such runs in earlier traces, which this one does not repeat. Receives its own.

        Raises:
            LayerNotReachedError: If the forward pass never called the layer.
        """
        if not self._ends:
            raise not_reached(self.model, self.name)
        count, seen, before = self._ends[-1]
        fine = [g for g in seen if min(g.shape[2:]) >= self.cells]
        trials = {} if trials is None else trials
        of_some = (_last(self.model, grids, self.inputs, self._at, trials) for grids in (fine, seen))
        spatial = next((module for module in of_some if module is not None), None)
        return Trace(tuple(dict.fromkeys(self._order[:count])), len(self._ends), spatial, before)


class _Grid(NamedTuple):
    """The last output of a module that may be feature maps."""

    module: nn.Module
    is_sure: bool
    """Whether convolutions and poolings lead from the image to maps of this size, and no tokens are as many."""
    shape: tuple[int, ...]
    output: Any
    version: int


def _is_spatial(output: Any, image: Tensor | None) -> bool:
    """Whether an output has the dimensions of feature maps of several cells, (N, C, H, W), or those of volumes."""
    dimensions = 5 if image is not None and image.dim() == 5 else 4
    return isinstance(output, Tensor) and output.dim() == dimensions and math.prod(output.shape[2:]) > 1


def _keeps_sizes(module: nn.Module, arguments: Any, sizes: set[tuple[int, ...]]) -> bool:
    """Whether a module computes feature maps from ones of a known size, or from the image."""
    sure = [x for x in _first(arguments) if isinstance(x, Tensor) and tuple(x.shape[2:]) in sizes]
    return isinstance(module, _LOCAL) and bool(sure)


def _first(arguments: Any) -> tuple[Any, ...]:
    """Return the first positional argument of a module, as a tuple; empty without one."""
    return arguments[:1] if isinstance(arguments, tuple) else ()


def _last(
    model: nn.Module, grids: list[_Grid], inputs: tuple[Any, ...], at: int | None, trials: Trials
) -> nn.Module | None:
    """Return the last module with feature maps.

    Modules whose maps have a size of their own, as attention weights and blocks with channels last do, are tried on
    images that differ in one half. ``trials`` keeps the result for the same modules with outputs of the same shapes.
    """
    if at is None or not grids or grids[-1].is_sure or inputs[at].dim() != 4:
        return grids[-1].module if grids else None
    key = tuple((g.module, g.is_sure, g.shape[1:]) for g in grids)
    if key not in trials:
        trials[key] = _last_by_trial(model, grids, inputs, at)
    return trials[key]


def _last_by_trial(model: nn.Module, grids: list[_Grid], inputs: tuple[Any, ...], at: int) -> nn.Module | None:
    """Return the last module whose output is a grid over the image."""
    channels = image_channels(model, inputs)
    image = inputs[at].movedim(channels, 1)
    likely = [g for g in grids if g.is_sure or not _is_plainly_last(g.shape, image)]
    tried: dict[nn.Module, bool | None] = {}
    if likely and not likely[-1].is_sure:
        tried = _tried(model, [g.module for g in likely if not g.is_sure], inputs, at, channels)
    unknown = {g.module: not has_channels_last(g.shape, image) for g in likely}
    told = [(g, g.is_sure or tried.get(g.module)) for g in likely]
    likely = [g for g, yes in told if yes or (yes is None and unknown[g.module])]
    return likely[-1].module if likely else None


def _is_plainly_last(shape: tuple[int, ...], image: Tensor) -> bool:
    """Whether sizes alone say that an output is (N, H, W, C). Those of few cells do not."""
    return min(shape[1:3]) >= 5 and channels_by_numbers(shape, image) == 3


def _tried(
    model: nn.Module, modules: list[nn.Module], inputs: tuple[Any, ...], at: int, channels: int
) -> dict[nn.Module, bool | None]:
    """Find out for modules whether their outputs are grids over the image, by its halves; None where that is open."""
    found: dict[nn.Module, bool | None] = {}
    if not (inputs[at].is_floating_point() or inputs[at].dtype == torch.uint8):
        return found
    given = list(repeated(inputs, 5))
    given[at] = halves(inputs[at][:1], channels)

    def note(module: nn.Module, _arguments: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            found[module] = is_over_image(output)

    try:
        with hooked(modules, note), untouched(model), torch.no_grad(), eager():
            model(*given)
    except Exception:
        return found  # the model's own code may fail on noise
    return found


def _is_unchanged(output: Tensor, before: _Grid) -> bool:
    """Whether an output is the same tensor as another one, not overwritten in between."""
    return output is before.output and _version(output) == before.version


def _version(x: Tensor) -> int:
    """Count the in-place changes of a tensor; 0 for inference tensors, which have no such count."""
    return 0 if x.is_inference() else x._version
