"""Tables .4 and .6: how faithful is a Lasso, by how many dimensions of Z it may take?

For each class and alpha, a Lasso of the class's output on Z, with positives at a quarter of the weight. F_reg is a mean
over the classes with its 95 % confidence interval, in logits. Alpha is scikit-learn's, and works on the scale of the
logits: the paper's are in brackets, for outputs of 0 to 50. A run with the same OUT goes on where the last one stopped.

    python -m benchmarks.lasso --root CUB_200_2011 --network FILE.py --layer relu6 --classes 30 --out DIR
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks import birds
from benchmarks.birds import Birds
from benchmarks.runs import Column, Line, measured, summary, table, write
from captum_xnn import Recipe
from captum_xnn.baselines.selection import lasso
from captum_xnn.metrics.faithfulness import f_cls, f_reg

PAPER = {
    "2.5": {"chosen": 8, "train": 3.80, "test": 3.70},
    "1.5": {"chosen": 21, "train": 3.06, "test": 2.99},
    "0.5": {"chosen": 68, "train": 1.86, "test": 1.84},
    "0.1": {"chosen": 232, "train": 1.00, "test": 1.03},
}
COLUMNS = (
    Column("chosen", "dimensions", 0),
    Column("train", "F_reg train", 3),
    Column("test", "test", 3),
    Column("f_cls", "F_cls test", 4),
)


def measure(of: Birds, job: Line) -> Line:
    """Returns the figures of one alpha on one class."""
    label, begin = job["class"], time.perf_counter()
    train, test, _ = birds.split(of.images.labels, label)
    positive = of.y_hat[train].argmax(1) == label
    share, wanted = float(positive.double().mean()), Recipe().positive_share
    weight = torch.where(positive, wanted / max(share, 1e-9), (1 - wanted) / (1 - share))
    model = lasso(of.Z[train], of.y_hat[train, label : label + 1], job["alpha"], weight=weight)
    y_bar = (of.Z @ model.coefficients.T + model.intercept)[:, 0]
    return {
        "chosen": len(model.dimensions),
        "train": f_reg(y_bar[train], of.y_hat[train, label]),
        "test": f_reg(y_bar[test], of.y_hat[test, label]),
        "f_cls": f_cls(y_bar[test], of.y_hat[test], label),
        "seconds": time.perf_counter() - begin,
    }


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    of = birds.read_options(given)
    chosen = birds.some_classes(of.images.labels, given.classes)
    jobs = [{"alpha": alpha, "class": c} for c in chosen for alpha in given.alphas]
    lines = measured(given.out, jobs, lambda job: measure(of, job), title="classes and alphas")
    order = [str(alpha) for alpha in sorted(given.alphas, reverse=True)]
    write(given.out, table(lines, "alpha", COLUMNS, paper=PAPER, order=order), summary(lines, "alpha", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--classes", type=int, default=30, help="how many, evenly spread over those there are")
    parser.add_argument("--alphas", type=float, nargs="+", default=[2.5, 1.5, 0.5, 0.1])
    main(parser.parse_args())
