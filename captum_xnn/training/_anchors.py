r"""Anchors: x-features of a linear explanation in closed form, as the start of training.

Eq. 5 leaves the choice of x-features open. With a linear x-layer, any rotation of decorrelated x-features is as
faithful and pulls away as far. Each seed would therefore find other x-features. Anchors depend on the data alone.
Training starts from them, so all seeds find the same x-features. Three steps compute them:

1. Find n partial-least-squares scores of Z with the output: directions of joint variation of Z and the output. They
   reconstruct Z and the output, as Eq. 5 asks. They are uncorrelated, as its pull-away term asks.
2. Rotate these scores by varimax. Each dimension of Z then belongs to one anchor, as far as possible. For a linear
   decoder this answers the question of Eq. 2: which dimensions of Z an x-feature reconstructs. With loadings
   :math:`L_{di}`, the covariance of dimension d with anchor i, varimax maximises

   .. math:: V = \frac{\sum_i \big(\sum_d L_{di}^4 - \frac1D (\sum_d L_{di}^2)^2\big)}{\sum_d (\sum_i L_{di}^2)^2}

3. Balance the shares slightly: maximise :math:`(1 - b)\,V - b \sum_i p_i^2`. Here :math:`p_i` is anchor i's share of
   the output's explained variance, and b is ``balance``. The recipe has b = 0.1. On real birds b = 0 leaves anchors
   that contribute next to nothing. b = 1 gives even shares for any model.

**Choices, not findings.** Partial least squares, varimax and balance choose among solutions that are equally good by
Eq. 5. The evenness of contributions follows from these choices, and is not a property of the model. An effective number
of x-features therefore says nothing about their quality.

**The same on every processor.** All sums are in double precision. The rotation starts from the scores in their order.
It turns one pair of anchors after another by the best angle: the direction of the leading eigenvector of a symmetric
2 x 2 matrix. If angles tie within a relative margin of 1e-6, the pair stays as it is. Signs and order follow rules with
the same margin (:func:`_arranged`). Scores with a correlation below 1e-5 with the output are left out. Rounding
therefore decides nothing, unless data lie within rounding of a margin.

Conventions:
    M examples, D dimensions, C outputs, r <= n anchors. Z and y standardised.

Reference:
    Not in the paper. Wold, Sjostrom, Eriksson, "PLS-regression: a basic tool of chemometrics", 2001, for step 1;
    Kaiser, "The varimax criterion for analytic rotation in factor analysis", 1958, for step 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_xnn.activations._memmap import Rows, chunks

__all__ = ["Anchors", "anchors", "anchors_of_each"]

Matrix = npt.NDArray[np.float64]

# Relative difference below which values count as tied.
_MARGIN = 1e-6
# Smallest correlation of a score with the output. Lower ones are rounding errors of activations in single precision.
_LEAST = 1e-5
# Largest number of passes over all pairs. Ten are usual.
_SWEEPS = 1000


class Anchors(NamedTuple):
    """Targets for the x-features and for the head."""

    E: Tensor
    """(M, r), mean 0, uncorrelated, variance 1 over the examples; r < n where Z has fewer than n useful directions."""
    v: Tensor
    """(C, r), least-squares weights of the anchors in the outputs."""


def anchors(Z: Tensor | Rows, y: Tensor, n: int, *, weight: Tensor | None = None, balance: float = 0.0) -> Anchors:
    """Compute the anchors of n x-features.

    Args:
        Z: Activations (M, D), in memory or on disk.
        y: Outputs (M, C).
        n: Number of x-features.
        weight: Weights (M,) of the examples in the choice of directions.
        balance: Weight of even shares of the output's variance, in [0, 1].

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> Z = torch.randn(500, 4, generator=g) * torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> anchors(Z, Z[:, :2].sum(1, keepdim=True), 2).v.round(decimals=1)
        tensor([[4.0000, 3.2000]])
        >>> anchors(Z, Z[:, :2].sum(1, keepdim=True), 2, balance=1.0).v.round(decimals=1)
        tensor([[3.6000, 3.6000]])
    """
    weights = None if weight is None else weight[None]
    return anchors_of_each(Z, y[None], n, weights=weights, balance=balance)[0]


def anchors_of_each(
    Z: Tensor | Rows, ys: Tensor, n: int, *, weights: Tensor | None = None, balance: float = 0.0
) -> list[Anchors]:
    """Compute the anchors of several explainers with shared passes over Z.

    Args:
        Z: Activations (M, D), in memory or on disk.
        ys: Outputs (T, M, C) of T explainers.
        n: Number of x-features of each explainer.
        weights: Weights (T, M) of the examples for each explainer.
        balance: Weight of even shares of the output's variance, in [0, 1].

    Raises:
        ValueError: If Z does not vary.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> Z, ys = torch.randn(500, 8, generator=g), torch.randn(2, 500, 1, generator=g)
        >>> torch.allclose(anchors_of_each(Z, ys, 3)[1].v, anchors(Z, ys[1], 3).v, atol=1e-4)
        True
    """
    weights = torch.ones_like(ys[..., 0]) if weights is None else weights
    exact = ys.dtype if ys.device.type == "mps" else torch.float64  # Apple's GPUs have no double precision
    weights = weights.to(exact) / weights.to(exact).sum(1, keepdim=True)
    # The remaining tensors have (M, r) and (D, r) numbers only: they are in double precision on the CPU.
    whitened = [_whitened(scores.cpu().double()) for scores in _pls_scores(Z, ys.to(exact), weights, n)]
    anchors_of_all = []
    for y, T, L in zip(ys, whitened, _loadings(Z, [T.to(weights) for T in whitened]), strict=True):
        c = T.T @ (y - y.mean(0)).cpu().double() / len(T)
        rotation = _arranged(_rotation(L.cpu().double(), c, balance), L.cpu().double(), c)
        anchors_of_all.append(Anchors((T @ rotation.T).to(y), (rotation @ c).T.to(y)))
    return anchors_of_all


def _pls_scores(Z: Tensor | Rows, ys: Tensor, w: Tensor, n: int) -> list[Tensor]:
    r"""Find up to n scores (M, r) for each of T outputs, orthonormal under its weights w, (T, M). Weights sum to 1.

    Each score is made orthogonal to the earlier ones. This equals a deflation of Z, but needs no copies of Z. The n-th
    scores of all outputs take one pass over Z, in memory or on disk. The pass computes t = Z d and :math:`Z^\top W t`.
    The residual r then loses its part along t, so the next :math:`Z^\top W r` follows without a further pass.
    """
    residuals = ys - (w[:, None] @ ys)
    centres, squares, crossed = _first_pass(Z, residuals, w)
    # Smaller norms are rounding errors of activations in their own precision.
    smallest = torch.finfo(Z.dtype).eps * squares.clamp_min(0).sqrt() * 10
    if not bool((squares > 0).all()):
        raise ValueError(
            "no activation varies; check that the layer lies on the path to this output, or explain another layer or "
            "target"
        )
    of_each = [_OutputScores(*of) for of in zip(residuals, w, crossed, smallest, strict=True)]
    for _ in range(n):
        unfinished = [i for i, output in enumerate(of_each) if not output.is_spent]
        if not unfinished:
            break
        directions = torch.stack([of_each[i].direction() for i in unfinished])
        for i, t, loading in zip(unfinished, *_pass(Z, centres[unfinished], directions, w[unfinished]), strict=True):
            of_each[i].add(t, loading)
    return [torch.stack([w.new_zeros(w.shape[1]), *output.scores], 1)[:, 1:] for output in of_each]


class _OutputScores:
    """The scores of one output found so far.

    Args:
        residual: Part of the output that the scores do not explain yet, (M, C).
        w: Weights (M,).
        crossed: Covariance of Z with the residual, (D, C).
        smallest: Norm below which a score is a rounding error.
    """

    def __init__(self, residual: Tensor, w: Tensor, crossed: Tensor, smallest: Tensor) -> None:
        self.residual, self.w, self.crossed, self.smallest = residual, w, crossed, smallest
        self.least = _LEAST * (w @ residual.square()).sum().sqrt()
        self.scores: list[Tensor] = []
        self.loadings: list[Tensor] = []
        self.is_spent = not bool(crossed.any())

    def direction(self) -> Tensor:
        """Compute the direction (D,) of largest covariance of Z with the residual. Ties go to the first output."""
        size = self.crossed.abs().max()
        values, vectors = torch.linalg.eigh((self.crossed / size).T @ (self.crossed / size))
        top = vectors[:, values >= values[-1] * (1 - _MARGIN)]
        # The projection of one axis on the leading eigenvectors has neither a free sign nor a free rotation.
        along = top @ top[_first_largest(top.norm(dim=1))]
        direction = self.crossed / size @ along
        unit: Tensor = direction / direction.norm()
        return unit

    def add(self, t: Tensor, loading: Tensor) -> None:
        """Add a direction's score (M,) and the covariance (D,) of Z with it, unless both are rounding errors."""
        for _twice in range(2):  # once leaves rounding errors behind
            for s, of_s in zip(self.scores, self.loadings, strict=True):
                along = (self.w * s) @ t
                t, loading = t - s * along, loading - of_s * along
        norm = ((self.w * t) @ t).sqrt()
        explained = (self.w * t) @ self.residual / norm
        if not (norm > self.smallest and explained.norm() > self.least):
            self.is_spent = True
            return
        t, loading = t / norm, loading / norm
        self.residual = self.residual - t[:, None] * explained
        self.crossed = self.crossed - loading[:, None] * explained
        self.scores.append(t)
        self.loadings.append(loading)


