"""What excitation backprop costs beside a saliency map of the same model, in time and in memory.

VGG16 and ResNet-50 of torchvision with random weights, 224 x 224 pixels. All runs take turns in one process; printed
are medians, in milliseconds, and the median over turns of ratios taken within a turn:

saliency     forward pass, and backward pass to the input
forward      forward pass without gradients
layer        one c-MWP to the layer of the method's authors (VGG16 features.23, ResNet-50 layer3)
layer, MWP   the same without contrast
input        one c-MWP to the pixels; and without contrast
K = 5        five targets at once, against five times one target
further      each of the four further targets to the pixels, against a backward pass to the input

    python -m benchmarks.excitation_speed --threads 1 2 --batches 1 8
    python -m benchmarks.excitation_speed --device cuda --batches 1 64
    python -m benchmarks.excitation_speed --memory

Memory is the highest resident size of a process of its own, beyond what it holds with the model loaded; on CUDA the
most that the allocator gave out, beyond the model.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_xnn import ExcitationBP, LayerExcitationBP

LAYERS = {"vgg16": "features.23", "resnet50": "layer3"}
BARS = {
    "vgg16": {
        "layer": 1.2,
        "input": 1.6,
        "layer / MWP": 1.1,
        "input / MWP": 1.1,
        "layer, K=5": 0.27,
        "input, K=5": 0.48,
        "further": 1.0,
    },
    "resnet50": {
        "layer": 0.75,
        "input": 1.6,
        "layer / MWP": 1.1,
        "input / MWP": 1.1,
        "layer, K=5": 0.32,
        "input, K=5": 0.48,
        "further": 1.0,
    },
}
TARGETS = [0, 1, 2, 3, 4]
_LIBRARY: list[torch.library.Library] = []


def network(name: str) -> nn.Module:
    """Returns a network of torchvision with random weights."""
    if not hasattr(torch.ops.torchvision, "nms"):
        # A torchvision built for CUDA does not import beside a torch without it, unless its operators are declared.
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARY.append(library)
    import torchvision

    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    return model.eval()


def saliency(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the gradient of output 0 with respect to the input."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the output, without gradients."""
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def jobs(name: str, model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """Returns what is timed, by name."""
    layer, mwp_layer = (LayerExcitationBP(model, LAYERS[name], contrastive=c) for c in (True, False))
    pixels, mwp_pixels = (ExcitationBP(model, contrastive=c) for c in (True, False))
    return {
        "saliency": lambda: saliency(model, x),
        "forward": lambda: forward(model, x),
        "layer": lambda: layer.attribute(x, 0),
        "layer, MWP": lambda: mwp_layer.attribute(x, 0),
        "layer, K=5": lambda: layer.attribute_targets(x, TARGETS),
        "input": lambda: pixels.attribute(x, 0),
        "input, MWP": lambda: mwp_pixels.attribute(x, 0),
        "input, K=5": lambda: pixels.attribute_targets(x, TARGETS),
    }


def timed(run: Callable[[], object], device: str) -> float:
    """Returns milliseconds."""
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def ratios(turn: dict[str, float]) -> dict[str, float]:
    """Returns the ratios of one turn that have a bar."""
    return {
        "layer": turn["layer"] / turn["saliency"],
        "input": turn["input"] / turn["saliency"],
        "layer / MWP": turn["layer"] / turn["layer, MWP"],
        "input / MWP": turn["input"] / turn["input, MWP"],
        "layer, K=5": turn["layer, K=5"] / (5 * turn["layer"]),
        "input, K=5": turn["input, K=5"] / (5 * turn["input"]),
        "further": (turn["input, K=5"] - turn["input"]) / 4 / (turn["saliency"] - turn["forward"]),
    }


def compare(name: str, batch: int, repeats: int, device: str) -> None:
    """Prints times and ratios of one network."""
    model, x = network(name).to(device), torch.randn(batch, 3, 224, 224, device=device)
    each = jobs(name, model, x)
    for run in each.values():
        timed(run, device)
    turns = [{job: timed(run, device) for job, run in each.items()} for _ in range(repeats)]
    print(f"\n{name}, batch {batch}, {torch.get_num_threads()} threads, {device}, {repeats} turns", flush=True)
    print("  " + ", ".join(f"{job} {statistics.median(t[job] for t in turns):.0f} ms" for job in each))
    found = [ratios(turn) for turn in turns]
    for ratio, bar in BARS[name].items():
        values = sorted(f[ratio] for f in found)
        middle = statistics.median(values)
        print(
            f"  {ratio:<14}{middle:6.3f}  ({values[0]:.3f} to {values[-1]:.3f})  bar {bar:<5} {_verdict(middle, bar)}"
        )
    sys.stdout.flush()


def _verdict(value: float, bar: float) -> str:
    return "ok" if value <= bar else "ABOVE"


def peak(name: str, job: str, batch: int, device: str) -> float:
    """Returns the MiB that a job needs at most, beyond the model; to be called in a process of its own."""
    model, x = network(name).to(device), torch.randn(batch, 3, 224, 224, device=device)
    run = jobs(name, model, x)[job]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # What building the model needed at most is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return max(0.0, resident("VmHWM") - before)  # the kernel counts the former in portions of some pages


def resident(kind: str) -> float:
    """Returns the resident size of this process on Linux in MiB, now (VmRSS) or at most (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) / 1024


def compare_memory(name: str, batch: int, device: str) -> None:
    """Prints the memory of saliency and of excitation backprop, each from a new process."""
    needed = {}
    for job in ("saliency", "layer", "input"):
        command = [
            sys.executable,
            "-m",
            "benchmarks.excitation_speed",
            "--device",
            device,
            "--peak",
            name,
            job,
            str(batch),
        ]
        needed[job] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    largest = max(p.numel() for p in network(name).parameters()) * 4 / 2**20
    print(f"\n{name}, batch {batch}, {device}: saliency {needed['saliency']:.0f} MiB beyond the model")
    for job in ("layer", "input"):
        bar = 1.3 * needed["saliency"] + largest
        print(
            f"  {job:<6} {needed[job]:6.0f} MiB = {needed[job] / needed['saliency']:.2f} x; bar 1.3 x + the largest "
            f"weight ({largest:.0f} MiB) = {bar:.0f} MiB {_verdict(needed[job], bar)}",
            flush=True,
        )


def main(
    networks: list[str],
    batches: list[int],
    threads: list[int],
    repeats: int,
    device: str,
    memory: bool,
    peak_of: list[str] | None,
) -> None:
    """Prints everything that was asked for."""
    if peak_of:
        print(peak(peak_of[0], peak_of[1], int(peak_of[2]), device))
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}")
    for name in networks:
        for batch in batches:
            if memory:
                compare_memory(name, batch, device)
                continue
            for count in threads:
                torch.set_num_threads(count)
                compare(name, batch, repeats, device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="compare memory and not time")
    parser.add_argument("--peak", dest="peak_of", nargs=3, metavar=("NETWORK", "JOB", "BATCH"), help=argparse.SUPPRESS)
    main(**vars(parser.parse_args()))
