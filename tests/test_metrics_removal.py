"""Selectivity by hand and by loops, rank correlations against SciPy, and what the controls score."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from captum_xnn.metrics import selectivity
from captum_xnn.metrics._removal import pair_share, single_deletion, within_part


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_definition_written_again():
    changes, weights = randn(4, 3, 5), randn(4, 3, seed=1).abs()
    plain = weighted = total = total_weight = 0.0
    for n in range(4):
        for k in range(3):
            moved = [abs(float(c)) for c in changes[n, k]]
            share = max(moved) / sum(moved)
            plain, total = plain + share * sum(moved), total + sum(moved)
            weighted, total_weight = weighted + share * float(weights[n, k]), total_weight + float(weights[n, k])
    found = selectivity(changes)
    assert found.share == pytest.approx(plain / total) and found.even == pytest.approx(1 / 5)
    assert selectivity(changes, weights).share == pytest.approx(weighted / total_weight)
    whole = np.abs(changes.numpy().sum(1))
    assert found.whole == pytest.approx(whole.max(1).sum() / whole.sum())
    assert found.movement == pytest.approx(total / whole.sum())


def test_worked_by_hand():
    """One x-feature moves by 3, 1, 0, the other by 0, 0, -2: (3 + 2) / 6; their sum by 3, 1, -2: 3 / 6."""
    found = selectivity(torch.tensor([[[3.0, 1.0, 0.0], [0.0, 0.0, -2.0]]]))
    assert found == pytest.approx((5 / 6, 3 / 6, 1 / 3, 1.0))


def test_an_x_feature_for_each_part_and_x_features_that_move_alike():
    own = torch.eye(5).expand(3, 5, 5) * torch.tensor([5.0, -1, 2, 4, 3])[:, None]
    found = selectivity(own)
    assert found.share == 1 and found.whole == pytest.approx(5 / 15) and found.movement == 1
    alike = own.sum(1, keepdim=True) * torch.tensor([0.5, 0.1, 0.4])[:, None]
    assert selectivity(alike).share == pytest.approx(selectivity(alike).whole) == pytest.approx(found.whole)
    assert selectivity(torch.full((2, 3, 4), 0.7)).share == pytest.approx(0.25)


def test_random_divisions_of_an_output_move_as_it_does():
    """Many dimensions, each with the output's profile and noise, in random groups: no better than the whole."""
    profile = torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0])
    dimensions = profile * randn(6, 500, 1).abs() + 0.1 * randn(6, 500, 5, seed=1)
    changes = dimensions.unflatten(1, (5, 100)).sum(2)
    found = selectivity(changes)
    assert found.share == pytest.approx(found.whole, abs=0.02) and found.whole == pytest.approx(0.5, abs=0.02)


def test_cancelling_shows_in_the_movement():
    """Two x-features of opposite signs look selective; what they add is nothing."""
    honest = torch.tensor([[[1.0, 1.0]]])
    padded = torch.cat([honest, torch.tensor([[[9.0, 0.0], [-9.0, 0.0]]])], 1)
    found = selectivity(padded)
    assert found.share == pytest.approx(19 / 20) and found.whole == 0.5 and found.movement == pytest.approx(10)
    assert selectivity(padded[:, 1:]).movement == math.inf and math.isnan(selectivity(padded[:, 1:]).whole)


def test_what_does_not_move_says_nothing():
    changes = randn(3, 2, 4)
    dead = torch.cat([changes, torch.zeros(3, 1, 4)], 1)
    assert selectivity(dead) == pytest.approx(selectivity(changes))
    assert selectivity(dead, torch.ones(3, 3)).share == pytest.approx(selectivity(changes, torch.ones(3, 2)).share)
    nothing = selectivity(torch.zeros(3, 2, 4))
    assert math.isnan(nothing.share) and math.isnan(nothing.whole) and math.isnan(nothing.movement)
    assert nothing.even == 0.25


