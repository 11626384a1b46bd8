"""A small prepared study of the network in conftest.py: two data sets of two classes each, and no files but its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from captum_xnn.study import DatasetSettings, Material, StudyConfiguration, prepare
from captum_xnn.study._prepared import PreparedStudy

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


def made(
    folder: Path, explained: Any, *, shapes: Sequence[tuple[int, int]] = ((24, 24), (24, 24)), **settings: Any
) -> PreparedStudy:
    """A prepared study, with some settings of its own, that shows each data set's images in a shape."""
    chosen = replace(SETTINGS, **{"arms": (), **settings, "out": str(folder)})
    squares = material(explained)
    shown = [replace(squares, shown=F.interpolate(squares.shown, shape)) for shape in shapes]
    return prepare(chosen, shown[: len(chosen.datasets)])


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
