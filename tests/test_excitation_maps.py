"""The default heatmaps, by excitation backprop, and where they stop."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from captum_xnn import ExcitationBP, LayerExcitationBP, XNNAttribution
from captum_xnn.errors import LayerNotFoundError, LayerNotReachedError, UnsupportedOperationError
from captum_xnn.excitation_bp._graph import Graph, cuts, topological
from captum_xnn.excitation_bp._stopping import stopping_layer
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._trace import trace
from captum_xnn.models import SRAE
from captum_xnn.training import Recipe

# Small random nets lose probability.
pytestmark = pytest.mark.filterwarnings("ignore:probabilities sum to")

K = 5


def network_of(model, layer, x, n_features=K):
    """x-features of a layer, with random weights."""
    module = model.get_submodule(layer)
    with torch.no_grad():
        width = module_output(model, module, x[:1]).flatten(1).shape[1]
    srae = SRAE(width, n_features, hidden=(8,)).to(next(model.parameters()).dtype)
    return ExplanationNetwork(model, layer, srae, trace=trace(model, module, (x[:1],)))


def module_output(model, module, x):
    seen = []
    handle = module.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(x)
    handle.remove()
    return seen[-1]


def images(n=3, size=(32, 32), dtype=torch.float32):
    return torch.rand(n, 2, *size, dtype=dtype)


def cnn(inplace=False):
    """16 x 16 cells after layer 1, 8 x 8 after layer 4."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(inplace), nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 12),
        nn.ReLU(inplace), nn.Linear(12, 4),
    ).eval()  # fmt: skip


def test_maps_of_all_features_are_those_of_each():
    model, x = cnn(), images()
    network = network_of(model, "8", x)
    (maps,) = ExcitationMaps()(network, (x,), range(K))
    assert maps.shape == (3, K, 1, 32, 32)
    for k in range(K):
        assert torch.equal(ExcitationMaps()(network, (x,), [k])[0][:, 0], maps[:, k])
    for i in range(3):
        torch.testing.assert_close(ExcitationMaps()(network, (x[i : i + 1],), range(K))[0], maps[i : i + 1])
    (some,) = ExcitationMaps()(network, (x,), [4, 0, 4])
    assert torch.equal(some, maps[:, [4, 0, 4]])


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        (1, [1] * 15),  # 3 examples, each with 5 features one by one
        (2, [1] * 9),  # 3 examples, each with 2, 2 and 1 features
        (3, [1] * 6),
        (4, [1] * 6),
        (7, [1] * 3),
        (10, [2, 1]),
        (100, [3]),
        (None, [3]),
    ],
)
def test_internal_batch_size_bounds_the_rows_and_changes_nothing(size, rows):
    model, x = cnn(), images()
    network = network_of(model, "8", x)
    backend = ExcitationMaps("4")  # reads the layout of its layer once, on one example
    (maps,) = backend(network, (x,), range(K))
    ran = []
    with model[0].register_forward_hook(lambda _m, _i, out: ran.append(len(out))):
        (bounded,) = backend(network, (x,), range(K), internal_batch_size=size)
    assert ran == rows
    torch.testing.assert_close(bounded, maps)


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("layer", ["1", "4", None])
def test_maps_are_the_positive_side_of_winning_probabilities(layer, contrastive):
    model, x = cnn(), images(6)
    network = network_of(model, "8", x)
    (maps,) = ExcitationMaps(layer, contrastive=contrastive)(network, (x,), range(K))
    E = network(x).detach()
    assert (E < 0).any() and (E > 0).any()
    for k in range(K):
        P = LayerExcitationBP(Composed(network), network.model.get_submodule(layer or "1"), contrastive=contrastive)
        cells = P.attribute(x, k).sum(1, keepdim=True)
        if contrastive:
            cells = cells * E[:, k].sign()[:, None, None, None]
        wanted = F.interpolate(cells.clamp(min=0), (32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(maps[:, k], wanted)
        assert maps[:, k].max() > 0


@pytest.mark.parametrize("contrastive", [True, False])
def test_maps_of_a_residual_network_and_of_images_that_are_not_square(contrastive):
    """The same equation, in double precision."""
    model = Residual(norm=True).eval().double()
    x = images(4, (64, 96), torch.float64)
    network = network_of(model, "head", x)
    maps = ExcitationMaps(contrastive=contrastive)
    (given,) = maps(network, (x,), range(K))
    assert given.shape == (4, K, 1, 64, 96)
    E = network(x).detach()
    for k in range(K):
        cells = LayerExcitationBP(Composed(network), model.out, contrastive=contrastive).attribute(x, k)
        assert cells.shape == (4, 4, 16, 24)
        drawn = cells.sum(1, keepdim=True) * (E[:, k].sign()[:, None, None, None] if contrastive else 1)
        wanted = F.interpolate(drawn.clamp(min=0), (64, 96), mode="bilinear", align_corners=False)
        torch.testing.assert_close(given[:, k], wanted, rtol=1e-12, atol=1e-15)


class Composed(nn.Module):
    """From the input to the x-features, as one module."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *x):
        return self.network(*x)


def halves():
    """Two x-features of 4 x 4 pixels: the left half's sum less the right half's, and the other way round."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Flatten()).double()
    srae = SRAE(16, 2, hidden=()).double()
    side = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(4)
    with torch.no_grad():
        model[0].weight.fill_(1)
        srae.encoder[0].weight.copy_(torch.stack([side, -side]))
        srae.encoder[0].bias.zero_()
    return ExplanationNetwork(model, "2", srae)


def test_a_negative_feature_shows_what_makes_it_negative():
    network = halves()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64) + 0.1
    x[0, :, :, :2] += 2  # brighter on the left
    x[1, :, :, 2:] += 2
    E = network(x).detach()
    assert E[0, 0] > 0 > E[0, 1] and E[1, 0] < 0 < E[1, 1]
    (maps,) = ExcitationMaps("1")(network, (x,), [0, 1])
    # Each pixel's share of the half that speaks for the sign; the other half is clamped away. Both features are of the
    # same opinion, as one is the other's negative.
    wanted = torch.zeros(2, 4, 4, dtype=torch.float64)
    wanted[0, :, :2] = x[0, 0, :, :2] / x[0, 0, :, :2].sum()
    wanted[1, :, 2:] = x[1, 0, :, 2:] / x[1, 0, :, 2:].sum()
    for k in (0, 1):
        torch.testing.assert_close(maps[:, k, 0], wanted)


def test_without_contrast_the_sign_does_not_matter():
    network = halves()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64) + 0.1
    x[1, :, :, 2:] += 2
    (maps,) = ExcitationMaps("1", contrastive=False)(network, (x,), [0])
    wanted = x.clone()[:, 0]
    wanted[:, :, 2:] = 0
    torch.testing.assert_close(maps[:, 0, 0], wanted / wanted.sum((1, 2), keepdim=True))


