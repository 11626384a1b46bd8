"""Drops: the contributions and activations that an image loses when one of its patches is covered.

There are three ways to cover a patch, from the slowest to the fastest: :class:`PixelDrops` covers pixels of the image,
:class:`MapDrops` cells of feature maps before the layer, and :class:`CellDrops` cells of the layer's own output. The
last two use the slopes of the whole image.

Conventions:
    N examples, C outputs, D dimensions or channels of Z. Images are (N, C, H, W), or (N, H, W, C) where channels are
    last. A grid has g x g patches of nearly the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._pixels import first_image
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._targets import Target
from captum_xnn.metrics._patches import patch_bounds
from captum_xnn.models._contribution_groups import ContributionGroups, Integral

__all__ = [
    "CellDrops",
    "Drops",
    "Grid",
    "ImageCovers",
    "Lost",
    "MapDrops",
    "PixelDrops",
    "channels_of",
    "drops_of",
    "images_among",
]

# Changes of an activation that count as rounding, in units of the last place.
_ROUNDING = 64
# Covered images in one batch of the model. On a CPU large batches of images leave the cache.
_ROWS, _CPU_ROWS = 64, 16
# Patches whose cells are summed at once.
_MAPS = 256


class Grid:
    """Patches of an image or of feature maps, row by row.

    Args:
        height: Rows of pixels or cells.
        width: Columns.
        per_side: Patches along each side, at most one for each pixel or cell.

    Example:
        >>> Grid(2, 3, 8).regions[-1]
        ((1, 2), (2, 3))
        >>> Grid(1, 2, 8).pairs(2)
        [(0, 0), (0, 1), (1, 0), (1, 1)]
    """

    def __init__(self, height: int, width: int, per_side: int) -> None:
        rows, columns = patch_bounds(height, per_side), patch_bounds(width, per_side)
        self.regions = [(row, column) for row in rows for column in columns]
        """Start and end along the rows and along the columns of each patch."""

    def pairs(self, n: int) -> list[tuple[int, int]]:
        """Return example and patch of each cover, example by example.

        Args:
            n: Number of examples.
        """
        return [(i, p) for i in range(n) for p in range(len(self.regions))]


class ImageCovers:
    """Images with one patch covered at a time, in the mean colour of the image.

    Args:
        inputs: Tensors (N, ...).
        at: Index of the input that holds the images.
        grid: Patches along each side.
        channels: The dimension of the images that holds channels.
    """

    def __init__(self, inputs: tuple[Tensor, ...], at: int, grid: int, *, channels: int = 1) -> None:
        self.inputs, self.at, self.channels = inputs, at, channels
        height, width = inputs[at].movedim(channels, 1).shape[2:]
        self.grid = Grid(height, width, grid)

    def covered(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Return the inputs of some covers, with the patches covered.

        Args:
            pairs: Image and patch of each.
        """
        rows = torch.tensor([i for i, _ in pairs], device="cpu")
        made = [x[rows.to(x.device)] for x in self.inputs]
        images = made[self.at].movedim(self.channels, 1)  # a view
        mean = images.mean((2, 3))
        for n, (_, p) in enumerate(pairs):
            (top, bottom), (left, right) = self.grid.regions[p]
            images[n, :, top:bottom, left:right] = mean[n, :, None, None]
        return tuple(made)


class Lost(NamedTuple):
    """Drops under covered patches, by dimension or channel."""

    contributions: Tensor
    """(C, n, D)."""
    activations: Tensor
    """(n, D)."""


class Drops(Protocol):
    """Computes the drops of some examples, by one way to cover patches."""

    grid: Grid
    """The patches."""
    at_once: int
    """Number of pairs of example and patch to compute at once."""

    def of(self, pairs: Sequence[tuple[int, int]]) -> Lost:
        """Compute the drops for pairs of example and patch."""
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

    def of(self, pairs: Sequence[tuple[int, int]]) -> Lost:
        """Compute the drops for pairs of example and patch."""
        rows = torch.tensor([i for i, _ in pairs], device="cpu")
        x, at = self.covers.covered(pairs), rows.to(self.whole.device)
        more = rows_of(self.covers.inputs[:1], self.additional, rows)[1]
        if self.found.Z.dim() == 2:
            loose = torch.full(
                (len(self.targets),), torch.inf, device="cpu"
            )  # an infinite tolerance: no interval is halved
            some = [[of[i] for i in rows.tolist()] for of in self.targets]
            covered = self.form.integral(self.tail, x, more, some, scale=loose)
            return Lost(self.whole[:, at] - self.form.contributions(covered), _difference(self.found.Z[at], covered.Z))
        return _by_slopes(self.form, self.found, at, self.tail.activations(x, more))


