"""Activations: a layer's output and the model's outputs on some data; the outputs and examples that a fit selects.

Conventions:
    M examples of all data, N examples of a batch, C outputs of the model, or those of them that are explained.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.activations._memmap import Rows, chunks
from captum_xnn.activations._store import Store
from captum_xnn.activations._unpacking import Unpack
from captum_xnn.errors import ModelMismatchError
from captum_xnn.layers._fingerprint import differences, fingerprint
from captum_xnn.layers._logits import OutputRange, no_logits
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.layers._targets import Target, positives_of, predicted_classes, select

__all__ = ["Activations", "Asked", "ChosenRows", "Outputs", "Source", "Task", "check_positives"]


class Source(NamedTuple):
    """Data that can be read again in the same order."""

    data: Any
    """As :func:`captum_xnn.activations.collect` takes them."""
    unpack: Unpack
    """Turns a batch of an iterable into (inputs, additional_forward_args)."""


class Asked:
    """The requested outputs of the model.

    Every batch is checked for them. Where the model gives maps or sequences, no other outputs are kept.

    Args:
        targets: Each None, an int, or a tuple of ints.
        gradients: Whether their derivatives by the layer are needed, so that the first batch is tried for them.

    Example:
        >>> asked = Asked([(1, 0), (0, 2)])
        >>> asked.kept(torch.arange(12.0).reshape(2, 2, 3))
        tensor([[3., 2.],
                [9., 8.]])
    """

    def __init__(self, targets: Iterable[Target], *, gradients: bool = False) -> None:
        self.targets = list(dict.fromkeys(targets))
        self.gradients = gradients
        self.value_range: OutputRange | None = None
        """Range and sums of all outputs, where not all outputs are kept."""

    def check(self, y_hat: Tensor) -> None:
        """Raise where the model has no such output.

        Args:
            y_hat: The model's outputs, (N, ...).
        """
        for target in self.targets:
            select(y_hat, target)

    def kept(self, y_hat: Tensor) -> Tensor:
        """Select the outputs to keep: (N,) or (N, C) as they are, otherwise only the requested ones, (N, targets).

        Args:
            y_hat: The model's outputs, (N, ...).
        """
        if y_hat.dim() <= 2:
            return y_hat
        self.value_range = self.value_range or OutputRange()
        self.value_range.add(y_hat)
        return torch.stack([select(y_hat, target) for target in self.targets], 1)


class Activations(NamedTuple):
    """Activations of a layer and the outputs of the model, example by example.

    Both are tensors, or both are :class:`~captum_xnn.activations._memmap.Rows` on disk. ``Z[rows]`` and ``Z.split(n)``
    work on either, and ``Z[:]`` is a tensor.
    """

    Z: Tensor | Rows
    """Output of the layer, (M, ...), in the model's dtype, on the CPU."""
    y_hat: Tensor | Rows
    """Output of the model, (M,) or (M, C), usually logits, on the CPU."""
    layer: str
    """Dotted name of the layer."""
    fingerprint: dict[str, Any] | None = None
    """The model's fingerprint (:mod:`captum_xnn.layers._fingerprint`), where activations come from a store."""
    source: Source | None = None
    """The inputs, to be read again by groups of contributions; None where they cannot be read again."""
    folder: Path | None = None
    """Folder of the store. Fits keep contributions beside it."""
    asked: Asked | None = None
    """The outputs in the columns of y_hat, where others were not kept; None where y_hat holds all outputs."""

    @classmethod
    def open(cls, store: str | os.PathLike[str], *, checksums: bool = True) -> Activations:
        """Open and verify the activations in a folder that :func:`~captum_xnn.activations.collect` filled.

        Args:
            store: The folder.
            checksums: Whether to read all files once and compare checksums, rather than look at sizes only.

        Raises:
            StoreError: If shards are missing, cut short, or changed, or the folder is not a store of this version. The
                error names the shards and the remedy.

        Example:
            >>> import tempfile
            >>> from captum_xnn.activations import collect
            >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
            >>> folder = tempfile.mkdtemp()
            >>> _ = collect(model, "1", torch.ones(10, 4), store=folder)
            >>> Activations.open(folder).Z
            Rows(shape=(10, 3), dtype=torch.float32, files=1)
        """
        opened = Store.open(store)
        opened.check(checksums=checksums)
        fingerprint = opened.manifest["fingerprint"]
        return cls(opened.rows("Z"), opened.rows("y_hat"), opened.layer, fingerprint, folder=Path(store))

    def check(self, model: nn.Module, layer: str) -> None:
        """Raise where the activations come from another layer or model, as far as is known.

        Args:
            model: A plain module.
            layer: Dotted name of the layer.

        Raises:
            ModelMismatchError: If they come from another layer, or from a model with other weights.
        """
        told = [f"layer is {layer}, was {self.layer}"] if layer != self.layer else []
        if not told and self.fingerprint is not None:
            told = differences(self.fingerprint, fingerprint(model, layer))
        if told:
            raise ModelMismatchError(
                f"these activations were not collected from layer {layer!r} of this model: {'; '.join(told)}. Name "
                "the other layer, load the weights they were collected with, or collect anew into another folder"
            )


