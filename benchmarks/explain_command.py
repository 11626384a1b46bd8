"""What `captum-xnn explain` takes beside the same work from Python.

A ResNet-18 of torchvision with random weights explains pictures of 224 x 224 pixels. The command and a script take
turns, each in a new process with one thread. Both import, load model and explainers, read the images, explain the
target with the highest output, and write a picture, the maps and a line of JSON for each image. Printed are medians in
seconds of the processor, with the lowest and the highest, and ratios within turns:

all          so many images, with imports and loading
further      the same, less what one image takes: imports and loading cancel

    python -m benchmarks.explain_command
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NET = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
from benchmarks.excitation_speed import network

MEAN, STD, SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224


def load():
    return network("resnet18")
"""
# A user's script: what the command writes, in as few lines as it takes.
SCRIPT = """
import json
import sys
from pathlib import Path

import net
import numpy as np
import torch
from PIL import Image

from captum_xnn import XNNAttribution

explainers, data, out, *targets = sys.argv[1:]
for name in ("maps", "pictures"):
    Path(out, name).mkdir(parents=True)
model, (mean, std) = net.load(), (torch.tensor(v)[:, None, None] for v in (net.MEAN, net.STD))
xnn = XNNAttribution.load(explainers, model)
files = sorted(Path(data).iterdir())
images = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1) / 255 for f in files])
x, targets = (images - mean) / std, torch.tensor([int(t) for t in targets])
with torch.no_grad():
    best = targets[model(x)[:, targets].argmax(1)]
why = xnn.explain(x, best)
lines = []
for i, file in enumerate(files):
    np.save(f"{out}/maps/{file.stem}.npy", why.maps[i].numpy())
    why.show(i, title=file.name, mean=net.MEAN, std=net.STD).savefig(f"{out}/pictures/{file.stem}.png", dpi=120)
    numbers = {name: getattr(why, name)[i].tolist() for name in ("contributions", "features", "bias", "surrogate")}
    lines.append(json.dumps({"name": file.name, "sentence": why.sentence(i), **numbers}) + "\\n")
Path(out, "explanations.jsonl").write_text("".join(lines))
"""
TARGETS = (0, 1, 2)


def prepare(folder: Path, images: int) -> None:
    """Writes the model's file, the script, folders of images, and explainers with their configuration."""
    from functools import partial

    import torch
    from PIL import Image

    from benchmarks.excitation_speed import network
    from benchmarks.report_speed import pictures
    from captum_xnn import XNNAttribution
    from captum_xnn.cli import Configuration
    from captum_xnn.models import ContributionGroups

    (folder / "net.py").write_text(NET)
    (folder / "script.py").write_text(SCRIPT)
    x = pictures(max(images, 8))  # eight to fit
    for some in (images, 1):
        (folder / f"{some}").mkdir()
        for i, picture in enumerate(x[:some]):
            Image.fromarray((255 * picture).byte().permute(1, 2, 0).numpy()).save(folder / f"{some}" / f"{i:03d}.png")
    few = partial(ContributionGroups, positives=2, others=2, grid=4)
    xnn = XNNAttribution(network("resnet18"), "avgpool", autoencoder=few)
    xnn.fit(x[:8], list(TARGETS), positives=torch.ones(8, dtype=torch.bool), progress=False)
    Configuration(model=str(folder / "net.py"), layer="avgpool", device="cpu").write(xnn.save(folder / "explainers"))


def seconds(command: list[str], folder: Path) -> float:
    """Returns the seconds of the processor that a command takes, with the system's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(images: int, out: str) -> dict[str, list[str]]:
    """Returns the command and the call of the script, for the folder of so many images."""
    options = ["--quiet", "--explainer", "explainers", "--data", f"{images}", "--out", out]
    return {
        "command": [sys.executable, "-m", "captum_xnn", "explain", *options],
        "script": [sys.executable, "script.py", "explainers", f"{images}", out, *map(str, TARGETS)],
    }


def turn(folder: Path, images: int) -> tuple[float, float]:
    """Returns the seconds of the command and of the script."""
    found = []
    for name, command in commands(images, "out").items():
        found.append(seconds(command, folder))
        written = len(list((folder / "out" / "pictures").iterdir()))
        if written != images:
            raise SystemExit(f"the {name} wrote {written} pictures, expected {images}")
        shutil.rmtree(folder / "out")
    return found[0], found[1]


def line(name: str, turns: list[tuple[float, float]]) -> str:
    """Returns a line with both medians and their ratio."""
    texts = []
    for title, values in (
        ("command", [a for a, _ in turns]),
        ("script", [b for _, b in turns]),
        ("ratio", [a / b for a, b in turns]),
    ):
        texts.append(f"{title} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    return f"{name:<8} {'  '.join(texts)}"


def main(images: int, repeats: int) -> None:
    """Prints the figures."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), images)
        every, one = [], []
        for _ in range(repeats):
            every.append(turn(Path(folder), images))
            one.append(turn(Path(folder), 1))
    print(f"{images} images, {repeats} turns, seconds of the processor")
    print(line("all", every))
    print(line("further", [(a - c, b - d) for (a, b), (c, d) in zip(every, one, strict=True)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=29)
    parser.add_argument("--repeats", type=int, default=5)
    main(**vars(parser.parse_args()))