def test_order_and_scale():
    changes = randn(3, 4, 5)
    wanted = selectivity(changes)
    assert selectivity(-3 * changes[:, [2, 0, 3, 1]][:, :, [4, 3, 0, 1, 2]]) == pytest.approx(wanted)
    assert selectivity(changes.float()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("digits", [8, 0])  # 0 makes ties
def test_rank_correlations_are_scipys(digits):
    importances, drops = (randn(9, 5, seed=s).round(decimals=digits) for s in (0, 1))
    over_parts = [spearmanr(a, b).statistic for a, b in zip(importances, drops, strict=True)]
    np.testing.assert_allclose(single_deletion(importances, drops), over_parts, atol=1e-12)
    over_images = [spearmanr(importances[:, p], drops[:, p]).statistic for p in range(5)]
    np.testing.assert_allclose(within_part(importances, drops), over_images, atol=1e-12)


def test_area_is_beaten_within_parts_only():
    """Drops are a part's size times what the image makes of it: size orders parts, and no images."""
    size = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]).double()
    use = 1 + randn(50, 5).abs()
    drops, area = size * use, size.expand(50, 5)
    assert float(single_deletion(area, drops).mean()) > 0.95
    assert within_part(area, drops).tolist() == [0] * 5
    assert within_part(use, drops).tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        (torch.ones(2, 3), None, r"changes are \(2, 3\), not \(N, K, P\) of at least one part; give a single"),
        (torch.ones(2, 0, 3), None, r"changes are \(2, 0, 3\), not \(N, K, P\) of at least one part"),
        (torch.full((1, 1, 2), math.nan), None, "changes are NaN or infinite"),
        (torch.ones(2, 3, 4), torch.ones(2, 4), r"weights are \(2, 4\), not \(2, 3\)"),
        (torch.ones(2, 3, 4), -torch.ones(2, 3), "weights are from -1 to -1; pass finite ones that are not negative"),
    ],
)
def test_other_changes_are_refused(changes, weights, message):
    with pytest.raises(ValueError, match=message):
        selectivity(changes, weights)


@pytest.mark.parametrize("measure", [single_deletion, within_part])
def test_other_importances_are_refused(measure):
    with pytest.raises(ValueError, match=r"importances are \(2, 3\) and drops \(3, 2\), not both \(N, P\)"):
        measure(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="values are NaN or infinite"):
        measure(torch.full((2, 3), math.nan), torch.ones(2, 3))


def assignments(parts, features):
    """All ways to give each part an x-feature of its own."""
    return itertools.permutations(range(features), parts)


def test_pair_share_by_trying_every_assignment():
    changes, parts = randn(9, 4), torch.tensor([7, 2, 2, 7, 5, 2, 5, 7, 5])
    numbers = [2, 5, 7]
    carried, most, total = ({p: 0.0 for p in numbers} for _ in range(3))
    for n in range(9):
        shares = {}
        for p in numbers:
            sums = [sum(abs(float(changes[m, k])) for m in range(9) if m != n and parts[m] == p) for k in range(4)]
            shares[p] = [s / sum(sums) for s in sums]
        best = max(assignments(3, 4), key=lambda ks: sum(shares[p][k] for p, k in zip(numbers, ks, strict=True)))
        p, own = int(parts[n]), [abs(float(c)) for c in changes[n]]
        k = best[numbers.index(p)]
        carried[p], total[p] = carried[p] + own[k], total[p] + sum(own)
        most[p] += own[k] == max(own)
    found = pair_share(changes, parts)
    assert found.share == pytest.approx(sum(carried[p] / total[p] for p in numbers) / 3)
    assert found.most == pytest.approx(sum(most[p] / 3 for p in numbers) / 3)


def test_pair_share_of_a_perfect_division_and_of_one_large_x_feature():
    parts = torch.arange(3).repeat(20)
    own = torch.nn.functional.one_hot(parts, 5) * randn(60, 1)
    found = pair_share(own, parts)
    assert found.share == found.most == 1 and found.share_by_chance < 0.5 and found.most_by_chance < 0.5
    assert pair_share(own[:, [3, 0, 4, 2, 1]], parts) == pytest.approx(found)
    # The x-feature that carries everything is the own one of a single part.
    large = torch.nn.functional.one_hot(torch.zeros(60, dtype=torch.long), 5) * randn(60, 1)
    assert pair_share(large, parts).share == pytest.approx(1 / 3, abs=0.02)


def test_pair_share_is_by_chance_where_the_part_says_nothing():
    found = pair_share(randn(600, 5), torch.arange(3).repeat(200))
    assert found.share == pytest.approx(found.share_by_chance, abs=0.02) == pytest.approx(0.2, abs=0.03)


def test_pair_share_leaves_out_parts_that_move_nothing_and_counts_parts_without_x_feature():
    changes = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    parts = torch.tensor([0, 0, 1, 1, 2, 2])
    assert pair_share(changes, parts)[::2] == (1.0, 1.0)
    assert pair_share(changes[:, :1] + changes[:, 1:], parts).share == pytest.approx(0.5)  # two parts, one x-feature
    assert all(math.isnan(value) for value in pair_share(0 * changes, parts))


def test_pair_share_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match=r"changes are \(4, 2\) and parts \(3,\)"):
        pair_share(randn(4, 2), torch.arange(3))
    with pytest.raises(ValueError, match="part 5 has a single pair"):
        pair_share(randn(3, 2), torch.tensor([1, 5, 1]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        pair_share(randn(2, 2) / 0, torch.tensor([0, 0]))
