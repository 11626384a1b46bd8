"""The layout of a layer's output is read from the model, also where numbers would say otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_xnn.layers._grid import has_channels_last
from captum_xnn.layers._layout import channel_dimension, token_cells


class Then(nn.Module):
    """A function of what a first module returns, as code in a forward pass is."""

    def __init__(self, first, code, *more):
        super().__init__()
        self.first, self.code, self.more = first, code, nn.ModuleList(more)

    def forward(self, x):
        return self.code(self.first(x), *self.more)


class Norm2d(nn.LayerNorm):
    """As in several libraries of vision models: a layer norm over channels that come first."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def last(x):
    return x.permute(0, 2, 3, 1)


def block(x, depth, norm, wide, narrow):
    """As a block of ConvNeXt: channels last inside, and first again at its end."""
    inside = narrow(F.gelu(wide(norm(last(depth(x))))))
    return x + inside.permute(0, 3, 1, 2)


def gated(x, squeeze):
    return x * squeeze(x.mean((2, 3))).sigmoid()[:, :, None, None]


CONV = lambda channels: nn.Conv2d(3, channels, 4, 4)  # noqa: E731
CHANNELS = {
    "a cube, first": (lambda: CONV(8), 1),
    "a cube, last": (lambda: Then(CONV(8), last), 3),
    "a cube, last, then a norm": (lambda: Then(CONV(8), lambda x, norm: norm(last(x)), nn.LayerNorm(8)), 3),
    "a cube, first again": (
        lambda: Then(CONV(8), block, nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.LayerNorm(8), nn.Linear(8, 16),
                     nn.Linear(16, 8)), 1),
    "a cube, norm of channels that come first": (lambda: Then(CONV(8), lambda x, n: n(x).relu(), Norm2d(8)), 1),
    "as many channels as almost rows": (lambda: Then(CONV(9), last), 3),
    "of a thin image": (lambda: Then(CONV(9), lambda x: last(x[:, :, :2])), 3),
    "one channel": (lambda: CONV(1), 1),
    "squeeze and excitation": (lambda: Then(CONV(8), gated, nn.Linear(8, 8)), 1),
    "a group norm": (lambda: nn.Sequential(CONV(8), nn.GroupNorm(2, 8), nn.SiLU()), 1),
    "as many tokens as dimensions": (lambda: Then(CONV(64), lambda x, mix: mix(x.flatten(2).mT), nn.Linear(64, 64)), 2),
    "flattened": (lambda: nn.Sequential(CONV(64), nn.Flatten(2), nn.GELU()), 1),
    "flattened, channels last": (lambda: Then(CONV(64), lambda x: x.flatten(2).mT.relu()), 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANNELS)
def test_channels_are_found(kind):
    make, wanted = CHANNELS[kind]
    layer = make().eval()
    model = nn.Sequential(layer, nn.Flatten())
    x = torch.randn(2, 3, 32, 32)
    before = layer(x)
    assert channel_dimension(model, layer, (x,)) == wanted
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(layer(x), before)


def test_a_convolution_of_one_dimension_with_as_many_channels_as_places():
    model = nn.Sequential(nn.Conv1d(2, 10, 3), nn.ReLU(), nn.AvgPool1d(1))
    assert channel_dimension(model, model[1], (torch.randn(1, 2, 12),)) == 1


def test_channels_of_a_recurrent_layer_with_as_many_steps_as_dimensions():
    model = Then(nn.LSTM(3, 6, batch_first=True), lambda made: made[0].sum(1))
    found = channel_dimension(model, model.first, (torch.randn(2, 6, 3),), output_transform=lambda made: made[0])
    assert found == 2
    swapped = channel_dimension(model, model.first, (torch.randn(2, 6, 3),), output_transform=lambda made: made[0].mT)
    assert swapped == 1


def test_channels_of_vision_models(torchvision):
    models = torchvision.models
    swin = models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4]).eval()
    x = torch.randn(1, 3, 32, 32)  # 8 x 8 cells of 8 channels
    assert not has_channels_last((1, 8, 8, 8), x)  # so numbers mislead
    for layer, wanted in ((swin.features[0], 3), (swin.features[1], 3), (swin.features[3], 3), (swin.permute, 1)):
        assert channel_dimension(swin, layer, (x,)) == wanted
    setting = models.convnext.CNBlockConfig(8, 8, 1)
    convnext = models.ConvNeXt([setting, setting]).eval()
    assert channel_dimension(convnext, convnext.features[1], (torch.randn(1, 3, 32, 32),)) == 1


# --- tokens


