"""Baselines against other libraries and plain algebra, what stays as drawn, and their life in XNNAttribution."""

from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import LRP, DeepLift, IntegratedGradients
from sklearn.decomposition import NMF as SkNMF
from sklearn.linear_model import Lasso as SkLasso
from sklearn.linear_model import LinearRegression, MultiTaskLasso
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.errors import ExplainerFileError
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.models._base import Dense, Reconstruction, TrainingExamples, dense
from captum_xnn.models.baselines import CAE, NMF, NN, SAE, Lasso, RandomDecoder, RandomEncoder, SingleDimensions
from captum_xnn.models.baselines._learned import PlainObjective
from captum_xnn.models.baselines._least_squares import read_out
from captum_xnn.models.baselines._nmf import _unroll
from captum_xnn.models.baselines._selection import lasso, lasso_of_size
from captum_xnn.training._fitting import fit
from captum_xnn.training._sampler import Sampler

QUICK = Recipe(steps=30)
EVENLY = torch.ones(400, dtype=torch.bool)  # no shortage of positives: all examples count alike


def problem(rows=400, dtype=torch.float64):
    """A class of four parts, which are on in a fifth of the examples; Z is a sum of non-negative parts, and noise."""
    g = torch.Generator().manual_seed(0)
    on = (torch.rand(rows, 4, generator=g) < 0.2) * torch.rand(rows, 4, generator=g) * 3
    Z = (on @ torch.rand(4, 20, generator=g) + 0.3 * torch.rand(rows, 20, generator=g)).to(dtype)
    y = (on @ torch.tensor([[3.0], [2.0], [-1.0], [1.0]])).to(dtype) - 2
    return Z, y, y[:, 0] > 2.5


FORMS = {
    "NN": partial(NN, hidden=(16, 8)),
    "SAE": partial(SAE, hidden=(16, 8)),
    "CAE": partial(CAE, hidden=(16, 8)),
    "Lasso": Lasso,
    "SingleDimensions": SingleDimensions,
    "RandomEncoder": partial(RandomEncoder, hidden=(16, 8)),
    "RandomDecoder": partial(RandomDecoder, hidden=(16, 8)),
    "NMF": partial(NMF, iterations=20),
}


def fitted(make, positives=None, n=3, recipe=QUICK, seed=0, outputs=None):
    Z, y, own = problem()
    y = y if outputs is None else torch.cat([y, Z[:, :1]], 1)
    xnn = make(20, n, n_outputs=y.shape[1]).double()
    history = fit(xnn, Z, y, positives=own if positives is None else positives, recipe=recipe, seed=seed)
    return xnn.requires_grad_(False), Z, y, history


def row_weight(positives, batch=40):
    """Of a batch some rows are drawn from the positives alone, so that a quarter of all are; 1 on average."""
    share = float(positives.double().mean())
    more = round(batch * (0.25 - share) / (1 - share))
    return ((batch - more) + more / share * positives) / batch


# --- what all have in common


