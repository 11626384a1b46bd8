r"""Selectivity: which part's removal moves an x-feature, and whether other parts leave it alone.

Conventions:
    N images, K x-features, P known parts. A **change** is an x-feature's contribution in the whole image minus that in
    the image without one part, (N, K, P), in logits. The **drop** of the output is the same of the logit, (N, P).
    The importance that an explanation gives to a part is any number, such as the mass of the maps on the part's
    pixels, (N, P).

Metrics:
    ``selectivity``: share of an x-feature's movement that its strongest part makes, from 1 / P to 1. No map is needed.
    ``single_deletion``: rank correlation of importances with drops over the parts of an image, from -1 to 1.
    ``within_part``: the same over images, for each part.

Controls:
    The whole output is one x-feature, which moves most with the part that the model weighs most: its selectivity is
    well above 1 / P. Random groups of dimensions have about that of the whole output.
    Part **area** is an importance of its own, which beats most methods over the parts of an image: large parts matter
    more, and heatmaps cover them. Print it beside both rank correlations. Across images within a part it tells less.

What fakes selectivity:
    Each x-feature may pick the same part, so that the others have none. Two large x-features may move with one part in
    opposite directions and add nothing: read ``movement``, which is 1 without such cancelling.

Reference:
    Hesse, Schaub-Meyer, Roth, "FunnyBirds: A Synthetic Vision Dataset for a Part-Based Analysis of Explainable AI
    Methods", 2023 (single deletion). Selectivity is made for this library.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_xnn.metrics.patches import rank_correlation

__all__ = ["Selectivity", "selectivity", "single_deletion", "within_part"]


class Selectivity(NamedTuple):
    """Selectivity beside its controls; NaN where nothing moves."""

    share: float
    """Share of the movement that the strongest part makes, in [1 / P, 1]."""
    whole: float
    """The same of the summed x-features as one: what x-features score that all move alike."""
    even: float
    """1 / P: an x-feature that every part moves by the same amount."""
    movement: float
    """Movement of all x-features in multiples of that of their sum; 1 if none cancels another, infinite if all do."""


def selectivity(changes: Tensor, weights: Tensor | None = None) -> Selectivity:
    r"""Return the share of the part that moves an x-feature most, of the movement by all parts.

    .. math:: \sum_{nk} w_{nk} \frac{\max_p |\Delta_{nkp}|}{\sum_p |\Delta_{nkp}|} \Big/ \sum_{nk} w_{nk}

    w is the total movement :math:`\sum_p |\Delta_{nkp}|` by default, so that x-features that do not move say nothing.

    Args:
        changes: (N, K, P), in logits.
        weights: Weights (N, K) in place of the total movement, not negative. The control ``whole`` takes their sum over
            x-features.

    Raises:
        ValueError: If shapes do not fit, values are not finite, or weights are negative.

    Example:
        >>> changes = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
        >>> selectivity(changes)
        Selectivity(share=1.0, whole=0.75, even=0.5, movement=1.0)
    """
    if changes.dim() != 3 or not changes.numel():
        raise ValueError(
            f"expected changes (N, K, P) of at least one part, got {tuple(changes.shape)}; give a single output a "
            "second dimension of 1"
        )
    if not bool(changes.isfinite().all()):
        raise ValueError("expected finite changes, got NaN or infinite values; look whether the fit diverged")
    if weights is not None:
        if weights.shape != changes.shape[:2]:
            raise ValueError(
                f"expected weights {tuple(changes.shape[:2])}, got {tuple(weights.shape)}; give one for each x-feature "
                "of each image"
            )
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise ValueError("expected finite weights of 0 or more, got others; take absolute values")
    size, together = changes.detach().double().abs(), changes.detach().double().sum(1, keepdim=True).abs()
    moved, moved_together = float(size.sum()), float(together.sum())
    return Selectivity(
        _share(size, weights),
        _share(together, None if weights is None else weights.sum(1, keepdim=True)),
        1 / changes.shape[2],
        moved / moved_together if moved_together else (float("inf") if moved else float("nan")),
    )


def _share(size: Tensor, weights: Tensor | None) -> float:
    """Return the weighted mean share of the largest, NaN without any movement."""
    total = size.sum(2)
    weight = total if weights is None else torch.where(total > 0, weights.to(total), 0)
    share = size.amax(2) / torch.where(total > 0, total, 1)
    return float((weight * share).sum() / weight.sum()) if weight.sum() > 0 else float("nan")


def single_deletion(importances: Tensor, drops: Tensor) -> Tensor:
    r"""Return how an explanation orders the parts of each image, against the drops of the logit, (N,), in [-1, 1].

    It asks: does the explanation give most to the part without which the output falls most? Spearman's rank
    correlation over the P parts; 0 where either says the same of all parts.

    Differs from FunnyBirds:
        The published score is :math:`(1 + \rho) / 2`, and leaves out images where :math:`\rho` is undefined.

    Args:
        importances: (N, P).
        drops: (N, P), in logits.

    Raises:
        ValueError: If shapes differ, or values are not finite.

    Example:
        >>> single_deletion(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.1, 0.5, 0.2]]))
        tensor([0.5000], dtype=torch.float64)

    Reference:
        Hesse et al., "FunnyBirds", 2023, section 4.2.
    """
    return rank_correlation(*_of_parts(importances, drops))


def within_part(importances: Tensor, drops: Tensor) -> Tensor:
    """Return how an explanation orders the images by each part, against the drops of the logit, (P,), in [-1, 1].

    It asks: does the explanation give a part more in those images where the output stands on it more? A part that is
    always large gains nothing. Images that hide a part have no drop; any method that gives it nothing is right there.

    Args:
        importances: (N, P), of several images.
        drops: (N, P), in logits.

    Raises:
        ValueError: If shapes differ, or values are not finite.

    Example:
        >>> within_part(torch.tensor([[1.0, 5.0], [2.0, 4.0]]), torch.tensor([[0.1, 0.5], [0.4, 0.9]]))
        tensor([ 1., -1.], dtype=torch.float64)
    """
    a, b = _of_parts(importances, drops)
    return rank_correlation(a.T, b.T)


def _of_parts(importances: Tensor, drops: Tensor) -> tuple[Tensor, Tensor]:
    """Return both after checking their shapes."""
    if importances.dim() != 2 or importances.shape != drops.shape:
        raise ValueError(
            f"expected importances and drops (N, P), got {tuple(importances.shape)} and {tuple(drops.shape)}; sum maps "
            "over x-features and over each part's pixels"
        )
    return importances, drops
