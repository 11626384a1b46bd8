r"""How much each x-feature matters to what the surrogate says: removal curves, Shapley values and completeness.

An x-feature is removed by setting it to its mean over the training data. That is 0, since :math:`E_i` is standardised,
and so its contribution :math:`v_i E_i` becomes 0.

Conventions:
    N examples, K x-features. ``kept`` is a boolean tensor (..., N, K), True where an x-feature stays. A *score* is a
    callable that gives what is measured, (..., N), from ``kept``: :func:`surrogate_score` for the surrogate itself, or
    one's own that decodes the kept x-features and runs the rest of the model. Curves and values are float64.

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
    r"""Returns the score :math:`b + \sum_{i\ \mathrm{kept}} v_i E_i`, as a callable of ``kept`` (..., N, K).

    Args:
        contributions: v_i E_i, (N, K), in logits.
        bias: What the average training example gives, (N,) or one number, in logits.

    Example:
        >>> score = surrogate_score(torch.tensor([[3.0, 1.0]]), 0.5)
        >>> score(torch.tensor([[True, False]]))
        tensor([3.5000], dtype=torch.float64)
    """
    return lambda kept: torch.where(kept, contributions.double(), 0).sum(-1) + bias


def contribution_order(contributions: Tensor) -> Tensor:
    r"""Returns the x-features of each example by falling :math:`|v_i E_i|`, (N, K); equal ones in their own order.

    ``order.flip(1)`` is the reverse; with contributions of both signs, :math:`v_i E_i` itself makes the surrogate fall
    fastest: ``contributions.argsort(1, descending=True)``.

    Args:
        contributions: v_i E_i, (N, K).

    Example:
        >>> contribution_order(torch.tensor([[1.0, -3.0, 2.0]]))
        tensor([[1, 2, 0]])
    """
    return contributions.abs().sort(dim=1, descending=True, stable=True).indices


def random_order(contributions: Tensor, *, seed: int) -> Tensor:
    """Returns a random order of the x-features for each example, (N, K), to compare with.

    Args:
        contributions: (N, K), of which shape and device count.
        seed: The same on every device.

    Example:
        >>> random_order(torch.zeros(1, 3), seed=0).sort().values
        tensor([[0, 1, 2]])
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(contributions.shape, generator=generator, dtype=torch.float64)
    return draws.argsort(1).to(contributions.device)


def deletion(score: Score, order: Tensor) -> Tensor:
    """Returns the scores after 0, 1, ... K x-features were removed in the given order, (N, K+1).

    Args:
        score: Called once for each step, with ``kept`` (N, K).
        order: Which x-feature goes first, second, ..., (N, K), a permutation in each row.

    Raises:
        ValueError: If a row of the order is no permutation.

    Example:
        >>> contributions = torch.tensor([[1.0, 4.0]])
        >>> deletion(surrogate_score(contributions), contribution_order(contributions))
        tensor([[5., 1., 0.]], dtype=torch.float64)
    """
    rank = _ranks(order)
    return torch.stack([score(rank >= step).double() for step in range(order.shape[1] + 1)], 1)


def insertion(score: Score, order: Tensor) -> Tensor:
    """Returns the scores after 0, 1, ... K x-features were put back in the given order, (N, K+1).

    Args:
        score: Called once for each step, with ``kept`` (N, K).
        order: Which x-feature comes first, second, ..., (N, K), a permutation in each row.

    Raises:
        ValueError: If a row of the order is no permutation.

    Example:
        >>> contributions = torch.tensor([[1.0, 4.0]])
        >>> insertion(surrogate_score(contributions), contribution_order(contributions))
        tensor([[0., 4., 5.]], dtype=torch.float64)
    """
    rank = _ranks(order)
    return torch.stack([score(rank < step).double() for step in range(order.shape[1] + 1)], 1)


def _ranks(order: Tensor) -> Tensor:
    """Returns the step in which each x-feature is taken, (N, K)."""
    if order.dim() != 2 or not bool((order.sort(1).values == torch.arange(order.shape[-1], device=order.device)).all()):
        raise ValueError(
            f"expected an order (N, K) with each x-feature 0..K-1 once in every row, got {tuple(order.shape)}; "
            "make one with contribution_order, random_order or argsort(1)"
        )
    return order.argsort(1)


