r"""Groups of contributions in closed form, from the drops that follow when patches of an image are covered.

An x-feature should be one reason for the output. A reason has a place in the image. Covering that place should lower
this x-feature and no other. Each row i of X belongs to one covered patch of one positive. It holds the drop of every
dimension's contribution to the output. The output drops by :math:`m_i = \sum_d X_{id}`. Only patches that speak for
the output count, :math:`m_i > 0`. Row i of V holds the drop of every dimension's activation, in units of the
dimension's root mean square drop. If patches were covered in several ways, such as cells of feature maps and then
pixels, each way gives rows of its own, with its own units.

1. *Clusters of patches.* Patches that lower the same activations when covered belong to one reason. Spectral
   clustering groups the rows of V by the squared positive cosine, weighted by :math:`m_i^\gamma`. :math:`S_{ik}` is 1
   if patch i is in cluster k, else 0. Activations say what the network sees in a patch. Drops of contributions say it
   less well, because a few dimensions with large weights hide the others.
2. *Groups by ridge regression.* The whole drop of each patch should be the drop of its cluster's x-feature alone:

   .. math:: a = \frac1K + (X^\top X + \rho I)^{-1} X^\top \Bigl(S \odot m - \frac{m}{K}\Bigr),
             \qquad \rho = \lambda \tfrac1n \sum_{i=1}^n \lVert x_i \rVert^2.

   This minimises :math:`\lVert X a - S \odot m \rVert^2 + \rho \lVert a - 1/K \rVert^2`. The columns of the target
   sum to m, so :math:`\sum_k a_{dk} = 1` holds without a constraint. Entries may be negative, because layers mix parts.
3. *Hardening.* Entries below a share of the row's largest become 0. The largest takes the rest, so that rows sum to 1.
4. *Merging.* A group that adds nothing to the positives joins the group that it correlates with most.

The target of step 2 is a pull-away term in the image, missing from the paper. The first term takes the place of Eq. 2:
each x-feature reconstructs the drops of its own patches. No heatmap method takes part, so a comparison of maps favours
no method. The computation uses no random numbers and no gradient descent. Ties go to the first candidate.

Without covered inputs the groups are clusters of dimensions with correlated contributions over the examples.

Conventions:
    D dimensions, K x-features, P patches. Contributions and drops are in standard deviations of their output.

Reference:
    Not in the paper. Ng, Jordan, Weiss, "On spectral clustering", NIPS 2001, for the clusters. Leemann, Kirchhof, Rong,
    Kasneci, Kasneci, "When are post-hoc conceptual explanations identifiable?", UAI 2023, argue for disjoint places.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_xnn.layers._threads import one_thread_if_small

__all__ = ["Drops", "hardened", "learn_groups", "patch_clusters", "regressed", "spectral_groups", "supporting"]

# Gamma, the power of a patch's drop that weights the patch in the clustering.
_WEIGHT = 0.5
# Share of a row's largest entry below which others become 0.
_SMALL = 0.2
# Patches with less than this share of the largest drop do not speak for the output.
_SILENT = 1e-4
# Share of all contributions to positives below which a group counts as adding nothing.
_NOTHING = 0.01
_TINY = 1e-12
# Likeness of all rows or columns with all. Without it, more separate clusters than asked for would leave the leading
# eigenvectors open, and rounding would choose among them.
_WEAK = 1e-4
# Share of the largest deviation, and of its own size, below which the deviation of a column may be rounding.
_CONSTANT = 1e-5
# Blocks of rows in products of a matrix with its own transpose.
_BLOCKS = 4
# Rows above which only the needed eigenvectors are computed.
_LARGE = 600
# Columns that are clustered; further ones, with the smallest deviations, join a cluster. The affinity of all columns
# of 20,000 would take 3 GB.
_WIDE = 4096


class Drops(NamedTuple):
    """What covered patches take away, by dimension or channel."""

    contributions: Tensor
    """Drops of contributions, (..., D)."""
    activations: Tensor
    """Drops of activations, (..., D)."""


def learn_groups(
    positives: Tensor,
    others: Tensor,
    covers: Sequence[Drops],
    K: int,
    *,
    ridge: float = 1.0,
    balance: float = 0.0,
) -> Tensor:
    """Compute groups (D, K') of at most K x-features; each row sums to 1.

    Args:
        positives: Contributions in positives, (m, D).
        others: Contributions in other examples, (m', D).
        covers: For each way to cover patches the drops in positives, both (m, P, D). P may differ between ways. Empty
            for inputs without patches.
        K: Largest number of x-features.
        ridge: Lambda. A larger one makes groups vary less with the examples, but they overlap more.
        balance: Pull of the clusters towards equal sizes, from 0 to 1.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> two = torch.rand(30, 2, generator=g)  # two reasons, each in three dimensions
        >>> seen = two.repeat_interleave(3, 1)
        >>> first, second = torch.tensor([1.0, 1, 1, 0, 0, 0]), torch.tensor([0.0, 0, 0, 1, 1, 1])
        >>> drops = torch.stack([seen * first, seen * second], 1)
        >>> learn_groups(seen, seen[:0], [Drops(drops, drops)], 2).sum(0)
        tensor([3., 3.], dtype=torch.float64)
    """
    every = torch.cat([positives, others]).double()
    K = max(1, min(K, every.shape[1]))
    rows = [supporting(Drops(*(part.double() for part in drops))) for drops in covers]
    X, m, V = (torch.cat(parts) for parts in zip(*rows, strict=True)) if rows else (every[:0],) * 3
    if not len(X):
        a = spectral_groups(every, K)
    else:
        K = min(K, len(X))
        a = hardened(regressed(X, m, patch_clusters(V, m, K, balance=balance), K, ridge))
    return _merged(a, positives.double(), every)


def supporting(drops: Drops) -> tuple[Tensor, Tensor, Tensor]:
    """Select the patches that speak for the output.

    Every image has the same weight. Drops of activations are divided by the root mean square of their dimension, so
    that the units of a layer do not matter. Patches with NaN or infinite drops, as where a model divides by the
    deviation within a patch, do not count.

    Args:
        drops: Drops in images, both (images, P, D).

    Returns:
        Drops of contributions (n, D), their sums (n,), and scaled drops of activations (n, D). n may be 0.
    """
    finite = torch.stack([part.isfinite().all(2) for part in drops]).all(0)[:, :, None]
    drops = Drops(*(torch.where(finite, part, 0) for part in drops))
    X = (drops.contributions / drops.contributions.flatten(1).norm(dim=1).clamp(min=_TINY)[:, None, None]).flatten(0, 1)
    m = X.sum(1)
    size = drops.activations.square().mean((0, 1)).sqrt()
    V = (drops.activations / torch.where(size > 0, size, 1)).flatten(0, 1)
    kept = (m > _SILENT * m.max()) & (m > 0) & (V != 0).any(1)
    return X[kept], m[kept], V[kept]


def patch_clusters(V: Tensor, m: Tensor, K: int, *, balance: float = 0.0) -> Tensor:
    """Find the cluster of each patch, (n,), from 0 to K - 1.

    Args:
        V: Drops of each activation, (n, D).
        m: Drops of the output, (n,), positive.
        K: Number of clusters.
        balance: Pull of the clusters towards equal sizes, from 0 to 1.

    Example:
        >>> V = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.1]], dtype=torch.float64)
        >>> patch_clusters(V, torch.ones(3), 2)
        tensor([0, 1, 0])
    """
    unit = V / V.norm(dim=1, keepdim=True).clamp(min=_TINY)
    weight = (m / m.max()).double() ** _WEIGHT
    # In place, as new memory for matrices of this size takes longer than the arithmetic.
    likeness = _gram(unit).clamp_(min=0).square_().add_(_WEAK).mul_(weight[:, None]).mul_(weight)
    root = likeness.sum(1).sqrt()
    embedding = _leading(likeness.div_(root[:, None]).div_(root), K) / root[:, None]
    embedding = embedding / embedding.norm(dim=1, keepdim=True).clamp(min=_TINY)
    return _clustered(embedding, weight, K, balance=balance)


def regressed(X: Tensor, m: Tensor, label: Tensor, K: int, ridge: float = 1.0) -> Tensor:
    """Compute groups (D, K) by ridge regression: a patch's drop is assigned to the x-feature of its cluster.

    Args:
        X: Drops of each contribution, (n, D).
        m: Drops of the output, (n,).
        label: Cluster of each patch, (n,).
        K: Number of x-features.
        ridge: Lambda.

    Example:
        >>> X = torch.eye(2, dtype=torch.float64)
        >>> regressed(X, X.sum(1), torch.tensor([0, 1]), 2, ridge=1e-6).round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    n, D = X.shape
    target = torch.nn.functional.one_hot(label, K).to(X) * m[:, None] - m[:, None] / K
    penalty = ridge * X.square().sum(1).mean()
    if n < D:  # the same solution from the smaller of two systems
        return 1 / K + X.T @ _solved(_gram(X), penalty, target)
    return 1 / K + _solved(_gram(X.T), penalty, X.T @ target)