def test_maps_sum_to_at_most_one_in_cells():
    """With a layer of the image's size no map is enlarged."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(96, 8))
    x = images(5)
    network = network_of(model.eval(), "4", x)
    sums = [ExcitationMaps("1", contrastive=c)(network, (x,), range(K))[0].sum((2, 3, 4)) for c in (True, False)]
    assert 0 < sums[0].max() <= 1 + 1e-5
    torch.testing.assert_close(sums[1], torch.ones(5, K))


@pytest.mark.parametrize(("contrastive", "down"), [(True, 2), (False, 1)])
@pytest.mark.parametrize("n", [1, 4])
def test_five_maps_cost_one_forward_and_one_batched_backward(n, contrastive, down, monkeypatch):
    model, x = cnn(), images(n)
    network = network_of(model, "8", x)
    maps = ExcitationMaps(contrastive=contrastive)
    forwards, descents, descend = [], [], Graph.descend

    def counted(graph, starts, *args, **kwargs):
        descents.append(len(starts[0][1]))
        return descend(graph, starts, *args, **kwargs)

    monkeypatch.setattr(Graph, "descend", counted)
    with model[0].register_forward_hook(lambda _m, _i, out: forwards.append(len(out))):
        for features in (range(K), range(K), [2]):
            maps(network, (x,), features)
            # One to the layer with weights that comes last, where contrasts are taken, and one from there.
            assert descents == [len(features)] * down
            descents.clear()
    assert forwards == [1, n, n, n]  # the first one chooses the layer


def test_a_layer_is_chosen_once_for_each_size_and_explained_layer():
    model, x = cnn(), images(2)
    networks = [network_of(model, layer, x) for layer in ("8", "4")]
    maps, forwards = ExcitationMaps(), []
    with model[0].register_forward_hook(lambda _m, _i, out: forwards.append(len(out))):
        for network, size in ((0, 32), (0, 32), (1, 32), (0, 32), (1, 32)):
            maps(networks[network], (images(2, (size, size)),), range(K))
        assert forwards == [1, 2, 2, 1, 2, 2, 2]
        forwards.clear()
        maps(networks[0], (images(2, (32, 36)),), range(K))
        maps(networks[0], (images(2, (32, 36)),), range(K))
        assert forwards == [1, 2, 2]
    wanted = ExcitationMaps(stopping_layer(model, networks[0], x[:1]))(networks[0], (x,), range(K))
    assert torch.equal(maps(networks[0], (x,), range(K))[0], wanted[0])
    kept = weakref.ref(model)
    del model, networks, network
    gc.collect()
    assert kept() is None


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.hidden(self.embedding(ids)).relu().mean(1))


def test_tokens_stop_at_the_embedding():
    model, ids = Text().eval(), torch.randint(20, (4, 7))
    network = network_of(model, "head", ids)
    (maps,) = ExcitationMaps("embedding")(network, (ids,), range(K))
    assert maps.shape == (4, K, 7, 6) and maps.dtype == torch.float32
    E = network(ids).detach()
    for k in range(K):
        P = LayerExcitationBP(Composed(network), model.embedding).attribute(ids, k)
        torch.testing.assert_close(maps[:, k], (P * E[:, k].sign()[:, None, None]).clamp(min=0))
    with pytest.raises(TypeError, match=r"stop at the embedding"):
        ExcitationMaps()(network, (ids,), range(K))


def test_tables_and_several_inputs():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(4, 6)
    srae = SRAE(8, K, hidden=(8,))
    network = ExplanationNetwork(model, "1", srae, trace=trace(model, model[1], (x[:1],)))
    (maps,) = ExcitationMaps()(network, (x,), range(K))
    assert maps.shape == (4, K, 6) and maps.min() >= 0 and maps.max() > 0

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, a, b):
            return self.inner(torch.cat([a, b], 1))

    two = Two().eval()
    joined = ExplanationNetwork(two, "inner.1", srae, trace=trace(two, model[1], (x[:1, :2], x[:1, 2:])))
    parts = ExcitationMaps()(joined, (x[:, :2], x[:, 2:]), range(K))
    assert torch.equal(torch.cat(parts, 2), maps)
    # What is a further argument takes no share, and goes with its example.
    for size in (None, 1):
        (first,) = ExcitationMaps()(
            joined, (x[:, :2],), range(K), additional_forward_args=(x[:, 2:],), internal_batch_size=size
        )
        E = joined(x[:, :2], x[:, 2:]).detach()
        for k in range(K):
            P = ExcitationBP(Composed(joined)).attribute(x[:, :2], k, (x[:, 2:],))
            torch.testing.assert_close(first[:, k], (P * E[:, k].sign()[:, None]).clamp(min=0))


def test_images_of_a_model_without_feature_maps_or_cuts():
    """Maps at the pixels."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(2, 4, 2, stride=2), nn.ReLU(), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.cat([x.mean((2, 3)), self.relu(self.conv(x)).mean((2, 3))], 1))

    for model in (Skip(), nn.Sequential(nn.Flatten(), nn.Linear(2048, 6), nn.ReLU(), nn.Linear(6, 3))):
        x = images(2)
        network = network_of(model.eval(), "head" if isinstance(model, Skip) else "3", x)
        assert stopping_layer(model, network, x[:1]) is None
        (maps,) = ExcitationMaps()(network, (x,), range(K))
        E = network(x).detach()
        for k in range(K):
            P = ExcitationBP(Composed(network)).attribute(x, k) * E[:, k].sign()[:, None, None, None]
            torch.testing.assert_close(maps[:, k], P.clamp(min=0))


