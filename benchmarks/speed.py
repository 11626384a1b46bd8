"""How long collecting activations and fitting one explainer take.

Collecting: `collect` against a plain inference loop over the same loader, in turns in one process; the median of the
ratios pair by pair, with the smallest and the largest. The model is a VGG-like CNN with random weights on 3 x 96 x 96
images from a TensorDataset, so that reading images costs nothing and the overhead shows.

Fitting: the default recipe, n = 5, on 8,050 examples x 2,048 dimensions of rectified random activations, 50 positives.

    python -m benchmarks.speed
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_xnn import SRAE
from captum_xnn.activations import collect
from captum_xnn.training._fitting import fit


def cnn() -> nn.Module:
    """Returns a VGG-like network with random weights, 2,048 units in its fully connected layer."""
    widths = (3, 32, 64, 128)
    blocks = [
        m
        for i, o in itertools.pairwise(widths)
        for m in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    ]
    head = (nn.Flatten(), nn.Linear(128 * 12 * 12, 2048), nn.ReLU(inplace=True), nn.Linear(2048, 100))
    return nn.Sequential(*blocks, *head).eval()


def collecting(images: int, repeats: int) -> list[float]:
    """Returns the ratios of collecting to plain inference, one for each pair of runs."""
    model = cnn()
    loader = DataLoader(TensorDataset(torch.rand(images, 3, 96, 96)), batch_size=32)

    def plain() -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            torch.cat([model(batch) for (batch,) in loader])
        return time.perf_counter() - begin

    def collected() -> float:
        begin = time.perf_counter()
        collect(model, "10", loader)
        return time.perf_counter() - begin

    plain(), collected()
    pairs = [(plain(), collected()) if i % 2 else (collected(), plain())[::-1] for i in range(repeats)]
    return [with_hook / without for without, with_hook in pairs]


def fitting(repeats: int) -> list[float]:
    """Returns the seconds of each fit."""
    generator = torch.Generator().manual_seed(0)
    Z = (torch.randn(8050, 300, generator=generator) @ torch.randn(300, 2048, generator=generator) / 17 - 0.8).relu()
    w = torch.randn(2048, generator=generator) * (torch.rand(2048, generator=generator) < 0.1)
    y = (Z @ w)[:, None]
    positives = torch.zeros(8050, dtype=torch.bool)
    positives[y[:, 0].topk(50).indices] = True
    seconds = []
    for seed in range(repeats):
        begin = time.perf_counter()
        fit(SRAE(2048, 5), Z, y, positives=positives, seed=seed)
        seconds.append(time.perf_counter() - begin)
    return seconds


def main(images: int, repeats: int, fits: int) -> None:
    """Prints both tables."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    ratios = sorted(collecting(images, repeats))
    print(
        f"collecting / plain inference, {images} images: median {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {repeats} pairs)"
    )
    seconds = sorted(fitting(fits))
    print(
        f"fitting 8,050 x 2,048: median {statistics.median(seconds):.1f} s "
        f"({seconds[0]:.1f} to {seconds[-1]:.1f}, {fits} fits)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--fits", type=int, default=3)
    main(**vars(parser.parse_args()))
