"""How time and memory of `captum-xnn fit` grow with images and targets.

A convolutional network with random weights and a layer of 256 dimensions gives each class to ten images of 32 x 32
pixels, in files. One command fits x-features of all classes, with its activations in a store. It runs in a process with
one thread; printed are its seconds of the processor and its highest resident size, with imports and libraries.

    python -m benchmarks.fit_command --out DIR                               # 1,000 images and 100 targets
    python -m benchmarks.fit_command --out DIR --images 10000 --targets 1000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from benchmarks.growth import material

ROOT = Path(__file__).parents[1]
PIXELS, DIMENSIONS = 32, 256
NET = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
from benchmarks.growth import material

SIZE = {PIXELS}


def load():
    return material(0, {PIXELS}, {DIMENSIONS}, {{targets}})[0]
"""


def prepare(folder: Path, images: int, targets: int) -> None:
    """Writes the model's file and the images."""
    place = folder / "images"
    place.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NET.format(targets=targets))
    for i, x in enumerate(material(images, PIXELS, DIMENSIONS, targets)[1]):
        Image.fromarray((255 * x).byte().permute(1, 2, 0).numpy()).save(place / f"{i:06d}.png")


def measure(folder: Path) -> dict[str, float]:
    """Returns seconds of the processor, seconds on the clock and the highest resident size of a fit, in MiB."""
    given = {"--model": "net.py", "--data": "images", "--layer": "7", "--target": "all", "--store": "store"}
    arguments = [word for pair in given.items() for word in pair]
    command = [sys.executable, "-m", "captum_xnn", "fit", "--quiet", "--out", "explainers", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)  # tells the resources of this process alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"the fit failed: {(folder / 'log.txt').read_text()[-2000:]}")
    fitted = len(json.loads((folder / "explainers" / "explainer.json").read_text())["explainers"])
    return {
        "fitted": fitted,
        "processor": used.ru_utime + used.ru_stime,
        "clock": time.perf_counter() - begin,
        "peak": used.ru_maxrss / 1024,
    }


def main(out: Path, images: int, targets: int) -> None:
    """Prints the figures of one size."""
    folder = out / f"{images}-{targets}"
    torch.set_num_threads(1)
    prepare(folder, images, targets)
    found = measure(folder)
    print(
        f"{images:,} images, {targets:,} classes, {found['fitted']:,} fitted: {found['processor']:.0f} s of the "
        f"processor, {found['clock']:.0f} s on the clock, peak {found['peak']:,.0f} MiB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data and explainers")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--targets", type=int, default=100)
    main(**vars(parser.parse_args()))
