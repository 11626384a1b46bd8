"""How many images are explained per second with five maps each, against the same work done by a loop over Captum.

A ResNet-50 of torchvision with random weights, 224 x 224 pixels, with x-features of a random encoder at its last
pooling layer. The default backend has no equal in Captum; of the others the loop calls Captum's own class on the whole
batch, for one x-feature after the other. Both take turns, and the medians are printed, with the peak of the GPU's
memory.

    python benchmarks/explaining.py
    python benchmarks/explaining.py --device cuda --batch 64
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from backend_speed import K, composed
from captum.attr import Attribution, InputXGradient, IntegratedGradients, Saliency
from excitation_speed import network
from torch import Tensor

from captum_xnn.heatmaps import ExcitationMaps, FromCaptum
from captum_xnn.heatmaps._network import ExplanationNetwork

METHODS: dict[str, tuple[type[Attribution], dict[str, int]]] = {
    "Saliency": (Saliency, {}),
    "InputXGradient": (InputXGradient, {}),
    "IntegratedGradients": (IntegratedGradients, {"n_steps": 8}),
}
LAYER = "avgpool"


def rate(run: Callable[[], object], x: Tensor) -> float:
    """Returns images per second."""
    begin = time.perf_counter()
    run()
    if x.is_cuda:
        torch.cuda.synchronize()
    return len(x) / (time.perf_counter() - begin)


def jobs(net: ExplanationNetwork, x: Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object] | None]]:
    """Returns by backend what draws all maps here, and in a loop over Captum."""
    default = ExcitationMaps()
    found: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
        "ExcitationBP": (lambda: default(net, (x,), range(K)), None)
    }
    for name, (method, settings) in METHODS.items():
        backend, captums = FromCaptum(method, **settings), method(net)

        def ours(backend: FromCaptum = backend) -> object:
            return backend(net, (x,), range(K), internal_batch_size=len(x))

        def loop(captums: Attribution = captums, settings: dict[str, int] = settings) -> object:
            return [captums.attribute(x, target=k, **settings) for k in range(K)]

        found[name] = ours, loop
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # Captum says of every gradient that it set requires_grad
    x = torch.randn(given.batch, 3, 224, 224)
    net = composed(network("resnet50"), LAYER, x).to(given.device)
    x = x.to(given.device)
    where = torch.cuda.get_device_name() if x.is_cuda else f"{torch.get_num_threads()} threads"
    print(f"batch {len(x)}, {K} maps each, {where}, medians of {given.repeats} turns, in images per second")
    for name, (ours, loop) in jobs(net, x).items():
        runs = [ours] if loop is None else [ours, loop]
        for run in runs:
            rate(run, x)
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        turns = [[rate(run, x) for run in runs] for _ in range(given.repeats)]
        here, *captum = (statistics.median(column) for column in zip(*turns, strict=True))
        text = f"  {name:<20} {here:8.2f}"
        if captum:
            ratio = statistics.median(a / b for a, b in turns)
            text += f"  loop over Captum {captum[0]:8.2f}  ratio {ratio:.2f}"
        if x.is_cuda:
            text += f"  peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
        print(text, flush=True)


if __name__ == "__main__":
    main()
