"""Mark the examples of a report whose class has usual or unusual reasons, by the typicality of their contributions.

Conventions:
    M positives of the data, K x-features. Contributions (M, K) are in logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.metrics._typicality import Typicality, typicality

__all__ = ["UNUSUAL", "Unusual", "mark_usual", "usual_of"]

UNUSUAL = 0.05
"""Share of the class below which an example counts as unusual: by chance one in twenty."""

# Fewer positives cannot tell one in twenty.
_LEAST = 20
# Standard deviations by which the contributions of one example differ between the page and the data: rounding.
_SAME = 1e-4


class Unusual(NamedTuple):
    """Number of examples with unusual reasons."""

    unusual: int
    """Shown positives with a share below :data:`UNUSUAL`."""
    shown: int
    """Shown positives."""
    positives: int
    """Positives that they were compared with, M."""


def usual_of(contributions: Tensor) -> Typicality | None:
    """Compute the typicality of each positive among the others; return None if they are too few, or all alike.

    Args:
        contributions: Contributions of the positives, (M, K).
    """
    M, K = contributions.shape
    if max(_LEAST, K + 2) > M or not bool((contributions.std(0) > 1e-9 * contributions.abs().amax(0)).any()):
        return None
    return typicality(contributions)


def mark_usual(rows: Sequence[dict[str, Any]], contributions: Tensor) -> Unusual | None:
    """Add to each positive of a page its share, and the x-feature in which it differs most from the class.

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
    deviation = contributions.std(0).clamp_min(torch.finfo(contributions.dtype).tiny)
    apart, nearest = ((c[:, None] - contributions).abs() / deviation).amax(2).min(1)
    shares = torch.where(apart < _SAME, within.share[nearest], found.share)
    for row, share, deviations in zip(shown, shares.tolist(), found.deviations, strict=True):
        k = int(deviations.abs().argmax())
        row["usual"] = {"share": share, "feature": k, "deviations": float(deviations[k])}
    return Unusual(int((shares < UNUSUAL).sum()), len(shown), len(contributions))
