"""Typicality: by loops, beside scikit-learn, and with the share of outliers that chance gives."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from captum_xnn.metrics import typicality
from captum_xnn.metrics._typicality import shrinkage


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixed(M, K, seed=0):
    """Correlated contributions of different sizes."""
    return drawn(M, K, seed=seed) @ drawn(K, K, seed=99) + 5 * drawn(K, seed=98)


def covariance(X, delta):
    S = np.cov(X.T, bias=True)
    return (1 - delta) * S + delta * np.trace(S) / len(S) * np.eye(len(S))


def test_distances_beside_scipy_and_scikit_learn():
    sklearn = pytest.importorskip("sklearn.covariance")
    usual, new = mixed(30, 4), mixed(6, 4, seed=1)
    X = ((usual - usual.mean(0)) / usual.std(0)).numpy()
    sigma, delta = sklearn.ledoit_wolf(X)
    assert shrinkage(torch.from_numpy(X)) == pytest.approx(delta, rel=1e-9)
    assert 0 < delta < 1
    found = typicality(new, usual)
    for x, distance in zip(((new - usual.mean(0)) / usual.std(0)).numpy(), found.distance.tolist(), strict=True):
        assert distance == pytest.approx(mahalanobis(x, np.zeros(4), np.linalg.inv(sigma)), rel=1e-9)


def test_shares_by_leaving_out_one_after_the_other():
    usual, new = mixed(25, 3), mixed(40, 3, seed=1)
    X = ((usual - usual.mean(0)) / usual.std(0)).numpy()
    delta = shrinkage(torch.from_numpy(X))
    whole = covariance(X, delta)
    target = delta * np.trace(whole) / 3 * np.eye(3)
    without = []
    for i in range(25):
        rest = np.delete(X, i, 0)
        sigma = (1 - delta) * np.cov(rest.T, bias=True) + target
        without.append(mahalanobis(X[i], rest.mean(0), np.linalg.inv(sigma)))
    found = typicality(new, usual)
    for distance, share in zip(found.distance.tolist(), found.share.tolist(), strict=True):
        assert share == pytest.approx((1 + sum(d >= distance for d in without)) / 26, abs=1e-12)


def test_examples_judge_each_other_each_without_itself():
    both = mixed(25, 3)
    X = ((both - both.mean(0)) / both.std(0)).numpy()
    delta = shrinkage(torch.from_numpy(X))
    target = delta * np.trace(covariance(X, delta)) / 3 * np.eye(3)
    without = []
    for i in range(25):
        rest = np.delete(X, i, 0)
        sigma = (1 - delta) * np.cov(rest.T, bias=True) + target
        without.append(mahalanobis(X[i], rest.mean(0), np.linalg.inv(sigma)))
    found = typicality(both)
    assert found.distance.tolist() == pytest.approx(without, rel=1e-9)
    assert found.share.tolist() == pytest.approx([sum(other >= d for other in without) / 25 for d in without])
    torch.testing.assert_close(found.deviations, torch.from_numpy(X))


@pytest.mark.parametrize(("power", "M"), [(1, 30), (3, 200)])
def test_examples_of_the_class_are_outliers_as_often_as_the_share_says(power, M):
    """Also for heavy tails. Of 30 examples, distances to a mean with themselves in it would call 19 % outliers."""
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
        torch.tensor([1e-6, 3.0, 1e4, 1.0]).double(),
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
