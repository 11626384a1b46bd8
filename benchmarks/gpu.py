"""All figures that need a GPU, from one command of less than ten minutes.

    python -m benchmarks.gpu --out DIR
    python -m benchmarks.gpu --out DIR --device cpu --batch 2 --targets 1 3 --steps 20     # a trial without a GPU

Printed, and written to DIR/gpu.json after each part, with the name of the device:

explaining   images per second with five maps each, of a ResNet-50, with the peak of memory; for Captum's methods the
             ratio to a loop over Captum's own class; `attribute` with groups and with an SRAE beside its parts
fits         seconds of the SRAE for some numbers of targets at once, by target, against single fits, with the peak
waits        how often the host waits for the device: in each further step of a fit, in one call of `attribute`, and in
             each further map. Reading a number of a tensor is such a wait, and the profiler counts it on a CPU too.
             On a CPU the optimiser reads its counter for each tensor of weights, 14 in all; on a GPU it does not

A part that does not fit in the rest of --minutes is left out, and named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import explaining, many_targets
from benchmarks.backend_speed import K, composed
from benchmarks.excitation_speed import network
from captum_xnn import SRAE, Recipe
from captum_xnn.training._fitting import fit_together

WAITS = frozenset(
    {"aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
)


def waits(run: Callable[[], object], device: torch.device) -> Counter[str]:
    """Returns how often the host waits for the device, by kind."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        run()
    return Counter(event.name for event in seen.events() if event.name in WAITS)


def beyond(few: Counter[str], many: Counter[str], times: int) -> dict[str, float]:
    """Returns the waits for each of so many further steps."""
    return {name: (many[name] - few[name]) / times for name in sorted(WAITS) if many[name] or few[name]}


def peak(device: torch.device) -> float | None:
    """Returns the peak of the GPU's memory since the last call, in GiB."""
    if device.type != "cuda":
        return None
    found = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return found


def explain(model: nn.Module, layer: str, x: Tensor, repeats: int) -> dict[str, Any]:
    """Returns images per second of each backend, the ratio to a loop over Captum, and the parts of `attribute`."""
    found: dict[str, Any] = {}
    net = composed(model, layer, x).to(x.device)
    for name, (ours, loop) in explaining.jobs(net, x).items():
        runs = [ours] if loop is None else [ours, loop]
        for run in runs:
            run()
        peak(x.device)
        turns = [[explaining.rate(run, x) for run in runs] for _ in range(repeats)]
        found[name] = {"images_per_second": statistics.median(turn[0] for turn in turns), "peak_gib": peak(x.device)}
        if loop is not None:
            found[name]["to_captum"] = statistics.median(a / b for a, b in turns)
    for form in explaining.FORMS:
        own = explaining.calls(explaining.explainer(model, layer, x, form), x)
        for run in own.values():
            run()
        peak(x.device)
        found[form] = {
            name: statistics.median(explaining.seconds(run, x) for _ in range(repeats)) for name, run in own.items()
        }
        found[form]["peak_gib"] = peak(x.device)
    return found


def fits(targets: list[int], recipe: Recipe, device: torch.device, examples: int, width: int) -> list[dict[str, Any]]:
    """Returns the seconds of fits of some numbers of targets at once, and of a single fit in the same turn."""
    Z, y_hat = (t.to(device) for t in many_targets.drawn(examples, width, max(targets)))
    order = many_targets.chosen(y_hat, max(targets))
    many_targets.timed(Z, y_hat, order[:1], recipe, 5, together=True)
    found = []
    for count in targets:
        one = many_targets.timed(Z, y_hat, order[:1], recipe, 5, together=True)[0]
        peak(device)
        seconds = many_targets.timed(Z, y_hat, order[:count], recipe, 5, together=True)[0]
        found.append(
            {"targets": count, "seconds": seconds, "to_single": one * count / seconds, "peak_gib": peak(device)}
        )
    return found


def loops(model: nn.Module, layer: str, x: Tensor, width: int = 256) -> dict[str, dict[str, float]]:
    """Returns the waits of each further step of a fit, of a call of `attribute`, and of each further map."""
    device = x.device
    Z, y_hat = (t.to(device) for t in many_targets.drawn(300, width, 2))

    def fit(steps: int) -> Callable[[], object]:
        form = SRAE(width, 5).to(device)
        return lambda: fit_together([form], Z, [y_hat[:, :1]], recipe=Recipe(steps=steps))

    fit(2)()
    found = {"a step of a fit": beyond(waits(fit(30), device), waits(fit(40), device), 10)}  # two blocks of steps
    for form in explaining.FORMS:
        xnn = explaining.explainer(model, layer, x, form)
        xnn.attribute(x, target=0)
        one = waits(partial(xnn.attribute, x, target=0, feature=0), device)
        every = waits(partial(xnn.attribute, x, target=0), device)
        found[f"attribute, {form}"] = dict(every)
        found[f"a further map, {form}"] = beyond(one, every, K - 1)
    return found


def main(given: argparse.Namespace) -> dict[str, Any]:
    """Measures all parts, prints them, and writes them to DIR/gpu.json."""
    warnings.simplefilter("ignore")  # Captum says of every gradient that it set requires_grad
    begin, device = time.perf_counter(), torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "batch": given.batch}
    model = (given.network or network("resnet50")).to(device)
    x = torch.randn(given.batch, 3, given.pixels, given.pixels, device=device)
    recipe = Recipe(steps=given.steps)
    parts: dict[str, Callable[[], Any]] = {
        "waits": lambda: loops(model, given.layer, x[:2]),
        "explaining": lambda: explain(model, given.layer, x, given.repeats),
        **{
            f"fits of {count}": partial(fits, [count], recipe, device, given.examples, given.width)
            for count in given.targets
        },
    }
    for part, run in parts.items():
        minutes = (time.perf_counter() - begin) / 60
        found[part] = run() if minutes < given.minutes else f"left out after {minutes:.1f} minutes"
        print(part, json.dumps(found[part], indent=1), flush=True)
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--layer", default="avgpool")
    parser.add_argument("--targets", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later")
    parser.set_defaults(network=None)
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
