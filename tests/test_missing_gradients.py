"""Maps that can only be zero: refused with the layer where gradients end, or told with their true reason."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import numpy as np
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
    LayerGradientXActivation,
    Saliency,
)
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.explainer import Explainers
from captum_xnn.heatmaps import ExcitationMaps, FromCaptum
from captum_xnn.heatmaps._feature_maps import Explained

FORMS = {"groups": None, "learned": partial(SRAE, hidden=(4,))}
K = 2


def fitted(model, layer, x, form, heatmap=None):
    xnn = XNNAttribution(model, layer, K, autoencoder=FORMS[form], recipe=Recipe(steps=12), heatmap=heatmap)
    return xnn.fit(x, 0, positives=torch.ones(len(x)).bool(), progress=False)


# --- gradients that end on the way


class Cut(nn.Module):
    """Five layers, between the first two of which the way is cut."""

    def __init__(self, cut):
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)
        self.act, self.head, self.cut = nn.ReLU(), nn.Linear(5, 2), cut

    def forward(self, x):
        return self.head(self.act(self.b(self.cut(self.relu, self.a(x)))))


def frozen(relu, x):
    with torch.no_grad():
        return relu(x)


CUTS = {
    "detach": (lambda relu, x: relu(x).detach(), "'relu'"),
    "numpy": (lambda relu, x: torch.from_numpy(relu(x).detach().numpy()), "'relu'"),
    "no_grad": (frozen, "'a'"),
}


@pytest.mark.parametrize(
    "backend", [Saliency, IntegratedGradients, FromCaptum(LayerGradientXActivation, layer="a")], ids=str
)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_cut_before_the_layer_is_named(form, cut, backend):
    made, where = CUTS[cut]
    xnn = fitted(Cut(made), "act", x := torch.randn(40, 6), form, backend)
    with pytest.raises(
        ValueError, match=f"no gradient reaches the inputs from layer 'act': it is cut off behind {where}"
    ):
        xnn.attribute(x[:3], 0)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_error_advises_works(form):
    """Ablation needs no gradient: with a cut it gives the maps that it gives without."""
    x = torch.randn(40, 6)
    model = Cut(CUTS["detach"][0])
    xnn = fitted(model, "act", x, form, FeatureAblation)
    maps = xnn.attribute(x[:3], 0)
    model.cut = lambda relu, x: relu(x)
    torch.testing.assert_close(xnn.attribute(x[:3], 0), maps)
    assert bool(maps.any())


# --- quantised layers


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module has been said to move
        return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)


def quantised():
    """A dynamically quantised network, and data whose extremes are the same in every batch."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    with torch.no_grad():  # the largest number of every layer is 8, of every row
        for layer in (model[0], model[2]):
            layer.weight[0], layer.bias[0] = 0, 0
            layer.weight[0, 0] = 1
    x = torch.randn(40, 6).clamp(-2, 2)
    x[:, 0], x[:, 1] = 8, -8
    return dynamic(model), x


quantising = pytest.mark.filterwarnings(
    "ignore:.*autograd kernel was not registered", "ignore:excitation backprop has no rule"
)


@quantising
@pytest.mark.parametrize("backend", [None, Saliency, IntegratedGradients, DeepLift, ExcitationMaps()], ids=str)
def test_quantised_layers_before_the_layer_are_named(backend):
    model, x = quantised()
    xnn = fitted(model, "3", x, "learned", backend)
    with pytest.raises(ValueError, match="'0' is quantised, and quantised layers have no gradient; explain the float"):
        xnn.attribute(x[:3], 0)


@quantising
def test_quantised_layers_behind_the_layer_are_named():
    model, x = quantised()
    with pytest.raises(
        ValueError, match=r"layer '3' contributes nothing .* '4' is quantised, .* explain the float model"
    ):
        fitted(model, "3", x, "groups")


