"""Fig. .12: x-features that stay apart (SRAE) and that degenerate (NN), with three x-features each.

Both are fitted to the same classes, as for Table 1. Written to OUT: for each class a gallery of test images by each of
the two, and in table.md, as means over the classes with their 95 % confidence interval:

corr      mean absolute correlation between x-features, on test data
same maps rms correlation of the x-features' maps, pixel by pixel
positive  x-features that raise the output on average over the class's test images
eff       effective number of x-features on these

    python -m benchmarks.degenerate_examples --root CUB_200_2011 --network FILE.py --layer relu6 --classes 3 --out DIR
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from torch import Tensor
from torch.utils.data import default_collate

from benchmarks import birds, one_vs_all
from benchmarks.birds import Birds
from benchmarks.degeneration import mean_correlation
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn.metrics import orthogonality
from captum_xnn.models._base import encode_all
from captum_xnn.plots import show_gallery

N_FEATURES, ROWS = 3, 4
COLUMNS = (
    Column("f_reg", "F_reg test"),
    Column("corr", "corr"),
    Column("same_maps", "same maps", 2),
    Column("positive", "positive", 1),
    Column("eff", "eff", 2),
)


def map_correlation(maps: Tensor) -> float:
    """Returns the rms correlation between the maps of different x-features, from O1 = ||P||_F - sqrt(n)."""
    n = maps.shape[1]
    return math.sqrt(max((orthogonality(maps).o1 + math.sqrt(n)) ** 2 - n, 0) / (n * (n - 1)))


def measure(of: Birds, job: Line, out: Path) -> Line:
    """Returns the figures of one method on one class, and draws its gallery."""
    label, begin = job["class"], time.perf_counter()
    train, test, rows = birds.split(of.images.labels, label)
    xnn = one_vs_all.fitted(job["method"], of.Z[train], of.y_hat[train], label, job["seed"], n=N_FEATURES)
    images = default_collate([of.images[i] for i in rows.tolist()]).image
    maps = one_vs_all.excitation_maps(xnn, of.model, of.layer, images)
    given = xnn.contributions(encode_all(xnn, of.Z[rows]))
    name = of.images.classes[label]
    figure = show_gallery(images[:ROWS], maps[:ROWS], given[:ROWS], title=f"{name}: {job['method']}")
    figure.savefig(out / f"{name}-{job['method']}-{job['seed']}.png", dpi=110)
    return {
        "f_reg": one_vs_all.faithfulness(xnn, of.Z[test], of.y_hat[test], label)["f_reg"],
        "corr": mean_correlation(encode_all(xnn, of.Z[test])),
        "same_maps": map_correlation(maps),
        "positive": int((given.mean(0) > 0).sum()),
        "eff": one_vs_all.effective(given),
        "seconds": time.perf_counter() - begin,
    }


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes pictures and table."""
    of = birds.read_options(given)
    chosen = birds.some_classes(of.images.labels, given.classes)
    jobs = [{"method": m, "class": c, "seed": given.seed} for c in chosen for m in ("SRAE", "NN")]
    lines = measured(given.out, jobs, lambda job: measure(of, job, given.out), title="classes", under=settings(given))
    write(given.out, table(lines, "method", COLUMNS), summary(lines, "method", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--classes", type=int, default=3, help="how many, evenly spread over those there are")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
