r"""The shares by which a winning neuron divides its probability among its children, the neurons it is computed from.

A neuron i of an affine layer wins with probability :math:`P_i`. Given this, its child j wins with probability

.. math::
    P(j|i) = \frac{a_j w^+_{ij}}{Z_i}, \qquad Z_i = \sum_k a_k w^+_{ik}, \qquad P_j = a_j \sum_i w^+_{ij} P_i / Z_i

with activations :math:`a \ge 0` and :math:`w^+ = \max(w, 0)`. The bias gets no share. If :math:`Z_i = 0`, no child is
active, and the probability of i is lost. P is linear in the probabilities above, so that they can be added, subtracted
and batched.

The formula assumes nonnegative activations. It breaks at the pixels and after GELU. There, one of three settings says
how negative activations count:

- ``excitatory``: every positive product counts, :math:`\max(a_j w_{ij}, 0)`, also a product of two negative factors;
- ``clamp``: negative activations get no share;
- ``raw``: the formula as it stands; shares may be negative, and are large where products cancel.

:mod:`captum_xnn.excitation_bp._operations` computes the shares of each kind of layer.

Conventions:
    p is the probability of a layer's output, in the shape of the output. Half precision is computed in float32.

Reference:
    Zhang, Bargal, Lin, Brandt, Shen, Sclaroff, "Top-Down Neural Attention by Excitation Backprop", International
    Journal of Computer Vision, 2018, section 3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # shares get kept tensors, a setting and memory, and make none
    from captum_xnn.excitation_bp._kept_tensor import KeptTensor
    from captum_xnn.excitation_bp._settings import Negative
    from captum_xnn.excitation_bp._workspace import Workspace

__all__ = ["Affine", "Descent", "Weighted", "accurate", "guarded", "unbroadcast", "without_zeros"]


@dataclass(frozen=True)
class Affine(ABC):
    """An affine operation with the input a of its run."""

    a: KeptTensor

    @abstractmethod
    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Compute the probabilities of the input for each of K targets, in separate memory.

        Args:
            p: Probabilities of the output for each target.
            descent: The setting ``negative``, and memory.
        """


class Weighted(Affine):
    """An affine operation with weights of either sign, which has an opposite."""

    @abstractmethod
    def opposite(self) -> Weighted:
        """Return the operation with the weights -W."""

    @abstractmethod
    def turned(self, sign: Tensor, shape: Sequence[int]) -> Weighted:
        """Multiply the operation by a constant; only the sign of the constant matters.

        Args:
            sign: The constant, in a shape that broadcasts with the output.
            shape: Shape of the output.
        """


@dataclass
class Descent:
    """State that all operations share while probability goes down a graph."""

    negative: Negative
    """Treatment of negative activations."""
    workspace: Workspace
    """Memory for intermediate results."""
    is_spent: bool = False
    """Whether only the current operation uses its p, so that it may overwrite p."""


def guarded(p: Tensor, Z: Tensor, *, signed: bool = True) -> Tensor:
    """Compute p / Z, and 0 where Z is 0: such a neuron has no active child.

    An epsilon in the denominator would lose mass everywhere, so there is none. A Z so small that the quotient could
    overflow counts as 0: in float32 below 8e-31, as in the tail of a SiLU.

    Args:
        p: Probabilities.
        Z: Denominators, of the same shape.
        signed: Whether Z may be negative. Nonnegative Z takes less time.

    Example:
        >>> guarded(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 2.0]))
        tensor([0.0000, 0.2500])
    """
    return p / without_zeros(Z if signed else Z.clone(), signed)


def without_zeros(Z: Tensor, signed: bool) -> Tensor:
    """Replace 0 in Z by infinity, so that quotients are 0 there. A Z that is not signed is overwritten.

    Args:
        Z: Denominators.
        signed: Whether Z may be negative.
    """
    least = float(torch.finfo(Z.dtype).tiny) * 2.0**26
    return Z.masked_fill(Z.abs() < least, math.inf) if signed else torch.threshold_(Z, least, math.inf)


def accurate(x: Tensor) -> Tensor:
    """Convert x to the precision in which shares are computed: float32 for half precision.

    Args:
        x: Any floating-point tensor.

    Example:
        >>> accurate(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unbroadcast(p: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum p over the dimensions along which a tensor of the given shape was repeated.

    Args:
        p: Probabilities of the repeated tensor.
        shape: Shape of the tensor itself.

    Example:
        >>> unbroadcast(torch.ones(2, 3), (3,))
        tensor([2., 2., 2.])
    """
    ahead = p.dim() - len(shape)
    summed = [i for i in range(p.dim()) if i < ahead or (shape[i - ahead] == 1 and p.shape[i] != 1)]
    return p.sum(summed, keepdim=True).reshape(tuple(shape)) if summed else p
