"""How long a fit takes from activations on disk, against the same fit from memory.

Rectified random activations of 2,048 dimensions go to a store, and one explainer (default recipe, n = 5) is fitted from
it and from memory, in turns in one process; the median of the ratios pair by pair, with the smallest and the largest.
Both give the same weights, bit by bit, or the script ends with an error. Then what the steps and the passes of a fit
ask for: 128 random rows, and all rows in chunks; from the tensor, from the store, and from NumPy's memory maps of its
files. "cold" is after the system was asked to drop the files from its cache, as where a store is larger than memory.

    python -m benchmarks.store
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from captum_xnn import SRAE, Recipe
from captum_xnn.activations import Activations, collect
from captum_xnn.activations._memmap import Rows, chunks
from captum_xnn.training._fitting import fit

BAR = 1.5
DIMENSIONS = 2048


def stored(folder: Path, examples: int) -> Activations:
    """Returns a store of the activations of a random layer, made in the folder if need be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, DIMENSIONS), nn.ReLU(), nn.Linear(DIMENSIONS, 1))
    g = torch.Generator().manual_seed(0)
    batches = (torch.randn(min(256, examples - i), 300, generator=g) for i in range(0, examples, 256))
    return collect(model, "1", batches, store=folder)


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def fits(found: Activations, steps: int, repeats: int) -> list[tuple[float, float]]:
    """Returns the seconds of each pair of fits, from memory and from the store."""
    y = found.y_hat[:]
    positives = y[:, 0] > y[:, 0].topk(max(2, len(y) // 100)).values[-1]
    tables = {"memory": found.Z[:], "store": found.Z}
    pairs, weights = [], {}
    for i in range(repeats):
        took = {}
        for name in sorted(tables, reverse=bool(i % 2)):
            srae = SRAE(DIMENSIONS, 5)
            took[name] = seconds(
                lambda srae=srae, name=name: fit(
                    srae, tables[name], y, positives=positives, recipe=Recipe(steps=steps), seed=0
                )
            )
            weights[name] = srae.state_dict()
        pairs.append((took["memory"], took["store"]))
        if not all(torch.equal(weights["memory"][k], weights["store"][k]) for k in weights["store"]):
            raise SystemExit("the two fits differ")
    return pairs


def dropped(folder: Path) -> None:
    """Asks the system to forget the contents of the store's files."""
    for file in folder.glob("*.npy") if hasattr(os, "posix_fadvise") else ():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(found: Activations, folder: Path, repeats: int) -> list[str]:
    """Returns lines on the milliseconds of reading 128 rows, and on the seconds of a pass over all of them."""
    Z, files = found.Z[:], sorted(folder.glob("Z-*.npy"))
    maps = [np.load(file, mmap_mode="r") for file in files]
    size = len(maps[0])
    g = torch.Generator().manual_seed(1)

    def from_maps(numbers: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([maps[i // size][i % size] for i in numbers.tolist()]))

    sources: dict[str, Callable[[Tensor], Tensor]] = {
        "tensor": Z.__getitem__,
        "store": found.Z.__getitem__,
        "memory maps": from_maps,
    }
    times: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(100 * repeats):
        numbers = torch.randint(len(Z), (128,), generator=g)
        for name, read in sources.items():
            times[name].append(1e3 * seconds(lambda read=read, numbers=numbers: read(numbers)))
    lines = [f"128 random rows, {name}: median {statistics.median(of):.2f} ms" for name, of in times.items()]
    maps.clear()  # mapped pages stay in the cache
    cold = []
    for _ in range(3 * repeats):
        dropped(folder)
        numbers = torch.randint(len(Z), (128,), generator=g)
        cold.append(1e3 * seconds(lambda numbers=numbers: found.Z[numbers]))
    lines.append(f"128 random rows, store, cold: median {statistics.median(cold):.2f} ms")

    def passed(table: Tensor | Rows) -> float:
        return seconds(lambda: [float(chunk.sum()) for chunk in chunks(table)])

    for name, table in (("tensor", Z), ("store", found.Z)):
        middle = statistics.median(passed(table) for _ in range(repeats))
        lines.append(f"a pass over {Z.numel() * 4 / 1e9:.2f} GB, {name}: median {middle:.2f} s")
    return lines


def main(examples: int, steps: int, repeats: int, folder: Path | None) -> None:
    """Prints all figures."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        where = folder or Path(temporary)
        found = stored(where, examples)
        pairs = fits(found, steps, repeats)
        ratios = sorted(disk / memory for memory, disk in pairs)
        middle = statistics.median(ratios)
        print(
            f"fit of {examples} x {DIMENSIONS}, {steps} steps: store / memory median {middle:.2f} ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}, {repeats} pairs), memory median {statistics.median(m for m, _ in pairs):.1f} s; bar "
            f"{BAR} {'ok' if middle <= BAR else 'ABOVE'}"
        )
        print("\n".join(reading(found, where, repeats)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=65_536)
    parser.add_argument("--steps", type=int, default=1200, help="of the recipe")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of fits")
    parser.add_argument("--folder", type=Path, help="for the store, to be kept; a temporary one otherwise")
    main(**vars(parser.parse_args()))
