"""Captum's tools, and Quantus, with the classes here, as a user would write them, and the numbers they must give."""

from __future__ import annotations

import warnings
from functools import partial

import matplotlib as mpl
import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, NoiseTunnel, Saliency, visualization
from captum.concept import TCAV, Classifier, Concept
from captum.metrics import infidelity, sensitivity_max
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.data import DataLoader

from captum_xnn import SRAE, LayerExcitationBP, OneHeatmap, Recipe, XNNAttribution
from captum_xnn.heatmaps import FromCaptum

mpl.use("Agg")
pytestmark = pytest.mark.filterwarnings("ignore:probabilities sum to")


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()


def images(n=4):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def fitted(model, layer="5", heatmap=InputXGradient, **settings):
    settings = {"autoencoder": partial(SRAE, hidden=()), "recipe": Recipe(steps=20)} | settings
    data = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    every = torch.ones(60, dtype=torch.bool)
    return XNNAttribution(model, layer, 2, heatmap=heatmap, **settings).fit(data, 1, positives=every, progress=False)


def test_noise_tunnel_around_an_explainer_is_a_mean_over_noise():
    """All x-features at once, and one, against the same noise added by hand."""
    xnn, x = fitted(cnn(), heatmap=Saliency), images()
    for more in ({}, {"feature": 1}):
        torch.manual_seed(5)
        found = NoiseTunnel(xnn).attribute(x, nt_samples=3, stdevs=0.2, target=1, **more)
        torch.manual_seed(5)
        noisy = x.repeat_interleave(3, 0)
        noisy = noisy + torch.normal(0, torch.full_like(noisy, 0.2))
        wanted = xnn.attribute(noisy, target=1, **more)
        torch.testing.assert_close(found, wanted.reshape(4, 3, *wanted.shape[1:]).mean(1), rtol=1e-4, atol=1e-6)
    maps, deltas = NoiseTunnel(xnn).attribute(
        x, nt_samples=2, stdevs=0.0, target=1, return_convergence_delta=True, nt_samples_batch_size=1
    )
    torch.testing.assert_close(maps, xnn.attribute(x, target=1), rtol=1e-4, atol=1e-6)
    assert deltas.shape == (8,)
    own = xnn.attribute(x, target=1, return_convergence_delta=True)[1]
    assert float((deltas.sort()[0] - own.repeat(2).sort()[0]).abs().max()) < 1e-5


def test_infidelity_and_sensitivity_of_one_x_feature():
    """Infidelity is nil where a map is the x-feature's gradient and the x-feature linear, and not of another map."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    xnn, x = fitted(linear, "1", heatmap=Saliency), images()
    network_of_one = partial(x_features, xnn)

    def perturb(inputs):
        noise = torch.randn_like(inputs)
        return noise, inputs - noise

    right = xnn.attribute(x, target=1, feature=0, abs=False)
    for maps, close in ((right, True), (right.abs(), False)):
        error = infidelity(network_of_one, perturb, x, maps, target=0, n_perturb_samples=4)
        assert error.shape == (4,) and bool((error < 1e-6).all()) == close
    constant = sensitivity_max(partial(xnn.attribute, feature=0), x, target=1, perturb_radius=0.05)
    torch.testing.assert_close(constant, torch.zeros(4), rtol=0, atol=1e-5)
    # Input x gradient of a linear function moves as the input does.
    moving = fitted(linear, "1")
    moved = sensitivity_max(partial(moving.attribute, feature=0), x, lambda x: x * 1.1, target=1)
    torch.testing.assert_close(moved, torch.full((4,), 0.1), rtol=1e-4, atol=1e-5)


def x_features(xnn, x):
    with torch.no_grad():
        return xnn.explainer(1).form.encode(xnn.model(x))


class ByMeans(Classifier):
    """Concept activation vectors as differences of means, so that they can be computed again."""

    def __init__(self):
        pass

    def train_and_eval(self, dataloader, **_kwargs):
        rows = [(x, y) for x, y in dataloader]
        x, y = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])
        self._classes = sorted(y.unique().tolist())
        self.w = torch.stack([x[y == c].mean(0) - x[y != c].mean(0) for c in self._classes])

    def weights(self):
        return self.w

    def classes(self):
        return self._classes


def test_tcav_by_excitation_backprop(tmp_path):
    """The share of inputs whose winning probabilities at the layer point along the concept."""
    model, x = cnn(), images(6)
    data = [images(5) + 1.0, images(5) - 1.0]
    concepts = [Concept(i, "ab"[i], DataLoader(list(d), batch_size=2)) for i, d in enumerate(data)]
    tcav = TCAV(
        model,
        ["2", "5"],
        layer_attr_method=LayerExcitationBP(model, None),
        classifier=ByMeans(),
        save_path=str(tmp_path),
    )
    with pytest.raises(ValueError, match="the layer to stop at is None; set"):
        tcav.layer_attr_method.attribute(x, target=1)
    scores = tcav.interpret(x, experimental_sets=[concepts], target=1)["0-1"]
    for name, layer in (("2", model[2]), ("5", model[5])):
        depth = int(name) + 1
        with torch.no_grad():
            means = [model[:depth](d).flatten(1).mean(0) for d in data]
        attributions = LayerExcitationBP(model, layer).attribute(x, target=1).flatten(1)
        along = attributions @ torch.stack([means[0] - means[1], means[1] - means[0]]).T
        torch.testing.assert_close(scores[name]["sign_count"], (along > 0).float().mean(0))
        torch.testing.assert_close(scores[name]["magnitude"], along.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heatmap", [None, Saliency, FromCaptum(IntegratedGradients, n_steps=4)])
def test_captums_pictures_of_the_results(heatmap):
    """As in Captum's tutorials: a map as (H, W, C), beside the image."""
    xnn, x = fitted(cnn(), heatmap=heatmap), images()
    maps = xnn.attribute(x, target=1, feature=0)
    i = int(maps.abs().flatten(1).sum(1).argmax())  # the x-feature has no map in some examples
    shown = maps[i].permute(1, 2, 0).numpy()
    assert shown.shape == (8, 8, 3) and np.abs(shown).sum() > 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to normalize by value approximately 0")
        figure, axes = visualization.visualize_image_attr_multiple(
            shown,
            x[i].permute(1, 2, 0).sigmoid().numpy(),
            ["original_image", "heat_map"],
            ["all", "absolute_value"],
            use_pyplot=False,
        )
    drawn = axes[1].images[0].get_array()
    wanted = np.abs(shown.sum(2))
    assert np.corrcoef(np.asarray(drawn).ravel(), wanted.ravel())[0, 1] > 0.9
    plt.close(figure)


