"""Matching beside all permutations, CKA beside its definition by kernels, and what neither may depend on."""

import itertools

import numpy as np
import pytest
import torch

from captum_xnn.metrics import matched_features
from captum_xnn.metrics._stability import linear_cka


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


A = drawn(40, 4)
B = drawn(40, 5, seed=1) + 0.5 * A[:, [0, 1, 2, 3, 0]]


@pytest.mark.parametrize("E_a, E_b", [(A, B), (B, A), (A, A[:, [1, 1, 0, 2]])])
def test_matching_beside_all_assignments(E_a, E_b):
    table = np.corrcoef(E_a.T, E_b.T)[: E_a.shape[1], E_a.shape[1] :]
    few, many = sorted(table.shape)
    wide = table if table.shape[0] == few else table.T
    best = max(
        np.mean([abs(wide[i, j]) for i, j in enumerate(order)]) for order in itertools.permutations(range(many), few)
    )
    found = matched_features(E_a, E_b)
    assert found.mean == pytest.approx(best, rel=1e-9)
    assert len(found.rows) == few == len(set(found.rows.tolist())) == len(set(found.columns.tolist()))
    for i, j, corr in zip(*found, strict=True):
        assert float(corr) == pytest.approx(table[i, j], abs=1e-12)


def test_order_sign_scale_and_shift_make_no_difference():
    order = [2, 0, 3, 1]
    changed = A[:, order] * torch.tensor([-1.0, 100, 1e-6, -3]) + torch.tensor([5.0, -1, 0, 1e3])
    found = matched_features(A, changed)
    assert found.rows.tolist() == [0, 1, 2, 3] and found.columns.tolist() == [1, 3, 0, 2]
    assert found.mean == pytest.approx(1, abs=1e-9)
    assert found.correlations.sign().tolist() == [1, -1, -1, 1]
    assert matched_features(changed, B).mean == pytest.approx(matched_features(A, B).mean, rel=1e-9)


def test_greedy_choice_is_not_enough():
    """The largest correlation first would leave a worse pair for the other."""
    x, y, z = torch.linalg.qr(drawn(50, 3) - drawn(50, 3).mean(0))[0].T
    E_a = torch.stack([x, 0.8 * x + 0.6 * y], 1)
    E_b = torch.stack([0.9 * x + 0.19**0.5 * y, x + 0.1 * z], 1)
    found = matched_features(E_a, E_b)
    assert found.columns.tolist() == [1, 0]


def test_dead_and_duplicate_features():
    dead = A.clone()
    dead[:, 1] = 0.1  # its mean is not exactly 0.1
    found = matched_features(dead, A)
    assert found.columns.tolist() == [0, 1, 2, 3] and found.correlations[1] == 0
    assert found.mean == pytest.approx(0.75)
    assert matched_features(dead.float(), A.float()).mean == pytest.approx(0.75, abs=1e-6)
    assert matched_features(torch.ones(5, 2), torch.zeros(5, 2)).mean == 0
    twice = matched_features(A, A[:, [0, 0, 0, 0]])
    assert twice.correlations.abs().max() == pytest.approx(1) and twice.mean < 0.6
    small = matched_features(A * 1e-9 + 1.0, A)  # small beside its mean, but live
    assert small.mean == pytest.approx(1, abs=1e-5)


def cka_by_kernels(E_a, E_b):
    """tr(K H L H) over its own two self-similarities, with the M x M kernels and centring matrix written out."""
    M = len(E_a)
    H = np.eye(M) - np.ones((M, M)) / M
    K, L = (H @ (e @ e.T) @ H for e in (E_a.numpy(), E_b.numpy()))
    return np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L))


def test_cka_by_kernels():
    assert linear_cka(A, B) == pytest.approx(cka_by_kernels(A, B), rel=1e-9)
    assert linear_cka(A + 5, B[:, :2]) == pytest.approx(cka_by_kernels(A, B[:, :2]), rel=1e-9)


def test_cka_sees_spaces():
    turned = A @ torch.linalg.qr(drawn(4, 4, seed=3))[0] * -7 + 2
    assert linear_cka(A, turned) == pytest.approx(1, abs=1e-9)
    assert linear_cka(turned, B) == pytest.approx(linear_cka(A, B), rel=1e-9)
    assert matched_features(A, turned).mean < 0.95
    assert linear_cka(A, A * torch.tensor([1.0, 1, 1, 9])) < 0.9  # one x-feature scaled is another space
    assert linear_cka(A, torch.full((40, 2), 0.1)) == 0 == linear_cka(torch.zeros(40, 1), A)
    half = torch.eye(4, dtype=torch.float64) - 0.25
    assert linear_cka(half[:, :1] + half[:, 1:2], half[:, :1] - half[:, 1:2]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("measure", [matched_features, linear_cka])
def test_errors(measure):
    with pytest.raises(ValueError, match="same M > 1 examples"):
        measure(A, B[:-1])
    with pytest.raises(
        ValueError, match=r"x-features are \(1, 4\) and \(1, 5\), not \(M, K\) and \(M, K'\) of the same M > 1 examples"
    ):
        measure(A[:1], B[:1])
    with pytest.raises(
        ValueError,
        match=r"x-features are \(40, 0\) and \(40, 5\), not \(M, K\) and \(M, K'\) of the same M > 1 examples",
    ):
        measure(A[:, :0], B)
    with pytest.raises(
        ValueError, match=r"x-features are \(40,\) and \(40, 5\), not \(M, K\) and \(M, K'\) of the same M > 1 examples"
    ):
        measure(A[:, 0], B)


@pytest.mark.parametrize("measure", [matched_features, linear_cka])
def test_what_is_not_finite_is_told(measure):
    """It would have been taken for a dead x-feature."""
    E = torch.rand(5, 2)
    for wrong in (torch.nan, torch.inf):
        bad = E.clone()
        bad[3, 1] = wrong
        for pair in ((bad, E), (E, bad)):
            with pytest.raises(ValueError, match="x-features are NaN or infinite"):
                measure(*pair)
