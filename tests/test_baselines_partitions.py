"""Partitions on contributions whose blocks are known, against plain algebra, and the same on any processor."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.decomposition import NMF

from captum_xnn.metrics import selectivity
from captum_xnn.models.baselines._partitions import (
    _ascent,
    _k_means,
    drsa,
    nmf_partition,
    prca,
    random_partition,
    single_dimensions,
    spectral_partition,
    subspace_relevances,
)

BLOCKS = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 0, 2, 1, 2])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks(noise=0.0, M=60, size=(3.0, 2.0, 1.0)):
    """Contributions of 12 dimensions, each a multiple, some of them negative, of one of three independent reasons."""
    reasons = (randn(M, 3) > 0.3) * (1 + 0.2 * randn(M, 3, seed=1)) * torch.tensor(size)
    strength = 0.5 + randn(12, seed=2).abs()
    strength[[3, 6]] *= -0.3
    return reasons[:, BLOCKS] * strength + noise * randn(M, 12, seed=3)


def groups_of(a):
    """Sets of dimensions, whatever the order of the groups."""
    assert set(a.unique().tolist()) <= {0, 1} and bool((a.sum(1) == 1).all())
    return {frozenset(column.nonzero()[:, 0].tolist()) for column in a.T}


WANTED = {frozenset((k == BLOCKS).nonzero()[:, 0].tolist()) for k in range(3)}


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_spectral_clusters_are_the_blocks(noise):
    c = blocks(noise)
    a = spectral_partition(c, 3)
    assert groups_of(a) == WANTED and a.dtype == torch.float64
    size = (c @ a).abs().mean(0)
    assert bool((size[:-1] >= size[1:]).all())  # the largest first
    torch.testing.assert_close((c @ a).sum(1), c.sum(1))


def test_spectral_clusters_ask_for_correlation_alone():
    """Units, signs, and the order of examples and dimensions do not count."""
    c = blocks(0.1)
    wanted = groups_of(spectral_partition(c, 3))
    scale = torch.tensor([1e-3, -5.0, 1e3]).double().repeat(4)
    assert groups_of(spectral_partition(c * scale + 7, 3)) == wanted
    order, rows = torch.randperm(12), torch.randperm(len(c))
    found = spectral_partition(c[rows][:, order], 3)
    back = torch.empty_like(found)
    back[order] = found
    assert groups_of(back) == wanted


def test_spectral_clusters_are_those_of_plain_algebra():
    """The embedding by NumPy's eigenvectors of the random walk, which times the root of the degrees are the same."""
    c = blocks(0.6)
    R = abs(np.corrcoef(c.numpy().T))
    values, vectors = np.linalg.eig(R / R.sum(1, keepdims=True))
    order = np.argsort(-values.real)[:3]
    rows = vectors.real[:, order]
    rows = rows * np.sqrt(R.sum(1, keepdims=True))
    rows /= np.linalg.norm(rows, axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = spectral_partition(c, 3).argmax(1).numpy()
    centres = np.stack([rows[labels == k].mean(0) for k in range(3)])
    nearest = ((rows[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (nearest == labels).all()  # a fixed point of k-means


def test_more_blocks_than_groups_tie_and_the_first_dimension_decides():
    """Four equal blocks, three groups: the third eigenvalue is as large as the fourth."""
    reasons = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).double()  # orthogonal
    reasons = torch.cat([reasons, -reasons])
    c = reasons[:, torch.arange(8) % 4]
    found = [spectral_partition(c, 3)]
    for seed in range(6):  # rounding, as other processors make it
        found.append(spectral_partition(c * (1 + 1e-14 * randn(*c.shape, seed=seed)), 3))
        order = torch.randperm(len(c), generator=torch.Generator().manual_seed(seed))
        found.append(spectral_partition(c[order], 3))
    assert all(torch.equal(a, found[0]) for a in found)
    assert all(frozenset({i, i + 4}) <= group for i in range(4) for group in groups_of(found[0]) if i in group)


def test_threads_and_rounding_change_nothing():
    c = torch.cat([blocks(0.5, M=200)] * 8, 1) + 0.3 * randn(200, 96, seed=5)
    alone = spectral_partition(c, 5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(spectral_partition(c, 5), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(spectral_partition(c * (1 + 1e-13 * randn(*c.shape, seed=6)), 5), alone)


def test_a_row_between_two_centres_goes_to_the_first():
    rows = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0.5, 0.5]]).double()
    for nudge in (-1e-14, 0, 1e-14):
        moved = rows.clone()
        moved[4, 1] += nudge
        assert _k_means(moved, 2, 0).tolist() == [0, 0, 1, 1, 0]
        assert _k_means(moved, 2, 2).tolist() == [1, 1, 0, 0, 0]


def test_dead_dimensions_join_the_largest_group():
    c = torch.cat([blocks(0.1), torch.zeros(60, 1), torch.full((60, 1), 0.1)], 1)
    a = spectral_partition(c, 3)
    assert a[12:].tolist() == [[1, 0, 0]] * 2 and groups_of(a[:12]) == WANTED
    with pytest.raises(ValueError, match="vary in only 2 dimensions, too few for 3 groups; ask for fewer"):
        spectral_partition(torch.cat([c[:, :2], torch.ones(60, 5)], 1), 3)


def test_single_dimensions_are_the_largest_and_a_rest():
    c = torch.tensor([[1.0, -4.0, 2.0, 0.5], [1.0, 4.0, -2.0, 0.5]])
    a = single_dimensions(c, 2)
    assert a.argmax(1).tolist() == [2, 0, 1, 2] and groups_of(a) == {frozenset({1}), frozenset({2}), frozenset({0, 3})}
    assert (c.double() @ a).tolist() == [[-4, 2, 1.5], [4, -2, 1.5]]
    tied = single_dimensions(torch.ones(3, 5), 2)
    assert tied.argmax(1).tolist() == [0, 1, 2, 2, 2]


def test_nmf_parts_are_the_blocks():
    c = blocks(M=200)
    a = nmf_partition(c, 3)
    torch.testing.assert_close(a.sum(1), torch.ones(12).double())
    assert bool((a >= 0).all()) and groups_of((a == a.amax(1, keepdim=True)).double()) == WANTED
    assert float(a.amax(1).min()) > 0.8
    torch.testing.assert_close((c @ a).sum(1), c.sum(1))


def test_nmf_shares_are_what_the_parts_give_on_average():
    """Written again from scikit-learn's factors; units of the contributions do not count."""
    c = blocks(0.2)
    made = NMF(3, init="nndsvda", random_state=0, max_iter=5000)
    W = made.fit_transform(c.abs().numpy() / float(c.abs().max()))
    given = np.stack([np.outer(W[:, k], made.components_[k]).mean(0) for k in range(3)], 1)
    wanted = given / given.sum(1, keepdims=True)
    found = nmf_partition(c, 3).numpy()
    order = [int(np.abs(wanted - found[:, k : k + 1]).sum(0).argmin()) for k in range(3)]
    np.testing.assert_allclose(found, wanted[:, order], atol=1e-9)
    np.testing.assert_allclose(nmf_partition(1e6 * c, 3), found, atol=1e-9)
    with_dead = nmf_partition(torch.cat([c, torch.zeros(60, 1)], 1), 3)
    assert with_dead[12].tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match="4 examples are too few for 5 groups; ask for fewer"):
        nmf_partition(c[:4], 5)


def pair(M=300, D=8):
    """Activations and contexts of two sources, on axes of a rotated space, which are on in different examples."""
    rotation = torch.linalg.qr(randn(D, D))[0]
    on = ((torch.arange(M) % 2)[:, None] == torch.arange(2)).double()
    strength = on * (1 + 0.3 * randn(M, 2, seed=1))
    a, c = 0.1 * randn(M, D, seed=2), 0.1 * randn(M, D, seed=3)
    a[:, [0, 2]], c[:, [0, 2]] = strength, 2 * on
    return a @ rotation.T, c @ rotation.T, 2 * strength, rotation[:, [0, 2]]


def test_prca_is_the_eigenvectors_of_the_mean_product():
    a, c = randn(40, 6), randn(40, 6, seed=1)
    mean = sum(torch.outer(x, y) + torch.outer(y, x) for x, y in zip(a, c, strict=True)) / 40
    values = np.linalg.eigvalsh(mean.numpy())[::-1]
    U = prca(a, c, 2, size=2)
    assert U.shape == (2, 6, 2)
    flat = U.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.T @ flat, torch.eye(4).double())
    for i in range(4):
        torch.testing.assert_close(mean @ flat[:, i], values[i] * flat[:, i])
        assert float(flat[flat[:, i].abs().argmax(), i]) > 0
    # Half of an eigenvalue is the mean relevance of its direction.
    found = subspace_relevances(prca(a, c, 4), a, c).mean(0)
    np.testing.assert_allclose(found[:4], values[:4] / 2, atol=1e-12)