def _first_pass(Z: Tensor | Rows, residuals: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute means (T, D), sums of the variances of all dimensions (T,), and covariances (T, D, C) with residuals."""
    shift = next(iter(chunks(Z)))[0].to(w)  # any row: subtracting it saves digits if the mean is large
    weighted = w[..., None] * residuals
    mean, square = w.new_zeros(len(w), len(shift)), w.new_zeros(len(w))
    crossed = w.new_zeros(len(w), len(shift), residuals.shape[2])
    for chunk, rows in _chunks(Z):
        shifted = chunk.to(w) - shift
        mean += w[:, rows] @ shifted
        square += w[:, rows] @ (shifted**2).sum(1)
        crossed += shifted.T @ weighted[:, rows]
    crossed -= mean[..., None] * weighted.sum(1)[:, None]
    return shift + mean, square - (mean**2).sum(1), crossed


def _pass(Z: Tensor | Rows, centres: Tensor, directions: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the scores (T, M) of directions (T, D), and the covariances (T, D) of Z with the scores."""
    scores, loadings = torch.empty_like(w), torch.zeros_like(centres)
    shift = centres[0]
    beside = ((centres - shift) * directions).sum(1)[:, None]
    for chunk, rows in _chunks(Z):
        shifted = chunk.to(w) - shift
        scores[:, rows] = directions @ shifted.T - beside
        loadings += (w[:, rows] * scores[:, rows]) @ shifted
    return scores, loadings - (w * scores).sum(1)[:, None] * (centres - shift)


def _chunks(Z: Tensor | Rows) -> Iterator[tuple[Tensor, slice]]:
    """Yield chunks of Z with their rows."""
    first = 0
    for chunk in chunks(Z):
        yield chunk, slice(first, first + len(chunk))
        first += len(chunk)


def _loadings(Z: Tensor | Rows, scores: list[Tensor]) -> list[Tensor]:
    """Compute the covariances (D, r) of Z with each table of centred scores (M, r)."""
    every = torch.cat(scores, 1)
    shift = next(iter(chunks(Z)))[0].to(every)
    total = every.new_zeros(len(shift), every.shape[1])
    for chunk, rows in _chunks(Z):
        total += (chunk.to(every) - shift).T @ every[rows]
    return list(torch.split(total / len(every), [T.shape[1] for T in scores], dim=1))


def _whitened(T: Tensor) -> Tensor:
    """Decorrelate scores (M, r), with variance 1 and as little change as possible.

    Scores that depend linearly on earlier ones are left out. Weights of zero can cause them.
    """
    T = T - T.mean(0)
    kept: list[int] = []
    for k in range(T.shape[1]):
        left = T[:, k] - T[:, kept] @ torch.linalg.lstsq(T[:, kept], T[:, k : k + 1]).solution[:, 0]
        if left.norm() > 1e-4 * T.norm(dim=0).max():
            kept.append(k)
    T = T[:, kept]
    values, vectors = torch.linalg.eigh(T.T @ T / len(T))
    white: Tensor = T @ vectors @ torch.diag(values.rsqrt()) @ vectors.T
    return white


def _rotation(L: Tensor, c: Tensor, balance: float) -> Tensor:
    r"""Find the rotation (r, r) that maximises :math:`(1 - b) V - b \sum_i p_i^2`, pair by pair.

    Under a rotation of two anchors by an angle a, both terms are quadratic in q = (cos 2a, sin 2a). With the loadings
    x and y of the pair, rotated ones have :math:`x_d'^2 - y_d'^2 = q \cdot (x_d^2 - y_d^2,\, 2 x_d y_d)`, while
    :math:`x_d'^2 + y_d'^2` stays. The quadratic form of V is the covariance of these vectors over d. The quadratic form
    of the shares is the square of their sum over the outputs. Every angle is the best one for its pair, so no step
    lowers the objective.

    Args:
        L: Loadings of the scores, (D, r).
        c: Covariances of the scores with the outputs, (r, C).
        balance: b. A rotation with b > 0 starts from the rotation with b = 0.
    """
    r = L.shape[1]
    # In NumPy, because a call of torch takes several times as long on so few numbers.
    loadings = (L / L.norm().clamp_min(1e-300)).numpy()
    loadings = loadings / max(float(np.square(np.square(loadings).sum(1)).sum()), 1e-300) ** 0.25
    weights = (c / c.norm().clamp_min(1e-300)).T.numpy()
    rotation = np.eye(r)
    for b in sorted({0.0, balance}):
        for _ in range(_SWEEPS):
            largest = 0.0
            for i in range(r):
                for j in range(i + 1, r):
                    pair = rotation[[i, j]]
                    d, shares = _doubled(loadings @ pair.T), _doubled(weights @ pair.T).sum(0)
                    centred = d - d.mean(0)
                    form = (1 - b) * centred.T @ centred - b * np.outer(shares, shares)
                    scale = (1 - b) * float(np.square(centred).sum()) + b * float(np.square(shares).sum())
                    angle = _best_angle(form, scale)
                    rotation[[i, j]] = _turn(angle) @ pair
                    largest = max(largest, abs(angle))
            if largest < 1e-9:
                break
    return torch.from_numpy(rotation)


def _doubled(pair: Matrix) -> Matrix:
    """Compute (x^2 - y^2, 2 x y) of rows (x, y): the vector of the doubled angle."""
    x, y = pair.T
    return np.stack([x * x - y * y, 2 * x * y], 1)


def _best_angle(form: Matrix, scale: float) -> float:
    """Find the angle in (-45, 45] degrees that maximises a form (2, 2) of the doubled angle; 0 if angles tie."""
    across, along = float(form[0, 0] - form[1, 1]), 2 * float(form[0, 1])
    if math.hypot(across, along) <= _MARGIN * scale:
        return 0.0
    angle = math.atan2(along, across) / 4
    # -45 degrees give the same two anchors as 45 degrees, in another order and sign.
    return angle if angle > -math.pi / 4 + _MARGIN else angle + math.pi / 2


def _turn(angle: float) -> Matrix:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def _arranged(rotation: Tensor, L: Tensor, c: Tensor) -> Tensor:
    """Sort the rows of a rotation, and choose their signs.

    Anchors are sorted by their share of the outputs' variance. Tied shares are sorted by the variance of Z that the
    anchors reconstruct. If that ties too, anchors keep their order. An anchor speaks for the output with its largest
    weight. If all weights are negligible, it speaks for the dimension with its largest loading.

    Args:
        rotation: (r, r).
        L: Loadings of the scores, (D, r).
        c: Covariances of the scores with the outputs, (r, C).
    """
    v, loadings = rotation @ c, L @ rotation.T
    order = _descending([v.square().sum(1), loadings.square().sum(0)])
    signs = []
    for i in order:
        given = v[i] if float(v[i].norm()) > _MARGIN * float(v.norm()) else loadings[:, i]
        signs.append(-1.0 if float(given[_first_largest(given.abs())]) < 0 else 1.0)
    return rotation[order] * torch.tensor(signs, dtype=rotation.dtype, device="cpu")[:, None]


def _first_largest(values: Tensor) -> int:
    """Return the index of the largest of non-negative values (n,); of tied values, the first."""
    return int((values >= values.max() * (1 - _MARGIN)).nonzero()[0, 0])


def _descending(keys: list[Tensor]) -> list[int]:
    """Sort indices by descending first key (n,), then by the next keys for ties. Remaining ties keep their order."""
    order = list(range(len(keys[0])))
    for key in reversed(keys):  # sorting is stable, so the first key comes last
        margin, rank, last = _MARGIN * float(key.sum()), torch.zeros(len(key), dtype=torch.long, device="cpu"), -1
        for i in key.argsort(descending=True).tolist():
            rank[i] = 0 if last < 0 else rank[last] + int(float(key[last] - key[i]) > margin)
            last = i
        order.sort(key=rank.tolist().__getitem__)
    return order
