"""Fig. 7: what each x-feature's map has of each part of one bird, by single pixels and by Algorithm 1.

The SRAE is fitted to the image's class as for Table 1. Written to OUT: figure.png with the image, its parts and maps
above the two bar charts, table.md and table.json with the numbers. --image picks one of the class's test images; the
class is the first of the data set, unless --name says otherwise.

    python -m benchmarks.part_probabilities --root CUB_200_2011 --network FILE.py --layer relu6 --out DIR
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks import birds, one_vs_all
from benchmarks.birds import Birds
from benchmarks.runs import write
from captum_xnn.datasets._parts import PartsSample
from captum_xnn.metrics import part_probabilities
from captum_xnn.metrics._localisation import pixel_probabilities
from captum_xnn.models._base import encode_all


def at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Returns the pixel probabilities (N, K, P) of maps (N, K, H, W) where the parts are; 0 where invisible."""
    probabilities = pixel_probabilities(maps).double()
    height, width = maps.shape[2:]
    visible = points.isfinite().all(2)
    at = torch.where(visible[..., None], points, 0).long()
    rows, columns = at[..., 1].clamp(0, height - 1), at[..., 0].clamp(0, width - 1)
    picked = torch.stack([p[:, r, c] for p, r, c in zip(probabilities, rows, columns, strict=True)])
    return torch.where(visible[:, None], picked, 0)


def explained(of: Birds, label: int, which: int, seed: int) -> tuple[PartsSample, Tensor, Tensor]:
    """Returns one test image of a class, the maps of its x-features (1, K, H, W), and their contributions (1, K)."""
    train, _, rows = birds.split(of.images.labels, label)
    row = rows[which : which + 1]
    sample = default_collate([of.images[i] for i in row.tolist()])
    xnn = one_vs_all.fitted("SRAE", of.Z[train], of.y_hat[train], label, seed)
    maps = one_vs_all.excitation_maps(xnn, of.model, of.layer, sample.image)
    return sample, maps, xnn.contributions(encode_all(xnn, of.Z[row]))


def drawn(sample: PartsSample, maps: Tensor, contributions: Tensor, parts: list[str], tables: list[Tensor]) -> Figure:
    """Returns the figure: image with parts and maps, then a bar chart for each table (K, parts)."""
    K = len(tables[0])
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(3, K + 1)
    image = sample.image[0].permute(1, 2, 0)
    image = (image - image.min()) / (image.max() - image.min())
    for k in range(-1, K):
        axes: Any = figure.add_subplot(grid[0, k + 1])
        axes.imshow(image if k < 0 else image.mean(2), cmap=None if k < 0 else "gray")
        if k >= 0:
            axes.imshow(maps[0, k], cmap="inferno", alpha=0.6)
        axes.plot(*sample.points[0].T, "c.", markersize=4)
        axes.set_title("image, parts" if k < 0 else f"x-feature {k + 1}\n{contributions[0, k]:+.2f}", fontsize=9)
        axes.set_axis_off()
    titles = ("(a) at the pixel of each part", "(b) Algorithm 1: all pixels nearest to the part, by distance")
    for row, (title, table) in enumerate(zip(titles, tables, strict=True), 1):
        axes = figure.add_subplot(grid[row, :])
        for k, values in enumerate(table):
            axes.bar(
                torch.arange(len(values)) + (k - (K - 1) / 2) * 0.8 / K, values, 0.8 / K, label=f"x-feature {k + 1}"
            )
        axes.set_xticks(range(len(table[0])), parts[: len(table[0])], rotation=30, ha="right", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("probability")
    axes.legend(fontsize=8)
    return figure


def main(given: argparse.Namespace) -> None:
    """Measures one image, and writes figure and table."""
    of = birds.read_options(given)
    names = {name: label for label, name in of.images.classes.items()}
    label = names[given.name] if given.name else int(of.images.labels.min())
    sample, maps, contributions = explained(of, label, given.image, given.seed)
    parts = [*of.images.part_names, "context"]
    tables = [at_points(maps, sample.points)[0], part_probabilities(maps, sample.points, sample.box)[0]]
    given.out.mkdir(parents=True, exist_ok=True)
    drawn(sample, maps, contributions, parts, tables).savefig(given.out / "figure.png", dpi=120)
    K = len(tables[0])
    rows = [f"| part | {' | '.join(f'{kind} {k + 1}' for kind in ('pixel', 'part') for k in range(K))} |"]
    rows.append("|---" * (2 * K + 1) + "|")
    for p, part in enumerate(parts):
        cells = [f"{table[k, p]:.2g}" if p < table.shape[1] else "" for table in tables for k in range(K)]
        rows.append(f"| {part} | {' | '.join(cells)} |")
    text = f"{of.images.classes[label]}, {of.images.names[int(sample.number)]}\n\n" + "\n".join(rows)
    write(given.out, text, {"pixels": tables[0].tolist(), "parts": tables[1].tolist(), "names": parts})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--name", help="of the class, as classes.txt has it")
    parser.add_argument("--image", type=int, default=0, help="which of the class's test images")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
