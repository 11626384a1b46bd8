"""The recipe: reproducible, standardised, balanced, and without degeneration where the plain recipe degenerates."""

import pytest
import torch
from captum.attr import InputXGradient
from torch import nn

from captum_xnn import XNNAttribution
from captum_xnn.models import SRAE, ConvSRAE, PaperSRAE
from captum_xnn.models._losses import covariance
from captum_xnn.models._objectives import RunningObjective
from captum_xnn.training import Recipe
from captum_xnn.training._fitting import fit
from captum_xnn.training._sampler import Sampler
from captum_xnn.training._trainer import Trainer

QUICK = Recipe(steps=400)


def problem(rows=600, seed=0):
    """A class of four parts: each is on in some examples, the output is their sum, Z a rectified mixture."""
    g = torch.Generator().manual_seed(seed)
    parts = (torch.rand(rows, 4, generator=g) < 0.2) * torch.rand(rows, 4, generator=g) * 3
    Z = (parts @ torch.randn(4, 40, generator=g) + 0.1 * torch.randn(rows, 40, generator=g)).relu()
    y = parts.sum(1, keepdim=True) * 2 - 1
    return Z, y, y[:, 0] > 4


def effective(contributions):
    share = contributions.abs().mean(0)
    share = share / share.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


@pytest.fixture(scope="module")
def fitted():
    Z, y, positives = problem()
    srae = SRAE(40, 4, hidden=(32, 16))
    history = fit(srae, Z, y, positives=positives, recipe=QUICK)
    return srae.requires_grad_(False), Z, y, positives, history


def test_balance_makes_x_features_begin_with_even_shares():
    """Shares of the output's variance that the anchors leave to the fit; uneven unless asked for."""
    Z, _, _ = problem()
    y = Z @ (torch.arange(40) < 5).float()[:, None]
    spread = []
    for balance in (0.0, 1.0):
        srae = SRAE(40, 4, hidden=())
        fit(srae, Z, y, recipe=Recipe(steps=300, balance=balance))
        share = srae.head.weight[0].detach().square()
        spread.append(float(share.max() / share.sum()))
    assert spread[0] > 0.5 and spread[1] < 0.4


def test_the_same_seed_gives_the_same_weights_and_spares_the_global_generator(fitted):
    srae, Z, y, positives, _ = fitted
    again = SRAE(40, 4, hidden=(32, 16))
    state = torch.get_rng_state()
    fit(again, Z, y, positives=positives, recipe=QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(srae.parameters(), again.parameters(), strict=True))


def test_two_seeds_find_the_same_features(fitted):
    srae, Z, y, positives, _ = fitted
    other = SRAE(40, 4, hidden=(32, 16))
    fit(other, Z, y, positives=positives, recipe=QUICK, seed=1)
    with torch.no_grad():
        table = torch.corrcoef(torch.cat([srae.encode(Z), other.encode(Z)], 1).T)[:4, 4:]
    assert sorted(table.argmax(1).tolist()) == [0, 1, 2, 3]
    assert float(table.max(1).values.min()) > 0.9


