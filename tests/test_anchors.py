"""Anchors: closed-form properties, scikit-learn's partial least squares, and recovery of known sources."""

import numpy as np
import pytest
import torch

from captum_xnn.anchors import anchors


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    Z = drawn(400, 20) @ drawn(20, 20, seed=1)
    y = (Z @ drawn(20, seed=2) + 0.5 * drawn(400, seed=3))[:, None]
    return Z - Z.mean(0), (y - y.mean()) / y.std()


@pytest.mark.parametrize("weighted", [False, True])
def test_uncorrelated_with_even_shares(problem, weighted):
    Z, y = problem
    E, v = anchors(Z, y, 5, weight=drawn(400, seed=4).abs() if weighted else None)
    torch.testing.assert_close(E.T @ E / 400, torch.eye(5).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(E.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-9)
    assert float(v.std() / v.mean()) < 1e-9 and float(v.min()) > 0
    torch.testing.assert_close(torch.linalg.lstsq(E, y).solution.T, v, rtol=1e-8, atol=1e-10)


def test_span_is_that_of_partial_least_squares(problem):
    pls = pytest.importorskip("sklearn.cross_decomposition").PLSRegression(5, scale=False)
    Z, y = problem
    E, v = anchors(Z, y, 5)
    scores = torch.from_numpy(pls.fit(Z.numpy(), y.numpy()).transform(Z.numpy()))
    residual = E - scores @ torch.linalg.lstsq(scores, E).solution
    assert float(residual.norm() / E.norm()) < 1e-6
    np.testing.assert_allclose((E @ v.T).numpy()[:, 0], pls.predict(Z.numpy()).reshape(-1), atol=1e-6)


def test_no_rotation_with_even_shares_is_more_skewed(problem):
    Z, y = problem
    E, _ = anchors(Z, y, 5)
    best = float(E.relu().pow(3).sum())
    generator = torch.Generator().manual_seed(5)
    ones = torch.ones(5, 1).double() / 5**0.5
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(5).double()], 1))[0][:, :5]
    for _ in range(300):
        inner = torch.eye(5).double()
        inner[1:, 1:] = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))[0]
        other = E @ (basis @ inner @ basis.T)
        torch.testing.assert_close((other.T @ y).std() / y.norm(), torch.zeros(()).double(), rtol=0, atol=1e-6)
        assert float(other.relu().pow(3).sum()) <= best * (1 + 1e-9)


def test_finds_the_sources_of_an_output():
    """Four independent skewed sources add up to the output; Z mixes them."""
    sources = torch.from_numpy(np.random.default_rng(0).exponential(size=(6000, 4))) - 1
    mixing = torch.linalg.qr(drawn(12, 4, seed=6))[0]
    E, _ = anchors(sources @ mixing.T, sources.sum(1, keepdim=True) / 2, 4)
    table = torch.corrcoef(torch.cat([E, sources], 1).T)[:4, 4:]
    assert sorted(table.argmax(1).tolist()) == [0, 1, 2, 3]
    assert float(table.max(1).values.min()) > 0.95


def test_fewer_anchors_than_asked_where_z_has_fewer_directions():
    Z = drawn(100, 2) @ drawn(2, 9, seed=1)
    E, v = anchors(Z - Z.mean(0), (Z @ drawn(9, seed=2))[:, None], 5)
    assert E.shape == (100, 2) and v.shape == (1, 2)


def test_one_anchor_is_the_linear_explanation(problem):
    Z, y = problem
    E, v = anchors(Z, y, 1)
    t = Z @ (Z.T @ y)[:, 0]
    assert float(torch.corrcoef(torch.stack([E[:, 0], t]))[0, 1]) == pytest.approx(1, abs=1e-9)
    assert float(v) > 0


def test_several_outputs(problem):
    Z, _ = problem
    y = Z @ drawn(20, 3, seed=7)
    E, v = anchors(Z, y, 6)
    torch.testing.assert_close(E.T @ E / 400, torch.eye(6).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.linalg.lstsq(E, y - y.mean(0)).solution.T, v, rtol=1e-7, atol=1e-9)


def test_what_never_varies_with_the_output_is_refused():
    with pytest.raises(ValueError, match="some vary with the output"):
        anchors(torch.zeros(10, 3), drawn(10, 1).float(), 2)
