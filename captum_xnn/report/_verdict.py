"""Verdict on an explanation, in words: how much is unexplained, how stable it is, and how true its maps are.

Every reason states its figure beside a control, so that a reader can judge the figure without experience.

Conventions:
    Levels are "good", "fair" and "poor", or "unknown" without a measurement. Limits between levels are
    conventions of this page, and stand beside the figures that they judge.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from captum_xnn.metrics._stability import matched_features

if TYPE_CHECKING:
    from captum_xnn.patch_scores import PatchScores

__all__ = [
    "Reason",
    "Stability",
    "Verdict",
    "format_error",
    "on_maps",
    "on_stability",
    "on_unexplained",
    "stability",
    "two_digits",
    "verdict",
]

# Share of the output's mean deviation that may stay unexplained, for "good" and for "fair".
_UNEXPLAINED = (0.05, 0.25)
# Correlation with the x-features of a second fit, and patch agreement.
_STABLE = (0.8, 0.5)
_AGREES = (0.5, 0.2)
# Difference of two agreements, up to which they count as equal.
_SAME = 0.05
# How patches are covered, in a sentence and in an instruction, and what is covered.
_COVERING = {
    "images": ("Where a part of the image is covered", "covers parts of some images", "parts of {} images"),
    "texts": ("Where a word is taken away", "takes away one word after the other of some texts", "words of {} texts"),
    "table": (
        "Where an input is set to its mean",
        "sets one input after the other to its mean in some examples",
        "inputs of {} examples",
    ),
}
_READ_AS = {"images": "places", "texts": "the words that matter", "table": "the inputs that matter"}


class Reason(NamedTuple):
    """One reason of a verdict."""

    level: str
    """"good", "fair", "poor" or "unknown"."""
    question: str
    """The question that was checked."""
    answer: str
    """The figure, its control and its meaning, in words."""
    hint: str = ""
    """How the author of the page can measure it. It is not printed."""


class Verdict(NamedTuple):
    """Whether an explanation can be trusted."""

    level: str
    """"good", "fair" or "poor"; "unknown" if a reason was not measured and no other is worse than "good"."""
    word: str
    """The answer in a word or two."""
    sentence: str
    """The answer in a sentence."""
    advice: str
    """Advice on which numbers, names and maps a reader can use."""
    reasons: tuple[Reason, ...]
    """Reasons from the unexplained part, the stability of x-features, and the truth of maps."""


class Stability(NamedTuple):
    """Similarity of the x-features of a second fit."""

    found_again: float
    """Mean absolute correlation of x-features with their partners in the second fit, in [0, 1]."""
    between: float | None
    """Control: the largest absolute correlation of an x-feature with another one of the same fit, averaged over
    x-features. None for a single x-feature."""
    examples: int
    """Number of examples."""


def stability(first: Tensor, second: Tensor) -> Stability:
    """Compare the contributions of two fits on the same examples.

    Args:
        first: Contributions (N, K) of the fit in the report.
        second: Contributions (N, K') of the other fit.

    Example:
        >>> E = torch.eye(3)
        >>> stability(E, E[:, [2, 0, 1]]).found_again
        1.0
    """
    again = matched_features(first, second).mean
    correlations = torch.corrcoef(first.double().T).nan_to_num().abs() if first.shape[1] > 1 else None
    between = None
    if correlations is not None:
        between = float((correlations - torch.eye(len(correlations), device="cpu")).max(1).values.mean())
    return Stability(float(again), between, len(first))


def format_error(f_reg: float, deviation: float) -> str:
    """Return F_reg with two digits. An error below a thousandth of the deviation gets no digits of its own.

    Args:
        f_reg: Mean |prediction - surrogate|, in the output's unit.
        deviation: Mean |prediction - its mean|, in the same unit.

    Example:
        >>> format_error(0.5, 10.0), format_error(0.3234, 61.7), format_error(1234.5, 9000.0)
        ('0.5', '0.32', '1,200')
        >>> format_error(6.72e-07, 5.8), format_error(0.0, 5.8)
        ('less than 0.006', '0')
    """
    smallest = deviation / 1000
    return f"less than {_rounded_up(smallest)}" if 0 < f_reg < smallest else two_digits(f_reg)


def two_digits(value: float) -> str:
    """Return a number with two significant digits, and without an exponent.

    Args:
        value: The number.

    Example:
        >>> two_digits(61.7), two_digits(0.0499), two_digits(123456.0), two_digits(2.0)
        ('62', '0.05', '120,000', '2')
    """
    if not value or not math.isfinite(value):
        return f"{value:.0f}"
    decimals = 1 - math.floor(math.log10(abs(value)))
    text = f"{round(value, decimals):,.{max(decimals, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _rounded_up(value: float) -> str:
    """Return a positive number rounded up to one significant digit."""
    decimals = -math.floor(math.log10(value))
    return two_digits(math.ceil(round(value * 10.0**decimals, 9)) / 10.0**decimals)


def on_unexplained(f_reg: float, deviation: float, examples: int, *, exact: bool, unit: str = "logits") -> Reason:
    """Judge the unexplained part of the output.

    Args:
        f_reg: Mean |prediction - surrogate|, in the output's unit.
        deviation: Mean |prediction - its mean|, in the output's unit: F_reg of a guess that gives the mean output.
        examples: Number of examples of both means.
        exact: Whether the x-features add up by construction.
        unit: Unit of the output.

    Example:
        >>> print(on_unexplained(0.5, 10.0, 200, exact=False).answer)
        5 % of the output is unexplained. Over 200 examples, the x-features miss the model's output by 0.5 logits on average. A guess that always gives the mean output misses by 10 logits.
    """  # noqa: E501
    share = f_reg / deviation if deviation > 0 else 0.0 if f_reg == 0 else float("inf")
    level = _level(-share, *(-limit for limit in _UNEXPLAINED))
    much = (
        f"{_percent(share).capitalize()} of the output is unexplained."
        if share <= 1
        else "The x-features explain nothing."
    )
    text = (
        f"{much} Over {examples:,} examples, the x-features miss the model's output by "
        f"{format_error(f_reg, deviation)} {unit} on average. A guess that always gives the mean output misses by "
        f"{two_digits(deviation)} {unit}."
    )
    if exact:
        text += (
            " The x-features are parts of the model's own calculation and add up by construction. So this checks the "
            "calculation only, and not whether an x-feature is one reason: judge that from its card."
        )
    return Reason(level, "Do the x-features add up to the model's output?", text)


def on_stability(found: Stability | None) -> Reason:
    """Judge whether a second fit finds the same x-features.

    Args:
        found: The comparison with a second fit, or None without one.

    Example:
        >>> on_stability(Stability(0.93, 0.31, 50)).level, on_stability(None).level
        ('good', 'unknown')
    """
    question = "Would another fit find the same x-features?"
    if found is None:
        return Reason(
            "unknown",
            question,
            "Not measured.",
            "To measure it, write the report with again= (--again), the same explanation fitted on other data or with "
            "another seed.",
        )
    level = _level(found.found_again, *_STABLE)
    text = (
        f"The x-features of a second fit correlate with these by {found.found_again:.2f} on average over "
        f"{found.examples:,} examples (1: the same x-features)."
    )
    if found.between is not None:
        text += f" For comparison, each x-feature correlates with its most similar neighbour by {found.between:.2f}."
        if found.found_again <= found.between + _SAME:
            level = "poor"
            text += " So the x-features of two fits are no more alike than two different x-features."
    return Reason(level, question, text)


def on_maps(found: PatchScores | None, *, kind: str = "images") -> Reason:
    """Judge whether maps agree with the drops that covering a patch causes.

    Maps that do no better than those of x-features drawn by chance, or worse than the single heatmap, are "fair" at
    best.

    Args:
        found: Measures on covered patches, or None without them.
        kind: Inputs of the page: "images", "texts" or "table".

    Example:
        >>> on_maps(None).level
        'unknown'
    """
    question = "Do the maps show what matters to the model?"
    covering, act, places = _COVERING[kind]
    if found is None:
        return Reason(
            "unknown",
            question,
            "Not measured.",
            f"To measure it, write the report with patches=4 (--patches): it {act}, and compares the maps with what "
            "the model then loses.",
        )
    a, noise, groups = found.agreement, found.agreement_random_maps, found.agreement_random_groups
    one = found.agreement_one_heatmap
    identified, by_chance = found.identified, found.identified_random_groups
    level = _level(a, *_AGREES) if a > noise + 2 * _SAME else "poor"
    chance = "" if groups is None else f", maps of x-features drawn by chance {_signed(groups)}"
    text = (
        f"{covering}, contributions drop. The maps rank the {places.format(found.examples)} in the order of these "
        f"drops with a correlation of {_signed(a)} (1: the same order). For comparison: maps of noise "
        f"{_signed(noise)}{chance}, the single usual heatmap {_signed(one)}."
    )
    if level == "poor":
        text += f" So the maps hardly follow what the model loses: do not read them as {_READ_AS[kind]}."
    elif groups is not None and a <= groups + _SAME:
        level = "fair"
        text += (
            " So the maps follow what the model loses, and those of x-features drawn by chance do so as well: this "
            "does not show that the division into these x-features is a good one."
        )
    elif a < one - _SAME:
        level = "fair"
        text += " So the maps follow what the model loses, but less than the single heatmap does."
    if by_chance is not None and not math.isnan(identified):
        text += (
            f" {100 * identified:.0f} % of the maps fit the drops of their own x-feature better than those of the "
            f"others; of x-features drawn by chance, {100 * by_chance:.0f} %. The x-features move {found.movement:.1f} "
            "times as much as their sum does (1: they do not cancel)."
        )
    return Reason(level, question, text)


_NUMBERS = {
    "good": "The contributions add up to the model's output",
    "fair": "The contributions add up to the model's output roughly",
    "poor": "The contributions miss the model's output",
}
_STABILITY = {
    "good": "another fit finds the same x-features",
    "fair": "another fit finds x-features that are partly the same",
    "poor": "another fit finds other x-features",
    "unknown": "whether another fit finds the same x-features was not measured",
}
_MAPS = {
    "good": "the maps show what matters to the model",
    "fair": "the maps show roughly what matters to the model",
    "poor": "the maps do not show what matters to the model",
    "unknown": "whether the maps show what matters to the model was not measured",
}
_WORDS = {"good": "Yes", "fair": "With care", "poor": "Not fully", "unknown": "As far as it was checked"}


def verdict(unexplained: Reason, stable: Reason, maps: Reason) -> Verdict:
    """Sum up the three reasons.

    Args:
        unexplained: From :func:`on_unexplained`.
        stable: From :func:`on_stability`.
        maps: From :func:`on_maps`.

    Example:
        >>> found = verdict(on_unexplained(0.1, 10.0, 200, exact=True), on_stability(None), on_maps(None))
        >>> found.word, found.level
        ('As far as it was checked', 'unknown')
    """
    levels = [unexplained.level, stable.level, maps.level]
    level = next(each for each in ("poor", "fair", "unknown", "good") if each in levels)
    word = "No" if unexplained.level == "poor" else _WORDS[level]
    said = [_STABILITY[stable.level], _MAPS[maps.level]]
    both = stable.level == maps.level == "unknown"
    rest = "whether another fit finds the same x-features, and whether the maps show what matters, was not measured"
    sentence = f"{_NUMBERS[unexplained.level]}; {rest if both else '; '.join(said)}."
    return Verdict(level, word, sentence, _advice(unexplained, stable, maps), (unexplained, stable, maps))


def _advice(unexplained: Reason, stable: Reason, maps: Reason) -> str:
    """Say what a reader can use."""
    if unexplained.level == "poor":
        return "do not decide anything by this page, as its numbers do not add up to the model's output."
    numbers = "use the numbers and the cards"
    if stable.level == "poor":
        numbers += ", but give no names to x-features that another fit does not find"
    details = {
        "good": "the maps show where to look",
        "fair": "take the maps as a hint, and do not rely on single details in them",
        "poor": "leave the maps aside",
        "unknown": "check the maps before you rely on them",
    }
    return f"{numbers}; {details[maps.level]}."


def _level(value: float, good: float, fair: float) -> str:
    return "good" if value >= good else "fair" if value >= fair else "poor"


def _percent(share: float) -> str:
    """Format a share; a small share is not rounded to 0."""
    return "0 %" if share == 0 else "less than 0.1 %" if share < 0.001 else f"{100 * share:.2g} %"


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
