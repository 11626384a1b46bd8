"""Why this class and not that one: do maps of a difference of two logits know the parts? On FunnyBirds.

Every bird is a line of OUT/results.jsonl, and a run with the same OUT resumes where the last one stopped. Maps are
gradient x activation, and a part's importance is the sum of a map over its pixels. Printed, and written to OUT, is the
mean over birds with its 95 % confidence interval:

SD            single deletion: rank correlation over the parts of a bird of the importance with the drop of
              y_A - y_B when the part is removed. A is the class of the bird, which the network tells right, and B the
              class with the second highest logit
within        the same over all birds, for each part, mean over parts
sensitivity   target sensitivity: classes A and B share two parts each with the bird, other ones, and the parts shared
              with A are more important than those shared with B. Mean over up to two pairs of classes of each bird

The rows are the map of the difference (``against=``), the map of A alone (for sensitivity the maps of A and of B, each
in its turn), the area of the parts, and the true drops, which no method exceeds.

    python -m benchmarks.against --root FunnyBirds --network funnynet.py --out DIR
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.birds import network
from benchmarks.funnybirds import mass
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn import OneHeatmap
from captum_xnn.datasets import FunnyBirds
from captum_xnn.heatmaps import GradientMaps
from captum_xnn.metrics._removal import single_deletion, within_part

ROWS = ("against", "one class", "area", "true drops")
COLUMNS = (Column("sd", "SD", 2), Column("within", "within", 2), Column("sensitivity", "sensitivity", 2))
PAIRS = 2


def pairs_of(classes: Tensor, label: int, seed: int) -> list[tuple[int, int]]:
    """Returns up to PAIRS random pairs of classes that share two parts each with a class, other ones."""
    shared = classes == classes[label]
    near = [c for c in range(len(classes)) if c != label and int(shared[c].sum()) == 2]
    found = [(a, b) for a, b in combinations(near, 2) if not bool((shared[a] & shared[b]).any())]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order[:PAIRS].tolist()]


def measure(model: nn.Module, test: FunnyBirds, job: Line) -> Line:
    """Returns the importances of a bird's parts, and whether they are sensitive to the target."""
    i = job["bird"]
    image, masks, label = test[i].image[None], test.masks(i)[None], int(test.labels[i])
    with torch.no_grad():
        y = model(torch.cat([image, *(test.without(i, part)[None] for part in test.part_names)]))
    drops = (y[0] - y[1:]).double()  # (P, classes)
    heatmap = OneHeatmap(model, GradientMaps())

    def importance(a: int, b: int | None = None) -> Tensor:
        return mass(heatmap.attribute(image, a, against=b)[:, 0].sum(1), masks)[0]

    area = masks[0].double().sum((1, 2))
    line: Line = {"right": int(y[0].argmax()) == label, "pairs": []}
    if line["right"]:
        other = int(y[0].topk(2).indices[1])
        found = (importance(label, other), importance(label), area, drops[:, label] - drops[:, other])
        line["importances"] = [row.tolist() for row in found]
    for a, b in pairs_of(test.classes, label, i):
        of_a, of_b = (test.classes[c] == test.classes[label] for c in (a, b))
        first, second, both = importance(a), importance(b), importance(a, b)

        def more(values: Tensor, ours: Tensor = of_a, others: Tensor = of_b) -> float:
            return float(values[ours].sum() > values[others].sum())

        alone = (more(first) + more(second, of_b, of_a)) / 2
        line["pairs"].append([more(both), alone, more(area), more(drops[:, a] - drops[:, b])])
    return line


def rows_of(lines: list[Line]) -> list[Line]:
    """Returns a line of figures for each row and bird, and one for all birds."""
    right = [line for line in lines if line["right"]]
    found: list[Line] = []
    for k, name in enumerate(ROWS):
        drops = torch.tensor([line["importances"][3] for line in right])
        own = torch.tensor([line["importances"][k] for line in right])
        found += [{"map": name, "sd": float(sd)} for sd in single_deletion(own, drops)]
        found += [{"map": name, "sensitivity": pair[k]} for line in lines for pair in line["pairs"]]
        found.append({"map": name, "within": float(within_part(own, drops).mean())})
    return found


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    model, normalise = network(given.file)
    test = FunnyBirds(given.root, "test", transform=normalise)
    jobs = [{"bird": i} for i in range(len(test))]
    lines = measured(given.out, jobs, partial(measure, model, test), title="birds", under=settings(given))
    found = rows_of(lines)
    write(given.out, table(found, "map", COLUMNS, order=ROWS), {"maps": summary(found, "map", COLUMNS)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the unpacked folder")
    parser.add_argument(
        "--network", dest="file", type=Path, required=True, help="Python file with load(), MEAN and STD"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run resumes")
    main(parser.parse_args())
