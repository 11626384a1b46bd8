"""Anchors: partial least squares and varimax by other libraries, hand-worked cases, known sources, ties and noise."""

import math

import numpy as np
import pytest
import torch

from captum_xnn.training._anchors import _arranged, _best_angle, _descending, _rotation, anchors


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    Z = drawn(400, 20) @ drawn(20, 20, seed=1)
    y = (Z @ drawn(20, seed=2) + 0.5 * drawn(400, seed=3))[:, None]
    return Z - Z.mean(0), (y - y.mean()) / y.std()


def simplicity(L):
    """V, written again: how far every dimension belongs to one anchor."""
    D, r = L.shape
    value = 0.0
    for i in range(r):
        value += sum(float(L[d, i]) ** 4 for d in range(D)) - sum(float(L[d, i]) ** 2 for d in range(D)) ** 2 / D
    return value / sum(sum(float(L[d, i]) ** 2 for i in range(r)) ** 2 for d in range(D))


def unevenness(v):
    """Sum of the squared shares of anchors in the outputs' explained variance, from their weights (C, r)."""
    shares = v.square().sum(0) / v.square().sum()
    return float(shares.square().sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("balance", [0.0, 0.4, 1.0])
def test_uncorrelated_with_least_squares_weights(problem, weighted, balance):
    Z, y = problem
    E, v = anchors(Z, y, 5, weight=drawn(400, seed=4).abs() if weighted else None, balance=balance)
    torch.testing.assert_close(E.T @ E / 400, torch.eye(5).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(E.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.linalg.lstsq(E, y).solution.T, v, rtol=1e-8, atol=1e-10)
    assert float(v.min()) > 0
    if balance == 1:
        assert float(v.std() / v.mean()) < 1e-8
    else:
        assert torch.equal(v, v.sort(descending=True).values)


def test_span_is_that_of_partial_least_squares(problem):
    pls = pytest.importorskip("sklearn.cross_decomposition").PLSRegression(5, scale=False)
    Z, y = problem
    E, v = anchors(Z, y, 5)
    scores = torch.from_numpy(pls.fit(Z.numpy(), y.numpy()).transform(Z.numpy()))
    residual = E - scores @ torch.linalg.lstsq(scores, E).solution
    assert float(residual.norm() / E.norm()) < 1e-6
    np.testing.assert_allclose((E @ v.T).numpy()[:, 0], pls.predict(Z.numpy()).reshape(-1), atol=1e-6)


def test_rotation_is_that_of_varimax(problem):
    """As scikit-learn's factor analysis rotates loadings, up to order and sign."""
    rotated = pytest.importorskip("sklearn.decomposition._factor_analysis")._ortho_rotation
    L = drawn(30, 4, seed=5).relu() @ drawn(4, 4, seed=6)
    ours = L @ _rotation(L, drawn(4, 1), 0.0).T
    theirs = torch.from_numpy(rotated(L.numpy(), method="varimax", tol=1e-14, max_iter=10000)).T
    table = (ours.T @ theirs / ours.norm(dim=0)[:, None] / theirs.norm(dim=0)).abs()
    assert sorted(table.argmax(1).tolist()) == [0, 1, 2, 3]
    assert float(table.max(1).values.min()) > 1 - 1e-6


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("outputs", [1, 3])
def test_no_small_turn_is_better(problem, balance, outputs):
    """The objective of the module's head, written again, falls whichever two anchors are turned."""
    Z, _ = problem
    y = Z @ drawn(20, outputs, seed=7)
    E, v = anchors(Z, y, 4, balance=balance)

    def value(turn):
        return (1 - balance) * simplicity(Z.T @ E @ turn.T / 400) - balance * unevenness(v @ turn.T)

    best = value(torch.eye(4).double())
    for i in range(4):
        for j in range(i):
            for angle in (-1.5, -0.7, -0.1, 0.1, 0.7, 1.5):
                turn = torch.eye(4).double()
                turn[i, i] = turn[j, j] = math.cos(angle)
                turn[i, j] = math.sin(angle)
                turn[j, i] = -turn[i, j]
                assert value(turn) < best


def test_balance_trades_simplicity_for_even_shares(problem):
    Z, y = problem
    made = [anchors(Z, y, 5, balance=b) for b in (0.0, 0.2, 0.5, 0.8, 1.0)]
    simple = [simplicity(Z.T @ E / 400) for E, _ in made]
    uneven = [unevenness(v) for _, v in made]
    assert simple == sorted(simple, reverse=True) and simple[0] > simple[-1] + 0.02
    assert uneven == sorted(uneven, reverse=True) and uneven[0] > 0.3
    assert uneven[-1] == pytest.approx(1 / 5, abs=1e-9)


def test_even_shares_of_several_outputs(problem):
    Z, _ = problem
    v = anchors(Z, Z @ drawn(20, 3, seed=7), 4, balance=1.0).v
    torch.testing.assert_close(v.square().sum(0), v.square().sum().expand(4) / 4, rtol=1e-8, atol=0)


def test_finds_the_sources_of_an_output():
    """Three sources of unequal size, each read by three dimensions of its own, add up to the output."""
    sources = drawn(5000, 3) * torch.tensor([3.0, 2.0, 1.0])
    Z = sources.repeat_interleave(3, 1) + 0.1 * drawn(5000, 9, seed=6)
    E, v = anchors(Z, sources.sum(1, keepdim=True), 3)
    table = torch.corrcoef(torch.cat([E, sources], 1).T)[:3, 3:]
    assert float(table.diagonal().min()) > 0.99  # in order of what they give to the output
    torch.testing.assert_close(v, torch.tensor([[3.0, 2.0, 1.0]]).double(), rtol=0.05, atol=0)


def test_a_hand_worked_turn():
    """Loadings of two dimensions, each turned by 30 degrees out of an anchor of its own."""
    cos, sin = math.cos(math.pi / 6), 0.5
    L = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    torch.testing.assert_close(L @ _rotation(L, torch.ones(2, 1).double(), 0.0).T, torch.eye(2).double())
    # The forms of two angles: along the first axis stay, along the second turn by 45 degrees.
    assert _best_angle(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 3.0) == 0
    assert _best_angle(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), 3.0) == pytest.approx(math.pi / 4)
    assert _best_angle(torch.tensor([[1.5, 0.5], [0.5, 1.5]]), 3.0) == pytest.approx(math.pi / 8)


# --- the same on every processor


def test_noise_hardly_moves_the_anchors(problem):
    """Rounding of activations in single precision is smaller."""
    Z, y = problem
    for balance in (0.0, 0.3, 1.0):
        E, v = anchors(Z, y, 5, balance=balance)
        for seed in range(5):
            other = anchors(Z * (1 + 1e-6 * drawn(400, 20, seed=10 + seed)), y, 5, balance=balance)
            matched = torch.corrcoef(torch.cat([E, other.E], 1).T)[:5, 5:].diagonal()
            assert float(matched.min()) > 0.9999
            torch.testing.assert_close(other.v, v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 1e-12, -1e-12])
