"""Inputs on which the model itself fails, and outputs that are no real numbers: errors that name them, and the fix."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution

FORMS = {"groups": None, "learned": partial(SRAE, hidden=(4,))}
X = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
ALL = torch.ones(80, dtype=torch.bool)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


def fitted(form, model=None, data=X, layer="1"):
    xnn = XNNAttribution(model or network(), layer, 3, autoencoder=FORMS[form], recipe=Recipe(steps=10))
    return xnn.fit(data, 0, positives=ALL, progress=False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            torch.Tensor.double,
            r"Sequential fails on inputs float64 \(2, 6\): .*; convert .* inputs.to\(torch.float32",
        ),
        (
            torch.Tensor.long,
            r"Sequential fails on inputs int64 \(2, 6\): .*; pass the arguments with which",
        ),
        (lambda x: x[:, :4], r"Sequential fails on inputs float32 \(2, 4\): .* cannot be multiplied"),
    ],
    ids=["double", "long", "width"],
)
def test_inputs_that_the_model_does_not_take(form, change, told):
    xnn = fitted(form)
    for seen in (False, True):  # later calls draw and read in one pass
        for call in (xnn.attribute, xnn.explain, xnn.contributions):
            with pytest.raises(RuntimeError, match=told):
                call(change(X[:2]), 0)
        if not seen:
            xnn.attribute(X[:2], 0)
    with pytest.raises(RuntimeError, match=r"Sequential fails on inputs"):
        fitted(form, data=change(X))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x, scale, *, shift):
        return self.body(x) * scale + shift


@pytest.mark.parametrize("form", FORMS)
def test_arguments_that_lack(form):
    with pytest.raises(TypeError, match=r"Scaled fails on inputs float32 \(\d+, 6\): .* missing 1 required .*scale"):
        fitted(form, Scaled(), layer="body.1")


class Mine(RuntimeError):
    pass


def test_errors_of_the_users_own_class_stay():
    model = network()
    xnn = fitted("groups", model)
    error = Mine("no more")

    def fail(*_):
        raise error

    model[2].register_forward_hook(fail)
    with pytest.raises(Mine) as caught:
        xnn.attribute(X[:2], 0)
    assert caught.value is error


class Complex(nn.Module):
    """Filters the frequencies of its inputs."""

    def __init__(self, real):
        super().__init__()
        self.a, self.weights, self.head, self.real = nn.Identity(), nn.Identity(), nn.Linear(6, 3), real

    def forward(self, x):
        y = self.head(torch.fft.ifft(self.weights(torch.fft.fft(self.a(x)))).real)
        return y if self.real else torch.complex(y, y)


@pytest.mark.parametrize("form", FORMS)
def test_complex_numbers_are_refused(form):
    with pytest.raises(TypeError, match=r"layer 'weights' has complex numbers, torch.complex64, .*; choose a"):
        fitted(form, Complex(True), layer="weights")
    with pytest.raises(TypeError, match=r"the model has complex numbers, .*prediction_transform=, such as lambda"):
        fitted(form, Complex(False), layer="a")
    fitted(form, Complex(True), layer="a").contributions(X[:2], 0)  # complex numbers on the way are fine


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_nan_are_told_from_inputs(form):
    model = network()
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite in all \d+ examples from example 0; .* the weights and"):
        fitted(form, model)
    data = X.clone()
    data[7, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite in example 7; look for NaN in this example's inputs"):
        fitted(form, data=data)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_empty_batch_changes_nothing(form, at, tmp_path):
    batches = [X[:40], X[40:64], X[64:]]
    wanted = fitted(form, data=batches).contributions(X[:4], 0).contributions
    batches.insert(at, X[:0])
    torch.testing.assert_close(fitted(form, data=batches).contributions(X[:4], 0).contributions, wanted)
    xnn = XNNAttribution(network(), "1", 3, autoencoder=FORMS[form], recipe=Recipe(steps=10))
    xnn.fit(batches, 0, positives=ALL, store=tmp_path / "store", progress=False)
    torch.testing.assert_close(xnn.contributions(X[:4], 0).contributions, wanted)
