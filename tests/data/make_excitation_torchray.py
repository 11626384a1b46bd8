"""Writes excitation_torchray.json: small nets, and what TorchRay's excitation backprop gives for them.

TorchRay's licence forbids commercial use, so that no test needs or contains it: tests read the numbers. To make them
again, unpack its source distribution (pip download --no-deps torchray) somewhere and run

    python tests/data/make_excitation_torchray.py FOLDER

with the folder that contains ``torchray/``. The nets avoid what TorchRay computes otherwise by mistake: sums that are
exactly 0, LRN, and functions called as other than ``torch.nn.functional.x``.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

FILE = Path(__file__).with_name("excitation_torchray.json")


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


class Block(nn.Module):
    """A residual block; ``add`` sums its branches."""

    def __init__(self, add):
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.second, self.add, self.out = nn.Conv2d(4, 4, 3, padding=1), add, nn.ReLU()

    def forward(self, x):
        return self.out(self.add(self.second(self.relu(self.norm(self.first(x)))), x))


def mlp(_add):
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def cnn(_add):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=(2, 1), stride=(1, 2), dilation=(2, 1)),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(4, 6, (3, 2), groups=2),
        nn.ReLU(),
        nn.AvgPool2d((1, 2), stride=1, padding=(0, 1)),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def residual(add):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), Block(add), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


# The net, the shape of its input, the layers to stop at, and the layer before the classifier.
NETS = {
    "mlp": (mlp, (5,), ("0", "1", "3"), "3"),
    "cnn": (cnn, (2, 8, 9), ("1", "2", "3", "5", "6"), "8"),
    "residual": (residual, (2, 6, 6), ("1", "2.relu", "2", "3"), "4"),
}
"""The input is a stopping layer as well, for MWP."""


def numbers(net, seed):
    """Random values, of three digits, for all of the net's tensors."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            drawn = drawn.abs() + 0.5
        state[name] = (drawn * 1000).round() / 1000
    return state


def digits(tensor):
    return [float(f"{v:.10g}") for v in tensor.double().flatten().tolist()]


def main(folder):
    """Runs TorchRay on every net and writes the file."""
    sys.path.insert(0, folder)
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchray.attribution import excitation_backprop as module

    torch.set_default_dtype(torch.float64)
    nets = {}
    for seed, (name, (make, shape, layers, last)) in enumerate(NETS.items()):
        net = make(module.EltwiseSum()).eval()
        state = numbers(net, seed)
        net.load_state_dict(state, strict=False)
        x = (torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed)) * 1000).round() / 1000
        signed = x - 0.5
        maps = {}
        for target in range(3):
            for kind, image in (("positive", x), ("signed", signed)):
                for layer in ("", *layers):
                    given = {}

                    def keep(data, given=given):
                        given["P"] = data.grad
                        return data.grad[:, :1]

                    module.excitation_backprop(
                        net, image.clone().requires_grad_(), target, saliency_layer=layer, gradient_to_saliency=keep
                    )
                    maps[f"MWP, {kind}, {target}, {layer or 'input'}"] = given["P"]
            for layer in layers:
                if layer != last:
                    maps[f"c-MWP, positive, {target}, {layer}"] = contrast(module, net, x, target, layer, last)
        for key, P in maps.items():
            assert bool(P.isfinite().all()), (name, key)
        nets[name] = {
            "state": {k: digits(v) for k, v in state.items()},
            "input": digits(x),
            "maps": {k: digits(P) for k, P in maps.items()},
        }
    FILE.write_text(json.dumps(nets, separators=(",", ":")).replace('"maps"', '\n"maps"') + "\n")
    print(FILE, FILE.stat().st_size, "bytes", sum(len(n["maps"]) for n in nets.values()), "maps")


def contrast(module, net, x, target, layer, last):
    """The signed difference at a layer, of which TorchRay returns only the map."""
    to_map, given = module.gradient_to_contrastive_excitation_backprop_saliency, {}

    def keep(data):
        given["P"] = data.grad
        return to_map(data)

    module.gradient_to_contrastive_excitation_backprop_saliency = keep
    try:
        module.contrastive_excitation_backprop(net, x.clone().requires_grad_(), target, layer, last)
    finally:
        module.gradient_to_contrastive_excitation_backprop_saliency = to_map
    return given["P"]


if __name__ == "__main__":
    main(sys.argv[1])
