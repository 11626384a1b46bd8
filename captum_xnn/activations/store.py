"""Activations on disk: shards of some thousand examples each, as plain .npy files, and JSON that says what they are.

A folder holds::

    store.json          the manifest: model fingerprint, layer, dtypes, shapes, examples in a shard, examples in all
    Z-00000.npy         activations of the first shard, (examples, ...); numpy.load(..., mmap_mode="r") reads them
    y_hat-00000.npy     the model's outputs on the same examples
    shard-00000.json    written last: the shard is done. Checksums of both files and of its first example's inputs
    rank-0.lock         held by the process that writes; left behind, it means nothing

Every file is written beside its place, brought to the disk, and moved there in one step, so that a process killed at
any point leaves whole shards and nothing that looks like one. The list of what is done is the set of
``shard-*.json`` files: each belongs to one process, and several can write at the same time. Shard i holds examples
``i * n`` to ``(i + 1) * n - 1`` whatever the size of batches, and process r of w writes the shards with ``i % w == r``.

NumPy has no bfloat16. What it lacks is stored as float32, which holds the same numbers, and read back as what it was.

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

from captum_xnn.activations.memmap import Rows, head
from captum_xnn.errors import StoreError
from captum_xnn.serialization import replace_file

__all__ = ["SCHEMA", "TABLES", "Store", "file_checksum", "locked", "stored"]

SCHEMA = 1
TABLES = ("Z", "y_hat")
_MANIFEST = "store.json"
_KIND = "captum_xnn activations"
# A shard is what a process holds in memory and what a kill loses: 64 MiB of it, and no more than 4096 examples.
_SHARD_BYTES, _SHARD_ROWS = 1 << 26, 4096
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AGAIN = "collect again with the same call, which makes only what is missing"


class Store:
    """Activations of one layer of one model, in a folder.

    Args:
        folder: The folder.
        manifest: What its store.json says.

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
        """Returns a new store without shards, or the one that another process made meanwhile.

        Args:
            folder: Made if need be.
            about: What to write down of the model, as JSON can hold it: its ``fingerprint``, which names the layer.
            tables: Some examples of every table, for their shapes and dtypes.
            rows_per_shard: Examples in a shard; by default 4,096, or fewer where these are more than 64 MiB.
            rows: Examples in all, where that is known.
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
        """Returns the store in a folder, after reading its manifest only.

        Args:
            folder: The folder.

        Raises:
            StoreError: If there is none, or one of another version or program.
        """
        path = Path(folder) / _MANIFEST
        manifest = _json(path, "pass the folder that activations were collected into, store=...")
        if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
            raise StoreError(f"expected activations described by {path}, got other JSON; pass another folder")
        if manifest.get("schema") != SCHEMA:
            raise StoreError(
                f"expected schema {SCHEMA} in {path}, got {manifest.get('schema')!r}; it was written by another "
                "version of captum_xnn: use that version, or collect into another folder"
            )
        try:
            n, rows = int(manifest["rows_per_shard"]), manifest["rows"]
            complete = n > 0 and (rows is None or int(rows) > 0) and bool(manifest["fingerprint"]["layer"] is not None)
            complete = complete and all({"dtype", "shape"} <= set(manifest["tables"][name]) for name in TABLES)
        except (KeyError, TypeError, ValueError):
            complete = False
        if not complete:
            raise StoreError(
                f"expected a whole manifest in {path}, got one with entries missing; delete it and collect anew"
            )
        return cls(Path(folder), manifest)

    @staticmethod
    def exists(folder: str | os.PathLike[str]) -> bool:
        """Returns whether a folder holds a manifest.

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
        """What tells this store from others, and from an earlier one in the same folder, 16 hexadecimal digits."""
        own = {k: v for k, v in self.manifest.items() if k != "rows"}
        return hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def rows_per_shard(self) -> int:
        """Examples in every shard but the last."""
        return int(self.manifest["rows_per_shard"])

    @property
    def examples(self) -> int | None:
        """Examples M in all; None as long as nobody has come to the end of the data."""
        return None if self.manifest["rows"] is None else int(self.manifest["rows"])

    @property
    def shards(self) -> int | None:
        """Shards in all; None as long as nobody has come to the end of the data."""
        return None if self.examples is None else -(-self.examples // self.rows_per_shard)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Returns the first example of a shard, and the one after its last, as far as that is known.

        Args:
            shard: Its number.
        """
        first, after = shard * self.rows_per_shard, (shard + 1) * self.rows_per_shard
        return first, after if self.examples is None else min(after, self.examples)

    def finish(self, rows: int) -> None:
        """Writes down how many examples there are, when the end of the data was reached.

        Args:
            rows: Examples in all.

        Raises:
            StoreError: If another number was written down before.
        """
        self.manifest = self.open(self.folder).manifest  # another rank may have come to the end
        if self.examples not in (None, rows):
            raise StoreError(
                f"expected {self.examples} examples, of which {self.folder} was begun, got {rows}; pass the same data, "
                "or collect these into another folder"
            )
        if self.examples is None:
            self.manifest = {**self.manifest, "rows": rows}
            _writing(self.folder / _MANIFEST, "the manifest", json.dumps(self.manifest, indent=1).encode())

    def write(self, shard: int, tables: Mapping[str, Tensor], *, first: str) -> None:
        """Writes a shard, whole or not at all.

        Args:
            shard: Its number.
            tables: The examples of every table, as many of each.
            first: Checksum of the inputs of the first example.

        Raises:
            OSError: If the disk is full, or the folder cannot be written to. What was finished before stays.
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
        """Returns whether a shard was finished once, whole or damaged now.

        Args:
            shard: Its number.
        """
        return self._entry(shard).exists()

    def first_inputs(self, shard: int) -> str:
        """Returns the checksum of the inputs of a finished shard's first example.

        Args:
            shard: Its number.
        """
        return str(_json(self._entry(shard), _AGAIN)["first_inputs"])

    def damage(self, shard: int, *, checksums: bool = True) -> str | None:
        """Returns what is wrong with a shard, or None if it is whole.

        Args:
            shard: Its number.
            checksums: Whether to read it and compare checksums, rather than look at sizes only.
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
            return f"has {name} of which the beginning cannot be read ({error})"
        if size != found.size:
            return f"has {name} with {size} bytes instead of {found.size}: it was cut short, or written to"
        if found.shape != shape:
            return f"has {name} with shape {found.shape} instead of {shape}"
        if checksums and file_checksum(path) != sha256:
            return f"has {name} with another checksum than when it was written"
        return None

    def check(self, *, checksums: bool = True) -> None:
        """Raises where the store is not complete and whole.

        Args:
            checksums: Whether to read all of it and compare checksums, rather than look at sizes only.

        Raises:
            StoreError: Naming the shards that are missing or damaged.
        """
        if self.shards is None:
            raise StoreError(
                f"expected all activations in {self.folder}, got a store whose end was not reached yet; {_AGAIN}"
            )
        found = ((i, self.damage(i, checksums=checksums)) for i in range(self.shards))
        damaged = [(i, damage) for i, damage in found if damage]
        if damaged:
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            said = "; ".join(f"shard {i} {damage}" for i, damage in damaged[:3])
            raise StoreError(f"expected {self.shards} whole shards in {self.folder}, but {said}{more}; {_AGAIN}")

    def rows(self, table: str) -> Rows:
        """Returns a table of a complete store, to be read row by row.

        Args:
            table: "Z" or "y_hat".

        Raises:
            StoreError: If the store is not complete.
        """
        self.check(checksums=False)
        return self.shard(table, *range(self.shards or 0))

    def shard(self, table: str, *shards: int) -> Rows:
        """Returns a table's rows of finished shards, one shard after the other.

        Args:
            table: "Z" or "y_hat".
            shards: Their numbers.
        """
        entries = (_json(self._entry(shard), _AGAIN) for shard in shards)
        files = [self.folder / Path(entry["files"][table]["name"]).name for entry in entries]
        rows, dtype = Rows(files), getattr(torch, self.manifest["tables"][table]["dtype"])
        return rows if rows.dtype == dtype else rows.map(lambda values: values.to(dtype))

    def sweep(self, rank: int, world_size: int) -> None:
        """Removes the beginnings of files that a killed process left among the shards of a rank.

        Args:
            rank: Number of this process.
            world_size: Number of processes.
        """
        for draft in self.folder.glob(".*-*.tmp"):
            number = draft.name.split(".")[1].rpartition("-")[2]
            if number.isdecimal() and int(number) % world_size == rank:
                draft.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, rank: int) -> Iterator[None]:
    """Returns a context in which this process alone writes to a store as one of the ranks.

    The system frees the lock when the process ends, however it ends. Where a file system has no locks, and on Windows,
    there is none: two processes that do the same work then do it twice.

    Args:
        folder: The store's folder.
        rank: Number of this process among those that share the work.

    Raises:
        StoreError: If another process does so already.
    """
    with (folder / f"rank-{rank}.lock").open("a") as file:
        if not _lock(file):
            raise StoreError(
                f"expected to be the only process that collects into {folder} as rank {rank}, got another at work; "
                "wait for it, or share the work by rank= and world_size="
            )
        yield


def stored(table: Tensor) -> Tensor:
    """Returns a tensor as NumPy can hold it: on the CPU, and in float32 where NumPy lacks its dtype.

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
    """Returns the SHA-256 of a file, read some megabytes at a time.

    Args:
        path: The file.
    """
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with FileIO(path) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _described(table: Tensor) -> dict[str, Any]:
    """Returns what the manifest says of a table."""
    name = str(table.dtype).removeprefix("torch.")
    return {
        "dtype": name,
        "stored_as": str(stored(table[:0]).dtype).removeprefix("torch."),
        "shape": list(table.shape[1:]),
    }


def _json(path: Path, hint: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(f"expected {path.name} in {path.parent}, found none; {hint}") from error
    except OSError as error:
        raise StoreError(f"expected {path.name} in {path.parent}, could not read it ({error}); {hint}") from error
    except ValueError as error:
        raise StoreError(f"expected JSON in {path}, got something cut short or foreign; {hint}") from error


def _writing(path: Path, what: str, *data: bytes | memoryview) -> None:
    """Replaces a file, and says what to do where there is no room."""
    try:
        replace_file(path, *data)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        size = sum(memoryview(some).nbytes for some in data) / 1e6
        raise OSError(
            error.errno,
            f"expected room for {what} ({size:.3g} MB), got {error.strerror!r}; finished shards stay: make room and "
            f"{_AGAIN}",
            str(path),
        ) from error


def _lock(file: io.TextIOWrapper) -> bool:
    """Returns False where another process holds the lock of a file; it is freed when the file is closed."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        # Not flock, whose locks forked loader workers would hold on to for seconds after their parent was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # any other: a file system without locks
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
