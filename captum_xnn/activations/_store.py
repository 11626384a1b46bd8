"""Activations on disk: shards of some thousand examples each, as plain .npy files, and JSON that describes them.

A folder holds::

    store.json          the manifest: model fingerprint, layer, dtypes, shapes, examples in a shard, examples in all
    Z-00000.npy         activations of the first shard, (examples, ...); numpy.load(..., mmap_mode="r") reads them
    y_hat-00000.npy     the model's outputs on the same examples
    shard-00000.json    written last: the shard is done. Checksums of both files and of its first example's inputs
    rank-0.lock         held by the process that writes; a file left behind has no effect

Every file is written under a temporary name, flushed to the disk, and renamed in one step. A process killed at any
point therefore leaves only whole shards. The ``shard-*.json`` files list the finished shards. Each belongs to one
process, so several processes can write at the same time. Shard i holds examples ``i * n`` to ``(i + 1) * n - 1``
whatever the size of batches, and process r of w writes the shards with ``i % w == r``.

NumPy has no bfloat16. Tensors of a dtype that NumPy lacks are stored as float32, without loss, and converted back when
they are read.

Conventions:
    M examples. A table is "Z" or "y_hat".
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_xnn._files import Format, read_json, replace_file
from captum_xnn.activations._memmap import Rows, head
from captum_xnn.errors import StoreError

__all__ = ["SCHEMA", "TABLES", "Store", "file_checksum", "locked", "stored"]

SCHEMA = 1
TABLES = ("Z", "y_hat")
_MANIFEST = "store.json"
_KIND = "captum_xnn activations"
# A process holds one shard in memory and loses it when killed: at most 64 MiB, and at most 4096 examples.
_SHARD_BYTES, _SHARD_ROWS = 1 << 26, 4096
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AGAIN = "collect again with the same call, which makes only the missing shards"
_FORMAT = Format(
    "activations",
    {"kind": _KIND},
    ("schema", SCHEMA),
    (),
    StoreError,
    "pass the folder that activations were collected into, store=..., or collect into another folder",
)


class Store:
    """Activations of one layer of one model, in a folder.

    Args:
        folder: The folder.
        manifest: Contents of its store.json.

    Example:
        >>> import tempfile
        >>> tables = {"Z": torch.rand(3, 2), "y_hat": torch.rand(3)}
        >>> store = Store.create(Path(tempfile.mkdtemp()), {"fingerprint": {"layer": "fc"}}, tables, rows_per_shard=2)
        >>> for i, rows in enumerate((slice(0, 2), slice(2, 3))):
        ...     store.write(i, {name: t[rows] for name, t in tables.items()}, first="")
        >>> store.finish(3)
        >>> torch.equal(store.rows("Z")[:], tables["Z"])
        True
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        about: Mapping[str, Any],
        tables: Mapping[str, Tensor],
        *,
        rows_per_shard: int | None = None,
        rows: int | None = None,
    ) -> Store:
        """Create a store without shards, or open the store that another process made meanwhile.

        Args:
            folder: The folder; created if missing.
            about: Entries of the manifest about the model, as JSON can hold them. Its ``fingerprint`` names the layer.
            tables: Some examples of every table, for their shapes and dtypes.
            rows_per_shard: Examples in a shard; by default 4,096, or fewer where these are more than 64 MiB.
            rows: Examples in all, where known.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described = {name: _described(table) for name, table in tables.items()}
        size = sum(t[:1].numel() * stored(t).element_size() for t in tables.values())
        manifest = {
            "kind": _KIND,
            "schema": SCHEMA,
            **about,
            "tables": described,
            "rows_per_shard": rows_per_shard or max(1, min(_SHARD_ROWS, _SHARD_BYTES // max(1, size))),
            "rows": rows,
        }
        if not cls.exists(folder):
            _writing(folder / _MANIFEST, "the manifest", json.dumps(manifest, indent=1).encode())
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Store:
        """Open the store in a folder; read only its manifest.

        Args:
            folder: The folder.

        Raises:
            StoreError: If the folder holds no store, or one of another version or program.
        """
        path = Path(folder) / _MANIFEST
        manifest = _FORMAT.read(path)
        try:
            n, rows = int(manifest["rows_per_shard"]), manifest["rows"]
            complete = n > 0 and (rows is None or int(rows) > 0) and bool(manifest["fingerprint"]["layer"] is not None)
            complete = complete and all({"dtype", "shape"} <= set(manifest["tables"][name]) for name in TABLES)
        except (KeyError, TypeError, ValueError):
            complete = False
        if not complete:
            raise StoreError(f"the manifest {path} lacks entries; delete it and collect anew")
        return cls(Path(folder), manifest)

    @staticmethod
    def exists(folder: str | os.PathLike[str]) -> bool:
        """Whether a folder holds a manifest.

        Args:
            folder: The folder.
        """
        return (Path(folder) / _MANIFEST).exists()

    @property
    def layer(self) -> str:
        """Dotted name of the layer."""
        return str(self.manifest["fingerprint"]["layer"])

    @property
    def key(self) -> str:
        """A checksum that differs from that of any other or earlier store in this folder, 16 hexadecimal digits."""
        own = {k: v for k, v in self.manifest.items() if k != "rows"}
        return hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def rows_per_shard(self) -> int:
        """Examples in every shard but the last."""
        return int(self.manifest["rows_per_shard"])

    @property
    def examples(self) -> int | None:
        """Examples M in all; None until the data have been read once."""
        return None if self.manifest["rows"] is None else int(self.manifest["rows"])

    @property
    def shards(self) -> int | None:
        """Shards in all; None until the data have been read once."""
        return None if self.examples is None else -(-self.examples // self.rows_per_shard)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Compute the first row of a shard and the row after its last. The last shard ends early, where M is known.

        Args:
            shard: Index of the shard.
        """
        first, after = shard * self.rows_per_shard, (shard + 1) * self.rows_per_shard
        return first, after if self.examples is None else min(after, self.examples)

    def finish(self, rows: int) -> None:
        """Write the number of examples to the manifest, when the end of the data is reached.

        Args:
            rows: Examples in all.

        Raises:
            StoreError: If the manifest already has another number.
        """
        self.manifest = self.open(self.folder).manifest  # another rank may have reached the end
        if self.examples not in (None, rows):
            raise StoreError(
                f"{self.folder} was begun with {self.examples} examples, and these data have {rows}; pass the same "
                "data, or collect these into another folder"
            )
        if self.examples is None:
            self.manifest = {**self.manifest, "rows": rows}
            _writing(self.folder / _MANIFEST, "the manifest", json.dumps(self.manifest, indent=1).encode())

    def write(self, shard: int, tables: Mapping[str, Tensor], *, first: str) -> None:
        """Write a shard, whole or not at all.

        Args:
            shard: Index of the shard.
            tables: The shard's rows of every table, the same number in each.
            first: Checksum of the inputs of the first example.

        Raises:
            OSError: If the disk is full, or the folder cannot be written to. Finished shards stay.
        """
        files = {}
        for name, table in tables.items():
            array = np.ascontiguousarray(stored(table).numpy())
            start = io.BytesIO()
            np.lib.format.write_array_header_1_0(start, np.lib.format.header_data_from_array_1_0(array))
            data = start.getvalue(), array.reshape(-1).view(np.uint8).data
            digest = hashlib.sha256()
            for some in data:
                digest.update(some)
            files[name] = {"name": f"{name}-{shard:05d}.npy", "sha256": digest.hexdigest()}
            _writing(self.folder / files[name]["name"], f"shard {shard}", *data)
        entry = {"store": self.key, "rows": len(tables[TABLES[0]]), "first_inputs": first, "files": files}
        _writing(self._entry(shard), f"shard {shard}", json.dumps(entry, indent=1).encode())

    def _entry(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.json"

    def begun(self, shard: int) -> bool:
        """Whether a shard has been finished, even if it is damaged now.

        Args:
            shard: Index of the shard.
        """
        return self._entry(shard).exists()

    def first_inputs(self, shard: int) -> str:
        """Read the checksum of the inputs of a finished shard's first example.

        Args:
            shard: Index of the shard.
        """
        return str(read_json(self._entry(shard), StoreError, _AGAIN)["first_inputs"])

    def damage(self, shard: int, *, checksums: bool = True) -> str | None:
        """Describe the damage of a shard, as the end of a sentence that begins "shard i"; None if it is whole.

        Args:
            shard: Index of the shard.
            checksums: Whether to read its files and compare checksums, rather than look at sizes only.
        """
        entry = self._entry(shard)
        if not self.begun(shard):
            return "is not collected yet"
        try:
            described = json.loads(entry.read_bytes())
            first, after = self.bounds(shard)
            if described["store"] != self.key:
                return "is of another model or other data than the manifest"
            if described["rows"] != after - first:
                return f"has {described['rows']} examples instead of {after - first}"
            files = {name: (str(f["name"]), str(f["sha256"])) for name, f in described["files"].items()}
            described["first_inputs"]
            wanted = {name: (after - first, *self.manifest["tables"][name]["shape"]) for name in TABLES}
            found = (self._file_damage(*files[name], wanted[name], checksums) for name in TABLES)
            return next((damage for damage in found if damage), None)
        except (AttributeError, KeyError, TypeError, ValueError):
            return f"is described by {entry.name}, which is damaged"

    def _file_damage(self, name: str, sha256: str, shape: tuple[int, ...], checksums: bool) -> str | None:
        path = self.folder / Path(name).name
        try:
            size, found = path.stat().st_size, head(path)
        except FileNotFoundError:
            return f"lacks {name}"
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            return f"has {name}, whose beginning cannot be read ({error})"
        if size != found.size:
            return f"has {name} with {size} bytes instead of {found.size}: it was cut short, or written to"
        if found.shape != shape:
            return f"has {name} with shape {found.shape} instead of {shape}"
        if checksums and file_checksum(path) != sha256:
            return f"has {name} with another checksum than when it was written"
        return None

    def check(self, *, checksums: bool = True) -> None:
        """Raise where the store is incomplete or damaged.

        Args:
            checksums: Whether to read all files and compare checksums, rather than look at sizes only.

        Raises:
            StoreError: If shards are missing or damaged. The error names them.
        """
        if self.shards is None:
            raise StoreError(
                f"{self.folder} does not hold all activations, as the data were never read to their end; {_AGAIN}"
            )
        found = ((i, self.damage(i, checksums=checksums)) for i in range(self.shards))
        damaged = [(i, damage) for i, damage in found if damage]
        if damaged:
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            said = "; ".join(f"shard {i} {damage}" for i, damage in damaged[:3])
            raise StoreError(f"{self.folder} does not hold {self.shards} whole shards: {said}{more}; {_AGAIN}")

    def rows(self, table: str) -> Rows:
        """Open a table of a complete store, to be read row by row.

        Args:
            table: "Z" or "y_hat".

        Raises:
            StoreError: If the store is not complete.
        """
        self.check(checksums=False)
        return self.shard(table, *range(self.shards or 0))

    def shard(self, table: str, *shards: int) -> Rows:
        """Open a table's rows of finished shards, one shard after the other.

        Args:
            table: "Z" or "y_hat".
            shards: Indices of the shards.
        """
        entries = (read_json(self._entry(shard), StoreError, _AGAIN) for shard in shards)
        files = [self.folder / Path(entry["files"][table]["name"]).name for entry in entries]
        rows, dtype = Rows(files), getattr(torch, self.manifest["tables"][table]["dtype"])
        return rows if rows.dtype == dtype else rows.map(lambda values: values.to(dtype))

    def sweep(self, rank: int, world_size: int) -> None:
        """Remove the unfinished files that a killed process left among the shards of a rank.

        Args:
            rank: Rank of this process.
            world_size: Number of processes.
        """
        for draft in self.folder.glob(".*-*.tmp"):
            number = draft.name.split(".")[1].rpartition("-")[2]
            if number.isdecimal() and int(number) % world_size == rank:
                draft.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, rank: int) -> Iterator[None]:
    """Hold the lock of one rank of a store, so that no other process writes as this rank.

    The system frees the lock when the process ends, however it ends. There is no lock on Windows, nor on file systems
    without locks. Two processes of the same rank then do the same work twice.

    Args:
        folder: The store's folder.
        rank: Rank of this process among those that share the work.

    Raises:
        StoreError: If another process holds the lock.
    """
    with (folder / f"rank-{rank}.lock").open("a") as file:
        if not _lock(file):
            raise StoreError(
                f"another process already collects into {folder} as rank {rank}; wait for it, or share the work by "
                "rank= and world_size="
            )
        yield


