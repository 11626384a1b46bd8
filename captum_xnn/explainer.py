"""Explainer: a fitted form with the facts of its fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from captum_xnn.layers._targets import Difference, Target
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._numbers import Choice, Form
from captum_xnn.training._history import Step

__all__ = ["Explainer"]


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
    history: tuple[Step, ...] = field(default=(), repr=False)
    requested: int | None = None
    """Number of x-features that the fit was asked for; None if unknown."""

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