def test_ablation_explains_a_quantised_model():
    model, x = quantised()
    xnn = fitted(model, "3", x, "learned", FromCaptum(FeatureAblation, baselines=x.mean(0, keepdim=True)))
    maps = xnn.attribute(x[:3], 0)
    for i in range(2, 6):  # columns without the extremes
        changed = x[:3].clone()
        changed[:, i] = x[:, i].mean()
        drop = xnn.contributions(x[:3], 0).features - xnn.contributions(changed, 0).features
        torch.testing.assert_close(maps[:, :, i], drop, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_quantisation_by_the_batch_is_named(form):
    """With extremes that differ between batches an example's output depends on the others."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].weight.data[:, 0] = 0
    x = torch.randn(40, 6)
    x[1:-1, 0] *= 1000  # counts for nothing, but for the scale on which all others are rounded
    model = dynamic(model)
    with pytest.raises(ValueError, match="layer '0' is quantised dynamically, by the extremes of the whole batch"):
        fitted(model, "1", x, form)


# --- inputs at their baseline


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 2)
    )


AT_BASELINE = {
    "DeepLift at zeros": (DeepLift, lambda x: 0 * x),
    "DeepLift at its baseline": (lambda x: FromCaptum(DeepLift, baselines=x), lambda x: x),
    "DeepLift at one baseline": (lambda x: FromCaptum(DeepLift, baselines=x[:1]), lambda x: x[:1].repeat(3, 1, 1, 1)),
    "DeepLiftShap": (lambda x: FromCaptum(DeepLiftShap, baselines=x[:1].repeat(4, 1, 1, 1)), lambda x: x[:1]),
    "integrated gradients": (lambda x: FromCaptum(IntegratedGradients, baselines=x), lambda x: x),
    "gradient SHAP": (
        lambda x: FromCaptum(GradientShap, baselines=x[:1].repeat(4, 1, 1, 1), stdevs=0.0),
        lambda x: x[:1],
    ),
    "input x gradient of a black image": (InputXGradient, lambda x: 0 * x),
}


@pytest.mark.parametrize("case", AT_BASELINE)
@pytest.mark.parametrize("form", FORMS)
def test_an_input_at_its_baseline_has_zeros_and_their_reason(form, case):
    backend, inputs = AT_BASELINE[case]
    x = torch.randn(40, 1, 8, 8)
    xnn = fitted(network(), "5", x, form)
    drawn = xnn.with_heatmap(backend if isinstance(backend, type) else backend(x[:3]))
    with pytest.warns(UserWarning, match="maps are zero for x-feature.*: the inputs equal the baseline"):
        maps = drawn.attribute(inputs(x[:3]), 0)
    assert bool((maps.abs() < 1e-6).all())


@pytest.mark.parametrize("away", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("form", FORMS)
def test_an_input_close_to_its_baseline_is_drawn(form, away):
    """Its differences are as small as rounding, of which DeepLift is not to be blamed."""
    x = torch.randn(40, 1, 8, 8)
    xnn = fitted(network(), "5", x, form, FromCaptum(DeepLift, baselines=x[:3]))
    maps = xnn.attribute(x[:3] + away, 0)
    assert bool(maps.isfinite().all())
    assert bool(maps.any())


@pytest.mark.parametrize("form", FORMS)
def test_what_deeplift_has_no_rule_for_is_still_refused(form):
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    xnn = fitted(model, "3", x := torch.randn(40, 6), form, DeepLift)
    with pytest.raises(UnsupportedOperationError, match="should sum to the x-feature's difference from the baseline"):
        xnn.attribute(x[:3], 0)


# --- modules made in forward


class MadeInForward(nn.Module):
    """Non-linearities made anew in every pass, and one pooling module for both levels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.pool, self.last, self.act, self.head = nn.MaxPool2d(2), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x):
        x = self.pool(nn.ReLU()(self.a(x)))
        x = self.pool(nn.LeakyReLU(0.1)(self.b(x)))
        return self.head(self.act(self.last(x.flatten(1))))


@pytest.mark.filterwarnings("ignore:maps are zero")
@pytest.mark.parametrize("form", FORMS)
def test_deeplift_through_modules_made_in_forward(form):
    """Each x-feature's attributions sum to what it differs by from its value at the baseline."""
    x = torch.randn(40, 1, 8, 8)
    xnn = fitted(MadeInForward(), "act", x, form, FromCaptum(DeepLift, baselines=x[5:6]))
    maps = xnn.attribute(x[:3], 0)
    if form == "groups":  # held slopes are those of the example, so the read-out at the baseline has them too
        slopes = Explained.of(xnn._examples(x[:3], 0, None, None)).numbers.slopes
        model, groups = xnn.model, xnn.explainer(0).form.groups
        Z, Z0 = (model.act(model.last(hidden(model, part))).detach() for part in (x[:3], x[5:6]))
        wanted = ((Z - Z0) * slopes) @ groups
    else:
        wanted = xnn.contributions(x[:3], 0).features - xnn.contributions(x[5:6], 0).features
    torch.testing.assert_close(maps.flatten(2).sum(2), wanted, rtol=1e-3, atol=1e-5)


