"""Data in other forms than tensors, and numbers in other units: right, or refused with what to pass instead."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution

FORMS = {"groups": None, "learned": partial(SRAE, hidden=(4,))}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def explainer(form="groups", model=None, **settings):
    return XNNAttribution(model or network(), "1", 3, autoencoder=FORMS[form], recipe=Recipe(steps=10), **settings)


X = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))


def contributions(xnn):
    return xnn.contributions(X[:5], 0).contributions


@pytest.mark.parametrize("form", FORMS)
def test_numpy_arrays_are_refused_and_what_is_advised_works(form):
    data = X.numpy().astype(np.float64)
    with pytest.raises(
        TypeError, match=r"the data are a numpy array \(80, 6\) of float64; .* torch.from_numpy\(data\)"
    ):
        explainer(form).fit(data, 0, progress=False)
    wanted = contributions(explainer(form).fit(X, 0, progress=False))
    torch.testing.assert_close(
        contributions(explainer(form).fit(torch.from_numpy(data).float(), 0, progress=False)), wanted
    )
    batches = [data[:40], data[40:]]
    with pytest.raises(TypeError, match=r"a batch has a numpy array \(40, 6\) of float64 .*from_numpy\(batch\).float"):
        explainer(form).fit(batches, 0, progress=False)
    advised = explainer(form, unpack=lambda batch: (torch.from_numpy(batch).float(), None))
    torch.testing.assert_close(contributions(advised.fit(batches, 0, progress=False)), wanted)
    labelled = [(batch, np.zeros(40)) for batch in batches]
    with pytest.raises(TypeError, match=r"a batch has a numpy array \(40, 6\) .*from_numpy\(batch\[0\]\).float"):
        explainer(form).fit(labelled, 0, progress=False)


def test_tables_and_images_are_refused_and_what_is_advised_works():
    pandas, Image = pytest.importorskip("pandas"), pytest.importorskip("PIL.Image")
    frame, xnn = pandas.DataFrame(X.numpy()), explainer()
    with pytest.raises(
        TypeError, match=r"are a DataFrame \(80, 6\); pass .* torch.tensor\(data.to_numpy\(\), dtype=torch"
    ):
        xnn.fit(frame, 0, progress=False)
    xnn.fit(torch.tensor(frame.to_numpy(), dtype=torch.float32), 0, progress=False)
    with pytest.raises(TypeError, match=r"DataFrame'>; pass torch.tensor\(inputs.to_numpy\(\), dtype=torch.float32\)"):
        xnn.explain(frame, 0)
    with pytest.raises(TypeError, match=r"are images of PIL; turn each into a tensor.*torch.stack\(images\)"):
        explainer().fit([Image.new("RGB", (8, 8))] * 4, 0, progress=False)


@pytest.mark.parametrize("cast", [np.array, torch.tensor, list])
def test_arrays_of_targets(cast):
    """As the labels of a data set are given: one for each example, or one explainer for each."""
    xnn = explainer().fit(X, cast([0, 2]), positives=torch.ones(80, dtype=torch.bool), progress=False)
    assert [targets for _, targets in xnn.explainers_] == [(0,), (2,)]
    made = xnn.contributions(X[:3], cast([2, 0, 2]))
    torch.testing.assert_close(made.prediction, network()(X[:3])[torch.arange(3), torch.tensor([2, 0, 2])].detach())
    with pytest.raises(ValueError, match="there are 2 targets for 3 examples"):
        xnn.contributions(X[:3], cast([2, 0]))
    assert torch.equal(xnn.contributions(X[:3], cast([2] * 3)).bias, xnn.contributions(X[:3], 2).bias)


def test_maps_of_inputs_with_nan_are_told_by_the_inputs():
    """A model may replace NaN, but gradient times input does not."""

    class Replaces(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x):
            return self.layers(torch.nan_to_num(x))

    x = X.clone()
    x[::4, 2] = torch.nan
    model = Replaces()
    xnn = XNNAttribution(model, "layers.1", 3).fit(x, 0, progress=False)
    with pytest.warns(
        UserWarning, match="NaN or infinite values; 2 of 5 examples have such inputs; replace them as the"
    ):
        why = xnn.explain(x[:5], 0)
    torch.testing.assert_close(why.prediction, model(x[:5])[:, 0])
    wanted = xnn.explain(torch.nan_to_num(x[:5]), 0)
    torch.testing.assert_close(why.contributions, wanted.contributions)
    torch.testing.assert_close(why.maps[1], wanted.maps[1])


@pytest.mark.parametrize("path", ["images of birds", Path("images of birds")], ids=["text", "path"])
def test_a_path_is_refused(path):
    with pytest.raises(TypeError, match=r"the data are the path 'images of birds'; pass tensors or .*DataLoader"):
        explainer().fit(path, 0, progress=False)


@pytest.mark.parametrize("positives", [[True] * 80, np.ones(80, dtype=bool)], ids=["list", "numpy"])
def test_positives_that_are_no_tensor_are_refused(positives):
    kind = type(positives).__name__
    with pytest.raises(TypeError, match=rf"positives are a {kind}; pass a boolean tensor \(80,\), as in torch.tensor"):
        explainer().fit(X, 0, positives=positives, progress=False)
    assert explainer().fit(X, 0, positives=torch.tensor(positives), progress=False).explainer(0).positives == 80


def test_tensors_without_rows_are_refused():
    with pytest.raises(TypeError, match=r"a tensor of layout torch.sparse_coo; pass a dense one, data.to_dense\(\)"):
        explainer().fit(X.to_sparse(), 0, progress=False)
    with pytest.raises(ValueError, match=r"a tensor \(\) without examples; pass a tensor \(M, ...\)"):
        explainer().fit(torch.tensor(1.0), 0, progress=False)


def test_positives_that_mark_nothing_are_refused():
    with pytest.raises(ValueError, match=r"positives mark none of 80 examples; mark the examples .* leave positives="):
        explainer().fit(X, 0, positives=torch.zeros(80, dtype=torch.bool), progress=False)


@pytest.mark.parametrize("n", ["3", 2.0, None])
def test_a_number_of_features_that_is_no_int_is_named(n):
    with pytest.raises(TypeError, match=rf"n_features is {n!r}, a {type(n).__name__}; pass an int"):
        XNNAttribution(network(), "1", n)
    assert XNNAttribution(network(), "1", np.int64(4)).n_features == 4


def test_one_example_without_a_batch_dimension_is_told():
    xnn = explainer().fit(X, 0, progress=False)
    with pytest.raises(
        ValueError,
        match=r"returns shape \(16,\), without a row .*; where the inputs are one example, add .* with x\[None\]",
    ):
        xnn.attribute(X[0], 0)
    assert xnn.attribute(X[0][None], 0).shape == (1, 3, 6)


# --- units


class Crossed(nn.Module):
    """A value crosses the layer, and is repeated, for other examples than it belongs to, where rows are repeated."""

    def __init__(self, unit):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.unit = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3), unit

    def forward(self, x):
        h, other = self.a(x).relu(), self.b(x).tanh()
        if len(h) != len(other):
            other = other.repeat(len(h) // len(other), 1).roll(1, 0)
        return self.unit * self.c(h * other)


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3, 1e8])
@pytest.mark.parametrize("make", ["plain", "crossed"])
def test_contributions_do_not_depend_on_the_unit_of_the_output(make, unit):
    """Outputs in small units were taken for equal, and in large units for different, where they were not."""
    made = []
    for size in (1, unit):
        model = Crossed(size).eval()
        if make == "plain":
            model = network()
            model[2].weight.data *= size
            model[2].bias.data *= size
        layer = "a" if make == "crossed" else "1"
        xnn = XNNAttribution(model, layer, 3).fit(X, 0, positives=torch.ones(80).bool(), progress=False)
        numbers = xnn.contributions(X[:6], 0)
        made.append((numbers.contributions.double() / size, xnn.explainer(0).form.groups))
        each = torch.cat([xnn.contributions(X[i : i + 1], 0).contributions for i in range(6)])
        torch.testing.assert_close(each, numbers.contributions, rtol=1e-3, atol=1e-4 * size)
        off = (numbers.surrogate - numbers.prediction).abs().max() / numbers.prediction.std()
        assert float(off) < 0.02
    torch.testing.assert_close(made[1][0], made[0][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made[1][1], made[0][1], rtol=1e-3, atol=1e-3)
