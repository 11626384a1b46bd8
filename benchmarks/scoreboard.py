"""The scoreboard: every method by every measure, on networks whose reasons, parts or objects are known.

Every network, class, method and seed is a line of OUT/results.jsonl, and a run with the same OUT resumes where the last
one stopped. Printed, and written to OUT as Markdown, JSON and one list-table for each network, are means over classes
and seeds with their 95 % confidence intervals, the best mean of the methods in bold, and a table of mean ranks.
Its column *behind groups* is a method's mean rank less that of the default form, in pairs of the same class and seed.
Controls are in italics. They take part in the ranks, because a method that is not ahead of them has achieved nothing.
A cell that cannot be asked is empty, and the reason is below the table.

F_reg       mean |sum of contributions and bias - logit| on test examples, in logits
patches     patch agreement: rank correlation over patches of 4 x 4 of the map with what the contribution loses when the
            patch is covered, weighted by contribution
identified  share of maps that fit the drops of their own x-feature better than those of the others; chance is 1 / K
O1          overlap of what different x-features lose when a patch is covered, weighted by contribution; 0 is best
overlap     the same as a share of what it would be if x-features of these contributions lost by the same patches; 1 is
            no division at all
found       drawn figures: share of reasons that one x-feature tells (AUROC at least 0.9), and others at most 0.7 of it
share       FunnyBirds and figures: share of what changes with one part that the part's own x-feature carries
selectivity FunnyBirds: share of the part that moves an x-feature most, of the movement by all parts
SD          FunnyBirds: rank correlation over a bird's parts of the drop of the logit with the mass of all maps
within      FunnyBirds: the same over all birds within each part, mean over parts, over all classes together
deletion    area under the logit while the x-features leave the layer one after the other, in shares from 0 to 1 of the
            change from the mean activation; the largest contribution to the change goes first, where the logit falls
            the most negative, by Sobol index for CRAFT
insertion   the same while they enter the mean activation one after the other
halves      mean correlation on test examples of matched x-features from two fits, each to half of the training data and
            with its own seed
locality    birds and rooms: entropy of the parts or objects that maps fall on, in nats
seconds     processor seconds of a fit
eff         effective number of x-features, of their mean absolute contributions: described, not ranked

All maps are gradient x activation of the contributions at the last feature maps that everything crosses. One-heatmap is
by excitation backprop. Locality takes maps turned to the side of the x-feature, without what speaks against it.

Two settings differ from the library's default. Maps take the mean slopes of the path integral, where the library's
GradientMaps take the model's gradient at the example. All methods count contributions from one base, the mean of each
number of the layer; for feature maps, the base of the library is one number per channel.

The path integral has 12 nodes where these miss little: of the images' logits less than 2 % of their standard deviation,
and of the drops by covered patches less than 6 %. Elsewhere the nodes of a class are doubled, up to 384, until 1 % and
2 % are missed. Methods learn with 12.

O1, deletion and insertion are best where one x-feature holds nearly everything: ``uneven random groups``, one of which
holds 19 of 20 dimensions, win them. Maps of x-features that cancel are easily identified. Ranks are therefore given
twice: by all measures but ``overlap``, and by those that neither unevenness nor cancelling flatters, with ``overlap``
in place of O1. F_reg, SD and within cannot tell exact methods apart: their contributions and their maps have the same
sums.

    python -m benchmarks.scoreboard --quick --out DIR
    python -m benchmarks.scoreboard --funnybirds FOLDER FILE.py --birds FOLDER FILE.py --rooms PLACES ADE FILE.py LAYER
        --out DIR
    python -m benchmarks.scoreboard --model FILE.py --images FOLDER --layer NAME --out DIR

Without folders, the drawn figures alone are measured. FILE.py offers ``load()``, MEAN and STD. ``--model`` takes what
``captum-xnn fit --model`` takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, default_collate

from benchmarks import birds, changed_parts, funnybirds, places, rivals, synthetic
from benchmarks.changed_parts import Pairs
from benchmarks.funnybirds import GRID, NODES, Form, Read, gradient_maps, mass, spatial
from benchmarks.one_vs_all import effective, in_batches
from benchmarks.pictures import CONTROL, METHOD, OTHER, figure_of, save_svg
from benchmarks.rivals import Explained, Fit, slopes_of
from benchmarks.runs import Line, interval, measured, read_lines, save, settings, write
from captum_xnn import OneHeatmap
from captum_xnn.activations import collect
from captum_xnn.datasets._places import ROOMS
from captum_xnn.errors import LayerNotReachedError
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.layers._fingerprint import fingerprint
from captum_xnn.layers._logits import OutputRange, no_logits
from captum_xnn.metrics import (
    deletion,
    drop_orthogonality,
    insertion,
    matched_features,
    object_probabilities,
    part_probabilities,
    patch_agreement,
    regression_faithfulness,
    selectivity,
)
from captum_xnn.metrics._concepts import area
from captum_xnn.metrics._controls import random_maps
from captum_xnn.metrics._localisation import mean_locality
from captum_xnn.metrics._patches import map_identification, patch_masks
from captum_xnn.metrics._removal import single_deletion, within_part

IMAGES, WIDEST, FEWEST = 10, 4096, 10
MOST_NODES = 32 * NODES
SAME, ROUNDING = 1e-3, 1e-5
"""How far two logits that should be the same may lie apart, in their standard deviation and in their size."""


class Measure(NamedTuple):
    """A column."""

    title: str
    better: int
    """1 if more is better, -1 if less is, 0 if it only describes."""
    digits: int = 2


MEASURES = {
    "f_reg": Measure("F_reg", -1, 3),
    "patches": Measure("patches", 1),
    "identified": Measure("identified", 1),
    "o1": Measure("O1 of drops", -1),
    "overlap": Measure("overlap", -1),
    "found": Measure("found", 1),
    "share": Measure("share", 1),
    "selectivity": Measure("selectivity", 1, 3),
    "sd": Measure("SD", 1),
    "within": Measure("within", 1),
    "deletion": Measure("deletion", -1),
    "insertion": Measure("insertion", 1),
    "halves": Measure("halves", 1),
    "locality": Measure("locality", -1),
    "seconds": Measure("seconds", -1, 1),
    "eff": Measure("eff", 0, 1),
}
FLATTERED = ("identified", "o1", "deletion", "insertion")
RANKED = {
    "mean": [key for key, measure in MEASURES.items() if measure.better and key not in FLATTERED],
    "all": [key for key, measure in MEASURES.items() if measure.better and key != "overlap"],
}
"""Measures of the two mean ranks."""
MAPS_ALONE = ("1-Heatmap", "random maps")
CONTROLS = (*rivals.CONTROLS, *MAPS_ALONE)
SINGLE = "one x-feature has nothing to overlap with, to be ordered or to be matched"
NO_FEATURES = "a map has no x-features, and no contributions"
REASONS = {
    **{(name, key): NO_FEATURES for name in MAPS_ALONE for key in MEASURES},
    **{
        ("whole output", key): SINGLE
        for key in ("identified", "o1", "overlap", "found", "share", "deletion", "insertion", "halves", "eff")
    },
}


class Problem(NamedTuple):
    """One class of a network: what to learn from, and what to measure on."""

    read: Read
    """Training and test activations. Test images are those of ``images``."""
    label: int
    images: Tensor
    """Of the class, (n, 3, H, W), to draw and to cover."""
    Z: Tensor
    """Their activations, (n, D)."""
    y: Tensor
    """Their logits, (n,)."""
    covered: Tensor
    """Activations with each patch covered, (n, patches, D)."""
    places: Callable[[Tensor], Tensor] | None = None
    """Gives what maps (n, K, H, W) have of parts or objects, (n, K, P)."""
    taken: tuple[Tensor, Tensor, Tensor] | None = None
    """Activations (n, P, D) and logits (n, P) without each part, and the parts' pixels (n, P, H, W)."""
    free: tuple[Tensor, Tensor] | None = None
    """Activations of figures of independent looks, and which reasons they show (M, R)."""
    pairs: Pairs | None = None
    """Images that differ in one part."""

    @property
    def base(self) -> Tensor:
        """The mean activation."""
        return self.read.train[0].float().mean(0)

    def fit(self, seed: int, half: int | None = None) -> Fit:
        """Returns what a method learns from: all training data, or one half of the class and of the others."""
        of = self.read
        if half is not None:
            own = of.train[1].argmax(1) == self.label
            rows = torch.cat([own.nonzero()[half::2, 0], (~own).nonzero()[half::2, 0]]).sort().values
            of = of._replace(
                train=(of.train[0][rows], of.train[1][rows]),
                train_labels=of.train_labels[rows],
                train_images=_some(of.train_images, rows),
            )
        return Fit(of, self.label, seed, self.base)


