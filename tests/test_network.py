"""The explanation network: an x-feature is an output neuron, and Captum's methods see a clean model."""

from __future__ import annotations

import warnings

import pytest
import torch
from captum.attr import LRP, DeepLift, GuidedBackprop, IntegratedGradients, LayerGradCam, Saliency
from torch import nn
from torch.nn import functional as F

from captum_xnn.errors import LayerNotFoundError, LayerNotReachedError
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._trace import trace
from captum_xnn.models import SRAE, ConvSRAE


class Tailed(nn.Module):
    """A plain convolutional part, and after it a tail that Captum's methods would stumble over."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU())
        self.unused = nn.LayerNorm(7)
        self.tail = nn.Sequential(nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 5), nn.GELU(), nn.Softmax(1))

    def forward(self, x):
        return self.tail(F.relu_(self.features(x)))


def composed(model, layer, xnn, x, **settings):
    module = model.get_submodule(layer)
    return ExplanationNetwork(model, layer, xnn, trace=trace(model, module, (x[:1],)), **settings)


@pytest.fixture
def tailed():
    model = Tailed().eval()
    x = torch.randn(3, 1, 8, 8)
    return model, SRAE((3, 4, 4), 4, hidden=(6,)), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_composition_written_out(tailed, dtype):
    model, srae, x = tailed
    model, srae, x = model.to(dtype), srae.to(dtype), x.to(dtype).requires_grad_()
    network = composed(model, "features.3", srae, x)
    f, (l1, _, l2) = model.features, srae.encoder
    z = F.conv2d(F.conv2d(x, f[0].weight, f[0].bias).clamp(min=0), f[2].weight, f[2].bias).clamp(min=0)
    E = (z.reshape(3, -1) @ l1.weight.T + l1.bias).clamp(min=0) @ l2.weight.T + l2.bias
    torch.testing.assert_close(network(x), E)
    torch.testing.assert_close(network.activations(x), z)
    for k in range(4):
        (given,) = torch.autograd.grad(network(x)[:, k].sum(), x)
        (wanted,) = torch.autograd.grad(E[:, k].sum(), x, retain_graph=True)
        torch.testing.assert_close(given, wanted)
        assert bool(given.abs().max() > 0)


def test_convolutional_explanation_network():
    model = Tailed()
    x = torch.randn(2, 1, 8, 8)
    srae = ConvSRAE((3, 4, 4), 2, hidden=(5,), pool=2)
    network = composed(model, "features.3", srae, x)
    maps = srae.encoder(model.features(x))
    pooled = maps.reshape(2, 2, 2, 2, 2, 2).amax((3, 5))
    wanted = torch.einsum("nkij,kij->nk", pooled, srae.planes.weight[:, 0]) + srae.planes.bias
    torch.testing.assert_close(network(x), wanted)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.step, self.act, self.head = nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)

    def forward(self, x, times):
        for _ in range(times):
            x = self.act(self.step(x))
        return self.head(self.act(x))


@pytest.mark.parametrize("times", [1, 3])
def test_a_reused_layer_is_read_at_its_last_call(times):
    model, srae, x = Loop(), SRAE(5, 2, hidden=()), torch.randn(4, 5, requires_grad=True)
    network = ExplanationNetwork(model, "step", srae, trace=trace(model, model.step, (x, times)))
    z = x
    for i in range(times):
        z = F.linear(z.relu() if i else z, model.step.weight, model.step.bias)
    E = F.linear(z, srae.encoder[0].weight, srae.encoder[0].bias)
    torch.testing.assert_close(network(x, times), E)
    (given,) = torch.autograd.grad(network(x, times)[:, 1].sum(), x)
    (wanted,) = torch.autograd.grad(E[:, 1].sum(), x)
    torch.testing.assert_close(given, wanted)


METHODS = {
    "saliency": (Saliency, {}),
    "integrated": (IntegratedGradients, {"n_steps": 9}),
    "guided": (GuidedBackprop, {}),
    "deeplift": (DeepLift, {}),
    "lrp": (LRP, {}),
}


@pytest.mark.parametrize("layer", ["features.0", "features.1", "features.2", "features.3"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Setting :UserWarning", "ignore:Input Tensor:UserWarning")
def test_methods_equal_those_on_a_clean_sequential(tailed, layer, method):
    """At the ReLU layers this fails if the layer is read by a hook that fires before Captum's own."""
    model, _, x = tailed
    end = int(layer[-1]) + 1
    width = 4 * 36 if end <= 2 else 3 * 16
    srae = SRAE(width, 3, hidden=(6,))
    flatten = nn.Flatten()
    parts = [*model.features[:end], flatten, *srae.encoder]
    if method == "lrp":  # no rule for nn.Flatten in Captum
        parts.remove(flatten)
        clean = Flattened(nn.Sequential(*model.features[:end]), srae.encoder)
    else:
        clean = nn.Sequential(*parts)
    network = composed(model, layer, srae, x)
    cls, settings = METHODS[method]
    for k in range(3):
        wanted = cls(clean).attribute(x.clone(), target=k, **settings).detach()
        given = cls(network).attribute(x.clone(), target=k, **settings).detach()
        assert bool(wanted.abs().max() > 0)
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-7)


