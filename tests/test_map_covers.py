"""Covers of feature maps: cells set to zero by hand, where they may be used, and the drops that follow."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from captum_xnn import ContributionGroups, XNNAttribution
from captum_xnn.activations import collect
from captum_xnn.layers._tail import Tail
from captum_xnn.metrics._patches import patch_bounds
from captum_xnn.models._grouping import Drops, learn_groups
from captum_xnn.training import _contributions
from captum_xnn.training._drops import Grid, _difference, strongest
from captum_xnn.training._map_covers import CoveredMaps, maps_before


def cnn(pool=2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Linear(8 * pool**2, 9), nn.ReLU(), nn.Linear(9, 3),
    ).eval()  # fmt: skip


class Around(nn.Module):
    """The image's mean goes around the feature maps."""

    def __init__(self):
        super().__init__()
        self.maps, self.head = cnn()[:4], nn.Linear(9, 4)
        self.relu, self.out = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.relu(self.head(torch.cat([self.maps(x).mean((2, 3)), x.mean((1, 2, 3))[:, None]], 1))))


class Twice(nn.Module):
    """One encoder for an image and its mirror image."""

    def __init__(self):
        super().__init__()
        self.encoder, self.relu, self.out = cnn()[:4], nn.ReLU(), nn.Linear(16, 3)

    def forward(self, x):
        both = [self.encoder(x).mean((2, 3)), self.encoder(x.flip(3)).mean((2, 3))]
        return self.out(self.relu(torch.cat(both, 1)))


class Rigid(nn.Module):
    """Rows behind the maps must be as many as images."""

    def __init__(self):
        super().__init__()
        self.maps, self.relu, self.out = cnn()[:4], nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.relu(self.maps(x).reshape(len(x), 8, -1).mean(2)))


def counted(model):
    """Counts the examples that run through the first module, in a list of the batches."""
    seen, forward = [], model[0].forward
    model[0].forward = lambda images: (seen.append(len(images)), forward(images))[1]
    return seen


def x(n=4, size=14):
    return torch.rand(n, 2, size, size, generator=torch.Generator().manual_seed(1))


def test_the_last_maps_with_cells_enough():
    model = cnn()
    assert maps_before(Tail(model, "7"), (x(),), None, 0) is model[3]
    assert maps_before(Tail(model, "7"), (x(size=6),), None, 0) is model[1]  # 3 x 3 cells are too few
    assert maps_before(Tail(model, "1"), (x(),), None, 0) is None  # the layer itself


@pytest.mark.parametrize(("model", "layer"), [(Around(), "relu"), (Twice(), "relu")])
def test_maps_that_something_goes_around_are_not_covered(model, layer):
    assert maps_before(Tail(model.eval(), layer), (x(),), None, 0) is None


