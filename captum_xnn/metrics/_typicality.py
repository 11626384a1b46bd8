r"""Typicality: whether the model gives an example its class for the usual reasons.

The contributions of x-features to one output, over examples of the class, have a mean and a covariance. An example far
from the mean is an outlier: the model has unusual reasons for it. An example near the mean is a prototype.

.. math:: D^2(c) = (c - m)^\top S^{-1} (c - m), \qquad
          \frac{M (M - K)}{(M + 1)(M - 1) K} D^2 \sim F_{K, M - K}

m and S are mean and covariance of M examples without the one that is judged. An outlier therefore hides neither itself
nor its size. If contributions are normal, a multiple of :math:`D^2` has the F distribution, exactly and for every M. So
*chance*, the probability of a distance as large, has a scale of its own: in a class there may be no example with a
chance below one in a thousand, or many. Heavy tails have many. Few examples need a large distance: one of 20 has to
be 4.0 standard deviations off with one x-feature, and D has to be 7.3 with five.

The *share* is the rank of the distance among those of the class's own examples, each measured without itself. It holds
for any distribution of a new example. Among the examples of one class, shares are ranks, and every class has the same.

Of normal contributions of 20, 40 and 200 examples with 1, 3 and 5 x-features, 0.09 to 0.12 % have a chance below one in
a thousand; of Student's distribution with 3 degrees of freedom 1.2 to 3.3 %. If one example is 1,000 standard
deviations off, it is always found, with at most 0.07 % of the others. Many outliers that are alike hide each other:
with five x-features two among 20 examples, and eleven among 200.

Conventions:
    N examples, M examples of the class, K x-features; contributions in logits. Where x-features depend on each other
    linearly, K counts the independent ones.

Reference:
    Penny, "Appropriate critical values when testing for a single multivariate outlier by using the Mahalanobis
    distance", Applied Statistics, 1996, for the distance that leaves the example out, and its F distribution.
    Barber, Candes, Ramdas, Tibshirani, "Predictive inference with the jackknife+", 2021, for ranks of values that each
    leave one example out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["UNUSUAL", "Typicality", "typicality", "varying"]

UNUSUAL = 0.001
"""Chance below which an example is unusual: of normal contributions, one in a thousand is."""

# Contributions that differ by a smaller share of their size are equal: float32 rounds.
_ROUNDING = 1e-6
# The least share of its length that an example keeps out of the space of the others.
_APART = 1e-15


class Typicality(NamedTuple):
    """Typicality of the contributions of examples for their class, float64."""

    distance: Tensor
    """Mahalanobis distance D from the mean of the class's other examples, (N,)."""
    chance: Tensor
    """Probability of a distance as large if contributions were normal, (N,) in [0, 1]. Below one in a thousand, an
    example is unusual."""
    share: Tensor
    """Share of the class's examples that are at least as far from the mean, (N,) in [1 / (M + 1), 1]: near 1 for
    prototypes. For a new example of the class, every value is as likely as any other. Without ``usual``, shares are the
    ranks 1 / N to 1, so they sort examples, and do not tell whether any is an outlier."""
    deviations: Tensor
    """Each contribution less the mean of the class's other examples, in their standard deviations, (N, K): where an
    outlier differs."""


