"""Images given as (N, H, W, C) to a model that permutes them have the same explanation as (N, C, H, W) without."""

from __future__ import annotations

import base64
import io
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam, Occlusion
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

from captum_xnn import SRAE, OneHeatmap, Recipe, XNNAttribution
from captum_xnn.heatmaps import ExcitationMaps, FromCaptum
from captum_xnn.layers._pixels import channels_by_size, image_channels
from captum_xnn.metrics import patch_drops
from captum_xnn.metrics._keeping import keep_top
from captum_xnn.metrics._patches import blurred
from captum_xnn.patch_scores import patch_scores
from captum_xnn.training import _contributions
from captum_xnn.training._drops import CoveredImages, images_among
from captum_xnn.training._map_covers import maps_before

K, N, SIZE = 2, 40, (18, 30)


class Ahead(nn.Module):
    """A function of the images, before a network."""

    def __init__(self, function, network):
        super().__init__()
        self.function, self.network = function, network

    def forward(self, x, *more):
        return self.network(self.function(x), *more)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3)),
    ).eval()


def data():
    made = torch.rand(N, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    made[:, :, 2:8, 3:12] += 2 * torch.rand(N, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    return made


FORMS = {
    "groups": {},
    "grad-cam": {"heatmap": LayerGradCam},
    "occlusion": {"heatmap": FromCaptum(Occlusion, sliding_window_shapes=(3, 6, 6), strides=(3, 6, 6))},
    "pixels": {"heatmap": FromCaptum(IntegratedGradients, n_steps=4)},
    "learned": {"autoencoder": partial(SRAE, hidden=(6,)), "recipe": Recipe(steps=20)},
    "excitation at a layer": {
        **{"autoencoder": partial(SRAE, hidden=(6,)), "recipe": Recipe(steps=20)},
        "heatmap": ExcitationMaps(layer="3"),
    },
}


def pair(settings, layer="6"):
    """Attributions of the network on images, and of one that permutes on images with channels last, both fitted."""
    plain, x = network(), data()
    settings = dict(settings)
    own = dict(settings)
    if own.get("heatmap") is FORMS["occlusion"]["heatmap"]:
        own["heatmap"] = FromCaptum(Occlusion, sliding_window_shapes=(6, 6, 3), strides=(6, 6, 3))
    if isinstance(own.get("heatmap"), ExcitationMaps):
        own["heatmap"] = ExcitationMaps(layer="network.3")
    first = XNNAttribution(plain, layer, K, **settings)
    last = XNNAttribution(Ahead(lambda x: x.permute(0, 3, 1, 2), network()).eval(), f"network.{layer}", K, **own)
    positives = torch.ones(N).bool()
    first.fit(x, 0, positives=positives, progress=False)
    last.fit(x.permute(0, 2, 3, 1).contiguous(), 0, positives=positives, progress=False)
    return first, last, x


@pytest.mark.parametrize(("form", "layer"), [*((form, "6") for form in FORMS), ("groups", "3"), ("grad-cam", "3")])
def test_an_explanation_is_the_same_with_channels_last(form, layer):
    first, last, x = pair(FORMS[form], layer)
    some = x[:4]
    one, other = first.explain(some, 0), last.explain(some.permute(0, 2, 3, 1), 0)
    torch.testing.assert_close(other.contributions, one.contributions)
    torch.testing.assert_close(other.features, one.features)
    torch.testing.assert_close(other.maps.movedim(-1, 2), one.maps)
    assert float(one.maps.abs().amax()) > 0
    own = last.attribute(some.permute(0, 2, 3, 1), 0, feature=1)
    assert own.shape == (4, *SIZE, 3)
    torch.testing.assert_close(own.permute(0, 3, 1, 2), first.attribute(some, 0, feature=1))
    single = OneHeatmap(last.model, last.heatmap).attribute(some.permute(0, 2, 3, 1), 0)
    torch.testing.assert_close(single.movedim(-1, 2), OneHeatmap(first.model, first.heatmap).attribute(some, 0))


def test_groups_are_learned_from_the_same_covered_patches():
    first, last, _ = pair({})
    torch.testing.assert_close(last.explainer(0).form.groups, first.explainer(0).form.groups)
    x = data()[:2]
    last_x = x.permute(0, 2, 3, 1)
    one, other = CoveredImages((x,), 0, 4), CoveredImages((last_x,), 0, 4, channels=3)
    pairs = one.grid.pairs(2)
    assert other.grid.pairs(2) == pairs
    torch.testing.assert_close(other.covered(pairs)[0].permute(0, 3, 1, 2), one.covered(pairs)[0])


@pytest.mark.parametrize("size", [(60, 60), (66, 66), (40, 110)])
@pytest.mark.parametrize("layer", ["3", "6"])
def test_channels_last_are_no_side_of_the_image_when_pixels_or_maps_are_chosen(size, layer, monkeypatch):
    found = []

    def noted(*arguments):
        found.append(maps_before(*arguments))
        return found[-1]

    monkeypatch.setattr(_contributions, "maps_before", noted)
    x = torch.rand(N, 3, *size, generator=torch.Generator().manual_seed(1))
    x[:, :, 10:30, 3:12] += 2 * torch.rand(N, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    groups = []
    for model, name, some in (
        (network(), layer, x),
        (Ahead(lambda x: x.permute(0, 3, 1, 2), network()).eval(), f"network.{layer}", x.permute(0, 2, 3, 1)),
    ):
        xnn = XNNAttribution(model, name, K).fit(some, 0, positives=torch.ones(N).bool(), progress=False)
        groups.append(xnn.explainer(0).form.groups)
    torch.testing.assert_close(groups[1], groups[0])
    assert len(found) == (2 if size[0] * size[1] > 64 * 64 else 0)


def test_images_are_found_by_their_sides():
    narrow = torch.rand(2, 8, 1, 3)  # one column
    assert images_among((narrow,), channels=3) is None
    assert images_among((torch.rand(2, 8, 8, 1),), channels=3) == 0
    assert images_among((torch.rand(2, 8, 8, 1),)) is None
    assert images_among((torch.rand(2, 4, 8, 8, 3), torch.rand(2, 3, 8, 8)), channels=4) == 1


def test_patch_scores_are_the_same_with_channels_last():
    first, last, x = pair({})
    one, other = patch_scores(first, x[:3], 0, grid=3), patch_scores(last, x[:3].permute(0, 2, 3, 1), 0, grid=3)
    torch.testing.assert_close(torch.tensor(other.agreement), torch.tensor(one.agreement))
    torch.testing.assert_close(torch.tensor(other.agreement_one_heatmap), torch.tensor(one.agreement_one_heatmap))
    torch.testing.assert_close(torch.tensor(other.drops), torch.tensor(one.drops))


def test_a_figure_is_the_same_with_channels_last():
    first, last, x = pair({})
    pictures = []
    for xnn, some in ((first, x[:2]), (last, x[:2].permute(0, 2, 3, 1))):
        why = xnn.explain(some, 0, one_heatmap=True)
        for figure in (why.show(1), why.gallery()):
            figure.canvas.draw()
            pictures.append(np.asarray(figure.canvas.buffer_rgba()).copy())
            plt.close(figure)
    for one, other in zip(pictures[:2], pictures[2:], strict=True):
        assert (np.abs(one.astype(int) - other) > 8).mean() < 1e-3


def test_a_report_is_the_same_with_channels_last(tmp_path):
    first, last, x = pair({})
    target = int(network()(x).argmax(1).mode().values)
    content = []
    for xnn, images, display in (
        (first, x, lambda image: image.clamp(0, 1)),
        (last, x.permute(0, 2, 3, 1), lambda image: image.permute(2, 0, 1).clamp(0, 1)),
    ):
        xnn.fit(images, target, positives=torch.ones(N).bool(), progress=False)
        page = xnn.report(images[:6], tmp_path / "report.html", target, display=display).read_text("utf-8")
        content.append(json.loads(re.search(r"<script[^>]*>(\{.*?)</script>", page, re.DOTALL)[1]))
    one, other = content
    assert one["images"] == other["images"]
    assert [(image["height"], image["width"]) for image in one["images"]] == [SIZE] * 6
    for row, same in zip(one["targets"][0]["rows"], other["targets"][0]["rows"], strict=True):
        assert same["strength"] == pytest.approx(row["strength"], abs=2e-3)
        assert len(set(row["strength"])) > 1
        sizes = [[png(m).size for m in [*r["maps"], r["one"]]] for r in (row, same)]
        assert sizes[0] == sizes[1] == [SIZE[::-1]] * (K + 1)
        for m, n in zip([*row["maps"], row["one"]], [*same["maps"], same["one"]], strict=True):
            assert np.abs(np.asarray(png(m)).astype(int) - np.asarray(png(n))).mean() < 1


def png(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGBA")


PERMUTED = {
    "as they are": (lambda x: x, 1, lambda x: x),
    "permuted": (lambda x: x.permute(0, 3, 1, 2), 3, lambda x: x.permute(0, 2, 3, 1)),
    "standardised, then permuted": (
        lambda x: ((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)).permute(0, 3, 1, 2),
        3,
        lambda x: x.permute(0, 2, 3, 1),
    ),
    "bytes, then permuted": (
        lambda x: x.float().permute(0, 3, 1, 2) / 255,
        3,
        lambda x: (x * 255).byte().permute(0, 2, 3, 1),
    ),
    "enlarged": (
        lambda x: nn.functional.interpolate(x.permute(0, 3, 1, 2), (40, 50), mode="bilinear"),
        3,
        lambda x: x.permute(0, 2, 3, 1),
    ),
    "grey, then with a channel": (
        lambda x: x.mean(3)[:, None].expand(-1, 3, -1, -1),
        3,
        lambda x: x.permute(0, 2, 3, 1),
    ),
    "turned": (lambda x: x.transpose(2, 3), 1, lambda x: x),
}


@pytest.mark.parametrize("case", list(PERMUTED))
@pytest.mark.parametrize("size", [(9, 9), (6, 14), (5, 40)])
def test_the_model_says_where_the_channels_of_images_are(case, size):
    function, wanted, given = PERMUTED[case]
    model = Ahead(function, nn.Conv2d(3, 4, 3, 2, padding=1))
    assert image_channels(model, (given(torch.rand(2, 3, *size)),)) == wanted


def test_frames_of_a_video_have_channels_behind_them():
    conv = nn.Conv2d(3, 4, 3)
    frames = Ahead(lambda x: x.flatten(0, 1), conv)
    assert image_channels(frames, (torch.rand(1, 5, 3, 9, 9),)) == 2
    assert image_channels(Ahead(lambda x: x.flatten(0, 1).permute(0, 3, 1, 2), conv), (torch.rand(1, 5, 9, 9, 3),)) == 4
    assert image_channels(nn.Sequential(nn.Conv3d(3, 4, 3)), (torch.rand(1, 3, 5, 9, 9),)) == 1


def test_without_a_convolution_the_shape_says_where_channels_are():
    flat = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    flat(torch.rand(1, 8, 8, 3))
    assert image_channels(flat, (torch.rand(1, 8, 8, 3),)) == 3
    assert image_channels(flat, (torch.rand(1, 3, 8, 8),)) == 1
    assert channels_by_size(torch.rand(1, 3, 3, 3)) == channels_by_size(torch.rand(1, 64, 4, 4)) == 1


def test_metrics_without_a_model_refuse_channels_last():
    x = data()[:1].permute(0, 2, 3, 1)
    with pytest.raises(ValueError, match=r"images are \(1, 18, 30, 3\), with channels last"):
        patch_drops(lambda x: x.sum((1, 2)), x, grid=3)
    with pytest.raises(ValueError, match="with channels last"):
        blurred(x, 2)
    with pytest.raises(ValueError, match="with channels last"):
        keep_top(x, torch.ones(1, *SIZE).bool(), lambda image, _: image)
