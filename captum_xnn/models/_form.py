"""Form: an explanation network of any kind, and the choice of one for an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from captum_xnn.layers._targets import Target
from captum_xnn.models._base import Autoencoder
from captum_xnn.models._contribution_groups import ContributionGroups

__all__ = ["Choice", "Form", "MakeForm"]

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
