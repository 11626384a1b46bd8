"""Heatmap layers that return tuples or dicts: drawn by the tensor that counts, or refused by what they return."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from captum.attr import (
    InternalInfluence,
    LayerConductance,
    LayerFeatureAblation,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from torch import nn
from torch.nn import functional as F

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.heatmaps import ExcitationMaps, FromCaptum

FORMS = {"groups": None, "learned": partial(SRAE, hidden=(4,))}
K = 2


class Net(nn.Module):
    """A layer, of whose output ``use`` picks what a small head reads."""

    def __init__(self, layer, use, size):
        super().__init__()
        self.layer, self.use = layer, use
        self.mixed, self.act, self.head = nn.Linear(size, 5), nn.ReLU(), nn.Linear(5, 2)

    def forward(self, x):
        given = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
        return self.head(self.act(self.mixed(self.use(self.layer(*given)).flatten(1))))


class Returns(nn.Module):
    """Feature maps in a container."""

    def __init__(self, container):
        super().__init__()
        self.conv, self.container = nn.Conv2d(1, 3, 3, padding=1), container

    def forward(self, x):
        return self.container(self.conv(x).relu())


def lstm():
    return nn.LSTM(4, 5, batch_first=True)


KINDS = {
    "LSTM": (lstm, lambda out: out[0], (6, 4), 30, lambda out: out[0]),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda out: out[0],
        (6, 4),
        24,
        lambda out: out[0],
    ),
    "tuple of one": (lambda: Returns(lambda h: (h,)), lambda out: out[0], (1, 8, 8), 192, lambda out: out[0]),
    "tuple with None": (lambda: Returns(lambda h: (None, h)), lambda out: out[1], (1, 8, 8), 192, lambda out: out[1]),
    "dict": (
        lambda: Returns(lambda h: {"shape": h.shape, "aux": 2 * h, "out": h}),
        lambda out: out["out"],
        (1, 8, 8),
        192,
        lambda out: out["out"],
    ),
    "nested": (
        lambda: Returns(lambda h: {"levels": [3 * h, (h, 4)]}),
        lambda out: out["levels"][1][0],
        (1, 8, 8),
        192,
        lambda out: out["levels"][1][0],
    ),
}


def made(kind, form, heatmap=None):
    make, use, shape, size, tensor = KINDS[kind]
    model, x = Net(make(), use, size), torch.randn(40, *shape)
    xnn = XNNAttribution(
        model, "act", K, autoencoder=FORMS[form], recipe=Recipe(steps=12, batch_size=128), heatmap=heatmap
    )
    return xnn.fit(x, 0, positives=torch.ones(40).bool(), progress=False), model, x[:3], tensor


def x_features(xnn, model, Y):
    form = xnn.explainer(0).form
    return form.encode(Y) if hasattr(form, "encode") else (Y * model.head.weight[0]) @ form.groups


def at_layer(xnn, model, x, tensor):
    """The tensor that counts, as a leaf, and the x-features from it."""
    raw = model.layer(x, x, x) if isinstance(model.layer, nn.MultiheadAttention) else model.layer(x)
    Z = tensor(raw).detach().requires_grad_()
    return Z, lambda z: x_features(xnn, model, model.act(model.mixed(z.flatten(1))))


def like_images(map, x):
    if map.dim() < 4:
        return map
    return F.interpolate(map.sum(1, keepdim=True), x.shape[2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_times_activation_is_that_of_the_tensor_that_counts(form, kind):
    xnn, model, x, tensor = made(kind, form, FromCaptum(LayerGradientXActivation, layer="layer"))
    Z, features = at_layer(xnn, model, x, tensor)
    maps, E = xnn.attribute(x, 0), features(Z)
    for k in range(E.shape[1]):
        gradient = torch.autograd.grad(E[:, k].sum(), Z, retain_graph=True)[0]
        torch.testing.assert_close(maps[:, k], like_images((gradient * Z).detach(), x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_of_a_layer_replaces_the_tensor_that_counts(kind):
    xnn, model, x, tensor = made(kind, "learned", FromCaptum(LayerFeatureAblation, layer="layer"))
    Z, features = at_layer(xnn, model, x, tensor)
    maps, without = xnn.attribute(x, 0), Z.detach().clone()
    if Z.dim() == 3:
        without[:, 2, 1] = 0
        torch.testing.assert_close(maps[:, :, 2, 1], (features(Z) - features(without)).detach(), rtol=1e-3, atol=1e-5)
    else:
        assert maps.shape == (3, K, 1, 8, 8)


@pytest.mark.filterwarnings("ignore:maps are zero", "ignore:probabilities sum to")
@pytest.mark.parametrize(
    "method", [LayerIntegratedGradients, LayerConductance, InternalInfluence, "excitation"], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_methods_draw_one_map_of_each(kind, method):
    heatmap = ExcitationMaps(layer="layer") if method == "excitation" else FromCaptum(method, layer="layer")
    xnn, model, x, tensor = made(kind, "learned", heatmap)
    Z, _ = at_layer(xnn, model, x, tensor)
    maps = xnn.attribute(x, 0)
    assert maps.shape == ((3, K, 1, 8, 8) if x.dim() == 4 else (3, K, *Z.shape[1:]))
    assert bool(maps.isfinite().all())
    assert bool(maps.any())


@pytest.mark.parametrize("kind", ["LSTM", "attention"])
def test_grad_cam_of_tokens_in_a_tuple(kind):
    """Tokens of a tuple's first tensor: the gradient's mean over tokens weighs the channels."""
    xnn, model, x, tensor = made(kind, "learned", FromCaptum(LayerGradCam, layer="layer", tokens="sequence"))
    Z, features = at_layer(xnn, model, x, tensor)
    maps, E = xnn.attribute(x, 0), features(Z)
    for k in range(K):
        gradient = torch.autograd.grad(E[:, k].sum(), Z, retain_graph=True)[0]
        wanted = (gradient.mean(1, keepdim=True) * Z).sum(2, keepdim=True).mT.detach()
        torch.testing.assert_close(maps[:, k], wanted, rtol=1e-4, atol=1e-6)


def test_grad_cam_without_tokens_names_the_layer():
    xnn, _, x, _ = made("LSTM", "learned", FromCaptum(LayerGradCam, layer="layer"))
    with pytest.raises(
        ValueError, match=r"LayerGradCam needs .* this LSTM has none; .* tokens='vit'\), 'swin' or 'sequence'"
    ):
        xnn.attribute(x, 0)


def states(out):
    return out[1][0][-1]


REFUSED = {
    "states": (
        lstm,
        states,
        (6, 4),
        5,
        r"and its tensor \[1\]\[0\] \(1, 11, 5\) for 11 examples has no row",
    ),
    "two of a dict": (
        lambda: Returns(lambda h: {"a": h, "b": 2 * h}),
        lambda out: out["a"] + out["b"],
        (1, 8, 8),
        192,
        r"returns a dict, .* depends on 2 of its tensors \(\['a'\] .*, \['b'\] .*\), but a map shows one",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_map_is_refused_with_its_shape(form, kind):
    make, use, shape, size, told = REFUSED[kind]
    model, x = Net(make(), use, size), torch.randn(40, *shape)
    heatmap = FromCaptum(LayerGradientXActivation, layer="layer")
    xnn = XNNAttribution(
        model, "act", K, autoencoder=FORMS[form], recipe=Recipe(steps=12, batch_size=128), heatmap=heatmap
    )
    xnn.fit(x, 0, positives=torch.ones(40).bool(), progress=False)
    with pytest.raises(ValueError, match=told):
        xnn.attribute(x[:3], 0)


def test_a_tuple_of_which_all_counts_has_a_map_for_each():
    """As Captum's own classes do."""
    model, x = Net(Returns(lambda h: (h.clone(), 2 * h)), lambda out: out[0] + out[1], 192), torch.randn(40, 1, 8, 8)
    heatmap = FromCaptum(LayerGradientXActivation, layer="layer")
    xnn = XNNAttribution(
        model, "act", K, autoencoder=FORMS["learned"], recipe=Recipe(steps=12, batch_size=128), heatmap=heatmap
    )
    xnn.fit(x, 0, positives=torch.ones(40).bool(), progress=False)
    one, other = xnn.attribute(x[:3], 0)
    torch.testing.assert_close(other, 2 * one)
