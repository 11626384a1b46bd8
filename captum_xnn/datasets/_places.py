r"""Rooms of Places365, and rooms of ADE20K with a mask of every object: the paper's data for explanations and locality.

This module downloads nothing. It reads the folders to which the official archives unpack.

Conventions:
    N images (3, H, W) in [0, 1], P objects. A category has the name of the official list without its leading letter:
    ``kitchen`` for ``/k/kitchen``, ``hotel/outdoor`` for ``/h/hotel/outdoor``. Labels are the official numbers of
    Places365. They count from 0 and number the outputs of the published models. A mask is a map of indices (H, W),
    int64: 0 is no object, objects count from 1.

Two layouts of Places365:
    With lists: ``categories_places365.txt``, ``places365_train_standard.txt`` and ``places365_val.txt`` lie beside the
    folders of images. Small images are in ``data_256_standard/`` or ``data_256/`` and ``val_256/``, large ones in
    ``data_large_standard/`` or ``data_large/`` and ``val_large/``. If both sizes are there, small images are read.
    Easy: images are in ``train/kitchen/``, ``val/kitchen/`` and so on. The archive of this layout lacks
    ``categories_places365.txt``; put that file beside the two folders.

Two releases of ADE20K:
    The scene parsing challenge (``ADEChallengeData2016``) has 150 objects; all others have index 0. The full release
    (``ADE20K_2021_17_01``) has 3,688 objects. There an index is :math:`256 \lfloor R / 10 \rfloor + G` of the colour in
    ``*_seg.png``. Parts of objects have no index of their own. Names are in the JSON file beside each image. The file
    ``index_ade20k.pkl`` is not read, because a pickle can run any code. The first full release, of 2016, has other
    folders and is not supported.

Left open by the paper, and decided here:
    The paper counts 173 objects in its ten rooms, but names neither the release nor the objects that it left out. Here
    all objects of the release count; :func:`object_masks` selects some. Pixels without an object belong to no object.
    They are not a context, in contrast to CUB.

Reference:
    Zhou, Lapedriza, Khosla, Oliva, Torralba, "Places: A 10 Million Image Database for Scene Recognition", 2018. Zhou,
    Zhao, Puig, Xiao, Fidler, Barriuso, Torralba, "Semantic Understanding of Scenes through the ADE20K Dataset", 2019.
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", 2021, section 4.2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_xnn.errors import DatasetError

__all__ = [
    "PLACES_OF_ADE",
    "ROOMS",
    "ADE20KScenes",
    "Places365",
    "PlacesSample",
    "SceneSample",
    "object_masks",
    "resized",
]

ROOMS = {
    "bathroom": 45,
    "bedroom": 52,
    "conference_room": 102,
    "dining_room": 121,
    "home_office": 176,
    "hotel_room": 182,
    "kitchen": 203,
    "living_room": 215,
    "office": 244,
    "waiting_room": 352,
}
"""The paper's ten categories with their numbers in Places365. Pass it as ``categories`` to either data set."""

PLACES_OF_ADE = {
    "bathroom": "bathroom",
    "bedroom": "bedroom",
    "conference_room": "conference_room",
    "dining_room": "dining_room",
    "home_office": "home_office",
    "hotel_room": "hotel_room",
    "kitchen": "kitchen",
    "living_room": "living_room",
    "office": "office",
    "waiting_room": "waiting_room",
}
"""Category of Places365 for each of the ten rooms in ADE20K's spelling, the same in both releases."""

_CATEGORIES = "categories_places365.txt"
_LISTS = {"train": "places365_train_standard.txt", "val": "places365_val.txt"}
_FOLDERS = {
    "train": ("data_256_standard", "data_256", "data_large_standard", "data_large"),
    "val": ("val_256", "val_large"),
}
_PLACES_REMEDY = (
    "unpack filelist_places365-standard.tar, train_256_places365standard.tar and val_256.tar once more into one folder "
    f"and pass it, or pass the folder of places365standard_easyformat.tar with {_CATEGORIES} from the first in it"
)
_ADE_REMEDY = (
    "unpack ADEChallengeData2016.zip once more and pass the folder ADEChallengeData2016, or pass the folder of the "
    "full release, ADE20K_2021_17_01"
)
_SPLITS_OF_ADE = ("training", "validation")
_CHALLENGE_OBJECTS = 150