def test_layers_that_cannot_be_stopped_at():
    model, x = cnn(), images()
    network = network_of(model, "4", x)
    assert torch.equal(*(ExcitationMaps(layer)(network, (x,), range(K))[0] for layer in ("4", model[4])))
    with pytest.raises(LayerNotReachedError, match="did not call layer '6'"):  # it comes after the explained layer
        ExcitationMaps("6")(network, (x,), range(K))
    with pytest.raises(LayerNotFoundError, match="does not hold this ReLU"):
        ExcitationMaps(nn.ReLU())(network, (x,), range(K))
    with pytest.raises(TypeError, match="int is not a layer; pass a dotted name or a module"):
        ExcitationMaps(4)(network, (x,), range(K))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_scripted_parts_are_refused():
    model, x = cnn(), images()
    network = network_of(model, "8", x)
    model[4] = torch.jit.script(model[4])
    with pytest.raises(TypeError, match="runs as Python code, and cannot see operations of a RecursiveScriptModule"):
        ExcitationMaps()(network, (x,), range(K))


def test_settings_of_a_call_go_before_those_of_the_object():
    model, x = cnn(), images()
    network = network_of(model, "8", x)

    def drawn(maps, **call):
        return maps(network, (x,), range(K), **call)[0]

    assert torch.equal(drawn(ExcitationMaps(), layer="4"), drawn(ExcitationMaps("4")))
    assert torch.equal(drawn(ExcitationMaps(model[4])), drawn(ExcitationMaps("4")))
    assert torch.equal(drawn(ExcitationMaps("4"), contrastive=False), drawn(ExcitationMaps("4", contrastive=False)))
    assert not torch.equal(drawn(ExcitationMaps("4"), contrastive=False), drawn(ExcitationMaps("4")))
    assert torch.equal(drawn(ExcitationMaps("4", contrastive=False), contrastive=True), drawn(ExcitationMaps("4")))
    assert torch.equal(drawn(ExcitationMaps("4"), layer=None), drawn(ExcitationMaps()))
    assert not torch.equal(drawn(ExcitationMaps("4")), drawn(ExcitationMaps()))
    kept = ExcitationMaps("4", negative="clamp")
    drawn(kept, layer="1", negative="raw")
    assert repr(kept) == "ExcitationMaps(layer='4', negative='clamp')"
    with pytest.raises(TypeError, match="n_steps"):
        drawn(ExcitationMaps(), n_steps=3)
    with pytest.raises(ValueError, match=r"negative is .*; pass one of"):
        drawn(ExcitationMaps(), negative="shift")
    with pytest.raises(TypeError, match="n_steps"):
        ExcitationMaps(n_steps=3)
    with pytest.raises(ValueError, match=r"negative is .*; pass one of"):
        ExcitationMaps(negative="shift")
    with pytest.raises(LayerNotFoundError, match="has no layer '77'; near names"):
        drawn(ExcitationMaps("77"))
    with pytest.raises(LayerNotFoundError, match="has no layer '77'; near names"):
        drawn(ExcitationMaps(), layer="77")