class Slopes(NamedTuple):
    """Activations of all that is measured with their mean slopes, the same for every method."""

    test: tuple[Tensor, Tensor]
    images: tuple[Tensor, Tensor]
    covered: tuple[Tensor, Tensor]
    taken: tuple[Tensor, Tensor] | None
    free: tuple[Tensor, Tensor] | None
    pairs: tuple[Tensor, Tensor] | None
    nodes: int = NODES
    """Of the path integral, also for the maps."""

    @classmethod
    def of(cls, problem: Problem) -> Slopes:
        rest, base = problem.fit(0).rest, problem.base
        check_rest(problem, rest)
        nodes = nodes_of(problem, rest)

        def both(Z: Tensor | None) -> Any:
            return None if Z is None else (Z.float(), slopes_of(rest, Z.float(), base, nodes))

        return cls(
            both(problem.read.test[0]),
            both(problem.Z),
            both(problem.covered.flatten(0, 1)),
            both(None if problem.taken is None else problem.taken[0].flatten(0, 1)),
            both(None if problem.free is None else problem.free[0]),
            both(None if problem.pairs is None else problem.pairs.every),
            nodes,
        )


@torch.no_grad()
def check_rest(problem: Problem, rest: Callable[[Tensor], Tensor]) -> None:
    """Stops unless the activations of each image, behind a stand-in image, give the logit of the image itself."""
    Z = torch.cat([problem.Z, problem.read.test[0]]).float()
    y = torch.cat([problem.y, problem.read.test[1][:, problem.label]])
    off = float((torch.cat([rest(part) for part in Z.split(512)]) - y).abs().max())
    deviation = float(problem.read.test[1][:, problem.label].std())
    if off > SAME * deviation + ROUNDING * float(y.abs().max()):
        raise SystemExit(
            f"expected the logit of class {problem.label} to depend on the image through layer {problem.read.layer!r} "
            f"alone, got logits that are off by up to {off:.2g} (their standard deviation is {deviation:.2g}) behind "
            "another image: a branch goes around the layer; choose a layer through which everything passes"
        )


class Missed(NamedTuple):
    """Error of the path integral."""

    sums: float
    """Mean |sum of contributions and bias - logit| of the images, in standard deviations of the logit."""
    drops: float
    """Root mean square of what it misses of the drops by covered patches, as a share of that of the drops."""

    def within(self, limits: Missed) -> bool:
        """Whether it misses no more than the limits."""
        return self.sums < limits.sums and self.drops < limits.drops


