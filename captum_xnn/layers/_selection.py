"""The places of Z in a layer's raw output: found, and filled with other numbers.

A transform of the output may pick and rearrange numbers. It runs on the indices of the numbers in place of the numbers
themselves, and so shows where each number of Z comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.layers._nested import put_in, tensors_in

if TYPE_CHECKING:  # a selection gets its transform
    from captum_xnn.layers._read import OutputTransform

__all__ = ["Selection"]


class Selection(NamedTuple):
    """The places of Z in a layer's raw output.

    Example:
        >>> raw = (torch.zeros(2, 3), torch.ones(2, 3))
        >>> selection = Selection.of(raw, lambda output: output[1][:, :2], "lstm")
        >>> selection.put(torch.full((2, 2), 7.0))[1]
        tensor([[7., 7., 1.],
                [7., 7., 1.]])
    """

    Z: Tensor
    """The selected numbers, (N, ...)."""
    put: Callable[[Tensor], Any]
    """Makes a raw output with other numbers in the places of Z."""

    @classmethod
    def of(cls, raw: Any, transform: OutputTransform | None, name: str) -> Selection:
        """Find the numbers of Z in a raw output.

        Args:
            raw: The layer's output: a tensor, or a tuple, list or dict of tensors.
            transform: Turns the raw output into Z; None for a raw output that is Z.
            name: Name of the layer.

        Raises:
            TypeError: If the raw output is no tensor, and there is no transform.
            ValueError: If the transform calculates, or Z holds integers.
        """
        if transform is None:
            if not isinstance(raw, Tensor):
                raise TypeError(
                    f"layer {name!r} returns a {type(raw).__name__}; pass output_transform= to pick one tensor of it"
                )
            _check_dtype(raw, name)
            return cls(raw, lambda points: points)
        Z = transform(raw)
        _check_dtype(Z, name)
        for path, tensor in tensors_in(raw):
            if tensor is Z:
                return cls(Z, partial(put_in, raw, path))
        for path, tensor in tensors_in(raw):
            index = _indices(raw, path, tensor, transform, Z)
            if index is not None:
                return cls(Z, partial(_scattered, raw, path, tensor, index))
        raise ValueError(
            f"output_transform calculates with the output of layer {name!r}, but contributions need to put numbers "
            "back into this output; let it only pick or rearrange numbers (means over places are not needed: "
            "x-features group channels), or fit with autoencoder=SRAE"
        )


def _check_dtype(Z: Tensor, name: str) -> None:
    """Raise where Z holds integers."""
    if not Z.is_floating_point():
        raise ValueError(
            f"layer {name!r} gives {Z.dtype} numbers, which have no gradients; choose a layer behind the embedding"
        )


def _scattered(raw: Any, path: tuple[Any, ...], tensor: Tensor, index: Tensor, points: Tensor) -> Any:
    """Replace numbers in some places of one tensor of a nested output; return the new output."""
    own = index >= 0  # the others are zeros that the transform added
    changed = tensor.flatten().index_put((index[own],), points.flatten()[own])
    return put_in(raw, path, changed.reshape(tensor.shape))


def _indices(raw: Any, path: tuple[Any, ...], tensor: Tensor, transform: OutputTransform, Z: Tensor) -> Tensor | None:
    """Find the indices of Z's numbers in a tensor, in order; None if the transform calculates.

    Zeros that the transform puts beside the numbers, such as the padding of a packed sequence, have the index -1.
    """
    numbered = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).reshape(tensor.shape)
    try:
        found = transform(put_in(raw, path, numbered + 1))
        other = transform(put_in(raw, path, -(numbered + 1)))
    except (RuntimeError, TypeError):  # the transform needs one dtype for several tensors
        return None
    if not isinstance(found, Tensor) or found.shape != Z.shape or not torch.equal(found, -other):
        return None
    index, flat = found.flatten().round().long() - 1, Z.flatten()
    own = index >= 0
    picked = index[own]
    is_in_range = bool(((index >= -1) & (index < tensor.numel())).all())
    if not is_in_range or len(torch.unique(picked)) != len(picked):
        return None
    has_same_numbers = torch.equal(tensor.flatten()[picked], flat[own]) and not flat[~own].any()
    return index if has_same_numbers else None