def test_a_map_of_zeros_is_a_picture_here():
    """Captum's own routine raises `Cannot normalize by scale factor = 0`."""
    xnn, x = fitted(cnn()), images()
    xnn.explainer(1).form.encoder[0].weight.data[0] = 0
    for told_by in (xnn.attribute, xnn.explain):
        with pytest.warns(UserWarning, match=r"maps are zero for x-feature 1 \(feature=0\) in 4 of 4 examples") as told:
            why = told_by(x, target=1)
        assert len(told) == 1 and told[0].filename == __file__
    with pytest.raises(AssertionError, match="Cannot normalize by scale factor = 0"):
        visualization.visualize_image_attr(why.maps[0, 0].permute(1, 2, 0).numpy(), use_pyplot=False)
    texts = [t.get_text() for axes in why.show(0).axes for t in axes.texts]
    assert any("empty map" in t or "no contribution" in t for t in texts)
    plt.close("all")


def test_maps_that_are_not_finite_are_told():
    """Once for a call, whatever the backend."""

    class Broken(Saliency):
        def attribute(self, inputs, target=None, additional_forward_args=None):
            maps = super().attribute.__wrapped__(self, inputs, target, True, additional_forward_args)
            return maps / (target != 0).to(maps).reshape(-1, 1, 1, 1)

    xnn, x = fitted(cnn(), heatmap=Broken), images()
    with pytest.warns(UserWarning, match="4 of 8 maps have NaN or infinite values") as told:
        xnn.attribute(x, target=1, internal_batch_size=3)
    assert len(told) == 1 and told[0].filename == __file__
    with pytest.warns(UserWarning, match="4 of 4 maps") as told:
        OneHeatmap(cnn(), Broken).attribute(x, target=0)
    assert len(told) == 1 and told[0].filename == __file__


def test_quantus_takes_an_explain_function(torchvision):
    """The recipe of the page for Captum users; sparseness is Gini's index, which is easily written again."""
    quantus = pytest.importorskip("quantus")
    model, x = cnn(), images()
    xnn = fitted(model)

    def explain(model, inputs, targets, **_kwargs):
        maps = xnn.attribute(torch.as_tensor(inputs), target=[1] * len(inputs), feature=0)
        return maps.sum(1, keepdim=True).numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = quantus.Sparseness(abs=True, normalise=False, disable_warnings=True, display_progressbar=False)
        found = metric(
            model=model, x_batch=x.numpy(), y_batch=np.ones(4, dtype=int), a_batch=None, explain_func=explain
        )
    for one, given in zip(explain(None, x.numpy(), None), found, strict=True):
        flat = np.sort(np.abs(one).ravel() + 1e-7)
        n = len(flat)
        gini = np.sum((2 * np.arange(1, n + 1) - n - 1) * flat) / (n * np.sum(flat))
        assert given == pytest.approx(gini, rel=1e-3)


def test_the_one_heatmap_in_captums_metrics():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), images()

    def perturb(inputs):
        noise = torch.randn_like(inputs)
        return noise, inputs - noise

    maps = OneHeatmap(model, FromCaptum(Saliency, abs=False)).attribute(x, target=2, feature=0)
    assert bool((infidelity(model, perturb, x, maps, target=2) < 1e-6).all())
