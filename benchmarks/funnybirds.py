"""Which part moves an x-feature, and do the maps know? On FunnyBirds, where every part can be taken away.

Each class of the test images is explained on its own, and only birds that the network tells right count. Every method,
class and seed is a line of OUT/results.jsonl, and a run with the same OUT resumes where the last one stopped. Printed,
and written to OUT, is the mean over classes and seeds with its 95 % confidence interval:

F_reg         mean |sum of contributions and bias - logit| on test birds, in logits
selectivity   share of the part that moves an x-feature most, of the movement by all parts
whole         the same of the sum of the x-features: what x-features score that all move alike
movement      movement of the x-features in multiples of that of their sum; more than 1 is cancelling
eff           effective number of x-features, of their mean absolute contributions to these birds
O1            overlap of the x-features' drops when one patch of 4 x 4 is covered, plain and weighted by contribution
patches       patch agreement of the maps: rank correlation over patches of the drops with the map, weighted by
              contribution; GxA is of gradient x activation, MWP of contrastive excitation backprop, with the drops
              turned to the side of the x-feature; chance is of smooth random maps, mean over 20
identified    share of GxA maps that fit the drops of their own x-feature better than those of the others; chance is
              1 / K
SD            single deletion: rank correlation over the parts of a bird of the drop of the logit with the importance,
              which is the sum of all GxA maps on the part, or, for MWP, of all unit maps times |contribution|; area is
              the number of the part's pixels
within        a second table: the same over all birds, for each part, mean over parts

Groups of dimensions divide their path-integrated contributions to the logit, from the mean activation of the training
images: ``groups`` as XNNAttribution learns them from the training images, which covers feature maps; ``groups of
covered images`` with pixels covered, in 8 x 8 patches of 30 birds unless it says otherwise; the others by chance or by
correlation. Add a method of your own to METHODS.

How selective can groups be? ``--limits`` prints three controls that no fit can use, since they read the movement of the
very birds that they are measured on: every dimension as an x-feature of its own; dimensions grouped by the part that
moves them most; and, from there, dimensions moved one by one to the group where selectivity rises most.

    python -m benchmarks.funnybirds --root FunnyBirds --network funnynet.py --layer relu6 --out DIR
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.birds import network, some_classes
from benchmarks.one_vs_all import N_FEATURES, effective, excitation_maps, fitted
from benchmarks.runs import Column, Line, kept, measured, settings, summary, table, write
from captum_xnn import ContributionGroups, OneHeatmap, XNNAttribution
from captum_xnn.activations import Activations, collect
from captum_xnn.activations._activations import Source
from captum_xnn.datasets import FunnyBirds
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._read import read_layer
from captum_xnn.layers._trace import trace
from captum_xnn.metrics import drop_orthogonality, patch_agreement, selectivity
from captum_xnn.metrics._controls import random_maps
from captum_xnn.metrics._patches import map_identification, patch_masks
from captum_xnn.metrics._removal import single_deletion, within_part
from captum_xnn.models.baselines._partitions import random_partition, spectral_partition

GRID, NODES, DRAWS = 4, 12, 20

COLUMNS = (
    Column("f_reg", "F_reg"),
    Column("selectivity", "selectivity"),
    Column("whole", "whole"),
    Column("movement", "movement", 1),
    Column("eff", "eff", 1),
    Column("o1", "O1", 2),
    Column("o1_weighted", "O1 weighted", 2),
    Column("patches", "patches, GxA", 2),
    Column("patches_mwp", "MWP", 2),
    Column("patches_chance", "chance", 2),
    Column("identified", "identified", 2),
    Column("sd", "SD, GxA", 2),
    Column("sd_mwp", "MWP", 2),
    Column("sd_area", "area", 2),
    Column("seconds", "seconds", 1),
)
WITHIN = (Column("within", "within parts, GxA", 2), Column("within_mwp", "MWP", 2), Column("within_area", "area", 2))


class Read(NamedTuple):
    """A network, what it gives on FunnyBirds, and the birds themselves; activations are flat, (M, D)."""

    model: nn.Module
    layer: str
    maps_layer: str
    train: tuple[Tensor, Tensor]
    """Activations and all outputs of the training images."""
    train_labels: Tensor
    test: tuple[Tensor, Tensor]
    labels: Tensor
    taken: tuple[Tensor, Tensor]
    """Activations (N, P, D) and outputs (N, P, classes) of the test images without each part."""
    covered: Tensor
    """Activations (N, patches, D) of the test images with each patch covered."""
    images: Callable[[list[int]], Tensor]
    """Gives test images (n, 3, H, W)."""
    masks: Callable[[list[int]], Tensor]
    """Gives their parts' pixels, (n, P, H, W), bool."""
    train_images: Any
    """The training images in order, as XNNAttribution.fit takes them."""


