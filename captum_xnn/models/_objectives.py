"""Losses for gradient descent: Eq. 5 with running statistics over mini-batches, and a plain loss for baselines.

Conventions:
    T explainers, m examples in a batch, D dimensions of Z, n x-features, C explained outputs.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, Eq. 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from captum_xnn._distributed import ALONE, Ranks
from captum_xnn.models._base import Objective, Reconstruction, Weights
from captum_xnn.models._losses import RunningMean, log_penalty, pull_away_and_slope, squared_error

__all__ = ["PlainObjective", "RunningObjective"]


class _WithSlopes(torch.autograd.Function):
    """Attach known derivatives to values (...): derivatives (..., m, k) with respect to tensors of the same shape."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, slopes: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        del inputs  # autograd passes the derivatives on to them
        ctx.save_for_backward(*slopes)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        wide = (s * given.reshape(given.shape + (1,) * (s.dim() - given.dim())) for s in ctx.saved_tensors)
        return None, None, *wide


class RunningObjective:
    r"""Eq. 5 over the whole training set, estimated from mini-batches, with gradients of the newest batch.

    Only the total has a gradient. Its derivatives with respect to the network's outputs are written out, because
    autograd takes longer for so many small operations. With weights w that sum to 1, the running mean :math:`\bar E`,
    the running moments G of :math:`E - \bar E` and the pull-away term P they are

    .. math:: \frac{\partial L}{\partial \bar y_i} = \frac2m (\bar y_i - \hat y_i), \quad
              \frac{\partial L}{\partial \tilde Z_{ik}} = \frac{2 \beta}{m D}
              \frac{\tilde Z_{ik} - Z_{ik}}{1/q + Q_k}, \quad
              \frac{\partial L}{\partial E_i} = 2 \eta\, w_i (E_i - \bar E) \frac{\partial P}{\partial G}

    Args:
        beta: Weight of the sparse reconstruction.
        eta: Weight of the pull-away term.
        q: Sparsity parameter.
        rho: Share of the newest batch in the running statistics.
        ranks: Processes that each hold a part of every batch.
        centred: Whether the pull-away term subtracts the mean. With it the term has squared correlations, without it
            squared cosines, as in Eq. 3 as printed.

    Example:
        >>> from captum_xnn.models._srae import SRAE
        >>> Z = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
        >>> _ = torch.manual_seed(0)
        >>> terms = RunningObjective()(SRAE(8, 2, hidden=())(Z), Z, Z[:, :1])
        >>> bool(terms.total == terms.faithfulness + terms.sparse_reconstruction + terms.pull_away)
        True
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        eta: float = 1.0,
        q: float = 1.0,
        rho: float = 0.1,
        ranks: Ranks = ALONE,
        centred: bool = True,
    ) -> None:
        self.beta, self.eta, self.q, self.ranks, self.centred = beta, eta, q, ranks, centred
        self._Q, self._mean, self._moments = self.statistics = RunningMean(rho), RunningMean(rho), RunningMean(rho)

    @classmethod
    def of(cls, weights: Weights, ranks: Ranks = ALONE, *, centred: bool = True) -> RunningObjective:
        """Create the objective with given settings.

        Args:
            weights: Settings of the terms.
            ranks: Processes that each hold a part of every batch.
            centred: Whether the pull-away term subtracts the mean.
        """
        return cls(**weights._asdict(), ranks=ranks, centred=centred)

    def __call__(
        self, reconstruction: Reconstruction, Z: Tensor, y_hat: Tensor, *, weight: Tensor | None = None
    ) -> Objective:
        """Add a batch to the running statistics, and compute the objective and its terms.

        All arguments and terms may have a leading dimension (T, ...) for T explainers.

        Args:
            reconstruction: Outputs of the network for the batch.
            Z: Activations (m, ...) of the batch.
            y_hat: Outputs (m, C).
            weight: Weights (m,) of the rows in the pull-away term. They make the batch represent the training set.
                Faithfulness and reconstruction weight all rows of the batch equally, and so favour examples that are
                drawn more often.
        """
        with torch.no_grad():
            terms, slopes = self._terms_and_slopes(reconstruction, Z, y_hat, weight)
            total = terms[0] + self.beta * terms[1] + self.eta * terms[2]
        return Objective(_WithSlopes.apply(total, slopes, *reconstruction), *terms)  # type: ignore[no-untyped-call]

    def _terms_and_slopes(
        self, reconstruction: Reconstruction, Z: Tensor, y_hat: Tensor, weight: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Reconstruction]:
        """Compute the three terms, and the derivatives of their weighted sum with respect to the network's outputs."""
        m, of_examples = reconstruction.E.shape[-2], reconstruction.E.dim() - 2
        error = reconstruction.y_bar - y_hat
        faithful = self.ranks.mean(error.square().sum(-1).mean(-1))

        off = (reconstruction.Z_tilde - Z).flatten(of_examples + 1)
        Q = self._Q.estimate(self.ranks.mean(off.square().mean(-2)))
        slope_of_Q = self.beta / Q.shape[-1] / (1 / self.q + Q)

        if weight is None:
            weight = torch.ones_like(reconstruction.E[..., 0])
        weight = (weight / self.ranks.mean(weight.sum(-1, keepdim=True)))[..., None]
        E = reconstruction.E
        if self.centred:
            E = E - self._mean.estimate(self.ranks.mean((weight * E).sum(-2)))[..., None, :]
        weighted = weight * E
        pull, slope_of_moments = pull_away_and_slope(self._moments.estimate(self.ranks.mean(E.mT @ weighted)))

        slopes = Reconstruction(
            2 * self.eta * weighted @ slope_of_moments,
            2 / m * error,
            (off * (2 / m * slope_of_Q)[..., None, :]).reshape(Z.shape),
        )
        return (faithful, log_penalty(Q, self.q), pull), slopes


def _faithfulness(reconstruction: Reconstruction, y_hat: Tensor) -> Tensor:
    """Compute Eq. 1 for each explainer, (...), from outputs (..., m, C)."""
    return squared_error(reconstruction.y_bar, y_hat).sum(-1).mean(-1)


def _errors(reconstruction: Reconstruction, Z: Tensor) -> Tensor:
    """Compute the mean squared error of each dimension of Z, (..., D)."""
    of_examples = reconstruction.E.dim() - 2
    return squared_error(reconstruction.Z_tilde, Z).mean(of_examples).flatten(of_examples)


class PlainObjective:
    """A loss of faithfulness and plain reconstruction.

    Args:
        faithful: Weight of the faithfulness, Eq. 1.
        reconstruct: Weight of the mean reconstruction error.
        ranks: Processes that each hold a part of every batch.
    """

    def __init__(self, faithful: float, reconstruct: float, ranks: Ranks = ALONE) -> None:
        self.faithful, self.reconstruct, self.ranks = faithful, reconstruct, ranks

    def __call__(
        self, reconstruction: Reconstruction, Z: Tensor, y_hat: Tensor, *, weight: Tensor | None = None
    ) -> Objective:
        """Compute the terms on a batch, as in :class:`~captum_xnn.models._base.Loss`."""
        del weight  # used in the pull-away term only; this loss has none
        zero = reconstruction.E.new_zeros(reconstruction.E.shape[:-2])
        first = self.ranks.mean(_faithfulness(reconstruction, y_hat)) if self.faithful else zero
        second = zero
        if self.reconstruct:
            second = self.ranks.mean(_errors(reconstruction, Z).mean(-1))
        return Objective(self.faithful * first + self.reconstruct * second, first, second, zero)