@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_features_are_as_the_sraes(form, outputs):
    xnn, Z, y, _ = fitted(FORMS[form], outputs=outputs)
    positives = problem()[2]
    made = xnn(Z)
    torch.testing.assert_close(made.E.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(made.E.std(0), torch.ones(3).double(), rtol=1e-8, atol=0)
    assert bool((xnn.head.weight[0] >= 0).all()) and bool((xnn.head.weight[0] > 0).any())
    given = xnn.contributions(made.E)[positives].mean(0)
    assert torch.equal(given, given.sort(descending=True).values)
    for c in range(y.shape[1]):
        total = xnn.head.bias[c] + xnn.contributions(made.E, c).sum(1)
        torch.testing.assert_close(total, made.y_bar[:, c])
    assert made.Z_tilde.shape == Z.shape and torch.equal(xnn.encode(Z), made.E)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_seed_gives_the_same_weights_and_spares_the_global_generator(form):
    state = torch.get_rng_state()
    first = FORMS[form](20, 3)
    torch.set_rng_state(state)
    Z, y, positives = problem()
    again, other = FORMS[form](20, 3), FORMS[form](20, 3)
    state = torch.get_rng_state()
    for xnn in (first, again):
        fit(xnn, Z.float(), y.float(), positives=positives, recipe=QUICK, seed=1)
    fit(other, Z.float(), y.float(), positives=positives, recipe=QUICK, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    drawn = form not in ("Lasso", "SingleDimensions", "NMF")
    same = all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert same != drawn or form == "NMF"


@pytest.mark.parametrize("form", FORMS)
def test_the_constructors_arguments_make_a_copy(form):
    xnn, Z, _, _ = fitted(FORMS[form])
    copy = type(xnn)(**xnn.config).double()
    copy.load_state_dict(xnn.state_dict())
    assert torch.equal(copy(Z).Z_tilde, xnn(Z).Z_tilde) and copy.config == xnn.config


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_learn_from_is_an_error(form):
    with pytest.raises(ValueError, match="activations are the same for every example; check"):
        fit(FORMS[form](4, 2), torch.ones(9, 4), torch.rand(9, 1))
    with pytest.raises(ValueError, match="output is the same for every example; check"):
        fit(FORMS[form](4, 2), torch.rand(9, 4), torch.ones(9, 1))


# --- learned


@pytest.mark.parametrize(("faithful", "reconstruct"), [(1.0, 0.0), (1.0, 0.7), (0.0, 1.0)])
def test_losses_by_loops(faithful, reconstruct):
    g = torch.Generator().manual_seed(0)
    Z, Z_tilde = torch.randn(2, 6, 5, generator=g, dtype=torch.float64)
    y, y_bar = torch.randn(2, 6, 2, generator=g, dtype=torch.float64)
    off = sum(float((y_bar[i, c] - y[i, c]) ** 2) for i in range(6) for c in range(2)) / 6
    plain = sum(float((Z_tilde[i, k] - Z[i, k]) ** 2) for i in range(6) for k in range(5)) / 6 / 5
    terms = PlainObjective(faithful, reconstruct)(Reconstruction(Z[:, :2], y_bar, Z_tilde), Z, y)
    wanted = off * (faithful > 0), plain * (reconstruct > 0)
    assert [float(t) for t in terms] == pytest.approx(
        [faithful * wanted[0] + reconstruct * wanted[1], *wanted, 0], rel=1e-12
    )


def test_nn_learns_no_reconstruction_and_reads_it_out_afterwards():
    xnn, Z, _, history = fitted(FORMS["NN"])
    assert all(step.sparse_reconstruction == step.pull_away == 0 < step.faithfulness for step in history)
    E = xnn.encode(Z).numpy()
    best = LinearRegression().fit(E, Z.numpy(), sample_weight=row_weight(problem()[2]).numpy())
    torch.testing.assert_close(xnn(Z).Z_tilde, torch.from_numpy(best.predict(E)), rtol=1e-5, atol=1e-5)


def test_nn_is_as_faithful_as_the_srae():
    recipe = Recipe(steps=400, batch_size=128)
    errors = []
    for make in (FORMS["NN"], partial(SRAE, hidden=(16, 8))):
        xnn, Z, y, history = fitted(make, recipe=recipe)
        errors.append(float((xnn(Z).y_bar - y).abs().mean()))
        assert history[-1].faithfulness < 0.1 * history[0].faithfulness
    assert errors[0] <= 1.05 * errors[1]


# What of the recipe moves a form. All else here leaves it at the same weights.
CONCERNS = {"NN": [], "SAE": ["beta"], "CAE": [], "RandomDecoder": ["beta", "eta", "q", "pretraining", "balance"]}
CHANGED = {"beta": 7.0, "eta": 7.0, "q": 7.0, "pretraining": 0.1, "balance": 0.9}


@pytest.mark.parametrize("form", CONCERNS)
def test_what_of_the_recipe_concerns_a_form(form):
    recipe = Recipe(steps=10)
    first = fitted(FORMS[form], recipe=recipe)[0]
    for name, value in CHANGED.items():
        other = fitted(FORMS[form], recipe=Recipe(**{"steps": 10, name: value}))[0]
        same = all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
        assert same != (name in CONCERNS[form]), name


def test_a_linear_cae_finds_the_principal_components():
    Z, y, _ = problem()
    xnn = CAE(20, 3, hidden=()).double()
    history = fit(xnn, Z, y, recipe=Recipe(steps=1200, learning_rate=2e-2))
    centred = Z - Z.mean(0)
    span = torch.linalg.svd(centred, full_matrices=False)[2][:3]
    best = centred @ span.T @ span + Z.mean(0)
    with torch.no_grad():
        made = xnn(Z)
        least = (best - Z).pow(2).mean()
        assert float((made.Z_tilde - Z).pow(2).mean() / least) == pytest.approx(1, abs=0.01)
        assert float((made.Z_tilde - best).pow(2).mean() / best.var(0).mean()) < 1e-3
        # The head is the best there is on these x-features.
        wanted = LinearRegression().fit(made.E.numpy(), y.numpy()).predict(made.E.numpy())
        torch.testing.assert_close(made.y_bar, torch.from_numpy(wanted), rtol=1e-6, atol=1e-8)
    assert history[-1].faithfulness == 0 and history[-1].pull_away == 0


def test_sae_does_both_cae_reconstructs_and_nn_predicts():
    """The paper's distinction, on data whose largest direction has nothing to do with the output."""
    g = torch.Generator().manual_seed(0)
    Z = torch.randn(400, 6, generator=g) * torch.tensor([6.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    y = Z[:, 5:]
    off, lost = {}, {}
    for name, make in (("NN", NN), ("SAE", SAE), ("CAE", CAE)):
        xnn = make(6, 2, hidden=())
        fit(xnn, Z, y, recipe=Recipe(steps=500, learning_rate=2e-2, weight_decay=0))
        with torch.no_grad():
            made = xnn(Z)
        off[name], lost[name] = float((made.y_bar - y).pow(2).mean()), float((made.Z_tilde - Z).pow(2).mean())
    assert off["NN"] < 1e-3 and off["SAE"] < 0.2 and off["CAE"] > 0.8
    assert lost["CAE"] < lost["SAE"] < lost["NN"]


def drawn(make, seed=0):
    xnn = make(20, 3).double()
    xnn.reset(torch.Generator().manual_seed(seed))
    return xnn


def proportional(a, b):
    ratio = a / b
    return bool((ratio / ratio.flatten()[0] - 1).abs().max() < 1e-8)


def test_a_random_encoder_is_not_trained():
    xnn, Z, y, history = fitted(FORMS["RandomEncoder"], EVENLY)
    start = drawn(FORMS["RandomEncoder"])
    assert history == []
    # Written for standardised Z, which scales the first layer; x-features are scaled and sorted at the last.
    assert proportional(xnn.encoder[0].weight, start.encoder[0].weight)
    assert torch.equal(xnn.encoder[2].weight, start.encoder[2].weight)
    rows = [i for row in xnn.encoder[4].weight for i in range(3) if proportional(row, start.encoder[4].weight[i])]
    assert sorted(rows) == [0, 1, 2]
    E = start.encode((Z - Z.mean(0)) / Z.var(0).mean().sqrt()).detach().numpy()
    for given, wanted in ((xnn(Z).y_bar, y), (xnn(Z).Z_tilde, Z)):
        best = LinearRegression().fit(E, wanted.numpy()).predict(E)
        torch.testing.assert_close(given, torch.from_numpy(best), rtol=1e-6, atol=1e-8)


def test_a_random_decoder_is_not_trained():
    xnn, start = fitted(FORMS["RandomDecoder"])[0], drawn(FORMS["RandomDecoder"])
    assert torch.equal(xnn.decoder[2].weight, start.decoder[2].weight)
    assert proportional(xnn.decoder[4].weight, start.decoder[4].weight)
    assert not proportional(xnn.encoder[2].weight, start.encoder[2].weight)
    assert all(p.grad is None for p in xnn.decoder.parameters())


# --- least squares


def read(E, wanted, positives):
    """The map of read_out from given x-features."""
    xnn = SRAE(E.shape[1], E.shape[1], hidden=()).double()
    with torch.no_grad():
        xnn.encoder[0].weight.copy_(torch.eye(E.shape[1]))
        xnn.encoder[0].bias.zero_()
    layer = nn.Linear(E.shape[1], wanted.shape[1]).double()
    sampler = Sampler(positives, len(E), Recipe(), torch.Generator())
    read_out(xnn, layer, TrainingExamples(E, wanted, sampler.row_weight.to(wanted), torch.Generator()), wanted)
    return layer.weight.detach(), layer.bias.detach()


def test_read_out_is_least_squares():
    g = torch.Generator().manual_seed(0)
    E = torch.randn(60, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 1e-2, 1e2]) + 5
    wanted, positives = torch.randn(60, 2, generator=g, dtype=torch.float64), torch.arange(60) < 6
    weight, bias = read(E, wanted, positives)
    weights = row_weight(positives).numpy()
    oracle = LinearRegression().fit(E.numpy(), wanted.numpy(), sample_weight=weights)
    np.testing.assert_allclose(weight.numpy(), oracle.coef_, rtol=1e-5)
    np.testing.assert_allclose(bias.numpy(), oracle.intercept_, rtol=1e-5)


def test_read_out_of_features_that_are_dead_or_twins():
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 60, 1, generator=g, dtype=torch.float64)
    # Twins up to rounding share what one would get alone, each in its own units, also where the output is noisy.
    weight, bias = read(torch.cat([x, 3 * x + 1e-13 * noise, torch.full_like(x, 3)], 1), 4 * x + 1 + noise, None)
    alone, bias_alone = read(x, 4 * x + 1 + noise, None)
    wanted = torch.tensor([[1 / 2, 1 / 6, 0.0]]).double() * alone
    torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(bias, bias_alone, rtol=1e-6, atol=1e-9)


# --- dimensions of Z


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("weighted", [False, True])
def test_lasso_is_scikit_learns(alpha, weighted):
    Z, y, positives = problem()
    weight = row_weight(positives) if weighted else None
    made = lasso(Z, y, alpha, weight=None if weight is None else 3 * weight)
    oracle = SkLasso(alpha, tol=1e-10, max_iter=50_000).fit(Z, y[:, 0], weight)
    np.testing.assert_allclose(made.coefficients[0], oracle.coef_, atol=1e-4)
    assert float(made.intercept[0]) == pytest.approx(float(oracle.intercept_), abs=1e-3)
    assert made.dimensions.tolist() == np.flatnonzero(oracle.coef_).tolist()


def test_lasso_of_several_outputs_is_scikit_learns():
    Z, y, _ = problem()
    y = torch.cat([y, Z[:, :1] ** 2], 1)
    made, oracle = lasso(Z, y, 0.3), MultiTaskLasso(0.3, tol=1e-10, max_iter=50_000).fit(Z, y)
    np.testing.assert_allclose(made.coefficients, oracle.coef_, atol=1e-4)
    assert 0 < len(made.dimensions) < 20
    assert len(lasso_of_size(Z, y, 4).dimensions) == 4


def orthonormal():
    """Sixteen examples with orthogonal dimensions of variance 1, so that the Lasso is soft thresholding."""
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    c = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    return H[:, 1:8], c


@pytest.mark.parametrize(("alpha", "left"), [(4.5, 1), (2.5, 3), (0.9, 5), (0.1, 6)])
def test_alphas_threshold(alpha, left):
    Z, c = orthonormal()
    made = lasso(Z, (Z @ c)[:, None] + 2, alpha)
    torch.testing.assert_close(made.coefficients[0], c.sign() * (c.abs() - alpha).clamp(min=0), rtol=1e-6, atol=1e-6)
    assert made.dimensions.tolist() == list(range(left)) and float(made.intercept[0]) == pytest.approx(2)


@pytest.mark.parametrize(("n", "next_one"), [(1, 4.0), (3, 2.0), (5, 0.5)])
def test_the_smallest_alpha_that_leaves_n(n, next_one):
    """The next dimension enters at its coefficient; alpha stays just above."""
    Z, c = orthonormal()
    made = lasso_of_size(Z, (Z @ c)[:, None], n)
    assert made.dimensions.tolist() == list(range(n))
    assert next_one <= made.alpha < next_one * 1.0001


def test_lasso_of_more_dimensions_than_matter():
    Z, c = orthonormal()
    assert lasso_of_size(Z, (Z @ c)[:, None], 7).dimensions.tolist() == list(range(6))


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_lasso_as_a_form(alpha):
    Z, y, positives = problem()
    weight = row_weight(positives)
    xnn = fitted(partial(Lasso, alpha=alpha), n=3 if alpha is None else 12)[0]
    wanted = lasso_of_size(Z, y, 3, weight=weight) if alpha is None else lasso(Z, y, alpha, weight=weight)
    made = xnn(Z)
    torch.testing.assert_close(made.y_bar, Z @ wanted.coefficients.T + wanted.intercept)
    dims = [d for d in xnn.dimensions.tolist() if d >= 0]
    assert sorted(dims) == wanted.dimensions.tolist() and len(xnn.dimensions) == xnn.n_features
    for k, d in enumerate(xnn.dimensions.tolist()):
        if d < 0:
            assert bool((made.E[:, k] == 0).all()) and float(xnn.head.weight[0, k]) == 0
            continue
        side = wanted.coefficients[0, d].sign()
        torch.testing.assert_close(made.E[:, k], side * (Z[:, d] - Z[:, d].mean()) / Z[:, d].std())


def test_alphas_that_do_not_fit():
    Z, y, _ = problem()
    with pytest.raises(ValueError, match=r"alpha=0.001 selects \d+ dimensions of Z, not 1 to 3; pass a larger"):
        fit(Lasso(20, 3, alpha=0.001), Z, y)
    with pytest.raises(ValueError, match=r"alpha=100 selects 0 dimensions of Z, not .*; pass a smaller alpha"):
        fit(Lasso(20, 3, alpha=100.0), Z, y)
    with pytest.raises(ValueError, match=r"alpha is 0.*; pass alpha > 0"):
        lasso(Z, y, 0.0)


@pytest.mark.parametrize("weighted", [False, True])
def test_single_dimensions_are_those_most_correlated(weighted):
    Z, y, positives = problem()
    xnn = fitted(SingleDimensions, None if weighted else EVENLY)[0]
    weight = row_weight(positives).numpy() if weighted else np.ones(400)
    table = np.cov(torch.cat([Z, y], 1).T.numpy(), aweights=weight)
    correlation = np.abs(table[:-1, -1]) / np.sqrt(np.diag(table)[:-1])
    assert {*xnn.dimensions.tolist()} == {*np.argsort(correlation)[-3:].tolist()}
    dims = xnn.dimensions.numpy()
    oracle = LinearRegression().fit(Z.numpy()[:, dims], y.numpy(), sample_weight=weight)
    torch.testing.assert_close(xnn(Z).y_bar, torch.from_numpy(oracle.predict(Z.numpy()[:, dims])))


def test_dimensions_that_are_given_or_dead():
    xnn, Z, _, _ = fitted(partial(SingleDimensions, dimensions=[7, 2, 11]))
    assert sorted(xnn.dimensions.tolist()) == [2, 7, 11]
    best = LinearRegression().fit(xnn(Z).E.numpy(), Z.numpy(), sample_weight=row_weight(problem()[2]).numpy())
    torch.testing.assert_close(xnn(Z).Z_tilde, torch.from_numpy(best.predict(xnn(Z).E.numpy())), rtol=1e-6, atol=1e-8)
    Z, y, _ = problem()
    Z[:, [0, 5]] = 0
    dead = SingleDimensions(20, 20, dimensions=range(20)).double()
    fit(dead, Z, y)
    made = dead(Z)
    assert bool(made.E.isfinite().all()) and int((made.E == 0).all(0).sum()) == 2
    some = SingleDimensions(20, 18).double()
    fit(some, Z, y)
    assert {0, 5}.isdisjoint(some.dimensions.tolist())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([0, 1], r"dimensions has 2 numbers, and n_features is 3; pass one dimension for each x-feature, or n_fea.*=2"),
        ([0, 1, 1], r"dimensions has 1 more than once; pass each dimension once"),
        ([0, 1, 20], r"dimension 20 does not exist; pass numbers from 0 to 19, which Z has"),
        ([0, 1, -1], r"dimension -1 does not exist; pass numbers from 0 to 19"),
    ],
)
def test_dimensions_are_checked(given, told):
    with pytest.raises(ValueError, match=told):
        SingleDimensions(20, 3, dimensions=given)


