"""How the default form grows: time and memory of a fit, and time of explaining, over five sizes of the problem.

A convolutional network with random weights explains drawn images: each class has a pattern, and the head prefers its
own one. One size is changed at a time. Each line is measured in a process of its own, with one thread:

fit       processor seconds of a fit of all targets
memory    highest resident size during the fit beyond that before it, in MiB; the images are in memory before
explain   processor seconds of `attribute` for eight images of one target

    python -m benchmarks.growth --out DIR
    python -m benchmarks.growth --out DIR --docs docs      # also docs/tables/growth_groups.inc and the curves
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_xnn import XNNAttribution

USUAL = {"images": 1000, "size": 64, "width": 256, "targets": 4, "n": 5}
VALUES = {
    "images": (1000, 4000, 16000),
    "size": (32, 64, 128),
    "width": (64, 256, 1024),
    "targets": (1, 4, 16),
    "n": (2, 5, 20),
}
TITLES = {"images": "images", "size": "pixels along a side", "width": "dimensions", "targets": "targets", "n": "K"}


def material(images: int, size: int, width: int, targets: int) -> tuple[nn.Module, Tensor]:
    """Returns a network whose classes each see some of the images, and the images (N, 3, size, size)."""
    classes = max(targets, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, width), nn.ReLU()),
        ).eval()
        patterns = nn.functional.interpolate(torch.rand(classes, 3, 4, 4), (size, size))
        x = torch.empty(images, 3, size, size)
        for i in range(0, images, 100):
            own = patterns[torch.arange(i, min(i + 100, images)) % classes]
            x[i : i + 100] = (own + 0.1 * torch.randn(own.shape)).clamp(0, 1)
    with torch.no_grad():
        seen = body(patterns)
        head = nn.Linear(width, classes)
        away = seen - seen.mean(0)
        head.weight.copy_(20 * away / away.norm(dim=1, keepdim=True))
        head.bias.copy_(-head.weight @ seen.mean(0))
    return nn.Sequential(*body, head).eval(), x


def measure(images: int, size: int, width: int, targets: int, n: int) -> dict[str, float]:
    """Returns the figures of one size of the problem."""
    model, x = material(images, size, width, targets)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before, begin = resident("VmRSS"), time.process_time()
    xnn = XNNAttribution(model, "7", n).fit(x, target=list(range(targets)), progress=False)
    fit, after = time.process_time() - begin, resident("VmHWM")
    xnn.attribute(x[:8], target=0)
    begin = time.process_time()
    xnn.attribute(x[:8], target=0)
    return {"fit": fit, "memory": max(0.0, after - before), "explain": time.process_time() - begin}


def resident(kind: str) -> float:
    """Returns the resident size of this process on Linux in MiB, now (VmRSS) or at most (VmHWM)."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told[kind].split()[0]) / 1024


def lines(values: Mapping[str, tuple[int, ...]], usual: dict[str, int], out: Path) -> list[dict[str, float]]:
    """Returns the figures of all sizes, and keeps them in a file, from which a further run goes on."""
    path = out / "growth.json"
    found: list[dict[str, float]] = json.loads(path.read_text()) if path.exists() else []
    for name, some in values.items():
        for value in some:
            size: dict[str, float] = {**usual, name: value}
            if any(all(line[k] == v for k, v in size.items()) for line in found):
                continue
            command = [sys.executable, "-m", "benchmarks.growth", "--one", json.dumps(size)]
            told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
            found.append(size | json.loads(told.stdout.splitlines()[-1]))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def table(found: list[dict[str, float]]) -> str:
    """Returns the figures as a table in reStructuredText."""
    heads = ["images", "pixels", "dimensions", "targets", "K", "fit, s", "memory, MiB", "explain, s"]
    rows = [
        [f"{line[k]:,}" for k in USUAL] + [f"{line['fit']:.1f}", f"{line['memory']:.0f}", f"{line['explain']:.2f}"]
        for line in found
    ]
    cells = ["\n".join(f"   {'* -' if i == 0 else '  -'} {c}" for i, c in enumerate(row)) for row in [heads, *rows]]
    return "\n".join([".. list-table::", "   :header-rows: 1", "", *cells]) + "\n"


def draw(found: list[dict[str, float]], path: Path) -> None:
    """Draws curves of time and memory over each size."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(2, len(VALUES), sharey="row")
    for column, name in enumerate(VALUES):
        own = sorted(
            (ln for ln in found if all(ln[k] == USUAL[k] for k in USUAL if k != name)), key=lambda ln: ln[name]
        )
        x = [line[name] for line in own]
        axes[0, column].loglog(x, [line["fit"] for line in own], "o-", label="fit")
        axes[0, column].loglog(x, [line["explain"] for line in own], "s--", label="explain 8 images")
        axes[1, column].semilogx(x, [line["memory"] for line in own], "o-")
        axes[1, column].set_xlabel(TITLES[name])
        for ax in axes[:, column]:
            ax.set_xticks(x, [f"{value:,}" for value in x])
            ax.minorticks_off()
    axes[1, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("processor seconds")
    axes[1, 0].set_ylabel("memory, MiB")
    axes[0, 0].legend(fontsize="small")
    rcParams["svg.hashsalt"] = "growth"
    figure.savefig(path, metadata={"Date": None})


def main(given: argparse.Namespace) -> None:
    """Measures, prints the table, and writes it with its curves."""
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(measure(**json.loads(given.one))))
        return
    found = lines(VALUES, USUAL, given.out)
    print(table(found))
    if given.docs:
        (given.docs / "tables" / "growth_groups.inc").write_text(table(found))
        draw(found, given.docs / "_static" / "growth_groups.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("growth"), help="folder of results, from which a run goes on")
    parser.add_argument("--docs", type=Path, help="folder of the docs, which gets the table and the curves")
    parser.add_argument("--one", help="one size as JSON, in this process")
    main(parser.parse_args())
