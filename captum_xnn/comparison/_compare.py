"""Compare methods of explanation on your own model and data, without annotations.

Every method is fitted on the same training examples, and measured on the same held-out examples:

===============  ====================================================================================================
x-features       number of x-features: fewer than asked for where groups were merged, one more with a remainder
faithfulness     F_reg and F_cls, as :meth:`captum_xnn.XNNAttribution.score` gives them
patch agreement  of maps with the drops of covered patches, beside random groups and maps of noise. Patches are squares
                 of an image, tokens of a text, or columns of a table
identified maps  share of maps that fit the drops of their own x-feature better than those of the others, beside random
                 groups; chance is 1 / K
movement         size of the x-features' drops in multiples of that of their sum; more than 1 is cancelling, which makes
                 maps easy to identify
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

Beside the measures on patches stand random groups, as many as the method has x-features. Methods with as many
x-features share the draws. Random groups as a method have other draws, and new ones for each half, so their stability
is that of chance. Groups of contributions add up exactly for any groups. Their F_reg therefore measures only the error
of the path integral, and equals that of random groups.

The largest dimensions and PRCA have one more x-feature, which holds the remaining contributions. In DRSA the last
x-feature holds this remainder. CRAFT and the TopK SAE leave a part of the output unexplained, and their F_reg shows how
much. PRCA, CRAFT and the TopK SAE have no maps here.

Conventions:
    M examples, K x-features. Positives are examples to which the model gives the class. If outputs are not classes, all
    examples are positives. The first positives among the held-out examples are drawn and covered.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from torch import Tensor, nn
from tqdm import tqdm

from captum_xnn.activations._activations import Activations, Asked, Source
from captum_xnn.activations._batches import Batches, repeatable
from captum_xnn.activations._collecting import collect
from captum_xnn.activations._unpacking import Unpack, first_of_batch, unpack_for
from captum_xnn.attribution import XNNAttribution
from captum_xnn.comparison._measures import Measurement, MeasurementSettings
from captum_xnn.comparison._methods import named_methods, ungrouped
from captum_xnn.comparison._relevances import Method
from captum_xnn.comparison._splits import FOLDS, Splits, Values, as_marks
from captum_xnn.comparison._table import MethodComparison
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.layers._read import OutputTransform
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.layers._targets import Target, targets_by_explainer
from captum_xnn.models._form import MakeForm
from captum_xnn.training._recipe import Recipe

__all__ = ["DEFAULT_METHODS", "compare"]

DEFAULT_METHODS = ("groups", "SRAE", "spectral groups", "random groups", "1-Heatmap")
"""The methods that are compared by default. They need no optional package."""


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
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> measured = compare(
        ...     model, "1", torch.randn(200, 6), [0, 1], ["groups", "random groups"], n_features=2, progress=False
        ... )
        >>> [row["method"] for row in measured.table], measured.train, measured.test
        (['groups', 'random groups'], 160, 40)
        >>> measured.estimate("groups", "f_reg").mean < 0.01
        True
    """
    chosen = named_methods(methods)
    targets = [t for (t,) in targets_by_explainer(target, joint=False)]
    _check_repeats(repeats, test)
    attribution = partial(
        XNNAttribution,
        model,
        layer,
        n_features,
        heatmap=heatmap,
        recipe=recipe,
        output_transform=output_transform,
        prediction_transform=prediction_transform,
    )
    reader = Reader.of(model, layer, output_transform, prediction_transform)
    settings = MeasurementSettings(attribution, reader, ungrouped, None if masks is None else as_marks(masks))
    unpack = unpack_for(model, unpack)
    activations = _collected(reader, data, targets, unpack, progress)
    apart = None if test is None else _collected(reader, test, targets, unpack, progress)
    _check_masks(settings.masks, activations, apart)
    splits = Splits.of(activations, apart, targets, images=images, seed=seed)
    with tqdm(total=repeats * len(chosen), disable=not progress, leave=False) as bar:
        measured = _measured(settings, chosen, splits, targets, repeats, seed, bar)
    result = MethodComparison(
        layer=reader.name,
        targets=tuple(targets),
        n_features=n_features,
        train=measured.train,
        test=measured.test,
        repeats=repeats,
        values=measured.values,
    )
    _repeat_warnings(measured.messages)
    _warn_of_better(result, next(iter(chosen)), 1e-5 * splits.size)
    return result


def _check_repeats(repeats: int, test: Any) -> None:
    """Raise if there are fewer folds than repeats."""
    if not 1 <= repeats <= (FOLDS if test is None else 2**16):
        raise ValueError(
            f"repeats is {repeats}; pass 1 to {FOLDS}, as each repeat holds out another fifth of the data, or pass "
            "test= data"
        )


