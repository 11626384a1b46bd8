"""OneHeatmap: the map of the model's own output, and what is shared with the x-features' maps."""

import copy
import pickle

import pytest
import torch
from captum.attr import (
    LRP,
    DeepLift,
    FeatureAblation,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    Saliency,
)
from torch import nn
from torch.nn import functional as F

import captum_xnn
from captum_xnn import LayerExcitationBP, OneHeatmap, XNNAttribution
from captum_xnn.heatmaps import ExcitationMaps, FromCaptum, GradientMaps

C = 3


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, C),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (Saliency, {}),
        (InputXGradient, {}),
        (IntegratedGradients, {"n_steps": 6}),
        (GuidedBackprop, {}),
        (FeatureAblation, {"feature_mask": torch.arange(64).reshape(1, 1, 8, 8) // 8}),
    ],
)
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
def test_it_is_the_method_on_the_model(method, settings, size):
    model, x, target = cnn(), torch.randn(4, 3, 8, 8), [0, 2, 2, 1]
    one = OneHeatmap(model, FromCaptum(method, **settings))
    found = one.attribute(x, target, feature=0, internal_batch_size=size)
    wanted = method(model).attribute(x.clone().requires_grad_(), target=target, **settings)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-7)
    assert torch.equal(one.attribute(x, torch.tensor(target))[:, 0], one.attribute(x, target, feature=0))


def test_methods_on_modules_work_on_the_whole_model():
    model, x = cnn(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        difference = (model(x) - model(torch.zeros_like(x)))[:, 1]
    found = OneHeatmap(model, DeepLift).attribute(x, 1)
    torch.testing.assert_close(found.flatten(1).sum(1), difference, rtol=1e-4, atol=1e-6)
    for module in model:
        if hasattr(module, "bias"):
            nn.init.zeros_(module.bias)
    total = OneHeatmap(model, LRP).attribute(x, 1).flatten(1).sum(1)
    torch.testing.assert_close(total, model(x)[:, 1].detach(), rtol=1e-3, atol=1e-5)


def test_grad_cam_takes_the_last_feature_maps_of_the_whole_model_before_they_are_pooled_to_few_cells():
    model = cnn()
    for size, layer in ((14, 4), (9, 2)):  # maps of 5 x 5, and of 4 x 4 cells; the next ones have 2 x 2
        x = torch.randn(2, 3, size, size)
        found = OneHeatmap(model, LayerGradCam).attribute(x, 1)
        cam = LayerGradCam(model, model[layer]).attribute(x, target=1).detach()
        torch.testing.assert_close(found[:, 0], F.interpolate(cam, (size, size), mode="bilinear"))


@pytest.mark.filterwarnings("ignore:probabilities sum to")
def test_excitation_maps_are_those_of_the_captum_class():
    """Also where the logit is below 0, where an x-feature's map would show the other side."""
    model, x = cnn(), torch.randn(6, 3, 28, 28)
    target = model(x).argmin(1)
    assert bool((model(x).gather(1, target[:, None]) < 0).any())
    found = OneHeatmap(model, ExcitationMaps(layer="1")).attribute(x, target)
    probabilities = LayerExcitationBP(model, model[1]).attribute(x, target=target)
    torch.testing.assert_close(found[:, 0, 0], probabilities.sum(1).clamp(min=0), rtol=1e-4, atol=1e-7)


class Awkward(nn.Module):
    """Several inputs, an extra argument, a dict of outputs with two dimensions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(2, 6)

    def forward(self, x, z, factor):
        return {"scores": F.relu(self.a(x) + self.b(z)).reshape(-1, 2, 3) * factor}


def test_several_inputs_and_outputs_of_several_dimensions():
    model, x, z = Awkward(), torch.randn(3, 4), torch.randn(3, 2)
    one = OneHeatmap(model, InputXGradient, prediction_transform=lambda out: out["scores"])
    targets = [(0, 1), (1, 2), (0, 1)]
    nn.init.ones_(model.a.bias)
    nn.init.ones_(model.b.bias)
    found = one.attribute((x, z), targets, 2.5, feature=0)
    leaves = x.clone().requires_grad_(), z.clone().requires_grad_()
    scores = model(*leaves, 2.5)["scores"]
    total = sum(scores[(i, *t)] for i, t in enumerate(targets))
    for given, leaf, grad in zip(found, leaves, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(given, (leaf * grad).detach())
    with pytest.raises(TypeError, match="output is a dict instead of one tensor; pass prediction_transform="):
        OneHeatmap(model, Saliency).attribute((x, z), (0, 1), 2.5)


def test_single_outputs_need_no_target_and_others_do():
    x = torch.randn(3, 4)
    for model in (nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))):
        assert OneHeatmap(model, Saliency).attribute(x).shape == (3, 1, 4)
    model = nn.Linear(4, 2)
    with pytest.raises((ValueError, AssertionError), match=r"[Tt]arget"):
        OneHeatmap(model, Saliency).attribute(x)
    with pytest.raises((ValueError, IndexError), match="2"):
        OneHeatmap(model, Saliency).attribute(x, 2)


def test_the_model_stays_as_it_was_and_the_object_pickles():
    model, x = cnn().train(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    one = OneHeatmap(model, DeepLift)
    first = one.attribute(x, 0)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(first, one.attribute(x, 0))
    assert torch.equal(first, pickle.loads(pickle.dumps(one)).attribute(x, 0))
    assert OneHeatmap.get_name() == "1-Heatmap" and captum_xnn.OneHeatmap is OneHeatmap
    with pytest.raises(NotImplementedError, match="attribute_future is not implemented for OneHeatmap"):
        one.attribute_future()


def test_an_explainer_draws_it_by_its_own_backend_without_a_fit():
    model, x = cnn(), torch.randn(2, 3, 8, 8)
    xnn = XNNAttribution(model, "6", 2, heatmap=FromCaptum(IntegratedGradients, n_steps=4))
    wanted = IntegratedGradients(model).attribute(x, target=2, n_steps=9)
    torch.testing.assert_close(xnn.one_heatmap(x, 2, feature=0, n_steps=9), wanted, rtol=1e-4, atol=1e-7)


def test_zeros_are_told_once():
    """The output 1 depends on nothing."""
    model, x = nn.Linear(4, 2), torch.randn(5, 4)
    nn.init.zeros_(model.weight[1:])
    with pytest.warns(UserWarning, match="maps are zero for output 1 in 5 of 5 examples") as told:
        maps = OneHeatmap(model, Saliency).attribute(x, 1, internal_batch_size=1)
    assert len(told) == 1 and not bool(maps.any())
    assert bool(OneHeatmap(model, Saliency).attribute(x, [0, 1, 1, 1, 1]).any())


def test_the_map_is_drawn_at_the_layer_of_the_x_features_maps():
    """The rest is linear, so gradient x activation of x-features adds up to that of the output, at the same layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 3)
    )  # the last maps before the output are smaller
    x = torch.rand(40, 1, 8, 8)
    xnn = XNNAttribution(model, "1", 3, heatmap=GradientMaps())
    xnn.fit(x, 0, positives=torch.ones(40).bool(), progress=False)
    maps, one = xnn.attribute(x[:5], 0), xnn.one_heatmap(x[:5], 0)
    assert torch.equal(xnn.with_heatmap(None).one_heatmap(x[:5], 0), one)  # by default it is drawn there, too
    torch.testing.assert_close(maps.sum(1, keepdim=True), one, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(OneHeatmap(model, GradientMaps()).attribute(x[:5], 0), one, atol=1e-3)
