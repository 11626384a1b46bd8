"""Faithfulness: how well the x-features give back what the model says (F_reg and F_cls).

Conventions:
    M examples, C outputs of the model, in logits.

Metrics:
    ``f_reg``: mean absolute difference between surrogate and prediction. In logits, 0 is best.
    ``f_cls``: share of examples whose predicted class stays when the surrogate replaces the prediction. 1 is best.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["f_cls", "f_reg"]


def f_reg(y_bar: Tensor, y_hat: Tensor) -> float:
    r"""Returns :math:`\frac1M \sum_m |\bar y^{(m)} - \hat y^{(m)}|`, in logits.

    Args:
        y_bar: Surrogate, (M,) or (M, C); with several outputs the mean is over these as well.
        y_hat: The model's prediction, of the same shape.

    Raises:
        ValueError: If shapes differ or there are no examples.

    Example:
        >>> import torch
        >>> f_reg(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5]))
        0.5
    """
    if y_bar.shape != y_hat.shape or not y_bar.numel():
        raise ValueError(
            f"expected surrogate and prediction of one shape, with examples, got {tuple(y_bar.shape)} and "
            f"{tuple(y_hat.shape)}; reshape them or check the data"
        )
    return float((y_bar - y_hat).abs().mean())


def f_cls(y_bar: Tensor, outputs: Tensor, target: int | Sequence[int]) -> float:
    """Returns the share of examples whose predicted class stays the same, in [0, 1].

    Args:
        y_bar: Surrogate of the target output, (M,), or of several, (M, C').
        outputs: All outputs of the model, (M, C).
        target: Which output the surrogate stands for, or which several.

    Raises:
        ValueError: If the model has a single output, which names no class.

    Example:
        >>> import torch
        >>> f_cls(torch.tensor([3.0, 0.0]), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0)
        0.0
    """
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        raise ValueError(
            f"expected outputs (M, C) of C > 1 classes, got {tuple(outputs.shape)}; for a single output use f_reg"
        )
    replaced = outputs.clone()
    columns = [target] if isinstance(target, int) else list(target)
    replaced[:, columns] = y_bar.reshape(len(outputs), -1).to(outputs)
    return float((replaced.argmax(1) == outputs.argmax(1)).double().mean())
