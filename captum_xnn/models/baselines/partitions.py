r"""Partitions: rival ways to divide the contributions of a layer's dimensions among a few x-features.

Where every dimension d has a contribution :math:`c_d` to the output, and they add up to it, x-features
:math:`E_k = \sum_d a_{dk} c_d` add up to it as well if :math:`\sum_k a_{dk} = 1`. Which dimensions belong together is
open then, and any rule can be tried: chance, size, correlation, factorisation. Subspaces divide it otherwise.

====================  ==========================================================  ===================================
function              which dimensions belong together                            a
====================  ==========================================================  ===================================
random_partition      those that chance puts together                             one-hot
single_dimensions     none: the largest stand alone, all others are one rest      one-hot, one group more
spectral_partition    those whose contributions go together                       one-hot
nmf_partition         those in one non-negative part of the contributions' size   shares, not negative
prca                  directions of most relevance                                none: orthogonal subspaces
drsa                  directions whose relevance comes in different examples      none: orthogonal subspaces
====================  ==========================================================  ===================================

Apply a partition by ``contributions @ a``, and subspaces by :func:`subspace_relevances`. All of them see contributions
alone: none looks at the image.

Conventions:
    M examples, D dimensions, K groups. Contributions (M, D) in logits. Subspaces are of activations less their base,
    (M, D), and contexts (M, D), the factors by which activations become contributions: ``activations * contexts`` are
    the contributions. Results are in float64. Groups come by falling mean :math:`|E_k|`. Ties are broken by the lowest
    index, and values that differ by rounding alone are ties, so that every processor finds the same groups.

Reference:
    Ng, Jordan, Weiss, "On Spectral Clustering: Analysis and an Algorithm", 2001; Lee, Seung, "Learning the parts of
    objects by non-negative matrix factorization", 1999; Chormai, Herrmann, Müller, Montavon, "Disentangled Explanations
    of Neural Network Predictions by Finding Relevant Subspaces", 2024 (PRCA and DRSA).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_xnn.metrics.controls import random_partition

__all__ = [
    "drsa",
    "nmf_partition",
    "prca",
    "random_partition",
    "single_dimensions",
    "spectral_partition",
    "subspace_relevances",
]

# Numbers whose difference is less than this, of their size, are equal: eigenvectors differ more between processors.
_ROUNDING = 1e-9


def single_dimensions(contributions: Tensor, groups: int) -> Tensor:
    """Give the dimensions of the largest mean absolute contribution a group each, and all others one, (D, K + 1).

    Args:
        contributions: (M, D), in logits.
        groups: K, less than D.

    Raises:
        ValueError: If contributions have another shape or are not finite, or there are too few dimensions.

    Example:
        >>> single_dimensions(torch.tensor([[1.0, -4.0, 2.0], [1.0, 4.0, 2.0]]), 1)
        tensor([[0., 1.],
                [1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    c = _checked(contributions, groups + 1)
    left, chosen = c.abs().mean(0), torch.full((c.shape[1],), groups, device=c.device)
    for k in range(groups):
        d = _first_largest(left)
        chosen[d], left[d] = k, -1
    return F.one_hot(chosen, groups + 1).to(c)


def spectral_partition(contributions: Tensor, groups: int) -> Tensor:
    r"""Group the dimensions whose contributions go together, by normalised spectral clustering; one-hot, (D, K).

    The affinity of two dimensions is the absolute correlation of their contributions over the examples: contributions
    that rise and fall together have one cause, also where one speaks against the output. On the drawn figures it finds
    more reasons than squared or positive correlations do. The K leading eigenvectors of
    :math:`G^{-1/2} R G^{-1/2}`, with the affinities R and their sums G, place each dimension on a sphere, where k-means
    starts at the dimension of the largest sum, then at the farthest from those chosen. Nothing is drawn.

    Constant contributions correlate with none; they join the group of the largest contributions.

    Args:
        contributions: (M, D), in logits, of examples among which the reasons differ.
        groups: K.

    Raises:
        ValueError: If contributions have another shape or are not finite, or fewer than K dimensions vary.

    Example:
        >>> reasons = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
        >>> spectral_partition(reasons[:, [0, 1, 0]] * torch.tensor([3.0, 1.0, -1.0]), 2)
        tensor([[1., 0.],
                [0., 1.],
                [1., 0.]], dtype=torch.float64)

    Reference:
        Ng, Jordan, Weiss, "On Spectral Clustering: Analysis and an Algorithm", 2001.
    """
    c = _checked(contributions, groups)
    centred = c - c.mean(0)
    size = centred.norm(dim=0)
    live = (size > _ROUNDING * c.norm(dim=0)).nonzero()[:, 0]
    if len(live) < groups:
        raise ValueError(
            f"expected {groups} dimensions or more whose contributions vary, got {len(live)}; ask for fewer groups, or "
            "pass more examples"
        )
    unit = centred[:, live] / size[live]
    affinity = (unit.T @ unit).abs()
    degree = affinity.sum(0)
    rows = _leading(affinity / degree.outer(degree).sqrt(), groups)
    length = rows.norm(dim=1, keepdim=True)
    # A dimension outside of the K leading directions has no place on the sphere, and rounding must not give it one.
    rows = torch.where(length > 1e-6, rows / length.clamp_min(1e-6), 0)
    labels = _k_means(rows, groups, _first_largest(degree))
    a = torch.zeros(c.shape[1], groups).to(c)
    a[live, labels] = 1
    dead = a.sum(1) == 0
    a = _ordered(a, c)
    a[dead, 0] = 1
    return a


def nmf_partition(contributions: Tensor, groups: int) -> Tensor:
    r"""Share each dimension among the non-negative parts of the contributions' size, (D, K); rows sum to 1.

    .. math:: \min_{W, H \ge 0} \lVert |c| - W H \rVert^2, \quad
              a_{dk} = \bar w_k H_{kd} \Big/ \sum_j \bar w_j H_{jd}

    :math:`\bar w_k` is the mean coefficient, so that the parts' scales do not count. A dimension in no part is shared
    evenly. The factorisation is scikit-learn's, started from the singular vectors.

    Args:
        contributions: (M, D), in logits.
        groups: K.

    Raises:
        ValueError: If contributions have another shape or are not finite, or there are fewer than K dimensions or
            examples.

    Example:
        >>> reasons = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
        >>> a = nmf_partition(reasons[:, [0, 1, 0]] * torch.tensor([3.0, 1.0, -1.0]), 2)
        >>> a.round(decimals=2).abs()
        tensor([[1., 0.],
                [0., 1.],
                [1., 0.]], dtype=torch.float64)

    Reference:
        Lee, Seung, "Learning the parts of objects by non-negative matrix factorization", 1999.
    """
    from sklearn.decomposition import NMF

    c = _checked(contributions, groups)
    if len(c) < groups:
        raise ValueError(
            f"expected {groups} examples or more, got {len(c)}; ask for fewer groups, or pass more of them"
        )
    data = c.abs().cpu().numpy()
    scale = data.max() or 1.0
    made = NMF(groups, init="nndsvda", random_state=0, max_iter=5000)
    weight = torch.from_numpy(made.fit_transform(data / scale)).mean(0)
    a = (weight[:, None] * torch.from_numpy(made.components_)).T.to(c)
    total = a.sum(1, keepdim=True)
    return _ordered(torch.where(total > 0, a / torch.where(total > 0, total, 1), 1 / groups), c)


def prca(activations: Tensor, contexts: Tensor, subspaces: int, *, size: int = 1) -> Tensor:
    r"""Find the directions of most relevance, as K orthogonal subspaces (K, D, d).

    They are the leading eigenvectors of :math:`\mathrm E[a c^T + c a^T]`, d for each subspace in falling order. The
    relevance that they leave out is the last column of :func:`subspace_relevances`.

    Args:
        activations: a, (M, D), less their base.
        contexts: c, (M, D).
        subspaces: K.
        size: d, dimensions of each.

    Raises:
        ValueError: If shapes do not fit, values are not finite, or K d is more than D.

    Example:
        >>> a = torch.eye(3)
        >>> prca(a, torch.tensor([1.0, 5.0, 2.0]) * a, 2)[:, :, 0]
        tensor([[0., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64)

    Reference:
        Chormai et al., "Disentangled Explanations of Neural Network Predictions by Finding Relevant Subspaces", 2024.
    """
    a, c = _checked_pair(activations, contexts, subspaces * size)
    product = a.T @ c / len(a)
    U = _leading(product + product.T, subspaces * size)
    return U.T.reshape(subspaces, size, -1).transpose(1, 2)


def drsa(
    activations: Tensor,
    contexts: Tensor,
    subspaces: int,
    *,
    size: int | None = None,
    steps: int = 200,
    generator: torch.Generator,
) -> Tensor:
    r"""Find K orthogonal subspaces whose relevance comes in different examples, (K, D, d).

    .. math:: \max_U \; M^{1/2}_k \, M^2_n \, \max\big(0, (U_k^T a_n)^T (U_k^T c_n)\big), \qquad U^T U = 1

    with the generalised mean :math:`M^p`: 2 over the examples rewards subspaces that are relevant in a few of them, and
    1/2 over the subspaces spreads relevance over all. A random U ascends the gradient on the orthogonal matrices; each
    step is taken back to them by a QR decomposition, and is made smaller until the objective rises.

    Args:
        activations: a, (M, D), less their base.
        contexts: c, (M, D).
        subspaces: K.
        size: d, dimensions of each subspace; D / K by default, rounded down.
        steps: Steps at most.
        generator: Of the CPU, draws the start.

    Raises:
        ValueError: If shapes do not fit, values are not finite, or K d is more than D.

    Example:
        >>> a = torch.eye(2).repeat(4, 1)
        >>> U = drsa(a, a, 2, generator=torch.Generator().manual_seed(0))
        >>> subspace_relevances(U, a, a)[:2].max(1).values.round(decimals=2)  # each example in a subspace of its own
        tensor([1., 1.], dtype=torch.float64)

    Reference:
        Chormai et al., "Disentangled Explanations of Neural Network Predictions by Finding Relevant Subspaces", 2024.
    """
    size = activations.shape[-1] // subspaces if size is None else size
    a, c = _checked_pair(activations, contexts, subspaces * size)
    a, c = (x / x.square().mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny) for x in (a, c))
    drawn = torch.randn(a.shape[1], subspaces * size, generator=generator, dtype=torch.float64)
    U, rate = _orthogonal(drawn.to(a)), 1.0
    value, slope = _ascent(U, a, c, subspaces)
    for _ in range(steps):
        # The gradient along the orthogonal matrices, of length 1.
        tangent = slope - U @ (U.T @ slope + slope.T @ U) / 2
        length = tangent.norm()
        while rate > _ROUNDING and length > 0:
            tried = _orthogonal(U + rate * tangent / length)
            better, slope_there = _ascent(tried, a, c, subspaces)
            if better > value:
                break
            rate /= 2
        else:
            break
        U, value, slope, rate = tried, better, slope_there, 2 * rate
    return U.T.reshape(subspaces, size, -1).transpose(1, 2)


def subspace_relevances(U: Tensor, activations: Tensor, contexts: Tensor) -> Tensor:
    r"""Return the relevance of each subspace, :math:`(U_k^T a)^T (U_k^T c)`, and of the rest, (M, K + 1), in logits.

    Their sum is :math:`a^T c`, the sum of all contributions, for any orthogonal U.

    Args:
        U: Subspaces (K, D, d), of :func:`prca` or :func:`drsa`.
        activations: a, (M, D), less their base.
        contexts: c, (M, D).

    Raises:
        ValueError: If shapes do not fit or values are not finite.

    Example:
        >>> U = torch.eye(3)[:2, :, None]
        >>> subspace_relevances(U, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, -1.0, 2.0]]))
        tensor([[ 1., -2.,  6.]], dtype=torch.float64)
    """
    a, c = _checked_pair(activations, contexts, 1)
    if U.dim() != 3 or U.shape[1] != a.shape[1]:
        raise ValueError(
            f"expected subspaces (K, {a.shape[1]}, d), got {tuple(U.shape)}; pass what prca or drsa returned for this "
            "layer"
        )
    found = _relevances(U.detach().to(a).transpose(0, 1).flatten(1), a, c, len(U))
    return torch.cat([found, (a * c).sum(1, keepdim=True) - found.sum(1, keepdim=True)], 1)


def _relevances(U: Tensor, a: Tensor, c: Tensor, subspaces: int) -> Tensor:
    """Return the relevance of each subspace, (M, K), of columns (D, K d)."""
    return ((a @ U) * (c @ U)).reshape(len(a), subspaces, -1).sum(2)


def _ascent(U: Tensor, a: Tensor, c: Tensor, subspaces: int) -> tuple[float, Tensor]:
    """Return DRSA's objective and its gradient (D, K d)."""
    with torch.enable_grad():
        U = U.detach().requires_grad_()
        squared = _relevances(U, a, c, subspaces).clamp_min(0).square().mean(0)
        value = (squared + 1e-12).pow(0.25).mean().square()  # a root has no slope at 0
        (slope,) = torch.autograd.grad(value, U)
    return float(value.detach()), slope


def _orthogonal(X: Tensor) -> Tensor:
    """Return the orthogonal factor whose triangular one has a positive diagonal, which is unique."""
    Q, R = torch.linalg.qr(X)
    factor: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)
    return factor


def _leading(S: Tensor, n: int) -> Tensor:
    """Return the n leading eigenvectors of a symmetric matrix (D, D), (D, n), the largest entry of each positive.

    Of equal eigenvalues any vectors of their space would do. Those nearest to single dimensions are taken, the first
    dimension first.
    """
    values, vectors = torch.linalg.eigh(S)
    values, vectors = values.flip(0), vectors.flip(1)
    kept: list[Tensor] = []
    while len(kept) < n:
        same = (values - values[len(kept)]).abs() <= _ROUNDING * values.abs().max()
        space = vectors[:, same] @ vectors[:, same].T
        for _ in range(min(int(same.sum()), n - len(kept))):
            d = _first_largest(space.diagonal())
            kept.append(space[:, d] / space[d, d].sqrt())
            space = space - kept[-1].outer(kept[-1])
    return torch.stack(kept, 1)


def _k_means(rows: Tensor, groups: int, first: int) -> Tensor:
    """Return the cluster of each row, (D,), from the farthest rows; of equally near centres the first."""
    centres = rows[first : first + 1]
    for _ in range(groups - 1):
        nearest = _squared_distances(rows, centres).amin(1)
        d = _first_largest(nearest)
        centres = torch.cat([centres, rows[d : d + 1]])
    labels = torch.full((len(rows),), -1, device=rows.device)
    for _ in range(300):
        distance = _squared_distances(rows, centres)
        near = distance <= distance.amin(1, keepdim=True) + _ROUNDING
        found = near.long().cummax(1).values.eq(0).sum(1)  # how many centres before the first near one
        if torch.equal(found, labels):
            break
        labels = found
        centres = torch.stack(
            [rows[labels == k].mean(0) if bool((labels == k).any()) else centres[k] for k in range(groups)]
        )
    return labels


def _squared_distances(rows: Tensor, centres: Tensor) -> Tensor:
    """Return squared distances, (D, K), without the cancellation of expanded squares."""
    return torch.stack([(rows - centre).square().sum(1) for centre in centres], 1)


def _first_largest(values: Tensor) -> int:
    """Return the first index whose value is the largest but for rounding."""
    largest = values.max()
    return int((values >= largest - _ROUNDING * largest.abs()).nonzero()[0])


def _ordered(a: Tensor, contributions: Tensor) -> Tensor:
    """Return groups by falling mean absolute contribution; equal ones in their own order."""
    left, order = (contributions @ a).abs().mean(0), []
    for _ in range(a.shape[1]):
        order.append(_first_largest(left))
        left[order[-1]] = -1
    return a[:, order]


def _checked(contributions: Tensor, groups: int) -> Tensor:
    """Return contributions in float64 after checking them."""
    if contributions.dim() != 2 or not len(contributions) or not 1 <= groups <= contributions.shape[1]:
        raise ValueError(
            f"expected contributions (M, D) with M > 0 and D >= {max(1, groups)}, got {tuple(contributions.shape)}; "
            "ask for fewer groups, or flatten the dimensions of each example"
        )
    if not bool(contributions.isfinite().all()):
        raise ValueError("expected finite contributions, got NaN or infinite values; look at the examples with them")
    return contributions.detach().double()


def _checked_pair(activations: Tensor, contexts: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """Return activations and contexts in float64 after checking them."""
    if activations.shape != contexts.shape:
        raise ValueError(
            f"expected activations and contexts (M, D), got {tuple(activations.shape)} and {tuple(contexts.shape)}; "
            "their product is the contributions"
        )
    return _checked(activations, directions), _checked(contexts, directions)
