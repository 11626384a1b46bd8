"""Rows of a table on disk, read on demand, in place of a tensor too large for memory.

``rows[numbers]`` and ``rows.split(n)`` give tensors, as they do for a tensor. Code that uses only a batch or a part at
a time therefore accepts either. ``rows[:]`` loads the whole table. Files are read, not mapped. The process holds only
the rows that it reads. A file that was cut short raises an error; with a memory map it would end the process.

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

__all__ = ["Head", "Rows", "chunks", "each", "head"]

# Most files open at a time; systems allow a process a few hundred at least.
_OPEN = 64
# Bytes of Z that a pass over all rows holds at a time.
_CHUNK = 1 << 23


class Head(NamedTuple):
    """The header of a .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    """Position of the first number, in bytes."""

    @property
    def size(self) -> int:
        """Bytes that the whole file should have."""
        return self.offset + int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def head(file: Path) -> Head:
    """Read shape, dtype and offset of the numbers in a .npy file.

    Args:
        file: The file.

    Raises:
        ValueError: If the file is not a .npy file, holds objects, or is in Fortran order.

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
            raise ValueError(f"{file} does not hold rows of numbers in C order; save np.ascontiguousarray(...) of them")
        return Head(shape, dtype, handle.tell())


class Rows:
    """Rows of one table in .npy files, one after the other.

    Every read returns new memory. Threads and forked processes may read at the same time.

    Args:
        files: The .npy files, in C order, of one dtype and of one shape apart from their number of rows.

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
        """Read one row to learn shape, dtype and device."""
        first = self[:1]
        self.shape = torch.Size((len(self), *first.shape[1:]))
        """Shape of the whole table."""
        self.dtype = first.dtype
        """Dtype of rows that have been read."""
        self.device = first.device
        """Device of rows that have been read."""

    def __len__(self) -> int:
        return self._files.rows

    def dim(self) -> int:
        """Return the number of dimensions, including the dimension of rows."""
        return len(self.shape)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        if isinstance(rows, slice):
            wanted = np.arange(*rows.indices(len(self)))
        else:
            wanted = (rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows).cpu().numpy()
            if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
                raise IndexError(
                    f"row indices must be from 0 to {len(self) - 1}, not {wanted.min()} to {wanted.max()}; count from "
                    "the start"
                )
        made = torch.from_numpy(self._files.read(wanted))
        for function in self._functions:
            made = function(made)
        return made

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all rows in order, a part at a time.

        Args:
            size: Most rows in a part.
        """
        for first in range(0, len(self), size):
            yield self[first : first + size]

    def map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """Apply a function to all rows that are read from now on; return the new rows.

        Args:
            function: Turns rows (m, ...) into m rows, each independent of the others.

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
    """The numbers of .npy files, one after the other; files stay open as long as this object lives."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.heads = [head(path) for path in self.paths]
        kinds = {(h.shape[1:], h.dtype) for h in self.heads}
        if len(kinds) != 1:
            raise ValueError(
                f".npy files must have one shape and dtype, and these {len(self.paths)} files have {len(kinds)} kinds; "
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
        """Read the numbers of some rows into new memory."""
        found = np.empty((len(wanted), *self.row), self.dtype)
        if not found.size:
            return found
        which = np.searchsorted(self.ends, wanted, side="right")
        into = found.reshape(-1).view(np.uint8).data
        runs = list(_runs(wanted, which))
        with self.lock:
            reads = []
            for first, last in runs:
                file = int(which[first])
                start = int(wanted[first] - (self.ends[file - 1] if file else 0))
                offset = self.heads[file].offset + start * self.bytes
                reads.append((file, offset, into[first * self.bytes : last * self.bytes]))
            if len(reads) > 1:  # the system fetches all uncached places at once
                reads = [read for read in reads if not self._cached(*read)]
            for read in reads:
                self._fill(*read)
        return found

    def _cached(self, file: int, offset: int, into: memoryview) -> bool:
        """Read bytes if they are in the system's cache; otherwise ask the disk to fetch them. Return whether read."""
        if not hasattr(os, "RWF_NOWAIT"):  # Linux
            return False
        handle = self._opened(file).fileno()
        try:
            if os.preadv(handle, [into], offset, os.RWF_NOWAIT) == len(into):
                return True
        except OSError:  # no byte is in the cache, or the file system cannot tell
            pass
        os.posix_fadvise(handle, offset, len(into), os.POSIX_FADV_WILLNEED)
        return False

    def _fill(self, file: int, offset: int, into: memoryview) -> None:
        """Read bytes of a file from an offset on."""
        handle, done = self._opened(file), 0
        while done < len(into):
            count = _read_at(handle, offset + done, into[done:])
            if not count:
                raise OSError(
                    f"{self.paths[file]} has {offset + done} bytes instead of {self.heads[file].size}, as it was cut "
                    "short since it was opened; collect the activations again to mend it"
                )
            done += count

    def _opened(self, file: int) -> FileIO:
        """Open a file, or take it from the open ones; close the least recently used file if too many are open."""
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
    """Apply a function to a tensor, or to rows on disk as they are read.

    Args:
        rows: A tensor or rows on disk; the result is of the same kind.
        function: Computes each row independently of the others.

    Example:
        >>> each(torch.ones(2, 3), lambda z: z.flatten(1) * 2).sum()
        tensor(12.)
    """
    return rows.map(function) if isinstance(rows, Rows) else function(rows)


def chunks(rows: Tensor | Rows) -> Iterable[Tensor]:
    """Split all rows, in order, into chunks of some megabytes: the same chunks of a tensor and of rows on disk.

    Sums over the chunks are therefore identical for a tensor and for rows on disk.

    Args:
        rows: A tensor or rows on disk, with at least one row.

    Example:
        >>> [len(chunk) for chunk in chunks(torch.zeros(3000, 2048))]
        [1024, 1024, 952]
    """
    # Sized for float32 whatever the dtype: rows in half precision are converted as they are read.
    size = max(1, _CHUNK // (4 * max(1, int(np.prod(rows.shape[1:], dtype=np.int64)))))
    return rows.split(size)


def _read_at(handle: FileIO, offset: int, into: memoryview) -> int:
    """Read bytes from an offset on; return how many."""
    if hasattr(os, "preadv"):  # does not move the file's position, which forked processes share
        return os.preadv(handle.fileno(), [into], offset)
    handle.seek(offset)
    return handle.readinto(into) or 0


def _runs(rows: np.ndarray[Any, Any], files: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Yield the first place, and the place after the last, of rows that follow each other in one file."""
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(files) != 0)) + 1
    bounds = [0, *breaks.tolist(), len(rows)]
    yield from itertools.pairwise(bounds)
