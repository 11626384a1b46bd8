"""Losses for gradient descent: Eq. 5 with running statistics over mini-batches, and a plain loss for baselines.

Conventions:
    T explainers, m examples in a batch, D dimensions of Z, n x-features, C explained outputs.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, Eq. 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_xnn._distributed import ALONE, Ranks
from captum_xnn.models._base import Objective, Reconstruction, Weights
from captum_xnn.models._losses import RunningMean, log_penalty, pull_away_of_moments, squared_error

__all__ = ["PlainObjective", "RunningObjective"]


class RunningObjective:
    """Eq. 5 over the whole training set, estimated from mini-batches, with gradients of the newest batch.

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

    def __call__(self, made: Reconstruction, Z: Tensor, y_hat: Tensor, *, weight: Tensor | None = None) -> Objective:
        """Add a batch to the running statistics, and compute the objective and its terms.

        All arguments and terms may have a leading dimension (T, ...) for T explainers.

        Args:
            made: Outputs of the network for the batch.
            Z: Activations (m, ...) of the batch.
            y_hat: Outputs (m, C).
            weight: Weights (m,) of the rows in the pull-away term. They make the batch represent the training set.
                Faithfulness and reconstruction weight all rows of the batch equally, and so favour examples that are
                drawn more often.
        """
        Q = self._Q(self.ranks.mean(_errors(made, Z)))
        if weight is None:
            weight = torch.ones_like(made.E[..., 0])
        weight = weight / self.ranks.mean(weight.sum(-1, keepdim=True))
        E = made.E
        if self.centred:
            E = E - self._mean(self.ranks.mean((weight[..., None] * E).sum(-2))).detach()[..., None, :]
        moments = self._moments(self.ranks.mean(E.mT @ (weight[..., None] * E)))
        terms = (
            self.ranks.mean(_faithfulness(made, y_hat)),
            log_penalty(Q, self.q),
            pull_away_of_moments(moments),
        )
        return Objective(terms[0] + self.beta * terms[1] + self.eta * terms[2], *terms)


def _faithfulness(made: Reconstruction, y_hat: Tensor) -> Tensor:
    """Compute Eq. 1 for each explainer, (...), from outputs (..., m, C)."""
    return squared_error(made.y_bar, y_hat).sum(-1).mean(-1)


def _errors(made: Reconstruction, Z: Tensor) -> Tensor:
    """Compute the mean squared error of each dimension of Z, (..., D)."""
    of_examples = made.E.dim() - 2
    return squared_error(made.Z_tilde, Z).mean(of_examples).flatten(of_examples)


class PlainObjective:
    """A loss of faithfulness and plain reconstruction.

    Args:
        faithful: Weight of the faithfulness, Eq. 1.
        reconstruct: Weight of the mean reconstruction error.
        ranks: Processes that each hold a part of every batch.
    """

    def __init__(self, faithful: float, reconstruct: float, ranks: Ranks = ALONE) -> None:
        self.faithful, self.reconstruct, self.ranks = faithful, reconstruct, ranks

    def __call__(self, made: Reconstruction, Z: Tensor, y_hat: Tensor, *, weight: Tensor | None = None) -> Objective:
        """Compute the terms on a batch, as in :class:`~captum_xnn.models._base.Loss`."""
        del weight  # used in the pull-away term only; this loss has none
        zero = made.E.new_zeros(made.E.shape[:-2])
        first = self.ranks.mean(_faithfulness(made, y_hat)) if self.faithful else zero
        second = zero
        if self.reconstruct:
            second = self.ranks.mean(_errors(made, Z).mean(-1))
        return Objective(self.faithful * first + self.reconstruct * second, first, second, zero)
