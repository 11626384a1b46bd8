r"""Anchors: the x-features of the best linear explanation, in closed form, from which training starts.

Eq. 5 does not say which x-features to find. Without a start of their own most of them die (a ReLU x-layer), or any
rotation of them does as well as any other (a linear one), so that each seed finds others. The anchors settle this:

1. n partial-least-squares scores of Z with the output: the directions in which Z varies and the output with it.
   They reconstruct Z and give the output, as Eq. 5 asks, and are uncorrelated, as its pull-away term asks.
2. The rotation of these scores in which every anchor carries the same share of the output's variance. None can die,
   and none can be the output itself with the others left over, which is the degeneration of the paper's Fig. .12(b).
3. Of all such rotations the one that makes the anchors most skewed: each is strong in few examples and weak in most,
   as a part or a mark is that few images show. It makes the anchors unique, and the same for every seed.

Conventions:
    M examples, D dimensions, C outputs, r <= n anchors. Z and y standardised.

Reference:
    Not in the paper. Wold, Sjostrom, Eriksson, "PLS-regression: a basic tool of chemometrics", 2001, for step 1;
    Hyvarinen, "Fast and robust fixed-point algorithms for independent component analysis", 1999, for step 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from captum_xnn.rows import Rows, parts

__all__ = ["Anchors", "anchors", "anchors_of_each"]


class Anchors(NamedTuple):
    """Targets for the x-features and for the head."""

    E: Tensor
    """(M, r), mean 0, uncorrelated, variance 1 over the examples; r < n where Z has fewer than n useful directions."""
    v: Tensor
    """(C, r), least-squares weights of the anchors in the outputs."""


def anchors(Z: Tensor | Rows, y: Tensor, n: int, *, weight: Tensor | None = None) -> Anchors:
    """Returns the anchors of n x-features.

    Args:
        Z: Activations (M, D), in memory or on disk.
        y: Outputs (M, C). With one output all anchors get the same share of it; with several they are only rotated to
            be most skewed, since no rotation shares several outputs evenly.
        n: Number of x-features.
        weight: Weights (M,) of the examples in the choice of directions.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> Z = torch.randn(500, 8, generator=g)
        >>> made = anchors(Z, Z[:, :4].sum(1, keepdim=True), 4)
        >>> made.E.shape, made.v.round(decimals=1)
        (torch.Size([500, 4]), tensor([[1., 1., 1., 1.]]))
    """
    weights = None if weight is None else weight[None]
    return anchors_of_each(Z, y[None], n, weights=weights)[0]


def anchors_of_each(Z: Tensor | Rows, ys: Tensor, n: int, *, weights: Tensor | None = None) -> list[Anchors]:
    """Returns the anchors of several explainers, which share the passes over Z.

    Args:
        Z: Activations (M, D), in memory or on disk.
        ys: Outputs (T, M, C) of T explainers.
        n: Number of x-features of each.
        weights: Weights (T, M) of the examples, for each.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> Z, ys = torch.randn(500, 8, generator=g), torch.randn(2, 500, 1, generator=g)
        >>> torch.allclose(anchors_of_each(Z, ys, 3)[1].v, anchors(Z, ys[1], 3).v, atol=1e-4)
        True
    """
    weights = torch.ones_like(ys[..., 0]) if weights is None else weights
    found = []
    for y, scores in zip(ys, _pls_scores(Z, ys, weights / weights.sum(1, keepdim=True), n), strict=True):
        # From here on (M, r) numbers only: in double precision on the CPU, which every machine has.
        T = _whitened(scores.cpu().double())
        c = T.T @ (y - y.mean(0)).cpu().double() / len(T)
        rotation = _most_skewed(T, c[:, 0] if y.shape[1] == 1 else None)
        found.append(Anchors((T @ rotation.T).to(y), (rotation @ c).T.to(y)))
    return found


def _pls_scores(Z: Tensor | Rows, ys: Tensor, w: Tensor, n: int) -> list[Tensor]:
    r"""Returns up to n scores (M, r) for each of T outputs, orthonormal under its weights w, (T, M), which sum to 1.

    Scores are kept orthogonal to each other instead of deflating Z, which is the same thing without the copies. The
    n-th scores of all outputs take one pass over Z, which may lie on disk: beside t = Z d it gives
    :math:`Z^\top W t`, and thereby the next :math:`Z^\top W r`, as the residual r loses its part along t.
    """
    residuals = ys - (w[:, None] @ ys)
    centres, squares, crossed = _first_pass(Z, residuals, w)
    those = [_Scores(*of) for of in zip(residuals, w, crossed, squares, strict=True)]
    for _ in range(n):
        going = [i for i, one in enumerate(those) if not one.is_spent]
        if not going:
            break
        directions = torch.stack([those[i].direction() for i in going])
        for i, t, loading in zip(going, *_pass(Z, centres[going], directions, w[going]), strict=True):
            those[i].take(t, loading)
    if not all(one.scores for one in those):
        raise ValueError(
            "expected activations of which some vary with the output, got none; check that the layer lies on the path "
            "to this output, or explain another layer or target"
        )
    return [torch.stack(one.scores, 1) for one in those]


class _Scores:
    """The scores of one output, as they are found.

    Args:
        residual: What is left of the output, (M, C).
        w: Weights (M,).
        crossed: Covariance of Z with the residual, (D, C).
        square: Sum of the variances of Z.
    """

    def __init__(self, residual: Tensor, w: Tensor, crossed: Tensor, square: Tensor) -> None:
        self.residual, self.w, self.crossed = residual, w, crossed
        self.smallest = torch.finfo(residual.dtype).eps * square.sqrt() * 10
        self.scores: list[Tensor] = []
        self.loadings: list[Tensor] = []
        self.is_spent = False

    def direction(self) -> Tensor:
        """Returns the direction (D,) in which Z varies most with the residual."""
        found: Tensor = torch.linalg.svd(self.crossed, full_matrices=False)[0][:, 0]
        return found

    def take(self, t: Tensor, loading: Tensor) -> None:
        """Takes in what the direction gives: a score (M,), and the covariance (D,) of Z with it."""
        for _twice in range(2):  # once leaves rounding errors behind
            for s, of_s in zip(self.scores, self.loadings, strict=True):
                along = (self.w * s) @ t
                t, loading = t - s * along, loading - of_s * along
        norm = ((self.w * t) @ t).sqrt()
        if not norm > self.smallest:
            self.is_spent = True
            return
        t, loading = t / norm, loading / norm
        explained = (self.w * t) @ self.residual
        self.residual = self.residual - t[:, None] * explained
        self.crossed = self.crossed - loading[:, None] * explained
        self.scores.append(t)
        self.loadings.append(loading)


def _first_pass(Z: Tensor | Rows, residuals: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns means (T, D), sums of the variances of all dimensions (T,), and covariances (T, D, C) with residuals."""
    shift = next(iter(parts(Z)))[0]  # any row, so that no digits are lost where the mean is large
    weighted = w[..., None] * residuals
    mean, square = w.new_zeros(len(w), len(shift)), w.new_zeros(len(w))
    crossed = w.new_zeros(len(w), len(shift), residuals.shape[2])
    for part, rows in _parts(Z):
        shifted = part - shift
        mean += w[:, rows] @ shifted
        square += w[:, rows] @ (shifted**2).sum(1)
        crossed += shifted.T @ weighted[:, rows]
    crossed -= mean[..., None] * weighted.sum(1)[:, None]
    return shift + mean, square - (mean**2).sum(1), crossed


