"""Problems for explanation networks: data, settings of the training, and random batches.

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

from captum_xnn._distributed import ALONE, Ranks
from captum_xnn.activations._memmap import Rows
from captum_xnn.models._base import Examples
from captum_xnn.training._checkpoint import Checkpoint

__all__ = ["Problem", "Recipe", "Sampler", "Step"]

# Examples from which batches have their full size: ten times that size.
_MANY = 1280


@dataclass(frozen=True)
class Recipe:
    """Settings of gradient descent. No setting should need tuning to a model.

    With ``beta=0, eta=0, pretraining=0`` the SRAE trains for faithfulness alone, like the paper's baseline NN
    (:class:`captum_xnn.models.baselines.NN`).

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
    """Number of steps, one mini-batch each."""
    batch_size: int | None = None
    """Examples in a mini-batch. None takes 128, or 64 from fewer than 1,280 examples. There 64 are as faithful to new
    digits (benchmarks/fit_speed.py) in two thirds of the time."""
    positive_share: float = 0.25
    """Share of positives in every batch. It has no effect if the data hold more, or no positives."""
    pretraining: float = 0.3
    """Share of the steps that pull the x-features to their anchors."""
    balance: float = 0.1
    """Weight of even shares of the output's variance in the anchors, in [0, 1]. A choice, not a finding: at 1 the
    x-features start with even shares for any model, and at 0 some contribute next to nothing
    (:mod:`captum_xnn.training._anchors`)."""
    learning_rate: float | None = None
    """Largest learning rate of Adam. The rate rises for a twentieth of the steps, stays until a tenth, and then falls
    to zero on a cosine. None takes the network's own: 3e-3 for the dense form, 1e-2 for the convolutional one. The few
    weights of the convolutional form have further to go."""
    weight_decay: float | None = None
    """Decoupled decay of the weights of encoder and decoder, times the learning rate (AdamW). Random batches leave
    noise in the weights, and heatmaps would show it. The decay removes this noise: two seeds draw nearly the same maps.
    None takes the network's own: 0.5 for the dense form, and 0.1 for the convolutional one because of its higher
    learning rate."""
    rho: float = 0.1
    """Share of the newest batch in running statistics."""
    patience: float | None = None
    """Share of the steps after which an explainer stops if Eq. 5 does not improve on held-out examples. A tenth of the
    examples, at most a thousand, is held out of the batches. The explainer keeps its best weights. The default never
    stops early. On the birds patience saves nothing, because the objective falls to the end. It helps on data that few
    steps explain."""
    mixed_precision: bool = False
    """Whether training computes products in bfloat16. Weights and losses keep their dtype. The x-features are nearly
    the same, and devices with bfloat16 products need less time (benchmarks/many_targets.py). The number of processes
    that learn together then changes results by more than 1e-4."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "q"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; pass {name} > 0, or leave it at its default")
        for name in ("beta", "eta", "weight_decay"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; pass {name} >= 0 (0 switches the term off)")
        if self.patience is not None and not 0 < self.patience <= 1:
            raise ValueError(f"patience is {self.patience}; pass a share of the steps, 0 < patience <= 1")
        for name in ("positive_share", "pretraining"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; pass a share, 0 <= {name} < 1")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance is {self.balance}; pass 0 <= balance <= 1 (0 leaves shares to the data)")
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho is {self.rho}; pass 0 < rho <= 1 (0.1 averages over about the last 10 batches)")
        for name in ("steps", "batch_size"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, operator.index(getattr(self, name)))

    def batch_of(self, rows: int) -> int:
        """Compute the number of examples in a mini-batch.

        Args:
            rows: Number of examples M.

        Example:
            >>> Recipe().batch_of(600), Recipe().batch_of(5000), Recipe(batch_size=50).batch_of(600)
            (64, 128, 50)
        """
        return self.batch_size or (64 if rows < _MANY else 128)


class Step(NamedTuple):
    """One record of the training history. Losses are on standardised Z and y; statistics are running means.

    For a form with plain reconstruction, ``sparse_reconstruction`` holds the plain error. For a form without a
    pull-away term, ``pull_away`` is 0.
    """

    step: int
    faithfulness: float
    sparse_reconstruction: float
    pull_away: float


class Sampler:
    r"""Draw batches of row numbers with more positives than in the data.

    A batch has two parts. Rows of the first part are drawn from all examples with equal probability. Rows of the second
    part are drawn from the positives and bring their expected share to ``recipe.positive_share``. The first part does
    not depend on the positives. Explainers of different targets that learn together therefore share it.

    Args:
        positives: Boolean (M,), or None without positives.
        rows: Number of examples M.
        recipe: Size of the batches and share of positives.
        generator: Source of random numbers.

    Example:
        >>> positives = torch.arange(100) < 3
        >>> sampler = Sampler(positives, 100, Recipe(batch_size=8), torch.Generator().manual_seed(0))
        >>> sampler.counts, int(positives[sampler.draw()].sum())
        ((6, 2), 2)
    """

    def __init__(self, positives: Tensor | None, rows: int, recipe: Recipe, generator: torch.Generator) -> None:
        self.size, self.generator = recipe.batch_of(rows), generator
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
        if 0 < share < recipe.positive_share:  # otherwise there are no positives, or enough of them
            drawn = min(max(1, round(self.size * (recipe.positive_share - share) / (1 - share))), self.size - 1)
        self.counts: tuple[int, int] = (self.size - drawn, drawn)
        """Number of rows in a batch drawn from all examples, and from the positives."""
        expected = torch.full((rows,), self.counts[0] / len(self.pool), dtype=torch.float32)
        expected[marked] += drawn / max(1, len(self.positives))
        self.row_weight = expected / expected.mean()
        """How often each example is drawn, (M,), 1 on average. A held-out example has the weight of its kind."""

    def draw(self) -> Tensor:
        """Draw row numbers (m,)."""
        return self._drawn(self.pool, self.positives, self.counts, self.generator)

    def _drawn(self, pool: Tensor, positives: Tensor, counts: tuple[int, int], generator: torch.Generator) -> Tensor:
        found = pool[torch.randint(len(pool), (counts[0],), generator=generator)]
        if not counts[1]:
            return found
        # A separate stream, so that rows drawn from all examples are the same for every choice of positives.
        more = torch.randint(len(positives), (counts[1],), generator=self._of_positives)
        return torch.cat([found, positives[more]])

    def watched(self) -> Tensor:
        """Draw held-out rows for checks during training, (4 m,), in the same way as batches."""
        positives = self.held_out[self.marked[self.held_out]]
        counts = (4 * self.counts[0], 4 * self.counts[1]) if len(positives) else (4 * self.size, 0)
        return self._drawn(self.held_out, positives, counts, self.generator)

    @property
    def state(self) -> list[Tensor]:
        """States of the random streams. Assign them to resume from there."""
        return [self.generator.get_state(), self._of_positives.get_state()]

    @state.setter
    def state(self, given: list[Tensor]) -> None:
        for generator, state in zip((self.generator, self._of_positives), given, strict=True):
            generator.set_state(state.cpu())

    def weight(self, rows: Tensor) -> Tensor:
        """Compute the share of the training set that each row of a batch represents, (m,). Shares sum to 1 on average.

        Args:
            rows: Row numbers from :meth:`draw`.
        """
        return 1 / (self.size * self.row_weight[rows])


@dataclass(frozen=True)
class Problem:
    """A problem to learn, in the model's own units."""

    Z: Tensor | Rows
    """Activations (M, D) or (M, channels, H, W), in memory or on disk."""
    y: Tensor
    """Outputs (M, C) to approximate, in logits."""
    sampler: Sampler
    """Sampler of batches, with the weights of the examples."""
    recipe: Recipe
    """Settings of the training. Each form uses only some of them."""
    progress: bool = False
    """Whether to show a progress bar."""
    checkpoint: Checkpoint | None = None
    """Folder for checkpoints of the training."""
    log: Callable[[Step], None] | None = None
    """Callback that receives each new record of the history."""
    ranks: Ranks = ALONE
    """Processes that learn together."""

    @property
    def weight(self) -> Tensor:
        """Weights of the examples, (M,), 1 on average: how often batches contain each example."""
        return self.sampler.row_weight.to(self.y)

    @property
    def examples(self) -> Examples:
        """The parts of the problem that a form in closed form uses."""
        return Examples(self.Z, self.y, self.weight, self.sampler.generator)
