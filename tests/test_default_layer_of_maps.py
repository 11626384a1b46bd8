"""Without a name, maps are drawn at the last layer that is a grid over the image, not at one of the same dimensions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import nn
from torch.nn import functional as F

from captum_xnn import XNNAttribution
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.layers._grid import halves, is_over_image
from captum_xnn.layers._trace import trace

SIZES = [(24, 24), (24, 40), (40, 24), (25, 31)]


class Heads(nn.Module):
    def forward(self, h):
        return h.unflatten(2, (2, -1)).transpose(1, 2)  # (N, heads, T, d)


class Vision(nn.Module):
    """A small vision transformer with 4-pixel cells, whose attention is made of modules, as in several libraries."""

    def __init__(self, mixing=False, class_token=True):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.heads, self.softmax, self.drop = Heads(), nn.Softmax(-1), nn.Dropout(0.1)
        self.mix = nn.Conv2d(2, 2, 1) if mixing else nn.Identity()
        self.norm, self.head, self.own = nn.LayerNorm(8), nn.Linear(8, 3), class_token

    def forward(self, x):
        h = self.embed(x).flatten(2).mT
        if self.own:
            h = torch.cat([h.new_ones(len(h), 1, 8), h], 1)
        q = self.heads(h)
        a = self.drop(self.softmax(self.mix(q @ q.mT)))
        h = self.norm(h + (a @ q).transpose(1, 2).flatten(2))
        return self.head(h.mean(1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
def test_attention_is_no_grid_over_the_image(size, mixing, class_token):
    torch.manual_seed(0)
    model = Vision(mixing, class_token).eval()
    x = torch.rand(1, 3, *size)
    assert trace(model, model.norm, (x,)).spatial is model.embed


class Windows(nn.Module):
    """Attends within windows of 2 x 2 cells, each of them a row, as Swin does."""

    def __init__(self):
        super().__init__()
        self.embed, self.heads, self.softmax = nn.Conv2d(3, 8, 4, 4), Heads(), nn.Softmax(-1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x)
        n, _, height, width = h.shape
        q = self.heads(h.reshape(n, 8, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 8))
        h = (self.softmax(q @ q.mT) @ q).transpose(1, 2).reshape(n, -1, 8)
        return self.head(self.norm(h).mean(1))


@pytest.mark.parametrize(
    "make", [partial(Vision, class_token=False), partial(Vision, mixing=True, class_token=False), Windows]
)
def test_attention_of_the_size_of_the_feature_maps_is_no_grid(make):
    """16 x 16 pixels are 16 tokens of 4 x 4, and four cells of such tokens are windows of 4."""
    torch.manual_seed(0)
    model = make().eval()
    x = torch.rand(60, 3, 16, 16)
    assert trace(model, model.norm, (x[:1],)).spatial is model.embed
    xnn = XNNAttribution(model, "norm", n_features=2)
    xnn.fit(x, 0, positives=torch.ones(60, dtype=torch.bool), progress=False)
    named = xnn.with_heatmap(FromCaptum(LayerGradientXActivation, layer="embed"))
    torch.testing.assert_close(xnn.attribute(x[:3], 0), named.attribute(x[:3], 0))


class Table(nn.Module):
    """Adds a table of position biases, which a network computes, to a layer's output."""

    def __init__(self):
        super().__init__()
        self.conv, self.table, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.conv(x)
        grid = torch.ones(1, h.shape[2] + 1, h.shape[3] + 1, 2)
        return self.head((h + self.table(grid).permute(0, 3, 1, 2)[:, :, 1:, 1:]).mean((2, 3)))


@pytest.mark.parametrize("size", [*SIZES, (12, 8)])
def test_a_table_that_does_not_depend_on_the_image_is_no_grid_over_it(size):
    """The table of Swin v2 has such a size on images of 96 x 64 pixels."""
    model = Table().eval()
    assert trace(model, model.head, (torch.rand(1, 3, *size),)).spatial is model.conv


class Last(nn.Module):
    """A layer with channels last, as in Swin."""

    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, h):
        return self.linear(h.permute(0, 2, 3, 1))


