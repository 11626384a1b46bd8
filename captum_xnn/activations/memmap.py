"""Rows of a table that lies on disk, read as they are asked for: what stands in for a tensor too large for memory.

``rows[numbers]`` and ``rows.split(n)`` give tensors, as they do of a tensor, so that code which takes no more than a
batch or a part at a time takes either; ``rows[:]`` is the whole table in memory. Files are read, not mapped: the
process stays as small as what it asks for, and a file that was cut short is an error, where a memory map would end the
process.

Conventions:
    M rows of any shape (...), in .npy files of several rows each.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Head", "Rows", "each", "head", "parts"]

# Files that are open at a time; systems allow a process a few hundred at least.
_OPEN = 64
# Bytes of Z that a pass over all rows holds at a time.
_PART = 1 << 23


class Head(NamedTuple):
    """What a .npy file says of itself."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    """Of the first number, in bytes."""

    @property
    def size(self) -> int:
        """Bytes that the whole file should have."""
        return self.offset + int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def head(file: Path) -> Head:
    """Returns shape, dtype and offset of the numbers of a .npy file.

    Args:
        file: The file.

    Raises:
        ValueError: If it is no .npy file, holds objects, or is in Fortran order.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "zeros.npy"
        >>> np.save(file, np.zeros((3, 2), np.float32))
        >>> head(file).shape, head(file).size == file.stat().st_size
        ((3, 2), True)
    """
    with file.open("rb") as handle:
        version = np.lib.format.read_magic(handle)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(handle)
        if fortran or dtype.hasobject or not shape:
            raise ValueError(f"expected rows of numbers in C order in {file}; save np.ascontiguousarray(...) of them")
        return Head(shape, dtype, handle.tell())


class Rows:
    """Rows of one table in .npy files, one after the other.

    What is read is fresh memory; threads and forked processes may read at the same time.

    Args:
        files: The .npy files, in C order, all of one dtype and, but for their number of rows, of one shape.

    Raises:
        ValueError: If there are no files, or they differ in shape or dtype.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for i in range(2):
        ...     np.save(folder / f"{i}.npy", np.arange(6.0).reshape(3, 2) + 6 * i)
        >>> rows = Rows([folder / "0.npy", folder / "1.npy"])
        >>> rows.shape, rows[torch.tensor([4, 0])]
        (torch.Size([6, 2]), tensor([[8., 9.],
                [0., 1.]], dtype=torch.float64))
        >>> [len(part) for part in rows.split(4)]
        [4, 2]
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = _Files(files)
        self._functions: tuple[Callable[[Tensor], Tensor], ...] = ()
        self._describe()

    def _describe(self) -> None:
        """Takes down what reading will give."""
        first = self[:1]
        self.shape = torch.Size((len(self), *first.shape[1:]))
        """Of the whole table."""
        self.dtype = first.dtype
        """Of what is read."""
        self.device = first.device
        """Where rows are when they have been read."""

    def __len__(self) -> int:
        return self._files.rows

    def dim(self) -> int:
        """Returns the number of dimensions, that of the rows included."""
        return len(self.shape)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        if isinstance(rows, slice):
            wanted = np.arange(*rows.indices(len(self)))
        else:
            wanted = (rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows).cpu().numpy()
            if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
                raise IndexError(
                    f"expected row numbers from 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}; count from "
                    "the start"
                )
        made = torch.from_numpy(self._files.read(wanted))
        for function in self._functions:
            made = function(made)
        return made

    def split(self, size: int) -> Iterator[Tensor]:
        """Yields all rows in order, at most so many at a time.

        Args:
            size: Rows at a time.
        """
        for first in range(0, len(self), size):
            yield self[first : first + size]

    def map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """Returns the same rows with a function applied to whatever is read, in which every row counts for itself.

        Args:
            function: From some rows (m, ...) to as many.

        Example:
            >>> import tempfile
            >>> file = Path(tempfile.mkdtemp()) / "rows.npy"
            >>> np.save(file, np.arange(4.0).reshape(2, 2))
            >>> Rows([file]).map(lambda z: z.float().sum(1))[:]
            tensor([1., 5.])
        """
        made: Rows = object.__new__(Rows)
        made._files, made._functions = self._files, (*self._functions, function)
        made._describe()
        return made

    def __repr__(self) -> str:
        return f"Rows(shape={tuple(self.shape)}, dtype={self.dtype}, files={len(self._files.paths)})"


