"""Collects what an explainer is fitted to: the activations Z of one layer and the model's own outputs.

One pass over the data serves every target. It costs what a plain inference loop costs, plus the copies.
All tensors are kept in memory on the CPU: M x D x 4 bytes in float32, 66 MB for 8,050 examples of 2,048 dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_xnn._compat import format_forward_args
from captum_xnn.host import OutputTransform, find_layer, read_layer, untouched, unwrap

__all__ = ["Activations", "Unpack", "checked", "collect", "first_of_batch"]

Unpack = Callable[[Any], tuple[Any, Any]]


class Activations(NamedTuple):
    """Activations of a layer and the outputs of the model, example by example."""

    Z: Tensor
    """Output of the layer, (M, ...), in the model's dtype, on the CPU."""
    y_hat: Tensor
    """Output of the model, (M,) or (M, C), usually logits, on the CPU."""
    layer: str
    """Dotted name of the layer."""


def first_of_batch(batch: Any) -> tuple[Any, Any]:
    """Returns the model's inputs and its additional arguments (here always None) from one batch of a loader.

    A tensor is the inputs; of a tuple or list the first entry is, and what follows (labels) is ignored. Several inputs
    are a tuple or list of their own in the first place.

    Args:
        batch: What a data loader yields.

    Raises:
        TypeError: If the batch is anything else.

    Example:
        >>> first_of_batch([torch.zeros(2, 3), torch.tensor([0, 1])])[0].shape
        torch.Size([2, 3])
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], (Tensor, tuple, list)):
        inputs = batch[0]
        return (tuple(inputs) if isinstance(inputs, list) else inputs), None
    raise TypeError(
        f"expected batches that are a tensor or begin with the inputs, got {type(batch).__name__}; pass unpack=, "
        "a function from a batch to (inputs, additional_forward_args)"
    )


def _batches(data: Any, batch_size: int, unpack: Unpack) -> Iterator[tuple[Any, Any]]:
    """Yields (inputs, additional arguments) from a tensor, a tuple of tensors (several inputs), or a loader."""
    if isinstance(data, Tensor):
        for part in torch.split(data, batch_size) if len(data) else ():
            yield part, None
    elif isinstance(data, tuple) and data and all(isinstance(x, Tensor) for x in data):
        for parts in zip(*(torch.split(x, batch_size) for x in data), strict=True):
            yield parts, None
    elif isinstance(data, Iterable):
        yield from map(unpack, data)
    else:
        raise TypeError(
            f"expected training data as a tensor, a tuple of tensors or an iterable of batches, got "
            f"{type(data).__name__}; wrap it in a torch.utils.data.DataLoader"
        )


def _moved(values: Any, device: torch.device) -> tuple[Any, ...]:
    """Returns copies on the device, so that a model which works in place does not change the user's data."""
    many = values if isinstance(values, tuple) else (values,)
    return tuple(v.to(device, copy=True) if isinstance(v, Tensor) else v for v in many)


def checked(Z: Tensor, y_hat: Any, name: str, first: int = 0) -> tuple[Tensor, Tensor]:
    """Returns both tensors as they are, after checking that they are finite and belong to the same examples.

    Args:
        Z: Output of the layer, (N, ...).
        y_hat: Output of the model, which should be a tensor (N, ...).
        name: What to call the layer in errors.
        first: Number of the first example, for errors.

    Raises:
        TypeError: If the model's output is no tensor.
        ValueError: If rows do not match, or anything is NaN or infinite.
    """
    if not isinstance(y_hat, Tensor):
        raise TypeError(
            f"expected the model to return one tensor, got {type(y_hat).__name__}; pass prediction_transform=, a "
            "function that picks the logits, such as `lambda output: output['logits']`"
        )
    if y_hat.dim() == 0 or len(Z) != len(y_hat):
        rows = len(y_hat) if y_hat.dim() else "no"
        raise ValueError(
            f"expected one row per example from layer {name!r} and from the model, got {len(Z)} and {rows} rows; "
            "reshape the layer's output in output_transform= so that examples come first"
        )
    for what, values in ((f"layer {name!r}", Z), ("the model", y_hat)):
        if not torch.isfinite(values).all():
            bad = first + int((~torch.isfinite(values)).reshape(len(values), -1).any(1).nonzero()[0])
            raise ValueError(
                f"expected finite outputs of {what}, got NaN or infinity in example {bad}; look for NaN in that input, "
                "or run the model in float32 if it overflows in half precision"
            )
    return Z, y_hat


def collect(
    model: nn.Module,
    layer: str | nn.Module,
    data: Any,
    *,
    unpack: Unpack = first_of_batch,
    output_transform: OutputTransform | None = None,
    prediction_transform: OutputTransform | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Activations:
    """Returns the layer's activations and the model's outputs on all of the data, in its order.

    The model runs in evaluation mode without gradients, and is left as it was found. Tensors in the batches are
    moved to the model's device.

    Args:
        model: The model to explain.
        layer: One of its layers, by dotted name or as a module. Of several calls in one pass the last counts.
        data: Inputs as a tensor (M, ...), a tuple of such tensors for a model with several inputs, or an iterable of
            batches such as a DataLoader.
        unpack: Turns a batch of an iterable into (inputs, additional_forward_args).
        output_transform: Turns the layer's raw output into one tensor (N, ...), for layers that return tuples or dicts.
        prediction_transform: The same for the model's output.
        batch_size: Examples per forward pass where data are tensors.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If there are no data, or if activations or outputs are NaN or infinite.
        LayerNotFoundError: If the model has no such layer.
        LayerNotReachedError: If the layer never runs.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> found = collect(model, "1", torch.ones(10, 4))
        >>> found.Z.shape, found.y_hat.shape
        (torch.Size([10, 3]), torch.Size([10, 2]))
    """
    model = unwrap(model)
    name, module = find_layer(model, layer)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    Zs: list[Tensor] = []
    y_hats: list[Tensor] = []
    total = len(data) if isinstance(data, Sized) and not isinstance(data, (Tensor, tuple)) else None
    with torch.inference_mode(False), untouched(model), torch.no_grad():
        batches = _batches(data, batch_size, unpack)
        for inputs, additional in tqdm(batches, f"activations of {name}", total, disable=not progress, leave=False):
            arguments = _moved(inputs, device) + _moved(format_forward_args(additional) or (), device)
            Z, output = read_layer(model, module, arguments, name=name, output_transform=output_transform)
            y_hat = output if prediction_transform is None else prediction_transform(output)
            Z, y_hat = checked(Z, y_hat, name, sum(map(len, y_hats)))
            Zs.append(Z.cpu())
            y_hats.append(y_hat.cpu())
    if not Zs:
        raise ValueError(
            "expected examples to collect activations from, got none; check that the loader is not empty or, if it is "
            "a generator, not used up already"
        )
    shapes = sorted({tuple(Z.shape[1:]) for Z in Zs})
    if len(shapes) > 1:
        raise ValueError(
            f"expected layer {name!r} to give every example the same shape, got {shapes[:3]}; pool over the varying "
            "dimension in output_transform=, such as `lambda output: output.mean(1)`"
        )
    return Activations(torch.cat(Zs), torch.cat(y_hats), name)
