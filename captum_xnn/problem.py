"""What an explanation network is to learn: data, the settings of the training, and how batches are drawn from it.

Conventions:
    M examples, D dimensions of Z, C explained outputs.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_xnn.rows import Rows

__all__ = ["Problem", "Recipe", "Sampler", "Step"]


@dataclass(frozen=True)
class Recipe:
    """Settings of the training, none of which should need tuning to a model.

    With ``beta=0, eta=0, pretraining=0`` the SRAE trains for faithfulness alone, as the paper's baseline NN
    (:class:`captum_xnn.baselines.NN`) always does.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> Recipe(steps=500).beta
        1.0
    """

    beta: float = 1.0
    """Weight of the sparse reconstruction in Eq. 5."""
    eta: float = 1.0
    """Weight of the pull-away term in Eq. 5."""
    q: float = 1.0
    """Sparsity parameter of the log penalty, on standardised Z."""
    steps: int = 1200
    """Mini-batches in all."""
    batch_size: int = 128
    """Examples in a mini-batch."""
    positive_share: float = 0.25
    """Share of positives in every batch, where there are positives and they are fewer than that."""
    pretraining: float = 0.3
    """Share of the steps that teach the anchors."""
    learning_rate: float | None = None
    """Largest learning rate of Adam, reached after a tenth of the steps, then a cosine to zero. None takes the
    network's own: 1e-3 for the dense form, 1e-2 for the convolutional one, whose few weights have further to go."""
    rho: float = 0.1
    """Share of the newest batch in running statistics."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "q"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}; the default is a good start")
        for name in ("beta", "eta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}; 0 switches the term off")
        for name in ("positive_share", "pretraining"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected 0 <= {name} < 1, got {getattr(self, name)}; it is a share")
        if not 0 < self.rho <= 1:
            raise ValueError(f"expected 0 < rho <= 1, got {self.rho}; 0.1 averages over about the last 10 batches")
        for name in ("steps", "batch_size"):
            object.__setattr__(self, name, operator.index(getattr(self, name)))


class Step(NamedTuple):
    """One record of the training history; losses are on standardised Z and y, statistics are running means.

    Where a form minimises the plain reconstruction error, or no pull-away term, the fields hold that, and 0.
    """

    step: int
    faithfulness: float
    sparse_reconstruction: float
    pull_away: float


class Sampler:
    """Draws batches of row numbers with a fixed share of positives.

    Args:
        positives: Boolean (M,), or None where no example is one.
        rows: Examples M.
        recipe: Size of the batches and share of positives.
        generator: What draws.

    Example:
        >>> positives = torch.arange(100) < 3
        >>> sampler = Sampler(positives, 100, Recipe(batch_size=8), torch.Generator().manual_seed(0))
        >>> int(positives[sampler.draw()].sum()), float(sampler.row_weight[positives].sum())
        (2, 25.0)
    """

    def __init__(self, positives: Tensor | None, rows: int, recipe: Recipe, generator: torch.Generator) -> None:
        self.size, self.generator = recipe.batch_size, generator
        marked = torch.zeros(rows, dtype=torch.bool) if positives is None else positives.cpu()
        share = int(marked.sum()) / rows
        if not 0 < share < recipe.positive_share:  # none, or no shortage of them: draw every row alike
            self.pools: tuple[Tensor, ...] = (torch.arange(rows),)
            self.counts: tuple[int, ...] = (self.size,)
        else:
            self.pools = marked.nonzero()[:, 0], (~marked).nonzero()[:, 0]
            drawn = max(1, round(self.size * recipe.positive_share))
            self.counts = drawn, max(1, self.size - drawn)
        parts = [
            torch.full((count,), len(pool) / rows / count) for pool, count in zip(self.pools, self.counts, strict=True)
        ]
        self.weight = torch.cat(parts)
        self.row_weight = torch.ones(rows)
        for pool, count in zip(self.pools, self.counts, strict=True):
            self.row_weight[pool] = count / self.size / len(pool) * rows

    def draw(self) -> Tensor:
        """Returns row numbers (m,); ``weight`` says for what part of the training set each of them stands."""
        return torch.cat(
            [
                pool[torch.randint(len(pool), (count,), generator=self.generator)]
                for pool, count in zip(self.pools, self.counts, strict=True)
            ]
        )


@dataclass(frozen=True)
class Problem:
    """What is to be learned, in the model's own units."""

    Z: Tensor | Rows
    """Activations (M, D) or (M, channels, H, W), in memory or on disk."""
    y: Tensor
    """Outputs (M, C) to be faithful to, in logits."""
    sampler: Sampler
    """Draws batches, and knows how much every example counts."""
    recipe: Recipe
    """Settings; every form takes those that concern it."""
    progress: bool
    """Whether to show a progress bar."""

    @property
    def weight(self) -> Tensor:
        """How much every example counts, (M,), 1 on average: as often as it is in batches."""
        return self.sampler.row_weight.to(self.y)

    def loaded(self) -> Tensor:
        """Returns the activations in memory, for forms that need all of them at once."""
        return self.Z[:]