@pytest.mark.parametrize(
    ("model", "layer", "maps"), [(cnn(), "7", lambda m: m[3]), (Rigid().eval(), "relu", lambda m: m.maps)]
)
def test_covered_cells_are_zero(model, layer, maps):
    images = x()
    tail, module = Tail(model, layer), maps(model)
    with torch.no_grad():
        made = CoveredMaps(tail, module, (images,), None)
        grid = Grid(*made.whole.shape[2:], 8)
        pairs = grid.pairs(4)
        Z = made.activations(grid.regions, pairs)
        A = (model[:4] if layer == "7" else model.maps)(images)
        assert len(pairs) == 4 * 49
        for (i, p), row in zip(pairs, Z, strict=True):
            (top, bottom), (left, right) = patch_bounds(7, 8)[p // 7], patch_bounds(7, 8)[p % 7]
            covered = A[i : i + 1].clone()
            covered[:, :, top:bottom, left:right] = 0
            rest = model[4:8](covered) if layer == "7" else torch.relu(covered.mean((2, 3)))
            torch.testing.assert_close(row, rest[0])
        torch.testing.assert_close(made.Z, tail.activations((images,), None))


def test_covers_in_small_pieces_and_from_reused_memory(monkeypatch):
    """Neither the pieces of images nor the copies of an earlier call change what a patch loses."""
    model, images = cnn(), x(5)
    tail = Tail(model, "7")
    whole = CoveredMaps(tail, model[3], (images,), None)
    monkeypatch.setattr("captum_xnn.layers._batching._CPU_BYTES", 2 * images[0].numel() * 4)
    seen = counted(model)
    made, grid = CoveredMaps(tail, model[3], (images,), None), Grid(*whole.whole.shape[2:], 3)
    assert seen == [1, 2, 2]
    torch.testing.assert_close(made.whole, whole.whole)
    torch.testing.assert_close(made.Z, whole.Z)
    pairs = grid.pairs(5)
    expected = [whole.activations(grid.regions, [pair])[0].clone() for pair in pairs]
    for size in (7, 45, 2):
        parts = [made.activations(grid.regions, pairs[i : i + size]).clone() for i in range(0, len(pairs), size)]
        torch.testing.assert_close(torch.cat(parts), torch.stack(expected))
    assert seen == [1, 2, 2]  # no cover runs the modules before the maps again


def test_small_batches_of_a_loader_change_nothing_but_the_time(monkeypatch):
    """Each positive runs once before the layer; a few run more often, before the facts about the model are known."""
    model, images, forms = cnn(), x(40, 16), []
    maps_alone = partial(ContributionGroups, covered="maps", strongest=0, positives=30)
    seen = counted(model)
    for size in (40, 2):
        xnn = XNNAttribution(model, "7", 3, autoencoder=maps_alone)
        found = collect(model, "7", DataLoader(images, size), unpack=lambda batch: (batch, None))
        seen.clear()
        forms.append(xnn.fit(found, 0, positives=torch.arange(40) < 30, progress=False).explainer(0).form)
        assert sum(seen) <= 30 + 14, seen
    torch.testing.assert_close(forms[1].groups, forms[0].groups, rtol=1e-5, atol=1e-6)


def evidence_of(model, layer, images, monkeypatch, *, n=None, **settings):
    """The form, and the data that a fit learns from: n examples, or the rows of a tensor."""
    seen = []
    learn = _contributions._learn
    monkeypatch.setattr(_contributions, "_learn", lambda form, evidence: (seen.append(evidence), learn(form, evidence)))
    make = lambda *given, **options: ContributionGroups(*given, **options, **settings)  # noqa: E731
    xnn = XNNAttribution(model, layer, 3, autoencoder=make)
    positives = torch.arange(n or len(images)) < 6
    xnn.fit(images, 0, positives=positives, progress=False)
    return xnn.explainer(0).form, seen[0]


def test_drops_where_the_layer_is_feature_maps_are_contributions_of_cells(monkeypatch):
    """Drops of all patches together are the contributions, place by place."""
    model, images = cnn(), x(20)
    form, seen = evidence_of(model, "3", images, monkeypatch, covered="maps", grid=3)
    tail = Tail(model, "3")
    found = form.integral(tail, (images[:6],), None, [[0] * 6])
    c = found.contributions(form.base)[0]  # (6, 8, 7, 7)
    bounds = patch_bounds(7, 3)
    expected = torch.stack([c[:, :, a:b, e:f].sum((2, 3)) for a, b in bounds for e, f in bounds], 1)
    torch.testing.assert_close(seen.covers[0].contributions[0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        seen.covers[0].contributions[0].sum(1), form.contributions(found)[0], rtol=1e-4, atol=1e-6
    )
    off = found.Z - form.base
    expected = torch.stack([off[:, :, a:b, e:f].sum((2, 3)) for a, b in bounds for e, f in bounds], 1)
    torch.testing.assert_close(seen.covers[0].activations, expected, rtol=1e-4, atol=1e-6)


def test_drops_at_a_vector_use_the_slopes_of_the_image(monkeypatch):
    model, images = cnn(), x(20)
    form, seen = evidence_of(model, "7", images, monkeypatch, covered="maps")
    with torch.no_grad():
        A = model[:4](images[:6])
    found = form.integral(Tail(model, "7"), (images[:6],), None, [[0] * 6])
    for p in (0, 24, 48):
        covered = A.clone()
        covered[:, :, p // 7, p % 7] = 0
        with torch.no_grad():
            off = found.Z - model[4:8](covered)
        torch.testing.assert_close(seen.covers[0].contributions[0, :, p], found.slopes[0] * off, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen.covers[0].activations[:, p], off, rtol=1e-4, atol=1e-5)


def test_drops_of_covered_pixels_are_differences_of_two_passes(monkeypatch):
    """At a vector, contributions under the cover are integrated again; at feature maps the image's slopes are taken."""
    model, images = cnn(), x(20)
    for layer in ("7", "3"):
        form, seen = evidence_of(model, layer, images, monkeypatch, covered="images", grid=2)
        covered = images[:6].clone()
        covered[:, :, :7, 7:] = images[:6].mean((2, 3), keepdim=True)
        whole, other = (form.integral(Tail(model, layer), (some,), None, [[0] * 6]) for some in (images[:6], covered))
        places = list(range(2, whole.Z.dim()))
        off = whole.Z - other.Z
        expected = form.contributions(whole)[0] - form.contributions(other)[0] if layer == "7" else None
        if expected is None:
            expected = (whole.slopes[0] * off).sum(places)
        torch.testing.assert_close(seen.covers[0].contributions[0, :, 1], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            seen.covers[0].activations[:, 1], off.sum(places) if places else off, rtol=1e-4, atol=1e-5
        )


class Packed(nn.Module):
    """Views the maps as rows, which needs their channels apart in memory."""

    def __init__(self):
        super().__init__()
        self.maps, self.head, self.out = cnn()[:4], nn.Linear(8 * 49, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.out(torch.relu(self.head(self.maps(x).view(len(x), 8 * 49))))


@pytest.mark.parametrize(("model", "layer"), [(cnn(), "7"), (cnn(), "3"), (Packed().eval(), "head")])
def test_pixels_of_the_strongest_patches_are_covered_after_maps(model, layer, monkeypatch):
    """Those of the 4 x 4 patches in which covered cells cost the output most, in each image for itself."""
    images = x(20)
    form, seen = evidence_of(model, layer, images, monkeypatch, covered="maps", strongest=3)
    cells, pixels = seen.covers
    assert pixels.contributions.shape[:3] == (1, 6, 3)
    cost = cells.contributions[0].sum(2).clamp(min=0).reshape(6, 7, 7)
    whole = form.integral(Tail(model, layer), (images[:6],), None, [[0] * 6])
    edges, cell_edges = patch_bounds(14, 4), [(7 * i // 4, -(-7 * (i + 1) // 4)) for i in range(4)]
    for n in range(6):
        mean = {
            (i, j): cost[n, a:b, e:f].mean()
            for i, (a, b) in enumerate(cell_edges)
            for j, (e, f) in enumerate(cell_edges)
        }
        chosen = sorted(sorted(mean, key=lambda patch: -mean[patch])[:3])
        for which, (i, j) in enumerate(chosen):
            covered = images[n : n + 1].clone()
            covered[:, :, edges[i][0] : edges[i][1], edges[j][0] : edges[j][1]] = images[n].mean((1, 2))[:, None, None]
            other = form.integral(Tail(model, layer), (covered,), None, [[0]], scale=torch.tensor([torch.inf]))
            off = (whole.Z[n] - other.Z[0]).reshape(len(form.groups), -1)
            expected = form.contributions(whole)[0, n] - form.contributions(other)[0, 0]
            if layer == "3":
                expected = (whole.slopes[0, n].reshape(len(off), -1) * off).sum(1)
            torch.testing.assert_close(pixels.contributions[0, n, which], expected, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(pixels.activations[n, which], off.sum(1), rtol=1e-4, atol=1e-5)


def test_strongest_patches_of_equal_drops_come_first():
    """A patch that costs the output nothing or less counts as one that costs nothing."""
    drops = torch.tensor([[[3.0, -9.0, 0.0, 3.0 + 1e-9], [-1.0, -1.0, -1.0, -1.0]]], dtype=torch.float64)[..., None]
    pairs = strongest(Drops(drops, drops[0]), Grid(8, 8, 2), Grid(64, 64, 2), 1, torch.ones(1, 2))
    assert pairs == [(0, 0), (1, 0)]
    both = strongest(Drops(drops, drops[0]), Grid(8, 8, 2), Grid(64, 64, 2), 9, torch.ones(1, 2))
    assert both == [(i, p) for i in range(2) for p in range(4)]


def test_patches_with_nan_drops_are_not_strong():
    """They do not decide which of the others are."""
    drops = torch.tensor([[[torch.nan, 1.0, torch.inf, 2.0]]])[..., None]
    assert strongest(Drops(drops, drops[0]), Grid(8, 8, 2), Grid(64, 64, 2), 2, torch.ones(1, 1)) == [(0, 1), (0, 3)]


def test_strongest_patches_by_several_outputs():
    """Drops of each output in its own unit, as outputs need not have one range."""
    drops = torch.tensor([[[100.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 2.0, 0.0]]])[..., None]
    for unit, patch in ((100.0, 2), (1.0, 0)):
        scale = torch.tensor([[unit], [1.0]])
        assert strongest(Drops(drops, drops[0]), Grid(8, 8, 2), Grid(64, 64, 2), 1, scale) == [(0, patch)]


def test_maps_of_few_cells_are_not_covered():
    model, images = cnn(), x(4, 4)  # the last maps have 2 x 2 cells
    assert maps_before(Tail(model, "7"), (images,), None, 0) is None
    assert maps_before(Tail(model, "7"), (x(4, 10),), None, 0) is model[3]


def test_groups_are_learned_from_drops_of_activations_and_of_contributions(monkeypatch):
    model, images = cnn(), x(20)
    form, seen = evidence_of(model, "7", images, monkeypatch, covered="images", grid=4)
    positives, others, drops = (
        p[0] / form.scale[0] for p in (seen.positives, seen.others, seen.covers[0].contributions)
    )
    given = seen.covers[0].activations
    for ridge, activation_drops in ((1.0, given), (5.0, given), (1.0, torch.randn(given.shape))):
        form.config |= {"n_features": 3, "ridge": ridge}
        _contributions._learn(form, seen._replace(covers=(seen.covers[0]._replace(activations=activation_drops),)))
        expected = learn_groups(positives, others, [Drops(drops, activation_drops)], 3, ridge=ridge)
        order = (seen.positives[0].double() @ expected).mean(0).argsort(descending=True, stable=True)
        torch.testing.assert_close(form.groups.double(), expected[:, order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, learn_groups(positives, others, [Drops(drops, drops)], 3), atol=1e-2)


def test_rounding_is_no_drop():
    Z = torch.tensor([[1.0, 100.0, 0.0, 1e-3]])
    covered = Z * (1 + torch.tensor([[1e-7, -1e-6, 0.0, 1e-2]]))
    assert (_difference(Z, torch.tensor([0]), covered) != 0).tolist() == [[False, False, False, True]]


def test_rounding_is_relative_to_the_largest_value_of_a_number():
    """A small value may be the rest of large terms; each number of Z has its own unit."""
    Z = torch.tensor([[1e-4, 1e-4], [100.0, 1e-4]])
    off = _difference(Z, torch.tensor([0]), Z[:1] - torch.tensor([[1e-5, 1e-5]]))
    assert (off != 0).tolist() == [[False, True]]


@pytest.mark.parametrize(("dtype", "drop"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_rounding_in_half_precision_is_no_drop(dtype, drop):
    """Sums are in single precision, so one last place is rounding, and a few percent are not."""
    Z = torch.tensor([[1.0, 100.0, 0.0, 1.0]], dtype=dtype)
    covered = Z * (1 + torch.tensor([[torch.finfo(dtype).eps, 0.0, 0.0, drop]])).to(dtype)
    assert covered[0, 0] != Z[0, 0]
    assert (_difference(Z, torch.tensor([0]), covered) != 0).tolist() == [[False, False, False, True]]


def test_large_images_have_their_maps_covered_and_small_ones_their_pixels(monkeypatch):
    """An image of 70 x 70 pixels has 8 x 8 patches either way; only pixels need a pass of the first layer for each."""
    model = cnn(pool=1)
    calls = []
    model[0].register_forward_hook(lambda _module, _inputs, output: calls.append(len(output)))
    for size, few in ((70, True), (16, False)):
        calls.clear()
        evidence_of(model, "7", x(20, size), monkeypatch)
        assert (sum(calls) < 6 * 64) == few


def test_other_examples_do_not_run_before_the_layer(monkeypatch):
    """Their activations are known, and nothing else reaches the output."""
    model = cnn()
    calls = []
    model[0].register_forward_hook(lambda _module, _inputs, output: calls.append(len(output)))
    found = XNNAttribution(model, "7", 3, autoencoder=lambda *a, **o: ContributionGroups(*a, covered="maps", **o))
    images = x(200)
    found.fit(images, 0, positives=torch.arange(200) < 6, progress=False)
    assert sum(calls) < 200 + 60  # collecting, and a few for six positives
    made = found.contributions(images, 0)
    torch.testing.assert_close(
        made.bias + made.contributions.sum(1), model(images)[:, 0].detach(), rtol=0.02, atol=0.02
    )


def test_images_of_two_sizes_give_each_its_own_patches(monkeypatch):
    """Images of 14 pixels have 7 x 7 cells to cover, of 6 pixels 6 x 6 in earlier maps, and of 4 pixels none."""
    model, larger = cnn(), torch.rand(3, 2, 20, 20, generator=torch.Generator().manual_seed(2))
    for size, patches in ((14, 49), (6, 36), (4, 0)):
        counts = []
        for loader in ([x(3, size), larger], [larger, x(3, size)]):
            with monkeypatch.context() as patched:
                _, seen = evidence_of(model, "7", loader, patched, covered="maps", n=6)
            first, second = (slice(0, 3), slice(3, 6)) if loader[1] is larger else (slice(3, 6), slice(0, 3))
            cells, pixels = (way.activations.abs().sum(2) for way in seen.covers)
            assert cells.shape == (6, 64)
            assert not cells[first, patches:].any()
            assert cells[second, 60:].any()
            assert not pixels[second, 3:].any()
            assert pixels[second, :3].any()
            counts.append((cells[first], pixels[first]))
        torch.testing.assert_close(counts[0], counts[1])
