"""Does each true reason get an x-feature, and does its map show it? On drawn figures, whose reasons are known.

A class of the figures is the conjunction of two or three reasons, each the look of one part. Two networks are
explained: ``exact``, whose layer has a neuron for each look of each part and whose outputs are sums of reasons, and
``trained``, a small network that learned from labels, at its dense layer. The x-features of a class are matched to its
reasons one to one by correlation, on test figures whose looks are independent of each other, so that an x-feature of
one reason tells nothing of another. Every network, method, class, number of x-features and seed is a line of
OUT/results.jsonl, and a run with the same OUT goes on where the last one stopped. Printed, and written to OUT, is the
mean over classes and seeds with its 95 % confidence interval:

F_reg       mean |surrogate - prediction|, in logits; std is the standard deviation of the prediction
F_cls       share of examples whose predicted class stays
eff         effective number of x-features, of their mean absolute contributions to the class
AUROC       how well the matched x-feature tells whether its reason is shown, turned round if need be; chance is the
            same of shuffled x-features, others the same x-feature's for the class's other reasons
found       share of reasons whose x-feature has an AUROC of at least 0.9, and for the others of at most 0.7
from E, Z   AUROC of the best linear read-out of the reason from all x-features, and from the layer
mass        share of the map of the matched x-feature on its reason's part, on members of the class; of 1-Heatmap, of
            its one map on each of the class's parts
lift        the same by the part's share of the image's area: 1 is chance
pointing    share of maps that peak at the part, within 5 pixels; chance is about 0.03
loss        Eq. 5 at the end of training the SRAE, and at the reasons themselves, with a linear head and decoder: where
            the former is less, the objective asks for something else than the reasons
O1          overlap of the maps
locality    entropy of the parts that an x-feature's maps fall on, in nats, and weighted by contribution

``groups`` is the default form of XNNAttribution, groups of contributions, fitted to the training figures. Its
x-features are their contributions to the class's logit. Its maps are those of the default backend for this form,
gradient x activation, turned to the side that the x-feature is on, without what speaks against it. The maps of all
other methods are by excitation backprop.

    python -m benchmarks.synthetic --out DIR
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.one_vs_all import METHODS, effective, excitation_maps, faithfulness
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn import OneHeatmap, XNNAttribution
from captum_xnn.activations import Activations, collect
from captum_xnn.activations._activations import Source
from captum_xnn.activations._unpacking import first_of_batch
from captum_xnn.datasets import Figures
from captum_xnn.metrics import (
    classification_faithfulness,
    orthogonality,
    part_probabilities,
    pointing_accuracy,
    regression_faithfulness,
)
from captum_xnn.metrics._localisation import mean_locality, pixel_probabilities
from captum_xnn.models._base import encode_all
from captum_xnn.models._losses import log_penalty, pull_away
from captum_xnn.models._scaling import scaling
from captum_xnn.training import Recipe
from captum_xnn.training._fitting import fit
from captum_xnn.training._sampler import Sampler

COMPARED = ("SRAE", "NN", "SAE", "RandomEncoder", "groups", "1-Heatmap")
LAYERS = {"exact": "Z", "trained": "relu4"}
FOUND, CONFUSED, TOLERANCE, MAPS, READ = 0.9, 0.7, 5.0, 60, 2000

COLUMNS = tuple(
    Column(key, title, 1 if key == "lift" else 2)
    for key, title in {
        "accuracy": "accuracy",
        "f_reg": "F_reg", "std": "std", "f_cls": "F_cls", "eff": "eff", "auroc": "AUROC", "chance": "chance",
        "others": "others", "found": "found", "from_e": "from E", "from_z": "from Z", "mass": "mass", "lift": "lift",
        "pointing": "pointing", "loss": "loss", "loss_of_reasons": "of reasons", "o1": "O1", "locality": "locality",
        "locality_weighted": "locality weighted",
    }.items()
)  # fmt: skip


class Seen(NamedTuple):
    """Figures, with what a network makes of them."""

    figures: Figures
    Z: Tensor
    y_hat: Tensor


class Explained(NamedTuple):
    """A network to explain, and three sets of figures: to learn from, to test on, and of independent looks."""

    model: nn.Module
    layer: str
    train: Seen
    test: Seen
    free: Seen

    @property
    def accuracy(self) -> float:
        """Share of test figures that the network tells right."""
        return float((self.test.y_hat.argmax(1) == self.test.figures.labels).double().mean())


@lru_cache(maxsize=1)
def explained(name: str, train: int, test: int, seed: int, epochs: int) -> Explained:
    """Returns a network with figures that it was, and was not, trained on."""
    sets = (
        Figures.draw(train, seed=seed),
        Figures.draw(test, seed=seed + 1),
        Figures.draw(test, seed=seed + 2, members=0, near_misses=0),
    )
    model: nn.Module = sets[0].exact_network()
    if name == "trained":
        model = sets[0].trained_network(epochs=epochs, seed=seed)
    seen = []
    for figures in sets:
        found = collect(model, LAYERS[name], figures.images)
        seen.append(Seen(figures, found.Z, found.y_hat))
    return Explained(model, LAYERS[name], *seen)


def auroc(scores: Tensor, shown: Tensor) -> Tensor:
    """Returns the probability that a score is higher where a reason is shown, ties half, (K, R), of (N, K), (N, R)."""
    pairs = itertools.product(scores.double().T, shown.T)
    return torch.stack([_auroc(*pair) for pair in pairs]).reshape(scores.shape[1], shown.shape[1])


def _auroc(score: Tensor, shown: Tensor) -> Tensor:
    _, place, count = score.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[place]
    own = shown.sum()
    return (rank[shown].sum() - own * (own + 1) / 2) / (own * (len(shown) - own))


def correlations(E: Tensor, shown: Tensor) -> Tensor:
    """Returns correlations of x-features (N, K) with reasons (N, R), (K, R); 0 of constant ones."""
    a, b = (x.double() - x.double().mean(0) for x in (E, shown))
    size = a.norm(dim=0)[:, None] * b.norm(dim=0)
    return a.T @ b / torch.where(size > 1e-9, size, math.inf)


def matched(E: Tensor, shown: Tensor) -> Tensor:
    """Returns the x-feature of each reason (R,), one to one, with the largest sum of |correlations|; -1 for none."""
    found = torch.full((shown.shape[1],), -1)
    rows, columns = linear_sum_assignment(correlations(E, shown).abs().numpy(), maximize=True)
    found[torch.as_tensor(columns)] = torch.as_tensor(rows)
    return found


def matched_auroc(E: Tensor, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the x-feature of each reason, its AUROC (R,), and its mean AUROC for the other reasons (R,)."""
    chosen = matched(E, shown)
    values = auroc(E[:, chosen.clamp(min=0)], shown)
    values = torch.where(chosen[:, None] >= 0, torch.maximum(values, 1 - values), 0.5)
    own = values.diagonal()
    return chosen, own, (values.sum(1) - own) / max(1, len(own) - 1)


