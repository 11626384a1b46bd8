"""Measures of one method on one division of the data: faithfulness, maps, patches, known parts, stability and cost.

Conventions:
    M examples, K x-features, P patches or known parts.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_xnn.activations._activations import Activations, Outputs, Task
from captum_xnn.comparison._relevances import Method, OneMap, Relevances, Rule
from captum_xnn.comparison._splits import Split, Values
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._embeddings import embedding_of
from captum_xnn.layers._forward_args import format_forward_args
from captum_xnn.layers._pixels import channels_first
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._targets import Target
from captum_xnn.metrics._faithfulness import Faithfulness
from captum_xnn.metrics._localisation import mean_locality, object_probabilities
from captum_xnn.metrics._overlap import OrthogonalityStream
from captum_xnn.metrics._patches import (
    drop_orthogonality,
    drops_of_patches,
    patch_cover,
    patch_drops,
)
from captum_xnn.metrics._removal import selectivity
from captum_xnn.metrics._stability import matched_features
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.patch_scores import CoveredBatch, PatchScores, one_heatmap_agreement, patch_scores_of

if TYPE_CHECKING:  # a measurement gets a function that makes attributions
    from captum_xnn.attribution import XNNAttribution

__all__ = ["Measurement", "MeasurementSettings"]

# Patches along each side of an image.
_GRID = 4
# Examples in a batch of images without a part.
_BATCH = 64


@dataclass(frozen=True)
class MeasurementSettings:
    """Settings that all methods share."""

    attribution: Callable[..., XNNAttribution]
    """Makes an attribution without explainers, from a form and a seed."""
    reader: Reader
    """Reader of the layer."""
    ungrouped: Callable[[XNNAttribution, Activations, Task], ContributionGroups]
    """Makes contributions with a group for each dimension."""
    masks: Tensor | None
    """Known parts, bool (M, P, H, W)."""


@dataclass(frozen=True)
class Measurement:
    """One method on one division of the data."""

    settings: MeasurementSettings
    method: Method
    split: Split
    targets: Sequence[Target]
    seed: int

    def values(self) -> list[Values]:
        """Measure the method; return the values of each target."""
        if isinstance(self.method, OneMap):
            single = self.settings.attribution(seed=self.seed)
            return [self._one_map(single, target) for target in self.targets]
        start = time.process_time()
        xnn = self._fitted(self.split.train.activations(), self.seed)
        seconds = (time.process_time() - start) / len(self.targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit on all training examples has given the same warnings
            again = [
                self._fitted(self.split.train.activations(half), self.seed + i)
                for i, half in enumerate(self.split.halves)
            ]
        test = self.split.test.activations()
        values_of_targets = []
        for target in self.targets:
            score = self._score(xnn, test, target)
            features = [self._features(other, target) for other in again]
            values: Values = {
                "f_reg": score.f_reg,
                "f_cls": score.f_cls,
                "x_features": _x_features(xnn, target),
                "stability": matched_features(*features).mean,
                "fit_seconds": seconds,
            }
            if isinstance(xnn, Relevances):
                values_of_targets.append(values | self._subspaces(xnn, target))
            else:
                values_of_targets.append(
                    values | self._maps(xnn, target) | self._patches(xnn, target) | self._parts(xnn, target)
                )
        return values_of_targets

    def _score(self, xnn: XNNAttribution | Relevances, test: Activations, target: Target) -> Faithfulness:
        """Measure faithfulness on held-out examples. The part that concepts leave unexplained counts as their error."""
        if not isinstance(xnn, Relevances):
            return xnn.score(test, target)
        if target not in xnn.concepts:
            return xnn.xnn.score(test, target)
        outputs = Outputs.of(test, [target])
        prediction = outputs.columns([target])[:, 0].double()
        batches = self.split.test.inputs(self.split.test.rows, self.settings.reader.device)
        left = torch.cat([xnn.contributions_and_rest(x, target, more)[1].cpu() for x, more in batches])
        surrogate = prediction - left
        if outputs.classes is None or not isinstance(target, int):
            return Faithfulness.of(surrogate, prediction)
        return Faithfulness.of(surrogate, prediction, [test.y_hat[:]], target)

    def _fitted(self, activations: Activations, seed: int) -> XNNAttribution | Relevances:
        method = self.method
        assert not isinstance(method, OneMap)
        if isinstance(method, Rule):
            return method.fit(self.settings.attribution(seed=seed), activations, self.targets)
        return self.settings.attribution(autoencoder=method, seed=seed).fit(
            activations, list(self.targets), progress=False
        )

    def _features(self, xnn: XNNAttribution | Relevances, target: Target) -> Tensor:
        """Compute the x-features of all held-out examples, (M, K)."""
        device = self.settings.reader.device
        batches = self.split.test.inputs(self.split.test.rows, device)
        numbers = [xnn.contributions(x, target, more) for x, more in batches]
        return torch.cat([(each if isinstance(each, Tensor) else each.features).cpu() for each in numbers])

    def _shown_batches(self, target: Target) -> list[tuple[Any, Any]]:
        """Load the examples for maps and patches."""
        rows = self.split.shown[target]
        return list(self.split.test.inputs(rows, self.settings.reader.device)) if len(rows) else []

    def _maps(self, xnn: XNNAttribution, target: Target) -> Values:
        """Draw maps; measure their overlap and the time."""
        stream, seconds, count = OrthogonalityStream(), 0.0, 0
        for x, more in self._shown_batches(target):
            why, took = _timed(lambda x, more: xnn.explain(x, target, more), x, more)
            seconds += took
            maps = (
                why.maps
                if isinstance(why.maps, Tensor)
                else torch.cat([m.reshape(*m.shape[:2], -1) for m in why.maps], 2)
            )
            stream.update(maps, contributions=why.contributions)
            count += len(why.contributions)
        return {"maps_o1": stream.compute().o1, "explain_seconds": seconds / count} if count else {}

    def _patches(self, xnn: XNNAttribution, target: Target) -> Values:
        batches = self._covered_batches(target)
        if not batches:
            return {}
        drawn = (target, xnn.explainer(target).form.n_features)
        of_random_groups = self.split.controls.get(drawn)
        grid, fill = _grid(batches[0].first), self._fill()
        scores = patch_scores_of(
            xnn,
            batches,
            target,
            grid=grid,
            fill=fill,
            seed=self.seed,
            controls=of_random_groups is None,
            contributions=self._contributions_beside(xnn, target) if of_random_groups is None else None,
        )
        if of_random_groups is None:
            of_random_groups = _of_random_groups(scores)
            if scores.drops_random_groups is not None:
                self.split.controls[drawn] = of_random_groups
        return {
            "identified": _known(scores.identified),
            "movement": _known(scores.movement),
            "agreement": scores.agreement,
            "agreement_random_maps": scores.agreement_random_maps,
            "drops_o1": scores.drops.o1,
            **of_random_groups,
        }

    def _contributions_beside(self, xnn: XNNAttribution, target: Target) -> ContributionGroups | None:
        """Make contributions with the base of exact forms to compare a learned network with; None if they have none."""
        if isinstance(xnn.explainer(target).form, ContributionGroups):
            return None
        activations = self.split.train.activations()
        task = Outputs.of(activations, [target]).task((target,))
        try:
            return self.settings.ungrouped(self.settings.attribution(seed=self.seed), activations, task)
        except ValueError:  # patch scores then have no random groups
            return None

    def _subspaces(self, relevances: Relevances, target: Target) -> Values:
        """Measure the time of relevances, and the overlap of their drops."""
        seconds, count = 0.0, 0
        for x, more in self._shown_batches(target):
            contributions, took = _timed(lambda x, more: relevances.contributions(x, target, more), x, more)
            seconds, count = seconds + took, count + len(contributions)
        values: Values = {"explain_seconds": seconds / count} if count else {}
        inputs = self._one_tensor(target)
        if inputs is None:
            return values
        drops = patch_drops(
            lambda x: relevances.contributions(x, target), inputs, grid=_grid(inputs), fill=self._fill()
        )
        values["drops_o1"] = drop_orthogonality(drops, contributions=relevances.contributions(inputs, target)).o1
        return values | self._selectivity(lambda x: relevances.contributions(x, target), target)

    def _one_map(self, xnn: XNNAttribution, target: Target) -> Values:
        """Draw the single map of the output, and measure patch agreement and time."""
        seconds, count = 0.0, 0
        for x, more in self._shown_batches(target):
            seconds += _timed(lambda x, more: xnn.one_heatmap(x, target, more), x, more)[1]
            count += len(x) if isinstance(x, Tensor) else len(x[0])
        values: Values = {"explain_seconds": seconds / count} if count else {}
        batches = self._covered_batches(target)
        if batches:
            grid, fill = _grid(batches[0].first), self._fill()
            values["agreement"] = one_heatmap_agreement(xnn, batches, target, grid=grid, fill=fill)
        return values

    def _parts(self, xnn: XNNAttribution, target: Target) -> Values:
        """Measure selectivity and locality on known parts."""
        images, masks = self._one_tensor(target), self._masks(target)
        if masks is None or images is None or images.dim() != 4:
            return {}
        why = xnn.explain(images, target)
        maps = channels_first(why.directed_maps(), images).sum(2).clamp(min=0)
        on_parts = object_probabilities(maps, masks.to(maps.device))
        locality = mean_locality(on_parts, contributions=why.contributions)
        return {
            "locality": None if math.isnan(locality) else locality,
            **self._selectivity(lambda x: xnn.contributions(x, target).contributions, target),
        }

    def _selectivity(self, contributions: Callable[[Tensor], Tensor], target: Target) -> Values:
        """Remove the known parts one by one, and measure the selectivity of the changes."""
        images, masks = self._one_tensor(target), self._masks(target)
        if masks is None or images is None or images.dim() != 4:
            return {}
        cover, masks = patch_cover(images, None), masks.to(images.device)

        def removed(rows: Tensor, parts: Tensor) -> Tensor:
            return torch.where(masks[rows, parts][:, None], cover[rows], images[rows])

        changes = drops_of_patches(
            lambda x, *_: contributions(x), images, removed, masks.flatten(2).any(2), batch_size=_BATCH
        )
        score = selectivity(changes)
        return {"selectivity": score.share, "selectivity_whole": score.whole}

    def _masks(self, target: Target) -> Tensor | None:
        """Return the known parts of the examples for maps and patches, bool (n, P, H, W)."""
        masks = self.settings.masks
        return None if masks is None else masks[self.split.shown[target]]

    def _covered_batches(self, target: Target) -> list[CoveredBatch]:
        """Return the examples to cover; none if their first input has no patches."""
        batches = []
        for x, more in self._shown_batches(target):
            inputs = x if isinstance(x, tuple) else (x,)
            batch = CoveredBatch(inputs, format_forward_args(more))
            if not isinstance(batch.first, Tensor) or not self._has_patches(batch):
                return []
            batches.append(batch)
        return batches

    def _has_patches(self, batch: CoveredBatch) -> bool:
        """Whether inputs are images, tokens or rows of at least three columns, which can be covered."""
        first = batch.first
        if first.is_floating_point() or (first.dtype == torch.uint8 and first.dim() == 4):
            return first.dim() == 4 or (first.dim() in (2, 3) and first.shape[1] > 2)
        if first.dim() != 2 or first.shape[1] < 3:
            return False
        return embedding_of(self.settings.reader.model, (*batch.inputs, *(batch.additional or ()))) is not None

    def _fill(self) -> Tensor | None:
        """Return the mean of each column over the training examples of a table; None for other inputs."""
        total, count = torch.zeros((), device="cpu"), 0
        for inputs, _ in self.split.train.inputs(self.split.train.rows, torch.device("cpu")):
            x = inputs[0] if isinstance(inputs, tuple) else inputs  # the first input is covered
            if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
                return None
            total, count = total + x.double().sum(0), count + len(x)
        return total / count

    def _one_tensor(self, target: Target) -> Tensor | None:
        """Return the examples to cover as one tensor; None if they have further inputs, are ids, or differ in size."""
        batches = self._covered_batches(target)
        inputs = [batch.first for batch in batches if len(batch.inputs) == 1 and not batch.additional]
        if not inputs or len(inputs) < len(batches) or len({x.shape[1:] for x in inputs}) > 1:
            return None
        joined = torch.cat(inputs)
        return joined if joined.is_floating_point() else None


def _x_features(xnn: XNNAttribution | Relevances, target: Target) -> int:
    """Count the x-features of a target."""
    if not isinstance(xnn, Relevances):
        return int(xnn.explainer(target).form.n_features)
    dictionary = xnn.concepts.get(target)
    return len(xnn.directions[target]) + 1 if dictionary is None else len(dictionary.concepts)


def _of_random_groups(scores: PatchScores) -> Values:
    """Collect the values of random groups; they are None where contributions cannot be computed."""
    return {
        "agreement_random_groups": scores.agreement_random_groups,
        "identified_random_groups": _known(scores.identified_random_groups),
        "drops_o1_random_groups": None if scores.drops_random_groups is None else scores.drops_random_groups.o1,
    }


def _known(value: float | None) -> float | None:
    """Replace NaN, which a single x-feature has, by None."""
    return None if value is None or math.isnan(value) else value


def _timed(explain: Callable[[Any, Any], Any], x: Any, more: Any) -> tuple[Any, float]:
    """Explain some examples; return the result and the processor seconds.

    The time does not count a first example, because the first call of a backend is slower than all others.
    """
    one, of_one = rows_of(x if isinstance(x, tuple) else (x,), more, torch.tensor([0], device="cpu"))
    explain(one if isinstance(x, tuple) else one[0], of_one)
    start = time.process_time()
    result = explain(x, more)
    return result, time.process_time() - start


def _grid(inputs: Tensor) -> int:
    return int(min(_GRID, *inputs.shape[2:])) if inputs.dim() == 4 else _GRID