class PlacesSample(NamedTuple):
    """One image with its category, or several along a first dimension N, joined by a DataLoader."""

    image: Tensor
    """(3, H, W) in [0, 1], or the result of the data set's transform."""
    label: Tensor
    """Number of the category in Places365, int64, ()."""
    number: Tensor
    """Row of the image in its data set, int64, (); ``names`` there has its file."""


class SceneSample(NamedTuple):
    """One image with its category and objects, or several along a first dimension N, joined by a DataLoader."""

    image: Tensor
    """(3, H, W) in [0, 1], or the result of the data set's transform."""
    label: Tensor
    """Number of the category in Places365, -1 for a scene other than the ten rooms, int64, ()."""
    mask: Tensor
    """Index of the object at each pixel (H, W), int64, 0 for no object."""
    number: Tensor
    """Row of the image in its data set, int64, (); ``names`` and ``scenes`` there have its file and scene."""


Sample = TypeVar("Sample", PlacesSample, SceneSample)


def resized(sample: Sample, size: tuple[int, int]) -> Sample:
    """Resize a sample, stretching it if the aspect ratio changes: the image bilinearly, the mask by the nearest pixel.

    A new pixel of the mask takes the old pixel in which its centre lies, to match the bilinear image. A centre on an
    edge takes the later pixel.

    Args:
        sample: A sample with an image (C, H, W).
        size: New height and width in pixels.

    Example:
        >>> one = SceneSample(torch.zeros(3, 2, 4), torch.tensor(45), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),
        ...                   torch.tensor(0))
        >>> resized(one, (4, 2)).mask.tolist()
        [[2, 4], [2, 4], [6, 8], [6, 8]]
    """
    image = torch.nn.functional.interpolate(
        sample.image[None], size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    if isinstance(sample, SceneSample):
        rows, columns = (_nearest(old, new) for old, new in zip(sample.mask.shape, size, strict=True))
        return sample._replace(image=image, mask=sample.mask[rows[:, None], columns])
    return sample._replace(image=image)


def _nearest(old: int, new: int) -> Tensor:
    """Find the old pixel that holds the centre of each new one, exactly, in integer arithmetic."""
    return (2 * torch.arange(new) + 1) * old // (2 * new)


def object_masks(mask: Tensor, objects: Iterable[int]) -> Tensor:
    r"""Mark the pixels of each of some objects, boolean (P, H, W), or (N, P, H, W) for masks of N images.

    Pass the result for N images to :func:`captum_xnn.metrics.object_probabilities`; its columns are then
    the objects in the given order. To count all objects, pass the masks of indices there instead.

    .. math:: m_{p, i, j} = [\text{mask}_{i, j} = o_p]

    Args:
        mask: Indices of objects (H, W) or (N, H, W), integers.
        objects: Indices of P objects, each once.

    Raises:
        ValueError: If the mask does not hold integers, if there are no objects, or if an object repeats.

    Example:
        >>> object_masks(torch.tensor([[0, 7], [7, 9]]), [9, 7]).long().tolist()
        [[[0, 0], [0, 1]], [[0, 1], [1, 0]]]

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2 (Places).
    """
    chosen = [int(o) for o in objects]
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"indices of objects are {chosen}; pass at least one and no index twice")
    if mask.dim() not in (2, 3) or mask.dtype == torch.bool or mask.is_floating_point():
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}, not integers (H, W) or (N, H, W); pass the mask of a "
            "SceneSample"
        )
    return mask.unsqueeze(-3) == torch.tensor(chosen, device=mask.device)[:, None, None]


