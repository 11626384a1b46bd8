"""Collect the training data of an explainer: the activations Z of one layer and the model's own outputs.

One pass over the data serves every target. It costs as much as a plain inference loop, plus the copies.
All tensors are kept in memory on the CPU: M x D x 4 bytes in float32, 66 MB for 8,050 examples of 2,048 dimensions.

Tensors that do not fit in memory go to a folder, shard by shard (:mod:`captum_xnn.activations._filling`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
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
    Batches,
    as_batches,
    as_they_come,
    copied_to,
    first_inputs,
    is_repeatable,
    number_of_batches,
)
from captum_xnn.activations._filling import fill, open_store
from captum_xnn.activations._store import locked
from captum_xnn.activations._unpacking import Unpack, first_of_batch, unpack_for
from captum_xnn.layers._arguments import refuse_too_many, refuse_uneven
from captum_xnn.layers._calls import calls_of
from captum_xnn.layers._fingerprint import fingerprint
from captum_xnn.layers._forward_args import format_forward_args
from captum_xnn.layers._lookup import find_layer, quantised, unwrap
from captum_xnn.layers._outputs import checked
from captum_xnn.layers._probe import probe
from captum_xnn.layers._read import OutputTransform
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Target
from captum_xnn.layers._threads import one_thread_if_small, pass_flops

__all__ = ["BatchReader", "activations_of", "collect", "collect_part", "collect_together"]

_NOTHING = (
    "the data have no examples to collect activations from; check that the loader is not empty or, if it is a "
    "generator, not used up already"
)


@dataclass(frozen=True)
class BatchReader(Reader):
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
    ) -> BatchReader:
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
    reader = BatchReader.for_data(model, layer, data, output_transform, prediction_transform, asked)
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
    reader = BatchReader.for_data(model, layer, data, output_transform, prediction_transform, asked)
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
    reader = BatchReader.for_data(model, layer, data, output_transform, prediction_transform, asked)
    batches = Batches(data, batch_size, unpack_for(model, unpack))
    folder = made_folder(store)
    with locked(folder, rank), torch.inference_mode(False), untouched(reader.model), torch.no_grad():
        first = batches.first()
        if first is None:
            raise ValueError(_NOTHING)
        opened = open_store(reader, folder, first, batches.examples, rows_per_shard)
        fill(opened, reader, batches, first, rank=rank, world_size=world_size, progress=progress)
    return folder


def _source(data: Any, unpack: Unpack) -> Source | None:
    """Make a source of the data; None if they can be read only once, or come in another order each time."""
    return Source(data, unpack) if is_repeatable(data) else None
