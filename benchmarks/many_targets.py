"""Explainers of many targets: fitted together, and one after the other; how they grow.

Fits on activations of M examples and D dimensions that are drawn here, or are those of a file with tensors Z and y_hat,
such as the one that the benchmarks on birds keep. A fifth of the examples is held out. Printed:

ratio      median over the rounds of the time of a loop of single fits to that of one fit of the same targets, in turns
GFLOP/s    arithmetic of the products per second while fitting together, and of one plain product of the same sizes
seconds    of all targets in one fit, with F_reg on training and held-out data and the largest difference to single fits

    python -m benchmarks.many_targets --out DIR --targets 100 --rounds 3
    python -m benchmarks.many_targets --out DIR --targets 100 --rounds 3 --device cuda

On a GPU the peak of its memory during the fit of all targets is printed, too. With --mixed-precision the few targets
are fitted together with and without products of bfloat16 numbers, in turns: how many times faster, F_reg of both, and
how matched x-features correlate on held-out data. With --grow the time of one fit is printed for other numbers of
examples, targets, x-features and widths.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_xnn import SRAE, Recipe
from captum_xnn.metrics import matched_features, regression_faithfulness
from captum_xnn.models._base import encode_all
from captum_xnn.training._fitting import fit, fit_together

SHARE_OF_TRAINING = 0.8


def drawn(examples: int, width: int, targets: int) -> tuple[Tensor, Tensor]:
    """Returns activations of which a fifth are not 0, and outputs each of which is high in a few examples."""
    g = torch.Generator().manual_seed(0)
    Z = torch.randn(examples, width, generator=g).sub(0.8).relu()
    W = torch.randn(width, targets, generator=g) / width**0.5
    return Z, Z @ W + 3 * (Z @ W).sub(1.5).relu()


def chosen(y_hat: Tensor, targets: int) -> list[int]:
    """Returns the targets with most positives."""
    counts = torch.bincount(y_hat.argmax(1), minlength=y_hat.shape[1])
    return counts.argsort(descending=True)[:targets].tolist()


def flops(width: int, hidden: tuple[int, ...], n: int, examples: int, recipe: Recipe) -> float:
    """Returns multiplications and additions of a fit's products: forward, and back to weights and to inputs but Z."""
    sizes = [width, *hidden, n]
    layers = [a * b for a, b in itertools.pairwise(sizes)]
    return 2 * recipe.batch_for(examples) * recipe.steps * (2 * 3 * sum(layers) - layers[0])