# 12 nodes are enough where they miss about as much as on the published networks: 1.5 % and 5.3 % at most. Sums alone
# do not tell: where 12 nodes missed 0.7 % of sums and 12 % of drops, the overlap of groups was 0.62 in place of 0.77.
ENOUGH, FINE = Missed(0.02, 0.06), Missed(0.01, 0.02)


@torch.no_grad()
def missed(problem: Problem, rest: Callable[[Tensor], Tensor], nodes: int) -> Missed:
    """Returns what the path integral misses on the images and their covered variants."""

    def error(Z: Tensor) -> Tensor:
        change = rest(Z) - rest(problem.base[None])
        return ((Z - problem.base) * slopes_of(rest, Z, problem.base, nodes)).sum(1) - change

    Z, covered = problem.Z.float(), problem.covered.float()
    of_images = error(Z)
    of_drops = of_images[:, None] - error(covered.flatten(0, 1)).reshape(len(Z), -1)
    drops = rest(Z)[:, None] - rest(covered.flatten(0, 1)).reshape(len(Z), -1)
    return Missed(
        float(of_images.abs().mean() / problem.read.test[1][:, problem.label].std()),
        float(of_drops.square().mean().sqrt() / drops.square().mean().sqrt()),
    )


def nodes_of(problem: Problem, rest: Callable[[Tensor], Tensor]) -> int:
    """Returns the number of nodes of a class: 12 where these are enough, else doubled until little is missed."""
    nodes, found = NODES, missed(problem, rest, NODES)
    if found.within(ENOUGH):
        return nodes
    while nodes < MOST_NODES and not found.within(FINE):
        nodes *= 2
        found = missed(problem, rest, nodes)
    return nodes


def _some(images: Any, rows: Tensor) -> Any:
    """Returns some rows of a tensor or of the data set of a loader, in small batches."""
    if isinstance(images, Tensor):
        return images[rows]
    return DataLoader(Subset(images.dataset, rows.tolist()), batch_size=images.batch_size, collate_fn=images.collate_fn)


def judged(of: Problem, made: Explained, by: Slopes, seed: int) -> Line:
    """Returns all figures of an explanation but those of its fit."""
    with torch.no_grad():
        E = made.contributions(*by.images)
        test = made.contributions(*by.test)
        drops = E[:, :, None] - made.contributions(*by.covered).reshape(len(E), -1, E.shape[1]).transpose(1, 2)
    line: Line = {
        "f_reg": regression_faithfulness(test.sum(1) + made.bias, of.read.test[1][:, of.label].to(test)),
        "eff": effective(E),
        "x_features": E.shape[1],
    }
    form = Form(lambda Z: made.contributions(Z, slopes_of(of.fit(seed).rest, Z, of.base, by.nodes)), made.bias)
    maps = gradient_maps(of.read._replace(images=lambda rows: of.images[rows]), form, of.images)
    line["patches"] = patch_agreement(maps, drops, contributions=E)
    if E.shape[1] > 1:
        side = torch.where(E < 0, -1, 1)[:, :, None]
        line["identified"] = map_identification(maps * side[..., None], drops * side)
        line["o1"] = drop_orthogonality(drops, contributions=E).o1
        most = drop_orthogonality(drops.sum(1, keepdim=True).expand_as(drops), contributions=E).o1
        line["overlap"] = line["o1"] / most if most > 0 else math.nan
        line |= curves(of, made, E)
    if of.taken is not None and by.taken is not None:
        with torch.no_grad():
            taken = made.contributions(*by.taken).reshape(len(E), -1, E.shape[1]).transpose(1, 2)
        line["selectivity"] = selectivity(E[:, :, None] - taken).share
    if of.free is not None and by.free is not None and E.shape[1] > 1:
        with torch.no_grad():
            _, own, others = synthetic.matched_auroc(made.contributions(*by.free), of.free[1])
        line["found"] = float(((own >= synthetic.FOUND) & (others <= synthetic.CONFUSED)).double().mean())
        line["auroc"], line["auroc_others"] = float(own.mean()), float(others.mean())
    if of.pairs is not None and of.pairs.enough and by.pairs is not None and E.shape[1] > 1:
        with torch.no_grad():
            changes = of.pairs.changes(made.contributions(*by.pairs))
        line["share"] = of.pairs.share(changes, seed).share
    return line | placed(of, maps.sum(1), maps * torch.where(E < 0, -1, 1)[:, :, None, None], E)


def placed(of: Problem, whole: Tensor, maps: Tensor, E: Tensor | None) -> Line:
    """Returns the figures of maps: the sum (n, H, W) of signed ones, and the directed ones (n, K, H, W)."""
    line: Line = {}
    if of.places is not None:
        line["locality"] = mean_locality(of.places(maps.clamp(min=0)), contributions=E)
    if of.taken is not None:
        drops, importance = of.y[:, None] - of.taken[1], mass(whole, of.taken[2])
        line |= {"sd": float(single_deletion(importance, drops).mean()), "importances": importance.tolist()}
        line |= {"part_drops": drops.tolist(), "areas": of.taken[2].double().sum((2, 3)).tolist()}
    return line


@torch.no_grad()
def curves(of: Problem, made: Explained, E: Tensor) -> Line:
    """Returns the areas under the logit while x-features leave the layer, and while they enter its base."""
    rest, Z = of.fit(0).rest, of.Z.float()
    every = made.part(Z, torch.ones(E.shape, dtype=torch.bool))
    start = rest(of.base[None])
    change = (rest(Z) - start).double()[:, None]
    toward = E * torch.where(change < 0, -1, 1)  # where the logit falls, what lowers it most goes first
    order = toward.argsort(dim=1, descending=True, stable=True) if made.order is None else made.order.expand(len(E), -1)
    found = {
        "deletion": deletion(lambda kept: rest(Z - every + made.part(Z, kept)), order),
        "insertion": insertion(lambda kept: rest(of.base + made.part(Z, kept)), order),
    }
    # Some methods leave the range of the model's activations: what they take below the base counts as 0.
    return {name: float(area(((curve - start) / change).clamp(0, 1)).mean()) for name, curve in found.items()}


