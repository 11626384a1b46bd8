"""Inputs beside an image, of other dimensions and dtypes: right maps, or an error that says how to pass them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from captum.attr import (
    LRP,
    DeepLift,
    DeepLiftShap,
    FeatureAblation,
    GradientShap,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NoiseTunnel,
    Occlusion,
    Saliency,
    ShapleyValueSampling,
)
from torch import nn
from torch.nn import functional as F

from captum_xnn import SRAE, ExcitationBP, Recipe, XNNAttribution
from captum_xnn.excitation_bp._attribution import total_mass
from captum_xnn.heatmaps import ExcitationMaps, FromCaptum

FORMS = {"groups": None, "learned": partial(SRAE, hidden=(4,))}
K = 2


def fitted(model, layer, data, form, **settings):
    xnn = XNNAttribution(model, layer, K, autoencoder=FORMS[form], recipe=Recipe(steps=12), **settings)
    n = len(data[0] if isinstance(data, tuple) else data)
    return xnn.fit(data, 0, positives=torch.ones(n).bool(), progress=False)


# --- a number for each example beside an image


class Aged(nn.Module):
    """An image and an age, which comes first or last, as (N,) or as (N, 1)."""

    def __init__(self, first=False):
        super().__init__()
        self.first = first
        self.conv, self.relu, self.flat = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten()
        self.pool, self.mixed, self.act, self.head = nn.AvgPool2d(8), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, a, b):
        age, image = (a, b) if self.first else (b, a)
        h = self.flat(self.pool(self.relu(self.conv(image))))
        return self.head(self.act(self.mixed(torch.cat([h, age.reshape(-1, 1)], 1))))


def aged(n, first, flat):
    torch.manual_seed(1)
    pair = torch.randn(n, 1, 8, 8), torch.randn(n) if flat else torch.randn(n, 1)
    return pair[::-1] if first else pair


def zeros(first, flat, rows):
    pair = torch.zeros(rows, 1, 8, 8), torch.zeros(rows) if flat else torch.zeros(rows, 1)
    return pair[::-1] if first else pair


def windows(first, flat):
    pair = (1, 4, 4), () if flat else (1,)
    return pair[::-1] if first else pair


BACKENDS = {
    "saliency": lambda *_: Saliency,
    "input x gradient": lambda *_: InputXGradient,
    "integrated gradients": lambda *_: FromCaptum(IntegratedGradients, n_steps=8),
    "DeepLift": lambda *_: DeepLift,
    "LRP": lambda *_: LRP,
    "guided": lambda *_: GuidedBackprop,
    "excitation": lambda *_: ExcitationMaps(contrastive=False),
    "ablation": lambda *_: FeatureAblation,
    "Shapley": lambda *_: FromCaptum(ShapleyValueSampling, n_samples=1),
    "occlusion": lambda first, flat: FromCaptum(Occlusion, sliding_window_shapes=windows(first, flat)),
    "gradient SHAP": lambda *of: FromCaptum(GradientShap, baselines=zeros(*of, 2), stdevs=0.0, n_samples=2),
    "DeepLift SHAP": lambda *of: FromCaptum(DeepLiftShap, baselines=zeros(*of, 2)),
    "noise": lambda *_: FromCaptum(NoiseTunnel, attribution_method=Saliency, stdevs=0.0),
}


@pytest.fixture(scope="module")
def both():
    """Explainers of the same model on ages (N,) and (N, 1), for every form and order."""
    made = {}
    for form in FORMS:
        for first in (False, True):
            torch.manual_seed(0)
            model = Aged(first)
            made[form, first] = [fitted(model, "act", aged(40, first, flat), form) for flat in (True, False)]
    return made


@pytest.mark.filterwarnings("ignore:maps are zero", "ignore:probabilities sum to")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [False, True], ids=["image first", "age first"])
@pytest.mark.parametrize("form", FORMS)
def test_ages_of_one_dimension_have_the_maps_of_ages_with_two(both, form, first, backend):
    maps = []
    for flat, xnn in zip((True, False), both[form, first], strict=True):
        drawn = xnn.with_heatmap(BACKENDS[backend](first, flat))
        inputs = tuple(x[:3] for x in aged(40, first, flat))
        torch.manual_seed(2)
        maps.append(drawn.attribute(inputs, 0))
        one = drawn.attribute(inputs, 0, feature=0)
        assert [m.shape for m in one] == [x.shape for x in inputs]
    for x, m, wanted in zip(aged(40, first, True), *maps, strict=True):
        assert m.shape == (3, K, *x.shape[1:])
        torch.testing.assert_close(m, wanted.reshape(m.shape), rtol=1e-4, atol=1e-6)


def test_probability_on_numbers_is_counted():
    """With positive weights and activations nothing is lost, and image and age share a probability of 1."""
    model = Aged()
    for p in model.parameters():
        p.data.abs_()
        if p.dim() == 1:
            p.data.zero_()
    image, age = (x.abs() for x in aged(5, False, True))
    maps = ExcitationBP(model, contrastive=False).attribute((image, age), 1)
    assert [m.shape for m in maps] == [(5, 1, 8, 8), (5,)]
    torch.testing.assert_close(total_mass(maps), torch.ones(5))
    assert bool((maps[1] > 0).all())


# --- lengths, masks and indices beside floating-point inputs


class Packed(nn.Module):
    """Sequences with their lengths, which a recurrent layer takes packed."""

    def __init__(self):
        super().__init__()
        self.lstm, self.mixed, self.act = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 5), nn.Tanh()
        self.head = nn.Linear(5, 2)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.act(self.mixed(self.lstm(packed)[1][0][-1])))


def sequences(n):
    return torch.randn(n, 6, 4), torch.randint(1, 7, (n,))


AS_ARGUMENT = r"lengths.* pass it as additional_forward_args: attribute\(x, target, lengths\)"


@pytest.mark.parametrize("backend", [None, Saliency, IntegratedGradients, ExcitationMaps(), FeatureAblation], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_lengths_among_the_inputs_are_told_where_to_go(form, backend):
    model, data = Packed(), sequences(40)
    xnn = fitted(model, "act", data, form, heatmap=backend)
    with pytest.raises((TypeError, ValueError), match=f"(?s)torch.int64.*{AS_ARGUMENT}"):
        xnn.attribute(tuple(x[:3] for x in data), 0)


@pytest.mark.parametrize("form", FORMS)
def test_lengths_as_an_argument_give_the_gradient(form):
    model, data = Packed(), sequences(40)
    xnn = fitted(model, "act", data, form, heatmap=FromCaptum(Saliency, abs=False))
    x, lengths = data[0][:3].clone().requires_grad_(), data[1][:3]
    seen = []
    handle = model.act.register_forward_hook(lambda _m, _i, output: seen.append(output))
    y = model(x, lengths)[:, 0]
    handle.remove()
    groups = getattr(xnn.explainer(0).form, "groups", None)
    if groups is None:
        E = xnn.explainer(0).form.encode(seen[0])
    else:  # the rest of the model is linear, so slopes are its weights
        E = (seen[0] * model.head.weight[0]) @ groups
        torch.testing.assert_close(
            xnn.attribute(x, 0, lengths).sum(1), torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        )
    for k in range(K):
        wanted = torch.autograd.grad(E[:, k].sum(), x, retain_graph=True)[0]
        torch.testing.assert_close(xnn.attribute(x, 0, lengths, feature=k), wanted)


def test_integers_alone_are_converted_or_drawn_at_the_embedding():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    ids = torch.randint(0, 9, (40, 3))
    xnn = fitted(model, "3", ids, "groups", heatmap=Saliency)
    with pytest.raises(
        TypeError, match=r"input 0 is torch\.int64; convert them with .float\(\), or, where they are token ids, draw"
    ):
        xnn.attribute(ids[:2], 0)


# --- maps of one x-feature in the input's own shape


def convolutional(dimensions, channels=2):
    Conv, Pool = {1: (nn.Conv1d, nn.MaxPool1d), 2: (nn.Conv2d, nn.MaxPool2d), 3: (nn.Conv3d, nn.MaxPool3d)}[dimensions]
    return nn.Sequential(
        Conv(channels, 3, 3, padding=1), nn.ReLU(), Pool(2), nn.Flatten(), nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 2)
    )


@pytest.mark.filterwarnings("ignore:maps are zero", "ignore:probabilities sum to")
@pytest.mark.parametrize(
    "backend",
    [
        None,
        LayerGradCam,
        FromCaptum(LayerGradientXActivation, layer="2"),
        FromCaptum(LayerIntegratedGradients, layer="1", n_steps=4),
        ExcitationMaps(layer="2"),
        ExcitationMaps(),
        Saliency,
    ],
    ids=str,
)
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_one_map_of_images_and_volumes_has_their_shape(form, dimensions, backend):
    model, x = convolutional(dimensions), torch.randn(20, 2, *[6] * dimensions)
    model(x)
    xnn = fitted(model, "5", x, form, heatmap=backend)
    every, one = xnn.attribute(x[:3], 0), xnn.attribute(x[:3], 0, feature=0)
    assert one.shape == x[:3].shape
    found = xnn.explainer(0).form.n_features
    assert every.shape in ((3, found, 1, *x.shape[2:]), (3, found, *x.shape[1:]))
    torch.testing.assert_close(one.sum(1), every[:, 0].sum(1))  # a layer's map gives each channel an equal part


@pytest.mark.parametrize("form", FORMS)
def test_maps_of_a_volume_are_those_of_the_layer_enlarged(form):
    model, x = convolutional(3), torch.randn(20, 2, 6, 6, 6)
    model(x)
    xnn = fitted(model, "5", x, form, heatmap=FromCaptum(LayerGradientXActivation, layer="2"))
    Z = model[:3](x[:3]).detach().requires_grad_()
    Y = model[3:6](Z)
    encode = getattr(xnn.explainer(0).form, "encode", None)
    E = encode(Y) if encode else (Y * model[6].weight[0]) @ xnn.explainer(0).form.groups
    for k in range(E.shape[1]):
        product = torch.autograd.grad(E[:, k].sum(), Z, retain_graph=True)[0] * Z
        wanted = F.interpolate(product.sum(1, keepdim=True).detach(), (6, 6, 6), mode="trilinear", align_corners=False)
        torch.testing.assert_close(xnn.attribute(x[:3], 0)[:, k], wanted)


def test_one_map_of_token_ids_is_summed_over_the_dimensions_of_a_token():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    ids = torch.randint(0, 9, (40, 3))
    xnn = fitted(model, "3", ids, "groups", heatmap=FromCaptum(LayerGradientXActivation, layer="0"))
    one = xnn.attribute(ids[:3], 0, feature=1)
    assert one.shape == ids[:3].shape
    torch.testing.assert_close(one, xnn.attribute(ids[:3], 0)[:, 1].sum(-1))


@pytest.mark.parametrize(
    "backend", [FromCaptum(LayerGradientXActivation, layer="1"), ExcitationMaps(layer="1")], ids=str
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:maps are zero", "ignore:probabilities sum to")
def test_one_map_of_another_shape_is_refused(form, backend):
    """Of sequences nobody knows which dimension of the layer belongs to which of the input."""
    model, x = convolutional(1), torch.randn(20, 2, 10)
    model(x)
    xnn = fitted(model, "5", x, form, heatmap=backend)
    assert xnn.attribute(x[:3], 0).shape[2:] == (3, 10)
    with pytest.raises(ValueError, match=r"input's shape \(3, 2, 10\), and the method gives \(3, 3, 10\)"):
        xnn.attribute(x[:3], 0, feature=0)
