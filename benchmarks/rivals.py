"""Rival explanations of one output, all from the activations of one layer: what ``benchmarks.scoreboard`` compares.

Every method gives an Explained of a Fit. Methods divide the path-integrated contributions of the layer's dimensions
(groups, spectral, NMF and random groups, single dimensions), directions (PRCA, DRSA), concepts that rebuild the layer
(CRAFT, FACE, TopK SAE), or learn to imitate the output (SRAE, NN, SAE, CAE, Lasso, random encoder). All but the learned
ones count from the mean activation of the training data.

Some methods have one x-feature more, for what the others leave: single dimensions, PRCA, DRSA and TopK SAE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.funnybirds import NODES, Read, library_groups, rest_of_model, slopes
from benchmarks.one_vs_all import N_FEATURES, fitted
from captum_xnn.activations import collect
from captum_xnn.models.baselines import _dictionaries as dictionaries
from captum_xnn.models.baselines import _partitions as partitions

POSITIVES, OTHERS = 30, 200
"""Examples from which rules learn, as many as the default form takes."""
CROPPED, SIDE = 20, 3
"""Images that CRAFT cuts, and crops along their sides."""
LATENTS, ACTIVE, STEPS, BATCH = 256, 16, 500, 128
"""Of the sparse autoencoder."""
FACE_STEPS, DRSA_STEPS, DRSA_SIZE = 100, 50, 8


class Fit(NamedTuple):
    """What a method has to learn from."""

    of: Read
    label: int
    seed: int
    base: Tensor
    """The mean activation, (D,)."""

    @property
    def rest(self) -> Callable[[Tensor], Tensor]:
        """The model from the layer to the logit, (n, D) to (n,)."""
        return partial(rest_of_model, self.of.model, self.of.layer, self.of.images([0]), self.label)

    @property
    def positives(self) -> Tensor:
        """Rows of up to 30 training examples to which the model gives the class, evenly spread."""
        return _evenly((self.of.train[1].argmax(1) == self.label).nonzero()[:, 0], POSITIVES)

    def sample(self) -> tuple[Tensor, Tensor]:
        """Returns activations (n, D) and mean slopes of positives and of others."""
        others = _evenly((self.of.train[1].argmax(1) != self.label).nonzero()[:, 0], OTHERS)
        Z = self.of.train[0][torch.cat([self.positives, others])].float()
        return Z, slopes_of(self.rest, Z, self.base)


class Explained(NamedTuple):
    """An explanation of one output."""

    contributions: Callable[[Tensor, Tensor], Tensor]
    """Gives contributions (n, K) in logits of activations (n, D) and their mean slopes (n, D)."""
    bias: float
    part: Callable[[Tensor, Tensor], Tensor]
    """Gives what the x-features kept (n, K) are of activations (n, D), less the base."""
    order: Tensor | None = None
    """x-features in the order of their importance for the class, (K,); by contribution if None."""


def _evenly(rows: Tensor, most: int) -> Tensor:
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=torch.float64).round().long()]


def slopes_of(rest: Callable[[Tensor], Tensor], Z: Tensor, base: Tensor, nodes: int = NODES) -> Tensor:
    """Returns the mean slopes of the logit on the way from the base, (n, D), in parts that bound memory."""
    return torch.cat([slopes(rest, part, base, nodes) for part in Z.split(max(1, 64 * NODES // nodes))])


def _divided(a: Tensor, fit: Fit) -> Explained:
    """Returns groups of dimensions, (D, K)."""
    a = a.float()
    return Explained(
        lambda Z, G: ((Z - fit.base) * G) @ a,
        float(fit.rest(fit.base[None])[0].detach()),
        lambda Z, kept: (Z - fit.base) * (kept.to(a) @ a.T),
    )


def groups(fit: Fit) -> Explained:
    """Returns the default form of XNNAttribution."""
    return _divided(library_groups(fit.of, fit.label)[0], fit)


def random_groups(fit: Fit) -> Explained:
    """Returns groups by chance."""
    generator = torch.Generator().manual_seed(1000 * fit.seed + fit.label)
    return _divided(partitions.random_partition(len(fit.base), N_FEATURES, generator), fit)


def uneven_groups(fit: Fit) -> Explained:
    """Returns groups by chance of which one holds 19 of 20 dimensions: measures that it wins reward unevenness."""
    generator = torch.Generator().manual_seed(1000 * fit.seed + fit.label)
    order = torch.randperm(len(fit.base), generator=generator)
    small = max(1, len(order) // (20 * (N_FEATURES - 1)))
    member = (order // small).clamp(max=N_FEATURES - 1)
    return _divided(torch.nn.functional.one_hot(member, N_FEATURES), fit)


def whole_output(fit: Fit) -> Explained:
    """Returns the logit as one x-feature."""
    return _divided(torch.ones(len(fit.base), 1), fit)


def by_rule(rule: Callable[[Tensor, int], Tensor], fit: Fit) -> Explained:
    """Returns groups by a rule that divides contributions."""
    Z, G = fit.sample()
    return _divided(rule((Z - fit.base) * G, N_FEATURES), fit)


def _subspaces(U: Tensor, fit: Fit) -> Explained:
    """Returns orthogonal subspaces (K, D, d), and what is outside."""
    U = U.float()

    def contributions(Z: Tensor, G: Tensor) -> Tensor:
        a = Z - fit.base
        found = torch.stack([((a @ u) * (G @ u)).sum(1) for u in U], 1)
        return torch.cat([found, (a * G).sum(1, keepdim=True) - found.sum(1, keepdim=True)], 1)

    def part(Z: Tensor, kept: Tensor) -> Tensor:
        a = Z - fit.base
        inside = torch.stack([a @ u @ u.T for u in U], 1)
        every = torch.cat([inside, (a - inside.sum(1))[:, None]], 1)
        return (every * kept.to(every)[:, :, None]).sum(1)

    return Explained(contributions, float(fit.rest(fit.base[None])[0].detach()), part)


def prca(fit: Fit) -> Explained:
    """Returns the directions of most relevance."""
    Z, G = fit.sample()
    return _subspaces(partitions.prca(Z - fit.base, G, N_FEATURES), fit)


def drsa(fit: Fit) -> Explained:
    """Returns subspaces with relevance in different examples."""
    Z, G = fit.sample()
    size = min(DRSA_SIZE, len(fit.base) // N_FEATURES)
    generator = torch.Generator().manual_seed(fit.seed)
    a = Z - fit.base
    return _subspaces(partitions.drsa(a, G, N_FEATURES, size=size, steps=DRSA_STEPS, generator=generator), fit)


def _rebuilt(made: dictionaries.Dictionary, fit: Fit, order: Tensor | None = None) -> Explained:
    """Returns concepts that rebuild the layer."""
    H, at_base = made.concepts.float(), made.encode(fit.base[None])
    return Explained(
        lambda Z, G: dictionaries.dictionary_contributions(made, Z, fit.base, G),
        float(fit.rest(fit.base[None])[0].detach()),
        lambda Z, kept: ((made.encode(Z) - at_base) * kept.to(Z)) @ H,
        order,
    )


def craft(fit: Fit) -> Explained:
    """Returns factors of the activations of crops, in the order of their Sobol indices."""
    rows = _evenly(fit.positives, CROPPED)
    crops = dictionaries.image_crops(images_at(fit.of.train_images, rows), side=SIDE)
    made = dictionaries.craft(activations(fit.of, crops), N_FEATURES, seed=fit.seed)
    codes = made.encode(fit.of.train[0][rows].float())

    def score(masks: Tensor) -> Tensor:
        scaled = masks.to(codes)[:, None] * codes
        return fit.rest(made.rebuilt(scaled.flatten(0, 1))).reshape(len(masks), -1).mean(1)

    with torch.no_grad():
        importance = dictionaries.sobol_indices(score, N_FEATURES, draws=32, seed=fit.seed)
    return _rebuilt(made, fit, importance.argsort(descending=True, stable=True))


def face(fit: Fit) -> Explained:
    """Returns factors that keep the model's predictions."""
    own = fit.of.train[0][(fit.of.train[1].argmax(1) == fit.label)].float()
    every = partial(rest_of_model, fit.of.model, fit.of.layer, fit.of.images([0]), slice(None))
    return _rebuilt(dictionaries.face(own, every, N_FEATURES, steps=FACE_STEPS, seed=fit.seed), fit)


