"""Methods to compare: forms of explanation network by name, and rules that divide contributions.

Conventions:
    M examples, D dimensions or channels of Z, K x-features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_xnn.activations._activations import Activations, Source
from captum_xnn.activations._batches import Batches
from captum_xnn.activations._memmap import parts
from captum_xnn.attribution import XNNAttribution
from captum_xnn.explainer import Explainer
from captum_xnn.layers._arguments import copied
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._forward_args import format_forward_args
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._state import untouched
from captum_xnn.models import ContributionGroups
from captum_xnn.models._srae import by_shape
from captum_xnn.models.baselines import CAE, NMF, NN, SAE, Lasso, RandomDecoder, RandomEncoder, SingleDimensions
from captum_xnn.models.baselines import _partitions as rules
from captum_xnn.training._contributions import Sample
from captum_xnn.training._making import MakeForm, maker
from captum_xnn.training._outputs import Outputs, Task

__all__ = ["METHODS", "Method", "OneMap", "Partition", "Relevances", "Rows", "Subspaces", "named_methods"]

# Examples in a batch of the data.
_BATCH = 64
# Largest number of rows, of examples or of their places, from which subspaces are found.
_ROWS = 2000


class OneMap:
    """The single map of the output, without x-features."""


@dataclass(frozen=True)
class Partition:
    """Groups of contributions, divided by a rule in place of the learned division."""

    rule: Callable[[Tensor, int, torch.Generator], Tensor]
    """Divides contributions (M, D) into K groups, (D, K), with the help of a seeded generator."""

    def fit(self, xnn: XNNAttribution, found: Activations, targets: Sequence[Any]) -> XNNAttribution:
        """Make an explainer for each target, and return the attribution that holds them.

        The rule gets the contributions of the examples from which the default form learns its groups.

        Args:
            xnn: An attribution of the layer.
            found: Activations of the training examples, with their source.
            targets: The targets.

        Raises:
            ValueError: If there are no positives, or the rule cannot divide the contributions.
        """
        outputs = Outputs.of(found, targets)
        for target in targets:
            task = outputs.task((target,))
            self._fit_one(xnn, found, task)
        return xnn

    def _fit_one(self, xnn: XNNAttribution, found: Activations, task: Task) -> None:
        (target,) = task.targets
        form = _ungrouped(xnn, found, task)
        numbers = [xnn.contributions(x, target, more) for x, more in _sample(xnn, found, task, form)]
        contributions = torch.cat([n.contributions for n in numbers])
        generator = torch.Generator().manual_seed(xnn.seed)
        form.groups = self.rule(contributions, xnn.n_features, generator).to(form.groups)
        form.config["n_features"] = form.groups.shape[1]
        error = float(torch.cat([n.prediction - n.surrogate for n in numbers]).double().abs().mean())
        made = xnn.explainers_[found.layer, task.targets]
        xnn.explainers_[found.layer, task.targets] = replace(made, f_reg=error)


@dataclass(frozen=True)
class Subspaces:
    """Orthogonal subspaces of the layer, whose relevances add up to the output as contributions do. They have no maps.

    For feature maps and tokens, the rule takes every place as an example.
    """

    rule: Callable[[Tensor, Tensor, int, torch.Generator], Tensor]
    """Finds subspaces (K, D, d) from activations minus their base (M, D) and contexts (M, D)."""

    def fit(self, xnn: XNNAttribution, found: Activations, targets: Sequence[Any]) -> Relevances:
        """Find the subspaces of each target.

        Args:
            xnn: An attribution of the layer.
            found: Activations of the training examples, with their source.
            targets: The targets.

        Raises:
            ValueError: If there are no positives, or the rule finds no subspaces.
        """
        outputs = Outputs.of(found, targets)
        made = Relevances(xnn, {})
        for target in targets:
            task = outputs.task((target,))
            form = _ungrouped(xnn, found, task)
            pairs = [made.factors(x, target, more) for x, more in _sample(xnn, found, task, form)]
            a, c = (torch.cat([pair[i].flatten(0, 1) for pair in pairs]) for i in range(2))
            some = torch.linspace(0, len(a) - 1, min(len(a), _ROWS), dtype=torch.float64).round().long()
            generator = torch.Generator().manual_seed(xnn.seed)
            made.directions[target] = self.rule(a[some], c[some], xnn.n_features, generator)
        return made


@dataclass(frozen=True)
class Relevances:
    """Relevances of fitted subspaces."""

    xnn: XNNAttribution
    """Explainers in which each dimension is an x-feature. They add up to the same output."""
    directions: dict[Any, Tensor]
    """Subspaces (K, D, d) of each target."""

    def factors(self, inputs: Any, target: Any, additional: Any) -> tuple[Tensor, Tensor]:
        """Compute activations minus their base, and contexts, (N, places, D) each.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, on the model's device.
            target: A fitted target.
            additional: Further arguments of the model.
        """
        form = self.xnn.explainer(target).form
        assert isinstance(form, ContributionGroups)
        reader = _reader(self.xnn)
        x, more = copied(inputs, additional)
        with torch.inference_mode(False), untouched(reader.model), torch.no_grad():
            found = form.integral(reader.tail(), x, more, [[target] * len(x[0])])
        c = found.slopes[0]
        a = found.Z.to(c) - form.base.to(c)
        a, c = (v.movedim(form.channels, -1).flatten(1, -2) if v.dim() > 2 else v[:, None] for v in (a, c))
        return a, c

    def of(self, inputs: Any, target: Any, additional: Any = None) -> Tensor:
        """Compute the relevance of each subspace, and of the rest, (N, K + 1), in logits.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, on the model's device.
            target: A fitted target.
            additional: Further arguments of the model.
        """
        a, c = self.factors(inputs, target, additional)
        flat = rules.subspace_relevances(self.directions[target], a.flatten(0, 1), c.flatten(0, 1))
        return flat.reshape(*a.shape[:2], -1).sum(1)


def _reader(xnn: XNNAttribution) -> Reader:
    return Reader.of(xnn.model, xnn.layer, xnn.output_transform, xnn.prediction_transform)


def _ungrouped(xnn: XNNAttribution, found: Activations, task: Task) -> ContributionGroups:
    """Make contributions with a group for each dimension, and put them into the attribution's explainers."""
    reader = _reader(xnn)
    make = maker(ContributionGroups, found, reader)
    dtype = torch.float64 if found.Z.dtype == torch.float64 else torch.float32
    form = make(tuple(found.Z.shape[1:]), xnn.n_features).to(reader.device, dtype)
    assert isinstance(form, ContributionGroups)
    form.base.copy_(form.mean_of(parts(found.Z), len(found.Z)))
    form.scale.copy_(task.y.double().std(0))
    form.groups = torch.eye(len(form.groups)).to(form.groups)
    positives = None if task.positives is None else int(task.positives.sum())
    xnn.explainers_[found.layer, task.targets] = Explainer(found.layer, task.targets, form, 0.0, len(task.y), positives)
    return form