def test_more_single_dimensions_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"n_features is 21, and Z has 20 dimensions; .* ask for at most 20"):
        SingleDimensions(20, 21)
    assert SingleDimensions(20, 20, dimensions=range(20)).given == list(range(20))


# --- NMF


def test_nmf_is_scikit_learns_and_its_coefficients_are_the_best():
    scipy_optimize = pytest.importorskip("scipy.optimize")
    xnn, Z, y, _ = fitted(partial(NMF, iterations=300), EVENLY, n=4)
    oracle = SkNMF(4, init="nndsvda", max_iter=2000, random_state=0).fit(Z.numpy())
    made = xnn(Z)
    assert float((made.Z_tilde - Z).norm()) == pytest.approx(oracle.reconstruction_err_, rel=1e-3)
    # Parts from the decoder, as they are before x-features are centred: what Z_tilde is made of.
    new = (problem()[0] * 0.7).roll(1, 1)[:30]
    parts = nn.functional.normalize(torch.from_numpy(oracle.components_))
    best = np.stack([scipy_optimize.nnls(parts.T.numpy(), z)[0] for z in new.numpy()])
    torch.testing.assert_close(xnn(new).Z_tilde, torch.from_numpy(best) @ parts, rtol=0, atol=0.02)
    E = made.E.numpy()
    torch.testing.assert_close(made.y_bar, torch.from_numpy(LinearRegression().fit(E, y).predict(E)))


