"""The model comes back as it was found, whatever its forward pass changes in it."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from captum.attr import InputXGradient
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.cli._layers import list_layers
from captum_xnn.layers._state import untouched

FORMS = {"groups": None, "learned": partial(SRAE, hidden=(4,))}


class Changing(nn.Module):
    """Registers buffers and a submodule in forward, replaces other buffers, counts, and remembers."""

    def __init__(self):
        super().__init__()
        self.a, self.relu, self.head = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)
        self.register_buffer("mask", None)
        self.register_buffer("count", torch.zeros(1))
        self.calls, self.last = 0, None

    def forward(self, x):
        if "scale" not in self._buffers:
            self.register_buffer("scale", torch.ones(8))
            self.register_buffer("hidden", torch.ones(8), persistent=False)
            self.extra = nn.Identity()
        if self.mask is None:
            self.mask = torch.ones(8)
        self.count = self.count + 1
        self.calls += 1
        self.last = self.relu(self.extra(self.a(x)) * self.scale * self.mask * self.hidden)
        return self.head(self.last)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_forward_registers_or_changes_stays(form):
    model, x = Changing(), torch.randn(60, 6)
    before, state = {k: copy.copy(v) for k, v in vars(model).items()}, copy.deepcopy(model.state_dict())
    xnn = XNNAttribution(model, "relu", 2, autoencoder=FORMS[form], recipe=Recipe(steps=5))
    xnn.fit(x, 0, positives=torch.ones(60).bool(), progress=False)
    xnn.explain(x[:2], 0)
    assert vars(model).keys() == before.keys()
    assert {k: v for k, v in vars(model).items() if k != "_buffers"} == {
        k: v for k, v in before.items() if k != "_buffers"
    }
    assert list(model._buffers) == ["mask", "count"]
    assert model.mask is None
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model.count, torch.zeros(1))


def test_buffers_are_the_same_objects():
    model = Changing()
    buffer = model.count
    with untouched(model):
        model(torch.ones(2, 6))
        assert model.calls == 1
        assert model.count is not buffer
    assert model.count is buffer
    assert (model.calls, model.last) == (0, None)


class Late(nn.Module):
    """Makes its head at the first call, with random weights."""

    def __init__(self, way):
        super().__init__()
        self.a, self.relu, self.way = nn.Linear(6, 8), nn.ReLU(), way

    def forward(self, x):
        h = self.relu(self.a(x))
        if self.way == "module" and not hasattr(self, "head"):
            self.head = nn.Linear(8, 2)
        if self.way == "parameter" and not hasattr(self, "weight"):
            self.weight = nn.Parameter(torch.randn(2, 8))
        return self.head(h) if self.way == "module" else h @ self.weight.T


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (partial(Late, "module"), r"new parameters \(Late.head.weight, Late.head.bias\)"),
        (partial(Late, "parameter"), r"new parameters \(Late.weight\)"),
        (
            lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LazyLinear(2)),
            r"new parameters \(those of LazyLinear\)",
        ),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_was_never_run_is_refused(model, told, form):
    """Its random weights would be others in every pass."""
    with pytest.raises(ValueError, match=told):
        XNNAttribution(
            model := model(), "1" if isinstance(model, nn.Sequential) else "relu", 2, autoencoder=FORMS[form]
        ).fit(torch.randn(60, 6), 0, progress=False)


def test_a_model_that_ran_once_is_explained():
    model, x = Late("module"), torch.randn(60, 6)
    y = model(x[:3])[:, 0].detach()  # the same batch, since a processor may sum a larger one in another order
    xnn = XNNAttribution(model, "relu", 2).fit(x, 0, positives=torch.ones(60).bool(), progress=False)
    assert torch.equal(xnn.explain(x[:3], 0).prediction, y)


# --- parts that are no Python code, and weights that cannot be used


class PartlyScripted(nn.Module):
    """Ends in a scripted module with batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.a, self.relu = nn.Linear(6, 8), nn.Tanh()
        rest = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        rest[0].running_mean.copy_(torch.rand(8))
        self.plain = rest
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.rest = torch.jit.script(copy.deepcopy(rest))

    def forward(self, x):
        return self.rest(self.relu(self.a(x)))


@pytest.mark.parametrize("form", FORMS)
def test_a_scripted_part_is_explained_and_stays(form):
    torch.manual_seed(0)
    model, x = PartlyScripted(), torch.randn(60, 6)
    model.rest.train(form == "learned")
    modes, state = {m: m.training for m in model.modules()}, copy.deepcopy(model.state_dict())
    xnn = XNNAttribution(model, "relu", 2, autoencoder=FORMS[form], recipe=Recipe(steps=5), heatmap=InputXGradient)
    xnn.fit(x, 0, positives=torch.ones(60).bool(), progress=False)
    why = xnn.explain(x[:3], 0)
    assert {m: m.training for m in model.modules()} == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [row.name for row in list_layers(model, x)] == ["a", "relu"]
    plain = nn.Sequential(model.a, model.relu, model.plain).eval()
    torch.testing.assert_close(why.prediction, plain(x[:3])[:, 0].detach())
    if form == "groups":
        torch.testing.assert_close(why.bias + why.contributions.sum(1), why.prediction)


@pytest.mark.parametrize("form", FORMS)
def test_weights_made_in_inference_mode_are_refused_and_what_is_advised_works(form):
    make, x = (
        partial(XNNAttribution, autoencoder=FORMS[form], recipe=Recipe(steps=5), heatmap=InputXGradient),
        torch.randn(60, 6),
    )
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"weight '0.weight' was made under torch.inference_mode, .*copy.deepcopy"):
        make(model, "1").fit(x, 0, progress=False)
    again = copy.deepcopy(model)
    make(again, "1", 2).fit(x, 0, positives=torch.ones(60).bool(), progress=False).contributions(x[:2], 0)


@pytest.mark.parametrize("form", FORMS)
def test_weights_without_values_are_refused(form):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"weight '0.weight' is on the meta device .*; load the model's weights"):
        XNNAttribution(model, "1", autoencoder=FORMS[form]).fit(torch.randn(60, 6), 0, progress=False)
