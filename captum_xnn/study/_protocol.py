"""Each participant's steps, and the answers that each step takes.

Conventions:
    Participants have slots 0, 1, 2, ... in the order in which links are made. A slot's arm, order of stages, order of
    data sets and batches follow from the study's seed alone.

Counterbalancing:
    A cell is an arm, an order of its stages and an order of the data sets. Slots go through all cells in blocks, each
    in a random order of its own: after every block all cells have as many participants. Data sets alternate in a stage
    (CUB, CEL, CUB, CEL, ...), as in the paper. Each stage shows another batch, and over as many participants as there
    are batches each stage shows every batch once.

Differs from the paper:
    The paper drew batches with replacement, so a participant could see a batch twice.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.1.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from captum_xnn.study._prepared import PreparedStudy

__all__ = [
    "ATTENTION",
    "BACKGROUND",
    "CONFIDENCE",
    "DIFFICULTY",
    "EVENTS",
    "PERFORMANCE",
    "RATINGS",
    "cells",
    "check_answer",
    "plan",
    "public_step",
]

CONFIDENCE = ("Zero", "Very Low", "Low", "Mediocre", "High", "Very High", "100%")
"""The paper's seven points, the least first."""
PERFORMANCE = ("Very Poor", "Poor", "Slightly Poor", "Neutral or N/A", "Slightly Good", "Good", "Very Good")
"""The paper's seven points, the least first."""
DIFFICULTY = tuple(range(8))
"""0 to 7, the hardest last."""
RATINGS = ("Surely wrong", "Probably wrong", "Probably right", "Surely right")
"""Four points of the agreement task."""
ATTENTION = 1
"""The point of :data:`CONFIDENCE` that the attention check asks for."""
BACKGROUND: dict[str, tuple[str, tuple[str, ...]]] = {
    "age": ("How old are you?", ("18-30", "31-40", "41-50", "51-60", "over 60")),
    "gender": ("What is your gender?", ("Female", "Male", "Another")),
    "computing": ("How many courses in computer science have you taken?", ("None", "1", "2", "3", "4 or more")),
    "ai": ("How many courses in artificial intelligence have you taken?", ("None", "1", "2", "3", "4 or more")),
    "colour": ("Do you see colours as most people do?", ("Yes", "No", "I am not sure")),
}
"""Optional questions, after the paper's appendix I.2."""
EVENTS = ("open", "move", "undo", "select", "toggle", "inspect", "compare", "choose", "fill", "hide", "show")
"""Kinds of events that a page may send."""

_COMMENT = 5000
_KINDS = {"sort": "sort", "agreement": "agree", "distinction": "distinguish", "prediction": "predict"}
# A fixed order of data sets has more permutations than participants where there are many; then it is rotated.
_PERMUTED = 3


def cells(study: PreparedStudy) -> list[tuple[int, tuple[str, ...], tuple[str, ...]]]:
    """List all cells of the design: index of the arm, stages in order, data sets in order.

    Args:
        study: The prepared study.
    """
    found = []
    names = list(study.datasets)
    if len(names) <= _PERMUTED:
        dataset_orders = list(permutations(names))
    else:
        dataset_orders = [tuple(names[i:] + names[:i]) for i in range(len(names))]
    for number, arm in enumerate(study.arms):
        first = tuple(s for s in arm["stages"] if s == "none" and study.facts["none_first"])
        others = [s for s in arm["stages"] if s not in first]
        found += [(number, (*first, *order), sets) for order in permutations(others) for sets in dataset_orders]
    return found


def plan(study: PreparedStudy, slot: int) -> dict[str, Any]:
    """Return the arm, the cell and all steps of a participant.

    Args:
        study: The prepared study.
        slot: Index of the participant.
    """
    facts, all_cells = study.facts, cells(study)
    seed, block = facts["seed"], slot // len(all_cells)
    order = random.Random(f"{seed}/cells/{block}").sample(range(len(all_cells)), len(all_cells))
    cell = order[slot % len(all_cells)]
    number, stages, datasets = all_cells[cell]
    arm = study.arms[number]
    shuffled = random.Random(f"{seed}/images/{slot}")
    steps: list[dict[str, Any]] = [{"kind": "consent"}]
    if facts["background"]:
        steps.append({"kind": "background"})
    if facts["practice"]:
        ids = [image["id"] for image in facts["practice_batch"]["images"]]
        steps.append(
            {
                "kind": "practice",
                "stage": "practice",
                "groups": facts["practice_batch"]["groups"],
                "media": study.media("practice"),
                "order": shuffled.sample(ids, len(ids)),
            }
        )
    # The check stands after the second stage: everybody is used to the question by then.
    checked = min(1, len(stages) - 1) if facts["attention"] else None
    for part, stage in enumerate(stages):
        here = {"stage": stage, "task": arm["task"], "part": part + 1, "parts": len(stages)}
        steps.append({"kind": "intro", **here})
        for name in datasets:
            batch = _batch(study, slot, name, arm["stages"].index(stage))
            steps.append({**_trial(study, arm["task"], stage, name, batch, shuffled), **here})
        steps.append({"kind": "confidence", **here, "datasets": list(datasets), "attention": part == checked})
    seen_in = {stage: part + 1 for part, stage in enumerate(stages) if stage != "none"}
    final = {"kind": "final", "task": arm["task"], "agents": list(seen_in), "agent_parts": list(seen_in.values())}
    steps.append(final)
    return {"arm": arm["name"], "cell": cell, "stages": list(stages), "datasets": list(datasets), "steps": steps}


