"""Removal curves, Shapley values and completeness, beside loops, all orders of players and the axioms."""

import itertools
from math import factorial

import pytest
import torch

from captum_xnn.metrics import deletion, insertion
from captum_xnn.metrics._concepts import (
    area,
    completeness,
    contribution_order,
    random_order,
    shapley_values,
    surrogate_score,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


C, BIAS = drawn(6, 4), drawn(6, seed=1)


# --- curves


@pytest.mark.parametrize("order", [contribution_order(C), random_order(C, seed=3), contribution_order(C).flip(1)])
def test_curves_by_loops(order):
    fallen, risen = deletion(surrogate_score(C, BIAS), order), insertion(surrogate_score(C, BIAS), order)
    for n in range(6):
        for step in range(5):
            out = set(order[n, :step].tolist())
            stay = float(BIAS[n]) + sum(float(C[n, k]) for k in range(4) if k not in out)
            back = float(BIAS[n]) + sum(float(C[n, k]) for k in out)
            assert float(fallen[n, step]) == pytest.approx(stay, abs=1e-12)
            assert float(risen[n, step]) == pytest.approx(back, abs=1e-12)


def test_curves_by_hand():
    contributions = torch.tensor([[1.0, -4.0, 2.0]])
    order = contribution_order(contributions)
    assert order.tolist() == [[1, 2, 0]]
    score = surrogate_score(contributions, 10.0)
    assert deletion(score, order).tolist() == [[9.0, 13.0, 11.0, 10.0]]
    assert insertion(score, order).tolist() == [[10.0, 6.0, 8.0, 9.0]]
    assert area(deletion(score, order)).item() == pytest.approx((9 / 2 + 13 + 11 + 10 / 2) / 3)


def test_deletion_falls_fastest_by_contribution():
    """Of all orders, with contributions that speak for the class; the reverse is the worst, a random one between."""
    contributions = C.abs()
    score = surrogate_score(contributions)
    best, worst = contribution_order(contributions), contribution_order(contributions).flip(1)
    areas = torch.stack(
        [area(deletion(score, torch.tensor(order).expand(6, 4))) for order in itertools.permutations(range(4))]
    )
    assert torch.allclose(area(deletion(score, best)), areas.amin(0))
    assert torch.allclose(area(deletion(score, worst)), areas.amax(0))
    assert torch.allclose(area(insertion(score, best)), areas.amax(0))
    between = area(deletion(score, random_order(contributions, seed=0)))
    assert (areas.amin(0) <= between + 1e-12).all() and (between < areas.amax(0)).any()


def test_signed_order_falls_fastest_with_signed_contributions():
    score = surrogate_score(C)
    areas = torch.stack([area(deletion(score, torch.tensor(o).expand(6, 4))) for o in itertools.permutations(range(4))])
    assert torch.allclose(area(deletion(score, C.argsort(1, descending=True))), areas.amin(0))


def test_deletion_and_insertion_of_the_surrogate_add_up():
    order = random_order(C, seed=5)
    score = surrogate_score(C, BIAS)
    assert torch.allclose(deletion(score, order) + insertion(score, order), (2 * BIAS + C.sum(1))[:, None].expand(6, 5))
    assert torch.allclose(insertion(score, order.flip(1)), deletion(score, order).flip(1))


def test_own_scores_see_what_is_kept():
    seen = []

    def score(kept):
        seen.append(kept.int().tolist())
        return kept.all(1).float()

    assert deletion(score, torch.tensor([[1, 0]])).tolist() == [[1.0, 0.0, 0.0]]
    assert seen == [[[1, 1]], [[1, 0]], [[0, 0]]]


def test_dead_and_duplicate_features():
    contributions = torch.tensor([[0.0, 2.0, 2.0, 0.0]])
    order = contribution_order(contributions)
    assert order.tolist() == [[1, 2, 0, 3]]  # equal ones in their own order
    assert deletion(surrogate_score(contributions), order).tolist() == [[4.0, 2.0, 0.0, 0.0, 0.0]]


def test_random_orders():
    order = random_order(torch.zeros(4000, 3), seed=0)
    assert torch.equal(order.sort(1).values, torch.arange(3).expand(4000, 3))
    counts = torch.unique(order, dim=0, return_counts=True)[1]
    assert len(counts) == 6 and (counts - 4000 / 6).abs().max() < 100  # 4 standard deviations
    assert torch.equal(order, random_order(torch.zeros(4000, 3), seed=0))
    assert not torch.equal(order, random_order(torch.zeros(4000, 3), seed=1))


def test_curve_errors():
    for order in (torch.tensor([[0, 0]]), torch.tensor([[1, 2]]), torch.tensor([0, 1])):
        for curve in (deletion, insertion):
            with pytest.raises(ValueError, match=r"with each x-feature 0 to K-1 once"):
                curve(surrogate_score(torch.zeros(1, 2)), order)
    with pytest.raises(ValueError, match="K > 0"):
        area(torch.zeros(3, 1))


# --- Shapley


def game(n, seed=0):
    """A set function with a random value for each subset, and its table."""
    table = drawn(2**n, seed=seed)

    def value(kept):
        return table[(kept.long() * 2 ** torch.arange(n)).sum(1)]

    return value, table


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_shapley_over_all_orders_of_players(n):
    value, table = game(n)
    wanted = [0.0] * n
    for order in itertools.permutations(range(n)):
        subset = 0
        for player in order:
            wanted[player] += float(table[subset | 1 << player] - table[subset]) / factorial(n)
            subset |= 1 << player
    assert shapley_values(value, n).tolist() == pytest.approx(wanted, abs=1e-12)


def test_shapley_value_of_a_contribution_is_itself():
    """In a linear head: v_i (E_i - mean), with the mean 0 that training gives, or any other."""
    E, v, mean = drawn(7, 5), drawn(5, seed=1), drawn(5, seed=2)

    def value(kept):  # removed x-features are at their mean
        return torch.where(kept[:, None], E, mean) @ v + 3.0

    assert torch.allclose(shapley_values(value, 5), (v * (E - mean)).T, atol=1e-12)
    score = surrogate_score(C, BIAS)
    assert torch.allclose(shapley_values(lambda kept: score(kept[:, None]), 4), C.T, atol=1e-12)


def test_efficiency():
    value, table = game(6)
    assert float(shapley_values(value, 6).sum()) == pytest.approx(float(table[-1] - table[0]), abs=1e-12)


def test_symmetry():
    value, _ = game(4)

    def alike(kept):  # players 1 and 3 can stand for each other
        return value(kept) + value(kept[:, [0, 3, 2, 1]])

    found = shapley_values(alike, 4)
    assert float(found[1]) == pytest.approx(float(found[3]), abs=1e-12) and abs(found[0] - found[2]) > 1e-3


def test_dummy():
    value, _ = game(3)

    def idle(kept):  # player 1 adds 2.5 to whomever it joins, player 4 nothing
        return value(kept[:, [0, 2, 3]]) + 2.5 * kept[:, 1]

    found = shapley_values(idle, 5)
    assert found[1].item() == pytest.approx(2.5) and abs(found[4].item()) < 1e-12
    assert torch.allclose(found[[0, 2, 3]], shapley_values(value, 3), atol=1e-12)


def test_linearity_and_many_games_at_once():
    (f, _), (g, _) = game(4), game(4, seed=1)
    both = shapley_values(lambda kept: torch.stack([f(kept), g(kept), 2 * f(kept) - 3 * g(kept)], 1), 4)
    assert both.shape == (4, 3)
    assert torch.allclose(both[:, 0], shapley_values(f, 4), atol=1e-12)
    assert torch.allclose(both[:, 2], 2 * both[:, 0] - 3 * both[:, 1], atol=1e-12)


def test_sixteen_players():
    weight = torch.arange(16.0)
    found = shapley_values(lambda kept: (kept * weight).sum(1) ** 2, 16)
    wanted = weight.double() * weight.sum()  # of (sum w)^2: w_i times the sum of all w
    assert torch.allclose(found, wanted, atol=1e-8)


def test_shapley_errors():
    for n in (0, 17):
        with pytest.raises(ValueError, match=f"n is {n} players, .* pass 1 to 16"):
            shapley_values(lambda kept: kept.sum(1), n)
    with pytest.raises(ValueError, match=r"values are \(3, 8\) for 8 subsets"):
        shapley_values(lambda kept: torch.zeros(3, 8), 3)
    with pytest.raises(ValueError, match=r"values are \(8, 1, 1\) for 8 subsets"):
        shapley_values(lambda kept: torch.zeros(8, 1, 1), 3)


# --- completeness


def test_completeness_by_hand():
    assert completeness(0.75, 1.0, 0.5) == 0.5
    assert completeness(0.9, 0.9, 0.1) == 1.0 and completeness(0.1, 0.9, 0.1) == 0.0
    assert completeness(0.0, 1.0, 0.5) == -1.0
    assert completeness(torch.tensor([0.5, 1.0]), 1.0, 0.5).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"the model's score .* is no better than chance"):
        completeness(0.1, 0.1, 0.1)


def test_completeness_of_errors_is_the_coefficient_of_determination():
    from sklearn.metrics import r2_score

    y, y_bar = drawn(50), drawn(50) + 0.3 * drawn(50, seed=2)
    found = completeness(-float((y - y_bar).square().mean()), 0.0, -float(y.var(correction=0)))
    assert found == pytest.approx(r2_score(y, y_bar))


def test_shapley_shares_of_completeness_sum_to_it():
    """ConceptSHAP: accuracies of all subsets of x-features, in two classes told apart by the surrogate's sign."""
    y = C.sum(1) > 0

    def eta(kept):
        accuracy = ((surrogate_score(C)(kept[:, None]) > 0) == y).double().mean(1)
        return completeness(accuracy, 1.0, 0.5)

    found = shapley_values(eta, 4)
    nothing = completeness(float((~y).double().mean()), 1.0, 0.5)
    assert float(found.sum()) == pytest.approx(1.0 - nothing) and found.abs().max() > 0
