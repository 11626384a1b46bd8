"""Table 1: faithfulness, orthogonality and locality of one-vs-all explainers on CUB-200-2011.

For each class, a form of explanation network learns from five sixths of its images (50 of 60) and 80 % of the
others; the rest is test data. Maps are drawn of the class's test images, by the default backend of each form: that of
``groups``, the default form of XNNAttribution, is gradient x activation, without what speaks against the x-feature, and
that of all others is excitation backprop. Every method and class
is a line of OUT/results.jsonl, and a run with the same OUT goes on where the last one stopped. Printed, and written to
OUT, is the mean over the classes with its 95 % confidence interval, beside the paper's value (VGG19, 200 classes):

F_reg     mean |surrogate - prediction|, in logits, on training and test data
F_cls     share of examples whose predicted class stays
eff       effective number of x-features: exp of the entropy of their mean absolute contributions, on the test images
O1, O2    overlap of the x-features' maps, and weighted by contribution
locality  entropy of the parts that an x-feature's maps fall on, in nats, and weighted by contribution

Then the SRAE's advantage over every other method, in pairs of the same class, with its 95 % confidence interval.

    python -m benchmarks.cub --root CUB_200_2011 --network FILE.py --layer relu6 --classes 30 --out DIR

FILE.py offers ``load()`` and the MEAN and STD of its inputs. For the paper's model:
``--torchvision vgg19 --weights FILE --layer classifier.0``, with 224 x 224 pixels.
"""

from __future__ import annotations

import argparse

from torch.utils.data import default_collate

from benchmarks import birds, one_vs_all
from benchmarks.birds import Birds
from benchmarks.one_vs_all import COLUMNS, METHODS
from benchmarks.runs import Line, interval, measured, settings, summary, write
from captum_xnn.metrics import part_probabilities

PAPER: dict[str, dict[str, float]] = {
    "SRAE": {"train": 0.0812, "test": 0.1659, "f_cls_train": 0.9999, "f_cls": 0.9999, "o1": 0.6554, "o2": 2.4312,
             "locality": 1.9713},
    "NN": {"train": 0.0696, "test": 0.1304, "f_cls_train": 1.0, "f_cls": 1.0, "o1": 0.9765, "o2": 4.9112,
           "locality": 2.4360},
    "SAE": {"train": 0.0972, "test": 0.1981, "f_cls_train": 0.9999, "f_cls": 0.9998, "o1": 0.8794, "o2": 3.5057,
            "locality": 2.1997},
    "CAE": {"train": 4.1513, "test": 4.0021, "f_cls_train": 0.6534, "f_cls": 0.6928, "o1": 0.6301, "o2": 2.3884,
            "locality": 2.1227},
    "Lasso": {"train": 3.5785, "test": 3.7928, "f_cls_train": 0.7314, "f_cls": 0.7153, "o1": 1.2052, "o2": 3.9851,
              "locality": 2.1082},
    "Z": {"locality": 1.9685},
    "1-Heatmap": {"locality": 2.5659},
}  # fmt: skip


def measure(of: Birds, job: Line, *, maps_layer: str | None = None) -> Line:
    """Returns all figures of one method on one class."""
    train, test, positives = birds.split(of.images.labels, job["class"])
    batch = default_collate([of.images[i] for i in positives.tolist()])
    problem = one_vs_all.Problem(
        of.model,
        of.layer,
        job["class"],
        (of.Z[train], of.y_hat[train]),
        (of.Z[test], of.y_hat[test]),
        batch.image,
        of.Z[positives],
        lambda maps: part_probabilities(maps, batch.points, batch.box),
        one_vs_all.in_batches(of.images, train),
    )
    return one_vs_all.measure(problem, job["method"], job["seed"], maps_layer=maps_layer)


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the tables."""
    of = birds.read_options(given)
    chosen = birds.some_classes(of.images.labels, given.classes)
    jobs = [{"method": m, "class": c, "seed": given.seed} for c in chosen for m in given.methods]
    lines = measured(
        given.out,
        jobs,
        lambda job: measure(of, job, maps_layer=given.maps_layer),
        title="methods and classes",
        under=settings(given),
    )
    hours = interval(line["seconds"] for line in lines if line["method"] == "SRAE")[0] * 100 / 3600
    text = one_vs_all.report(lines, PAPER) + f"\n\n100 classes by the SRAE, at the mean of these: {hours:.2f} hours."
    write(given.out, text, {"methods": summary(lines, "method", COLUMNS), "hours_for_100_classes": hours})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--maps-layer", help="where maps stop; chosen by the backend if not given")
    parser.add_argument("--classes", type=int, default=1000, help="how many, evenly spread over those there are")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