@pytest.mark.parametrize("find", ["prca", "drsa"])
@pytest.mark.parametrize(("subspaces", "size"), [(2, 1), (3, 2), (2, 4)])
def test_subspaces_are_orthogonal_and_their_relevances_add_up(find, subspaces, size):
    a, c = randn(50, 8), randn(50, 8, seed=1)
    more = {"generator": torch.Generator().manual_seed(0), "steps": 20} if find == "drsa" else {}
    U = {"prca": prca, "drsa": drsa}[find](a, c, subspaces, size=size, **more)
    assert U.shape == (subspaces, 8, size)
    flat = U.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.T @ flat, torch.eye(subspaces * size).double())
    found = subspace_relevances(U, a, c)
    for k in range(subspaces):
        wanted = torch.stack([(U[k].T @ x) @ (U[k].T @ y) for x, y in zip(a, c, strict=True)])
        torch.testing.assert_close(found[:, k], wanted)
    torch.testing.assert_close(found.sum(1), (a * c).sum(1))
    if subspaces * size == 8:
        torch.testing.assert_close(found[:, -1], torch.zeros(50).double(), atol=1e-10, rtol=0)


def objective(U, a, c):
    """The generalised means, written again."""
    R = subspace_relevances(U, a, c)[:, :-1].clamp(min=0)
    over_examples = R.square().mean(0).sqrt()
    return float(over_examples.sqrt().mean() ** 2)


