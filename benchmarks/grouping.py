"""How the groups of contributions were found: other ways to divide the same contributions, on the same examples.

Each way gets what a fit reads from the model: contributions in positives and in other examples, and what contributions
and activations of positives lose where a patch is covered. One class of one network is a line of OUT/results.jsonl, and
a run with the same OUT resumes. Printed, and written to OUT, is the mean over classes with its 95 % confidence
interval:

O1           overlap of the x-features' drops in test images when one patch of 4 x 4 is covered, weighted by
             contribution; the groups were learned from patches of 8 x 8
eff          effective number of x-features. A division that leaves nearly all to one of them has little to overlap
halves       correlation on test examples of matched x-features learned from two halves of the positives
mixed        the same with the test examples of one half shuffled

    python -m benchmarks.grouping --networks digits-relu3 figures-trained --out DIR
    python -m benchmarks.grouping --networks birds-relu6 --root CUB_200_2011 --network FILE.py --out DIR
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import contributions
from benchmarks.contributions import NETWORKS, Problem, agreement, shown
from benchmarks.one_vs_all import N_FEATURES, effective
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn import ContributionGroups, XNNAttribution
from captum_xnn.metrics import drop_orthogonality
from captum_xnn.metrics._controls import random_partition
from captum_xnn.models._grouping import (
    Drops,
    hardened,
    learn_groups,
    patch_clusters,
    regressed,
    spectral_groups,
    supporting,
)
from captum_xnn.training import Checkpoint
from captum_xnn.training._contributions import Evidence


class Seen(NamedTuple):
    """What a fit reads from the model for one class, in standard deviations of the output."""

    positives: Tensor
    """Contributions in positives, (m, D)."""
    others: Tensor
    """Contributions in other examples, (m', D)."""
    covers: list[Drops]
    """Drops in the positives for each covered patch, both (m, P, D), for each way to cover patches."""

    def half(self, first: int) -> Seen:
        """Returns every second positive."""
        covers = [Drops(*(part[first::2] for part in drops)) for drops in self.covers]
        return Seen(self.positives[first::2], self.others, covers)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the patches that speak for the output, as :func:`supporting`."""
        rows = [supporting(Drops(*(part.double() for part in drops))) for drops in self.covers]
        X, m, V = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return X, m, V


Way = Callable[[Seen], Tensor]
"""Gives groups (D, K)."""

COLUMNS = (
    Column("o1", "O1 of drops", 2),
    Column("eff", "eff", 1),
    Column("halves", "halves", 2),
    Column("mixed", "mixed", 2),
)


def with_ridge(ridge: float) -> Way:
    """Returns the way of the library with another ridge."""
    return lambda seen: learn_groups(seen.positives, seen.others, seen.covers, N_FEATURES, ridge=ridge)


def by_drops_of_contributions(seen: Seen) -> Tensor:
    """Returns groups from patches that are alike if covering them takes the same contributions, in logits."""
    X, m, _ = seen.rows()
    return hardened(regressed(X, m, patch_clusters(X, m, N_FEATURES), N_FEATURES))


def soft(seen: Seen) -> Tensor:
    """Returns the groups before they are hardened."""
    X, m, V = seen.rows()
    return regressed(X, m, patch_clusters(V, m, N_FEATURES), N_FEATURES)


def one_each(seen: Seen) -> Tensor:
    """Returns groups in which each dimension belongs to the one x-feature that it is strongest in."""
    return hardened(soft(seen), small=1.0)


def clusters_of_drops(seen: Seen) -> Tensor:
    """Returns spectral clusters of dimensions that lose by the same patches."""
    return spectral_groups(torch.cat([drops.contributions.flatten(0, 1) for drops in seen.covers]), N_FEATURES)


def clusters_of_contributions(seen: Seen) -> Tensor:
    """Returns spectral clusters of dimensions whose contributions go together: the way without images."""
    return spectral_groups(torch.cat([seen.positives, seen.others]), N_FEATURES)


def by_chance(seen: Seen) -> Tensor:
    """Returns random groups."""
    return random_partition(seen.positives.shape[1], N_FEATURES, torch.Generator().manual_seed(0))


WAYS: dict[str, Way] = {
    "as it is (ridge 1, hardened)": with_ridge(1.0),
    "patches alike by contributions": by_drops_of_contributions,
    "ridge 0.1": with_ridge(0.1),
    "ridge 2": with_ridge(2.0),
    "ridge 4": with_ridge(4.0),
    "ridge 10": with_ridge(10.0),
    "not hardened": soft,
    "one x-feature for each dimension": one_each,
    "clusters of dimensions by drops": clusters_of_drops,
    "clusters of dimensions by contributions": clusters_of_contributions,
    "random groups": by_chance,
}
"""Every way is an entry; one of your own belongs here."""


def seen_by_fit(of: Problem) -> tuple[ContributionGroups, Seen]:
    """Returns a fitted form, and what it was learned from."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoint(folder)
        xnn = XNNAttribution(of.model, of.layer, N_FEATURES).fit(of.train, of.label, checkpoint=kept, progress=False)
        form: Any = xnn.explainer(of.label).form
        (file,) = Path(folder).glob("*.checkpoint")
        key = file.stem.removeprefix("fit-")
        found = Evidence.of_state(kept.read(key, torch.device("cpu")))
    scale = float(form.scale)
    assert found.covers, "only networks of images have drops"
    covers = [Drops(drops.contributions[0] / scale, drops.activations) for drops in found.covers]
    return form, Seen(found.positives[0] / scale, found.others[0] / scale, covers)


def measure(of: Problem, given: argparse.Namespace) -> Line:
    """Returns the figures of all ways on one class."""
    form, seen = seen_by_fit(of)
    by = shown(of, given.images)
    exact, dropped = contributions._dimensions(of, by, form)
    assert dropped is not None
    c, found = exact.c.double(), {}
    for name, way in WAYS.items():
        a = way(seen).double()
        E = c @ a
        values = E[by.rows[: len(dropped)]]
        halves = [c @ way(seen.half(i)).double() for i in (0, 1)]
        found[name] = {
            "o1": drop_orthogonality(torch.einsum("ndp,dk->nkp", dropped, a), contributions=values).o1,
            "eff": effective(E[by.rows]),
            **agreement(halves[0], halves[1]),
        }
    return {"ways": found}


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    jobs = [{"network": name, "class": label} for name in given.networks for label in NETWORKS[name].classes(given)]
    lines = measured(
        given.out,
        jobs,
        lambda job: measure(NETWORKS[job["network"]].of(given, job["class"]), given),
        title="classes",
        under=settings(given),
    )
    found = [
        {"way": f"{line['network']}, {name}", "class": line["class"], **of}
        for line in lines
        for name, of in line["ways"].items()
    ]
    write(given.out, table(found, "way", COLUMNS), summary(found, "way", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", required=True, choices=list(NETWORKS), help="of images")
    parser.add_argument("--classes", type=int, default=4, help="of each network")
    parser.add_argument("--root", type=Path, help="folder of the birds with images.txt")
    parser.add_argument("--network", dest="file", type=Path, help="Python file with load(), MEAN and STD, for birds")
    parser.add_argument("--activations", type=Path, help="file that keeps the birds' activations at relu6")
    parser.add_argument("--negatives", type=int, default=1000, help="other birds to train on at pool and features.11")
    parser.add_argument("--examples", type=int, default=6000, help="figures to learn from")
    parser.add_argument("--epochs", type=int, default=6, help="of training small networks")
    parser.add_argument("--test", type=int, default=300, help="birds to test on; three times as many small inputs")
    parser.add_argument("--images", type=int, default=10, help="of the class to cover, at most")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run resumes")
    main(parser.parse_args())
