r"""Paired comparison: did the same people, or the same images, score higher under one condition than under another?

Conventions:
    P pairs; ``a`` and ``b`` each hold one score for every person, class or image. Differences are a - b, in the
    scores' unit. p-values are two-sided and uncorrected. For several comparisons, correct them with
    :func:`scipy.stats.false_discovery_control`. Groups of different people are not paired, such as the paper's
    *1-Heatmap (DeepLIFT)* against its main study; use :func:`scipy.stats.mannwhitneyu` for them.

The paper gives p-values without naming its test. Purities of ten images take few values, so there are many ties. With
ties the permutation test's p-value is exact, and Wilcoxon's is approximate.

Reference:
    Wilcoxon, "Individual Comparisons by Ranking Methods", 1945; Kerby, "The Simple Difference Formula", 2014;
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Comparison", "paired_test"]

_Array = np.ndarray[Any, np.dtype[Any]]


class Comparison(NamedTuple):
    """The difference of two conditions, estimated from paired scores."""

    difference: float
    """Mean of a - b."""
    low: float
    """Lower end of the bootstrap confidence interval of that mean."""
    high: float
    """Upper end."""
    wilcoxon: float
    """p-value of the signed-rank test, without pairs that do not differ; 1 if no pair differs."""
    permutation: float
    """p-value of the mean difference under random signs."""
    effect: float
    """Matched-pairs rank-biserial correlation, in [-1, 1]: 1 if a is above b in all pairs, 0 if neither leads."""


def paired_test(
    a: Sequence[float] | Tensor,
    b: Sequence[float] | Tensor,
    *,
    seed: int,
    resamples: int = 9999,
    confidence: float = 0.95,
) -> Comparison:
    r"""Compute the mean difference of paired scores, its confidence interval, two p-values and an effect size.

    With the ranks :math:`R_p` of the absolute differences that are not 0, the effect size is

    .. math:: r = \frac{\sum_{d_p > 0} R_p - \sum_{d_p < 0} R_p}{\sum_p R_p}

    Args:
        a: Scores under one condition, (P,), finite. Differences that agree to 12 digits of the largest score (6 for
            float32 scores) are ties.
        b: Scores of the same people under the other condition, (P,).
        seed: Seeds both resamplings.
        resamples: How many sign patterns and bootstrap samples to draw. If there are no more sign patterns than this,
            the test uses each once.
        confidence: Confidence level of the interval, a percentile bootstrap.

    Raises:
        ValueError: If a and b differ in length, have fewer than two scores, or are not finite.

    Example:
        >>> found = paired_test([0.8, 0.7, 0.9, 0.6], [0.6, 0.5, 0.6, 0.7], seed=0)
        >>> round(found.difference, 3), found.permutation, found.effect
        (0.15, 0.25, 0.8)
    """
    given = [_array(x) for x in (a, b)]
    first, second = (x.astype(np.float64) for x in given)
    finite = bool(np.isfinite(first).all() and np.isfinite(second).all())
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2 or not finite:
        raise ValueError(
            f"scores a and b are {first.shape} and {second.shape}, finite: {finite}; pass finite scores of the same P "
            ">= 2 people, and leave out people who lack one of the two scores"
        )
    # Without rounding, the last bits would break the tie of 0.8 - 0.7 and 0.4 - 0.3, and keep 0.1 + 0.2 - 0.3 from 0.
    scale = max(abs(first).max(), abs(second).max()) or 1.0
    shares = np.round((first - second) / scale, 6 if np.float32 in {x.dtype.type for x in given} else 12)
    low, high = _interval(shares, seed, resamples, confidence)
    p_value, effect = _signed_ranks(shares)
    return Comparison(
        difference=float(scale * shares.mean()),
        low=float(scale * low),
        high=float(scale * high),
        wilcoxon=p_value,
        permutation=_sign_flips(shares, seed, resamples),
        effect=effect,
    )


def _array(scores: Sequence[float] | Tensor) -> _Array:
    if not isinstance(scores, Tensor):
        return np.asarray(scores)
    own = scores.detach().cpu()
    return np.asarray(own if own.dtype == torch.float64 or not own.is_floating_point() else own.float())


def _interval(differences: _Array, seed: int, resamples: int, confidence: float) -> tuple[float, float]:
    from scipy.stats import bootstrap

    found = bootstrap(
        (differences,),
        np.mean,
        n_resamples=resamples,
        batch=_batch(differences),
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _signed_ranks(differences: _Array) -> tuple[float, float]:
    """Compute the signed-rank test's p-value and the rank-biserial correlation."""
    from scipy.stats import rankdata, wilcoxon

    moved = differences[differences != 0]
    if not len(moved):
        return 1.0, 0.0
    ranks = rankdata(abs(moved))
    return float(wilcoxon(moved).pvalue), float((np.sign(moved) * ranks).sum() / ranks.sum())


def _sign_flips(differences: _Array, seed: int, resamples: int) -> float:
    from scipy.stats import permutation_test

    found = permutation_test(
        (differences, np.zeros_like(differences)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=_batch(differences),
        random_state=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _batch(differences: _Array) -> int:
    """Compute how many resamples at once keep scipy's arrays at some 40 MB."""
    return max(1, 5_000_000 // len(differences))
