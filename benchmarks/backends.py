"""Which backend draws maps that agree with what covering a patch takes away? It decides the default for groups.

The networks are those of ``benchmarks.contributions``. Printed, and written to OUT, are means over classes with 95 %
confidence intervals of the patch agreement: the rank correlation over 4 x 4 patches of the drops of a contribution with
the map, weighted by contribution.

groups      maps of the default form's x-features
random      maps of as many random groups: what a backend reaches without a division
one map     the map of the whole output
identified  share of maps of groups that fit the drops of their own x-feature best; chance is 1 / K
seconds     of the processor for an explanation of one image with all maps

*the default* is the contribution of each place where the explained layer has feature maps, and gradient x activation at
other layers. *chance* is a row of smooth random maps. Maps of excitation backprop have no sign: drops are turned to the
side of the contribution. Occlusion covers patches itself, half as wide as those of the measure: its figures are a
ceiling.

A second table has a row for each backend: the agreement of groups in each network, and in brackets that of random
groups and of the one map.

    python -m benchmarks.backends --networks digits-relu3 vision-transformer --classes 3 --out DIR
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import (
    DeepLift,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    LayerIntegratedGradients,
    Occlusion,
    Saliency,
)
from torch import Tensor

from benchmarks.contributions import BATCH, DRAWS, NETWORKS, Problem, by_dimension, fitted, flat, shown
from benchmarks.runs import Column, Line, interval, measured, settings, summary, table, write
from captum_xnn import ContributionGroups
from captum_xnn.heatmaps import ContributionMaps, ExcitationMaps, FromCaptum, GradientMaps, Heatmap
from captum_xnn.metrics import patch_agreement, patch_drops
from captum_xnn.metrics._controls import random_maps, random_partition
from captum_xnn.metrics._patches import map_identification

COLUMNS = (
    Column("groups", "groups", 2),
    Column("random", "random", 2),
    Column("one", "one map", 2),
    Column("identified", "identified", 2),
    Column("seconds", "seconds", 3),
)
DEFAULT = "the default"


def windows(images: Tensor) -> Heatmap:
    """Returns Occlusion by the images' mean colour, in windows half as wide as the patches of the measure."""
    side = max(images.shape[2] // 8, 1)
    window, step = (images.shape[1], side, side), (images.shape[1], side, side)
    baseline = float(images.mean())
    return FromCaptum(Occlusion, sliding_window_shapes=window, strides=step, baselines=baseline)


BACKENDS: dict[str, Callable[[Tensor], Heatmap]] = {
    DEFAULT: lambda _: ContributionMaps(),
    "gradient x activation": lambda _: GradientMaps(),
    "excitation backprop (c-MWP)": lambda _: ExcitationMaps(),
    "InputXGradient": lambda _: FromCaptum(InputXGradient),
    "IntegratedGradients": lambda _: FromCaptum(IntegratedGradients, n_steps=20, internal_batch_size=BATCH),
    "Saliency": lambda _: FromCaptum(Saliency),
    "GuidedBackprop": lambda _: FromCaptum(GuidedBackprop),
    "DeepLift": lambda _: FromCaptum(DeepLift),
    "LayerGradCam": lambda _: FromCaptum(LayerGradCam),
    "LayerIntegratedGradients": lambda _: FromCaptum(LayerIntegratedGradients, n_steps=20, internal_batch_size=BATCH),
    "Occlusion": windows,
}
"""Every backend gives a heatmap method for some images."""


def measure(of: Problem, given: argparse.Namespace) -> Line:
    """Returns the figures of all backends on one class; a backend that cannot explain the model has none."""
    by = shown(of, given.images)
    if by.images is None or by.lost is None:
        raise SystemExit("maps are compared on images; choose networks of images")
    images = by.images
    xnn, _ = fitted(of, ContributionGroups)
    form: Any = xnn.explainer(of.label).form
    drops = patch_drops(lambda x: by_dimension(of, form, x).c, images).double()
    c = by_dimension(of, form, images).c.double()
    drawn = random_partition(len(form.groups), form.n_features, torch.Generator().manual_seed(of.label))
    partitions = {"groups": form.groups, "random": drawn.to(form.groups)}
    found: dict[str, Line] = {}
    for name in given.backends:
        heatmap, line = BACKENDS[name](images), Line()
        unsigned = isinstance(heatmap, ExcitationMaps)
        try:
            for kind, a in partitions.items():
                form.groups = a
                E, lost = c @ a.double(), torch.einsum("ndp,dk->nkp", drops, a.double())
                begin = time.process_time()
                maps = drawn_maps(partial(xnn.with_heatmap(heatmap).explain, images, of.label))
                seconds = (time.process_time() - begin) / len(images)
                side = torch.where(E < 0, -1, 1)[:, :, None]
                line[kind] = patch_agreement(maps, lost * side if unsigned else lost, contributions=E)
                if kind == "groups":
                    towards = maps if unsigned else maps * side[..., None]
                    line |= {"identified": map_identification(towards, lost * side), "seconds": seconds}
                    found.setdefault("chance", {"groups": by_chance(maps, lost, E)})
            one = drawn_maps(partial(xnn.with_heatmap(heatmap).one_heatmap, images, of.label))
            line["one"] = patch_agreement(one, by.lost)
        except (ValueError, RuntimeError, TypeError) as error:
            line = {"failed": str(error).splitlines()[0]}
        found[name] = line
    return {"backends": found}


def by_chance(maps: Tensor, drops: Tensor, E: Tensor) -> float:
    """Returns the agreement of smooth random maps of the same shape, mean of twenty."""
    draws = (random_maps(maps, seed=seed) for seed in range(DRAWS))
    return sum(patch_agreement(random, drops, contributions=E) for random in draws) / DRAWS


def drawn_maps(draw: Callable[..., Any]) -> Tensor:
    """Returns maps (N, K, H, W), summed over channels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = draw(internal_batch_size=BATCH)
    return (made if isinstance(made, Tensor) else made.maps).detach().sum(2)


def across(lines: list[Line]) -> str:
    """Returns a row for each backend: agreement of groups in each network, in brackets that of the controls."""
    networks = list(dict.fromkeys(line["network"] for line in lines))
    head = ["backend", *networks]
    rows = []
    for name in dict.fromkeys(name for line in lines for name in line["backends"]):
        row = [name]
        for network in networks:
            of = [line["backends"][name] for line in lines if line["network"] == network and name in line["backends"]]
            groups, random, one = (interval(line.get(key) for line in of) for key in ("groups", "random", "one"))
            known = not math.isnan(groups[0])
            controls = "" if math.isnan(random[0]) else f" ({random[0]:.2f}, {one[0]:.2f})"
            spread = "" if math.isnan(groups[1]) else f" ± {groups[1]:.2f}"
            row.append(f"{groups[0]:.2f}{spread}{controls}" if known else "")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    jobs = [{"network": name, "class": label} for name in given.networks for label in NETWORKS[name].classes(given)]

    def of(job: Line) -> Line:
        return measure(NETWORKS[job["network"]].of(given, job["class"]), given)

    lines = measured(given.out, jobs, of, title="classes", under=settings(given))
    found = flat(lines, "backends")
    for reason in sorted({f"{line['explained']}: {line['failed']}" for line in found if "failed" in line}):
        print(reason)
    text = "\n\n".join([table(found, "explained", COLUMNS), across(lines)])
    write(given.out, text, summary(found, "explained", COLUMNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", required=True, choices=list(NETWORKS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--classes", type=int, default=3, help="of each network")
    parser.add_argument("--root", type=Path, help="folder of the birds with images.txt")
    parser.add_argument("--network", dest="file", type=Path, help="Python file with load(), MEAN and STD, for birds")
    parser.add_argument("--activations", type=Path, help="file that keeps the birds' activations at relu6")
    parser.add_argument("--negatives", type=int, default=200, help="other birds to train on at feature maps")
    parser.add_argument("--examples", type=int, default=6000, help="figures to learn from")
    parser.add_argument("--epochs", type=int, default=6, help="of training small networks")
    parser.add_argument("--test", type=int, default=100, help="birds to test on; three times as many small inputs")
    parser.add_argument("--images", type=int, default=10, help="of the class to cover, at most")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run resumes")
    main(parser.parse_args())