class Odd(nn.Module):
    def forward(self, x):
        return x.cumprod(1)


def test_no_features_and_no_rows_are_refused():
    model, x = cnn(), images()
    network = network_of(model, "8", x)
    with pytest.raises(ValueError, match="at least one x-feature"):
        ExcitationMaps()(network, (x,), [])
    with pytest.raises(ValueError, match="internal_batch_size is -1; pass at least 1"):
        ExcitationMaps()(network, (x,), range(K), internal_batch_size=-1)


def test_strict_maps_refuse_operations_without_a_rule():
    model = nn.Sequential(*list(cnn())[:2], Odd(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))
    x = images()
    network = network_of(model.eval(), "5", x)
    for maps, call in ((ExcitationMaps("1", strict=True), {}), (ExcitationMaps("1"), {"strict": True})):
        with pytest.raises(UnsupportedOperationError, match=r"cumprod in '2'"):
            maps(network, (x,), range(K), **call)
    with pytest.warns(UserWarning, match=r"cumprod in '2' and takes their gradient"):
        ExcitationMaps("1")(network, (x,), range(K))


def test_objects_pickle_and_print():
    model, x = cnn(), images()
    network = network_of(model, "8", x)
    maps = ExcitationMaps("4", negative="clamp")
    assert repr(maps) == "ExcitationMaps(layer='4', negative='clamp')"
    assert repr(ExcitationMaps(contrastive=False, add="excitatory", batch_norm="pass", strict=True)) == (
        "ExcitationMaps(contrastive=False, add='excitatory', batch_norm='pass', strict=True)"
    )
    assert repr(ExcitationMaps(model[4])) == "ExcitationMaps(layer=ReLU())"
    wanted = maps(network, (x,), range(K))[0]
    for again in (pickle.loads(pickle.dumps(maps)), copy.deepcopy(maps)):
        assert repr(again) == repr(maps)
        assert torch.equal(again(network, (x,), range(K))[0], wanted)
    used = ExcitationMaps()
    wanted = used(network, (x,), range(K))[0]  # it has chosen a layer, which is not copied
    for again in (pickle.loads(pickle.dumps(used)), copy.deepcopy(used), copy.copy(used)):
        ran = []
        with model[0].register_forward_hook(lambda _m, _i, out, ran=ran: ran.append(len(out))):
            assert torch.equal(again(network, (x,), range(K))[0], wanted)
        assert ran == [1, 3]
    # A layer given as a module goes with its model.
    wanted = ExcitationMaps("4")(network, (x,), range(K))[0]
    for other, again in (
        copy.deepcopy((network, ExcitationMaps(model[4]))),
        pickle.loads(pickle.dumps((network, ExcitationMaps(model[4])))),
    ):
        assert other.model is not model
        assert torch.equal(again(other, (x,), range(K))[0], wanted)