class Flattened(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x).flatten(1))


@pytest.mark.parametrize("layer", ["features.1", "features.3"])
def test_guided_rules_hold_at_the_layer_itself(tailed, layer):
    """Guided backpropagation differs from the gradient there, or the test above could not see a missing rule."""
    model, _, x = tailed
    srae = SRAE(4 * 36 if layer == "features.1" else 48, 3, hidden=())
    network = composed(model, layer, srae, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        guided = GuidedBackprop(network).attribute(x.clone(), target=0)
        plain = Saliency(network).attribute(x.clone(), target=0, abs=False)
    assert bool((guided - plain).abs().max() > 1e-3 * plain.abs().max())


def test_grad_cam_at_an_inner_layer_and_at_the_layer_itself(tailed):
    model, srae, x = tailed
    network = composed(model, "features.3", srae, x)
    for inner in (model.features[1], model.features[3]):
        given = LayerGradCam(network, inner).attribute(x, target=1)
        A = x
        for module in model.features:
            A = module(A)
            if module is inner:
                A = kept = A.detach().requires_grad_()
        (grad,) = torch.autograd.grad(srae.encode(A)[:, 1].sum(), kept)
        wanted = (grad.mean((2, 3), keepdim=True) * kept).sum(1, keepdim=True)
        torch.testing.assert_close(given, wanted)


def test_executed_leaves_are_registered_once_each(tailed):
    model, srae, x = tailed
    network = composed(model, "features.3", srae, x)
    leaves = [m for m in network.modules() if not list(m.children())]
    assert leaves == [*model.features, *srae.encoder]
    assert len({id(p) for p in network.parameters()}) == len(list(network.parameters())) == 8
    visited = []
    network.apply(lambda m: visited.append(m))
    assert sum(m is model.features[1] for m in visited) == 1
    assert model not in visited and srae.head not in visited and srae.decoder not in visited
    assert {id(p) for p in network.parameters()}.isdisjoint(map(id, model.tail.parameters()))


def test_shared_leaves_are_registered_once():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Sequential(nn.Linear(4, 4), relu), nn.Linear(4, 2))
    network = composed(model, "2", SRAE(4, 2, hidden=()), torch.zeros(1, 4))
    assert [m for m in network.executed] == [model[0], relu, model[2][0]]


def test_encoder_and_model_share_no_leaf_twice():
    """The registry is made of the trained modules themselves, not of copies."""
    model, srae = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), SRAE(3, 2, hidden=(2,))
    network = composed(model, "1", srae, torch.zeros(1, 4))
    with torch.no_grad():
        model[0].bias += 1
        srae.encoder[2].bias += 1
    x = torch.randn(5, 4)
    torch.testing.assert_close(network(x), srae.encode(model(x)))


def test_network_neither_runs_nor_changes_what_follows_the_layer(tailed):
    model, srae, x = tailed
    model.tail = nn.Sequential(Broken())
    network = ExplanationNetwork(model, model.features, srae)
    assert network(x).shape == (3, 4)
    assert model.training is False and not network.training


class Broken(nn.Module):
    def forward(self, x):
        raise AssertionError("what follows the layer must not run")


def test_wrapped_models_and_transforms(tailed):
    model, srae, x = tailed
    wanted = ExplanationNetwork(model, "features", srae)(x)
    torch.testing.assert_close(ExplanationNetwork(nn.DataParallel(model), "features", srae)(x), wanted)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(ExplanationNetwork(compiled, model.features, srae)(x), wanted)
    halved = ExplanationNetwork(model, "features", srae, output_transform=lambda z: z / 2)
    torch.testing.assert_close(halved(x), srae.encode(model.features(x) / 2))


def test_half_precision_models_keep_a_float32_encoder(tailed):
    model, srae, x = tailed
    model, x = model.bfloat16(), x.bfloat16()
    network = ExplanationNetwork(model, "features", srae)
    assert network(x).dtype == torch.float32
    torch.testing.assert_close(network(x), srae.encode(model.features(x).float()))


def test_errors_name_the_layer(tailed):
    model, srae, x = tailed
    with pytest.raises(LayerNotFoundError, match="near names: 'features'"):
        ExplanationNetwork(model, "feature", srae)
    with pytest.raises(LayerNotReachedError, match="layer 'unused'"):
        ExplanationNetwork(model, "unused", srae)(x)
