"""The analysis recovers what simulated participants put in, and its statistics are those of other libraries."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.cbook import boxplot_stats

from benchmarks.human_study import by_hand

pytest.importorskip("flask")
pytest.importorskip("statsmodels")

from captum_xnn.study._analysis import (
    Exported,
    Results,
    Trial,
    _holm,
    analyse,
    compare,
    mixed_model,
    read_export,
    scored,
)
from captum_xnn.study._export import export
from captum_xnn.study._figures import box_statistics, confidence_figure, performance_figure, scores_figure, svg
from captum_xnn.study._findings import write_findings
from captum_xnn.study._simulation import (
    BEHAVIOURS,
    PAPER,
    Behaviour,
    expected_purity,
    paper_behaviour,
    power,
    simulate,
    skill_for,
)
from captum_xnn.study._store import ANSWERS_FILE, StudyStore

COUNTS = (3, 3, 2, 2)


def answered(folder: Path, behaviour: Behaviour | Sequence[Behaviour], participants: int, **facts: Any) -> Exported:
    study = by_hand(folder, **facts)
    with StudyStore(folder / ANSWERS_FILE) as store:
        simulate(study, store, behaviour, participants=participants)
    return read_export(export(folder, folder / "export"))


def results(folder: Path, behaviour: Behaviour | Sequence[Behaviour], participants: int, **facts: Any) -> Results:
    return analyse(answered(folder, behaviour, participants, **facts), resamples=99)


def scores(found: Results, condition: str, dataset: str | None = None) -> list[float]:
    return [t.score for t in found.trials if t.condition == condition and dataset in (None, t.dataset)]


def test_perfect_people_are_perfect_and_random_ones_are_at_chance(tmp_path: Path) -> None:
    perfect = results(tmp_path / "perfect", BEHAVIOURS["perfect"], 4)
    assert {t.score for t in perfect.trials} == {1.0} and len(perfect.trials) == 4 * 6
    assert all(c.difference == 0 and c.effect == 0 for c in perfect.comparisons if c.measure == "purity")
    random = scored(answered(tmp_path / "random", BEHAVIOURS["random"], 16))
    found = [t.score for t in random]
    expected = expected_purity(0.0, COUNTS)
    assert np.mean(found) == pytest.approx(expected, abs=3 * np.std(found) / np.sqrt(len(found)))
    assert np.mean([t.chance for t in random]) == pytest.approx(expected, abs=0.03)


def test_noisy_people_have_the_purity_that_was_put_in(tmp_path: Path) -> None:
    found = [t.score for t in scored(answered(tmp_path, BEHAVIOURS["noisy"], 16))]
    expected = expected_purity(0.6, COUNTS)
    assert np.mean(found) == pytest.approx(expected, abs=3 * np.std(found) / np.sqrt(len(found)))


def test_people_who_use_x_features_do_better_with_them_alone(tmp_path: Path) -> None:
    found = results(tmp_path, BEHAVIOURS["features"], 7)
    assert np.mean(scores(found, "xnn")) > 0.95
    assert np.mean(scores(found, "none")) < 0.62 and np.mean(scores(found, "single")) < 0.62
    for c in found.comparisons:
        if c.measure == "purity":
            assert (c.low > 0.2) if c.a == "xnn" else (c.low < 0 < c.high)


@pytest.mark.slow
def test_the_papers_means_come_out_and_x_features_are_told_apart(tmp_path: Path) -> None:
    study = by_hand(tmp_path)
    with StudyStore(tmp_path / ANSWERS_FILE) as store:
        simulate(study, store, paper_behaviour(study), participants=120)
    found = analyse(read_export(export(tmp_path, tmp_path / "export")), resamples=4999)
    for dataset, means in PAPER.items():
        for condition, mean in means.items():
            own = scores(found, condition, dataset)
            assert len(own) == 120
            assert np.mean(own) == pytest.approx(mean, abs=3 * np.std(own) / np.sqrt(len(own)))
    (cub,) = [c for c in found.comparisons if (c.measure, c.dataset, c.a, c.b) == ("purity", "cub", "xnn", "single")]
    assert cub.holm_p < 0.01 and cub.low > 0.03 and cub.high < 0.17 and cub.effect > 0.3
    terms = {e.term: e for e in found.effects}
    expected = np.mean([PAPER[d]["xnn"] - PAPER[d]["none"] for d in PAPER])
    assert terms["xnn against none"].low < expected < terms["xnn against none"].high


def test_the_number_of_groups_people_make_does_not_matter_to_their_names(tmp_path: Path) -> None:
    # Groups have no names: the simulation gives each person names of their own.
    study = by_hand(tmp_path)
    with StudyStore(tmp_path / ANSWERS_FILE) as store:
        simulate(study, store, BEHAVIOURS["perfect"], participants=6)
        groups = [
            store.answers(p.id)[i]["data"]["groups"]
            for p in store.participants()
            for i, s in enumerate(p.steps)
            if s["kind"] == "sort"
        ]
    assert len({min(g.items()) for g in groups}) > 3


def test_exclusions_are_those_fixed_beforehand(tmp_path: Path) -> None:
    lazy = replace(BEHAVIOURS["perfect"], attentive=False)
    hasty = replace(BEHAVIOURS["perfect"], seconds=4.0)
    people = [BEHAVIOURS["perfect"], lazy, hasty]
    rules = {"unfinished": True, "failed_attention": True, "min_practice_purity": 0.8, "min_trial_seconds": 7.0}
    found = results(tmp_path / "a", people, 9, exclusions=rules)
    assert found.excluded == {f"p{n:03d}": ("failed attention check",) for n in (2, 5, 8)}
    assert {t.participant for t in found.trials} == {"p001", "p004", "p007"} and found.dropped_trials == 18
    everybody = next(c for c in found.comparisons_of_all if c.measure == "purity")
    assert everybody.n_a == 9 and next(c for c in found.comparisons if c.measure == "purity").n_a == 3
    none = {"unfinished": False, "failed_attention": False, "min_practice_purity": 0.0, "min_trial_seconds": 0.0}
    assert results(tmp_path / "b", people, 9, exclusions=none).excluded == {}


def test_people_who_stop_or_fail_the_practice_are_left_out(tmp_path: Path) -> None:
    study = by_hand(tmp_path)
    with StudyStore(tmp_path / ANSWERS_FILE) as store:
        tokens = simulate(study, store, BEHAVIOURS["perfect"], participants=4)
        people = store.participants()
        first, second = store.participant(tokens[0]), store.participant(tokens[1])
        store._write(lambda c: c.execute("DELETE FROM answers WHERE participant = ? AND step > 9", (first.id,)))
        store._write(lambda c: c.execute("UPDATE participants SET finished = NULL WHERE id = ?", (first.id,)))
        wrong = json.dumps({"groups": {f"p{i}": 1 for i in range(6)}})
        store._write(
            lambda c: c.execute("UPDATE answers SET data = ? WHERE participant = ? AND step = 2", (wrong, second.id))
        )
    found = analyse(read_export(export(tmp_path, tmp_path / "export")), resamples=99)
    assert len(people) == 4
    assert found.excluded == {"p001": ("unfinished",), "p002": ("practice batch",)}


def test_different_people_are_compared_unpaired(tmp_path: Path) -> None:
    arms = [
        {"name": "a", "stages": ["none", "single:ExcitationMaps", "xnn"], "task": "sort"},
        {"name": "b", "stages": ["none", "single:DeepLift"], "task": "sort"},
    ]
    found = results(tmp_path, BEHAVIOURS["features"], 12, arms=arms)
    designs = {(c.a, c.b): c.design for c in found.comparisons if c.measure == "purity"}
    assert designs["single:ExcitationMaps", "single:DeepLift"] == "unpaired"
    assert designs["xnn", "single:DeepLift"] == "unpaired" and designs["xnn", "single:ExcitationMaps"] == "paired"
    assert designs["single:DeepLift", "none"] == "paired"
    (c,) = [
        c for c in found.comparisons if (c.measure, c.dataset, c.a, c.b) == ("purity", "cub", "xnn", "single:DeepLift")
    ]
    assert c.n_a == 8 and c.n_b == 4 and c.effect > 0.9 and c.rank_p < 0.01


def test_ratings_of_different_tasks_are_never_mixed(tmp_path: Path) -> None:
    arms = [{"name": task, "stages": ["single", "xnn"], "task": task} for task in ("sort", "prediction")]
    answered(tmp_path, BEHAVIOURS["noisy"], 16, arms=arms)
    found = write_findings(tmp_path / "export", tmp_path / "out", resamples=99)
    ratings = read_export(tmp_path / "export").tables["ratings"]
    for task in ("sort", "prediction"):
        people = {t.participant for t in found.trials if t.task == task}
        assert len(people) == 8
        for question, where in (("confidence", "cub"), ("performance", "")):
            (c,) = [
                c for c in found.comparisons if (c.measure, c.task, c.dataset) == (question, task, where)
            ]  # fmt: skip
            own = [
                r for r in ratings if r["participant"] in people and (r["question"], r["dataset"]) == (question, where)
            ]
            means = [np.mean([int(r["value"]) for r in own if r["stage"] == stage]) for stage in ("xnn", "single")]
            assert (c.n_a, c.design) == (8, "paired") and c.difference == pytest.approx(means[0] - means[1])
        counts = found.confidence[task]["cub"]
        assert [sum(n) for n in counts.values()] == [8, 8] == [sum(n) for n in found.performance[task].values()]
        assert (tmp_path / "out" / f"figure5_confidence_{task}.svg").is_file()
    page = (tmp_path / "out" / "findings.html").read_text()
    assert "In the task prediction." in page and "Confidence (0 to 6), prediction" in page


@pytest.mark.parametrize(("task", "chance"), [("agreement", 0.5), ("distinction", 0.25), ("prediction", 0.25)])
def test_scores_of_the_other_tasks(tmp_path: Path, task: str, chance: float) -> None:
    arms = [{"name": "a", "stages": ["single", "xnn"], "task": task}]
    perfect = scored(answered(tmp_path / "p", BEHAVIOURS["perfect"], 3, arms=arms))
    assert {(t.task, t.score, t.chance) for t in perfect} == {(task, 1.0, chance)}
    random = [t.score for t in scored(answered(tmp_path / "r", BEHAVIOURS["random"], 12, arms=arms))]
    assert np.mean(random) == pytest.approx(chance, abs=3 * np.std(random) / np.sqrt(len(random)))


def test_comparisons_are_those_of_scipy() -> None:
    from scipy.stats import mannwhitneyu, wilcoxon

    generator = np.random.default_rng(0)
    a, b = generator.random(12), generator.random(12)
    names = [f"p{i}" for i in range(12)]
    paired = compare(dict(zip(names, a, strict=True)), dict(zip(names, b, strict=True)), resamples=99)
    assert paired is not None and paired.design == "paired"
    assert paired.rank_p == pytest.approx(wilcoxon(a, b).pvalue) and paired.difference == pytest.approx((a - b).mean())
    others = compare(dict(zip(names, a, strict=True)), {f"q{i}": v for i, v in enumerate(b[:9])}, resamples=999)
    assert others is not None and others.design == "unpaired"
    found = mannwhitneyu(a, b[:9])
    wins = np.mean([float(x > y) + 0.5 * float(x == y) for x in a for y in b[:9]])
    assert others.rank_p == pytest.approx(found.pvalue) and others.effect == pytest.approx(2 * wins - 1)
    assert others.difference == pytest.approx(a.mean() - b[:9].mean())
    assert others.low < others.difference < others.high
    assert compare({"p": 1.0}, {"p": 0.5}) is None


def test_corrections_are_those_of_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(1).random(15) ** 3
    np.testing.assert_allclose(_holm(p.tolist()), multipletests(p, method="holm")[1])
    assert _holm([]) == []


def made_trials(generator: Any, people: int, effect: float, own: float, batch: float) -> list[Trial]:
    batches = generator.normal(0, batch, (2, 5))
    found = []
    for person in range(people):
        skill = generator.normal(0, own)
        for place, condition in enumerate(("none", "single", "xnn")):
            for d, dataset in enumerate(("cub", "cel")):
                b = (person + place) % 5
                score = (
                    0.5 + effect * (condition == "xnn") + 0.1 * d + skill + batches[d, b] + generator.normal(0, 0.05)
                )
                found.append(Trial(f"p{person}", "a", "sort", condition, dataset, str(b), place, 9.0, score, 0.5))
    return found


def test_the_mixed_model_finds_effects_and_variances_that_were_put_in() -> None:
    generator = np.random.default_rng(0)
    found = mixed_model(made_trials(generator, 60, effect=0.15, own=0.1, batch=0.08))
    assert found is not None
    effects, variances = found
    terms = {e.term: e for e in effects}
    assert terms["xnn against none"].low < 0.15 < terms["xnn against none"].high
    assert (
        terms["xnn against none"].p < 1e-6 and terms["single against none"].low < 0 < terms["single against none"].high
    )
    assert np.sqrt(variances["participant"]) == pytest.approx(0.1, rel=0.3)
    assert np.sqrt(variances["residual"]) == pytest.approx(0.05, rel=0.1)
    assert np.sqrt(variances["batch"]) == pytest.approx(0.08, rel=0.6)  # there are ten batches only
    # Effects of participants taken out, the interval is narrower than that of different people would be.
    assert terms["xnn against none"].high - terms["xnn against none"].low < 0.05


def test_the_mixed_model_of_a_balanced_design_has_the_differences_of_means() -> None:
    trials = made_trials(np.random.default_rng(3), 20, effect=0.1, own=0.1, batch=0.0)
    effects, _ = mixed_model(trials) or pytest.fail("no model")
    means = {c: np.mean([t.score for t in trials if t.condition == c]) for c in ("none", "single", "xnn")}
    for e in effects:
        if e.term.endswith("against none"):
            assert e.estimate == pytest.approx(means[e.term.split()[0]] - means["none"], abs=0.01)


def test_too_few_people_have_no_model_and_a_note_says_so(tmp_path: Path) -> None:
    found = results(tmp_path, BEHAVIOURS["noisy"], 2)
    assert found.effects == [] and "three participants" in found.notes[0]


def test_nobody_is_told(tmp_path: Path) -> None:
    by_hand(tmp_path)
    with pytest.raises(ValueError, match="wait for participants"):
        analyse(read_export(export(tmp_path, tmp_path / "export")))
    with pytest.raises(ValueError, match="run `captum-xnn study export` first"):
        read_export(tmp_path / "nowhere")


def test_boxes_are_those_of_matplotlib() -> None:
    x = [0.1, 0.5, 0.5, 0.6, 0.7, 0.7, 0.8, 1.0]
    (expected,) = boxplot_stats(x)
    found = box_statistics(x)
    for own, theirs in (("q1", "q1"), ("median", "med"), ("q3", "q3"), ("low", "whislo"), ("high", "whishi")):
        assert found[own] == pytest.approx(expected[theirs])
    assert found["mean"] == pytest.approx(np.mean(x)) and found["sd"] == pytest.approx(np.std(x, ddof=1))


def test_figures_show_the_counts_and_the_scores(tmp_path: Path) -> None:
    found = results(tmp_path, BEHAVIOURS["noisy"], 5)
    figure = scores_figure(found)
    assert [ax.get_title() for ax in figure.axes] == ["CUB", "CEL"]
    for ax, dataset in zip(figure.axes, ("cub", "cel"), strict=True):
        drawn = [sorted(line.get_ydata()) for line in ax.lines if line.get_marker() == "o"]
        assert drawn == [sorted(scores(found, c, dataset)) for c in ("none", "single", "xnn")]
        means = [float(line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "D"]
        assert means == pytest.approx([np.mean(scores(found, c, dataset)) for c in ("none", "single", "xnn")])
    bars = [bar.get_height() for bar in confidence_figure(found).axes[0].patches]
    counts = [n for counts in found.confidence["sort"]["cub"].values() for n in counts]
    assert bars == pytest.approx([100 * n / 5 for n in counts]) and sum(counts) == 15
    assert sum(bar.get_height() for bar in performance_figure(found).axes[0].patches) == pytest.approx(200)
    assert svg(scores_figure(found)) == svg(scores_figure(found))


def test_the_page_and_the_tables_hold_the_results(tmp_path: Path) -> None:
    by_hand(tmp_path)
    results(tmp_path, BEHAVIOURS["features"], 8)
    found = write_findings(tmp_path / "export", tmp_path / "out", resamples=99)
    page = html.unescape((tmp_path / "out" / "findings.html").read_text())
    assert "default-src 'none'" in page and "://" not in page
    c = next(c for c in found.comparisons if c.a == "xnn" and c.measure == "purity")
    assert f"{c.mean_a:.2f} with x-features" in page
    with (tmp_path / "out" / "comparisons.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["difference"]) for r in rows] == pytest.approx([c.difference for c in found.comparisons])
    with (tmp_path / "out" / "figure4_points.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 48 and {p["participant"] for p in points} == {f"p{i:03d}" for i in range(1, 9)}
    with (tmp_path / "out" / "figure5_confidence.csv").open() as file:
        assert sum(int(r["answers"]) for r in csv.DictReader(file)) == 48


def test_hostile_comments_and_titles_stay_text(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"
    results(tmp_path, replace(BEHAVIOURS["noisy"], comments=f"=1+1 {evil}"), 3, title=evil)
    write_findings(tmp_path / "export", tmp_path / "out", resamples=99)
    page = (tmp_path / "out" / "findings.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") >= 5
    # A browser runs no formulas: there the comment stands as it was written.
    assert page.count("<blockquote>=1+1 &lt;/p&gt;") == 3


def test_power_is_the_level_without_a_difference_and_grows_with_people() -> None:
    equal = power((0.5, 0.5), COUNTS, participants=25, studies=200)
    assert equal < 0.11  # 0.05, with a standard error of 0.015
    few, many = (power((0.3, 0.55), COUNTS, participants=n, studies=60) for n in (8, 40))
    assert few < many > 0.8


def test_purity_follows_from_skill_and_back() -> None:
    assert expected_purity(1.0, COUNTS) == 1.0
    for purity in (0.56, 0.62, 0.72, 0.9):
        assert expected_purity(skill_for(purity, COUNTS), COUNTS) == pytest.approx(purity, abs=0.005)
    # Two images of two classes, at random: together with probability 1/2, and then half of them are right.
    assert expected_purity(0.0, (1, 1)) == pytest.approx(0.75, abs=0.02)


def test_a_study_of_which_everybody_is_left_out_still_has_its_page(tmp_path: Path) -> None:
    answered(tmp_path, replace(BEHAVIOURS["noisy"], attentive=False), 3)
    found = write_findings(tmp_path / "export", tmp_path / "out", resamples=99)
    assert len(found.excluded) == 3 and not found.trials and not found.comparisons and found.comparisons_of_all
    page = (tmp_path / "out" / "findings.html").read_text()
    assert "failed attention check 3" in page and "Too few participants to compare." in page


def test_arms_without_any_agent_have_no_ratings_of_agents(tmp_path: Path) -> None:
    answered(tmp_path, BEHAVIOURS["noisy"], 3, arms=[{"name": "a", "stages": ["none"], "task": "sort"}])
    found = write_findings(tmp_path / "export", tmp_path / "out", resamples=99)
    assert found.performance == {} and found.conditions() == ["none"] and not found.comparisons
    assert sum(found.difficulty) == 3 and not (tmp_path / "out" / "figure5_performance_sort.svg").exists()