def test_nmf_descends_to_the_best_coefficients_step_by_step():
    """The unrolled network against the update written as loops, and against its fixed point."""
    xnn = NMF(6, 3, iterations=7).double()
    g = torch.Generator().manual_seed(0)
    W, H = (torch.rand(50, 3, generator=g) + 0.1).double(), torch.rand(3, 6, generator=g).double()
    fit(xnn, W @ H, W[:, :1])
    parts = xnn.decoder[0].weight.detach().T
    parts = parts / parts.norm(dim=1, keepdim=True) * torch.sign(parts.sum(1, keepdim=True))
    z = (W @ H)[0]
    state = [0.0] * 3
    for _ in range(7):
        new = []
        for k in range(3):
            G = [float(parts[k] @ parts[j]) for j in range(3)]
            slope = sum(G[j] * state[j] for j in range(3)) - float(parts[k] @ z)
            new.append(max(0.0, state[k] - slope / sum(G)))
        state = new
    wanted = torch.tensor(state).double() @ parts
    with torch.no_grad():
        torch.testing.assert_close(xnn(z[None]).Z_tilde[0], wanted, rtol=1e-8, atol=1e-8)


def test_parts_that_are_zero_have_coefficient_zero():
    """Where there are fewer parts in Z than asked for."""
    encoder = dense((3, 4, 4, 2))
    _unroll(encoder, torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 0.0]]))
    with torch.no_grad():
        torch.testing.assert_close(encoder(torch.tensor([[3.0, 4.0, 1.0]])), torch.tensor([[5.0, 0.0]]))


