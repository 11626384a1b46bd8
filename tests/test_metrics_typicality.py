"""Typicality: by loops, beside scipy, and with the share of outliers that chance gives."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import mahalanobis

from captum_xnn.metrics import typicality


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixed(M, K, seed=0):
    """Correlated contributions of different sizes."""
    return drawn(M, K, seed=seed) @ drawn(K, K, seed=99) + 5 * drawn(K, seed=98)


def without_each(X):
    """Distance, chance and deviations of each example from the others, by a loop."""
    made = []
    for i in range(len(X)):
        rest = np.delete(X, i, 0)
        M, K = rest.shape
        D = mahalanobis(X[i], rest.mean(0), np.linalg.inv(np.cov(rest.T).reshape(K, K)))
        chance = stats.f.sf(D**2 * M * (M - K) / ((M + 1) * (M - 1) * K), K, M - K)
        made.append((D, chance, (X[i] - rest.mean(0)) / rest.std(0, ddof=1)))
    return [np.array(each) for each in zip(*made, strict=True)]


def test_new_examples_beside_scipy():
    usual, new = mixed(30, 4), mixed(40, 4, seed=1)
    found, inverse = typicality(new, usual), np.linalg.inv(np.cov(usual.numpy().T))
    D = [mahalanobis(x, usual.numpy().mean(0), inverse) for x in new.numpy()]
    assert found.distance.tolist() == pytest.approx(D, rel=1e-9)
    chance = [stats.f.sf(d**2 * 30 * 26 / (31 * 29 * 4), 4, 26) for d in D]
    assert found.chance.tolist() == pytest.approx(chance, rel=1e-7)
    torch.testing.assert_close(found.deviations, (new - usual.mean(0)) / usual.std(0))
    without = without_each(usual.numpy())[0]
    wanted = [(1 + (without >= d).sum()) / 31 for d in D]
    assert found.share.tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("K", [1, 3])
def test_examples_judge_each_other_each_without_itself(K):
    both = mixed(25, K)
    distance, chance, deviations = without_each(both.numpy())
    found = typicality(both)
    assert found.distance.tolist() == pytest.approx(distance, rel=1e-9)
    assert found.chance.tolist() == pytest.approx(chance, rel=1e-7)
    assert found.share.tolist() == pytest.approx([(distance >= d).mean() for d in distance])
    np.testing.assert_allclose(found.deviations.numpy(), deviations, rtol=1e-9)


def unusual(c):
    return typicality(c).chance < 0.001


@pytest.mark.parametrize("K", [1, 3, 5])
@pytest.mark.parametrize(("N", "times"), [(20, 500), (200, 50)])
def test_one_in_a_thousand_normal_examples_is_unusual_and_many_of_heavy_tails(N, times, K):
    normal = [mixed(N, K, seed=seed) for seed in range(times)]
    found = torch.stack([unusual(c) for c in normal]).double()
    assert 0 < float(found.mean()) < 0.0025  # of 10,000 about 10, Poisson
    cubes = torch.stack([unusual(drawn(N, K, seed=seed) ** 3) for seed in range(times // 5)]).double()
    assert float(cubes.mean()) > 0.01


@pytest.mark.parametrize("K", [1, 3, 5])
@pytest.mark.parametrize("N", [20, 40, 200])
def test_one_gross_outlier_is_found_alone_at_its_full_size(N, K):
    """With 20 examples the share cannot fall below one in twenty, and 4.2 deviations were the most with itself."""
    c = drawn(N, K, seed=N)
    before = unusual(c)
    c[3, 0] += 1000
    found = typicality(c)
    after = found.chance < 0.001
    assert bool(after[3]) and not bool((after & ~before)[torch.arange(N) != 3].any())
    others = c[torch.arange(N) != 3, 0]
    assert float(found.deviations[3, 0]) == pytest.approx(float((c[3, 0] - others.mean()) / others.std()), rel=1e-6)


def test_one_example_apart_from_equal_ones_is_found():
    c = torch.full((25, 2), 0.1)
    c[7] = torch.tensor([0.1, 0.3])
    found = typicality(c)
    assert (found.chance < 0.001).nonzero().tolist() == [[7]] and bool(found.deviations.isfinite().all())


@pytest.mark.parametrize("value", [0.1, 0.3, 1.7, 3.3])
def test_equal_examples_are_refused_and_rounding_is_no_difference(value):
    same = torch.full((25, 2), value)
    with pytest.raises(ValueError, match="contributions of the class's examples are all equal"):
        typicality(same)
    rounded = same * (1 + 2e-7 * torch.randint(-1, 2, (25, 2), generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="contributions of the class's examples are all equal"):
        typicality(rounded)


def test_x_features_that_depend_on_each_other_count_once():
    usual, new = mixed(30, 2), mixed(6, 2, seed=1)
    more = [torch.cat([c, c.sum(1, keepdim=True)], 1) for c in (new, usual)]
    one, other = typicality(new, usual), typicality(*more)
    torch.testing.assert_close(other.distance, one.distance)
    torch.testing.assert_close(other.chance, one.chance)


@pytest.mark.parametrize(("power", "M"), [(1, 30), (3, 200)])
def test_examples_of_the_class_are_outliers_as_often_as_the_share_says(power, M):
    """Also for heavy tails."""
    shares = []
    for seed in range(300):
        both = mixed(M + 2, 5, seed=seed)
        both = both.sign() * both.abs() ** power
        shares.append(typicality(both[:2], both[2:]).share)
    shares = torch.cat(shares)
    assert float((shares <= 0.1).double().mean()) == pytest.approx(0.1, abs=0.04)
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.04)


def test_an_outlier_is_found_where_it_differs():
    """Each contribution is usual by itself, and together they are not."""
    usual = drawn(200, 1) * torch.ones(1, 3).double() + 0.1 * drawn(200, 3, seed=1)
    found = typicality(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 9.0]]), usual)
    assert found.share.tolist() == [pytest.approx(found.share[0]), 1 / 201, 1 / 201]
    assert found.share[0] > 0.2
    assert found.deviations.abs()[:2].max() < 1.3
    assert found.deviations[2].argmax() == 2


def test_units_and_order_do_not_matter():
    usual, new = mixed(30, 4), mixed(6, 4, seed=1)
    scale, shift, order = (
        torch.tensor([1e-3, 3.0, 1e4, 1.0]).double(),
        torch.tensor([2.0, -1.0, 0.0, 5.0]),
        [2, 0, 3, 1],
    )
    one = typicality(new, usual)
    other = typicality((new * scale + shift)[:, order], (usual * scale + shift)[:, order])
    torch.testing.assert_close(other.distance, one.distance, rtol=1e-6, atol=0)
    torch.testing.assert_close(other.share, one.share)
    torch.testing.assert_close(other.deviations, one.deviations[:, order], rtol=1e-6, atol=1e-6)


def test_a_constant_x_feature_is_left_out():
    usual, new = mixed(30, 3), mixed(6, 3, seed=1)
    one = typicality(new, usual)
    padded = [torch.cat([c, torch.zeros(len(c), 1)], 1) for c in (new + 1, usual + 1)]
    other = typicality(*padded)
    torch.testing.assert_close(other.share, one.share)
    assert other.deviations[:, 3].abs().max() == 0


@pytest.mark.parametrize(
    ("new", "usual", "said"),
    [
        (torch.zeros(2, 3), torch.rand(9, 4), "take both from the same explainer"),
        (torch.zeros(3), torch.rand(9, 3), "take both from the same explainer"),
        (torch.zeros(2, 3), torch.rand(4, 3), "4 examples of the class are too few for 3 x-features"),
        (torch.zeros(2, 3), torch.ones(9, 3), "contributions of the class's examples are all equal"),
        (torch.full((2, 3), torch.nan), torch.rand(9, 3), "contributions are NaN or infinite"),
    ],
)
def test_what_cannot_be_compared_is_refused(new, usual, said):
    with pytest.raises(ValueError, match=said):
        typicality(new, usual)
