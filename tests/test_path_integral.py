"""Path-integrated contributions: the integral in closed form, the sum, and the doubling of intervals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_xnn.layers._tail import Tail
from captum_xnn.models._contribution_groups import integrate


class Square(nn.Module):
    """The sum of squares of the layer's output, and twice the product of its first two numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        z = self.layer(x)
        return torch.stack([z.square().sum(1), 2 * z[:, 0] * z[:, 1]], 1)


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        return torch.sin(self.layer(x)).sum(1)


def of(model, x, base, targets, tolerance=1e9, **options):
    C = len(targets)
    return integrate(Tail(model, "layer"), (x,), None, base, targets, tolerance=torch.full((C,), tolerance), **options)


@pytest.mark.parametrize("intervals", [1, 3, 8])
def test_quadratic_outputs_in_closed_form(intervals):
    """The trapezoid rule is exact for gradients that are linear in t."""
    x, base = torch.randn(5, 3).double(), torch.randn(3).double()
    made = of(Square(), x, base, [[0] * 5, [1] * 5], intervals=intervals)
    c = made.contributions(base)
    torch.testing.assert_close(c[0], x**2 - base**2, rtol=0, atol=1e-6)
    d, mean = x - base, (x + base) / 2
    torch.testing.assert_close(c[1, :, :2], 2 * d[:, :2] * mean[:, [1, 0]], rtol=0, atol=1e-6)
    assert c[1, :, 2].abs().max() == 0
    torch.testing.assert_close(made.end, Square()(x).T)
    torch.testing.assert_close(made.start, Square()(base[None]).T.expand(2, 5), rtol=0, atol=1e-6)


def test_trapezoid_rule_by_loops():
    x, base, S = torch.randn(4, 3).double() * 3, torch.zeros(3).double(), 5
    made = of(Sine(), x, base, [[None] * 4], intervals=S)
    for n in range(4):
        for d in range(3):
            slopes = [torch.cos(x[n, d] * s / S) for s in range(S + 1)]
            slope = (slopes[0] / 2 + sum(slopes[1:-1]) + slopes[-1] / 2) / S
            torch.testing.assert_close(made.slopes[0, n, d], slope, rtol=0, atol=1e-6)


def test_doubled_intervals_are_the_rule_with_as_many_from_the_start():
    x, base = torch.randn(4, 3).double() * 3, torch.zeros(3).double()
    doubled = of(Sine(), x, base, [[None] * 4], tolerance=0.0, intervals=4, most=32)
    whole = of(Sine(), x, base, [[None] * 4], intervals=32)
    assert doubled.intervals.tolist() == [[32] * 4]
    torch.testing.assert_close(doubled.slopes, whole.slopes)


def test_only_examples_that_are_off_take_more_intervals():
    x = torch.tensor([[0.01, 0.0], [9.0, -4.0], [0.02, 0.01]]).double()
    made = of(Sine(), x, torch.zeros(2).double(), [[None] * 3], tolerance=0.01, intervals=2, most=64)
    assert made.intervals[0, [0, 2]].tolist() == [2, 2]
    assert made.intervals[0, 1] > 2
    off = made.contributions(torch.zeros(2).double())[0].sum(1) - (made.end - made.start)[0]
    assert off.abs().max() <= 0.01


