r"""Fits a Sparse Reconstruction Autoencoder to activations and outputs: the recipe, with its settings.

The recipe, found by measurement (see the page "How the training recipe was found"):

1. Z and the output are standardised, so that no setting depends on the model's scales.
2. Batches hold a fixed share of positives, which weights them against the imbalance.
3. Pre-training: beside Eq. 5 the x-features are drawn to their anchors (:mod:`captum_xnn.anchors`).
4. Then Eq. 5 alone. Its statistics over the training set, :math:`Q_k` and the inner products of the pull-away term,
   are running means over mini-batches (:class:`~captum_xnn.losses.RunningMean`).
5. The result is rewritten to the model's own units; x-features get mean 0 and standard deviation 1 over the training
   data, a positive weight v, and the order of their mean contribution to the positives.

Differs from the paper:
    The pull-away term is taken about the mean (squared correlations, not cosines); the start is the anchors, not a
    stacked autoencoder; the x-layer is linear. Adam with a cosine schedule replaces stepwise decay.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, Eq. 5.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from captum_xnn.anchors import Anchors, anchors
from captum_xnn.autoencoder import Autoencoder, Objective, Reconstruction, Scaling
from captum_xnn.losses import (
    RunningMean,
    faithfulness,
    log_penalty,
    pull_away_of_moments,
    reconstruction_error,
    second_moments,
)
from captum_xnn.problem import Problem, Recipe, Sampler, Step
from captum_xnn.rows import Rows, each, parts

__all__ = ["Loss", "RunningObjective", "descend", "encode_all", "fit", "scaling"]


class Loss(Protocol):
    """What is minimised: the total of the terms that it returns of a batch."""

    def __call__(self, made: Reconstruction, Z: Tensor, y_hat: Tensor, *, weight: Tensor | None = None) -> Objective:
        """Returns the terms on a batch; arguments as :meth:`RunningObjective.__call__` takes them."""
        ...


class RunningObjective:
    """Eq. 5 over the whole training set, estimated over mini-batches with gradients for the newest one.

    Args:
        beta: Weight of the sparse reconstruction.
        eta: Weight of the pull-away term.
        q: Sparsity parameter.
        rho: Share of the newest batch in the running statistics.

    Example:
        >>> from captum_xnn.srae import SRAE
        >>> Z = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
        >>> _ = torch.manual_seed(0)
        >>> terms = RunningObjective()(SRAE(8, 2, hidden=())(Z), Z, Z[:, :1])
        >>> bool(terms.total == terms.faithfulness + terms.sparse_reconstruction + terms.pull_away)
        True
    """

    def __init__(self, *, beta: float = 1.0, eta: float = 1.0, q: float = 1.0, rho: float = 0.1) -> None:
        self.beta, self.eta, self.q = beta, eta, q
        self._Q, self._mean, self._moments = RunningMean(rho), RunningMean(rho), RunningMean(rho)

    def __call__(self, made: Reconstruction, Z: Tensor, y_hat: Tensor, *, weight: Tensor | None = None) -> Objective:
        """Returns the objective and its terms after taking in a batch.

        Args:
            made: What the network makes of the batch.
            Z: Activations (m, ...) of the batch.
            y_hat: Outputs (m, C).
            weight: Weights (m,) by which the batch stands for the training set, in the pull-away term. Faithfulness and
                reconstruction count every row of the batch alike, and so weight what was drawn more often.
        """
        Q = self._Q(reconstruction_error(made.Z_tilde, Z))
        first = second_moments(torch.cat([made.E, torch.ones_like(made.E[:, :1])], 1), weight=weight)
        mean = self._mean(first[:-1, -1]).detach()
        moments = self._moments(second_moments(made.E - mean, weight=weight))
        terms = faithfulness(made.y_bar, y_hat), log_penalty(Q, self.q), pull_away_of_moments(moments)
        return Objective(terms[0] + self.beta * terms[1] + self.eta * terms[2], *terms)


def scaling(Z: Tensor | Rows, y: Tensor) -> Scaling:
    """Returns by what Z and y are standardised.

    All dimensions of Z share one scale, that of their mean variance: what varies little in the model weighs little here
    too, and the x-features generalise better than with a scale for each dimension (benchmarks/degeneration.py).

    Args:
        Z: Activations (M, D) or (M, channels, H, W), in memory or on disk.
        y: Outputs (M, C).

    Example:
        >>> made = scaling(torch.tensor([[0.0, 4.0], [2.0, 2.0]]), torch.tensor([[1.0], [3.0]]))
        >>> made.Z_mean, made.Z_std
        (tensor([1., 3.]), tensor([1.4142, 1.4142]))
    """
    # One pass about the mean of its beginning, so that no digits are lost where the mean is large.
    shift = _channels_last(next(iter(parts(Z)))).mean(0)
    total, square, count = torch.zeros(len(shift), dtype=torch.float64), 0.0, 0
    for part in parts(Z):
        off = _channels_last(part) - shift
        total += off.sum(0).cpu()
        square += float(off.flatten() @ off.flatten())
        count += len(off)
    beside = total / count
    variance = max(0.0, square - count * float(beside @ beside)) / (count - 1) / len(beside)
    mean = shift + beside.to(shift)
    return Scaling(mean, mean.new_tensor(math.sqrt(variance)).expand_as(mean), y.mean(0), y.std(0))


def _channels_last(Z: Tensor) -> Tensor:
    """Returns (M, channels, H, W) as (M * H * W, channels), and (M, D) as it is."""
    return Z.flatten(2).transpose(1, 2).flatten(0, 1) if Z.dim() > 2 else Z


def _check_varies(Z: Tensor | Rows, y: Tensor) -> None:
    """Raises where there is nothing to learn from, or nothing to learn."""
    by = scaling(Z, y)
    if not bool((by.Z_std > by.Z_mean.abs().max() * torch.finfo(Z.dtype).eps).all()):
        raise ValueError(
            "expected activations that vary, got the same for every example; check the inputs, or explain another layer"
        )
    if not bool((by.y_std > by.y_mean.abs() * torch.finfo(y.dtype).eps * 4).all()):
        raise ValueError(
            "expected an output that varies, got the same for every example; there is nothing to explain, check that "
            "the target is the right one and that the inputs differ"
        )


def _standardised(Z: Tensor | Rows, y: Tensor) -> tuple[Tensor | Rows, Tensor, Scaling]:
    """Returns Z and y standardised, and by what; of Z on disk what is read of it."""
    by = scaling(Z, y)
    mean, std = (values.reshape(1, -1, *[1] * (Z.dim() - 2)) for values in (by.Z_mean, by.Z_std))
    return each(Z, lambda part: (part - mean) / std), (y - by.y_mean) / by.y_std, by


def fit(
    srae: Autoencoder,
    Z: Tensor | Rows,
    y_hat: Tensor,
    *,
    positives: Tensor | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Step]:
    """Returns the history of fitting an autoencoder, in place, to activations and outputs.

    Args:
        srae: The network, on any device; its weights are drawn anew.
        Z: Activations (M, D), or (M, channels, H, W) for the convolutional form, floating-point, on the same device.
            Rows on disk give the same numbers; some megabytes of them at a time, or a batch, are in memory.
        y_hat: Outputs (M, C) to be faithful to, in logits.
        positives: Boolean (M,): the examples of the explained class, to be drawn more often. None draws all alike.
        recipe: Settings of the training.
        seed: Seeds weights and batches; the same seed gives the same result.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If there are fewer than two examples, or if Z or the outputs do not vary.

    Example:
        >>> from captum_xnn.srae import SRAE
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> _ = torch.manual_seed(0)
        >>> srae = SRAE(8, n_features=2, hidden=(16,))
        >>> history = fit(srae, Z, Z[:, :2].sum(1, keepdim=True), recipe=Recipe(steps=600))
        >>> with torch.no_grad():
        ...     float((srae(Z).y_bar - Z[:, :2].sum(1, keepdim=True)).abs().mean()) < 0.1
        True

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, Eq. 5.
    """
    if len(Z) < 2:
        raise ValueError(f"expected at least two examples to learn from, got {len(Z)}; pass more data to fit")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(Z.device.type, enabled=False):
        Z = Z if isinstance(Z, Rows) else Z.detach().clone()
        return _fit(srae, Z, y_hat.detach().clone(), positives, recipe or Recipe(), seed, progress)


def _fit(
    srae: Autoencoder,
    Z: Tensor | Rows,
    y_hat: Tensor,
    positives: Tensor | None,
    recipe: Recipe,
    seed: int,
    progress: bool,
) -> list[Step]:
    """Runs the recipe where gradients flow."""
    generator = torch.Generator().manual_seed(seed)
    srae.reset(generator)
    Z = each(Z, srae.shaped)
    _check_varies(Z, y_hat)
    sampler = Sampler(positives, len(Z), recipe, generator)
    history = srae.learn(Problem(Z, y_hat, sampler, recipe, progress))
    _arrange(srae, Z, positives)
    return history


def descend(
    xnn: Autoencoder,
    problem: Problem,
    loss: Loss,
    *,
    pretraining: float = 0.0,
) -> list[Step]:
    """Returns the history of minimising a loss by gradient descent on standardised data, undone afterwards.

    Args:
        xnn: The network, as drawn. Weights that require no gradient stay so.
        problem: Data, and the settings of optimiser and batches.
        loss: What is minimised.
        pretraining: Share of the steps that teach the anchors beside the loss.

    Example:
        >>> from captum_xnn.problem import Sampler
        >>> from captum_xnn.srae import SRAE
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> recipe, generator = Recipe(steps=100), torch.Generator().manual_seed(0)
        >>> srae = SRAE(8, n_features=2, hidden=())
        >>> srae.reset(generator)
        >>> problem = Problem(Z, Z[:, :1], Sampler(None, 200, recipe, generator), recipe, False)
        >>> history = descend(srae, problem, RunningObjective())
        >>> history[-1].faithfulness < history[0].faithfulness
        True
    """
    Z, y, by = _standardised(problem.Z, problem.y)
    start = None
    if pretraining > 0:
        start = anchors(each(problem.Z, _flat), y, xnn.n_features, weight=problem.weight)
        with torch.no_grad():
            xnn.head.weight[:, : start.v.shape[1]] = start.v
    history = _descend(xnn, Z, y, problem, loss, start, pretraining)
    xnn.fold(by)
    return history


def _descend(
    xnn: Autoencoder,
    Z: Tensor | Rows,
    y: Tensor,
    problem: Problem,
    loss: Loss,
    start: Anchors | None,
    pretraining: float,
) -> list[Step]:
    """Runs the optimisation on standardised data."""
    recipe, sampler = problem.recipe, problem.sampler
    optimiser = torch.optim.Adam(xnn.parameters(), recipe.learning_rate or xnn.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step / recipe.steps))
    weight = sampler.weight.to(y)
    history = []
    for step in tqdm(range(recipe.steps), "fitting the x-features", disable=not problem.progress, leave=False):
        rows = sampler.draw().to(y.device)
        batch, target = Z[rows], y[rows]
        hold = _hold(step / recipe.steps, pretraining) if start else 0.0
        made = xnn(batch)
        terms = loss(made, batch, target, weight=weight)
        total = terms.total
        if start and hold:
            total = total + hold * _off_anchor(made.E, start.E[rows])
        optimiser.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if step % max(1, recipe.steps // 50) == 0 or step == recipe.steps - 1:
            history.append(Step(step, *(float(term.detach()) for term in terms[1:])))
    return history


def _flat(Z: Tensor) -> Tensor:
    return Z.flatten(1)


def _rate(done: float) -> float:
    """Returns the learning rate's factor after a share of the steps: up over a tenth, held, a cosine from 0.3 on."""
    return max(min(done / 0.1, 1.0) * (1.0 if done < 0.3 else 0.5 * (1 + math.cos(math.pi * (done - 0.3) / 0.7))), 1e-3)


