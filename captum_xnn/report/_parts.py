r"""Parts: what each input of a table adds to the output through an x-feature.

.. math:: p_{kj} = \frac{v_k E_k}{E_k} m_{kj}, \qquad r_k = v_k E_k - \sum_j p_{kj}

The maps m of gradient methods sum to the x-feature less its value at their baseline, so these parts are in the unit of
the output, and the rest r is about the same in all examples. Maps without negative values, such as those of excitation
backprop, sum to 1: there the contribution is divided in proportion to the map. Maps of other methods have another unit
and give no parts.

Conventions:
    N examples, K x-features, L inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_up", "directions", "parts_of"]

# Share of the contributions' variance that the rest may have, and of their size with fewer examples than this. Maps of
# another unit leave more.
_REST, _FEW = 0.25, 3
# Correlation from which an input's direction is stated, and examples that it needs. Independent values of 20 examples
# reach it with probability .025, those of 8 with .21.
_CLEAR = 0.5
_EXAMPLES = 20


def parts_of(maps: Tensor, features: Tensor, contributions: Tensor) -> Tensor:
    """Divide contributions among inputs, (N, K, L).

    Args:
        maps: Maps (N, K, L), as the backend gives them.
        features: x-features (N, K).
        contributions: Contributions (N, K).

    Example:
        >>> maps = torch.tensor([[[3.0, -1.0]]])
        >>> parts_of(maps, torch.tensor([[2.0]]), torch.tensor([[4.0]])).tolist()
        [[[6.0, -2.0]]]
        >>> parts_of(maps.abs(), torch.tensor([[2.0]]), torch.tensor([[4.0]])).tolist()
        [[[3.0, 1.0]]]
    """
    maps, features, contributions = maps.double(), features.double(), contributions.double()
    unit = features if bool((maps < 0).any()) else maps.sum(2)
    return maps * torch.where(unit == 0, 0, contributions / torch.where(unit == 0, 1, unit))[:, :, None]


def add_up(parts: Sequence[Tensor], contributions: Sequence[Tensor]) -> bool:
    """Whether parts are in the unit of the output: what they leave to no input then hardly differs between examples.

    Args:
        parts: Parts (K, L) of each example.
        contributions: Contributions (K,) of each example.

    Example:
        >>> parts = [torch.tensor([[v, -3.0]]) for v in (4.0, 6.0, 9.0)]
        >>> add_up(parts, [part.sum(1) + 8 for part in parts])  # 8 at the baseline
        True
        >>> add_up([100 * part for part in parts], [part.sum(1) for part in parts])
        False
    """
    c = torch.stack(list(contributions)).double()
    rest = c - torch.stack([part.double().sum(1) for part in parts])
    size, left = (float(v.square().sum()) for v in (c, rest))
    if len(c) >= _FEW:
        size, left = (float((v - v.mean(0)).square().sum()) for v in (c, rest))
    return left <= _REST * size


def directions(values: Tensor, parts: Tensor) -> list[str]:
    """Say for each input whether examples with higher values have higher parts.

    Args:
        values: Values (N, L) of the inputs.
        parts: Parts (N, L) of one x-feature.

    Returns:
        For each input "raises", "lowers", or "" where neither is clear.

    Example:
        >>> values = torch.arange(20.0)[:, None]
        >>> directions(torch.cat([values, values, values], 1), torch.cat([values, -values, (values - 9.5) ** 2], 1))
        ['raises', 'lowers', '']
    """
    if len(values) < _EXAMPLES:
        return [""] * values.shape[1]
    x, y = (v.double() - v.double().mean(0) for v in (values, parts))
    size = x.norm(dim=0) * y.norm(dim=0)
    r = torch.where(size > 0, (x * y).sum(0) / torch.where(size > 0, size, 1), 0)
    return ["raises" if v >= _CLEAR else "lowers" if v <= -_CLEAR else "" for v in r.tolist()]