class MapDrops:
    """Covers cells of feature maps before the layer, and runs the modules from there to the layer on each.

    The drops use the slopes of the whole image. ``activations`` computes Z for pairs of example and patch, with that
    patch of the feature maps covered (:meth:`captum_xnn.training._map_covers.MapCovers.activations`).
    """

    def __init__(
        self,
        form: ContributionGroups,
        found: Integral,
        grid: Grid,
        activations: Callable[[Sequence[tuple[int, int]]], Tensor],
        at_once: int,
    ) -> None:
        self.form, self.found, self.grid, self.activations = form, found, grid, activations
        self.at_once = at_once

    def of(self, pairs: Sequence[tuple[int, int]]) -> Lost:
        """Compute the drops for pairs of example and patch."""
        at = torch.tensor([i for i, _ in pairs], device="cpu").to(self.found.Z.device)
        return _by_slopes(self.form, self.found, at, self.activations(pairs))


class CellDrops:
    """Sums the contributions of a patch's cells, where the layer's output is feature maps. Nothing runs again."""

    def __init__(self, form: ContributionGroups, found: Integral, grid: int) -> None:
        base = form.base.to(found.slopes)
        self.contributions = found.contributions(base).movedim(form.channels + 1, 2)  # (C, N, D, rows, columns)
        self.activations = (found.Z.to(base) - base).movedim(form.channels, 1)  # (N, D, rows, columns)
        self.grid = Grid(self.contributions.shape[3], self.contributions.shape[4], grid)
        self.at_once = _MAPS

    def of(self, pairs: Sequence[tuple[int, int]]) -> Lost:
        """Compute the drops for pairs of example and patch."""
        contributions, activations = [], []
        for i, p in pairs:
            (top, bottom), (left, right) = self.grid.regions[p]
            contributions.append(self.contributions[:, i, :, top:bottom, left:right].sum((2, 3)))
            activations.append(self.activations[i, :, top:bottom, left:right].sum((1, 2)))
        return Lost(torch.stack(contributions, 1), torch.stack(activations))


def drops_of(drops: Drops, n: int) -> Lost:
    """Compute the drops of n examples for each covered patch: (C, n, patches, D) and (n, patches, D)."""
    pairs = drops.grid.pairs(n)
    every = [drops.of(pairs[i : i + drops.at_once]) for i in range(0, len(pairs), drops.at_once)]
    contributions = torch.cat([one.contributions.cpu() for one in every], 1)
    activations = torch.cat([one.activations.cpu() for one in every])
    D = activations.shape[1]
    return Lost(contributions.reshape(len(contributions), n, -1, D), activations.reshape(n, -1, D))


def images_among(inputs: tuple[Tensor, ...], *, channels: int = 1) -> int | None:
    """Return the index of the input that holds images; None without images.

    Images are the first input of four dimensions with floating-point numbers and several pixels along both sides.

    Args:
        inputs: Tensors (N, ...).
        channels: The dimension of channels in the first image or volume; other images have channels first.

    Example:
        >>> images_among((torch.zeros(2, 7), torch.zeros(2, 3, 4, 4)))
        1
    """
    for i, x in enumerate(inputs):
        channel = channels_of(inputs, i, channels)
        if x.dim() == 4 and x.is_floating_point() and min(x.movedim(channel, 1).shape[2:]) > 1:
            return i
    return None


def channels_of(inputs: tuple[Tensor, ...], at: int, channels: int) -> int:
    """Return the dimension that holds the channels of one input.

    Args:
        inputs: Tensors (N, ...).
        at: Index of the input.
        channels: The dimension of channels in the first image or volume; other images have channels first.

    Example:
        >>> inputs = (torch.zeros(1, 9, 9, 3), torch.zeros(1, 3, 9, 9))
        >>> channels_of(inputs, 0, 3), channels_of(inputs, 1, 3)
        (3, 1)
    """
    return channels if at == first_image(inputs) else 1


def _by_slopes(form: ContributionGroups, found: Integral, at: Tensor, covered: Tensor) -> Lost:
    """Compute the drops from covered activations and the slopes of the whole image.

    Args:
        form: A form with the dimension of channels of Z.
        found: Integral of the whole images.
        at: Row of each covered image in it, (n,).
        covered: Activations of the covered images, (n, ...).
    """
    off = (found.Z[at] - covered).to(found.slopes)
    return Lost(form.by_channel(found.slopes[:, at] * off), form.by_channel(_difference(found.Z[at], covered)))


def _difference(Z: Tensor, covered: Tensor) -> Tensor:
    """Compute Z - covered, (n, ...); differences within rounding are 0."""
    noise = _ROUNDING * torch.finfo(Z.dtype).eps * torch.maximum(Z.abs(), covered.abs())
    off = Z - covered
    return torch.where(off.abs() > noise, off, 0).to(torch.promote_types(Z.dtype, torch.float32))
