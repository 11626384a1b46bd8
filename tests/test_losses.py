"""Eq. 1, 2 and 3 written a second time, in float64 with loops, and the running statistics against the full batch."""

import math

import pytest
import torch
from torch import nn

from captum_xnn.models._losses import (
    RunningMean,
    covariance,
    faithfulness,
    log_loss,
    log_penalty,
    pull_away,
    pull_away_of_moments,
    reconstruction_error,
    second_moments,
    sparse_reconstruction,
)

M, D, N = 13, 7, 4


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WEIGHT = drawn(M, seed=9).abs()


def weights(given):
    """The weight of each example in a mean."""
    return [1 / M] * M if given is None else [float(w) / float(given.sum()) for w in given]


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("shape", [(M,), (M, 3)])
def test_equation_1(weight, shape):
    y_bar, y_hat = drawn(*shape), drawn(*shape, seed=1)
    wanted = 0.0
    for i, w in enumerate(weights(weight)):
        rows = zip(y_bar[i].reshape(-1).tolist(), y_hat[i].reshape(-1).tolist(), strict=True)
        wanted += w * sum((a - b) ** 2 for a, b in rows)
    assert float(faithfulness(y_bar, y_hat, weight=weight)) == pytest.approx(wanted, rel=1e-12)


def test_equation_1_with_log_loss():
    y_bar, y_hat = drawn(M), drawn(M, seed=1)
    wanted = 0.0
    for a, b in zip(y_bar.tolist(), y_hat.tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-b)), 1 / (1 + math.exp(-a))
        wanted -= (p * math.log(q) + (1 - p) * math.log(1 - q)) / M
    assert float(faithfulness(y_bar, y_hat, loss=log_loss)) == pytest.approx(wanted, rel=1e-12)


def test_faithfulness_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"y_bar has shape \(13,\) and y_hat \(13, 1\); reshape"):
        faithfulness(drawn(M), drawn(M, 1))