def typicality(contributions: Tensor, usual: Tensor | None = None) -> Typicality:
    """Compare the contributions of examples with those usual for their class.

    An x-feature that contributes the same to all examples of the class is left out.

    Args:
        contributions: Contributions of the examples to judge, (N, K).
        usual: Contributions of examples of the class to the same output by the same explainer, (M, K). They should not
            contain the examples to judge. None takes ``contributions``, and judges each example by the others.

    Raises:
        ValueError: If shapes do not fit, the class has fewer than K + 2 examples, all with the same contributions, or
            a number is not finite.

    Example:
        >>> usual = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([5.0, 1.0])
        >>> found = typicality(torch.tensor([[5.0, 1.0], [5.0, 6.0]]), usual)
        >>> found.chance < 0.001, found.deviations.round().tolist()
        (tensor([False,  True]), [[-0.0, -0.0], [-0.0, 5.0]])
    """
    _check(contributions, contributions if usual is None else usual)
    c = contributions.double()
    own = c if usual is None else usual.double().to(c.device)
    varies = varying(own)
    if not bool(varies.any()):
        raise ValueError("contributions of the class's examples are all equal; pass examples that differ")
    mean, std = own.mean(0), torch.where(varies, own.std(0), 1)
    X, new = (torch.where(varies, (of - mean) / std, 0) for of in (own, c))
    lengths, of_new, K = _squared_lengths(X, new)
    M = len(own)
    without = _without_itself(lengths, M)
    squared = without if usual is None else (M - 1) * of_new
    farther = (without[None] >= squared[:, None]).sum(1).double()
    # Without ``usual``, an example is as far as itself, which is the 1 of the other case.
    share = farther / M if usual is None else (1 + farther) / (M + 1)
    deviations = _deviations_without_itself(X) if usual is None else new
    return Typicality(squared.sqrt(), _chance(squared, M - 1 if usual is None else M, K), share, deviations)


def varying(contributions: Tensor) -> Tensor:
    """Mark x-features whose contributions differ between examples by more than rounding, boolean (K,).

    Args:
        contributions: (M, K).
    """
    return (contributions - contributions[0]).abs().amax(0) > _ROUNDING * contributions.abs().amax(0)


def _squared_lengths(X: Tensor, new: Tensor) -> tuple[Tensor, Tensor, int]:
    r"""Compute :math:`x^\top (X^\top X)^{-1} x` of the class's examples and of new ones, and the rank of X.

    Directions in which the class does not vary are left out.

    Args:
        X: Centred examples of the class, (M, K).
        new: Examples less the class's mean, (N, K).
    """
    U, size, Vh = torch.linalg.svd(X, full_matrices=False)
    kept = size > _ROUNDING * size[0]
    of_new = (new @ Vh[kept].T / size[kept]).square().sum(1)
    return U[:, kept].square().sum(1), of_new, int(kept.sum())


def _without_itself(lengths: Tensor, M: int) -> Tensor:
    """Compute the squared distance of each example from the mean of the others, in their covariance, (M,).

    Without an example, the mean moves by x / (M - 1), and the inverse of the sum of squares follows from Sherman and
    Morrison's formula. The distance is infinite if the others do not vary in the example's direction; it becomes huge.
    """
    scale = M / (M - 1)
    return scale**2 * (M - 2) * lengths / (1 - scale * lengths).clamp_min(_APART)


def _deviations_without_itself(X: Tensor) -> Tensor:
    """Compute each number less the mean of its column's others, in their standard deviations, (M, K).

    Args:
        X: Centred numbers, (M, K).
    """
    total = X.square().sum(0)
    lengths = X.square() / torch.where(total > 0, total, 1)
    return X.sign() * _without_itself(lengths, len(X)).sqrt()


def _chance(squared: Tensor, M: int, K: int) -> Tensor:
    """Compute the probability that a normal example has a squared distance as large from M others."""
    from scipy.special import fdtrc

    statistic = squared * (M * (M - K) / ((M + 1) * (M - 1) * K))
    return torch.from_numpy(fdtrc(K, M - K, statistic.cpu().numpy())).to(squared)


def _check(contributions: Tensor, usual: Tensor) -> None:
    """Raise if contributions cannot be compared."""
    if contributions.dim() != 2 or usual.dim() != 2 or contributions.shape[1] != usual.shape[1]:
        raise ValueError(
            f"contributions are {tuple(contributions.shape)} and usual ones {tuple(usual.shape)}, not (N, K) and (M, "
            "K); take both from the same explainer"
        )
    if len(usual) < usual.shape[1] + 2:
        raise ValueError(
            f"{len(usual)} examples of the class are too few for {usual.shape[1]} x-features; pass at least "
            f"{usual.shape[1] + 2}, best 50 or more"
        )
    if not bool(contributions.isfinite().all() and usual.isfinite().all()):
        raise ValueError("contributions are NaN or infinite; look for an overflow in the model")