def finished(device: torch.device) -> float:
    """Returns the time at which a device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def product_rate(width: int, rows: int, columns: int, device: torch.device) -> float:
    """Returns additions and multiplications per second of the largest product, alone, at its best of 20 times."""
    x, w = torch.randn(rows, width, device=device), torch.randn(columns, width, device=device)
    times = []
    for _ in range(20):
        begin = finished(device)
        x @ w.T
        finished(device)
        times.append(time.perf_counter() - begin)
    return 2 * width * rows * columns / min(times)


def timed(
    Z: Tensor, y_hat: Tensor, targets: list[int], recipe: Recipe, n: int, *, together: bool
) -> tuple[float, list[SRAE]]:
    """Returns the seconds of fitting targets, and the explainers."""
    xnns = [SRAE(Z.shape[1], n).to(Z.device) for _ in targets]
    ys, marks = [y_hat[:, [t]] for t in targets], [y_hat.argmax(1) == t for t in targets]
    begin = finished(Z.device)
    if together:
        fit_together(xnns, Z, ys, positives=marks, recipe=recipe)
    else:
        for xnn, y, marked in zip(xnns, ys, marks, strict=True):
            fit(xnn, Z, y, positives=marked, recipe=recipe)
    return finished(Z.device) - begin, xnns


@torch.no_grad()
def errors(xnns: list[SRAE], Z: Tensor, y_hat: Tensor, targets: list[int]) -> float:
    """Returns F_reg, a mean over explainers."""
    return statistics.mean(
        regression_faithfulness(xnn.head(encode_all(xnn, Z))[:, 0], y_hat[:, t])
        for xnn, t in zip(xnns, targets, strict=True)
    )


@torch.no_grad()
def mixed(Z: tuple[Tensor, Tensor], y_hat: tuple[Tensor, Tensor], targets: list[int], given: argparse.Namespace) -> Any:
    """Returns what products of bfloat16 numbers save, and what they cost; data are pairs of training and held-out."""
    recipe = Recipe(steps=given.steps, batch_size=128)
    ratios, agreements, found = [], [], {}
    for _ in range(given.rounds):
        full, xnns = timed(Z[0], y_hat[0], targets, recipe, 5, together=True)
        half, others = timed(Z[0], y_hat[0], targets, replace(recipe, mixed_precision=True), 5, together=True)
        ratios.append(full / half)
        agreements += [matched_features(*(encode_all(x, Z[1]) for x in p)).mean for p in zip(xnns, others, strict=True)]
        found = {"f_reg_test": errors(xnns, Z[1], y_hat[1], targets)}
        found["f_reg_test_mixed"] = errors(others, Z[1], y_hat[1], targets)
    return found | {"ratio": statistics.median(ratios), "ratios": ratios, "agreement": statistics.mean(agreements)}


@torch.no_grad()
def main(given: argparse.Namespace) -> None:
    """Measures, prints, and writes DIR/many_targets.json."""
    recipe = Recipe(steps=given.steps, batch_size=128)
    if given.activations is None:
        Z, y_hat = drawn(given.examples, given.width, max(given.targets, 10))
    else:
        known = torch.load(given.activations, weights_only=True)
        Z, y_hat = known["Z"].flatten(1), known["y_hat"]
    order = torch.randperm(len(Z), generator=torch.Generator().manual_seed(0))
    cut = int(SHARE_OF_TRAINING * len(Z))
    train, test = order[:cut], order[cut:]
    targets = chosen(y_hat[train], given.targets)
    Z, y_hat = Z.to(given.device), y_hat.to(given.device)
    few = targets[: given.few]
    ratios, differences = [], []
    for _ in range(given.rounds):
        apart, single = timed(Z[train], y_hat[train], few, recipe, 5, together=False)
        joined, many = timed(Z[train], y_hat[train], few, recipe, 5, together=True)
        ratios.append(apart / joined)
        for a, b in zip(single, many, strict=True):
            differences.append(float((encode_all(a, Z[test]) - encode_all(b, Z[test])).abs().max()))
    if given.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(given.device)
    seconds, xnns = timed(Z[train], y_hat[train], targets, recipe, 5, together=True)
    arithmetic = flops(Z.shape[1], (800, 100), 5, len(Z[train]), recipe)
    found = {
        "examples": len(Z),
        "width": Z.shape[1],
        "targets": len(targets),
        "seconds": seconds,
        "seconds_per_explainer": seconds / len(targets),
        "ratio": statistics.median(ratios) if ratios else None,
        "ratios": ratios,
        "largest_difference": max(differences, default=None),
        "tflop_per_explainer": arithmetic / 1e12,
        "gflops": arithmetic * len(targets) / seconds / 1e9,
        "gflops_of_a_product": product_rate(Z.shape[1], recipe.batch_for(len(Z[train])), 800, given.device) / 1e9,
        "f_reg_train": errors(xnns, Z[train], y_hat[train], targets),
        "f_reg_test": errors(xnns, Z[test], y_hat[test], targets),
        "threads": torch.get_num_threads(),
    }
    if given.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(given.device)
        found["peak_gib"] = torch.cuda.max_memory_allocated(given.device) / 2**30
    if given.mixed_precision:
        found["mixed_precision"] = mixed((Z[train], Z[test]), (y_hat[train], y_hat[test]), few, given)
    if given.grow:
        found["growth"] = growth(recipe, given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "many_targets.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def growth(recipe: Recipe, device: torch.device) -> list[dict[str, float]]:
    """Returns the seconds of fits of which one size is another than 4,096 examples, 4 targets, 5 x-features, 1,024."""
    usual = {"examples": 4096, "targets": 4, "n": 5, "width": 1024}
    lines = []
    for name, values in {
        "examples": (4096, 16384, 65536),
        "targets": (1, 4, 16),
        "n": (2, 5, 20),
        "width": (256, 1024, 4096),
    }.items():
        for value in values:
            size = usual | {name: value}
            Z, y_hat = drawn(size["examples"], size["width"], 20)
            some = chosen(y_hat, size["targets"])
            Z, y_hat = Z.to(device), y_hat.to(device)
            lines.append({**size, "seconds": timed(Z, y_hat, some, recipe, size["n"], together=True)[0]})
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--activations", type=Path, help="file with tensors Z and y_hat, instead of drawn ones")
    parser.add_argument("--examples", type=int, default=5903)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--targets", type=int, default=100, help="in one fit")
    parser.add_argument("--few", type=int, default=4, help="targets that are also fitted one after the other")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--mixed-precision", action="store_true", help="with and without, too")
    parser.add_argument("--grow", action="store_true", help="other sizes, too")
    main(parser.parse_args())
