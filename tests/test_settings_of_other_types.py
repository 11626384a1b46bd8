"""Settings of another type or out of range: refused where they are given, with the name, the value and the fix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from captum_xnn import SRAE, OneHeatmap, Recipe, XNNAttribution


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


X = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"output_transform": "0"}, r"output_transform is '0', a str, and cannot be called; pass a function, such as"),
        ({"prediction_transform": "logits"}, r"prediction_transform is 'logits', .* lambda output: output\['logits'\]"),
        ({"unpack": 0}, r"unpack is 0, a int, and cannot be called; .* lambda batch: \(batch\[0\], None\)"),
        ({"recipe": {"steps": 5}}, r"recipe is \{'steps': 5\}, a dict; pass captum_xnn.Recipe\(steps=...\)"),
        ({"autoencoder": SRAE((16,), 3)}, r"autoencoder is a network of class SRAE, .* pass a class such as SRAE"),
        ({"seed": 0.5}, r"seed is 0.5, a float; pass an int, such as 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_are_checked_before_the_model_runs(setting, told):
    with pytest.raises(TypeError, match=told):
        XNNAttribution(network(), "1", **setting)


@pytest.mark.parametrize("form", [None, SRAE])
@pytest.mark.parametrize(
    ("setting", "kind", "told"),
    [
        ({"internal_batch_size": 0}, ValueError, "internal_batch_size is 0; pass at least 1, such as 16"),
        ({"internal_batch_size": -1}, ValueError, "internal_batch_size is -1; pass at least 1"),
        ({"internal_batch_size": "4"}, TypeError, "internal_batch_size is '4', a str; pass an int"),
        ({"feature": 1.0}, TypeError, "feature is 1.0, a float; pass an int"),
    ],
    ids=str,
)
def test_numbers_of_a_call(form, setting, kind, told):
    model = network()
    xnn = XNNAttribution(model, "1", 3, autoencoder=form, recipe=Recipe(steps=5)).fit(X, 0, progress=False)
    with pytest.raises(kind, match=told):
        xnn.attribute(X[:2], 0, **setting)
    if "feature" not in setting:
        for call in (xnn.explain, xnn.contributions, xnn.one_heatmap, OneHeatmap(model).attribute):
            with pytest.raises(kind, match=told):
                call(X[:2], 0, **setting)
    torch.testing.assert_close(
        xnn.attribute(X[:4], 0, internal_batch_size=np.int64(1)), xnn.attribute(X[:4], 0, internal_batch_size=3)
    )


def test_a_tuple_of_one_index_is_that_index():
    """Captum takes (2,) for 2 in outputs (N, C)."""
    xnn = XNNAttribution(network(), "1", 3).fit(X, (1,), progress=False)
    assert list(xnn.explainers_) == [("1", (1,))]
    wanted = xnn.contributions(X[:2], 1).contributions
    for target in ((1,), torch.tensor([1]), [(1,), (1,)], torch.tensor([[1], [1]])):
        assert torch.equal(xnn.contributions(X[:2], target).contributions, wanted)


@pytest.mark.parametrize("target", [(1.5, 0), (1, 0.0), ("1", 0)])
def test_parts_of_a_target_are_not_rounded(target):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(2)).eval()
    with pytest.raises(ValueError, match=r"the target .* is not an int, a tuple of ints or None; pass the index"):
        XNNAttribution(model, "1").fit(torch.rand(20, 1, 8, 8), target, progress=False)


def test_a_joint_explainer_of_one_output_twice_is_refused():
    with pytest.raises(ValueError, match=r"target is \(0, 0\), and a joint explainer needs different ones; pass each"):
        XNNAttribution(network(), "1").fit(X, (0, 0), joint=True, progress=False)
