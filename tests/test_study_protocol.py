"""The design of a study: balance, order, batches, and the answers that steps take."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from study_made import answer_to, made

from captum_xnn.study import Arm
from captum_xnn.study._protocol import cells, check_answer, plan, public_step


@pytest.fixture(scope="module")
def study(explained: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made(tmp_path_factory.mktemp("study"), explained, heatmaps=("InputXGradient", "Saliency"))


def test_every_block_has_every_cell_once_in_an_order_of_its_own(study: Any) -> None:
    # Two arms, single and xnn in two orders, data sets in two orders.
    assert len(cells(study)) == 8 == len(set(cells(study)))
    blocks = [[plan(study, 8 * block + i)["cell"] for i in range(8)] for block in range(6)]
    assert all(sorted(block) == list(range(8)) for block in blocks)
    assert len({tuple(block) for block in blocks}) > 3


def test_the_stage_without_maps_comes_first_and_data_sets_alternate(study: Any) -> None:
    orders = Counter()
    for slot in range(16):
        made_plan = plan(study, slot)
        trials = [(s["stage"].partition(":")[0], s["dataset"]) for s in made_plan["steps"] if s["kind"] == "sort"]
        first, second = made_plan["datasets"]
        assert [d for _, d in trials] == [first, second] * 3
        assert trials[0][0] == trials[1][0] == "none"
        orders[trials[2][0], first] += 1
    assert orders == {(s, d): 4 for s in ("single", "xnn") for d in ("gulls", "cells")}


def test_other_first_stages_are_counterbalanced_where_they_may_be(explained: Any, tmp_path: Path) -> None:
    free = made(tmp_path, explained, none_first=False)
    assert len(cells(free)) == 12
    assert Counter(plan(free, slot)["stages"][0] for slot in range(12)) == {
        "none": 4, "single:InputXGradient": 4, "xnn": 4,
    }  # fmt: skip


def test_no_participant_sees_an_image_twice_and_stages_share_the_batches(study: Any) -> None:
    shown = Counter()
    for slot in range(12):
        steps = [s for s in plan(study, slot)["steps"] if s["kind"] == "sort"]
        images = [image for step in steps for image in step["order"]]
        assert len(images) == len(set(images)) == 30
        for step in steps:
            assert sorted(step["order"]) == sorted(study.datasets[step["dataset"]].batches[step["batch"]])
            shown[step["dataset"], step["stage"].partition(":")[0], step["batch"]] += 1
    assert set(shown.values()) == {4} and len(shown) == 2 * 3 * 3


def test_plans_follow_from_the_seed_alone(study: Any, explained: Any, tmp_path: Path) -> None:
    again = made(tmp_path / "again", explained, heatmaps=("InputXGradient", "Saliency"))
    other = made(tmp_path / "other", explained, heatmaps=("InputXGradient", "Saliency"), seed=1)
    assert [plan(again, i) for i in range(9)] == [plan(study, i) for i in range(9)]
    assert [plan(other, i)["cell"] for i in range(9)] != [plan(study, i)["cell"] for i in range(9)]


def test_one_question_checks_attention(study: Any) -> None:
    asked = [s["attention"] for s in plan(study, 0)["steps"] if s["kind"] == "confidence"]
    assert asked == [False, True, False]


def test_a_browser_learns_neither_classes_nor_the_heatmaps_name(study: Any) -> None:
    for step in plan(study, 0)["steps"]:
        said = repr(public_step(study, step))
        assert "Gradient" not in said.replace("'name': 'single:InputXGradient'", "") or step["kind"] == "final"
        assert "given" not in said and "bar " not in said


def test_agents_are_rated_by_the_part_in_which_they_were_met(explained: Any, tmp_path: Path) -> None:
    stages = ("none", "single:InputXGradient", "single:Saliency", "xnn")
    study = made(tmp_path, explained, arms=(Arm("two", stages),), batches=4)
    orders = set()
    for slot in range(12):
        steps = plan(study, slot)["steps"]
        parts = {s["part"]: s["stage"] for s in steps if s["kind"] == "intro"}
        shown = public_step(study, steps[-1])["agents"]
        assert {a["part"]: a["name"] for a in shown} == {p: s for p, s in parts.items() if s != "none"}
        orders.add(tuple(a["name"] for a in shown))
    assert len(orders) == 6


def test_every_step_takes_its_answer_and_no_other(study: Any) -> None:
    steps = plan(study, 0)["steps"]
    for step in steps:
        check_answer(step, answer_to(step))
        if answer_to(step) and step["kind"] != "background":
            with pytest.raises(ValueError, match=r"^(give|the participant did not)"):
                check_answer(step, {})
        with pytest.raises(ValueError, match=r"the answer is a .*, not an object"):
            check_answer(step, [])


@pytest.mark.parametrize("wrong", [0, 3, "1", 1.0, True, None])
def test_groups_are_whole_numbers_of_the_groups(study: Any, wrong: Any) -> None:
    step = next(s for s in plan(study, 0)["steps"] if s["kind"] == "sort")
    groups = {**answer_to(step)["groups"], step["order"][2]: wrong}
    with pytest.raises(ValueError, match="a group for every image"):
        check_answer(step, {"groups": groups})


def test_a_comment_is_text_of_bounded_length(study: Any) -> None:
    step = plan(study, 0)["steps"][-1]
    assert check_answer(step, answer_to(step, comments="a\0b"))["comments"] == "ab"
    for wrong in ("x" * 5001, 3):
        with pytest.raises(ValueError, match="comments"):
            check_answer(step, {**answer_to(step), "comments": wrong})
