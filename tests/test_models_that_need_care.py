"""Kinds of models on which an explanation was wrong or an error misled, each with the right value or the refusal."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from captum.attr import LayerGradientXActivation, Saliency
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.heatmaps.network import ExplanationNetwork
from captum_xnn.layers.read import EveryCall

K = 2


def made(model, layer, **settings):
    settings = {"heatmap": FromCaptum(Saliency, abs=False), "recipe": Recipe(steps=12), **settings}
    settings.setdefault("autoencoder", partial(SRAE, hidden=(8,)))
    return XNNAttribution(model, layer, K, **settings)


# --- two implementations of one model


class PaddedTokens(nn.Module):
    """Token ids of which 0 is padding, as text models have them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, ids):
        padding = ids == 0
        h = self.encoder(self.embedding(ids), src_key_padding_mask=padding)
        return self.head(h.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True))


def padded(n):
    ids = torch.randint(1, 20, (n, 6))
    ids[::2, 4:] = 0
    return ids


@pytest.mark.parametrize("layer", ["encoder", "encoder.layers.0", "encoder.layers.1.linear1", "encoder.layers.1.norm2"])
def test_a_padded_transformer_has_the_same_numbers_with_and_without_gradients(layer):
    """Without gradients torch has a fused implementation, which skips layers and zeroes padded positions."""
    model, ids = PaddedTokens().eval(), padded(80)
    heatmap = FromCaptum(LayerGradientXActivation, layer="embedding")
    xnn = made(model, layer, heatmap=heatmap).fit(ids, 0, positives=torch.ones(80).bool(), progress=False)
    assert torch.backends.mha.get_fastpath_enabled()
    some = ids[:5]
    why = xnn.explain(some, 0)
    network = ExplanationNetwork(model, layer, xnn.explainer(0).form)
    torch.testing.assert_close(why.features, network(some).detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(why.features, network(some), rtol=1e-4, atol=1e-5)
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    model(some)  # with gradients, by torch alone
    handle.remove()
    torch.testing.assert_close(why.features, xnn.explainer(0).form.encode(seen[0]), rtol=1e-4, atol=1e-5)


# --- a layer that runs several times in one pass


class Towers(nn.Module):
    """One encoder for two images, compared."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(10, 3)

    def forward(self, a, b):
        return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))


class Frames(nn.Module):
    """An encoder of frames, whose outputs are averaged; under no_grad, as frozen encoders run."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, frames):
        with torch.no_grad():
            seen = [self.encoder(frame) for frame in frames.unbind(1)]
        return self.head(torch.stack(seen).mean(0).tanh())


class Pyramid(nn.Module):
    """One head over two sizes of feature maps."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1), nn.Linear(160, 3)

    def forward(self, x):
        fine = self.stem(x).relu()
        coarse = fine[..., ::2, ::2]
        return self.head(torch.cat([self.shared(level).flatten(1) for level in (fine, coarse)], 1))


class Steps(nn.Module):
    """A cell whose state goes from call to call, in place."""

    def __init__(self, attention):
        super().__init__()
        self.cell, self.head, self.attention = nn.GRUCell(2, 5), nn.Linear(5, 3), attention

    def forward(self, x):
        states = [torch.zeros(len(x), 5)]
        for step in x.unbind(1):
            states.append(self.cell(step, states[-1]))
        return self.head(sum(states) if self.attention else states[-1].relu_())


SIDE_BY_SIDE = {
    "Siamese towers": (Towers, "encoder", ((6,), (6,)), (2, 5)),
    "frame encoder": (Frames, "encoder", ((3, 6),), (3, 5)),
    "pyramid levels": (Pyramid, "shared", ((1, 8, 8),), (160,)),
    "states that are summed": (partial(Steps, True), "cell", ((4, 2),), (4, 5)),
}


def batches(shapes, n=60):
    made = tuple(torch.randn(n, *shape) for shape in shapes)
    return made if len(made) > 1 else made[0]


@pytest.mark.parametrize("kind", SIDE_BY_SIDE)
def test_calls_side_by_side_are_refused(kind):
    make, layer, shapes, _ = SIDE_BY_SIDE[kind]
    model, data = make(), batches(shapes)
    with pytest.raises(ValueError, match=r"to run once in a forward pass, got \d calls side by side, .*EveryCall\(\)"):
        made(model, layer).fit(data, 0, positives=torch.ones(60).bool(), progress=False)
    assert not model.get_submodule(layer)._forward_hooks


def test_calls_in_a_row_are_read_at_the_last_one():
    model, data = Steps(False), batches(((4, 2),))
    xnn = made(model, "cell").fit(data, 0, positives=torch.ones(60).bool(), progress=False)
    state = torch.zeros(3, 5)
    for step in data[:3].unbind(1):
        state = model.cell(step, state)
    torch.testing.assert_close(xnn.explain(data[:3], 0).features, xnn.explainer(0).form.encode(state))


@pytest.mark.parametrize("kind", SIDE_BY_SIDE)
def test_every_call_is_explained(kind):
    """X-features and their gradients are those of all calls' outputs, put together by hand."""
    make, layer, shapes, shape = SIDE_BY_SIDE[kind]
    model, data = make(), batches(shapes)
    xnn = made(model, layer, output_transform=EveryCall())
    xnn.fit(data, 0, positives=torch.ones(60).bool(), progress=False)
    some = tuple(x[:3].clone().requires_grad_() for x in (data if isinstance(data, tuple) else (data,)))
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: seen.append(output))
    model(*some)
    handle.remove()
    Z = torch.stack(seen, 1) if len(shape) > 1 else torch.cat([z.flatten(1) for z in seen], 1)
    assert Z.shape[1:] == shape
    E = xnn.explainer(0).form.encode(Z)
    plain = tuple(x.detach() for x in some)
    if kind == "frame encoder":  # without gradients by its own will
        torch.testing.assert_close(xnn._explained(plain[0], 0, None)[1].features, E)
        return
    why = xnn.explain(plain if len(plain) > 1 else plain[0], 0)
    torch.testing.assert_close(why.features, E.detach())
    for k in range(K):
        wanted = torch.autograd.grad(E[:, k].sum(), some, retain_graph=True)
        for maps, grad in zip(why.maps if len(some) > 1 else (why.maps,), wanted, strict=True):
            assert bool(grad.any())
            torch.testing.assert_close(maps[:, k], grad)


def test_a_layer_whose_earlier_calls_count_for_nothing():
    """An auxiliary branch in the output that prediction_transform leaves out is no reason to refuse."""

    class Auxiliary(Towers):
        def forward(self, a, b):
            return {"aux": self.encoder(a), "logits": self.head(self.encoder(b).repeat(1, 2))}

    model, data = Auxiliary(), batches(((6,), (6,)))
    xnn = made(model, "encoder", prediction_transform=lambda output: output["logits"])
    assert len(xnn.fit(data, 0, positives=torch.ones(60).bool(), progress=False).explainers_) == 1
