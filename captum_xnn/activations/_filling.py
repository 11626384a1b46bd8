"""Fill a store with the activations of one layer, shard by shard.

Finished shards stay when a run is interrupted, and the same call resumes it: the model runs only on the examples of
missing or damaged shards. Tensors and a plain ``DataLoader`` on an indexed data set also load only these examples.
Other iterables are read from their beginning.

Data must come in the same order every time, without random augmentation. Loaders that shuffle raise an error. The
inputs of the very first example are also compared with a checksum in the manifest. So are the inputs of the first
example of every finished shard, where they are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from captum_xnn.activations._batches import Batch, Batches, first_inputs
from captum_xnn.activations._store import TABLES, Store
from captum_xnn.errors import ModelMismatchError, StoreError
from captum_xnn.layers._fingerprint import differences, fingerprint

if TYPE_CHECKING:  # a store gets the reader that fills it
    from captum_xnn.activations._collecting import BatchReader

__all__ = ["fill", "open_store"]

_LOG = logging.getLogger(__name__)

# Devices and precisions differ by at most this share of the largest activation; another transform is further off.
_ROUNDING = 0.05


def open_store(
    reader: BatchReader, folder: Path, first: Batch, examples: int | None, rows_per_shard: int | None
) -> Store:
    """Create a store, or open the store in the folder.

    Args:
        reader: Reads the layer.
        folder: The folder.
        first: The first batch of the data.
        examples: Number of all examples, if known.
        rows_per_shard: Examples in a shard; None leaves the choice to the store.

    Raises:
        ModelMismatchError: If the store holds activations of another model or layer.
        StoreError: If the store was begun with other data, transforms, or sizes of shards.
    """
    about: dict[str, Any] = {
        "fingerprint": fingerprint(reader.model, reader.name),
        "transforms": [k for k in ("output_transform", "prediction_transform") if getattr(reader, k) is not None],
        "first_inputs": first_inputs(first.inputs, 0),
    }
    if not Store.exists(folder):
        Z, y_hat = reader.read_batch(first.inputs, first.additional, 0)
        reader.try_out(first.inputs, first.additional, (Z, y_hat))
        tables = {"Z": Z, "y_hat": y_hat}
        Store.create(folder, about, tables, rows_per_shard=rows_per_shard, rows=examples)
    store = Store.open(folder)
    was = store.manifest
    different = differences(was["fingerprint"], about["fingerprint"])
    if different:
        raise ModelMismatchError(
            f"{folder} holds activations of another model or layer: {'; '.join(different)}. Load the weights they were "
            "collected with, or collect into another folder"
        )
    if was["transforms"] != about["transforms"]:
        raise StoreError(
            f"{folder} was begun with transforms {was['transforms']}, and this call has {about['transforms']}; pass "
            "the same transforms, or collect into another folder"
        )
    if was["first_inputs"] != about["first_inputs"]:
        raise _other_data(store, 0)
    if rows_per_shard not in (None, store.rows_per_shard):
        raise StoreError(
            f"{folder} was begun with rows_per_shard={store.rows_per_shard}, and this call has {rows_per_shard}; "
            "leave it out, or collect into another folder"
        )
    if examples is not None:
        store.finish(examples)
    return store


def _other_data(store: Store, example: int) -> StoreError:
    return StoreError(
        f"{store.folder} was begun with other data: the inputs differ in example {example}; pass the same data in the "
        "same order and without random augmentation, or collect these into another folder"
    )


def fill(
    store: Store, reader: BatchReader, batches: Batches, first: Batch, *, rank: int, world_size: int, progress: bool
) -> None:
    """Write the missing shards of one process.

    Args:
        store: The store.
        reader: Reads the layer.
        batches: All batches of the data.
        first: The first batch.
        rank: Rank of this process.
        world_size: Number of processes that share the work.
        progress: Whether to show a progress bar.

    Raises:
        StoreError: If the store was filled from other data, or by other transforms.
    """
    filling = _Filling(reader, store, rank, world_size)
    filling.check_transforms(first)
    store.sweep(rank, world_size)
    with (
        _with_note(store),
        tqdm(desc=f"activations of {reader.name}", unit=" examples", disable=not progress, leave=False) as bar,
    ):
        end = 0
        for batch in batches.where(filling.wanted):
            filling.add(batch)
            end = batch.first + batch.rows
            bar.update(batch.rows)
        filling.finish(batches.examples or end)


class _Filling:
    """Fills a store with the shards of one process."""

    def __init__(self, reader: BatchReader, store: Store, rank: int, world_size: int) -> None:
        self.reader, self.store, self.rank, self.world_size = reader, store, rank, world_size
        self._missing: dict[int, bool] = {}
        # Memory for one shard, allocated once: new memory for each shard would fragment it.
        size = min(store.rows_per_shard, store.examples or store.rows_per_shard)
        self._shard = {
            name: torch.empty(size, *table["shape"], dtype=getattr(torch, table["dtype"]), device="cpu")
            for name, table in store.manifest["tables"].items()
        }
        self._full = 0
        self._inputs = ""

    def check_transforms(self, first: Batch) -> None:
        """Raise where transforms give other values for the first batch than the store holds.

        A manifest can say that there are transforms, but cannot identify these functions.
        """
        if not self.store.manifest["transforms"] or self.store.damage(0):
            return
        for name, made in zip(TABLES, self._read(first), strict=True):
            was = self.store.shard(name, 0)[: len(made)].double()
            off = float((made[: len(was)].double() - was).abs().max())
            if off > _ROUNDING * float(was.abs().max()):
                raise StoreError(
                    f"{self.store.folder} was begun with other transforms: {name} differs by up to {off:.3g}; pass "
                    "the same transforms, or collect into another folder"
                )

    def missing(self, shard: int) -> bool:
        """Whether this process has to make a shard."""
        if shard % self.world_size != self.rank:
            return False
        if shard not in self._missing:
            damage = self.store.damage(shard)
            self._missing[shard] = damage is not None
            if damage and self.store.begun(shard):
                _LOG.warning("shard %d in %s %s; it is collected again", shard, self.store.folder, damage)
        return self._missing[shard]

    def _shards(self, first: int, after: int) -> range:
        """List the shards that hold rows from ``first`` to before ``after``."""
        n = self.store.rows_per_shard
        return range(first // n, -(-after // n))

    def wanted(self, first: int, after: int) -> bool:
        """Whether this process has to make a shard with some of these examples."""
        return any(map(self.missing, self._shards(first, after)))

    def add(self, batch: Batch) -> None:
        """Run the model on a batch where a shard needs it, and write the shards that the batch completes."""
        after = batch.first + batch.rows
        activations: tuple[Tensor, Tensor] | None = None
        for shard in self._shards(batch.first, after):
            begin, end = self.store.bounds(shard)
            if not self.missing(shard):
                self._compare(shard, begin, batch)
                continue
            activations = activations or self._read(batch)
            rows = slice(max(begin - batch.first, 0), min(end, after) - batch.first)
            if begin >= batch.first:
                self._full, self._inputs = 0, first_inputs(batch.inputs, begin - batch.first)
            self._hold(Z=activations[0][rows], y_hat=activations[1][rows])
            if end <= after:
                self._write(shard)

    def _hold(self, **tables: Tensor) -> None:
        """Add rows to the current shard."""
        before = self._full
        for name, table in tables.items():
            self._full = before + len(table)
            self._shard[name][before : self._full] = table

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model on a batch; raise where rows, shapes or dtypes do not fit the store."""
        Z, y_hat = self.reader.read_batch(batch.inputs, batch.additional, batch.first)
        if len(Z) != batch.rows:
            raise ValueError(
                f"layer {self.reader.name!r} gives {len(Z)} rows for {batch.rows} examples from example {batch.first} "
                "on; a store needs one row for every row of the inputs: leave out unusable examples in the data set "
                "rather than in collate_fn, and put examples first in output_transform="
            )
        for name, table in (("Z", Z), ("y_hat", y_hat)):
            was = self.store.manifest["tables"][name]
            self.reader.refuse_other_shapes({tuple(was["shape"]), tuple(table.shape[1:])})
            if str(table.dtype) != f"torch.{was['dtype']}":
                raise StoreError(
                    f"{self.store.folder} was begun with {name} in {was['dtype']}, and {name} is now in {table.dtype}; "
                    "convert the model or its inputs, or collect into another folder"
                )
        return Z, y_hat

    def _compare(self, shard: int, begin: int, batch: Batch) -> None:
        """Raise where a finished shard was made from other inputs than this batch."""
        mine = shard % self.world_size == self.rank
        has_first_row = mine and begin >= batch.first
        if has_first_row and self.store.first_inputs(shard) != first_inputs(batch.inputs, begin - batch.first):
            raise _other_data(self.store, begin)

    def _write(self, shard: int) -> None:
        """Write the current shard and begin an empty one."""
        self.store.write(shard, {k: table[: self._full] for k, table in self._shard.items()}, first=self._inputs)
        self._full = 0

    def finish(self, examples: int) -> None:
        """Write the last shard, after the last example.

        Args:
            examples: Number of examples in all.
        """
        self.store.finish(examples)
        if self._full:
            self._write(examples // self.store.rows_per_shard)


@contextmanager
def _with_note(store: Store) -> Iterator[None]:
    """Add a note to any error that ends this context, Ctrl-C included: which shards stay and how to resume."""
    try:
        yield
    except BaseException as error:
        done = sum(1 for _ in store.folder.glob("shard-*.json"))
        text = f"{done} finished shards of activations stay in {store.folder}; the same call resumes from there"
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(text)
        else:
            _LOG.error(text)
        raise
