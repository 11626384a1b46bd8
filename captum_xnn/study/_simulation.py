r"""Simulate participants with known behaviour, who go through a study as its page does.

Behaviours sort an image into the group of its class with probability p, else into any group at random:

- ``random``: p = 0;  ``perfect``: p = 1;  ``noisy``: p in between, the same in all stages;
- ``features``: p is 0 without x-features, and with them images are grouped by the contributions that the page shows;
- ``paper``: p of each stage such that the mean purity is the paper's (section 4.1).

Power is the share of simulated studies of N people whose paired test finds the simulated difference.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from captum_xnn.metrics._paired import paired_test
from captum_xnn.metrics._purity import clustering_purity
from captum_xnn.study._prepared import PreparedDataset, PreparedStudy
from captum_xnn.study._protocol import ATTENTION, CONFIDENCE, PERFORMANCE, RATINGS
from captum_xnn.study._server import invite, make_app
from captum_xnn.study._store import StudyStore

__all__ = [
    "BEHAVIOURS",
    "PAPER",
    "Behaviour",
    "counts_of",
    "expected_purity",
    "paper_behaviour",
    "power",
    "simulate",
    "skill_for",
]

PAPER: dict[str, dict[str, float]] = {
    "cub": {"none": 0.56, "single": 0.62, "xnn": 0.72},
    "cel": {"none": 0.75, "single": 0.696, "xnn": 0.79},
}
"""Mean purities of the paper's main study, by data set and stage (section 4.1)."""


@dataclass(frozen=True)
class Behaviour:
    """Behaviour of a simulated participant."""

    skill: Callable[[str, str], float]
    """Probability of putting an image where it belongs, of stage (none, single, xnn) and data set."""
    by_features: bool = False
    """Whether, in the stage xnn, images are grouped by the contributions on the page instead."""
    attentive: bool = True
    std: float = 0.0
    """Standard deviation of people's own skill around it."""
    seconds: float = 40.0
    """Time for a batch, in the mean."""
    comments: str = ""
    confidence: Mapping[str, float] = field(default_factory=lambda: {"none": 2.0, "single": 3.0, "xnn": 4.0})
    """Mean point of confidence and performance, by stage."""


def _flat(skill: float) -> Behaviour:
    return Behaviour(lambda stage, dataset: skill)


BEHAVIOURS: dict[str, Behaviour] = {
    "random": _flat(0.0),
    "noisy": _flat(0.6),
    "perfect": _flat(1.0),
    "features": Behaviour(lambda stage, dataset: 0.0, by_features=True),
}
"""Behaviours by name."""


@cache
def expected_purity(skill: float, counts: tuple[int, ...], draws: int = 4000) -> float:
    """Compute the mean purity of people who place an image correctly with some probability, else at random.

    Args:
        skill: Probability of placing an image correctly.
        counts: Images of each class in a batch.
        draws: Simulated batches.

    Example:
        >>> expected_purity(1.0, (3, 3, 2, 2))
        1.0
    """
    generator = np.random.default_rng(0)
    classes = np.repeat(np.arange(len(counts)), counts)
    right = generator.random((draws, len(classes))) < skill
    groups = np.where(right, classes, generator.integers(0, len(counts), (draws, len(classes))))
    totals = sum(
        np.stack([((groups == g) & (classes == c)).sum(1) for c in range(len(counts))]).max(0)
        for g in range(len(counts))
    )
    return float(np.mean(totals) / len(classes))


def skill_for(purity: float, counts: tuple[int, ...]) -> float:
    """Compute the probability with which people of some mean purity place images correctly.

    Args:
        purity: The mean purity. Below that of random sorting the probability is 0.
        counts: Images of each class in a batch.

    Example:
        >>> 0.4 < skill_for(0.72, (3, 3, 2, 2)) < 0.7
        True
    """
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_purity(middle, counts) < purity else (low, middle)
    return (low + high) / 2


