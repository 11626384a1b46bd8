r"""Analyse an exported study: scores, exclusions, tests, a mixed model, and the numbers of the paper's Figures 4 and 5.

Conventions:
    A score is a trial's purity against the model's classes (sorting), or the share of right choices: of the model's
    answer (distinction, prediction), or of whether that answer is true (agreement). Scores are in [0, 1].
    A condition is a stage with the heatmap that it names: ``none``, ``single:DeepLift``, ``xnn``.

Tests:
    Two conditions that the same people went through are compared pair by pair
    (:func:`captum_xnn.metrics.paired_test`): mean difference with a bootstrap interval, Wilcoxon's signed ranks,
    a permutation of signs, rank-biserial correlation. Conditions of different people are compared by Mann and Whitney's
    test, with the same effect size for two groups. Holm's correction is over all comparisons of one measure.
    Tasks are never mixed: confidence in groups is compared with confidence in groups alone.
    The mixed model is linear: score ~ condition + data set, with effects of each participant and each batch
    (statsmodels ``MixedLM`` with crossed variance components, REML).

Exclusions were fixed when the study was prepared. Results without exclusions stand beside those with them.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.1;
    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from captum_xnn._files import read_json
from captum_xnn.metrics._paired import paired_test
from captum_xnn.metrics._purity import chance_purity, clustering_purity

__all__ = [
    "Difference",
    "Effect",
    "Exported",
    "Results",
    "Trial",
    "analyse",
    "compare",
    "mixed_model",
    "read_export",
    "scored",
]

Row = Mapping[str, str]


@dataclass(frozen=True)
class Exported:
    """A Psych-DS folder as :func:`captum_xnn.study._export.export` writes it."""

    design: Mapping[str, Any]
    tables: Mapping[str, Sequence[Row]]


class Trial(NamedTuple):
    """One batch of one participant, with its score."""

    participant: str
    arm: str
    task: str
    condition: str
    dataset: str
    batch: str
    part: int
    seconds: float
    score: float
    """In [0, 1]."""
    chance: float
    """Mean score of the same groups dealt at random, or of random choices."""


class Difference(NamedTuple):
    """The difference of two conditions a and b in some scores."""

    measure: str
    task: str
    dataset: str
    a: str
    b: str
    design: str
    """``paired``, or ``unpaired`` for different people."""
    n_a: int
    n_b: int
    mean_a: float
    mean_b: float
    difference: float
    """Mean of a less that of b."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    rank_p: float
    """p-value of Wilcoxon's signed ranks, or of Mann and Whitney's test."""
    permutation_p: float
    holm_p: float
    """The permutation's p-value after Holm's correction over the measure's comparisons."""
    effect: float
    """Rank-biserial correlation, in [-1, 1]."""


class Effect(NamedTuple):
    """One term of the mixed model."""

    task: str
    term: str
    estimate: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Results:
    """Everything that the page of findings shows."""

    design: Mapping[str, Any]
    participants: Sequence[Row]
    excluded: Mapping[str, tuple[str, ...]]
    """Why participants are left out, by participant."""
    trials: Sequence[Trial]
    """Those that count."""
    dropped_trials: int
    """Trials left out for their time."""
    confidence: Mapping[str, Mapping[str, Mapping[str, Sequence[int]]]]
    """Counts of each point, by task, data set and condition."""
    performance: Mapping[str, Mapping[str, Sequence[int]]]
    """Counts of each point, by task and condition."""
    difficulty: Sequence[int]
    comparisons: Sequence[Difference]
    comparisons_of_all: Sequence[Difference]
    """The same without exclusions."""
    effects: Sequence[Effect]
    variances: Mapping[str, Mapping[str, float]]
    """Variance of participants, batches and the rest, by task."""
    notes: Sequence[str]
    """Notes on the fits for the reader."""

    def conditions(self, task: str = "sort") -> list[str]:
        """Return the conditions of a task: none, then single ones, then xnn.

        Args:
            task: Such as ``sort``.
        """
        return _ordered({trial.condition for trial in self.trials if trial.task == task})


