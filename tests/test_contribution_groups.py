"""x-features as groups of contributions: sums over places, bases, the read-out, and refused settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_xnn.activations._activations import ChosenRows
from captum_xnn.layers._tail import Tail
from captum_xnn.models import ContributionGroups

SHAPES = {"vector": ((6,), 1), "maps": ((6, 3, 4), 1), "tokens": ((5, 6), 2), "last": ((3, 4, 6), 3)}


def form_of(shape, channels, K=3):
    form = ContributionGroups(shape, K, channels=channels).double()
    form.groups = torch.randn(6, K).softmax(1).double()
    form.base = torch.randn(form.base.shape).double()
    return form


@pytest.mark.parametrize(("shape", "channels"), SHAPES.values(), ids=SHAPES)
def test_read_out_by_loops(shape, channels):
    form = form_of(shape, channels)
    Z, slopes = torch.randn(4, *shape).double(), torch.randn(4, *shape).double()
    c = (slopes * (Z - form.base)).movedim(channels, 1).reshape(4, 6, -1)
    expected = torch.zeros(4, 3).double()
    for n in range(4):
        for d in range(6):
            for k in range(3):
                expected[n, k] += form.groups[d, k] * sum(c[n, d])
    torch.testing.assert_close(form.read_out(Z, slopes), expected)
    torch.testing.assert_close(form.features(form.by_channel(slopes * (Z - form.base))), expected)


@pytest.mark.parametrize(
    ("shape", "channels", "over"),
    [((6,), 1, 0), ((6, 3, 4), 1, (0, 2, 3)), ((5, 6), 2, 0), ((3, 4, 6), 3, (0, 1, 2))],
    ids=["vector", "maps", "positions keep theirs", "last"],
)
def test_base_is_the_mean_over_examples_and_places_of_grids(shape, channels, over):
    Z = torch.randn(11, *shape)
    form = ContributionGroups(shape, channels=channels)
    found = form.mean_of(Z.split(4), 11)
    torch.testing.assert_close(found.flatten(), Z.double().mean(over).flatten())
    assert (found.expand(shape) - found).abs().max() == 0


@pytest.mark.parametrize(("shape", "channels"), [((6,), 1), ((6, 3, 4), 1), ((5, 6), 2)])
def test_channels_by_default(shape, channels):
    assert ContributionGroups(shape).channels == channels
    assert ContributionGroups(shape).groups.shape == (6, 5)


def test_tokens_behind_the_channels_are_told():
    assert ContributionGroups((6, 5), channels=1).groups.shape == (6, 5)
    assert ContributionGroups((3, 4, 6), channels=-1).channels == 3


def test_contributions_of_a_linear_rest():
    model, x = nn.Sequential(nn.Identity(), nn.Linear(6, 2)).double(), torch.randn(5, 6).double()
    form = form_of((6,), 1)
    made = form.integral(Tail(model, "0"), (x,), None, [[1] * 5])
    expected = (x - form.base) * model[1].weight[1]
    torch.testing.assert_close(form.contributions(made)[0], expected.detach(), rtol=0, atol=1e-6)
    total = made.start[0] + form.features(form.contributions(made)[0]).sum(1)
    torch.testing.assert_close(total, model(x)[:, 1].detach(), rtol=0, atol=1e-6)


def test_kept_columns_are_in_the_order_asked_for():
    form = form_of((6,), 1)
    groups = form.groups.clone()
    form.keep(torch.tensor([2, 0]))
    assert torch.equal(form.groups, groups[:, [2, 0]])
    assert form.n_features == form.config["n_features"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_features": 0}, "n_features is 0; pass a whole number of at least 1"),
        ({"grid": 0}, "grid is 0; pass a whole number of at least 1"),
        ({"tolerance": 0}, "tolerance 0; pass .*tolerance > 0"),
        ({"balance": -1}, "balance is -1 .*pass balance >= 0"),
        ({"ridge": 0}, "ridge is 0; pass a number above 0"),
        ({"strongest": -1}, "strongest is -1; pass a whole number, or 0 to cover maps only"),
        ({"strongest": 1.5}, "strongest is 1.5; pass a whole number"),
        ({"covered": "map"}, "covered is 'map'; pass 'maps', 'images', or None"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ContributionGroups(6, **settings)


def test_chosen_examples_are_spread_evenly_and_positives_are_positive():
    marks = torch.zeros(100, dtype=torch.bool)
    marks[10:31] = True
    found = ChosenRows.choose([marks, ~marks], 100, 5, 3)
    assert found.positives[0].tolist() == [10, 15, 20, 25, 30]
    assert not marks[found.positives[1]].any()
    assert found.others.tolist() == [0, 50, 99] or found.others.tolist() == [0, 49, 99]
