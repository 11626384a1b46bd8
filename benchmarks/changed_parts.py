"""Pairs of images that differ in one part, as the layer sees them: what each x-feature makes of the difference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import synthetic
from captum_xnn.activations import collect
from captum_xnn.metrics._removal import PairShare, pair_share

MEMBERS = 60


class Pairs(NamedTuple):
    """Images of one class, each with one part after the other changed."""

    Z: Tensor
    """Activations of the images, (n, D)."""
    changed: Tensor
    """Activations with each part changed, (n, P, D)."""
    differs: Tensor
    """Which pairs differ, boolean, (n, P): an invisible part cannot change."""
    counts: Tensor
    """Which parts are reasons of the class, boolean, (P,)."""

    @property
    def every(self) -> Tensor:
        """Activations of all images, those with a changed part last, (n + n P, D)."""
        return torch.cat([self.Z, self.changed.flatten(0, 1)]).float()

    @property
    def enough(self) -> bool:
        """Whether each reason has the two pairs that a share needs."""
        return bool(((self.differs & self.counts).sum(0)[self.counts] > 1).all())

    def changes(self, contributions: Tensor) -> Tensor:
        """Returns what contributions of all images, (n + n P, K), lose by each change, (n, P, K); 0 without one."""
        E, changed = contributions[: len(self.Z)], contributions[len(self.Z) :]
        lost = E[:, None] - changed.reshape(*self.differs.shape, -1)
        return torch.where(self.differs[:, :, None], lost, 0)

    def share(self, changes: Tensor, seed: int) -> PairShare:
        """Returns how far each reason has an x-feature of its own, from changes (n, P, K)."""
        images, parts = (self.differs & self.counts).nonzero().T
        return pair_share(changes[images, parts], parts, seed=seed)


def of_figures(of: synthetic.Explained, label: int) -> Pairs:
    """Returns members of a class that the network tells right, with another look of each part."""
    figures = of.test.figures
    rows = ((figures.labels == label) & (of.test.y_hat.argmax(1) == label)).nonzero()[:MEMBERS, 0]
    parts = range(len(figures.PARTS))
    changed = torch.stack(
        [collect(of.model, of.layer, figures.changed(p, seed=p).images[rows]).Z[:].flatten(1) for p in parts], 1
    )
    counts = torch.zeros(len(parts), dtype=torch.bool)
    counts[figures.reason_parts(label)] = True
    return Pairs(of.test.Z[:].flatten(1)[rows], changed, figures.looks[rows] >= 0, counts)


def of_birds(Z: Tensor, without: Tensor) -> Pairs:
    """Returns birds, (n, D), and the same without each part, (n, P, D): every part counts."""
    every = torch.ones(without.shape[:2], dtype=torch.bool)
    return Pairs(Z, without, every, every[0])
