"""Forward passes that run layers again, take gradients, change weights or route examples: right, or refused."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from captum.attr import DeepLift, InputXGradient, LayerGradientXActivation
from torch import nn
from torch.utils.checkpoint import checkpoint

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.layers._state import untouched

FORMS = {"groups": None, "learned": partial(SRAE, hidden=(4,))}
X = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
ALL = torch.ones(60).bool()


def fitted(model, layer, form, x=X, **settings):
    recipe = Recipe(steps=10)
    xnn = XNNAttribution(model.eval(), layer, 3, autoencoder=FORMS[form], recipe=recipe, **settings)
    return xnn.fit(x, 0, positives=ALL[: len(x)], progress=False)


class Checkpointed(nn.Module):
    """A block whose activations are not kept, but computed again in the backward pass."""

    def __init__(self, way, times=1):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.way, self.times = way, times

    def block(self, x):
        h = self.a(x).tanh()
        for _ in range(self.times):
            h = self.b(h).tanh()
        return h

    def forward(self, x):
        h = self.block(x) if self.way is None else checkpoint(self.block, x, use_reentrant=self.way)
        return self.c(h)


@pytest.mark.parametrize("heatmap", [None, InputXGradient, FromCaptum(LayerGradientXActivation, layer="a")], ids=str)
@pytest.mark.parametrize("layer", ["a", "b", ""])
def test_checkpoints_change_nothing(layer, heatmap):
    made = []
    for way in (None, False):
        model = Checkpointed(way)
        xnn = fitted(model, layer or model, "groups", heatmap=heatmap)
        why = xnn.explain(X[:4], 0)
        made.append((why.contributions, why.maps, xnn.explainer(0).form.groups))
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own
def test_learned_forms_take_any_checkpoints():
    wanted = fitted(Checkpointed(None), "b", "learned").contributions(X[:4], 0).contributions
    for way in (False, True):
        torch.testing.assert_close(fitted(Checkpointed(way), "b", "learned").contributions(X[:4], 0)[1], wanted)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints_that_cut_gradients_are_named():
    with pytest.raises(
        ValueError, match=r"layer 'a' runs without gradients: under torch.no_grad, or in a .*checkpoint"
    ):
        fitted(Checkpointed(True), "a", "groups")
    fitted(Checkpointed(True), "c", "groups")  # a layer outside, as the error advises


class CheckpointedRest(nn.Module):
    """A checkpoint behind the layer."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.way = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), way

    def forward(self, x):
        rest = nn.Sequential(nn.Tanh(), self.b, nn.Tanh())
        h = self.a(x)
        return self.c(rest(h) if self.way is None else checkpoint(rest, h, use_reentrant=self.way))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints_behind_the_layer():
    with pytest.raises(ValueError, match=r"use_reentrant=True lies behind layer 'a', .*; pass use_reentrant=False"):
        fitted(CheckpointedRest(True), "a", "groups")
    wanted = fitted(CheckpointedRest(None), "a", "groups").explain(X[:4], 0)
    made = fitted(CheckpointedRest(False), "a", "groups").explain(X[:4], 0)  # as the error advises
    torch.testing.assert_close((made.contributions, made.maps), (wanted.contributions, wanted.maps))
    fitted(CheckpointedRest(True), "a", "learned").contributions(X[:4], 0)


class InInferenceMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    @torch.inference_mode()
    def forward(self, x):
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("form", FORMS)
def test_a_forward_pass_in_inference_mode_is_refused(form):
    with pytest.raises(ValueError, match=r"forward pass runs under torch.inference_mode, .*; take the decorator"):
        fitted(InInferenceMode(), "a", form)


def test_a_layer_of_several_calls_in_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="runs layer 'b' again in the backward pass, and the layer runs 2 times"):
        fitted(Checkpointed(False, times=2), "b", "groups")
    plain, other = (fitted(Checkpointed(way, times=2), "a", "groups") for way in (None, False))
    torch.testing.assert_close(other.attribute(X[:3], 0), plain.attribute(X[:3], 0))


