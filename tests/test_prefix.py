"""Explaining one example runs the modules up to the layer once, and gives what two passes give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_xnn import XNNAttribution
from captum_xnn.layers._prefix import Prefix

IMAGES = torch.rand(60, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Counted(nn.Module):
    """Counts the calls of a module."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, []  # a list: attributes are restored after every call

    def forward(self, *args, **kwargs):
        self.calls.append(1)
        return self.module(*args, **kwargs)


class Net(nn.Module):
    """Convolutions, a layer and a head, called in a way that a subclass changes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Counted(nn.Conv2d(3, 6, 3, padding=1)), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.in_place, self.layer = nn.ReLU(), nn.ReLU(inplace=True), nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def maps(self, x):
        return self.relu(self.second(self.relu(self.first(x))))

    def forward(self, x):
        return self.head(self.relu(self.layer(self.maps(x).mean((2, 3)))))


class InPlace(Net):
    """ReLUs work on the outputs of modules before them, one of them without its return value being used."""

    def maps(self, x):
        y = self.in_place(self.first(x))
        z = self.second(y)
        self.in_place(z)
        return self.relu(z + y)


class Around(Net):
    """What precedes the layer also goes around it."""

    def forward(self, x):
        y = self.maps(x).mean((2, 3))
        return self.head(F.relu(self.layer(y)) + F.pad(y, (0, 2)))


class AroundInPlace(Net):
    """A value that goes around the layer was changed by a module whose output nobody uses."""

    def forward(self, x):
        y = self.second(self.first(x)).mean((2, 3)) - 0.05
        self.in_place(y)
        return self.head(F.relu(self.layer(y)) + F.pad(y, (0, 2)))


class Several(Net):
    """A recurrent layer returns a tuple, and a dict is handed on."""

    def __init__(self):
        super().__init__()
        self.lstm, self.named = nn.LSTM(6, 6, batch_first=True), Named()

    def forward(self, x):
        y, (h, _) = self.lstm(self.maps(x).flatten(2).mT)
        found = self.named(y)
        return self.head(self.relu(self.layer(found["last"] + h[0])))


class Named(nn.Module):
    def forward(self, y):
        return {"last": y[:, -1], "first": None}


class Unusual(Net):
    """A module returns an object that nobody can copy."""

    def __init__(self):
        super().__init__()
        self.wrapping = Wrapping()

    def forward(self, x):
        return self.head(self.relu(self.layer(self.wrapping(self.maps(x)).value)))


class Wrapping(nn.Module):
    def forward(self, y):
        return type("Output", (), {"value": y.mean((2, 3))})()


class Hooked(Net):
    """A user's hook changes the output of the first convolution."""

    def __init__(self):
        super().__init__()
        self.first.register_forward_hook(lambda _module, _inputs, output: 2 * output + 0.1)


def fitted(net):
    torch.manual_seed(1)
    model = net().eval()
    with torch.no_grad():
        model.head.bias -= model(IMAGES).mean(0)
    return XNNAttribution(model, "layer", 3).fit(IMAGES, 0, progress=False)


def explained(xnn, x):
    """The numbers and maps of a first call."""
    other = XNNAttribution(xnn.model, xnn.layer, 3)
    other.explainers_ = copy.deepcopy(xnn.explainers_)
    return other.explain(x, 0)


@pytest.mark.parametrize("net", [Net, InPlace, Around, AroundInPlace, Several, Unusual, Hooked])
def test_later_calls_give_what_a_first_call_gives(net):
    xnn = fitted(net)
    for x in IMAGES[:4].split(1):
        xnn.explain(x, 0)
        later, first = xnn.explain(x, 0), explained(xnn, x)
        for name in ("contributions", "bias", "surrogate", "prediction", "maps"):
            torch.testing.assert_close(getattr(later, name), getattr(first, name), rtol=1e-4, atol=1e-6)
        assert float(later.unexplained.abs().max()) < 0.02
        assert "forward" not in vars(xnn.model.first)


@pytest.mark.parametrize(("net", "runs"), [(Net, 1), (InPlace, 2), (Several, 1), (Hooked, 1), (Unusual, 2)])
def test_the_modules_up_to_the_layer_run_once(net, runs):
    """Where an output cannot be kept, or changes in place, they run twice."""
    xnn = fitted(net)
    xnn.explain(IMAGES[:1], 0)
    calls = xnn.model.first.calls
    calls.clear()
    xnn.explain(IMAGES[:1], 0)
    assert len(calls) == runs


def pass_of(model, layer, x):
    prefix = Prefix(model, layer)
    with prefix.kept(), torch.no_grad():
        return prefix, model(x)


def test_a_layer_that_runs_twice_or_inside_of_another_module_is_not_kept():
    class Twice(Net):
        def forward(self, x):
            y = self.maps(x).mean((2, 3))
            return self.head(self.layer(y) + self.layer(2 * y))

    class Inside(Net):
        def __init__(self):
            super().__init__()
            self.around = [nn.Sequential(self.layer, self.relu)]  # in a list, so that it is no submodule
            self.holder = Holder(self.layer)

        def forward(self, x):
            return self.head(self.holder(self.maps(x).mean((2, 3))))

    assert pass_of(Net(), (net := Net()).layer, IMAGES[:1])[0].is_complete is False  # another model's layer
    for kind in (Twice, Inside):
        net = kind()
        assert not pass_of(net, net.layer, IMAGES[:1])[0].is_complete
    net = Net()
    assert pass_of(net, net.layer, IMAGES[:1])[0].is_complete


class Holder(nn.Module):
    """Calls a module that it does not register."""

    def __init__(self, module):
        super().__init__()
        self.held = [module]

    def forward(self, x):
        return self.held[0](x)


def test_outputs_that_take_too_much_memory_are_not_kept(monkeypatch):
    net = Net()
    monkeypatch.setattr("captum_xnn.layers._prefix._BYTES", 6 * 12 * 12 * 4)  # the first convolution's alone
    assert not pass_of(net, net.layer, IMAGES[:1])[0].is_complete


@pytest.mark.parametrize("net", [Net, InPlace])
def test_a_pass_with_kept_outputs_gives_the_same_again(net):
    model = net()
    prefix, y = pass_of(model, model.layer, IMAGES[:1])
    for _ in range(2):
        with prefix.returned(), torch.no_grad():
            again = model(IMAGES[:1])
        torch.testing.assert_close(again, y, rtol=0, atol=0)


def test_an_output_that_later_code_changes_is_computed_again():
    class Changing(Net):
        def forward(self, x):
            y = self.first(x)
            z = self.second(y)
            y += 1
            return self.head(self.layer(self.relu(z + y).mean((2, 3))))

    model = Changing()
    prefix, y = pass_of(model, model.layer, IMAGES[:1])
    model.first.calls.clear()
    with prefix.returned(), torch.no_grad():
        again = model(IMAGES[:1])
    assert torch.equal(again, y) and len(model.first.calls) == 1
