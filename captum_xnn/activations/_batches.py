"""Batches of a user's data with a known first row, so that a caller can skip batches.

Batches of tensors are skipped without loading them. So are batches of a plain ``DataLoader`` on an indexed data set.
Any other iterable is read to its end, batch by batch. Tensors and such loaders can also load single examples
(:meth:`Batches.picked`).

Conventions:
    M examples in all.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from captum_xnn.activations._unpacking import Unpack
from captum_xnn.layers._arguments import refuse_uneven

__all__ = [
    "Batch",
    "Batches",
    "Picked",
    "as_batches",
    "as_they_come",
    "copied_to",
    "first_inputs",
    "is_repeatable",
    "number_of_batches",
    "refuse_changed",
    "refuse_lack",
    "refuse_no_batches",
    "repeatable",
    "rows_in",
]

# Most bytes of joined batches.
_BYTES = 1 << 26
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Batch(NamedTuple):
    """Examples that follow each other."""

    first: int
    """Row of the first example."""
    rows: int
    """Number of examples."""
    inputs: Any
    """A tensor or a tuple of values, as the model takes them."""
    additional: Any
    """Additional arguments of the model, or None."""

    def on(self, device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Copy inputs and additional arguments to a device; return each as a tuple.

        A model that works in place then does not change the user's data.

        Args:
            device: The model's device.

        Example:
            >>> Batch(0, 2, torch.ones(2, 1), None).on(torch.device("cpu"))
            ((tensor([[1.],
                    [1.]]),), ())
        """
        return _arguments_on(self.inputs, self.additional, device)


