"""Twins made of modules: the same outputs, and the results that Captum has on a network written in modules by hand."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from captum.attr import (
    LRP,
    Deconvolution,
    DeepLift,
    DeepLiftShap,
    GuidedBackprop,
    GuidedGradCam,
    IntegratedGradients,
    LayerDeepLift,
    LayerIntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from captum.attr._utils.custom_modules import Addition_Module
from torch import nn
from torch.nn import functional as F

from captum_xnn.errors import LayerNotReachedError, UnsupportedOperationError
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.heatmaps._canonical import Twins, canonical
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._trace import trace
from captum_xnn.models import SRAE

K = 3


class Residual(nn.Module):
    """A block as torchvision writes it, in one of several spellings."""

    def __init__(self, way="modules"):
        super().__init__()
        self.way = way
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(64, 6)
        self.relu, self.pool = nn.ReLU(inplace=way == "shared"), nn.MaxPool2d(2)
        if way == "modules":
            self.relus, self.add = nn.ModuleList(nn.ReLU() for _ in range(3)), Addition_Module()

    def forward(self, x, gain=None):
        if self.way == "modules":
            x = self.pool(self.relus[0](self.norm(self.a(x))).clone())
            x = self.relus[2](self.add(self.relus[1](self.b(x)), x))
        elif self.way in ("shared", "reused"):
            x = self.pool(self.relu(self.norm(self.a(x))))
            y = self.relu(self.b(x))
            y += x
            x = self.relu(y)
        elif self.way == "functions":
            x = F.max_pool2d(F.relu(self.norm(self.a(x))), 2)
            x = torch.relu(torch.add(F.relu(self.b(x)), other=x))
        else:  # methods
            x = F.max_pool2d(self.norm(self.a(x)).relu(), kernel_size=2)
            x = self.b(x).relu_().add(x).relu()
        if gain is not None:
            x = x * gain
        return self.fc(torch.flatten(F.dropout(x, training=self.training), 1))


WAYS = ["shared", "reused", "functions", "methods"]


def residual(way="modules"):
    model = Residual("modules").eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.norm.running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=g) / max(1, tensor[0].numel()) ** 0.5)
    other = Residual(way).eval()
    other.load_state_dict(model.state_dict())
    return other


def network_of(model, layer, *inputs, hidden=(5,)):
    torch.manual_seed(2)
    module = model.get_submodule(layer)
    found = trace(model, module, inputs)
    with torch.no_grad():
        width = ExplanationNetwork(model, layer, SRAE(1, K, hidden=()), trace=found).activations(*inputs)[0].numel()
    return ExplanationNetwork(model, layer, SRAE(width, K, hidden=hidden), trace=found).eval()


def images(n=3, size=8):
    return torch.randn(n, 2, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layer", ["fc", "b", "norm"])
@pytest.mark.parametrize("way", ["modules", *WAYS])
def test_outputs_are_the_same_bits(way, layer):
    x = images()
    network = network_of(residual(way), layer, x)
    twin = canonical(network, (x,))
    assert torch.equal(twin(x), network(x))
    used = [id(m) for m in twin.graph.modules() if not list(m.children())]
    called = [twin.graph.get_submodule(n.target) for n in twin.graph.graph.nodes if n.op == "call_module"]
    assert sorted(map(id, called)) == sorted(used)  # each once
    assert {id(p) for p in twin.graph.parameters()} <= {id(p) for p in network.model.parameters()}


METHODS = {
    "DeepLift": (DeepLift, {}),
    "DeepLiftShap": (DeepLiftShap, {"baselines": torch.zeros(2, 2, 8, 8)}),
    "LRP": (LRP, {}),
    "GuidedBackprop": (GuidedBackprop, {}),
    "Deconvolution": (Deconvolution, {}),
    "GuidedGradCam": (GuidedGradCam, {"layer": "b"}),
    "LayerDeepLift": (LayerDeepLift, {"layer": "b"}),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_maps_are_those_of_a_network_written_in_modules(way, name):
    """By Captum's own class, once per x-feature."""
    method, settings = METHODS[name]
    x = images()
    clean = network_of(residual("modules"), "fc", x)

    class Clean(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.encoder = clean.model, clean.xnn_encoder

        def forward(self, x):
            return self.encoder(self.model(x))

    hand, call = Clean().eval(), {k: v for k, v in settings.items() if k != "layer"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        construct = [hand.model.b] if "layer" in settings else []
        one = [method(hand, *construct).attribute(x.clone(), target=k, **call).detach() for k in range(K)]
    wanted = torch.stack(one, 1)
    assert bool(wanted.abs().max() > 0)
    (given,) = FromCaptum(method, **settings)(network_of(residual(way), "fc", x), (x,), range(K))
    if wanted.shape[2] == 4:  # a layer's
        wanted = F.interpolate(wanted.sum(2), x.shape[2:], mode="bilinear")[:, :, None]
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_they_were_wrong_before(way):
    """What Captum makes of the network as it is, so that the tests here would notice if nothing were rewritten."""
    x = images()
    network = network_of(residual(way), "fc", x)
    twin = canonical(network, (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        right = LRP(twin).attribute(x.clone(), target=0)
        try:
            assert not torch.allclose(LRP(network).attribute(x.clone(), target=0), right, rtol=0.01)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)


def test_additional_arguments_decide_what_runs():
    x, model = images(), residual("functions")
    (one,) = FromCaptum(DeepLift)(network_of(model, "fc", x), (x,), range(K))
    (two,) = FromCaptum(DeepLift)(network_of(model, "fc", x), (x,), range(K), additional_forward_args=(2.0,))
    gain = torch.full((3, 1, 1, 1), 2.0)
    (three,) = FromCaptum(DeepLift)(network_of(model, "fc", x), (x,), range(K), additional_forward_args=(gain,))
    assert not torch.allclose(one, two)
    torch.testing.assert_close(two, three)


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(F.relu(self.a(x))) if x.sum() > -1e9 else self.a(x)


def test_models_that_decide_by_values():
    x = torch.randn(3, 4)
    network = network_of(Decides(), "b", x)
    for method in (LRP, GuidedBackprop):
        with pytest.raises(
            UnsupportedOperationError,
            match=r"torch\.fx cannot follow .* layer 'b'.*control flow.*Integrated",
        ):
            FromCaptum(method)(network, (x,), range(K))
    with pytest.raises(UnsupportedOperationError, match="attributions of DeepLift should sum"):
        FromCaptum(DeepLift)(network, (x,), range(K))


class Gated(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.a, self.b, self.activation = nn.Linear(4, 6), nn.Linear(6, 6), activation

    def forward(self, x):
        x = self.a(x)
        return self.b(self.activation(x) * x.sigmoid())


@pytest.mark.parametrize(
    ("method", "activation", "named"),
    [
        (LRP, nn.ReLU(), "mul"),
        (LRP, nn.GELU(), "GELU"),
        (GuidedBackprop, nn.GELU(), "GELU"),
        (Deconvolution, F.silu, "silu"),
    ],
)
def test_operations_without_a_rule_are_refused_by_name(method, activation, named):
    x = torch.randn(3, 4)
    network = network_of(Gated(activation), "b", x)
    with pytest.raises(UnsupportedOperationError, match=f"{method.__name__} has no rule for .*{named}"):
        FromCaptum(method)(network, (x,), range(K))
    (maps,) = FromCaptum(IntegratedGradients, n_steps=500)(network, (x,), range(K))
    difference = network(x) - network(0 * x)
    torch.testing.assert_close(maps.sum(2), difference.detach(), rtol=1e-3, atol=1e-4)


class Clamped(nn.Module):
    """Rectified in one of several spellings."""

    def __init__(self, way):
        super().__init__()
        self.way, self.a, self.b = way, nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)

    def forward(self, x):
        return self.b(self.way(self.a(x)))


SPELLINGS = [
    lambda x: x.clamp(min=0),
    lambda x: torch.clamp(x, 0),
    lambda x: x.clamp_min_(0.0),
    lambda x: torch.clip(x, min=0),
]


@pytest.mark.parametrize("spelling", range(len(SPELLINGS)))
@pytest.mark.parametrize("method", [DeepLift, LRP, GuidedBackprop])
def test_clamps_at_zero_are_rectifiers(method, spelling):
    x = images()
    models = [Clamped(way).eval() for way in (F.relu, SPELLINGS[spelling])]
    models[1].load_state_dict(models[0].state_dict())
    wanted, given = (FromCaptum(method)(network_of(m, "b", x), (x,), range(K))[0] for m in models)
    assert bool(wanted.any())
    torch.testing.assert_close(given, wanted)


class Beside(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self, x):
        return self.other(F.relu(x - 1) + x)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (nn.ReLU6(), "ReLU6"),
        (nn.Hardswish(), "Hardswish"),
        (F.relu6, "relu6"),
        (lambda x: x.clamp(0, 6), "clamp"),
        (lambda x: torch.maximum(x, 0 * x), "maximum"),
        (nn.PReLU(), "PReLU"),
    ],
)
@pytest.mark.parametrize("method", [GuidedBackprop, Deconvolution])
def test_guided_methods_are_refused_where_only_some_rectifiers_are_seen(method, other, named):
    """As in MobileNets, whose ReLU6 and Hardswish Captum leaves as they are, beside ReLUs that it does not."""
    x = images()
    network = network_of(Clamped(Beside(other)), "b", x)
    with pytest.raises(UnsupportedOperationError, match=f"{method.__name__} has no rule for {named}, .* the plain"):
        FromCaptum(method)(network, (x,), range(K))


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.LSTM(6, 6)])
def test_guided_methods_do_not_look_into_what_is_taken_as_a_whole(layer):
    class Taken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.fc = layer, nn.Linear(6, 4)

        def forward(self, x):
            made = self.layer(x)
            return self.fc(made[0] if isinstance(self.layer, nn.LSTM) else made)

    x = torch.randn(3, 2, 6)
    network = network_of(Taken().eval(), "fc", x)
    with pytest.raises(
        UnsupportedOperationError,
        match=f"no rule for {type(layer).__name__}, .* plain gradient",
    ):
        FromCaptum(GuidedBackprop)(network, (x,), range(K))


