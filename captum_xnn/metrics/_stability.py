r"""Stability: do two explainers of the same output, for instance from two seeds, find the same x-features?

Conventions:
    M examples, the same rows for both explainers; K and K' x-features. A dead x-feature is constant over the examples;
    its correlation with any other is 0. Computations are in float64.

Reference:
    Li, Yosinski, Clune, Lipson, Hopcroft, "Convergent Learning: Do Different Neural Networks Learn the Same
    Representations?", 2016 (matching by correlation);
    Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", 2019 (CKA).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Matching", "linear_cka", "matched_features"]

# In float64, rounding leaves up to this share of a constant column's norm after centring. Live x-features vary more.
_DEAD = 1e-12


class Matching(NamedTuple):
    """Pairs of x-features of two explainers; min(K, K') of them."""

    rows: Tensor
    """x-features of the first explainer, ascending."""
    columns: Tensor
    """Their partners in the second."""
    correlations: Tensor
    """Correlation of each pair, in [-1, 1], float64; negative if the partner has the opposite sign."""

    @property
    def mean(self) -> float:
        """Mean absolute correlation of the pairs, in [0, 1]: 1 if both explainers found the same x-features."""
        return float(self.correlations.abs().mean())


def matched_features(E_a: Tensor, E_b: Tensor) -> Matching:
    """Match two explainers' x-features one to one, with the largest sum of absolute correlations.

    Order, sign and scale of x-features make no difference, because they have no meaning between explainers. The choice
    of the best pairs makes even unrelated x-features correlate. As a control, match with shuffled rows of E_b.

    Args:
        E_a: x-features of the first explainer, (M, K).
        E_b: x-features of the second explainer on the same examples, (M, K').

    Raises:
        ValueError: If the numbers of examples differ or are below two, or values are not finite.

    Example:
        >>> E = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
        >>> found = matched_features(E, torch.stack([E[:, 1], -2 * E[:, 0]], 1))
        >>> found.columns, round(found.mean, 6)
        (tensor([1, 0]), 1.0)
    """
    from scipy.optimize import linear_sum_assignment

    a, b = _centred(E_a, E_b)
    unit_a, unit_b = (x / torch.where(norm > 0, norm, 1) for x in (a, b) for norm in [x.norm(dim=0)])
    correlations = (unit_a.T @ unit_b).clamp(-1, 1)
    rows, columns = linear_sum_assignment(correlations.abs().cpu().numpy(), maximize=True)
    i, j = torch.as_tensor(rows, device=E_a.device), torch.as_tensor(columns, device=E_a.device)
    return Matching(i, j, correlations[i, j])


def linear_cka(E_a: Tensor, E_b: Tensor) -> float:
    r"""Compute the linear centred kernel alignment of two sets of x-features, in [0, 1].

    .. math:: \frac{\lVert E_a^T E_b \rVert_F^2}{\lVert E_a^T E_a \rVert_F \, \lVert E_b^T E_b \rVert_F},
              \qquad \text{columns centred}

    It compares the spaces that x-features span rather than single x-features. Rotating all x-features of a set, or
    scaling them together, makes no difference. Scaling one of them does. The result is 0 if either set is constant.

    Args:
        E_a: x-features of the first explainer, (M, K).
        E_b: x-features of the second explainer on the same examples, (M, K').

    Raises:
        ValueError: If the numbers of examples differ or are below two, or values are not finite.

    Example:
        >>> E = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
        >>> round(linear_cka(E, 2 * E.flip(1)), 6)
        1.0

    Reference:
        Kornblith et al., 2019, section 3.
    """
    a, b = _centred(E_a, E_b)
    size = (a.T @ a).norm() * (b.T @ b).norm()
    return float((a.T @ b).square().sum() / size) if size > 0 else 0.0


def _centred(E_a: Tensor, E_b: Tensor) -> tuple[Tensor, Tensor]:
    """Check both sets of x-features, and centre their columns; dead columns are exactly 0."""
    if E_a.dim() != 2 or E_b.dim() != 2 or len(E_a) != len(E_b) or len(E_a) < 2 or not E_a.shape[1] * E_b.shape[1]:
        raise ValueError(
            f"x-features are {tuple(E_a.shape)} and {tuple(E_b.shape)}, not (M, K) and (M, K') of the same M > 1 "
            "examples; encode the same data with both explainers"
        )
    if not bool(E_a.isfinite().all() and E_b.isfinite().all()):
        raise ValueError("x-features are NaN or infinite; check whether a fit diverged")
    return _alive(E_a.double()), _alive(E_b.double().to(E_a.device))


def _alive(E: Tensor) -> Tensor:
    """Subtract the means of x-features; constant x-features are exactly 0."""
    centred = E - E.mean(0)
    return torch.where(centred.norm(dim=0) > _DEAD * E.norm(dim=0), centred, 0)
