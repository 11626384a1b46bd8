"""Eq. 5 from the weights by matrices, and rewritings that must change units and nothing else."""

import math

import pytest
import torch
from torch.nn import functional as F

from captum_xnn._distributed import ALONE
from captum_xnn.models import SRAE, ConvSRAE, PaperSRAE
from captum_xnn.models._base import Scaling, Weights
from captum_xnn.models._losses import covariance, second_moments

M = 11


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense():
    srae = SRAE(6, 3, hidden=(5, 4), n_outputs=2).double()
    srae.reset(torch.Generator().manual_seed(1))
    return srae, drawn(M, 6)


def convolutional():
    srae = ConvSRAE((4, 5, 6), 3, hidden=(7,), n_outputs=2, pool=2).double()
    srae.reset(torch.Generator().manual_seed(1))
    return srae, drawn(M, 4, 5, 6)


def affine(layer, x):
    return x @ layer.weight.flatten(1).T + layer.bias


def by_hand(srae, Z):
    """E, y_bar and Z_tilde by matrix algebra."""
    if isinstance(srae, SRAE):
        hidden = affine(srae.encoder[2], affine(srae.encoder[0], Z).clamp(min=0)).clamp(min=0)
        E = affine(srae.encoder[4], hidden)
        hidden = affine(srae.decoder[2], affine(srae.decoder[0], E).clamp(min=0)).clamp(min=0)
        return E, affine(srae.head, E), affine(srae.decoder[4], hidden)
    cells = Z.permute(0, 2, 3, 1)
    maps = affine(srae.encoder[2], affine(srae.encoder[0], cells).clamp(min=0))
    E = torch.empty(len(Z), 3, dtype=Z.dtype)
    for m in range(len(Z)):
        for k in range(3):
            value = srae.planes.bias[k]
            for i in range(2):
                for j in range(3):
                    pooled = maps[m, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, k].max()
                    value = value + srae.planes.weight[k, 0, i, j] * pooled
            E[m, k] = value
    Z_tilde = affine(srae.decoder[2], affine(srae.decoder[0], maps).clamp(min=0)).permute(0, 3, 1, 2)
    return E, affine(srae.head, E), Z_tilde


@pytest.mark.parametrize("made", [dense, convolutional])
@torch.no_grad()
def test_equation_5(made):
    srae, Z = made()
    y_hat, beta, eta, q = drawn(M, 2, seed=5), 0.7, 1.3, 4.0
    E, y_bar, Z_tilde = by_hand(srae, Z)
    faithful = sum(float((y_bar[i] - y_hat[i]) @ (y_bar[i] - y_hat[i])) for i in range(M)) / M
    flat, flat_tilde = Z.reshape(M, -1), Z_tilde.reshape(M, -1)
    Q = [sum(float(flat_tilde[i, k] - flat[i, k]) ** 2 for i in range(M)) / M for k in range(flat.shape[1])]
    sparse = sum(math.log(1 + q * each) for each in Q) / len(Q)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    pull = sum(float(E[:, a] @ E[:, b] / E[:, a].norm() / E[:, b].norm()) ** 2 for a, b in pairs) / 6
    given = srae.objective(Z, y_hat, beta=beta, eta=eta, q=q)
    assert [float(t) for t in given] == pytest.approx(
        [faithful + beta * sparse + eta * pull, faithful, sparse, pull], rel=1e-10
    )
    centred = E - E.mean(0)
    pull = sum(float(torch.corrcoef(centred.T)[a, b]) ** 2 for a, b in pairs)
    assert float(srae.objective(Z, y_hat, moments=covariance).pull_away) == pytest.approx(pull / 6, rel=1e-10)
    assert torch.equal(srae.objective(Z, y_hat, moments=second_moments).total, srae.objective(Z, y_hat).total)


@pytest.mark.parametrize("made", [dense, convolutional])
@torch.no_grad()
def test_contributions_add_up(made):
    srae, Z = made()
    E, y_bar, _ = srae(Z)
    for output in (0, 1):
        total = srae.head.bias[output] + srae.contributions(E, output).sum(1)
        torch.testing.assert_close(total, y_bar[:, output], rtol=1e-12, atol=1e-12)
    assert torch.equal(srae.encode(Z), E)


