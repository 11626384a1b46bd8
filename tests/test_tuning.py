"""Cross-validation: folds, scores and their statistics by hand, and a run that was cut off ends as one that was not."""

import json
import math
import statistics
from functools import partial

import pytest
import torch

from captum_xnn import SRAE, Recipe
from captum_xnn.models.baselines import Lasso
from captum_xnn.models.baselines._selection import lasso
from captum_xnn.training import choose_n, tune
from captum_xnn.training._fitting import fit
from captum_xnn.training._sampler import Sampler
from captum_xnn.training._tuning import Trial, Tuning, _folds, held_out_f_reg, tune_alpha

small = partial(SRAE, hidden=())
GRID = {"n_features": [1, 2], "eta": [0.5, 2.0]}
SETTINGS = {"grid": GRID, "folds": 3, "autoencoder": small, "recipe": Recipe(steps=9), "progress": False}


def problem(rows=120):
    g = torch.Generator().manual_seed(0)
    Z = torch.rand(rows, 6, generator=g)
    y = Z[:, :1] + 2 * Z[:, 1:2] + 3 * Z[:, 2:3] + 0.1 * torch.randn(rows, 1, generator=g)
    return Z, y, y[:, 0] > y.quantile(0.9)


def test_scores_are_those_of_fits_without_the_fold():
    Z, y, positives = problem()
    found = tune(Z, y, positives=positives, seed=4, **SETTINGS)
    assert [t.settings for t in found.trials] == [{"n_features": n, "eta": e} for n in (1, 2) for e in (0.5, 2.0)]
    fold = _folds(120, 3, 4, positives)
    for trial in found.trials:
        for k, score in enumerate(trial.scores):
            xnn = SRAE(6, trial.settings["n_features"], hidden=())
            recipe = Recipe(steps=9, eta=trial.settings["eta"])
            fit(xnn, Z[fold != k], y[fold != k], positives=positives[fold != k], recipe=recipe, seed=4)
            with torch.no_grad():
                wanted = float((xnn(Z[fold == k]).y_bar - y[fold == k]).abs().mean())
            assert score == pytest.approx(wanted, rel=1e-6)
    assert found.chosen == min(found.trials, key=lambda t: sum(t.scores)).settings == found.best.settings


def test_other_scores_and_other_arguments_of_the_network():
    Z, y, _ = problem()
    seen = []

    def sizes(xnn, Z, y):
        seen.append((xnn.config["hidden"], xnn.n_features, len(Z)))
        return -float(len(xnn.config["hidden"]))

    found = tune(Z, y, grid={"hidden": [[], [3], [4, 3]]}, folds=2, recipe=Recipe(steps=2), score=sizes, progress=False)
    assert seen == [(hidden, 5, 60) for hidden in ([], [3], [4, 3]) for _ in range(2)]
    assert found.chosen == {"hidden": [4, 3]}


def test_folds_hold_every_example_once_and_their_share_of_positives():
    positives = torch.arange(100) % 9 == 0
    for seed in range(9):
        fold = _folds(100, 5, seed, positives)
        assert fold.bincount().tolist() == [20] * 5
        assert sorted(fold[positives].bincount(minlength=5).tolist()) == [2, 2, 2, 3, 3]
    fold = _folds(100, 5, 0, positives)
    assert torch.equal(fold, _folds(100, 5, 0, positives)) and not torch.equal(fold, _folds(100, 5, 1, positives))
    assert _folds(7, 3, 0, None).bincount().tolist() == [3, 2, 2]


def test_statistics_of_a_trial():
    trial = Trial({}, (1.0, 2.0, 4.0, 5.5))
    assert trial.mean == statistics.fmean(trial.scores) and trial.std == pytest.approx(statistics.stdev(trial.scores))
    assert trial.error == pytest.approx(statistics.stdev(trial.scores) / 2)


@pytest.mark.parametrize(("second", "n"), [((1.0, 1.4), 2), ((1.05, 1.4), 4)])
def test_enough_features(second, n):
    """The best, n = 4, has mean 1.1 and standard error 0.1: n = 2 is enough up to a mean of 1.2."""
    scores = {8: (1.15, 1.15), 2: second, 1: (9.0, 9.0), 4: (1.0, 1.2)}
    trials = [Trial({"n_features": k, "eta": eta}, s) for k, s in scores.items() for eta in (0, 1)]
    trials += [Trial({"n_features": k, "eta": 2}, (50.0, 50.0)) for k in scores]
    assert choose_n(Tuning(tuple(trials))) == n
    with pytest.raises(ValueError, match=r"grid has \['eta'\], but not n_features; pass"):
        choose_n(Tuning((Trial({"eta": 1}, (1.0, 2.0)),)))


