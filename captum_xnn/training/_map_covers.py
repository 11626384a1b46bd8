"""Cover cells of feature maps, to measure the drops of contributions without running the whole model again.

Covering pixels takes a forward pass of the whole model for every patch. It is faster to cover cells of feature maps
before the layer, if every path from the image to the layer crosses these maps. The cells of a patch are set to zero,
and only the modules between the maps and the layer run again. If the layer's own output is feature maps, nothing runs
again: a patch's drop is the sum of the contributions of its cells (:class:`captum_xnn.training._drops.CellCovering`).

Conventions:
    N examples, feature maps (N, C, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._batching import pieces, rows_of
from captum_xnn.layers._hooks import hooked
from captum_xnn.layers._prefix import Prefix
from captum_xnn.layers._read import run_to_layer
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._trace import trace

__all__ = ["CoveredMaps", "has_cells", "maps_before"]

Region = tuple[tuple[int, int], tuple[int, int]]

# Fewest cells along the shorter side of feature maps that are covered.
_CELLS = 5
# Most covered feature maps in one batch, and most bytes of them.
_COVERED_MAPS, _MAP_BYTES = 256, 1 << 26
# Errors that a model raises where the number of covered maps differs from the number of rows of other values.
_MISFITS = (RuntimeError, ValueError, IndexError, AssertionError)


def has_cells(Z: Tensor, channels: int) -> bool:
    """Whether the layer's own output is feature maps with cells to cover.

    Args:
        Z: The layer's output, (N, ...).
        channels: Its dimension of channels.

    Example:
        >>> has_cells(torch.zeros(1, 8, 6, 6), 1), has_cells(torch.zeros(1, 8, 4, 4), 1)
        (True, False)
    """
    sides = [size for i, size in enumerate(Z.shape[1:], start=1) if i != channels]
    return len(sides) == 2 and min(sides) >= _CELLS


def maps_before(
    tail: Tail, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, at: int
) -> nn.Module | None:
    """Find the last feature maps that every path from the image to the layer crosses; None without such maps.

    Args:
        tail: The model's rest, whose layer gives Z.
        inputs: Tensors (N, ...), on the model's device.
        additional: Further arguments of the model.
        at: Index of the input that holds the images.
    """
    twice = torch.tensor([0, 0], device="cpu")
    with torch.no_grad():
        x, more = rows_of(inputs, additional, twice)
        maps = trace(tail.model, tail.layer, (*x, *(more or ())), name=tail.name, cells=_CELLS).spatial
        if maps is None or maps is tail.layer:
            return None
        first = _Replaced(maps, None)
        _run(tail, x, more, first)
        if first.calls != 1 or first.seen is None or len(first.seen) != 2 or min(first.seen.shape[2:]) < _CELLS:
            return None
        # Another image with the maps of the first one. If Z still differs, another value bypasses the maps.
        x[at][1] = 1 - x[at][1]
        Z = _run(tail, x, more, _Replaced(maps, first.seen))
    return maps if torch.allclose(Z[0], Z[1], rtol=1e-4, atol=1e-6 * float(Z.abs().max())) else None


class CoveredMaps:
    """Computes activations of examples with one patch of their feature maps covered at a time.

    Args:
        tail: The model's rest, whose layer gives Z.
        maps: Module before the layer, from :func:`maps_before`.
        inputs: Tensors (N, ...), on the model's device.
        additional: Further arguments of the model.
    """

    def __init__(
        self, tail: Tail, maps: nn.Module, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None
    ) -> None:
        self.tail, self.maps, self.inputs, self.additional = tail, maps, inputs, additional
        self.prefix = Prefix(tail.model, maps)
        with self.prefix.kept():
            outputs = [self._read(torch.tensor([0], device="cpu"))]
        outputs += [
            self._read(rows) for rows in pieces(inputs, torch.arange(1, len(inputs[0]), device="cpu")) if len(rows)
        ]
        self.Z = torch.cat([Z for Z, _ in outputs])
        """The layer's output without covers, (N, ...)."""
        self.whole = torch.cat([maps for _, maps in outputs])
        """The maps without covers, (N, C, H, W)."""
        self.at_once = max(1, min(_COVERED_MAPS, _MAP_BYTES // (self.whole[0].numel() * self.whole.element_size())))
        """Number of covered maps to compute at once."""
        self.runs_on_first_inputs = True
        """Whether covers run on the inputs of the first example, which stand in for those of all."""
        self.copies: Tensor | None = None

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the layer's output and the maps of some examples."""
        reading = _Replaced(self.maps, None)
        with torch.no_grad():
            Z = _run(self.tail, *rows_of(self.inputs, self.additional, rows), reading)
        assert reading.seen is not None
        return Z, reading.seen

    def activations(self, regions: Sequence[Region], pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Compute Z with patches covered, (len(pairs), ...). The next call may overwrite it.

        Args:
            regions: Cells of each patch: start and end along the rows and along the columns.
            pairs: Example and patch of each cover.
        """
        rows = torch.tensor([i for i, _ in pairs], device="cpu")

        def run(rows: Tensor) -> Tensor:
            """Run the model on some examples, with the covered maps in place of theirs."""
            replaced = _Replaced(self.maps, self._covered(regions, pairs))
            return _run(self.tail, *rows_of(self.inputs, self.additional, rows), replaced)

        with torch.no_grad():
            if self.runs_on_first_inputs:
                try:
                    with nullcontext() if not self.prefix.is_complete else self.prefix.returned():
                        Z = run(torch.tensor([0], device="cpu"))
                    if len(Z) == len(pairs):
                        return Z
                except _MISFITS:
                    pass
                self.runs_on_first_inputs = False
            return run(rows)

    def _covered(self, regions: Sequence[Region], pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Copy maps and cover one patch of each; reuse the memory of the last copies, as new memory takes longer."""
        if self.copies is None or len(self.copies) < len(pairs):
            self.copies = self.whole[torch.zeros(len(pairs), dtype=torch.long, device="cpu")]
        maps = self.copies[: len(pairs)]
        first = 0
        for i, some in groupby(i for i, _ in pairs):  # one copy for each example, as each makes threads wait
            last = first + len(list(some))
            maps[first:last] = self.whole[i]
            first = last
        for n, (_, p) in enumerate(pairs):
            (top, bottom), (left, right) = regions[p]
            maps[n, :, top:bottom, left:right] = 0
        return maps


class _Replaced:
    """Reads a module's output, or replaces it by other values, which the model may then overwrite."""

    def __init__(self, module: nn.Module, by: Tensor | None) -> None:
        self.module, self.by = module, by
        self.calls = 0
        self.seen: Tensor | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Read or replace the output in this context."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            self.calls += 1
            if self.by is None:
                self.seen = output.clone()  # what follows may work in place
            return self.by

        with hooked([self.module], hook):
            yield


def _run(tail: Tail, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, replaced: _Replaced) -> Tensor:
    """Run the model to the layer, with a module's output read or replaced."""
    with replaced.on():
        return run_to_layer(
            tail.model,
            tail.layer,
            (*inputs, *(additional or ())),
            calls=tail.calls,
            name=tail.name,
            output_transform=tail.output_transform,
        )
