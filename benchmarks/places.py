"""Table 2: faithfulness, orthogonality and locality of explainers of rooms, on Places365 and ADE20K.

For each room, a form of explanation network learns from 4,000 of its training images in Places365 and 20,000 of other
categories, and is tested on 1,000 and 4,000 others, as in the paper. Where there are fewer images, they are divided in
the same proportion. Maps are drawn of the room's images in ADE20K, and locality is that of the objects in them. Rooms
are those of the paper's ten that both data sets have. Columns, resuming and output are those of ``benchmarks.cub``; the
paper's values, for VGG16, are in brackets.

    python -m benchmarks.places --places places365 --ade ADEChallengeData2016 --network FILE.py --layer LAYER --out DIR

FILE.py offers ``load()`` and the MEAN and STD of its inputs. For the paper's model: ``--torchvision vgg16 --weights
FILE --layer classifier.0``, a state dict with 365 outputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, default_collate

from benchmarks import birds, one_vs_all
from benchmarks.one_vs_all import COLUMNS, METHODS
from benchmarks.runs import Line, kept, measured, settings, summary, write
from captum_xnn.activations import collect
from captum_xnn.datasets import ADE20KScenes, Places365
from captum_xnn.datasets._places import ROOMS
from captum_xnn.metrics import object_probabilities

SEED = 2021

PAPER: dict[str, dict[str, float]] = {
    "SRAE": {"train": 0.5527, "test": 1.0260, "f_cls_train": 0.9722, "f_cls": 0.9479, "o1": 0.2252, "o2": 0.5617,
             "locality": 2.7208},
    "NN": {"train": 0.3346, "test": 0.8736, "f_cls_train": 0.9717, "f_cls": 0.9486, "o1": 0.3472, "o2": 0.8852,
           "locality": 2.7756},
    "SAE": {"train": 1.4768, "test": 1.5505, "f_cls_train": 0.9459, "f_cls": 0.9329, "o1": 0.4578, "o2": 1.0799,
            "locality": 2.7819},
    "Lasso": {"train": 4.0726, "test": 4.3366, "f_cls_train": 0.9019, "f_cls": 0.8855, "o1": 0.4729, "o2": 0.9194,
              "locality": 2.7282},
    "CAE": {"train": 4.3579, "test": 4.6553, "f_cls_train": 0.9011, "f_cls": 0.8842, "o1": 0.2741, "o2": 0.5945,
            "locality": 2.7627},
    "1-Heatmap": {"locality": 2.7591},
}  # fmt: skip


class Counts(NamedTuple):
    """Images of a room and of others."""

    train: tuple[int, int] = (4000, 20_000)
    test: tuple[int, int] = (1000, 4000)
    maps: int = 100


class Scenes(NamedTuple):
    """The network, what it gives on the images drawn from Places365, and the rooms of ADE20K."""

    model: nn.Module
    layer: str
    Z: Tensor
    y_hat: Tensor
    labels: Tensor
    rooms: ADE20KScenes
    images: Any = None
    """The images drawn, as a data set, in the order of Z."""


def drawn(labels: Tensor, counts: Counts) -> Tensor:
    """Returns rows of Places365: as many of each of the ten rooms as are needed, then of all categories."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    wanted = counts.train[0] + counts.test[0]
    own = torch.cat([order[labels[order] == room][:wanted] for room in ROOMS.values()])
    taken = torch.zeros(len(labels), dtype=torch.bool)
    taken[own] = True
    return torch.cat([own, order[~taken[order]][: counts.train[1] + counts.test[1]]])


def split(labels: Tensor, label: int, counts: Counts) -> tuple[Tensor, Tensor]:
    """Returns rows to train and to test on, those of the room first. Too few images are divided in proportion."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED + label))
    own, others = order[labels[order] == label], order[labels[order] != label]
    held_out = counts.test[0] * len(own) // (counts.train[0] + counts.test[0])
    first = min(counts.train[1], counts.train[1] * len(others) // (counts.train[1] + counts.test[1]))
    return (
        torch.cat([own[held_out:][: counts.train[0]], others[:first]]),
        torch.cat([own[:held_out], others[first : first + counts.test[1]]]),
    )


def untested(labels: Tensor, label: int, test: Tensor) -> str | None:
    """Returns what a room's test data lack, or None if they have images of the room and of others."""
    own = int((labels[test] == label).sum())
    if own and own < len(test):
        return None
    return "no images at all" if not len(test) else "no images of other categories" if own else "no images of the room"