def test_drsa_climbs_its_objective():
    """The value is the formula's; the gradient that of finite differences, off the orthogonal matrices too."""
    a, c, U = randn(30, 6), randn(30, 6, seed=1), torch.linalg.qr(randn(6, 4, seed=2))[0]
    value, slope = _ascent(U, a, c, 2)
    assert value == pytest.approx(objective(U.T.reshape(2, 2, 6).transpose(1, 2), a, c), rel=1e-6)
    for i, j in ((0, 0), (3, 2), (5, 3)):
        moved = [U.clone(), U.clone()]
        moved[0][i, j] += 1e-6
        moved[1][i, j] -= 1e-6
        up, down = (_ascent(x, a, c, 2)[0] for x in moved)
        assert float(slope[i, j]) == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-6)


def test_drsa_tells_sources_of_different_examples_apart_and_prca_holds_both():
    a, c, sources, axes = pair()
    U = drsa(a, c, 2, generator=torch.Generator().manual_seed(0))
    assert objective(U, a, c) >= objective(axes.T[:, :, None], a, c)
    found = subspace_relevances(U, a, c)[:, :2]
    each = torch.corrcoef(torch.cat([found, sources], 1).T)[:2, 2:].abs()
    assert float(each.amax(1).min()) > 0.99 and each.argmax(1).unique().numel() == 2
    together = subspace_relevances(prca(a, c, 1, size=2), a, c)[:, 0]
    torch.testing.assert_close(together, sources.sum(1), atol=0.2, rtol=0)


