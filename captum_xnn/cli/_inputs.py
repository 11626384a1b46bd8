"""Inputs of a model from files: a folder of images, one image, texts, or an array, in batches with their names.

Conventions:
    Images are resized bilinearly to the requested size, without keeping their aspect ratio. They have C = 3 channels
    (RGB), or C = 1 if mean and std are of one channel. Values are in [0, 1] before normalisation, and for display.
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

__all__ = ["ARRAY_FILES", "IMAGE_FILES", "Batch", "Inputs", "Preparation", "as_channels", "as_size", "read_tensor"]

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
"""File extensions of images, in lower case; other files in a folder are skipped."""
ARRAY_FILES = (".npy", ".npz", ".pt")
"""File extensions of arrays."""
TEXT_FILES = (".txt",)
"""File extensions of texts."""

# Modes that PIL converts to grey by way of RGB only.
_COLOURED = ("LAB", "HSV")

_log = logging.getLogger(__name__)


def as_size(name: str, value: Any) -> tuple[int, int]:
    """Convert a size to height and width in pixels.

    Args:
        name: Name of the value in error messages.
        value: One number for both, or a pair.

    Raises:
        ValueError: If the value is neither.

    Example:
        >>> as_size("SIZE", 224), as_size("SIZE", [120, 160])
        ((224, 224), (120, 160))
    """
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(many) not in (1, 2) or not all(type(v) is int and v > 0 for v in many):
        raise ValueError(f"{name} is {value!r}; give one number of pixels such as 224, or height and width")
    return many[0], many[-1]


def as_channels(name: str, value: Any) -> tuple[float, ...]:
    """Convert numbers to one float for each channel.

    Args:
        name: Name of the value in error messages.
        value: One number, or a sequence, array or tensor of 1 or 3 numbers.

    Raises:
        ValueError: If the value is neither.

    Example:
        >>> as_channels("MEAN", torch.tensor([0.5, 0.25, 1.0])), as_channels("MEAN", 0)
        ((0.5, 0.25, 1.0), (0.0,))
    """
    many = list(value) if hasattr(value, "__len__") and not isinstance(value, str) else [value]
    if len(many) not in (1, 3) or any(isinstance(v, (bool, str)) or not hasattr(v, "__float__") for v in many):
        raise ValueError(f"{name} is {value!r}; give one number such as 0.5 for each of 1 or 3 channels")
    return tuple(float(v) for v in many)


@dataclass(frozen=True)
class Preparation:
    """Conversion of an image to an input of the model, and of an input back to an image.

    Raises:
        ValueError: If mean and std have different numbers of channels, or a std is not positive.

    Example:
        >>> from PIL import Image
        >>> preparation = Preparation(size=(2, 2), mean=(0.5,), std=(0.25,))
        >>> prepared = preparation(Image.new("RGB", (8, 4), (255, 255, 255)))
        >>> prepared.shape, round(float(prepared.mean()), 4), preparation.displayable(prepared[None]).shape
        (torch.Size([1, 2, 2]), 2.0, torch.Size([1, 1, 2, 2]))
    """

    size: tuple[int, int] | None = None
    """Height and width in pixels. If None, images keep their size."""
    mean: tuple[float, ...] | None = None
    """Number to subtract from each channel; 0 if None."""
    std: tuple[float, ...] | None = None
    """Number to divide each channel by; 1 if None."""
    transform: Callable[[Any], Tensor] | None = None
    """Function from a PIL image in RGB to a tensor (C, H, W). It replaces size, mean and std. Mean and std then only
    serve to convert the tensor back to an image for display. PIL holds RGB in 8 bits, so the function sees deeper
    pixels rounded; without it they keep their depth."""
    encode: Callable[[str], Any] | None = None
    """Function from a text to the ids of its tokens (L,), padded to the same length for all texts."""
    tokens: Callable[[Any], Sequence[str]] | None = None
    """Function from the ids (L,) of a text to its tokens, without padding."""

    def __post_init__(self) -> None:
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(
                f"mean {self.mean} and std {self.std} have different numbers of channels; give both for the same "
                "channels"
            )
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}; give numbers above 0, or 1 for no normalisation")

    def __call__(self, image: Any) -> Tensor:
        """Convert an image to an input (C, H, W).

        Args:
            image: A PIL image. Floating-point pixels lie in [0, 255].
        """
        if self.transform is not None:
            return self.transform(_in_eight_bits(image).convert("RGB"))
        grey = 1 in (len(self.mean or ()), len(self.std or ()))
        if image.mode == "F":
            pixels = np.repeat(np.asarray(image)[..., None], 1 if grey else 3, 2)
        else:
            image = image.convert("RGB") if image.mode in _COLOURED else image
            pixels = np.array(image.convert("L" if grey else "RGB"))
        prepared = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1) / 255
        if self.size is not None and self.size != tuple(prepared.shape[1:]):
            prepared = torch.nn.functional.interpolate(
                prepared[None], self.size, mode="bilinear", align_corners=False, antialias=True
            )[0]
        mean, std = self._scale()
        return (prepared - mean) / std

    def displayable(self, inputs: Tensor) -> Tensor | None:
        """Convert inputs to images for display, (N, C, H, W) in [0, 1]; return None if they are not images.

        Args:
            inputs: Inputs as the model takes them. Without mean and std, they should be in [0, 1] already, and are
                returned unchanged.
        """
        mean, std = self._scale()
        if inputs.dim() != 4 or inputs.shape[1] not in (1, 3) or not inputs.is_floating_point():
            return None
        if max(len(mean), len(std)) not in (1, inputs.shape[1]):
            return None
        images = inputs.detach().cpu().float()
        return images if self.mean is None and self.std is None else (images * std + mean).clamp(0, 1)

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Return mean and std, each (C, 1, 1)."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None]
            for values in (self.mean or (0.0,), self.std or (1.0,))
        )
        return mean, std


class Batch(NamedTuple):
    """A batch of inputs. Inputs are the first field, so :meth:`captum_xnn.XNNAttribution.fit` accepts the batches."""

    inputs: Tensor
    """Inputs as the model takes them, (N, ...)."""
    images: Tensor | None
    """Images for display, (N, C, H, W) in [0, 1]; None if the inputs are not images."""
    names: tuple[str, ...]
    """Paths of the images in their folder, with ``/``; row indices of an array; ``line 1`` and so on for texts."""


class Inputs:
    """Batches of inputs from files, which can be iterated repeatedly. Labels are not used.

    Args:
        path: A folder of images, flat or with sub-folders as for torchvision's ImageFolder; one image; a ``.txt`` file
            with a text on each line; or a ``.npy``, ``.npz`` or ``.pt`` file with an array (M, ...) of inputs as the
            model takes them. Nothing is unpickled.
        preparation: Conversion of images and texts to inputs. Arrays only use its conversion back to images for
            display.
        batch_size: Number of inputs in a batch.
        workers: Number of processes that read images.
        skip_damaged: Whether to skip images that cannot be read. After each pass, :attr:`skipped` holds their names.
        dtype: Type to convert images, and arrays of real numbers, to.

    Raises:
        DatasetError: If there is nothing to read. While iterating: if an image is damaged (the message names it), if
            sizes differ, or if all images are damaged.

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
        self.dtype = dtype
        self._rows = _dataset_of(self.path, self.preparation, dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all inputs, including damaged images, in the order of the batches."""
        return self._rows.names

    def __len__(self) -> int:
        """Return the number of batches."""
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
            _log.warning("skipped %d damaged of %d images: %s", len(skipped), len(self.names), ", ".join(skipped))
        self.skipped = tuple(skipped)
        if len(skipped) == len(self.names):
            raise DatasetError(
                f"0 of {len(skipped)} images in {str(self.path)!r} can be read; check that they were copied completely"
            )

    def loader(self) -> DataLoader[Any]:
        """Return a DataLoader of the inputs whose batches can be read independently of each other.

        Pass each of its batches to :meth:`batch`. Processes that share the work use it to read one part each.
        """
        return DataLoader(
            self._rows,
            self.batch_size,
            num_workers=self.workers,
            collate_fn=list,
            # Without its own generator, a loader draws a seed from the global one. Nothing is shuffled.
            generator=torch.Generator().manual_seed(0),
        )

    def batch(self, rows: Sequence[tuple[str, Tensor | str]]) -> Batch:
        """Make a batch from names and inputs.

        Args:
            rows: Names and inputs, as :meth:`loader` yields them.

        Raises:
            DatasetError: If an image is damaged, or sizes differ.
        """
        shapes: dict[tuple[int, ...], str] = {}
        for name, row in rows:
            if not isinstance(row, Tensor):
                raise DatasetError(
                    f"the image {name!r} in {str(self.path)!r} cannot be read ({row}); replace it, or skip damaged "
                    "images with skip_damaged=True (--skip-damaged)"
                )
            shapes[tuple(row.shape)] = name
        if len(shapes) > 1:
            sizes = ", ".join(f"{list(shape)} ({name})" for shape, name in list(shapes.items())[:2])
            texts = isinstance(self._rows, _Texts)
            raise DatasetError(
                f"the texts differ in length: {sizes}; let encode() in the model's file pad or cut them to one length"
                if texts
                else f"the images differ in size: {sizes}; pass size=(H, W) (--size), or set SIZE in the model's file"
            )
        inputs = torch.stack([row for _, row in rows if isinstance(row, Tensor)])
        inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs
        return Batch(inputs, self.preparation.displayable(inputs), tuple(name for name, _ in rows))


def _dataset_of(path: Path, preparation: Preparation, dtype: torch.dtype) -> _Array | _Images | _Texts:
    """Open a file or a folder by its ending."""
    ending = path.suffix.lower() if path.is_file() else ""
    if ending in TEXT_FILES:
        return _Texts(path, preparation)
    return _Array(path, dtype) if ending in ARRAY_FILES else _Images(path, preparation)


class _Texts(Dataset[tuple[str, Tensor]]):
    """Line numbers and ids of the texts in a file."""

    def __init__(self, path: Path, preparation: Preparation) -> None:
        if preparation.encode is None:
            raise DatasetError(
                f"{str(path)!r} holds texts, and the model's file has no encode(); define encode(text) to return the "
                "ids of its tokens, padded to one length"
            )
        self.encode = preparation.encode
        try:
            # Only line feeds end a text. str.splitlines would also split it at form feeds and separators of Unicode.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise DatasetError(f"{str(path)!r} cannot be read as text ({error}); save it in UTF-8") from error
        self.lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not self.lines:
            raise DatasetError(f"{str(path)!r} holds no texts; write one on each line")
        self.names = tuple(f"line {number}" for number, _ in self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        name, (_, line) = self.names[index], self.lines[index]
        try:
            ids = torch.as_tensor(self.encode(line))
        except Exception as error:
            raise ValueError(
                f"encode() raised {type(error).__name__} ({error}) for {name}; it must turn a text into the ids of its "
                "tokens"
            ) from error
        if ids.dim() != 1:
            raise ValueError(f"encode() returned ids {tuple(ids.shape)} for {name}; return those of one text, (L,)")
        return name, ids


class _Images(Dataset[tuple[str, Tensor | str]]):
    """Names and inputs from image files. For a damaged image, the input is replaced by the reason as text."""

    names: tuple[str, ...]

    def __init__(self, path: Path, preparation: Preparation) -> None:
        self.preparation = preparation
        if path.is_file():
            if path.suffix.lower() not in IMAGE_FILES:
                raise DatasetError(
                    f"{str(path)!r} is not a folder of images, an image ({', '.join(IMAGE_FILES)}), texts "
                    f"({', '.join(TEXT_FILES)}) or an array ({', '.join(ARRAY_FILES)}); convert it"
                )
            self.root, self.names = path.parent, (path.name,)
            return
        if not path.is_dir():
            raise DatasetError(f"the folder or file of inputs {str(path)!r} does not exist; check the path")
        files = list(_files(path))
        names = [name for name in files if Path(name).suffix.lower() in IMAGE_FILES]
        if not names:
            raise DatasetError(
                f"{str(path)!r} has no images among its {len(files)} files; file names must end in one of "
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
                image = _with_white_at_255(ImageOps.exif_transpose(opened), opened.format)
        except Exception as error:  # PIL's readers raise nearly every type for damaged files
            # PIL's own message for unknown formats repeats the path.
            unknown = isinstance(error, UnidentifiedImageError)
            return "unknown format" if unknown else " ".join(str(error).split())
        try:
            prepared = self.preparation(image)
        except Exception as error:
            raise ValueError(
                f"the transform raised {type(error).__name__} ({error}) for {self.names[index]!r}; it must turn a PIL "
                "image in RGB into a tensor"
            ) from error
        if not isinstance(prepared, Tensor):
            raise TypeError(
                f"the transform returned {type(prepared).__name__} instead of a tensor; end it with a conversion such "
                "as torchvision's ToTensor"
            )
        return prepared


def _with_white_at_255(image: Any, file_format: str | None) -> Any:
    """Scale an image with deeper pixels to floating-point pixels in [0, 255], without rounding them.

    PIL's own conversion would clip values above 255. 16-bit pixels are scaled by their whole range. Whole numbers of 32
    bits, which only TIFF holds, must lie in [0, 255] or in [0, 65535], and floating-point pixels in [0, 1] or in
    [0, 255].

    Raises:
        ValueError: If the pixels lie outside these ranges, so that the value of white is unknown.
    """
    from PIL import Image

    if not image.mode.startswith("I") and image.mode != "F":
        return image
    pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    if image.mode == "F":
        white = 1.0 if high <= 1 else 255.0
    else:  # older versions of PIL open 16 bits of other formats as "I"
        white = 255.0 if image.mode == "I" and file_format == "TIFF" and high <= 255 else 65535.0
    if not 0 <= low <= high <= white:  # true for NaN as well
        raise ValueError(
            f"pixels from {low:g} to {high:g} in mode {image.mode!r}, so the value of white is unknown; save it with "
            "8 or 16 bits, or with floating-point pixels from 0 to 1"
        )
    return Image.fromarray((pixels * (255.0 / white)).astype(np.float32))


def _in_eight_bits(image: Any) -> Any:
    """Round floating-point pixels in [0, 255] to 8 bits; return all other images as they are."""
    from PIL import Image

    return Image.fromarray(np.round(np.asarray(image)).astype(np.uint8)) if image.mode == "F" else image


class _Array(Dataset[tuple[str, Tensor]]):
    """Row indices and rows of an array in a file. The file is memory-mapped if its format allows."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        hint = "save one array (M, ...) of inputs with numpy.save, numpy.savez or torch.save"
        try:
            self.values = _read_array(path)
        except Exception as error:  # numpy, zipfile and torch each raise their own errors for damaged or foreign files
            reason = " ".join(str(error).split())[:200]
            raise DatasetError(f"{str(path)!r} cannot be read as an array ({reason}); {hint}") from error
        if not self.values.shape or not len(self.values):
            raise DatasetError(
                f"the array in {str(path)!r} has shape {tuple(self.values.shape)}, so it holds no inputs (M, ...); "
                f"{hint}"
            )
        self.dtype = dtype
        self.names = tuple(map(str, range(len(self.values))))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        row = self.values[index]
        row = torch.from_numpy(np.array(row)) if not isinstance(row, Tensor) else row
        return self.names[index], row.to(self.dtype) if row.is_floating_point() else row


def read_tensor(path: str | os.PathLike[str]) -> Tensor:
    """Read the one array of a file as a tensor.

    Args:
        path: A ``.npy``, ``.npz`` or ``.pt`` file. Nothing is unpickled.

    Raises:
        DatasetError: If the file cannot be read.
    """
    try:
        found = _read_array(Path(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(f"{str(path)!r} cannot be read as an array ({reason}); save it with numpy.save") from error
    return found if isinstance(found, Tensor) else torch.from_numpy(np.array(found))


def _of_numbers(array: Tensor | np.ndarray[Any, Any]) -> Tensor | np.ndarray[Any, Any]:
    """Return an array in the byte order of this machine; raise if torch cannot hold it."""
    if isinstance(array, Tensor):
        if array.layout != torch.strided:
            raise ValueError(f"it holds a tensor of layout {array.layout}, which is not dense")
        return array
    if array.dtype.kind not in "biufc":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _read_array(path: Path) -> Tensor | np.ndarray[Any, Any]:
    """Read the one array of a file."""
    if path.suffix.lower() == ".pt":
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, Tensor):
            raise ValueError(f"it holds a {type(found).__name__}")
        return _of_numbers(found)
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return _of_numbers(loaded)
    with loaded:
        if len(loaded.files) != 1:
            raise ValueError(f"it holds {len(loaded.files)} arrays: {', '.join(loaded.files[:5])}")
        return _of_numbers(loaded[loaded.files[0]])


def _files(root: Path) -> Iterator[str]:
    """Yield the paths of a folder's files, with ``/``. Skip hidden files and folders; follow links to a folder once."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [] if real in seen else [name for name in subfolders if not name.startswith(".")]
        if real not in seen:
            yield from (Path(folder, name).relative_to(root).as_posix() for name in files if not name.startswith("."))
        seen.add(real)