def test_where_angles_tie_the_pair_stays_as_it_is(noise):
    """Eight dimensions spread evenly over the half circle belong to no pair of axes more than to any other."""
    angles = torch.arange(8) * math.pi / 8
    L = torch.stack([angles.cos(), angles.sin()], 1).double() + noise * drawn(8, 2, seed=3)
    assert torch.equal(_rotation(L, torch.tensor([[2.0], [1.0]]).double(), 0.0), torch.eye(2).double())


@pytest.mark.parametrize("noise", [0.0, 1e-12, -1e-12])
def test_a_turn_by_half_a_right_angle_has_one_way_round(noise):
    """Both ways give the same anchors, in another order."""
    L = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) + noise * drawn(2, 2, seed=4)
    half = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(_rotation(L, torch.tensor([[1.0], [0.2]]).double(), 0.0), half, rtol=0, atol=1e-9)


def test_order_and_signs_by_rule():
    eye = torch.eye(3, dtype=torch.float64)
    L = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, -2.0]], dtype=torch.float64)
    # The largest share first; the other two tie, and the one that reconstructs more comes before.
    c = torch.tensor([[1.0 + 1e-9], [1.0], [-2.0]], dtype=torch.float64)
    assert _arranged(eye, L, c).tolist() == [[0, 0, -1], [0, 1, 0], [1, 0, 0]]
    # Of no weight: the sign of its largest loading.
    c = torch.tensor([[2.0, -3.0], [1.0, 0.0], [1e-9, -1e-9]], dtype=torch.float64)
    assert _arranged(eye, L, c).tolist() == [[-1, 0, 0], [0, 1, 0], [0, 0, -1]]
    keys = [torch.tensor([1.0, 1.0 + 1e-9, 2.0, 1.0 - 1e-9]), torch.tensor([0.0, 5.0, 0.0, 5.0 + 1e-9])]
    assert _descending(keys) == [2, 1, 3, 0]


