"""Covered patches: measures and controls are those that loops over patches give."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from captum.attr import InputXGradient
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.metrics import patch_agreement, random_maps
from captum_xnn.metrics._controls import random_partition
from captum_xnn.metrics._patches import drop_orthogonality
from captum_xnn.models import ConvSRAE
from captum_xnn.patch_scores import patch_scores

DATA = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
SOME = DATA[:5]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 1))


def covered(image, patch):
    """An image of 8 x 8 with one of 16 patches in its mean colour."""
    hidden, (row, column) = image.clone(), divmod(patch, 4)
    hidden[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = image.mean()
    return hidden


def drops_of(numbers):
    """What functions of an image (K,) lose by each patch, (N, K, P)."""
    whole = numbers(SOME)
    return torch.stack([whole - numbers(torch.stack([covered(x, p) for x in SOME])) for p in range(16)], 2)


@pytest.mark.parametrize("form", ["groups", "learned"])
def test_measures_and_controls_by_loops(model, form):
    settings = {"heatmap": FromCaptum(InputXGradient)}
    if form == "learned":
        settings |= {"autoencoder": partial(ConvSRAE, hidden=(8,)), "recipe": Recipe(steps=40)}
    xnn = XNNAttribution(model, "1", 2, **settings).fit(DATA, progress=False)
    found = patch_scores(xnn, SOME, seed=3, internal_batch_size=7)
    why = xnn.explain(SOME)
    own = why.contributions
    drops = drops_of(lambda x: xnn.contributions(x).contributions)
    maps = why.maps.sum(2)
    assert found.images == 5
    assert found.agreement == pytest.approx(patch_agreement(maps, drops, contributions=own), abs=1e-6)
    assert found.drops.o1 == pytest.approx(drop_orthogonality(drops, contributions=own).o1, abs=1e-5)
    noise = [
        patch_agreement(random_maps(maps, seed=3 + i), drops * own.sign()[..., None], contributions=own)
        for i in range(3)
    ]
    assert found.agreement_random_maps == pytest.approx(sum(noise) / 3, abs=1e-6)
    x = SOME.clone().requires_grad_()
    whole = torch.autograd.grad(model(x).sum(), x)[0] * x.detach()
    with torch.no_grad():
        lost = drops_of(model)
    assert found.agreement_one_heatmap == pytest.approx(patch_agreement(whole, lost), abs=1e-6)

    # Random groups: contributions of channels by a fine sum along the path, from the base of the fit or of the images.
    base = xnn.explainer().form.base if form == "groups" else model[:2](SOME).mean((0, 2, 3))[:, None, None]

    def channels(x):
        Z = model[:2](x).detach()
        total = 0
        for i in range(400):
            z = (base + (i + 0.5) / 400 * (Z - base)).detach().requires_grad_()
            total = total + torch.autograd.grad(model[2:](z).sum(), z)[0] / 400
        return (total * (Z - base)).sum((2, 3))

    agreement, o1 = [], []
    c, lost = channels(SOME), drops_of(channels)
    x = SOME.clone().requires_grad_()
    Z = model[:2](x)
    at = Z.detach().requires_grad_()
    slope = torch.autograd.grad(model[2:](at).sum(), at)[0]
    for i in range(3):
        a = random_partition(6, 2, torch.Generator().manual_seed(3 + i))
        c_k, lost_k = c @ a, torch.einsum("ndp,dk->nkp", lost, a)
        grads = [
            torch.autograd.grad((Z * slope * a[:, k, None, None]).sum(), x, retain_graph=True)[0] for k in range(2)
        ]
        drawn = torch.stack([g[:, 0] * SOME[:, 0] for g in grads], 1)
        agreement.append(patch_agreement(drawn, lost_k, contributions=c_k))
        o1.append(drop_orthogonality(lost_k, contributions=c_k).o1)
    assert found.agreement_random_groups == pytest.approx(sum(agreement) / 3, abs=0.03)
    assert found.drops_random_groups.o1 == pytest.approx(sum(o1) / 3, abs=0.03)


def test_a_learned_form_without_contributions_has_no_random_groups(model):
    """Nothing can be put back into a layer of which a mean is explained."""
    settings = {"heatmap": FromCaptum(InputXGradient), "output_transform": lambda Z: Z.mean((2, 3))}
    xnn = XNNAttribution(model, "1", 2, autoencoder=partial(SRAE, hidden=(8,)), recipe=Recipe(steps=20), **settings)
    xnn.fit(DATA, positives=torch.ones(60, dtype=torch.bool), progress=False)
    found = patch_scores(xnn, SOME)
    assert found.agreement_random_groups is found.drops_random_groups is None
    drops = drops_of(lambda x: xnn.contributions(x).contributions)
    own = xnn.contributions(SOME).contributions
    assert found.drops.o1 == pytest.approx(drop_orthogonality(drops, contributions=own).o1, abs=1e-5)


def test_two_halves_lose_by_patches_of_their_own():
    """Contributions of a sum of squares are known: each square less that of the base."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            seen = self.layer(torch.stack([x[:, 0, :4].sum((1, 2)), x[:, 0, 4:].sum((1, 2))], 1))
            return seen.square().sum(1, keepdim=True)

    xnn = XNNAttribution(Halves(), "layer", 2, heatmap=FromCaptum(InputXGradient)).fit(DATA, progress=False)
    found = patch_scores(xnn, SOME)

    def squares(x):
        return torch.stack([x[:, 0, :4].sum((1, 2)), x[:, 0, 4:].sum((1, 2))], 1).square()

    drops = drops_of(squares)
    assert not drops[:, 0, 8:].any() and not drops[:, 1, :8].any()
    own = squares(SOME) - xnn.explainer().form.base.square()
    expected = drop_orthogonality(drops, contributions=own).o1
    for o1 in (found.drops.o1, found.drops_random_groups.o1):  # of two dimensions there is one division
        assert o1 == pytest.approx(expected, abs=1e-3)
