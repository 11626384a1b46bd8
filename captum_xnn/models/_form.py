"""Form: an explanation network of any kind, and the choice of one for an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from captum_xnn.layers._targets import Target
from captum_xnn.models._base import Autoencoder
from captum_xnn.models._contribution_groups import ContributionGroups

__all__ = ["Choice", "Form", "MakeForm", "refuse_no_maker"]

Form = Autoencoder | ContributionGroups
"""An explanation network: a learned network or groups of contributions."""

MakeForm = Callable[..., Form]
"""Makes a form from ``(shape of Z, n_features, n_outputs=...)``."""


class Choice(NamedTuple):
    """The form that explains an example, and the explained output."""

    form: Form
    output: int
    """Index of the output among those that the form explains."""
    target: Target
    """The same output among the model's outputs, or its difference from another one."""
    against: int | None = None
    """Index of the output that a learned network subtracts; None subtracts nothing."""


def refuse_no_maker(autoencoder: Any) -> None:
    """Raise where the argument ``autoencoder=`` cannot make forms.

    Args:
        autoencoder: The argument.

    Raises:
        TypeError: If it is a network, or cannot be called.
    """
    if autoencoder is None or (callable(autoencoder) and not isinstance(autoencoder, nn.Module)):
        return
    value = f"a network of class {type(autoencoder).__name__}" if callable(autoencoder) else repr(autoencoder)
    problem = "and cannot make one" if callable(autoencoder) else "and cannot be called"
    raise TypeError(
        f"autoencoder is {value}, {problem}; pass a class such as SRAE or "
        "captum_xnn.models.baselines.NN, or a function that makes the network"
    )
