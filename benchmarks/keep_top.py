"""Table .5: does the network still recognise a bird from the strongest pixels of its heatmaps?

For each class, the default form (groups) and the SRAE are fitted as for Table 1. Of every test image of the class the n
strongest pixels are kept, all others are inpainted from them, and the network classifies again: by the maps of the
x-features joined in the shares of their contributions, by the single map of the output (1-Heatmap), and, as a control
that the paper lacks, by pixels at random. Accuracies are means over the classes with their 95 % confidence intervals,
the paper's in brackets; then the advantage of either form over the other rankings, in pairs of the same class. A run
with the same OUT goes on where the last one stopped.

    python -m benchmarks.keep_top --root CUB_200_2011 --network FILE.py --layer relu6 --classes 30 --out DIR
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks import birds, one_vs_all
from benchmarks.birds import Birds
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn import OneHeatmap
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.metrics import keep_top_accuracy
from captum_xnn.models._base import encode_all

MAPS = ("groups", "SRAE", "1-Heatmap", "random")
FILLS = ("biharmonic", "telea")
PAPER = {
    "SRAE": {"original": 0.8798, "300": 0.6767, "500": 0.7456, "1000": 0.8297},
    "1-Heatmap": {"original": 0.8798, "300": 0.6713, "500": 0.7381, "1000": 0.8264},
}


def drawn(
    job: Line, of: Birds, images: Tensor, rows: Tensor, train: Tensor, maps_layer: str | None
) -> tuple[Tensor, Tensor | None]:
    """Return one map per image (N, H, W) and None, or maps of x-features (N, K, H, W) and their contributions."""
    kind, label, seed = job["maps"], job["class"], job["seed"]
    if kind == "random":
        return torch.rand(len(images), *images.shape[2:], generator=torch.Generator().manual_seed(seed)), None
    if kind == "1-Heatmap":
        return OneHeatmap(of.model, ExcitationMaps(maps_layer)).attribute(images, label)[:, 0, 0], None
    if kind == "groups":
        data, nothing = (of.Z[train], of.y_hat[train]), (of.Z[:0], of.y_hat[:0])
        problem = one_vs_all.Problem(
            of.model, of.layer, label, data, nothing, images, of.Z[rows], lambda maps: maps,
            one_vs_all.in_batches(of.images, train),
        )  # fmt: skip
        return one_vs_all.maps_of_groups(one_vs_all.fitted_groups(problem), images, label)
    xnn = one_vs_all.fitted("SRAE", of.Z[train], of.y_hat[train], label, seed)
    maps = one_vs_all.excitation_maps(xnn, of.model, of.layer, images, maps_layer=maps_layer)
    return maps, xnn.contributions(encode_all(xnn, of.Z[rows]))


def measure(of: Birds, job: Line, pixels: Sequence[int], fill: str, maps_layer: str | None = None) -> Line:
    """Returns the accuracies on the test images of one class."""
    label, begin = job["class"], time.perf_counter()
    train, _, rows = birds.split(of.images.labels, label)
    images = default_collate([of.images[i] for i in rows.tolist()]).image
    maps, E = drawn(job, of, images, rows, train, maps_layer)
    labels = torch.full((len(images),), label)
    found = {str(n): keep_top_accuracy(of.model, images, maps, labels, n, contributions=E, fill=fill) for n in pixels}
    original = float((of.y_hat[rows].argmax(1) == label).double().mean())
    return {"original": original, **found, "images": len(images), "seconds": time.perf_counter() - begin}


def columns(pixels: Sequence[int]) -> list[Column]:
    """Returns what the table shows."""
    return [Column("original", "whole image", 3), *(Column(str(n), f"{n} pixels", 3) for n in pixels)]


def advantages(lines: Sequence[Line], pixels: Sequence[int]) -> list[Line]:
    """Returns what the accuracy of both forms has over that of the other rankings on the same class and seed."""
    by = {(line["maps"], line["class"], line["seed"]): line for line in lines}
    return [
        {"over": f"{form} less {kind}"}
        | {str(n): one.get(str(n), math.nan) - line.get(str(n), math.nan) for n in pixels}
        for form in MAPS[:2]
        for (kind, label, seed), line in by.items()
        if kind in MAPS[MAPS.index(form) + 1 :] and (one := by.get((form, label, seed))) is not None
    ]


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the tables."""
    of = birds.read_options(given)
    chosen = birds.some_classes(of.images.labels, given.classes)
    jobs = [{"maps": kind, "class": c, "seed": given.seed} for c in chosen for kind in MAPS]
    lines = measured(
        given.out,
        jobs,
        lambda job: measure(of, job, given.pixels, given.fill, given.maps_layer),
        title="classes and maps",
        under=settings(given),
    )
    text = "\n\n".join(
        [
            table(lines, "maps", columns(given.pixels), paper=PAPER, order=MAPS),
            "Accuracy by a form less that by another ranking:",
            table(advantages(lines, given.pixels), "over", columns(given.pixels)[1:]),
        ]
    )
    write(given.out, text, summary(lines, "maps", columns(given.pixels)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--classes", type=int, default=30, help="how many, evenly spread over those there are")
    parser.add_argument("--pixels", type=int, nargs="+", default=[300, 500, 1000])
    parser.add_argument("--fill", choices=FILLS, default="biharmonic", help="inpainting; telea needs OpenCV")
    parser.add_argument(
        "--maps-layer",
        help="where maps of excitation backprop stop, to be enlarged; if not given, a layer of 14 x 14 cells or more",
    )
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
