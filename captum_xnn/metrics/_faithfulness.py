r"""Faithfulness: how closely the surrogate reproduces the model's prediction (F_reg and F_cls).

Conventions:
    M examples, C outputs of the model, in logits.

Metrics:
    :func:`regression_faithfulness`, F_reg: mean absolute difference between surrogate and prediction. In logits, 0 is
    best. :func:`error_floor` is the smallest squared error that x-features can reach if they are fewer than the
    outputs they explain.
    :func:`classification_faithfulness`, F_cls: share of examples whose predicted class stays when the surrogate
    replaces the prediction. 1 is best.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_xnn.layers._targets import Target, predicted_classes

__all__ = [
    "Faithfulness",
    "FaithfulnessStream",
    "classification_faithfulness",
    "error_floor",
    "regression_faithfulness",
]


class Faithfulness(NamedTuple):
    """Faithfulness of the x-features on some data."""

    f_reg: float
    """Mean absolute difference between surrogate and prediction, in logits."""
    f_cls: float | None
    """Share of examples whose predicted class stays; None for models with a single output."""
    examples: int

    @classmethod
    def of(
        cls, surrogate: Tensor, prediction: Tensor, logits: Iterable[Tensor] | None = None, target: Target = None
    ) -> Faithfulness:
        """Compute F_reg, and F_cls where the model's outputs are classes.

        Args:
            surrogate: Bias plus contributions, (M,).
            prediction: The explained output, (M,).
            logits: All outputs of the model, in parts (m, ...), which together have M rows; None for no classes.
            target: The explained output.

        Raises:
            ValueError: If shapes differ or there are no examples.

        Example:
            >>> parts = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])
            >>> Faithfulness.of(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0]), parts, 0)
            Faithfulness(f_reg=1.0, f_cls=0.5, examples=2)
        """
        stream, first = FaithfulnessStream(target), 0
        if logits is None:
            stream.update(surrogate, prediction)
        for part in logits or ():
            rows = slice(first, first + len(part))
            stream.update(surrogate[rows], prediction[rows], part)
            first += len(part)
        return stream.compute()


class FaithfulnessStream:
    """Adds up F_reg and F_cls over batches.

    Args:
        target: The explained output. F_cls is of a class only.

    Example:
        >>> stream = FaithfulnessStream(0)
        >>> stream.update(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([[1.0, 2.0]]))
        >>> stream.update(torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor([[2.0, 1.0]]))
        >>> stream.compute(), stream.mean_deviation()
        (Faithfulness(f_reg=1.0, f_cls=0.5, examples=2), 0.5)
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.examples = 0
        self.misses = 0.0
        """Sum of |prediction - surrogate|."""
        self.same: float | None = None
        """Number of examples whose predicted class stays; None unless outputs are classes."""
        self.predictions: list[Tensor] = []

    def update(self, surrogate: Tensor, prediction: Tensor, logits: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            surrogate: Bias plus contributions, (n,).
            prediction: The explained output, (n,).
            logits: All outputs of the model, (n, ...); None for no classes.
        """
        n = len(prediction)
        if not n:
            return
        self.examples += n
        self.misses += _misses(surrogate, prediction)
        self.predictions.append(prediction.double())
        if logits is not None and isinstance(self.target, int) and predicted_classes(logits) is not None:
            self.same = (self.same or 0.0) + classification_faithfulness(logits, surrogate, self.target) * n

    def compute(self) -> Faithfulness:
        """Return the faithfulness on all batches.

        Raises:
            ValueError: If there are no examples.
        """
        self._check()
        return Faithfulness(
            self.misses / self.examples, None if self.same is None else self.same / self.examples, self.examples
        )

    def mean_deviation(self) -> float:
        """Compute the mean absolute difference between the predictions and their mean, in logits.

        It is the F_reg of a guess that always gives the mean prediction.

        Raises:
            ValueError: If there are no examples.
        """
        self._check()
        y_hat = torch.cat(self.predictions)
        return float((y_hat - y_hat.mean()).abs().mean())

    def _check(self) -> None:
        if not self.examples:
            raise ValueError("there are no examples, and faithfulness is a mean over them; pass at least one")


def regression_faithfulness(surrogate: Tensor, prediction: Tensor) -> float:
    r"""Compute F_reg, :math:`\frac1M \sum_m |\bar y^{(m)} - \hat y^{(m)}|`, in logits.

    Args:
        surrogate: Bias plus contributions, (M,) or (M, C). With several outputs the mean is over outputs as well.
        prediction: The model's outputs, of the same shape.

    Raises:
        ValueError: If shapes differ or there are no examples.

    Example:
        >>> regression_faithfulness(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5]))
        0.5
    """
    return _misses(surrogate, prediction) / surrogate.numel()


def _misses(surrogate: Tensor, prediction: Tensor) -> float:
    """Compute the sum of |prediction - surrogate|, after checking the shapes."""
    if surrogate.shape != prediction.shape or not surrogate.numel():
        raise ValueError(
            f"surrogate is {tuple(surrogate.shape)} and prediction {tuple(prediction.shape)}; pass both in the same "
            "shape, with at least one example"
        )
    return float((surrogate.double() - prediction.double()).abs().sum())


def classification_faithfulness(logits: Tensor, surrogate: Tensor, target: int | Sequence[int]) -> float:
    """Compute F_cls, the share of examples whose predicted class stays the same, in [0, 1].

    An example with a NaN in its surrogate or logits has no predicted class, and counts as changed.

    Args:
        logits: All outputs of the model, (M, C).
        surrogate: Bias plus contributions for one target, (M,), or for several, (M, C').
        target: The output or outputs that the surrogate replaces.

    Raises:
        ValueError: If the model has a single output and so no classes, if there are no examples, if a target is out of
            range or repeats, or if the surrogate does not have one column for each target.

    Example:
        >>> classification_faithfulness(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([3.0, 0.0]), 0)
        0.0
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits are {tuple(logits.shape)}, and F_cls needs those of several classes, (M, C); for a single output "
            "use regression_faithfulness"
        )
    M, C = logits.shape
    columns = [target] if isinstance(target, int) else list(target)
    if not all(0 <= c < C for c in columns) or len({*columns}) != len(columns):
        raise ValueError(f"targets are {columns}; pass different ones from 0 to {C - 1}, each output of the model once")
    if not M or surrogate.shape not in ((M, len(columns)), (M,) * (len(columns) == 1)):
        raise ValueError(
            f"surrogate is {tuple(surrogate.shape)} for {M} examples and {len(columns)} targets; pass at least one "
            "example, and one column for each target"
        )
    replaced = logits.clone()
    replaced[:, columns] = surrogate.reshape(M, -1).to(logits)
    # argmax takes a NaN for the largest number.
    same = (replaced.argmax(1) == logits.argmax(1)) & ~(replaced.isnan() | logits.isnan()).any(1)
    return float(same.double().mean())


def error_floor(prediction: Tensor, n: int) -> float:
    r"""Compute the smallest mean squared error, summed over outputs, that n x-features with a linear head can reach.

    It is the sum of the C - n smallest eigenvalues of the outputs' covariance, because n x-features span at most n
    directions. It is 0 if n is at least C.

    Args:
        prediction: Outputs that are explained jointly, (M, C).
        n: Number of x-features.

    Raises:
        ValueError: If there are fewer than two examples, or the shape is not (M, C).

    Example:
        >>> error_floor(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]]), 1)
        0.125
    """
    if prediction.dim() != 2 or len(prediction) < 2:
        raise ValueError(f"outputs are {tuple(prediction.shape)}; pass (M, C) of two examples or more")
    values = torch.linalg.eigvalsh(torch.cov(prediction.T.double(), correction=0).reshape(2 * prediction.shape[1:]))
    return float(values[: max(prediction.shape[1] - n, 0)].clamp(min=0).sum())
