"""Caltech-UCSD Birds-200-2011: 200 classes of birds with 15 parts and a box on every image.

The official archive unpacks to a folder with ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``,
``bounding_boxes.txt``, ``classes.txt``, ``parts/parts.txt``, ``parts/part_locs.txt`` and ``images/``. Classes may be
left out, from all files alike. Labels are the official numbers minus one.

Conventions:
    See :mod:`captum_xnn.datasets._parts`. Official boxes are x, y, width, height; they become x0, y0, x1, y1.

Reference:
    Wah, Branson, Welinder, Perona, Belongie, "The Caltech-UCSD Birds-200-2011 Dataset", 2011.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_xnn.datasets._parts import PartsSample, resized
from captum_xnn.errors import DatasetError

__all__ = ["CUB200"]

_REMEDY = (
    "unpack CUB_200_2011.tgz once more and pass the folder CUB_200_2011, with images.txt and the folder images in it"
)


class CUB200(Dataset[PartsSample]):
    """Read the images of CUB-200-2011 with their parts and boxes.

    Args:
        root: The unpacked folder.
        split: The official training or test images; all images if None.
        size: Height and width to which images, points and boxes are stretched; their own size if None.
        transform: Applied to each image (3, H, W) in [0, 1], such as a normalisation; must not move its pixels.

    Raises:
        DatasetError: If a file is missing, cut short, or does not fit the others. Missing images raise at once, damaged
            images when they are read.

    Example:
        ``DataLoader(CUB200("CUB_200_2011", "train", size=(224, 224)), batch_size=32)``
    """

    names: list[str]
    """File of every image, below ``images/``."""
    labels: Tensor
    """0-based class of every image, (M,), int64."""
    points: Tensor
    """Parts of every image (M, P, 2), x and y in pixels of the file, NaN where invisible."""
    boxes: Tensor
    """(M, 4), x0, y0, x1, y1 in pixels of the file."""
    classes: dict[int, str]
    """Name of every class, by 0-based label."""
    part_names: list[str]
    """Names of the P parts."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Literal["train", "test"] | None = None,
        *,
        size: tuple[int, int] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if split not in (None, "train", "test"):
            raise ValueError(f"split is {split!r}; pass 'train', 'test', or None for all images")
        self.root, self.size, self.transform = Path(root), size, transform
        names = _table(self.root / "images.txt", 1, str)
        tables = {
            file: _table(self.root / file, columns, float)
            for file, columns in (
                ("image_class_labels.txt", 1),
                ("train_test_split.txt", 1),
                ("bounding_boxes.txt", 4),
            )
        }
        for file, table in tables.items():
            if table.keys() != names.keys():
                missing = sorted(names.keys() ^ table.keys())
                raise DatasetError(
                    f"{self.root / file} and images.txt list different images: {len(missing)} are in only one of the "
                    f"files, such as {missing[0]}; {_REMEDY}"
                )
        trained = {i for i, (flag,) in tables["train_test_split.txt"].items() if flag}
        chosen = [i for i in names if split is None or (i in trained) == (split == "train")]
        self.names = [str(names[i][0]) for i in chosen]
        self.labels = torch.tensor([int(tables["image_class_labels.txt"][i][0]) - 1 for i in chosen])
        boxes = torch.tensor([tables["bounding_boxes.txt"][i] for i in chosen]).reshape(-1, 4)
        self.boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        self.classes = {i - 1: str(name) for i, (name,) in _table(self.root / "classes.txt", 1, str).items()}
        self.part_names = [str(name) for (name,) in _table(self.root / "parts" / "parts.txt", 1, str).values()]
        self.points = self._points(chosen)
        self._check_files()

    def _check_files(self) -> None:
        """Raise if an image or a class name is missing; list each folder once."""
        folders: dict[Path, set[str]] = {}
        missing = []
        for path in (self.root / "images" / name for name in self.names):
            if path.parent not in folders:
                folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            if path.name not in folders[path.parent]:
                missing.append(path)
        unnamed = sorted({*self.labels.tolist()} - self.classes.keys())
        if unnamed:
            raise DatasetError(f"{self.root / 'classes.txt'} has no name for class {unnamed[0] + 1}; {_REMEDY}")
        if missing:
            raise DatasetError(
                f"{len(missing)} of {len(self)} images are missing in {self.root / 'images'}, such as {missing[0]}; "
                f"{_REMEDY}"
            )

    def _points(self, chosen: list[int]) -> Tensor:
        """Read the parts of the chosen images, given by official numbers."""
        path = self.root / "parts" / "part_locs.txt"
        rows = _lines(path, 5)
        P = len(self.part_names)
        try:
            located = [(int(i), int(part), float(x), float(y), bool(float(seen))) for i, part, x, y, seen in rows]
        except ValueError as error:
            raise DatasetError(f"cannot read the numbers in {path} ({error}); {_REMEDY}") from error
        if sorted({part for _, part, *_ in located}) != list(range(1, P + 1)):
            raise DatasetError(
                f"{path} locates parts {sorted({part for _, part, *_ in located})}, not 1 to {P}; {_REMEDY}"
            )
        at = {number: row for row, number in enumerate(chosen)}
        points = torch.full((len(chosen), P, 2), float("nan"))
        seen = 0
        for image, part, x, y, visible in located:
            row = at.get(image)
            if row is not None:
                seen += 1
                if visible:
                    points[row, part - 1] = torch.tensor([x, y])
        if seen != len(chosen) * P:
            raise DatasetError(
                f"{path} has {seen} lines of parts for {len(chosen)} images with {P} parts each; {_REMEDY}"
            )
        return points

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> PartsSample:
        path = self.root / "images" / self.names[index]
        sample = PartsSample(
            _image(path), self.labels[index], self.points[index], self.boxes[index], torch.tensor(index)
        )
        if self.size is not None and tuple(sample.image.shape[1:]) != tuple(self.size):
            sample = resized(sample, self.size)
        return sample if self.transform is None else sample._replace(image=self.transform(sample.image))


def _image(path: Path) -> Tensor:
    """Read an image (3, H, W) in [0, 1]."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise DatasetError(f"cannot read the image {path} ({error}); {_REMEDY}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def _lines(path: Path, columns: int) -> list[list[str]]:
    """Split all lines of a file into columns; the last column takes the rest of its line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read the file {path} ({type(error).__name__}); {_REMEDY}") from error
    rows = [line.split(maxsplit=columns - 1) for line in lines if line.strip()]
    short = next((i for i, row in enumerate(rows) if len(row) != columns), None)
    if short is not None or not rows:
        at = f"line {short + 1} has {len(rows[short])}" if short is not None else "there are no lines"
        raise DatasetError(f"{path} needs {columns} columns in every line, and {at}; {_REMEDY}")
    return rows


def _table(path: Path, columns: int, kind: Callable[[str], float | str]) -> dict[int, list[float | str]]:
    """Read the columns of a file, keyed by the number at the start of each line."""
    rows = _lines(path, columns + 1)
    try:
        return {int(row[0]): [kind(word) for word in row[1:]] for row in rows}
    except ValueError as error:
        raise DatasetError(f"cannot read the numbers in {path} ({error}); {_REMEDY}") from error