class _Measured(NamedTuple):
    """The measures of all methods."""

    values: dict[str, dict[str, tuple[float, ...]]]
    """For each method and measure the values of all targets and repeats."""
    messages: dict[str, list[str]]
    """Texts of the warnings of each method."""
    train: int
    """Number of training examples of a repeat."""
    test: int
    """Number of held-out examples of a repeat."""


def _measured(
    settings: MeasurementSettings,
    methods: Mapping[str, Method],
    splits: Splits,
    targets: Sequence[Target],
    repeats: int,
    seed: int,
    bar: tqdm[Any],
) -> _Measured:
    """Measure each method on the division of each repeat. The first method must not fail."""
    values: dict[str, dict[str, tuple[float, ...]]] = {name: {} for name in methods}
    messages: dict[str, list[str]] = {name: [] for name in methods}
    first, train, test = next(iter(methods)), 0, 0
    for repeat in range(repeats):
        split = splits.split(repeat)
        train, test = len(split.train.rows), len(split.test.rows)
        for name, method in methods.items():
            bar.set_description(name)
            measurement = Measurement(settings, method, split, targets, seed + repeat)
            values_of_targets, raised = _values_and_warnings(measurement, needed=name == first)
            messages[name] += raised
            for of_target in values_of_targets:
                for key, value in of_target.items():
                    if value is not None:
                        values[name][key] = (*values[name].get(key, ()), value)
            bar.update()
    return _Measured(values, messages, train, test)


def _values_and_warnings(measurement: Measurement, needed: bool) -> tuple[list[Values], list[str]]:
    """Measure a method; return its values and the texts of its warnings.

    Args:
        measurement: The method on one division of the data.
        needed: Whether a failure of its fit is an error, and not a warning without values.
    """
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            values = measurement.values()
        except (ImportError, ValueError) as error:
            if needed:
                raise
            return [], [f"a repeat is left out of the table, as the fit failed: {error}"]
    return values, [str(warning.message) for warning in raised]


def _repeat_warnings(messages: Mapping[str, Sequence[str]]) -> None:
    """Warn once for each method that raised warnings, with the first of them."""
    for name, texts in messages.items():
        if texts:
            others = len(set(texts)) - 1
            more = f" ({others} more warning{'s' * (others > 1)} of this method)" if others else ""
            warnings.warn(f"{name}: {texts[0]}{more}", stacklevel=levels_up())


def _warn_of_better(result: MethodComparison, first: str, rounding: float) -> None:
    """Warn of methods whose interval of F_reg lies below that of the first method, by more than rounding."""
    own = result.estimate(first, "f_reg")
    if own is None:
        return
    better = [
        f"{name} ({estimate})"
        for name in result.methods
        if (estimate := result.estimate(name, "f_reg")) is not None
        and estimate.below(own)
        and own.mean - estimate.mean > rounding
    ]
    if better:
        warnings.warn(
            f"{', '.join(better)} {'is' if len(better) == 1 else 'are'} clearly more faithful at layer "
            f"{result.layer!r} than {first} ({own}), in F_reg; consider explaining the model by "
            f"{'it' if len(better) == 1 else 'one of them'}",
            stacklevel=levels_up(),
        )


def _collected(reader: Reader, data: Any, targets: Sequence[Target], unpack: Unpack, progress: bool) -> Activations:
    """Run all data through the model once."""
    if isinstance(data, Activations):
        raise TypeError("data are activations, and patches and maps need the inputs; pass the data themselves")
    data = repeatable(data)
    activations = collect(
        reader.model,
        reader.layer,
        data,
        unpack=unpack,
        output_transform=reader.output_transform,
        prediction_transform=reader.prediction_transform,
        asked=Asked(targets),
        progress=progress,
    )
    return activations._replace(source=Source(data, unpack))


def _check_masks(masks: Tensor | None, activations: Activations, test: Activations | None) -> None:
    """Raise unless there is a mask, of the images' size, for each example that methods are measured on."""
    if masks is None:
        return
    measured = activations if test is None else test
    if len(masks) != (examples := len(measured.Z)):
        raise ValueError(
            f"there are masks of {len(masks)} examples, and methods are measured on {examples} examples; pass one for "
            f"each example of {'data' if test is None else 'test'}, in the same order"
        )
    assert measured.source is not None  # compare has collected them
    first = Batches(measured.source.data, 2, measured.source.unpack).first()
    assert first is not None
    inputs, _ = first.on(torch.device("cpu"))
    image, size = inputs[0], tuple(masks.shape[-2:])
    if image.dim() == 4 and size not in (image.shape[2:], image.shape[1:3]):
        raise ValueError(
            f"masks are {' x '.join(map(str, size))}, and an image has shape {tuple(image.shape[1:])}; pass masks of "
            "the images' height and width"
        )
