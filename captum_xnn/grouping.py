r"""Which contributions belong together: the objective by which groups are learned.

An x-feature should be one reason, and a reason sits somewhere in the image: cover its place, and that x-feature loses,
no other. Let :math:`m_{ikp} = \sum_d a_{dk} \Delta c_{ipd}` be what x-feature k of positive i loses where patch p is
covered, and :math:`E_k = \sum_d a_{dk} c_d`. Groups a, with :math:`\sum_k a_{dk} = 1` held by projection, minimise

.. math::

    L = - \frac{\sum_{ik} \lVert m_{ik} \rVert_2}{\sum_{ik} \lVert m_{ik} \rVert_1}
        + \alpha \Bigl(\frac{\sum_{ikp} |m_{ikp}|}{\sum_{ip} |\sum_k m_{ikp}|} - 1\Bigr)
        + \eta L_{PT}(E) + \lambda \frac{\lVert E - E^0 \rVert^2}{\lVert E^0 \rVert^2}
        + \rho R(a) + \beta B(E).

1. *Concentration*: each x-feature loses through few patches. It is pull-away in the image, the term the paper lacks.
2. *Economy*: x-features do not lose large amounts that cancel each other.
3. *Pull-away* of the x-features, Eq. 3 of the paper, on squared correlations.
4. *Nearness to the start* :math:`E^0`: clusters of dimensions whose drops go together. It has the place of Eq. 2:
   dimensions of one group say the same, so that each would do to reconstruct the others.
5. *Range*: squares of what lies outside [0, 1]. Signs are allowed, as layers mix parts.
6. *Balance*: one minus the normalised entropy of variance shares; off by default.

Nothing here knows a heatmap method, so that none is favoured when maps are judged. In the end small entries become 0
and groups that add nothing join the one they correlate with most.

Without covered inputs the groups are the start: clusters of dimensions whose contributions go together.

Conventions:
    D dimensions, K x-features, P patches. Contributions are divided by the standard deviation of their output.

Reference:
    Not in the paper. Ng, Jordan, Weiss, "On spectral clustering", NIPS 2001, for the start. Leemann, Kirchhof, Rong,
    Kasneci, Kasneci, "When are post-hoc conceptual explanations identifiable?", UAI 2023, argue for disjoint places.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Weights", "learn_groups", "objective", "spectral_groups"]

# Of the contributions' mass, what may belong to dimensions that are shared evenly and left alone.
_REST = 1e-3
# Entries below this become 0 in the end: where a reason is one group, what leaks into others is smaller.
_SMALL = 0.1
# Share of all contributions to positives below which a group adds nothing.
_NOTHING = 0.01


class Weights(NamedTuple):
    """Weights of the objective's terms."""

    economy: float = 0.1
    """Alpha."""
    pull_away: float = 0.3
    """Eta, as in the paper's Eq. 5."""
    nearness: float = 0.3
    """Lambda."""
    range: float = 0.01
    """Rho."""
    balance: float = 0.0
    """Beta."""


def learn_groups(
    own: Tensor,
    others: Tensor,
    drops: Tensor | None,
    K: int,
    *,
    weights: Weights | None = None,
    steps: int = 150,
    learning_rate: float = 0.02,
) -> Tensor:
    """Return groups (D, K') of at most K x-features, whose rows sum to 1.

    Args:
        own: Contributions in positives, (m, D).
        others: Contributions in other examples, (m', D).
        drops: What the contributions of positives lose where a patch is covered, (m, P, D); None where nothing can be
            covered.
        K: x-features at most.
        weights: Weights of the terms.
        steps: Steps of Adam.
        learning_rate: Its learning rate.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> two = torch.rand(30, 2, generator=g)  # two reasons, each in three dimensions
        >>> own = two.repeat_interleave(3, 1)
        >>> drops = torch.stack([own * torch.tensor([1.0, 1, 1, 0, 0, 0]), own * torch.tensor([0.0, 0, 0, 1, 1, 1])], 1)
        >>> learn_groups(own, own[:0], drops, 2).round().sum(0)
        tensor([3., 3.], dtype=torch.float64)
    """
    weights = weights or Weights()
    every = torch.cat([own, others]).double()
    D, K = every.shape[1], max(1, min(K, every.shape[1]))
    live = _live(every, drops)
    E = every[:, live]
    M = None if drops is None else drops.double()[..., live]
    a = spectral_groups(E if M is None else M.flatten(0, 1), K)
    if M is not None and K > 1 and bool(M.abs().sum() > 0):
        a = _descended(a, E, M, weights, steps, learning_rate)
    groups = torch.full((D, a.shape[1]), 1 / a.shape[1], dtype=torch.float64)
    groups[live] = a
    return _useful(_hardened(groups), own.double(), every)


