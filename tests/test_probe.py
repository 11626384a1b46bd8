"""Models whose rows depend on each other, or on gradients, are refused on the first batch; others pass."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from captum.attr import Saliency
from torch import nn
from torch.nn import functional as F

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.activations import collect
from captum_xnn.heatmaps import FromCaptum

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(5))
ALL = torch.ones(40, dtype=torch.bool)


def made(model, layer="layer", **settings):
    heatmap = FromCaptum(Saliency, abs=False)
    return XNNAttribution(
        model, layer, 2, heatmap=heatmap, recipe=Recipe(steps=12), autoencoder=partial(SRAE, hidden=(8,)), **settings
    )


class Graph(nn.Module):
    """Every node takes the mean of its neighbours."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x, edges):
        to, of = edges
        h = self.first(x)
        return self.head(self.layer(h + torch.zeros_like(h).index_add(0, to, h[of])))


class Neighbours(nn.Module):
    """Builds a graph over its batch: each example is pulled towards those like it."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.layer(x)
        return self.head((h @ h.mT).softmax(1) @ h)


def without_statistics():
    model = nn.Sequential()
    for name, module in {
        "first": nn.Linear(6, 5),
        "norm": nn.BatchNorm1d(5, track_running_stats=False),
        "layer": nn.ReLU(),
        "head": nn.Linear(5, 3),
    }.items():
        model.add_module(name, module)
    return model


class Remembering(nn.Module):
    """Attends to a bank of memories, which have nothing to do with the batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x, bank):
        h = self.layer(x)
        return self.head((h @ bank.mT).softmax(1) @ bank)


class Scaled(nn.Module):
    """Has an argument with a row for each example."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x, scale, offsets):
        return self.head(self.layer(x).tanh() * scale[:, None] + offsets[: len(x)])


class Switching(nn.Module):
    """Another implementation, and another result, without gradients."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.layer(x)
        return self.head(h if torch.is_grad_enabled() else (h * 4).round() / 4)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(F.dropout(self.layer(x), 0.5))


class TimeFirst(nn.Module):
    """An LSTM whose outputs are (T, N, D)."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.layer(x.transpose(0, 1))[0][-1])


DEPENDENT = r"output depends on other examples of the batch: 2 of 40 examples have other values than all 40 together"


@pytest.mark.parametrize("make", [Neighbours, without_statistics])
def test_rows_that_depend_on_each_other_are_refused(make, tmp_path):
    model = make()
    for store in (None, tmp_path / "store"):
        with pytest.raises(ValueError, match=DEPENDENT):
            collect(model, "layer", X, store=store)


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ([[0, 0, 5], [39, 1, 0]], "fails on two of 40 examples with IndexError"),
        ([[0, 1], [1, 0]], DEPENDENT),  # which two examples have as well, but between others
    ],
)
def test_a_graph_is_refused(edges, said):
    with pytest.raises(ValueError, match=said):
        made(Graph(), unpack=lambda batch: batch).fit([(X, torch.tensor(edges))], 0, positives=ALL, progress=False)


def test_a_memory_bank_of_as_many_rows_as_the_batch():
    model, bank = Remembering(), torch.randn(8, 5)
    xnn = made(model, unpack=lambda batch: batch)
    xnn.fit([(x, bank) for x in X.split(8)], 0, positives=ALL, progress=False)  # cuts nothing
    with torch.no_grad():
        wanted = model(X[:7], bank)[:, 0]
    why = xnn.explain(X[:7], 0, bank, internal_batch_size=3)
    torch.testing.assert_close(why.prediction, wanted)
    with pytest.raises(ValueError, match=r"argument 0 has as many rows as the batch, 8, .*batch of another size"):
        xnn.explain(X[:8], 0, bank, internal_batch_size=3)


def test_arguments_with_a_row_for_each_example_are_cut():
    model, scale, offsets = Scaled(), torch.rand(40) + 0.5, torch.randn(40, 5)
    xnn = made(model, unpack=lambda batch: batch)
    xnn.fit([(X, (scale, offsets))], 0, positives=ALL, progress=False)
    more = (scale[:6], offsets[:6])
    whole, parts = (xnn.explain(X[:6], 0, more, internal_batch_size=size) for size in (None, 2))
    torch.testing.assert_close(parts.prediction, whole.prediction)
    torch.testing.assert_close(parts.maps, whole.maps)


def test_a_model_that_computes_other_things_without_gradients():
    with pytest.raises(ValueError, match="computes other values with gradients than without"):
        collect(Switching(), "layer", X)  # its layer is the same, its output is not


def test_a_model_that_draws_random_numbers_is_warned_of():
    with pytest.warns(UserWarning, match=r"draws random numbers in evaluation mode.*F\.dropout"):
        collect(Random(), "layer", X)


@pytest.mark.parametrize("steps", [4, 7])
def test_a_layer_with_time_first(steps):
    """As many steps as examples pass for examples first, but for two of them."""
    data = torch.randn(4, steps, 3)
    with pytest.raises(ValueError, match=r"so it has no row for each example|rows for the same examples"):
        collect(TimeFirst(), "layer", data, output_transform=lambda output: output[0])
    found = collect(TimeFirst(), "layer", data, output_transform=lambda output: output[0].transpose(0, 1))
    assert found.Z.shape == (4, steps, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_rounding_is_no_dependence(dtype, offset):
    """Sums of 4,000 terms in another order differ by rounding."""
    model = nn.Sequential(nn.Linear(6, 4000), nn.Tanh(), nn.Linear(4000, 50), nn.ReLU(), nn.Linear(50, 3)).to(dtype)
    with torch.no_grad():
        model[4].bias += offset
    assert len(collect(model, "3", X.to(dtype)).Z) == 40