def counts_of(dataset: PreparedDataset) -> tuple[int, ...]:
    """Return the images of each class in a data set's batches, the most first.

    Args:
        dataset: Data set of a prepared study.
    """
    given = dataset.given(dataset.batches[0])
    return tuple(sorted((given.count(c) for c in dataset.classes), reverse=True))


def paper_behaviour(study: PreparedStudy, std: float = 0.1) -> Behaviour:
    """Make a behaviour with the paper's mean purities: those of CUB for the first data set, of CEL for the others.

    Args:
        study: The prepared study, whose batches decide how purity follows from skill.
        std: Standard deviation of people's own skill.
    """
    skills = {}
    for i, dataset in enumerate(study.datasets.values()):
        means = PAPER["cub" if i == 0 else "cel"]
        counts = counts_of(dataset)
        skills[dataset.name] = {stage: skill_for(mean, counts) for stage, mean in means.items()}
    return Behaviour(lambda stage, dataset: skills[dataset][stage], std=std)


def simulate(
    study: PreparedStudy,
    store: StudyStore,
    behaviour: Behaviour | Sequence[Behaviour],
    *,
    participants: int,
    seed: int = 0,
    client: Any = None,
) -> list[str]:
    """Let simulated participants go through a study, by the requests that the page makes, and return their tokens.

    Args:
        study: The prepared study.
        store: Its database.
        behaviour: Behaviour of all participants, or a behaviour for each in turn.
        participants: Number of participants.
        seed: Seed of the participants' behaviour.
        client: A client with Flask's ``get`` and ``post``; None makes a client of the application.
    """
    asking = make_app(study, store).test_client() if client is None else client
    behaviours = [behaviour] if isinstance(behaviour, Behaviour) else list(behaviour)
    tokens = invite(study, store, participants)
    for i, token in enumerate(tokens):
        _Person(study, behaviours[i % len(behaviours)], random.Random(f"{seed}/{i}"), asking, token).walk()
    return tokens