def test_features_are_standardised_speak_for_the_output_and_come_in_order(fitted):
    srae, Z, _, positives, _ = fitted
    E = srae.encode(Z)
    torch.testing.assert_close(E.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(E.std(0), torch.ones(4), rtol=1e-3, atol=0)
    assert bool((srae.head.weight > 0).all())
    mean = srae.contributions(E)[positives].mean(0)
    assert torch.equal(mean, mean.sort(descending=True).values)


def test_faithful_several_and_distinct(fitted):
    srae, Z, y, positives, _ = fitted
    made = srae(Z)
    assert float((made.y_bar - y).abs().mean() / y.std()) < 0.1
    assert effective(srae.contributions(made.E)[positives]) > 3
    table = torch.corrcoef(made.E.T).abs()
    assert float((table.sum() - 4) / 12) < 0.1


def test_eq_5_as_printed_degenerates_here():
    """What the test above would fail on."""
    Z, y, positives = problem()
    xnn = PaperSRAE(40, 4, hidden=(32, 16))
    fit(xnn, Z, y, positives=positives, recipe=Recipe(steps=1200))
    with torch.no_grad():
        E, y_bar, _ = xnn(Z)
        given = xnn.contributions(E)
        assert float((y_bar - y).abs().mean() / y.std()) < 0.1
        torch.testing.assert_close(given.sum(1, keepdim=True), y_bar)  # no bias beside them
        assert effective(given[positives]) < 2.5
        assert torch.equal(E, E.relu()) and float(E.std(0).min()) < 1e-6


def test_eq_5_as_printed_is_fitted_in_the_models_units(monkeypatch):
    """No scale, no anchors, no decay; x-features stay as learned, in order of contribution."""
    begun, given = [], []
    resume, arranged = Trainer._resume, PaperSRAE.reorder_features

    def spy(trainer, bar):
        begun.append(trainer)
        resume(trainer, bar)

    def reorder(xnn, order):
        given.append(xnn.encode(Z).detach())
        arranged(xnn, order)

    monkeypatch.setattr(Trainer, "_resume", spy)
    monkeypatch.setattr(PaperSRAE, "reorder_features", reorder)
    Z, y, positives = problem()
    xnn = PaperSRAE(40, 4, hidden=(32, 16))
    fit(xnn, Z, y, positives=positives, recipe=Recipe(steps=30))
    assert torch.equal(begun[0].Z, Z) and torch.equal(begun[0].y[0], y) and begun[0].anchored is None
    assert list(begun[0].stack.by_decay) == [0.0]
    E = xnn.encode(Z).detach()
    assert sorted(E.sum(0).tolist()) == pytest.approx(sorted(given[0].sum(0).tolist()), rel=1e-4)
    mean = xnn.contributions(E)[positives].mean(0)
    assert torch.equal(mean, mean.sort(descending=True).values)
    assert float(xnn.head.bias) == 0


@pytest.mark.filterwarnings("ignore:maps are zero")  # of dead x-features
def test_eq_5_as_printed_in_one_argument(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    data = torch.randn(300, 6)
    made = XNNAttribution(model, "1", 3, autoencoder=PaperSRAE, heatmap=InputXGradient, recipe=Recipe(steps=100))
    made.fit(data, target=[0, 2], progress=False).save(tmp_path / "saved")
    back = XNNAttribution.load(tmp_path / "saved", model, heatmap=InputXGradient)
    for target in (0, 2):
        why, again = (xnn.explain(data[:7], target=target) for xnn in (made, back))
        assert bool((why.features >= 0).all()) and float(why.features.max()) > 0
        torch.testing.assert_close(why.contributions.sum(1), why.surrogate)
        assert torch.equal(why.contributions, again.contributions) and torch.equal(why.maps, again.maps)


def test_history_falls(fitted):
    history = fitted[-1]
    assert history[-1].step == QUICK.steps - 1
    assert history[-1].faithfulness < 0.1 * history[0].faithfulness


@torch.no_grad()
def test_running_objective_agrees_with_the_full_batch(fitted):
    """Stated tolerance for a fixed network: 5 % of each term, averaged after a start."""
    srae, Z, y, _, _ = fitted
    full = srae.objective(Z, y, beta=0.5, eta=2.0, q=3.0, moments=covariance)
    running = RunningObjective(beta=0.5, eta=2.0, q=3.0, rho=0.02)
    g = torch.Generator().manual_seed(1)
    sums = torch.zeros(4)
    for step in range(1000):
        rows = torch.randint(len(Z), (64,), generator=g)
        terms = running(srae(Z[rows]), Z[rows], y[rows])
        if step >= 200:
            sums += torch.stack(list(terms)) / 800
    assert sums[:3].tolist() == pytest.approx([float(t) for t in full[:3]], rel=0.05)
    assert float(sums[3]) == pytest.approx(float(full.pull_away), abs=2e-3)


def test_positives_are_drawn_at_their_share_and_weights_undo_it():
    positives = torch.arange(1000) < 20
    sampler = Sampler(positives, 1000, Recipe(batch_size=64), torch.Generator().manual_seed(0))
    rows = torch.stack([sampler.draw() for _ in range(2000)])
    # 15 positives are drawn as such, and 49 rows of which one in 50 is positive: 16 of 64, but for rounding.
    assert sampler.counts == (49, 15)
    assert float(positives[rows].float().mean()) == pytest.approx((15 + 49 * 0.02) / 64, abs=2e-3)
    weight = sampler.weight(rows)
    assert float(weight.sum(1).mean()) == pytest.approx(1, rel=0.01)
    values = torch.arange(1000.0)
    assert float((values[rows] * weight).sum(1).mean()) == pytest.approx(499.5, rel=0.02)
    assert float((positives[rows] * weight).sum(1).mean()) == pytest.approx(0.02, rel=0.02)
    # The anchors see the whole set, weighted as batches are.
    assert float(sampler.row_weight[positives].sum() / 1000) == pytest.approx((15 + 49 * 0.02) / 64, abs=1e-6)
    assert float(sampler.row_weight.mean()) == pytest.approx(1, abs=1e-6)


def test_what_is_drawn_from_all_examples_does_not_depend_on_the_positives():
    made = [
        Sampler(torch.arange(100) < n, 100, Recipe(batch_size=16), torch.Generator().manual_seed(5)) for n in (2, 3)
    ]
    assert made[0].counts == made[1].counts
    for _ in range(3):
        a, b = (sampler.draw() for sampler in made)
        assert torch.equal(a[: made[0].counts[0]], b[: made[0].counts[0]])
        assert not torch.equal(a, b)


@pytest.mark.parametrize("positives", [None, torch.zeros(50, dtype=torch.bool), torch.ones(50, dtype=torch.bool)])
def test_without_a_shortage_of_positives_all_rows_count_alike(positives):
    sampler = Sampler(positives, 50, Recipe(batch_size=8), torch.Generator().manual_seed(0))
    assert len(sampler.draw()) == 8
    assert torch.equal(sampler.row_weight, torch.ones(50))


def test_feature_maps():
    g = torch.Generator().manual_seed(0)
    Z = torch.rand(300, 6, 4, 4, generator=g)
    # What three maps, their maxima in 2 x 2 windows and a plane of weights can say exactly.
    y = (Z[:, 0, :2, :2].amax((1, 2)) - 2 * Z[:, 1, 2:, 2:].amax((1, 2)))[:, None]
    srae = ConvSRAE((6, 4, 4), 3)
    fit(srae, Z, y)
    with torch.no_grad():
        E = srae.encode(Z)
        torch.testing.assert_close(E.std(0), torch.ones(3), rtol=1e-3, atol=0)
        assert float((srae(Z).y_bar - y).abs().mean() / y.std()) < 0.5


def test_more_features_than_directions():
    Z = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 8)
    srae = SRAE(8, 4, hidden=(16,))
    fit(srae, Z, Z[:, :1], recipe=QUICK)
    with torch.no_grad():
        assert srae.encode(Z).isfinite().all()
        assert float((srae(Z).y_bar - Z[:, :1]).abs().mean()) < 0.2


@pytest.mark.parametrize(
    ("Z", "y", "text"),
    [
        (torch.rand(1, 4), torch.rand(1, 1), "needs at least two examples, not 1; pass more data"),
        (torch.ones(9, 4), torch.rand(9, 1), "activations are the same for every example; check"),
        (torch.rand(9, 4), torch.full((9, 1), 3.0), "output is the same for every example; check"),
    ],
)
def test_what_cannot_be_learned_from(Z, y, text):
    with pytest.raises(ValueError, match=text):
        fit(SRAE(4, 2, hidden=()), Z, y)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "steps is 0; pass steps > 0"),
        ({"q": -1.0}, "q is -1.0; pass q > 0"),
        ({"beta": -0.1}, "beta >= 0"),
        ({"positive_share": 1.0}, "positive_share < 1"),
        ({"rho": 0.0}, "rho is 0.0; pass 0 < rho <= 1"),
        ({"balance": 1.5}, "balance is 1.5; pass 0 <= balance <= 1"),
    ],
)
def test_recipes_are_checked(settings, text):
    with pytest.raises(ValueError, match=text):
        Recipe(**settings)