def test_n_of_known_factors_is_found():
    """Three outputs, three independent dimensions: with two x-features one is missing, a fourth adds nothing."""
    Z = problem()[0]
    settings = SETTINGS | {"grid": {"n_features": [1, 2, 3, 4]}, "recipe": Recipe(steps=300, learning_rate=0.05)}
    assert choose_n(tune(Z, Z[:, :3], **settings)) == 3


# --- the Lasso's alpha


def test_alphas_are_scored_without_the_fold():
    Z, y, positives = problem()
    found = tune_alpha(Z, y, alphas=[0.3, 0.01, 0.001], folds=4, seed=2, positives=positives, progress=False)
    fold = _folds(120, 4, 2, positives)
    for trial in found.trials:
        for k, score in enumerate(trial.scores):
            rows = fold != k
            weight = Sampler(positives[rows], int(rows.sum()), Recipe(), torch.Generator()).row_weight
            made = lasso(Z[rows], y[rows], trial.settings["alpha"], weight=weight)
            off = Z[~rows] @ made.coefficients.T + made.intercept - y[~rows]
            assert score == pytest.approx(float(off.abs().mean()), rel=1e-5)
    assert found.chosen["alpha"] < 0.3
    other = tune_alpha(Z, y, alphas=[0.3], folds=4, seed=2, positives=positives, recipe=Recipe(positive_share=0.5))
    assert other.trials[0].scores != found.trials[0].scores


# --- the checkpoint


class Crash(Exception):
    pass


def crashing(after):
    """A score with the name of the usual one that fails after some calls."""
    calls = []

    def score(xnn, Z, y):
        if len(calls) == after:
            raise Crash
        calls.append(1)
        return held_out_f_reg(xnn, Z, y)

    score.__module__, score.__qualname__ = held_out_f_reg.__module__, held_out_f_reg.__qualname__
    return score, calls


@pytest.mark.parametrize("cut", [0, 7])
def test_a_resumed_run_equals_one_without_interruption(tmp_path, cut):
    Z, y, _ = problem()
    checkpoint = tmp_path / "new" / "tuning.jsonl"
    whole = tune(Z, y, **SETTINGS)
    with pytest.raises(Crash):
        tune(Z, y, checkpoint=checkpoint, score=crashing(5)[0], **SETTINGS)
    checkpoint.write_text(checkpoint.read_text()[: -cut or None])  # as a crash in the middle of a line leaves it
    score, calls = crashing(99)
    assert tune(Z, y, checkpoint=checkpoint, score=score, **SETTINGS) == whole
    assert len(calls) == 12 - 5 + (cut > 0)
    # All done: nothing is fitted, and the file stays as it is.
    before = checkpoint.read_text()
    assert tune(Z, y, checkpoint=str(checkpoint), score=crashing(0)[0], **SETTINGS) == whole
    assert checkpoint.read_text() == before


def test_the_checkpoint_keeps_problems_apart(tmp_path):
    Z, y, positives = problem()
    checkpoint = tmp_path / "tuning.jsonl"
    tune(Z, y, checkpoint=checkpoint, **SETTINGS)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    changes = [
        {"Z": Z + 1},
        {"y": y + 1},
        {"positives": positives},
        {"positives": torch.zeros(120, dtype=torch.bool).index_fill(0, order[:5], True)},
        {"positives": torch.zeros(120, dtype=torch.bool).index_fill(0, order[:9], True)},  # the same folds
        {"seed": 1},
        {"recipe": Recipe(steps=8)},
        {"autoencoder": partial(SRAE, hidden=(2,))},
        {"folds": 4},
    ]
    one = {"grid": {"n_features": [1], "eta": [0.5]}}
    for i, change in enumerate(changes):
        lines = len(checkpoint.read_text().splitlines())
        settings = SETTINGS | one | {"Z": Z, "y": y} | change
        score, calls = crashing(99)
        found = tune(checkpoint=checkpoint, score=score, **settings)
        assert len(calls) == settings["folds"], i
        assert found == tune(**settings)
        assert len(checkpoint.read_text().splitlines()) == lines + settings["folds"]
    score, calls = crashing(99)
    tune(Z, y, checkpoint=checkpoint, score=score, **SETTINGS)
    assert not calls
    assert {"problem", "settings", "fold", "score"} == set(json.loads(checkpoint.read_text().splitlines()[0]))


