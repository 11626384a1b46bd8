"""Forms with single dimensions of Z as x-features.

The default heatmaps of an x-feature below its average, E < 0, show the evidence against it. A dimension that only has
excitation has no such evidence. Its map is then empty.

Conventions:
    M examples, D dimensions of Z, n x-features, C explained outputs. Z is flattened to (M, D).

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2,
    Tables 1, .4 and .6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_xnn.activations._memmap import Rows, chunks
from captum_xnn.models._base import Dense, TrainingExamples
from captum_xnn.models.baselines._least_squares import read_out
from captum_xnn.models.baselines._scikit import scikit_learn

__all__ = ["Lasso", "LinearModel", "SingleDimensions", "lasso", "lasso_of_size"]


class LinearModel(NamedTuple):
    """A sparse linear model of the outputs as functions of Z."""

    alpha: float
    """Factor of the L1 term, on the scale of scikit-learn's ``Lasso``."""
    coefficients: Tensor
    """(C, D)."""
    intercept: Tensor
    """(C,)."""

    @property
    def dimensions(self) -> Tensor:
        """Dimensions of Z with a non-zero coefficient, in ascending order."""
        return self.coefficients.abs().sum(0).nonzero()[:, 0]


def lasso(Z: Tensor, y: Tensor, alpha: float, *, weight: Tensor | None = None) -> LinearModel:
    r"""Fit the Lasso of the outputs on Z.

    .. math:: \min_{W, b} \frac1{2M} \sum_i w_i \lVert W Z^{(i)} + b - y^{(i)} \rVert^2
              + \alpha \sum_k \lVert W_{\cdot k} \rVert_2

    With one output the penalty is the L1 norm. With several, all outputs select the same dimensions.

    Args:
        Z: Activations (M, D). They are not standardised, and the penalty depends on their scale.
        y: Outputs (M, C).
        alpha: Factor of the penalty, positive.
        weight: Non-negative weights (M,) of the examples. Only their ratios count.

    Raises:
        ValueError: If alpha is not positive.

    Example:
        >>> Z = torch.eye(4).repeat(5, 1)
        >>> made = lasso(Z, Z[:, :1] * 8, alpha=0.5)
        >>> made.dimensions, made.coefficients[0, 0].round(decimals=2)
        (tensor([0]), tensor(5.3300))

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2 and Tables .4 and .6.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; pass alpha > 0, such as 0.1 to 15 as in the paper")
    return _Regression(Z, y, weight).model(alpha)


def lasso_of_size(Z: Tensor, y: Tensor, n: int, *, weight: Tensor | None = None) -> LinearModel:
    """Fit the Lasso with the smallest alpha that selects n dimensions of Z.

    The search lowers alpha from a value that selects no dimension. Several dimensions may enter at once. If no alpha
    selects exactly n, the result has fewer.

    Args:
        Z: Activations (M, D).
        y: Outputs (M, C).
        n: Number of dimensions to select.
        weight: Non-negative weights (M,) of the examples.

    Example:
        >>> Z = torch.rand(200, 9, generator=torch.Generator().manual_seed(0))
        >>> lasso_of_size(Z, 3 * Z[:, 2:3] - 2 * Z[:, 5:6] + Z[:, 7:8], 2).dimensions
        tensor([2, 5])
    """
    problem = _Regression(Z, y, weight)
    above = problem.largest
    below = above
    while below > problem.largest * 1e-4:
        below = above * 0.9
        if problem.size(below) > n:
            break
        above = below
    else:
        return problem.model(above)
    for _ in range(12):  # to a part in 40,000 of alpha
        middle = (above * below) ** 0.5
        above, below = (above, middle) if problem.size(middle) > n else (middle, below)
    return problem.model(above)


class _Regression:
    """Weighted, centred data for scikit-learn's path. Computes the terms shared by all alphas once."""

    def __init__(self, Z: Tensor, y: Tensor, weight: Tensor | None) -> None:
        self.like = Z
        w = torch.ones(len(Z), dtype=torch.float64, device="cpu") if weight is None else weight.detach().cpu().double()
        w = w / w.mean()
        X, t = (m.detach().cpu().double().flatten(1) for m in (Z, y))
        self.X_mean, self.t_mean = (w @ m / len(m) for m in (X, t))
        root = w.sqrt()[:, None]
        X, t = (X - self.X_mean) * root, (t - self.t_mean) * root
        cross = X.T @ t
        self.largest = float(cross.norm(dim=1).max()) / len(X)
        self.single = t.shape[1] == 1
        self.X = X.numpy()
        self.t = t[:, 0].numpy() if self.single else t.numpy()
        self.gram = (X.T @ X).numpy() if self.single else False
        self.solved = 0.0, X[:0]

    def coefficients(self, alpha: float) -> Tensor:
        """Compute the coefficients (C, D)."""
        if self.solved[0] != alpha:
            path = scikit_learn().lasso_path(
                self.X, self.t, alphas=[alpha], precompute=self.gram, max_iter=20_000, tol=1e-7
            )
            self.solved = alpha, torch.from_numpy(path[1][..., 0].reshape(-1, self.X.shape[1]))
        return self.solved[1]

    def size(self, alpha: float) -> int:
        """Count the selected dimensions."""
        return int((self.coefficients(alpha) != 0).any(0).sum())

    def model(self, alpha: float) -> LinearModel:
        """Build the solution in the units, dtype and device of the data."""
        W = self.coefficients(alpha)
        return LinearModel(alpha, W.to(self.like), (self.t_mean - W @ self.X_mean).to(self.like))


