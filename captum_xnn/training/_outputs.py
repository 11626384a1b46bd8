"""The outputs that a fit explains, and the examples that count as positives of each target.

Conventions:
    M examples, C explained outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.activations._activations import Activations
from captum_xnn.activations._memmap import parts
from captum_xnn.layers._logits import Spread, no_logits
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.layers._targets import Target, predicted_classes, select

__all__ = ["Outputs", "Task", "check_positives"]


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
    spread: Spread
    """Range and sums of all outputs."""

    @classmethod
    def of(cls, found: Activations, targets: Sequence[Target]) -> Outputs:
        """Read the outputs of collected activations once.

        Args:
            found: Activations with the model's outputs.
            targets: The explained targets.

        Raises:
            ValueError: If the model has no such output.

        Example:
            >>> found = Activations(torch.zeros(2, 3), torch.tensor([[1.0, 5.0], [4.0, 2.0]]), "fc")
            >>> outputs = Outputs.of(found, [1])
            >>> outputs.y.tolist(), outputs.classes.tolist()
            ([[5.0], [2.0]], [1, 0])
        """
        targets, y_hat, asked = list(dict.fromkeys(targets)), found.y_hat, found.asked
        if asked is not None and asked.spread is not None:
            return cls(y_hat[:][:, [asked.targets.index(t) for t in targets]], targets, None, asked.spread)
        y, first, given, spread = torch.empty(len(y_hat), len(targets), dtype=y_hat.dtype), 0, [], Spread()
        for part in parts(y_hat):
            y[first : first + len(part)] = torch.stack([select(part, t) for t in targets], 1)
            first += len(part)
            classes = predicted_classes(part)
            given += [] if classes is None else [classes]
            spread.add(part)
        return cls(y, targets, torch.cat(given) if given else None, spread)

    def columns(self, targets: Sequence[Target]) -> Tensor:
        """Select some of the explained outputs, (M, C).

        Args:
            targets: Some of the explained targets.
        """
        return self.y[:, [self.targets.index(t) for t in targets]]

    def warn_unless_logits(self) -> None:
        """Warn where outputs look like probabilities."""
        if (reason := no_logits(self.spread)) is not None:
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
        given = self.classes
        if given is None or not all(isinstance(t, int) for t in targets):
            return None
        positives = torch.isin(given, torch.tensor(targets))
        if not bool(positives.any()):
            raise ValueError(
                f"the model gives class {', '.join(map(str, targets))} to none of {len(given)} examples; add such "
                "examples to the data, or, if the outputs are no classes, weight all examples alike with "
                f"positives=torch.ones({len(given)}, dtype=torch.bool)"
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
