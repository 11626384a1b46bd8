"""Drops: the contributions and activations that an image loses when one of its patches is covered.

There are three ways to cover a patch, from the slowest to the fastest: :class:`PixelCovering` covers pixels of the
image, :class:`MapCovering` cells of feature maps before the layer, and :class:`CellCovering` cells of the layer's own
output. The last two use the slopes of the whole image. :func:`strongest` selects the patches that are worth a slower
way, after a faster one.

Conventions:
    N examples, C outputs, D dimensions or channels of Z. Images are (N, C, H, W), or (N, H, W, C) where channels are
    last. A grid has g x g patches of nearly the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._pixels import first_image
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._targets import Target
from captum_xnn.metrics._patches import mean_colours, patch_bounds
from captum_xnn.models._contribution_groups import ContributionGroups, Integral
from captum_xnn.models._grouping import Drops

__all__ = [
    "CellCovering",
    "CoveredImages",
    "Covering",
    "Grid",
    "MapCovering",
    "PixelCovering",
    "all_drops",
    "channels_of",
    "images_among",
    "strongest",
]

# Changes of an activation that count as rounding, in units of the last place of its largest value. Operations in half
# precision add up in single precision, so only their results are rounded.
_ROUNDING, _HALF_ROUNDING = 64, 4
# Share of the largest drop of an image below which drops count as equal.
_EQUAL = 1e-6
# Covered images in one batch of the model. On a CPU large batches of images leave the cache.
_IMAGES, _CPU_IMAGES = 64, 16
# Patches whose cells are summed at once.
_CELL_PATCHES = 256


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
        self.shape = len(rows), len(columns)
        """Number of rows and columns of patches."""
        self.regions = [(row, column) for row in rows for column in columns]
        """Start and end along the rows and along the columns of each patch."""

    def pairs(self, n: int) -> list[tuple[int, int]]:
        """Return example and patch of each cover, example by example.

        Args:
            n: Number of examples.
        """
        return [(i, p) for i in range(n) for p in range(len(self.regions))]


class CoveredImages:
    """Images with one patch covered at a time, in the mean colour of the image.

    Args:
        inputs: Tensors (N, ...).
        at: Index of the input that holds the images.
        grid: Patches along each side.
        channels: The dimension of the images that holds channels.
    """

    def __init__(self, inputs: tuple[Tensor, ...], at: int, grid: int, *, channels: int = 1) -> None:
        self.inputs, self.images_at, self.channels = inputs, at, channels
        height, width = inputs[at].movedim(channels, 1).shape[2:]
        self.grid = Grid(height, width, grid)

    def covered(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Return the inputs of some covers, with the patches covered.

        Args:
            pairs: Image and patch of each.
        """
        rows = torch.tensor([i for i, _ in pairs], device="cpu")
        covered = [x[rows.to(x.device)] for x in self.inputs]
        images = covered[self.images_at].movedim(self.channels, 1)  # a view
        mean = mean_colours(images)[:, :, 0, 0]
        for n, (_, p) in enumerate(pairs):
            (top, bottom), (left, right) = self.grid.regions[p]
            images[n, :, top:bottom, left:right] = mean[n, :, None, None]
        return tuple(covered)


class Covering(Protocol):
    """Computes the drops of some examples: one way to cover patches."""

    grid: Grid
    """The patches."""
    at_once: int
    """Number of pairs of example and patch to compute at once."""

    def drops(self, pairs: Sequence[tuple[int, int]]) -> Drops:
        """Compute the drops for n pairs of example and patch: (C, n, D) and (n, D)."""
        ...


