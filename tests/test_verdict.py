"""The verdict of a report: every figure beside its control, and no better word than its worst reason allows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import written

from captum_xnn.metrics._overlap import Orthogonality
from captum_xnn.patch_scores import PatchScores
from captum_xnn.report._verdict import (
    Reason,
    Stability,
    format_error,
    on_maps,
    on_stability,
    on_unexplained,
    stability,
    two_digits,
    verdict,
)


def covered(agreement: float, groups: float | None = 0.0, noise: float = 0.0, one: float = 0.3) -> PatchScores:
    return PatchScores(7, agreement, groups, noise, one, 0.5, None, 1.1, Orthogonality(0.1, 0.2), None)


@pytest.mark.parametrize(
    ("f_reg", "level", "said"),
    [
        (0.0, "good", "0 % of the output is unexplained"),
        (0.001, "good", "Less than 0.1 % of"),
        (0.2, "good", "5 % of"),
        (0.21, "fair", "5.2 % of"),
        (1.0, "fair", "25 % of"),
        (1.1, "poor", "28 % of"),
        (9.0, "poor", "The x-features explain nothing"),
    ],
)
def test_unexplained_is_judged_against_a_constant_guess(f_reg: float, level: str, said: str) -> None:
    reason = on_unexplained(f_reg, 4.0, 1200, exact=False)
    assert reason.level == level and reason.answer.startswith(said)
    assert "Over 1,200 examples" in reason.answer and "misses by 4 logits" in reason.answer
    assert "by construction" not in reason.answer
    assert "by construction" in on_unexplained(f_reg, 4.0, 1200, exact=True).answer


def test_errors_have_two_digits_at_most_and_no_exponent() -> None:
    for exponent in range(-12, 8):
        for first in (1.0, 1.04, 2.5, 3.456789, 9.94, 9.96):
            value = first * 10.0**exponent
            said = two_digits(value)
            assert "e" not in said and float(said.replace(",", "")) == pytest.approx(float(f"{value:.1e}"), rel=1e-9)
            assert len(said.replace(",", "").replace(".", "").strip("0")) <= 2
            bound = format_error(value / 1000 / 2, value)
            assert bound.startswith("less than ")
            number = float(bound.removeprefix("less than ").replace(",", ""))
            # One digit, which does not claim more than was found.
            assert len(f"{number:.9e}".split("e")[0].strip("0").rstrip(".")) == 1
            assert value / 1000 * (1 - 1e-9) <= number <= 2 * value / 1000
    assert two_digits(-0.0123) == "-0.012" and two_digits(0.0) == "0"
    assert format_error(0.0058, 5.8) == "0.0058", "an error of a thousandth has digits of its own"


def test_output_that_never_varies_is_explained_by_its_own_value_only() -> None:
    assert on_unexplained(0.0, 0.0, 5, exact=False).level == "good"
    assert on_unexplained(0.1, 0.0, 5, exact=False).level == "poor"


def test_stability_is_that_of_partners_beside_that_of_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(200, 3, generator=generator)
    E[:, 1] = 0.6 * E[:, 0] + 0.8 * E[:, 1]
    swapped = -2 * E[:, [2, 0, 1]] + 0.1 * torch.randn(200, 3, generator=generator)
    found = stability(E, swapped)
    r = torch.corrcoef(E.double().T).abs()
    assert found.examples == 200 and found.found_again > 0.99
    neighbours = [max(float(r[i, j]) for j in range(3) if j != i) for i in range(3)]
    assert found.between == pytest.approx(sum(neighbours) / 3)
    assert stability(E[:, :1], E[:, :1]).between is None


@pytest.mark.parametrize(
    ("again", "between", "level"),
    [(0.9, 0.3, "good"), (0.6, 0.3, "fair"), (0.4, 0.1, "poor"), (0.9, 0.88, "poor"), (0.9, None, "good")],
)
def test_x_features_as_alike_as_neighbours_are_not_stable(again: float, between: float | None, level: str) -> None:
    reason = on_stability(Stability(again, between, 40))
    assert reason.level == level and f"{again:.2f}" in reason.answer
    assert (between is None) or f"neighbour by {between:.2f}" in reason.answer


@pytest.mark.parametrize(
    ("scores", "level", "said"),
    [
        (covered(0.7), "good", "chance 0.00"),
        (covered(0.3), "fair", "the single usual heatmap 0.30"),
        (covered(0.1), "poor", "do not read them as places"),
        (covered(0.6, noise=0.55), "poor", "noise 0.55"),
        (covered(0.6, groups=0.58), "fair", "drawn by chance do so as well"),
        (covered(0.6, one=0.8), "fair", "less than the single heatmap"),
        (covered(-0.2, groups=None), "poor", "\N{MINUS SIGN}0.20"),
    ],
)
def test_maps_are_judged_beside_their_controls(scores: PatchScores, level: str, said: str) -> None:
    reason = on_maps(scores)
    assert reason.level == level and said in reason.answer and "7 images" in reason.answer
    assert ("drawn by chance" in reason.answer) == (scores.agreement_random_groups is not None)


def test_maps_that_can_be_told_apart_are_said_beside_chance_and_cancelling() -> None:
    told = covered(0.6, groups=0.62)._replace(identified=0.7, identified_random_groups=0.35, movement=2.16)
    reason = on_maps(told)
    assert reason.level == "fair"  # x-features that cancel are told apart as easily
    assert "70 % of the maps" in reason.answer and "drawn by chance, 35 %" in reason.answer
    assert "move 2.2 times as much" in reason.answer
    assert "% of the maps" not in on_maps(told._replace(identified=float("nan"))).answer
    assert "% of the maps" not in on_maps(told._replace(identified_random_groups=None)).answer


def test_no_word_is_better_than_the_worst_reason() -> None:
    order = ["poor", "fair", "unknown", "good"]
    words = {}
    for levels in itertools.product(order, repeat=3):
        if levels[0] != "unknown":
            found = verdict(*(Reason(level, "?", ".") for level in levels))
            assert found.level == min(levels, key=order.index)
            assert [r.level for r in found.reasons] == [*levels]
            words.setdefault(found.word, set()).add(found.level)
    assert words == {
        "Yes": {"good"}, "With care": {"fair"}, "As far as it was checked": {"unknown"},
        "Not fully": {"poor"}, "No": {"poor"},
    }  # fmt: skip


def test_report_answers_first_and_in_words(explained: Any, tmp_path: Path) -> None:
    xnn, images, target = explained
    again = xnn.with_heatmap(None)
    _, page = written(tmp_path / "r.html", explained, data=images, patches=3, again=again)
    text = page.text
    questions = [
        "How to read this page",
        "logit",
        "Do the x-features add up to the model's output?",
        "Would another fit find the same x-features?",
        "Do the maps show what matters to the model?",
        "F_reg",
    ]
    places = [text.index(q) for q in questions]
    assert places == sorted(places)
    # An explainer agrees with itself, and F_reg is that of `score`.
    answers = " ".join(text[places[2] : places[5]])
    assert "correlate with these by 1.00 on average over 9 examples" in answers
    score = xnn.score(images, target)
    y = xnn.model(images)[:, target]
    spread = float((y - y.mean()).abs().mean())
    assert f"miss the model's output by {format_error(score.f_reg, spread)} logits" in answers
    assert f"misses by {two_digits(spread)} logits" in answers
    assert f"{100 * score.f_cls:.1f} %" in text
    assert "parts of 3 images" in answers and "noise" in answers
    assert [a["class"] for a in page.named("li") if a.get("class") in ("good", "fair", "poor", "unknown")][1] == "good"


def test_advice_leaves_out_what_did_not_hold() -> None:
    def advice(*levels: str) -> str:
        return verdict(*(Reason(level, "?", ".") for level in levels)).advice

    assert advice("good", "good", "good") == "use the numbers and the cards; the maps show where to look."
    assert advice("good", "good", "fair").endswith("do not rely on single details in them.")
    assert advice("good", "poor", "poor") == (
        "use the numbers and the cards, but give no names to x-features that another fit does not find; leave the maps "
        "aside."
    )
    assert advice("poor", "good", "good").startswith("do not decide anything by this page")