@pytest.mark.parametrize("q", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_equation_2(weight, q):
    Z_tilde, Z = drawn(M, D), drawn(M, D, seed=1)
    wanted = 0.0
    for k in range(D):
        Q = sum(w * float(Z_tilde[i, k] - Z[i, k]) ** 2 for i, w in enumerate(weights(weight)))
        wanted += math.log(1 + q * Q) / D
    assert float(sparse_reconstruction(Z_tilde, Z, q=q, weight=weight)) == pytest.approx(wanted, rel=1e-12)


def test_every_unit_of_a_feature_map_is_a_dimension():
    Z_tilde, Z = drawn(M, 2, 3, 3), drawn(M, 2, 3, 3, seed=1)
    flat = sparse_reconstruction(Z_tilde.flatten(1), Z.flatten(1))
    assert torch.equal(sparse_reconstruction(Z_tilde, Z), flat)
    assert reconstruction_error(Z_tilde, Z).shape == (18,)


def test_log_penalty_needs_a_positive_q():
    with pytest.raises(ValueError, match="q is 0; pass q > 0"):
        log_penalty(torch.ones(3), 0)


def looped_pull_away(E, weight):
    total = 0.0
    w = torch.tensor(weights(weight), dtype=torch.float64)
    for a in range(N):
        for b in range(N):
            if a != b:
                x, y = E[:, a] * w.sqrt(), E[:, b] * w.sqrt()
                total += float(x @ y / (x.norm() * y.norm())) ** 2
    return total / (N * (N - 1))


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_equation_3(weight):
    E = drawn(M, N) + 0.5
    assert float(pull_away(E, weight=weight)) == pytest.approx(looped_pull_away(E, weight), rel=1e-12)


def test_pull_away_is_0_for_orthogonal_and_1_for_parallel_features():
    assert float(pull_away(torch.linalg.qr(drawn(M, N))[0])) == pytest.approx(0, abs=1e-28)
    assert float(pull_away(drawn(M, 1) * torch.tensor([1.0, -2.0, 0.1, 7.0]))) == pytest.approx(1, rel=1e-12)


def test_pull_away_does_not_see_factors():
    """Why taking it on v * E, as the authors' code does, changes nothing."""
    E = drawn(M, N)
    assert float(pull_away(E * torch.tensor([3.0, -0.2, 1e-3, 40.0]))) == pytest.approx(float(pull_away(E)), rel=1e-12)


def test_centred_pull_away_is_the_mean_squared_correlation():
    E = drawn(M, N).abs()
    table = torch.corrcoef(E.T) ** 2
    wanted = float((table.sum() - N) / (N * (N - 1)))
    assert float(pull_away(E - E.mean(0))) == pytest.approx(wanted, rel=1e-12)
    assert float(pull_away_of_moments(covariance(E))) == pytest.approx(wanted, rel=1e-12)
    assert float(pull_away(E)) > 0.3 > 0.1 > wanted, "non-negative features are far from orthogonal, and independent"


def test_covariance_with_weights():
    E = drawn(M, N)
    w = WEIGHT / WEIGHT.sum()
    mean = sum(w[i] * E[i] for i in range(M))
    wanted = sum(w[i] * torch.outer(E[i] - mean, E[i] - mean) for i in range(M))
    torch.testing.assert_close(covariance(E, weight=WEIGHT), wanted, rtol=1e-12, atol=1e-14)


def test_a_dead_feature_counts_as_orthogonal():
    E = drawn(M, N)
    E[:, 1] = 0
    alive = E[:, [0, 2, 3]]
    assert float(pull_away(E)) == pytest.approx(float(pull_away(alive)) * 6 / 12, rel=1e-12)
    assert float(pull_away(drawn(M, 1))) == 0
    assert float(pull_away(torch.zeros(M, N))) == 0


@pytest.mark.parametrize("size", [1e-10, 1e-19, 1e-25, 1e-38, 1e-45, 0.0])
def test_a_dying_feature_makes_no_nan(size):
    G = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    scale = torch.tensor([1.0, size])
    G = (G * scale[:, None].sqrt() * scale.sqrt()).requires_grad_()
    value = pull_away_of_moments(G)
    value.backward()
    assert 0 <= float(value.detach()) <= 0.25001 and G.grad.isfinite().all()


def test_running_mean_by_hand():
    mean = RunningMean(0.25)
    given = [float(mean(torch.tensor(x))) for x in (8.0, 0.0, 4.0)]
    # Weights .25, then .75 * .25 and .25, then .75^2 * .25, .75 * .25 and .25, each set divided by its sum.
    wanted = [8.0, 8 * 0.1875 / 0.4375, (8 * 0.140625 + 4 * 0.25) / 0.578125]
    assert given == pytest.approx(wanted, rel=1e-6)
    assert float(RunningMean(1.0)(torch.tensor(3.0))) == 3
    with pytest.raises(ValueError, match="rho is 0; pass 0 < rho <= 1"):
        RunningMean(0)


def test_mini_batches_alone_are_biased_and_running_means_are_not():
    """Independent features: the pull-away term of a batch is about 1 / batch, not 0. Tolerance: a tenth of that."""
    g = torch.Generator().manual_seed(3)
    E = torch.randn(4000, N, generator=g)
    full = float(pull_away(E))
    alone, running, mean = [], [], RunningMean(0.02)
    for _ in range(600):
        batch = E[torch.randint(len(E), (16,), generator=g)]
        alone.append(float(pull_away(batch)))
        running.append(float(pull_away_of_moments(mean(second_moments(batch)))))
    assert sum(alone) / 600 == pytest.approx(1 / 16, rel=0.2)
    assert full < 1e-3
    assert sum(running[200:]) / 400 == pytest.approx(full, abs=0.1 / 16)


def test_gradients_through_running_means_are_those_of_the_full_batch():
    """Averaged over batches of a fixed network; stated tolerance: cosine above 0.99, length within 10 %."""
    g = torch.Generator().manual_seed(4)
    Z = torch.randn(2000, 6, generator=g) @ torch.randn(6, 6, generator=g)
    encoder, decoder = nn.Linear(6, 3, bias=False), nn.Linear(3, 6)

    def objective(z, moments, errors):
        E = encoder(z)
        return pull_away_of_moments(moments(second_moments(E))) + log_penalty(
            errors(reconstruction_error(decoder(E), z)), 5.0
        )

    def as_it_is(statistic):
        return statistic

    (full,) = torch.autograd.grad(objective(Z, as_it_is, as_it_is), encoder.weight)
    moments, errors = RunningMean(0.02), RunningMean(0.02)
    total, plain = torch.zeros_like(full), torch.zeros_like(full)
    for step in range(1200):
        batch = Z[torch.randint(len(Z), (32,), generator=g)]
        (grad,) = torch.autograd.grad(objective(batch, moments, errors), encoder.weight)
        if step >= 200:
            total += grad / 1000
            plain += torch.autograd.grad(objective(batch, as_it_is, as_it_is), encoder.weight)[0] / 1000
    assert float(torch.cosine_similarity(total.flatten(), full.flatten(), dim=0)) > 0.99
    assert float(total.norm() / full.norm()) == pytest.approx(1, abs=0.1)
    assert float((total - full).norm()) < float((plain - full).norm())
