"""Explain examples: compute the numbers of their x-features, and draw the maps.

Maps need one network for each form. Examples with the same number of x-features are drawn together. Where one forward
pass can serve the maps and the numbers, it does. :func:`draw` also draws outputs of the model, for the 1-Heatmap.

Conventions:
    N examples, K x-features, or K outputs of the model. Maps are (N, K, ...).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.heatmaps._heatmap import DefaultMaps, Heatmap
from captum_xnn.heatmaps._layouts import in_shape_of
from captum_xnn.heatmaps._network import ContributionNetwork, ExplanationNetwork, cut_off
from captum_xnn.heatmaps._numbers import Examples, Numbers
from captum_xnn.heatmaps._one_pass import Pass, Reading
from captum_xnn.heatmaps._rows_of_settings import rows_of_settings
from captum_xnn.layers._arguments import as_int
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._outputs import checked
from captum_xnn.layers._read import UnfitError, WithGraph
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import grouped, select_each
from captum_xnn.layers._trace import Trace, Trials
from captum_xnn.models._contribution_groups import ContributionGroups

__all__ = ["EarlierCalls", "Explained", "FeatureMaps", "Portion", "backend_of", "draw"]


class EarlierCalls:
    """Remembers findings of earlier calls about a model. Attributions with other backends can share it."""

    def __init__(self) -> None:
        self.map_layers: dict[Any, nn.Module | None] = {}
        """Layer at which the maps of groups are drawn, for each explained layer and shape of the inputs."""
        self.trials: Trials = {}
        """Results of passes that showed which modules have feature maps."""
        self.two_passes: set[Any] = set()
        """Keys of ``map_layers`` for which one pass does not serve maps and numbers of a learned network."""


class DrawnReading(NamedTuple):
    """The results of a forward pass that drew maps as well."""

    maps: tuple[Tensor, ...]
    """For each input the maps of all x-features, (N, K, ...), or that of one x-feature, in the input's shape."""
    Z: Tensor
    """The layer's output, (N, ...)."""
    y_hat: Tensor
    """The model's outputs, (N, ...)."""


class Explained(NamedTuple):
    """An explanation without its maps."""

    numbers: Numbers
    """Numbers of all examples."""
    prediction: Tensor
    """The explained output of each example, (N,), in the dtype of the numbers."""
    reading: Reading | DrawnReading
    """The pass that read the first examples, or drew the maps of all of them too."""

    @property
    def unexplained(self) -> Tensor:
        """Prediction minus surrogate, (N,), in logits."""
        return self.prediction - self.numbers.surrogate

    @classmethod
    def of(
        cls,
        examples: Examples,
        internal_batch_size: int | None = None,
        *,
        start_layer: nn.Module | None = None,
        drawn: DrawnReading | None = None,
    ) -> Explained:
        """Run the model on examples, and compute their numbers.

        Args:
            examples: N examples.
            internal_batch_size: Number of examples explained at once; all of them, if None.
            start_layer: The layer at which the graph for maps should begin, if maps of all examples follow at once.
            drawn: Results of a pass over all examples, if one has drawn the maps already.

        Raises:
            ModelMismatchError: If a form was fitted to another shape of Z.
            ValueError: If a target is out of range, or an output is NaN or infinite.
        """
        reader, n = examples.reader, len(examples)
        readings: list[Reading] = []

        def outputs(some: Examples) -> tuple[Tensor, Tensor]:
            """Read Z and the model's outputs of some examples."""
            if drawn is not None:
                return drawn.Z, drawn.y_hat
            if readings:
                with untouched(reader.model):
                    return reader.read((*some.inputs, *(some.additional or ())))
            readings.append(Reading.of(reader, some.inputs, some.additional, start_layer))
            return readings[0].Z, readings[0].y_hat

        def numbers_by_rows() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
            """Yield row indices, and the numbers and predictions of these rows."""
            for rows in torch.split(torch.arange(n, device="cpu"), internal_batch_size or n):
                with torch.inference_mode(False), torch.no_grad():
                    Z, y_hat = outputs(examples.subset(rows))
                some = examples.subset(rows)  # copies again, as a model may have worked in place
                predictions = select_each(y_hat, some.targets)
                prefix = readings[0].prefix if readings and n == 1 else None
                numbers = some.numbers(Z, predictions, prefix=prefix, whole=examples)
                yield rows.tolist(), (*numbers, predictions.to(numbers.features.dtype))

        *values, prediction = gathered(numbers_by_rows(), n)
        return cls(Numbers(*values), prediction, readings[0] if drawn is None else drawn)