def measure(of: Problem, by: Slopes, job: Line, halves: bool) -> Line:
    """Returns all figures of one method on one class, or why there are none."""
    name, seed = job["method"], job["seed"]
    if name in MAPS_ALONE:
        return map_alone(of, by, name, seed)
    make = (rivals.METHODS | rivals.CONTROLS)[name]
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = make(of.fit(seed))
        except ValueError as error:
            return {"failed": str(error)}
        seconds = time.process_time() - begin
        line = judged(of, made, by, seed) | {"seconds": seconds}
        if halves and line["x_features"] > 1:
            two = [make(of.fit(2 * seed + half, half)) for half in (0, 1)]
            with torch.no_grad():
                line["halves"] = matched_features(*(one.contributions(*by.test) for one in two)).mean
    return line


def map_alone(of: Problem, by: Slopes, name: str, seed: int) -> Line:
    """Returns the figures of one map of the output, or of smooth random maps."""
    begin = time.process_time()
    maps = OneHeatmap(of.read.model, ExcitationMaps()).attribute(of.images, of.label)[:, :, 0]
    seconds = time.process_time() - begin
    if name == "random maps":
        maps = random_maps(maps, seed=1000 * seed + of.label)
    lost = ((by.images[0] - of.base) * by.images[1]).sum(1)[:, None] - (
        ((by.covered[0] - of.base) * by.covered[1]).sum(1).reshape(len(maps), -1)
    )
    found = {"patches": patch_agreement(maps, lost[:, None])} | placed(of, maps.sum(1), maps, None)
    return found if name == "random maps" else found | {"seconds": seconds}


class Network(NamedTuple):
    """A network with classes to explain."""

    name: str
    classes: list[int]
    of: Callable[[int], Problem | None]
    """Gives the problem of a class; None if there is no image to measure on."""
    why_empty: str = "the network tells none of its test images right"
    """Why a class has no problem."""
    weights: str | None = None
    """Checksum of a user's model, by which a run with another model is refused."""


def of_funnybirds(root: Path, file: Path, count: int, out: Path) -> Network:
    """Returns the network of FunnyBirds; activations are kept in OUT/funnybirds."""
    folder = out / "funnybirds"
    folder.mkdir(parents=True, exist_ok=True)
    of = funnybirds.read(argparse.Namespace(root=root, file=file, layer="relu6", maps_layer=None, out=folder))

    def problem(label: int) -> Problem | None:
        right = (of.labels == label) & (of.test[1].argmax(1) == label)
        rows = right.nonzero()[:, 0]
        if not len(rows):
            return None
        taken = of.taken[0][rows], of.taken[1][rows, :, label], of.masks(rows.tolist())
        images = of.images(rows.tolist())
        Z, y = of.test[0][rows], of.test[1][rows, label]
        pairs = changed_parts.of_birds(Z, taken[0])
        return Problem(of, label, images, Z, y, of.covered[rows], taken=taken, pairs=pairs)

    return Network("FunnyBirds", birds.some_classes(of.labels, count), problem)


