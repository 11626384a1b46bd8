"""Scales with which training standardises Z and the outputs.

Conventions:
    M examples, D dimensions of Z, C explained outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_xnn.activations._memmap import Rows, chunks
from captum_xnn.models._base import Scaling

__all__ = ["scaling"]


def scaling(Z: Tensor | Rows, y: Tensor) -> Scaling:
    """Compute the means and standard deviations that standardise Z and y.

    All dimensions of Z share one scale, the root of their mean variance. A dimension that varies little in the model
    therefore also has little weight here. The x-features generalise better than with a scale for each dimension
    (benchmarks/degeneration.py).

    Args:
        Z: Activations (M, D) or (M, channels, H, W), in memory or on disk.
        y: Outputs (M, C).

    Example:
        >>> made = scaling(torch.tensor([[0.0, 4.0], [2.0, 2.0]]), torch.tensor([[1.0], [3.0]]))
        >>> made.Z_mean, made.Z_std
        (tensor([1., 3.]), tensor([1.4142, 1.4142]))
    """
    # One pass, relative to the mean of the first chunk: a large mean then costs no digits.
    shift = _channels_last(next(iter(chunks(Z)))).mean(0)
    total, square, count = torch.zeros(len(shift), dtype=torch.float64, device="cpu"), 0.0, 0
    for chunk in chunks(Z):
        off = _channels_last(chunk) - shift
        total += off.sum(0).cpu()
        square += float(off.flatten() @ off.flatten())
        count += len(off)
    beside = total / count
    variance = max(0.0, square - count * float(beside @ beside)) / (count - 1) / len(beside)
    mean = shift + beside.to(shift)
    return Scaling(mean, mean.new_tensor(math.sqrt(variance)).expand_as(mean), y.mean(0), y.std(0))


def _channels_last(Z: Tensor) -> Tensor:
    """Reshape (M, channels, H, W) to (M * H * W, channels); leave (M, D) unchanged."""
    return Z.flatten(2).transpose(1, 2).flatten(0, 1) if Z.dim() > 2 else Z