def hidden(model, x):
    x = model.pool(model.a(x).relu())
    return model.pool(nn.functional.leaky_relu(model.b(x), 0.1)).flatten(1)


@pytest.mark.parametrize("inputs", [((torch.zeros(2, 6),),), (torch.zeros(2, 6), None)], ids=["nested", "None"])
def test_inputs_that_are_no_tensors_are_told(inputs):
    xnn = fitted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "1", torch.randn(40, 6), "groups")
    with pytest.raises(TypeError, match=r"inputs are a tuple of |is 2 inputs of the model"):
        xnn.attribute(inputs, 0)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([torch.zeros(2, 6), torch.zeros(2)], r"found: <class 'list'>; pass batch\[0\] of a batch"),
        (
            {"ids": torch.zeros(2, 6), "mask": torch.ones(2, 6)},
            r"pass the entry that gets maps, such as batch\['ids'\].*additional_forward_args=\(batch\['mask'\],\)",
        ),
        ({"ids": torch.zeros(2, 6)}, r"such as batch\['ids'\]$"),
        (np.zeros((2, 6)), r"found: <class 'numpy.ndarray'>; pass torch.from_numpy"),
        (torch.utils.data.DataLoader(torch.zeros(4, 6)), r"next\(iter\(loader\)\)\[0\]; fit, score and report also"),
    ],
    ids=["batch", "dict", "dict of one", "array", "loader"],
)
def test_batches_say_which_of_their_tensors_to_pass(inputs, said):
    xnn = fitted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "1", torch.randn(40, 6), "groups")
    for explain in (xnn.explain, xnn.attribute, xnn.contributions):
        with pytest.raises(TypeError, match=said):
            explain(inputs, 0)


class Fused(nn.Module):
    """A table joins the image's activations behind the layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.act, self.mixed = nn.Linear(6, 8), nn.ReLU(), nn.Linear(12, 5)
        self.bend, self.head = nn.ReLU(), nn.Linear(5, 3)

    def forward(self, image, table):
        return self.head(self.bend(self.mixed(torch.cat([self.act(self.layer(image)), table], 1))))


GRADIENTS = {
    "InputXGradient": InputXGradient,
    "IntegratedGradients": FromCaptum(IntegratedGradients, n_steps=20),
    "Saliency": FromCaptum(Saliency, abs=False),
    "DeepLift": DeepLift,
    "GuidedBackprop": GuidedBackprop,
    "LRP": LRP,
}


@pytest.mark.filterwarnings("ignore:maps are zero")
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("form", [None, partial(SRAE, hidden=(4,))], ids=["groups", "learned"])
def test_an_input_that_joins_behind_the_layer_has_maps_of_zeros(form, name):
    """No x-feature depends on it. Those of the other input are as without it, and sum to the output's if groups."""
    model, image, table = Fused().eval(), torch.randn(40, 6), torch.randn(40, 4)
    xnn = XNNAttribution(model, "act", 3, autoencoder=form, recipe=Recipe(steps=5), heatmap=GRADIENTS[name])
    xnn.fit((image, table), 0, positives=torch.ones(40, dtype=torch.bool), progress=False)
    maps = xnn.attribute((image[:4], table[:4]), 0)
    assert maps[1].shape == (4, 3, 4) and not maps[1].any() and maps[0].abs().max() > 0
    if form is not None:
        layers = nn.Sequential(model.layer, model.act, nn.Linear(8, 3))
        alone = XNNAttribution(layers, "1", 3, heatmap=GRADIENTS[name], autoencoder=form)
        alone.explainers_ = Explainers({("1", (0,)): replace(xnn.explainer(0), layer="1", weights=None)})
        torch.testing.assert_close(maps[0], alone.attribute(image[:4], 0))
    elif name in ("InputXGradient", "IntegratedGradients", "Saliency"):
        whole = xnn.one_heatmap((image[:4], table[:4]), 0)
        if name != "IntegratedGradients":  # whose path leads through other tables
            torch.testing.assert_close(maps[0].sum(1), whole[0][:, 0])
        assert whole[1].abs().max() > 0