def _hold(done: float, pretraining: float) -> float:
    """Returns the weight of the anchors after a share of the steps: 1 in pre-training, then down to 0 in a tenth."""
    return max(0.0, min(1.0, 1 - (done - pretraining) / 0.1))


def _off_anchor(E: Tensor, anchored: Tensor) -> Tensor:
    """Returns the mean over examples of the squared distance of the x-features from their anchors."""
    return ((E[:, : anchored.shape[1]] - anchored) ** 2).sum(1).mean()


@torch.no_grad()
def _arrange(srae: Autoencoder, Z: Tensor | Rows, positives: Tensor | None) -> None:
    """Standardises the x-features over the training data, makes v positive, and sorts them by contribution.

    A dead x-feature, of no variance, is only centred. With several outputs signs and order follow the first.
    """
    E = encode_all(srae, Z)
    mean, std = E.mean(0), E.std(0)
    flip = torch.where(srae.head.weight[0] < 0, -1.0, 1.0)
    scale = torch.where(std > 1e-6, std, 1.0) * flip
    srae.standardise_features(mean, scale)
    given = srae.contributions((E - mean) / scale)
    marked = given if positives is None or not bool(positives.any()) else given[positives.to(given.device)]
    size = marked.mean(0) if marked is not given else given.std(0)
    srae.reorder_features(size.argsort(descending=True))


@torch.no_grad()
def encode_all(srae: Autoencoder, Z: Tensor | Rows, *, batch_size: int = 1024) -> Tensor:
    """Returns the x-features (M, n) of activations (M, ...), batch by batch.

    Args:
        srae: The network.
        Z: Activations, in memory or on disk.
        batch_size: Rows at once.
    """
    # One tensor made beforehand: small ones between large parts would leave the memory of these in pieces.
    E, first = srae.head.weight.new_empty(len(Z), srae.n_features), 0
    for part in Z.split(batch_size):
        E[first : first + len(part)] = srae.encode(part)
        first += len(part)
    return E
