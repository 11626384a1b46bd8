"""torch's default device is the user's affair: the library follows models and inputs, and counts on the CPU.

The default here is the meta device. It holds no values, so a number that the library makes there by mistake raises an
error. A GPU as the default would only make some of these mistakes visible.
"""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import captum_xnn
from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.heatmaps import ExcitationMaps, GradientMaps
from captum_xnn.models.baselines import DRSA, NMF, Lasso, RandomEncoder

PACKAGE = Path(captum_xnn.__file__).parent
FACTORIES = {
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "zeros", "as_tensor", "asarray", "triu_indices", "tril_indices", "hann_window", "kaiser_window", "scalar_tensor",
}  # fmt: skip
ELSEWHERE = {"cli", "datasets", "study"}
"""Folders that make data of their own, and do not work on the user's."""


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_default_device(None)


@pytest.mark.filterwarnings("ignore:maps are zero", "ignore:contributions to target", "ignore:probabilities sum to")
@pytest.mark.parametrize("heatmap", [GradientMaps(), ExcitationMaps(contrastive=False)])
@pytest.mark.parametrize(
    ("form", "layer"),
    [(None, "4"), (None, "1"), (DRSA, "4"), (partial(SRAE, hidden=(8,)), "4"), (Lasso, "4"), (NMF, "4"),
     (partial(RandomEncoder, hidden=(8,)), "4")],
)  # fmt: skip
def test_everything_is_the_same_under_another_default(form, layer, heatmap, tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.ReLU(), nn.Linear(6, 2))
    x, every = torch.randn(60, 1, 8, 8), torch.ones(60, dtype=torch.bool)

    def made():
        xnn = XNNAttribution(model, layer, 2, autoencoder=form, recipe=Recipe(steps=6), heatmap=heatmap)
        xnn.fit(x, [0, 1], positives=every, progress=False)
        targets = [0, 1, 1]
        return xnn, xnn.explain(x[:3], targets, one_heatmap=True, internal_batch_size=2), xnn.score(x, 0)

    _, wanted, score = made()
    torch.set_default_device("meta")
    xnn, found, again = made()
    for name in ("maps", "one_heatmap", "features", "contributions", "bias", "surrogate", "prediction"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert again == score
    xnn.save(tmp_path)
    loaded = XNNAttribution.load(tmp_path, model, heatmap=heatmap)
    assert torch.equal(loaded.contributions(x[:3], 1).contributions, xnn.contributions(x[:3], 1).contributions)


def test_every_new_tensor_names_its_device():
    """Indices and weights that the library makes are on the CPU, or where other tensors are."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ELSEWHERE:
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            name = call.func if isinstance(call, ast.Call) else None
            made = isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name) and name.value.id == "torch"
            if made and name.attr in FACTORIES and not any(k.arg == "device" for k in call.keywords):
                found.append(f"{path.relative_to(PACKAGE)}:{call.lineno}: torch.{name.attr}")
    assert not found, "add device= to " + "; ".join(found)
