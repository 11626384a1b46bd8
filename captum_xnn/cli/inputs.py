"""Inputs of a model from files: a folder of images, one image, or an array, in batches with their names.

Conventions:
    Images are squashed to the size asked for, bilinearly, and have C = 3 channels (RGB), or C = 1 where mean and std
    are those of one channel. Values are in [0, 1] before mean and std, and when they are shown.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captum_xnn.errors import DatasetError

__all__ = ["ARRAY_FILES", "IMAGE_FILES", "Batch", "Inputs", "Preparation", "as_channels", "as_size"]

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of images, in small letters; other files in a folder are passed over."""
ARRAY_FILES = (".npy", ".npz", ".pt")
"""Endings of arrays."""

_log = logging.getLogger(__name__)


def as_size(name: str, value: Any) -> tuple[int, int]:
    """Returns height and width in pixels.

    Args:
        name: What to call the value in errors.
        value: One number for both, or a pair.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> as_size("SIZE", 224), as_size("SIZE", [120, 160])
        ((224, 224), (120, 160))
    """
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(many) not in (1, 2) or not all(type(v) is int and v > 0 for v in many):
        raise ValueError(f"expected {name} as pixels, one number or height and width, got {value!r}; such as 224")
    return many[0], many[-1]


def as_channels(name: str, value: Any) -> tuple[float, ...]:
    """Returns a number for each channel.

    Args:
        name: What to call the value in errors.
        value: One number, or a sequence, array or tensor of 1 or 3.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> as_channels("MEAN", torch.tensor([0.5, 0.25, 1.0])), as_channels("MEAN", 0)
        ((0.5, 0.25, 1.0), (0.0,))
    """
    many = list(value) if hasattr(value, "__len__") and not isinstance(value, str) else [value]
    if len(many) not in (1, 3) or any(isinstance(v, (bool, str)) or not hasattr(v, "__float__") for v in many):
        raise ValueError(f"expected {name} as a number for each of 1 or 3 channels, got {value!r}; such as 0.5")
    return tuple(float(v) for v in many)


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an input of a model, and an input an image again.

    Raises:
        ValueError: If mean and std are not for the same channels, or a std is not positive.

    Example:
        >>> from PIL import Image
        >>> preparation = Preparation(size=(2, 2), mean=(0.5,), std=(0.25,))
        >>> made = preparation(Image.new("RGB", (8, 4), (255, 255, 255)))
        >>> made.shape, round(float(made.mean()), 4), preparation.displayable(made[None]).shape
        (torch.Size([1, 2, 2]), 2.0, torch.Size([1, 1, 2, 2]))
    """

    size: tuple[int, int] | None = None
    """Height and width in pixels; the image's own, if None."""
    mean: tuple[float, ...] | None = None
    """What is subtracted from each channel; 0 if None."""
    std: tuple[float, ...] | None = None
    """What each channel is divided by; 1 if None."""
    transform: Callable[[Any], Tensor] | None = None
    """From a PIL image in RGB to a tensor (C, H, W), in place of size, mean and std, which then only tell how to show
    the tensor."""

    def __post_init__(self) -> None:
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"expected mean and std of as many channels, got {self.mean} and {self.std}; give both")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ValueError(f"expected std above 0, got {self.std}; without normalisation it is 1")

    def __call__(self, image: Any) -> Tensor:
        """Returns the input (C, H, W) that an image makes.

        Args:
            image: A PIL image.
        """
        if self.transform is not None:
            return self.transform(image.convert("RGB"))
        grey = 1 in (len(self.mean or ()), len(self.std or ()))
        pixels = np.array(image.convert("L" if grey else "RGB"))
        made = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1) / 255
        if self.size is not None and self.size != tuple(made.shape[1:]):
            made = torch.nn.functional.interpolate(
                made[None], self.size, mode="bilinear", align_corners=False, antialias=True
            )[0]
        mean, std = self._scale()
        return (made - mean) / std

    def displayable(self, inputs: Tensor) -> Tensor | None:
        """Returns inputs as images to show, (N, C, H, W) in [0, 1], or None where they are no images.

        Args:
            inputs: As the model takes them. Without mean and std they should be in [0, 1] already; if not, they are
                returned as they are.
        """
        mean, std = self._scale()
        if inputs.dim() != 4 or inputs.shape[1] not in (1, 3) or not inputs.is_floating_point():
            return None
        if max(len(mean), len(std)) not in (1, inputs.shape[1]):
            return None
        images = inputs.detach().cpu().float()
        return images if self.mean is None and self.std is None else (images * std + mean).clamp(0, 1)

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Returns mean and std, each (C, 1, 1)."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None]
            for values in (self.mean or (0.0,), self.std or (1.0,))
        )
        return mean, std


