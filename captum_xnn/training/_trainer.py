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
from torch.func import functional_call, vmap
from tqdm import tqdm

from captum_xnn.activations._memmap import Rows, each
from captum_xnn.errors import CheckpointError
from captum_xnn.models._base import Autoencoder, Loss, Reconstruction, Scaling
from captum_xnn.models._scaling import scaling
from captum_xnn.training._anchors import anchors_of_each
from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._problem import Problem, Recipe, Step

__all__ = ["descend"]

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
) -> list[list[Step]]:
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
        >>> from captum_xnn.training._problem import Sampler
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
    histories: list[list[Step]] = []
    size = min(first.ranks.all_of(_together(xnns[0], len(xnns))))  # free memory may differ between devices
    steps = first.recipe.steps * math.ceil(len(xnns) / size)
    with tqdm(total=steps, desc="fitting the x-features", disable=not first.progress, leave=False) as bar:
        for start in range(0, len(xnns), size):
            some = slice(start, start + size)
            stack = _Stack(xnns[some], problems[some], by[some], Z, loss, pretraining)
            histories += stack.run(bar)
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


class _Stack:
    """Explainers that learn at the same time: their stacked weights, and the state of training."""

    def __init__(
        self,
        xnns: Sequence[Autoencoder],
        problems: Sequence[Problem],
        by: Sequence[Scaling],
        Z: Tensor | Rows,
        loss: Callable[[], Loss],
        pretraining: float,
    ) -> None:
        self.xnns, self.problems, self.Z, self.make_loss, self.pretraining = xnns, problems, Z, loss, pretraining
        self.recipe, self.ranks, self.loss = problems[0].recipe, problems[0].ranks, loss()
        self.y = torch.stack([(p.y - s.y_mean) / s.y_std for p, s in zip(problems, by, strict=True)])
        self.samplers = [p.sampler for p in problems]
        watch = _watched(self.samplers, self.recipe)
        self.watch = watch.to(self.y.device)
        """Held-out rows, (T, rows). ``watch_weight`` is the share of the training set that each represents."""
        self.watch_weight = torch.stack([s.weight(r) for s, r in zip(self.samplers, watch, strict=False)] or [watch])
        self.watch_weight = self.watch_weight.to(self.y)
        self.anchored = self._anchors() if pretraining > 0 else None
        self._set_alive(list(range(len(xnns))))
        self.step = 0
        self.history: list[tuple[int, list[int], Tensor]] = []
        self.n_sent = 0
        self.best = self.y.new_full((len(xnns),), math.inf)
        self.best_step = torch.zeros(len(xnns), dtype=torch.long, device=self.y.device)
        state = [dict(xnn.named_parameters()) | dict(xnn.named_buffers()) for xnn in xnns]
        learned = {name for name, p in xnns[0].named_parameters() if p.requires_grad}
        stacked = {name: torch.stack([s[name].detach() for s in state]) for name in state[0]}
        self.weights = {name: t.requires_grad_(name in learned) for name, t in stacked.items()}
        self.best_weights = {name: t.detach().clone() for name, t in self.weights.items()} if len(self.watch) else {}
        self._optimise()
        self.checkpoint, self.key = problems[0].checkpoint, ""
        if self.checkpoint is not None:
            key = Checkpoint.key(_signature(x, p, by[0]) for x, p in zip(xnns, problems, strict=True))
            self.key = self.ranks.all_of(key)[0]  # the key of the writing process

    def _set_alive(self, which: list[int]) -> None:
        """Store the numbers of the explainers that still learn, as a list and on the device."""
        self.alive, self.places = which, torch.tensor(which, dtype=torch.long, device=self.y.device)

    def _optimise(self) -> None:
        """Create an optimiser for the present weights."""
        rate = self.recipe.learning_rate or self.xnns[0].learning_rate
        learned = {name: p for name, p in self.weights.items() if p.requires_grad}
        given = self.recipe.weight_decay
        decay = self.xnns[0].weight_decay if given is None else given
        decays = [name.endswith("weight") and not name.startswith("head.") for name in learned]
        groups = [
            {"params": [p for p, d in zip(learned.values(), decays, strict=True) if d], "weight_decay": decay},
            {"params": [p for p, d in zip(learned.values(), decays, strict=True) if not d], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW([g for g in groups if g["params"]], rate, fused=True)
        self.rate = rate

    def _anchors(self) -> Tensor:
        """Set the heads to the anchors' weights, and return the anchors of all explainers, (T, M, n)."""
        flat = each(self.Z, lambda part: part.flatten(1))
        weights = torch.stack([problem.weight for problem in self.problems])
        found = anchors_of_each(flat, self.y, self.xnns[0].n_features, weights=weights, balance=self.recipe.balance)
        E = self.y.new_full((len(found), self.y.shape[1], self.xnns[0].n_features), math.nan)
        for t, (xnn, made) in enumerate(zip(self.xnns, found, strict=True)):
            r = made.v.shape[1]
            with torch.no_grad():
                xnn.head.weight[:, :r] = self.ranks.same(made.v)
            E[t, :, :r] = made.E
        return self.ranks.same(E)

    def run(self, bar: Any) -> list[list[Step]]:
        """Train, write the learned weights into the networks, and return the histories.

        Args:
            bar: Progress bar to advance by one for each step.
        """
        self._resume(bar)
        while self.alive and self.step < self.recipe.steps:
            count = min(_BLOCK, self.recipe.steps - self.step)
            drawn = torch.stack([torch.stack([s.draw() for s in self.samplers]) for _ in range(count)])
            weight = torch.stack([s.weight(drawn[:, t]) for t, s in enumerate(self.samplers)], 1)
            rows, weight = (self.ranks.part(some).to(self.y.device) for some in (drawn, weight))
            for now in range(count):
                if not self.alive:
                    break
                self._take(rows[now][self.places], weight[now][self.places].to(self.y))
                bar.update(1)
            if self.checkpoint is None or self.checkpoint.due():
                self._keep_record()
        self._finish(range(len(self.alive)))
        self.alive = []
        bar.update(self.recipe.steps - self.step)
        self._keep_record()
        return [
            [Step(step, *terms[members.index(t)].tolist()) for step, members, terms in self.history if t in members]
            for t in range(len(self.xnns))
        ]

    def _take(self, rows: Tensor, weight: Tensor) -> None:
        """Take a step on a batch with rows (T, m), without waiting for the device."""
        share = self.step / self.recipe.steps
        Z, y = _rows(self.Z, rows), self.y[self.places[:, None], rows]
        made = self._made(Z)
        terms = self.loss(made, Z, y, weight=weight)
        total = terms.total.sum()
        hold = _hold(share, self.pretraining)
        if self.anchored is not None and hold:
            total = total + hold * _off_anchor(made.E, self.anchored[self.places[:, None], rows]).sum()
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        for p in self.weights.values():
            if p.grad is not None:
                self.ranks.average(p.grad)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * _rate(share)
        self.optimiser.step()
        often = max(1, self.recipe.steps // 50)
        if self.step % often == 0 or self.step == self.recipe.steps - 1:
            self.history.append((self.step, list(self.alive), torch.stack(terms[1:], 1).detach()))
        self.step += 1
        if len(self.watch) and (self.step % often == 0 or self.step == self.recipe.steps):
            self._check()

    def _made(self, Z: Tensor) -> Reconstruction:
        """Run the networks on activations (T, m, ...), and return their outputs in the dtype of the activations."""
        weights, some = self.weights, Z
        if self.recipe.mixed_precision:  # cast by hand, because autocast does not act inside vmap
            weights, some = {k: t.bfloat16() for k, t in weights.items()}, Z.bfloat16()
        return Reconstruction(*(part.to(Z.dtype) for part in self._networks(weights, some)))

    def _networks(self, weights: dict[str, Tensor], Z: Tensor) -> Reconstruction:
        if len(Z) == 1:  # forms of users need not support vmap
            made = functional_call(self.xnns[0], {k: t[0] for k, t in weights.items()}, (Z[0],))
            return Reconstruction(*(part[None] for part in made))

        def one(weights: dict[str, Tensor], some: Tensor) -> Any:
            return functional_call(self.xnns[0], weights, (some,))

        return Reconstruction(*vmap(one, randomness="different")(weights, Z))

    @torch.no_grad()
    def _check(self) -> None:
        """Keep the best weights on held-out examples, and stop explainers that no longer improve."""
        rows = self.watch[self.places]
        Z, y = _rows(self.Z, rows), self.y[self.places[:, None], rows]
        now = self.make_loss()(self._made(Z), Z, y, weight=self.watch_weight[self.places]).total
        better = now < self.best[self.places]
        self.best[self.places] = torch.where(better, now, self.best[self.places])
        self.best_step[self.places] = torch.where(better, self.step, self.best_step[self.places])
        for name, kept in self.best_weights.items():
            kept[better] = self.weights[name].detach()[better]
        late = self.step - self.best_step[self.places] >= (self.recipe.patience or 1) * self.recipe.steps
        late &= self.step >= (self.pretraining + _RELEASE) * self.recipe.steps
        if bool(late.any()):
            self._finish(late.nonzero()[:, 0].tolist())
            self._keep(~late)

    def _finish(self, places: Sequence[int]) -> None:
        """Write the weights of some explainers that still learn into their networks."""
        source = self.best_weights or self.weights
        with torch.no_grad():
            for place in places:
                xnn = self.xnns[self.alive[place]]
                for name, target in (*xnn.named_parameters(), *xnn.named_buffers()):
                    target.copy_(source[name][place])

    def _keep(self, which: Tensor) -> None:
        """Continue with some of the explainers, and keep their state of training."""
        old = self.optimiser.state
        self._set_alive([t for t, kept in zip(self.alive, which.tolist(), strict=True) if kept])
        weights = {k: t.detach()[which].clone().requires_grad_(t.requires_grad) for k, t in self.weights.items()}
        states = {k: old[t] for k, t in self.weights.items() if t in old}
        self.weights = weights
        self.best_weights = {k: t[which] for k, t in self.best_weights.items()}
        self._optimise()
        for name, state in states.items():
            kept = {k: v[which].clone() if v.dim() else v for k, v in state.items()}
            self.optimiser.state[weights[name]] = kept
        for statistic in getattr(self.loss, "statistics", ()):
            statistic.keep(which)

    def _keep_record(self) -> None:
        """Send new records to the callbacks, and write a checkpoint.

        Both happen together, so a resumed fit repeats no record and skips none.
        """
        if self.ranks.first:
            self._send()
            self._save()

    def _send(self) -> None:
        """Send new records to the callbacks."""
        for step, members, terms in self.history[self.n_sent :]:
            for t, row in zip(members, terms, strict=True):
                log = self.problems[t].log
                if log is not None:
                    log(Step(step, *row.tolist()))
        self.n_sent = len(self.history)

    def _save(self) -> None:
        """Write a checkpoint, if the fit has a folder for checkpoints."""
        if self.checkpoint is None:
            return
        self.checkpoint.write(
            self.key,
            {
                "step": self.step,
                "alive": self.alive,
                "done": {str(t): dict(xnn.state_dict()) for t, xnn in enumerate(self.xnns) if t not in self.alive},
                "weights": {k: t.detach() for k, t in self.weights.items()},
                "best_weights": self.best_weights,
                "best": self.best,
                "best_step": self.best_step,
                "optimiser": self.optimiser.state_dict(),
                "statistics": [s.state for s in getattr(self.loss, "statistics", ())],
                "samplers": [s.state for s in self.samplers],
                "history": [(step, members, terms.cpu()) for step, members, terms in self.history],
            },
        )

    def _resume(self, bar: Any) -> None:
        """Resume from the last checkpoint of this fit, if there is one."""
        if self.checkpoint is None:
            return
        saved = self.checkpoint.read(self.key, self.y.device)
        found = self.ranks.all_of(0 if saved is None else saved["step"])
        if len(set(found)) > 1:
            raise CheckpointError(
                f"processes cannot resume from one checkpoint, because in {str(self.checkpoint.folder)!r} they found "
                f"steps {found}; name a folder that all of them share"
            )
        if saved is None:
            return
        self.step = saved["step"]
        self._set_alive(saved["alive"])
        for t, state in saved["done"].items():
            self.xnns[int(t)].load_state_dict(state)
        self.weights = {k: t.requires_grad_(self.weights[k].requires_grad) for k, t in saved["weights"].items()}
        self.best_weights, self.best, self.best_step = saved["best_weights"], saved["best"], saved["best_step"]
        self._optimise()
        self.optimiser.load_state_dict(saved["optimiser"])
        for statistic, state in zip(getattr(self.loss, "statistics", ()), saved["statistics"], strict=True):
            statistic.state = state
        for sampler, state in zip(self.samplers, saved["samplers"], strict=True):
            sampler.state = state
        self.history = [(step, members, terms.to(self.y.device)) for step, members, terms in saved["history"]]
        self.n_sent = len(self.history)
        bar.update(self.step)


def _signature(xnn: Autoencoder, problem: Problem, by: Scaling) -> list[Any]:
    """Collect the values that identify a fit."""
    tensors = [by.Z_mean, by.Z_std, problem.y, problem.sampler.row_weight, *xnn.state_dict().values()]
    return [type(xnn).__name__, repr(problem.recipe), problem.ranks.world, *tensors]


def _watched(samplers: Sequence[Any], recipe: Recipe) -> Tensor:
    """Draw the held-out rows for checks during training, (T, rows); empty without patience."""
    if recipe.patience is None:
        return torch.zeros(0, 0, dtype=torch.long)
    return torch.stack([s.watched() for s in samplers])


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


def _hold(done: float, pretraining: float) -> float:
    """Compute the weight of the anchors after a share of the steps: 1 in pre-training, then falling to 0 in a tenth."""
    return max(0.0, min(1.0, 1 - (done - pretraining) / _RELEASE))


def _off_anchor(E: Tensor, anchored: Tensor) -> Tensor:
    """Compute the mean squared distance of x-features (T, m, n) from their anchors over examples, (T,).

    If Z has fewer useful directions than x-features, the remaining x-features have anchors of NaN. NaN does not count.
    """
    return torch.where(anchored.isnan(), 0.0, E - anchored).square().sum(2).mean(1)
