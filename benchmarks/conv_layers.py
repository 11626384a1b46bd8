"""Table 3: how faithful is the convolutional explanation network, layer by layer?

One-vs-all explainers of 1x1 convolutions (three to encode, three to decode, max-pooling and one plane of weights for
each x-feature) on the layers of --layers, all on the same images: the class's and, to bound memory, some of the others.
The fully connected --layer is explained beside them, by the SRAE on the same data. F_reg is a mean over the classes
with its 95 % confidence interval, in logits; beside it the standard deviation of the output. The paper's values are in
brackets. A run with the same OUT goes on where the last one stopped.

    python -m benchmarks.conv_layers --root CUB_200_2011 --network FILE.py --layer relu6 \\
        --layers features.2 features.6 features.11 pool --classes 3 --out DIR
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, Subset

from benchmarks import birds, one_vs_all
from benchmarks.birds import Birds
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn import SRAE, ConvSRAE, Recipe
from captum_xnn.activations import collect
from captum_xnn.training._fitting import fit

PAPER = {
    "pool1": {"train": 2.627, "test": 10.883},
    "pool2": {"train": 3.530, "test": 9.164},
    "pool3": {"train": 4.067, "test": 8.938},
    "pool4": {"train": 2.605, "test": 5.849},
    "pool5": {"train": 2.766, "test": 3.954},
    "fully connected": {"train": 0.0812, "test": 0.1659},
}
COLUMNS = (
    Column("train", "F_reg train"),
    Column("test", "test"),
    Column("f_cls", "F_cls test", 4),
    Column("spread", "std of the output"),
    Column("eff", "eff", 2),
)


def rows_of(of: Birds, label: int, negatives: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows to train and to test on, with so many negatives to train and a quarter of that to test."""
    train, test, held_out = birds.split(of.images.labels, label)
    first = len(train) - int((of.images.labels[train] != label).sum())
    return train[: first + negatives], test[: len(held_out) + negatives // 4]


def measure(of: Birds, job: Line, *, negatives: int, hidden: Sequence[int], steps: int) -> Line:
    """Returns the figures of one layer on one class."""
    label, begin = job["class"], time.perf_counter()
    train, test = rows_of(of, label, negatives)
    if job["layer"] == of.layer:
        Z, y_hat = of.Z[torch.cat([train, test])], of.y_hat[torch.cat([train, test])]
        xnn: SRAE | ConvSRAE = SRAE(tuple(Z.shape[1:]), one_vs_all.N_FEATURES)
    else:
        images = Subset(of.images, torch.cat([train, test]).tolist())
        loader = DataLoader(images, batch_size=32)
        found = collect(of.model, job["layer"], loader, unpack=lambda batch: ((batch.image,), None))
        Z, y_hat = found.Z, found.y_hat
        xnn = ConvSRAE(tuple(Z.shape[1:]), one_vs_all.N_FEATURES, hidden=hidden, pool=min(2, *Z.shape[2:]))
    learn, new = slice(len(train)), slice(len(train), None)
    y = y_hat[:, label : label + 1]
    positives = y_hat[learn].argmax(1) == label
    fit(xnn, Z[learn], y[learn], positives=positives, recipe=Recipe(steps=steps), seed=job["seed"])
    xnn.requires_grad_(False)
    seen, unseen = (one_vs_all.faithfulness(xnn, Z[part], y_hat[part], label) for part in (learn, new))
    held_out = int((of.images.labels[test] == label).sum())
    with torch.no_grad():
        contributions = xnn.contributions(xnn.encode(xnn.shaped(Z[new][:held_out])))
    return {
        "train": seen["f_reg"],
        "test": unseen["f_reg"],
        "f_cls": unseen["f_cls"],
        "spread": float(y[new].std()),
        "eff": one_vs_all.effective(contributions),
        "seconds": time.perf_counter() - begin,
    }


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    of = birds.read_options(given)
    chosen = birds.some_classes(of.images.labels, given.classes)
    layers = [*given.layers, given.layer]
    jobs = [{"layer": layer, "class": c, "seed": given.seed} for c in chosen for layer in reversed(layers)]
    lines = measured(
        given.out,
        jobs,
        lambda job: measure(of, job, negatives=given.negatives, hidden=given.hidden, steps=given.steps),
        title="classes and layers",
        under=settings(given),
    )
    pools = list(PAPER)[-1 - len(given.layers) : -1]  # the paper's five, or the last of them
    paper = {layer: PAPER[at] for layer, at in zip(given.layers, pools, strict=False)}
    paper |= {given.layer: PAPER["fully connected"]}
    write(given.out, table(lines, "layer", COLUMNS, paper=paper, order=layers), summary(lines, "layer", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--layers", nargs="+", required=True, help="convolutional layers, the lowest first")
    parser.add_argument("--classes", type=int, default=3, help="how many, evenly spread over those there are")
    parser.add_argument("--negatives", type=int, default=1000, help="images of other classes to train on")
    parser.add_argument(
        "--hidden", type=int, nargs="*", default=[64, 32], help="channels of the encoder's hidden layers"
    )
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
