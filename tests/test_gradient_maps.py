"""Maps of groups from one forward pass are those that Captum draws x-feature by x-feature."""

from __future__ import annotations

import copy

import pytest
import torch
from captum.attr import InputXGradient, LayerGradientXActivation
from test_contribution_network import ZOO, Several, everything, fitted, state
from torch import nn

from captum_xnn import XNNAttribution
from captum_xnn.explainer import Explainers
from captum_xnn.heatmaps import FromCaptum, GradientMaps
from captum_xnn.heatmaps._one_pass import Pass
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._tail import Tail


def drawn(xnn, data, target, backend, **settings):
    torch.manual_seed(0)
    return xnn.with_heatmap(backend).attribute(data, target, **settings)


@pytest.mark.filterwarnings("ignore:maps are zero")
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("chunk", [None, 2])
def test_maps_are_captums(name, chunk):
    build, layer, shape, transform = ZOO[name]
    model, data = build().eval(), torch.randn(40, *shape)
    xnn = fitted(model, layer, data, 1, output_transform=transform)
    before = state(model)
    found = drawn(xnn, data[:5], 1, GradientMaps(), internal_batch_size=chunk)
    after = state(model)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0]) and before[1:] == after[1:]
    layered = found.dim() == 5 and any(isinstance(m, nn.Conv2d) for m in model.modules())
    expected = drawn(xnn, data[:5], 1, FromCaptum(LayerGradientXActivation if layered else InputXGradient))
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ["0", "1", "3"])
def test_a_named_layer_may_be_the_explained_one(layer):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(6, 3))
    data = torch.randn(40, 1, 8, 8)
    xnn = fitted(model, "3", data)
    found = drawn(xnn, data[:3], 0, GradientMaps(), layer=layer)
    expected = drawn(xnn, data[:3], 0, FromCaptum(LayerGradientXActivation, layer=layer))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_several_inputs_have_maps_each():
    model, x, y = Several(), torch.randn(40, 4), torch.randn(40, 3)
    batches = [((x[i : i + 10], y[i : i + 10]), None) for i in range(0, 40, 10)]
    xnn = fitted(model, "mix", batches, fit={"positives": everything(40)}, unpack=lambda batch: batch)
    found = drawn(xnn, (x[:4], y[:4]), 0, GradientMaps(), additional_forward_args=2.0)
    expected = drawn(xnn, (x[:4], y[:4]), 0, FromCaptum(InputXGradient), additional_forward_args=2.0)
    for a, b in zip(found, expected, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_model_runs_once_for_all_maps():
    build, layer, shape, _ = ZOO["cnn late"]
    model, data = build().eval(), torch.randn(40, *shape)
    xnn = fitted(model, layer, data, 1, K=4)
    xnn.attribute(data[:6], 1)  # the first call also asks where the layer's channels are
    rows = []
    handle = model[0].register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    xnn.contributions(data[:6], 1)
    numbers = sum(rows)
    xnn.attribute(data[:6], 1)
    handle.remove()
    assert sum(rows) - 2 * numbers <= 6 + 1  # and one example to trace the layers


def test_two_calls_of_a_layer_leave_the_shared_pass():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = self.conv(self.conv(x).relu())
            return self.head(self.mix(x.mean((2, 3))).relu())

    model, data = Twice(), torch.randn(40, 2, 6, 6)
    xnn = fitted(model, "mix", data)
    found = drawn(xnn, data[:3], 0, GradientMaps(), layer="conv")
    torch.testing.assert_close(found, drawn(xnn, data[:3], 0, FromCaptum(LayerGradientXActivation, layer="conv")))


def residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(x + self.norm(self.second(self.relu(self.first(x)))))

    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.ReLU()
    ).append(nn.Linear(6, 3))


def runs(model, call):
    rows = []
    handle = model[0].register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    call()
    handle.remove()
    return sum(rows)


