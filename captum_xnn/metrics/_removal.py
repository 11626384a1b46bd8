r"""Selectivity and pair share: does an x-feature move with one part only, and a part move one x-feature only?

Conventions:
    N images, K x-features, P known parts. A **change** is an x-feature's contribution in the whole image minus that in
    the image without one part, (N, K, P), in logits. The **drop** of the output is the same difference of the logit,
    (N, P). The importance that an explanation gives to a part is any number, such as the mass of the maps on the part's
    pixels, (N, P). A **pair** is an image and the same image with one part changed or removed.

Metrics:
    ``selectivity``: share of an x-feature's movement that comes from its strongest part, 1 / P to 1. It needs no map.
    ``pair_share``: share of a part's pairs' changes that one x-feature carries, the same in all pairs, and another one
    for every part.
    ``single_deletion``: rank correlation of importances with drops over the parts of an image, from -1 to 1.
    ``within_part``: the same rank correlation over images, for each part.

Controls:
    Take the whole output as a single x-feature. It moves most with the part that the model weighs most, so its
    selectivity is well above 1 / P. Random groups of dimensions reach about the same value.
    Take the **area** of a part as its importance. It beats most methods over the parts of an image, because large parts
    matter more and heatmaps cover them. Print it beside both rank correlations. Over images within a part, area is a
    weaker control.

How to read selectivity:
    It can be high although every x-feature moves with the same part, so that other parts move no x-feature. It can also
    be high if two large x-features move with one part in opposite directions and cancel. Read ``movement`` beside it:
    it is 1 if no x-features cancel. ``pair_share`` asks for another x-feature for every part, so x-features that all
    move with the same part score low.

Reference:
    Hesse, Schaub-Meyer, Roth, "FunnyBirds: A Synthetic Vision Dataset for a Part-Based Analysis of Explainable AI
    Methods", 2023 (single deletion). Selectivity and pair share were made for this library.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from captum_xnn.metrics._patches import rank_correlation

__all__ = ["PairShare", "Selectivity", "pair_share", "selectivity", "single_deletion", "within_part"]

# Shuffles for the control of pairs.
_DRAWS = 20


class Selectivity(NamedTuple):
    """Selectivity beside its controls; NaN if nothing moves."""

    share: float
    """Share of the movement that comes from the strongest part, in [1 / P, 1]."""
    whole: float
    """Selectivity of the sum of all x-features. x-features that all move alike score the same."""
    even: float
    """1 / P: selectivity of an x-feature that moves by the same amount with every part."""
    movement: float
    """Movement of all x-features divided by that of their sum: 1 if no x-features cancel, infinite if all cancel."""


def selectivity(changes: Tensor, weights: Tensor | None = None) -> Selectivity:
    r"""Compute the share of an x-feature's movement that comes from its strongest part, as a weighted mean.

    .. math:: \sum_{nk} w_{nk} \frac{\max_p |\Delta_{nkp}|}{\sum_p |\Delta_{nkp}|} \Big/ \sum_{nk} w_{nk}

    By default w is the total movement :math:`\sum_p |\Delta_{nkp}|`, so x-features that do not move do not count.

    Args:
        changes: (N, K, P), in logits.
        weights: Weights (N, K) in place of the total movement, not negative. The control ``whole`` uses their sum over
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
            f"changes are {tuple(changes.shape)}, not (N, K, P) of at least one part; give a single output a second "
            "dimension of size 1"
        )
    if not bool(changes.isfinite().all()):
        raise ValueError("changes are NaN or infinite; check whether the fit diverged")
    if weights is not None:
        if weights.shape != changes.shape[:2]:
            raise ValueError(
                f"weights are {tuple(weights.shape)}, not {tuple(changes.shape[:2])}; pass one for each x-feature of "
                "each image"
            )
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise ValueError(
                f"weights are from {float(weights.min()):.3g} to {float(weights.max()):.3g}; pass finite ones that are "
                "not negative, such as absolute values"
            )
    size, together = changes.detach().double().abs(), changes.detach().double().sum(1, keepdim=True).abs()
    moved, moved_together = float(size.sum()), float(together.sum())
    return Selectivity(
        _share(size, weights),
        _share(together, None if weights is None else weights.sum(1, keepdim=True)),
        1 / changes.shape[2],
        moved / moved_together if moved_together else (float("inf") if moved else float("nan")),
    )


def _share(size: Tensor, weights: Tensor | None) -> float:
    """Compute the weighted mean share of the largest movement; NaN without any movement."""
    total = size.sum(2)
    weight = total if weights is None else torch.where(total > 0, weights.to(total), 0)
    share = size.amax(2) / torch.where(total > 0, total, 1)
    return float((weight * share).sum() / weight.sum()) if weight.sum() > 0 else float("nan")


