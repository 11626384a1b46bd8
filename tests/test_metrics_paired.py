"""Paired tests beside their definitions: all sign patterns counted, ranks by hand, intervals that cover."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, wilcoxon

from captum_xnn.metrics import paired_test

A = [0.8, 0.7, 0.9, 0.6, 0.7, 0.9, 0.5, 1.0]
B = [0.6, 0.5, 0.6, 0.7, 0.7, 0.4, 0.4, 0.6]


def test_permutation_counts_all_sign_patterns():
    d = [round(a - b, 9) for a, b in zip(A, B, strict=True)]
    means = [sum(s * x for s, x in zip(signs, d, strict=True)) for signs in itertools.product((1, -1), repeat=len(d))]
    wanted = sum(abs(m) >= abs(sum(d)) - 1e-9 for m in means) / len(means)
    found = paired_test(A, B, seed=0)
    assert found.permutation == pytest.approx(wanted) and 0 < wanted < 0.1
    assert found.difference == pytest.approx(sum(d) / len(d))


def test_ranks_by_hand():
    """Differences 2 2 3 -1 0 5 1 4 tenths: without the 0 the ranks are 3.5 3.5 5 -1.5 - 7 1.5 6 of 28."""
    found = paired_test(A, B, seed=0)
    assert found.effect == pytest.approx((28 - 2 * 1.5) / 28)
    tenths = np.array([2, 2, 3, -1, 5, 1, 4])
    assert rankdata(abs(tenths)).tolist() == [3.5, 3.5, 5, 1.5, 7, 1.5, 6]
    assert found.wilcoxon == pytest.approx(wilcoxon(tenths).pvalue)


def test_swapping_the_conditions_turns_the_signs():
    one, other = paired_test(A, B, seed=0), paired_test(B, A, seed=0)
    assert (one.difference, one.effect) == (-other.difference, -other.effect)
    assert (one.wilcoxon, one.permutation) == (other.wilcoxon, other.permutation)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.01)
    assert one.low < one.difference < one.high
    wider = paired_test(A, B, seed=0, confidence=0.99)
    assert wider.low < one.low and wider.high > one.high


def test_units_and_pairing():
    one = paired_test(A, B, seed=0)
    for unit in (100, 1e-15, -3e12):
        for dtype in (torch.float64, torch.float32):
            found = paired_test(unit * torch.tensor(A, dtype=dtype), unit * torch.tensor(B, dtype=dtype), seed=0)
            turned = 1 if unit > 0 else -1
            assert found.difference == pytest.approx(unit * one.difference, rel=1e-6)
            assert sorted([found.low, found.high]) == pytest.approx(
                sorted([unit * one.low, unit * one.high]), rel=0.1, abs=0
            )
            assert found[3:] == pytest.approx((one.wilcoxon, one.permutation, turned * one.effect))
    shuffled = [A[i] for i in (3, 1, 4, 0, 2, 7, 5, 6)], [B[i] for i in (3, 1, 4, 0, 2, 7, 5, 6)]
    again = paired_test(*shuffled, seed=0)
    assert (again.wilcoxon, again.permutation) == pytest.approx((one.wilcoxon, one.permutation))
    assert paired_test(A, B[::-1], seed=0).permutation != pytest.approx(one.permutation)


def test_the_last_bits_do_not_count():
    assert 0.8 - 0.7 != 0.4 - 0.3 and 0.1 + 0.2 != 0.3
    assert paired_test([0.8, 0.3, 0.1 + 0.2], [0.7, 0.4, 0.3], seed=0)[3:] == (1.0, 1.0, 0.0)


def test_no_difference_is_no_evidence():
    found = paired_test([0.3, 0.1, 0.7], [0.3, 0.1, 0.7], seed=0)
    assert found == (0.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    assert paired_test([1.0, 0.0], [0.0, 1.0], seed=0).effect == 0.0


def test_many_pairs_are_sampled_with_the_seed():
    generator = np.random.default_rng(0)
    b = generator.normal(size=60)
    a = b + generator.normal(0.3, 1, size=60)
    one = paired_test(a.tolist(), b.tolist(), seed=1, resamples=2000)
    assert one == paired_test(a.tolist(), b.tolist(), seed=1, resamples=2000)
    assert one != paired_test(a.tolist(), b.tolist(), seed=2, resamples=2000)
    # The interval of a mean of 60 is close to the normal one, and the sign flips' p-value to the signed-rank test's.
    half = 1.96 * (a - b).std() / 60**0.5
    assert one.low == pytest.approx(one.difference - half, abs=0.1 * half)
    assert one.high == pytest.approx(one.difference + half, abs=0.1 * half)
    assert one.permutation == pytest.approx(one.wilcoxon, abs=0.05)


def test_intervals_cover_the_truth_and_null_p_values_are_uniform():
    generator = np.random.default_rng(3)
    found = [
        paired_test(generator.normal(size=20), np.zeros(20), seed=i, resamples=200, confidence=0.8) for i in range(200)
    ]
    assert 0.7 < np.mean([f.low <= 0 <= f.high for f in found]) < 0.87
    assert 0.13 < np.mean([f.permutation <= 0.2 for f in found]) < 0.28


def test_errors():
    with pytest.raises(ValueError, match="P >= 2 people"):
        paired_test([1.0], [2.0], seed=0)
    with pytest.raises(ValueError, match=r"scores a and b are \(2,\) and \(3,\), finite: True"):
        paired_test([1.0, 2.0], [1.0, 2.0, 3.0], seed=0)
    with pytest.raises(ValueError, match="finite: False"):
        paired_test([1.0, float("nan")], [1.0, 2.0], seed=0)


def test_halves():
    a, b = torch.tensor([0.75, 0.5, 1.0]), torch.tensor([0.25, 0.5, 0.5])
    assert paired_test(a.bfloat16(), b.bfloat16(), seed=0) == paired_test(a, b, seed=0)
