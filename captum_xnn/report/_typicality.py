"""Mark the examples of a report whose class has usual or unusual reasons, by the typicality of their contributions.

Conventions:
    M positives of the data, K x-features. Contributions (M, K) are in logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.metrics._typicality import UNUSUAL, Typicality, typicality, varying

__all__ = ["Unusual", "mark_usual", "usual_of"]

# Among fewer positives an outlier would have to be farther away than most are.
_LEAST = 20
# Share of the spread by which the contributions of one example differ between the page and the data: rounding.
_SAME = 1e-4


class Unusual(NamedTuple):
    """Number of examples with unusual reasons."""

    unusual: int
    """Shown positives with a chance below ``UNUSUAL``, none or many."""
    shown: int
    """Shown positives."""
    positives: int
    """Positives of the data, M; a shown one is compared with the others."""


def usual_of(contributions: Tensor) -> Typicality | None:
    """Compute the typicality of each positive among the others; return None if they are too few, or all alike.

    Args:
        contributions: Contributions of the positives, (M, K).
    """
    M, K = contributions.shape
    if max(_LEAST, K + 2) > M or not bool(varying(contributions).any()):
        return None
    return typicality(contributions)


def mark_usual(rows: Sequence[dict[str, Any]], contributions: Tensor) -> Unusual | None:
    """Add to each positive of a page its share, whether it is unusual, and the x-feature in which it differs most.

    A positive that is also in the data is compared with the other positives there.

    Args:
        rows: Rows of all examples of the page, for one target.
        contributions: Contributions of the positives of the data, (M, K).
    """
    shown = [row for row in rows if row["is_positive"]]
    within = usual_of(contributions)
    if not shown or within is None:
        return None
    c = torch.tensor([row["c"] for row in shown], dtype=torch.float64, device="cpu")
    found = typicality(c, contributions)
    apart, nearest = ((c[:, None] - contributions).abs() / _spread(contributions)).amax(2).min(1)
    of_data = Typicality(*(values[nearest] for values in within))
    same = apart < _SAME
    share, chance = (torch.where(same, a, b) for a, b in ((of_data.share, found.share), (of_data.chance, found.chance)))
    deviations = torch.where(same[:, None], of_data.deviations, found.deviations)
    for i, row in enumerate(shown):
        k = int(deviations[i].abs().argmax())
        row["usual"] = {
            "share": float(share[i]),
            "unusual": bool(chance[i] < UNUSUAL),
            "feature": k,
            "deviations": float(deviations[i, k]),
        }
    return Unusual(int((chance < UNUSUAL).sum()), len(shown), len(contributions))


def _spread(contributions: Tensor) -> Tensor:
    """Compute the distance between the quartiles of each x-feature, or the standard deviation where it is 0, (K,).

    An outlier does not widen quartiles, so two other examples are not taken for one.
    """
    low, high = (contributions.double().quantile(q, 0) for q in (0.25, 0.75))
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(high > low, high - low, contributions.double().std(0)).clamp_min(tiny)