def test_guided_methods_take_sigmoids_that_gate_beside_rectifiers():
    x = images()
    network = network_of(Clamped(lambda x: F.relu(x) * x.mean((2, 3), True).sigmoid()), "b", x)
    (given,) = FromCaptum(GuidedBackprop)(network, (x,), range(K))
    assert not torch.allclose(given, FromCaptum(Saliency, abs=False)(network, (x,), range(K))[0], rtol=0.01)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_guided_methods_on_mobilenets(name, torchvision):
    model, x = getattr(torchvision.models, name)(weights=None).eval(), torch.randn(1, 3, 32, 32)
    for method in (GuidedBackprop, Deconvolution, GuidedGradCam):
        with pytest.raises(UnsupportedOperationError, match=r"ReLU6|Hardswish"):
            FromCaptum(method)(network_of(model, "features", x), (x,), range(K))


class Two(nn.Module):
    """Something before the layer b, something after."""

    def __init__(self, before, after):
        super().__init__()
        self.before, self.after = before, after
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x):
        return self.c(self.after(self.b(self.before(self.a(x)))) * self.scale / 2)


@pytest.mark.parametrize(
    ("after", "named"),
    [
        (nn.GELU(), "GELU"),
        (nn.LayerNorm(6), "LayerNorm"),
        (nn.ReLU6(), "ReLU6"),
        (F.silu, "silu"),
        (lambda x: x * x, "mul"),
        (lambda x: 1 / (x + 9), "truediv"),
    ],
)
def test_deeplift_at_a_layer_before_what_it_does_not_know(after, named):
    """Where its delta says nothing, for there may be ways around the layer."""
    x = torch.randn(3, 4)
    network = network_of(Two(nn.ReLU(), after), "c", x)
    with pytest.raises(UnsupportedOperationError, match=f"LayerDeepLift has no rule for .*{named}, and would"):
        FromCaptum(LayerDeepLift, layer="b")(network, (x,), range(K))


