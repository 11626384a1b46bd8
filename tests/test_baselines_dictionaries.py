"""Dictionaries on activations whose concepts are known, against plain algebra and other libraries."""

import pytest
import torch
from scipy.optimize import nnls
from torch.nn import functional as F

from captum_xnn.models.baselines._dictionaries import (
    Dictionary,
    _factors,
    craft,
    dictionary_contributions,
    face,
    image_crops,
    non_negative_codes,
    sobol_indices,
    topk_sae,
)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Three concepts, each alone in some examples and some dimensions, so that their factorisation is unique.
PARTS = torch.block_diag(*(1 + rand(3, 1, 3, seed=1))) + torch.tensor([0.0] * 8 + [0.3])
CODES = torch.cat([torch.eye(3).double(), rand(57, 3, seed=2) * (rand(57, 3, seed=3) > 0.4)])


def test_codes_are_the_least_squares_of_scipy():
    H, Z = rand(5, 12, seed=4), randn(40, 12, seed=5)
    u = non_negative_codes(Z, H)
    wanted = torch.stack([torch.from_numpy(nnls(H.T.numpy(), z.numpy())[0]) for z in Z])
    torch.testing.assert_close(u, wanted, atol=1e-7, rtol=1e-6)
    assert 0.1 < float((u == 0).double().mean()) < 0.9  # the bound is felt


