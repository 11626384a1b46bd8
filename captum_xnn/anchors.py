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

__all__ = ["Anchors", "anchors"]


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
    w = torch.full_like(y[:, 0], 1 / len(y)) if weight is None else weight / weight.sum()
    # From here on (M, r) numbers only: in double precision on the CPU, which every machine has.
    T = _whitened(_pls_scores(Z, y, w, n).cpu().double())
    c = T.T @ (y - y.mean(0)).cpu().double() / len(T)
    rotation = _most_skewed(T, c[:, 0] if y.shape[1] == 1 else None)
    E = T @ rotation.T
    return Anchors(E.to(y), (rotation @ c).T.to(y))


def _pls_scores(Z: Tensor | Rows, y: Tensor, w: Tensor, n: int) -> Tensor:
    r"""Returns up to n scores (M, r), orthonormal under the weights w, which sum to 1.

    Scores are kept orthogonal to each other instead of deflating Z, which is the same thing without the copies. Every
    score takes one pass over Z, which may lie on disk: beside t = Z d it gives :math:`Z^\top W t`, and thereby the next
    :math:`Z^\top W r`, as the residual r loses its part along t.
    """
    residual = y - w @ y
    centre, square, crossed = _first_pass(Z, residual, w)
    smallest = torch.finfo(Z.dtype).eps * square.sqrt() * 10
    scores: list[Tensor] = []
    loadings: list[Tensor] = []
    for _ in range(n):
        direction = torch.linalg.svd(crossed, full_matrices=False)[0][:, 0]
        t, loading = _pass(Z, centre, direction, w)
        for _twice in range(2):  # once leaves rounding errors behind
            for s, of_s in zip(scores, loadings, strict=True):
                along = (w * s) @ t
                t, loading = t - s * along, loading - of_s * along
        norm = (w * t) @ t
        if not norm.sqrt() > smallest:
            break
        t, loading = t / norm.sqrt(), loading / norm.sqrt()
        explained = (w * t) @ residual
        residual = residual - t[:, None] * explained
        crossed = crossed - loading[:, None] * explained
        scores.append(t)
        loadings.append(loading)
    if not scores:
        raise ValueError(
            "expected activations of which some vary with the output, got none; check that the layer lies on the path "
            "to this output, or explain another layer or target"
        )
    return torch.stack(scores, 1)


def _first_pass(Z: Tensor | Rows, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean (D,), sum of the variances of all dimensions, and covariance (D, C) with a residual."""
    shift = next(iter(parts(Z)))[0]  # any row, so that no digits are lost where the mean is large
    mean, square = torch.zeros_like(shift), w.new_zeros(())
    crossed = w.new_zeros(len(shift), residual.shape[1])
    for part, weight, r in _parts(Z, w, residual):
        shifted = part - shift
        mean += weight @ shifted
        square += weight @ (shifted**2).sum(1)
        crossed += shifted.T @ (weight[:, None] * r)
    return shift + mean, square - mean @ mean, crossed - mean[:, None] * (w @ residual)


def _pass(Z: Tensor | Rows, centre: Tensor, direction: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the score (M,) of a direction, and the covariance (D,) of Z with it."""
    scores, loading = torch.empty_like(w), torch.zeros_like(centre)
    for part, weight, score in _parts(Z, w, scores):
        centred = part - centre
        score.copy_(centred @ direction)
        loading += (weight * score) @ centred
    return scores, loading


def _parts(Z: Tensor | Rows, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields parts of Z with those of tensors that have as many rows."""
    first = 0
    for part in parts(Z):
        yield (part, *(other[first : first + len(part)] for other in others))
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
            V = _nearest_rotation(outer.T @ (columns**2).T @ T @ inner)
        rotation = fixed + outer @ V @ inner.T
        value = float((T @ rotation.T).relu().pow(3).sum())
        if value > best_value:
            best, best_value = rotation, value
    return best


def _nearest_rotation(matrix: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(matrix)
    rotation: Tensor = U @ Vh
    return rotation