def stored(table: Tensor) -> Tensor:
    """Convert a tensor so that NumPy can hold it: to the CPU, and to float32 where NumPy lacks its dtype.

    Args:
        table: Any tensor.

    Example:
        >>> stored(torch.ones(2, dtype=torch.bfloat16)).dtype, stored(torch.ones(2, dtype=torch.float16)).dtype
        (torch.float32, torch.float16)
    """
    table = table.detach().cpu()
    try:
        table[:0].numpy()
    except TypeError:
        return table.float()
    return table


def file_checksum(path: Path) -> str:
    """Compute the SHA-256 of a file, read one MiB at a time.

    Args:
        path: The file.
    """
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with FileIO(path) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _described(table: Tensor) -> dict[str, Any]:
    """Describe a table for the manifest."""
    name = str(table.dtype).removeprefix("torch.")
    return {
        "dtype": name,
        "stored_as": str(stored(table[:0]).dtype).removeprefix("torch."),
        "shape": list(table.shape[1:]),
    }


def _writing(path: Path, what: str, *data: bytes | memoryview) -> None:
    """Write a file in place of the old one; where the disk is full, raise an error that names the remedy."""
    try:
        replace_file(path, *data)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        size = sum(memoryview(some).nbytes for some in data) / 1e6
        raise OSError(
            error.errno,
            f"no room for {what} ({size:.3g} MB): {error.strerror!r}; finished shards stay: make room and {_AGAIN}",
            str(path),
        ) from error


def _lock(file: io.TextIOWrapper) -> bool:
    """Lock a file until it is closed; return False where another process holds its lock."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        # Not flock: forked loader workers would keep its locks for seconds after their parent was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # any other error: a file system without locks
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
