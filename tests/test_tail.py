"""The rest of a model from a layer on: the same outputs, and derivatives by the layer's output."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_xnn import XNNAttribution
from captum_xnn.layers._tail import Tail


class Block(nn.Module):
    """A skip across the layer, or none, and ReLUs in place."""

    def __init__(self, skip=True):
        super().__init__()
        self.layer, self.head, self.skip = nn.Linear(4, 4), nn.Linear(4, 2), skip

    def forward(self, x):
        z = self.layer(x)
        return self.head(F.relu_(z + x if self.skip else z))

    def rest(self, Z, x):
        return self.head(torch.relu(Z + x if self.skip else Z))


class Packed(nn.Module):
    """The layer returns a dict with a tuple in it."""

    class Inner(nn.Module):
        def forward(self, x):
            return {"more": (x * 2, x.unsqueeze(1).repeat(1, 3, 1)), "other": x + 1}

    def __init__(self):
        super().__init__()
        self.layer, self.head = self.Inner(), nn.Linear(4, 2)

    def forward(self, x):
        out = self.layer(x)
        return self.head(torch.tanh(out["more"][1]).sum(1) + out["other"] + out["more"][0])


@pytest.mark.parametrize("skip", [True, False])
def test_outputs_and_gradients_on_a_line(skip):
    model, x = Block(skip).double(), torch.randn(5, 4).double()
    base, ts, weights = torch.randn(4).double(), torch.tensor([0, 0.3, 1.0]), torch.tensor([0.5, 2, 1.0])
    targets = [[0] * 5, [1, 0, 1, 1, 0]]
    found = Tail(model, "layer").along((x,), None, base, ts, weights, targets)
    Z = model.layer(x).detach()
    assert torch.equal(found.Z, Z)
    for c, of in enumerate(targets):
        for n in range(5):
            total = torch.zeros(4).double()
            for s, (t, w) in enumerate(zip(ts.double(), weights.double(), strict=True)):
                z = (base + t * (Z[n] - base)).requires_grad_()
                y = model.rest(z, x[n])[of[n]]
                total += w * torch.autograd.grad(y, z)[0]
                torch.testing.assert_close(found.y[c, s, n], y.detach(), rtol=0, atol=1e-7)
            torch.testing.assert_close(found.gradient[c, n], total, rtol=0, atol=1e-7)


def test_the_beginning_runs_once_where_nothing_crosses_the_layer():
    seen = []
    model, x = nn.Sequential(nn.Identity(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4)
    model[0].register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
    ts = torch.linspace(0, 1, 9)
    Tail(model, "1").along((x,), None, torch.zeros(3), ts, ts, [[0] * 5])
    assert set(seen) == {5}


def test_a_line_for_some_rows_is_that_of_these_rows():
    for model in (Block(), Block(skip=False)):
        x, ts, rows = torch.randn(5, 4), torch.linspace(0, 1, 9), torch.tensor([3, 0])
        found = Tail(model, "layer").along((x,), None, torch.zeros(4), ts, ts, [[0, 1]], rows=rows)
        expected = Tail(model, "layer").along((x[rows],), None, torch.zeros(4), ts, ts, [[0, 1]])
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    Z = torch.randn(2, 4)  # known, as if the layer gave it
    found = Tail(model, "layer").along((x,), None, torch.zeros(4), ts, ts, [[0, 1]], Z=Z, rows=rows)
    assert torch.equal(found.Z, Z)


def test_a_kept_prefix_stands_in_for_examples_of_the_same_shape():
    seen = []

    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):  # (N, T, 4) with any T
            return self.head(torch.tanh(self.layer((self.first(x) * x).mean(1))))

    model, x, ts = Means().eval(), torch.randn(5, 6, 4), torch.linspace(0, 1, 3)
    expected = Tail(model, "layer").along((x,), None, torch.zeros(3), ts, ts, [[0] * 5])
    model.first.register_forward_hook(lambda _m, _i, out: seen.append(out))
    tail, Z = Tail(model, "layer"), Tail(model, "layer").activations((x,), None)
    tail.keep_prefix((x[2:3],), None)
    kept = seen[-1]
    for other, same in ((x, True), (x[:, :3], False)):
        found = tail.along((other,), None, torch.zeros(3), ts, ts, [[0] * 5], Z=Z)
        assert torch.equal(seen[-1], kept) == same
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    tail.forget()
    tail.along((x,), None, torch.zeros(3), ts, ts, [[0] * 5], Z=Z)
    assert not torch.equal(seen[-1], kept)


def test_large_images_run_up_to_the_layer_a_few_at_a_time(monkeypatch):
    seen = []
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)), torch.randn(7, 1, 6, 6)
    model[0].register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
    whole = Tail(model, "1").activations((x,), None)
    monkeypatch.setattr("captum_xnn.layers._batching._CPU_BYTES", 3 * 36 * 4)
    torch.testing.assert_close(Tail(model, "1").activations((x,), None), whole)
    assert seen == [7, 3, 3, 1]


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_points_at_once_change_nothing(most, monkeypatch):
    model, x = Block().double(), torch.randn(5, 4).double()
    ts = torch.linspace(0, 1, 9)
    whole = Tail(model, "layer").along((x,), None, torch.zeros(4), ts, ts, [[0] * 5])
    monkeypatch.setattr(Tail, "_points_at_once", lambda _self, _n: most)
    parted = Tail(model, "layer").along((x,), None, torch.zeros(4), ts, ts, [[0] * 5])
    torch.testing.assert_close(parted.y, whole.y)
    torch.testing.assert_close(parted.gradient, whole.gradient)


@pytest.mark.parametrize(
    "transform",
    [
        lambda out: out["more"][1],
        lambda out: out["more"][1].transpose(1, 2),
        lambda out: out["more"][1][:, 1:],
        lambda out: out["more"][1][:, -1],
    ],
    ids=["picks", "transposes", "slices", "one place"],
)
def test_picked_and_rearranged_outputs_are_put_back(transform):
    model, x = Packed().double(), torch.randn(5, 4).double()
    tail = Tail(model, "layer", output_transform=transform)
    one = torch.ones(1)
    Z = transform(model.layer(x))
    found = tail.along((x,), None, torch.zeros(Z.shape[1:]), one, one, [[1] * 5])
    with torch.no_grad():
        torch.testing.assert_close(found.y[0, 0], model(x)[:, 1])
    slope = (1 - torch.tanh(model.layer(x)["more"][1]) ** 2) * model.head.weight[1]
    torch.testing.assert_close(found.gradient[0], transform({"more": (None, slope)}).detach())
    assert torch.equal(found.Z, Z)


@pytest.mark.parametrize(
    "transform",
    [
        lambda out: out["more"][1].mean(1),
        lambda out: out["more"][1] * 2,
        lambda out: out["more"][1].square(),
        lambda out: torch.cat([out["more"][1]] * 2, 1),  # each number would count twice
    ],
)
def test_calculating_is_refused(transform):
    tail = Tail(Packed(), "layer", output_transform=transform)
    with pytest.raises(
        ValueError, match=r"output_transform calculates with the output of layer 'layer'.*let it only pick"
    ):
        tail.along((torch.randn(5, 4),), None, torch.zeros(1), torch.ones(1), torch.ones(1), [[0] * 5])


def test_an_integer_output_is_refused():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.ids, self.embed = nn.Identity(), nn.Embedding(9, 4)

        def forward(self, x):
            return self.embed(self.ids(x)).sum(1)

    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"layer 'ids' gives torch\.int64 numbers.*choose a layer behind the embedd"):
        Tail(Ids(), "ids").along((torch.ones(2, 3, dtype=torch.long),), None, torch.zeros(1), one, one, [[0] * 2])


def test_of_a_layer_that_runs_twice_the_last_call_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    model, one = Twice(), torch.ones(1)
    made = Tail(model, "layer").along((torch.ones(2, 4),), None, torch.zeros(4), one, one, [[0] * 2])
    torch.testing.assert_close(made.Z, model(torch.ones(2, 4)).detach())
    torch.testing.assert_close(made.gradient[0], torch.eye(4)[:1].expand(2, 4))
    assert not model.layer._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_weights_and_hooks_are_left_as_found_after_an_error():
    model, one = Block(), torch.ones(1)
    model.head.bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(Exception, match=r"target|index|out of"):
        Tail(model, "layer").along((torch.ones(2, 4),), None, torch.zeros(4), one, one, [[7] * 2])
    assert [p.requires_grad for p in model.parameters()] == before
    assert not model.layer._forward_hooks


class Table(nn.Module):
    """Adds a weight that a layer passes on, as a table of positions."""

    def __init__(self):
        super().__init__()
        self.body, self.table, self.rows = nn.Linear(4, 3), nn.Parameter(torch.ones(1, 3)), nn.Identity()

    def forward(self, x):
        return self.body(x) + self.rows(self.table.expand(len(x), 3))


def test_a_layer_that_is_the_same_for_all_examples_is_refused():
    """Its output is a view of a weight, which requires gradients also where none are taken."""
    model, x = Table(), torch.randn(40, 4)
    assert not Tail(model, "rows").activations((x,), None).requires_grad
    with pytest.raises(ValueError, match="layer 'rows' contributes nothing to the output of any example"):
        XNNAttribution(model, "rows", 2).fit(x, 0, positives=torch.ones(40).bool(), progress=False)


class Shared(nn.Module):
    """One ReLU behind feature maps and behind two hidden layers, or three of them."""

    def __init__(self, relus):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.hidden, self.out = nn.Conv2d(1, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)
        self.first, self.second, self.third = relus

    def forward(self, x):
        return self.out(self.third(self.hidden(self.second(self.hidden(self.first(self.conv(x)).mean((2, 3)))))))


def test_earlier_calls_of_a_layer_may_have_another_shape():
    x, relu = torch.randn(6, 1, 9, 9, generator=torch.Generator().manual_seed(1)), nn.ReLU()
    line = (x,), None, torch.tensor([0.1, -0.2, 0.3, 0.4]), torch.tensor([0.2, 1.0]), torch.ones(2), [[1] * 6]
    found = Tail(Shared([relu] * 3), "first").along(*line)
    apart = Tail(Shared([nn.ReLU() for _ in range(3)]), "third").along(*line)
    for ours, wanted in zip(found, apart, strict=True):
        assert torch.equal(ours, wanted)


def test_another_size_than_that_of_the_training_data_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(0, -1), nn.Unflatten(0, (5, -1)), nn.AdaptiveAvgPool1d(2))
    base, ones = torch.zeros(2, 4, 4), torch.ones(2)
    with pytest.raises(ValueError, match=r"layer '0' gives \(2, 3, 3\) for each example, and its base is \(2, 4, 4\)"):
        Tail(model, "0").along((torch.rand(5, 1, 5, 5),), None, base, torch.tensor([0.0, 1.0]), ones, [[0] * 5])