@pytest.mark.parametrize("made", [dense, convolutional])
@torch.no_grad()
def test_folding_changes_the_units_and_nothing_else(made):
    srae, Z = made()
    D = Z.shape[1]
    scaling = Scaling(drawn(D, seed=2), drawn(D, seed=3).abs() + 0.1, drawn(2, seed=4), drawn(2, seed=5).abs() + 0.1)
    shape = (1, D, *[1] * (Z.dim() - 2))
    mean, std = scaling.Z_mean.reshape(shape), scaling.Z_std.reshape(shape)
    E, y_bar, Z_tilde = srae((Z - mean) / std)
    srae.fold(scaling)
    folded = srae(Z)
    torch.testing.assert_close(folded.E, E, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded.y_bar, y_bar * scaling.y_std + scaling.y_mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded.Z_tilde, Z_tilde * std + mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("made", [dense, convolutional])
@torch.no_grad()
def test_features_can_be_standardised_flipped_and_reordered(made):
    srae, Z = made()
    E, y_bar, Z_tilde = srae(Z)
    mean, std = E.mean(0), E.std(0) * torch.tensor([1, -1, 1])
    srae.standardise_features(mean, std)
    torch.testing.assert_close(srae(Z).E, (E - mean) / std, rtol=1e-10, atol=1e-10)
    order = torch.tensor([2, 0, 1])
    srae.reorder_features(order)
    after = srae(Z)
    torch.testing.assert_close(after.E, ((E - mean) / std)[:, order], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.y_bar, y_bar, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.Z_tilde, Z_tilde, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("made", [dense, convolutional])
def test_weights_come_from_the_generator_alone(made):
    before = torch.get_rng_state()
    first, second = made()[0], made()[0]
    torch.set_rng_state(before)
    state = torch.get_rng_state()
    second.reset(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    second.reset(torch.Generator().manual_seed(2))
    assert not torch.equal(first.encoder[0].weight, second.encoder[0].weight)


@torch.no_grad()
def test_equation_5_as_printed():
    """What PaperSRAE minimises, written as the sums over examples, dimensions and pairs that the paper prints."""
    srae, Z, y_hat = PaperSRAE(6, 3, hidden=(5, 4), n_outputs=2).double(), drawn(M, 6), drawn(M, 2, seed=5)
    srae.reset(torch.Generator().manual_seed(8))
    srae.encoder[4].weight.mul_(10)  # so that x-features are zero in some examples only
    beta, eta, q, D, n = 0.7, 1.3, 4.0, 6, 3
    E, Z_tilde = [], []
    for i in range(M):
        hidden = affine(srae.encoder[2], affine(srae.encoder[0], Z[i]).clamp(min=0)).clamp(min=0)
        E.append(affine(srae.encoder[4], hidden).clamp(min=0))
        hidden = affine(srae.decoder[2], affine(srae.decoder[0], E[i]).clamp(min=0)).clamp(min=0)
        Z_tilde.append(affine(srae.decoder[4], hidden))
    assert bool((sum(E) > 0).all()) and float(torch.stack(E).min()) == 0
    v = srae.head.weight
    faithful = sum(float(v[c] @ E[i] - y_hat[i, c]) ** 2 for i in range(M) for c in range(2)) / M
    sparse = 0.0
    for k in range(D):
        sparse += math.log(1 + q * sum(float(Z_tilde[i][k] - Z[i, k]) ** 2 for i in range(M)) / M) / D
    pull = 0.0
    for a in range(n):
        for b in range(n):
            if a != b:
                product, norm_a, norm_b = (
                    sum(float(E[i][x] * E[i][y]) for i in range(M)) for x, y in ((a, b), (a, a), (b, b))
                )
                pull += product**2 / (norm_a * norm_b) / (n * (n - 1))
    assert pull > 0.1
    given = PaperSRAE.minimised(Weights(beta, eta, q), ALONE)(srae(Z), Z, y_hat)
    assert [float(t) for t in given] == pytest.approx(
        [faithful + beta * sparse + eta * pull, faithful, sparse, pull], rel=1e-10
    )
    assert float(srae.objective(Z, y_hat, beta=beta, eta=eta, q=q).total) == pytest.approx(
        float(given.total), rel=1e-12
    )


def test_v_of_the_printed_form_has_both_signs_and_no_bias():
    srae = PaperSRAE(6, 40, hidden=())
    srae.reset(torch.Generator().manual_seed(0))
    v = srae.head.weight.detach()
    assert 0.3 < float((v > 0).double().mean()) < 0.7 and 0.9 < float(v.abs().max()) * 40**0.5 <= 1
    assert float(srae.head.bias) == 0 and not srae.head.bias.requires_grad


def test_vectors_of_any_shape_are_flattened():
    srae, Z = SRAE((2, 3), 2, hidden=()), torch.rand(4, 2, 3)
    made = srae(Z)
    assert made.Z_tilde.shape == Z.shape
    assert torch.equal(made.E, F.linear(Z.flatten(1), srae.encoder[0].weight, srae.encoder[0].bias))


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="n_features is 0; pass at least 1"):
        SRAE(4, 0)
    with pytest.raises(ValueError, match="window is 3, larger than the maps of 2 x 5 cells; pass pool from 1 to 2"):
        ConvSRAE((4, 2, 5), pool=3)
