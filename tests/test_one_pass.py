"""Later calls explain in fewer passes than the first one, by what it found out; they give what a first call gives."""

import copy

import pytest
import torch
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.heatmaps import ExcitationMaps

X = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A network whose ReLU runs before the explained layer and, if shared, behind it."""

    def __init__(self, shared=False):
        super().__init__()
        self.first, self.relu, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1)
        self.last_relu = nn.ReLU(inplace=True)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.shared, self.passes = shared, []  # a list: attributes are restored after every call

    def forward(self, x):
        self.passes.append(len(x))
        z = self.hidden(self.second(self.relu(self.first(x))).relu().mean((2, 3)))
        return self.head(self.relu(z) if self.shared else self.last_relu(z))


@pytest.fixture(params=["groups", "SRAE"])
def fitted(request):
    torch.manual_seed(0)
    form = None if request.param == "groups" else lambda *a, **k: SRAE(*a, hidden=(6,), **k)
    xnn = XNNAttribution(Net().eval(), "hidden", 2, autoencoder=form, recipe=Recipe(steps=5))
    return xnn.fit(torch.rand(60, 3, 16, 16), target=0, positives=torch.ones(60, dtype=torch.bool), progress=False)


def anew(xnn):
    """Returns an explainer of the same model that has not been called yet."""
    other = XNNAttribution(xnn.model, xnn.layer, 2, autoencoder=xnn.autoencoder)
    other.explainers_ = copy.deepcopy(xnn.explainers_)
    return other


def passes(xnn, run):
    """Returns the result, and how often the model ran."""
    xnn.model.passes.clear()
    return run(), len(xnn.model.passes)


def same(why, other):
    """Whether two explanations agree to a ten-thousandth of the largest value of each kind."""
    names = ("maps", "features", "contributions", "bias", "surrogate", "prediction")
    pairs = [(getattr(why, n), getattr(other, n)) for n in names]
    return all(float((a - b).abs().max()) <= 1e-4 * float(b.abs().max()) for a, b in pairs)


def test_a_second_call_gives_the_same_in_fewer_passes(fitted):
    one, first = passes(fitted, lambda: fitted.explain(X, target=0))
    two, second = passes(fitted, lambda: fitted.explain(X, target=0))
    assert same(one, two) and second < first
    assert float(one.maps.abs().max()) > 0
    maps, again = passes(fitted, lambda: fitted.attribute(X, target=0, feature=1))
    assert torch.allclose(maps, anew(fitted).attribute(X, target=0, feature=1), atol=1e-6) and again == second
    pieces, _ = passes(fitted, lambda: fitted.explain(X, target=0, internal_batch_size=3))
    assert same(one, pieces)


def test_a_copy_knows_what_earlier_calls_showed(fitted):
    fitted.explain(X, target=0)
    one, count = passes(fitted, lambda: fitted.explain(X, target=0))
    other = fitted.with_heatmap(fitted.heatmap)
    two, again = passes(fitted, lambda: other.explain(X, target=0))
    assert same(one, two) and again == count


@pytest.mark.filterwarnings("ignore:probabilities sum")
def test_settings_of_a_later_call_count(fitted):
    usual = fitted.attribute(X, target=0)
    settings = {"layer": "first"} if fitted.autoencoder is None else {"contrastive": False}
    later, fresh = (xnn.attribute(X, target=0, **settings) for xnn in (fitted, anew(fitted)))
    size = float(fresh.abs().max())
    assert float((later - fresh).abs().max()) <= 1e-4 * size
    assert float((later - usual).abs().max()) > 0.1 * size


class Shrinking(Net):
    """A network of two convolutions, the second of which leaves too few cells of small images to draw maps there."""

    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(6, 8, 3, stride=3)


def test_other_sizes_and_layers_do_not_change_what_is_known():
    torch.manual_seed(0)
    net, small = Shrinking().eval(), X[:, :, :9, :9]
    xnn = XNNAttribution(net, "first", 2)
    marks = {"positives": torch.ones(60, dtype=torch.bool), "progress": False}
    data = torch.rand(60, 3, 16, 16)
    for xnn.layer in (net.first, net.hidden):
        xnn.fit(data, target=0, **marks)

    def counts(calls, rounds):
        for _ in range(rounds):
            found = []
            for layer, x in calls:
                xnn.layer = layer
                found.append(passes(xnn, lambda x=x: xnn.explain(x, target=0))[1])
        return found

    calls = [(net.hidden, X), (net.hidden, small), (net.first, X)]
    first = counts(calls[:1], 1)
    alone = [counts([call], 2)[0] for call in calls]
    assert alone[0] < first[0] and counts(calls, 2) == alone


def test_a_learned_network_of_a_changed_output_is_drawn_as_such():
    torch.manual_seed(0)
    transforms = {"output_transform": lambda z: 1 - 2 * z, "prediction_transform": lambda y: 3 * y}
    xnn = XNNAttribution(Net().eval(), "hidden", 2, autoencoder=SRAE, recipe=Recipe(steps=5), **transforms)
    xnn.fit(torch.rand(60, 3, 16, 16), target=0, positives=torch.ones(60, dtype=torch.bool), progress=False)
    one, two = (xnn.explain(X, target=0) for _ in range(2))
    assert same(two, one)
    xnn.output_transform = None
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(xnn.explain(X, target=0).prediction, 3 * xnn.model(X)[:, 0], atol=1e-5)


def test_a_learned_network_is_explained_in_one_pass():
    torch.manual_seed(0)
    xnn = XNNAttribution(Net().eval(), "hidden", 2, autoencoder=lambda *a, **k: SRAE(*a, hidden=(6,), **k))
    xnn.recipe = Recipe(steps=5)
    xnn.fit(torch.rand(60, 3, 16, 16), target=0, positives=torch.ones(60, dtype=torch.bool), progress=False)
    why = xnn.explain(X, target=0)
    later, count = passes(xnn, lambda: xnn.explain(X[:3], target=0))
    assert count == 1
    # What follows the layer, in place, changes neither Z nor the prediction.
    with torch.no_grad():
        assert torch.allclose(later.prediction, xnn.model(X[:3])[:, 0], atol=1e-6)
    assert torch.allclose(later.features, why.features[:3], atol=1e-5)
    assert torch.allclose(later.maps, why.maps[:3], atol=1e-6)


def to_double(net):
    net.double()


def other_weights(net):
    with torch.no_grad():
        net.first.weight.mul_(-1.5)
        net.head.bias.add_(3.0)


def other_module(net):
    net.relu = nn.LeakyReLU(0.3)


def other_layer(net):
    net.hidden = copy.deepcopy(net.hidden)
    with torch.no_grad():
        net.hidden.weight.mul_(1.5)


@pytest.mark.filterwarnings("ignore:.*changed after the explainer")
@pytest.mark.parametrize("change", [to_double, other_weights, other_module, other_layer])
def test_a_model_that_changed_since_is_read_as_it_is_now(fitted, change):
    before = [fitted.explain(X, target=0) for _ in range(2)][1]
    change(fitted.model)
    if change is other_layer:
        fitted.layer = fitted.model.hidden
    x = X.to(fitted.model.first.weight.dtype)
    later, fresh = fitted.explain(x, target=0), anew(fitted).explain(x, target=0)
    assert same(later, fresh) and later.maps.dtype == x.dtype
    assert same(later, fitted.explain(x, target=0))
    if change is not to_double:
        assert not torch.allclose(later.prediction, before.prediction, atol=1e-3)


def test_a_layer_of_maps_that_also_runs_behind_the_explained_layer():
    torch.manual_seed(0)
    net = Net(shared=True).eval()
    xnn = XNNAttribution(net, "hidden", 2, autoencoder=SRAE, recipe=Recipe(steps=5), heatmap=ExcitationMaps("relu"))
    xnn.fit(torch.rand(60, 3, 16, 16), target=0, positives=torch.ones(60, dtype=torch.bool), progress=False)
    one, two, three = (xnn.explain(X, target=0) for _ in range(3))
    assert same(one, two) and same(one, three) and one.maps.shape[3:] == X.shape[2:]


class Again(Net):
    """A network that runs the explained layer twice."""

    def forward(self, x):
        self.passes.append(len(x))
        z = self.hidden(self.second(self.relu(self.first(x))).relu().mean((2, 3)))
        return self.head(self.last_relu(self.hidden(z.relu())))


def test_a_pass_that_failed_is_not_tried_again():
    torch.manual_seed(0)
    xnn = XNNAttribution(Again().eval(), "hidden", 2, autoencoder=SRAE, recipe=Recipe(steps=5))
    xnn.fit(torch.rand(60, 3, 16, 16), target=0, positives=torch.ones(60, dtype=torch.bool), progress=False)
    one, _ = passes(xnn, lambda: xnn.explain(X, target=0))
    two, tried = passes(xnn, lambda: xnn.explain(X, target=0))
    three, count = passes(xnn, lambda: xnn.explain(X, target=0))
    assert same(two, one) and same(three, one) and count < tried


def test_later_calls_raise_what_a_first_call_raises(fitted):
    fitted.explain(X, target=0)
    bad = X.clone()
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite in example 1"):
        fitted.explain(bad, target=0)
    with pytest.raises(ValueError, match="feature is 7, the index of no x-feature"):
        fitted.attribute(X, target=0, feature=7)
    assert same(fitted.explain(X, target=0), anew(fitted).explain(X, target=0))


def test_later_calls_take_gradients_through_the_prediction_transform():
    torch.manual_seed(0)
    settings = {"prediction_transform": lambda y: (y.log_softmax(1) + 1).tanh()}
    xnn = XNNAttribution(Net().eval(), "hidden", 2, **settings)
    xnn.fit(torch.rand(60, 3, 16, 16), target=0, positives=torch.ones(60, dtype=torch.bool), progress=False)
    first = XNNAttribution(xnn.model, "hidden", 2, **settings)
    first.explainers_ = copy.deepcopy(xnn.explainers_)
    known = first.explain(X, target=0)
    with torch.no_grad():
        for call in range(3):
            assert same(xnn.explain(X, target=0), known), call


class LastChannels(nn.Module):
    """A network whose blocks have 4 x 4 cells and 4 channels, so that sizes do not say which dimension holds them."""

    def __init__(self):
        super().__init__()
        self.first, self.block, self.hidden = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 4), nn.Linear(4, 8)
        self.head, self.passes = nn.Linear(8, 3), []

    def forward(self, x):
        self.passes.append(len(x))
        cells = self.block(self.first(x).relu().movedim(1, -1)).relu()
        return self.head(self.hidden(cells.mean((1, 2))).relu())


@pytest.mark.parametrize("side", [16, 32])
def test_only_the_first_call_tries_which_outputs_are_grids(side):
    torch.manual_seed(0)
    xnn = XNNAttribution(LastChannels().eval(), "hidden", 2)
    data = torch.rand(60, 3, side, side)
    xnn.fit(data, target=0, positives=torch.ones(60, dtype=torch.bool), progress=False)
    one, first = passes(xnn, lambda: xnn.attribute(data[:3], target=0))
    assert 5 in xnn.model.passes  # variants of an image
    two, second = passes(xnn, lambda: xnn.attribute(data[:3], target=0))
    assert 5 not in xnn.model.passes and second < first
    assert torch.allclose(one, two, atol=1e-6) and float(one.abs().max()) > 0
    larger = torch.rand(2, 3, 2 * side, 2 * side)
    maps, count = passes(xnn, lambda: xnn.attribute(larger, target=0))
    fresh, as_many = passes(xnn, lambda: anew(xnn).attribute(larger, target=0))
    assert count == as_many  # outputs of other shapes are tried anew
    assert torch.allclose(maps, fresh, atol=1e-6)