def test_a_residual_network_runs_once_for_numbers_and_maps():
    """Its last feature maps are those of a ReLU that runs twice."""
    torch.manual_seed(0)
    model, data = residual().eval(), torch.randn(40, 1, 8, 8)
    xnn = fitted(model, "6", data, K=4)
    first = xnn.explain(data[:5], 0)  # finds the layer of the maps
    assert runs(model, lambda: xnn.attribute(data[:5], 0)) == 5 + 1  # and one example for the points of the integral
    again = xnn.explain(data[:5], 0)
    assert torch.equal(first.prediction, again.prediction) and torch.equal(first.contributions, again.contributions)
    torch.testing.assert_close(first.maps, again.maps)
    torch.testing.assert_close(again.maps, drawn(xnn, data[:5], 0, FromCaptum(LayerGradientXActivation)))
    # several targets, several chunks and settings of a call take passes of their own
    xnn.fit(data, 1, positives=everything(40), progress=False)
    found = xnn.attribute(data[:5], torch.tensor([0, 1, 0, 1, 0]))
    for i, target in enumerate((0, 1, 0, 1, 0)):  # groups of an explainer may be fewer
        own = xnn.attribute(data[i : i + 1], target)
        torch.testing.assert_close(found[i : i + 1, : own.shape[1]], own, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(xnn.attribute(data[:5], 0, internal_batch_size=2), again.maps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        xnn.attribute(data[:5], 0, layer="1"), drawn(xnn, data[:5], 0, FromCaptum(LayerGradientXActivation, layer="1"))
    )


def doubled(_module, _inputs, output):
    return 2 * output


CHANGES = {
    "a weight": lambda model: model[2].second.weight.data.mul_(-3),
    "a weight, past its count of changes": lambda model: model[0].weight.detach().numpy().__imul__(2),
    "a buffer": lambda model: model[2].norm.running_var.mul_(0.1),
    "a module": lambda model: model.__setitem__(1, nn.Softplus()),
    "the module of the maps": lambda model: setattr(model[2], "relu", nn.GELU()),
    "a module behind the maps": lambda model: model.insert(3, nn.Tanh()),
    "a hook": lambda model: model[2].register_forward_hook(doubled),
    "a hook at the maps": lambda model: model[2].relu.register_forward_hook(doubled),
    "training": lambda model: model.train(),
    "double precision": lambda model: model.double(),
}


@pytest.mark.filterwarnings("ignore:.* changed after the explainer")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_explained_as_it_is(change):
    torch.manual_seed(0)
    model, data = residual().eval(), torch.randn(40, 1, 8, 8)
    xnn = fitted(model, model[6], data)
    before = [xnn.explain(data[:3], 0) for _ in range(2)][1]
    CHANGES[change](model)
    x = data[:3].to(model[0].weight.dtype)
    fresh = XNNAttribution(model, xnn.layer, 3)
    fresh.explainers_ = Explainers({(find_layer(model, xnn.layer)[0], t): e for (_, t), e in xnn.explainers_.items()})
    xnn.explainers_ = Explainers(fresh.explainers_)
    expected = fresh.explain(x, 0)
    for _ in range(2):
        found = xnn.explain(x, 0)
        for name in ("prediction", "contributions", "bias", "maps"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
    assert model.training == (change == "training")
    with torch.no_grad():
        own = copy.deepcopy(model).eval()(x)[:, 0]
    torch.testing.assert_close(found.prediction, own)
    same = torch.allclose(found.maps.float(), before.maps, rtol=1e-4, atol=1e-6)
    assert same == (change in ("training", "double precision"))


class Sometimes(nn.Module):
    """Calls a layer as often as it is told."""

    def __init__(self):
        super().__init__()
        self.layer, self.head, self.calls = nn.Linear(4, 4), nn.Linear(4, 2), 1

    def forward(self, x):
        for _ in range(self.calls):
            x = self.layer(x)
        return self.head(x)


def test_one_pass_serves_a_layer_that_runs_once_and_is_explained_as_it_is():
    model, x = Sometimes().eval(), torch.randn(3, 4)
    found = Pass.of(Tail(model, "layer"), (x,), (), None)
    assert found is not None and torch.equal(found.Z, model.layer(x))
    for model.calls in (0, 2):
        assert Pass.of(Tail(model, "layer"), (x,), (), None) is None
    model.calls = 1
    assert Pass.of(Tail(model, "layer", output_transform=lambda z: z[:, :2]), (x,), (), None) is None


@pytest.mark.filterwarnings("ignore:maps are zero")
def test_an_output_transform_that_selects_has_the_maps_of_its_selection():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2))
    x = torch.randn(40, 4)
    xnn = fitted(model, "2", x, output_transform=lambda z: z[:, 0])
    found = drawn(xnn, x[:3], 0, GradientMaps())
    torch.testing.assert_close(found, drawn(xnn, x[:3], 0, FromCaptum(InputXGradient)), rtol=1e-4, atol=1e-6)
    assert found.abs().sum() > 0
