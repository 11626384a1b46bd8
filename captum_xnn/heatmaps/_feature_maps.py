"""Draw the maps of x-features: build one network for each form, call the backend, and check the maps.

Examples with the same number of x-features are drawn together. :func:`draw` also draws outputs of the model, for the
1-Heatmap.

Conventions:
    N examples, K x-features, or K outputs of the model. Maps are (N, K, ...).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from torch import Tensor

from captum_xnn.heatmaps._from_captum import FromCaptum
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.heatmaps._layouts import in_shape_of
from captum_xnn.heatmaps._network import ContributionNetwork, ExplanationNetwork, cut_off
from captum_xnn.heatmaps._one_pass import Pass
from captum_xnn.heatmaps._rows_of_settings import rows_of_settings
from captum_xnn.layers._arguments import as_int
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._read import UnfitError, WithGraph
from captum_xnn.layers._reader import Reader, checked
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.layers._targets import grouped
from captum_xnn.layers._trace import Trace
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._numbers import Choice, Form

__all__ = ["DrawnAndRead", "FeatureMaps", "Part", "as_heatmap", "draw"]


def as_heatmap(heatmap: type[Attribution] | Heatmap) -> Heatmap:
    """Turn a class of Captum into a backend, and return a backend unchanged.

    Args:
        heatmap: A Captum attribution class, or a backend object.

    Raises:
        TypeError: If ``heatmap`` is neither a class of Captum nor callable.

    Example:
        >>> from captum.attr import IntegratedGradients
        >>> as_heatmap(IntegratedGradients)
        FromCaptum(IntegratedGradients)
    """
    if isinstance(heatmap, type):
        return FromCaptum(heatmap)
    if isinstance(heatmap, Attribution) or not callable(heatmap):
        raise TypeError(
            f"heatmap is an object of type {type(heatmap).__name__}, neither a Captum class nor a heatmap backend; "
            "pass the class and its settings as FromCaptum(Class, setting=...), since the backend builds the object"
        )
    return heatmap


class DrawnAndRead(NamedTuple):
    """The results of one forward pass."""

    maps: tuple[Tensor, ...]
    """For each input the maps of all x-features, (N, K, ...), or that of one x-feature, in the input's shape."""
    Z: Tensor
    """The layer's output, (N, ...)."""
    y_hat: Tensor
    """The model's outputs, (N, ...)."""