def read_out(train: Tensor, shown: Tensor, test: Tensor) -> Tensor:
    """Returns what a linear model of least squares, with a touch of ridge, says of each reason, (N, R)."""
    x = train.double()
    mean, size = x.mean(0), x.std(0).max().clamp_min(1e-12)
    a = torch.cat([(x - mean) / size, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    b = torch.cat([(test.double() - mean) / size, torch.ones(len(test), 1, dtype=x.dtype)], 1)
    penalty = 1e-6 * len(x) * torch.eye(a.shape[1], dtype=x.dtype)
    return b @ torch.linalg.solve(a.T @ a + penalty, a.T @ shown.double())


def loss_of_reasons(of: Explained, label: int) -> float:
    """Returns Eq. 5 at x-features that are the reasons, by least-squares head and decoder, weighted as in a fit."""
    y_hat, E = of.train.y_hat, of.train.figures.shown_reasons(label).double()
    y, recipe = y_hat[:, label : label + 1], Recipe()
    by = scaling(of.train.Z, y)
    wanted = torch.cat([(of.train.Z - by.Z_mean) / by.Z_std, (y - by.y_mean) / by.y_std], 1).double()
    weight = Sampler(y_hat.argmax(1) == label, len(y), recipe, torch.Generator()).row_weight.double()
    root = weight.sqrt()[:, None]
    a = torch.cat([E, torch.ones_like(E[:, :1])], 1) * root
    made = a @ torch.linalg.lstsq(a, wanted * root).solution
    error = (made - wanted * root).square().sum(0) / weight.sum()
    centred = E - (weight[:, None] * E).sum(0) / weight.sum()
    terms = error[-1], recipe.beta * log_penalty(error[:-1], recipe.q), recipe.eta * pull_away(centred, weight=weight)
    return float(sum(terms))


class Made(NamedTuple):
    """An explanation of one class on the figures."""

    E: Tensor
    """x-features (N, K) of the figures of independent looks."""
    E_train: Tensor
    """x-features of the first training figures."""
    contributions: Tensor
    """Of the members that maps are drawn of, in logits."""
    maps: Tensor
    """Of the members, (N, K, H, W), not negative."""
    figures: Line
    """F_reg, F_cls and, of what learns by Eq. 5, its loss."""


def by_network(of: Explained, job: Line, n: int, members: Figures, rows: Tensor) -> Made:
    """Returns the explanation by a network that learns from activations."""
    label, make = job["class"], METHODS[job["method"]]
    assert make is not None
    xnn = make(tuple(of.train.Z.shape[1:]), n, n_outputs=1)
    y_hat = of.train.y_hat
    history = fit(xnn, of.train.Z, y_hat[:, label : label + 1], positives=y_hat.argmax(1) == label, seed=job["seed"])
    xnn.requires_grad_(False)
    losses: Line = {}
    if job["method"] == "SRAE":  # Eq. 5 is what it learns by
        end = history[-1][1:]
        losses = {"loss": math.fsum(end), "losses": end, "loss_of_reasons": loss_of_reasons(of, label)}
    return Made(
        encode_all(xnn, of.free.Z),
        encode_all(xnn, of.train.Z),
        xnn.contributions(encode_all(xnn, of.test.Z[rows])),
        excitation_maps(xnn, of.model, of.layer, members.images),
        faithfulness(xnn, of.test.Z, of.test.y_hat, label) | losses,
    )


def by_groups(of: Explained, job: Line, n: int, members: Figures, rows: Tensor) -> Made:
    """Returns the explanation by groups of contributions, as a user gets it."""
    label, images = job["class"], of.train.figures.images
    known = Activations(of.train.Z, of.train.y_hat, of.layer, source=Source(images, first_of_batch))
    xnn = XNNAttribution(of.model, of.layer, n).fit(known, label, progress=False)
    free, train, test = (
        xnn.contributions(some, label, internal_batch_size=64)
        for some in (of.free.figures.images, images[:READ], of.test.figures.images)
    )
    why = xnn.explain(members.images, label, internal_batch_size=64)
    return Made(
        free.contributions,
        train.contributions,
        test.contributions[rows],
        why.directed_maps().sum(2).clamp(min=0),
        {
            "f_reg": regression_faithfulness(test.surrogate, of.test.y_hat[:, label]),
            "f_cls": classification_faithfulness(of.test.y_hat, test.surrogate, label),
        },
    )


def reasons_found(made: Made, of: Explained, label: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Returns the x-feature of each reason, and how well it and others tell whether the reason is shown."""
    shown, shown_train = of.free.figures.shown_reasons(label), of.train.figures.shown_reasons(label)
    E, E_train = made.E, made.E_train
    chosen, own, others = matched_auroc(E, shown)
    mixed = E[torch.randperm(len(E), generator=torch.Generator().manual_seed(seed))]
    everything = {
        "from_e": auroc(read_out(E_train, shown_train[: len(E_train)], E), shown).diagonal(),
        "from_z": auroc(read_out(of.train.Z, shown_train, of.free.Z), shown).diagonal(),
        "chance": matched_auroc(mixed, shown)[1],
        "others": others,
    }
    found = {name: float(values.mean()) for name, values in everything.items()}
    each = {
        "auroc": float(own.mean()),
        "found": float(((own >= FOUND) & (others <= CONFUSED)).double().mean()),
        "aurocs": own.tolist(),
    }
    return chosen, found | each | {"correlations": correlations(E, shown).tolist()}


def places(maps: Tensor, members: Figures, label: int, chosen: Tensor) -> dict[str, float]:
    """Returns how far the maps (N, K, H, W) of each reason's x-feature (R,) fall on the reason's part."""
    parts = members.reason_parts(label)
    there = chosen >= 0
    masks = members.masks[:, parts].double()
    p = pixel_probabilities(maps).double()[:, chosen.clamp(min=0)]
    drawn = (p.sum((2, 3)) > 0) & there
    mass = (p * masks).sum((2, 3))[drawn]
    area = masks.mean((2, 3))[drawn]
    peaks = pointing_accuracy(maps, members.points[:, parts], TOLERANCE)
    own = peaks[chosen[there], there.nonzero()[:, 0]]
    return {"mass": float(mass.mean()), "lift": float((mass / area).mean()), "pointing": float(own.mean())}


def measure(of: Explained, job: Line) -> Line:
    """Returns all figures of one explanation of one class."""
    begin, label = time.perf_counter(), job["class"]
    rows = (of.test.figures.labels == label).nonzero()[:MAPS, 0]
    members = replace(
        of.test.figures, **{k: getattr(of.test.figures, k)[rows] for k in ("images", "points", "boxes", "masks")}
    )
    if job["method"] == "1-Heatmap":
        maps = OneHeatmap(of.model).attribute(members.images, label)[:, :, 0]
        S = part_probabilities(maps, members.points, members.boxes)
        every = torch.zeros(len(members.reason_parts(label)), dtype=torch.long)
        found: Line = {"locality": mean_locality(S)} | places(maps, members, label, every)
        return {"accuracy": of.accuracy, **found, "seconds": time.perf_counter() - begin}
    n = len(members.reason_parts(label)) if job["x_features"] == "reasons" else int(job["x_features"])
    explain = by_groups if job["method"] == "groups" else by_network
    made = explain(of, job, n, members, rows)
    chosen, told = reasons_found(made, of, label, job["seed"])
    S = part_probabilities(made.maps, members.points, members.boxes)
    return {
        "accuracy": of.accuracy,
        **made.figures,
        "std": float(of.test.y_hat[:, label].std()),
        "eff": effective(made.contributions),
        **told,
        **places(made.maps, members, label, chosen),
        "o1": orthogonality(made.maps).o1,
        "locality": mean_locality(S),
        "locality_weighted": mean_locality(S, contributions=made.contributions),
        "seconds": time.perf_counter() - begin,
    }


def named(lines: list[Line]) -> list[Line]:
    """Returns the lines with what tells their kinds apart as one name, sorted by it."""
    known = [{"explained": f"{ln['network']}, {ln['x_features']} x-features, {ln['method']}", **ln} for ln in lines]
    return sorted(known, key=lambda ln: (ln["network"], ln["x_features"], COMPARED.index(ln["method"])))


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    jobs = [
        {"network": network, "seed": seed, "class": label, "x_features": n, "method": method}
        for network, seed, label, n, method in itertools.product(
            given.networks, range(given.seeds), given.classes, given.x_features, given.methods
        )
        if method != "1-Heatmap" or n == given.x_features[0]  # a single map has no x-features to count
    ]

    def of(job: Line) -> Line:
        return measure(explained(job["network"], given.train, given.test, 10 * job["seed"], given.epochs), job)

    lines = named(measured(given.out, jobs, of, title="explanations", under=settings(given)))
    write(given.out, table(lines, "explained", COLUMNS), summary(lines, "explained", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--methods", nargs="+", default=list(COMPARED), choices=list(COMPARED))
    parser.add_argument("--classes", nargs="+", type=int, default=[0, 2, 3, 5], help="0 to 5; 4 and 5 have two reasons")
    parser.add_argument("--x-features", nargs="+", default=["reasons", "5"], help="numbers, or one for each reason")
    parser.add_argument("--seeds", type=int, default=2, help="each with figures and networks of its own")
    parser.add_argument("--train", type=int, default=6000, help="figures to learn from")
    parser.add_argument("--test", type=int, default=2000, help="figures to test on, twice")
    parser.add_argument("--epochs", type=int, default=6, help="of training the network")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run goes on")
    main(parser.parse_args())