def _problem(
    model: nn.Module, layer: str, label: int, train: Any, test: Any, images: Tensor, train_images: Any, **more: Any
) -> Problem:
    """Returns a problem whose images are covered now: train and test are activations (M, ...) and outputs."""
    patches = patch_masks(images.shape[2], images.shape[3], GRID)
    fill = images.mean((2, 3), keepdim=True)
    covered = torch.stack(
        [torch.where(patches[:, None], colour, image) for image, colour in zip(images, fill, strict=True)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own, others = collect(model, layer, images), collect(model, layer, covered.flatten(0, 1))
    flat = [(Z.flatten(1).float(), y) for Z, y in (train, test)]
    if flat[0][0].shape[1] > WIDEST:
        raise SystemExit(
            f"expected a layer of at most {WIDEST} numbers, got {flat[0][0].shape[1]} from {layer!r}; choose a dense "
            "layer, or compare methods that group channels by `captum-xnn compare`"
        )
    nothing: Any = None
    of = Read(
        model, layer, spatial(model, layer, images), flat[0], flat[0][1].argmax(1), flat[1], flat[1][1].argmax(1),
        nothing, nothing, lambda rows: images[rows], nothing, train_images,
    )  # fmt: skip
    Z, y = own.Z[:].flatten(1), own.y_hat[:][:, label]
    return Problem(of, label, images, Z, y, others.Z[:].reshape(len(images), len(patches), -1), **more)


def of_birds(root: Path, file: Path, count: int, cache: Path) -> Network:
    """Returns the network of real birds at relu6."""
    of = birds.read(root, file, "relu6", cache=cache)

    def problem(label: int) -> Problem | None:
        train, test, positives = birds.split(of.images.labels, label)
        shown = positives[of.y_hat[positives].argmax(1) == label][:IMAGES]
        if not len(shown):
            return None
        batch = default_collate([of.images[i] for i in shown.tolist()])
        return _problem(
            of.model, of.layer, label, (of.Z[train], of.y_hat[train]), (of.Z[test], of.y_hat[test]), batch.image,
            in_batches(of.images, train), places=lambda maps: part_probabilities(maps, batch.points, batch.box),
        )  # fmt: skip

    return Network("birds", birds.some_classes(of.images.labels, count), problem)


def of_rooms(place: Path, ade: Path, file: Path, layer: str, count: int, cache: Path) -> Network:
    """Returns a network of rooms, with objects of ADE20K."""
    given = argparse.Namespace(
        places=place, ade=ade, file=file, torchvision=None, weights=None, layer=layer, size=224, rooms=None, workers=0,
        activations=cache, out=cache.parent,
    )  # fmt: skip
    counts = places.Counts()
    of = places.read(given, counts)

    def problem(label: int) -> Problem | None:
        train, test = places.split(of.labels, label, counts)
        rows = (of.rooms.labels == label).nonzero()[: 4 * IMAGES, 0].tolist()
        batch = default_collate([of.rooms[i] for i in rows])
        with torch.no_grad():
            right = (of.model(batch.image).argmax(1) == label).nonzero()[:IMAGES, 0]
        if not len(right):
            return None
        mask = batch.mask[right]
        return _problem(
            of.model, layer, label, (of.Z[train], of.y_hat[train]), (of.Z[test], of.y_hat[test]), batch.image[right],
            in_batches(of.images, train),
            places=lambda maps: object_probabilities(maps, mask, objects=int(mask.max()) + 1),
        )  # fmt: skip

    return Network(f"rooms {file.stem}", [ROOMS[room] for room in given.rooms][:count], problem)


def of_figures(examples: int, count: int) -> Network:
    """Returns the network of the drawn figures."""

    def problem(label: int) -> Problem | None:
        of = synthetic.explained("trained", examples, 2000, 0, 6)
        members = ((of.test.figures.labels == label) & (of.test.y_hat.argmax(1) == label)).nonzero()[:IMAGES, 0]
        return _problem(
            of.model, of.layer, label, of.train[1:], of.test[1:], of.test.figures.images[members],
            of.train.figures.images, free=(of.free.Z.flatten(1), of.free.figures.shown_reasons(label)),
            pairs=changed_parts.of_figures(of, label),
        )  # fmt: skip

    return Network("figures", [0, 2, 3, 5][:count], problem)


# Remedies in errors of the library by options that this script lacks.
_OPTIONS = (
    "pass size=(H, W) (--size), or ",
    ", or skip damaged images with skip_damaged=True (--skip-damaged)",
)


def _stopped(error: Exception) -> SystemExit:
    """Returns an error of the library in terms of this script."""
    text = str(error)
    for option in _OPTIONS:
        text = text.replace(option, "")
    return SystemExit(text)


def _images(folder: Path, preparation: Any, most: int) -> Tensor:
    """Returns the first images of a folder, (M, C, H, W)."""
    from captum_xnn.cli._inputs import Inputs

    found: list[Tensor] = []
    for batch in Inputs(folder, preparation, batch_size=32):
        found.append(batch.inputs)
        if sum(map(len, found)) >= most:
            break
    shapes = {tuple(batch.shape[1:]) for batch in found}
    if len(shapes) > 1:
        raise SystemExit(f"the images in {folder} differ in size: {sorted(shapes)}; set SIZE in the model's file")
    images = torch.cat(found)[:most]
    if images.dim() != 4 or len(images) < FEWEST:
        raise SystemExit(
            f"expected at least {FEWEST} images (N, C, H, W) in {folder}, got {tuple(images.shape)}; add images, of "
            "which a fifth is measured"
        )
    return images


def check_logits(source: str, outputs: Tensor) -> None:
    """Stops unless the outputs of a model may be logits, (N, classes)."""
    if outputs.dim() != 2:
        raise SystemExit(
            f"expected outputs (N, classes) of {source}, got {tuple(outputs.shape)}; let its model return logits (N, "
            "classes), or (N, 1) if there is one output"
        )
    seen = OutputRange()
    seen.add(outputs)
    if (reason := no_logits(seen)) is not None:
        # The library's other remedy is an argument that this script lacks.
        raise SystemExit(f"{source}: {reason.partition(', or pass ')[0]}: let load() return a model that gives logits")


def _checksum(model: nn.Module, layer: str) -> str:
    described = json.dumps(fingerprint(model, layer), sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=6).hexdigest()


def of_model(source: str, folder: Path, layer: str, count: int, most: int) -> Network:
    """Returns a user's own network, on a folder of images: the classes that it gives most often."""
    from captum_xnn.cli._model_files import load_model

    try:
        found = load_model(source)
        images = _images(folder, found.preparation, most)
        seen = collect(found.model, layer, images, progress=True)
    except (ValueError, LayerNotReachedError) as error:
        raise _stopped(error) from error
    Z, y = seen.Z[:], seen.y_hat[:]
    check_logits(source, y)
    order = torch.randperm(len(Z), generator=torch.Generator().manual_seed(0))
    train, test = order[len(order) // 5 :].sort().values, order[: len(order) // 5].sort().values
    counts = y.argmax(1).bincount(minlength=y.shape[1])
    classes = counts.argsort(descending=True, stable=True)[: min(count, int((counts > 0).sum()))].tolist()

    def problem(label: int) -> Problem | None:
        shown = test[y[test].argmax(1) == label][:IMAGES]
        if not len(shown) or not bool((y[train].argmax(1) == label).any()):
            return None
        loader = images[train]
        return _problem(found.model, layer, label, (Z[train], y[train]), (Z[test], y[test]), images[shown], loader)

    few = f"the model gives it to none of {len(train)} images to learn from, or to none of {len(test)} to measure on"
    return Network(Path(source).stem, classes, problem, few, _checksum(found.model, layer))


def networks(given: argparse.Namespace) -> list[Network]:
    """Returns the networks whose data are given."""
    count, out = given.classes, given.out
    if given.model:
        if given.images is None or given.layer is None:
            raise SystemExit("--model needs --images FOLDER and --layer NAME; add both")
        return [of_model(given.model, given.images, given.layer, count, given.most)]
    found = []
    if given.funnybirds:
        found.append(
            of_funnybirds(Path(given.funnybirds[0]), Path(given.funnybirds[1]), given.classes_funnybirds or count, out)
        )
    if given.birds:
        found.append(of_birds(Path(given.birds[0]), Path(given.birds[1]), count, given.activations or out / "birds.pt"))
    for place, ade, file, layer in given.rooms or ():
        found.append(of_rooms(Path(place), Path(ade), Path(file), layer, count, out / f"{Path(file).stem}.pt"))
    return [*found, of_figures(given.examples, min(count, 4))]


def pooled(lines: Sequence[Line]) -> list[Line]:
    """Returns the lines, with the rank correlation within parts over all birds of a network, method and seed."""
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        if "importances" in line:
            groups.setdefault((line["network"], line["method"], line["seed"]), []).append(line)
    found = {
        key: float(within_part(*(torch.tensor([r for line in of for r in line[name]]) for name in pair)).mean())
        for key, of in groups.items()
        for pair in [("importances", "part_drops")]
    }
    return [
        line | {"within": value}
        if (value := found.get((line["network"], line["method"], line["seed"]))) is not None
        else line
        for line in lines
    ]


def ranks(lines: Sequence[Line]) -> list[Line]:
    """Returns every rank by every measure, for each class and seed: 1 is best.

    Values that the table prints alike are ties, and share their mean rank. Controls take part: a method that is not
    ahead of them has achieved nothing.
    """
    found = []
    for job in sorted({(line["class"], line["seed"]) for line in lines}):
        of = [line for line in lines if (line["class"], line["seed"]) == job]
        by = {line["method"]: Line(method=line["method"], **{"class": job[0]}, seed=job[1]) for line in of}
        for key in (key for key, measure in MEASURES.items() if measure.better):
            known = [line for line in of if _is_number(line.get(key))]
            if len(known) > 1:
                values = [-MEASURES[key].better * round(line[key], MEASURES[key].digits) for line in known]
                for line, rank in zip(known, rankdata(values), strict=True):
                    by[line["method"]][key] = float(rank)
        for line in by.values():
            more: Line = {}
            for name, keys in RANKED.items():
                own = [line[key] for key in keys if key in line]
                more |= {name: math.fsum(own) / len(own)} if own else {}
                if name == "mean":
                    more["asked"] = len(own)
            found.append(line | more)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def columns_of(lines: Sequence[Line]) -> list[str]:
    """Returns the measures that a network has."""
    return [key for key in MEASURES if any(_is_number(line.get(key)) for line in lines)]


def rows_of(lines: Sequence[Line]) -> list[str]:
    """Returns the methods in their order, controls last."""
    known = {line["method"] for line in lines}
    return [name for name in (*rivals.METHODS, *CONTROLS) if name in known]


def cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]], list[str]]:
    """Returns the head, the rows and the reasons of empty cells of a network's table."""
    keys, rows = columns_of(lines), []
    reasons: dict[tuple[str, str], list[str]] = {}
    of = {name: [line for line in lines if line["method"] == name] for name in rows_of(lines)}
    means = {(name, key): interval(_known(own, key)) for name, own in of.items() for key in keys}
    for name, own in of.items():
        row = [f"*{name}*" if name in CONTROLS else name]
        for key in keys:
            mean, half = means[name, key]
            measure = MEASURES[key]
            if math.isnan(mean):
                row.append("")
                failed = next((line["failed"] for line in own if "failed" in line), None)
                reason = failed or REASONS.get((name, key))
                if reason is not None:
                    reasons.setdefault((name, reason), []).append(measure.title)
                continue
            text = f"{mean:.{measure.digits}f}" + ("" if math.isnan(half) else f" ± {half:.{measure.digits}f}")
            ranked = [means[n, key][0] for n in of if n in rivals.METHODS and not math.isnan(means[n, key][0])]
            best = ranked and max(value * measure.better for value in ranked)
            is_best = bool(measure.better) and name in rivals.METHODS
            is_best = is_best and f"{mean * measure.better:.{measure.digits}f}" == f"{best:.{measure.digits}f}"
            row.append(f"**{text}**" if is_best else text)
        rows.append(row)
    said = [f"{name}, {', '.join(titles)}: {reason}." for (name, reason), titles in reasons.items()]
    return ["method", *(MEASURES[key].title for key in keys)], rows, said


