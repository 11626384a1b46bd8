"""Explain the examples of a report, whether images, texts or rows of a table, and format their numbers and maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_xnn.layers._targets import Target
from captum_xnn.metrics._faithfulness import FaithfulnessStream
from captum_xnn.plots._scales import own_scale

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.attribution import XNNAttribution
    from captum_xnn.explanation import Contributions, Explanation
    from captum_xnn.patch_scores import PatchScores
    from captum_xnn.report._options import ReportOptions

__all__ = [
    "ExampleExplanations",
    "TargetContent",
    "captioned",
    "compare",
    "decimals",
    "explain_examples",
    "numbers_of",
    "scaled",
    "short",
    "strengths",
]


class ExampleExplanations(NamedTuple):
    """Examples explained for one target, with the comparisons that the options ask for."""

    why: Explanation
    one_heatmaps: Any
    """The 1-Heatmaps."""
    y_hat: Tensor
    """All outputs of the model, (N, ...). With an ``internal_batch_size`` below N, those of the first examples only."""
    against: Explanation | None
    """Explanation of the difference to another output; None if the options name no other."""
    one_heatmaps_against: Any
    """The 1-Heatmaps of the difference."""
    contributions: tuple[Tensor, Tensor] | None
    """Contributions by this fit and by the other one; None without another fit."""


class TargetContent(NamedTuple):
    """All that the passes over a report's inputs and data found for one target."""

    target: Target
    """The explained output."""
    label: str
    """Its name."""
    classes: bool
    """Whether the model gives the target to some examples and not to others."""
    rows: list[dict[str, Any]]
    """Numbers and maps of each example of the page."""
    cards: list[dict[str, Any]]
    """The card of each x-feature, as the template takes it."""
    faithfulness: FaithfulnessStream
    """Faithfulness on the data."""
    positive_contributions: Tensor
    """Contributions to the positives of the data, (M, K)."""
    contributions: Sequence[tuple[Tensor, Tensor]]
    """Contributions by this fit and by another one, batch by batch; empty without another fit."""
    patches: PatchScores | None
    """Measures on covered patches; None if no patches were covered."""


def explain_examples(
    xnn: XNNAttribution, inputs: Any, target: Target, options: ReportOptions, additional: Any = None
) -> ExampleExplanations:
    """Explain some examples of a page for one target.

    Args:
        xnn: The explainers.
        inputs: A tensor or a tuple of tensors, as the model takes them.
        target: A fitted target.
        options: Options of the report, with the other output and the other fit to compare with.
        additional: Further arguments of the model.
    """
    size = options.internal_batch_size
    why, y_hat = xnn._explain_and_read(inputs, target, additional, internal_batch_size=size)
    one_heatmaps = xnn.one_heatmap(inputs, target, additional, internal_batch_size=size)
    against = one_heatmaps_against = contributions = None
    if options.against not in (None, target):
        against = xnn.explain(inputs, target, additional, against=options.against, internal_batch_size=size)
        one_heatmaps_against = xnn.one_heatmap(
            inputs, target, additional, against=options.against, internal_batch_size=size
        )
    if options.again is not None:
        again = options.again.contributions(inputs, target, additional, internal_batch_size=size)
        contributions = (why.contributions.cpu(), again.contributions.cpu())
    return ExampleExplanations(why, one_heatmaps, y_hat, against, one_heatmaps_against, contributions)


def numbers_of(why: Explanation | Contributions, index: int, is_positive: bool) -> dict[str, Any]:
    """Return the numbers of one example, short enough for the page."""
    return {
        "c": [short(v) for v in why.contributions[index].detach().double().tolist()],
        "e": [short(v) for v in why.features[index].tolist()],
        "bias": short(float(why.bias[index])),
        "sum": short(float(why.surrogate[index])),
        "prediction": short(float(why.prediction[index])),
        "is_positive": is_positive,
    }


def compare(rows: Sequence[dict[str, Any]], differences: Iterable[Mapping[str, Any]], label: str) -> None:
    """Add to each row the numbers and maps of a difference of two outputs, for a second sentence and other maps.

    Args:
        rows: Rows of some examples.
        differences: Rows of the difference for the same examples.
        label: Name of the difference.
    """
    kept = ("c", "bias", "sum", "prediction", "maps", "one", "strength", "parts")
    for row, of in zip(rows, differences, strict=True):
        row["rather"] = {"label": label, **{name: of[name] for name in kept if name in of}}


def scaled(maps: Tensor, contributions: Tensor) -> Tensor:
    """Scale each of the maps (K, H, W) to [-1, 1] by itself, multiplied by the sign of its contribution."""
    return torch.from_numpy(own_scale(maps, contributions)).float()


def strengths(maps: Tensor, contributions: Tensor) -> list[float]:
    """Compute the strength of each map on a shared scale, in [0, 1]: its contribution spread over its pixels."""
    mass = maps.double().abs().sum((1, 2))
    density = torch.where(mass > 0, contributions.abs() / torch.where(mass > 0, mass, 1), 0)
    largest = density.max()
    return (density / largest).tolist() if largest > 0 else density.tolist()


def short(value: float) -> float:
    """Round a number to six significant digits, to keep the page small."""
    return float(f"{value:.6g}")


def captioned(shown: Sequence[Mapping[str, Any]], captions: Sequence[str] | None, thing: str) -> list[dict[str, Any]]:
    """Return all examples of a page with their captions, such as "image 1" if there are none.

    Args:
        shown: The examples.
        captions: A caption for each.
        thing: "image", "text" or "example".

    Raises:
        ValueError: If there are no examples, or not one caption for each.
    """
    n = len(shown)
    if captions is None:
        captions = [f"{thing} {i + 1}" for i in range(n)]
    if not n or isinstance(captions, str) or len(captions) != n:
        raise ValueError(
            f"there are {n} {thing}s and {len(captions)} captions; pass at least one {thing}, and one caption for each "
            "(such as its file name) or none at all"
        )
    return [{**each, "caption": str(caption)} for each, caption in zip(shown, captions, strict=True)]


def decimals(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of decimals that shows three digits of the largest contribution or output."""
    largest = max(abs(v) for row in rows for v in (*row["c"], row["prediction"]))
    return int(min(max(2 - np.floor(np.log10(largest)), 1), 6)) if largest > 0 else 1