def _sample(xnn: XNNAttribution, found: Activations, task: Task, form: ContributionGroups) -> Iterator[tuple[Any, Any]]:
    """Yield the examples from which the default form learns its groups, as inputs and additional arguments."""
    assert found.source is not None  # compare makes one
    some = Sample.chosen([task.positives], len(found.Z), form.config["positives"], form.config["others"])
    rows = torch.unique(torch.cat([some.positives[0], some.others]))
    return Rows(found.source, rows).on(_reader(xnn).device)


class Rows:
    """Some rows of data that can be read again, as pairs of inputs and additional arguments.

    Args:
        source: The data.
        rows: Numbers of the rows, ascending.

    Example:
        >>> some = Rows(Source(torch.arange(100.0)[:, None], None), torch.tensor([1, 70]))
        >>> [inputs.tolist() for inputs, _ in some]
        [[[1.0]], [[70.0]]]
    """

    def __init__(self, source: Source, rows: Tensor) -> None:
        self.source, self.rows = source, rows

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        rows = self.rows

        def own(first: int, after: int) -> Tensor:
            return rows[(rows >= first) & (rows < after)]

        batches = Batches(self.source.data, _BATCH, self.source.unpack)
        for batch in batches.those(lambda first, after: bool(len(own(first, after)))):
            wanted = own(batch.first, batch.first + batch.rows) - batch.first
            if len(wanted):
                inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
                some, more = rows_of(inputs, format_forward_args(batch.additional), wanted)
                yield some if isinstance(batch.inputs, tuple) else some[0], more

    def on(self, device: torch.device) -> Iterator[tuple[Any, Any]]:
        """Yield the pairs with their tensors on a device.

        Args:
            device: The model's device.
        """
        for inputs, additional in self:
            yield _moved(inputs, device), _moved(additional, device)

    def as_source(self) -> Source:
        """Return a source of these rows alone."""
        return Source(self, _pair)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _pair(batch: Any) -> tuple[Any, Any]:
    return batch  # type: ignore[no-any-return]


def _random(contributions: Tensor, K: int, generator: torch.Generator) -> Tensor:
    D = contributions.shape[1]
    return rules.random_partition(D, min(K, D), generator)


def _without_chance(rule: Callable[[Tensor, int], Tensor]) -> Partition:
    return Partition(lambda contributions, K, _: rule(contributions, K))


def _drsa(a: Tensor, c: Tensor, K: int, generator: torch.Generator) -> Tensor:
    return rules.drsa(a, c, K, generator=generator)


Method = MakeForm | Partition | Subspaces | OneMap
"""A form of explanation network, a rule that divides contributions or finds subspaces, or the single map."""

METHODS: Mapping[str, Method] = {
    "groups": ContributionGroups,
    "SRAE": by_shape,
    "random groups": Partition(_random),
    "1-Heatmap": OneMap(),
    "spectral groups": _without_chance(rules.spectral_partition),
    "NMF of contributions": _without_chance(rules.nmf_partition),
    "largest dimensions": _without_chance(rules.single_dimensions),
    "PRCA": Subspaces(lambda a, c, K, _: rules.prca(a, c, K)),
    "DRSA": Subspaces(_drsa),
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
    found: dict[str, Method] = {}
    for name, method in pairs:
        if name in found:
            raise ValueError(f"two methods are named {name!r}; pass a dict from names of your own to methods")
        found[name] = _looked_up(method)
    if not found:
        raise ValueError(f"there are no methods to compare; name some of {', '.join(METHODS)}")
    return found


def _name(method: Any) -> str:
    made = method.func if isinstance(method, partial) else method
    return made if isinstance(made, str) else getattr(made, "__name__", str(made))


def _looked_up(method: Any) -> Method:
    if isinstance(method, str):
        known = {name.lower(): value for name, value in METHODS.items()}
        if method.lower() not in known:
            raise ValueError(f"method {method!r} does not exist; pass a form, or one of {', '.join(METHODS)}")
        return known[method.lower()]
    if not callable(method):
        raise TypeError(f"{method!r} is not a method; pass a name or a class of forms such as SRAE")
    return method  # type: ignore[no-any-return]
