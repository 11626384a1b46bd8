r"""Sparsity: on how few pixels a map lies, and on how few x-features an output depends.

Conventions:
    N images, K x-features, d pixels (and channels) of a map. Only absolute values count, and no measure depends on
    their scale. A map of zeros is empty rather than sparse: both measures give it 0, as they give a constant map.

Reference:
    Hurley, Rickard, "Comparing Measures of Sparsity", 2009;
    Hoyer, "Non-negative Matrix Factorization with Sparseness Constraints", 2004.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_number", "gini", "hoyer"]


def gini(maps: Tensor) -> Tensor:
    r"""Compute the Gini index of each map, (N, K) in [0, 1 - 1/d], float64.

    .. math:: 1 - 2 \sum_{r=1}^{d} \frac{|c|_{(r)}}{\lVert c \rVert_1} \cdot \frac{d - r + 1/2}{d},
              \qquad |c|_{(1)} \le \dots \le |c|_{(d)}

    It is 0 if all pixels are equally strong, and 1 - 1/d if only one pixel is not zero.

    Args:
        maps: (N, K, ...).

    Raises:
        ValueError: If maps have no pixels, or are not finite.

    Example:
        >>> gini(torch.tensor([[[0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]]]))
        tensor([[0.7500, 0.0000]], dtype=torch.float64)

    Reference:
        Hurley, Rickard, 2009, Table 1.
    """
    values = _magnitudes(maps).sort(2).values
    d = values.shape[2]
    weight = (d - torch.arange(1, d + 1, device=maps.device, dtype=torch.float64) + 0.5) / d
    total = values.sum(2)
    index = 1 - 2 * (values @ weight) / torch.where(total > 0, total, 1)
    return torch.where(total > 0, index.clamp_min(0), 0)


def hoyer(maps: Tensor) -> Tensor:
    r"""Compute Hoyer's measure of each map, (N, K) in [0, 1], float64.

    .. math:: \frac{\sqrt d - \lVert c \rVert_1 / \lVert c \rVert_2}{\sqrt d - 1}

    It is 0 if all pixels are equally strong, and 1 if only one pixel is not zero. A map of one pixel in all gets 0.

    Args:
        maps: (N, K, ...).

    Raises:
        ValueError: If maps have no pixels, or are not finite.

    Example:
        >>> hoyer(torch.tensor([[[0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]]]))
        tensor([[1., 0.]], dtype=torch.float64)

    Reference:
        Hoyer, 2004, section 3.1.
    """
    values = _magnitudes(maps)
    root = values.shape[2] ** 0.5
    norm = values.square().sum(2).sqrt()
    if root == 1:
        return torch.zeros_like(norm)
    measure = (root - values.sum(2) / torch.where(norm > 0, norm, 1)) / (root - 1)
    return torch.where(norm > 0, measure.clamp(0, 1), 0)


def effective_number(contributions: Tensor) -> Tensor:
    r"""Compute on how many x-features each output depends, (N,) in [0, K], float64: the exponential of an entropy.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad p_i = \frac{|v_i E_i|}{\sum_j |v_j E_j|}

    It is 1 if a single x-feature contributes, K if all contribute equally, and 0 if all contributions are 0. It
    describes an explanation and does not rate it: ``Recipe.balance`` alone can bring it near K. For a whole class
    rather than single examples, average first: ``effective_number(contributions.abs().mean(0, keepdim=True))``.

    Args:
        contributions: v_i E_i, (N, K).

    Raises:
        ValueError: If contributions are not (N, K) with K > 0, or not finite.

    Example:
        >>> effective_number(torch.tensor([[2.0, -2.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]))
        tensor([2., 1., 0.], dtype=torch.float64)
    """
    if contributions.dim() != 2 or not contributions.shape[1]:
        raise ValueError(
            f"contributions are {tuple(contributions.shape)}, not (N, K) of K > 0 x-features; add a first dimension "
            "for a single example"
        )
    values = _magnitudes(contributions[None])[0]
    total = values.sum(1, keepdim=True)
    share = values / torch.where(total > 0, total, 1)
    return torch.where(total[:, 0] > 0, torch.exp(-torch.xlogy(share, share).sum(1)), 0)


def _magnitudes(maps: Tensor) -> Tensor:
    """Scale absolute values (N, K, d) so that the largest of each map is 1 and no square over- or underflows."""
    if maps.dim() < 3 or 0 in maps.shape[2:]:
        raise ValueError(f"maps are {tuple(maps.shape)}, not (N, K, ...) with pixels; keep the first two dimensions")
    if not bool(maps.isfinite().all()):
        raise ValueError("values are NaN or infinite; check whether the explainer's fit diverged")
    values = maps.double().abs().flatten(2)
    largest = values.amax(2, keepdim=True)
    return values / torch.where(largest > 0, largest, 1)
