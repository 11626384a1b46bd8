"""How much of O1, O2 and locality is in the choice of x-features? The SRAE's against random rotations of them.

Any rotation of decorrelated x-features gives the same surrogate, the same reconstruction and the same pull-away term,
so that Eq. 5 cannot tell them apart; here those rotations are drawn in which the x-features share the output as the
SRAE's do. Shown, as means over the classes with their 95 % confidence interval:

SRAE      the x-features as learned
mean      mean over the rotations
std       standard deviation over the rotations
best      the rotation with the best value on images to learn from, as it is on test images: what choosing by maps gives
agreement rank correlation over the rotations between images to learn from and test images

    python -m benchmarks.rotations --root CUB_200_2011 --network FILE.py --layer relu6 --classes 5 --out DIR
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from scipy import stats
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks import birds, one_vs_all
from benchmarks.birds import Birds
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn import SRAE
from captum_xnn.metrics import part_probabilities
from captum_xnn.models._base import encode_all

METRICS = ("o1", "o2", "locality", "o1_weighted", "o2_weighted", "locality_weighted")
COLUMNS = tuple(Column(name, name, 2) for name in ("SRAE", "mean", "std", "best", "agreement"))


def rotation_of_same_shares(v: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a random rotation (n, n) that leaves v, (n,), as it is."""
    n = len(v)
    along = v.double() / v.double().norm()
    basis = torch.linalg.qr(torch.cat([along[:, None], torch.eye(n, dtype=torch.double)], 1))[0][:, :n]
    free = torch.linalg.qr(torch.randn(n - 1, n - 1, generator=generator, dtype=torch.double))[0]
    rotation: Tensor = basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.double), free) @ basis.T
    return rotation.to(v)


def rotated(xnn: SRAE, rotation: Tensor) -> SRAE:
    """Returns a copy whose x-features are R E, with head and decoder turned back, so that all else stays."""
    made = copy.deepcopy(xnn)
    with torch.no_grad():
        for name in ("weight", "bias"):
            made.encoder[-1].get_parameter(name).copy_(rotation @ xnn.encoder[-1].get_parameter(name))
        made.head.weight.copy_(xnn.head.weight @ rotation.T)
        made.decoder[0].get_parameter("weight").copy_(xnn.decoder[0].get_parameter("weight") @ rotation.T)
    return made


def figures(of: Birds, xnn: SRAE, rows: Tensor) -> Line:
    """Returns orthogonality and locality on some images."""
    batch = default_collate([of.images[i] for i in rows.tolist()])
    maps = one_vs_all.excitation_maps(xnn, of.model, of.layer, batch.image)
    S = part_probabilities(maps, batch.points, batch.box)
    return one_vs_all.locations(maps, S, xnn.contributions(encode_all(xnn, of.Z[rows])))


def measure(of: Birds, job: Line, *, rotations: int) -> Line:
    """Returns what the rotations of one class's SRAE give, by metric."""
    label, begin = job["class"], time.perf_counter()
    train, _, rows = birds.split(of.images.labels, label)
    xnn = one_vs_all.fitted("SRAE", of.Z[train], of.y_hat[train], label, 0)
    assert isinstance(xnn, SRAE)
    generator = torch.Generator().manual_seed(label)
    tried = [xnn, *(rotated(xnn, rotation_of_same_shares(xnn.head.weight[0], generator)) for _ in range(rotations))]
    seen, new = ([figures(of, x, part) for x in tried] for part in (train[: len(rows)], rows))
    found = {}
    for metric in METRICS:
        a, b = ([line[metric] for line in lines[1:]] for lines in (seen, new))
        found[metric] = {
            "SRAE": new[0][metric],
            "mean": statistics.mean(b),
            "std": statistics.stdev(b),
            "best": b[a.index(min(a))],
            "agreement": float(stats.spearmanr(a, b).statistic),
        }
    return {"found": found, "seconds": time.perf_counter() - begin}


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    of = birds.read_options(given)
    jobs = [{"class": c} for c in birds.some_classes(of.images.labels, given.classes)]
    lines = measured(
        given.out, jobs, lambda job: measure(of, job, rotations=given.rotations), title="classes", under=settings(given)
    )
    each = [{"metric": metric, **values} for line in lines for metric, values in line["found"].items()]
    write(given.out, table(each, "metric", COLUMNS), summary(each, "metric", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--classes", type=int, default=5, help="how many, evenly spread over those there are")
    parser.add_argument("--rotations", type=int, default=12)
    main(parser.parse_args())
