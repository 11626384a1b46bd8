r"""Faithfulness: how well the x-features give back what the model says (F_reg and F_cls).

Conventions:
    M examples, C outputs of the model, in logits.

Metrics:
    :func:`regression_faithfulness`, F_reg: mean absolute difference between surrogate and prediction. In logits, 0 is
    best. :func:`error_floor` says below what no x-features can come when several outputs are explained by fewer.
    :func:`classification_faithfulness`, F_cls: share of examples whose predicted class stays when the surrogate is put
    in the place of the prediction. 1 is best.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["classification_faithfulness", "error_floor", "regression_faithfulness"]


def regression_faithfulness(surrogate: Tensor, prediction: Tensor) -> float:
    r"""Returns F_reg, :math:`\frac1M \sum_m |\bar y^{(m)} - \hat y^{(m)}|`, in logits.

    Args:
        surrogate: What the x-features give, (M,) or (M, C); with several outputs the mean is over these as well.
        prediction: What the model gives, of the same shape.

    Raises:
        ValueError: If shapes differ or there are no examples.

    Example:
        >>> regression_faithfulness(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5]))
        0.5
    """
    if surrogate.shape != prediction.shape or not surrogate.numel():
        raise ValueError(
            f"expected surrogate and prediction of one shape, with examples, got {tuple(surrogate.shape)} and "
            f"{tuple(prediction.shape)}; reshape them or check the data"
        )
    return float((surrogate.double() - prediction.double()).abs().mean())


def classification_faithfulness(logits: Tensor, surrogate: Tensor, target: int | Sequence[int]) -> float:
    """Returns F_cls, the share of examples whose predicted class stays the same, in [0, 1].

    An example whose surrogate or logits are NaN has no predicted class, and counts as one that changed.

    Args:
        logits: All outputs of the model, (M, C).
        surrogate: What the x-features give for the target output, (M,), or for several, (M, C').
        target: Which output the surrogate stands for, or which several.

    Raises:
        ValueError: If the model has a single output, which names no class, there are no examples, a target is out of
            range, or the surrogate is not of these targets.

    Example:
        >>> classification_faithfulness(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([3.0, 0.0]), 0)
        0.0
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits (M, C) of C > 1 classes, got {tuple(logits.shape)}; for a single output use "
            "regression_faithfulness"
        )
    M, C = logits.shape
    columns = [target] if isinstance(target, int) else list(target)
    if not all(0 <= c < C for c in columns) or len({*columns}) != len(columns):
        raise ValueError(f"expected different targets from 0 to {C - 1}, got {columns}; name outputs of the model")
    if not M or surrogate.shape not in ((M, len(columns)), (M,) * (len(columns) == 1)):
        raise ValueError(
            f"expected a surrogate ({M}, {len(columns)}) of M > 0 examples and {len(columns)} targets, got "
            f"{tuple(surrogate.shape)}; pass one column for each target"
        )
    replaced = logits.clone()
    replaced[:, columns] = surrogate.reshape(M, -1).to(logits)
    # argmax takes a NaN for the largest number.
    same = (replaced.argmax(1) == logits.argmax(1)) & ~(replaced.isnan() | logits.isnan()).any(1)
    return float(same.double().mean())


def error_floor(prediction: Tensor, n: int) -> float:
    r"""Returns the least mean squared error, summed over outputs, that any n x-features with a linear head can have.

    It is the sum of the C - n smallest eigenvalues of the outputs' covariance: n x-features span n directions at most.
    0 where n is at least C.

    Args:
        prediction: Outputs that are explained jointly, (M, C).
        n: Number of x-features.

    Raises:
        ValueError: If there are fewer than two examples, or the shape is another.

    Example:
        >>> error_floor(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]]), 1)
        0.125
    """
    if prediction.dim() != 2 or len(prediction) < 2:
        raise ValueError(f"expected outputs (M, C) of two examples or more, got {tuple(prediction.shape)}; pass more")
    values = torch.linalg.eigvalsh(torch.cov(prediction.T.double(), correction=0).reshape(2 * prediction.shape[1:]))
    return float(values[: max(prediction.shape[1] - n, 0)].clamp(min=0).sum())