class PixelCovering:
    """Covers patches of the image, and runs the whole model on each.

    If Z is a vector, the rest of the model is cheap, and contributions of a covered image are integrated again. For
    feature maps and tokens, the drops use the slopes of the whole image.
    """

    def __init__(
        self,
        form: ContributionGroups,
        integral: Integral,
        images: CoveredImages,
        tail: Tail,
        additional: tuple[Any, ...] | None,
        targets: Sequence[Sequence[Target]],
    ) -> None:
        self.form, self.integral, self.images, self.tail = form, integral, images, tail
        self.additional, self.targets = additional, targets
        self.contributions = form.contributions(integral)
        """Contributions in the whole images, (C, N, D)."""
        self.grid = images.grid
        self.at_once = _CPU_IMAGES if self.contributions.device.type == "cpu" else _IMAGES

    def drops(self, pairs: Sequence[tuple[int, int]]) -> Drops:
        """Compute the drops for pairs of example and patch."""
        rows = torch.tensor([i for i, _ in pairs], device="cpu")
        x, at = self.images.covered(pairs), rows.to(self.contributions.device)
        more = rows_of(self.images.inputs[:1], self.additional, rows)[1]
        if self.integral.Z.dim() == 2:
            # An infinite tolerance: no interval is halved.
            scale = torch.full((len(self.targets),), torch.inf, device="cpu")
            targets = [[of_output[i] for i in rows.tolist()] for of_output in self.targets]
            covered = self.form.integral(self.tail, x, more, targets, scale=scale)
            drops = self.contributions[:, at] - self.form.contributions(covered)
            return Drops(drops, _difference(self.integral.Z, at, covered.Z))
        return _by_slopes(self.form, self.integral, at, self.tail.activations(x, more))


class MapCovering:
    """Covers cells of feature maps before the layer, and runs the modules from there to the layer on each.

    The drops use the slopes of the whole image. ``activations`` computes Z for pairs of example and patch, with that
    patch of the feature maps covered (:meth:`captum_xnn.training._map_covers.CoveredMaps.activations`).
    """

    def __init__(
        self,
        form: ContributionGroups,
        integral: Integral,
        grid: Grid,
        activations: Callable[[Sequence[tuple[int, int]]], Tensor],
        at_once: int,
    ) -> None:
        self.form, self.integral, self.grid, self.activations = form, integral, grid, activations
        self.at_once = at_once

    def drops(self, pairs: Sequence[tuple[int, int]]) -> Drops:
        """Compute the drops for pairs of example and patch."""
        at = torch.tensor([i for i, _ in pairs], device="cpu").to(self.integral.Z.device)
        return _by_slopes(self.form, self.integral, at, self.activations(pairs))


class CellCovering:
    """Sums the contributions of a patch's cells, where the layer's output is feature maps. Nothing runs again."""

    def __init__(self, form: ContributionGroups, integral: Integral, grid: int) -> None:
        base = form.base.to(integral.slopes)
        self.contributions = integral.contributions(base).movedim(form.channels + 1, 2)  # (C, N, D, rows, columns)
        self.activations = (integral.Z.to(base) - base).movedim(form.channels, 1)  # (N, D, rows, columns)
        self.grid = Grid(self.contributions.shape[3], self.contributions.shape[4], grid)
        self.at_once = _CELL_PATCHES

    def drops(self, pairs: Sequence[tuple[int, int]]) -> Drops:
        """Compute the drops for pairs of example and patch."""
        contributions, activations = [], []
        for i, p in pairs:
            (top, bottom), (left, right) = self.grid.regions[p]
            contributions.append(self.contributions[:, i, :, top:bottom, left:right].sum((2, 3)))
            activations.append(self.activations[i, :, top:bottom, left:right].sum((1, 2)))
        return Drops(torch.stack(contributions, 1), torch.stack(activations))


def all_drops(covering: Covering, n: int, pairs: Sequence[tuple[int, int]] | None = None) -> Drops:
    """Compute the drops of n examples: (C, n, patches, D) and (n, patches, D).

    Args:
        covering: The way to cover patches.
        n: Number of examples.
        pairs: Example and patch of each cover, example by example, with as many patches for each. None takes all.
    """
    pairs = covering.grid.pairs(n) if pairs is None else pairs
    batches = [covering.drops(pairs[i : i + covering.at_once]) for i in range(0, len(pairs), covering.at_once)]
    contributions = torch.cat([drops.contributions.cpu() for drops in batches], 1)
    activations = torch.cat([drops.activations.cpu() for drops in batches])
    D = activations.shape[1]
    return Drops(contributions.reshape(len(contributions), n, -1, D), activations.reshape(n, -1, D))