def read_export(folder: str | os.PathLike[str]) -> Exported:
    """Read a Psych-DS folder.

    Args:
        folder: The folder that :func:`captum_xnn.study._export.export` wrote.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    root = Path(folder)
    hint = "run `captum-xnn study export` first, and name the folder that it wrote"
    design = read_json(root / "materials" / "design.json", ValueError, hint)
    tables = {}
    for table in ("participants", "trials", "placements", "ratings"):
        files = sorted((root / "data").glob(f"study-*_description-{table}_data.csv"))
        if len(files) != 1:
            raise ValueError(f"{str(root / 'data')!r} has {len(files)} files of {table}, not one; {hint}")
        with files[0].open(encoding="utf-8", newline="") as file:
            tables[table] = list(csv.DictReader(file))
    return Exported(design, tables)


def analyse(exported: Exported, *, seed: int = 0, resamples: int = 9999) -> Results:
    """Return all results of a study.

    Args:
        exported: Answers of the study.
        seed: Seed of resampling and of the chance lines.
        resamples: Number of resamples of each test.

    Raises:
        ValueError: If no participant completed a trial.
    """
    rules = exported.design["exclusions"]
    participants = exported.tables["participants"]
    excluded = {p["participant"]: reasons for p in participants if (reasons := _reasons(p, rules))}
    every = scored(exported, seed=seed)
    if not every:
        raise ValueError("the export has no completed batches; wait for participants")
    kept = [t for t in every if t.participant not in excluded]
    trials = [t for t in kept if t.seconds >= rules["min_trial_seconds"]]
    ratings = [r for r in exported.tables["ratings"] if r["participant"] not in excluded]
    notes: list[str] = []
    effects: list[Effect] = []
    variances: dict[str, Mapping[str, float]] = {}
    for task in sorted({t.task for t in trials}):
        fitted = mixed_model([t for t in trials if t.task == task], notes)
        if fitted is not None:
            effects += fitted[0]
            variances[task] = fitted[1]
    points = {name: len(scale) for name, scale in exported.design["scales"].items()}
    options = {"seed": seed, "resamples": resamples}
    return Results(
        design=exported.design,
        participants=participants,
        excluded=excluded,
        trials=trials,
        dropped_trials=len(kept) - len(trials),
        confidence={
            task: _confidence(rows, points["confidence"]) for task, rows in _by_task(ratings, "confidence").items()
        },
        performance={
            task: _counts(rows, "performance", points["performance"])
            for task, rows in _by_task(ratings, "performance").items()
        },
        difficulty=_counts(ratings, "difficulty", points["difficulty"]).get("", [0] * points["difficulty"]),
        comparisons=_comparisons(exported, trials, ratings, **options),
        comparisons_of_all=_comparisons(exported, every, exported.tables["ratings"], **options)
        if len(every) > len(trials)
        else (),
        effects=effects,
        variances=variances,
        notes=notes,
    )


def _reasons(participant: Row, rules: Mapping[str, Any]) -> tuple[str, ...]:
    """List the preregistered rules by which a participant is excluded."""
    found = []
    if rules["unfinished"] and participant["finished"] != "1":
        found.append("unfinished")
    if rules["failed_attention"] and participant["attention"] == "0":
        found.append("failed attention check")
    practice = participant["practice_purity"]
    if practice and float(practice) < rules["min_practice_purity"]:
        found.append("practice batch")
    return tuple(found)


def _condition(row: Row) -> str:
    return f"{row['stage']}:{row['heatmap']}" if row["heatmap"] else row["stage"]


def _ordered(conditions: set[str]) -> list[str]:
    return sorted(conditions, key=lambda c: (("none", "single", "xnn").index(c.partition(":")[0]), c))


def scored(exported: Exported, *, seed: int = 0) -> list[Trial]:
    """Return every completed batch with its score, including participants who are excluded later.

    Args:
        exported: A study's answers.
        seed: Seed of the random groups for the chance line.
    """
    placed: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in exported.tables["placements"]:
        placed[row["participant"], row["part"], row["dataset"]].append(row)
    found = []
    for row in exported.tables["trials"]:
        rows = placed[row["participant"], row["part"], row["dataset"]]
        score, chance = _score(row, rows, seed)
        found.append(
            Trial(
                participant=row["participant"],
                arm=row["arm"],
                task=row["task"],
                condition=_condition(row),
                dataset=row["dataset"],
                batch=row["batch"],
                part=int(row["part"]),
                seconds=float(row["seconds"]),
                score=score,
                chance=chance,
            )
        )
    return found


def _score(trial: Row, rows: Sequence[Row], seed: int) -> tuple[float, float]:
    """Return a trial's score, and the score of chance."""
    if trial["task"] == "sort":
        groups, classes = [r["answer"] for r in rows], [r["given"] for r in rows]
        return clustering_purity(groups, classes), chance_purity(groups, classes, seed=seed, draws=100)
    if trial["task"] == "agreement":
        right = [(int(r["answer"]) >= 2) == (r["given"] == r["label"]) for r in rows]
        return float(np.mean(right)), 0.5
    right = [r["answer"] == r["given_place"] for r in rows]
    return float(np.mean(right)), 1 / int(trial["groups"])