class PairShare(NamedTuple):
    """Measures of pairs beside their controls; NaN if nothing moves."""

    share: float
    """Share of the changes that the part's own x-feature carries, mean over parts, in [0, 1]."""
    share_by_chance: float
    """The same after the parts are shuffled among the pairs."""
    most: float
    """Share of pairs in which the part's own x-feature changes most, mean over parts, in [0, 1]."""
    most_by_chance: float
    """The same after the parts are shuffled among the pairs."""


def pair_share(changes: Tensor, parts: Tensor, *, seed: int = 0) -> PairShare:
    r"""Compute how far each part has an x-feature of its own, from pairs that differ in one part.

    Each part gets one x-feature, and no x-feature gets two parts. The choice maximises the sum over parts of the shares
    in all pairs but one. That pair then tests it. So the x-feature :math:`k_n` of pair n depends on other pairs only:

    .. math:: \frac1P \sum_p \frac{\sum_{n \in p} |\Delta_{n k_n}|}{\sum_{n \in p} \sum_k |\Delta_{nk}|}

    Parts that move nothing do not count. With more parts than x-features, some parts get no x-feature and score 0.

    Args:
        changes: Contributions in the image minus those in the changed image, (N, K), in logits, one row a pair.
        parts: Index of the changed part, int64, (N,). Each part needs at least two pairs.
        seed: Seed of the control.

    Raises:
        ValueError: If shapes do not fit, values are not finite, or a part has a single pair.

    Example:
        >>> changes = torch.tensor([[3.0, 1.0], [3.0, 1.0], [0.0, -2.0], [0.0, 2.0]])
        >>> found = pair_share(changes, torch.tensor([0, 0, 1, 1]))
        >>> found.share, found.most
        (0.875, 1.0)
    """
    _check_pairs(changes, parts)
    size, part = changes.detach().double().abs().cpu(), torch.unique(parts.cpu(), return_inverse=True)[1]
    generator = torch.Generator().manual_seed(seed)
    drawn = [_carried(size, part[torch.randperm(len(part), generator=generator, device="cpu")]) for _ in range(_DRAWS)]
    share, most = _carried(size, part)
    return PairShare(share, sum(s for s, _ in drawn) / _DRAWS, most, sum(m for _, m in drawn) / _DRAWS)


def _carried(size: Tensor, part: Tensor) -> tuple[float, float]:
    """Compute ``share`` and ``most`` of sizes of changes (N, K) and parts from 0 (N,)."""
    member = torch.nn.functional.one_hot(part).T.double()
    carried, most = torch.zeros(len(size), device="cpu").double(), torch.zeros(len(size), device="cpu").double()
    for n, (own, p) in enumerate(zip(size, part.tolist(), strict=True)):
        rest = member.clone()
        rest[:, n] = 0
        others = rest @ size
        others /= others.sum(1, keepdim=True).clamp(min=torch.finfo(others.dtype).tiny)
        chosen = dict(zip(*linear_sum_assignment(others.numpy(), maximize=True), strict=True))
        if p in chosen and own.any():
            carried[n], most[n] = own[chosen[p]], own[chosen[p]] == own.max()
    moves = (size.sum(1) > 0).double()
    moved, count = member @ size.sum(1), member @ moves
    kept = moved > 0
    return float(((member @ carried) / moved)[kept].mean()), float(((member @ most) / count)[kept].mean())


def _check_pairs(changes: Tensor, parts: Tensor) -> None:
    """Raise if pairs cannot be compared."""
    if changes.dim() != 2 or not changes.numel() or parts.shape != changes.shape[:1]:
        raise ValueError(
            f"changes are {tuple(changes.shape)} and parts {tuple(parts.shape)}, not (N, K) and (N,); pass one row and "
            "one part for each pair"
        )
    if not bool(changes.isfinite().all()):
        raise ValueError("changes are NaN or infinite; check whether the fit diverged")
    numbers, counts = torch.unique(parts, return_counts=True)
    if int(counts.min()) < 2:
        raise ValueError(
            f"part {numbers[counts.argmin()].item()} has a single pair, and its x-feature is chosen by other pairs; "
            "pass at least two pairs of each part"
        )


def single_deletion(importances: Tensor, drops: Tensor) -> Tensor:
    r"""Compute the rank correlation of importances with the logit's drops over each image's parts, (N,), in [-1, 1].

    It asks: does the explanation give most importance to the part whose removal lowers the output most? The rank
    correlation is Spearman's. It is 0 if all importances of an image, or all its drops, are equal.

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
    """Compute for each part the rank correlation of importances with the logit's drops over images, (P,), in [-1, 1].

    It asks: does the explanation give a part more importance in images where the output depends on it more? A part that
    is always large gains nothing. Images that hide a part have no drop. A method that gives a hidden part no importance
    is right there.

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
    """Return importances and drops after checking their shapes."""
    if importances.dim() != 2 or importances.shape != drops.shape:
        raise ValueError(
            f"importances are {tuple(importances.shape)} and drops {tuple(drops.shape)}, not both (N, P); sum maps "
            "over x-features and over each part's pixels"
        )
    return importances, drops
