"""Maps of contributions by place: their pixels sum to the contribution, and their cells are those of the integral."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_contribution_network import Residual, everything, fitted
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.heatmaps import ContributionMaps, GradientMaps
from captum_xnn.heatmaps._layouts import Image


def cnn(stride=1, padding=1, channels=1, dtype=torch.float32):
    """A network whose layer "1" has feature maps; behind it come a ReLU, a pooling and a dense layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, stride, padding), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(2),
        nn.Flatten(), nn.Linear(32, 3),
    ).to(dtype)  # fmt: skip


class Permuted(nn.Module):
    """Puts the channels of images (N, H, W, C) first."""

    def forward(self, x):
        return x.movedim(-1, 1)


class ChannelsLast(nn.Module):
    """Two strides of 2, and a layer that gives (N, h, w, C), as Swin transformers do."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(1, 6, 4, 4, 1), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        z = self.mix(self.conv(x).movedim(1, -1))
        return self.head(z.relu().mean((1, 2)))


class Container(nn.Module):
    """The explained block ends with a ReLU, whose maps are the block's."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 5, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))

    def forward(self, x):
        return self.head(self.block(x))


class SharedReLU(nn.Module):
    """Two blocks with one ReLU, whose first name is outside of the second block."""

    def __init__(self):
        super().__init__()
        relu = nn.ReLU()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), relu)
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), relu)
        self.head = nn.Sequential(nn.Conv2d(4, 5, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def followed_by(*layers):
    """A network whose layer "1" is one of these modules, behind a convolution."""
    return lambda: nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), *layers, *cnn(channels=6))


MODELS = {
    "pixels as cells": (cnn, "1", (1, 9, 9)),
    "cells of 2 x 2 pixels": (partial(cnn, 2), "1", (1, 12, 12)),
    "cells of no whole pixels": (partial(cnn, 2, 0), "1", (1, 14, 11)),
    "double precision": (partial(cnn, 2, dtype=torch.float64), "1", (1, 13, 12)),
    "three channels": (partial(cnn, channels=3), "1", (3, 9, 9)),
    "a way around the layer": (Residual, "inner", (1, 9, 9)),
    "more cells than pixels": (followed_by(nn.Upsample(scale_factor=2)), "1", (1, 6, 7)),
    "four cells to a pixel": (followed_by(nn.Upsample(scale_factor=4)), "1", (1, 6, 7)),
    "cells that see the whole image": (
        lambda: nn.Sequential(nn.Conv2d(1, 6, 17, 1, 8), *cnn(channels=6)),
        "0",
        (1, 9, 9),
    ),
    "cells beyond the border": (followed_by(nn.ZeroPad2d(3)), "1", (1, 20, 20)),
    "dropout": (followed_by(nn.Dropout2d()), "1", (1, 9, 9)),
    "a module that changes nothing": (followed_by(nn.Identity()), "1", (1, 9, 9)),
    "a ReLU in two blocks": (SharedReLU, "second", (1, 9, 9)),
    "a container": (Container, "block", (1, 13, 13)),
    "a layer with channels last": (ChannelsLast, "mix", (1, 22, 18)),
    "images with channels last": (lambda: nn.Sequential(Permuted(), *cnn(channels=2)), "2", (9, 9, 2)),
}


def explained(name, n=5, **options):
    make, layer, shape = MODELS[name]
    torch.manual_seed(1)
    model = make().eval()
    dtype = next(model.parameters()).dtype
    data = torch.randn(40, *shape, dtype=dtype)
    return fitted(model, layer, data, 1, **options), data[:n]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_pixels_of_a_map_sum_to_the_contribution(name, chunk):
    xnn, x = explained(name)
    for _ in range(2):  # the second call draws from a pass of its own
        why = xnn.explain(x, 1, internal_batch_size=chunk)
        assert why.maps.dtype == x.dtype and why.contributions.abs().max() > 1e-4
        torch.testing.assert_close(
            why.maps.sum((2, 3, 4)).to(why.contributions), why.contributions, rtol=1e-4, atol=2e-6
        )
    one = xnn.attribute(x, 1, feature=0)
    assert one.shape == x.shape
    torch.testing.assert_close(one.sum((1, 2, 3)).to(why.contributions), why.contributions[:, 0], rtol=1e-4, atol=1e-5)


