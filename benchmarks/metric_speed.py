"""How long part probabilities take, and how much memory orthogonality needs as images stream by.

1,000 images of 227 x 227 pixels, 15 parts, 5 maps each, in batches of 50; random maps and parts, boxes of half the
image. Printed are the median of several turns, and the highest resident size (Linux) of processes of their own.

    python -m benchmarks.metric_speed
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.excitation_speed import resident
from captum_xnn.metrics import part_probabilities
from captum_xnn.metrics._overlap import OrthogonalityStream

K, P, SIZE, BATCH = 5, 15, 227, 50
BAR = 5.0


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns maps, parts and boxes of 50 images."""
    g = torch.Generator().manual_seed(seed)
    maps, points = torch.rand(BATCH, K, SIZE, SIZE, generator=g), torch.rand(BATCH, P, 2, generator=g) * SIZE
    low = torch.rand(BATCH, 2, generator=g) * SIZE * 0.3
    return maps, points, torch.cat([low, low + 0.7 * SIZE], 1)


def seconds(images: int) -> float:
    """Returns how long part probabilities of some images take, without making up the images."""
    given, spent = batch(0), 0.0
    for _ in range(images // BATCH):
        begin = time.perf_counter()
        part_probabilities(*given)
        spent += time.perf_counter() - begin
    return spent


def peak(images: int) -> float:
    """Returns the MiB that the orthogonality of a stream needs at most; to be called in a fresh process."""
    stream = OrthogonalityStream()
    stream.update(batch(0)[0])
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for i in range(images // BATCH):
        stream.update(batch(i)[0])
    stream.compute()
    return resident("VmHWM") - before


def main(repeats: int, images: int) -> None:
    """Prints both."""
    seconds(BATCH)
    found = sorted(seconds(images) for _ in range(repeats))
    middle = statistics.median(found)
    print(
        f"part probabilities of {images} images: {middle:.1f} s ({found[0]:.1f} to {found[-1]:.1f}, {repeats} turns, "
        f"{torch.get_num_threads()} threads), bar {BAR} {'ok' if middle <= BAR else 'ABOVE'}"
    )
    for n in (images // 4, images):
        code = f"from benchmarks import metric_speed as m; print(m.peak({n}))"
        command, folder = [sys.executable, "-c", code], Path(__file__).parents[1]
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
        print(f"orthogonality of {n} images: {float(told):.0f} MiB, with one batch of {BATCH}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000)
    main(**vars(parser.parse_args()))