def test_the_default_of_an_explainer_is_left_alone_by_it():
    model, x = cnn(inplace=True).train(), images(40)
    before = copy.deepcopy(model.state_dict())
    xnn = XNNAttribution(model, "8", n_features=2, autoencoder=SRAE, recipe=Recipe(steps=20))
    positives = torch.arange(40) % 2 == 0
    xnn.fit(x, target=1, positives=positives, progress=False)
    maps = xnn.attribute(x[:3], target=1)
    assert maps.shape == (3, 2, 1, 32, 32) and maps.dtype == x.dtype
    assert not maps.requires_grad and maps.is_contiguous() and maps.isfinite().all() and maps.min() >= 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def state(model):
    """All that a user could miss."""
    parts = {name: t.detach().clone() for name, t in model.state_dict().items()}
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    modules = {name: {k: v for k, v in vars(m).items() if not k.startswith("_")} for name, m in model.named_modules()}
    hooks = {name: [dict(v) for k, v in vars(m).items() if "_hooks" in k] for name, m in model.named_modules()}
    return parts, flags, modules, hooks


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("layer", [None, "5"])
def test_the_model_is_left_as_it_was(layer, fails):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4),
    ).train()  # fmt: skip
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model[8].weight.grad = torch.ones_like(model[8].weight)
    handle = model[2].register_forward_hook(lambda *_: None)
    x = images().requires_grad_()
    srae = SRAE(16, K, hidden=(8,))
    network = ExplanationNetwork(model, "7", srae)
    copied, parts, others = x.detach().clone(), *state(model)[:1], state(model)[1:]
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="to have 2 channels"):
            ExcitationMaps(layer)(network, (torch.zeros(3, 3, 32, 32),), range(K))
    else:
        (maps,) = ExcitationMaps(layer)(network, (x,), range(K))
        assert not maps.requires_grad and maps.grad_fn is None and maps.is_contiguous() and maps.dtype == x.dtype
        assert maps.min() >= 0 and maps.max() > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, copied) and x.grad is None and x.requires_grad
    now = state(model)
    assert all(torch.equal(now[0][name], t) for name, t in parts.items()) and now[1:] == others
    assert [len(m._forward_hooks) for m in model] == [0, 0, 1, 0, 0, 0, 0, 0, 0]
    handle.remove()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_grad_modes_make_no_difference(context):
    model, x = cnn(inplace=True), images()
    network = network_of(model, "8", x)
    (wanted,) = ExcitationMaps()(network, (x,), range(K))
    with context():
        (maps,) = ExcitationMaps()(network, (x * 1,), range(K))
        assert torch.equal(maps, wanted)


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("layer", [None, "0", "5"])
def test_dead_images_have_empty_maps(layer, contrastive):
    model = cnn()
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    x = torch.cat([torch.zeros(2, 2, 32, 32), images(1)])
    (maps,) = ExcitationMaps(layer, contrastive=contrastive)(network_of(model, "8", x), (x,), range(K))
    assert torch.equal(maps[:2], torch.zeros(2, K, 1, 32, 32))
    assert maps.isfinite().all() and maps[2].max() > 0


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-5), (torch.float16, 0.05), (torch.bfloat16, 0.3)])
def test_maps_have_the_dtype_of_the_image(dtype, close):
    model, x = cnn(), images()
    network = network_of(model, "8", x)
    (wanted,) = ExcitationMaps("4")(network, (x,), range(K))
    E = network(x).detach()
    model.to(dtype), network.xnn_encoder.xnn.to(dtype)
    (maps,) = ExcitationMaps("4")(network, (x.to(dtype),), range(K))
    (chosen,) = ExcitationMaps()(network, (x.to(dtype),), range(K))
    assert maps.dtype == chosen.dtype == dtype and chosen.isfinite().all() and chosen.max() > 0
    sure = E.abs() > 0.05  # of what sign the x-feature is
    assert sure.sum() > 8
    assert ((maps.float() - wanted)[sure].abs().amax((1, 2, 3)) <= close * wanted[sure].amax((1, 2, 3))).all()


def test_the_default_draws_each_target_with_its_own_explainer():
    model, x = cnn(), images(40)
    xnn = XNNAttribution(model, "8", n_features=2, autoencoder=SRAE, recipe=Recipe(steps=20))
    assert isinstance(xnn.heatmap.of_networks, ExcitationMaps)
    xnn.fit(x, target=[0, 1], positives=torch.arange(40) % 2 == 0, progress=False)
    targets = [1, 0, 0, 1]
    maps = xnn.attribute(x[:4], targets)
    assert maps.shape == (4, 2, 1, 32, 32)
    for i, target in enumerate(targets):
        torch.testing.assert_close(xnn.attribute(x[i : i + 1], target), maps[i : i + 1])
    assert not torch.allclose(xnn.attribute(x[:4], 0), maps)
    assert torch.equal(xnn.attribute(x[:4], targets, layer="1"), maps)
    assert not torch.allclose(xnn.attribute(x[:4], targets, layer="4"), maps)
    assert not torch.allclose(xnn.attribute(x[:4], targets, contrastive=False), maps)


