"""Sentences: hand-worked ones for every case, and which x-features are named by the rule written again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from captum_xnn import Explanation, XNNAttribution
from captum_xnn.plots import write_names
from captum_xnn.plots._sentence import decimals, sentence

NAMES = ["golden feather", "red forehead", "beak", "wing bar", "branch"]


def said(*contributions: float, residual: float = 0.0, names: Any = None, **options: Any) -> str:
    surrogate = 3.0 + sum(contributions)
    names = NAMES[: len(contributions)] if names is None else names
    terms = {"target_name": "goldfinch", "surrogate": surrogate, "prediction": surrogate + residual, "share": 0.8}
    return sentence(contributions, names, **(terms | options))


def test_where_the_bias_decides_the_sentence_says_what_the_x_features_do() -> None:
    """Contributions count from the average example, so they may speak for a class that the model does not give."""
    because = "because of golden feather (+2.00)"
    assert said(2.0, is_positive=True) == f"goldfinch {because}"
    assert said(2.0, is_positive=False) == f"more like goldfinch than the average example {because}"
    assert said(-2.0, is_positive=False) == "against goldfinch because of golden feather (-2.00)"
    assert said(-2.0, is_positive=True).startswith("less like goldfinch than the average example because of golden")


# Which are named


def test_the_example_of_the_paper() -> None:
    terms = {"target_name": "European goldfinch", "surrogate": 80.3, "prediction": 80.0}
    expected = "European goldfinch because of golden feather (+63.1) and red forehead (+15.2)"
    assert sentence([63.1, 15.2], NAMES[:2], **terms) == expected
    # The third one is less than a tenth of all that speaks for the class, as is the fourth, which speaks against it.
    assert sentence([63.1, 15.2, 2.0, -3.2], NAMES[:4], **terms) == expected
    assert sentence([63.1, 15.2, 2.0, -13.2], NAMES[:4], **terms) == f"{expected}, although wing bar (-13.2)"


def test_the_largest_comes_first_whatever_its_number() -> None:
    assert (
        said(1.0, 5.0, 3.0, share=1.0)
        == "goldfinch because of red forehead (+5.00), beak (+3.00) and golden feather (+1.00)"
    )


def test_reasons_are_named_until_they_reach_the_share() -> None:
    # Of 10: 5, 8, 9.5, 10.
    contributions = (5.0, 3.0, 1.5, 0.5)
    one = "goldfinch because of golden feather (+5.00)"
    assert said(*contributions, share=0.0) == one
    assert said(*contributions, share=0.5) == one
    assert said(*contributions, share=0.51) == f"{one} and red forehead (+3.00)"
    assert said(*contributions, share=0.8) == f"{one} and red forehead (+3.00)"
    assert said(*contributions, share=0.81) == f"{one}, red forehead (+3.00) and beak (+1.50)"
    assert said(*contributions, share=1.0).endswith("beak (+1.50) and wing bar (+0.50)")


def test_a_share_that_binary_numbers_miss_is_reached() -> None:
    # 0.1 + 0.2 is more than 0.3, and 0.7 + 0.1 less than 0.8.
    assert said(0.7, 0.1, 0.2) == "goldfinch because of golden feather (+0.700) and beak (+0.200)"
    assert said(0.6, 0.2, 0.1, 0.1).endswith("and red forehead (+0.200)")


def test_what_speaks_against_is_said_where_it_is_large() -> None:
    # P = 10; up to 2 may be left out on either side.
    assert said(10.0, 0.0, 0.0, -3.2) == "goldfinch because of golden feather (+10.0), although wing bar (-3.2)"
    assert said(10.0, 0.0, 0.0, -2.0) == "goldfinch because of golden feather (+10.0)"
    # 1.5 + 0.6 are more than 2 together: the larger one is named.
    assert said(10.0, -0.6, 0.0, -1.5) == "goldfinch because of golden feather (+10.0), although wing bar (-1.5)"
    assert said(10.0, -0.6, -1.5, share=1.0).endswith("although beak (-1.5) and red forehead (-0.6)")


def test_an_output_that_is_held_down_is_explained_by_what_speaks_against_it() -> None:
    assert said(3.0, -10.0) == "against goldfinch because of red forehead (-10.0), although golden feather (+3.0)"
    assert said(1.0, -10.0) == "against goldfinch because of red forehead (-10.0)"
    assert said(0.0, -4.0, -3.0) == "against goldfinch because of red forehead (-4.00) and beak (-3.00)"
    assert said(5.0, -5.0) == "goldfinch because of golden feather (+5.00), although red forehead (-5.00)"


def test_x_features_without_contribution_are_never_named() -> None:
    assert said(0.0, 2.0, 0.0, share=1.0) == "goldfinch because of red forehead (+2.00)"
    assert said(0.0, 0.0) == "no reason for goldfinch"
    assert said(0.0, 0.0, residual=1.5) == "no reason for goldfinch; unexplained: +1.50"


@pytest.mark.parametrize("seed", range(20))
def test_no_fewer_would_do(seed: int) -> None:
    generator = np.random.default_rng(seed)
    contributions = generator.normal(0.3, 2.0, size=5).tolist()
    share = float(generator.uniform())
    text = said(*contributions, share=share)
    allowed = (1 - share) * max(sum(c for c in contributions if c > 0), -sum(c for c in contributions if c < 0))
    for sign in (1, -1):
        side = [(c, name) for c, name in zip(contributions, NAMES, strict=True) if c * sign > 0]
        named = [c for c, name in side if name in text]
        rest = [abs(c) for c, name in side if name not in text]
        assert sum(rest) <= allowed + 1e-9
        if len(named) > 1:  # the least of them was needed, and none that is named is smaller than one that is not
            assert sum(rest) + min(map(abs, named)) > allowed
            assert min(map(abs, named)) >= max(rest, default=0)


# The residual


def test_a_large_residual_is_told_with_its_sign() -> None:
    reasons = "goldfinch because of golden feather (+8.00) and red forehead (+2.00)"
    said_all = {"share": 1.0}
    assert said(8.0, 2.0, residual=1.0, **said_all) == reasons  # a tenth is not more than a tenth
    assert said(8.0, 2.0, residual=1.01, **said_all) == f"{reasons}; unexplained: +1.01"
    assert said(8.0, 2.0, residual=-1.5, **said_all) == f"{reasons}; unexplained: -1.50"
    assert said(8.0, 2.0, residual=-1.5, unexplained_share=0.2, **said_all) == reasons
    assert said(8.0, 2.0, residual=0.5, unexplained_share=0.0, **said_all) == f"{reasons}; unexplained: +0.50"


def test_the_residual_is_compared_with_contributions_of_both_signs() -> None:
    # |8| + |-7| = 15: a residual of 1.4 is below a tenth of it, though larger than their sum.
    assert "unexplained" not in said(8.0, -7.0, residual=1.4)
    assert said(8.0, -7.0, residual=1.6).endswith("; unexplained: +1.60")


def test_rounding_is_no_residual() -> None:
    assert "unexplained" not in said(0.0, 0.0, residual=1e-9)
    assert "unexplained" not in said(8.0, residual=1e-9, unexplained_share=0.0)


# Numbers and refusals


@pytest.mark.parametrize(
    ("values", "expected"), [([1234.5], 1), ([-63.1], 1), ([6.3], 2), ([0.031], 4), ([0], 1), ([], 1)]
)
def test_three_digits_of_the_largest(values: list[float], expected: int) -> None:
    assert decimals(values) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["a"]}, "there are 1 names and 2 contributions; pass as many"),
        ({"prediction": float("nan")}, r"are NaN or infinite in .*nan.*; look"),
        ({"share": 1.1}, r"share is 1.1 and unexplained_share is 0.1; pass 0 <= share <= 1"),
        ({"unexplained_share": -1.0}, r"share is 0\.8 and unexplained_share is -1\.0"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        said(1.0, 2.0, **changes)


# Of an explanation


def explanation(targets: Any = (46, 7), layer: str | None = "relu6") -> Explanation:
    contributions = torch.tensor([[63.1, 15.2], [-4.0, 0.3]])
    surrogate = contributions.sum(1) + 0.5
    return Explanation(
        inputs=torch.zeros(2, 4),
        maps=torch.zeros(2, 2, 4),
        features=torch.ones(2, 2),
        contributions=contributions,
        bias=torch.tensor([0.5, 0.5]),
        surrogate=surrogate,
        prediction=surrogate + torch.tensor([0.0, 2.0]),
        target=targets,
        layer=layer,
    )


def test_unnamed_x_features_and_outputs_are_numbered() -> None:
    why = explanation()
    assert why.sentence() == "target 46 because of x-feature 1 (+63.1) and x-feature 2 (+15.2)"
    named = why.sentence(names=["golden feather"], target_name="European goldfinch")
    assert named == "European goldfinch because of golden feather (+63.1) and x-feature 2 (+15.2)"
    assert why.sentence(index=1) == "against target 7 because of x-feature 1 (-4.00); unexplained: +2.00"
    assert why.sentence(index=1, share=1.0, unexplained_share=1.0).endswith("(-4.00), although x-feature 2 (+0.30)")
    assert explanation(targets=(None, None)).sentence().startswith("the output because of")


def test_all_examples_get_a_sentence_with_the_names_of_their_targets() -> None:
    why = explanation()
    expected = [why.sentence(), why.sentence(index=1)]
    assert why.sentences() == expected
    named = [e.replace("target 46", "goldfinch").replace("target 7", "wren") for e in expected]
    assert why.sentences(target_names={46: "goldfinch", 7: "wren"}) == named
    all_names = ["?"] * 47
    all_names[46], all_names[7] = "goldfinch", "wren"
    assert why.sentences(target_names=all_names) == named
    assert why.sentences(share=0.0, unexplained_share=9.0) == [
        "target 46 because of x-feature 1 (+63.1)",
        "against target 7 because of x-feature 1 (-4.00)",
    ]


def test_a_target_without_a_name_is_told() -> None:
    for names in ({46: "goldfinch"}, ["a"] * 7, "goldfinch, wren, and others"):
        with pytest.raises(ValueError, match=r"target \d+ has no name among the \d+ target_names"):
            explanation().sentences(target_names=names)


def test_names_are_read_for_the_layer_and_for_the_target_of_each_example(tmp_path: Any) -> None:
    names = {46: ["golden feather", "red forehead"], 7: ["beak"]}
    path = write_names(tmp_path / "names.json", names, layer="relu6")
    first, second = explanation().sentences(path, share=1.0)
    assert "golden feather (+63.1) and red forehead (+15.2)" in first
    assert "beak (-4.00), although x-feature 2 (+0.30)" in second
    with pytest.raises(
        ValueError, match=r".*names\.json' has names of layer 'relu6', and the x-features are of layer 'fc7'"
    ):
        explanation(layer="fc7").sentence(names=path)
    assert explanation().describe(0, ["a"]).count("a +63.10, x-feature 2 +15.20") == 1


@pytest.mark.parametrize("size", [None, 2])
def test_sentences_of_explanations_do_not_contradict_the_model(size):
    """Whatever the x-features say, the bias may decide: then the sentence compares with the average example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(300, 6)
    with torch.no_grad():
        model[2].bias -= model(x).mean(0)
        model[2].bias[1] += 0.3
    xnn = XNNAttribution(model, "1", 2).fit(x, target=1, progress=False)
    why = xnn.explain(x, target=1, internal_batch_size=size)
    own = (model(x).argmax(1) == 1).tolist()
    assert why.is_positive == (None if size else tuple(own))
    total, said = why.contributions.sum(1), why.sentences(target_names=["a", "b", "c"])
    odd = {(is_own, float(t) > 0): s for is_own, t, s in zip(own, total, said, strict=True)}
    assert len(odd) == 4
    if size is None:
        assert odd[True, False].startswith("less like b than the average example because of ")
        assert odd[False, True].startswith("more like b than the average example because of ")
    assert odd[True, True].startswith("b because of ") and odd[False, False].startswith("against b because of ")
    assert xnn.explain(x[:5], target=1, against=0).is_positive is None
    single = XNNAttribution(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)).eval(), "1", 2)
    single.fit(x, positives=torch.ones(300, dtype=torch.bool), progress=False)
    assert single.explain(x[:5]).is_positive is None