class Form(NamedTuple):
    """An explanation of one output."""

    contributions: Callable[[Tensor], Tensor]
    """Gives the contributions (n, K) of activations (n, D), in logits, with the gradient that maps are to follow."""
    bias: float
    """What contributions leave out of the logit."""
    excitation: Callable[[Tensor], Tensor] | None = None
    """Gives maps (n, K, H, W) of images by contrastive excitation backprop."""


class Job(NamedTuple):
    """What a method has to fit an explanation."""

    of: Read
    label: int
    seed: int

    @property
    def rest(self) -> Callable[[Tensor], Tensor]:
        """The model from the layer to the logit, (n, D) to (n,)."""
        return partial(rest_of_model, self.of.model, self.of.layer, self.of.images([0]), self.label)


class Variants(Dataset[Tensor]):
    """Several variants of each image, one after the other."""

    def __init__(self, images: int, variants: int, make: Callable[[int, int], Tensor]) -> None:
        self.images, self.variants, self.make = images, variants, make

    def __len__(self) -> int:
        return self.images * self.variants

    def __getitem__(self, index: int) -> Tensor:
        return self.make(*divmod(index, self.variants))


def spatial(model: nn.Module, layer: str, images: Tensor) -> str:
    """Returns the last layer of feature maps that everything crosses: where the library draws by default."""
    found = trace(model, find_layer(model, layer)[1], (images[:1],)).spatial
    if found is None:
        raise SystemExit(f"expected feature maps before layer {layer!r}, got none; choose a layer behind convolutions")
    return find_layer(model, found)[0]


def read(given: argparse.Namespace) -> Read:
    """Returns the network's activations on all images, from one pass over them (minutes on one core) or from OUT."""
    model, normalise = network(given.file)
    train, test = (FunnyBirds(given.root, split, transform=normalise) for split in ("train", "test"))
    height, width = test[0].image.shape[1:]
    patches = patch_masks(height, width, GRID)

    def collected(name: str, images: Dataset[Any]) -> tuple[Tensor, Tensor]:
        def run() -> Any:
            loader = DataLoader(images, batch_size=50)
            return collect(model, given.layer, loader, unpack=_images_of, progress=True)

        known = {"network": str(given.file.resolve()), "root": str(given.root.resolve()), "layer": given.layer}
        found = kept(given.out / f"{name}.pt", known | {"images": len(images)}, run)  # type: ignore[arg-type]
        return found["Z"].flatten(1), found["y_hat"]

    taken = collected(
        "taken", Variants(len(test), len(test.part_names), lambda i, p: test.without(i, test.part_names[p]))
    )
    # In normalised images 0 is the mean colour of the data.
    covered = collected("covered", Variants(len(test), GRID**2, lambda i, p: torch.where(patches[p], 0, test[i].image)))
    return Read(
        model,
        given.layer,
        given.maps_layer or spatial(model, given.layer, test[0].image[None]),
        collected("train", train),
        train.labels,
        collected("test", test),
        test.labels,
        tuple(values.reshape(len(test), len(test.part_names), -1) for values in taken),  # type: ignore[arg-type]
        covered[0].reshape(len(test), GRID**2, -1),
        lambda rows: torch.stack([test[i].image for i in rows]),
        lambda rows: torch.stack([test.masks(i) for i in rows]),
        DataLoader(train, batch_size=10),  # type: ignore[arg-type]
    )


def _images_of(batch: Any) -> tuple[tuple[Tensor], None]:
    return (batch if isinstance(batch, Tensor) else batch.image,), None


