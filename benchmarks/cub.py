"""Table 1: faithfulness, orthogonality and locality of one-vs-all explainers on CUB-200-2011.

For each class, a form of explanation network learns from five sixths of its images (50 of 60) and 80 % of the
others; the rest is test data. Maps are drawn of the class's test images, by the default backend. Every method and class
is a line of OUT/results.jsonl, and a run with the same OUT goes on where the last one stopped. Printed, and written to
OUT, is the mean over the classes with its 95 % confidence interval, beside the paper's value (VGG19, 200 classes):

F_reg     mean |surrogate - prediction|, in logits, on training and test data
F_cls     share of examples whose predicted class stays
eff       effective number of x-features: exp of the entropy of their mean absolute contributions, on the test images
O1, O2    overlap of the x-features' maps, and weighted by contribution
locality  entropy of the parts that an x-feature's maps fall on, in nats, and weighted by contribution

    python -m benchmarks.cub --root CUB_200_2011 --network FILE.py --layer relu6 --classes 30 --out DIR

FILE.py offers ``load()`` and the MEAN and STD of its inputs. For the paper's model:
``--torchvision vgg19 --weights FILE --layer classifier.0``, with 224 x 224 pixels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from captum_xnn import SRAE, OneHeatmap
from captum_xnn.activations import collect
from captum_xnn.autoencoder import Autoencoder
from captum_xnn.baselines import CAE, NMF, NN, SAE, Lasso, RandomDecoder, RandomEncoder, SingleDimensions
from captum_xnn.datasets.cub import CUB200
from captum_xnn.datasets.parts import PartsSample, collate
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.host import find_layer, trace
from captum_xnn.metrics.faithfulness import f_cls, f_reg
from captum_xnn.metrics.locality import mean_locality, part_probabilities
from captum_xnn.metrics.orthogonality import orthogonality
from captum_xnn.metrics.sparsity import effective_number
from captum_xnn.network import ExplanationNetwork
from captum_xnn.training import encode_all, fit

POSITIVE_SHARE, NEGATIVE_SHARE, SEED, N_FEATURES, DIMENSIONS = 5 / 6, 0.8, 2021, 5, 20

PAPER: dict[str, dict[str, float]] = {
    "SRAE": {"train": 0.0812, "test": 0.1659, "f_cls": 0.9999, "o1": 0.6554, "o2": 2.4312, "locality": 1.9713},
    "NN": {"train": 0.0696, "test": 0.1304, "f_cls": 1.0, "o1": 0.9765, "o2": 4.9112, "locality": 2.4360},
    "SAE": {"train": 0.0972, "test": 0.1981, "f_cls": 0.9998, "o1": 0.8794, "o2": 3.5057, "locality": 2.1997},
    "CAE": {"train": 4.1513, "test": 4.0021, "f_cls": 0.6928, "o1": 0.6301, "o2": 2.3884, "locality": 2.1227},
    "Lasso": {"train": 3.5785, "test": 3.7928, "f_cls": 0.7153, "o1": 1.2052, "o2": 3.9851, "locality": 2.1082},
    "Z": {"locality": 1.9685},
    "1-Heatmap": {"locality": 2.5659},
}


def some_dimensions(shape: Any, n_features: int, *, n_outputs: int, label: int) -> Autoencoder:
    """Returns dimensions of Z drawn at random, of which the paper takes all."""
    del n_features
    width = math.prod(shape)
    drawn = torch.randperm(width, generator=torch.Generator().manual_seed(SEED + label))[:DIMENSIONS].tolist()
    return SingleDimensions(shape, len(drawn), dimensions=drawn, n_outputs=n_outputs)


METHODS: dict[str, Callable[..., Any] | None] = {
    "SRAE": SRAE,
    "NN": NN,
    "1-Heatmap": None,
    "Lasso": Lasso,
    "RandomEncoder": RandomEncoder,
    "SAE": SAE,
    "CAE": CAE,
    "Z": some_dimensions,
    "single dimensions": SingleDimensions,
    "NMF": NMF,
    "RandomDecoder": RandomDecoder,
}
COLUMNS = (
    "train", "test", "f_cls_train", "f_cls", "eff", "o1", "o2", "locality", "o1_weighted", "o2_weighted",
    "locality_weighted",
)  # fmt: skip


class Explained(NamedTuple):
    """The network to explain, and what it gives on all images."""

    model: nn.Module
    layer: str
    images: CUB200
    Z: Tensor
    y_hat: Tensor


def network(file: Path | None, torchvision: str | None, weights: Path | None) -> tuple[nn.Module, Any, Any]:
    """Returns the network with mean and standard deviation of its inputs."""
    if file is not None:
        spec = importlib.util.spec_from_file_location("network", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.load(), module.MEAN, module.STD
    from torchvision import models

    if torchvision is None or weights is None:
        raise SystemExit("expected --network FILE.py, or --torchvision NAME and --weights FILE")
    state = torch.load(weights, map_location="cpu", weights_only=True)
    classes = next(t for name, t in reversed(state.items()) if name.endswith("weight")).shape[0]
    model = models.get_model(torchvision, weights=None, num_classes=classes)
    model.load_state_dict(state)
    return model.eval(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read(
    root: Path, model: nn.Module, mean: Any, std: Any, layer: str, size: tuple[int, int], cache: Path
) -> Explained:
    """Returns activations and outputs on all images, from one pass over them or a file."""
    middle, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    images = CUB200(root, size=size, transform=lambda image: (image - middle) / scale)
    if not cache.exists():
        loader = DataLoader(images, batch_size=32, collate_fn=collate)
        found = collect(model, layer, loader, unpack=lambda batch: ((batch.image,), None), progress=True)
        torch.save({"Z": found.Z, "y_hat": found.y_hat}, cache)
    return Explained(model, layer, images, **torch.load(cache, weights_only=True))


def split(labels: Tensor, label: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows to train and to test on, and those of the class among the latter."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED + label))
    positives, negatives = order[labels[order] == label], order[labels[order] != label]
    first, cut = round(POSITIVE_SHARE * len(positives)), int(NEGATIVE_SHARE * len(negatives))
    train, held_out = torch.cat([positives[:first], negatives[:cut]]), positives[first:]
    return train, torch.cat([held_out, negatives[cut:]]), held_out


def fitted(method: str, of: Explained, label: int, train: Tensor, seed: int) -> Autoencoder:
    """Returns an explanation network of one class."""
    make = METHODS[method]
    assert make is not None
    if method == "Z":
        make = partial(make, label=label)
    xnn: Autoencoder = make(tuple(of.Z.shape[1:]), N_FEATURES, n_outputs=1)
    y_hat = of.y_hat[train]
    fit(xnn, of.Z[train], y_hat[:, label : label + 1], positives=y_hat.argmax(1) == label, seed=seed)
    return xnn.requires_grad_(False)


@torch.no_grad()
def faithfulness(xnn: Autoencoder, of: Explained, label: int, train: Tensor, test: Tensor) -> dict[str, float]:
    """Returns F_reg and F_cls on training and test data."""
    found = {}
    for name, suffix, rows in (("train", "_train", train), ("test", "", test)):
        y_bar, y_hat = xnn.head(encode_all(xnn, of.Z[rows]))[:, 0], of.y_hat[rows]
        found |= {name: f_reg(y_bar, y_hat[:, label]), f"f_cls{suffix}": f_cls(y_bar, y_hat, label)}
    return found


def locations(maps: Tensor, contributions: Tensor | None, batch: PartsSample) -> dict[str, float]:
    """Returns orthogonality and locality of maps (N, K, H, W), plain and weighted by contributions (N, K)."""
    S = part_probabilities(maps, batch.points, batch.box)
    found = {"locality": mean_locality(S)}
    if contributions is not None:
        plain, weighted = orthogonality(maps), orthogonality(maps, contributions=contributions)
        found |= {"o1": plain.o1, "o2": plain.o2, "o1_weighted": weighted.o1, "o2_weighted": weighted.o2}
        found["locality_weighted"] = mean_locality(S, contributions=contributions)
    return found


def measure(method: str, of: Explained, label: int, seed: int, maps_layer: str | None) -> dict[str, Any]:
    """Returns all figures of one method on one class."""
    train, test, positives = split(of.images.labels, label)
    begin = time.perf_counter()
    batch, heatmap = collate([of.images[i] for i in positives.tolist()]), ExcitationMaps(maps_layer)
    if METHODS[method] is None:
        maps = OneHeatmap(of.model, heatmap).attribute(batch.image, label)
        return locations(maps[:, :, 0], None, batch) | {"seconds": time.perf_counter() - begin}
    xnn = fitted(method, of, label, train, seed)
    learned = time.perf_counter() - begin
    found = faithfulness(xnn, of, label, train, test) if method != "Z" else {}
    E = encode_all(xnn, of.Z[positives])
    contributions = xnn.contributions(E)
    module = find_layer(of.model, of.layer)[1]
    explained = ExplanationNetwork(of.model, of.layer, xnn, trace=trace(of.model, module, (batch.image[:1],)))
    (maps,) = heatmap(explained, (batch.image,), range(E.shape[1]), internal_batch_size=4 * N_FEATURES)
    found |= locations(maps[:, :, 0], contributions, batch)
    if method == "Z":  # unrelated dimensions, whose overlap says nothing
        found = {"locality": found["locality"]}
    return found | {
        "eff": float(effective_number(contributions.abs().mean(0, keepdim=True))) if method != "Z" else math.nan,
        "contributions": [round(c, 3) for c in contributions.mean(0).tolist()] if method != "Z" else [],
        "empty_maps": float((maps.flatten(2).sum(2) == 0).double().mean()),
        "seconds": time.perf_counter() - begin,
        "seconds_fit": learned,
    }


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95 % confidence interval by Student's t; numbers only."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return math.nan, math.nan
    mean = math.fsum(known) / len(known)
    if len(known) < 2:
        return mean, math.nan
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1) / len(known))
    return mean, float(stats.t.ppf(0.975, len(known) - 1)) * error


def summary(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns mean and half interval over the classes of every figure, by method."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        of = [line for line in lines if line["method"] == method]
        if of:
            found[method] = {"classes": len(of)}
            found[method] |= {c: interval(line.get(c, math.nan) for line in of) for c in COLUMNS}
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the table in Markdown; the paper's values in brackets."""
    titles = (
        "F_reg train", "test", "F_cls train", "test", "eff", "O1", "O2", "locality", "O1 weighted", "O2 weighted",
        "locality weighted",
    )  # fmt: skip
    out = [f"| | classes | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for method, figures in summary(lines).items():
        cells = []
        for column in COLUMNS:
            mean, half = figures[column]
            digits = 4 if column.startswith("f_cls") else 3 if column in ("train", "test") else 2
            shown = "" if math.isnan(mean) else f"{mean:.{digits}f}"
            shown += "" if math.isnan(half) else f" ± {half:.{digits}f}"
            paper = PAPER.get(method, {}).get(column)
            cells.append(shown + (f" ({paper:g})" if paper is not None and shown else ""))
        out.append(f"| {method} | {figures['classes']} | {' | '.join(cells)} |")
    return "\n".join(out)


def main(
    root: Path,
    network_file: Path | None,
    torchvision: str | None,
    weights: Path | None,
    layer: str,
    maps_layer: str | None,
    size: int,
    classes: int,
    methods: list[str],
    seed: int,
    out: Path,
) -> None:
    """Measures what OUT lacks, and writes the table."""
    out.mkdir(parents=True, exist_ok=True)
    model, mean, std = network(network_file, torchvision, weights)
    of = read(root, model, mean, std, layer, (size, size), out / "activations.pt")
    known = of.images.labels.unique()
    chosen = known[torch.linspace(0, len(known) - 1, min(classes, len(known))).round().long()].tolist()
    log = out / "results.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(line["method"], line["class"], line["seed"]) for line in lines}
    jobs = [(m, c) for c in chosen for m in methods if (m, c, seed) not in done]
    for method, label in tqdm(jobs, "methods and classes"):
        figures = measure(method, of, label, seed, maps_layer)
        lines.append({"method": method, "class": label, "seed": seed, **figures})
        with log.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    (out / "table.md").write_text(table(lines) + "\n")
    (out / "table.json").write_text(json.dumps(summary(lines), indent=1) + "\n")
    print(table(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with images.txt")
    parser.add_argument("--network", dest="network_file", type=Path, help="Python file with load(), MEAN and STD")
    parser.add_argument("--torchvision", help="name of a torchvision model, instead of --network")
    parser.add_argument("--weights", type=Path, help="its state dict")
    parser.add_argument("--layer", required=True, help="the layer to explain")
    parser.add_argument("--maps-layer", help="where maps stop; chosen by the backend if not given")
    parser.add_argument("--size", type=int, default=227, help="height and width of the images")
    parser.add_argument("--classes", type=int, default=1000, help="how many, evenly spread over those there are")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    main(**vars(parser.parse_args()))