class Lasso(Dense):
    """Dimensions of Z selected by a Lasso of the output, with the Lasso's coefficients.

    The x-features are these dimensions, standardised, and flipped where their coefficient is negative. The form uses
    only the share of positives from the recipe.

    Args:
        shape: Dimensions D of Z, or the shape (...) of one example.
        n_features: x-features n.
        alpha: Factor of the L1 term in scikit-learn's objective, as in the paper's tables. The default is the smallest
            alpha that selects n dimensions (:func:`lasso_of_size`).
        n_outputs: Explained outputs C.

    Raises:
        ValueError: On fitting, if alpha selects no dimension or more than n. If it selects fewer, the other x-features
            are 0 for all examples.

    Example:
        >>> from captum_xnn.training._fitting import fit
        >>> Z = torch.rand(200, 9, generator=torch.Generator().manual_seed(0))
        >>> made = Lasso(9, n_features=2)
        >>> _ = fit(made, Z, 3 * Z[:, 2:3] - 2 * Z[:, 5:6] + Z[:, 7:8])
        >>> made.dimensions
        tensor([2, 5])

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2 and Tables .4 and .6.
    """

    def __init__(
        self, shape: int | Sequence[int], n_features: int = 5, *, alpha: float | None = None, n_outputs: int = 1
    ) -> None:
        super().__init__(shape, n_features, hidden=(), n_outputs=n_outputs)
        self.alpha = alpha
        self.config = {k: v for k, v in self.config.items() if k != "hidden"} | {"alpha": alpha}

    @property
    def dimensions(self) -> Tensor:
        """Dimension of Z behind each x-feature, (n,); -1 for an x-feature that is 0 for all examples."""
        return _dimensions(self)

    def solve(self, examples: TrainingExamples) -> None:
        """Solve the Lasso.

        Args:
            examples: Data to learn from.
        """
        if self.alpha is None:
            found = lasso_of_size(examples.loaded(), examples.y, self.n_features, weight=examples.weight)
        else:
            found = lasso(examples.loaded(), examples.y, self.alpha, weight=examples.weight)
        chosen = found.dimensions
        if not 0 < len(chosen) <= self.n_features:
            raise ValueError(
                f"alpha={found.alpha:g} selects {len(chosen)} dimensions of Z, not 1 to {self.n_features}; pass a "
                f"{'larger' if len(chosen) else 'smaller'} alpha, another n_features, or no alpha"
            )
        std = _select(self, examples.Z, chosen)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[:, : len(chosen)] = found.coefficients[:, chosen] * std
            self.head.bias.copy_(found.intercept)
        read_out(self, self.decoder[-1], examples, examples.Z)


