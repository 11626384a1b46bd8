"""The kinds of methods to compare: a form, a rule, or one map; and the relevances that some rules give.

Conventions:
    N examples, D dimensions or channels of Z, K x-features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_xnn.activations._activations import Activations
from captum_xnn.layers._arguments import copied
from captum_xnn.layers._state import untouched
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._form import MakeForm
from captum_xnn.models.baselines import _dictionaries as dictionaries
from captum_xnn.models.baselines import _partitions as rules

if TYPE_CHECKING:  # relevances get an attribution that holds explainers, and make none
    from captum_xnn.attribution import XNNAttribution

__all__ = ["Method", "OneMap", "Relevances", "Rule"]


class OneMap:
    """The single map of the output, without x-features."""


class Rule(ABC):
    """A rule that divides contributions in place of the learned division, or finds subspaces or concepts."""

    @abstractmethod
    def fit(self, xnn: XNNAttribution, activations: Activations, targets: Sequence[Any]) -> XNNAttribution | Relevances:
        """Apply the rule to each target.

        Args:
            xnn: An attribution of the layer.
            activations: Activations of the training examples, with their source.
            targets: The targets.

        Raises:
            ValueError: If there are no positives, or the rule finds nothing.
        """


@dataclass(frozen=True)
class Relevances:
    """Contributions of fitted subspaces or of concepts."""

    xnn: XNNAttribution
    """Explainers in which each dimension is an x-feature. They add up to the same output."""
    directions: dict[Any, Tensor]
    """Subspaces (K, D, d) of each target."""
    concepts: dict[Any, dictionaries.Dictionary] = field(default_factory=dict)
    """Dictionary of each target, in place of subspaces."""

    def base(self, target: Any) -> Tensor:
        """Return the base of a target's activations, (D,) or (places, D).

        Args:
            target: A fitted target.
        """
        form = self.xnn.explainer(target).form
        assert isinstance(form, ContributionGroups)
        base: Tensor = form.base.movedim(form.channels - 1, -1).flatten(0, -2) if form.base.dim() > 1 else form.base
        return base

    def factors(self, inputs: Any, target: Any, additional: Any) -> tuple[Tensor, Tensor]:
        """Compute activations minus their base, and contexts, (N, places, D) each.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, on the model's device.
            target: A fitted target.
            additional: Further arguments of the model.
        """
        form = self.xnn.explainer(target).form
        assert isinstance(form, ContributionGroups)
        reader = self.xnn._reader()
        x, more = copied(inputs, additional)
        with torch.inference_mode(False), untouched(reader.model), torch.no_grad():
            integral = form.integral(reader.tail(), x, more, [[target] * len(x[0])])
        c = integral.slopes[0]
        a = integral.Z.to(c) - form.base.to(c)
        a, c = (v.movedim(form.channels, -1).flatten(1, -2) if v.dim() > 2 else v[:, None] for v in (a, c))
        return a, c

    def contributions(self, inputs: Any, target: Any, additional: Any = None) -> Tensor:
        """Compute the contributions, in logits: of each subspace and the remainder, (N, K + 1), or of concepts, (N, K).

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, on the model's device.
            target: A fitted target.
            additional: Further arguments of the model.
        """
        return self.contributions_and_rest(inputs, target, additional)[0]

    def contributions_and_rest(self, inputs: Any, target: Any, additional: Any = None) -> tuple[Tensor, Tensor]:
        """Compute the contributions, and the part of the output's change that they leave unexplained, (N,).

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, on the model's device.
            target: A fitted target.
            additional: Further arguments of the model.
        """
        a, c = self.factors(inputs, target, additional)
        flat_a, flat_c = a.flatten(0, 1), c.flatten(0, 1)
        if (dictionary := self.concepts.get(target)) is None:
            flat = rules.subspace_relevances(self.directions[target], flat_a, flat_c)
        else:
            base = self.base(target).expand(a.shape[1:]).to(a)
            codes = dictionary.encode((a + base).flatten(0, 1)) - dictionary.encode(base).repeat(len(a), 1)
            flat = codes * (flat_c @ dictionary.concepts.to(flat_c).T)
        contributions = flat.reshape(*a.shape[:2], -1).sum(1)
        return contributions, (a * c).sum((1, 2)).to(contributions) - contributions.sum(1)


Method = MakeForm | Rule | OneMap
"""A form of explanation network, a rule, or one map."""