def test_exchangeable_dimensions_give_the_same_anchors_up_to_rounding():
    """All sign patterns of four dimensions, two of which the output reads alike: no direction is ahead of its twin."""
    Z = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4).repeat(4, 1)
    Z = Z * torch.tensor([3.0, 3.0, 1.0, 1.0])
    y = Z.sum(1, keepdim=True)
    E, v = anchors(Z, y, 4)
    # Twins cannot be told apart, and only their sums vary with the output.
    wanted = torch.stack([Z[:, :2].sum(1) / (3 * 2**0.5), Z[:, 2:].sum(1) / 2**0.5], 1)
    torch.testing.assert_close(E, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(v, torch.tensor([[3 * 2**0.5, 2**0.5]], dtype=torch.float64))
    for seed in range(3):
        rows = torch.randperm(64, generator=torch.Generator().manual_seed(seed))  # another order of sums
        torch.testing.assert_close(anchors(Z[rows], y[rows], 4).E, E[rows], rtol=0, atol=1e-9)


def test_outputs_alike_in_size_are_taken_in_order():
    """Three uncorrelated outputs that vary as much with Z: the first gives the first direction."""
    Z = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    for outputs in ([0, 1, 2], [2, 0, 1]):
        E, v = anchors(Z, Z[:, outputs], 1)
        torch.testing.assert_close(E[:, 0], Z[:, outputs[0]])
        torch.testing.assert_close(v.T, torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-12)


def test_an_output_that_is_explained_needs_no_more_anchors():
    """White Z: the first score is the output itself, and all others would be rounding."""
    Z = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 5)
    y = Z @ torch.tensor([[1.0], [2.0], [3.0], [0.0], [0.0]])
    E, v = anchors(Z + 7, y, 3)
    assert E.shape == (32, 1) and v.shape == (1, 1)
    torch.testing.assert_close(E * v, y)


def test_nothing_linear_to_explain_gives_no_anchors():
    Z = torch.tensor([[-1.0], [1.0], [-2.0], [2.0]], dtype=torch.float64)
    E, v = anchors(Z, Z.square(), 2)
    assert E.shape == (4, 0) and v.shape == (1, 0)


# --- few directions, few outputs


def test_fewer_anchors_than_asked_where_z_has_fewer_directions():
    Z = drawn(100, 2) @ drawn(2, 9, seed=1)
    E, v = anchors(Z - Z.mean(0), (Z @ drawn(9, seed=2))[:, None], 5)
    assert E.shape == (100, 2) and v.shape == (1, 2)


def test_examples_of_no_weight_leave_no_score_twice():
    """Two of eight examples count; unweighted, the second score is what it is."""
    Z, w = drawn(8, 3), torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).double()
    E, _ = anchors(Z, drawn(8, 1, seed=1), 3, weight=w)
    torch.testing.assert_close(E.T @ E / 8, torch.eye(E.shape[1]).double(), rtol=0, atol=1e-9)


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
    with pytest.raises(ValueError, match="no activation varies; check"):
        anchors(torch.zeros(10, 3), drawn(10, 1).float(), 2)