def test_a_layer_with_channels_last_is_summed_over_channels():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.mix, self.act = nn.Conv2d(2, 4, 4, stride=4), nn.Linear(4, 6), nn.ReLU()
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.act(self.mix(self.cells(x).permute(0, 2, 3, 1))).mean((1, 2)))

    model, x = Tokens().eval(), images(2)
    network = network_of(model, "head", x)
    (maps,) = ExcitationMaps("act", contrastive=False)(network, (x,), [0])
    cells = LayerExcitationBP(Composed(network), model.act, contrastive=False).attribute(x, 0)
    assert cells.shape == (2, 8, 8, 6)
    wanted = F.interpolate(cells.sum(3)[:, None], (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(maps[:, 0], wanted)


# Where to stop


def chosen(model, size=(64, 64), channels=2):
    model = model.eval()
    return stopping_layer(model, model, torch.rand(1, channels, *size))


def stage(*stride, act=nn.ReLU):
    """Convolutions with an activation, each with its stride: layers 1, 3, 5, ..."""
    layers = []
    for i, s in enumerate(stride):
        layers += [nn.Conv2d(2 if i == 0 else 4, 4, 3, stride=s, padding=1), act()]
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]


def test_it_stops_at_the_coarsest_map_of_14_cells():
    assert chosen(nn.Sequential(*stage(1, 2, 2, 2))) == "5"  # 64, 32, 16, 8 cells
    assert chosen(nn.Sequential(*stage(2, 2, 1, 1))) == "3"  # of three with 16 cells the first
    assert chosen(nn.Sequential(*stage(1, 2, 2, 2)), size=(64, 128)) == "5"  # 16 x 32
    assert chosen(nn.Sequential(*stage(1, 2, 2, 2)), size=(56, 112)) == "5"  # 14 x 28
    assert chosen(nn.Sequential(*stage(1, 2, 2, 2)), size=(52, 104)) == "3"  # 13 x 26 are too few
    assert chosen(nn.Sequential(*stage(1, 2, 2, 2)), size=(112, 56)) == "5"  # 28 x 14
    assert chosen(nn.Sequential(*stage(1, 2, 2, 2)), size=(104, 52)) == "3"
    # Too few everywhere: the finest.
    assert chosen(nn.Sequential(*stage(2, 2)), size=(16, 16)) == "1"
    assert chosen(nn.Sequential(*stage(4, 1)), size=(16, 16)) == "1"


def test_in_place_activations_make_no_difference():
    for strides, wanted in (((1, 2, 2, 2), "5"), ((2, 2, 1, 1), "3"), ((8, 2), "1")):
        assert chosen(nn.Sequential(*stage(*strides, act=partial(nn.ReLU, inplace=True)))) == wanted


def test_poolings_of_activations_and_nested_layers():
    def block(channels):
        return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

    net = nn.Sequential(block(2), block(4), block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    assert chosen(net) == "1.2"  # 64, 32, 16, 8 cells; "1" has the same output, later
    net = nn.Sequential(net[:3], *net[3:])
    assert chosen(net) == "0.1.2"


class Functional(nn.Module):
    """Activations are no modules; where they are called within one, its output is theirs."""

    def __init__(self, inplace, within):
        super().__init__()
        self.inplace, self.within = inplace, within
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 3, stride=2, padding=1) for _ in range(3))
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(2, 3)

    def forward(self, x):
        x = F.relu(self.a(x), inplace=self.inplace)
        x = self.pool(x) if self.within else F.avg_pool2d(x, 2)
        return self.head(F.relu(self.c(F.relu(self.b(x), inplace=self.inplace))).mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_that_are_functions(inplace):
    assert chosen(Functional(inplace, True)) == "pool"  # 16 cells; of the convolutions 32, 8, 4, and of any sign


def test_cells_are_no_larger_than_16_pixels():
    assert chosen(nn.Sequential(*stage(8, 2, 2)), size=(512, 512)) == "3"  # 64, 32, 16 cells; 16 of 32 pixels


def test_it_stops_at_activations_that_are_not_negative():
    net = nn.Sequential(*stage(1, 2, 2, 2))
    net[5] = nn.GELU()
    assert chosen(net) == "3"
    # Without any the sign does not matter. An activation and the convolution below it are one.
    assert chosen(nn.Sequential(*stage(1, 2, 2, 2, act=nn.GELU))) == "5"


class Residual(nn.Module):
    """16 cells in the branch and after the sum; 32 before."""

    def __init__(self, norm=False):
        super().__init__()
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        if norm:
            nn.init.uniform_(self.norm.weight, -1, 1), nn.init.uniform_(self.norm.running_mean, -0.1, 0.1)
        self.stem, self.relu = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True)
        self.left, self.act = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU()
        self.right, self.out = nn.Conv2d(4, 4, 1, stride=2), nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.out(self.norm(self.act(self.left(x))) + self.right(x))
        return self.head(x.mean((2, 3)))


def test_it_does_not_stop_in_a_branch():
    assert chosen(Residual()) == "out"


