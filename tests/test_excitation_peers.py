"""Excitation backprop beside other implementations: zennit, Captum's LRP, and recorded numbers of TorchRay."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from captum.attr import LRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_xnn import ExcitationBP, LayerExcitationBP

# Small random nets lose probability, in every implementation alike.
pytestmark = pytest.mark.filterwarnings("ignore:probabilities sum to")
few = settings(max_examples=6, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


class Chain(nn.Sequential):
    """Flattens before linear layers, for which Captum's LRP has no module."""

    def forward(self, x):
        for module in self:
            x = module(x.flatten(1) if isinstance(module, nn.Linear) else x)
        return x


NETS = {
    "mlp": (lambda: Chain(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)), (6,)),
    "cnn": (
        lambda: Chain(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(),
            nn.AvgPool2d(2), nn.Linear(6, 3),
        ),
        (2, 8, 8),
    ),
    "strided, dilated, grouped": (
        lambda: Chain(
            nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), nn.ReLU(),
            nn.Conv2d(4, 6, 2, dilation=2, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Linear(24, 3),
        ),
        (2, 9, 8),
    ),
    "one dimension, transposed": (
        lambda: Chain(
            nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 3, 2, stride=2), nn.ReLU(),
            nn.Linear(36, 3),
        ),
        (2, 8),
    ),
}  # fmt: skip


def made(name, seed):
    """A random net without positive biases, and inputs of both signs."""
    torch.manual_seed(seed)
    make, shape = NETS[name]
    net = make().double().eval()
    for module in net:
        if getattr(module, "bias", None) is not None:
            module.bias.data.abs_().neg_()
    return net, torch.randn(3, *shape, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore")  # zennit's hooks are deprecated forms
@few
@given(seed=seeds, name=st.sampled_from([*NETS]), target=st.integers(0, 2))
def test_zennit(torchvision, seed, name, target):
    """Its ZPlus, without stabiliser and biases, on inputs of both signs."""
    pytest.importorskip("zennit")
    from zennit.composites import ExcitationBackprop

    net, x = made(name, seed)
    leaf = x.clone().requires_grad_()
    with ExcitationBackprop(stabilizer=1e-300, zero_params="bias").context(net) as hooked:
        (wanted,) = torch.autograd.grad(hooked(leaf)[:, target].sum(), leaf)
    torch.testing.assert_close(ExcitationBP(net, contrastive=False).attribute(x, target), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # Captum warns of hooks and of gradients that it turns on
@few
@given(seed=seeds, name=st.sampled_from(["mlp", "cnn", "strided, dilated, grouped"]), target=st.integers(0, 2))
def test_lrp_of_captum(seed, name, target):
    """Its alpha1-beta0 rule, which starts with the output in place of 1, on inputs that are not negative."""
    net, x = made(name, seed)
    x = x.abs() * 1e6  # Captum adds 1e-9 to denominators
    for module in net:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.rule = Alpha1_Beta0_Rule(set_bias_to_zero=True)
    R = LRP(net).attribute(x, target=target)
    output = net(x)[:, target].detach().reshape(-1, *[1] * (x.dim() - 1))
    P = ExcitationBP(net, contrastive=False).attribute(x, target)
    torch.testing.assert_close(P, R / output, rtol=1e-9, atol=1e-9)


# TorchRay

DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "excitation_torchray.json").read_text())
PARITY = {"negative": "raw", "batch_norm": "pass"}


def script():
    spec = importlib.util.spec_from_file_location("make_excitation_torchray", DATA / "make_excitation_torchray.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(name):
    """The net, its input, and TorchRay's maps by how they were made."""
    maker = script()
    make, shape, _, _ = maker.NETS[name]
    net = make(maker.Sum()).double().eval()
    state = net.state_dict()
    for key, values in RECORDED[name]["state"].items():
        state[key] = torch.tensor(values, dtype=torch.float64).reshape(state[key].shape)
    net.load_state_dict(state)
    x = torch.tensor(RECORDED[name]["input"], dtype=torch.float64).reshape(1, *shape)
    maps = {tuple(key.split(", ")): torch.tensor(P, dtype=torch.float64) for key, P in RECORDED[name]["maps"].items()}
    return net, x, maps


@pytest.mark.parametrize("name", RECORDED)
def test_torchray(name):
    net, x, maps = recorded(name)
    assert len(maps) > 20
    for (kind, sign, target, layer), wanted in maps.items():
        chosen = {"contrastive": kind == "c-MWP", **PARITY}
        ebp = ExcitationBP(net, **chosen) if layer == "input" else LayerExcitationBP(net, layer, **chosen)
        P = ebp.attribute(x - 0.5 if sign == "signed" else x, int(target))
        assert P.numel() == wanted.numel() == math.prod(P.shape)
        # Raw shares of signed inputs are large where they cancel.
        torch.testing.assert_close(P.flatten(), wanted, rtol=1e-6, atol=1e-9 * max(1, float(wanted.abs().max())))


def test_torchray_needs_its_settings():
    """With ours, results differ: the recorded numbers tell settings apart."""
    for name, setting in (("mlp", {"batch_norm": "pass"}), ("cnn", {"negative": "raw"})):
        net, x, maps = recorded(name)
        wanted = maps["MWP", "signed", "0", "input"]
        P = ExcitationBP(net, contrastive=False, **setting).attribute(x - 0.5, 0).flatten()
        assert float((P - wanted).abs().max()) > 1e-3