class Task(NamedTuple):
    """The outputs that one explainer explains."""

    targets: tuple[Target, ...]
    y: Tensor
    """Outputs, (M, C)."""
    positives: Tensor | None
    """Boolean (M,): the examples of the class; None if outputs are not classes."""


class Outputs(NamedTuple):
    """Everything that a fit needs of the model's outputs. All outputs together may be too large for memory."""

    y: Tensor
    """The explained outputs, (M, C)."""
    targets: list[Target]
    """The targets of the columns."""
    classes: Tensor | None
    """The class that the model gives each example, (M,); None if outputs are not classes."""
    value_range: OutputRange
    """Range and sums of all outputs."""

    @classmethod
    def of(cls, activations: Activations, targets: Sequence[Target]) -> Outputs:
        """Read the outputs of collected activations once.

        Args:
            activations: Activations with the model's outputs.
            targets: The explained targets.

        Raises:
            ValueError: If the model has no such output.

        Example:
            >>> activations = Activations(torch.zeros(2, 3), torch.tensor([[1.0, 5.0], [4.0, 2.0]]), "fc")
            >>> outputs = Outputs.of(activations, [1])
            >>> outputs.y.tolist(), outputs.classes.tolist()
            ([[5.0], [2.0]], [1, 0])
        """
        targets, y_hat, asked = list(dict.fromkeys(targets)), activations.y_hat, activations.asked
        if asked is not None and asked.value_range is not None:
            return cls(y_hat[:][:, [asked.targets.index(t) for t in targets]], targets, None, asked.value_range)
        y = torch.empty(len(y_hat), len(targets), dtype=y_hat.dtype, device="cpu")
        classes: list[Tensor] = []
        value_range, first = OutputRange(), 0
        for chunk in chunks(y_hat):
            y[first : first + len(chunk)] = torch.stack([select(chunk, t) for t in targets], 1)
            first += len(chunk)
            classes_of_chunk = predicted_classes(chunk)
            if classes_of_chunk is not None:
                classes.append(classes_of_chunk)
            value_range.add(chunk)
        return cls(y, targets, torch.cat(classes) if classes else None, value_range)

    def columns(self, targets: Sequence[Target]) -> Tensor:
        """Select some of the explained outputs, (M, C).

        Args:
            targets: Some of the explained targets.
        """
        return self.y[:, [self.targets.index(t) for t in targets]]

    def refuse_softmax(self) -> None:
        """Raise where outputs come from a softmax."""
        if self.value_range.sum_to_one:
            raise ValueError(
                f"{no_logits(self.value_range)}. To explain the probabilities all the same, pass "
                "prediction_transform=lambda y: y"
            )

    def warn_unless_logits(self) -> None:
        """Warn where outputs look like probabilities."""
        if (reason := no_logits(self.value_range)) is not None:
            warnings.warn(reason, stacklevel=levels_up())

    def task(self, targets: tuple[Target, ...], positives: Tensor | None = None) -> Task:
        """Select the outputs of one explainer and its positives.

        Args:
            targets: The targets of the explainer.
            positives: Boolean (M,); None takes the examples to which the model gives one of the classes.

        Raises:
            ValueError: If the model gives no example one of the classes, or positives do not mark every example.
        """
        if positives is None:
            return Task(targets, self.columns(targets), self._own_positives(targets))
        check_positives(positives, self.y)
        return Task(targets, self.columns(targets), positives)

    def _own_positives(self, targets: tuple[Target, ...]) -> Tensor | None:
        """Mark the examples to which the model gives one of the classes; None if outputs are not classes."""
        positives = positives_of(self.classes, targets)
        if positives is not None and not bool(positives.any()):
            raise ValueError(
                f"the model gives class {', '.join(map(str, targets))} to none of {len(positives)} examples; add such "
                "examples to the data. If examples may have several labels at once, mark those with this one, as in "
                f"positives=model(x)[:, {targets[0]}] > 0. If the outputs are no classes, weight all examples alike by "
                f"positives=torch.ones({len(positives)}, dtype=torch.bool)"
            )
        return positives


