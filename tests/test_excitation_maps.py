"""The default heatmaps, by excitation backprop, and where they stop."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from captum_xnn import LayerExcitationBP, XNNAttribution
from captum_xnn.errors import LayerNotFoundError
from captum_xnn.excitation_bp.graph import cuts, topological
from captum_xnn.excitation_bp.stopping import stopping_layer
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.host import trace
from captum_xnn.network import ExplanationNetwork
from captum_xnn.srae import SRAE
from captum_xnn.training import Recipe

# Small random nets lose probability.
pytestmark = pytest.mark.filterwarnings("ignore:expected probabilities that sum to 1")

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
    for size in (1, 2, 4, 7, 100):
        (bounded,) = ExcitationMaps()(network, (x,), range(K), internal_batch_size=size)
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


class Composed(nn.Module):
    """From the input to the x-features, as one module."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def test_a_negative_feature_shows_what_makes_it_negative():
    """One x-feature: the left half's mean less the right half's, at a layer that copies the image."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.AvgPool2d((4, 2)), nn.Flatten())
    srae = SRAE(2, 1, hidden=())
    with torch.no_grad():
        model[0].weight.fill_(1)
        (weighing,) = [m for m in srae.encoder.modules() if isinstance(m, nn.Linear)]
        weighing.weight.copy_(torch.tensor([[1.0, -1.0]]))
        weighing.bias.zero_()
        for name, buffer in srae.named_buffers():
            buffer.fill_(1.0 if "scale" in name or "std" in name else 0.0)
    x = torch.ones(2, 1, 4, 4)
    x[0, :, :, 2:] = 0.5  # brighter on the left: positive
    x[1, :, :, :2] = 0.5
    network = ExplanationNetwork(model, "3", srae, trace=trace(model, model[3], (x[:1],)))
    E = network(x).detach()
    assert E[0] > 0 > E[1]
    (maps,) = ExcitationMaps("1")(network, (x,), [0])
    left, right = maps[..., :2].sum((1, 2, 3, 4)), maps[..., 2:].sum((1, 2, 3, 4))
    assert left[0] > 0 == right[0]
    assert right[1] > 0 == left[1]


@pytest.mark.parametrize("n", [1, 4])
def test_five_maps_cost_one_forward_and_one_batched_backward(n, monkeypatch):
    model, x = cnn(), images(n)
    network = network_of(model, "8", x)
    maps = ExcitationMaps()
    maps(network, (x[:1],), range(K))  # chooses the layer
    forwards, backwards, grad = [], [], torch.autograd.grad
    handle = model[0].register_forward_hook(lambda *_: forwards.append(1))

    def counted(*args, **kwargs):
        backwards.append(1)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    maps(network, (x,), range(K))
    handle.remove()
    assert len(forwards) == 1
    # One to the layer with weights that comes last and one from there; five make the priors from the targets.
    assert len(backwards) - K == 2


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
    assert maps.min() >= 0 and maps.isfinite().all()
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


def test_settings_of_a_call_go_before_those_of_the_object():
    model, x = cnn(), images()
    network = network_of(model, "8", x)

    def drawn(maps, **call):
        return maps(network, (x,), range(K), **call)[0]

    assert torch.equal(drawn(ExcitationMaps(), layer="4"), drawn(ExcitationMaps("4")))
    assert torch.equal(drawn(ExcitationMaps(model[4])), drawn(ExcitationMaps("4")))
    assert torch.equal(drawn(ExcitationMaps("4"), contrastive=False), drawn(ExcitationMaps("4", contrastive=False)))
    assert not torch.equal(drawn(ExcitationMaps("4"), contrastive=False), drawn(ExcitationMaps("4")))
    with pytest.raises(TypeError, match="n_steps"):
        drawn(ExcitationMaps(), n_steps=3)
    with pytest.raises(ValueError, match="expected negative to be one of"):
        drawn(ExcitationMaps(), negative="shift")
    with pytest.raises(LayerNotFoundError):
        drawn(ExcitationMaps("77"))


def test_objects_pickle_and_print():
    model, x = cnn(), images()
    network = network_of(model, "8", x)
    maps = ExcitationMaps("4", negative="clamp")
    assert repr(maps) == "ExcitationMaps(layer='4', negative='clamp')"
    wanted = maps(network, (x,), range(K))[0]
    for again in (pickle.loads(pickle.dumps(maps)), copy.deepcopy(maps)):
        assert repr(again) == repr(maps)
        assert torch.equal(again(network, (x,), range(K))[0], wanted)


def test_the_default_of_an_explainer_is_left_alone_by_it():
    model, x = cnn(inplace=True).train(), images(40)
    before = copy.deepcopy(model.state_dict())
    xnn = XNNAttribution(model, "8", n_features=2, recipe=Recipe(steps=20))
    positives = torch.arange(40) % 2 == 0
    xnn.fit(x, target=1, positives=positives, progress=False)
    maps = xnn.attribute(x[:3], target=1)
    assert maps.shape == (3, 2, 1, 32, 32) and maps.dtype == x.dtype
    assert not maps.requires_grad and maps.is_contiguous() and maps.isfinite().all() and maps.min() >= 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_dead_images_have_empty_maps():
    model = cnn()
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    x = torch.zeros(2, 2, 32, 32)
    (maps,) = ExcitationMaps()(network_of(model, "8", x), (x,), range(K))
    assert torch.equal(maps, torch.zeros_like(maps))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_maps_have_the_dtype_of_the_image(dtype):
    model, x = cnn().to(dtype), images(dtype=dtype)
    (maps,) = ExcitationMaps()(network_of(model, "8", x), (x,), range(K))
    assert maps.dtype == dtype and maps.isfinite().all() and maps.max() > 0


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
    # Too few everywhere: the finest.
    assert chosen(nn.Sequential(*stage(2, 2)), size=(16, 16)) == "1"
    assert chosen(nn.Sequential(*stage(4, 1)), size=(16, 16)) == "1"


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

    def __init__(self):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True)
        self.left, self.act = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU()
        self.right, self.out = nn.Conv2d(4, 4, 1, stride=2), nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.out(self.act(self.left(x)) + self.right(x))
        return self.head(x.mean((2, 3)))


def test_it_does_not_stop_in_a_branch():
    assert chosen(Residual()) == "out"


def test_a_module_called_twice_counts_with_its_last_call():
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
    assert stopping_layer(model := nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), model, torch.rand(1, 2, 2, 2)) is None


def test_hooks_are_removed_also_after_an_error():
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Linear(5, 2)).train()
    with pytest.raises(RuntimeError):
        stopping_layer(net, net, torch.rand(1, 2, 8, 8))
    assert net.training and all(not m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(("name", "layer"), [("vgg11", "features.15"), ("resnet18", "layer3.0.relu")])
def test_networks_of_torchvision(torchvision, name, layer):
    """After the fourth pooling layer but one, and in the third stage, where 224 pixels are 14 cells."""
    model = getattr(torchvision.models, name)(weights=None).eval()
    assert stopping_layer(model, model, torch.rand(1, 3, 224, 224)) == layer


# Cuts of the graph


def brute_force(root, leaf):
    """The nodes without which no path leads from the root to the leaf."""

    def reaches(banned):
        todo, seen = [root], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen or node is banned:
                continue
            if getattr(node, "variable", None) is leaf:
                return True
            seen.add(node)
            todo += [below for below, _ in node.next_functions]
        return False

    return {node for node in topological([root]) if not reaches(node)}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.booleans()), min_size=1, max_size=12))
def test_cuts_are_the_nodes_that_no_path_avoids(steps):
    leaf = torch.ones(2, requires_grad=True)
    values = [leaf * 1]
    for i, j, joins in steps:
        a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
        values.append(a + b if joins else a * 2)
    root = values[-1].grad_fn
    assert cuts(topological([root]), [leaf]) == brute_force(root, leaf)