class Joined(nn.Module):
    """16 cells in all layers but the stem and the last; the branches are joined by concatenation or by a sum."""

    def __init__(self, long):
        super().__init__()
        self.long = long
        self.stem, self.relu = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU()
        self.left, self.act = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU()
        self.inner, self.again = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.pool, self.join = nn.MaxPool2d(2), nn.Conv2d(8, 4, 3, stride=2, padding=1)
        self.out, self.head = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.stem(x))
        y = self.again(self.inner(self.act(self.left(x))))
        if self.long:  # the stem goes past all layers
            return self.head(self.out(y + self.pool(x)).mean((2, 3)))
        return self.head(self.out(self.join(torch.cat([y, self.pool(x)], 1))).mean((2, 3)))


def test_it_stops_only_where_all_paths_cross():
    assert chosen(Joined(long=True)) == "out"  # "act", "again" and "pool" have as many cells, and come before
    assert chosen(Joined(long=False)) == "relu"  # 32 cells, as "out" has 8 and what is between is passed by


def test_a_module_called_twice_counts_with_its_last_call():
    class Shared(nn.Module):
        def __init__(self, *strides):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, stride=s, padding=1) for s in strides)
            self.relu, self.other, self.head = nn.ReLU(), nn.ReLU(), nn.Linear(2, 3)

        def forward(self, x):
            for i, conv in enumerate(self.convs):
                x = conv(x)
                x = self.other(x) if i == 1 else self.relu(x)
            return self.head(x.mean((2, 3)))

    assert chosen(Shared(4, 1, 1)) == "other"  # 16 cells each: the first is called again after it
    assert chosen(Shared(4, 1)) == "relu"
    assert chosen(Shared(2, 1, 2)) == "relu"  # 32, 32, 16 cells
    assert chosen(Shared(4, 2, 2)) == "other"  # 16, 8, 4 cells: of the finest last calls

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.relu, self.head = nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.ReLU(), nn.Linear(2, 3)

        def forward(self, x):
            for _ in range(3):  # 32, 16, 8 cells
                x = self.relu(self.down(x))
            return self.head(x.mean((2, 3)))

    assert chosen(Twice()) == "relu"


def test_tokens_are_no_cells():
    class Tokens(nn.Module):
        """(N, 16, 16, 4) after the embedding, channels last, and 16 x 16 cells before."""

        def __init__(self):
            super().__init__()
            self.cells, self.relu = nn.Conv2d(2, 4, 4, stride=4), nn.ReLU()
            self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = self.relu(self.cells(x)).permute(0, 2, 3, 1)
            return self.head(self.mix(x).relu().mean((1, 2)))

    assert chosen(Tokens()) == "relu"

    class Fine(nn.Module):
        """32 x 32 cells, then (N, 16, 16, 40), which would be fewer cells."""

        def __init__(self):
            super().__init__()
            self.cells, self.relu = nn.Conv2d(2, 4, 2, stride=2), nn.ReLU()
            self.merge, self.mix, self.act = nn.Conv2d(4, 4, 2, stride=2), nn.Linear(4, 40), nn.ReLU()
            self.head = nn.Linear(40, 3)

        def forward(self, x):
            x = self.merge(self.relu(self.cells(x))).permute(0, 2, 3, 1)
            return self.head(self.act(self.mix(x)).mean((1, 2)))

    assert chosen(Fine()) == "relu"
    assert chosen(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))) is None  # one cell is no map
    assert chosen(nn.Sequential(nn.Conv2d(2, 3, (64, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(192, 3))) is None
    assert stopping_layer(model := nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), model, torch.rand(1, 2, 2, 2)) is None


def test_hooks_are_removed_also_after_an_error():
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Linear(5, 2)).train()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stopping_layer(net, net, torch.rand(1, 2, 8, 8))
    assert net.training and all(not m._forward_hooks for m in net.modules())
    assert stopping_layer(net[:2], net[:2], torch.rand(1, 2, 8, 8)) == "1"
    assert net.training and all(not m._forward_hooks for m in net.modules())


def test_it_runs_on_a_copy_of_the_image_and_with_further_arguments():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(2, 4, 4, stride=4), nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x, scale):
            x *= scale
            return self.head(self.relu(self.conv(x)).mean((2, 3)))

    model, x = Scaled().eval(), torch.rand(1, 2, 64, 64)
    before = x.clone()
    assert stopping_layer(model, model, x, (torch.tensor(3.0),)) == "relu"
    assert torch.equal(x, before)
    with torch.inference_mode():
        assert stopping_layer(model, model, torch.rand(1, 2, 64, 64), (torch.tensor(3.0),)) == "relu"


