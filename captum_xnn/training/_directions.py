"""Count the directions in which a layer's output varies: how many x-features it can tell apart.

The last layers of a classifier of C classes vary in little more than C - 1 directions. More x-features than directions,
if they must differ from each other, follow the remaining noise. That noise says nothing about the output.

Conventions:
    M examples, Z (M, ...), taken as vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_xnn.activations._memmap import Rows

__all__ = ["directions"]

# Examples that are enough to count directions, evenly spread.
_EXAMPLES = 512


def directions(Z: Tensor | Rows, share: float = 0.99) -> int:
    """Return the fewest principal directions that hold a share of the variance.

    Args:
        Z: Activations (M, ...), in memory or on disk.
        share: Of the variance, below 1.

    Example:
        >>> one = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
        >>> directions(one * torch.tensor([[1.0, 2.0, -1.0]]))
        1
    """
    rows = torch.linspace(0, len(Z) - 1, min(len(Z), _EXAMPLES), device="cpu").round().long()
    off = Z[rows].flatten(1).float()
    off = off - off.mean(0)
    held = torch.linalg.eigvalsh((off @ off.mT).double()).flip(0).clamp(min=0).cumsum(0)
    return int((held < share * held[-1]).sum()) + 1
