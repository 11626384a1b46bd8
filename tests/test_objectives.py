"""The written-out derivatives of Eq. 5 with running statistics, against autograd in float64."""

import pytest
import torch

from captum_xnn.models._base import Reconstruction
from captum_xnn.models._losses import RunningMean, log_penalty, pull_away_and_slope, pull_away_of_moments
from captum_xnn.models._objectives import RunningObjective

M, N = 11, 4
SETTINGS = {"beta": 0.7, "eta": 1.3, "q": 2.5, "rho": 0.3}


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("of_explainers", [(), (3,)])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_slope_of_the_pull_away_term(of_explainers, n):
    E = drawn(*of_explainers, M, n)
    G = (E.mT @ E).requires_grad_()
    value, slope = pull_away_and_slope(G.detach())
    wanted = pull_away_of_moments(G)
    torch.testing.assert_close(value, wanted.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(wanted.sum(), G)[0])


def test_a_dead_feature_has_no_slope():
    E = drawn(M, N)
    E[:, 1] = 0
    value, slope = pull_away_and_slope(E.T @ E)
    others = [0, 2, 3]
    of_others, slope_of_others = pull_away_and_slope((E.T @ E)[others][:, others])
    share = 3 * 2 / (4 * 3)  # pairs of three x-features among those of four
    assert float(value) == pytest.approx(share * float(of_others))
    assert not slope[1].any() and not slope[:, 1].any()
    torch.testing.assert_close(slope[others][:, others], share * slope_of_others)


class ByAutograd:
    """Eq. 5 of one explainer, with derivatives by autograd."""

    def __init__(self, *, beta, eta, q, rho, centred):
        self.beta, self.eta, self.q, self.centred = beta, eta, q, centred
        self.mean, self.moments, self.errors = RunningMean(rho), RunningMean(rho), RunningMean(rho)

    def __call__(self, made, Z, y_hat, weight):
        Q = self.errors(((made.Z_tilde - Z) ** 2).mean(0).flatten())
        w = torch.ones(len(Z), dtype=Z.dtype) if weight is None else weight
        w = torch.diag(w / w.sum())
        E = made.E
        if self.centred:
            E = E - self.mean(w.sum(0) @ E).detach()
        pull = pull_away_of_moments(self.moments(E.T @ w @ E))
        faithful = ((made.y_bar - y_hat) ** 2).sum() / len(Z)
        return faithful + self.beta * log_penalty(Q, self.q) + self.eta * pull


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(6,), (2, 3, 3)])
def test_gradients_are_those_of_autograd(centred, weighted, shape):
    """Three explainers at once, on the second batch: statistics then differ from those of the batch."""
    of_each = [ByAutograd(**SETTINGS, centred=centred) for _ in range(3)]
    running = RunningObjective(**SETTINGS, centred=centred)
    factor = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)  # derivatives follow the chain rule
    for seed in (10, 20):
        Z, y_hat = drawn(3, M, *shape, seed=seed), drawn(3, M, 2, seed=seed + 1)
        made = Reconstruction(
            *(drawn(3, M, *s, seed=seed + 2 + i).requires_grad_() for i, s in enumerate(((N,), (2,), shape)))
        )
        weight = drawn(3, M, seed=seed + 5).abs() if weighted else None
        total = running(made, Z, y_hat, weight=weight).total
        wanted = torch.stack(
            [
                loss(Reconstruction(*(part[t] for part in made)), Z[t], y_hat[t], weight[t] if weighted else None)
                for t, loss in enumerate(of_each)
            ]
        )
        torch.testing.assert_close(total, wanted)
        found = torch.autograd.grad((factor * total).sum(), made)
        for own, its in zip(found, torch.autograd.grad((factor * wanted).sum(), made), strict=True):
            torch.testing.assert_close(own, its)
