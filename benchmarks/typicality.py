"""Are images with unusual contributions those that the network gets wrong? On real digits.

For each seed a network of two convolutional layers learns 4,000 digits, and every digit is explained by groups at the
fully connected layer. A test image is compared with the training images of the class that the network gives it.
Printed, and written to OUT, is the mean over seeds with its 95 % confidence interval:

unusual  share of test images whose typicality has a share below .05; of usual images it would be one in twenty
right    the same of the images that the network gets right
wrong    the same of the others
AUC      probability that an image that the network gets right has a higher share than one it gets wrong; logit and
         probability are the network's own, as controls

    python -m benchmarks.typicality --seeds 3 --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.digits import trained
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn import XNNAttribution
from captum_xnn.metrics import typicality

UNUSUAL, BATCH = 0.05, 64
COLUMNS = (
    Column("errors", "images wrong", 0),
    Column("unusual", "unusual"),
    Column("right", "right"),
    Column("wrong", "wrong"),
    Column("auc", "AUC", 2),
    Column("auc_logit", "logit", 2),
    Column("auc_probability", "probability", 2),
)


def auc(values: Tensor, right: Tensor) -> float:
    """Returns the probability that a value of the right is higher than one of the others, ties half."""
    high, low = values[right].double()[:, None], values[~right].double()
    return float(((high > low).double() + (high == low).double() / 2).mean())


def measure(job: Line) -> Line:
    """Returns the figures of one network."""
    cnn, digits = trained(job["seed"], None)
    with torch.no_grad():
        seen, new = cnn(digits.train_images).argmax(1), cnn(digits.test_images)
    given = new.argmax(1)
    xnn = XNNAttribution(cnn, "relu3").fit(digits.train_images, target=range(10), progress=False)
    share = torch.zeros(len(given), dtype=torch.float64)
    for label in range(10):
        made = [
            xnn.contributions(images[rows == label], label, internal_batch_size=BATCH).contributions
            for images, rows in ((digits.test_images, given), (digits.train_images, seen))
        ]
        share[given == label] = typicality(*made).share.double()
    right, unusual = given == digits.test_labels, (share < UNUSUAL).double()
    return {
        "errors": int((~right).sum()),
        "unusual": float(unusual.mean()),
        "right": float(unusual[right].mean()),
        "wrong": float(unusual[~right].mean()),
        "auc": auc(share, right),
        "auc_logit": auc(new.amax(1), right),
        "auc_probability": auc(new.softmax(1).amax(1), right),
    }


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    given.out.mkdir(parents=True, exist_ok=True)
    jobs = [{"seed": seed} for seed in range(given.seeds)]
    lines = measured(given.out, jobs, measure, title="networks", under=settings(given))
    found = [{"network": "digits", **line} for line in lines]
    write(given.out, table(found, "network", COLUMNS), summary(found, "network", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="each with a network of its own")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run resumes")
    main(parser.parse_args())
