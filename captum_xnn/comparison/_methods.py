"""Methods to compare: forms of explanation network by name, and rules that divide contributions.

Conventions:
    M examples, D dimensions or channels of Z, K x-features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_xnn.activations._activations import Activations, ChosenRows, Outputs, Task
from captum_xnn.activations._memmap import chunks
from captum_xnn.comparison._relevances import Method, OneMap, Relevances, Rule
from captum_xnn.comparison._selected_rows import SelectedRows
from captum_xnn.explainer import Explainer
from captum_xnn.models import ContributionGroups
from captum_xnn.models._form import MakeForm
from captum_xnn.models._srae import by_shape
from captum_xnn.models.baselines import CAE, DRSA, NMF, NN, SAE, Lasso, RandomDecoder, RandomEncoder, SingleDimensions
from captum_xnn.models.baselines import _dictionaries as dictionaries
from captum_xnn.models.baselines import _partitions as rules
from captum_xnn.training._layer_fit import form_maker
from captum_xnn.training._subspaces import evenly

if TYPE_CHECKING:  # rivals get an attribution to fill with explainers, and make none
    from captum_xnn.attribution import XNNAttribution

__all__ = ["METHODS", "Dictionaries", "Partition", "Subspaces", "named_methods", "ungrouped"]

# Latents of a sparse autoencoder for each dimension of the layer, their largest number, and how many are active.
_LATENTS, _MOST_LATENTS, _ACTIVE = 4, 512, 16


@dataclass(frozen=True)
class Partition(Rule):
    """Groups of contributions, divided by a rule in place of the learned division."""

    rule: Callable[[Tensor, int, torch.Generator], Tensor]
    """Divides contributions (M, D) into K groups, (D, K), with the help of a seeded generator."""

    def fit(self, xnn: XNNAttribution, activations: Activations, targets: Sequence[Any]) -> XNNAttribution:
        """Make an explainer for each target, and return the attribution that holds them.

        The rule gets the contributions of the examples from which the default form learns its groups.

        Args:
            xnn: An attribution of the layer.
            activations: Activations of the training examples, with their source.
            targets: The targets.

        Raises:
            ValueError: If there are no positives, or the rule cannot divide the contributions.
        """
        outputs = Outputs.of(activations, targets)
        for target in targets:
            task = outputs.task((target,))
            self._fit_one(xnn, activations, task)
        return xnn

    def _fit_one(self, xnn: XNNAttribution, activations: Activations, task: Task) -> None:
        (target,) = task.targets
        form = ungrouped(xnn, activations, task)
        numbers = [xnn.contributions(x, target, more) for x, more in _chosen_batches(xnn, activations, task, form)]
        contributions = torch.cat([n.contributions for n in numbers])
        generator = torch.Generator().manual_seed(xnn.seed)
        form.groups = self.rule(contributions, xnn.n_features, generator).to(form.groups)
        form.config["n_features"] = form.groups.shape[1]
        error = float(torch.cat([n.prediction - n.surrogate for n in numbers]).double().abs().mean())
        explainer = xnn.explainers_[activations.layer, task.targets]
        xnn.explainers_[activations.layer, task.targets] = replace(explainer, f_reg=error)


@dataclass(frozen=True)
class Subspaces(Rule):
    """Orthogonal subspaces of the layer, whose relevances add up to the output as contributions do. They have no maps.

    For feature maps and tokens, the rule takes every place as an example.
    """

    rule: Callable[[Tensor, Tensor, int, torch.Generator], Tensor]
    """Finds subspaces (K, D, d) from activations minus their base (M, D) and contexts (M, D)."""

    def fit(self, xnn: XNNAttribution, activations: Activations, targets: Sequence[Any]) -> Relevances:
        """Find the subspaces of each target.

        Args:
            xnn: An attribution of the layer.
            activations: Activations of the training examples, with their source.
            targets: The targets.

        Raises:
            ValueError: If there are no positives, or the rule finds no subspaces.
        """
        outputs = Outputs.of(activations, targets)
        relevances = Relevances(xnn, {})
        for target in targets:
            task = outputs.task((target,))
            form = ungrouped(xnn, activations, task)
            pairs = [relevances.factors(x, target, more) for x, more in _chosen_batches(xnn, activations, task, form)]
            a, c = (torch.cat([pair[i].flatten(0, 1) for pair in pairs]) for i in range(2))
            generator = torch.Generator().manual_seed(xnn.seed)
            relevances.directions[target] = self.rule(evenly(a), evenly(c), xnn.n_features, generator)
        return relevances


@dataclass(frozen=True)
class Dictionaries(Rule):
    """Concepts that rebuild the layer. Their contributions leave a part of the output unexplained. They have no maps.

    For feature maps and tokens, the rule takes every place as an example, and contributions are summed over places.
    """

    rule: Callable[[Tensor, Tensor, int, torch.Generator], dictionaries.Dictionary]
    """Finds a dictionary from activations (M, D) of positives and (M', D) of all examples in the sample."""
    cropped: bool = False
    """Whether the positives are cut into crops, if they are images."""

    def fit(self, xnn: XNNAttribution, activations: Activations, targets: Sequence[Any]) -> Relevances:
        """Find the dictionary of each target.

        Args:
            xnn: An attribution of the layer.
            activations: Activations of the training examples, with their source.
            targets: The targets.

        Raises:
            ValueError: If there are no positives, or the rule finds no concepts.
        """
        outputs = Outputs.of(activations, targets)
        relevances = Relevances(xnn, {}, {})
        for target in targets:
            task = outputs.task((target,))
            form = ungrouped(xnn, activations, task)
            chosen = _chosen_rows(activations, task, form)
            own, every = (
                torch.cat(
                    [
                        self._activations(relevances, x, target, more, cut)
                        for x, more in _batches(xnn, activations, rows)
                    ]
                )
                for rows, cut in ((chosen.positives[0].sort().values, self.cropped), (_all_rows(chosen), False))
            )
            generator = torch.Generator().manual_seed(xnn.seed)
            relevances.concepts[target] = self.rule(evenly(own), evenly(every), xnn.n_features, generator)
        return relevances

    def _activations(self, relevances: Relevances, inputs: Any, target: Any, additional: Any, cut: bool) -> Tensor:
        """Compute activations (M, D) of a batch, or of crops of its images; each place is a row."""
        if cut and isinstance(inputs, Tensor) and inputs.dim() == 4 and not additional:
            inputs = dictionaries.image_crops(inputs)
        a, _ = relevances.factors(inputs, target, additional)
        return (a + relevances.base(target)).flatten(0, 1)


def ungrouped(xnn: XNNAttribution, activations: Activations, task: Task) -> ContributionGroups:
    """Make contributions with a group for each dimension, and put them into the attribution's explainers.

    Args:
        xnn: An attribution of the layer.
        activations: Activations of the training examples, with their source.
        task: The outputs to explain.
    """
    reader = xnn._reader()
    make = form_maker(ContributionGroups, activations, reader)
    dtype = torch.float64 if activations.Z.dtype == torch.float64 else torch.float32
    form = make(tuple(activations.Z.shape[1:]), xnn.n_features).to(reader.device, dtype)
    assert isinstance(form, ContributionGroups)
    form.base.copy_(form.mean_of(chunks(activations.Z), len(activations.Z)))
    form.scale.copy_(task.y.double().std(0))
    form.groups = torch.eye(len(form.groups), device="cpu").to(form.groups)
    positives = None if task.positives is None else int(task.positives.sum())
    xnn.explainers_[activations.layer, task.targets] = Explainer(
        activations.layer, task.targets, form, 0.0, len(task.y), positives
    )
    return form


def _chosen_rows(activations: Activations, task: Task, form: ContributionGroups) -> ChosenRows:
    """Choose the examples from which the default form learns its groups."""
    return ChosenRows.choose([task.positives], len(activations.Z), form.config["positives"], form.config["others"])


def _all_rows(chosen: ChosenRows) -> Tensor:
    rows: Tensor = torch.unique(torch.cat([chosen.positives[0], chosen.others]))
    return rows


def _batches(xnn: XNNAttribution, activations: Activations, rows: Tensor) -> Iterator[tuple[Any, Any]]:
    """Yield some examples as inputs and additional arguments."""
    assert activations.source is not None  # compare makes one
    return SelectedRows(activations.source, rows).on(xnn._reader().device)


def _chosen_batches(
    xnn: XNNAttribution, activations: Activations, task: Task, form: ContributionGroups
) -> Iterator[tuple[Any, Any]]:
    """Yield the examples from which the default form learns its groups."""
    return _batches(xnn, activations, _all_rows(_chosen_rows(activations, task, form)))


def _random(contributions: Tensor, K: int, generator: torch.Generator) -> Tensor:
    D = contributions.shape[1]
    return rules.random_partition(D, min(K, D), generator)


def _without_chance(rule: Callable[[Tensor, int], Tensor]) -> Partition:
    return Partition(lambda contributions, K, _: rule(contributions, K))


def _craft(own: Tensor, every: Tensor, K: int, generator: torch.Generator) -> dictionaries.Dictionary:
    del every
    return dictionaries.craft(own, K, seed=generator.initial_seed())


def _topk_sae(own: Tensor, every: Tensor, K: int, generator: torch.Generator) -> dictionaries.Dictionary:
    """Train a sparse autoencoder; its concepts are the K latents that are largest in positives."""
    latents = min(_LATENTS * every.shape[1], _MOST_LATENTS)
    autoencoder = dictionaries.topk_sae(every, latents, active=min(_ACTIVE, latents), generator=generator)
    kept = autoencoder.encode(own).mean(0).argsort(descending=True, stable=True)[:K]
    return dictionaries.Dictionary(
        autoencoder.concepts[kept], autoencoder.offset, lambda Z: autoencoder.encode(Z)[:, kept]
    )


METHODS: Mapping[str, Method] = {
    "groups": ContributionGroups,
    "SRAE": by_shape,
    "random groups": Partition(_random),
    "1-Heatmap": OneMap(),
    "spectral groups": _without_chance(rules.spectral_partition),
    "NMF of contributions": _without_chance(rules.nmf_partition),
    "largest dimensions": _without_chance(rules.single_dimensions),
    "PRCA": Subspaces(lambda a, c, K, _: rules.prca(a, c, K)),
    "DRSA": DRSA,
    "CRAFT": Dictionaries(_craft, cropped=True),
    "TopK SAE": Dictionaries(_topk_sae),
    "NMF": NMF,
    "NN": NN,
    "SAE": SAE,
    "CAE": CAE,
    "Lasso": Lasso,
    "single dimensions": SingleDimensions,
    "random encoder": RandomEncoder,
    "random decoder": RandomDecoder,
}
"""All methods that have a name."""


def named_methods(methods: Iterable[str | MakeForm] | Mapping[str, str | MakeForm]) -> dict[str, Method]:
    """Look up methods by name, and name the forms among them.

    Args:
        methods: Names of :data:`METHODS` and forms, or a mapping from names of your own to them.

    Raises:
        ValueError: If a name does not exist, two methods have one name, or there are no methods.
        TypeError: If a method is neither a name nor a form.

    Example:
        >>> from captum_xnn import SRAE
        >>> list(named_methods(["groups", partial(SRAE, hidden=(16,))]))
        ['groups', 'SRAE']
    """
    if isinstance(methods, str):
        methods = [methods]
    pairs = list(methods.items()) if isinstance(methods, Mapping) else [(_name(m), m) for m in methods]
    activations: dict[str, Method] = {}
    for name, method in pairs:
        if name in activations:
            raise ValueError(f"two methods are named {name!r}; pass a dict from names of your own to methods")
        activations[name] = _looked_up(method)
    if not activations:
        raise ValueError(f"there are no methods to compare; name some of {', '.join(METHODS)}")
    return activations


def _name(method: Any) -> str:
    made = method.func if isinstance(method, partial) else method
    return made if isinstance(made, str) else getattr(made, "__name__", str(made))


def _looked_up(method: Any) -> Method:
    if isinstance(method, str):
        by_name = {name.lower(): value for name, value in METHODS.items()}
        if method.lower() not in by_name:
            raise ValueError(f"method {method!r} does not exist; pass a form, or one of {', '.join(METHODS)}")
        return by_name[method.lower()]
    if not callable(method):
        raise TypeError(f"{method!r} is not a method; pass a name or a class of forms such as SRAE")
    return method  # type: ignore[no-any-return]
