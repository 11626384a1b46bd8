r"""How much each x-feature matters to a score of the explanation: removal curves, Shapley values and completeness.

To remove an x-feature, set it to its mean over the training data. :math:`E_i` is standardised, so that mean is 0, and
the contribution :math:`v_i E_i` becomes 0.

Conventions:
    N examples, K x-features. ``kept`` is a boolean tensor (..., N, K), True where an x-feature stays. A *score* is a
    callable that computes the measured quantity, (..., N), from ``kept``. :func:`surrogate_score` scores the surrogate
    itself. Your own score may decode the kept x-features and run the rest of the model. Curves and values are float64.

Reference:
    Fel et al., "CRAFT: Concept Recursive Activation FacTorization for Explainability", 2023 (deletion and insertion);
    Shapley, "A Value for n-Person Games", 1953;
    Yeh et al., "On Completeness-aware Concept-Based Explanations in Deep Neural Networks", 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial
from typing import overload

import torch
from torch import Tensor

__all__ = [
    "area",
    "completeness",
    "contribution_order",
    "deletion",
    "insertion",
    "random_order",
    "shapley_values",
    "surrogate_score",
]

Score = Callable[[Tensor], Tensor]
_MOST_FEATURES = 16


def surrogate_score(contributions: Tensor, bias: Tensor | float = 0.0) -> Score:
    r"""Build the score :math:`b + \sum_{i\ \mathrm{kept}} v_i E_i`, a callable of ``kept`` (..., N, K).

    Args:
        contributions: v_i E_i, (N, K), in logits.
        bias: The output without the x-features, (N,) or one number, in logits.

    Example:
        >>> score = surrogate_score(torch.tensor([[3.0, 1.0]]), 0.5)
        >>> score(torch.tensor([[True, False]]))
        tensor([3.5000], dtype=torch.float64)
    """
    return lambda kept: torch.where(kept, contributions.double(), 0).sum(-1) + bias


def contribution_order(contributions: Tensor) -> Tensor:
    r"""Sort the x-features of each example by falling :math:`|v_i E_i|`, (N, K); ties keep their numbering.

    ``order.flip(1)`` is the reverse order. If contributions have both signs, the surrogate falls fastest in the order
    of falling :math:`v_i E_i`: ``contributions.argsort(1, descending=True)``.

    Args:
        contributions: v_i E_i, (N, K).

    Example:
        >>> contribution_order(torch.tensor([[1.0, -3.0, 2.0]]))
        tensor([[1, 2, 0]])
    """
    return contributions.abs().sort(dim=1, descending=True, stable=True).indices


def random_order(contributions: Tensor, *, seed: int) -> Tensor:
    """Draw a random order of the x-features for each example, (N, K): the control of :func:`contribution_order`.

    Args:
        contributions: (N, K); only shape and device count.
        seed: Seeds the draw. One seed gives the same order on every device.

    Example:
        >>> random_order(torch.zeros(1, 3), seed=0).sort().values
        tensor([[0, 1, 2]])
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(contributions.shape, generator=generator, dtype=torch.float64, device="cpu")
    return draws.argsort(1).to(contributions.device)


def deletion(score: Score, order: Tensor) -> Tensor:
    """Compute the scores after removing 0, 1, ... K x-features in the given order, (N, K+1).

    Args:
        score: Called once for each step, with ``kept`` (N, K).
        order: The x-features in the order of their removal, (N, K), a permutation in each row.

    Raises:
        ValueError: If a row of the order is not a permutation.

    Example:
        >>> contributions = torch.tensor([[1.0, 4.0]])
        >>> order = contributions.argsort(1, descending=True)
        >>> deletion(lambda kept: (contributions * kept).sum(1), order)
        tensor([[5., 1., 0.]], dtype=torch.float64)
    """
    rank = _ranks(order)
    return torch.stack([score(rank >= step).double() for step in range(order.shape[1] + 1)], 1)


def insertion(score: Score, order: Tensor) -> Tensor:
    """Compute the scores after inserting 0, 1, ... K x-features in the given order, (N, K+1).

    Args:
        score: Called once for each step, with ``kept`` (N, K).
        order: The x-features in the order of their insertion, (N, K), a permutation in each row.

    Raises:
        ValueError: If a row of the order is not a permutation.

    Example:
        >>> contributions = torch.tensor([[1.0, 4.0]])
        >>> order = contributions.argsort(1, descending=True)
        >>> insertion(lambda kept: (contributions * kept).sum(1), order)
        tensor([[0., 4., 5.]], dtype=torch.float64)
    """
    rank = _ranks(order)
    return torch.stack([score(rank < step).double() for step in range(order.shape[1] + 1)], 1)


def _ranks(order: Tensor) -> Tensor:
    """Compute the step at which the order reaches each x-feature, (N, K)."""
    if order.dim() != 2 or not bool((order.sort(1).values == torch.arange(order.shape[-1], device=order.device)).all()):
        raise ValueError(
            f"an order {tuple(order.shape)} is not (N, K) with each x-feature 0 to K-1 once in every row; make one "
            "with contributions.argsort(1, descending=True)"
        )
    return order.argsort(1)


