r"""Partitions: rival ways to divide the contributions of a layer's dimensions among a few x-features.

Let every dimension d have a contribution :math:`c_d`, so that all contributions sum to the output. x-features
:math:`E_k = \sum_d a_{dk} c_d` then sum to the same output if :math:`\sum_k a_{dk} = 1`. This leaves open which
dimensions form a group. The rules here use chance, size, correlation and factorisation. Subspaces divide the output
differently: along directions instead of dimensions.

====================  ==========================================================  ===================================
function              a group holds                                               a
====================  ==========================================================  ===================================
random_partition      random dimensions                                           one-hot
single_dimensions     one large dimension each; the last group holds all others   one-hot, one group more
spectral_partition    dimensions with correlated contributions                    one-hot
nmf_partition         dimensions of one non-negative part of the sizes            shares, not negative
prca                  directions of most relevance                                no a: orthogonal subspaces
drsa                  directions with relevance in different examples             no a: orthogonal subspaces
====================  ==========================================================  ===================================

Apply a partition by ``contributions @ a``, and subspaces by :func:`subspace_relevances`. All rules use contributions
alone, without the image.

Conventions:
    M examples, D dimensions, K groups. Contributions (M, D) are in logits. Subspaces take activations minus their base,
    (M, D), and contexts (M, D). Contexts are the factors that turn activations into contributions:
    ``activations * contexts`` are the contributions. Results are in float64. Groups have falling mean :math:`|E_k|`.
    Ties go to the lowest index. Values that differ by rounding alone are ties, so every processor finds the same
    groups.

Reference:
    Ng, Jordan, Weiss, "On Spectral Clustering: Analysis and an Algorithm", 2001; Lee, Seung, "Learning the parts of
    objects by non-negative matrix factorization", 1999; Chormai, Herrmann, Müller, Montavon, "Disentangled Explanations
    of Neural Network Predictions by Finding Relevant Subspaces", 2024 (PRCA and DRSA).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_xnn.metrics._controls import random_partition
from captum_xnn.models.baselines._scikit import scikit_learn

__all__ = [
    "drsa",
    "nmf_partition",
    "prca",
    "random_partition",
    "single_dimensions",
    "spectral_partition",
    "subspace_relevances",
]

# Relative difference below which two numbers count as equal. Rounding differs between processors.
_ROUNDING = 1e-9


def single_dimensions(contributions: Tensor, groups: int) -> Tensor:
    """Give each of the K dimensions with the largest mean absolute contribution its own group, (D, K + 1).

    The last group holds all other dimensions.

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
    if groups < 1:
        raise ValueError("the number of groups is below 1; pass at least 1")
    c = _checked(contributions, groups + 1)
    left, chosen = c.abs().mean(0), torch.full((c.shape[1],), groups, device=c.device)
    for k in range(groups):
        d = _first_largest(left)
        chosen[d], left[d] = k, -1
    return F.one_hot(chosen, groups + 1).to(c)


def spectral_partition(contributions: Tensor, groups: int) -> Tensor:
    r"""Group dimensions with correlated contributions by normalised spectral clustering; one-hot, (D, K).

    The affinity of two dimensions is the absolute correlation of their contributions over the examples. Contributions
    that rise and fall together have one cause, even if one of them speaks against the output. On the drawn figures
    absolute correlations find more reasons than squared or positive ones. Let R be the affinities and G their sums. The
    K leading eigenvectors of :math:`G^{-1/2} R G^{-1/2}` place each dimension on a sphere. There k-means starts at the
    dimension of the largest sum, then at the dimension farthest from earlier starts. It draws no random numbers.

    Constant contributions correlate with no others. They join the group of the largest contributions.

    Args:
        contributions: (M, D), in logits, of examples with different reasons.
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
            f"contributions vary in only {len(live)} dimensions, too few for {groups} groups; ask for fewer groups, or "
            "pass more examples"
        )
    unit = centred[:, live] / size[live]
    affinity = (unit.T @ unit).abs()
    degree = affinity.sum(0)
    rows = _leading(affinity / degree.outer(degree).sqrt(), groups)
    length = rows.norm(dim=1, keepdim=True)
    # A dimension outside the K leading directions has no place on the sphere. Rounding must not give it one.
    rows = torch.where(length > 1e-6, rows / length.clamp_min(1e-6), 0)
    labels = _k_means(rows, groups, _first_largest(degree))
    a = torch.zeros(c.shape[1], groups, device="cpu").to(c)
    a[live, labels] = 1
    dead = a.sum(1) == 0
    a = _ordered(a, c)
    a[dead, 0] = 1
    return a


def nmf_partition(contributions: Tensor, groups: int) -> Tensor:
    r"""Share each dimension among the non-negative parts of the absolute contributions, (D, K); rows sum to 1.

    .. math:: \min_{W, H \ge 0} \lVert |c| - W H \rVert^2, \quad
              a_{dk} = \bar w_k H_{kd} \Big/ \sum_j \bar w_j H_{jd}

    :math:`\bar w_k` is the mean coefficient and cancels the scale of the parts. A dimension outside all parts is shared
    evenly. The factorisation is scikit-learn's and starts from the singular vectors.

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
    c = _checked(contributions, groups)
    if len(c) < groups:
        raise ValueError(
            f"{len(c)} examples are too few for {groups} groups; ask for fewer groups, or pass more examples"
        )
    data = c.abs().cpu().numpy()
    scale = data.max() or 1.0
    made = scikit_learn().factorise(groups, init="nndsvda", random_state=0, max_iter=5000)
    weight = torch.from_numpy(made.fit_transform(data / scale)).mean(0)
    a = (weight[:, None] * torch.from_numpy(made.components_)).T.to(c)
    total = a.sum(1, keepdim=True)
    return _ordered(torch.where(total > 0, a / torch.where(total > 0, total, 1), 1 / groups), c)