def test_nmf_has_gradients_and_refuses_negative_activations():
    xnn, Z, _, _ = fitted(FORMS["NMF"])
    assert torch.autograd.gradcheck(xnn.encode, Z[:3].clone().requires_grad_())
    with pytest.raises(ValueError, match="activations go down to -1, but NMF needs non-negative ones; explain"):
        fit(NMF(3, 2), torch.eye(3).repeat(3, 1) - torch.tensor([1.0, 0, 0]), torch.rand(9, 1))


def test_nmf_counts_positives_for_their_share():
    """Dimensions that only positives have are a part of their own once positives are a quarter, not a hundredth."""
    g = torch.Generator().manual_seed(0)
    Z, positives = torch.rand(800, 6, generator=g).double(), torch.arange(800) < 8
    Z[:, 5] = 0
    Z[positives] = torch.tensor([0.0, 0, 0, 0, 0, 3.0]).double()
    lost = []
    for given in (None, positives):
        xnn = NMF(6, 1).double()
        fit(xnn, Z, positives[:, None].double(), positives=given)
        with torch.no_grad():
            lost.append(float((xnn(Z).Z_tilde - Z)[positives].norm()))
    assert lost[1] < 0.5 * lost[0]


@pytest.mark.parametrize("n", [7, 12])
def test_nmf_of_more_parts_than_dimensions(n):
    xnn = NMF(5, n)
    Z = torch.rand(60, 5, generator=torch.Generator().manual_seed(0))
    fit(xnn, Z, Z[:, :1])
    with torch.no_grad():
        made = xnn(Z)
    assert bool(made.E.isfinite().all()) and float((made.y_bar - Z[:, :1]).abs().mean()) < 0.1


