"""A fitted explanation network with what is known of its fit, and its form in saved files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_xnn.errors import ExplainerFileError
from captum_xnn.models.base import Autoencoder
from captum_xnn.models.baselines import CAE, NMF, NN, SAE, Lasso, RandomDecoder, RandomEncoder, SingleDimensions
from captum_xnn.models.contribution_groups import ContributionGroups
from captum_xnn.models.srae import SRAE, ConvSRAE, PaperSRAE
from captum_xnn.targets import Target
from captum_xnn.training.problem import Step

__all__ = ["Explainer", "Form"]

Form = Autoencoder | ContributionGroups
"""What an explainer may be: a learned network, or groups of contributions."""

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
    """A fitted explanation network of one output, or of several jointly."""

    layer: str
    """Dotted name of the explained layer."""
    targets: tuple[Target, ...]
    """The explained outputs, in the order of the head's rows."""
    form: Form
    f_reg: float
    """Mean absolute error, in logits: on the examples that groups were learned from, or on all training data."""
    examples: int
    """Training examples."""
    positives: int | None
    """Those of them that the model gives the class; None where no class is explained."""
    floor: float | None = None
    """With fewer x-features than outputs: the mean squared error, summed over outputs, that no x-features go below."""
    history: tuple[Step, ...] = field(default=(), repr=False)

    @property
    def is_exact(self) -> bool:
        """Whether x-features add up to the output by construction, as groups of contributions do."""
        return isinstance(self.form, ContributionGroups)

    def covers(self, target: Target) -> bool:
        """Returns whether this explains an output; of a model with one output, None and 0 are the same.

        Args:
            target: None, int, or tuple of ints.
        """
        return target in self.targets or (target in (None, 0) and self.targets in ((None,), (0,)))

    def output(self, target: Target) -> int:
        """Returns which row of the head approximates an output that is covered.

        Args:
            target: None, int, or tuple of ints.
        """
        return self.targets.index(target) if target in self.targets else 0

    def entry(self) -> dict[str, Any]:
        """Returns all but the weights, as JSON can hold it."""
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
        """Returns the explainer that :meth:`entry` and the network's state dict describe.

        Args:
            entry: What :meth:`entry` returned.
            weights: The network's tensors by name.
            layer: Dotted name of the explained layer.
            forms: Classes of networks beside those of this package.

        Raises:
            ExplainerFileError: If the network is of an unknown form.
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
    """Returns targets from a file, where tuples are lists."""
    made = tuple(tuple(t) if isinstance(t, list) else t for t in saved)
    for target in made:
        numbers = target if isinstance(target, tuple) else () if target is None else (target,)
        if not all(type(t) is int for t in numbers):
            raise ValueError(f"a target is {target!r}, expected None, an int or a list of ints")
    return made


def _name(form: type[Form]) -> str:
    """Returns the name of a form in files: with its module, unless it is of this package."""
    return form.__name__ if form in _FORMS else f"{form.__module__}.{form.__qualname__}"


def _form(name: str, forms: Sequence[type[Form]]) -> type[Form]:
    """Returns the class that a file names.

    Those handed in are found wherever they are defined by now. Nothing is imported: a file must not run code.
    """
    for form in _FORMS:
        if form.__name__ == name:
            return form
    for form in forms:
        if form.__name__ == name.rpartition(".")[2]:
            return form
    raise ExplainerFileError(
        f"expected an explanation network of a known form, got one of class {name!r}; pass the class to load, as "
        f"XNNAttribution.load(path, model, forms=[{name.rpartition('.')[2]}])"
    )