def _by_task(ratings: Sequence[Row], question: str) -> dict[str, list[Row]]:
    """Return the ratings of a question, by task: being sure of groups is not being sure of predictions."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in ratings:
        if row["question"] == question:
            found[row["task"]].append(row)
    return dict(sorted(found.items()))


def _confidence(ratings: Sequence[Row], points: int) -> dict[str, dict[str, list[int]]]:
    datasets = sorted({r["dataset"] for r in ratings})
    return {d: _counts([r for r in ratings if r["dataset"] == d], "confidence", points) for d in datasets}


def _counts(ratings: Sequence[Row], question: str, points: int) -> dict[str, list[int]]:
    """Return how often each point was chosen, by condition."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for row in ratings:
        if row["question"] == question:
            found[_condition(row)][int(row["value"])] += 1
    order = _ordered(set(found) - {""}) + ([""] if "" in found else [])
    return {condition: [found[condition][p] for p in range(points)] for condition in order}


def _comparisons(
    exported: Exported, trials: Sequence[Trial], ratings: Sequence[Row], *, seed: int, resamples: int
) -> list[Difference]:
    """Return every comparison of two conditions, with Holm's correction over each measure of a task."""
    measured: dict[tuple[tuple[str, str], str], dict[str, dict[str, list[float]]]]
    measured = defaultdict(lambda: defaultdict(dict))
    for t in trials:
        name = ("purity" if t.task == "sort" else t.task, t.task)
        measured[name, t.dataset][t.condition].setdefault(t.participant, []).append(t.score)
    for r in ratings:
        if r["question"] in ("confidence", "performance"):
            where = measured[(r["question"], r["task"]), r["dataset"]]
            where[_condition(r)].setdefault(r["participant"], []).append(float(r["value"]))
    positions = {d["name"]: i for i, d in enumerate(exported.design["datasets"])}
    found: list[Difference] = []
    for name in dict.fromkeys(name for name, _ in measured):
        family = []
        for (measure, dataset), by_condition in sorted(measured.items(), key=lambda m: positions.get(m[0][1], -1)):
            if measure != name:
                continue
            means = {c: {p: float(np.mean(v)) for p, v in people.items()} for c, people in by_condition.items()}
            for b, a in combinations(_ordered(set(means)), 2):
                one = compare(means[a], means[b], seed=seed, resamples=resamples)
                if one is not None:
                    family.append(one._replace(measure=name[0], task=name[1], dataset=dataset, a=a, b=b))
        corrected = _holm([one.permutation_p for one in family])
        found += [one._replace(holm_p=p) for one, p in zip(family, corrected, strict=True)]
    return found


def compare(
    a: Mapping[str, float], b: Mapping[str, float], *, seed: int = 0, resamples: int = 9999
) -> Difference | None:
    """Compare the scores of people in two conditions; return None with too few people.

    Args:
        a: Score of each participant in one condition.
        b: Score of each participant in the other. If most people are in both, their scores are compared pair by pair.
        seed: Seed of the resampling.
        resamples: Number of resamples of the interval and of the permutation test.

    Example:
        >>> found = compare({"p1": 0.8, "p2": 0.9, "p3": 0.7}, {"p1": 0.6, "p2": 0.6, "p3": 0.6})
        >>> found.design, round(found.difference, 2), found.effect
        ('paired', 0.2, 1.0)
    """
    both = [p for p in a if p in b]
    if 2 * len(both) >= min(len(a), len(b)):
        if len(both) < 2:
            return None
        first, second = [a[p] for p in both], [b[p] for p in both]
        found = paired_test(first, second, seed=seed, resamples=resamples)
        return Difference(
            "", "", "", "", "", "paired", len(both), len(both), float(np.mean(first)), float(np.mean(second)),
            found.difference, found.low, found.high, found.wilcoxon, found.permutation, found.permutation, found.effect,
        )  # fmt: skip
    if min(len(a), len(b)) < 2:
        return None
    return _unpaired(np.array(list(a.values())), np.array(list(b.values())), seed, resamples)