def test_drsa_rises_and_depends_on_the_generator_alone():
    a, c, *_ = pair()
    values = [
        objective(drsa(a, c, 2, steps=steps, generator=torch.Generator().manual_seed(1)), a, c) for steps in (0, 3, 30)
    ]
    assert values[0] < values[1] < values[2]
    one, two = (drsa(a, c, 2, steps=5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    other = drsa(1e4 * a, c / 7, 2, steps=5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(other, one)  # units do not count


def test_partitions_that_know_the_reasons_are_more_selective_than_chance():
    """Removing a part takes its reason away: clusters answer to one part each, chance to all."""
    c = blocks(0.05)
    without = torch.stack([torch.where(p == BLOCKS, 0, c) for p in range(3)], 2)
    drops = c[:, :, None] - without
    chance = [random_partition(12, 3, torch.Generator().manual_seed(s)) for s in range(20)]
    shares = [
        selectivity(torch.einsum("mdp,dk->mkp", drops, a.to(drops))).share for a in (spectral_partition(c, 3), *chance)
    ]
    assert shares[0] == pytest.approx(1) and sum(shares[1:]) / 20 < 0.85


@pytest.mark.parametrize("make", [spectral_partition, nmf_partition, single_dimensions])
def test_other_contributions_are_refused(make):
    with pytest.raises(ValueError, match=r"shape \(4, 2, 2\), not .* as in contributions.flatten\(1\)"):
        make(torch.ones(4, 2, 2), 2)
    make(torch.arange(16.0).reshape(4, 2, 2).flatten(1), 2)  # as the error advises
    with pytest.raises(ValueError, match=r"shape \(0, 3\), not \(M, D\) with at least one example"):
        make(torch.ones(0, 3), 2)
    with pytest.raises(ValueError, match=r"have 3 dimensions, and the groups asked for need \d; ask for fewer"):
        make(torch.ones(4, 3), 4)
    for number in (0, -1):
        with pytest.raises(ValueError, match="the number of groups is below 1; pass at least 1"):
            make(torch.ones(4, 3), number)
    with pytest.raises(ValueError, match="contributions are NaN or infinite"):
        make(torch.full((4, 3), float("nan")), 2)


def test_other_subspaces_are_refused():
    a = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"shape \(4, 6\) and contexts \(4, 5\); pass both as \(M, D\)"):
        prca(a, a[:, :5], 2)
    with pytest.raises(ValueError, match="activations have 6 dimensions, and the subspaces asked for need 8"):
        drsa(a, a, 2, size=4, generator=torch.Generator())
    with pytest.raises(ValueError, match="contexts are NaN or infinite in some examples"):
        prca(a, a * float("nan"), 2)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 1\), not \(K, 6, d\); pass the result of prca or drsa"):
        subspace_relevances(torch.ones(2, 5, 1), a, a)
    with pytest.raises(ValueError, match="subspaces are NaN or infinite; find them again"):
        subspace_relevances(torch.full((2, 6, 1), float("nan")), a, a)
    for find in (prca, partial(drsa, generator=torch.Generator())):
        with pytest.raises(ValueError, match="0 subspaces of 1 dimensions were asked for; pass at least 1"):
            find(a, a, 0)
        with pytest.raises(ValueError, match="2 subspaces of 0 dimensions"):
            find(a, a, 2, size=0)
        with pytest.raises(ValueError, match=r"shape \(0, 6\), not \(M, D\) with at least one example"):
            find(a[:0], a[:0], 2)
    with pytest.raises(ValueError, match="activations have 6 dimensions, and the subspaces asked for need 7"):
        drsa(a, a, 7, generator=torch.Generator())