@contextmanager
def hooked(module: nn.Module, hook: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replaces a module's output."""
    handle = module.register_forward_hook(lambda _module, _inputs, output: hook(output))
    try:
        yield
    finally:
        handle.remove()


def rest_of_model(model: nn.Module, layer: str, stand_in: Tensor, label: int | slice, Z: Tensor) -> Tensor:
    """Returns the logit (n,), or some logits, of activations (n, D), which take the place of those of a stand-in image.

    Nothing else may cross from before the layer to behind it.
    """
    # A clone, because what follows may work in place.
    with hooked(find_layer(model, layer)[1], lambda output: Z.reshape(-1, *output.shape[1:]).clone()):
        return model(stand_in)[:, label]


def slopes(rest: Callable[[Tensor], Tensor], Z: Tensor, base: Tensor, nodes: int = NODES) -> Tensor:
    """Returns the mean gradient of the logit on the way from the base to Z, (n, D), by Gauss-Legendre."""
    places, weights = (torch.from_numpy(x).to(Z) for x in np.polynomial.legendre.leggauss(nodes))
    on_the_way = base + (places[:, None, None] + 1) / 2 * (Z.detach() - base)
    with torch.enable_grad():
        on_the_way = on_the_way.flatten(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(rest(on_the_way).sum(), on_the_way)
    return (weights[:, None, None] / 2 * gradient.reshape(nodes, *Z.shape)).sum(0)


def contributions_of_dimensions(rest: Callable[[Tensor], Tensor], Z: Tensor, base: Tensor) -> Tensor:
    """Returns the path-integrated contributions (n, D), in logits; their gradient is that of the fixed read-out."""
    return torch.cat([(part - base) * slopes(rest, part, base) for part in Z.split(64)])


def learned(method: str, job: Job) -> Form:
    """Returns an explanation network that learns from activations."""
    of = job.of
    xnn = fitted(method, *of.train, job.label, job.seed)
    return Form(
        lambda Z: xnn.contributions(xnn.encode(Z)),
        float(xnn.head.bias[0]),
        lambda images: excitation_maps(xnn, of.model, of.layer, images),
    )


def whole(job: Job) -> Form:
    """Returns the logit as one x-feature."""
    of, bias = job.of, float(job.rest(job.of.train[0].mean(0, keepdim=True)).detach())
    return Form(
        lambda Z: job.rest(Z)[:, None] - bias,
        bias,
        lambda images: OneHeatmap(of.model, ExcitationMaps()).attribute(images, job.label)[:, :, 0],
    )


def divided(make: Callable[[Job, Tensor], Tensor], job: Job) -> Form:
    """Returns groups of dimensions by a partition (D, K) of the base's (D,) contributions."""
    base = job.of.train[0].mean(0)
    a = make(job, base).to(base)
    return Form(lambda Z: contributions_of_dimensions(job.rest, Z, base) @ a, float(job.rest(base[None]).detach()))


def library_groups(of: Read, label: int, **settings: Any) -> tuple[Tensor, Tensor]:
    """Returns the groups (D, K) that XNNAttribution learns from the training images, and their base (D,)."""
    model, layer = of.model, find_layer(of.model, of.layer)[1]
    shape = read_layer(model, layer, (of.images([0]),), name=of.layer)[0].shape[1:]
    Z, y_hat = of.train
    data = Activations(Z.reshape(-1, *shape), y_hat, of.layer, source=Source(of.train_images, _images_of))
    make = partial(ContributionGroups, **settings)
    xnn = XNNAttribution(model, of.layer, N_FEATURES, autoencoder=make).fit(data, label, progress=False)
    form: Any = xnn.explainer(label).form
    places = [1] * len(shape)
    places[form.channels - 1] = -1
    channel = torch.arange(len(form.groups)).reshape(places).expand(shape).flatten()  # of each dimension
    return form.groups[channel], form.base.expand(shape).flatten()


def by_library(job: Job, **settings: Any) -> Form:
    """Returns the groups of the default form."""
    a, base = library_groups(job.of, job.label, **settings)
    return Form(lambda Z: contributions_of_dimensions(job.rest, Z, base) @ a, float(job.rest(base[None]).detach()))


def by_chance(job: Job, base: Tensor) -> Tensor:
    """Returns random groups."""
    return random_partition(len(base), N_FEATURES, torch.Generator().manual_seed(1000 * job.seed + job.label))


def by_correlation(job: Job, base: Tensor) -> Tensor:
    """Returns spectral clusters of the contributions to the class's training images, some of which lack parts."""
    own = job.of.train[0][job.of.train_labels == job.label]
    return spectral_partition(contributions_of_dimensions(job.rest, own, base), N_FEATURES)


METHODS: dict[str, Callable[[Job], Form]] = {
    "SRAE": partial(learned, "SRAE"),
    "NN": partial(learned, "NN"),
    "1-Heatmap": whole,
    "groups": by_library,
    "groups of covered maps alone": partial(by_library, strongest=0),
    "groups of covered images": partial(by_library, covered="images"),
    "groups of covered images, 6 x 6": partial(by_library, covered="images", grid=6),
    "groups of covered images, 4 x 4": partial(by_library, covered="images", grid=4),
    "groups of covered images, 4 x 4, 12 birds": partial(by_library, covered="images", grid=4, positives=12),
    "random groups": partial(divided, by_chance),
    "spectral clusters": partial(divided, by_correlation),
}
"""Every method gives a Form of a Job."""
LIMITS = ("every dimension alone", "dimensions by their part", "searched on the test birds")
"""Controls that read what they are measured on."""


def gradient_maps(of: Read, form: Form, images: Tensor) -> Tensor:
    """Returns gradient x activation of each contribution, (n, K, H, W), summed over channels and enlarged."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> Tensor:
        seen[name] = output
        return output.clone()  # what follows may work in place

    modules = {name: find_layer(of.model, name)[1] for name in (of.maps_layer, of.layer)}
    with torch.enable_grad():
        with hooked(modules[of.maps_layer], partial(keep, "A")), hooked(modules[of.layer], partial(keep, "Z")):
            of.model(images.clone().requires_grad_())
        given = form.contributions(seen["Z"].flatten(1))
        maps = []
        for k in range(given.shape[1]):
            (gradient,) = torch.autograd.grad(given[:, k].sum(), seen["A"], retain_graph=True)
            maps.append((gradient * seen["A"]).sum(1).detach())
    return F.interpolate(torch.stack(maps, 1), images.shape[2:], mode="bilinear", align_corners=False)


def mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Returns the sum of maps (n, H, W) over the pixels of each part, (n, P)."""
    return torch.einsum("nhw,nphw->np", maps.double(), masks.double())


def searched(changes: Tensor, groups: Tensor, dimensions: int = 200, rounds: int = 2) -> Tensor:
    """Returns groups (D,) after a greedy search for selectivity over the dimensions that move most.

    Args:
        changes: Change of every dimension's contribution without each part, (n, D, P), in logits.
        groups: Group of each dimension at the start, (D,), from 0 to P - 1.
        dimensions: How many may move to another group.
        rounds: How often each of them may.
    """
    groups, K = groups.clone(), changes.shape[2]
    own = torch.stack([changes[:, groups == k].sum(1) for k in range(K)], 1)
    best = selectivity(own).share
    for d in changes.abs().sum((0, 2)).argsort(descending=True, stable=True)[:dimensions].tolist() * rounds:
        for k in set(range(K)) - {int(groups[d])}:
            tried = own.clone()
            tried[:, int(groups[d])] -= changes[:, d]
            tried[:, k] += changes[:, d]
            if (share := selectivity(tried).share) > best + 1e-6:
                best, own, groups[d] = share, tried, k
    return groups


def limit(of: Read, job: Line) -> Line:
    """Returns the selectivity of a control that reads the test birds; none if the network tells none right."""
    label, P = job["class"], of.taken[0].shape[1]
    rows = ((of.labels == label) & (of.test[1].argmax(1) == label)).nonzero()[:, 0].tolist()
    if not rows:
        return {"birds": 0}
    rest, base = Job(of, label, job["seed"]).rest, of.train[0].mean(0)
    whole = contributions_of_dimensions(rest, of.test[0][rows], base)
    without = contributions_of_dimensions(rest, of.taken[0][rows].flatten(0, 1), base)
    changes = (whole[:, None] - without.reshape(len(rows), P, -1)).transpose(1, 2).double()
    groups = changes.sum(0).abs().argmax(1)
    if job["method"] != LIMITS[0]:
        groups = searched(changes, groups) if job["method"] == LIMITS[2] else groups
        changes = torch.stack([changes[:, groups == k].sum(1) for k in range(P)], 1)
    found = selectivity(changes)
    return {"selectivity": found.share, "whole": found.whole, "movement": found.movement, "birds": len(rows)}


def judged(of: Read, form: Form, rows: list[int], label: int, seed: int) -> Line:
    """Returns all figures of an explanation of some test images."""
    images, masks = of.images(rows), of.masks(rows)
    with torch.no_grad():
        values = form.contributions(of.test[0][rows])
        taken, covered = (
            torch.stack([form.contributions(Z) for Z in variants[rows].transpose(0, 1)], 2)
            for variants in (of.taken[0], of.covered)
        )
        surrogate = form.contributions(of.test[0]).sum(1) + form.bias
    found = selectivity(values[:, :, None] - taken)
    drops, part_drops = values[:, :, None] - covered, of.test[1][rows, None, label] - of.taken[1][rows, :, label]
    side = torch.where(values < 0, -1, 1)[:, :, None]
    plain, weighted = drop_orthogonality(drops), drop_orthogonality(drops, contributions=values)
    maps = gradient_maps(of, form, images)
    importances = {"": mass(maps.sum(1), masks), "_area": masks.double().sum((2, 3))}
    line: Line = {
        "f_reg": float((surrogate - of.test[1][:, label]).abs().mean()),
        "selectivity": found.share,
        "whole": found.whole,
        "movement": found.movement,
        "eff": effective(values),
        "o1": plain.o1,
        "o1_weighted": weighted.o1,
        "patches": patch_agreement(maps, drops, contributions=values),
        "patches_chance": sum(
            patch_agreement(random_maps(maps, seed=DRAWS * seed + i), drops, contributions=values) for i in range(DRAWS)
        )
        / DRAWS,
        "identified": map_identification(maps * side[..., None], drops * side),
    }
    if form.excitation is not None:
        maps = form.excitation(images)
        turned = drops * values.sign()[:, :, None]
        line["patches_mwp"] = patch_agreement(maps, turned, contributions=values)
        size = maps.sum((2, 3), keepdim=True)
        unit = maps / torch.where(size > 0, size, 1)
        importances["_mwp"] = mass((values.abs()[:, :, None, None] * unit).sum(1), masks)
    for name, importance in importances.items():
        line[f"sd{name}"] = float(single_deletion(importance, part_drops).mean())
        line[f"importances{name}"] = importance.tolist()
    return line | {"part_drops": part_drops.tolist(), "birds": len(rows)}


def measure(of: Read, job: Line) -> Line:
    """Returns all figures of one method on one class; none if the network tells no bird of the class right."""
    begin, label = time.process_time(), job["class"]
    right = (of.labels == label) & (of.test[1].argmax(1) == label)
    rows = right.nonzero()[:, 0].tolist()
    if not rows:
        return {"birds": 0}
    form = METHODS[job["method"]](Job(of, label, job["seed"]))
    learned_in = time.process_time() - begin
    return judged(of, form, rows, label, job["seed"]) | {"seconds": learned_in}


def within(lines: list[Line]) -> list[Line]:
    """Returns the rank correlation over all birds within each part, mean over parts, of every method and seed."""
    groups: dict[tuple[str, int], list[Line]] = {}
    for line in lines:
        if line["birds"]:
            groups.setdefault((line["method"], line["seed"]), []).append(line)
    found = []
    for (method, seed), of in groups.items():
        drops = torch.tensor([row for line in of for row in line["part_drops"]])
        own: Line = {"method": method, "seed": seed}
        for name in ("", "_mwp", "_area"):
            if f"importances{name}" in of[0]:
                importances = torch.tensor([row for line in of for row in line[f"importances{name}"]])
                own[f"within{name}"] = float(within_part(importances, drops).mean())
        found.append(own)
    return found


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the tables."""
    given.out.mkdir(parents=True, exist_ok=True)
    of = read(given)
    jobs = [
        {"method": method, "class": label, "seed": seed}
        for seed in range(given.seeds)
        for label in some_classes(of.labels, given.classes)
        for method in (LIMITS if given.limits else given.methods)
    ]
    if given.limits:
        lines = measured(given.out / "limits", jobs, partial(limit, of), title="limits", under=settings(given))
        told = [line for line in lines if line["birds"]]
        columns = COLUMNS[1:4]
        write(given.out / "limits", table(told, "method", columns, order=LIMITS), summary(told, "method", columns))
        return
    lines = measured(given.out, jobs, partial(measure, of), title="methods and classes", under=settings(given))
    told = [line for line in lines if line["birds"]]
    parts = within(lines)
    order = list(METHODS)
    text = "\n\n".join(
        [
            table(told, "method", COLUMNS, order=order),
            "Over all birds of these classes, for each part:",
            table(parts, "method", WITHIN, order=order),
        ]
    )
    write(given.out, text, {"methods": summary(told, "method", COLUMNS), "within": summary(parts, "method", WITHIN)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the unpacked folder")
    parser.add_argument(
        "--network", dest="file", type=Path, required=True, help="Python file with load(), MEAN and STD"
    )
    parser.add_argument("--layer", required=True, help="the layer to explain; nothing crosses from before it to behind")
    parser.add_argument("--maps-layer", help="where GxA maps are drawn, if not where the library draws them")
    parser.add_argument("--classes", type=int, default=50, help="how many, evenly spread over those there are")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--limits", action="store_true", help="measure how selective groups can be; nothing else")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run resumes")
    main(parser.parse_args())
