"""Which contributions belong together: equations a second time, and reasons set by hand."""

from __future__ import annotations

import resource
from functools import partial

import pytest
import torch

from captum_xnn.models import _grouping
from captum_xnn.models._grouping import (
    Drops,
    _gram,
    _leading,
    hardened,
    learn_groups,
    patch_clusters,
    regressed,
    spectral_groups,
    supporting,
)


def under(drops, activation_drops=None):
    """One way to cover patches. Without drops of activations, those of contributions stand in."""
    return [Drops(drops, drops if activation_drops is None else activation_drops)]


def double_rand(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def two_reasons(m=40, patches=6):
    """Contributions of six dimensions, of which 0, 2, 5 are lost in the first patches and 1, 3, 4 in the last."""
    mask = torch.zeros(patches, 6, dtype=torch.float64)
    mask[:2, [0, 2, 5]], mask[-2:, [1, 3, 4]] = 0.5, 0.5
    own = double_rand(m, 6) + 0.1
    return own, own[:, None] * mask


def test_two_reasons_are_found():
    own, drops = two_reasons()
    a = learn_groups(own, double_rand(20, 6), under(drops), 2)
    labels = a.argmax(1).tolist()
    assert labels[0] == labels[2] == labels[5] != labels[1] == labels[3] == labels[4]
    assert a.max(1).values.min() > 0.9
    torch.testing.assert_close(a.sum(1), torch.ones(6).double())


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("K", [1, 3, 50])
def test_rows_sum_to_one_and_all_of_it_is_the_same_twice(drops, K):
    own, others = torch.randn(30, 12).double(), torch.randn(20, 12).double()
    covers = under(torch.randn(30, 9, 12).double()) if drops else []
    before = torch.get_rng_state()
    first, second = learn_groups(own, others, covers, K), learn_groups(own, others, covers, K)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, second)
    assert first.shape[0] == 12
    assert first.shape[1] <= min(K, 12)
    torch.testing.assert_close(first.sum(1), torch.ones(12).double())


def test_groups_that_add_nothing_join_the_one_that_they_go_with():
    own = double_rand(40, 3) * torch.tensor([1, 1, 1e-4]).double()
    own[:, 2] = own[:, 1] * 1e-4
    a = learn_groups(own, own[:0], [], 3)
    assert a.shape == (3, 2)
    assert torch.equal(a[1], a[2])
    assert not torch.equal(a[0], a[1])


def test_outputs_scale_away():
    own, drops = two_reasons()
    a = learn_groups(own, own[:0], under(drops), 2)
    torch.testing.assert_close(learn_groups(own * 7, own[:0], under(drops * 7, drops), 2), a)


def test_patches_that_change_no_activation_say_nothing():
    """Their drops are rounding of the integral; with no other patches, dimensions are clustered by contributions."""
    own, drops = two_reasons()
    activation_drops = drops.clone()
    activation_drops[:, 2:4] = 0
    drops[:, 2:4] = 1e-3
    a = learn_groups(own, own[:0], under(drops, activation_drops), 2)
    expected = learn_groups(own, own[:0], under(drops[:, [0, 1, 4, 5]], activation_drops[:, [0, 1, 4, 5]]), 2)
    torch.testing.assert_close(a, expected, rtol=1e-2, atol=1e-2)
    alone = learn_groups(own, own[:0], under(drops, torch.zeros_like(activation_drops)), 2)
    torch.testing.assert_close(alone, learn_groups(own, own[:0], [], 2))


def test_units_of_the_layer_scale_away():
    """Activations in other units drop by other numbers, while contributions stay."""
    own, others, drops = torch.randn(30, 8).double(), torch.randn(20, 8).double(), torch.randn(30, 9, 8).double()
    activation_drops, unit = torch.randn(30, 9, 8).double(), torch.tensor([1e-3, 0.5, 7, 1, 2, 40, 1, 1e4]).double()
    a = learn_groups(own, others, under(drops, activation_drops), 3)
    torch.testing.assert_close(learn_groups(own, others, under(drops, activation_drops * unit), 3), a)
    assert not torch.allclose(learn_groups(own, others, under(drops), 3), a)


def test_patches_that_lower_the_same_activations_are_one_reason():
    """Contributions of a dimension change their sign from image to image; activations tell two kinds of patches."""
    activation_drops = torch.zeros(30, 4, 5, dtype=torch.float64)
    activation_drops[:, :, 0] = activation_drops[:, :2, 1:3] = activation_drops[:, 2:, 3:] = 1
    slopes = torch.randn(30, 1, 5).double()
    slopes[:, :, 0] = 9
    drops = activation_drops * slopes
    rows = supporting(Drops(drops, activation_drops))
    label = patch_clusters(rows[2], rows[1], 2).reshape(30, 4)
    assert label[:, :2].unique().tolist() != label[:, 2:].unique().tolist()
    assert all(half.unique().numel() == 1 for half in (label[:, :2], label[:, 2:]))
    expected = hardened(regressed(rows[0], rows[1], label.flatten(), 2))
    a = learn_groups(drops.sum(1), drops[:0, 0], under(drops, activation_drops), 2)
    torch.testing.assert_close(a, expected)


