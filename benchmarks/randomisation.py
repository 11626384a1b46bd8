"""Sanity checks: do the maps depend on what network and explainer have learned, and does another seed give the same?

Maps of the SRAE's x-features on the test images of some classes, fitted as for Table 1, are compared with those after
weights are drawn anew, and with those of the same x-features (matched by correlation) of an explainer of another seed:

network   the last layer below the explained one redrawn, then the last two, ... down to all
explainer the explainer's last layer redrawn, then the last two, ... all
seed      learned again from another seed: here maps should be alike

Shown are rank correlation and structural similarity of the maps, means over the classes with their 95 % confidence
interval; 1 is a map that did not change. A run with the same OUT goes on where the last one stopped.

    python -m benchmarks.randomisation --root CUB_200_2011 --network FILE.py --layer relu6 --classes 5 --out DIR
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils.data import default_collate

from benchmarks import birds, one_vs_all
from benchmarks.birds import Birds
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn.metrics import matched_features, randomised, similarity
from captum_xnn.metrics._randomisation import top_down
from captum_xnn.models import Autoencoder
from captum_xnn.models._base import encode_all

COLUMNS = (Column("spearman", "rank correlation", 2), Column("ssim", "structural similarity", 2))


def layers_to(model: nn.Module, layer: str) -> list[tuple[str, ...]]:
    """Returns the cascade of a model's layers from the explained one down; later ones play no part."""
    names = [cascade[-1] for cascade in top_down(model)]
    inside = [name for name in names if name == layer or name.startswith(f"{layer}.")]
    order = [name for name, part in model.named_modules() if name in names or name == layer]
    until = max(order.index(name) for name in inside or [layer])
    kept = [name for name in names if order.index(name) <= until]
    return [tuple(kept[: count + 1]) for count in range(len(kept))]


def alike(a: Tensor, b: Tensor) -> Line:
    """Returns the mean similarities of maps."""
    found = similarity(a, b)
    return {"spearman": float(found.spearman.mean()), "ssim": float(found.ssim.mean())}


def changes(of: Birds, xnn: Autoencoder, images: Tensor, steps: int) -> Iterator[tuple[str, Line]]:
    """Yields what was redrawn, with how much the maps then are like those before."""
    before = one_vs_all.excitation_maps(xnn, of.model, of.layer, images)
    for kind, module, cascade in (
        ("network", of.model, layers_to(of.model, of.layer)),
        ("explainer", xnn.encoder, top_down(xnn.encoder)),
    ):
        picked = sorted({round(i * (len(cascade) - 1) / max(steps - 1, 1)) for i in range(steps)})
        for i in picked:
            with randomised(module, seed=0, layers=cascade[i]):
                after = one_vs_all.excitation_maps(xnn, of.model, of.layer, images)
            yield f"{kind}, {i + 1} of {len(cascade)} layers", alike(before, after)


def measure(of: Birds, job: Line, *, steps: int, n_images: int) -> Line:
    """Returns the similarities of one class, as a list of lines by what was redrawn."""
    label, begin = job["class"], time.perf_counter()
    train, _, rows = birds.split(of.images.labels, label)
    rows = rows[:n_images]
    images = default_collate([of.images[i] for i in rows.tolist()]).image
    xnn, again = (one_vs_all.fitted("SRAE", of.Z[train], of.y_hat[train], label, seed) for seed in (0, 1))
    found = dict(changes(of, xnn, images, steps))
    partners = matched_features(encode_all(xnn, of.Z[train]), encode_all(again, of.Z[train])).columns
    maps, others = (one_vs_all.excitation_maps(x, of.model, of.layer, images) for x in (xnn, again))
    found["another seed"] = alike(maps, others[:, partners])
    return {"found": found, "seconds": time.perf_counter() - begin}


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    of = birds.read_options(given)
    jobs = [{"class": c} for c in birds.some_classes(of.images.labels, given.classes)]
    lines = measured(
        given.out,
        jobs,
        lambda job: measure(of, job, steps=given.steps, n_images=given.images),
        title="classes",
        under=settings(given),
    )
    each = [{"redrawn": what, **values} for line in lines for what, values in line["found"].items()]
    write(given.out, table(each, "redrawn", COLUMNS), summary(each, "redrawn", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--classes", type=int, default=5, help="how many, evenly spread over those there are")
    parser.add_argument("--images", type=int, default=4, help="of each class")
    parser.add_argument("--steps", type=int, default=4, help="steps of each cascade that are taken")
    main(parser.parse_args())