class Forces(nn.Module):
    """Gradients of an energy by the inputs, as in models of molecules."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(6, 3)

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.clone().requires_grad_()
            (force,) = torch.autograd.grad(self.b(self.a(x).tanh()).sum(), x, create_graph=True)
        return self.c(force)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_gradients_within_a_forward_pass():
    model = Forces()
    with pytest.raises(ValueError, match="takes gradients in its own forward pass, by values ahead of layer 'a'"):
        fitted(model, "a", "groups")
    for layer, form in (("a", "learned"), ("c", "groups")):
        made = fitted(model, layer, form).contributions(X[:4], 0)
        torch.testing.assert_close(made.prediction, model(X[:4])[:, 0].detach())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("form", FORMS)
def test_an_embedding_that_is_renormed_stays_as_it_was(form, kind):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.hidden, self.head = kind(20, 8, max_norm=0.5), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, ids):
            h = self.words(ids)
            return self.head(self.hidden(h if h.dim() == 2 else h.mean(1)).tanh())

    model, ids = Words(), torch.randint(0, 20, (60, 5), generator=torch.Generator().manual_seed(2))
    before = model.words.weight.detach().clone()
    assert bool((before.norm(dim=1) > 0.5).all())
    xnn = fitted(model, "hidden", form, ids, heatmap=FromCaptum(LayerGradientXActivation, layer="words"))
    why = xnn.explain(ids[:3], 0)
    assert torch.equal(model.words.weight, before)
    torch.testing.assert_close(why.prediction, model(ids[:3])[:, 0].detach())


class Routed(nn.Module):
    """Each example goes to one of two experts."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)]), nn.Linear(8, 3)

    def forward(self, x):
        first = x[:, 0] > 0
        h = x.new_zeros(len(x), 8)
        for rows, expert in zip((first, ~first), self.experts, strict=True):
            h = h.index_put((rows.nonzero()[:, 0],), expert(x[rows]))
        return self.head(h.tanh())


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_sees_some_of_the_examples_is_refused(form):
    with pytest.raises(
        ValueError,
        match=r"gives \d+ rows and the model gives 60 rows .* as an expert behind a router, choose a layer behind",
    ):
        fitted(Routed(), "experts.1", form)
    model = Routed()
    made = fitted(model, "head", form).contributions(X[:4], 0)
    torch.testing.assert_close(made.prediction, model(X[:4])[:, 0].detach())


DOUBLING = {
    "full": lambda layer: layer.register_full_backward_hook(
        lambda _, given, __: tuple(None if g is None else 2 * g for g in given)
    ),
    "pre": lambda layer: layer.register_full_backward_pre_hook(lambda _, given: (2 * given[0],)),
}


@pytest.mark.parametrize("heatmap", [None, InputXGradient, DeepLift], ids=str)
@pytest.mark.parametrize("layer", ["0", "1", "2"])
@pytest.mark.parametrize("kind", DOUBLING)
def test_backward_hooks_on_the_model_change_no_gradient(kind, layer, heatmap):
    """As an interrupted guided backpropagation leaves them. Ahead of the layer they changed the maps alone."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    with_hooks = copy.deepcopy(plain)
    for module in with_hooks[1:4:2]:
        DOUBLING[kind](module)
    why, wanted = (fitted(m, layer, "groups", heatmap=heatmap).explain(X[:4], 0) for m in (with_hooks, plain))
    torch.testing.assert_close(why.contributions, wanted.contributions)
    torch.testing.assert_close(why.maps, wanted.maps)
    assert [len(m._backward_hooks) + len(m._backward_pre_hooks) for m in with_hooks] == [0, 1, 0, 1, 0]


def test_backward_hooks_are_back_after_an_exception():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    handles = [model[1].register_full_backward_hook(lambda *_: None) for _ in range(2)]
    before = list(model[1]._backward_hooks.items())
    with pytest.raises(RuntimeError, match="in the middle"), untouched(model):
        assert not model[1]._backward_hooks
        model[1].register_full_backward_hook(lambda *_: None)
        raise RuntimeError("in the middle")
    assert list(model[1]._backward_hooks.items()) == before
    for handle in handles:
        handle.remove()
    assert not model[1]._backward_hooks


class Ensemble(nn.Module):
    """Two networks, run by vmap."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.network = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.stacked = {name: torch.stack([p.detach(), -p.detach() / 2]) for name, p in self.network.named_parameters()}

    def forward(self, x):
        def run(weights, h):
            return torch.func.functional_call(self.network, weights, (h,))

        return torch.func.vmap(run, (0, None))(self.stacked, self.a(x)).sum(0)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_within_vmap_is_refused_and_others_are_explained(form):
    with pytest.raises(ValueError, match=r"layer 'network.1' runs within torch.func, .*; choose a layer outside"):
        fitted(Ensemble(), "network.1", form)
    why = fitted(Ensemble(), "a", form).contributions(X[:4], 0)
    if form == "groups":
        torch.testing.assert_close(why.bias + why.contributions.sum(1), why.prediction, rtol=0, atol=0.005)
