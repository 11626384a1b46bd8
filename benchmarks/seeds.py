"""Do other seeds give the same x-features, and the same maps of them?

The same class is explained several times, from other weights and other batches. x-features are matched to those of the
first seed by their correlation on test data. Shown, as means over the classes with their 95 % confidence interval:

x-features agree  correlation of matched x-features, on test data
maps agree        correlation over pixels of their maps, on the class's test images
O1, locality      of maps as they are, a mean over the seeds
... of means      of maps averaged over the seeds: chance, which another seed has otherwise, cancels, and what is left
                  is what the x-features have to show. Maps that differ by chance only become one and the same map

    python -m benchmarks.seeds --root CUB_200_2011 --network FILE.py --layer relu6 --classes 5 --seeds 5 --out DIR
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks import birds, one_vs_all
from benchmarks.birds import Birds
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn.metrics import matched_features, orthogonality, part_probabilities
from captum_xnn.metrics._localisation import mean_locality
from captum_xnn.models._base import encode_all

METHODS = ("SRAE", "NN", "SAE", "RandomEncoder")
COLUMNS = (
    Column("x_features", "x-features agree", 2),
    Column("maps", "maps agree", 2),
    Column("o1", "O1", 2),
    Column("o1_of_means", "O1 of means", 2),
    Column("locality", "locality", 2),
    Column("locality_of_means", "locality of means", 2),
)


def agreement(a: Tensor, b: Tensor) -> float:
    """Returns the mean correlation over pixels of maps (N, K, H, W) with others; one that is constant agrees in 0."""
    a, b = (m.flatten(2) - m.flatten(2).mean(2, keepdim=True) for m in (a, b))
    norm = a.norm(dim=2) * b.norm(dim=2)
    return float(torch.where(norm > 0, (a * b).sum(2) / norm, 0).mean())


def mean_maps(seeds: Sequence[Tensor]) -> Tensor:
    """Returns maps (N, K, H, W) averaged over seeds, in which every map that is not empty counts alike."""
    return torch.stack([m / m.sum((2, 3), keepdim=True).clamp_min(1e-30) for m in seeds]).mean(0)


def measure(of: Birds, job: Line, *, seeds: int) -> Line:
    """Returns how far seeds agree on one class, and what is left of their maps' differences on average."""
    label, begin = job["class"], time.perf_counter()
    train, test, positives = birds.split(of.images.labels, label)
    batch = default_collate([of.images[i] for i in positives.tolist()])
    xnns = [one_vs_all.fitted(job["method"], of.Z[train], of.y_hat[train], label, seed) for seed in range(seeds)]
    E = [encode_all(xnn, of.Z[test]) for xnn in xnns]
    matchings = [matched_features(E[0], other) for other in E[1:]]
    maps = [one_vs_all.excitation_maps(xnn, of.model, of.layer, batch.image) for xnn in xnns]
    first = maps[0]
    matched = [first]
    for matching, other in zip(matchings, maps[1:], strict=True):
        matched.append(torch.empty_like(first))
        matched[-1][:, matching.rows] = other[:, matching.columns]

    def locality(some: Tensor) -> float:
        return mean_locality(part_probabilities(some, batch.points, batch.box))

    means = mean_maps(matched)
    return {
        "x_features": statistics.mean(matching.mean for matching in matchings),
        "maps": statistics.mean(agreement(first, other) for other in matched[1:]),
        "o1": statistics.mean(orthogonality(some).o1 for some in maps),
        "o1_of_means": orthogonality(means).o1,
        "locality": statistics.mean(locality(some) for some in maps),
        "locality_of_means": locality(means),
        "seconds": time.perf_counter() - begin,
    }


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    of = birds.read_options(given)
    chosen = birds.some_classes(of.images.labels, given.classes)
    jobs = [{"method": m, "class": c} for c in chosen for m in METHODS]
    lines = measured(
        given.out,
        jobs,
        lambda job: measure(of, job, seeds=given.seeds),
        title="methods and classes",
        under=settings(given),
    )
    write(given.out, table(lines, "method", COLUMNS, order=METHODS), summary(lines, "method", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--classes", type=int, default=5, help="how many, evenly spread over those there are")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    main(parser.parse_args())