class _Person:
    """One simulated participant."""

    def __init__(
        self, study: PreparedStudy, behaviour: Behaviour, generator: random.Random, client: Any, token: str
    ) -> None:
        self.study, self.behaviour, self.generator = study, behaviour, generator
        self.client, self.token = client, token
        self.own = generator.gauss(0, behaviour.std)
        self.truth = {
            name: (dataset, facts["given"], facts["label"])
            for dataset in study.datasets.values()
            for name, facts in dataset.images.items()
        }
        self.practice = {image["id"]: image["given"] for image in study.facts["practice_batch"]["images"]}

    def walk(self) -> None:
        """Answer step after step to the end."""
        state = self._ask("claim")
        while "now" in state:
            now, step = state["now"], state["step"]
            data = self._answer(now)
            at = int(1000 * self.generator.uniform(0.5, 1.5) * (self.behaviour.seconds if "order" in now else 8))
            events = [
                {"id": f"{step}-{i}", "step": step, "kind": "move", "at": (i + 1) * at // 20, "data": {"to": [[n, g]]}}
                for i, (n, g) in enumerate(data.get("groups", {}).items())
            ]
            state = self._ask("answer", step=step, data=data, at=at, events=events)

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        answered = self.client.post(f"/s/{self.token}/{path}", json={"tab": "simulated", **body})
        if answered.status_code != 200:
            raise RuntimeError(f"the study refused a simulated answer: {answered.get_data(as_text=True)}")
        found: dict[str, Any] = answered.get_json()
        return found

    def _answer(self, now: Mapping[str, Any]) -> dict[str, Any]:
        kind = now["kind"]
        if kind == "consent":
            return {"agreed": True}
        if kind == "background":
            return {q["name"]: self.generator.choice([*q["options"], ""]) for q in now["questions"]}
        if kind == "practice":
            return {"groups": {i: self.practice[i] + 1 for i in now["order"]}}
        if kind == "sort":
            return {"groups": self._sorted(now)}
        if kind in ("agree", "distinguish", "predict"):
            return {"choices": {i: self._chosen(kind, now, i) for i in now["order"]}}
        if kind == "confidence":
            ratings: dict[str, Any] = {
                "confidence": {d["name"]: self._point(now["stage"], len(CONFIDENCE)) for d in now["datasets"]}
            }
            if now["attention"]:
                ratings["attention"] = ATTENTION if self.behaviour.attentive else (ATTENTION + 3) % len(CONFIDENCE)
            return ratings
        if kind == "final":
            agents = {a["name"]: self._point(a["stage"], len(PERFORMANCE)) for a in now["agents"]}
            return {
                "agents": agents, "difficulty": self.generator.randint(2, 6), "comments": self.behaviour.comments,
            }  # fmt: skip
        return {}

    def _point(self, stage: str, points: int) -> int:
        return min(max(round(self.generator.gauss(self.behaviour.confidence[stage], 1.0)), 0), points - 1)

    def _right(self, stage: str, dataset: str) -> bool:
        return self.generator.random() < min(max(self.behaviour.skill(stage, dataset) + self.own, 0.0), 1.0)

    def _sorted(self, now: Mapping[str, Any]) -> dict[str, int]:
        stage, ids = now["stage"], list(now["order"])
        dataset = self.truth[ids[0]][0]
        if self.behaviour.by_features and stage == "xnn":
            shown = self.client.get(f"/s/{self.token}/media/{now['media']}").get_json()["images"]
            shares = {image["id"]: [m["c"] for m in image["maps"]] for image in shown}
            return dict(zip(ids, _clustered(np.array([shares[i] for i in ids]), now["groups"]), strict=True))
        names = self.generator.sample(range(1, now["groups"] + 1), now["groups"])  # groups have no names
        return {
            i: names[dataset.classes.index(self.truth[i][1])]
            if self._right(stage, dataset.name)
            else self.generator.randint(1, now["groups"])
            for i in ids
        }

    def _chosen(self, kind: str, now: Mapping[str, Any], image: str) -> int:
        dataset, given, label = self.truth[image]
        right = self._right(now["stage"], dataset.name)
        if kind == "agree":
            options = range(len(RATINGS)) if not right else (2, 3) if given == label else (0, 1)
            return self.generator.choice(options)
        return dataset.classes.index(given) if right else self.generator.randrange(now["groups"])


def _clustered(points: np.ndarray[Any, Any], groups: int) -> list[int]:
    """Return the group of each point, from 1, by Ward's linkage."""
    from scipy.cluster.hierarchy import fcluster, linkage

    return [int(g) for g in fcluster(linkage(points, "ward"), groups, "maxclust")]


def power(
    skills: tuple[float, float],
    counts: tuple[int, ...],
    *,
    participants: int,
    std: float = 0.1,
    studies: int = 200,
    alpha: float = 0.05,
    seed: int = 0,
) -> float:
    """Return the share of simulated studies whose Wilcoxon test tells two stages apart.

    Args:
        skills: Probability of placing an image correctly in each of the two stages.
        counts: Images of each class in a batch.
        participants: People in each study. They sort one batch in each stage.
        std: Standard deviation of people's own skill.
        studies: Number of simulated studies. With 200 studies the share is known to about 0.07.
        alpha: Level of the test.
        seed: Seed of all random draws.

    Example:
        >>> power((0.2, 0.9), (3, 3, 2, 2), participants=20, studies=5)
        1.0
    """
    generator = np.random.default_rng(seed)
    classes = np.repeat(np.arange(len(counts)), counts)
    found = 0
    for _ in range(studies):
        own = generator.normal(0, std, participants)
        scores = []
        for skill in skills:
            right = generator.random((participants, len(classes))) < np.clip(skill + own, 0, 1)[:, None]
            groups = np.where(right, classes, generator.integers(0, len(counts), right.shape))
            scores.append([clustering_purity(row, classes.tolist()) for row in groups.tolist()])
        found += paired_test(scores[1], scores[0], seed=0, resamples=19).wilcoxon < alpha
    return found / studies
