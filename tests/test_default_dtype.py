"""torch's default dtype is the user's affair: models, numbers and maps of another dtype do not depend on it."""

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
    IntegratedGradients,
    LayerGradCam,
    NoiseTunnel,
    Saliency,
    ShapleyValueSampling,
)
from torch import nn

from captum_xnn import SRAE, ConvSRAE, Recipe, XNNAttribution
from captum_xnn.heatmaps import ExcitationMaps, FromCaptum
from captum_xnn.models.baselines import CAE, NMF, NN, SAE, Lasso, RandomDecoder, RandomEncoder, SingleDimensions

FORMS = {
    "groups": (None, "4"),
    "groups of channels": (None, "1"),
    "SRAE": (partial(SRAE, hidden=(8,)), "4"),
    "ConvSRAE": (partial(ConvSRAE, hidden=(3,), pool=3), "1"),
    "NN": (partial(NN, hidden=(8,)), "4"),
    "SAE": (partial(SAE, hidden=(8,)), "4"),
    "CAE": (partial(CAE, hidden=(8,)), "4"),
    "Lasso": (Lasso, "4"),
    "single dimensions": (SingleDimensions, "4"),
    "random encoder": (partial(RandomEncoder, hidden=(8,)), "4"),
    "random decoder": (partial(RandomDecoder, hidden=(8,)), "4"),
    "NMF": (NMF, "4"),
}
BACKENDS = {
    "saliency": Saliency,
    "integrated gradients": FromCaptum(IntegratedGradients, n_steps=8),
    "DeepLift": DeepLift,
    "Grad-CAM": LayerGradCam,
    "excitation": ExcitationMaps(contrastive=False),
    "ablation": FeatureAblation,
    "Shapley": FromCaptum(ShapleyValueSampling, n_samples=1),
    "noise": FromCaptum(NoiseTunnel, attribution_method=Saliency, stdevs=1e-6),
    "LRP": LRP,
    "guided": GuidedBackprop,
    "gradient SHAP": FromCaptum(GradientShap, baselines=torch.zeros(2, 1, 8, 8), stdevs=0.0, n_samples=1),
    "DeepLift SHAP": FromCaptum(DeepLiftShap, baselines=torch.zeros(2, 1, 8, 8)),
}


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_default_dtype(torch.float32)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.ReLU(), nn.Linear(6, 2))
    return model, torch.randn(60, 1, 8, 8)


def made(form, model, x, **settings):
    autoencoder, layer = FORMS[form]
    xnn = XNNAttribution(model, layer, 2, autoencoder=autoencoder, recipe=Recipe(steps=6), **settings)
    return xnn.fit(x, [0, 1], positives=torch.ones(60).bool(), progress=False)


@pytest.mark.filterwarnings("ignore:maps are zero", "ignore:contributions to target")
@pytest.mark.parametrize(
    ("form", "other"), [*((f, torch.float64) for f in FORMS), *((f, torch.bfloat16) for f in ("groups", "SRAE"))]
)
def test_every_form_is_the_same_under_another_default(form, other, tmp_path):
    model, x = network()
    wanted = made(form, model, x, heatmap=Saliency)
    why, score = wanted.explain(x[:3], 0), wanted.score(x, 0)
    torch.set_default_dtype(other)
    xnn = made(form, model, x, heatmap=Saliency)
    found = xnn.explain(x[:3], 0)
    for name in ("maps", "features", "contributions", "bias", "surrogate", "prediction"):
        assert getattr(found, name).dtype == torch.float32
        assert torch.equal(getattr(found, name), getattr(why, name)), name
    assert xnn.score(x, 0) == score
    xnn.save(tmp_path)
    loaded = XNNAttribution.load(tmp_path, model, heatmap=Saliency).explain(x[:3], 0)
    assert torch.equal(loaded.maps, why.maps)


@pytest.mark.filterwarnings("ignore:maps are zero", "ignore:probabilities sum to")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["groups", "SRAE"])
def test_every_backend_is_the_same_under_another_default(form, backend):
    model, x = network()
    xnn = made(form, model, x, heatmap=BACKENDS[backend])
    torch.manual_seed(1)
    wanted = xnn.attribute(x[:3], 0)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    maps = xnn.attribute(x[:3], 0)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
