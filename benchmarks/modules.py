"""What Captum's methods that hook modules make of torchvision's networks, alone and on twins made of modules.

Random weights, an x-feature of a random encoder, float64. DeepLift: how far the attributions are from summing to the
difference from a black image, in parts of it. LRP: the sum of absolute relevances, in parts of the x-feature.
GuidedBackprop: how far from the plain gradient, in parts of it (0 where no ReLU was seen).

    python -m benchmarks.modules
"""

from __future__ import annotations

import warnings

import torch
from captum.attr import LRP, DeepLift, GuidedBackprop, Saliency
from torch import Tensor, nn

from benchmarks.excitation_speed import network
from captum_xnn.heatmaps._canonical import canonical
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._trace import trace
from captum_xnn.models import SRAE

LAYERS = {
    "vgg11": "avgpool",
    "alexnet": "avgpool",
    "resnet18": "avgpool",
    "resnet50": "avgpool",
    "densenet121": "features",
    "squeezenet1_1": "features",
}


def composed(model: nn.Module, layer: str, x: Tensor) -> ExplanationNetwork:
    """Returns a network from images to the x-features of a random encoder."""
    module = find_layer(model, layer)[1]
    found = trace(model, module, (x,))
    with torch.no_grad():
        width = ExplanationNetwork(model, layer, SRAE(1, 1, hidden=()), trace=found).activations(x).numel()
    return ExplanationNetwork(model, layer, SRAE(width, 1, hidden=(8,)).double().eval(), trace=found)


def deeplift(net: nn.Module, x: Tensor) -> float:
    """Returns what is missing of the sum, in parts of it."""
    delta = DeepLift(net).attribute(x.clone(), target=0, return_convergence_delta=True)[1]
    with torch.no_grad():
        difference = (net(x) - net(0 * x))[:, 0]
    return float(delta.detach().abs() / difference.abs())


def lrp(net: nn.Module, x: Tensor) -> float:
    """Returns the sum of absolute relevances, in parts of the x-feature."""
    with torch.no_grad():
        E = float(net(x)[0, 0])
    return float(LRP(net).attribute(x.clone(), target=0).detach().abs().sum()) / abs(E)


def guided(net: nn.Module, x: Tensor) -> float:
    """Returns the distance from the gradient, in parts of it."""
    gradient = Saliency(net).attribute(x.clone(), target=0, abs=False)
    return float((GuidedBackprop(net).attribute(x.clone(), target=0) - gradient).norm() / gradient.norm())


def main() -> None:
    """Prints a line for each network and method."""
    warnings.simplefilter("ignore")
    for name, layer in LAYERS.items():
        model = network(name).double()
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        for measure in (deeplift, lrp, guided):
            net = composed(model, layer, x)
            twin = canonical(net, (x,))
            found = []
            for each in (net, twin):
                try:
                    found.append(f"{measure(each, x):.3g}")
                except (RuntimeError, TypeError, AttributeError) as error:
                    found.append(type(error).__name__)
            print(f"{name:<14}{measure.__name__:<10}alone {found[0]:<14} twin {found[1]}")


if __name__ == "__main__":
    main()
