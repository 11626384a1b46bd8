"""FunnyBirds: rendered birds of five parts, with images that lack some parts, so the true effect of a part is known.

The official archive unpacks to a folder with ``classes.json`` and ``parts.json``, and for each split
``dataset_test.json``, ``test/CLASS/NUMBER.png``, ``test_part_map/CLASS/NUMBER.png`` and
``test_interventions/CLASS/NUMBER/body_PARTS_KEPT.png``. The training split has images only. This module downloads
nothing.

Conventions:
    N images (3, H, W) in [0, 1]; official ones have 256 x 256 pixels. P parts, in the order of ``parts.json``: beak,
    eye, foot, tail, wing. Both eyes are one part, and so are both feet and both wings. A file's number is the row of
    its image in ``dataset_test.json``, or the entry's ``image_idx`` if it has one.

Smaller copies:
    Images may be ``.png`` or ``.webp``. A split may lie in ``handed/`` below the root, and have some of the images
    only. A part map may have a palette. ``drops.csv`` beside a split holds the drop of one network's logit without each
    part.

Reference:
    Hesse, Schaub-Meyer, Roth, "FunnyBirds: A Synthetic Vision Dataset for a Part-Based Analysis of Explainable AI
    Methods", 2023.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_xnn._files import read_json
from captum_xnn.errors import DatasetError

__all__ = ["FunnyBirds", "FunnyBirdsSample", "PartDrops"]

_REMEDY = (
    "unpack FunnyBirds.zip once more and pass the folder FunnyBirds, with classes.json and dataset_test.json in it"
)
# The official colours of part maps. The body and the background have other colours.
_COLOURS = {
    (255, 255, 0): "beak",
    (255, 255, 253): "eye",
    (255, 255, 254): "eye",
    (255, 0, 1): "foot",
    (255, 0, 2): "foot",
    (0, 0, 255): "tail",
    (0, 255, 1): "wing",
    (0, 255, 2): "wing",
}
_SUFFIXES = (".png", ".webp")


class FunnyBirdsSample(NamedTuple):
    """One image with its class, or several along a first dimension N, joined by a DataLoader."""

    image: Tensor
    """(3, H, W) in [0, 1], or the result of the data set's transform."""
    label: Tensor
    """0-based class, int64, ()."""
    number: Tensor
    """Row of the image in its data set, int64, ()."""


class PartDrops(NamedTuple):
    """Drops of the true class's logit in one network without each part, from ``drops.csv``."""

    logit: Tensor
    """Logit of the whole bird, (N,), float32."""
    drops: Tensor
    """Logit of the whole bird minus logit without the part, (N, P), float32."""
    predicted: Tensor
    """Class with the highest logit, (N,), int64."""
    pixels: Tensor
    """Visible pixels of each part, (N, P), int64."""


