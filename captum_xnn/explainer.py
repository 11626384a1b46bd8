"""Explainer: a fitted explanation network with the facts of its fit, and the conversion to and from saved files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_xnn._targets import Target
from captum_xnn.errors import ExplainerFileError
from captum_xnn.models._base import Autoencoder
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._srae import SRAE, ConvSRAE, PaperSRAE
from captum_xnn.models.baselines import CAE, NMF, NN, SAE, Lasso, RandomDecoder, RandomEncoder, SingleDimensions
from captum_xnn.training._problem import Step

__all__ = ["Explainer", "Form"]

Form = Autoencoder | ContributionGroups
"""An explanation network: a learned network or groups of contributions."""

_FORMS: tuple[type[Form], ...] = (
    ContributionGroups,
    SRAE,
    ConvSRAE,
    PaperSRAE,
    NN,
    SAE,
    CAE,
    Lasso,
    SingleDimensions,
    RandomEncoder,
    RandomDecoder,
    NMF,
)


@dataclass(frozen=True)
class Explainer:
    """A fitted explanation network for one output, or for several outputs jointly."""

    layer: str
    """Dotted name of the explained layer."""
    targets: tuple[Target, ...]
    """The explained outputs, in the order of the head's rows."""
    form: Form
    """The explanation network."""
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

    @property
    def is_exact(self) -> bool:
        """Whether the x-features add up to the output by construction, as groups of contributions do."""
        return isinstance(self.form, ContributionGroups)

    def covers(self, target: Target) -> bool:
        """Whether this explainer explains the target. For a model with one output, None and 0 are the same target.

        Args:
            target: None, int, or tuple of ints.
        """
        return target in self.targets or (target in (None, 0) and self.targets in ((None,), (0,)))

    def output(self, target: Target) -> int:
        """Return the row of the head that approximates a covered output.

        Args:
            target: None, int, or tuple of ints.
        """
        return self.targets.index(target) if target in self.targets else 0

    def entry(self) -> dict[str, Any]:
        """Return everything except the weights, in types that JSON can hold."""
        return {
            "targets": self.targets,
            "class": _name(type(self.form)),
            "config": self.form.config,
            "dtype": str(self.form.dtype).removeprefix("torch."),
            "f_reg": self.f_reg,
            "examples": self.examples,
            "positives": self.positives,
            "floor": self.floor,
            "history": self.history,
        }

    @classmethod
    def restored(
        cls, entry: dict[str, Any], weights: dict[str, Tensor], layer: str, *, forms: Sequence[type[Form]] = ()
    ) -> Explainer:
        """Rebuild an explainer from its entry and the network's state dict.

        Args:
            entry: The dict that :meth:`entry` returned.
            weights: The network's tensors by name.
            layer: Dotted name of the explained layer.
            forms: Your own classes of explanation networks, in addition to those of this package.

        Raises:
            ExplainerFileError: If the class of the network is unknown.
        """
        form = _form(entry["class"], forms)(**entry["config"]).to(getattr(torch, entry["dtype"]))
        form.load_state_dict(weights)
        return cls(
            layer=layer,
            targets=_targets(entry["targets"]),
            form=form.requires_grad_(False),
            f_reg=entry["f_reg"],
            examples=entry["examples"],
            positives=entry["positives"],
            floor=entry["floor"],
            history=tuple(Step(*step) for step in entry["history"]),
        )


def _targets(saved: Any) -> tuple[Target, ...]:
    """Restore targets from a file, in which tuples are lists."""
    made = tuple(tuple(t) if isinstance(t, list) else t for t in saved)
    for target in made:
        numbers = target if isinstance(target, tuple) else () if target is None else (target,)
        if not all(type(t) is int for t in numbers):
            raise ValueError(f"a target is {target!r}, expected None, an int or a list of ints")
    return made


def _name(form: type[Form]) -> str:
    """Return the name of a form's class in files; classes from outside this package include their module."""
    return form.__name__ if form in _FORMS else f"{form.__module__}.{form.__qualname__}"


def _form(name: str, forms: Sequence[type[Form]]) -> type[Form]:
    """Find the class that a file names.

    A class in ``forms`` matches by its bare name, so its module may have moved. No module is imported, because a file
    must not run code.
    """
    for form in _FORMS:
        if form.__name__ == name:
            return form
    for form in forms:
        if form.__name__ == name.rpartition(".")[2]:
            return form
    raise ExplainerFileError(
        f"the explainer's class {name!r} is not known; pass the class to load, as "
        f"XNNAttribution.load(path, model, forms=[{name.rpartition('.')[2]}])"
    )
