"""Recipe: the settings of gradient descent."""

from __future__ import annotations

import operator
from dataclasses import dataclass

__all__ = ["Recipe"]


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
    """Examples in a mini-batch. None takes a fifteenth of the examples, 40 at least and 128 at most
    (:meth:`batch_for`)."""
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

    def batch_for(self, examples: int) -> int:
        """Choose the number of examples in a mini-batch.

        On few examples, small batches save time. With 600 examples of digits, batches of 40 instead of 128 save a third
        of it, and errors on new digits are 6 % larger (``benchmarks.fit_speed --digits``).

        Args:
            examples: Number of examples of the fit.

        Example:
            >>> [Recipe().batch_for(examples) for examples in (60, 600, 1000, 10_000)]
            [40, 40, 64, 128]
            >>> Recipe(batch_size=64).batch_for(600)
            64
        """
        if self.batch_size is not None:
            return self.batch_size
        return min(128, max(40, examples // 15 // 8 * 8))