def test_deeplift_at_a_layer_behind_what_it_does_not_know():
    """At the layer's output it sums to the difference, whatever is before."""
    x = torch.randn(3, 4)
    network = network_of(Two(nn.GELU(), nn.ReLU()), "c", x)
    (given,) = FromCaptum(LayerDeepLift, layer="b")(network, (x,), range(K))
    difference = (network(x) - network(0 * x)).detach()
    torch.testing.assert_close(given.sum(2), difference, rtol=1e-4, atol=1e-6)


class Halved(DeepLift):
    """A user's own."""

    def attribute(self, inputs, target=None, additional_forward_args=None):
        return super().attribute.__wrapped__(self, inputs, None, target, additional_forward_args) / 2


@pytest.mark.parametrize(
    "backend",
    [
        FromCaptum(NoiseTunnel, attribution_method=DeepLift, nt_samples=2, stdevs=0.0),
        FromCaptum(DeepLift, multiply_by_inputs=False),
        FromCaptum(Halved),
    ],
    ids=["noise", "multipliers", "subclass"],
)
def test_forms_of_deeplift_whose_delta_says_nothing(backend):
    x = torch.randn(3, 4)
    with pytest.raises(UnsupportedOperationError, match=r"no rule for GELU, and would silently treat them as linear"):
        backend(network_of(Two(nn.GELU(), nn.ReLU()), "c", x), (x,), range(K))
    network = network_of(Two(nn.ReLU(), nn.Tanh()), "c", x)
    (given,), difference = backend(network, (x,), range(K)), (network(x) - network(0 * x)).detach()
    if "multiply_by_inputs" in repr(backend):
        given = given * x[:, None]
    if backend.method is Halved:
        given = 2 * given
    torch.testing.assert_close(given.sum(2), difference, rtol=1e-4, atol=1e-6)


