"""Table 1: faithfulness, orthogonality and locality of one-vs-all explainers on CUB-200-2011.

For each class, a form of explanation network learns from five sixths of its images (50 of 60) and 80 % of the
others; the rest is test data. Maps are drawn of the class's test images, by the default backend. Every method and class
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
import math
import time
from collections.abc import Iterable

from torch import Tensor

from benchmarks import birds, one_vs_all
from benchmarks.birds import Birds
from benchmarks.one_vs_all import METHODS
from benchmarks.runs import Column, Line, interval, measured, summary, table, write
from captum_xnn import OneHeatmap
from captum_xnn.datasets.parts import PartsSample, collate
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.metrics.locality import mean_locality, part_probabilities
from captum_xnn.metrics.orthogonality import orthogonality
from captum_xnn.training import encode_all

PAPER: dict[str, dict[str, float]] = {
    "SRAE": {"train": 0.0812, "test": 0.1659, "f_cls": 0.9999, "o1": 0.6554, "o2": 2.4312, "locality": 1.9713},
    "NN": {"train": 0.0696, "test": 0.1304, "f_cls": 1.0, "o1": 0.9765, "o2": 4.9112, "locality": 2.4360},
    "SAE": {"train": 0.0972, "test": 0.1981, "f_cls": 0.9998, "o1": 0.8794, "o2": 3.5057, "locality": 2.1997},
    "CAE": {"train": 4.1513, "test": 4.0021, "f_cls": 0.6928, "o1": 0.6301, "o2": 2.3884, "locality": 2.1227},
    "Lasso": {"train": 3.5785, "test": 3.7928, "f_cls": 0.7153, "o1": 1.2052, "o2": 3.9851, "locality": 2.1082},
    "Z": {"locality": 1.9685},
    "1-Heatmap": {"locality": 2.5659},
}

COLUMNS = (
    Column("train", "F_reg train"),
    Column("test", "test"),
    Column("f_cls_train", "F_cls train", 4),
    Column("f_cls", "test", 4),
    Column("eff", "eff", 2),
    Column("o1", "O1", 2),
    Column("o2", "O2", 2),
    Column("locality", "locality", 2),
    Column("o1_weighted", "O1 weighted", 2),
    Column("o2_weighted", "O2 weighted", 2),
    Column("locality_weighted", "locality weighted", 2),
)


def locations(maps: Tensor, contributions: Tensor | None, batch: PartsSample) -> dict[str, float]:
    """Returns orthogonality and locality of maps (N, K, H, W), plain and weighted by contributions (N, K)."""
    S = part_probabilities(maps, batch.points, batch.box)
    found = {"locality": mean_locality(S)}
    if contributions is not None:
        plain, weighted = orthogonality(maps), orthogonality(maps, contributions=contributions)
        found |= {"o1": plain.o1, "o2": plain.o2, "o1_weighted": weighted.o1, "o2_weighted": weighted.o2}
        found["locality_weighted"] = mean_locality(S, contributions=contributions)
    return found


def measure(of: Birds, job: Line, *, maps_layer: str | None = None) -> Line:
    """Returns all figures of one method on one class."""
    method, label = job["method"], job["class"]
    train, test, positives = birds.split(of.images.labels, label)
    begin = time.perf_counter()
    batch = collate([of.images[i] for i in positives.tolist()])
    if METHODS[method] is None:
        maps = OneHeatmap(of.model, ExcitationMaps(maps_layer)).attribute(batch.image, label)
        return locations(maps[:, :, 0], None, batch) | {"seconds": time.perf_counter() - begin}
    xnn = one_vs_all.fitted(method, of.Z[train], of.y_hat[train], label, job["seed"])
    learned = time.perf_counter() - begin
    contributions = xnn.contributions(encode_all(xnn, of.Z[positives]))
    maps = one_vs_all.excitation_maps(xnn, of.model, of.layer, batch.image, maps_layer=maps_layer)
    found = locations(maps, contributions, batch)
    if method == "Z":  # unrelated dimensions, which explain nothing together
        return {"locality": found["locality"], "seconds": time.perf_counter() - begin}
    seen, new = (one_vs_all.faithfulness(xnn, of.Z[rows], of.y_hat[rows], label) for rows in (train, test))
    return {
        "train": seen["f_reg"],
        "test": new["f_reg"],
        "f_cls_train": seen["f_cls"],
        "f_cls": new["f_cls"],
        **found,
        "eff": one_vs_all.effective(contributions),
        "contributions": [round(c, 3) for c in contributions.mean(0).tolist()],
        "empty_maps": float((maps.flatten(2).sum(2) == 0).double().mean()),
        "seconds": time.perf_counter() - begin,
        "seconds_fit": learned,
    }


def advantages(lines: Iterable[Line], over: str = "SRAE") -> list[Line]:
    """Returns, for every other method, its figures less one method's on the same class and seed."""
    by = {(line["method"], line["class"], line["seed"]): line for line in lines}
    return [
        {"against": name} | {c.key: line.get(c.key, math.nan) - one.get(c.key, math.nan) for c in COLUMNS}
        for (name, label, seed), line in by.items()
        if name != over and (one := by.get((over, label, seed))) is not None
    ]


def report(lines: list[Line]) -> str:
    """Returns both tables in Markdown."""
    order = list(METHODS)
    return "\n\n".join(
        [
            table(lines, "method", COLUMNS, paper=PAPER, order=order),
            "Other methods less the SRAE:",
            table(advantages(lines), "against", COLUMNS, order=order),
        ]
    )


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the tables."""
    of = birds.read_options(given)
    chosen = birds.some_classes(of.images.labels, given.classes)
    jobs = [{"method": m, "class": c, "seed": given.seed} for c in chosen for m in given.methods]
    lines = measured(
        given.out, jobs, lambda job: measure(of, job, maps_layer=given.maps_layer), title="methods and classes"
    )
    hours = interval(line["seconds"] for line in lines if line["method"] == "SRAE")[0] * 100 / 3600
    text = report(lines) + f"\n\n100 classes by the SRAE, at the mean of these: {hours:.2f} hours."
    write(given.out, text, {"methods": summary(lines, "method", COLUMNS), "hours_for_100_classes": hours})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--maps-layer", help="where maps stop; chosen by the backend if not given")
    parser.add_argument("--classes", type=int, default=1000, help="how many, evenly spread over those there are")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