def area(curve: Tensor) -> Tensor:
    """Compute the area under each curve over the share of x-features removed or inserted, (N,), in the scores' unit.

    The area is the trapezoidal mean of a curve. If the first x-features matter most, a deletion curve falls early and
    its area is small; the area of an insertion curve is then large.

    Args:
        curve: Curves from :func:`deletion` or :func:`insertion`, (N, K+1).

    Raises:
        ValueError: If there is no x-feature.

    Example:
        >>> area(torch.tensor([[5.0, 1.0, 0.0]]))
        tensor([1.7500], dtype=torch.float64)
    """
    if curve.dim() != 2 or curve.shape[1] < 2:
        raise ValueError(
            f"curves are {tuple(curve.shape)}, not (N, K+1) with K > 0; pass the curves of deletion or insertion"
        )
    return torch.trapezoid(curve.double(), dim=1) / (curve.shape[1] - 1)


def shapley_values(value: Callable[[Tensor], Tensor], n: int) -> Tensor:
    r"""Compute the exact Shapley value of each of n players, (n,), or of N games at once, (n, N).

    .. math:: \phi_i = \sum_{S \not\ni i} \frac{|S|!\,(n - |S| - 1)!}{n!} \big(w(S \cup \{i\}) - w(S)\big)

    The values sum to :math:`w(\text{all}) - w(\emptyset)`. For the surrogate's own score they equal the contributions
    :math:`v_i E_i`. They add information for other scores, such as an accuracy.

    Args:
        value: The set function w. It is called once, with all subsets as rows of a boolean tensor (2^n, n), and returns
            (2^n,) or (2^n, N). To use a score, pass ``lambda kept: score(kept[:, None])``.
        n: Number of players, 1 to 16.

    Raises:
        ValueError: If n is out of range, or ``value`` does not return one value for each subset.

    Example:
        >>> def both_needed(kept):
        ...     return kept[:, :2].all(1).double()
        >>> shapley_values(both_needed, 3)
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)

    Reference:
        Yeh et al., 2020, section 4 (ConceptSHAP), use them as the importance of concepts.
    """
    if not 1 <= n <= _MOST_FEATURES:
        raise ValueError(
            f"n is {n} players, and all 2^n subsets are evaluated; pass 1 to {_MOST_FEATURES}, group x-features, or "
            "sample with captum.attr.ShapleyValueSampling"
        )
    subsets = torch.arange(2**n, device="cpu")
    kept = (subsets[:, None] >> torch.arange(n, device="cpu")) & 1 == 1
    values = value(kept)
    if values.dim() not in (1, 2) or len(values) != len(subsets):
        raise ValueError(
            f"values are {tuple(values.shape)} for {len(subsets)} subsets; return one value for each row of the "
            "subsets, (2^n,) or (2^n, N)"
        )
    values = values.double()
    by_size = torch.tensor(
        [factorial(s) * factorial(n - s - 1) / factorial(n) for s in range(n)], dtype=torch.float64, device="cpu"
    )
    shapley = []
    for i in range(n):
        without = subsets[~kept[:, i]]
        weight = by_size[kept[without].sum(1)].to(values.device)
        shapley.append(weight @ (values[without + 2**i] - values[without]))
    return torch.stack(shapley)


@overload
def completeness(kept: float, full: float, chance: float) -> float: ...
@overload
def completeness(kept: Tensor, full: float, chance: float) -> Tensor: ...
def completeness(kept: float | Tensor, full: float, chance: float) -> float | Tensor:
    r"""Compute the share of the model's score above chance that the x-features keep: 1 is all of it, 0 is nothing.

    .. math:: \eta = \frac{a_{\text{x-features}} - a_{\text{chance}}}{a_{\text{model}} - a_{\text{chance}}}

    With accuracies this is the completeness of Yeh et al. It is the coefficient of determination with minus the mean
    squared error as ``kept``, 0 as ``full`` and minus the variance of the model's outputs as ``chance``. A value below
    0 is worse than chance. A value above 1 is possible if the part of the activation that the x-features leave out
    misled the model. To split the completeness among x-features, let the ``value`` of :func:`shapley_values` compute
    the accuracies of all subsets and apply this function to them.

    Differs from Yeh et al.:
        They train a network on top of the concepts and take the best accuracy that any such network reaches. This
        function takes the accuracy of the fitted explainer, a lower bound.

    Args:
        kept: Accuracy, or another score where higher is better, with x-features in place of the layer. For several
            subsets, a tensor of any shape.
        full: The same score of the model itself.
        chance: The same score of guessing, such as 1 / classes or the share of the commonest class.

    Raises:
        ValueError: If the model is not better than chance.

    Example:
        >>> completeness(0.75, 1.0, 0.5)
        0.5

    Reference:
        Yeh et al., "On Completeness-aware Concept-Based Explanations", 2020, Definition 3.1.
    """
    if not full > chance:
        raise ValueError(
            f"the model's score {full} is no better than chance, {chance}; check the labels, or use minus the error as "
            "the score"
        )
    if isinstance(kept, Tensor):
        return (kept.double() - chance) / (full - chance)
    return (kept - chance) / (full - chance)