# --- in XNNAttribution


def net():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


DATA = torch.randn(150, 5, generator=torch.Generator().manual_seed(10))
X = torch.randn(9, 5, generator=torch.Generator().manual_seed(11))


# So small a model has neurons that only a bias excites, and x-features for which nothing speaks.
@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.parametrize("form", FORMS)
def test_lifecycle(form, tmp_path):
    make = FORMS[form]
    xnn = XNNAttribution(net(), "1", 2, autoencoder=make, recipe=Recipe(steps=30)).fit(DATA, [0, 2], progress=False)
    why = xnn.explain(X, 2)
    torch.testing.assert_close(why.bias + why.contributions.sum(1), why.surrogate, rtol=1e-4, atol=1e-5)
    assert why.maps.shape == (9, 2, 5) and bool(why.maps.isfinite().all()) and bool(why.maps.abs().sum() > 0)
    exact = xnn.with_heatmap(FromCaptum(IntegratedGradients, n_steps=100))
    maps = exact.attribute(X[:3], 2)
    empty = exact.explain(torch.zeros(1, 5), 2).features
    torch.testing.assert_close(maps.sum(-1), why.features[:3] - empty, rtol=0, atol=0.05)
    again = XNNAttribution.load(xnn.save(tmp_path), xnn.model)
    for target in (0, 2):
        assert torch.equal(again.attribute(X, target), xnn.attribute(X, target))
        assert again.score(DATA, target) == xnn.score(DATA, target)
        assert type(again.explainer(target).form) is type(xnn.explainer(target).form)
    assert xnn.score(DATA, 2).f_reg == pytest.approx(xnn.explainer(2).f_reg, rel=1e-4)