@pytest.mark.parametrize("is_known", [False, True])
def test_outputs_beside_each_other_change_nothing(is_known, monkeypatch):
    """Each takes the intervals that it would take alone, with a tolerance of its own for each example.

    With known activations, few pairs of an output and an example that are left run without the other outputs.
    """
    C, counts, along = 6, [], Tail.along
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, C)).double()
    x, base = torch.randn(5, 2).double() * 4, torch.zeros(2).double()
    tolerance = torch.rand(C, 5) * 0.02 + torch.tensor([0.0, 0, 9, 9, 9, 9])[:, None]
    some = {"intervals": 2, "most": 64}
    with torch.no_grad():
        known = {"Z": x, "predictions": model(x).T} if is_known else {}
    monkeypatch.setattr(Tail, "along", lambda self, *a, **k: (counts.append(len(a[5])), along(self, *a, **k))[1])
    every = integrate(
        Tail(model, "0"), (x,), None, base, [[c] * 5 for c in range(C)], tolerance=tolerance, **some, **known
    )
    assert set(counts) == ({C, 1} if is_known else {C})
    assert len(every.intervals.unique()) > 2
    for c in range(C):
        for n in range(5):
            at = tolerance[c : c + 1, n : n + 1]
            alone = integrate(Tail(model, "0"), (x[n : n + 1],), None, base, [[c]], tolerance=at, **some)
            assert alone.intervals[0, 0] == every.intervals[c, n]
            torch.testing.assert_close(alone.slopes[0, 0], every.slopes[c, n])


def test_intervals_stop_at_the_most():
    made = of(Sine(), torch.full((1, 1), 50.0), torch.zeros(1), [[None]], tolerance=0.0, intervals=2, most=16)
    assert made.intervals.tolist() == [[16]]


def test_each_example_has_its_own_target():
    x, base = torch.randn(4, 3).double(), torch.zeros(3).double()
    each = of(Square(), x, base, [[0, 1, 0, 1]]).slopes[0]
    both = of(Square(), x, base, [[0] * 4, [1] * 4]).slopes
    torch.testing.assert_close(each, torch.stack([both[n % 2, n] for n in range(4)]))


def test_a_model_that_gives_other_outputs_is_refused():
    x, base = torch.randn(4, 3), torch.zeros(3)
    own = Square()(x).T[:1] + 1
    with pytest.raises(ValueError, match=r"output changes when layer 'layer' gets its own output back.*; .*SRAE"):
        of(Square(), x, base, [[0] * 4], predictions=own)
    of(Square(), x, base, [[0] * 4], predictions=own - 1)


def test_inputs_are_repeated_where_the_wrong_rows_would_meet_the_right_shape():
    """One row for all examples crosses the layer by broadcasting in such a model: the unchanged point tells."""

    class Crossing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            z = self.layer(x)
            return (torch.relu(z).reshape(-1, len(x), 3) * x).reshape(-1, 3).sum(1)

    model, x = Crossing().double(), torch.randn(5, 3).double()
    made = of(
        model, x, torch.zeros(3).double(), [[None] * 5], predictions=model(x)[None].detach(), tolerance=1e-3, most=4096
    )
    c = made.contributions(torch.zeros(3).double())
    torch.testing.assert_close(c[0], (torch.relu(model.layer(x)) * x).detach(), rtol=0, atol=1e-2)