@pytest.mark.parametrize("channels", [5, 6, 7, 8, 10, 12, 64])
@pytest.mark.parametrize("size", SIZES)
def test_channels_last_are_no_feature_maps(channels, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, channels, 4, 4), Last(channels), nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.rand(1, 3, *size)
    model(x)
    found = trace(model, model[3], (x,)).spatial
    cells = (size[0] // 4, size[1] // 4)
    if (cells[1], channels) == cells:  # then numbers mislead, and the dimension of channels is looked for later
        return
    assert found is model[0]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


REAL = {
    "padded images": (lambda x: F.pad(x, (3, 2, 1, 4)), nn.Conv2d(3, 4, 3, 2), lambda h: h),
    "pooled by a function, unevenly": (lambda x: x, nn.Conv2d(3, 4, 3), lambda h: F.avg_pool2d(h, (4, 1))),
    "cropped": (lambda x: x, nn.Conv2d(3, 4, 3), lambda h: h[:, :, 2:-3, 1:-1]),
    "enlarged by a function": (lambda x: x, nn.Conv2d(3, 4, 3, 2), lambda h: F.interpolate(h, scale_factor=3)),
    "cells of 14 pixels": (lambda x: F.interpolate(x, (96, 128)), nn.Conv2d(3, 4, 14, 14), lambda h: h),
}


@pytest.mark.parametrize("case", list(REAL))
@pytest.mark.parametrize("size", SIZES)
def test_feature_maps_of_any_size_are_found(case, size):
    torch.manual_seed(0)
    ahead, conv, behind = REAL[case]
    model = nn.Sequential(Function(ahead), conv, Function(behind), nn.Softplus(), nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.rand(1, 3, *size)
    model(x)
    assert trace(model, model[5], (x,)).spatial is model[3]


@pytest.mark.parametrize("size", SIZES)
def test_the_default_map_of_a_vision_transformer_is_that_of_its_patch_embedding(size):
    torch.manual_seed(0)
    model = Vision().eval()
    x = torch.rand(40, 3, *size)
    xnn = XNNAttribution(model, "norm", 2).fit(x, 0, positives=torch.ones(40).bool(), progress=False)
    named = xnn.with_heatmap(FromCaptum(LayerGradientXActivation, layer="embed"))
    torch.testing.assert_close(xnn.attribute(x[:3], 0), named.attribute(x[:3], 0))


def test_halves_move_only_their_half():
    image = torch.rand(1, 6, 9, 2)
    made = halves(image, 3)
    assert made.shape == (5, 6, 9, 2)
    moved = (made[1:] != made[:1]).all(3)
    assert torch.equal(moved[0], (torch.arange(6) < 3)[:, None].expand(6, 9))
    assert torch.equal(moved[0], ~moved[1]) and torch.equal(moved[2], ~moved[3])
    assert torch.equal(moved[2], (torch.arange(9) < 4)[None].expand(6, 9))
    assert is_over_image(made) is False and is_over_image(made.permute(0, 3, 1, 2)) is True
    assert is_over_image(made.permute(0, 3, 2, 1)) is False  # turned
    assert is_over_image(torch.rand(1, 2, 4, 4)) is False and is_over_image(torch.ones(5, 2, 4, 4)) is False


class Shares(nn.Module):
    """One ReLU behind the convolution and behind the hidden layer, as in many models written by hand."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.hidden, self.out = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.relu(self.hidden(self.relu(self.conv(x)).mean((2, 3)))))


def test_a_module_whose_last_call_gives_no_feature_maps_is_passed_over():
    torch.manual_seed(0)
    model, x = Shares(), torch.rand(60, 1, 8, 8)
    assert trace(model, model.relu, (x[:1],)).spatial is model.conv
    xnn = XNNAttribution(model, "relu", 2).fit(x, target=int(model(x).sum(0).argmax()), progress=False)
    assert xnn.attribute(x[:5], target=next(iter(xnn.explainers_.values())).targets[0]).shape == (5, 2, 1, 8, 8)
