"""Problem: activations and outputs that a network learns from, with sampler, recipe and checkpoint.

Conventions:
    M examples, D dimensions of Z, C explained outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from captum_xnn._distributed import ALONE, Ranks
from captum_xnn.activations._memmap import Rows
from captum_xnn.models._base import TrainingExamples
from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._history import Record
from captum_xnn.training._recipe import Recipe
from captum_xnn.training._sampler import Sampler

__all__ = ["Problem"]


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
    log: Callable[[Record], None] | None = None
    """Callback that receives each new record of the history."""
    ranks: Ranks = ALONE
    """Processes that learn together."""

    @property
    def weight(self) -> Tensor:
        """Weights of the examples, (M,), 1 on average: how often batches contain each example."""
        return self.sampler.row_weight.to(self.y)

    @property
    def examples(self) -> TrainingExamples:
        """The parts of the problem that a form in closed form uses."""
        return TrainingExamples(self.Z, self.y, self.weight, self.sampler.generator)
