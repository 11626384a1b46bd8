"""Checkpoints of a fit. A resumed fit gives the same numbers as an uninterrupted one.

A checkpoint is one file in a folder. Its name depends on the data, settings and first weights of the fit, so no other
fit resumes from it. A temporary file takes the data first and then replaces the checkpoint in one step. The file begins
with a checksum of its contents, because a fit would not notice a wrong number. Reading a file runs no foreign code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_xnn._distributed import Ranks
from captum_xnn._files import replace_file
from captum_xnn.errors import CheckpointError
from captum_xnn.layers._fingerprint import checksum

__all__ = ["Checkpoint", "FitCheckpoint"]

# Version of the contents. Checkpoints of another version belong to other fits.
_LAYOUT = 5
# Bytes of the checksum.
_DIGEST = 32


class Checkpoint:
    """A folder for the checkpoints of fits.

    Args:
        folder: Created if missing. Processes that fit together must share it.
        every: Least time between two checkpoints, in seconds.

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
        """Compute the key of a fit, 16 hexadecimal digits.

        Args:
            parts: Values that identify the fit: texts, numbers, tensors, and lists of these.
        """
        described = [_LAYOUT, *(_described(part) for part in parts)]
        return hashlib.blake2b(repr(described).encode(), digest_size=8).hexdigest()

    def due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        return time.monotonic() - self._last >= self.every

    def _path(self, key: str) -> Path:
        return self.folder / f"fit-{key}.checkpoint"

    def write(self, key: str, state: dict[str, Any]) -> None:
        """Write the checkpoint of a fit in place of its last one.

        Args:
            key: Key of the fit, from :meth:`key`.
            state: Tensors, numbers, texts, and lists and dicts of these.

        Raises:
            CheckpointError: If the file cannot be written, for example on a full disk. The last checkpoint stays.
        """
        data = io.BytesIO()
        torch.save(state, data)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(key), _digest(data.getbuffer()), data.getbuffer())
        except OSError as error:
            raise CheckpointError(
                f"writing a checkpoint to {str(self.folder)!r} failed: {error}; make room, or name another folder, and "
                "fit again to resume from the last checkpoint"
            ) from error
        self._last = time.monotonic()

    def read(self, key: str, device: torch.device) -> Any:
        """Read the last checkpoint of a fit; None without one.

        Args:
            key: Key of the fit, from :meth:`key`.
            device: Device for the tensors.

        Raises:
            CheckpointError: If the file is damaged.
        """
        path = self._path(key)
        if not path.exists():
            return None
        found = memoryview(path.read_bytes())
        digest, data = found[:_DIGEST], found[_DIGEST:]
        if digest != _digest(data):
            raise CheckpointError(f"the checkpoint {str(path)!r} is damaged; delete it to fit from the start")
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)

    def clear(self) -> None:
        """Remove all checkpoints in the folder, and the folder itself if it is then empty.

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
        with contextlib.suppress(OSError):  # the folder holds other files
            self.folder.rmdir()


class FitCheckpoint:
    """The checkpoint of one fit, shared by the processes that learn together.

    Args:
        checkpoint: The folder. None reads and writes nothing.
        parts: Values that identify the fit, as in :meth:`Checkpoint.key`. Read only if there is a folder.
        ranks: The processes.

    Example:
        >>> import tempfile
        >>> from captum_xnn._distributed import ALONE
        >>> kept = FitCheckpoint(Checkpoint(tempfile.mkdtemp()), ["a fit"], ALONE)
        >>> kept.write(lambda: {"step": 3})
        >>> kept.read(torch.device("cpu"))
        {'step': 3}
    """

    def __init__(self, checkpoint: Checkpoint | None, parts: Iterable[Any], ranks: Ranks) -> None:
        self.checkpoint, self.ranks = checkpoint, ranks
        # Sums differ between processes, and the first one writes: its key counts.
        self.key = "" if checkpoint is None else ranks.all_of(Checkpoint.key(parts))[0]

    def due(self) -> bool:
        """Whether it is time for the next checkpoint; always True without a folder."""
        return self.checkpoint is None or self.checkpoint.due()

    def write(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the checkpoint.

        Args:
            state: Collects the state of the fit, with the number of its ``"step"``.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        if self.checkpoint is not None:
            self.checkpoint.write(self.key, state())

    def read(self, device: torch.device) -> Any:
        """Read the last checkpoint; None without one.

        Args:
            device: Device for the tensors.

        Raises:
            CheckpointError: If the file is damaged, or if processes find different checkpoints.
        """
        if self.checkpoint is None:
            return None
        saved = self.checkpoint.read(self.key, device)
        found = self.ranks.all_of(0 if saved is None else saved["step"])
        if len(set(found)) > 1:
            raise CheckpointError(
                f"processes cannot resume from one checkpoint, because in {str(self.checkpoint.folder)!r} they found "
                f"steps {found}; name a folder that all of them share"
            )
        return saved


def _digest(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _described(part: Any) -> Any:
    if isinstance(part, Tensor):
        return checksum(part)
    return [_described(p) for p in part] if isinstance(part, list) else part
