"""Early stopping: keep the best weights on held-out examples, and stop networks that no longer improve.

Conventions:
    T networks that still learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_xnn.training._sampler import Sampler

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Remember the best weights of each network, and find the networks that have stopped improving.

    Args:
        samplers: Samplers of the networks. They draw the held-out rows.
        weights: Stacked weights, (T, ...) by name.
        y: Outputs, in the dtype and on the device of the losses.
        patience: Steps without improvement after which a network stops.
        earliest: Step before which no network stops.

    Example:
        >>> from captum_xnn.training._recipe import Recipe
        >>> sampler = Sampler(None, 100, Recipe(patience=0.5), torch.Generator().manual_seed(0))
        >>> early = EarlyStopping([sampler], {"w": torch.zeros(1, 2)}, torch.zeros(1), patience=3, earliest=0)
        >>> [bool(early.to_stop(step, torch.tensor([loss]), {"w": torch.full((1, 2), float(step))}))
        ...  for step, loss in ((1, 5.0), (2, 4.0), (3, 6.0), (5, 4.5))]
        [False, False, False, True]
        >>> early.best_weights["w"]
        tensor([[2., 2.]])
    """

    def __init__(
        self,
        samplers: Sequence[Sampler],
        weights: dict[str, Tensor],
        y: Tensor,
        *,
        patience: float,
        earliest: float,
    ) -> None:
        self.patience, self.earliest = patience, earliest
        rows = torch.stack([s.draw_held_out() for s in samplers])
        self.rows = rows.to(y.device)
        """Held-out rows, (T, rows)."""
        self.row_weight = torch.stack([s.weight(r) for s, r in zip(samplers, rows, strict=True)]).to(y)
        """Share of the training set that each held-out row represents, (T, rows)."""
        self.best = y.new_full((len(rows),), math.inf)
        self.best_step = torch.zeros(len(rows), dtype=torch.long, device=y.device)
        self.best_weights = {name: t.detach().clone() for name, t in weights.items()}

    def to_stop(self, step: int, losses: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Keep weights that are better than before, and mark the networks to stop, (T,).

        Args:
            step: Number of steps taken.
            losses: Losses on the held-out rows, (T,).
            weights: Stacked weights, (T, ...) by name.
        """
        better = losses < self.best
        self.best = torch.where(better, losses, self.best)
        self.best_step = torch.where(better, step, self.best_step)
        for name, kept in self.best_weights.items():
            kept[better] = weights[name].detach()[better]
        return (step - self.best_step >= self.patience) & (step >= self.earliest)

    def keep(self, which: Tensor) -> None:
        """Continue with some of the networks.

        Args:
            which: Boolean (T,).
        """
        self.rows, self.row_weight = self.rows[which], self.row_weight[which]
        self.best, self.best_step = self.best[which], self.best_step[which]
        self.best_weights = {name: t[which] for name, t in self.best_weights.items()}

    @property
    def state(self) -> dict[str, Any]:
        """The best weights so far, and the rows they were found on. Assign them to resume from there."""
        return {name: getattr(self, name) for name in ("rows", "row_weight", "best", "best_step", "best_weights")}

    @state.setter
    def state(self, saved: dict[str, Any]) -> None:
        self.rows, self.row_weight = saved["rows"], saved["row_weight"]
        self.best, self.best_step, self.best_weights = saved["best"], saved["best_step"], saved["best_weights"]