def test_cells_are_the_terms_of_the_integral():
    """Written again with loops: the path integral by many small steps, place by place."""
    xnn, x = explained("pixels as cells", 2)
    form, model = xnn.explainer(1).form, xnn.model
    Z, base = model[:2](x), form.base.expand_as(model[:2](x[:1]))
    slopes, steps = torch.zeros_like(Z), 2000
    for i in range(steps):
        at = (base + (i + 0.5) / steps * (Z - base)).detach().requires_grad_()
        slopes += torch.autograd.grad(model[2:](at)[:, 1].sum(), at)[0] / steps
    found = xnn.attribute(x, 1)
    for k in range(form.n_features):
        expected = torch.zeros(2, 9, 9)
        for d in range(6):
            expected += form.groups[d, k] * slopes[:, d] * (Z - base)[:, d]
        torch.testing.assert_close(
            found[:, k, 0], expected.detach(), rtol=0.02, atol=0.01 * float(expected.detach().abs().max())
        )


def test_a_place_that_stays_at_the_base_has_no_part_in_the_map():
    """Where all inputs are equal, Z is its mean over the data, the base, and the map is 0 there."""
    torch.manual_seed(0)
    model, x = cnn(), torch.randn(40, 1, 9, 9)
    x[:, :, :, 5:] = 0.0
    model[0].bias.data.zero_()
    xnn = fitted(model, "1", x, 1)
    xnn.explainer(1).form.base.zero_()
    maps = xnn.attribute(x[:4], 1)[:, :, 0]
    assert maps[..., 6:].abs().max() == 0 and maps[..., :5].abs().max() > 0


@pytest.mark.filterwarnings("ignore:maps are zero", "ignore:0.bias changed")
def test_numbers_below_the_base_are_seen():
    """A ReLU that is inactive has no gradient there, but its value below the base contributes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    x = torch.randn(40, 1, 8, 8)
    xnn = fitted(model, "1", x, 0)
    dark = torch.zeros(1, 1, 8, 8)
    model[0].bias.data.fill_(-0.1)
    why = xnn.with_heatmap(ContributionMaps()).explain(dark, 0)
    assert model[:2](dark).abs().max() == 0 and why.maps.abs().max() > 0
    torch.testing.assert_close(why.maps.sum((2, 3, 4)), why.contributions, rtol=1e-4, atol=1e-6)
    assert xnn.with_heatmap(GradientMaps()).attribute(dark, 0).abs().max() == 0


@pytest.mark.filterwarnings("ignore:maps are zero", "ignore:.*ill-conditioned")
@pytest.mark.parametrize(("layer", "settings"), [("6", {}), ("5", {}), ("4", {}), ("3", {"layer": "1"})])
def test_elsewhere_the_maps_are_gradient_x_activation(layer, settings):
    """At dense layers, at fewer than 4 x 4 cells, and at a layer that the call names."""
    model, x = cnn(), torch.randn(40, 1, 9, 9)
    xnn = fitted(model, layer, x, 1)
    found = xnn.attribute(x[:4], 1, **settings)
    torch.testing.assert_close(found, xnn.with_heatmap(GradientMaps()).attribute(x[:4], 1, **settings))
    assert found.abs().sum() > 0


@pytest.mark.parametrize("name", ["pixels as cells", "a layer with channels last", "cells of 2 x 2 pixels"])
@pytest.mark.parametrize("size", [(20, 18), (16, 24), (25, 17)])
def test_images_of_another_size_than_in_the_fit(name, size):
    xnn, _ = explained(name)
    why = xnn.explain(torch.randn(3, 1, *size), 1)
    assert why.maps.shape[3:] == size
    torch.testing.assert_close(why.maps.sum((2, 3, 4)), why.contributions, rtol=1e-4, atol=1e-5)


def drawn_by_gradients(model, layer, x):
    xnn = fitted(model, layer, x, 1)
    found = xnn.attribute(x[:4], 1)
    torch.testing.assert_close(found, xnn.with_heatmap(GradientMaps()).attribute(x[:4], 1))
    return bool(found.abs().sum() > 0)


def test_maps_of_few_cells_are_drawn_before_they_were_pooled():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(54, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )
    assert drawn_by_gradients(model, "2", torch.randn(40, 1, 12, 12))


class Picky(nn.Module):
    """Refuses images whose pixels are not in [0, 1], as noise is not."""

    def __init__(self):
        super().__init__()
        self.rest = cnn()

    def forward(self, x):
        if x.min() < 0 or x.max() > 1:
            raise ValueError("pixels must be in [0, 1]")
        return self.rest(x)


def test_a_model_that_fails_on_noise_is_drawn_by_gradients():
    assert drawn_by_gradients(Picky(), "rest.1", torch.rand(40, 1, 9, 9))


class Reshaped(nn.Module):
    """Feature maps whose four dimensions are no longer places of the image."""

    def __init__(self, how):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.Tanh(), *how)
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self.block(x))


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


class Similarities(nn.Module):
    """Compares each place with each, as attention does: (N, 1, 16, 16)."""

    def forward(self, x):
        tokens = x.flatten(2)
        return (tokens.mT @ tokens)[:, None]


@pytest.mark.filterwarnings("ignore:maps are zero", "ignore:Lazy modules")
@pytest.mark.parametrize(
    "how",
    [
        [nn.Flatten(2), nn.Unflatten(1, (1, 4))],
        [nn.Flatten(2), nn.Unflatten(2, (4, 4)), Transposed()],
        [Similarities()],
    ],
)
def test_values_that_are_no_grid_over_the_image_are_drawn_by_gradients(how):
    torch.manual_seed(0)
    model, x = Reshaped(how), torch.randn(40, 1, 16, 16)
    model(x)
    xnn = fitted(model.eval(), "block", x, 1)
    torch.testing.assert_close(xnn.attribute(x[:4], 1), xnn.with_heatmap(GradientMaps()).attribute(x[:4], 1))


def test_another_corner_of_the_image_moves_the_map_there_alone():
    """The rest is linear, so a place's contribution depends on its own cell; a filter sees 3 x 3 pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    x = torch.randn(40, 1, 12, 16)
    xnn = fitted(model, "1", x, 1)
    changed = x[:3].clone()
    changed[:, :, :4, 10:] += 1.0
    moved = (xnn.attribute(changed, 1) - xnn.attribute(x[:3], 1))[:, :, 0].abs().amax((0, 1))
    assert (moved[:4, 10:] > 1e-5).all() and moved[8:].max() < 1e-7 and moved[:, :8].max() < 1e-7