class Batch(NamedTuple):
    """Some inputs. The inputs come first, so that :meth:`captum_xnn.XNNAttribution.fit` takes batches as they are."""

    inputs: Tensor
    """(N, ...), as the model takes them."""
    images: Tensor | None
    """(N, C, H, W) in [0, 1], to be shown; None where inputs are no images."""
    names: tuple[str, ...]
    """The images' paths in their folder, with ``/``; of an array the numbers of its rows."""


class Inputs:
    """Batches of inputs from files, as often as they are iterated; labels play no part.

    Args:
        path: A folder with images at any depth, as torchvision's ImageFolder lays them out or flat; one image; or an
            array (M, ...) of inputs as the model takes them, in a ``.npy``, ``.npz`` or ``.pt`` file. Nothing is
            unpickled.
        preparation: How images become inputs; of arrays, only how they are shown.
        batch_size: Inputs at once.
        workers: Processes that read images.
        skip_damaged: Whether images that cannot be read are left out. Their names are in :attr:`skipped`, once a pass
            came to them.
        dtype: What arrays of real numbers are turned into.

    Raises:
        DatasetError: If there is nothing to read. While iterating: if an image is damaged, with its name; if sizes
            differ; or if every image is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/inputs.npy", np.zeros((5, 3, 8, 8), "float32"))
        ...     inputs = Inputs(f"{folder}/inputs.npy", batch_size=4)
        ...     [batch.names for batch in inputs]
        [('0', '1', '2', '3'), ('4',)]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        preparation: Preparation | None = None,
        *,
        batch_size: int = 64,
        workers: int = 0,
        skip_damaged: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.path = Path(path)
        self.preparation = preparation or Preparation()
        self.batch_size, self.workers, self.skip_damaged = batch_size, workers, skip_damaged
        self.skipped: tuple[str, ...] = ()
        array = self.path.suffix.lower() in ARRAY_FILES and self.path.is_file()
        self._rows: _Array | _Images = _Array(self.path, dtype) if array else _Images(self.path, self.preparation)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all inputs, damaged ones too, in the order of the batches."""
        return self._rows.names

    def __len__(self) -> int:
        """Returns the number of batches."""
        return -(-len(self.names) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        skipped: list[str] = []
        for rows in self.loader():
            if self.skip_damaged:
                skipped += [name for name, row in rows if not isinstance(row, Tensor)]
                rows = [(name, row) for name, row in rows if isinstance(row, Tensor)]
            if rows:
                yield self.batch(rows)
        if skipped and not self.skipped:
            _log.warning("left out %d damaged of %d images: %s", len(skipped), len(self.names), ", ".join(skipped))
        self.skipped = tuple(skipped)
        if len(skipped) == len(self.names):
            raise DatasetError(
                f"expected images in {str(self.path)!r}, got {len(skipped)} of which none can be read; check that they "
                "arrived whole"
            )

    def loader(self) -> DataLoader[Any]:
        """Returns a plain loader of the inputs, of which each batch can be had without the others.

        What it yields is for :meth:`batch`. Processes that share the work load a part each with it.
        """
        return DataLoader(
            self._rows,
            self.batch_size,
            num_workers=self.workers,
            collate_fn=list,
            # Its own, as a loader draws a seed from the global one. Nothing is shuffled.
            generator=torch.Generator().manual_seed(0),
        )

    def batch(self, rows: Sequence[tuple[str, Tensor | str]]) -> Batch:
        """Returns the batch that some names and inputs make.

        Args:
            rows: As :meth:`loader` yields them.

        Raises:
            DatasetError: If an image is damaged, or sizes differ.
        """
        shapes: dict[tuple[int, ...], str] = {}
        for name, row in rows:
            if not isinstance(row, Tensor):
                raise DatasetError(
                    f"expected an image, got one that cannot be read, {name!r} in {str(self.path)!r} ({row}); replace "
                    "it, or leave damaged images out with skip_damaged=True (--skip-damaged)"
                )
            shapes[tuple(row.shape)] = name
        if len(shapes) > 1:
            told = ", ".join(f"{list(shape)} ({name})" for shape, name in list(shapes.items())[:2])
            raise DatasetError(
                f"expected images of one size, got {told}; pass size=(H, W) (--size), or SIZE in the model's file"
            )
        inputs = torch.stack([row for _, row in rows if isinstance(row, Tensor)])
        return Batch(inputs, self.preparation.displayable(inputs), tuple(name for name, _ in rows))


class _Images(Dataset[tuple[str, Tensor | str]]):
    """Names and inputs made of image files; in place of one that cannot be read, why."""

    names: tuple[str, ...]

    def __init__(self, path: Path, preparation: Preparation) -> None:
        self.preparation = preparation
        if path.is_file():
            if path.suffix.lower() not in IMAGE_FILES:
                raise DatasetError(
                    f"expected a folder of images, an image ({', '.join(IMAGE_FILES)}) or an array "
                    f"({', '.join(ARRAY_FILES)}), got {str(path)!r}; convert it"
                )
            self.root, self.names = path.parent, (path.name,)
            return
        if not path.is_dir():
            raise DatasetError(
                f"expected a folder or a file of inputs, got {str(path)!r}, which is none; check the path"
            )
        files = list(_files(path))
        names = [name for name in files if Path(name).suffix.lower() in IMAGE_FILES]
        if not names:
            raise DatasetError(
                f"expected images in {str(path)!r}, got none among {len(files)} files; they should end in one of "
                f"{', '.join(IMAGE_FILES)}"
            )
        self.root, self.names = path, tuple(sorted(names))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        return self.names[index], self._read(index)

    def _read(self, index: int) -> Tensor | str:
        from PIL import Image, ImageOps, UnidentifiedImageError

        path = self.root / self.names[index]
        try:
            with Image.open(path) as opened:
                opened.load()
                image = _in_eight_bits(ImageOps.exif_transpose(opened))
        except Exception as error:  # on damaged files, PIL's readers raise nearly everything
            # PIL's own words repeat the path.
            unknown = isinstance(error, UnidentifiedImageError)
            return "of no known format" if unknown else " ".join(str(error).split())
        try:
            made = self.preparation(image)
        except Exception as error:
            raise ValueError(
                f"expected the transform to turn {self.names[index]!r} into a tensor, got {type(error).__name__} "
                f"({error}); it is given a PIL image in RGB"
            ) from error
        if not isinstance(made, Tensor):
            raise TypeError(
                f"expected the transform to return a tensor, got {type(made).__name__}; end it with a conversion such "
                "as torchvision's ToTensor"
            )
        return made


def _in_eight_bits(image: Any) -> Any:
    """Return an image of deeper pixels in 8 bits, where PIL's own conversion would cut off all above 255.

    16 bits are scaled by their whole range. Floating-point pixels lie in [0, 1], or in [0, 255].

    Raises:
        ValueError: If the range of the pixels does not tell what white is.
    """
    from PIL import Image

    if not image.mode.startswith("I") and image.mode != "F":
        return image
    pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    white = 65535.0 if image.mode != "F" else 1.0 if high <= 1 else 255.0
    if not 0 <= low <= high <= white:  # also of NaN
        raise ValueError(
            f"pixels from {low:g} to {high:g} in mode {image.mode!r}, of which none is known to be white; save it with "
            "8 or 16 bits, or floating-point pixels from 0 to 1"
        )
    return Image.fromarray(np.round(pixels * (255.0 / white)).astype(np.uint8))


class _Array(Dataset[tuple[str, Tensor]]):
    """Numbers and rows of an array in a file, which is mapped into memory where its format allows."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        hint = "save one array (M, ...) of inputs with numpy.save, numpy.savez or torch.save"
        try:
            self.values = _read_array(path)
        except Exception as error:  # numpy, zipfile and torch raise errors of their own for foreign and truncated files
            told = " ".join(str(error).split())[:200]
            raise DatasetError(f"expected an array in {str(path)!r}, could not read it ({told}); {hint}") from error
        if not self.values.shape or not len(self.values):
            raise DatasetError(
                f"expected inputs (M, ...) in {str(path)!r}, got an array {tuple(self.values.shape)}; {hint}"
            )
        self.dtype = dtype
        self.names = tuple(map(str, range(len(self.values))))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        row = self.values[index]
        row = torch.from_numpy(np.array(row)) if not isinstance(row, Tensor) else row
        return self.names[index], row.to(self.dtype) if row.is_floating_point() else row


def _read_array(path: Path) -> Tensor | np.ndarray[Any, Any]:
    """Returns the one array of a file."""
    if path.suffix.lower() == ".pt":
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, Tensor):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        if len(loaded.files) != 1:
            raise ValueError(f"it holds {len(loaded.files)} arrays: {', '.join(loaded.files[:5])}")
        array: np.ndarray[Any, Any] = loaded[loaded.files[0]]
    return array


def _files(root: Path) -> Iterator[str]:
    """Yields the paths of a folder's files, with ``/``, but for hidden ones; links to folders are followed once."""
    seen = set()
    for place, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            yield from (Path(place, name).relative_to(root).as_posix() for name in files if not name.startswith("."))
        seen.add(real)
