"""Some rows of a user's data, read again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from captum_xnn.activations._activations import Source
from captum_xnn.activations._batches import Batches
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._forward_args import format_forward_args

__all__ = ["SelectedRows"]

# Examples in a batch of the data.
_BATCH = 64


class SelectedRows:
    """Some rows of data that can be read again, as pairs of inputs and additional arguments.

    Args:
        source: The data.
        rows: Indices of the rows, ascending.

    Example:
        >>> some = SelectedRows(Source(torch.arange(100.0)[:, None], None), torch.tensor([1, 70]))
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
        for batch in batches.where(lambda first, after: bool(len(own(first, after)))):
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