def backend_of(heatmap: Heatmap | DefaultMaps, exact: bool) -> Heatmap:
    """Return the backend for groups of contributions, which are exact, or for learned networks.

    Args:
        heatmap: A backend for all forms, or the default ones.
        exact: Whether the form is exact.
    """
    if not isinstance(heatmap, DefaultMaps):
        return heatmap
    return heatmap.of_groups if exact else heatmap.of_networks


class Portion(NamedTuple):
    """Examples with the same explainer, so that one network draws their maps."""

    heatmap: Heatmap
    """The backend."""
    network: ExplanationNetwork
    """From the model's inputs to the outputs to draw."""
    features: Sequence[int]
    """Indices of the K outputs to draw."""
    rows: list[int]
    """Row indices of the examples."""
    slopes: Tensor | None = None
    """Slopes of these examples, (n, ...), if the network takes them as its last argument."""


class FeatureMaps(NamedTuple):
    """Draws the maps of x-features."""

    heatmap: Heatmap | DefaultMaps
    """One backend for all forms, or the default ones."""
    earlier: EarlierCalls
    """Findings of earlier calls about the model."""

    def explain(
        self,
        examples: Examples,
        *,
        feature: int | None = None,
        internal_batch_size: int | None = None,
        settings: dict[str, Any],
    ) -> tuple[tuple[Tensor, ...], Explained]:
        """Draw the maps of all examples, (N, K, ...) for each input, and compute the numbers of their explanation.

        Maps of x-features that a form lacks are zero.

        Args:
            examples: N examples.
            feature: The one x-feature to draw, in the inputs' shape; all of them, if None.
            internal_batch_size: Maps, or examples, computed at once.
            settings: Settings of the backend for this call.

        Raises:
            ModelMismatchError: If a form was fitted to another shape of Z.
            ValueError: If the x-feature is out of range, or a layer's maps do not fit in the input's shape.
        """
        drawn, map_layer = None, None
        key = examples.reader.name, tuple(x.shape[1:] for x in examples.inputs)
        if key in self.earlier.map_layers and not settings:  # one pass may serve the maps and the numbers
            drawn = self._draw_in_one_pass(key, examples, feature, internal_batch_size)
            map_layer = self._map_layer(key, examples, internal_batch_size)
        explained = Explained.of(examples, internal_batch_size, start_layer=map_layer, drawn=drawn)
        if isinstance(explained.reading, DrawnReading):
            return explained.reading.maps, explained
        with torch.inference_mode(False), untouched(examples.reader.model):
            trace, slopes = explained.reading.tracer.trace(self.earlier.trials), explained.numbers.slopes
            self.earlier.map_layers[key] = trace.spatial
            maps = self._draw(
                examples,
                slopes,
                trace,
                graph_pass=explained.reading.graph_pass,
                feature=feature,
                internal_batch_size=internal_batch_size,
                settings=settings,
            )
        return maps if feature is None else in_shape_of(examples.inputs, maps), explained

    def _draw_in_one_pass(
        self, key: Any, examples: Examples, feature: int | None, internal_batch_size: int | None
    ) -> DrawnReading | None:
        """Draw maps and read Z and the outputs in one pass, as excitation backprop does for one learned network.

        Return None where the pass fails, as for a layer that runs twice: two passes then work, or raise the error.
        """
        form = examples.choices[0].form
        is_one_network = not isinstance(form, ContributionGroups) and all(c.form is form for c in examples.choices)
        at_once = internal_batch_size is None or internal_batch_size >= len(examples) * form.n_features
        heatmap = backend_of(self.heatmap, False)
        can_read = getattr(heatmap, "runs_once", False) and examples.reader.output_transform is None
        if not (is_one_network and at_once and can_read) or key in self.earlier.two_passes:
            return None
        drawn = _draw_and_read(heatmap, examples, feature)
        if drawn is None:
            self.earlier.two_passes.add(key)
        return drawn

    def _map_layer(self, key: Any, examples: Examples, internal_batch_size: int | None) -> nn.Module | None:
        """Return the layer of the maps of groups in an earlier call; None without one, or if one pass cannot draw."""
        at_once = internal_batch_size is None or internal_batch_size >= len(examples)
        forms = [choice.form for choice in examples.choices]
        alike = len({*examples.targets}) == 1 and all(isinstance(form, ContributionGroups) for form in forms)
        if not (at_once and alike and getattr(backend_of(self.heatmap, True), "takes_pass", False)):
            return None
        return self.earlier.map_layers[key]

    def _draw(
        self,
        examples: Examples,
        slopes: Tensor,
        trace: Trace,
        *,
        graph_pass: Pass | None,
        feature: int | None,
        internal_batch_size: int | None,
        settings: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """Draw the maps of all examples, (N, K, ...) for each input.

        ``slopes`` are (N, ...) as Z, or (N, 0). ``trace`` are the modules that the model ran before the layer, and
        ``graph_pass`` is a pass over all examples, if one was taken.
        """
        widths = [choice.form.n_features for choice in examples.choices]
        features = _features(feature, max(widths))

        def maps_by_rows() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
            for width, rows in grouped(widths):  # examples with the same number of maps
                present = [k for k in features if k < width]
                some = examples.subset(torch.tensor(rows, device="cpu"))
                are_all = len(rows) == len(examples)
                of_rows = slopes[torch.tensor(rows, device="cpu").to(slopes.device)]
                taken = graph_pass if are_all else None
                portions = list(self._portions(some, present or [0], of_rows, trace, graph_pass=taken))
                some_settings = settings if are_all else rows_of_settings(settings, len(examples), rows)
                maps = draw(portions, some.inputs, some.additional, internal_batch_size, some_settings)
                yield rows, tuple(_padded(m if present else m[:, :0], len(features)) for m in maps)

        return gathered(maps_by_rows(), len(examples))

    def _portions(
        self, examples: Examples, features: list[int], slopes: Tensor, trace: Trace, *, graph_pass: Pass | None
    ) -> Iterator[Portion]:
        """Yield the networks that draw the maps of some examples."""
        reader = examples.reader
        for (form, _, target, _), rows in grouped(examples.choices):
            heatmap = backend_of(self.heatmap, isinstance(form, ContributionGroups))
            if isinstance(form, ContributionGroups):
                groups = ContributionNetwork(form, reader.tail(), target, trace=trace)
                groups.graph_pass = graph_pass if len(rows) == len(examples) else None
                yield Portion(heatmap, groups, features, rows, slopes[rows])
            else:
                transform = reader.output_transform
                network = ExplanationNetwork(reader.model, reader.layer, form, trace=trace, output_transform=transform)
                yield Portion(heatmap, network, features, rows)


def _draw_and_read(heatmap: Heatmap, examples: Examples, feature: int | None) -> DrawnReading | None:
    """Draw the maps of one learned network, and read Z and the model's outputs; None where the pass fails.

    Raises:
        TypeError: If the model's output is no tensor.
        ValueError: If the x-feature is out of range, or an output is NaN or infinite.
    """
    form, reader, inputs = examples.choices[0].form, examples.reader, examples.inputs
    features = _features(feature, form.n_features)
    network = ExplanationNetwork(reader.model, reader.layer, form)
    readings: list[WithGraph] = []
    network.readings = readings
    try:
        maps = heatmap(network, inputs, features, additional_forward_args=examples.additional)
    except (UnfitError, RuntimeError, TypeError, ValueError):
        return None
    network.readings = None
    with torch.no_grad():
        transform = reader.prediction_transform
        output = readings[-1].output if transform is None else transform(readings[-1].output)
    Z, y_hat = checked(readings[-1].values, output, reader.name)
    portion = Portion(heatmap, network, features, list(range(len(examples))))
    maps = _checked_maps(maps, [portion], inputs, examples.additional, {})
    return DrawnReading(maps if feature is None else in_shape_of(inputs, maps), Z, y_hat)


def _features(feature: int | None, K: int) -> list[int]:
    """List the x-features to draw."""
    if feature is None:
        return list(range(K))
    k = as_int("feature", feature, None, "0")
    if not 0 <= k < K:
        raise ValueError(
            f"feature is {k}, the index of no x-feature; pass 0 to {K - 1}, or leave feature out for all of them"
        )
    return [k]


def _padded(maps: Tensor, most: int) -> Tensor:
    """Append empty maps to (N, K, ...) for x-features that a form lacks; return (N, most, ...)."""
    missing = most - maps.shape[1]
    return torch.cat([maps, maps.new_zeros(len(maps), missing, *maps.shape[2:])], 1) if missing else maps


def draw(
    portions: Sequence[Portion],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    internal_batch_size: int | None,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Draw the maps of all examples, (N, K, ...) for each input; warn once of maps that are zero or not finite.

    Args:
        portions: Portions that together hold each example once, with the same number K of outputs.
        inputs: Tensors (N, ...).
        additional: Further arguments of the model.
        internal_batch_size: Number of maps computed at once. All maps, if None.
        settings: Settings of the backend for this call.

    Raises:
        ValueError: If all maps are zero because no gradient reaches the inputs.
    """
    n = len(inputs[0])

    def maps_by_rows() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
        for heatmap, network, features, rows, slopes in portions:
            x, more = (
                (inputs, additional)
                if len(rows) == n
                else rows_of(inputs, additional, torch.tensor(rows, device="cpu"))
            )
            if slopes is not None:
                more = (*(more or ()), slopes)
            some_settings = settings if len(rows) == n else rows_of_settings(settings, n, rows)
            yield (
                rows,
                heatmap(
                    network,
                    x,
                    features,
                    additional_forward_args=more,
                    internal_batch_size=internal_batch_size,
                    **some_settings,
                ),
            )

    return _checked_maps(gathered(maps_by_rows(), n), portions, inputs, additional, settings)


def _checked_maps(
    maps: tuple[Tensor, ...],
    portions: Sequence[Portion],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Make maps contiguous; warn of maps that are zero or not finite; raise if no gradient reached the inputs."""
    maps = tuple(m.contiguous() for m in maps)
    _warn_of_infinite(maps, inputs)
    blank = torch.stack([(_flat(m) == 0).all(2).all(0) for m in maps]).all(0)
    if bool(blank.any()):
        _warn_of_blank(blank, portions, inputs, additional, settings)
    return maps


def _warn_of_infinite(maps: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    """Warn of maps with NaN or infinite values, and why: models may replace such inputs, but maps multiply by them."""
    bad = torch.stack([~_flat(m).isfinite().all(2) for m in maps]).any(0)
    if bool(bad.any()):
        if count := int(torch.stack([~x.reshape(len(x), -1).isfinite().all(1) for x in inputs]).any(0).sum()):
            why = (
                f"{count} of {len(inputs[0])} examples have such inputs; replace them as the model does, before you "
                "explain it"
            )
        else:
            why = "the usual cause is half precision: run the model and its inputs with .float()"
        warnings.warn(
            f"{int(bad.sum())} of {bad.numel()} maps have NaN or infinite values; {why}",
            stacklevel=levels_up(),
        )


def _warn_of_blank(
    blank: Tensor,
    portions: Sequence[Portion],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    settings: dict[str, Any],
) -> None:
    """Warn of x-features with zero maps in all examples, and why; raise if no gradient reaches the inputs."""
    heatmap, network, _, rows, slopes = portions[0]
    if bool(blank.all()) and not getattr(heatmap, "replaces_inputs", False):
        x, more = rows_of(inputs, additional, torch.tensor(rows, device="cpu"))
        if (reason := cut_off(network, x, more if slopes is None else (*(more or ()), slopes))) is not None:
            raise ValueError(reason)
    what = "x-feature" if network.centred else "output"
    zero = sorted({portion.features[i] for portion in portions for i in blank.nonzero()[:, 0].tolist()})
    names = [f"{k + 1} (feature={k})" if network.centred else str(k) for k in zero]
    why = f"by this method nothing in these inputs speaks for it. A dead {what} always has such maps"
    at_baseline = getattr(heatmap, "is_at_baseline", None)
    if at_baseline is not None and at_baseline(inputs, settings):
        why = "the inputs equal the baseline from which this method measures; pass other baselines"
    elif slopes is not None:
        why = (
            "it may contribute by numbers below the base, such as inactive ReLUs, and this method does not see those. "
            "Draw it with a method that replaces inputs, as FromCaptum(Occlusion, ...)"
        )
    n = len(inputs[0])
    warnings.warn(
        f"maps are zero for {what} {', '.join(names)} in {n} of {n} examples: {why}",
        stacklevel=levels_up(),
    )


def _flat(maps: Tensor) -> Tensor:
    """Flatten maps (N, K, ...) to (N, K, numbers). Inputs (N,), such as a column of a table, give one number."""
    return maps.unsqueeze(-1).flatten(2)
