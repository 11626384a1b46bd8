"""Why one output and not another: ``against=`` explains the difference of two outputs."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LRP, DeepLift, FeatureAblation, InputXGradient, IntegratedGradients, Saliency
from torch import nn

from captum_xnn import OneHeatmap, XNNAttribution
from captum_xnn.errors import NotFittedError
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.models import SRAE
from captum_xnn.plots._names import write_names
from captum_xnn.training import Recipe

IMAGES = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(1))
X = IMAGES[:5]
# Groups of one output, and groups that two outputs share.
KINDS = {"one": {}, "joint": {"joint": True}, "learned": {"joint": True, "autoencoder": SRAE}}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 9))
    made.extend([nn.ReLU(), nn.Linear(9, 4)]).double()
    with torch.no_grad():
        made[-1].weight *= 5
        made[-1].bias -= made(IMAGES.double()).mean(0)  # so that every class has images
    return made


def images():
    return IMAGES.double()


def x():
    return X.double()


@pytest.fixture(scope="module")
def fitted(model):
    def fit(joint=False, autoencoder=None, layer="5"):
        xnn = XNNAttribution(model, layer, 3, autoencoder=autoencoder, recipe=Recipe(steps=50))
        return xnn.fit(images(), (0, 2) if joint else [0, 2], joint=joint, progress=False)

    return {name: fit(**settings) for name, settings in KINDS.items()} | {"conv": fit(layer="1")}


def two_outputs(model, a, b):
    with torch.no_grad():
        y = model(x())
    return y[:, a] - y[:, b]


@pytest.mark.parametrize("kind", ["joint", "learned"])
def test_it_is_the_difference_of_both_explanations_where_x_features_are_shared(fitted, kind):
    xnn = fitted[kind]
    one, other, both = (xnn.contributions(x(), 0), xnn.contributions(x(), 2), xnn.contributions(x(), 0, against=2))
    for name in ("contributions", "bias", "surrogate", "prediction"):
        wanted = getattr(one, name) - getattr(other, name)
        # Path integrals of piecewise linear functions are exact to the tolerance only.
        torch.testing.assert_close(getattr(both, name), wanted, rtol=0, atol=1e-6 if kind == "learned" else 2e-3)


@pytest.mark.parametrize("kind", ["joint", "learned"])
def test_swapping_the_outputs_flips_every_sign(fitted, kind):
    xnn = fitted[kind]
    one, other = xnn.contributions(x(), 0, against=2), xnn.contributions(x(), 2, against=0)
    for name in ("contributions", "bias", "surrogate", "prediction"):
        torch.testing.assert_close(getattr(one, name), -getattr(other, name))
    assert one.contributions.abs().max() > 0.01


@pytest.mark.parametrize("kind", ["one", "joint", "conv"])
def test_groups_add_up_to_the_difference(model, fitted, kind):
    """Also against an output that has no explainer."""
    for b in (1, 2, 3):
        why = fitted[kind].explain(x(), 0, against=b)
        wanted = two_outputs(model, 0, b)
        torch.testing.assert_close(why.prediction, wanted)
        tolerance = 0.01 * float(model(images())[:, 0].detach().std())
        torch.testing.assert_close(why.bias + why.contributions.sum(1), wanted, rtol=0, atol=tolerance)


def test_groups_are_those_of_the_target(model, fitted):
    """The layer is followed by one linear layer, so the contributions have a closed form."""
    xnn = fitted["one"]
    form = xnn.explainer(0).form
    with torch.no_grad():
        Z = model[:6](x())
        slope = model[-1].weight[0] - model[-1].weight[3]
        wanted = ((Z - form.base) * slope) @ form.groups.to(Z)
        bias = form.base.to(Z) @ slope + model[-1].bias[0] - model[-1].bias[3]
    made = xnn.contributions(x(), 0, against=3)
    torch.testing.assert_close(made.contributions, wanted, check_dtype=False, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.bias, bias.expand(5), check_dtype=False, rtol=1e-5, atol=1e-6)


def test_one_output_for_each_example(fitted):
    """None subtracts nothing; a batch equals single examples, maps included."""
    targets, against = [0, 2, 0, 2, 0], [1, 0, None, 3, 2]
    xnn = fitted["conv"]
    why = xnn.explain(x(), targets, against=against, one_heatmap=True)
    for i, (a, b) in enumerate(zip(targets, against, strict=True)):
        alone = xnn.explain(x()[i : i + 1], a, against=b, one_heatmap=True)
        for name in ("contributions", "bias", "prediction", "maps", "one_heatmap"):
            torch.testing.assert_close(getattr(why, name)[i], getattr(alone, name)[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(xnn.attribute(x(), targets, against=against), why.maps)
    torch.testing.assert_close(
        xnn.explain(x(), torch.tensor(targets), against=torch.ones(5).long()).bias[0], why.bias[0]
    )


def test_maps_add_up_to_the_map_of_the_difference(model, fitted):
    xnn = fitted["conv"].with_heatmap(InputXGradient)
    maps = xnn.attribute(x(), 0, against=3).sum(1)
    given = x().requires_grad_()
    y = model(given)
    (gradient,) = torch.autograd.grad((y[:, 0] - y[:, 3]).sum(), given)
    torch.testing.assert_close(maps, (given * gradient).detach(), rtol=1e-4, atol=1e-7)


class Subtracting(nn.Module):
    """The difference of two outputs as a model of one output."""

    def __init__(self, model, a, b):
        super().__init__()
        self.model, self.last = model, nn.Linear(4, 1, bias=False).double()
        with torch.no_grad():
            self.last.weight.zero_()[0, [a, b]] = torch.tensor([1.0, -1.0]).double()

    def forward(self, given):
        return self.last(self.model(given))


@pytest.mark.parametrize("method", [Saliency, InputXGradient, IntegratedGradients, DeepLift, LRP, FeatureAblation])
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_the_1_heatmap_is_the_method_on_the_difference(method):
    torch.manual_seed(3)
    plain, given = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).double(), torch.randn(5, 6).double()
    found = OneHeatmap(plain, method).attribute(given, 0, against=3, feature=0)
    wanted = method(Subtracting(plain, 0, 3)).attribute(given.clone().requires_grad_(), target=0)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6)
    assert found.abs().max() > 0.1


def test_the_1_heatmap_of_excitation_backprop_contrasts_two_outputs():
    """By hand: probabilities of both outputs at the last hidden layer, and the excess of the first."""
    small = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    given = torch.rand(5, 4).double()
    made = OneHeatmap(small, ExcitationMaps(layer="1")).attribute(given, [0, 2, 1, 0, 0], against=[1, 1, None, 2, 1])
    with torch.no_grad():
        Z, weight = small[:2](given), small[2].weight
        p = Z[:, None] * weight.clamp(min=0)
        p = p / p.sum(2, keepdim=True)
        excess = (p[:, :, None] - p[:, None]).clamp(min=0)
    for i, (a, b) in {0: (0, 1), 1: (2, 1), 3: (0, 2), 4: (0, 1)}.items():
        torch.testing.assert_close(made[i].flatten(), excess[i, a, b])
    plain = OneHeatmap(small, ExcitationMaps(layer="1")).attribute(given, 1)
    torch.testing.assert_close(made[2], plain[2])


def test_f_reg_is_that_of_the_difference(model, fitted):
    for kind in ("one", "learned"):
        made = fitted[kind].contributions(images(), 0, against=2)
        score = fitted[kind].score(images(), 0, against=2)
        assert score.f_reg == pytest.approx(float((made.surrogate - made.prediction).abs().mean()), abs=1e-6)
        assert score.f_cls is None


def test_a_saved_explainer_explains_differences(model, fitted, tmp_path):
    for kind in ("one", "learned"):
        loaded = XNNAttribution.load(fitted[kind].save(tmp_path / kind), model)
        for name in ("contributions", "bias", "surrogate"):
            first, second = (getattr(one.contributions(x(), 0, against=2), name) for one in (fitted[kind], loaded))
            torch.testing.assert_close(first, second)


@pytest.mark.filterwarnings("ignore:maps are zero")  # of one x-feature in one example
def test_the_sentence_names_both_outputs(fitted, tmp_path):
    why = fitted["one"].explain(x()[:1], 0, against=3)
    assert why.sentence().removeprefix("against ").startswith("target 0 rather than 3 because of x-feature ")
    (said,) = why.sentences(target_names=["goldfinch", "crow", "wren", "canary"])
    assert said.removeprefix("against ").startswith("goldfinch rather than canary because of x-feature ")
    assert why.describe(0).startswith("target 0 rather than 3: prediction ")


@pytest.mark.filterwarnings("ignore:maps are zero")  # of one x-feature in one example
def test_names_of_the_targets_x_features_hold(fitted, tmp_path):
    names = {"0": {0: "golden feather", 1: "red forehead", 2: "wing bar"}}
    write_names(tmp_path / "names.json", names, layer="5")
    why = fitted["one"].explain(x()[:1], 0, against=3)
    assert "golden feather" in why.sentence(names=tmp_path / "names.json", share=1)


def test_missing_explainers_are_fitted_or_asked_for(model, fitted):
    with pytest.raises(NotFittedError, match=r"xnn.fit\(train_loader, target=3\)"):
        fitted["one"].contributions(x(), 3, against=0)
    with pytest.raises(NotFittedError, match=r"target=\[0, 3\], joint=True"):
        fitted["learned"].contributions(x(), 0, against=3)
    xnn = XNNAttribution(model, "5", 3, train_data=images())
    first = xnn.contributions(x(), 0, against=2)
    assert [e.targets for e in xnn.explainers_.values()] == [(0,)]
    torch.testing.assert_close(first.contributions, fitted["one"].contributions(x(), 0, against=2).contributions)
    xnn = XNNAttribution(model, "5", 3, autoencoder=SRAE, recipe=Recipe(steps=5), train_data=images())
    xnn.contributions(x(), 0, against=2)
    assert [e.targets for e in xnn.explainers_.values()] == [(0, 2)]


def test_two_equal_or_missing_outputs_raise(model, fitted):
    with pytest.raises(ValueError, match="target and against are both 2, and their difference is always 0"):
        fitted["one"].attribute(x(), [0, 2, 0, 0, 0], against=2)
    with pytest.raises(ValueError, match=r"the difference .* lacks an output; pass both target= and against="):
        fitted["one"].attribute(x(), against=2)
    with pytest.raises(ValueError, match="target 9 is outside the model's outputs"):
        fitted["one"].attribute(x(), 0, against=9)
    with pytest.raises(ValueError, match="there are 2 targets for 5 examples"):
        fitted["one"].attribute(x(), 0, against=[1, 2])


def test_outputs_of_several_dimensions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    xnn = XNNAttribution(model, "1", 3).fit(IMAGES, (0, 4, 4), progress=False)
    made = xnn.contributions(X, (0, 4, 4), against=(1, 4, 4))
    wanted = (model(X)[:, 0] - model(X)[:, 1])[:, 4, 4].detach()
    torch.testing.assert_close(made.bias + made.contributions.sum(1), wanted, rtol=0, atol=1e-4)
    one = xnn.one_heatmap(X, (0, 4, 4), against=(1, 4, 4))
    assert one.isfinite().all()
    assert one.abs().max() > 0
