r"""One example's explanation in a sentence: "European goldfinch because of golden feather (+63.1)".

The sentence names the x-features that matter and leaves the others out. Let :math:`P` and :math:`N` be the sums of the
sizes of all positive and of all negative contributions. The side with the larger sum comes first::

    P >= N    goldfinch because of golden feather (+63.1) and red forehead (+15.2), although wing bar (-20.4)
    P < N     against goldfinch because of wing bar (-20.4), although golden feather (+3.1)

Both sides name x-features from the largest contribution down. A side ends when its unnamed contributions add up to no
more than ``1 - share`` of :math:`\max(P, N)`. If the unexplained part of the output is large, the sentence states it.

Conventions:
    K x-features. Contributions :math:`v_i E_i`, surrogate and prediction are in logits. Contributions are relative to
    the average training example, so "because of" means: more than on average.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 1:
    "A is something because of B, C and D".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["decimals", "sentence"]


def decimals(values: Sequence[float]) -> int:
    """Compute how many decimals show three digits of the largest value, from 1 to 6.

    Args:
        values: Numbers to print beside each other.

    Example:
        >>> decimals([63.103, 15.2]), decimals([0.031, -0.2])
        (1, 3)
    """
    largest = max(map(abs, values), default=0.0)
    return min(max(2 - math.floor(math.log10(largest)), 1), 6) if largest > 0 else 1


def sentence(
    contributions: Sequence[float],
    names: Sequence[str],
    *,
    target_name: str,
    surrogate: float,
    prediction: float,
    share: float = 0.9,
    unexplained_share: float = 0.1,
    is_positive: bool | None = None,
) -> str:
    r"""Write a sentence of the x-features for an output, the x-features against it, and the unexplained part.

    Args:
        contributions: Contributions (K,) in logits.
        names: K names.
        target_name: Name of the output, such as its class.
        surrogate: Bias plus contributions, in logits.
        prediction: The model's output, in logits.
        share: Share of the larger side's contributions that named x-features must reach, in [0, 1]. With 1 the
            sentence names every x-feature that contributes, with 0 only the largest.
        unexplained_share: The sentence states the unexplained part, prediction - surrogate, if its size is above this
            share of :math:`\sum_i |v_i E_i|`.
        is_positive: Whether the model gives the example this class. Where the x-features speak the other way, the
            sentence says so. None if it is not known.

    Raises:
        ValueError: If a contribution has no name, a number is not finite, or a share is out of range.

    Example:
        >>> says = {"target_name": "European goldfinch", "surrogate": 82.1}
        >>> sentence([15.2, 63.1], ["red forehead", "golden feather"], prediction=82.0, **says)
        'European goldfinch because of golden feather (+63.1) and red forehead (+15.2)'
        >>> sentence([15.2, 63.1], ["red forehead", "golden feather"], prediction=97.0, share=0.5, **says)
        'European goldfinch because of golden feather (+63.1); unexplained: +14.9'
        >>> sentence([63.1], ["golden feather"], prediction=82.0, is_positive=False, **says)
        'more like European goldfinch than the average example because of golden feather (+63.1)'
    """
    _check(contributions, names, [surrogate, prediction], share, unexplained_share)
    digits = decimals(contributions)
    order = sorted(range(len(names)), key=lambda k: -abs(contributions[k]))
    positive = [k for k in order if contributions[k] > 0]
    negative = [k for k in order if contributions[k] < 0]
    P, N = (sum(abs(contributions[k]) for k in side) for side in (positive, negative))
    first, second, start = (positive, negative, "") if P >= N else (negative, positive, "against ")
    unnamed = (1 - share) * max(P, N)
    # The larger side always has a reason, even if share is 0.
    because = [_said(k, contributions, names, digits) for k in first[: max(1, _needed(first, contributions, unnamed))]]
    although = [_said(k, contributions, names, digits) for k in second[: _needed(second, contributions, unnamed)]]
    what = f"{start}{target_name}"
    if is_positive is not None and is_positive == bool(start):  # the bias decides, and not the x-features
        what = f"{'less' if start else 'more'} like {target_name} than the average example"
    text = f"{what} because of {_list(because)}" if because else f"no reason for {target_name}"
    if although:
        text += f", although {_list(although)}"
    unexplained = prediction - surrogate
    if abs(unexplained) > unexplained_share * (P + N) and round(unexplained, decimals([*contributions, unexplained])):
        text += f"; unexplained: {unexplained:+.{decimals([*contributions, unexplained])}f}"
    return text


def _check(
    contributions: Sequence[float],
    names: Sequence[str],
    numbers: Sequence[float],
    share: float,
    unexplained_share: float,
) -> None:
    """Raise ValueError if the arguments make no sentence."""
    if len(names) != len(contributions) or not names:
        raise ValueError(
            f"there are {len(names)} names and {len(contributions)} contributions; pass as many names, such as "
            "'x-feature 3' for one without a name"
        )
    if not all(map(math.isfinite, [*contributions, *numbers])):
        raise ValueError(
            f"contributions, surrogate or prediction are NaN or infinite in {[*contributions, *numbers]}; look for an "
            "overflow in the model: half precision is the usual cause"
        )
    if not 0 <= share <= 1 or not unexplained_share >= 0:
        raise ValueError(
            f"share is {share} and unexplained_share is {unexplained_share}; pass 0 <= share <= 1 and "
            "unexplained_share >= 0, or leave both at their defaults"
        )


def _needed(side: Sequence[int], contributions: Sequence[float], unnamed: float) -> int:
    """Count the x-features of one side to name, largest first, until the unnamed ones add up to at most ``unnamed``."""
    left = sum(abs(contributions[k]) for k in side)
    for count, k in enumerate(side):
        # A trillionth of tolerance: a sum that equals the share in decimals may exceed it in binary.
        if left <= unnamed * (1 + 1e-12):
            return count
        left -= abs(contributions[k])
    return len(side)


def _said(k: int, contributions: Sequence[float], names: Sequence[str], digits: int) -> str:
    """Write an x-feature with its contribution."""
    return f"{names[k]} ({contributions[k]:+.{digits}f})"


def _list(said: Sequence[str]) -> str:
    """Join texts to an enumeration in English."""
    return " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