def _gram(X: Tensor) -> Tensor:
    """Compute the inner products of all rows, (n, n), exactly symmetric, without computing each of them twice."""
    n = len(X)
    edges = [n * i // _BLOCKS for i in range(_BLOCKS + 1)]
    found = X.new_empty(n, n)
    for first, last in pairwise(edges):
        torch.mm(X[first:last], X[first:].T, out=found[first:last, first:])
        found[last:, first:last] = found[first:last, last:].T
        block = found[first:last, first:last]  # some processors round its halves differently
        block.copy_(block.triu() + block.triu(1).T)
    return found


def _solved(gram: Tensor, penalty: Tensor, target: Tensor) -> Tensor:
    """Solve (gram + penalty I) x = target, in the memory of gram."""
    gram.diagonal().add_(penalty)
    found: Tensor = torch.linalg.solve(gram, target)
    return found


def hardened(a: Tensor, small: float = _SMALL) -> Tensor:
    """Set small entries to 0, and correct the largest entry of each row, so that the row sums to 1.

    Args:
        a: Groups (D, K); each row sums to 1.
        small: Share of a row's largest entry below which others become 0.

    Example:
        >>> hardened(torch.tensor([[0.9, 0.1], [0.6, 0.4]]))
        tensor([[1.0000, 0.0000],
                [0.6000, 0.4000]])
    """
    size = a.abs()
    largest = size.amax(1, keepdim=True)
    made = torch.where(size < small * largest, 0, a)
    first = (size >= largest * (1 - 1e-9)).double().argmax(1, keepdim=True)
    return made.scatter_add(1, first, 1 - made.sum(1, keepdim=True))


def spectral_groups(X: Tensor, K: int) -> Tensor:
    """Cluster correlated columns by spectral clustering, as one-hot rows (D, K); share constant columns evenly.

    The affinity of two columns is their positive correlation. The weight of a column is its standard deviation. The
    method draws no random numbers: the first cluster starts at the column with the largest standard deviation, each
    further one at the column farthest from the earlier starts, weighted. Ties go to the first column. Of more than
    4,096 columns, those with the smallest weights join the cluster of the largest mean affinity.

    Args:
        X: Rows of numbers, (m, D).
        K: Number of clusters, at most D.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 0.0, 7.0], [0.0, 0.0, 1.0, 7.0], [2.0, 4.0, 0.5, 7.0], [0.0, 0.0, 0.0, 7.0]])
        >>> spectral_groups(x, 2)
        tensor([[1.0000, 0.0000],
                [1.0000, 0.0000],
                [0.0000, 1.0000],
                [0.5000, 0.5000]], dtype=torch.float64)

    Reference:
        Ng, Jordan, Weiss, "On spectral clustering", 2001.
    """
    X = X.double()
    D = X.shape[1]
    K = min(K, D)
    centred = X - X.mean(0)
    size = centred.norm(dim=0)
    live = (size > _CONSTANT * size.max()) & (size > _CONSTANT * X.norm(dim=0))
    groups = torch.full((D, K), 1 / K, dtype=torch.float64, device="cpu")
    count = min(K, int(live.sum()))
    if not count:
        return groups
    unit, weight = centred[:, live] / size[live], size[live] / size.max()
    labels = torch.empty(unit.shape[1], dtype=torch.long, device="cpu")
    order = weight.argsort(descending=True, stable=True)
    heavy, light = order[:_WIDE].sort()[0], order[_WIDE:]
    labels[heavy] = own = _spectral_clusters(unit[:, heavy], weight[heavy], count)
    member = torch.eye(count, dtype=torch.float64, device="cpu")[own] * weight[heavy, None]
    for some in torch.split(light, _WIDE):
        labels[some] = ((unit[:, some].T @ unit[:, heavy]).clamp(min=0) @ (member / member.sum(0))).argmax(1)
    groups[live] = torch.eye(K, dtype=torch.float64, device="cpu")[labels]
    return groups


def _spectral_clusters(unit: Tensor, weight: Tensor, count: int) -> Tensor:
    """Compute the cluster of each of some columns of length 1, (D,)."""
    likeness = ((unit.T @ unit).clamp(min=0) + _WEAK) * weight[:, None] * weight
    root = likeness.sum(1).sqrt()
    embedding = _leading(likeness / root[:, None] / root, count)
    embedding = embedding / embedding.norm(dim=1, keepdim=True).clamp(min=_TINY)
    return _clustered(embedding, weight, count)


def _leading(matrix: Tensor, K: int) -> Tensor:
    """Compute the eigenvectors of the K largest eigenvalues of a symmetric matrix, (D, K)."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    D = len(matrix)
    if D > _LARGE:
        start = np.linspace(1, 2, D)  # any vector that is not an eigenvector; the same in every run
        # By torch, as numpy's threads would wait for the same cores.
        times = LinearOperator((D, D), lambda x: torch.mv(matrix, torch.from_numpy(x)).numpy(), dtype=np.float64)
        try:
            with one_thread_if_small(2.0 * D**2):
                found: Tensor = torch.from_numpy(np.ascontiguousarray(eigsh(times, K, v0=start, tol=1e-10)[1]))
            return found
        except ArpackNoConvergence:
            pass
    whole: Tensor = torch.linalg.eigh(matrix)[1]
    return whole[:, D - K :]


def _clustered(embedding: Tensor, weight: Tensor, K: int, *, balance: float = 0.0) -> Tensor:
    """Find the cluster of each row, (D,), by k-means that starts from the farthest points.

    A positive balance enlarges the distances to large clusters.
    """
    near = torch.full_like(weight, torch.inf)
    chosen = [int(weight.argmax())]
    for _ in range(K - 1):
        near = torch.minimum(near, (embedding - embedding[chosen[-1]]).square().sum(1))
        chosen.append(_first_of_largest(near * weight))
    centres = embedding[chosen]
    label, total = torch.full((len(embedding),), -1, device="cpu"), weight.new_ones(K)
    for _ in range(100):
        distance = torch.cdist(embedding, centres) * (total / total.mean()).clamp(min=_TINY) ** balance
        new = (distance <= distance.amin(1, keepdim=True) + 1e-9).double().argmax(1)
        if torch.equal(new, label):
            break
        label = new
        share = torch.nn.functional.one_hot(label, K).double() * weight[:, None]
        total = share.sum(0)
        centres = torch.where((total > 0)[:, None], share.T @ embedding / total.clamp(min=1e-12)[:, None], centres)
    return label


def _first_of_largest(values: Tensor) -> int:
    """Return the index of the largest value; of values equal up to rounding, the first."""
    return int((values >= values.max() * (1 - 1e-9)).double().argmax())


def _merged(a: Tensor, positives: Tensor, every: Tensor) -> Tensor:
    """Merge each group that adds nothing into the group that it correlates with most."""
    while a.shape[1] > 1:
        given = (positives @ a).abs().mean(0)
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
