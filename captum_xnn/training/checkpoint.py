"""Checkpoints of a fit, from which it goes on with the very numbers that it would have had.

A checkpoint is one file in a folder, named after the data, settings and weights that a fit starts from, so that no
other fit goes on from it. It is written beside its place and moved there in one step, begins with a checksum of the
rest, as a fit would go on from a wrong number without a word, and is read without running foreign code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_xnn.errors import CheckpointError
from captum_xnn.serialization import checksum, replace_file

__all__ = ["Checkpoint"]

# Of what a fit writes: one that wrote another is another fit.
_LAYOUT = 1
# Bytes of the checksum.
_DIGEST = 32


class Checkpoint:
    """A folder in which a fit keeps where it stands.

    Args:
        folder: Made if need be. Processes that fit together need to see the same one.
        every: Seconds between two checkpoints, at least.

    Example:
        >>> import tempfile
        >>> checkpoint = Checkpoint(tempfile.mkdtemp(), every=0)
        >>> key = Checkpoint.key(["a fit", torch.zeros(3)])
        >>> checkpoint.write(key, {"step": 3})
        >>> checkpoint.read(key, torch.device("cpu"))
        {'step': 3}
        >>> checkpoint.read(Checkpoint.key(["another fit"]), torch.device("cpu")) is None
        True
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: float = 60.0) -> None:
        self.folder, self.every = Path(folder), every
        self._last = time.monotonic()

    @staticmethod
    def key(parts: Iterable[Any]) -> str:
        """Returns the name under which a fit is found again, 16 hexadecimal digits.

        Args:
            parts: What makes it this fit: texts, numbers, tensors, and lists of them.
        """
        described = [_LAYOUT, *(_described(part) for part in parts)]
        return hashlib.blake2b(repr(described).encode(), digest_size=8).hexdigest()

    def due(self) -> bool:
        """Returns whether it is time for another checkpoint."""
        return time.monotonic() - self._last >= self.every

    def _path(self, key: str) -> Path:
        return self.folder / f"fit-{key}.checkpoint"

    def write(self, key: str, state: dict[str, Any]) -> None:
        """Writes where a fit stands, in place of what it wrote before.

        Args:
            key: What :meth:`key` returned.
            state: Tensors, numbers, texts, and lists and dicts of them.

        Raises:
            CheckpointError: If it cannot be written, as on a full disk; the last one stays.
        """
        data = io.BytesIO()
        torch.save(state, data)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(key), _digest(data.getbuffer()), data.getbuffer())
        except OSError as error:
            raise CheckpointError(
                f"expected to write a checkpoint to {str(self.folder)!r}, got {error}; make room or name another "
                "folder and fit again: it goes on from the last checkpoint"
            ) from error
        self._last = time.monotonic()

    def read(self, key: str, device: torch.device) -> Any:
        """Returns what was written last, None if nothing was.

        Args:
            key: What :meth:`key` returned.
            device: Where its tensors are to be.

        Raises:
            CheckpointError: If the file is damaged.
        """
        path = self._path(key)
        if not path.exists():
            return None
        found = memoryview(path.read_bytes())
        digest, data = found[:_DIGEST], found[_DIGEST:]
        if digest != _digest(data):
            raise CheckpointError(
                f"expected a whole checkpoint in {str(path)!r}, got a damaged one; delete it to fit from the start"
            )
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)

    def clear(self) -> None:
        """Removes all checkpoints in the folder, and the folder if nothing else is in it.

        Example:
            >>> import tempfile
            >>> checkpoint = Checkpoint(Path(tempfile.mkdtemp()) / "kept")
            >>> checkpoint.write("0", {"step": 3})
            >>> checkpoint.clear()
            >>> checkpoint.folder.exists()
            False
        """
        for path in self.folder.glob("fit-*.checkpoint"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # files of somebody else are in it
            self.folder.rmdir()


def _digest(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _described(part: Any) -> Any:
    if isinstance(part, Tensor):
        return checksum(part)
    return [_described(p) for p in part] if isinstance(part, list) else part
