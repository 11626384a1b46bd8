"""What an explanation network is to learn: data, the settings of the training, and how batches are drawn from it.

Conventions:
    M examples, D dimensions of Z, C explained outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_xnn.activations.memmap import Rows
from captum_xnn.distributed import ALONE, Ranks
from captum_xnn.models.base import Examples
from captum_xnn.training.checkpoint import Checkpoint

__all__ = ["Problem", "Recipe", "Sampler", "Step"]


@dataclass(frozen=True)
class Recipe:
    """Settings of the training, none of which should need tuning to a model.

    With ``beta=0, eta=0, pretraining=0`` the SRAE trains for faithfulness alone, as the paper's baseline NN
    (:class:`captum_xnn.models.baselines.NN`) always does.

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
    steps: int = 600
    """Mini-batches in all."""
    batch_size: int = 128
    """Examples in a mini-batch."""
    positive_share: float = 0.25
    """Share of positives in every batch, where there are positives and they are fewer than that."""
    pretraining: float = 0.3
    """Share of the steps that teach the anchors."""
    balance: float = 0.1
    """How much even shares of the output's variance count in the anchors, in [0, 1]. A choice, not a finding: at 1 the
    x-features begin with even shares, whatever the model does, and at 0 some contribute next to nothing
    (:mod:`captum_xnn.training.anchors`)."""
    learning_rate: float | None = None
    """Largest learning rate of Adam, reached after a twentieth of the steps and left after a tenth on a cosine to zero.
    None takes the network's own: 3e-3 for the dense form, 1e-2 for the convolutional one, whose few weights have
    further to go."""
    weight_decay: float | None = None
    """Decoupled decay of the weights of encoder and decoder, times the learning rate (AdamW). What batches leave in
    weights by chance decays, which heatmaps would show: with it two seeds draw nearly the same maps. None takes the
    network's own: 0.5 for the dense form, 0.1 for the convolutional one, whose learning rate is higher."""
    rho: float = 0.1
    """Share of the newest batch in running statistics."""
    patience: float | None = None
    """Where set, a tenth of the examples, a thousand at most, is held out of the batches, and an explainer stops once
    Eq. 5 has not become better on it for this share of the steps; its best weights count. Measured on the birds it
    saves nothing, as the objective falls to the end: it is for data that few steps explain."""
    mixed_precision: bool = False
    """Whether products of training are of bfloat16 numbers, while weights and losses stay as they are. The
    x-features come out nearly the same, in less time where the device has such products (benchmarks/many_targets.py).
    How many processes learn together then makes more than 1e-4 of a difference."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "q"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}; the default is a good start")
        for name in ("beta", "eta", "weight_decay"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}; 0 switches the term off")
        if self.patience is not None and not 0 < self.patience <= 1:
            raise ValueError(f"expected 0 < patience <= 1, got {self.patience}; it is a share of the steps")
        for name in ("positive_share", "pretraining"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected 0 <= {name} < 1, got {getattr(self, name)}; it is a share")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"expected 0 <= balance <= 1, got {self.balance}; 0 leaves shares as they come")
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
    r"""Draws batches of row numbers, in which positives are more frequent than in the data.

    A batch has two parts: rows drawn from all examples alike, then rows drawn from the positives, as many as bring
    their expected share to ``recipe.positive_share``. The first part does not depend on the positives, so that
    explainers of different targets, learned together, share it.

    Args:
        positives: Boolean (M,), or None where no example is one.
        rows: Examples M.
        recipe: Size of the batches and share of positives.
        generator: What draws.

    Example:
        >>> positives = torch.arange(100) < 3
        >>> sampler = Sampler(positives, 100, Recipe(batch_size=8), torch.Generator().manual_seed(0))
        >>> sampler.counts, int(positives[sampler.draw()].sum())
        ((6, 2), 2)
    """

    def __init__(self, positives: Tensor | None, rows: int, recipe: Recipe, generator: torch.Generator) -> None:
        self.size, self.generator = recipe.batch_size, generator
        marked = torch.zeros(rows, dtype=torch.bool) if positives is None else positives.cpu()
        seed = generator.initial_seed() % 2**62
        self.pool, self.held_out = torch.arange(rows), torch.zeros(0, dtype=torch.long)
        if recipe.patience is not None:
            held_out = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + 2))[: min(rows // 10, 1000)]
            self.held_out = held_out.sort().values
            self.pool = self.pool[~torch.isin(self.pool, self.held_out)]
        self._of_positives = torch.Generator().manual_seed(seed + 1)
        self.marked = marked
        self.positives = self.pool[marked[self.pool]]
        share = len(self.positives) / len(self.pool)
        drawn = 0
        if 0 < share < recipe.positive_share:  # otherwise there are none, or there is no shortage of them
            drawn = min(max(1, round(self.size * (recipe.positive_share - share) / (1 - share))), self.size - 1)
        self.counts: tuple[int, int] = (self.size - drawn, drawn)
        """Rows of a batch that are drawn from all examples, and from the positives."""
        expected = torch.full((rows,), self.counts[0] / len(self.pool), dtype=torch.float32)
        expected[marked] += drawn / max(1, len(self.positives))
        self.row_weight = expected / expected.mean()
        """How often every example is drawn, (M,), 1 on average; one that is held out counts as others of its kind."""

    def draw(self) -> Tensor:
        """Returns row numbers (m,)."""
        return self._drawn(self.pool, self.positives, self.counts, self.generator)

    def _drawn(self, pool: Tensor, positives: Tensor, counts: tuple[int, int], generator: torch.Generator) -> Tensor:
        found = pool[torch.randint(len(pool), (counts[0],), generator=generator)]
        if not counts[1]:
            return found
        # Their own stream, so that what is drawn from all examples is the same for every choice of positives.
        more = torch.randint(len(positives), (counts[1],), generator=self._of_positives)
        return torch.cat([found, positives[more]])

    def watched(self) -> Tensor:
        """Returns held-out rows on which training is watched, (4 m,), drawn as batches are."""
        positives = self.held_out[self.marked[self.held_out]]
        counts = (4 * self.counts[0], 4 * self.counts[1]) if len(positives) else (4 * self.size, 0)
        return self._drawn(self.held_out, positives, counts, self.generator)

    @property
    def state(self) -> list[Tensor]:
        """Where its random streams stand; set it to go on from there."""
        return [self.generator.get_state(), self._of_positives.get_state()]

    @state.setter
    def state(self, given: list[Tensor]) -> None:
        for generator, state in zip((self.generator, self._of_positives), given, strict=True):
            generator.set_state(state.cpu())

    def weight(self, rows: Tensor) -> Tensor:
        """Returns for what part of the training set each row of a batch stands, (m,), which sum to 1 on average.

        Args:
            rows: What :meth:`draw` returned.
        """
        return 1 / (self.size * self.row_weight[rows])


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
    progress: bool = False
    """Whether to show a progress bar."""
    checkpoint: Checkpoint | None = None
    """Where to keep how far training has come."""
    log: Callable[[Step], None] | None = None
    """Is told every new record of the history."""
    ranks: Ranks = ALONE
    """Processes that learn together."""

    @property
    def weight(self) -> Tensor:
        """How much every example counts, (M,), 1 on average: as often as it is in batches."""
        return self.sampler.row_weight.to(self.y)

    @property
    def examples(self) -> Examples:
        """What is left of it for a form in closed form."""
        return Examples(self.Z, self.y, self.weight, self.sampler.generator)