class Vit(nn.Module):
    """A small vision transformer; tokens of the class and registers stand ahead of the cells', or behind them."""

    def __init__(self, patch=(14, 14), ahead=1, behind=0, by_column=False, dim=8, embedding="conv"):
        super().__init__()
        self.kind, self.ahead, self.behind, self.by_column = embedding, ahead, behind, by_column
        if embedding == "unfold":
            self.patch, self.embed = nn.Unfold(patch, stride=patch), nn.Linear(3 * math.prod(patch), dim)
        else:
            self.patch = nn.Conv2d(3, dim, patch, patch)
        self.extra = nn.Parameter(torch.randn(1, ahead + behind, dim))
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(dim, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        cells = self.patch(x)
        if self.kind == "unfold":
            cells = self.embed(cells.mT).mT
        elif self.by_column:
            cells = cells.mT
        extra = self.extra.expand(len(x), -1, -1)
        tokens = torch.cat([extra[:, : self.ahead], cells.flatten(2).mT, extra[:, self.ahead :]], 1)
        return self.head(self.blocks(tokens + torch.linspace(0, 1, tokens.shape[1])[:, None])[:, 0])


GRIDS = {
    "patch 14 of 96 x 128": ({}, (96, 128), (6, 9)),
    "patch 14 of 240 x 320": ({}, (240, 320), (17, 22)),
    "no class token": ({"ahead": 0}, (96, 128), (6, 9)),
    "registers": ({"ahead": 5}, (28, 28), (2, 2)),
    "the class token last": ({"ahead": 0, "behind": 1}, (96, 128), (6, 9)),
    "column by column": ({"by_column": True}, (28, 42), (2, 3)),
    "patches that are no squares": ({"patch": (4, 16)}, (32, 32), (8, 2)),
    "unfold": ({"embedding": "unfold"}, (96, 128), (6, 9)),
    "as many tokens as dimensions": ({"ahead": 2}, (28, 42), (2, 3)),
}


@pytest.mark.parametrize("layer", ["blocks.layers.0", "blocks.layers.1.norm1", "blocks"])
@pytest.mark.parametrize("kind", GRIDS)
def test_cells_are_read_from_the_patch_embedding(kind, layer):
    settings, size, (height, width) = GRIDS[kind]
    model = Vit(**settings).eval()
    found = token_cells(model, model.get_submodule(layer), (torch.randn(2, 3, *size),))
    assert (found.height, found.width) == (height, width)
    wanted = torch.arange(height * width).reshape(height, width)
    if model.by_column:
        wanted = torch.arange(height * width).reshape(width, height).mT
    assert torch.equal(found.tokens, wanted.flatten() + model.ahead)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_cells_of_vision_transformers(torchvision):
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 8, 16).eval()
    found = token_cells(model, model.encoder.layers[1], (torch.randn(1, 3, 32, 32),))
    assert (found.height, found.width) == (4, 4)
    assert torch.equal(found.tokens, torch.arange(1, 17))


def test_cells_behind_a_convolutional_stem():
    """The last of several convolutions makes the tokens."""
    model = Vit()
    model.patch = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1))
    found = token_cells(model.eval(), model.blocks, (torch.randn(1, 3, 20, 12),))
    assert (found.height, found.width) == (5, 3)


def test_cells_of_reduced_keys_are_not_taken_for_the_tokens():
    """As in pyramid transformers, whose attention has keys on a coarser grid, from a convolution of its own."""

    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.reduce = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.end = nn.LayerNorm(8)

        def forward(self, x):
            cells = self.patch(x)
            tokens = cells.flatten(2).mT
            keys = self.reduce(cells).flatten(2).mT
            return self.end(tokens + self.attention(self.norm(tokens), keys, keys)[0]).mean(1)

    model = Reduced().eval()
    found = token_cells(model, model.end, (torch.randn(1, 3, 16, 24),))
    assert (found.height, found.width) == (4, 6)


def test_cells_that_a_model_does_not_tell():
    class Linear(nn.Module):
        """Patches by reshape, and tokens that see each other before any module returns them."""

        def __init__(self):
            super().__init__()
            self.embed, self.end = nn.Linear(48, 8), nn.LayerNorm(8)

        def forward(self, x):
            patches = x.unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
            return self.end(self.embed(patches)).mean(1)

    model = Linear().eval()
    assert token_cells(model, model.end, (torch.randn(1, 3, 16, 24),)) is None


def test_tokens_that_come_before_the_examples():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.end = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)

        def forward(self, x):
            return self.end(self.patch(x).flatten(2).permute(2, 0, 1)).mean(0)

    model = First().eval()
    with pytest.raises(ValueError, match=r"shape \(4, 1, 8\) for 1 example, so its examples do not come first"):
        token_cells(model, model.end, (torch.randn(4, 3, 8, 8),))