def test_codes_have_the_derivative_of_their_descent():
    H, Z = rand(3, 6, seed=6).requires_grad_(), randn(8, 6, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(non_negative_codes, (Z, H))


def test_a_concept_of_zeros_has_no_code():
    H = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(non_negative_codes(torch.tensor([[2.0, 4.0]]), H), torch.tensor([[2.0, 0.0]]))


def test_codes_refuse_another_layer():
    with pytest.raises(ValueError, match=r"\(4, 3\) and concepts \(2, 5\)"):
        non_negative_codes(rand(4, 3), rand(2, 5))


def test_craft_recovers_factors_of_exact_low_rank():
    Z = CODES @ PARTS
    made = craft(Z, 3)
    torch.testing.assert_close(made.rebuilt(made.encode(Z)), Z, atol=0.02, rtol=0)
    likeness = F.normalize(made.concepts) @ F.normalize(PARTS).T
    assert sorted(likeness.argmax(1).tolist()) == [0, 1, 2] and float(likeness.amax(1).min()) > 0.99


def test_contributions_and_the_rest_sum_to_the_change_of_a_quadratic():
    """The slopes of a quadratic, averaged on a straight way, are those in the middle."""
    Z, base, Q = rand(7, 9, seed=8), rand(9, seed=9), randn(9, 9, seed=10)
    Q = Q + Q.T

    def f(Z):
        return ((Z @ Q) * Z).sum(1)

    slopes = (Z + base) @ Q
    torch.testing.assert_close(((Z - base) * slopes).sum(1), f(Z) - f(base[None]))
    made = craft(CODES @ PARTS, 3)
    E = dictionary_contributions(made, Z, base, slopes)
    left = (Z - made.rebuilt(made.encode(Z))) - (base - made.rebuilt(made.encode(base[None])))
    torch.testing.assert_close(E.sum(1) + (left * slopes).sum(1), f(Z) - f(base[None]))
    inside = CODES[:5] @ PARTS  # concepts rebuild these and their base
    on_the_way = (inside + PARTS[0]) @ Q
    E = dictionary_contributions(made, inside, PARTS[0], on_the_way)
    torch.testing.assert_close(E.sum(1), f(inside) - f(PARTS[:1]), atol=0.2, rtol=0)


def test_sobol_indices_of_a_linear_and_of_a_product():
    w = torch.tensor([3.0, -2.0, 1.0, 0.0], dtype=torch.float64)
    found = sobol_indices(lambda m: m @ w + 5, 4, draws=4096)
    torch.testing.assert_close(found, w**2 / (w**2).sum(), atol=0.01, rtol=0)
    # Of x y: Var = 1/9 - 1/16 = 7/144, and E[x^2] Var(y) = 1/36 is the total effect of either.
    found = sobol_indices(lambda m: m[:, 0] * m[:, 1], 3, draws=4096)
    torch.testing.assert_close(found, torch.tensor([4 / 7, 4 / 7, 0.0]).double(), atol=0.01, rtol=0)
    assert sobol_indices(lambda m: 0 * m[:, 0], 2).tolist() == [0, 0]
    torch.testing.assert_close(sobol_indices(lambda m: m @ w, 4, seed=1), sobol_indices(lambda m: m @ w, 4, seed=1))


def test_face_keeps_predictions_that_factors_lose():
    """Three concepts cannot rebuild six parts, but the output can do without most of what is lost."""
    P = rand(6, 40, seed=3) * (rand(6, 40, seed=4) > 0.5)
    Z, new = ((rand(60, 6, seed=i) * (rand(60, 6, seed=i + 1) > 0.4) @ P).float() for i in (20, 30))
    w = randn(40, 4, seed=5).float()

    def divergence(made, Z):
        rebuilt = made.rebuilt(made.encode(Z))
        return float(F.kl_div((rebuilt @ w).log_softmax(1), (Z @ w).softmax(1), reduction="batchmean"))

    plain, kept = (face(Z, lambda Z: Z @ w, 3, steps=steps) for steps in (0, 200))
    torch.testing.assert_close(plain.concepts, _factors(Z, 3, 0)[1], atol=1e-6, rtol=1e-5)
    assert divergence(kept, Z) < 0.2 * divergence(plain, Z)
    assert divergence(kept, new) < 0.9 * divergence(plain, new)
    lost = [float((Z - made.rebuilt(made.encode(Z))).square().sum()) for made in (plain, kept)]
    assert lost[0] < lost[1] < 2 * lost[0]
    assert bool((kept.concepts >= 0).all())
    torch.testing.assert_close(kept.concepts.norm(dim=1), torch.ones(3).double())


def test_topk_keeps_exactly_k_and_rebuilds_what_is_sparse():
    Z = (CODES @ PARTS).float().repeat(5, 1)
    made = topk_sae(Z, 12, active=3, steps=1500, rate=3e-3, batch=64, generator=torch.Generator().manual_seed(0))
    u = made.encode(Z)
    assert int((u > 0).sum(1).max()) <= 3 and bool((u >= 0).all())
    torch.testing.assert_close(made.concepts.norm(dim=1), torch.ones(12).double(), atol=1e-5, rtol=0)
    left = (made.rebuilt(u) - Z).square().sum()
    assert float(left) < 0.05 * float((Z - Z.mean(0)).square().sum())
    again = topk_sae(Z, 12, active=3, steps=3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        again.concepts, topk_sae(Z, 12, active=3, steps=3, generator=torch.Generator().manual_seed(1)).concepts
    )


def test_topk_is_the_formula_of_gao():
    Z = rand(20, 6, seed=12).float()
    made = topk_sae(Z, 8, active=2, steps=0, generator=torch.Generator().manual_seed(0))
    pre = F.relu((Z.double() - Z.double().mean(0)) @ made.concepts.T)  # W is H transposed before the first step
    wanted = torch.zeros_like(pre)
    for row, values in enumerate(pre):
        for j in values.argsort(descending=True)[:2]:
            wanted[row, j] = values[j]
    torch.testing.assert_close(made.encode(Z).double(), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made.offset, Z.double().mean(0), atol=1e-6, rtol=0)


def test_crops_are_enlarged_windows():
    images = rand(2, 3, 8, 6, seed=13)
    crops = image_crops(images, side=2)
    assert crops.shape == (8, 3, 8, 6)
    wanted = F.interpolate(images[1:, :, 4:, 3:], (8, 6), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(crops[7], wanted)
    torch.testing.assert_close(image_crops(images, side=1, share=1.0), images)
    with pytest.raises(ValueError, match="share 1"):
        image_crops(images, share=1.5)


@pytest.mark.parametrize("make", [craft, lambda Z, K: face(Z, lambda Z: Z, K)])
def test_factors_refuse_negative_activations(make):
    with pytest.raises(ValueError, match=r"go down to -.*choose a layer after a ReLU"):
        make(randn(10, 4), 2)


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match="5 of 4 latents"):
        topk_sae(rand(10, 3), 4, active=5, generator=torch.Generator())
    with pytest.raises(ValueError, match="0 concepts"):
        sobol_indices(lambda m: m.sum(1), 0)
    with pytest.raises(ValueError, match="0 concepts"):
        craft(rand(10, 3), 0)


def _topk(Z, **settings):
    return topk_sae(Z, 4, active=2, steps=1, generator=torch.Generator().manual_seed(0), **settings)


ON_ACTIVATIONS = {
    "codes": lambda Z: non_negative_codes(Z, torch.ones(2, 4)),
    "craft": lambda Z: craft(Z, 2),
    "face": lambda Z: face(Z, lambda Z: Z, 2, steps=1),
    "topk": _topk,
    "topk codes": lambda Z: _topk(torch.rand(9, 4)).encode(Z),
}


@pytest.mark.parametrize("name", ON_ACTIVATIONS)
def test_activations_that_are_empty_or_not_finite_are_refused(name):
    Z = torch.rand(6, 4)
    for value in (float("nan"), float("inf")):
        Z[2, 1] = value
        with pytest.raises(ValueError, match=r"activations are NaN or infinite in 1 of 6 rows; check the values"):
            ON_ACTIVATIONS[name](Z)
    with pytest.raises(ValueError, match=r"activations have shape \(0, 4\); pass \(M, D\) with at least one row"):
        ON_ACTIVATIONS[name](Z[:0])


def test_other_numbers_that_are_empty_or_not_finite_are_refused():
    Z, nan = torch.rand(6, 4), float("nan")
    for act, said in (
        (lambda: non_negative_codes(Z, Z[:0]), r"concepts have shape \(0, 4\); pass"),
        (lambda: non_negative_codes(Z, Z * nan), "concepts are NaN or infinite in 6 of 6 rows"),
        (lambda: dictionary_contributions(craft(Z, 2), Z, Z[0], Z * nan), "slopes are NaN or infinite in 6 of 6"),
        (lambda: dictionary_contributions(craft(Z, 2), Z, Z, Z), r"the base \(6, 4\).*pass \(M, D\), \(D,\)"),
        (lambda: face(Z, lambda Z: Z * nan, 2), "outputs of rest are NaN or infinite in 6 of 6 rows"),
        (lambda: sobol_indices(lambda mask: mask[:, 0] * nan, 2), "scores are NaN or infinite in 64 of 64 rows"),
        (lambda: sobol_indices(lambda mask: mask, 2), r"scores have shape \(64, 2\); return one score for each mask"),
        (lambda: image_crops(torch.rand(0, 1, 4, 4)), r"images have shape \(0, 1, 4, 4\); pass \(N, C, H, W\)"),
        (lambda: image_crops(torch.full((2, 1, 4, 4), nan)), "images are NaN or infinite in 2 of 2 rows"),
        (lambda: _topk(Z, batch=0), "steps is 1 and batch 0; pass steps >= 0 and batch >= 1"),
    ):
        with pytest.raises(ValueError, match=said):
            act()


def test_a_dictionary_rebuilds_from_its_offset():
    made = Dictionary(torch.eye(2), torch.tensor([1.0, 2.0]), lambda Z: Z)
    assert made.rebuilt(torch.tensor([[3.0, 4.0]])).tolist() == [[4.0, 6.0]]