def topk_sae(fit: Fit) -> Explained:
    """Returns the latents of a sparse autoencoder that contribute most to positives, and all others together.

    The autoencoder learns from all training activations.
    """
    latents = min(LATENTS, 4 * len(fit.base))
    made = dictionaries.topk_sae(
        fit.of.train[0].float(), latents, active=min(ACTIVE, latents), steps=STEPS, batch=BATCH,
        generator=torch.Generator().manual_seed(fit.seed),
    )  # fmt: skip
    Z, G = fit.sample()
    positives = slice(0, len(fit.positives))
    size = dictionaries.dictionary_contributions(made, Z[positives], fit.base, G[positives]).abs().mean(0)
    place = torch.full((latents,), N_FEATURES)
    place[size.argsort(descending=True, stable=True)[:N_FEATURES]] = torch.arange(N_FEATURES)
    member = torch.nn.functional.one_hot(place, N_FEATURES + 1).float()
    every = _rebuilt(made, fit)
    return Explained(
        lambda Z, G: every.contributions(Z, G) @ member,
        every.bias,
        lambda Z, kept: every.part(Z, kept.float() @ member.T),
    )


def learned(method: str, fit: Fit) -> Explained:
    """Returns an explanation network that learns from activations; x-features that are not kept are at their mean."""
    xnn = fitted(method, *fit.of.train, fit.label, fit.seed)

    def part(Z: Tensor, kept: Tensor) -> Tensor:
        E = xnn.encode(Z)
        return (xnn.decoder(E * kept.to(E)) - xnn.decoder(torch.zeros_like(E))).flatten(1)  # type: ignore[no-any-return]

    return Explained(lambda Z, G: xnn.contributions(xnn.encode(Z)), float(xnn.head.bias[0]), part)