@pytest.mark.parametrize("method", [DeepLift, LRP])
def test_methods_that_walk_modules_run_through_nmf(method):
    xnn = XNNAttribution(net(), "1", 2, autoencoder=NMF, heatmap=FromCaptum(method)).fit(DATA, 2, progress=False)
    maps = xnn.attribute(X, 2)
    assert maps.shape == (9, 2, 5) and bool(maps.isfinite().all())
    if method is DeepLift:
        features = xnn.explain(torch.cat([X, torch.zeros(1, 5)]), 2).features
        torch.testing.assert_close(maps.sum(-1), features[:-1] - features[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:maps are zero")
def test_feature_maps_are_flattened(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    data = torch.rand(60, 1, 6, 6)
    xnn = XNNAttribution(model, "1", 2, autoencoder=Lasso).fit(data, 0, positives=torch.ones(60).bool(), progress=False)
    again = XNNAttribution.load(xnn.save(tmp_path), model)
    assert bool(xnn.attribute(data[:2], 0).abs().sum() > 0)
    assert torch.equal(again.attribute(data[:2], 0), xnn.attribute(data[:2], 0))


class FirstDimensions(Dense):
    """A form of a user's own."""

    def __init__(self, shape, n_features=5, *, n_outputs=1):
        super().__init__(shape, n_features, hidden=(), n_outputs=n_outputs)
        del self.config["hidden"]

    def solve(self, examples):
        with torch.no_grad():
            self.encoder[0].weight.copy_(torch.eye(*self.encoder[0].weight.shape))
        read_out(self, self.head, examples, examples.y)


def test_forms_of_ones_own_load(tmp_path):
    xnn = XNNAttribution(net(), "1", 2, autoencoder=FirstDimensions).fit(DATA, 2, progress=False)
    path = xnn.save(tmp_path)
    told = (
        r"^the explainer's class '.*test_baselines.FirstDimensions' is not known; .* "
        r"forms=\[FirstDimensions\]\)"
    )
    for forms in ([], [NN]):
        with pytest.raises(ExplainerFileError, match=told):
            XNNAttribution.load(path, xnn.model, forms=forms)
    # Also from a module of another name, such as __main__.
    moved = type("FirstDimensions", (FirstDimensions,), {"__module__": "__main__"})
    for form in (FirstDimensions, moved):
        again = XNNAttribution.load(path, xnn.model, forms=[NN, form])
        assert type(again.explainer(2).form) is form
        assert torch.equal(again.attribute(X, 2), xnn.attribute(X, 2))


def test_a_form_of_ones_own_is_not_taken_for_one_of_ours(tmp_path):
    mine = type("NN", (FirstDimensions,), {})
    xnn = XNNAttribution(net(), "1", 2, autoencoder=mine).fit(DATA, 2, progress=False)
    path = xnn.save(tmp_path)
    with pytest.raises(ExplainerFileError, match=r"class '.*NN' is not known"):
        XNNAttribution.load(path, xnn.model)
    assert type(XNNAttribution.load(path, xnn.model, forms=[mine]).explainer(2).form) is mine