class Skips(nn.Module):
    """The input reaches the output around the layer, by a product."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.relu(self.layer(x)) ** 2) * (1 + x[:, :1] ** 2)


def known(model, x, Z, targets):
    tail = Tail(model, "layer")
    own = tail.outputs((x,), None, targets)
    tolerance = torch.full((len(targets),), 1e-4)
    return integrate(tail, (x,), None, torch.zeros(4), targets, tolerance=tolerance, predictions=own, Z=Z), tail


def test_a_known_activation_saves_the_modules_before_the_layer():
    """One example runs there, whatever the number of intervals, and the numbers are the same."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("before", nn.Linear(3, 5))
    model.add_module("layer", nn.Linear(5, 4))
    model.add_module("after", nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    x, targets = torch.randn(6, 3), [[0] * 6, [1] * 6]
    Z = model.layer(model.before(x)).detach()
    rows = []
    model.before.register_forward_hook(lambda _module, _inputs, output: rows.append(len(output)))
    made, tail = known(model, x, Z, targets)
    assert tail.layer_decides is True and rows[0] == 6 and {*rows[1:]} == {1}  # the model's own outputs come first
    plain = integrate(Tail(model, "layer"), (x,), None, torch.zeros(4), targets, tolerance=torch.full((2,), 1e-4))
    torch.testing.assert_close(made.slopes, plain.slopes)
    assert torch.equal(made.intervals, plain.intervals)


@pytest.mark.parametrize("n", [1, 5])
def test_known_activations_do_not_hide_what_goes_around_the_layer(n):
    torch.manual_seed(0)
    model, x = Skips(), torch.randn(n, 3)
    made, tail = known(model, x, model.layer(x).detach(), [[1] * n])
    assert tail.layer_decides is (None if n == 1 else False)
    plain = integrate(Tail(model, "layer"), (x,), None, torch.zeros(4), [[1] * n], tolerance=torch.full((1,), 1e-4))
    torch.testing.assert_close(made.slopes, plain.slopes)
    torch.testing.assert_close(made.end, model(x)[:, 1].detach()[None])


def test_activations_of_other_examples_are_noticed():
    torch.manual_seed(0)
    model, x = Skips(), torch.randn(5, 3)
    x[:, 0] = 0.5  # nothing that goes around differs
    Z = model.layer(x).detach()
    made, tail = known(model, x, Z, [[1] * 5])
    assert tail.layer_decides is True
    wrong, tail = known(model, x, Z.flip(0), [[1] * 5])
    assert tail.layer_decides is False
    torch.testing.assert_close(wrong.slopes, made.slopes)


class Normed(nn.Module):
    """Instance norm of feature maps, then the mean square of a ReLU; the norm's derivative at the base is 1 / eps."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Identity(), nn.InstanceNorm2d(3)

    def forward(self, x):
        return self.norm(self.layer(x)).relu().square().mean((1, 2, 3))


@pytest.mark.parametrize("most", [64, 512])
def test_instance_norm_whose_variance_is_zero_at_the_base(most):
    """f(t) = m t^2 v / (t^2 v + eps) for one channel of variance v: nearly all of the change lies close to t = 0."""
    x = torch.randn(4, 3, 6, 6) + 1
    base, own = x.mean((0, 2, 3), keepdim=True)[0], Normed()(x)[None]
    for inputs, options in (
        (x, {}),
        (x, {"predictions": own, "Z": x}),
        (x[:1].expand_as(x), {"predictions": own, "Z": x}),
    ):
        plain = of(Normed(), x, base, [[None] * 4], intervals=most)  # evenly
        made = of(Normed(), inputs, base, [[None] * 4], tolerance=1e-3, most=most, **options)
        error = (made.contributions(base).flatten(2).sum(2) - (made.end - made.start)).abs().max()
        crude = (plain.contributions(base).flatten(2).sum(2) - (plain.end - plain.start)).abs().max()
        assert crude > 0.04  # of outputs of about a half
        assert error < 0.05 * crude
        assert torch.allclose(made.start, Normed()(base.expand_as(x))[None], atol=1e-6)
    for n in range(4):
        alone = of(Normed(), x[n : n + 1], base, [[None]], tolerance=1e-3, most=most)
        torch.testing.assert_close(alone.slopes[0, 0], made.slopes[0, n], rtol=1e-3, atol=1e-4)


def test_examples_that_add_up_keep_their_points_beside_one_that_does_not():
    """The second output is linear: its slopes are 1, whatever the first one needs."""

    class Both(Normed):
        def forward(self, x):
            z = self.layer(x)
            return torch.stack([self.norm(z).relu().square().mean((1, 2, 3)), z.sum((1, 2, 3))], 1)

    x = torch.randn(4, 3, 6, 6) + 1
    made = of(Both(), x, x.mean((0, 2, 3), keepdim=True)[0], [[0] * 4, [1] * 4], tolerance=1e-2)
    assert made.intervals[1].tolist() == [8] * 4 and made.intervals[0].tolist() == [512] * 4
    torch.testing.assert_close(made.slopes[1], torch.ones_like(x))
