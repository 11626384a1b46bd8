"""Drops: the contributions that an image loses when one of its patches is covered.

There are three ways to cover a patch, from the slowest to the fastest: :class:`PixelDrops` covers pixels of the image,
:class:`MapDrops` cells of feature maps before the layer, and :class:`CellDrops` cells of the layer's own output. The
last two use the slopes of the whole image.

Conventions:
    N examples, C outputs, D dimensions or channels of Z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._targets import Target
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._path_integral import Integral
from captum_xnn.training._covering import Grid, ImageCovers
from captum_xnn.training._map_covers import CELLS, MapCovers

__all__ = ["CellDrops", "Drops", "MapDrops", "PixelDrops", "drops_of", "has_cells"]

# Covered images in one batch of the model. On a CPU large batches of images leave the cache.
_ROWS, _CPU_ROWS = 64, 16
# Covered feature maps in one batch.
_MAPS = 256


def has_cells(Z: Tensor, form: ContributionGroups) -> bool:
    """Whether the layer's own output is feature maps with cells to cover."""
    places = [size for i, size in enumerate(Z.shape[1:], start=1) if i != form.channels]
    return len(places) == 2 and min(places) >= CELLS


class Drops(Protocol):
    """Computes the drops of some examples' contributions, by one way to cover patches."""

    grid: Grid
    """The patches."""
    at_once: int
    """Number of pairs of example and patch to compute at once."""

    def of(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Compute the drops of contributions, (C, len(pairs), D), for pairs of example and patch."""
        ...


class PixelDrops:
    """Covers patches of the image, and runs the whole model on each.

    If Z is a vector, the rest of the model is cheap, and contributions of a covered image are integrated again. For
    feature maps and tokens, the drops use the slopes of the whole image.
    """

    def __init__(
        self,
        form: ContributionGroups,
        found: Integral,
        covers: ImageCovers,
        tail: Tail,
        additional: tuple[Any, ...] | None,
        targets: Sequence[Sequence[Target]],
    ) -> None:
        self.form, self.found, self.covers, self.tail = form, found, covers, tail
        self.additional, self.targets = additional, targets
        self.whole = form.contributions(found)
        self.grid = covers.grid
        self.at_once = _CPU_ROWS if self.whole.device.type == "cpu" else _ROWS

    def of(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Compute the drops of contributions, (C, len(pairs), D)."""
        rows = torch.tensor([i for i, _ in pairs])
        x, at = self.covers.covered(pairs), rows.to(self.whole.device)
        more = rows_of(self.covers.inputs[:1], self.additional, rows)[1]
        if self.found.Z.dim() == 2:
            loose = torch.full((len(self.targets),), torch.inf)  # no example gets more than the first intervals
            some = [[of[i] for i in rows.tolist()] for of in self.targets]
            covered = self.form.integral(self.tail, x, more, some, scale=loose)
            return self.whole[:, at] - self.form.contributions(covered)
        off = self.found.Z[at] - self.tail.activations(x, more)
        return self.form.by_channel(self.found.slopes[:, at] * off.to(self.found.slopes))


class MapDrops:
    """Covers cells of feature maps before the layer, and runs the modules from there to the layer on each.

    The drops use the slopes of the whole image.
    """

    def __init__(self, form: ContributionGroups, found: Integral, covers: MapCovers, patches: int) -> None:
        self.form, self.found, self.covers = form, found, covers
        self.grid = covers.grid(patches)
        self.at_once = _MAPS

    def of(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Compute the drops of contributions, (C, len(pairs), D)."""
        at = torch.tensor([i for i, _ in pairs]).to(self.found.Z.device)
        off = self.found.Z[at] - self.covers.activations(self.grid, pairs)
        return self.form.by_channel(self.found.slopes[:, at] * off.to(self.found.slopes))


class CellDrops:
    """Sums the contributions of a patch's cells, where the layer's output is feature maps. Nothing runs again."""

    def __init__(self, form: ContributionGroups, found: Integral, patches: int) -> None:
        c = found.contributions(form.base.to(found.slopes))
        self.contributions = c.movedim(form.channels + 1, 2)  # (C, N, D, rows, columns)
        self.grid = Grid(self.contributions.shape[3], self.contributions.shape[4], patches)
        self.at_once = _MAPS

    def of(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Compute the drops of contributions, (C, len(pairs), D)."""
        made = []
        for i, p in pairs:
            (top, bottom), (left, right) = self.grid.regions[p]
            made.append(self.contributions[:, i, :, top:bottom, left:right].sum((2, 3)))
        return torch.stack(made, 1)


def drops_of(drops: Drops, n: int) -> Tensor:
    """Compute the drops of n examples' contributions for each covered patch, (C, n, patches, D)."""
    pairs = drops.grid.pairs(n)
    every = torch.cat([drops.of(pairs[i : i + drops.at_once]).cpu() for i in range(0, len(pairs), drops.at_once)], 1)
    return every.reshape(len(every), n, -1, every.shape[2])
