"""Do two seeds give the same x-features, and the same maps of them?

The same class is explained twice, from other weights and other batches. x-features are matched by their correlation on
test data, their maps on the class's test images by the correlation over pixels. An explainer whose maps are others for
another seed shows its weights' chance, not the network's reasons, however orthogonal and local these maps are.

    python -m benchmarks.seeds --root CUB_200_2011 --network FILE.py --layer relu6 --classes 5 --out DIR
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks import birds, one_vs_all
from benchmarks.birds import Birds
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn.datasets.parts import collate
from captum_xnn.metrics.locality import mean_locality, part_probabilities
from captum_xnn.metrics.orthogonality import orthogonality
from captum_xnn.metrics.stability import matched_features
from captum_xnn.training import encode_all

METHODS = ("SRAE", "NN", "SAE", "CAE", "RandomEncoder")
COLUMNS = (
    Column("x_features", "x-features agree", 2),
    Column("maps", "maps agree", 2),
    Column("o1", "O1", 2),
    Column("locality", "locality", 2),
)


def agreement(a: Tensor, b: Tensor) -> float:
    """Returns the mean correlation over pixels of maps (N, K, H, W) with others; one that is constant agrees in 0."""
    a, b = (m.flatten(2) - m.flatten(2).mean(2, keepdim=True) for m in (a, b))
    norm = a.norm(dim=2) * b.norm(dim=2)
    return float(torch.where(norm > 0, (a * b).sum(2) / norm, 0).mean())


def measure(of: Birds, job: Line) -> Line:
    """Returns how far two seeds agree on one class."""
    label, begin = job["class"], time.perf_counter()
    train, test, positives = birds.split(of.images.labels, label)
    batch = collate([of.images[i] for i in positives.tolist()])
    xnns = [one_vs_all.fitted(job["method"], of.Z[train], of.y_hat[train], label, seed) for seed in (0, 1)]
    matching = matched_features(*(encode_all(xnn, of.Z[test]) for xnn in xnns))
    maps = [one_vs_all.excitation_maps(xnn, of.model, of.layer, batch.image) for xnn in xnns]
    return {
        "x_features": matching.mean,
        "maps": agreement(maps[0][:, matching.rows], maps[1][:, matching.columns]),
        "o1": orthogonality(maps[0]).o1,
        "locality": mean_locality(part_probabilities(maps[0], batch.points, batch.box)),
        "seconds": time.perf_counter() - begin,
    }


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    of = birds.read_options(given)
    chosen = birds.some_classes(of.images.labels, given.classes)
    jobs = [{"method": m, "class": c} for c in chosen for m in METHODS]
    lines = measured(given.out, jobs, lambda job: measure(of, job), title="methods and classes", under=settings(given))
    write(given.out, table(lines, "method", COLUMNS, order=METHODS), summary(lines, "method", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--classes", type=int, default=5, help="how many, evenly spread over those there are")
    main(parser.parse_args())
