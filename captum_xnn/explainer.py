"""Explainer: a fitted form with the facts of its fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_xnn.activations._activations import Activations
from captum_xnn.activations._batches import Batches, refuse_changed, refuse_lack
from captum_xnn.activations._memmap import chunks
from captum_xnn.heatmaps._numbers import Examples, Numbers, check_shape, numbers_of_network
from captum_xnn.layers._fingerprint import WeightSamples
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Difference, Target, select_each
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._form import Choice, Form
from captum_xnn.training._history import Record

if TYPE_CHECKING:  # an explainer gets the reader of its layer, and makes none
    from captum_xnn.layers._reader import Reader

__all__ = ["Explainer"]

# Examples that the model runs on at once, where it runs on data again.
_AT_ONCE = 64


@dataclass(frozen=True)
class Explainer:
    """A fitted form for one output, or for several outputs jointly."""

    layer: str
    """Dotted name of the explained layer."""
    targets: tuple[Target, ...]
    """The explained outputs, in the order of the head's rows."""
    form: Form
    """The form: groups of contributions, or a learned network."""
    f_reg: float
    """Mean absolute error in logits. For groups, over the examples that they were learned from; for other forms, over
    all training data."""
    examples: int
    """Number of training examples."""
    positives: int | None
    """Number of training examples to which the model gives the class; None if the output is not a class."""
    floor: float | None = None
    """Lowest mean squared error, summed over outputs, that so few x-features can reach. None for groups, and with at
    least as many x-features as outputs."""
    history: tuple[Record, ...] = field(default=(), repr=False)
    requested: int | None = None
    """Number of x-features that the fit was asked for; None if unknown."""
    weights: WeightSamples | None = field(default=None, repr=False, compare=False)
    """Some numbers of the model's weights when the explainer was fitted or loaded; None if unknown."""

    @property
    def is_exact(self) -> bool:
        """Whether the x-features add up to the output by construction, as groups of contributions do."""
        return isinstance(self.form, ContributionGroups)

    @property
    def shortfall(self) -> str:
        """Why there are fewer x-features than the fit was asked for, in a sentence; empty if there are as many."""
        left = self.form.n_features
        if self.requested is None or left >= self.requested:
            return ""
        return (
            f"The fit was asked for {self.requested} x-features and has {left}: the other "
            f"{'one' if self.requested - left == 1 else self.requested - left} held less than one percent of the "
            "contributions and went into these."
        )

    def covers(self, target: Target) -> bool:
        """Whether this explainer explains the target. For a model with one output, None and 0 are the same target.

        Groups of contributions of an output divide its difference from any other output. A learned network needs to
        cover both outputs.

        Args:
            target: None, int, tuple of ints, or a difference.
        """
        if isinstance(target, Difference):
            return self.covers(target.target) and (self.is_exact or self.covers(target.against))
        return target in self.targets or (target in (None, 0) and self.targets in ((None,), (0,)))

    def output(self, target: Target) -> int:
        """Return the row of the head that approximates a covered output.

        Args:
            target: None, int, tuple of ints, or a difference, which has the row of its first output.
        """
        target = target.target if isinstance(target, Difference) else target
        return self.targets.index(target) if target in self.targets else 0

    def choice(self, target: Target) -> Choice:
        """Return how this explainer explains a covered target.

        Args:
            target: None, int, tuple of ints, or a difference.
        """
        against = None
        if isinstance(target, Difference) and not self.is_exact:
            against = self.output(target.against)
        return Choice(self.form, self.output(target), target, against)

    def numbers(self, target: Target, found: Activations, predictions: Tensor, reader: Reader) -> Numbers:
        """Compute the numbers of a covered target on collected activations, on the CPU and without slopes.

        A learned network reads the activations. Groups of contributions need the model, which runs on the inputs again.

        Args:
            target: None, int, tuple of ints, or a difference.
            found: Activations of M examples.
            predictions: The explained output of each example, (M,).
            reader: Reader of the layer.

        Raises:
            ModelMismatchError: If the form was fitted to another shape of Z.
            ValueError: If groups are to be read from activations without inputs, or the inputs have changed.

        Example:
            >>> from captum_xnn.layers._reader import Reader
            >>> from captum_xnn.models._srae import SRAE
            >>> reader = Reader.of(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU()), "1")
            >>> found = Activations(Z=torch.rand(9, 4), y_hat=torch.rand(9, 4), layer="1")
            >>> explainer = Explainer("1", (1,), SRAE(4, 2), f_reg=0.1, examples=9, positives=3)
            >>> explainer.numbers(1, found, found.y_hat[:, 1], reader).contributions.shape
            torch.Size([9, 2])
        """
        choice = self.choice(target)
        if isinstance(choice.form, ContributionGroups):
            parts = _again(choice, found, predictions, reader)
        else:
            parts = _encoded(choice, found)
        made = [numbers._replace(slopes=numbers.features[:, :0]) for numbers in parts]
        return Numbers(*(torch.cat([value.cpu() for value in values]) for values in zip(*made, strict=True)))


def _encoded(choice: Choice, found: Activations) -> Iterator[Numbers]:
    """Yield the numbers of a learned network, part by part of the activations."""
    form = choice.form
    assert not isinstance(form, ContributionGroups)
    for Z in chunks(found.Z):
        check_shape(form, Z, found.layer)
        with torch.no_grad():
            yield numbers_of_network(form, choice, Z.to(form.head.weight.device), sloping=False)


def _again(choice: Choice, found: Activations, predictions: Tensor, reader: Reader) -> Iterator[Numbers]:
    """Yield the numbers of groups of contributions, batch by batch of the inputs, which must be those of Z."""
    if found.source is None:
        raise ValueError(
            "these activations do not say which inputs they belong to, and contributions need the inputs again; "
            "pass the data themselves"
        )
    count = 0
    for batch in Batches(found.source.data, _AT_ONCE, found.source.unpack).those(lambda _first, _end: True):
        rows = torch.arange(batch.first, batch.first + batch.rows, device="cpu")
        with torch.inference_mode(False), torch.no_grad(), untouched(reader.model):
            inputs, additional = batch.on(reader.device)
            Z, y_hat = reader.read((*inputs, *additional))
        again = select_each(y_hat, [choice.target] * batch.rows)
        refuse_changed(predictions[rows].cpu(), again.to(predictions.dtype).cpu(), rows)
        # Copies again, as a model may have worked in place.
        yield Examples([choice] * batch.rows, reader, *batch.on(reader.device)).numbers(Z, again)
        count += batch.rows
    refuse_lack(count, torch.arange(len(predictions), device="cpu"))