def _live(every: Tensor, drops: Tensor | None) -> Tensor:
    """Return the dimensions that hold nearly all of the contributions' mass, in ascending order."""
    mass = every.abs().mean(0)
    mass = mass / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)
    if drops is not None:
        lost = drops.double().abs().mean((0, 1))
        mass = mass + lost / lost.sum().clamp(min=torch.finfo(mass.dtype).tiny)
    order = mass.argsort(descending=True, stable=True)
    before = mass[order].cumsum(0) - mass[order]
    return order[before < (1 - _REST) * mass.sum()].sort().values


def spectral_groups(X: Tensor, K: int) -> Tensor:
    """Return spectral clusters of columns as one-hot rows (D, K): which columns go together.

    Columns are alike by their positive correlation, and count by their standard deviation. Nothing is drawn at random:
    clusters start at the column that varies most and go on to the farthest ones, ties go to the first.

    Args:
        X: Rows of numbers, (m, D).
        K: Clusters; as many as there are columns at most.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0], [2.0, 4.0, 0.5], [0.0, 0.0, 0.0]])
        >>> spectral_groups(x, 2)
        tensor([[1., 0.],
                [1., 0.],
                [0., 1.]], dtype=torch.float64)

    Reference:
        Ng, Jordan, Weiss, "On spectral clustering", 2001.
    """
    X = X.double()
    D = X.shape[1]
    K = min(K, D)
    centred = X - X.mean(0)
    size = centred.norm(dim=0)
    weight = size / size.max().clamp(min=torch.finfo(size.dtype).tiny)
    unit = centred / torch.where(size > 0, size, 1)
    likeness = (unit.T @ unit).clamp(min=0) * weight[:, None] * weight
    likeness.diagonal().copy_(weight.square().clamp(min=1e-12))
    root = likeness.sum(1).sqrt()
    places = _leading(likeness / root[:, None] / root, K)
    places = places / places.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.nn.functional.one_hot(_clustered(places, weight, K), K).double()


def _leading(matrix: Tensor, K: int) -> Tensor:
    """Return the eigenvectors of the K largest eigenvalues of a symmetric matrix, (D, K)."""
    from scipy.sparse.linalg import eigsh

    D = len(matrix)
    if 4 * K >= D:
        return torch.linalg.eigh(matrix)[1][:, D - K :]
    start = np.linspace(1, 2, D)  # any that is no eigenvector, and the same in every run
    return torch.from_numpy(np.ascontiguousarray(eigsh(matrix.numpy(), K, v0=start, tol=1e-10)[1]))


def _clustered(places: Tensor, weight: Tensor, K: int) -> Tensor:
    """Return the cluster of each row by k-means from the farthest points, (D,)."""
    near = torch.full_like(weight, torch.inf)
    chosen = [int(weight.argmax())]
    for _ in range(K - 1):
        near = torch.minimum(near, (places - places[chosen[-1]]).square().sum(1))
        chosen.append(_first_of_largest(near * weight))
    centres = places[chosen]
    label = torch.full((len(places),), -1)
    for _ in range(100):
        distance = torch.cdist(places, centres)
        new = (distance <= distance.amin(1, keepdim=True) + 1e-9).double().argmax(1)
        if torch.equal(new, label):
            break
        label = new
        share = torch.nn.functional.one_hot(label, K).double() * weight[:, None]
        total = share.sum(0)
        centres = torch.where((total > 0)[:, None], share.T @ places / total.clamp(min=1e-12)[:, None], centres)
    return label


