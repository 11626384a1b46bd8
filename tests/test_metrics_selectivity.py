"""Selectivity by hand and by loops, rank correlations against SciPy, and what the controls score."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from captum_xnn.metrics import selectivity
from captum_xnn.metrics._removal import single_deletion, within_part


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
        (torch.ones(2, 3, 4), -torch.ones(2, 3), "finite and not negative, got -1 to -1; take absolute"),
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