def test_alphas_resume(tmp_path):
    Z, y, _ = problem()
    checkpoint, settings = tmp_path / "alpha.jsonl", {"alphas": [0.1, 0.01], "folds": 2, "progress": False}
    whole = tune_alpha(Z, y, **settings)
    tune_alpha(Z, y, checkpoint=checkpoint, **settings | {"alphas": [0.1]})
    assert len(checkpoint.read_text().splitlines()) == 2
    assert tune_alpha(Z, y, checkpoint=checkpoint, **settings) == whole
    assert len(checkpoint.read_text().splitlines()) == 4


def test_the_number_of_dimensions_of_the_lasso():
    Z, y, _ = problem()
    found = tune(Z, y, **SETTINGS | {"grid": {"n_features": [1, 3, 6]}, "autoencoder": Lasso})
    assert choose_n(found) >= 3 and found.trials[0].mean > 2 * found.trials[1].mean


def test_arguments_are_checked():
    Z, y, _ = problem()
    for grid in ({}, {"beta": []}):
        with pytest.raises(ValueError, match="has no values; pass"):
            tune(Z, y, grid=grid)
    for folds in (1, 121):
        with pytest.raises(ValueError, match=f"{folds} folds do not fit 120 examples; pass 2 to 120"):
            tune(Z, y, **SETTINGS | {"folds": folds})


def test_a_fit_that_diverged_is_never_chosen():
    """NaN is neither above nor below a number, so that min would keep a first one."""
    nan = math.nan
    trials = {1: (nan, nan), 2: (1.0, 1.2), 3: (0.1, nan), 4: (1.05, 1.1)}
    found = Tuning(tuple(Trial({"n_features": n}, scores) for n, scores in trials.items()))
    assert found.chosen == {"n_features": 4} and choose_n(found) == 2
    for start in range(4):
        turned = Tuning(found.trials[start:] + found.trials[:start])
        assert turned.chosen == {"n_features": 4} and choose_n(turned) == 2
    nothing = Tuning(found.trials[:1])
    for ask in (lambda: nothing.best, lambda: nothing.chosen, lambda: choose_n(nothing), nothing.table):
        with pytest.raises(ValueError, match="all 1 combinations have a mean score of NaN"):
            ask()


def test_curve_and_table():
    scores = {(3, 0.1): (4.0, 6.0), (3, 1.0): (3.0, 5.0), (5, 0.1): (1.0, 2.0), (5, 1.0): (math.nan, 0.0)}
    found = Tuning(tuple(Trial({"n_features": n, "eta": eta}, s) for (n, eta), s in scores.items()))
    assert found.curve("n_features") == [(3, 4.0, pytest.approx(1)), (5, 1.5, pytest.approx(0.5))]
    assert found.curve("eta") == [(0.1, 1.5, pytest.approx(0.5)), (1.0, 4.0, pytest.approx(1))]
    rows = found.table().splitlines()
    assert rows[0] == "| n_features | eta | mean | standard error |" and len(rows) == 6
    assert rows[4] == "| **5** | **0.1** | **1.5** | **0.5** |" and rows[3] == "| 3 | 1.0 | 4 | 1 |"
    with pytest.raises(ValueError, match=r"'beta' is not in the grid; pass one of \['n_features', 'eta'\]"):
        found.curve("beta")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"grid": {"betta": [1.0]}}, r"unknown settings \['betta'\]; check the spelling: .*'beta'"),
        ({"grid": {"shape": [3]}}, r"unknown settings \['shape'\]"),
        ({"grid": {"beta": 1.0}}, r"list of values for beta, not 1.0; pass \[1.0\]"),
        ({"y": torch.zeros(30)}, r"Z has shape \(40, 3\) and y \(30,\), not \(M, ...\) and \(M, C\)"),
        ({"y": torch.zeros(30, 1)}, r"Z has shape \(40, 3\) and y \(30, 1\), not"),
        ({"positives": torch.ones(40).long()}, "not boolean of shape"),
        ({"positives": torch.ones(30).bool()}, r"torch.bool of shape \(30,\), not boolean of shape \(40,\)"),
    ],
)
def test_what_does_not_fit_is_told_before_any_fit(change, told):
    given = {"Z": torch.rand(40, 3), "y": torch.rand(40, 1), "grid": {"n_features": [1]}, "progress": False} | change
    with pytest.raises(ValueError, match=told):
        tune(given.pop("Z"), given.pop("y"), **given)
