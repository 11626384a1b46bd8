r"""Fit learned forms, such as a Sparse Reconstruction Autoencoder, to activations and outputs.

The recipe rests on measurements (see the page "How the training recipe was found"):

1. Standardise Z and the output, so that no setting depends on the model's scales.
2. Fill a fixed share of each batch with positives, to balance the classes.
3. Pre-train: minimise Eq. 5 and pull the x-features to their anchors (:mod:`captum_xnn.training._anchors`).
4. Minimise Eq. 5 alone. Its statistics over the training set, :math:`Q_k` and the inner products of the pull-away
   term, are running means over mini-batches (:class:`~captum_xnn.models._losses.RunningMean`).
5. Rewrite the weights to the model's own units. x-features get mean 0 and standard deviation 1 over the training data,
   a positive weight v, and the order of their mean contribution to the positives.

Explainers of several targets learn together on the same activations (:mod:`captum_xnn.training._trainer`).

Differs from the paper:
    The pull-away term subtracts the mean: it has squared correlations, not cosines. Training starts from the anchors,
    not from a stacked autoencoder. The x-layer is linear. Adam with a cosine schedule replaces stepwise decay.
    :class:`~captum_xnn.models.PaperSRAE` trains by Eq. 5 as printed.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, Eq. 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from captum_xnn._distributed import ALONE, Ranks
from captum_xnn.activations._memmap import Rows, each
from captum_xnn.models._base import Autoencoder, Loss, Scaling, Weights, encode_all
from captum_xnn.models._scaling import scaling
from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._history import Record
from captum_xnn.training._problem import Problem
from captum_xnn.training._recipe import Recipe
from captum_xnn.training._sampler import Sampler
from captum_xnn.training._trainer import descend

__all__ = ["fit", "fit_together"]


def fit(
    srae: Autoencoder,
    Z: Tensor | Rows,
    y_hat: Tensor,
    *,
    positives: Tensor | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Record]:
    """Fit a learned form in place to activations and outputs, and return the history.

    Args:
        srae: The network, on any device. It starts from new random weights.
        Z: Activations (M, D), or (M, channels, H, W) for the convolutional form, floating-point, on the same device.
            Rows on disk give the same result. Memory then holds a batch or some megabytes of them at a time.
        y_hat: Outputs (M, C) to approximate, in logits.
        positives: Boolean (M,): the examples of the explained class. Batches draw them more often. None draws all
            examples with equal probability.
        recipe: Settings of the training.
        seed: Seed of weights and batches. The same seed gives the same result.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If there are fewer than two examples, or if Z or the outputs do not vary.

    Example:
        >>> from captum_xnn.models._srae import SRAE
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
    return fit_together([srae], Z, [y_hat], positives=[positives], recipe=recipe, seed=seed, progress=progress)[0]