def prca(activations: Tensor, contexts: Tensor, subspaces: int, *, size: int = 1) -> Tensor:
    r"""Find the directions of most relevance, as K orthogonal subspaces (K, D, d).

    The directions are the leading eigenvectors of :math:`\mathrm E[a c^T + c a^T]`, d for each subspace in falling
    order. The last column of :func:`subspace_relevances` holds the relevance outside the subspaces.

    Args:
        activations: a, (M, D), minus their base.
        contexts: c, (M, D).
        subspaces: K.
        size: d, dimensions of each subspace.

    Raises:
        ValueError: If shapes do not fit, there are no examples, values are not finite, a number is below 1, or K d is
            more than D.

    Example:
        >>> a = torch.eye(3)
        >>> prca(a, torch.tensor([1.0, 5.0, 2.0]) * a, 2)[:, :, 0]
        tensor([[0., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64)

    Reference:
        Chormai et al., "Disentangled Explanations of Neural Network Predictions by Finding Relevant Subspaces", 2024.
    """
    a, c = _checked_pair(activations, contexts, _directions(subspaces, size))
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
    r"""Find K orthogonal subspaces with relevance in different examples, (K, D, d).

    .. math:: \max_U \; M^{1/2}_k \, M^2_n \, \max\big(0, (U_k^T a_n)^T (U_k^T c_n)\big), \qquad U^T U = 1

    with the generalised mean :math:`M^p`. The power 2 over the examples rewards subspaces that are relevant in a few
    examples. The power 1/2 over the subspaces spreads relevance over all of them. Gradient ascent on the orthogonal
    matrices starts from a random U. A QR decomposition makes the result of each step orthogonal again. A step is halved
    until the objective rises.

    Args:
        activations: a, (M, D), minus their base.
        contexts: c, (M, D).
        subspaces: K.
        size: d, dimensions of each subspace; D / K by default, rounded down.
        steps: Largest number of steps.
        generator: CPU generator that draws the start.

    Raises:
        ValueError: If shapes do not fit, there are no examples, values are not finite, a number is below 1, or K d is
            more than D.

    Example:
        >>> a = torch.eye(2).repeat(4, 1)
        >>> U = drsa(a, a, 2, generator=torch.Generator().manual_seed(0))
        >>> subspace_relevances(U, a, a)[:2].max(1).values.round(decimals=2)  # each example in its own subspace
        tensor([1., 1.], dtype=torch.float64)

    Reference:
        Chormai et al., "Disentangled Explanations of Neural Network Predictions by Finding Relevant Subspaces", 2024.
    """
    a, c = _checked_pair(activations, contexts, _directions(subspaces, 1 if size is None else size))
    size = a.shape[1] // subspaces if size is None else size
    a, c = (x / x.square().mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny) for x in (a, c))
    drawn = torch.randn(a.shape[1], subspaces * size, generator=generator, dtype=torch.float64, device="cpu")
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
    r"""Compute the relevance of each subspace, :math:`(U_k^T a)^T (U_k^T c)`, and the remainder, (M, K + 1), in logits.

    Their sum is :math:`a^T c`, the sum of all contributions, for any orthogonal U.

    Args:
        U: Subspaces (K, D, d) from :func:`prca` or :func:`drsa`.
        activations: a, (M, D), minus their base.
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
            f"subspaces have shape {tuple(U.shape)}, not (K, {a.shape[1]}, d); pass the result of prca or drsa for "
            "this layer"
        )
    if not bool(U.isfinite().all()):
        raise ValueError("subspaces are NaN or infinite; find them again by prca or drsa")
    found = _relevances(U.detach().to(a).transpose(0, 1).flatten(1), a, c, len(U))
    return torch.cat([found, (a * c).sum(1, keepdim=True) - found.sum(1, keepdim=True)], 1)


def _relevances(U: Tensor, a: Tensor, c: Tensor, subspaces: int) -> Tensor:
    """Compute the relevance of each subspace, (M, K), from columns (D, K d)."""
    return ((a @ U) * (c @ U)).reshape(len(a), subspaces, -1).sum(2)


def _ascent(U: Tensor, a: Tensor, c: Tensor, subspaces: int) -> tuple[float, Tensor]:
    """Compute DRSA's objective and its gradient (D, K d)."""
    with torch.enable_grad():
        U = U.detach().requires_grad_()
        squared = _relevances(U, a, c, subspaces).clamp_min(0).square().mean(0)
        value = (squared + 1e-12).pow(0.25).mean().square()  # a root has no slope at 0
        (slope,) = torch.autograd.grad(value, U)
    return float(value.detach()), slope