class FeatureMaps(NamedTuple):
    """Draws the maps of x-features."""

    backend: Callable[[bool], Heatmap]
    """Gives the backend: for groups of contributions if called with True, else for learned networks."""
    reader: Reader
    """Reader of the explained layer."""

    def draw(
        self,
        choices: Sequence[Choice],
        slopes: Tensor,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        ran: Trace,
        *,
        taken: Pass | None = None,
        feature: int | None = None,
        internal_batch_size: int | None = None,
        settings: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """Draw the maps of all examples, (N, K, ...) for each input; maps of x-features that a form lacks are zero.

        Args:
            choices: The choice of each example.
            slopes: Slopes of each example, (N, ...) as Z, or (N, 0).
            inputs: Tensors (N, ...).
            additional: Further arguments of the model.
            ran: Modules that the model runs before the layer.
            taken: A pass over all examples, if one has been taken.
            feature: The one x-feature to draw, in the inputs' shape; all of them, if None.
            internal_batch_size: Maps computed at once.
            settings: Settings of the backend for this call.

        Raises:
            ValueError: If the x-feature is out of range, or a layer's maps do not fit in the input's shape.
        """
        widths = [choice.form.n_features for choice in choices]
        features = _features(feature, max(widths))

        def drawn() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
            for width, rows in grouped(widths):  # examples with the same number of maps
                own = [k for k in features if k < width]
                x, more = rows_of(inputs, additional, torch.tensor(rows))
                some = slopes[torch.tensor(rows).to(slopes.device)]
                every = len(rows) == len(choices)
                parts = list(
                    self._parts([choices[i] for i in rows], own or [0], some, ran, taken=taken if every else None)
                )
                of_rows = settings if every else rows_of_settings(settings, len(choices), rows)
                maps = draw(parts, x, more, internal_batch_size, of_rows)
                yield rows, tuple(_padded(m if own else m[:, :0], len(features)) for m in maps)

        maps = gathered(drawn(), len(choices))
        return maps if feature is None else in_shape_of(inputs, maps)

    def reads(self, choices: Sequence[Choice], internal_batch_size: int | None = None) -> bool:
        """Whether :meth:`draw_and_read` suits some examples: excitation backprop draws one learned network, at once.

        Args:
            choices: The choice of each example.
            internal_batch_size: Maps computed at once.
        """
        form = choices[0].form
        is_one = all(choice.form is form for choice in choices) and not isinstance(form, ContributionGroups)
        at_once = internal_batch_size is None or internal_batch_size >= len(choices) * form.n_features
        reading = getattr(self._backend(form), "runs_once", False) and self.reader.output_transform is None
        return is_one and at_once and reading

    def draw_and_read(
        self,
        choices: Sequence[Choice],
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        *,
        feature: int | None = None,
    ) -> DrawnAndRead | None:
        """Draw maps as :meth:`draw` does, and read Z and the model's outputs in the same forward pass.

        Return None where the pass fails, as for a layer that runs twice: :meth:`draw` then works, or raises the error.

        Args:
            choices: The choice of each example, for which :meth:`reads` is true.
            inputs: Tensors (N, ...).
            additional: Further arguments of the model.
            feature: The one x-feature to draw, in the inputs' shape; all of them, if None.

        Raises:
            TypeError: If the model's output is no tensor.
            ValueError: If the x-feature is out of range, or an output is NaN or infinite.
        """
        form, reader, n = choices[0].form, self.reader, len(choices)
        heatmap, features = self._backend(form), _features(feature, form.n_features)
        network = ExplanationNetwork(reader.model, reader.layer, form)
        read: list[WithGraph] = []
        network.read = read
        try:
            maps = heatmap(network, inputs, features, additional_forward_args=additional)
        except (UnfitError, RuntimeError, TypeError, ValueError):
            return None
        network.read = None
        with torch.no_grad():
            transform = reader.prediction_transform
            output = read[-1].output if transform is None else transform(read[-1].output)
        Z, y_hat = checked(read[-1].values, output, reader.name)
        maps = _warned(maps, [Part(heatmap, network, features, list(range(n)))], inputs, additional, {})
        return DrawnAndRead(maps if feature is None else in_shape_of(inputs, maps), Z, y_hat)

    def _parts(
        self, choices: Sequence[Choice], features: list[int], slopes: Tensor, ran: Trace, *, taken: Pass | None
    ) -> Iterator[Part]:
        """Yield the networks that draw the maps of some examples."""
        reader = self.reader
        for (form, _, target, _), rows in grouped(choices):
            heatmap = self._backend(form)
            if isinstance(form, ContributionGroups):
                groups = ContributionNetwork(form, reader.tail(), target, trace=ran)
                groups.taken = taken if len(rows) == len(choices) else None
                yield Part(heatmap, groups, features, rows, slopes[rows])
            else:
                transform = reader.output_transform
                network = ExplanationNetwork(reader.model, reader.layer, form, trace=ran, output_transform=transform)
                yield Part(heatmap, network, features, rows)

    def _backend(self, form: Form) -> Heatmap:
        """Choose the backend that draws a form."""
        return self.backend(isinstance(form, ContributionGroups))


def _features(feature: int | None, K: int) -> list[int]:
    """List the x-features to draw."""
    if feature is None:
        return list(range(K))
    k = as_int("feature", feature, None, "0")
    if not 0 <= k < K:
        raise ValueError(f"x-feature {k} does not exist; pass 0 to {K - 1}, or leave feature out for all of them")
    return [k]


def _padded(maps: Tensor, most: int) -> Tensor:
    """Append empty maps to (N, K, ...) for x-features that a form lacks; return (N, most, ...)."""
    missing = most - maps.shape[1]
    return torch.cat([maps, maps.new_zeros(len(maps), missing, *maps.shape[2:])], 1) if missing else maps


class Part(NamedTuple):
    """Examples with the same explainer, so that one network draws their maps."""

    heatmap: Heatmap
    """The backend."""
    network: ExplanationNetwork
    """From the model's inputs to the outputs to draw."""
    features: Sequence[int]
    """Numbers of the K outputs to draw."""
    rows: list[int]
    """Row indices of the examples."""
    slopes: Tensor | None = None
    """Slopes of these examples, (n, ...), if the network takes them as its last argument."""


def draw(
    parts: Sequence[Part],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    internal_batch_size: int | None,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Draw the maps of all examples, (N, K, ...) for each input; warn once of maps that are zero or not finite.

    Args:
        parts: Parts that together hold each example once, with the same number K of outputs.
        inputs: Tensors (N, ...).
        additional: Further arguments of the model.
        internal_batch_size: Number of maps computed at once. All maps, if None.
        settings: Settings of the backend for this call.

    Raises:
        ValueError: If all maps are zero because no gradient reaches the inputs.
    """
    n = len(inputs[0])

    def drawn() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
        for heatmap, network, features, rows, slopes in parts:
            x, more = (inputs, additional) if len(rows) == n else rows_of(inputs, additional, torch.tensor(rows))
            if slopes is not None:
                more = (*(more or ()), slopes)
            own = settings if len(rows) == n else rows_of_settings(settings, n, rows)
            yield (
                rows,
                heatmap(
                    network,
                    x,
                    features,
                    additional_forward_args=more,
                    internal_batch_size=internal_batch_size,
                    **own,
                ),
            )

    return _warned(gathered(drawn(), n), parts, inputs, additional, settings)


def _warned(
    maps: tuple[Tensor, ...],
    parts: Sequence[Part],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Return maps, contiguous; warn once of maps that are zero or not finite, and raise if no gradient made them."""
    maps = tuple(m.contiguous() for m in maps)
    _warn_of_infinite(maps)
    blank = torch.stack([(_flat(m) == 0).all(2).all(0) for m in maps]).all(0)
    if bool(blank.any()):
        _warn_of_blank(blank, parts, inputs, additional, settings)
    return maps


def _warn_of_blank(
    blank: Tensor,
    parts: Sequence[Part],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    settings: dict[str, Any],
) -> None:
    """Warn of x-features with zero maps in all examples, and why; raise if no gradient reaches the inputs."""
    heatmap, network, _, rows, slopes = parts[0]
    replaces = isinstance(heatmap, FromCaptum) and heatmap.replaces_inputs
    if bool(blank.all()) and not replaces:
        x, more = rows_of(inputs, additional, torch.tensor(rows))
        if (reason := cut_off(network, x, more if slopes is None else (*(more or ()), slopes))) is not None:
            raise ValueError(reason)
    what = "x-feature" if network.centred else "output"
    numbers = sorted({part.features[i] for part in parts for i in blank.nonzero()[:, 0].tolist()})
    why = f"by this method nothing in these inputs speaks for it. A dead {what} always has such maps"
    if isinstance(heatmap, FromCaptum) and heatmap.is_at_baseline(inputs, settings):
        why = "the inputs equal the baseline from which this method measures; pass other baselines"
    elif slopes is not None:
        why = (
            "it may contribute by numbers below the base, such as inactive ReLUs, and this method does not see those. "
            "Draw it with a method that replaces inputs, as FromCaptum(Occlusion, ...)"
        )
    n = len(inputs[0])
    warnings.warn(
        f"maps are zero for {what} {', '.join(map(str, numbers))} in {n} of {n} examples: {why}",
        stacklevel=levels_up(),
    )


def _flat(maps: Tensor) -> Tensor:
    """Flatten maps (N, K, ...) to (N, K, numbers). Inputs (N,), such as a column of a table, give one number."""
    return maps.unsqueeze(-1).flatten(2)


def _warn_of_infinite(maps: tuple[Tensor, ...]) -> None:
    """Warn of maps with NaN or infinite values."""
    bad = torch.stack([~_flat(m).isfinite().all(2) for m in maps]).any(0)
    if bool(bad.any()):
        warnings.warn(
            f"{int(bad.sum())} of {bad.numel()} maps have NaN or infinite values; the usual cause is half precision: "
            "run the model and its inputs with .float()",
            stacklevel=levels_up(),
        )