class FunnyBirds(Dataset[FunnyBirdsSample]):
    """Read the images of FunnyBirds, and part masks and images without parts if the split has them.

    Args:
        root: The unpacked folder.
        split: The official training or test images.
        transform: Applied to each image (3, H, W) in [0, 1], such as a normalisation; must not move its pixels.

    Raises:
        DatasetError: If a file is missing, cut short, or does not fit the others. Missing images raise at once, damaged
            images when they are read.
        ValueError: If the split does not exist.

    Example:
        ``DataLoader(FunnyBirds("FunnyBirds", "train"), batch_size=32)``
    """

    part_names: list[str]
    """Names of the P parts."""
    classes: Tensor
    """Variant of each part of every class, (classes, P), int64."""
    labels: Tensor
    """0-based class of every image, (N,), int64."""
    numbers: Tensor
    """Official number of every image, (N,), int64."""
    present: Tensor
    """Whether the image was rendered with the part, (N, P), bool. Half of the training birds lack some parts."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Literal["train", "test"],
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}; pass 'train' or 'test', as FunnyBirds has no other splits")
        self.root, self.split, self.transform = Path(root), split, transform
        listed = f"dataset_{split}.json"
        handed = self.root / "handed"
        self.folder = handed if (handed / listed).is_file() and not (self.root / listed).is_file() else self.root
        self.part_names = list(_json(self.root / "parts.json", dict))
        self.classes = self._classes()
        entries = _json(self.folder / listed, list)
        try:
            self.labels = torch.tensor([entry["class_idx"] for entry in entries])
            self.numbers = torch.tensor([entry.get("image_idx", i) for i, entry in enumerate(entries)])
            self.present = torch.tensor(
                [[entry[f"{part}_model"] != "placeholder" for part in self.part_names] for entry in entries]
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError(
                f"each entry of {self.folder / listed} must have class_idx and the model of every part "
                f"({type(error).__name__}: {error}); {_REMEDY}"
            ) from error
        unknown = self.labels[(self.labels < 0) | (self.labels >= len(self.classes))]
        if len(unknown):
            raise DatasetError(
                f"{self.folder / listed} has class {int(unknown[0])}, and classes.json has 0 to "
                f"{len(self.classes) - 1}; {_REMEDY}"
            )
        self.files = self._files()

    def _classes(self) -> Tensor:
        """Read the variants of each class's parts, (classes, P)."""
        path = self.root / "classes.json"
        try:
            entries = sorted(_json(path, list), key=lambda entry: int(entry["class_idx"]))
            if [entry["class_idx"] for entry in entries] != list(range(len(entries))):
                raise ValueError("class_idx are not 0, 1, ...")
            return torch.tensor([[entry["parts"][part] for part in self.part_names] for entry in entries])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(
                f"each entry of {path} must have class_idx and a variant of {', '.join(self.part_names)} "
                f"({type(error).__name__}: {error}); {_REMEDY}"
            ) from error

    def _files(self) -> list[Path]:
        """Find the file of every image; list each folder once."""
        folders: dict[Path, set[str]] = {}
        found, missing = [], []
        for label, number in zip(self.labels.tolist(), self.numbers.tolist(), strict=True):
            folder = self.folder / self.split / str(label)
            if folder not in folders:
                folders[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
            names = [f"{number:06d}{suffix}" for suffix in _SUFFIXES]
            name = next((name for name in names if name in folders[folder]), None)
            if name is None:
                missing.append(folder / names[0])
            else:
                found.append(folder / name)
        if missing:
            raise DatasetError(
                f"{len(missing)} of {len(self)} images are missing in {self.folder / self.split}, such as "
                f"{missing[0]}; {_REMEDY}"
            )
        return found

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> FunnyBirdsSample:
        image = self._seen(_pixels(self.files[index]))
        return FunnyBirdsSample(image, self.labels[index], torch.tensor(index))

    def masks(self, index: int) -> Tensor:
        """Read the pixels of each part of an image, (P, H, W), bool; all False for a hidden part.

        Args:
            index: Row of the image in this data set.

        Raises:
            DatasetError: If the split has no part maps, or the part map of this image cannot be read.
        """
        path = self._beside(f"{self.split}_part_map", f"{int(self.numbers[index]):06d}", index)
        pixels = torch.from_numpy(_pixels(path)).long()
        code = (pixels * torch.tensor([65536, 256, 1])).sum(2)
        masks = torch.zeros(len(self.part_names), *code.shape, dtype=torch.bool)
        for (red, green, blue), part in _COLOURS.items():
            if part in self.part_names:
                masks[self.part_names.index(part)] |= code == 65536 * red + 256 * green + blue
        return masks

    def without(self, index: int, parts: str | Iterable[str]) -> Tensor:
        """Read the image of the same scene without some parts, (3, H, W), after the transform.

        Args:
            index: Row of the image in this data set.
            parts: Name of a part to leave out, or several names. The official archive has all combinations.

        Raises:
            ValueError: If a part does not exist.
            DatasetError: If there is no such image, or it cannot be read.
        """
        taken = {parts} if isinstance(parts, str) else set(parts)
        unknown = sorted(taken - set(self.part_names))
        if unknown:
            raise ValueError(f"part {unknown[0]!r} does not exist; pass some of {', '.join(self.part_names)}")
        name = "_".join(["body", *sorted(set(self.part_names) - taken)])
        number = f"{int(self.numbers[index]):06d}"
        return self._seen(_pixels(self._beside(f"{self.split}_interventions", f"{number}/{name}", index)))

    def part_drops(self) -> PartDrops:
        """Read the drops of one network's logits, in the order of this data set.

        The official archive has no drops.

        Raises:
            DatasetError: If the split has no ``drops.csv``, or the file lacks images.
        """
        path = self.folder / "drops.csv"
        try:
            with path.open(newline="") as file:
                rows = {int(row["image_idx"]): row for row in csv.DictReader(file)}
            chosen = [rows[number] for number in self.numbers.tolist()]
            table = {
                key: [[float(row[f"{key}_{part}"]) for part in self.part_names] for row in chosen]
                for key in ("drop", "pixels")
            }
            logit, predicted = ([float(row[key]) for row in chosen] for key in ("logit", "predicted"))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f"the drops of {len(self)} images in {path} cannot be read: {type(error).__name__} ({error}); the "
                "official archive has no such file: measure drops on the images of without()"
            ) from error
        return PartDrops(
            torch.tensor(logit),
            torch.tensor(table["drop"]).reshape(-1, len(self.part_names)),
            torch.tensor(predicted).long(),
            torch.tensor(table["pixels"]).long().reshape(-1, len(self.part_names)),
        )

    def _seen(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
        """Turn pixels (H, W, 3) into the transformed image (3, H, W)."""
        image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        return image if self.transform is None else self.transform(image)

    def _beside(self, folder: str, name: str, index: int) -> Path:
        """Find a file of an image in another folder of the split."""
        paths = [self.folder / folder / str(int(self.labels[index])) / f"{name}{suffix}" for suffix in _SUFFIXES]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            there = (
                "it is missing"
                if (self.folder / folder).is_dir()
                else f"the split {self.split!r} has no folder {folder}"
            )
            raise DatasetError(f"cannot read the file {paths[0]}: {there}; {_REMEDY}, or pass split='test'")
        return path


def _pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read an image as (H, W, 3), without transparency, as the official code does."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except OSError as error:
        raise DatasetError(f"cannot read the image {path} ({error}); {_REMEDY}") from error


def _json(path: Path, kind: type) -> Any:
    """Read a JSON file that holds a dictionary or a list."""
    found = read_json(path, DatasetError, _REMEDY)
    if not isinstance(found, kind) or not found:
        raise DatasetError(f"{path} holds {found!r:.40}, not a {kind.__name__} with entries; {_REMEDY}")
    return found
