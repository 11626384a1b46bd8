"""Inputs of a report: batches of texts or rows of a table, the words of their cells, and the outputs of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.layers._forward_args import format_forward_args
from captum_xnn.layers._lookup import unwrap
from captum_xnn.layers._outputs import outputs_of

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.attribution import XNNAttribution

__all__ = ["RowBatch", "Texts", "are_images", "model_outputs", "row_batches", "texts_of"]

Texts = Sequence[Sequence[str]] | Callable[[Tensor], Sequence[str]]

_BATCH = 64


class RowBatch(NamedTuple):
    """A batch of inputs that are no images."""

    inputs: Any
    """A tensor or a tuple of tensors; the page shows the first."""
    additional: Any
    """Further arguments of the model."""

    @property
    def first(self) -> Tensor:
        """The input that the page shows, (n, L, ...)."""
        first: Tensor = self.inputs[0] if isinstance(self.inputs, tuple) else self.inputs
        return first

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All positional arguments of the model."""
        inputs = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
        return (*inputs, *(format_forward_args(self.additional) or ()))


def row_batches(xnn: XNNAttribution, data: Any) -> Iterator[RowBatch]:
    """Yield the inputs of a data set in batches.

    Args:
        xnn: Its ``unpack`` finds the inputs in a batch.
        data: A tensor (M, L, ...), a tuple of tensors, or an iterable of batches.

    Raises:
        ValueError: If a batch holds no tensor with a dimension after that of examples.
    """
    if isinstance(data, Tensor):
        batches: Iterable[RowBatch] = (RowBatch(part, None) for part in torch.split(data, _BATCH))
    elif isinstance(data, tuple):
        batches = (RowBatch(parts, None) for parts in zip(*(torch.split(t, _BATCH) for t in data), strict=True))
    else:
        batches = (RowBatch(*xnn.unpack(batch)) for batch in data)
    for batch in batches:
        if not isinstance(batch.first, Tensor) or batch.first.dim() < 2:
            given = tuple(batch.first.shape) if isinstance(batch.first, Tensor) else type(batch.first).__name__
            raise ValueError(
                f"the inputs are {given}, and a report needs images, tokens or input features, (N, L, ...); stack "
                "single numbers to columns"
            )
        yield batch


def are_images(xnn: XNNAttribution, data: Any) -> bool:
    """Whether the first batch of a data set is one tensor of images (N, C, H, W), with C = 1 or 3.

    Args:
        xnn: Its ``unpack`` finds the inputs in a batch.
        data: As :func:`row_batches` takes it.
    """
    if isinstance(data, Tensor):
        return data.dim() == 4
    if isinstance(data, tuple) and data and all(isinstance(part, Tensor) for part in data):
        # Images in a tuple are batches that the error of image_batches explains.
        return all(part.dim() == 4 for part in data)
    try:
        inputs = xnn.unpack(next(iter(data)))[0]
    except (StopIteration, TypeError, KeyError):
        return True  # the gallery raises the error that names the problem
    inputs = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
    return not isinstance(inputs, Tensor) or inputs.dim() == 4 or inputs.dim() < 2


def model_outputs(xnn: XNNAttribution, *arguments: Any) -> Tensor:
    """Compute all outputs of the model, (N, ...), on the CPU.

    Args:
        xnn: The attribution of the model.
        arguments: All positional arguments of the model.
    """
    return outputs_of(unwrap(xnn.model), arguments, xnn.prediction_transform).cpu()


def displayed(rows: Tensor, display: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Turn rows of a table into the values that the page shows.

    Args:
        rows: Rows (N, D), as the model takes them.
        display: Function of such rows; None shows them as they are.

    Raises:
        ValueError: If the function changes the shape.

    Example:
        >>> displayed(torch.tensor([[-1.0, 2.0]]), lambda z: 10 * z + 50)
        tensor([[40., 70.]])
    """
    rows = rows.detach().cpu()
    shown = rows if display is None else display(rows)
    if shown.shape != rows.shape:
        raise ValueError(
            f"display= turns rows {tuple(rows.shape)} into {tuple(shown.shape)}; return one value for each, such as "
            "lambda z: z * std + mean"
        )
    return shown


def texts_of(batch: RowBatch, first: int, tokens: Texts | None, names: Sequence[str] | None) -> list[list[str]]:
    """Return the texts of the cells of each example of a batch.

    Args:
        batch: The inputs.
        first: Index of the batch's first example in the data.
        tokens: Texts of the tokens of each example, or a function of one example's input.
        names: Names of the input features, if there are no tokens.

    Raises:
        ValueError: If there are fewer texts than examples, or more texts than cells.
    """
    x = batch.first
    n, cells = len(x), x.shape[1]
    if tokens is None:
        names = [f"input {i + 1}" for i in range(cells)] if names is None else list(names)
        if len(names) != cells:
            raise ValueError(
                f"there are {len(names)} input_names for {cells} input features; pass a name for each, in their order"
            )
        return [list(map(str, names))] * n
    if callable(tokens):
        cells_of_each = [list(map(str, tokens(row))) for row in x.cpu()]
    else:
        cells_of_each = [list(map(str, some)) for some in tokens[first : first + n]]
    if len(cells_of_each) != n or any(not 0 < len(texts) <= cells for texts in cells_of_each):
        lengths = [len(texts) for texts in cells_of_each]
        raise ValueError(
            f"tokens have lengths {lengths[:5]} for {n} examples of {cells} cells; pass the texts of each example, "
            "without padding"
        )
    return cells_of_each
