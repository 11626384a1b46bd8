"""Compare methods of explanation on your own model and data, without annotations.

Every method is fitted on the same training examples, and measured on the same held-out examples:

===============  ====================================================================================================
faithfulness     F_reg and F_cls, as :meth:`captum_xnn.XNNAttribution.score` gives them
patch agreement  of maps with the drops of covered patches, beside random groups and maps of noise. Patches are squares
                 of an image, tokens of a text, or columns of a table
O1 of drops      overlap of the drops of different x-features, beside random groups
O1 of maps       overlap of the maps of different x-features, weighted by contribution
selectivity      share of an x-feature's changes that the removal of one known part causes, beside that of the whole
                 output; with ``masks=`` only
locality         entropy of the maps over the known parts, in nats; with ``masks=`` only
stability        mean absolute correlation of matched x-features of two fits, each on one half of the training
                 examples and with its own seed, on held-out examples
fit, explain     processor seconds of a fit for each target, and of an explanation for each example. They include
                 neither the one pass of all data through the model, shared by all methods, nor the work of a GPU
===============  ====================================================================================================

Random groups as a control beside the measures on patches are drawn once for all methods, from the first method whose
contributions can be computed. As a method, random groups are drawn anew for each half, so their stability is that of
chance. Groups of contributions add up exactly for any groups. Their F_reg therefore measures only the error of the path
integral, and equals that of random groups.

The largest dimensions, PRCA and DRSA have one more x-feature: all that their other x-features leave over. CRAFT and the
TopK SAE leave a part of the output unexplained, which their F_reg shows. These four have no maps here.

Conventions:
    M examples, K x-features. Positives are examples to which the model gives the class. If outputs are not classes, all
    examples are positives. Maps are drawn for the first positives among the held-out examples, and these are covered.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from torch import Tensor, nn
from tqdm import tqdm

from captum_xnn.activations._activations import Activations, Asked, Source
from captum_xnn.activations._batches import repeatable
from captum_xnn.activations._collecting import collect
from captum_xnn.activations._unpacking import Unpack, first_of_batch, unpack_for
from captum_xnn.attribution import XNNAttribution
from captum_xnn.comparison._compared import MethodComparison
from captum_xnn.comparison._rivals import (
    Dictionaries,
    Method,
    OneMap,
    Partition,
    Relevances,
    Rows,
    Subspaces,
    named_methods,
)
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._embeddings import embedding_of
from captum_xnn.layers._forward_args import format_forward_args
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._pixels import channels_first
from captum_xnn.layers._read import OutputTransform
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Target, select, target_groups
from captum_xnn.metrics._faithfulness import Faithfulness
from captum_xnn.metrics._localisation import mean_locality, object_probabilities
from captum_xnn.metrics._overlap import OrthogonalityStream
from captum_xnn.metrics._patches import (
    drop_orthogonality,
    drops_of_patches,
    patch_agreement,
    patch_cover,
    patch_drops,
)
from captum_xnn.metrics._removal import selectivity
from captum_xnn.metrics._stability import matched_features
from captum_xnn.patch_scores import CoveredBatch, patch_scores_of
from captum_xnn.training._making import MakeForm
from captum_xnn.training._outputs import Outputs
from captum_xnn.training._recipe import Recipe

__all__ = ["DEFAULT_METHODS", "compare"]

DEFAULT_METHODS = ("groups", "SRAE", "spectral groups", "random groups", "1-Heatmap")
"""The methods that are compared by default. They need no optional package."""

# One of so many parts of the data is held out; each repeat holds out another.
_FOLDS = 5
# Patches along each side of an image.
_GRID = 4
# Examples in a batch of images without a part.
_BATCH = 64

Values = dict[str, float | None]


def compare(
    model: nn.Module,
    layer: str | nn.Module,
    data: Any,
    target: Any = None,
    methods: Iterable[str | MakeForm] | Mapping[str, str | MakeForm] = DEFAULT_METHODS,
    *,
    test: Any = None,
    n_features: int = 5,
    repeats: int = 1,
    images: int = 16,
    masks: Tensor | None = None,
    heatmap: type[Attribution] | Heatmap | None = None,
    recipe: Recipe | None = None,
    unpack: Unpack = first_of_batch,
    output_transform: OutputTransform | None = None,
    prediction_transform: OutputTransform | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MethodComparison:
    """Fit methods on one part of the data, measure them on the rest, and return a table with intervals.

    A seeded draw holds out one fifth of the examples of each class. The methods are fitted on the other four fifths.
    Calls with the same seed give the same result, except for the processor seconds. A warning is raised if another
    method is clearly more faithful than the first one, so that its whole interval of F_reg lies below.

    Args:
        model: Any trained module.
        layer: The layer to explain, by dotted name or as a module.
        data: Inputs as :meth:`captum_xnn.XNNAttribution.fit` takes them.
        target: One output of the model, or a list of them. Intervals need several targets or repeats.
        methods: Names of methods, or forms such as ``functools.partial(SRAE, hidden=(64,))``, or a dict from names of
            your own to either. The first is the method in use. Names are ``groups`` (the default form), ``SRAE``,
            ``random groups``, ``1-Heatmap``, ``spectral groups``, ``NMF of contributions``, ``largest dimensions``,
            ``PRCA``, ``DRSA``, ``CRAFT``, ``TopK SAE``, ``NMF``, ``NN``, ``SAE``, ``CAE``, ``Lasso``, ``single
            dimensions``, ``random encoder`` and ``random decoder``.
        test: Other data to measure on, in place of the held-out fifth.
        n_features: x-features K of each method.
        repeats: Number of repeats, each with another seed and another fifth held out.
        images: Held-out positives of each target to draw maps of and to cover patch by patch; 0 leaves both out.
            Rows of a table are covered column by column, and texts token by token.
        masks: Known parts of images, for selectivity and locality: the part of each pixel, integers (M, H, W) from 1 to
            P and 0 for none, or boolean (M, P, H, W). One for each example of ``test``, or of ``data`` without it.
        heatmap: Draws all maps; by default each method's own backend.
        recipe: Settings of the training of learned forms.
        unpack: As in :class:`captum_xnn.XNNAttribution`.
        output_transform: As in :class:`captum_xnn.XNNAttribution`.
        prediction_transform: As in :class:`captum_xnn.XNNAttribution`.
        seed: Seed of the division of the data, of the fits and of the controls.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a method does not exist, there are too few examples of a class, or the first method cannot be
            fitted. Another method that cannot be fitted raises a warning, and its row stays empty.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> found = compare(
        ...     model, "1", torch.randn(200, 6), [0, 1], ["groups", "random groups"], n_features=2, progress=False
        ... )
        >>> [row["method"] for row in found.table], found.train, found.test
        (['groups', 'random groups'], 160, 40)
        >>> found.estimate("groups", "f_reg").mean < 0.01
        True
    """
    chosen = named_methods(methods)
    targets = [t for (t,) in target_groups(target, joint=False)]
    if not 1 <= repeats <= (_FOLDS if test is None else 2**16):
        raise ValueError(
            f"repeats is {repeats}; pass 1 to {_FOLDS}, as each repeat holds out another fifth of the data, or pass "
            "test= data"
        )
    settings = _Settings(
        model, layer, n_features, heatmap, recipe, output_transform, prediction_transform, seed, images,
        None if masks is None else _as_marks(masks),
    )  # fmt: skip
    splits = _Splits.of(settings, data, test, targets, unpack_for(model, unpack), progress)
    values: dict[str, dict[str, tuple[float, ...]]] = {name: {} for name in chosen}
    messages: dict[str, list[str]] = {name: [] for name in chosen}
    first = next(iter(chosen))
    train = held_out = 0
    with tqdm(total=repeats * len(chosen), disable=not progress, leave=False) as bar:
        for repeat in range(repeats):
            split = splits.split(repeat)
            train, held_out = len(split.train.rows), len(split.test.rows)
            for name, method in chosen.items():
                bar.set_description(name)
                found, raised = _tried(_Measured(settings, method, split, targets, seed + repeat), needed=name == first)
                messages[name] += raised
                for of_target in found:
                    for key, value in of_target.items():
                        if value is not None:
                            values[name][key] = (*values[name].get(key, ()), value)
                bar.update()
    result = MethodComparison(
        layer=find_layer(unwrap(model), layer)[0],
        targets=tuple(targets),
        n_features=n_features,
        train=train,
        test=held_out,
        repeats=repeats,
        values=values,
    )
    _pass_on(messages)
    _warn_of_better(result, first, 1e-5 * splits.size)
    return result


def _tried(measured: _Measured, needed: bool) -> tuple[list[Values], list[str]]:
    """Measure a method; return its values and the texts of its warnings.

    Args:
        measured: The method.
        needed: Whether a failure of its fit is an error, and not a warning without values.
    """
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            found = measured.values()
        except (ImportError, ValueError) as error:
            if needed:
                raise
            return [], [f"a repeat is left out of the table, as the fit failed: {error}"]
    return found, [str(warning.message) for warning in raised]


def _pass_on(messages: Mapping[str, Sequence[str]]) -> None:
    """Warn once for each method that raised warnings, with the first of them."""
    for name, found in messages.items():
        if found:
            others = len(set(found)) - 1
            more = f" ({others} more warning{'s' * (others > 1)} of this method)" if others else ""
            warnings.warn(f"{name}: {found[0]}{more}", stacklevel=levels_up())


def _warn_of_better(result: MethodComparison, first: str, rounding: float) -> None:
    """Warn of methods whose interval of F_reg lies below that of the first method, by more than rounding."""
    own = result.estimate(first, "f_reg")
    if own is None:
        return
    better = [
        f"{name} ({found})"
        for name in result.methods
        if (found := result.estimate(name, "f_reg")) is not None
        and found.below(own)
        and own.mean - found.mean > rounding
    ]
    if better:
        warnings.warn(
            f"{', '.join(better)} {'is' if len(better) == 1 else 'are'} clearly more faithful at layer "
            f"{result.layer!r} than {first} ({own}), in F_reg; consider explaining the model by "
            f"{'it' if len(better) == 1 else 'one of them'}",
            stacklevel=levels_up(),
        )


@dataclass(frozen=True)
class _Settings:
    """Settings that all methods share."""

    model: nn.Module
    layer: str | nn.Module
    n_features: int
    heatmap: type[Attribution] | Heatmap | None
    recipe: Recipe | None
    output_transform: OutputTransform | None
    prediction_transform: OutputTransform | None
    seed: int
    images: int
    masks: Tensor | None
    """Known parts, bool (M, P, H, W)."""

    def attribution(self, form: MakeForm | None, seed: int) -> XNNAttribution:
        return XNNAttribution(
            self.model,
            self.layer,
            self.n_features,
            heatmap=self.heatmap,
            autoencoder=form,
            recipe=self.recipe,
            output_transform=self.output_transform,
            prediction_transform=self.prediction_transform,
            seed=seed,
        )

    def reader(self) -> Reader:
        return Reader.of(self.model, self.layer, self.output_transform, self.prediction_transform)


class _Part(NamedTuple):
    """Some rows of collected activations, with the inputs of the same rows."""

    found: Activations
    rows: Tensor

    def activations(self, some: Tensor | None = None) -> Activations:
        """Return the activations of these rows, or of some of them given by boolean marks, with their inputs."""
        rows = self.rows if some is None else self.rows[some]
        source = self.found.source
        assert source is not None  # made by _collected
        return self.found._replace(
            Z=self.found.Z[rows], y_hat=self.found.y_hat[rows], source=Rows(source, rows).as_source()
        )

    def inputs(self, rows: Tensor, device: torch.device) -> Iterator[tuple[Any, Any]]:
        """Yield inputs and additional arguments of some rows of the data, batch by batch."""
        assert self.found.source is not None
        return Rows(self.found.source, rows).on(device)


class _Split(NamedTuple):
    """One division into training and held-out examples."""

    train: _Part
    halves: tuple[Tensor, Tensor]
    """Boolean marks of the training examples in each half."""
    test: _Part
    shown: dict[Target, Tensor]
    """Rows of the data for maps and patches of each target."""
    controls: dict[Target, Values]
    """Values of random groups for each target, which all methods share; the first method draws them."""


@dataclass(frozen=True)
class _Splits:
    """Data with a fold for each example."""

    found: Activations
    fold: Tensor
    """Number of the fold of each example, (M,)."""
    classes: Tensor | None
    test: Activations | None
    test_classes: Tensor | None
    targets: Sequence[Target]
    images: int
    size: float
    """Mean absolute value of the explained outputs."""

    @classmethod
    def of(
        cls, settings: _Settings, data: Any, test: Any, targets: Sequence[Target], unpack: Unpack, progress: bool
    ) -> _Splits:
        """Collect activations once, and draw the folds. Examples of each class are spread evenly over the folds."""
        found = _collected(settings, data, targets, unpack, progress)
        apart = None if test is None else _collected(settings, test, targets, unpack, progress)
        measured = len((found if apart is None else apart).Z)
        if settings.masks is not None and len(settings.masks) != measured:
            raise ValueError(
                f"got masks of {len(settings.masks)} examples, and {measured} examples that methods are measured on; "
                f"pass one for each example of {'data' if apart is None else 'test'}, in the same order"
            )
        outputs = Outputs.of(found, targets)
        classes = outputs.classes
        _check_enough(found, classes, targets)
        order = torch.randperm(len(found.Z), generator=torch.Generator().manual_seed(settings.seed))
        if classes is not None:
            order = order[classes[order].argsort(stable=True)]
        fold = torch.empty(len(order), dtype=torch.long)
        # Two folds for each part, so that the training examples have halves with examples of each class.
        fold[order] = torch.arange(len(order)) % (2 * _FOLDS)
        test_classes = None if apart is None else Outputs.of(apart, targets).classes
        size = float(outputs.y.double().abs().mean())
        return cls(found, fold, classes, apart, test_classes, targets, settings.images, size)

    def split(self, repeat: int) -> _Split:
        """Return the division of a repeat."""
        everything = torch.arange(len(self.fold))
        if self.test is None:
            held = self.fold % _FOLDS == repeat
            train, test, classes = everything[~held], _Part(self.found, everything[held]), self.classes
        else:
            train, test = everything, _Part(self.test, torch.arange(len(self.test.Z)))
            classes = self.test_classes
        first = self.fold[train] < _FOLDS
        shown = {}
        for target in self.targets:
            rows = test.rows
            if classes is not None and isinstance(target, int):
                rows = rows[classes[rows] == target]
            shown[target] = rows[: self.images]
        return _Split(_Part(self.found, train), (first, ~first), test, shown, {})


def _collected(
    settings: _Settings, data: Any, targets: Sequence[Target], unpack: Unpack, progress: bool
) -> Activations:
    """Run all data through the model once."""
    if isinstance(data, Activations):
        raise TypeError("data are activations, and patches and maps need the inputs; pass the data themselves")
    data = repeatable(data)
    found = collect(
        settings.model,
        settings.layer,
        data,
        unpack=unpack,
        output_transform=settings.output_transform,
        prediction_transform=settings.prediction_transform,
        asked=Asked(targets),
        progress=progress,
    )
    return found._replace(source=Source(data, unpack))


def _check_enough(found: Activations, classes: Tensor | None, targets: Sequence[Target]) -> None:
    """Raise where folds would lack examples, or positives of a class."""
    counts: dict[int | None, int] = {None: len(found.Z)}
    if classes is not None:
        counts |= {t: int((classes == t).sum()) for t in targets if isinstance(t, int)}
    for target, count in counts.items():
        if count < 2 * _FOLDS:
            which = "there are" if target is None else f"the model gives class {target} to"
            raise ValueError(
                f"{which} only {count} examples, and a comparison needs {2 * _FOLDS}, to fit on halves and to hold out "
                "others; pass more data, or other targets"
            )


@dataclass(frozen=True)
class _Measured:
    """One method on one division of the data."""

    settings: _Settings
    method: Method
    split: _Split
    targets: Sequence[Target]
    seed: int

    def values(self) -> list[Values]:
        """Measure the method; return the values of each target."""
        if isinstance(self.method, OneMap):
            single = self.settings.attribution(None, self.seed)
            return [self._one_map(single, target) for target in self.targets]
        start = time.process_time()
        xnn = self._fitted(self.split.train.activations(), self.seed)
        seconds = (time.process_time() - start) / len(self.targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a fit warns of was said of the fit on all training examples
            again = [
                self._fitted(self.split.train.activations(half), self.seed + i)
                for i, half in enumerate(self.split.halves)
            ]
        test = self.split.test.activations()
        made = []
        for target in self.targets:
            score = self._score(xnn, test, target)
            features = [self._features(other, target) for other in again]
            values: Values = {
                "f_reg": score.f_reg,
                "f_cls": score.f_cls,
                "stability": matched_features(*features).mean,
                "fit_seconds": seconds,
            }
            if isinstance(xnn, Relevances):
                made.append(values | self._subspaces(xnn, target))
            else:
                made.append(values | self._maps(xnn, target) | self._patches(xnn, target) | self._parts(xnn, target))
        return made

    def _score(self, xnn: XNNAttribution | Relevances, test: Activations, target: Target) -> Faithfulness:
        """Measure faithfulness on held-out examples. What concepts leave over counts as their error."""
        if not isinstance(xnn, Relevances):
            return xnn.score(test, target)
        if target not in xnn.concepts:
            return xnn.xnn.score(test, target)
        outputs = Outputs.of(test, [target])
        prediction = outputs.columns([target])[:, 0].double()
        batches = self.split.test.inputs(self.split.test.rows, self.settings.reader().device)
        left = torch.cat([xnn.with_rest(x, target, more)[1].cpu() for x, more in batches])
        surrogate = prediction - left
        if outputs.classes is None or not isinstance(target, int):
            return Faithfulness.of(surrogate, prediction)
        return Faithfulness.of(surrogate, prediction, [test.y_hat[:]], target)

    def _fitted(self, found: Activations, seed: int) -> XNNAttribution | Relevances:
        method = self.method
        assert not isinstance(method, OneMap)
        if isinstance(method, (Partition, Subspaces, Dictionaries)):
            return method.fit(self.settings.attribution(None, seed), found, self.targets)
        return self.settings.attribution(method, seed).fit(found, list(self.targets), progress=False)

    def _features(self, xnn: XNNAttribution | Relevances, target: Target) -> Tensor:
        """Compute the x-features of all held-out examples, (M, K)."""
        device = self.settings.reader().device
        batches = self.split.test.inputs(self.split.test.rows, device)
        if isinstance(xnn, Relevances):
            return torch.cat([xnn.of(x, target, more).cpu() for x, more in batches])
        return torch.cat([xnn.contributions(x, target, more).features.cpu() for x, more in batches])

    def _shown(self, target: Target) -> list[tuple[Any, Any]]:
        """Load the examples for maps and patches."""
        rows = self.split.shown[target]
        return list(self.split.test.inputs(rows, self.settings.reader().device)) if len(rows) else []

    def _maps(self, xnn: XNNAttribution, target: Target) -> Values:
        """Draw maps; measure their overlap and the time."""
        stream, seconds, count = OrthogonalityStream(), 0.0, 0
        for x, more in self._shown(target):
            why, took = _timed(lambda x, more: xnn.explain(x, target, more), x, more)
            seconds += took
            maps = why.maps if isinstance(why.maps, Tensor) else torch.cat([m.flatten(2) for m in why.maps], 2)
            stream.update(maps, contributions=why.contributions)
            count += len(why.contributions)
        return {"maps_o1": stream.compute().o1, "explain_seconds": seconds / count} if count else {}

    def _patches(self, xnn: XNNAttribution, target: Target) -> Values:
        batches = self._covered(target)
        if not batches:
            return {}
        known = self.split.controls.get(target)
        grid, fill = _grid(batches[0].first), self._fill()
        found = patch_scores_of(
            xnn, batches, target, grid=grid, fill=fill, seed=self.seed, controls=known is None
        )  # fmt: skip
        if known is None:
            known = {
                "agreement_random_groups": found.agreement_random_groups,
                "drops_o1_random_groups": None if found.drops_random_groups is None else found.drops_random_groups.o1,
            }
            if found.drops_random_groups is not None:
                self.split.controls[target] = known
        return {
            "agreement": found.agreement,
            "agreement_random_maps": found.agreement_random_maps,
            "drops_o1": found.drops.o1,
            **known,
        }

    def _subspaces(self, found: Relevances, target: Target) -> Values:
        """Measure the time of relevances, and the overlap of their drops."""
        seconds, count = 0.0, 0
        for x, more in self._shown(target):
            made, took = _timed(lambda x, more: found.of(x, target, more), x, more)
            seconds, count = seconds + took, count + len(made)
        values: Values = {"explain_seconds": seconds / count} if count else {}
        inputs = self._alone(target)
        if inputs is None:
            return values
        drops = patch_drops(lambda x: found.of(x, target), inputs, grid=_grid(inputs), fill=self._fill())
        values["drops_o1"] = drop_orthogonality(drops, contributions=found.of(inputs, target)).o1
        return values | self._selectivity(lambda x: found.of(x, target), target)

    def _one_map(self, xnn: XNNAttribution, target: Target) -> Values:
        """Draw the single map of the output, and measure patch agreement and time."""
        seconds, count = 0.0, 0
        for x, more in self._shown(target):
            seconds += _timed(lambda x, more: xnn.one_heatmap(x, target, more), x, more)[1]
            count += len(x) if isinstance(x, Tensor) else len(x[0])
        values: Values = {"explain_seconds": seconds / count} if count else {}
        inputs = self._alone(target)
        if inputs is None:
            return values
        drops = patch_drops(self._outputs(target), inputs, grid=_grid(inputs), fill=self._fill())
        maps = xnn.one_heatmap(inputs, target)
        return values | {"agreement": patch_agreement(maps.sum(2) if maps.dim() > 3 else maps, drops)}

    def _outputs(self, target: Target) -> Callable[[Tensor], Tensor]:
        """Make a function that computes the output of a batch, (n, 1)."""
        reader = self.settings.reader()

        def outputs(x: Tensor) -> Tensor:
            with untouched(reader.model), torch.no_grad():
                return select(reader.run((x.clone(),))[1], target)[:, None]

        return outputs

    def _parts(self, xnn: XNNAttribution, target: Target) -> Values:
        """Measure selectivity and locality on known parts."""
        images, masks = self._alone(target), self._masks(target)
        if masks is None or images is None or images.dim() != 4:
            return {}
        why = xnn.explain(images, target)
        maps = channels_first(why.directed_maps(), images).sum(2).clamp(min=0)
        on_parts = object_probabilities(maps, masks.to(maps.device))
        found = mean_locality(on_parts, contributions=why.contributions)
        return {
            "locality": None if math.isnan(found) else found,
            **self._selectivity(lambda x: xnn.contributions(x, target).contributions, target),
        }

    def _selectivity(self, contributions: Callable[[Tensor], Tensor], target: Target) -> Values:
        """Remove the known parts one by one, and measure the selectivity of the changes."""
        images, masks = self._alone(target), self._masks(target)
        if masks is None or images is None or images.dim() != 4:
            return {}
        cover, masks = patch_cover(images, None), masks.to(images.device)

        def removed(rows: Tensor, parts: Tensor) -> Tensor:
            return torch.where(masks[rows, parts][:, None], cover[rows], images[rows])

        changes = drops_of_patches(
            lambda x, *_: contributions(x), images, removed, masks.flatten(2).any(2), batch_size=_BATCH
        )
        found = selectivity(changes)
        return {"selectivity": found.share, "selectivity_whole": found.whole}

    def _masks(self, target: Target) -> Tensor | None:
        """Return the known parts of the examples for maps and patches, bool (n, P, H, W)."""
        masks = self.settings.masks
        return None if masks is None else masks[self.split.shown[target]]

    def _covered(self, target: Target) -> list[CoveredBatch]:
        """Return the examples to cover; none if their first input has no patches."""
        made = []
        for x, more in self._shown(target):
            inputs = x if isinstance(x, tuple) else (x,)
            batch = CoveredBatch(inputs, format_forward_args(more))
            if not isinstance(batch.first, Tensor) or not self._has_patches(batch):
                return []
            made.append(batch)
        return made

    def _has_patches(self, batch: CoveredBatch) -> bool:
        """Whether inputs are images, tokens or rows of at least three columns, which can be covered."""
        first = batch.first
        if first.is_floating_point():
            return first.dim() == 4 or (first.dim() in (2, 3) and first.shape[1] > 2)
        if first.dim() != 2 or first.shape[1] < 3:
            return False
        model = unwrap(self.settings.model)
        return embedding_of(model, (*batch.inputs, *(batch.additional or ()))) is not None

    def _fill(self) -> Tensor | None:
        """Return the mean of each column over the training examples of a table; None for other inputs."""
        total, count = torch.zeros(()), 0
        for x, _ in self.split.train.inputs(self.split.train.rows, torch.device("cpu")):
            if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
                return None
            total, count = total + x.double().sum(0), count + len(x)
        return total / count

    def _alone(self, target: Target) -> Tensor | None:
        """Return the examples to cover as one tensor; None if they have further inputs, are ids, or differ in size."""
        batches = self._covered(target)
        inputs = [batch.first for batch in batches if len(batch.inputs) == 1 and not batch.additional]
        if not inputs or len(inputs) < len(batches) or len({x.shape[1:] for x in inputs}) > 1:
            return None
        joined = torch.cat(inputs)
        return joined if joined.is_floating_point() else None


def _timed(explain: Callable[[Any, Any], Any], x: Any, more: Any) -> tuple[Any, float]:
    """Explain some examples; return the result and the processor seconds.

    One example is explained before, not counted, because the first call of a backend is slower than all others.
    """
    one, of_one = rows_of(x if isinstance(x, tuple) else (x,), more, torch.tensor([0]))
    explain(one if isinstance(x, tuple) else one[0], of_one)
    start = time.process_time()
    made = explain(x, more)
    return made, time.process_time() - start


def _as_marks(masks: Tensor) -> Tensor:
    """Convert masks of parts to bool (M, P, H, W)."""
    if masks.dtype == torch.bool and masks.dim() == 4:
        return masks
    if masks.dim() != 3 or masks.is_floating_point() or masks.dtype == torch.bool or int(masks.max()) < 1:
        raise ValueError(
            f"masks are {masks.dtype} {tuple(masks.shape)}; pass integers from 1 to P for parts and 0 for the "
            "rest, (M, H, W), or boolean (M, P, H, W)"
        )
    return masks[:, None] == torch.arange(1, int(masks.max()) + 1, device=masks.device)[:, None, None]


def _grid(inputs: Tensor) -> int:
    return int(min(_GRID, *inputs.shape[2:])) if inputs.dim() == 4 else _GRID
