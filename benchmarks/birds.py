"""Caltech-UCSD Birds and a network that knows them: what every benchmark on the birds starts from."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.runs import kept
from captum_xnn.activations import collect
from captum_xnn.datasets import CUB200

POSITIVE_SHARE, NEGATIVE_SHARE, SEED = 5 / 6, 0.8, 2021


@dataclass
class Birds:
    """The network to explain, and what it gives on all images."""

    model: nn.Module
    layer: str
    images: CUB200
    Z: Tensor
    y_hat: Tensor


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which birds, which network and which of its layers."""
    parser.add_argument("--root", type=Path, required=True, help="folder with images.txt")
    parser.add_argument("--network", dest="file", type=Path, help="Python file with load(), MEAN and STD")
    parser.add_argument("--torchvision", help="name of a torchvision model, instead of --network")
    parser.add_argument("--weights", type=Path, help="its state dict")
    parser.add_argument("--layer", required=True, help="the layer to explain")
    parser.add_argument("--size", type=int, default=227, help="height and width of the images")
    parser.add_argument("--activations", type=Path, help="file that keeps the activations between runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run goes on")


def network(file: Path | None, torchvision: str | None = None, weights: Path | None = None) -> tuple[nn.Module, Any]:
    """Returns the network, and the function that normalises its images (3, H, W)."""
    if file is not None:
        spec = importlib.util.spec_from_file_location("network", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.load(), _normalise(module.MEAN, module.STD)
    if torchvision is None or weights is None:
        raise SystemExit("expected --network FILE.py, or --torchvision NAME and --weights FILE")
    from torchvision import models

    state = torch.load(weights, map_location="cpu", weights_only=True)
    classes = next(t for name, t in reversed(state.items()) if name.endswith("weight")).shape[0]
    model = models.get_model(torchvision, weights=None, num_classes=classes)
    model.load_state_dict(state)
    return model.eval(), _normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _normalise(mean: Any, std: Any) -> Any:
    middle, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    return lambda image: (image - middle) / scale


def read(
    root: Path,
    file: Path | None,
    layer: str,
    *,
    torchvision: str | None = None,
    weights: Path | None = None,
    size: int = 227,
    cache: Path | None = None,
) -> Birds:
    """Returns activations and outputs on all images, from one pass over them (minutes on two cores) or a file."""
    model, normalise = network(file, torchvision, weights)
    images = CUB200(root, size=(size, size), transform=normalise)
    loader = DataLoader(images, batch_size=32)
    found = kept(
        cache,
        {"network": str(file.resolve()) if file else torchvision, "layer": layer, "size": size, "images": len(images)},
        lambda: collect(model, layer, loader, unpack=lambda batch: ((batch.image,), None), progress=True),
    )
    return Birds(model, layer, images, **found)


def read_options(given: argparse.Namespace) -> Birds:
    """Returns what :func:`read` gives for the options, keeping activations in OUT unless told otherwise."""
    cache = given.activations or given.out / "activations.pt"
    return read(
        given.root,
        given.file,
        given.layer,
        torchvision=given.torchvision,
        weights=given.weights,
        size=given.size,
        cache=cache,
    )


def some_classes(labels: Tensor, n: int) -> list[int]:
    """Returns n classes, evenly spread over those there are."""
    known = labels.unique()
    return known[torch.linspace(0, len(known) - 1, min(n, len(known))).round().long()].tolist()


def split(labels: Tensor, label: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows to train and to test on, and those of the class among the latter.

    Five sixths of the class's images (50 of 60) and 80 % of the others are to train on, those of the class first.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED + label))
    positives, negatives = order[labels[order] == label], order[labels[order] != label]
    first, cut = round(POSITIVE_SHARE * len(positives)), int(NEGATIVE_SHARE * len(negatives))
    train, held_out = torch.cat([positives[:first], negatives[:cut]]), positives[first:]
    return train, torch.cat([held_out, negatives[cut:]]), held_out