def strongest(drops: Drops, grid: Grid, other: Grid, count: int, scale: Tensor) -> list[tuple[int, int]]:
    """Find the patches of another grid under which outputs drop most: example and patch of each, example by example.

    The drop of a patch is the mean drop of the first grid's patches that it touches. NaN and infinite drops count as 0.

    Args:
        drops: Drops of contributions for each patch of the first grid, (C, n, patches, D).
        grid: The first grid.
        other: The other grid.
        count: Number of patches for each example; at most all.
        scale: Unit of each output of each example, (C, n).

    Example:
        >>> drops = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.1, 5.0]])[None, :, :, None]  # 2 x 3 cells of one example
        >>> strongest(Drops(drops, drops[0]), Grid(2, 3, 8), Grid(32, 48, 2), 1, torch.ones(1, 1))
        [(0, 3)]
    """
    of_each = drops.contributions.double().sum(3) / scale.double().cpu()[:, :, None]
    of_output = torch.where(of_each.isfinite(), of_each, 0).clamp(min=0).sum(0)
    n = len(of_output)
    pooled = nn.functional.adaptive_avg_pool2d(of_output.reshape(n, 1, *grid.shape), other.shape).flatten(1)
    # Rounded, so that of equal drops the first patch is taken on every processor.
    unit = pooled.amax(1, keepdim=True) * _EQUAL
    rounded = torch.where(unit > 0, (pooled / unit).round(), 0)
    order = rounded.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1)[0]
    return [(i, p) for i, patches in enumerate(order.tolist()) for p in patches]


def images_among(inputs: tuple[Tensor, ...], *, channels: int = 1) -> int | None:
    """Return the index of the input that holds images; None without images.

    Images are the first input of four dimensions with floating-point numbers, or bytes, and several pixels along both
    sides.

    Args:
        inputs: Tensors (N, ...).
        channels: The dimension of channels in the first image or volume; other images have channels first.

    Example:
        >>> images_among((torch.zeros(2, 7), torch.zeros(2, 3, 4, 4)))
        1
    """
    for i, x in enumerate(inputs):
        channel = channels_of(inputs, i, channels)
        is_image = x.dim() == 4 and (x.is_floating_point() or x.dtype == torch.uint8)
        if is_image and min(x.movedim(channel, 1).shape[2:]) > 1:
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


def _by_slopes(form: ContributionGroups, integral: Integral, at: Tensor, covered: Tensor) -> Drops:
    """Compute the drops from covered activations and the slopes of the whole image.

    Args:
        form: A form with the dimension of channels of Z.
        integral: Integral of the whole images.
        at: Row of each covered image in it, (n,).
        covered: Activations of the covered images, (n, ...).
    """
    off = (integral.Z[at] - covered).to(integral.slopes)
    return Drops(form.by_channel(integral.slopes[:, at] * off), form.by_channel(_difference(integral.Z, at, covered)))


def _difference(Z: Tensor, at: Tensor, covered: Tensor) -> Tensor:
    """Compute Z[at] - covered, (n, ...); differences within rounding are 0.

    Rounding is in proportion to the largest value of a number of Z, because a layer adds up terms of either sign.
    """
    eps = torch.finfo(Z.dtype).eps * (_HALF_ROUNDING if Z.dtype in (torch.float16, torch.bfloat16) else _ROUNDING)
    noise = eps * torch.maximum(Z.abs().amax(0), covered.abs())
    off = Z[at] - covered
    return torch.where(off.abs() > noise, off, 0).to(torch.promote_types(Z.dtype, torch.float32))
