"""Kinds of models on which an explanation was wrong or an error misled, each with the right value or the refusal."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from captum.attr import LayerGradientXActivation, Saliency
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.network import ExplanationNetwork

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
    network = ExplanationNetwork(model, layer, xnn.explainer(0).srae)
    torch.testing.assert_close(why.features, network(some).detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(why.features, network(some), rtol=1e-4, atol=1e-5)
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    model(some)  # with gradients, by torch alone
    handle.remove()
    torch.testing.assert_close(why.features, xnn.explainer(0).srae.encode(seen[0]), rtol=1e-4, atol=1e-5)