def _orthogonal(X: Tensor) -> Tensor:
    """Compute the orthogonal factor of a QR decomposition; a positive diagonal of R makes it unique."""
    Q, R = torch.linalg.qr(X)
    factor: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)
    return factor


def _leading(S: Tensor, n: int) -> Tensor:
    """Compute the n leading eigenvectors of a symmetric matrix (D, D), as (D, n), with a positive largest entry each.

    Equal eigenvalues leave the choice of vectors in their space open. The function takes the vectors nearest to single
    dimensions, starting with the first dimension.
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
    """Find the cluster of each row, (D,), by k-means from the farthest rows. Ties go to the first centre."""
    centres = rows[first : first + 1]
    for _ in range(groups - 1):
        nearest = _squared_distances(rows, centres).amin(1)
        d = _first_largest(nearest)
        centres = torch.cat([centres, rows[d : d + 1]])
    labels = torch.full((len(rows),), -1, device=rows.device)
    for _ in range(300):
        distance = _squared_distances(rows, centres)
        near = distance <= distance.amin(1, keepdim=True) + _ROUNDING
        found = near.long().cummax(1).values.eq(0).sum(1)  # number of centres before the first near one
        if torch.equal(found, labels):
            break
        labels = found
        centres = torch.stack(
            [rows[labels == k].mean(0) if bool((labels == k).any()) else centres[k] for k in range(groups)]
        )
    return labels


def _squared_distances(rows: Tensor, centres: Tensor) -> Tensor:
    """Compute squared distances, (D, K), without the cancellation of expanded squares."""
    return torch.stack([(rows - centre).square().sum(1) for centre in centres], 1)


def _first_largest(values: Tensor) -> int:
    """Return the index of the largest value; of values equal up to rounding, the first."""
    largest = values.max()
    return int((values >= largest - _ROUNDING * largest.abs()).nonzero()[0])


def _ordered(a: Tensor, contributions: Tensor) -> Tensor:
    """Sort groups by falling mean absolute contribution. Ties keep their order."""
    left, order = (contributions @ a).abs().mean(0), []
    for _ in range(a.shape[1]):
        order.append(_first_largest(left))
        left[order[-1]] = -1
    return a[:, order]


def _checked(values: Tensor, least: int, name: str = "contributions", parts: str = "groups") -> Tensor:
    """Check numbers (M, D) with at least some dimensions, and convert them to float64."""
    shape = tuple(values.shape)
    if values.dim() != 2 or not len(values):
        raise ValueError(
            f"{name} have shape {shape}, not (M, D) with at least one example; pass one row for each example, as in "
            f"{name}.flatten(1)"
        )
    if least < 1:
        raise ValueError(f"the number of {parts} is below 1; pass at least 1")
    if least > shape[1]:
        raise ValueError(
            f"{name} have {shape[1]} dimension{'s' * (shape[1] != 1)}, and the {parts} asked for need {least}; ask for "
            "fewer"
        )
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} are NaN or infinite in some examples; check the values of these examples")
    return values.detach().double()


def _directions(subspaces: int, size: int) -> int:
    """Return the number of directions of all subspaces."""
    if subspaces < 1 or size < 1:
        raise ValueError(f"{subspaces} subspaces of {size} dimensions were asked for; pass at least 1 of each")
    return subspaces * size


def _checked_pair(activations: Tensor, contexts: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """Check activations and contexts, and convert them to float64."""
    if activations.shape != contexts.shape:
        raise ValueError(
            f"activations have shape {tuple(activations.shape)} and contexts {tuple(contexts.shape)}; pass both as "
            "(M, D), because their product is the contributions"
        )
    return (
        _checked(activations, directions, "activations", "subspaces"),
        _checked(contexts, directions, "contexts", "subspaces"),
    )