class Places365(Dataset[PlacesSample]):
    """Read the training or validation images of Places365-Standard.

    Args:
        root: The folder with the lists and the folders of images, or the folder of the easy layout.
        split: The official training or validation images; the labels of the test images are not published.
        categories: Names of the categories to keep, such as :data:`ROOMS`; all if None. Labels stay the official ones.
        size: Height and width to which images are stretched; their own size if None.
        transform: Applied to each image (3, H, W) in [0, 1], such as a normalisation.

    Raises:
        DatasetError: If a file or folder is missing, cut short, or does not fit the others. If the last listed image of
            a category is missing, this raises at once; other images raise when they are read.
        ValueError: If a category does not exist.

    Example:
        ``DataLoader(Places365("places365", "train", categories=ROOMS, size=(224, 224)), 32)``
    """

    names: list[str]
    """File of every image, below the root."""
    labels: Tensor
    """Category of every image, (M,), int64."""
    classes: dict[int, str]
    """Name of every category of Places365, by label, including categories left out."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Literal["train", "val"],
        *,
        categories: Iterable[str] | None = None,
        size: tuple[int, int] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if split not in _LISTS:
            raise ValueError(f"split is {split!r}; pass 'train' or 'val', as test images have no labels")
        self.root, self.size, self.transform = Path(root), size, transform
        self.classes = _classes(self.root / _CATEGORIES)
        kept = _kept(categories, set(self.classes.values()), f"{self.root / _CATEGORIES} lists them")
        folder = next((f for f in _FOLDERS[split] if (self.root / f).is_dir()), None)
        if folder is not None:
            found = list(_listed(self.root / _LISTS[split], folder, self.classes, kept))
            self._check_ends(found)
        elif (self.root / split).is_dir():
            found = list(_in_folders(self.root, split, self.classes, kept))
        else:
            raise DatasetError(
                f"there is no folder {', '.join(_FOLDERS[split])} or {split} in {self.root}; {_PLACES_REMEDY}"
            )
        self.names = [name for name, _ in found]
        self.labels = torch.tensor([label for _, label in found], dtype=torch.int64)

    def _check_ends(self, found: list[tuple[str, int]]) -> None:
        """Raise if the last image of a category is missing, as it is if the archive was cut short."""
        last = {label: name for name, label in found}
        missing = [name for name in last.values() if not (self.root / name).is_file()]
        if missing:
            raise DatasetError(
                f"{len(missing)} of {len(last)} categories in {self.root} lack their last image, such as {missing[0]}; "
                f"{_PLACES_REMEDY}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> PlacesSample:
        image = _image(self.root / self.names[index], _PLACES_REMEDY)
        return _finished(PlacesSample(image, self.labels[index], torch.tensor(index)), self.size, self.transform)


class ADE20KScenes(Dataset[SceneSample]):
    """Read the images of ADE20K with a mask of their objects, from the challenge or from the full release.

    Args:
        root: The unpacked folder, ``ADEChallengeData2016`` or ``ADE20K_2021_17_01``.
        split: The official training or validation images; all images if None.
        categories: Names of the scenes to keep, such as :data:`ROOMS`; all if None. A scene of two words, such as
            ``diner/outdoor`` in Places365, is ``diner_outdoor`` here. The challenge shortens some such names to the
            last word.
        size: Height and width to which images and masks are stretched; their own size if None.
        transform: Applied to each image (3, H, W) in [0, 1], such as a normalisation; must not move its pixels.

    Raises:
        DatasetError: If a file or folder is missing, cut short, or does not fit the others. Missing images and
            annotations of the chosen scenes raise at once, damaged files when they are read.
        ValueError: If a scene does not exist.

    Example:
        ``scenes = ADE20KScenes("ADEChallengeData2016", "validation", categories=ROOMS, size=(224, 224))``, then
        ``object_probabilities(maps, batch.mask, objects=len(scenes.objects))``
    """

    names: list[str]
    """File of every image, below the root."""
    scenes: list[str]
    """Scene of every image, in ADE20K's spelling."""
    labels: Tensor
    """Category of every image in Places365, (M,), int64; -1 for scenes that :data:`PLACES_OF_ADE` lacks."""
    objects: dict[int, str]
    """Names of the challenge's 150 objects, by index. Empty for the full release: :meth:`objects_of` has its names."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: Literal["training", "validation"] | None = None,
        categories: Iterable[str] | None = None,
        size: tuple[int, int] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if split not in (None, *_SPLITS_OF_ADE):
            raise ValueError(f"split is {split!r}; pass 'training', 'validation', or None for all images")
        self.root, self.size, self.transform = Path(root), size, transform
        self._release = _FULL if (self.root / "images" / "ADE").is_dir() else _CHALLENGE
        every = self._release.entries(self.root)
        self.objects = self._release.objects(self.root)
        kept = _kept(categories, {e.scene for e in every}, "ADE20K names scenes as Places365 does, with _ for /")
        chosen = [e for e in every if split in (None, e.split) and e.scene in kept]
        self.names, self.scenes = [e.name for e in chosen], [e.scene for e in chosen]
        self.labels = torch.tensor([ROOMS.get(PLACES_OF_ADE.get(s, ""), -1) for s in self.scenes], dtype=torch.int64)
        for wanted in _SPLITS_OF_ADE if split is None else (split,):
            if not any(e.split == wanted for e in every):
                raise DatasetError(
                    f"there are no {wanted} images in {self.root}; pass the split that is there, or {_ADE_REMEDY}"
                )
        self._check_files()

    def _check_files(self) -> None:
        """Raise if an image or an annotation is missing; list each folder once."""
        folders: dict[Path, set[str]] = {}
        missing = []
        for file in (f for name in self.names for f in (name, self._release.annotation(name))):
            path = self.root / file
            if path.parent not in folders:
                folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            if path.name not in folders[path.parent]:
                missing.append(file)
        if missing:
            raise DatasetError(
                f"{len(missing)} files of {len(self)} images and their annotations are missing in {self.root}, such as "
                f"{missing[0]}; {_ADE_REMEDY}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> SceneSample:
        image, mask = _image(self.root / self.names[index], _ADE_REMEDY), self._mask(index)
        if mask.shape != image.shape[1:]:
            raise DatasetError(
                f"{self.root / self._release.annotation(self.names[index])} is {tuple(mask.shape)}, and its image "
                f"{self.names[index]} is {tuple(image.shape[1:])}; {_ADE_REMEDY}"
            )
        return _finished(SceneSample(image, self.labels[index], mask, torch.tensor(index)), self.size, self.transform)

    def _mask(self, index: int) -> Tensor:
        path = self.root / self._release.annotation(self.names[index])
        return torch.from_numpy(self._release.indices(_pixels(path, None, _ADE_REMEDY).astype(np.int64), path))

    def objects_of(self, index: int) -> dict[int, str]:
        """Read the names of the objects in one image, by their index in its mask.

        Args:
            index: Row of the image.

        Raises:
            DatasetError: If the annotation cannot be read, or the JSON file in the full release.

        Example:
            ``scenes.objects_of(0)`` is ``{1: 'wall', 4: 'floor, flooring', 66: 'toilet, can, ...'}``
        """
        names = self.objects or _described(self.root / Path(self.names[index]).with_suffix(".json"))
        present = set(self._mask(index).flatten().tolist())
        return {i: names[i] for i in sorted(present & names.keys())}


class _Entry(NamedTuple):
    """An image of ADE20K."""

    split: str
    name: str
    scene: str


class _Release(NamedTuple):
    """Functions that read one release of ADE20K."""

    entries: Callable[[Path], list[_Entry]]
    """All images below a root."""
    objects: Callable[[Path], dict[int, str]]
    """Names of all objects below a root."""
    annotation: Callable[[str], str]
    """File of the annotation of an image, both below the root."""
    indices: Callable[[np.ndarray[Any, Any], Path], np.ndarray[Any, Any]]
    """Indices of objects (H, W), from the pixels of an annotation; errors name its path."""


def _challenge_entries(root: Path) -> list[_Entry]:
    path, splits = root / "sceneCategories.txt", dict(zip(("train", "val"), _SPLITS_OF_ADE, strict=True))
    entries = []
    for number, words in _lines(path, _ADE_REMEDY):
        split = splits.get(words[0].removeprefix("ADE_").rpartition("_")[0])
        if len(words) != 2 or split is None:
            raise _malformed(path, number, "ADE_train_00000001 airport_terminal", words, _ADE_REMEDY)
        entries.append(_Entry(split, f"images/{split}/{words[0]}.jpg", words[1]))
    return entries


def _challenge_objects(root: Path) -> dict[int, str]:
    path = root / "objectInfo150.txt"
    objects: dict[int, str] = {}
    for number, words in _lines(path, _ADE_REMEDY):
        if number > 1:  # line 1 names the columns: index, ratio, images in training and validation, name
            if len(words) < 5 or words[0] != str(len(objects) + 1):
                raise _malformed(path, number, f"{len(objects) + 1} 0.1576 11664 1172 wall", words, _ADE_REMEDY)
            objects[len(objects) + 1] = " ".join(words[4:])
    if len(objects) != _CHALLENGE_OBJECTS:
        raise DatasetError(f"{path} lists {len(objects)} objects, not {_CHALLENGE_OBJECTS}; {_ADE_REMEDY}")
    return objects


def _challenge_annotation(name: str) -> str:
    return name.replace("images/", "annotations/", 1).removesuffix(".jpg") + ".png"


def _challenge_indices(pixels: np.ndarray[Any, Any], path: Path) -> np.ndarray[Any, Any]:
    if pixels.ndim != 2 or pixels.max(initial=0) > _CHALLENGE_OBJECTS:
        raise DatasetError(
            f"{path} has {pixels.shape} values up to {pixels.max(initial=0)}, not indices (H, W) from 0 to "
            f"{_CHALLENGE_OBJECTS}; {_ADE_REMEDY}"
        )
    return pixels


def _full_entries(root: Path) -> list[_Entry]:
    images = root / "images" / "ADE"
    return [
        # work_place/office/ADE_train_1.jpg below a split; two underscores join the words of a scene
        _Entry(split, path.relative_to(root).as_posix(), path.parent.name.replace("__", "_"))
        for split in _SPLITS_OF_ADE
        for path in sorted((images / split).glob("*/*/*.jpg"))
    ]


def _full_objects(root: Path) -> dict[int, str]:
    """Return no names: they are in the JSON file beside each image."""
    return {}


def _full_annotation(name: str) -> str:
    return name.removesuffix(".jpg") + "_seg.png"


def _full_indices(pixels: np.ndarray[Any, Any], path: Path) -> np.ndarray[Any, Any]:
    if pixels.ndim != 3:
        raise DatasetError(f"{path} has {pixels.shape} values, not colours (H, W, 3); {_ADE_REMEDY}")
    indices: np.ndarray[Any, Any] = pixels[..., 0] // 10 * 256 + pixels[..., 1]
    return indices


_CHALLENGE = _Release(_challenge_entries, _challenge_objects, _challenge_annotation, _challenge_indices)
_FULL = _Release(_full_entries, _full_objects, _full_annotation, _full_indices)


def _described(path: Path) -> dict[int, str]:
    """Read the names of objects by index from the JSON file of an image."""
    try:
        # Names are ASCII; some other fields are not UTF-8.
        found = json.loads(path.read_bytes().decode(errors="replace"))["annotation"]["object"]
        # The files write a list of one object as that object.
        return {int(o["name_ndx"]): str(o["name"]) for o in (found if isinstance(found, list) else [found])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"the names of objects in {path} cannot be read: {type(error).__name__} ({error}); {_ADE_REMEDY}"
        ) from error


def _classes(path: Path) -> dict[int, str]:
    """Read the names of all categories by label."""
    classes: dict[int, str] = {}
    for number, words in _lines(path, _PLACES_REMEDY):
        if len(words) != 2 or words[0][:1] != "/" or words[0][2:3] != "/" or not words[1].isdecimal():
            raise _malformed(path, number, "/a/airfield 0", words, _PLACES_REMEDY)
        classes[int(words[1])] = words[0][3:]
    return classes


def _kept(categories: Iterable[str] | None, available: set[str], hint: str) -> set[str]:
    """Check the categories to keep; keep all known ones if None."""
    if categories is None:
        return available
    kept = {categories} if isinstance(categories, str) else set(categories)
    if not kept or kept - available:
        problem = f"unknown categories {sorted(kept - available)}" if kept else "the list of categories is empty"
        raise ValueError(f"{problem}; {hint}")
    return kept


def _listed(path: Path, folder: str, classes: dict[int, str], kept: set[str]) -> Iterator[tuple[str, int]]:
    """Yield images below the root with their labels, from an official list.

    A training image lies in its category's folder, so a list that does not fit the categories raises.
    """
    names = {str(label): name for label, name in classes.items()}
    for number, words in _lines(path, _PLACES_REMEDY):
        name = names.get(words[-1])
        parent = words[0].rpartition("/")[0][3:]  # /k/kitchen/1.jpg, but no folder for validation images
        if len(words) != 2 or name is None or parent not in ("", name):
            form = f"/k/kitchen/00000001.jpg 203 (the label in {_CATEGORIES})"
            raise _malformed(path, number, form, words, _PLACES_REMEDY)
        if name in kept:
            yield f"{folder}/{words[0].lstrip('/')}", int(words[-1])


def _in_folders(root: Path, split: str, classes: dict[int, str], kept: set[str]) -> Iterator[tuple[str, int]]:
    """Yield images below the root with their labels, from the folder of their category."""
    for label, name in sorted(classes.items()):
        if name in kept:
            folder = f"{split}/{name.replace('/', '-')}"
            images = sorted((root / folder).glob("*.jpg"))
            if not images:
                raise DatasetError(f"there are no images in {root / folder}; {_PLACES_REMEDY}")
            for image in images:
                yield f"{folder}/{image.name}", label


def _lines(path: Path, remedy: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the words of each line that is not empty; the training list has 1.8 million lines."""
    empty = True
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                words = line.split()
                if words:
                    empty = False
                    yield number, words
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read the file {path} ({type(error).__name__}); {remedy}") from error
    if empty:
        raise DatasetError(f"{path} is empty; {remedy}")


def _malformed(path: Path, number: int, form: str, words: list[str], remedy: str) -> DatasetError:
    return DatasetError(f"line {number} of {path} is {' '.join(words)!r}, not like {form!r}; {remedy}")


def _image(path: Path, remedy: str) -> Tensor:
    """Read an image (3, H, W) in [0, 1]."""
    return torch.from_numpy(_pixels(path, "RGB", remedy)).permute(2, 0, 1) / 255


def _pixels(path: Path, mode: str | None, remedy: str) -> np.ndarray[Any, Any]:
    """Read the pixels of a file in a mode of PIL, or in the file's own mode if None."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image if mode is None else image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises the last two for damaged headers of PNG files
        raise DatasetError(f"cannot read the image {path} ({error}); {remedy}") from error


def _finished(sample: Sample, size: tuple[int, int] | None, transform: Callable[[Tensor], Tensor] | None) -> Sample:
    """Resize a sample if a size is given, and transform its image."""
    if size is not None and tuple(sample.image.shape[1:]) != tuple(size):
        sample = resized(sample, size)
    return sample if transform is None else sample._replace(image=transform(sample.image))
