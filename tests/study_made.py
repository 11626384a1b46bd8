"""A small prepared study of the network in conftest.py: two data sets of two classes each, and no files but its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from captum_xnn.study.configuration import DatasetSettings, StudyConfiguration
from captum_xnn.study.preparation import Material, prepare
from captum_xnn.study.prepared import PreparedStudy

SETTINGS = StudyConfiguration(
    datasets=tuple(DatasetSettings(name, "-", "-", (1, 2), title=f"The {name}") for name in ("gulls", "cells")),
    title="Bars",
    batches=3,
    batch_images=5,
    heatmaps=("InputXGradient",),
    contact="study@example.org",
)


def material(explained: Any, labels: bool = True) -> Material:
    """The network's images, of which it is right about all."""
    xnn, images, _ = explained
    names = tuple(f"bar {i}.png" for i in range(len(images)))
    true = tuple(i % 3 for i in range(len(images))) if labels else None
    return Material(xnn, images, images, names, ("green", "blue"), true)


def made(folder: Path, explained: Any, **settings: Any) -> PreparedStudy:
    """A prepared study, with some settings of its own."""
    chosen = replace(SETTINGS, **{"arms": (), **settings, "out": str(folder)})
    return prepare(chosen, [material(explained)] * len(chosen.datasets))


def answer_to(step: Any, group: int = 1, comments: str = "") -> dict[str, Any]:
    """A complete answer to a step of a plan."""
    kind = step["kind"]
    if kind == "consent":
        return {"agreed": True}
    if kind in ("practice", "sort"):
        return {"groups": dict.fromkeys(step["order"], group)}
    if kind in ("agree", "distinguish", "predict"):
        return {"choices": dict.fromkeys(step["order"], 1)}
    if kind == "confidence":
        said: dict[str, Any] = {"confidence": dict.fromkeys(step["datasets"], 3)}
        return {**said, "attention": 1} if step["attention"] else said
    if kind == "final":
        return {"agents": dict.fromkeys(step["agents"], 5), "difficulty": 4, "comments": comments}
    return {}


def by_hand(folder: Path, *, classes: int = 4, **facts: Any) -> PreparedStudy:
    """A prepared study without a model: two data sets, 5 batches of 10 images, contributions that tell the class."""
    datasets, media = [], {}
    (folder / "media").mkdir(parents=True, exist_ok=True)
    pixel = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
    arms = facts.get("arms") or [{"name": "one", "stages": ["none", "single", "xnn"], "task": "sort"}]
    for name in ("cub", "cel"):
        images, batches = [], []
        for b in range(5):
            ids = []
            for i in range(10):
                given = i % classes
                contributions = [3.0 if k == given else 0.1 * (i + 1) for k in range(classes)]
                images.append(
                    {
                        "id": f"{name}{b}{i}", "source": f"{b}{i}.png", "given": given, "contributions": contributions,
                        # The model is wrong about every fifth image.
                        "label": given if i % 5 else (given + 1) % classes,
                        "bias": 0.0, "surrogate": sum(contributions), "prediction": sum(contributions),
                    }
                )  # fmt: skip
                ids.append(images[-1]["id"])
            batches.append(ids)
            for arm in arms:
                for stage in arm["stages"]:
                    key = f"{name}/{b}/{stage}/{arm['task']}"
                    media[key] = f"m-{key.replace('/', '-').replace(':', '')}.json"
                    media[f"{name}/examples/{stage}/{arm['task']}"] = media[f"{name}/examples/none/{arm['task']}"] = (
                        "m-e.json"
                    )
                    shown = []
                    for image in images[-10:]:
                        total = sum(image["contributions"])
                        maps = (
                            [{"src": pixel, "c": c / total} for c in image["contributions"]] if stage == "xnn" else []
                        )
                        shown.append({"id": image["id"], "src": pixel, "pixels": False, "maps": maps})
                    (folder / "media" / media[key]).write_text(json.dumps({"images": shown}))
        datasets.append(
            {
                "name": name, "title": name.upper(), "classes": list(range(classes)), "images": images,
                "class_names": [f"class {c}" for c in range(classes)], "batches": batches, "examples": [],
            }
        )  # fmt: skip
    practice = [{"id": f"p{i}", "given": i % 3} for i in range(6)]
    (folder / "media" / "m-e.json").write_text('{"images": []}')
    media["practice"] = "m-e.json"
    made_facts = {
        "title": "By hand", "consent": ["Do."], "contact": "", "seed": 0, "none_first": True, "background": True,
        "practice": True, "attention": True, "arms": arms, "practice_batch": {"groups": 3, "images": practice},
        "exclusions": {
            "unfinished": True, "failed_attention": True, "min_practice_purity": 0.8, "min_trial_seconds": 0,
        },
        "datasets": datasets, "media": media,
    }  # fmt: skip
    study = PreparedStudy.of(folder, {**made_facts, **facts})
    study.write()
    return PreparedStudy.read(folder)