def _known(lines: Sequence[Line], key: str) -> list[float]:
    """Returns the values of a measure; of ``within``, which is one number for all classes, one for each seed."""
    if key != "within":
        return [line[key] for line in lines if _is_number(line.get(key))]
    return list({line["seed"]: line[key] for line in lines if _is_number(line.get(key))}.values())


def _over_networks(each: Iterable[tuple[float, float]]) -> list[float]:
    """Returns the mean of some networks' means, each counting alike, and half the width of its interval."""
    each = list(each)
    known = [half**2 for _, half in each if not math.isnan(half)]
    mean = math.fsum(value for value, _ in each) / len(each)
    return [mean, math.sqrt(math.fsum(known)) / len(each) if known else math.nan]


def behind(of: dict[str, list[Line]], default: dict[str, list[Line]]) -> list[float] | None:
    """Returns how much larger a method's mean rank is than the default's, in pairs of the same class and seed."""
    each = []
    for name, lines in of.items():
        by = {(line["class"], line["seed"]): line["mean"] for line in default.get(name, [])}
        pairs = [line["mean"] - by[job] for line in lines if (job := (line["class"], line["seed"])) in by]
        each += [interval(pairs)] if pairs else []
    return _over_networks(each) if each else None


def rank_cells(by_network: dict[str, list[Line]]) -> tuple[list[str], list[list[str]], Line]:
    """Returns the head and the rows of the table of mean ranks, best first, and its figures."""
    found: Line = {}
    for name, lines in by_network.items():
        for line in ranks(lines):
            if "mean" in line:
                found.setdefault(line["method"], {}).setdefault(name, []).append(line)
    figures: Line = {}
    for method, of in found.items():
        figures[method] = {"asked": sum(max(line["asked"] for line in own) for own in of.values())}
        for kind in RANKED:
            each = {name: interval(line[kind] for line in of[name]) for name in of}
            figures[method] |= {kind: _over_networks(each.values()), f"{kind} of networks": each}
        figures[method]["behind"] = behind(of, found.get("groups", {})) if method != "groups" else None
    rows = []
    for method in sorted(figures, key=lambda method: (method in CONTROLS, figures[method]["mean"][0])):
        of = figures[method]
        each = {name: _shown(*value) for name, value in of["mean of networks"].items()}
        row = [
            f"*{method}*" if method in CONTROLS else method,
            _shown(*of["mean"]),
            _shown(*of["behind"]) if of["behind"] else "",
            *(each.get(name, "") for name in by_network),
        ]
        rows.append([*row, _shown(*of["all"]), str(of["asked"])])
    return ["method", "mean rank", "behind groups", *by_network, "by all measures", "asked"], rows, figures