def check_positives(positives: Any, data: Any) -> None:
    """Raise where a user's positives do not mark every example.

    Args:
        positives: Should be a boolean tensor (M,).
        data: The data. Without tensors their number of examples is not known, and the shape is not checked.

    Raises:
        TypeError: If positives are no tensor.
        ValueError: If the shape or dtype is another, or no example is marked.
    """
    first = next(iter(data), None) if isinstance(data, tuple) else data
    if not isinstance(positives, Tensor):
        M = len(first) if isinstance(first, Tensor) else "M"
        raise TypeError(
            f"positives are a {type(positives).__name__}; pass a boolean tensor ({M},), as in torch.tensor(positives)"
        )
    if not isinstance(first, Tensor):
        return
    M = len(first)
    if positives.shape != (M,) or positives.dtype != torch.bool:
        raise ValueError(
            f"positives are {positives.dtype} {tuple(positives.shape)}, not booleans ({M},); mark each example of the "
            "class True"
        )
    if M and not bool(positives.any()):
        raise ValueError(
            f"positives mark none of {M} examples; mark the examples of the class True, or leave positives= out"
        )


class ChosenRows(NamedTuple):
    """Row indices of the examples to learn from."""

    positives: list[Tensor]
    """Rows of positives for each explainer, in ascending order."""
    others: Tensor
    """Rows of other examples, shared by all explainers, in ascending order."""

    @classmethod
    def choose(cls, marks: Sequence[Tensor | None], rows: int, positives: int, others: int) -> ChosenRows:
        """Choose positives for each explainer and other examples, evenly spread over the data, without random numbers.

        Args:
            marks: Boolean (M,) of positives for each explainer; None if outputs are not classes.
            rows: Number of examples M.
            positives: Largest number of positives for each explainer.
            others: Largest number of other examples.

        Example:
            >>> ChosenRows.choose([torch.arange(9) < 5, None], 9, 3, 2)
            ChosenRows(positives=[tensor([0, 2, 4]), tensor([0, 4, 8])], others=tensor([0, 8]))
        """
        everything = torch.arange(rows, device="cpu")
        own = [everything if m is None or not bool(m.any()) else everything[m.cpu()] for m in marks]
        return cls([_evenly(p, positives) for p in own], _evenly(everything, others))


def _evenly(rows: Tensor, count: int) -> Tensor:
    """Select evenly spread rows, ``count`` at most."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, dtype=torch.float32, device="cpu").round().long()]