def test_learned_networks_and_outputs_are_drawn_by_gradients():
    model, x = cnn(), torch.randn(40, 1, 9, 9)
    learned = XNNAttribution(model, "1", 2, autoencoder=SRAE, recipe=Recipe(steps=3), heatmap=ContributionMaps())
    learned.fit(x, 1, positives=everything(40), progress=False)
    for found, backend in ((learned, "attribute"), (learned, "one_heatmap")):
        a, b = (getattr(xnn, backend)(x[:3], 1) for xnn in (found, found.with_heatmap(GradientMaps())))
        torch.testing.assert_close(a, b)


def test_targets_of_their_own_and_differences_of_outputs():
    xnn, x = explained("cells of 2 x 2 pixels")
    xnn.fit(torch.randn(40, 1, 12, 12), 0, positives=everything(40), progress=False)
    why = xnn.explain(x, torch.tensor([0, 1, 0, 1, 1]))
    torch.testing.assert_close(why.maps.sum((2, 3, 4)), why.contributions, rtol=1e-4, atol=1e-5)
    why = xnn.explain(x, 1, against=0)
    torch.testing.assert_close(why.maps.sum((2, 3, 4)), why.contributions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 7), (4, 5), (13, 6)])
def test_spread_cells_keep_their_sums(size):
    image = Image(torch.zeros(2, 3, 21, 17), 1)
    cells = torch.randn(2, 4, *size)
    one = torch.zeros(1, 1, *size)
    one[0, 0, 0, 2] = 3.0
    assert float(image.spread(one).sum()) == pytest.approx(3.0, abs=1e-5)
    torch.testing.assert_close(image.spread(cells).sum((2, 3, 4)), cells.sum((2, 3)), rtol=1e-4, atol=1e-4)
    whole = Image(torch.zeros(2, 3, 5 * size[0], 5 * size[1]), 1)  # whole pixels: interpolation in parts of 25
    expected = nn.functional.interpolate(cells, scale_factor=5, mode="bilinear", align_corners=False) / 25
    torch.testing.assert_close(whole.spread(cells)[:, :, 0], expected)
