"""Collect the training data of an explainer: the activations Z of one layer and the model's own outputs.

One pass over the data serves every target. It costs as much as a plain inference loop, plus the copies.
All tensors are kept in memory on the CPU: M x D x 4 bytes in float32, 66 MB for 8,050 examples of 2,048 dimensions.

Tensors that do not fit in memory go to a folder, shard by shard (:mod:`captum_xnn.activations._store`). Finished shards
stay when a run is interrupted, and the same call resumes it: the model runs only on the examples of missing or damaged
shards. Tensors and a plain ``DataLoader`` on an indexed data set also load only these examples. Other iterables are
read from their beginning.

Data must come in the same order every time, without random augmentation. Loaders that shuffle raise an error. The
inputs of the very first example are also compared with a checksum in the manifest. So are the inputs of the first
example of every finished shard, where they are loaded.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_xnn._distributed import Ranks
from captum_xnn._files import made_folder
from captum_xnn.activations._activations import Activations, Asked, Source
from captum_xnn.activations._batches import (
    Batch,
    Batches,
    as_batches,
    as_they_come,
    copied_to,
    first_inputs,
    is_repeatable,
    number_of_batches,
)
from captum_xnn.activations._store import TABLES, Store, locked
from captum_xnn.activations._unpacking import Unpack, first_of_batch, unpack_for
from captum_xnn.errors import ModelMismatchError, StoreError
from captum_xnn.layers._arguments import refuse_too_many, refuse_uneven
from captum_xnn.layers._calls import calls_of
from captum_xnn.layers._fingerprint import differences, fingerprint
from captum_xnn.layers._forward_args import format_forward_args
from captum_xnn.layers._lookup import find_layer, quantised, unwrap
from captum_xnn.layers._outputs import checked
from captum_xnn.layers._probe import probe
from captum_xnn.layers._read import OutputTransform
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Target
from captum_xnn.layers._threads import one_thread_if_small, pass_flops

__all__ = ["activations_of", "collect", "collect_part", "collect_together"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _BatchReader(Reader):
    """Reads one layer of a model on data, batch by batch."""

    asked: Asked | None = None

    @classmethod
    def for_data(
        cls,
        model: nn.Module,
        layer: str | nn.Module,
        data: Any,
        output_transform: OutputTransform | None,
        prediction_transform: OutputTransform | None,
        asked: Asked | None = None,
    ) -> _BatchReader:
        """Make a reader for some data; raise where a tuple of tensors cannot be the model's inputs."""
        model = unwrap(model)
        if isinstance(data, tuple) and data and all(isinstance(x, Tensor) for x in data):
            refuse_too_many(model, data, "pass them as a list, list(batches)")
            refuse_uneven(data)
        return cls(model, *find_layer(model, layer), output_transform, prediction_transform, asked)

    def read_batch(self, inputs: Any, additional: Any, first: int) -> tuple[Tensor, Tensor]:
        """Compute the layer's and the model's outputs on a batch, on the CPU."""
        many = inputs if isinstance(inputs, tuple) else (inputs,)
        with one_thread_if_small(pass_flops(self.model, many)):
            Z, y_hat = checked(*self._run_on_device(many, format_forward_args(additional) or ()), self.name, first)
        if self.asked is not None:
            self.asked.check(y_hat)
        return Z.cpu(), y_hat.cpu()

    def _run_on_device(self, inputs: tuple[Any, ...], additional: tuple[Any, ...]) -> tuple[Tensor, Any]:
        """Compute the layer's and the model's outputs on a batch, unchecked and on the model's device."""
        return self.run(copied_to(inputs, self.device) + copied_to(additional, self.device))

    def try_out(self, inputs: Any, additional: Any, result: tuple[Tensor, Tensor]) -> None:
        """Raise where a model cannot be explained, as far as its first batch shows.

        Args:
            inputs: Inputs of the batch.
            additional: Additional arguments.
            result: The result of :meth:`read_batch` on them.
        """
        many = inputs if isinstance(inputs, tuple) else (inputs,)
        more = format_forward_args(additional) or ()
        if not isinstance(many[0], Tensor) or not many[0].dim() or len(many[0]) != len(result[0]):
            return
        with one_thread_if_small(pass_flops(self.model, many)):
            many, more = probe(self._run_on_device, many, more, *result, quantised=quantised(self.model))
            calls_of(
                self.model,
                self.layer,
                copied_to(many, self.device) + copied_to(more, self.device),
                name=self.name,
                output_transform=self.output_transform,
                prediction_transform=self.prediction_transform,
            )
            if self.asked is not None and self.asked.gradients:
                self._try_gradients(copied_to(many, self.device), copied_to(more, self.device), self.asked.targets[0])

    def _try_gradients(self, inputs: tuple[Any, ...], additional: tuple[Any, ...], target: Target) -> None:
        """Raise where no gradient reaches the layer from an output."""
        one = torch.ones(1, device="cpu")
        self.tail().along(inputs, additional, torch.zeros((), device="cpu"), one, one, [[target] * len(inputs[0])])

    def read_all(
        self, batches: Iterable[tuple[Any, Any]], total: int | None, progress: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Read each batch by :meth:`read_batch`, try the model out on the first, and keep the requested outputs."""
        read_batches: list[tuple[Tensor, Tensor]] = []
        first = 0
        with torch.inference_mode(False), untouched(self.model), torch.no_grad():
            title = f"activations of {self.name}"
            for inputs, additional in tqdm(batches, title, total, disable=not progress, leave=False):
                Z, y_hat = self.read_batch(inputs, additional, first)
                if not first:
                    self.try_out(inputs, additional, (Z, y_hat))
                read_batches.append((Z, y_hat if self.asked is None else self.asked.kept(y_hat)))
                first += len(Z)
        return read_batches

    def joined(self, read_batches: Sequence[tuple[Tensor, Tensor]]) -> Activations:
        """Join the results of :meth:`read_all` to the activations of all examples."""
        if not read_batches:
            raise ValueError(_NOTHING)
        self.refuse_other_shapes({tuple(Z.shape[1:]) for Z, _ in read_batches})
        Z, y_hat = (torch.cat(part) for part in zip(*read_batches, strict=True))
        return Activations(Z, y_hat, self.name, asked=self.asked if self.asked and self.asked.value_range else None)

    def refuse_other_shapes(self, shapes: set[tuple[int, ...]]) -> None:
        """Raise where examples differ in shape."""
        if len(shapes) > 1:
            raise ValueError(
                f"layer {self.name!r} gives examples of different shapes, {sorted(shapes)[:3]}; pass inputs of one "
                "size, or pool over the varying dimensions in a learned form, such as autoencoder=SRAE, "
                f"output_transform=lambda output: {'output.mean(1)' if len(min(shapes)) < 3 else 'output.mean((2, 3))'}"
            )


# Devices and precisions differ by at most this share of the largest activation; another transform is further off.
_ROUNDING = 0.05

_NOTHING = (
    "the data have no examples to collect activations from; check that the loader is not empty or, if it is a "
    "generator, not used up already"
)


def collect(
    model: nn.Module,
    layer: str | nn.Module,
    data: Any,
    *,
    store: str | os.PathLike[str] | None = None,
    unpack: Unpack = first_of_batch,
    output_transform: OutputTransform | None = None,
    prediction_transform: OutputTransform | None = None,
    batch_size: int = 64,
    rows_per_shard: int | None = None,
    asked: Asked | None = None,
    progress: bool = False,
) -> Activations:
    """Collect the layer's activations and the model's outputs on all data, in the order of the data.

    The model runs in evaluation mode without gradients, and is left as it was found. Tensors in the batches are
    moved to the model's device.

    Args:
        model: The model to explain.
        layer: One of its layers, by dotted name or as a module. Of several calls in a row the last counts; for calls
            side by side see :class:`captum_xnn.layers.EveryCall`.
        data: Inputs as a tensor (M, ...), a tuple of such tensors for a model with several inputs, an iterable of
            batches such as a DataLoader, or a data set whose examples are an input, or begin with it, as (x, y).
        store: A folder (created if missing) for activations that do not fit in memory. Shards that it already holds
            are verified and kept.
        unpack: Turns a batch of an iterable into (inputs, additional_forward_args). By default the keys of a dict are
            the names of the model's arguments, and the first entry of a tuple or list is the inputs.
        output_transform: Turns the layer's raw output into one tensor (N, ...), for layers that return tuples or dicts.
        prediction_transform: The same for the model's output.
        batch_size: Examples per forward pass for tensors and data sets.
        rows_per_shard: Examples in a shard of a new store; by default 4,096, or fewer where these are more than 64 MiB.
        asked: The requested outputs. The first batch is checked for them. Without a store, only they are kept where
            the model gives maps or sequences of outputs. With None, all outputs are kept.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If there are no data, or if activations or outputs are NaN or infinite.
        LayerNotFoundError: If the model has no such layer.
        LayerNotReachedError: If the layer never runs.
        StoreError: If the store holds activations of other data, or is in use.
        ModelMismatchError: If the store holds activations of another model or layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> found = collect(model, "1", torch.ones(10, 4))
        >>> found.Z.shape, found.y_hat.shape
        (torch.Size([10, 3]), torch.Size([10, 2]))
    """
    unpack, data = unpack_for(model, unpack), as_batches(data, batch_size)
    if store is not None:
        folder = collect_part(
            model,
            layer,
            data,
            store,
            unpack=unpack,
            output_transform=output_transform,
            prediction_transform=prediction_transform,
            batch_size=batch_size,
            rows_per_shard=rows_per_shard,
            asked=asked,
            progress=progress,
        )
        opened = Activations.open(folder, checksums=False)  # old shards were verified, new ones just written
        return opened._replace(source=_source(data, unpack))
    reader = _BatchReader.for_data(model, layer, data, output_transform, prediction_transform, asked)
    total = None if isinstance(data, (Tensor, tuple)) else number_of_batches(data)
    read_batches = reader.read_all(as_they_come(data, batch_size, unpack), total, progress)
    return reader.joined(read_batches)._replace(source=_source(data, unpack))


def collect_together(
    model: nn.Module,
    layer: str | nn.Module,
    data: Any,
    *,
    ranks: Ranks,
    store: str | os.PathLike[str] | None = None,
    unpack: Unpack = first_of_batch,
    output_transform: OutputTransform | None = None,
    prediction_transform: OutputTransform | None = None,
    batch_size: int = 64,
    asked: Asked | None = None,
    progress: bool = False,
) -> Activations:
    """Split the forward pass over processes; return all activations and outputs in every process.

    Without a store, every process holds all of them in memory.

    Args:
        model: The model to explain, the same in all processes.
        layer: One of its layers.
        data: All of the data, as :func:`collect` takes them, the same in all processes.
        ranks: The processes.
        store: A folder to collect into, shared by all processes.
        unpack: As in :func:`collect`.
        output_transform: As in :func:`collect`.
        prediction_transform: As in :func:`collect`.
        batch_size: As in :func:`collect`.
        asked: As in :func:`collect`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: As :func:`collect`, or if models or data differ between processes, or if a loader shuffles.

    Example:
        >>> from captum_xnn._distributed import ALONE
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> collect_together(model, "1", torch.ones(10, 4), ranks=ALONE).Z.shape
        torch.Size([10, 3])
    """
    unpack, data = unpack_for(model, unpack), as_batches(data, batch_size)
    transforms: dict[str, Any] = {
        "unpack": unpack,
        "output_transform": output_transform,
        "prediction_transform": prediction_transform,
        "batch_size": batch_size,
        "asked": asked,
        "progress": progress and ranks.first,
    }
    if ranks.world == 1:
        return collect(model, layer, data, store=store, **transforms)
    if store is not None:
        collect_part(model, layer, data, store, rank=ranks.rank, world_size=ranks.world, **transforms)
        ranks.wait()
        return Activations.open(store, checksums=False)._replace(source=_source(data, unpack))
    reader = _BatchReader.for_data(model, layer, data, output_transform, prediction_transform, asked)
    batches = Batches(data, batch_size, unpack)
    first = batches.first()
    if first is None:
        raise ValueError(_NOTHING)
    read_batches = reader.read_all(
        ((b.inputs, b.additional) for b in batches.share(ranks.rank, ranks.world)), None, progress
    )
    seen = {
        "model": fingerprint(reader.model, reader.name),
        "data": (batches.examples, first_inputs(first.inputs, 0)),
    }
    of_all = ranks.all_of((read_batches, seen))
    for noun, value in seen.items():
        if any(other[noun] != value for _, other in of_all):
            raise ValueError(
                f"not all processes have the same {noun}; seed every random draw, load the same weights, and pass all "
                "processes the same data in the same order"
            )
    turns = itertools.zip_longest(*(batches for batches, _ in of_all))  # processes read the batches in turn
    joined = reader.joined([batch for turn in turns for batch in turn if batch is not None])
    return joined._replace(source=_source(data, unpack))


def _source(data: Any, unpack: Unpack) -> Source | None:
    """Make a source of the data; None if they can be read only once, or come in another order each time."""
    return Source(data, unpack) if is_repeatable(data) else None


def activations_of(
    reader: Reader,
    data: Any,
    *,
    unpack: Unpack,
    store: str | os.PathLike[str] | None,
    asked: Asked,
    ranks: Ranks,
    progress: bool,
) -> Activations:
    """Collect activations on some data, or check and return activations that the user has collected before.

    Args:
        reader: Reader of the layer.
        data: Data as :func:`collect` takes them, or activations.
        unpack: As in :func:`collect`.
        store: A folder to collect into.
        asked: As in :func:`collect`.
        ranks: The processes that collect together.
        progress: Whether to show a progress bar.

    Raises:
        ModelMismatchError: If the activations are of another layer or model.
        ValueError: If the data are activations and there is a store, or as :func:`collect_together`.
    """
    if not isinstance(data, Activations):
        return collect_together(
            reader.model,
            reader.layer,
            data,
            store=store,
            unpack=unpack,
            output_transform=reader.output_transform,
            prediction_transform=reader.prediction_transform,
            progress=progress,
            ranks=ranks,
            asked=asked,
        )
    if store is not None:
        raise ValueError(
            "the data are activations that were collected already, and store= is a folder to collect into; "
            "leave store= out"
        )
    data.check(reader.model, reader.name)
    return data


def collect_part(
    model: nn.Module,
    layer: str | nn.Module,
    data: Any,
    store: str | os.PathLike[str],
    *,
    rank: int = 0,
    world_size: int = 1,
    unpack: Unpack = first_of_batch,
    output_transform: OutputTransform | None = None,
    prediction_transform: OutputTransform | None = None,
    batch_size: int = 64,
    rows_per_shard: int | None = None,
    asked: Asked | None = None,
    progress: bool = False,
) -> Path:
    """Collect this process's shards into a folder; return the folder.

    Several processes, on one machine or on several machines that share the folder, make the same call with the same
    data and a rank each. When all calls have returned, :meth:`Activations.open` opens the whole. No process waits for
    another.

    Args:
        model: The model to explain, the same in all processes.
        layer: One of its layers.
        data: All of the data, as :func:`collect` takes them.
        store: The folder.
        rank: Rank of this process, from 0 on.
        world_size: Number of processes that share the work.
        unpack: As in :func:`collect`.
        output_transform: As in :func:`collect`.
        prediction_transform: As in :func:`collect`.
        batch_size: As in :func:`collect`.
        rows_per_shard: As in :func:`collect`; the same in all processes.
        asked: Outputs to be checked on the first batch.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: As :func:`collect`, or if the rank is not one of the processes.
        StoreError: If the store holds activations of other data, or another process collects as the same rank.
        ModelMismatchError: If the store holds activations of another model or layer.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> folder = tempfile.mkdtemp()
        >>> for rank in range(2):  # in processes of their own
        ...     _ = collect_part(model, "1", torch.ones(10, 4), folder, rank=rank, world_size=2, rows_per_shard=3)
        >>> len(Activations.open(folder).Z)
        10
    """
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank is {rank}, and there are {world_size} processes; pass each its own rank, 0 to {world_size - 1}"
        )
    reader = _BatchReader.for_data(model, layer, data, output_transform, prediction_transform, asked)
    batches = Batches(data, batch_size, unpack_for(model, unpack))
    folder = made_folder(store)
    with locked(folder, rank), torch.inference_mode(False), untouched(reader.model), torch.no_grad():
        first = batches.first()
        if first is None:
            raise ValueError(_NOTHING)
        filling = _Filling(reader, _opened(reader, folder, first, batches.examples, rows_per_shard), rank, world_size)
        filling.check_transforms(first)
        filling.store.sweep(rank, world_size)
        with (
            _with_note(filling.store),
            tqdm(desc=f"activations of {reader.name}", unit=" examples", disable=not progress, leave=False) as bar,
        ):
            end = 0
            for batch in batches.where(filling.wanted):
                filling.add(batch)
                end = batch.first + batch.rows
                bar.update(batch.rows)
            filling.finish(batches.examples or end)
    return folder


def _opened(
    reader: _BatchReader, folder: Path, first: Batch, examples: int | None, rows_per_shard: int | None
) -> Store:
    """Create a store, or open the store in the folder; raise where it is of another model, layer or data."""
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


class _Filling:
    """Fills a store with the shards of one process."""

    def __init__(self, reader: _BatchReader, store: Store, rank: int, world_size: int) -> None:
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
