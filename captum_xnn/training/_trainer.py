r"""Gradient descent on Eq. 5, for one explainer or for many that share their activations.

Explainers of one form and size learn together. Their weights are stacked, (T, out, in), and one batched product serves
all of them. Each result equals that of a fit alone, up to the order of sums: weights, batches and schedule depend on
the seed only, and explainers exchange no numbers. They share the rows of each batch that are drawn from all examples.

Conventions:
    T explainers, M examples, m examples in a batch, D dimensions of Z, n x-features, C explained outputs.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, Eq. 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from captum_xnn.activations._memmap import Rows, each
from captum_xnn.layers._threads import one_thread_if_small
from captum_xnn.models._base import Autoencoder, Loss, Scaling
from captum_xnn.models._scaling import scaling
from captum_xnn.training._anchors import anchors_of_each
from captum_xnn.training._checkpoint import FitCheckpoint
from captum_xnn.training._early_stopping import EarlyStopping
from captum_xnn.training._history import History, Record
from captum_xnn.training._problem import Problem
from captum_xnn.training._stack import Stack

__all__ = ["Trainer", "descend"]

# Steps in a block. A block draws its rows, and copies them to the device, at once. Checkpoints are written between
# blocks.
_BLOCK = 25
# Largest stacked weight on a CPU, in bytes. Stacking makes larger products a fifth slower (benchmarks/many_targets.py).
# It speeds up small products, because their calls take longer than their arithmetic.
_CPU_STACK = 4 << 20
# Share of the steps in which the pull of the anchors falls to 0.
_RELEASE = 0.1
# Copies of the weights in memory: weights, gradients, Adam's two moments, and temporary products.
_COPIES = 6

# Means and standard deviations that leave data unchanged.
_UNITS = (torch.zeros_like, torch.ones_like, torch.zeros_like, torch.ones_like)


def _standardised(Z: Tensor | Rows, by: Scaling) -> Any:
    """Standardise Z; rows on disk when they are read."""
    shape = (1, -1, *[1] * (Z.dim() - 2))
    return each(Z, lambda part: (part - by.Z_mean.reshape(shape)) / by.Z_std.reshape(shape))


def descend(
    xnns: Sequence[Autoencoder],
    problems: Sequence[Problem],
    loss: Callable[[], Loss],
    *,
    pretraining: float = 0.0,
    standardise: bool = True,
) -> list[list[Record]]:
    """Minimise a loss by gradient descent, and return the histories.

    Args:
        xnns: Networks of one form and size, with random weights. Weights that require no gradient stay unchanged.
        problems: For each network its problem. All share Z and the recipe.
        loss: Creates the loss of a stack of explainers.
        pretraining: Share of the steps that also pull the x-features to their anchors.
        standardise: Whether to standardise Z and the outputs during descent.

    Example:
        >>> from captum_xnn.models._objectives import RunningObjective
        >>> from captum_xnn.models._srae import SRAE
        >>> from captum_xnn.training._recipe import Recipe
        >>> from captum_xnn.training._sampler import Sampler
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> recipe, generator = Recipe(steps=100), torch.Generator().manual_seed(0)
        >>> srae = SRAE(8, n_features=2, hidden=())
        >>> srae.reset(generator)
        >>> problem = Problem(Z, Z[:, :1], Sampler(None, 200, recipe, generator), recipe)
        >>> (history,) = descend([srae], [problem], RunningObjective)
        >>> history[-1].faithfulness < history[0].faithfulness
        True
    """
    first = problems[0]
    by = [scaling(first.Z, first.y)]
    by += [Scaling(*by[0][:2], p.y.mean(0), p.y.std(0)) for p in problems[1:]]
    if not standardise:
        by = [Scaling(*(fill(t) for t, fill in zip(one, _UNITS, strict=True))) for one in by]
    Z = _standardised(first.Z, by[0])
    histories: list[list[Record]] = []
    size = min(first.ranks.all_of(_together(xnns[0], len(xnns))))  # free memory may differ between devices
    steps = first.recipe.steps * math.ceil(len(xnns) / size)
    with tqdm(total=steps, desc="fitting the x-features", disable=not first.progress, leave=False) as bar:
        for start in range(0, len(xnns), size):
            some = slice(start, start + size)
            histories += Trainer(xnns[some], problems[some], by[some], Z, loss, pretraining).run(bar)
    for xnn, scales in zip(xnns, by, strict=True):
        xnn.fold(scales)
    return histories


def _together(xnn: Autoencoder, wanted: int) -> int:
    """Compute the number of explainers in a stack; all stacks have nearly the same size."""
    weights = list(xnn.parameters())
    if weights[0].device.type == "cuda":
        free = torch.cuda.mem_get_info(weights[0].device)[0] // 2
        most = free // (_COPIES * sum(p.numel() * p.element_size() for p in weights))
    else:
        most = _CPU_STACK // max(p.numel() * p.element_size() for p in weights)
    return math.ceil(wanted / math.ceil(wanted / max(1, most)))


class Trainer:
    """Gradient descent of networks that learn at the same time.

    Args:
        xnns: The networks.
        problems: For each network its problem. All share Z and the recipe.
        by: For each network the scales of its data.
        Z: Standardised activations.
        loss: Creates the loss of a stack of networks.
        pretraining: Share of the steps that also pull the x-features to their anchors.
    """

    def __init__(
        self,
        xnns: Sequence[Autoencoder],
        problems: Sequence[Problem],
        by: Sequence[Scaling],
        Z: Tensor | Rows,
        loss: Callable[[], Loss],
        pretraining: float,
    ) -> None:
        self.Z, self.make_loss, self.pretraining = Z, loss, pretraining
        self.recipe, self.ranks, self.loss = problems[0].recipe, problems[0].ranks, loss()
        self.y = torch.stack([(p.y - s.y_mean) / s.y_std for p, s in zip(problems, by, strict=True)])
        self.samplers = [p.sampler for p in problems]
        self.anchored = _start_at_anchors(xnns, problems, Z, self.y) if pretraining > 0 else None
        self.stack = Stack(xnns, self.recipe)
        self.early_stopping = self._early_stopping()
        self.history = History([p.log for p in problems])
        signatures = (_signature(x, p, by[0]) for x, p in zip(xnns, problems, strict=True))
        self.checkpoint = FitCheckpoint(problems[0].checkpoint, signatures, self.ranks)
        self.step = 0

    def _early_stopping(self) -> EarlyStopping | None:
        if self.recipe.patience is None:
            return None
        return EarlyStopping(
            self.samplers,
            self.stack.weights,
            self.y,
            patience=self.recipe.patience * self.recipe.steps,
            earliest=(self.pretraining + _RELEASE) * self.recipe.steps,
        )

    def run(self, bar: Any) -> list[list[Record]]:
        """Train, write the learned weights into the networks, and return the histories.

        Args:
            bar: Progress bar to advance by one for each step.
        """
        with one_thread_if_small(self._flops()):
            return self._run(bar)

    def _flops(self) -> float:
        """Estimate the additions and multiplications of one step: each weight serves three products."""
        learned = sum(w.numel() for w in self.stack.weights.values())
        return 6.0 * learned * self.samplers[0].size

    def _run(self, bar: Any) -> list[list[Record]]:
        self._resume(bar)
        while self.stack.alive and self.step < self.recipe.steps:
            for rows, weight in zip(*self._drawn(min(_BLOCK, self.recipe.steps - self.step)), strict=True):
                if not self.stack.alive:
                    break
                self._take(rows, weight)
                bar.update(1)
            if self.checkpoint.due():
                self._save()
        self._finish(range(len(self.stack.alive)))
        self.stack.close()
        bar.update(self.recipe.steps - self.step)
        self._save()
        return self.history.of_each()

    def _drawn(self, steps: int) -> tuple[Tensor, Tensor]:
        """Draw this process's part of some batches: row indices and weights of rows, (steps, T, m)."""
        drawn = torch.stack([torch.stack([s.draw() for s in self.samplers]) for _ in range(steps)])
        weight = torch.stack([s.weight(drawn[:, t]) for t, s in enumerate(self.samplers)], 1)
        return self.ranks.part(drawn).to(self.y.device), self.ranks.part(weight).to(self.y.device)

    def _take(self, rows: Tensor, weight: Tensor) -> None:
        """Take a step on batches with rows (T, m), without waiting for the device."""
        share, alive = self.step / self.recipe.steps, self.stack.alive_index
        rows = rows[alive]
        Z, y = self._examples(rows)
        reconstruction = self.stack.outputs(Z)
        terms = self.loss(reconstruction, Z, y, weight=weight[alive].to(y))
        total = terms.total.sum()
        anchor_weight = _anchor_weight(share, self.pretraining)
        if self.anchored is not None and anchor_weight:
            total = (
                total
                + anchor_weight * _distance_from_anchors(reconstruction.E, self.anchored[alive[:, None], rows]).sum()
            )
        self.stack.step(total, _rate(share), self.ranks)
        often, last = max(1, self.recipe.steps // 50), self.recipe.steps - 1
        if self.step % often == 0 or self.step == last:
            self.history.add(self.step, self.stack.alive, torch.stack(terms[1:], 1).detach())
        self.step += 1
        if self.early_stopping is not None and (self.step % often == 0 or self.step == self.recipe.steps):
            self._check(self.early_stopping)

    def _examples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Select activations (T, m, ...) and outputs (T, m, C) of rows (T, m)."""
        return _rows(self.Z, rows), self.y[self.stack.alive_index[:, None], rows]

    @torch.no_grad()
    def _check(self, early: EarlyStopping) -> None:
        """Keep the best weights on held-out examples, and stop networks that no longer improve."""
        Z, y = self._examples(early.rows)
        losses = self.make_loss()(self.stack.outputs(Z), Z, y, weight=early.row_weight).total
        stopping = early.to_stop(self.step, losses, self.stack.weights)
        if bool(stopping.any()):
            self._finish(stopping.nonzero()[:, 0].tolist())
            for part in (self.stack, early, *self._statistics):
                part.keep(~stopping)

    def _finish(self, positions: Sequence[int]) -> None:
        """Write the weights of some networks that still learn into them."""
        early = self.early_stopping
        self.stack.write(positions, self.stack.weights if early is None else early.best_weights)

    @property
    def _statistics(self) -> Sequence[Any]:
        """Running statistics of the loss."""
        return getattr(self.loss, "statistics", ())

    def _save(self) -> None:
        """Send new records to the callbacks, and write a checkpoint.

        Both happen together, so a resumed fit repeats no record and skips none.
        """
        if self.ranks.first:
            self.history.send()
            self.checkpoint.write(self._state)

    def _state(self) -> dict[str, Any]:
        """Collect the state of the training for a checkpoint."""
        return {
            "step": self.step,
            "stack": self.stack.state,
            "early_stopping": None if self.early_stopping is None else self.early_stopping.state,
            "statistics": [s.state for s in self._statistics],
            "samplers": [s.state for s in self.samplers],
            "history": self.history.state,
        }

    def _resume(self, bar: Any) -> None:
        """Resume from the last checkpoint of this fit, if there is one."""
        saved = self.checkpoint.read(self.y.device)
        if saved is None:
            return
        self.step, self.stack.state, self.history.state = saved["step"], saved["stack"], saved["history"]
        if self.early_stopping is not None:
            self.early_stopping.state = saved["early_stopping"]
        for part, state in zip(
            (*self._statistics, *self.samplers), (*saved["statistics"], *saved["samplers"]), strict=True
        ):
            part.state = state
        bar.update(self.step)


def _start_at_anchors(xnns: Sequence[Autoencoder], problems: Sequence[Problem], Z: Tensor | Rows, y: Tensor) -> Tensor:
    """Set the heads to the anchors' weights, and return the anchors of all networks, (T, M, n)."""
    ranks, n = problems[0].ranks, xnns[0].n_features
    weights = torch.stack([problem.weight for problem in problems])
    flat = each(Z, lambda part: part.flatten(1))
    with one_thread_if_small(2.0 * len(weights) * math.prod(flat.shape)):
        found = anchors_of_each(flat, y, n, weights=weights, balance=problems[0].recipe.balance)
    E = y.new_full((len(found), y.shape[1], n), math.nan)
    for t, (xnn, made) in enumerate(zip(xnns, found, strict=True)):
        r = made.v.shape[1]
        with torch.no_grad():
            xnn.head.weight[:, :r] = ranks.same(made.v)
        E[t, :, :r] = made.E
    return ranks.same(E)


def _signature(xnn: Autoencoder, problem: Problem, by: Scaling) -> list[Any]:
    """Collect the values that identify a fit."""
    tensors = [by.Z_mean, by.Z_std, problem.y, problem.sampler.row_weight, *xnn.state_dict().values()]
    return [type(xnn).__name__, repr(problem.recipe), problem.ranks.world, *tensors]


def _rows(Z: Tensor | Rows, rows: Tensor) -> Tensor:
    """Select activations (T, m, ...) of rows (T, m). Read a row on disk once, even if several explainers use it."""
    if isinstance(Z, Tensor):
        return Z[rows]
    needed, where = torch.unique(rows, return_inverse=True)
    return Z[needed][where]


def _rate(done: float) -> float:
    """Compute the factor of the learning rate after a share of the steps.

    It rises in a twentieth of the steps, stays as long, and then follows a cosine.
    """
    return max(min(done / 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * max(0.0, done - 0.1) / 0.9)), 1e-3)


def _anchor_weight(done: float, pretraining: float) -> float:
    """Compute the weight of the anchors after a share of the steps: 1 in pre-training, then falling to 0 in a tenth."""
    return max(0.0, min(1.0, 1 - (done - pretraining) / _RELEASE))


def _distance_from_anchors(E: Tensor, anchored: Tensor) -> Tensor:
    """Compute the mean squared distance of x-features (T, m, n) from their anchors over examples, (T,).

    If Z has fewer useful directions than x-features, the remaining x-features have anchors of NaN. NaN does not count.
    """
    return torch.where(anchored.isnan(), 0.0, E - anchored).square().sum(2).mean(1)