def test_patches_covered_in_two_ways_are_rows_of_one_regression():
    """Each way has its own units: images of norm 1, and dimensions of root mean square 1."""
    own, others = torch.randn(12, 5).double(), torch.randn(20, 5).double()
    ways = [
        Drops(size * torch.randn(12, P, 5).double(), torch.randn(12, P, 5).double() / size)
        for P, size in ((9, 3), (2, 50))
    ]
    X, V = [], []
    for drops in ways:
        size = (sum(a * a for of in drops.activations for a in of) / drops.activations[..., 0].numel()).sqrt()
        for c, a in zip(*drops, strict=True):
            norm = float((c * c).sum()) ** 0.5
            for row, activation in zip(c, a, strict=True):
                if row.sum() > 0:
                    X.append(row / norm)
                    V.append(activation / size)
    X, V = torch.stack(X), torch.stack(V)
    m = X.sum(1)
    expected = hardened(regressed(X, m, patch_clusters(V, m, 3), 3))
    torch.testing.assert_close(learn_groups(own, others, ways, 3), expected)
    assert not torch.allclose(learn_groups(own, others, ways[:1], 3), expected)


def test_patches_without_drops_change_nothing():
    """Images of other sizes may have fewer patches; drops of 0 take the place of the others."""
    own, others = torch.randn(12, 5).double(), torch.randn(20, 5).double()
    drops, pad = Drops(*torch.randn(2, 12, 9, 5).double()), partial(torch.nn.functional.pad, pad=(0, 0, 0, 4))
    a = learn_groups(own, others, [drops], 3)
    torch.testing.assert_close(learn_groups(own, others, [Drops(*map(pad, drops))], 3), a)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_patches_with_drops_that_are_not_finite_do_not_count(value):
    own, others = torch.randn(12, 5).double(), torch.randn(20, 5).double()
    contributions, activations = torch.randn(2, 12, 9, 5).double()
    for part in (contributions, activations):
        off, zero = part.clone(), torch.ones(12, 9, 1).double()
        off[3, 4, 1], zero[3, 4] = value, 0
        given = Drops(*(off if p is part else p for p in (contributions, activations)))
        expected = learn_groups(own, others, [Drops(contributions * zero, activations * zero)], 3)
        torch.testing.assert_close(learn_groups(own, others, [given], 3), expected)


def test_permuting_dimensions_permutes_rows():
    own, others, drops = torch.randn(30, 8).double(), torch.randn(20, 8).double(), torch.randn(30, 9, 8).double()
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    activation_drops = torch.randn(30, 9, 8).double()
    a = learn_groups(own, others, under(drops, activation_drops), 3)
    b = learn_groups(own[:, order], others[:, order], under(drops[:, :, order], activation_drops[:, :, order]), 3)
    torch.testing.assert_close(b, a[order])


@pytest.mark.parametrize(("n", "D"), [(20, 6), (5, 12)], ids=["more patches", "more dimensions"])
def test_ridge_regression_by_loops(n, D):
    K, ridge = 3, 0.7
    X = torch.randn(n, D).double()
    m, label = X.sum(1), torch.arange(n) % K
    a = regressed(X, m, label, K, ridge)
    rho = ridge * sum(float(x @ x) for x in X) / n

    def objective(a):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(n):
            for k in range(K):
                wanted = m[i] if label[i] == k else 0
                total = total + (sum(X[i, d] * a[d, k] for d in range(D)) - wanted) ** 2
        return total + rho * sum((a[d, k] - 1 / K) ** 2 for d in range(D) for k in range(K))

    at = a.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(at), at)
    assert slope.abs().max() < 1e-9
    torch.testing.assert_close(a.sum(1), torch.ones(D).double())


@pytest.mark.parametrize("n", [1, 3, 4, 9, 70])
def test_inner_products_by_loops(n):
    X = double_rand(n, 5) - 0.5
    found = _gram(X)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, torch.stack([torch.stack([(a * b).sum() for b in X]) for a in X]))


def test_leading_eigenvectors_of_a_large_matrix_are_those_of_all():
    """The search for a few takes one thread, and changes neither the matrix nor the number of threads."""
    before = torch.get_num_threads()
    X = double_rand(650, 650) - 0.5
    matrix = X @ X.T + 500 * torch.outer(X[0], X[0])
    kept = matrix.clone()
    found, all_of_them = _leading(matrix, 3), torch.linalg.eigh(matrix)[1]
    torch.testing.assert_close((found.T @ all_of_them[:, -3:]).abs(), torch.eye(3).double(), rtol=0, atol=1e-7)
    assert torch.equal(matrix, kept) and torch.get_num_threads() == before


def test_hardening_by_hand():
    a = torch.tensor([[0.7, 0.2, 0.1], [-1.0, 1.9, 0.1], [0.5, 0.5, 0.0], [0.45, 0.45, 0.1]]).double()
    expected = torch.tensor([[0.8, 0.2, 0.0], [-1.0, 2.0, 0.0], [0.5, 0.5, 0.0], [0.45, 0.45, 0.1]]).double()
    torch.testing.assert_close(hardened(a), expected)