class _Files:
    """The numbers of .npy files, one after the other; files stay open until nobody reads them any longer."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.heads = [head(path) for path in self.paths]
        kinds = {(h.shape[1:], h.dtype) for h in self.heads}
        if len(kinds) != 1:
            raise ValueError(
                f"expected .npy files of one shape and dtype, got {len(kinds)} kinds in {len(self.paths)} files; "
                "write them anew"
            )
        ((self.row, self.dtype),) = kinds
        self.bytes = int(np.prod(self.row, dtype=np.int64)) * self.dtype.itemsize
        self.ends = np.cumsum([h.shape[0] for h in self.heads])
        self.rows = int(self.ends[-1])
        self._begin()

    def _begin(self) -> None:
        self.open: OrderedDict[int, FileIO] = OrderedDict()
        self.lock = threading.Lock()
        weakref.finalize(self, _close, self.open)

    def read(self, wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Returns the numbers of some rows, in fresh memory."""
        found = np.empty((len(wanted), *self.row), self.dtype)
        if not found.size:
            return found
        which = np.searchsorted(self.ends, wanted, side="right")
        into = found.reshape(-1).view(np.uint8).data
        runs = list(_runs(wanted, which))
        with self.lock:
            places = []
            for first, last in runs:
                file = int(which[first])
                start = int(wanted[first] - (self.ends[file - 1] if file else 0))
                offset = self.heads[file].offset + start * self.bytes
                places.append((file, offset, into[first * self.bytes : last * self.bytes]))
            if len(places) > 1:  # the system fetches what is not in its cache from all places at once
                places = [place for place in places if not self._cached(*place)]
            for place in places:
                self._fill(*place)
        return found

    def _cached(self, file: int, offset: int, into: memoryview) -> bool:
        """Returns whether bytes could be read without waiting for the disk, which is asked to fetch them otherwise."""
        if not hasattr(os, "RWF_NOWAIT"):  # Linux
            return False
        handle = self._opened(file).fileno()
        try:
            if os.preadv(handle, [into], offset, os.RWF_NOWAIT) == len(into):
                return True
        except OSError:  # nothing of it is in the cache, or the file system cannot tell
            pass
        os.posix_fadvise(handle, offset, len(into), os.POSIX_FADV_WILLNEED)
        return False

    def _fill(self, file: int, offset: int, into: memoryview) -> None:
        """Reads bytes of a file from an offset on."""
        handle, done = self._opened(file), 0
        while done < len(into):
            count = _read_at(handle, offset + done, into[done:])
            if not count:
                raise OSError(
                    f"expected {self.heads[file].size} bytes in {self.paths[file]}, got {offset + done}; the file was "
                    "cut short since it was opened, collect the activations again to mend it"
                )
            done += count

    def _opened(self, file: int) -> FileIO:
        """Returns a file, opened now or before; that not used for longest is closed."""
        if file not in self.open:
            self.open[file] = FileIO(self.paths[file])
            if len(self.open) > _OPEN:
                self.open.popitem(last=False)[1].close()
        self.open.move_to_end(file)
        return self.open[file]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("open", "lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _close(files: OrderedDict[int, FileIO]) -> None:
    while files:
        files.popitem()[1].close()


def each(rows: Tensor | Rows, function: Callable[[Tensor], Tensor]) -> Any:
    """Returns a function of a tensor, or rows to which it is applied as they are read.

    Args:
        rows: Of one or the other kind, which is that of the result.
        function: In which every row counts for itself.

    Example:
        >>> each(torch.ones(2, 3), lambda z: z.flatten(1) * 2).sum()
        tensor(12.)
    """
    return rows.map(function) if isinstance(rows, Rows) else function(rows)


def parts(rows: Tensor | Rows) -> Iterable[Tensor]:
    """Returns all rows in order, some megabytes of them at a time: the same parts of a tensor and of rows on disk.

    What is summed over them is therefore the same number by number, wherever the rows are.

    Args:
        rows: Of either kind, at least one.

    Example:
        >>> [len(part) for part in parts(torch.zeros(3000, 2048))]
        [1024, 1024, 952]
    """
    # As if in float32, whatever it is: rows in half precision are converted as they are read.
    size = max(1, _PART // (4 * max(1, int(np.prod(rows.shape[1:], dtype=np.int64)))))
    return rows.split(size)


def _read_at(handle: FileIO, offset: int, into: memoryview) -> int:
    """Returns how many bytes were read from an offset on."""
    if hasattr(os, "preadv"):  # leaves alone the file's position, which forked processes share
        return os.preadv(handle.fileno(), [into], offset)
    handle.seek(offset)
    return handle.readinto(into) or 0


def _runs(rows: np.ndarray[Any, Any], files: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Yields first and last place, exclusive, of rows that follow each other in one file."""
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(files) != 0)) + 1
    bounds = [0, *breaks.tolist(), len(rows)]
    yield from itertools.pairwise(bounds)
