"""Fits store images with the channels of a pixel side by side in memory, where the model gives the same that way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_xnn import XNNAttribution
from captum_xnn.training._contributions import _EvidenceCollector


class Maps(nn.Module):
    """Feature maps (N, 8, 4, 4), numbers (N, 8), and two outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())
        self.relu, self.out = nn.ReLU(), nn.Linear(8, 2)
        self.stored = []

    def forward(self, x):
        self.stored.append(x.is_contiguous())
        return self.out(self.relu(self.numbers(self.maps(x))))

    def numbers(self, maps):
        return maps.mean((2, 3))


class Rows(Maps):
    """Views maps as rows, which fails with several examples only."""

    def numbers(self, maps):
        return maps.view(-1, *maps.shape[2:]).mean((1, 2)).view(len(maps), -1)


class Strict(Maps):
    """Raises an error of another class."""

    def numbers(self, maps):
        assert maps.is_contiguous()
        return super().numbers(maps)


class Branch(Maps):
    """Gives other values, and no error."""

    def numbers(self, maps):
        return super().numbers(maps) * (1 if maps.is_contiguous() else -1)


class InPlace(Maps):
    """Changes maps in place where a reshape makes no copy."""

    def numbers(self, maps):
        pixels = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
        pixels *= 2
        return super().numbers(maps) + pixels.view(len(maps), -1, maps.shape[1]).mean(1)


class Doubled(torch.autograd.Function):
    """Doubles numbers, and views their gradient as a vector."""

    @staticmethod
    def forward(_context, x):
        return 2 * x

    @staticmethod
    def backward(_context, gradient):
        return 2 * gradient.view(-1).view(gradient.shape)


class Backward(Maps):
    """Raises in the backward pass."""

    def numbers(self, maps):
        return nn.functional.max_pool2d(Doubled.apply(maps), 2).mean((2, 3))


class Squeezed(Maps):
    """Fails with one example, however it lies."""

    def forward(self, x):
        return super().forward(x).squeeze()


class OnSmallMaps(Maps):
    """Views maps as vectors, which works for one pixel."""

    def numbers(self, maps):
        return nn.functional.avg_pool2d(maps, 16).view(len(maps), -1)[:, :8]


def images(size=64):
    return torch.rand(24, 3, size, size, generator=torch.Generator().manual_seed(1))


def groups(model, layer, data):
    model.stored.clear()
    positives = torch.arange(24) % 2 == 0
    return XNNAttribution(model, layer, 3).fit(data, 0, positives=positives, progress=False).explainer(0).form.groups


@pytest.mark.parametrize(
    ("kind", "layer"),
    [(kind, "relu") for kind in (Rows, Strict, Branch, InPlace, Squeezed)] + [(Backward, "maps.3")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_model_that_depends_on_memory_gets_images_as_they_are(kind, layer, monkeypatch):
    model = kind().eval()
    found = groups(model, layer, images(66))
    assert kind is Squeezed or all(model.stored[-5:])
    monkeypatch.setattr(_EvidenceCollector, "_gives_the_same", lambda *_: False)
    torch.testing.assert_close(found, groups(model, layer, images(66)), rtol=1e-4, atol=1e-4)


def test_another_model_gets_channels_side_by_side(monkeypatch):
    model = Maps().eval()
    found = groups(model, "relu", images(66))
    assert not any(model.stored[-5:])
    monkeypatch.setattr(_EvidenceCollector, "_gives_the_same", lambda *_: False)
    torch.testing.assert_close(found, groups(model, "relu", images(66)), rtol=1e-4, atol=1e-4)
    assert all(model.stored)


class Wrapped(Maps):
    """Returns its outputs in a dict."""

    def forward(self, x):
        return {"logits": super().forward(x)}


def test_the_trial_reads_the_outputs_as_the_fit_does():
    model = Wrapped().eval()
    xnn = XNNAttribution(model, "relu", 3, prediction_transform=lambda output: output["logits"])
    xnn.fit(images(66), 0, positives=torch.arange(24) % 2 == 0, progress=False)
    assert not any(model.stored[-5:])


def test_images_of_each_size_are_tried():
    """A view that works for the maps of the first size may fail for those of another size."""
    data = images(132)
    loader = [data[:12, :, :66, :66], data[12:]]
    model = OnSmallMaps().eval()
    groups(model, "relu", loader)
    assert model.stored[-1]