def blocks(sizes, m=200):
    """Columns that go together in blocks, and each block on its own."""
    sources = torch.randn(m, len(sizes)).double()
    columns = [sources[:, [b]] + 0.1 * torch.randn(m, size).double() for b, size in enumerate(sizes)]
    return torch.cat(columns, 1), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


@pytest.mark.parametrize("sizes", [(4, 4), (2, 5, 3), (3, 3, 3, 3)])
def test_spectral_groups_find_blocks(sizes):
    X, block = blocks(sizes)
    order = torch.randperm(len(block))
    label = spectral_groups(X[:, order], len(sizes)).argmax(1)
    same = block[order][:, None] == block[order]
    assert torch.equal(label[:, None] == label, same)


def test_spectral_groups_tie_to_the_first():
    """Both blocks are the same but for their place: the first column is the first cluster's."""
    source = torch.randn(50, 1).double()
    source = source - source.mean()
    X = torch.cat([source, source, -source, -source], 1)
    assert spectral_groups(X, 2).argmax(1).tolist() == [0, 0, 1, 1]


def test_spectral_groups_of_constants():
    a = spectral_groups(torch.ones(5, 4), 2)
    assert a.isfinite().all()
    torch.testing.assert_close(a.sum(1), torch.ones(4).double())


def test_patches_that_lose_the_same_are_one_cluster():
    X = torch.zeros(8, 6).double()
    X[::2, :3], X[1::2, 3:] = double_rand(4, 1) + 0.5, double_rand(4, 1) + 0.5
    label = patch_clusters(X, X.sum(1), 2)
    assert label[::2].unique().numel() == label[1::2].unique().numel() == 1
    assert label[0] != label[1]


def sources(count, m=40):
    """Centred columns that do not correlate at all."""
    x = torch.randn(m, count, generator=torch.Generator().manual_seed(5)).double()
    return torch.linalg.qr(x - x.mean(0))[0]


def rounded(X, seed):
    """The same numbers with other rounding."""
    return X + 1e-9 * torch.randn(X.shape, generator=torch.Generator().manual_seed(seed)).double()


def test_rounding_chooses_no_clusters_where_more_are_separate_than_asked_for():
    X = sources(4).repeat_interleave(torch.tensor([4, 3, 2, 1]), 1) * torch.linspace(1, 2, 10)
    first = spectral_groups(X, 2)
    assert first.sum(0).min() > 0
    for seed in range(8):
        assert torch.equal(spectral_groups(rounded(X, seed), 2), first)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_columns_that_hardly_vary_take_no_cluster(value):
    """Alone they correlate with nothing, so each would be a cluster of its own."""
    live = sources(2).repeat_interleave(3, 1) * torch.linspace(1, 2, 6)
    alone = spectral_groups(live, 2)
    for seed in range(4):
        a = spectral_groups(rounded(torch.cat([torch.full((40, 5), value).double(), live], 1), seed), 2)
        assert torch.equal(a[5:], alone) and bool((a[:5] == 0.5).all())


def test_large_columns_that_vary_by_rounding_alone_take_no_cluster():
    live = sources(2).repeat_interleave(3, 1) * torch.linspace(1, 2, 6)
    large = 1e4 + 1e-3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(6)).double()
    a = spectral_groups(torch.cat([large, live], 1), 2)
    assert torch.equal(a[5:], spectral_groups(live, 2)) and bool((a[:5] == 0.5).all())


def test_wide_layers_are_clustered_by_their_largest_columns(monkeypatch):
    """Three reasons in 300 columns. The others of a reason join it, whatever their unit; constants belong to all."""
    g = torch.Generator().manual_seed(3)
    reasons, label = torch.randn(60, 3, generator=g).double(), torch.arange(300) % 3
    X = reasons[:, label] * torch.rand(300, generator=g).double() * 10 + 0.05 * torch.randn(60, 300, generator=g)
    X = torch.cat([X[:, :150], torch.full((60, 2), 7.0), X[:, 150:]], 1)
    whole = spectral_groups(X, 3)
    monkeypatch.setattr(_grouping, "_WIDE", 40)  # of 300
    wide = spectral_groups(X, 3)
    assert torch.equal(wide, whole)
    columns = torch.cat([torch.arange(150), torch.arange(152, 302)])
    for k in range(3):
        assert len(wide[columns][label == k].unique(dim=0)) == 1
    assert len(wide[columns].unique(dim=0)) == 3 and bool((wide[150:152] == 1 / 3).all())


def test_twenty_thousand_columns_take_little_memory():
    """The affinity of all columns with all would have 3.2 GB."""
    X = torch.eye(8).double()[:, torch.arange(20_000) % 3] * torch.linspace(1, 2, 20_000).double()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (spectral_groups(X, 3).argmax(1).reshape(-1)[:19_998].reshape(-1, 3).unique(dim=0)).shape == (1, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.2e6  # kB
