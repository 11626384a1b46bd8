"""Sampler: random batches with more positives than in the data.

Conventions:
    M examples, m rows of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_xnn.training._recipe import Recipe

__all__ = ["Sampler"]


class Sampler:
    r"""Draw batches of row indices with more positives than in the data.

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
        self.size, self.generator = recipe.batch_for(rows), generator
        marked = torch.zeros(rows, dtype=torch.bool, device="cpu") if positives is None else positives.cpu()
        seed = generator.initial_seed() % 2**62
        self.pool, self.held_out = torch.arange(rows, device="cpu"), torch.zeros(0, dtype=torch.long, device="cpu")
        if recipe.patience is not None:
            held_out = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + 2), device="cpu")[
                : min(rows // 10, 1000)
            ]
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
        expected = torch.full((rows,), self.counts[0] / len(self.pool), dtype=torch.float64, device="cpu")
        expected[marked] += drawn / max(1, len(self.positives))
        self.row_weight = (expected / expected.mean()).float()
        """How often each example is drawn, (M,), 1 on average. A held-out example has the weight of its kind."""

    def draw(self) -> Tensor:
        """Draw row indices (m,)."""
        return self._drawn(self.pool, self.positives, self.counts, self.generator)

    def _drawn(self, pool: Tensor, positives: Tensor, counts: tuple[int, int], generator: torch.Generator) -> Tensor:
        found = pool[torch.randint(len(pool), (counts[0],), generator=generator, device="cpu")]
        if not counts[1]:
            return found
        # A separate stream, so that rows drawn from all examples are the same for every choice of positives.
        more = torch.randint(len(positives), (counts[1],), generator=self._of_positives, device="cpu")
        return torch.cat([found, positives[more]])

    def draw_held_out(self) -> Tensor:
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
            rows: Row indices from :meth:`draw`.
        """
        return 1 / (self.size * self.row_weight[rows])
