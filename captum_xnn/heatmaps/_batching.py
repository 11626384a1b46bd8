"""Draw the maps of a batch whose examples belong to several networks, and join them in the form of the inputs.

Conventions:
    N examples, K maps of each, (N, K, ...).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.heatmaps._from_captum import FromCaptum
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.heatmaps._network import ExplanationNetwork, cut_off
from captum_xnn.heatmaps._rows_of_settings import rows_of_settings
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._forward_args import format_forward_args, format_tensors
from captum_xnn.layers._stacklevel import levels_up

__all__ = ["Part", "copied", "draw", "in_shape_of", "like"]


class Part(NamedTuple):
    """Examples with the same explainer, so that one network draws their maps."""

    network: ExplanationNetwork
    """From the model's inputs to the outputs to draw."""
    features: Sequence[int]
    """Numbers of the K outputs to draw."""
    rows: list[int]
    """Row numbers of the examples."""
    slopes: Tensor | None = None
    """Slopes of these examples, (n, ...), if the network takes them as its last argument."""


def draw(
    heatmap: Heatmap,
    parts: Sequence[Part],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    internal_batch_size: int | None,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Draw the maps of all examples, (N, K, ...) for each input; warn once of maps that are zero or not finite.

    Args:
        heatmap: A backend.
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
        for network, features, rows, slopes in parts:
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

    maps = tuple(m.contiguous() for m in gathered(drawn(), n))
    _warn_of_infinite(maps)
    blank = torch.stack([(_flat(m) == 0).all(2).all(0) for m in maps]).all(0)
    if bool(blank.any()):
        _warn_of_blank(blank, heatmap, parts, inputs, additional, settings)
    return maps


def _warn_of_blank(
    blank: Tensor,
    heatmap: Heatmap,
    parts: Sequence[Part],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    settings: dict[str, Any],
) -> None:
    """Warn of x-features with zero maps in all examples, and why; raise if no gradient reaches the inputs."""
    network, _, rows, slopes = parts[0]
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
        f"expected maps that are not zero, got zeros for {what} {', '.join(map(str, numbers))} in {n} of {n} "
        f"examples: {why}",
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


def copied(
    inputs: Tensor | tuple[Tensor, ...], additional_forward_args: Any
) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """Copy the inputs and further arguments into tuples, and check that all inputs have the same number of examples.

    The model gets copies because it may work in place, and because inference tensors take no gradients.

    Args:
        inputs: A tensor or a tuple of tensors.
        additional_forward_args: None, one argument, or a tuple of them.

    Raises:
        TypeError: If an input is not a tensor.
        ValueError: If there is no example, or the inputs differ in the number of examples.
    """
    tensors: tuple[Tensor, ...] = format_tensors(inputs)
    if not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(
            f"inputs are a tuple of {', '.join(type(x).__name__ for x in tensors)}; pass one tensor, or a tuple of "
            "tensors in the order of forward, and everything else as additional_forward_args"
        )
    if not tensors or any(x.dim() == 0 or len(x) == 0 or len(x) != len(tensors[0]) for x in tensors):
        raise ValueError(
            f"inputs need examples in dimension 0, at least one and equally many, and their shapes are "
            f"{[tuple(x.shape) for x in tensors]}; add the batch dimension with x[None]"
        )
    given = format_forward_args(additional_forward_args)
    with torch.inference_mode(False):
        more = given and tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in given)
        return tuple(x.detach().clone() for x in tensors), more


def like(inputs: Any, maps: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Return the maps as the inputs are given: one tensor, or a tuple. Several maps are always a tuple.

    Args:
        inputs: A tensor or a tuple of tensors.
        maps: Maps of each input, or of each tensor of a layer.
    """
    return maps if len(maps) > 1 or (isinstance(inputs, tuple) and len(inputs) == 1) else maps[0]


def in_shape_of(inputs: tuple[Tensor, ...], maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Bring maps (N, 1, ...) to the shape of the inputs.

    The map of a layer is divided equally among the channels of an image or a volume. The map of an embedding is summed
    over its dimensions.

    Args:
        inputs: Tensors (N, ...).
        maps: Maps of each input, or of each tensor of a layer.

    Raises:
        ValueError: If the maps of a layer have another shape.
    """
    image = next((x for x in inputs if x.dim() in (4, 5)), inputs[0])
    likes = inputs if len(maps) == len(inputs) else (image,) * len(maps)
    return tuple(_shaped(m[:, 0], x).contiguous() for m, x in zip(maps, likes, strict=True))


def _shaped(m: Tensor, x: Tensor) -> Tensor:
    """Bring the map of one input to its shape."""
    if m.shape == x.shape:
        return m
    if m.dim() == x.dim() > 2:
        differing = [d for d in range(m.dim()) if m.shape[d] != x.shape[d]]
        if len(differing) == 1 and m.shape[differing[0]] == 1:  # the channels, first or last
            return m.expand_as(x) / x.shape[differing[0]]
    if m.shape[: x.dim()] == x.shape:  # an embedding of token ids
        return m.flatten(x.dim()).sum(-1)
    raise ValueError(
        f"feature= needs maps in the input's shape {tuple(x.shape)}, and the method gives {tuple(m.shape)}, the shape "
        "of its layer; leave feature out for such maps, or draw at the inputs, as with heatmap=InputXGradient"
    )