def _batch(study: PreparedStudy, slot: int, dataset: str, stage: int) -> int:
    """Return the index of the batch that a participant sees in a stage, by the stage's index in its arm."""
    count = len(study.datasets[dataset].batches)
    order = random.Random(f"{study.facts['seed']}/batches/{dataset}/{slot // count}").sample(range(count), count)
    return order[(slot + stage) % count]


def _trial(
    study: PreparedStudy, task: str, stage: str, dataset: str, batch: int, generator: random.Random
) -> dict[str, Any]:
    facts = study.datasets[dataset]
    ids = list(facts.batches[batch])
    step = {
        "kind": _KINDS[task],
        "dataset": dataset,
        "title": facts.title,
        "batch": batch,
        "groups": len(facts.classes),
        "media": study.media(f"{dataset}/{batch}/{stage}/{task}"),
        "order": generator.sample(ids, len(ids)),
    }
    if task != "sort":
        step["examples"] = study.media(f"{dataset}/examples/{stage if task == 'prediction' else 'none'}/{task}")
    return step


def public_step(study: PreparedStudy, step: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a step that the participant's browser may know.

    Args:
        study: The prepared study.
        step: One of a plan's steps.
    """
    shown = ("kind", "part", "parts", "title", "groups", "media", "examples", "order", "task", "attention")
    public = {name: step[name] for name in shown if name in step}
    kind = step["kind"]
    if "stage" in step:
        public["stage"] = step["stage"].partition(":")[0]
    if kind == "consent":
        public |= {"paragraphs": list(study.facts["consent"]), "contact": study.facts["contact"]}
    if kind == "background":
        public["questions"] = [{"name": n, "text": t, "options": list(o)} for n, (t, o) in BACKGROUND.items()]
    if kind == "confidence":
        public["datasets"] = [{"name": n, "title": study.datasets[n].title} for n in step["datasets"]]
        public |= {"options": list(CONFIDENCE), "check": CONFIDENCE[ATTENTION]}
    if kind == "agree":
        public["options"] = list(RATINGS)
    if kind == "final":
        public["agents"] = [
            # People know two agents with one heatmap each by the part in which they met them.
            {"name": stage, "stage": stage.partition(":")[0], "part": part}
            for stage, part in zip(step["agents"], step["agent_parts"], strict=True)
        ]
        public |= {"options": list(PERFORMANCE), "difficulty": list(DIFFICULTY)}
    return public


def check_answer(step: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """Check an answer to a step, and return it.

    Args:
        step: One of a plan's steps.
        data: The data that a browser sent, of any kind.

    Raises:
        ValueError: If the data are not an answer to the step.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"the answer is a {type(data).__name__}, not an object")
    kind = step["kind"]
    if kind == "consent":
        if data.get("agreed") is not True:
            raise ValueError("the participant did not consent; agree, or close the page")
        return {"agreed": True}
    if kind == "background":
        checked = {}
        for name, (_, options) in BACKGROUND.items():
            value = data.get(name, "")
            if value != "" and value not in options:
                raise ValueError(f"the answer for {name} is not one of its options")
            checked[name] = value
        return checked
    if kind in ("practice", "sort"):
        return {"groups": _numbers(data.get("groups"), step["order"], 1, step["groups"], "a group for every image")}
    if kind in ("agree", "distinguish", "predict"):
        last = len(RATINGS) if kind == "agree" else step["groups"]
        return {"choices": _numbers(data.get("choices"), step["order"], 0, last - 1, "a choice for every image")}
    if kind == "confidence":
        checked = {
            "confidence": _numbers(data.get("confidence"), step["datasets"], 0, len(CONFIDENCE) - 1, "confidence")
        }
        if step["attention"]:
            checked["attention"] = _number(data.get("attention"), 0, len(CONFIDENCE) - 1, "the point that is named")
        return checked
    if kind == "final":
        comments = data.get("comments", "")
        if not isinstance(comments, str) or len(comments) > _COMMENT:
            raise ValueError(f"comments have more than {_COMMENT} characters; shorten them")
        agents = _numbers(data.get("agents", {}), step["agents"], 0, len(PERFORMANCE) - 1, "a rating of each agent")
        difficulty = _number(data.get("difficulty"), DIFFICULTY[0], DIFFICULTY[-1], "a difficulty")
        return {"agents": agents, "difficulty": difficulty, "comments": comments.replace("\0", "")}
    return {}


def _numbers(given: Any, names: Sequence[str], low: int, high: int, what: str) -> dict[str, int]:
    if not isinstance(given, Mapping) or set(given) != set(names):
        raise ValueError(
            f"give {what}; the answer has {len(given) if isinstance(given, Mapping) else 'none'} of {len(names)}"
        )
    return {name: _number(given[name], low, high, what) for name in names}


def _number(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"give {what} as a whole number from {low} to {high}, not {str(value)[:40]!r}")
    return value