class Picked(NamedTuple):
    """Examples that need not follow each other."""

    rows: Tensor
    """Row of each example in the data, (N,), ascending."""
    inputs: Any
    """A tensor or a tuple of values, as the model takes them."""
    additional: Any
    """Additional arguments of the model, or None."""

    def on(self, device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Copy inputs and additional arguments to a device, as :meth:`Batch.on` does.

        Args:
            device: The model's device.
        """
        return _arguments_on(self.inputs, self.additional, device)

    def among(self, rows: Tensor) -> Tensor:
        """Select the row indices that are among these examples.

        Args:
            rows: Row indices in the data.
        """
        return rows[torch.isin(rows, self.rows)]


class Batches:
    """All batches of some data, in order, each with its first row.

    Args:
        data: Inputs as a tensor (M, ...), a tuple of such tensors, an iterable of batches, or a data set.
        batch_size: Examples in a batch of tensors or of a data set.
        unpack: Turns a batch of an iterable into (inputs, additional arguments).

    Raises:
        TypeError: If data are of another type.
        ValueError: If a loader shuffles, or gives each process only a share of the examples.

    Example:
        >>> made = Batches(torch.arange(10.0)[:, None], 4, lambda batch: (batch, None))
        >>> [(b.first, b.rows) for b in made.where(lambda first, after: after > 8)]
        [(0, 4), (8, 2)]
    """

    def __init__(self, data: Any, batch_size: int, unpack: Unpack) -> None:
        self._unpack = unpack
        data = as_batches(data, batch_size)
        self._indices: Sequence[Sequence[int]] | None = None
        if (tensors := _tensors_of(data)) is None:
            _refuse_disorder(data)
            self._indices = _indexed(data)
        else:
            refuse_uneven(tensors)
            self._indices = _ranges(len(tensors[0]), batch_size)
        self._data = data
        self._first_batch: Batch | None = None
        self._end: int | None = None
        self._rest = self._counted(data)

    @property
    def examples(self) -> int | None:
        """Number of examples M. None for an iterable without a length, until it has been read to its end."""
        return self._end if self._indices is None else sum(map(len, self._indices))

    def first(self) -> Batch | None:
        """Load the first batch, once; None if there are no data. :meth:`where` begins with it."""
        if self._first_batch is None:
            self._first_batch = next(self._rest if self._indices is None else self._fetched(self._listed()[:1]), None)
        return self._first_batch

    def where(self, wanted: Callable[[int, int], bool]) -> Iterator[Batch]:
        """Yield the first batch and every other wanted batch. An iterable that cannot skip yields all batches, once.

        Args:
            wanted: Whether a batch is wanted. Gets the batch's first row and the row after its last.
        """
        first = self.first()
        if first is None:
            return
        yield first
        if self._indices is None:
            yield from self._rest
        else:
            yield from self._fetched([(at, n) for at, n in self._listed()[1:] if wanted(at, at + len(n))])

    @property
    def largest_batch(self) -> int | None:
        """Largest number of examples in a batch; None for an iterable without indices."""
        return None if self._indices is None else max(map(len, self._indices), default=1)

    def picked(self, wanted: Tensor, *, least: int = 1) -> Iterator[Picked]:
        """Yield batches that hold all wanted examples; load as few others as possible.

        A loader with a ``collate_fn`` of its own loads whole batches, since inputs may depend on the other examples of
        a batch, as padding does.

        Args:
            wanted: Rows, in any order.
            least: Examples in each batch after the first, where the data have smaller batches, can load single
                examples, and this many take at most 64 MB.

        Example:
            >>> made = Batches(torch.arange(10.0)[:, None], 4, lambda batch: (batch, None))
            >>> [(p.rows.tolist(), p.inputs[:, 0].tolist()) for p in made.picked(torch.tensor([9, 0, 5]))]
            [([0, 5, 9], [0.0, 5.0, 9.0])]
        """
        wanted = torch.unique(wanted)
        if self._indices is None or not _joins_equally(self._data):
            for batch in self.where(lambda first, after: bool(((wanted >= first) & (wanted < after)).any())):
                yield Picked(
                    torch.arange(batch.first, batch.first + batch.rows, device="cpu"), batch.inputs, batch.additional
                )
            return
        size = self.largest_batch or 1
        if size < min(least, len(wanted)):
            (first,) = self._joined([wanted[:size]])
            yield first
            room = _BYTES // max(1, _bytes_of(first.inputs) // size)
            wanted, size = wanted[size:], max(size, min(least, room))
        yield from self._joined(torch.split(wanted, size) if len(wanted) else ())

    def _joined(self, groups: Sequence[Tensor]) -> Iterator[Picked]:
        """Load groups of examples of indexed data, each as one batch."""
        indices = list(itertools.chain.from_iterable(self._indices or ()))
        loaded = self._loaded([[indices[row] for row in rows.tolist()] for rows in groups])
        for rows, (inputs, additional) in zip(groups, loaded, strict=True):
            yield Picked(rows, inputs, additional)

    def share(self, rank: int, world: int) -> Iterator[Batch]:
        """Yield the batches of one of several processes that take turns.

        Args:
            rank: Rank of the process, also the index of its first batch.
            world: Number of processes.

        Example:
            >>> made = Batches(torch.arange(10.0)[:, None], 4, lambda batch: (batch, None))
            >>> [b.first for b in made.share(0, 2)]
            [0, 8]
        """
        first = self.first()
        if first is not None and rank == 0:
            yield first
        following = rank or world
        if self._indices is None:
            yield from itertools.islice(self._rest, following - 1, None, world)
        else:
            yield from self._fetched(self._listed()[following::world])

    def _listed(self) -> list[tuple[int, Sequence[int]]]:
        """List the batches of indexed data: the first row of each batch, and its indices in the data."""
        numbers = self._indices or ()
        ends = itertools.accumulate(map(len, numbers))
        return [(end - len(n), n) for end, n in zip(ends, numbers, strict=True)]

    def _fetched(self, chosen: list[tuple[int, Sequence[int]]]) -> Iterator[Batch]:
        """Load chosen batches of indexed data, one after the other."""
        for (first, numbers), loaded in zip(chosen, self._loaded([n for _, n in chosen]), strict=True):
            yield Batch(first, len(numbers), *loaded)

    def _loaded(self, numbers: list[Sequence[int]]) -> Iterator[tuple[Any, Any]]:
        """Yield batches of the examples with these indices."""
        if isinstance(self._data, DataLoader):
            yield from map(self._unpack, _loader(self._data, _Chosen(numbers)))
            return
        for n in numbers:
            rows = slice(n.start, n.stop) if isinstance(n, range) else list(n)  # a slice copies nothing
            yield (self._data[rows] if isinstance(self._data, Tensor) else tuple(x[rows] for x in self._data)), None

    def _counted(self, batches: Iterable[Any]) -> Iterator[Batch]:
        """Yield the batches of an iterable, each with its first row."""
        first = 0
        for batch in batches:
            inputs, additional = self._unpack(batch)
            rows = rows_in(inputs)
            if rows == 0:
                continue
            if rows is None:
                raise TypeError(
                    f"the inputs ({type(inputs).__name__}) contain no tensor with a row for each example; collect "
                    "their activations into memory in one process, without store="
                )
            yield Batch(first, rows, inputs, additional)
            first += rows
        self._end = first


def as_they_come(data: Any, batch_size: int, unpack: Unpack) -> Iterator[tuple[Any, Any]]:
    """Yield (inputs, additional arguments) of all batches once, in any order.

    Args:
        data: As :class:`Batches` takes them; loaders may shuffle.
        batch_size: Examples in a batch of tensors.
        unpack: Turns a batch of an iterable into (inputs, additional arguments).

    Raises:
        TypeError: If data are of another type.

    Example:
        >>> [len(x) for x, _ in as_they_come(torch.zeros(10, 1), 4, lambda batch: (batch, None))]
        [4, 4, 2]
    """
    tensors = _tensors_of(data)
    if tensors is None:
        yield from (unpacked for unpacked in map(unpack, data) if rows_in(unpacked[0]) != 0)
    elif len(tensors[0]):
        for parts in zip(*(torch.split(x, batch_size) for x in tensors), strict=True):
            yield (parts[0] if isinstance(data, Tensor) else parts), None


def _tensors_of(data: Any) -> tuple[Tensor, ...] | None:
    """Return data that are tensors as a tuple, and None for an iterable of batches; raise for other data."""
    refuse_no_batches(data)
    tensors = (data,) if isinstance(data, Tensor) else data
    if isinstance(tensors, tuple) and tensors and all(isinstance(x, Tensor) for x in tensors):
        return tensors
    if not isinstance(data, Iterable):
        raise TypeError(
            f"the data are of type {type(data).__name__}; pass a tensor, a tuple of tensors or an iterable of batches, "
            "such as a torch.utils.data.DataLoader"
        )
    return None


def as_batches(data: Any, batch_size: int = 64) -> Any:
    """Return a loader of a data set that gives single examples; return anything else unchanged.

    Args:
        data: A tensor, an iterable of batches, or a data set.
        batch_size: Examples in a batch of a data set.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> [len(x) for x, y in as_batches(TensorDataset(torch.zeros(70, 3), torch.zeros(70)))]
        [64, 6]
    """
    if not isinstance(data, Dataset) or isinstance(data, IterableDataset):
        return data
    # Without its own generator, a loader draws a seed from the global one. Nothing is shuffled.
    return DataLoader(data, batch_size, collate_fn=_collate, generator=torch.Generator().manual_seed(0))


def _collate(rows: list[Any]) -> Any:
    """Stack examples; raise an error with the fix where they cannot be stacked."""
    try:
        return default_collate(rows)
    except (TypeError, RuntimeError) as error:
        first = rows[0][0] if isinstance(rows[0], (tuple, list)) and rows[0] else rows[0]
        if isinstance(first, Tensor):
            shapes = sorted({tuple(row[0].shape if isinstance(row, (tuple, list)) else row.shape) for row in rows})
            got = f"inputs of the shapes {', '.join(map(str, shapes[:3]))}, which cannot be stacked to a batch"
            fix = "resize or pad them to one shape in the data set's transform"
        else:
            got = f"a {type(first).__name__} as an example's input"
            fix = "give it a transform to tensors, such as torchvision.transforms.ToTensor()"
        raise TypeError(f"the data set gives {got}; {fix}, or pass a DataLoader with your own collate_fn") from error


def refuse_no_batches(data: Any) -> None:
    """Raise where data are one dict, a array, a table, a path or a tensor without rows instead of batches.

    Args:
        data: As :class:`Batches` takes them.

    Example:
        >>> refuse_no_batches({"ids": torch.zeros(2)})
        Traceback (most recent call last):
        ...
        TypeError: the data are a dict with the keys ids; pass batches of them, such as [data] for a single one, or a
        torch.utils.data.DataLoader
    """
    if isinstance(data, Mapping):
        raise TypeError(
            f"the data are a dict with the keys {', '.join(map(str, data))}; pass batches of them, such as [data] for "
            "a single one, or a torch.utils.data.DataLoader"
        )
    if isinstance(data, np.ndarray):
        raise TypeError(
            f"the data are a numpy array {data.shape} of {data.dtype}; pass a tensor in the dtype of the model, as in "
            "torch.from_numpy(data).float()"
        )
    if hasattr(data, "to_numpy"):
        raise TypeError(
            f"the data are a {type(data).__name__} {getattr(data, 'shape', '')}; pass a tensor in the dtype of the "
            "model, as in torch.tensor(data.to_numpy(), dtype=torch.float32)"
        )
    if isinstance(data, Tensor) and data.layout != torch.strided:
        raise TypeError(f"the data are a tensor of layout {data.layout}; pass a dense one, data.to_dense()")
    if isinstance(data, Tensor) and not data.dim():
        raise ValueError("the data are a tensor () without examples; pass a tensor (M, ...)")
    if isinstance(data, (str, bytes, os.PathLike)):
        raise TypeError(
            f"the data are the path {os.fspath(data)!r}; pass tensors or a torch.utils.data.DataLoader, or let "
            "captum_xnn.cli.ModelAndInputs read a folder of images"
        )


class _Chosen(Sampler[list[int]]):
    """Batches of indices that are known already."""

    def __init__(self, indices: list[Sequence[int]]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def first_inputs(inputs: Any, row: int) -> str:
    """Compute a checksum of one example's inputs, 16 hexadecimal digits.

    Args:
        inputs: A tensor (N, ...) or a tuple of values; only its tensors count.
        row: The example's row in the batch.

    Example:
        >>> first_inputs(torch.eye(3), 1) == first_inputs(torch.eye(2, 3), 1)
        True
    """
    digest = hashlib.blake2b(digest_size=8)
    for value in _many(inputs):
        if isinstance(value, Tensor) and value.dim() and row < len(value):
            one = value[row].detach().cpu().contiguous().reshape(-1)
            digest.update(one.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_repeatable(data: Any) -> bool:
    """Whether data give the same examples in the same order each time they are read, as far as is known.

    Args:
        data: As :class:`Batches` takes them.

    Example:
        >>> is_repeatable(torch.zeros(3, 1)), is_repeatable(iter([torch.zeros(3, 1)]))
        (True, False)
    """
    return not isinstance(data, Iterator) and not _is_random(data)


def repeatable(data: Any) -> Any:
    """Bring data into a form that can be read again in the same order, with the same examples.

    A loader that shuffles is replaced by a loader of the same data set that does not shuffle. Data that can be read
    only once are kept in memory, batch by batch. A data set gets a loader.

    Args:
        data: As :class:`Batches` takes them.

    Example:
        >>> loader = DataLoader([1.0, 2.0, 3.0], batch_size=2, shuffle=True)
        >>> list(repeatable(loader))
        [tensor([1., 2.], dtype=torch.float64), tensor([3.], dtype=torch.float64)]
    """
    data = as_batches(data)
    if isinstance(data, Iterator):
        return list(data)
    if not _is_random(data) or type(data) is not DataLoader or isinstance(data.dataset, IterableDataset):
        return data
    order = range(len(data.dataset))  # type: ignore[arg-type]
    size = data.batch_size or getattr(data.batch_sampler, "batch_size", None) or 1
    return _loader(data, _Chosen([order[i : i + size] for i in range(0, len(order), size)]))


def _is_random(data: Any) -> bool:
    """Whether a loader gives another order in every run."""
    return any(isinstance(sampler, _RANDOM) for sampler in _samplers(data))


def _samplers(data: Any) -> list[Any]:
    samplers = [getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    return [*samplers, getattr(samplers[1], "sampler", None)]


def number_of_batches(data: Any) -> int | None:
    """Count the batches of an iterable; None if it does not say, as a loader of an ``IterableDataset`` without length.

    Args:
        data: As :class:`Batches` takes them.

    Example:
        >>> number_of_batches([torch.zeros(2, 1)]), number_of_batches(iter([]))
        (1, None)
    """
    try:
        return len(data)
    except TypeError:
        return None


def refuse_changed(before: Tensor, again: Tensor, rows: Tensor) -> None:
    """Raise where data give other examples when they are read again, as far as values of a model show it.

    Args:
        before: Values of some examples at the first reading, (N, ...).
        again: Values of the same examples now. Other dtypes and shapes say nothing.
        rows: Rows of these examples in the data, (N,).

    Raises:
        ValueError: If values differ by more than rounding.

    Example:
        >>> refuse_changed(torch.eye(2), torch.eye(2), torch.arange(2))
    """
    if before.dtype != again.dtype or before.shape != again.shape or not again.is_floating_point() or not len(rows):
        return
    half = again.dtype in (torch.float16, torch.bfloat16)
    first, now = (values[:, None].flatten(1).float() for values in (before, again))
    deviation, size = float((first - first.mean(0)).abs().amax()), float(first.abs().amax())
    # Batches of another size round otherwise.
    allowed = (0.1 * deviation + 0.02 * size) if half else (0.01 * deviation + 1e-3 * size)
    off = (now - first).abs().amax(1) > allowed
    if bool(off.any()):
        raise ValueError(
            f"the data changed: example {int(rows[int(off.nonzero()[0])])} gives other values than when it was first "
            "read, as with random augmentation, another order in every run, or a store of other data; pass the same "
            "examples in the same order each time, and images with the transform of the test set"
        )


def refuse_lack(found: int, rows: Tensor) -> None:
    """Raise where data that are read again end too early.

    Args:
        found: Number of examples that were found again.
        rows: Rows of all wanted examples.

    Raises:
        ValueError: If examples are missing.
    """
    if found < len(rows):
        raise ValueError(
            f"the data ended early when they were read again: {found} of {len(rows)} wanted examples were left; pass "
            "data that can be read several times, such as list(batches) or a DataLoader"
        )


def rows_in(inputs: Any) -> int | None:
    """Count the examples in a batch; None without a tensor that has rows.

    Args:
        inputs: A tensor (N, ...) or a tuple of values.

    Example:
        >>> rows_in((torch.zeros(3, 2), torch.zeros(3))), rows_in("text")
        (3, None)
    """
    return next((len(x) for x in _many(inputs) if isinstance(x, Tensor) and x.dim()), None)


def _bytes_of(inputs: Any) -> int:
    """Count the bytes of the tensors among some inputs."""
    return sum(x.numel() * x.element_size() for x in _many(inputs) if isinstance(x, Tensor))


def _many(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def copied_to(values: Any, device: torch.device) -> tuple[Any, ...]:
    """Copy values to a device, so that a model that works in place does not change the user's data.

    Args:
        values: A tensor or a tuple of values; only tensors are copied.
        device: The device.

    Example:
        >>> copied_to(torch.ones(2), torch.device("cpu"))
        (tensor([1., 1.]),)
    """
    return tuple(v.to(device, copy=True) if isinstance(v, Tensor) else v for v in _many(values))


def _arguments_on(inputs: Any, additional: Any, device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Copy inputs and additional arguments to a device; return each as a tuple."""
    return copied_to(inputs, device), () if additional is None else copied_to(additional, device)


def _joins_equally(data: Any) -> bool:
    """Whether inputs of an example are the same in any batch: tensors, and loaders that stack or list examples."""
    return not isinstance(data, DataLoader) or data.collate_fn in (default_collate, _collate, list)


def _ranges(examples: int, batch_size: int) -> list[Sequence[int]]:
    return [range(first, min(first + batch_size, examples)) for first in range(0, examples, batch_size)]


def _refuse_disorder(data: Any) -> None:
    """Raise where a loader gives another order in every run, or other examples to every process."""
    for sampler in _samplers(data):
        if isinstance(sampler, _RANDOM):
            raise ValueError(
                f"the loader draws its examples in a new order every time, with a {type(sampler).__name__}; a store "
                "can only be resumed, and work only be shared, in a fixed order: pass a loader with shuffle=False (the "
                "fit draws its own batches at random)"
            )
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise ValueError(
                f"the loader gives each of {sampler.num_replicas} processes only a share of the examples, with a "
                "DistributedSampler; pass the same plain loader in all processes: rank= and world_size= divide the work"
            )


def _indexed(data: Any) -> Sequence[Sequence[int]] | None:
    """List the indices of the examples in every batch of a loader; None where it cannot load one batch alone."""
    if type(data) is not DataLoader or isinstance(data.dataset, IterableDataset):
        return None
    batches = data.batch_sampler
    if type(batches) is BatchSampler and type(batches.sampler) is SequentialSampler:
        examples, size = len(batches.sampler), batches.batch_size
        return _ranges(examples - examples % size if batches.drop_last else examples, size)
    return None if batches is None else [list(batch) for batch in batches]


def _loader(like: DataLoader[Any], batches: _Chosen) -> DataLoader[Any]:
    """Make a loader of other batches of the same data, with the same settings."""
    return DataLoader(
        like.dataset,
        batch_sampler=batches,
        num_workers=like.num_workers,
        collate_fn=like.collate_fn,
        pin_memory=like.pin_memory,
        timeout=like.timeout,
        worker_init_fn=like.worker_init_fn,
        multiprocessing_context=like.multiprocessing_context,
        generator=like.generator,
        prefetch_factor=like.prefetch_factor,
    )
