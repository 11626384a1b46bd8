"""A prepared study: a folder with ``study.json`` for the experimenter, and the media that participants see.

``study.json`` holds the model's answers, the contributions and the names of the images. Participants never see it.
Media are JSON files with pictures as data URIs. Their names are random, so requests do not reveal a class.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_xnn._files import Format, replace_file

__all__ = ["MEDIA_FOLDER", "STUDY_FILE", "PreparedDataset", "PreparedStudy"]

STUDY_FILE = "study.json"
MEDIA_FOLDER = "media"
_VERSION = 1
_FACTS = (
    "title", "consent", "contact", "seed", "none_first", "background", "practice", "attention", "arms", "exclusions",
    "practice_batch", "datasets", "media",
)  # fmt: skip
_FORMAT = Format(
    "a study",
    {"captum_xnn": "study"},
    ("version", _VERSION),
    _FACTS,
    ValueError,
    "run `captum-xnn study prepare --config study.toml`, or name the folder that it wrote",
)


@dataclass(frozen=True)
class PreparedDataset:
    """One data set of a prepared study."""

    name: str
    title: str
    classes: tuple[int, ...]
    """The model's outputs, one for each group."""
    class_names: tuple[str, ...]
    images: Mapping[str, Mapping[str, Any]]
    """By id: ``source``, ``given`` (the model's class), ``label`` or None, and the numbers of the explanation."""
    batches: tuple[tuple[str, ...], ...]
    """Ids of the images of each batch."""
    examples: tuple[str, ...]
    """Ids of the images that tasks other than sorting show beforehand, with their classes."""

    def given(self, ids: Sequence[str]) -> list[int]:
        """Return the model's classes of some images.

        Args:
            ids: Images of this data set.
        """
        return [int(self.images[i]["given"]) for i in ids]


@dataclass(frozen=True)
class PreparedStudy:
    """Everything about a study that was fixed before its first participant."""

    folder: Path
    facts: Mapping[str, Any]
    """The contents of ``study.json``."""
    datasets: Mapping[str, PreparedDataset]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> PreparedStudy:
        """Read a prepared study.

        Args:
            folder: The folder that :func:`~captum_xnn.study.prepare` wrote.

        Raises:
            ValueError: If the folder holds no study, or a study of another version.
        """
        return cls.of(Path(folder), _FORMAT.read(Path(folder) / STUDY_FILE))

    @classmethod
    def of(cls, folder: Path, facts: Mapping[str, Any]) -> PreparedStudy:
        """Build a study from the contents of its file.

        Args:
            folder: Folder of its media.
            facts: Contents of ``study.json``.
        """
        datasets = {
            d["name"]: PreparedDataset(
                name=d["name"],
                title=d["title"],
                classes=tuple(d["classes"]),
                class_names=tuple(d["class_names"]),
                images={image["id"]: image for image in d["images"]},
                batches=tuple(map(tuple, d["batches"])),
                examples=tuple(d["examples"]),
            )
            for d in facts["datasets"]
        }
        return cls(folder, facts, datasets)

    def write(self) -> Path:
        """Write ``study.json`` into the folder."""
        path = self.folder / STUDY_FILE
        text = json.dumps({"captum_xnn": "study", "version": _VERSION, **self.facts}, indent=1, allow_nan=False)
        replace_file(path, text.encode())
        return path

    @property
    def arms(self) -> list[Mapping[str, Any]]:
        """The arms, each with name, stages and task."""
        return list(self.facts["arms"])

    def media(self, key: str) -> str:
        """Return the name of a media file.

        Args:
            key: What it shows, such as ``gulls/0/xnn/sort``.
        """
        return str(self.facts["media"][key])

    def media_path(self, name: str) -> Path | None:
        """Return the path of a media file; None if the study has no such file.

        Args:
            name: The name that a browser asks for, any text.
        """
        return self.folder / MEDIA_FOLDER / name if name in self._names else None

    @property
    def _names(self) -> frozenset[str]:
        return frozenset(self.facts["media"].values())