def _pass(Z: Tensor | Rows, centres: Tensor, directions: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scores (T, M) of directions (T, D), and the covariances (T, D) of Z with them."""
    scores, loadings = torch.empty_like(w), torch.zeros_like(centres)
    shift = centres[0]
    beside = ((centres - shift) * directions).sum(1)[:, None]
    for part, rows in _parts(Z):
        shifted = part - shift
        scores[:, rows] = directions @ shifted.T - beside
        loadings += (w[:, rows] * scores[:, rows]) @ shifted
    return scores, loadings - (w * scores).sum(1)[:, None] * (centres - shift)


def _parts(Z: Tensor | Rows) -> Iterator[tuple[Tensor, slice]]:
    """Yields parts of Z, and which rows they are."""
    first = 0
    for part in parts(Z):
        yield part, slice(first, first + len(part))
        first += len(part)


def _whitened(T: Tensor) -> Tensor:
    """Returns the columns decorrelated, with variance 1 and as near as possible to what they were."""
    T = T - T.mean(0)
    values, vectors = torch.linalg.eigh(T.T @ T / len(T))
    keep = values > values.max() * 1e-9
    values, vectors = values[keep], vectors[:, keep]
    back = vectors.T if bool(keep.all()) else torch.eye(len(values)).to(T)
    white: Tensor = T @ vectors @ torch.diag(values.rsqrt()) @ back
    return white


def _contrasts(r: int) -> Tensor:
    """Returns an orthonormal basis (r, r-1) of what sums to zero (Helmert's)."""
    basis = torch.zeros(r, r - 1, dtype=torch.float64)
    for k in range(1, r):
        basis[:k, k - 1] = 1 / math.sqrt(k * (k + 1))
        basis[k, k - 1] = -k / math.sqrt(k * (k + 1))
    return basis


def _most_skewed(T: Tensor, even: Tensor | None, *, starts: int = 8, iterations: int = 60) -> Tensor:
    r"""Returns the rotation (r, r) that maximises :math:`\sum_i \mathrm{mean}(\max(T R_i, 0)^3)`.

    Args:
        T: Whitened scores (M, r).
        even: A direction (r,) of which all rotated columns get the same part, or None for any rotation.
        starts: Starting points; the best end counts.
        iterations: Steps from each; every step goes up, as the objective is convex in the rotation.
    """
    r = T.shape[1]
    if even is None:
        fixed, outer, inner = T.new_zeros(r, r), torch.eye(r).to(T), torch.eye(r).to(T)
    else:
        unit = even / even.norm()
        fixed = T.new_ones(r, 1) @ unit[None] / math.sqrt(r)
        outer = _contrasts(r).to(T)
        inner = torch.linalg.qr(torch.cat([unit[:, None], torch.eye(r).to(T)], 1))[0][:, 1:r]
    free = outer.shape[1]
    generator = torch.Generator().manual_seed(0)  # of the search only; the optimum is the data's
    best, best_value = fixed + outer @ inner.T, -math.inf
    for start in range(starts if free else 0):
        drawn = torch.randn(free, free, generator=generator, dtype=torch.float64)
        V = torch.eye(free).to(T) if start == 0 else torch.linalg.qr(drawn)[0].to(T)
        for _ in range(iterations):
            columns = (T @ (fixed + outer @ V @ inner.T).T).relu()
            last, V = V, _nearest_rotation(outer.T @ (columns**2).T @ T @ inner)
            if float((V - last).abs().max()) < 1e-12:
                break
        rotation = fixed + outer @ V @ inner.T
        value = float((T @ rotation.T).relu().pow(3).sum())
        if value > best_value:
            best, best_value = rotation, value
    return best


def _nearest_rotation(matrix: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(matrix)
    rotation: Tensor = U @ Vh
    return rotation