def _shown(value: float, half: float) -> str:
    return f"{value:.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def list_table(head: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Returns a list-table of reStructuredText, and notes below it."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if i == 0 else ' '} - {cell}".rstrip() for i, cell in enumerate(row)]
    return "\n".join([*lines, *([""] if notes else []), *(f"{note}" for note in notes)]) + "\n"


def picture_of_ranks(ranked: Line, names: Sequence[str]) -> Any:
    """Returns a figure of the mean ranks: a row for each method, a mark for each network, and a line for the mean."""
    figure, (axis,) = figure_of(6.4, 0.28 * len(ranked) + 1.2)
    order = sorted(ranked, key=lambda method: ranked[method]["mean"][0], reverse=True)
    for row, method in enumerate(order):
        color = CONTROL if method in CONTROLS else METHOD
        mean, half = ranked[method]["mean"]
        half = 0.0 if math.isnan(half) else half
        axis.plot([mean - half, mean + half], [row, row], color="0.2", linewidth=5, alpha=0.35, solid_capstyle="butt")
        axis.plot([mean], [row], marker="|", markersize=13, color="0.1")
        for mark, name in zip("osD^vP", names, strict=False):
            if name in (of := ranked[method]["mean of networks"]):
                label = name if row == 0 else None
                axis.plot([of[name][0]], [row], mark, color=color, markersize=5, fillstyle="none", label=label)
    axis.set_yticks(range(len(order)), order)
    axis.set_xlabel("mean rank over measures; 1 is best")
    axis.set_xlim(0, len(order) + 1)
    if ranked:  # one method alone has no rank
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


NAMED = ("groups", "SRAE", "DRSA", "CRAFT", "random groups", "uneven random groups", "random encoder")


def picture_of_pair(by_network: dict[str, list[Line]], across: str, up: str, named: Sequence[str] = NAMED) -> Any:
    """Returns a figure of two measures of every method, a panel for each network: some by name, others as grey dots."""
    shown = {
        name: found
        for name, lines in by_network.items()
        if len(
            found := {
                method: (x, y)
                for method in rows_of(lines)
                for own in [[line for line in lines if line["method"] == method]]
                for x, y in [(interval(_known(own, across))[0], interval(_known(own, up))[0])]
                if math.isfinite(x) and math.isfinite(y)
            }
        )
        > 1
    }
    figure, axes = figure_of(3.1 * max(len(shown), 1), 3.0, max(len(shown), 1))
    for axis, (name, found) in zip(axes, shown.items(), strict=False):
        for method, (x, y) in found.items():
            control = method in CONTROLS
            color = CONTROL if control else METHOD if method in named else OTHER
            axis.plot([x], [y], "s" if control else "o", color=color, markersize=6 if method in named else 4)
            if method in named:
                axis.annotate(method, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8, color=color)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(_directed(across), fontsize=8)
        axis.set_ylabel(_directed(up), fontsize=8)
        axis.margins(0.18)
    return figure


def _directed(key: str) -> str:
    measure = MEASURES[key]
    return measure.title + {1: " (more is better)", -1: " (less is better)", 0: ""}[measure.better]


def draw(by_network: dict[str, list[Line]], ranked: Line, folder: Path) -> None:
    """Writes a picture for each finding: who is ahead, what overlaps, and what removal curves measure."""
    figures = {
        "ranks": picture_of_ranks(ranked, list(by_network)),
        "overlap": picture_of_pair(by_network, "overlap", "patches", ("groups", "DRSA", "random groups")),
        "removal": picture_of_pair(by_network, "eff", "insertion"),
    }
    for name, figure in figures.items():
        save_svg(figure, folder / f"scoreboard_{name}.svg")


def without_halves(lines: Sequence[Line]) -> list[str]:
    """Returns for which classes and methods halves were not measured, in sentences."""
    methods: dict[tuple[int, ...], list[str]] = {}
    for name in rows_of(lines):
        own = [line for line in lines if line["method"] == name and line.get("x_features", 1) > 1]
        if lacking := tuple(sorted({line["class"] for line in own if "halves" not in line})):
            methods.setdefault(lacking, []).append(name)
    return [
        f"halves, class {', '.join(map(str, classes))}: not measured for {', '.join(names)}. `--again METHOD ...` "
        "measures methods anew; --halves N lets N classes of each network have halves."
        for classes, names in methods.items()
    ]