class Awkward(nn.Module):
    """Sizes that depend on the input, an input that is overwritten, a softmax with all its arguments."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3), nn.Linear(4, 6)

    def forward(self, x):
        x = self.a(x.mul_(2))
        x = F.avg_pool2d(F.relu(x, True), x.size()[2:]).flatten(1)
        return self.b(F.softmax(x, dim=1, dtype=None) + x.mean())


def test_awkward_models():
    x = images()
    network = network_of(Awkward(), "b", x.clone())
    twin = canonical(network, (x.clone(),))
    assert torch.equal(twin(x.clone()), network(x.clone()))
    assert {type(m).__name__ for m in twin.called()} == {"Conv2d", "ReLU", "Softmax", "Addition_Module", "Linear"}


def test_layers_inside_of_what_is_taken_as_a_whole():
    model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True))
    x = torch.randn(2, 3, 6)
    with pytest.raises(UnsupportedOperationError, match=r"inside of a module that torch\.fx takes as a whole"):
        canonical(network_of(model, "0.norm1", x), (x,))


def test_layers_that_are_taken_apart():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), nn.Flatten(), nn.Linear(64, 6)
    )
    x = images()
    with pytest.raises(UnsupportedOperationError, match=r"layer '1' is not one operation .*name the last layer in it"):
        FromCaptum(GuidedGradCam, layer="1")(network_of(model, "3", x), (x,), range(K))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.unused, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.head(self.layer(x + self.attention(x, x, x)[0]).mean(1))


@pytest.mark.parametrize(
    ("layer", "error", "told"),
    [
        ("attention", UnsupportedOperationError, "layer 'attention' is not one operation that gives one tensor"),
        ("attention.out_proj", LayerNotReachedError, "layer 'attention.out_proj' does not run before"),
        ("layer.norm1", UnsupportedOperationError, "'layer.norm1' is a part of 'layer', a TransformerEncoderLayer"),
        ("unused", LayerNotReachedError, "layer 'unused' does not run before"),
    ],
)
def test_deeplift_at_layers_of_attention_says_what_is_wrong_with_them(layer, error, told):
    """A layer that ran is not said to have never run, and what is advised works."""
    x = torch.randn(4, 3, 6)
    network = network_of(Attends().eval(), "head", x)
    with pytest.raises(error, match=told):
        FromCaptum(LayerDeepLift, layer=layer)(network, (x,), range(K))
    if error is UnsupportedOperationError:
        (maps,) = FromCaptum(LayerIntegratedGradients, layer=layer, n_steps=2)(network, (x,), range(K))
        assert bool(maps.any())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", [DeepLift, LRP, GuidedBackprop])
def test_the_model_is_as_before(method, way):
    x, model = images(), residual(way)
    network = network_of(model, "fc", x)
    before = [(name, type(m), sorted(vars(m)), getattr(m, "inplace", None)) for name, m in model.named_modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    FromCaptum(method)(network, (x,), range(K))
    assert before == [
        (name, type(m), sorted(vars(m)), getattr(m, "inplace", None)) for name, m in model.named_modules()
    ]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


# Each with a layer behind everything that Captum alone gets wrong there.
FAMILIES = {
    "vgg11": ("avgpool", 32),
    "vgg11_bn": ("avgpool", 32),
    "resnet18": ("avgpool", 64),
    "resnet50": ("avgpool", 64),
    "densenet121": ("features", 64),
    "squeezenet1_1": ("features", 64),
    "alexnet": ("avgpool", 64),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvisions_networks(name, torchvision):
    layer, size = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    x = torch.randn(1, 3, size, size)
    network = network_of(model, layer, x)
    twin = canonical(network, (x,))
    assert torch.equal(twin(x), network(x))
    for k in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            _, delta = DeepLift(twin).attribute(x.clone(), target=k, return_convergence_delta=True)
            guided, plain = (
                m(twin).attribute(x.clone(), target=k, **s)
                for m, s in ((GuidedBackprop, {}), (Saliency, {"abs": False}))
            )
        with torch.no_grad():
            difference = (twin(x) - twin(0 * x))[:, k]
        assert float(delta.detach().abs()) <= 1e-3 * float(difference.abs())
        assert not torch.allclose(guided, plain, rtol=0.01)
    (maps,) = FromCaptum(LRP)(network, (x,), [0])
    assert bool(torch.isfinite(maps).all()) and 0 < float(maps.abs().sum()) < 1e3 * float(
        network(x)[:, 0].detach().abs()
    )


class Mean(nn.Module):
    """Means over places, in several spellings."""

    def __init__(self, way):
        super().__init__()
        self.way, self.a, self.fc = way, nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
        self.pool = nn.AdaptiveAvgPool2d(1) if way == "module" else None

    def forward(self, x):
        x = F.relu(self.a(x))
        if self.way == "module":
            x = torch.flatten(self.pool(x), 1)
        elif self.way == "method":
            x = x.mean((2, 3))
        elif self.way == "function":
            x = torch.mean(x, dim=[-1, -2])
        elif self.way == "kept":
            x = x.mean((-2, -1), True).flatten(1)
        else:
            x = x.mean(2).mean(2)
        return self.fc(x)


@pytest.mark.parametrize("way", ["method", "function", "kept"])
def test_means_over_places_are_poolings(way):
    x = images()
    models = [Mean("module").eval(), Mean(way).eval()]
    models[1].load_state_dict(models[0].state_dict())
    wanted, given = (FromCaptum(LRP)(network_of(m, "fc", x), (x,), range(K))[0] for m in models)
    torch.testing.assert_close(given, wanted)
    with pytest.raises(UnsupportedOperationError, match="no rule for mean"):
        FromCaptum(LRP)(network_of(Mean("one by one").eval(), "fc", x), (x,), range(K))


def test_twins_are_kept_until_the_model_changes():
    """Also where the change is none of its weights."""
    x = images()
    network, twins = network_of(residual("functions"), "fc", x), Twins()
    first = twins.of(network, (x,))
    assert twins.of(network, (x[:1],)).graph is first.graph
    with torch.no_grad():
        network.model.a.weight *= 2  # which both share
    assert twins.of(network, (x,)).graph is first.graph
    network.model.a = nn.Conv2d(2, 4, 3, padding=1)
    second = twins.of(network, (x,))
    assert second.graph is not first.graph and torch.equal(second(x), network(x))
    network.model.way = "methods"
    third = twins.of(network, (x,))
    assert third.graph is not second.graph and torch.equal(third(x), network(x))
    network.model.norm.weight = nn.Parameter(-network.model.norm.weight)
    assert torch.equal(twins.of(network, (x,))(x), network(x))


class Token(nn.Module):
    """A parameter of its own, which a graph refers to by name."""

    def __init__(self):
        super().__init__()
        self.token, self.fc = nn.Parameter(torch.ones(6)), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(F.relu(x + self.token))


def test_twins_of_models_whose_own_parameter_is_replaced():
    model, x, twins = Token(), torch.randn(2, 6), Twins()
    network = network_of(model, "fc", x)
    twins.of(network, (x,))
    for value in (2.0, 3.0):
        model.token = nn.Parameter(torch.full((6,), value))
        assert torch.equal(twins.of(network, (x,))(x), network(x))
    model.token.data *= -1
    assert torch.equal(twins.of(network, (x,))(x), network(x))


def test_kept_twins_do_not_keep_the_model():
    backend, x = FromCaptum(LRP), images()
    model = residual("functions")
    wanted = backend(network_of(model, "fc", x), (x,), range(K))
    assert torch.equal(backend(network_of(model, "fc", x), (x,), range(K))[0], wanted[0])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_arguments_that_are_no_tensors_have_twins_of_their_own():
    x, twins = images(), Twins()
    network = network_of(residual("functions"), "fc", x)
    for gain in (None, 2.0, 3.0):
        assert torch.equal(twins.of(network, (x, gain))(x, gain), network(x, gain))
