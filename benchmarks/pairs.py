"""Does only the matching x-feature move? On pairs of images that differ in one part, where the truth is known.

Every network, class, method and seed is a line of OUT/results.jsonl, and a run with the same OUT resumes where the last
one stopped. Printed, and written to OUT, is for each network the mean over classes and seeds with its 95 % confidence
interval:

share        share of the changes of a part's pairs that the part's own x-feature carries, mean over parts. Every part
             has another x-feature, which the other pairs choose (pair_share in captum_xnn/metrics/_removal.py)
most         share of pairs in which the part's own x-feature changes most
chance       of either, the same after the parts are shuffled among the pairs
selectivity  the other way round: share of an x-feature's changes that comes from its strongest part; whole is the same
             of the sum of the x-features
movement     changes of the x-features in multiples of those of their sum; more than 1 is cancelling
idle         changes by parts that are no reasons of the class, in multiples of those by its reasons, for each pair
eff          effective number of x-features, of their mean absolute contributions: few score low, because no x-feature
             may have two parts

Figures: members of a class that the network tells right, with another look of one part. The reasons of the class are
the parts that count. Three networks: ``by hand``, whose layer has a neuron for each look of each part; ``trained``;
and ``FunnyBirds``, where one of five parts is removed, and all of them count. Random groups are the control of the
division. Below each table is the share of groups less that of the other methods, in pairs of the same class and seed.

    python -m benchmarks.pairs --out DIR
    python -m benchmarks.pairs --funnybirds FOLDER FILE.py --out DIR
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import changed_parts, rivals, scoreboard, synthetic
from benchmarks.changed_parts import Pairs
from benchmarks.funnybirds import Read
from benchmarks.one_vs_all import effective
from benchmarks.rivals import Fit, slopes_of
from benchmarks.runs import Column, Line, interval, measured, save, settings, summary, table, write
from captum_xnn.metrics import selectivity

METHODS = ("groups", "DRSA", "SRAE", "NN", "random groups")
CLASSES = (0, 2, 3, 5)
COLUMNS = (
    Column("share", "share", 2),
    Column("share_by_chance", "chance", 2),
    Column("most", "most", 2),
    Column("most_by_chance", "chance", 2),
    Column("selectivity", "selectivity", 2),
    Column("whole", "whole", 2),
    Column("movement", "movement", 1),
    Column("idle", "idle", 2),
    Column("eff", "eff", 1),
)


class Case(NamedTuple):
    """What methods learn from, and the pairs to judge them by."""

    read: Read
    pairs: Pairs


def of_figures(name: str, examples: int, seed: int, label: int) -> Case:
    """Returns figures of a class with another look of each part."""
    of, nothing = synthetic.explained(name, examples, 2000, seed, 6), _nothing()
    train, test = ((seen.Z.flatten(1), seen.y_hat) for seen in (of.train, of.test))
    read = Read(
        of.model, of.layer, "", train, train[1].argmax(1), test, of.test.figures.labels,
        nothing, nothing, lambda rows: of.test.figures.images[rows], nothing, of.train.figures.images,
    )  # fmt: skip
    return Case(read, changed_parts.of_figures(of, label))


def of_funnybirds(network: scoreboard.Network, label: int) -> Case | None:
    """Returns birds of a class without each part; None if the network tells fewer than two birds of it right."""
    problem = network.of(label)
    if problem is None or problem.pairs is None or not problem.pairs.enough:
        return None
    return Case(problem.read, problem.pairs)


def _nothing() -> Any:
    return None


@torch.no_grad()
def judged(pairs: Pairs, contributions: Callable[[Tensor, Tensor], Tensor], fit: Fit) -> Line:
    """Returns all figures of an explanation."""
    Z = pairs.every
    E = contributions(Z, slopes_of(fit.rest, Z, fit.base))
    changes = pairs.changes(E)
    found, by = pairs.share(changes, fit.seed), selectivity(changes.transpose(1, 2))
    own = pairs.differs & pairs.counts
    moved = [float(changes[some].abs().sum(1).mean()) for some in (own, pairs.differs & ~pairs.counts)]
    return found._asdict() | {
        "selectivity": by.share,
        "whole": by.whole,
        "movement": by.movement,
        "idle": moved[1] / moved[0],
        "eff": effective(E[: len(pairs.Z)]),
        "pairs": int(own.sum()),
    }


def measure(of: Callable[[str, int, int], Case | None], job: Line) -> Line:
    """Returns all figures of one method on one class; none if there are no pairs, or the method cannot explain it."""
    case = of(job["network"], job["seed"], job["class"])
    if case is None:
        return {"pairs": 0}
    fit = Fit(case.read, job["class"], job["seed"], case.read.train[0].float().mean(0))
    try:
        made = (rivals.METHODS | rivals.CONTROLS)[job["method"]](fit)
    except ValueError as error:
        return {"pairs": 0, "failed": str(error)}
    return judged(case.pairs, made.contributions, fit)


def rows_of(lines: list[Line]) -> str:
    """Returns the table as a list-table of reStructuredText, random groups in italics, without what nothing has."""
    found = summary(lines, "method", COLUMNS)
    columns = [c for c in COLUMNS if any(math.isfinite(of[c.key][0]) for of in found.values())]
    rows = [
        [f"*{name}*" if name in rivals.CONTROLS else name]
        + [f"{of[c.key][0]:.{c.digits}f} ± {of[c.key][1]:.{c.digits}f}" for c in columns]
        for name, of in found.items()
    ]
    return scoreboard.list_table(["method", *(c.title for c in columns)], rows)


def leads(lines: list[Line]) -> str:
    """Returns the share of groups less that of the others, over the same classes and seeds, with their number."""
    share = {(line["method"], line["class"], line["seed"]): line["share"] for line in lines}
    told = []
    for method in METHODS[1:]:
        both = [of for name, *of in share if name == method and ("groups", of[0], of[1]) in share]
        mean, half = interval([share["groups", label, seed] - share[method, label, seed] for label, seed in both])
        told.append(f"{method} {mean:.2f} ± {half:.2f} ({len(both)})")
    return "groups less " + ", ".join(told)


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the tables."""
    classes = {"by hand": CLASSES[: given.classes], "trained": CLASSES[: given.classes]}
    birds = None
    if given.funnybirds:
        folder, file = map(Path, given.funnybirds)
        birds = scoreboard.of_funnybirds(folder, file, given.classes_funnybirds, given.out)
        classes["FunnyBirds"] = tuple(birds.classes)

    @lru_cache(maxsize=1)
    def case(network: str, seed: int, label: int) -> Case | None:
        if network == "FunnyBirds":
            assert birds is not None
            return of_funnybirds(birds, label)
        return of_figures("exact" if network == "by hand" else "trained", given.examples, seed, label)

    jobs = [
        {"network": network, "seed": seed, "class": label, "method": method}
        for network, labels in classes.items()
        for seed in range(given.seeds if network != "FunnyBirds" else 1)
        for label in labels
        for method in given.methods
    ]
    lines = measured(given.out, jobs, partial(measure, case), title="methods and classes", under=settings(given))
    texts, figures = [], {}
    for network in classes:
        own = [line for line in lines if line["network"] == network and line["pairs"]]
        texts.append(f"{network}\n\n{table(own, 'method', COLUMNS, order=METHODS)}\n\n{leads(own)}")
        figures[network] = summary(own, "method", COLUMNS)
        save((given.tables or given.out) / f"pairs_{network.replace(' ', '_').lower()}.inc", rows_of(own).encode())
    write(given.out, "\n\n".join(texts), figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--funnybirds", nargs=2, metavar=("FOLDER", "FILE.py"))
    parser.add_argument("--classes", type=int, default=4, help="of figures, at most four")
    parser.add_argument("--classes-funnybirds", type=int, default=10, help="evenly spread over those there are")
    parser.add_argument("--seeds", type=int, default=2, help="of figures: other figures, and another trained network")
    parser.add_argument("--examples", type=int, default=6000, help="figures to learn from")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*rivals.METHODS, *rivals.CONTROLS])
    parser.add_argument("--tables", type=Path, help="folder of list-tables; OUT if not given")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run resumes")
    main(parser.parse_args())
