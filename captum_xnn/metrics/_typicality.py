r"""Typicality: whether the model gives an example its class for the usual reasons.

The contributions of x-features to one output, over examples of the class, have a mean and a covariance. An example far
from the mean is an outlier: the model has unusual reasons for it. An example near the mean is a prototype.

.. math:: D^2(c) = (c - m)^\top \Sigma^{-1} (c - m), \qquad \Sigma = (1 - \delta) S + \delta\, \frac{\mathrm{tr} S}{K} I

S is the covariance of contributions in standard deviations of each x-feature, and the shrinkage :math:`\delta` is the
optimal one of Ledoit and Wolf. Contributions are not normally distributed, so D alone has no scale. Its rank has one:
the share of the class's own examples that are at least as far from the mean, each measured without itself.

Conventions:
    N examples, M examples of the class, K x-features; contributions in logits.

Reference:
    Ledoit, Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004;
    Barber, Candes, Ramdas, Tibshirani, "Predictive inference with the jackknife+", 2021, for ranks of values that each
    leave one example out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Typicality", "shrinkage", "typicality"]


class Typicality(NamedTuple):
    """Typicality of the contributions of examples for their class, float64."""

    distance: Tensor
    """Mahalanobis distance D from the class's mean, (N,)."""
    share: Tensor
    """Share of the class's examples that are at least as far from the mean, (N,) in [1 / (M + 1), 1]. Near 0 for
    outliers, near 1 for prototypes; if the example is one of the class, every value is as likely as any other. Without
    ``usual``, in [1 / N, 1]."""
    deviations: Tensor
    """Each contribution less the class's mean, in standard deviations, (N, K): where an outlier differs."""


def typicality(contributions: Tensor, usual: Tensor | None = None) -> Typicality:
    """Compare the contributions of examples with those usual for their class.

    An x-feature that contributes the same to all examples of the class is left out.

    Args:
        contributions: Contributions of the examples to judge, (N, K).
        usual: Contributions of examples of the class to the same output by the same explainer, (M, K). They should not
            contain the examples to judge. None takes ``contributions``, and judges each example without itself.

    Raises:
        ValueError: If shapes do not fit, the class has fewer than K + 2 examples, all with the same contributions, or
            a number is not finite.

    Example:
        >>> usual = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([5.0, 1.0])
        >>> found = typicality(torch.tensor([[5.0, 1.0], [5.0, 5.0]]), usual)
        >>> [round(share, 3) for share in found.share.tolist()], found.deviations.round().tolist()
        ([1.0, 0.015], [[-0.0, -0.0], [-0.0, 4.0]])
    """
    _check(contributions, contributions if usual is None else usual)
    c = contributions.double()
    own = c if usual is None else usual.double().to(c.device)
    mean, std = own.mean(0), own.std(0)
    varies = std > 1e-9 * own.abs().amax(0)
    if not bool(varies.any()):
        raise ValueError("contributions of the class's examples are all equal; pass examples that differ")
    deviations = torch.where(varies, (c - mean) / torch.where(varies, std, 1), 0)
    X = ((own - mean) / std)[:, varies]
    M, K = X.shape
    delta = shrinkage(X)
    S = X.T @ X / M
    target = delta * S.trace() / K * torch.eye(K, device="cpu").to(S)
    squared = _squared(deviations[:, varies], torch.linalg.pinv((1 - delta) * S + target, hermitian=True))
    # Without example i, the mean moves by x_i / (M - 1), and x_i is M / (M - 1) times as far from it.
    left = (M * S - X[:, :, None] * X[:, None] * (M / (M - 1))) / (M - 1)
    without = _squared(X * (M / (M - 1)), torch.linalg.pinv((1 - delta) * left + target, hermitian=True))
    if usual is None:
        squared = without
    farther = (without[None] >= squared[:, None]).sum(1)
    # Without ``usual``, an example is as far as itself, which is the 1 of the other case.
    share = farther.double() / M if usual is None else (1 + farther.double()) / (M + 1)
    return Typicality(squared.sqrt(), share, deviations)


def shrinkage(X: Tensor) -> float:
    r"""Compute Ledoit and Wolf's share of the identity in a covariance, in [0, 1].

    .. math:: \delta = \min\Big(1, \frac{\sum_i \lVert x_i x_i^\top - S \rVert^2}{M^2 \lVert S - \mu I \rVert^2}\Big),
              \qquad \mu = \mathrm{tr} S / K

    Args:
        X: Centred examples (M, K).

    Reference:
        Ledoit, Wolf, 2004, section 3.2.

    Example:
        >>> shrinkage(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        0.0
    """
    M, K = X.shape
    S = X.T @ X / M
    noise = (X.square().sum(1).square().sum() / M - S.square().sum()) / M
    signal = (S - S.trace() / K * torch.eye(K, device="cpu").to(S)).square().sum()
    return float((noise / signal).clamp(0, 1)) if signal > 0 else 1.0


def _squared(X: Tensor, inverse: Tensor) -> Tensor:
    """Compute squared lengths of rows in a metric, (N,), or in one metric for each row."""
    return torch.einsum("nk,kl,nl->n" if inverse.dim() == 2 else "nk,nkl,nl->n", X, inverse, X).clamp(min=0)


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
