"""How much can one map know about what a part adds? Maps, the part's area and its own cover, on FunnyBirds.

Every bird is a line of OUT/results.jsonl, and a run with the same OUT resumes where the last one stopped. A part's
importance is the sum of a map over its pixels. Printed, and written to OUT, over the test birds that the network tells
right, with 95 % confidence intervals:

SD      single deletion: rank correlation over the parts of a bird of the importance with the drop of the logit when the
        part is removed, mean over birds
within  the same over all birds, for each part, mean over parts

Controls are in italics. *Area* is the number of a part's pixels. *Part covered* needs no map: the drop of the logit
when the part's own pixels, and three more around them, get the image's mean colour or the colours around them. A map
that does not know the parts cannot be expected to know more than that.

Maps of the default form's x-features sum to gradient x activation of the logit, so its row is that of the default form,
whatever the groups. *Blurred* is the same map after a Gaussian of 8 pixels.

    python -m benchmarks.part_effects --root FunnyBirds --network funnynet.py --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from captum.attr import (
    DeepLift,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    Occlusion,
    Saliency,
)
from scipy.ndimage import binary_dilation, gaussian_filter
from torch import Tensor, nn

from benchmarks.birds import network
from benchmarks.funnybirds import mass
from benchmarks.runs import Column, Line, measured, settings, summary, table, write
from captum_xnn import OneHeatmap
from captum_xnn.datasets import FunnyBirds
from captum_xnn.heatmaps import ExcitationMaps, FromCaptum, GradientMaps, Heatmap
from captum_xnn.metrics._removal import single_deletion, within_part

WINDOW, STEP, BLUR, AROUND, NEAR = 16, 8, 8.0, 3, 6.0
"""In pixels: Occlusion's window and step, the blurred map's Gaussian, the rim of a covered part, and the Gaussian that
mixes the colours around it."""

MAPS: dict[str, Callable[[], Heatmap]] = {
    "gradient x activation (default form)": GradientMaps,
    "excitation backprop": ExcitationMaps,
    "InputXGradient": partial(FromCaptum, InputXGradient),
    "IntegratedGradients": partial(FromCaptum, IntegratedGradients, n_steps=24),
    "Saliency": partial(FromCaptum, Saliency),
    "GuidedBackprop": partial(FromCaptum, GuidedBackprop),
    "DeepLift": partial(FromCaptum, DeepLift),
    "LayerGradCam": partial(FromCaptum, LayerGradCam),
    "Occlusion": partial(
        FromCaptum, Occlusion, sliding_window_shapes=(3, WINDOW, WINDOW), strides=(3, STEP, STEP), baselines=0
    ),
}
"""Heatmap methods for the logit."""
COLUMNS = (Column("sd", "SD", 2), Column("within", "within", 2))


def covered(image: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Returns an image (3, H, W) with each part (P, H, W) covered, (P, 3, H, W), by two colours."""
    wide = torch.stack([torch.from_numpy(binary_dilation(mask.numpy(), iterations=AROUND)) for mask in masks])
    left = (~wide).double()[:, None].numpy()
    blurred = gaussian_filter(image.double().numpy() * left, (0, 0, NEAR, NEAR)) / gaussian_filter(
        left + 1e-9, (0, 0, NEAR, NEAR)
    )
    fills = {"image's mean colour": image.mean((1, 2))[:, None, None], "colours around": torch.from_numpy(blurred)}
    return {
        f"*part covered by the {name}*": torch.where(wide[:, None], fill.to(image), image)
        for name, fill in fills.items()
    }


def measure(model: nn.Module, test: FunnyBirds, job: Line) -> Line:
    """Returns the importances of a bird's parts, and the drops of the logit without them."""
    i = job["bird"]
    image, masks, label = test[i].image[None], test.masks(i)[None], int(test.labels[i])
    with torch.no_grad():
        y = model(torch.cat([image, *(test.without(i, part)[None] for part in test.part_names)]))
    if int(y[0].argmax()) != label:
        return {"right": False}
    importances = {"*area*": masks[0].double().sum((1, 2))}
    for name, make in MAPS.items():
        maps = OneHeatmap(model, make()).attribute(image, label)[:, 0].sum(1)
        importances[name] = mass(maps, masks)[0]
        if make is GradientMaps:
            smooth = torch.from_numpy(gaussian_filter(maps.numpy(), (0, BLUR, BLUR), mode="reflect"))
            importances[f"{name}, blurred"] = mass(smooth, masks)[0]
    with torch.no_grad():
        for name, images in covered(image[0], masks[0]).items():
            importances[name] = (y[0, label] - model(images)[:, label]).double()
    drops = (y[0, label] - y[1:, label]).double()
    found = {name: row.tolist() for name, row in importances.items()}
    return {"right": True, "importances": found, "drops": drops.tolist()}


def rows_of(lines: list[Line]) -> list[Line]:
    """Returns a line of figures for each map and bird, and one for all birds of each map."""
    right = [line for line in lines if line["right"]]
    drops = torch.tensor([line["drops"] for line in right])
    found: list[Line] = []
    for name in right[0]["importances"]:
        own = torch.tensor([line["importances"][name] for line in right])
        found += [{"map": name, "sd": float(sd)} for sd in single_deletion(own, drops)]
        found.append({"map": name, "within": float(within_part(own, drops).mean())})
    return found


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    model, normalise = network(given.file)
    test = FunnyBirds(given.root, "test", transform=normalise)
    jobs = [{"bird": i} for i in range(min(given.birds, len(test)))]
    lines = measured(given.out, jobs, partial(measure, model, test), title="birds", under=settings(given))
    found = rows_of(lines)
    write(given.out, table(found, "map", COLUMNS), {"maps": summary(found, "map", COLUMNS)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the unpacked folder")
    parser.add_argument(
        "--network", dest="file", type=Path, required=True, help="Python file with load(), MEAN and STD"
    )
    parser.add_argument("--birds", type=int, default=10**6, help="the first of the test birds, at most")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run resumes")
    main(parser.parse_args())
