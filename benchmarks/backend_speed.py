"""What the maps of five x-features cost by a gradient backend, and what leaving the model early saves.

A VGG16 of torchvision with random weights, 112 x 112 pixels, explained at a convolutional layer and at its first fully
connected one. All runs take turns; printed are medians of ratios taken within a turn:

backend      five maps of N images, to one map of 5 N images by the same backend
, Captum     the same, to Captum's own class on 5 N images; DeepLift on the model's twin made of modules, as on the
             model itself Captum 0.9 is wrong where a max-pooling follows a ReLU
early exit   the x-features from the convolutional layer, to a forward pass of the whole model

    python -m benchmarks.backend_speed
    python -m benchmarks.backend_speed --memory

The C library gives large blocks back to the system, and fetching them anew costs more than what is compared here: the
script starts itself again with glibc told to keep them.

``--memory`` prints what maps need beyond what goes in and comes out, with and without an internal_batch_size, as the
highest resident size of processes of their own (Linux).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from captum.attr import Attribution, DeepLift, InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from benchmarks.excitation_speed import network, resident
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.heatmaps._canonical import canonical
from captum_xnn.heatmaps._missing_rules import needs_modules
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._trace import trace
from captum_xnn.models import SRAE

BACKENDS: dict[str, tuple[type[Attribution], dict[str, Any]]] = {
    "Saliency": (Saliency, {}),
    "InputXGradient": (InputXGradient, {}),
    "IntegratedGradients": (IntegratedGradients, {"n_steps": 4}),
    "DeepLift": (DeepLift, {}),
}
K = 5
BAR = 1.1


def composed(model: nn.Module, layer: str, x: Tensor) -> ExplanationNetwork:
    """Returns a network from images to five x-features of a random encoder."""
    module = find_layer(model, layer)[1]
    found = trace(model, module, (x[:1],))
    with torch.no_grad():
        width = ExplanationNetwork(model, layer, SRAE(1, K, hidden=()), trace=found).activations(x[:1]).numel()
    return ExplanationNetwork(model, layer, SRAE(width, K, hidden=(16,)).eval(), trace=found)


def timed(run: Callable[[], object]) -> float:
    """Returns milliseconds."""
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def ratio(name: str, one: Callable[[], object], other: Callable[[], object], repeats: int, bar: float) -> None:
    """Prints the median ratio of two runs that take turns."""
    one(), other()
    found = sorted(timed(one) / timed(other) for _ in range(repeats))
    middle = statistics.median(found)
    verdict = "ok" if middle <= bar else "ABOVE"
    print(f"  {name:<30}{middle:6.3f}  ({found[0]:.3f} to {found[-1]:.3f})  bar {bar} {verdict}", flush=True)


def runs(
    net: ExplanationNetwork, x: Tensor, method: type[Attribution], settings: dict[str, Any]
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
    """Returns what draws the maps of all x-features, and on as many images one map each, by backend and by Captum."""
    backend, many, targets = FromCaptum(method, **settings), x.repeat_interleave(K, 0), list(range(K)) * len(x)
    right = canonical(net, (x[:1],)) if needs_modules(method) else net
    return (
        lambda: backend(net, (x,), range(K)),
        lambda: backend(net, (many,), [0]),
        lambda: method(right).attribute(many.clone(), target=targets, **settings),
    )


def compare(repeats: int, batch: int, backends: list[str]) -> None:
    """Prints all ratios."""
    model, x = network("vgg16"), torch.randn(batch, 3, 112, 112)
    print(f"batch {batch}, {torch.get_num_threads()} threads, {repeats} turns")
    for layer in ("features.23", "classifier.0"):
        print(f"five maps at {layer}, to one map of five times as many images")
        net = composed(model, layer, x)
        for name, (method, settings) in ((name, BACKENDS[name]) for name in backends):
            ours, same, captums = runs(net, x, method, settings)
            ratio(name, ours, same, repeats, BAR)
            ratio(f"{name}, Captum", ours, captums, repeats, BAR)
    early = composed(model, "features.23", x)
    with torch.no_grad():
        print("x-features of features.23, to the whole model")
        ratio("early exit", lambda: early(x), lambda: model(x), repeats, 1.0)


def peak(images: int, features: int, size: int | None) -> float:
    """Returns the MiB that maps need at most, beyond model, inputs and the maps; to be called in a fresh process."""
    model, x = network("vgg16"), torch.randn(images, 3, 112, 112)
    net = composed(model, "features.23", x)
    backend = FromCaptum(InputXGradient)
    backend(net, (x[:1],), range(1))  # what is kept for later calls
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = resident("VmRSS")
    (maps,) = backend(net, (x,), range(features), internal_batch_size=size)
    return resident("VmHWM") - before - maps.numel() * maps.element_size() / 2**20


def memory() -> None:
    """Prints the memory of several sizes, each from a process of its own."""
    print("MiB beyond model, inputs and maps, InputXGradient at features.23")
    for size in (None, 2):
        for images, features in ((4, 1), (4, 5), (16, 5), (48, 5)):
            if size is None and images > 16:
                continue
            code = f"from benchmarks import backend_speed as b; print(b.peak({images}, {features}, {size}))"
            folder = Path(__file__).parents[1]
            told = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
            print(f"  internal_batch_size={size}: {images} images, {features} maps each: {float(told.stdout):.0f}")


# Of glibc, in bytes: blocks up to the first come from memory that is kept up to the second.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def main() -> None:
    """Prints what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.memory:
        memory()
    elif not KEEP.keys() <= os.environ.keys():
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.backend_speed", *sys.argv[1:]], {**os.environ, **KEEP}
        )
    else:
        compare(given.repeats, given.batch, given.backends)


if __name__ == "__main__":
    main()
