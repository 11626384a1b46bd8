"""Tables .4 and .6: how faithful is a Lasso, by how many dimensions of Z it may take?

For each class and alpha, a Lasso of the class's output on Z, with positives at a quarter of the weight; the data are
those of ``benchmarks.cub`` or ``benchmarks.places``. F_reg is a mean over the classes with its 95 % confidence
interval, in logits. Alpha is scikit-learn's, and works on the scale of the logits; the paper's values are in brackets,
for networks whose outputs go up to 50. A run with the same OUT goes on where the last one stopped.

    python -m benchmarks.lasso cub --root CUB_200_2011 --network FILE.py --layer relu6 --classes 30 --out DIR
    python -m benchmarks.lasso places --places places365 --ade ADEChallengeData2016 --network FILE.py --layer LAYER \\
        --alphas 15 10 5 2.5 1 0.1 --out DIR
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import birds, places
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn import Recipe
from captum_xnn.datasets._places import ROOMS
from captum_xnn.metrics import classification_faithfulness, regression_faithfulness
from captum_xnn.models.baselines._selection import lasso

PAPER = {
    "cub": {
        "2.5": {"chosen": 8, "train": 3.80, "test": 3.70},
        "1.5": {"chosen": 21, "train": 3.06, "test": 2.99},
        "0.5": {"chosen": 68, "train": 1.86, "test": 1.84},
        "0.1": {"chosen": 232, "train": 1.00, "test": 1.03},
    },
    "places": {
        "15.0": {"chosen": 5, "train": 4.0726, "test": 4.3366},
        "10.0": {"chosen": 11, "train": 3.8078, "test": 4.0214},
        "5.0": {"chosen": 31, "train": 3.3673, "test": 3.5281},
        "2.5": {"chosen": 69, "train": 3.0566, "test": 3.1655},
        "1.0": {"chosen": 283, "train": 2.2385, "test": 2.3382},
        "0.1": {"chosen": 1782, "train": 1.1677, "test": 1.3131},
    },
}
COLUMNS = (
    Column("chosen", "dimensions", 0),
    Column("train", "F_reg train", 3),
    Column("test", "test", 3),
    Column("f_cls", "F_cls test", 4),
)


def measure(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], label: int, alpha: float) -> Line:
    """Returns the figures of one alpha on one class, from activations (M, D) and all outputs (M, classes)."""
    begin = time.perf_counter()
    positive = train[1].argmax(1) == label
    share, wanted = float(positive.double().mean()), Recipe().positive_share
    weight = torch.where(positive, wanted / max(share, 1e-9), (1 - wanted) / (1 - share))
    model = lasso(train[0], train[1][:, label : label + 1], alpha, weight=weight)
    surrogates = [(Z @ model.coefficients.T + model.intercept)[:, 0] for Z, _ in (train, test)]
    return {
        "chosen": len(model.dimensions),
        "train": regression_faithfulness(surrogates[0], train[1][:, label]),
        "test": regression_faithfulness(surrogates[1], test[1][:, label]),
        "f_cls": classification_faithfulness(test[1], surrogates[1], label),
        "seconds": time.perf_counter() - begin,
    }


def read(given: argparse.Namespace) -> tuple[list[int], Tensor, Tensor, Callable[[int], tuple[Tensor, ...]]]:
    """Returns classes, activations, outputs, and what gives rows of these to train and to test on for a class."""
    if given.data == "cub":
        of = birds.read_options(given)
        classes = birds.some_classes(of.images.labels, given.classes)
        return classes, of.Z.flatten(1), of.y_hat, partial(birds.split, of.images.labels)
    counts = places.Counts()
    scenes = places.read(given, counts)
    rows = partial(places.split, scenes.labels, counts=counts)
    return [ROOMS[room] for room in given.rooms], scenes.Z.flatten(1), scenes.y_hat, rows


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    classes, Z, y_hat, rows = read(given)

    def of(job: Line) -> Line:
        train, test = rows(job["class"])[:2]
        return measure((Z[train], y_hat[train]), (Z[test], y_hat[test]), job["class"], job["alpha"])

    jobs = [{"alpha": alpha, "class": c} for c in classes for alpha in given.alphas]
    lines = measured(given.out, jobs, of, title="classes and alphas", under=settings(given))
    order = [str(alpha) for alpha in sorted(given.alphas, reverse=True)]
    text = table(lines, "alpha", COLUMNS, paper=PAPER[given.data], order=order)
    write(given.out, text, summary(lines, "alpha", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="data", required=True)
    of_birds, of_places = kinds.add_parser("cub", help="Table .4"), kinds.add_parser("places", help="Table .6")
    birds.options(of_birds)
    of_birds.add_argument("--classes", type=int, default=30, help="how many, evenly spread over those there are")
    places.options(of_places)
    for of_kind in (of_birds, of_places):
        of_kind.add_argument("--alphas", type=float, nargs="+", default=[2.5, 1.5, 0.5, 0.1])
    main(parser.parse_args())