def _unpaired(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], seed: int, resamples: int) -> Difference:
    """Return the comparison of different people."""
    from scipy.stats import mannwhitneyu, permutation_test

    generator = np.random.default_rng(seed)
    drawn = [
        x[generator.integers(0, len(x), (resamples, len(x)))].mean(1) for x in (a, b)
    ]  # the bootstrap's means of either group
    low, high = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
    ranks = mannwhitneyu(a, b)
    permuted = permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        vectorized=True,
        n_resamples=resamples,
        random_state=np.random.default_rng(seed),
    )
    effect = 2 * float(ranks.statistic) / (len(a) * len(b)) - 1
    p = float(permuted.pvalue)
    return Difference(
        "", "", "", "", "", "unpaired", len(a), len(b), float(a.mean()), float(b.mean()), float(a.mean() - b.mean()),
        float(low), float(high), float(ranks.pvalue), p, p, effect,
    )  # fmt: skip


def _holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[int(i)] = largest
    return corrected


def mixed_model(
    trials: Sequence[Trial], notes: list[str] | None = None
) -> tuple[list[Effect], dict[str, float]] | None:
    """Return the effects and variances of a linear mixed model of one task's scores, None where it cannot be fitted.

    Args:
        trials: Trials of one task.
        notes: Receives a sentence where the fit is doubtful.

    Raises:
        ImportError: If statsmodels is missing.
    """
    try:
        import pandas
        from statsmodels.formula.api import mixedlm
    except ImportError as error:
        raise ImportError(
            "the mixed model needs statsmodels, which is not installed; run `pip install captum-xnn[study]`"
        ) from error
    notes = [] if notes is None else notes
    if not trials:
        return None
    task = trials[0].task
    conditions = _ordered({t.condition for t in trials})
    people = {t.participant for t in trials}
    if len(conditions) < 2 or len(people) < 3:
        notes.append(f"No mixed model of {task}: it needs two conditions and three participants.")
        return None
    frame = pandas.DataFrame(trials)
    frame["batch"] = frame["dataset"] + "/" + frame["batch"]
    frame["everybody"] = 1
    formula = f"score ~ C(condition, Treatment({conditions[0]!r}))"
    if frame["dataset"].nunique() > 1:
        formula += " + C(dataset)"
    components = {"participant": "0 + C(participant)", "batch": "0 + C(batch)"}
    model = mixedlm(formula, frame, groups="everybody", vc_formula=components, re_formula="0")
    fitted = _fitted(model, task, notes)
    if fitted is None:
        return None
    variances = {name: float(v) for name, v in zip(model.exog_vc.names, fitted.vcomp, strict=True)}
    return _effects(fitted, task, conditions[0]), {**variances, "residual": float(fitted.scale)}


def _fitted(model: Any, task: str, notes: list[str]) -> Any:
    """Fit the mixed model of a task; note where the fit is doubtful, and return None where it fails."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            # Gradient methods stop early where a variance is about 0, as that of batches often is; Powell's does not.
            fitted = model.fit(reml=True, method="powell")
        except (np.linalg.LinAlgError, ValueError) as error:
            notes.append(f"The mixed model of {task} could not be fitted ({error}).")
            return None
    if not fitted.converged:
        notes.append(f"The mixed model of {task} did not converge well: trust the paired tests rather.")
    elif any("boundary" in str(w.message).lower() for w in warned):
        notes.append(f"In the mixed model of {task} a variance of participants or batches is estimated as about 0.")
    return fitted


def _effects(fitted: Any, task: str, reference: str) -> list[Effect]:
    """Return the fixed effects of a fitted mixed model, each against the reference condition."""
    intervals = fitted.conf_int()
    return [
        Effect(
            task, _term(name, reference), float(fitted.fe_params[name]), float(intervals.loc[name, 0]),
            float(intervals.loc[name, 1]), float(fitted.pvalues[name]),
        )
        for name in fitted.fe_params.index
    ]  # fmt: skip


def _term(name: str, reference: str) -> str:
    """Return the name of a term of the formula."""
    if name == "Intercept":
        return "mean of the reference"
    level = name.partition("[T.")[2].rstrip("]")
    return f"{level} against {reference}" if name.startswith("C(condition") else f"data set {level}"