def area(curve: Tensor) -> Tensor:
    """Returns the area under removal curves over the share of x-features removed, (N,), in the scores' unit.

    It is the trapezoidal mean of a curve. The score falls early, and a deletion's area is small, where what is removed
    first matters most; for insertion the area is then large.

    Args:
        curve: What :func:`deletion` or :func:`insertion` returned, (N, K+1).

    Raises:
        ValueError: If there is no x-feature.

    Example:
        >>> area(torch.tensor([[5.0, 1.0, 0.0]]))
        tensor([1.7500], dtype=torch.float64)
    """
    if curve.dim() != 2 or curve.shape[1] < 2:
        raise ValueError(f"expected curves (N, K+1) with K > 0, got {tuple(curve.shape)}; pass what deletion returned")
    return torch.trapezoid(curve.double(), dim=1) / (curve.shape[1] - 1)


def shapley_values(value: Callable[[Tensor], Tensor], n: int) -> Tensor:
    r"""Returns the exact Shapley value of each of n players, (n,), or of each for N games at once, (n, N).

    .. math:: \phi_i = \sum_{S \not\ni i} \frac{|S|!\,(n - |S| - 1)!}{n!} \big(w(S \cup \{i\}) - w(S)\big)

    They sum to :math:`w(\text{all}) - w(\emptyset)`. For the surrogate's own score they are the contributions
    :math:`v_i E_i` themselves; other scores, such as an accuracy, are where they say more.

    Args:
        value: The set function w, as a callable that is called once, with all subsets as rows of a boolean tensor
            (2^n, n), and returns (2^n,) or (2^n, N). Of a score: ``lambda kept: score(kept[:, None])``.
        n: Number of players, 1 to 16.

    Raises:
        ValueError: If n is out of range or the values do not belong to the subsets.

    Example:
        >>> def both_needed(kept):
        ...     return kept[:, :2].all(1).double()
        >>> shapley_values(both_needed, 3)
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)

    Reference:
        As importance of concepts: Yeh et al., 2020, section 4 (ConceptSHAP).
    """
    if not 1 <= n <= _MOST_FEATURES:
        raise ValueError(
            f"expected 1 to {_MOST_FEATURES} players, got {n}: all 2^n subsets are evaluated; group x-features, "
            "or sample with captum.attr.ShapleyValueSampling"
        )
    subsets = torch.arange(2**n)
    kept = (subsets[:, None] >> torch.arange(n)) & 1 == 1
    values = value(kept)
    if values.dim() not in (1, 2) or len(values) != len(subsets):
        raise ValueError(
            f"expected values (2^n,) or (2^n, N) with 2^n = {len(subsets)}, got {tuple(values.shape)}; give a value "
            "for each row of the subsets"
        )
    values = values.double()
    by_size = torch.tensor([factorial(s) * factorial(n - s - 1) / factorial(n) for s in range(n)], dtype=torch.float64)
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
    r"""Returns the share of what the model knows beyond chance that the x-features keep: 1 all of it, 0 none.

    .. math:: \eta = \frac{a_{\text{x-features}} - a_{\text{chance}}}{a_{\text{model}} - a_{\text{chance}}}

    With accuracies it is the completeness of Yeh et al.; with minus the mean squared error, 0 for the model and minus
    its outputs' variance for chance, it is the coefficient of determination. Below 0 is worse than chance; above 1 is
    possible, where what the x-features leave out misled the model. As ``value`` of :func:`shapley_values`, applied to
    the accuracies of all subsets, it gives each x-feature's part of the completeness.

    Differs from Yeh et al.:
        They take the best accuracy that any network on top of the concepts reaches, and train one. Here it is that of
        the explainer as it stands, a lower bound.

    Args:
        kept: Accuracy, or another score that grows, with x-features in place of the layer; a tensor of any shape of
            them, of several subsets.
        full: The same of the model itself.
        chance: The same of guessing, such as 1 / classes or the share of the commonest class.

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
            f"expected a model better than chance, got {full} against {chance}; there is nothing to be complete about: "
            "check the labels, or take minus the error as score"
        )
    if isinstance(kept, Tensor):
        return (kept.double() - chance) / (full - chance)
    return (kept - chance) / (full - chance)