def why_nothing(lines: Sequence[Line]) -> str:
    """Returns a sentence that says why no method has a figure."""
    reasons: dict[str, None] = {}
    for line in lines:
        if "failed" in line:
            reasons[f"{line['network']}, class {line['class']}, {line['method']}: {line['failed']}"] = None
        else:
            reasons[f"{line['network']}, class {line['class']}: {line['empty']}"] = None
    return "nothing was measured:\n" + "\n".join(reasons) + "\nAdd images or methods, and take another --out"


def report(lines: list[Line], out: Path, tables: Path | None, pictures: Path | None) -> None:
    """Prints the tables, and writes them as Markdown, JSON and list-tables, with pictures."""
    if all("failed" in line or line.get("empty") for line in lines):
        raise SystemExit(why_nothing(lines))
    lines = pooled([line for line in lines if not line.get("empty")])
    by_network: dict[str, list[Line]] = {}
    for line in lines:
        by_network.setdefault(line["network"], []).append(line)
    head, rows, figures = rank_cells(by_network)
    texts, files = [f"Mean ranks\n\n{markdown(head, rows)}"], {"ranks": list_table(head, rows)}
    for name, of in by_network.items():
        first, body, notes = cells(of)
        notes += without_halves(of)
        count = len({line["class"] for line in of})
        texts.append(f"{name}, {count} classes\n\n{markdown(first, body)}\n\n" + "\n".join(notes))
        files[name.replace(" ", "_").lower()] = list_table(first, body)
    means = {
        name: {m: {k: interval(_known([ln for ln in of if ln["method"] == m], k)) for k in columns_of(of)}
               for m in rows_of(of)}
        for name, of in by_network.items()
    }  # fmt: skip
    write(out, "\n\n".join(texts), {"ranks": figures, "networks": means})
    for name, text in files.items():
        save((tables or out) / f"scoreboard_{name}.inc", text.encode())
    draw(by_network, figures, pictures or out)


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the tables."""
    if given.report:
        found = list(read_lines(given.out / "results.jsonl"))
        if not found:
            raise SystemExit(f"expected results in {given.out / 'results.jsonl'}, got none; measure without --report")
        report(found, given.out, given.tables, given.pictures)
        return
    if given.quick:
        given.classes, given.halves = min(given.classes, 2), 0
        given.birds = given.rooms = None
    known = {network.name: network for network in networks(given)}
    methods = [name for name in (*rivals.METHODS, *CONTROLS) if name in given.methods]
    jobs = [
        {"network": name, "class": label, "seed": seed, "method": method}
        for turn in range(max(len(network.classes) for network in known.values()))
        for name, network in known.items()
        for label in network.classes[turn : turn + 1]
        for seed in range(given.seeds)
        for method in methods
    ]

    @lru_cache(maxsize=1)
    def read(name: str, label: int) -> tuple[Problem, Slopes] | None:
        of = known[name].of(label)
        return None if of is None else (of, Slopes.of(of))

    def of(job: Line) -> Line:
        found = read(job["network"], job["class"])
        halved = job["class"] in known[job["network"]].classes[: given.halves]
        return {"empty": known[job["network"]].why_empty} if found is None else measure(*found, job, halved)

    under = settings(given)
    for network in known.values():
        under |= {"model": f"{given.model}, weights {network.weights}"} if network.weights else {}
    lines = measured(given.out, jobs, of, title="networks, classes and methods", under=under, again=given.again)
    report(lines, given.out, given.tables, given.pictures)


def at_least(least: int) -> Callable[[str], int]:
    """Returns a type of options: whole numbers from the least."""

    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return whole_number


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of a command line."""
    every = [*rivals.METHODS, *CONTROLS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--funnybirds", nargs=2, metavar=("FOLDER", "FILE.py"))
    parser.add_argument("--birds", nargs=2, metavar=("FOLDER", "FILE.py"))
    parser.add_argument("--rooms", nargs=4, action="append", metavar=("PLACES", "ADE", "FILE.py", "LAYER"))
    parser.add_argument("--model", help="a model of your own, as FILE.py or FILE.py:function")
    parser.add_argument("--images", type=Path, help="its folder of images")
    parser.add_argument("--layer", help="its layer, of at most 4,096 numbers")
    parser.add_argument("--most", type=at_least(FEWEST), default=2000, help="images of the folder, at most")
    parser.add_argument("--classes", type=at_least(1), default=8, help="of each network, evenly spread")
    parser.add_argument("--classes-funnybirds", type=at_least(1), help="of FunnyBirds, where it is another number")
    parser.add_argument("--seeds", type=at_least(1), default=1)
    parser.add_argument("--methods", nargs="+", default=every, choices=every, metavar="METHOD")
    parser.add_argument(
        "--again", nargs="+", default=[], choices=every, metavar="METHOD", help="measure these anew, as after a change"
    )
    parser.add_argument(
        "--halves", type=at_least(0), default=1000, help="classes of each network with fits to halves, at most"
    )
    parser.add_argument("--quick", action="store_true", help="FunnyBirds and figures, two classes, without halves")
    parser.add_argument("--examples", type=int, default=6000, help="figures to learn from")
    parser.add_argument("--activations", type=Path, help="file that keeps the birds' activations")
    parser.add_argument("--tables", type=Path, help="folder of list-tables; OUT if not given")
    parser.add_argument("--pictures", type=Path, help="folder of pictures; OUT if not given")
    parser.add_argument("--report", action="store_true", help="write the tables of what OUT has; measure nothing")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run resumes")
    found = parser.parse_args(given)
    if unknown := set(found.again) - set(found.methods):
        parser.error(f"argument --again: {', '.join(sorted(unknown))} not among --methods; add it there")
    return found


if __name__ == "__main__":
    main(arguments())