def images_at(images: Any, rows: Tensor) -> Tensor:
    """Returns some training images, (n, 3, H, W), from a tensor or a loader of samples."""
    if isinstance(images, Tensor):
        return images[rows]
    samples = [images.dataset[i] for i in rows.tolist()]
    return torch.stack([sample if isinstance(sample, Tensor) else sample.image for sample in samples])


def activations(of: Read, images: Tensor) -> Tensor:
    """Returns the activations of images, (n, D)."""
    return collect(of.model, of.layer, images).Z[:].flatten(1).float()


METHODS: dict[str, Callable[[Fit], Explained]] = {
    "groups": groups,
    "SRAE": partial(learned, "SRAE"),
    "NN": partial(learned, "NN"),
    "SAE": partial(learned, "SAE"),
    "Lasso": partial(learned, "Lasso"),
    "CAE": partial(learned, "CAE"),
    "single dimensions": partial(by_rule, partitions.single_dimensions),
    "spectral groups": partial(by_rule, partitions.spectral_partition),
    "NMF of contributions": partial(by_rule, partitions.nmf_partition),
    "PRCA": prca,
    "DRSA": drsa,
    "CRAFT": craft,
    "FACE": face,
    "TopK SAE": topk_sae,
}
"""Methods that are ranked. One of your own belongs here."""

CONTROLS: dict[str, Callable[[Fit], Explained]] = {
    "random groups": random_groups,
    "uneven random groups": uneven_groups,
    "random encoder": partial(learned, "RandomEncoder"),
    "whole output": whole_output,
}
"""Controls with contributions. ``benchmarks.scoreboard`` adds two without: one heatmap, and random maps."""