def _first_of_largest(values: Tensor) -> int:
    """Return the first of those that are largest but for rounding."""
    return int((values >= values.max() * (1 - 1e-9)).double().argmax())


def objective(a: Tensor, E0: Tensor, every: Tensor, drops: Tensor, weights: Weights) -> Tensor:
    """Return the objective of groups, a scalar.

    Args:
        a: Groups (D, K), whose rows sum to 1.
        E0: Centred x-features of the start, (m, K).
        every: Centred contributions, (m, D).
        drops: What contributions of positives lose, (i, P, D).
        weights: Weights of the terms.

    Example:
        >>> drops = torch.eye(2).reshape(1, 2, 2)  # two patches, each of which one dimension needs
        >>> every = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> round(float(objective(torch.eye(2), every, every, drops, Weights())), 3)
        -1.0
    """
    m = torch.einsum("ipd,dk->ikp", drops, a)
    size = (m.square() + _TINY).sqrt()
    lost = size.sum()
    loss = -m.norm(dim=2).sum() / lost
    loss = loss + weights.economy * (lost / m.sum(1).abs().sum().clamp(min=_TINY) - 1)
    E = every @ a
    K = a.shape[1]
    unit = E / E.norm(dim=0).clamp(min=_TINY)
    loss = loss + weights.pull_away * (unit.T @ unit).fill_diagonal_(0).square().sum() / (K * (K - 1))
    loss = loss + weights.nearness * (E - E0).square().sum() / E0.square().sum().clamp(min=_TINY)
    outside = a.clamp(max=0).square() + (a - 1).clamp(min=0).square()
    loss = loss + weights.range * outside.sum(1).mean()
    if weights.balance:
        share = E.square().sum(0) / E.square().sum().clamp(min=_TINY)
        loss = loss + weights.balance * (1 + (share * (share + _TINY).log()).sum() / np.log(K))
    return loss


_TINY = 1e-12


def _descended(start: Tensor, every: Tensor, drops: Tensor, weights: Weights, steps: int, rate: float) -> Tensor:
    """Return groups that minimise the objective, from a start."""
    # Single precision where it saves time; both give the same groups to three digits.
    dtype = torch.float64 if drops.numel() < 1_000_000 else torch.float32
    centred, drops, a0 = (every - every.mean(0)).to(dtype), drops.to(dtype), start.to(dtype)
    E0 = centred @ a0
    free = a0.clone()
    mean, square = torch.zeros_like(free), torch.zeros_like(free)
    for step in range(1, steps + 1):
        with torch.enable_grad():
            leaf = free.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(objective(_summing_to_one(leaf), E0, centred, drops, weights), leaf)
        # Adam, written out: its few lines take less time than an optimiser's bookkeeping.
        mean = 0.9 * mean + 0.1 * g
        square = 0.999 * square + 0.001 * g.square()
        free = free - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return _summing_to_one(free).double()


def _summing_to_one(a: Tensor) -> Tensor:
    """Return the nearest groups whose rows sum to 1."""
    return a + (1 - a.sum(1, keepdim=True)) / a.shape[1]


def _hardened(a: Tensor) -> Tensor:
    """Return groups without small entries, whose rows sum to 1."""
    large = torch.where(a.abs() < _SMALL, 0.0, a)
    total = large.sum(1, keepdim=True)
    return torch.where(total.abs() > 0.5, large / torch.where(total == 0, 1, total), a)


def _useful(a: Tensor, own: Tensor, every: Tensor) -> Tensor:
    """Return groups of which those that add nothing have joined the one that they correlate with most."""
    while a.shape[1] > 1:
        given = (own @ a).abs().mean(0)
        k = int(given.argmin())
        if given[k] >= _NOTHING * given.sum():
            break
        E = every @ a
        E = E - E.mean(0)
        likeness = (E.T @ E[:, k]) / E.norm(dim=0).clamp(min=_TINY)
        likeness[k] = -torch.inf
        into = int(likeness.argmax())
        a = a.clone()
        a[:, into] += a[:, k]
        a = a[:, [j for j in range(a.shape[1]) if j != k]]
    return a