def known_rooms(rooms: Tensor, images: Tensor, wanted: list[str] | None) -> list[str]:
    """Returns the rooms that both data sets have, or those wanted.

    Args:
        rooms: Labels of ADE20K.
        images: Labels of Places365.
        wanted: Names of rooms; None takes all there are.
    """
    both = [name for name, label in ROOMS.items() if bool((rooms == label).any()) and bool((images == label).any())]
    if missing := sorted(set(wanted or ()) - set(both)):
        raise SystemExit(f"expected rooms that both data sets have, got {missing[0]}; choose among {', '.join(both)}")
    if not both:
        raise SystemExit("expected rooms in both data sets, got none; check --places and --ade")
    return wanted or both


def read(given: argparse.Namespace, counts: Counts) -> Scenes:
    """Returns activations and outputs from one pass over the images drawn, or from OUT/activations.pt."""
    model, normalise = birds.network(given.file, given.torchvision, given.weights)
    size: Any = {"size": (given.size, given.size), "transform": normalise}
    rooms = ADE20KScenes(given.ade, **size)
    images = Places365(given.places, "train", **size)
    rows = drawn(images.labels, counts)
    given.rooms = known_rooms(rooms.labels, images.labels, given.rooms)
    cache = given.activations or given.out / "activations.pt"
    chosen: Any = Subset(images, rows.tolist())
    loader = DataLoader(chosen, 32, num_workers=given.workers)
    found = kept(
        cache,
        {
            "network": str(given.file.resolve()) if given.file else given.torchvision,
            "layer": given.layer,
            "size": given.size,
            "images": len(rows),
        },
        lambda: collect(model, given.layer, loader, unpack=one_vs_all.image_of, progress=True),
    )
    return Scenes(model, given.layer, **found, labels=images.labels[rows], rooms=rooms, images=chosen)


def measure(of: Scenes, job: Line, counts: Counts, *, maps_layer: str | None = None) -> Line:
    """Returns all figures of one method on one room."""
    label = job["class"]
    train, test = split(of.labels, label, counts)
    if (lack := untested(of.labels, label, test)) is not None:
        print(f"the test data of room {label} have {lack}: their figures say less, or are empty", file=sys.stderr)
    shown = (of.rooms.labels == label).nonzero()[: counts.maps, 0].tolist()
    batch = default_collate([of.rooms[i] for i in shown])
    objects = int(batch.mask.max()) + 1
    problem = one_vs_all.Problem(
        of.model,
        of.layer,
        label,
        (of.Z[train], of.y_hat[train]),
        (of.Z[test], of.y_hat[test]),
        batch.image,
        collect(of.model, of.layer, batch.image).Z[:],
        lambda maps: object_probabilities(maps, batch.mask, objects=objects),
        None if of.images is None else one_vs_all.in_batches(of.images, train),
    )
    return one_vs_all.measure(problem, job["method"], job["seed"], maps_layer=maps_layer)


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the tables."""
    counts = Counts(maps=given.maps)
    of = read(given, counts)
    jobs = [{"method": m, "class": ROOMS[r], "seed": given.seed} for r in given.rooms for m in given.methods]
    lines = measured(
        given.out,
        jobs,
        lambda job: measure(of, job, counts, maps_layer=given.maps_layer),
        title="methods and rooms",
        under=settings(given),
    )
    write(given.out, one_vs_all.report(lines, PAPER), summary(lines, "method", COLUMNS))


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which images, which network and which of its layers."""
    parser.add_argument("--places", type=Path, required=True, help="folder of Places365")
    parser.add_argument("--ade", type=Path, required=True, help="folder of ADE20K")
    parser.add_argument("--network", dest="file", type=Path, help="Python file with load(), MEAN and STD")
    parser.add_argument("--torchvision", help="name of a torchvision model, instead of --network")
    parser.add_argument("--weights", type=Path, help="its state dict")
    parser.add_argument("--layer", required=True, help="the layer to explain")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rooms", nargs="+", choices=list(ROOMS), help="all that both data sets have if not given")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--activations", type=Path, help="file that keeps the activations between runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run goes on")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--maps-layer", help="where maps stop; chosen by the backend if not given")
    parser.add_argument("--maps", type=int, default=Counts().maps, help="images of each room to draw maps of, at most")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