def test_the_layer_does_not_depend_on_the_first_image():
    """Black images are 0 everywhere if nothing has a bias."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.AvgPool2d(4),
        nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    x = images(1, (64, 64))
    black = torch.zeros_like(x)
    network = network_of(model, "8", x)
    assert stopping_layer(model, network, black) == stopping_layer(model, network, x) == "5"
    both = ExcitationMaps()(network, (torch.cat([black, x]),), range(K))[0]
    torch.testing.assert_close(both[1:], ExcitationMaps()(network, (x,), range(K))[0])


@pytest.mark.parametrize("stem", [nn.Identity(), nn.AvgPool2d(1)])
def test_an_image_that_is_handed_on_is_no_activation(stem):
    """Pixels are not negative either."""
    assert chosen(nn.Sequential(*stage(1, 2, 2, 2, act=nn.GELU))) == "5"
    assert chosen(nn.Sequential(stem, *stage(1, 2, 2, 2, act=nn.GELU))) == "6"


def uneven(second):
    """64 x 64 cells of 4 x 4 pixels, or 16 x 16, and a second layer."""
    first, head = nn.Conv2d(2, 4, 4, stride=4), nn.Linear(4, 3)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def test_cells_are_no_wider_than_16_pixels():
    """The second layer has 16 x 16 cells of 16 x 20 pixels."""
    assert chosen(uneven(nn.Conv2d(4, 4, (4, 5), stride=(4, 5))), size=(256, 320)) == "1"


def test_the_fewest_cells_are_counted_in_both_directions():
    """The first layer has 16 x 16 cells, the second 16 x 14."""
    assert chosen(uneven(nn.Conv2d(4, 4, (1, 3)))) == "3"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vgg11", "features.15"),
        ("vgg16", "features.23"),
        ("resnet18", "layer3.0.relu"),
        ("resnet50", "layer3.0.relu"),
        ("googlenet", "maxpool3"),
        ("densenet121", "features.transition3.relu"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
def test_networks_of_torchvision(torchvision, name, layer):
    """After the fourth pooling layer but one, and in the third stage, where 224 pixels are 14 cells."""
    model = getattr(torchvision.models, name)(weights=None).eval()
    assert stopping_layer(model, model, torch.rand(1, 3, 224, 224)) == layer


# Cuts of the graph


def brute_force(root, leaves):
    """The nodes that lead to a leaf, and without which no path leads from the root to any."""

    def found(start, banned=None):
        """All nodes below a start, and whether a leaf is among them."""
        todo, seen = [start], set()
        while todo:
            node = todo.pop()
            if node is not None and node is not banned and node not in seen:
                seen.add(node)
                todo += [below for below, _ in node.next_functions]
        return seen, any(getattr(node, "variable", None) is leaf for node in seen for leaf in leaves)

    return {node for node in found(root)[0] if found(node)[1] and not found(root, node)[1]}


STEPS = st.lists(
    st.tuples(st.sampled_from(["linear", "relu", "twice", "+", "cat"]), st.integers(0, 9), st.integers(0, 9)),
    min_size=1,
    max_size=12,
)


def random_network(steps, leaves):
    """The last node of layers joined at random, each of some earlier value; late values are likelier."""
    values = [leaf * 1 for leaf in leaves]
    for kind, i, j in steps:
        a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
        values.append(
            {
                "linear": lambda a, b: nn.Linear(3, 3)(a),
                "relu": lambda a, b: a.relu(),
                "twice": lambda a, b: a * a,
                "+": lambda a, b: a + b,
                "cat": lambda a, b: nn.Linear(6, 3)(torch.cat([a, b], 1)),
            }[kind](a, b)
        )
    return values[-1].grad_fn


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS)
def test_cuts_are_the_nodes_that_no_path_avoids(steps):
    leaf = torch.ones(2, 3, requires_grad=True)
    root = random_network(steps, [leaf])
    found = cuts(topological([root]), [leaf])
    assert found == brute_force(root, [leaf])
    assert root in found and len(found) >= 3  # the first value and the leaf's own node are crossed as well


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS)
def test_cuts_of_several_inputs(steps):
    """A path to either input counts."""
    leaves = [torch.ones(2, 3, requires_grad=True) for _ in range(2)]
    root = random_network([*steps, ("+", 0, len(steps) + 1)], leaves)
    assert cuts(topological([root]), leaves) == brute_force(root, leaves)


def test_cuts_by_hand():
    x = torch.ones(1, 3, requires_grad=True)
    stem = (x * 2).relu()
    left, right = stem.exp(), nn.Linear(3, 3)(stem)
    joined = left + right
    out = joined.sum()
    crossed = cuts(topological([out.grad_fn]), [x])
    assert {stem.grad_fn, joined.grad_fn, out.grad_fn} < crossed and not {left.grad_fn, right.grad_fn} & crossed
    assert len(crossed) == 5  # also x * 2, and x
    unused = torch.ones(3, requires_grad=True)
    assert cuts(topological([out.grad_fn]), [unused]) == set()
    assert cuts([], [x]) == set()