def fit_together(
    xnns: Sequence[Autoencoder],
    Z: Tensor | Rows,
    y_hats: Sequence[Tensor],
    *,
    positives: Sequence[Tensor | None] | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
    logs: Sequence[Callable[[Record], None] | None] | None = None,
    ranks: Ranks = ALONE,
) -> list[list[Record]]:
    """Fit several learned forms in place to the same activations, each to its own outputs, and return the histories.

    Each result equals that of :func:`fit` alone, up to the order of sums.

    Args:
        xnns: Networks of one form and size, on one device. They start from new random weights.
        Z: Activations, as in :func:`fit`.
        y_hats: For each network the outputs (M, C) to approximate, in logits.
        positives: For each network its positives, as in :func:`fit`.
        recipe: Settings of the training for all networks.
        seed: Seed of weights and batches of each network.
        progress: Whether to show a progress bar.
        checkpoint: Folder for checkpoints. An interrupted fit resumes from the last one.
        logs: For each network a callback that receives each new record of its history.
        ranks: Processes that learn together. All call this function with the same arguments and get the same result.

    Raises:
        ValueError: If there are fewer than two examples, if Z or an output does not vary, or if the networks differ.

    Example:
        >>> from captum_xnn.models._srae import SRAE
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> made = [SRAE(8, n_features=2, hidden=(16,)) for _ in range(2)]
        >>> histories = fit_together(made, Z, [Z[:, :1], Z[:, 1:2]], recipe=Recipe(steps=50))
        >>> alone = SRAE(8, n_features=2, hidden=(16,))
        >>> _ = fit(alone, Z, Z[:, 1:2], recipe=Recipe(steps=50))
        >>> torch.allclose(alone.encode(Z), made[1].encode(Z), atol=1e-3)
        True
    """
    recipe, marks = recipe or Recipe(), positives or [None] * len(xnns)
    if len(Z) < 2:
        raise ValueError(f"learning needs at least two examples, not {len(Z)}; pass more data to fit")
    if len({(type(xnn), str(xnn.config)) for xnn in xnns}) != 1:
        raise ValueError("the networks differ in form or size; fit them one after another")
    batch = recipe.batch_for(len(Z))
    recipe = replace(recipe, batch_size=batch)
    if batch % ranks.world:
        raise ValueError(
            f"{ranks.world} processes cannot share batches of {batch} examples evenly; pass "
            f"Recipe(batch_size={-(-batch // ranks.world) * ranks.world})"
        )
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(Z.device.type, enabled=False):
        shared = each(Z if isinstance(Z, Rows) else Z.detach().clone(), xnns[0].shaped)
        by = scaling(shared, y_hats[0])
        problems = []
        for i, (xnn, y_hat, marked) in enumerate(zip(xnns, y_hats, marks, strict=True)):
            _check_varies(by, y_hat)
            generator = torch.Generator().manual_seed(seed)
            xnn.reset(generator)
            sampler = Sampler(marked, len(y_hat), recipe, generator)
            log = logs[i] if logs else None
            y = y_hat.detach().clone()
            problems.append(Problem(shared, y, sampler, recipe, progress, checkpoint, log, ranks))
        histories = _learned(xnns, problems)
        for xnn, marked in zip(xnns, marks, strict=True):
            _arrange(xnn, shared, marked)
    return histories


def _learned(xnns: Sequence[Autoencoder], problems: Sequence[Problem]) -> list[list[Record]]:
    """Learn the weights of networks of one form, by descent or in closed form, and return the histories."""
    form, recipe, ranks = type(xnns[0]), problems[0].recipe, problems[0].ranks
    weights = Weights(recipe.beta, recipe.eta, recipe.q, recipe.rho)

    def make_loss() -> Loss:
        loss = form.minimised(weights, ranks)
        assert loss is not None  # checked below, before the first call
        return loss

    histories: list[list[Record]] = [[] for _ in xnns]
    if form.minimised(weights, ranks) is not None:
        pretraining = recipe.pretraining if form.anchored else 0.0
        histories = descend(xnns, problems, make_loss, pretraining=pretraining, standardise=form.standardised)
    for xnn, problem in zip(xnns, problems, strict=True):
        xnn.solve(problem.examples)
    return histories


def _check_varies(by: Scaling, y: Tensor) -> None:
    """Raise ValueError where activations or outputs are constant."""
    if not bool((by.Z_std > by.Z_mean.abs().max() * torch.finfo(by.Z_std.dtype).eps).all()):
        raise ValueError("the activations are the same for every example; check the inputs, or explain another layer")
    if not bool((y.std(0) > y.mean(0).abs() * torch.finfo(y.dtype).eps * 4).all()):
        raise ValueError(
            "the output is the same for every example; check that the target is right and that the inputs differ"
        )


@torch.no_grad()
def _arrange(srae: Autoencoder, Z: Tensor | Rows, positives: Tensor | None) -> None:
    """Standardise the x-features over the training data, make v positive, and sort them by contribution.

    A dead x-feature without variance is only centred. With several outputs, signs and order follow the first output.
    x-features of a rectified x-layer are only sorted.
    """
    E = encode_all(srae, Z)
    if srae.signed:
        mean, std = E.mean(0), E.std(0)
        flip = torch.where(srae.head.weight[0] < 0, -1, 1).to(std)
        scale = torch.where(std > 1e-6, std, 1.0) * flip
        srae.standardise_features(mean, scale)
        E = (E - mean) / scale
    given = srae.contributions(E)
    marked = given if positives is None or not bool(positives.any()) else given[positives.to(given.device)]
    size = marked.mean(0) if marked is not given else given.std(0)
    srae.reorder_features(size.argsort(descending=True))