class SingleDimensions(Dense):
    """Single dimensions of Z as x-features, with a head by least squares.

    The paper's column Z is the mean over all dimensions, ``SingleDimensions(D, D, dimensions=range(D))``, or over parts
    of them in turn. The form uses only the share of positives from the recipe.

    Args:
        shape: Dimensions D of Z, or the shape (...) of one example.
        n_features: x-features n.
        dimensions: Numbers of n dimensions of (flattened) Z. The default are the dimensions with the largest absolute
            correlation with the output, or, with several outputs, the largest sum of squared correlations.
        n_outputs: Explained outputs C.

    Raises:
        ValueError: If dimensions are not n different numbers below D.

    Example:
        >>> from captum_xnn.training._fitting import fit
        >>> Z = torch.rand(200, 9, generator=torch.Generator().manual_seed(0))
        >>> made = SingleDimensions(9, n_features=2)
        >>> _ = fit(made, Z, 3 * Z[:, 2:3] - 2 * Z[:, 5:6])
        >>> made.dimensions, made.head.weight > 0
        (tensor([2, 5]), tensor([[True, True]]))

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, Table 1, column Z.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        n_features: int = 5,
        *,
        dimensions: Sequence[int] | None = None,
        n_outputs: int = 1,
    ) -> None:
        super().__init__(shape, n_features, hidden=(), n_outputs=n_outputs)
        given, D = None if dimensions is None else [int(d) for d in dimensions], self.config["shape"]
        if n_features > D:
            raise ValueError(
                f"n_features is {n_features}, and Z has {D} dimensions; each x-feature is one of them, so ask for at "
                f"most {D}"
            )
        if given is not None:
            _check_dimensions(given, n_features, D)
        self.given = given
        self.config = {k: v for k, v in self.config.items() if k != "hidden"} | {"dimensions": given}

    @property
    def dimensions(self) -> Tensor:
        """Dimension of Z behind each x-feature, (n,); -1 for an x-feature that is 0 for all examples."""
        return _dimensions(self)

    def solve(self, examples: TrainingExamples) -> None:
        """Choose dimensions and fit the head.

        Args:
            examples: Data to learn from.
        """
        if self.given is None:
            chosen = _square_correlation(examples).topk(self.n_features).indices
        else:
            chosen = torch.tensor(self.given, device=examples.Z.device)
        _select(self, examples.Z, chosen)
        read_out(self, self.head, examples, examples.y)
        read_out(self, self.decoder[-1], examples, examples.Z)


def _check_dimensions(given: list[int], n: int, D: int) -> None:
    """Raise where numbers of dimensions are not n different ones below D."""
    if len(given) != n:
        raise ValueError(
            f"dimensions has {len(given)} number{'s' * (len(given) != 1)}, and n_features is {n}; pass one dimension "
            f"for each x-feature, or n_features={len(given)}"
        )
    if outside := [d for d in given if not 0 <= d < D]:
        raise ValueError(f"dimension {outside[0]} does not exist; pass numbers from 0 to {D - 1}, which Z has")
    if twice := [d for d in given if given.count(d) > 1]:
        raise ValueError(f"dimensions has {twice[0]} more than once; pass each dimension once")


@torch.no_grad()
def _select(xnn: Dense, Z: Tensor | Rows, chosen: Tensor) -> Tensor:
    """Set the first x-features to chosen dimensions of Z over their standard deviations; return the deviations."""
    weight, bias = xnn.encoder[-1].get_parameter("weight"), xnn.encoder[-1].get_parameter("bias")
    std = torch.cat([chunk[:, chosen] for chunk in chunks(Z)]).std(0)
    std = torch.where(std > 0, std, 1)
    weight.zero_()
    bias.zero_()
    weight[torch.arange(len(chosen), device="cpu"), chosen] = 1 / std
    return std


def _dimensions(xnn: Dense) -> Tensor:
    size, at = xnn.encoder[-1].get_parameter("weight").detach().abs().max(1)
    return torch.where(size > 0, at, -1)


def _square_correlation(examples: TrainingExamples) -> Tensor:
    """Compute the squared correlations of all dimensions with the outputs, summed over the outputs, (D,)."""
    w, Z = examples.weight / len(examples.Z), examples.loaded()
    Z, y = Z - w @ Z, examples.y - w @ examples.y
    covariance = Z.T @ (w[:, None] * y)
    variance = (w @ Z**2)[:, None] * (w @ y**2)
    return torch.where(variance > 0, covariance**2 / variance, 0).sum(1)
