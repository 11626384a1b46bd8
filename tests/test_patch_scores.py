"""Covered patches: measures and controls are those that loops over patches give."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, LayerIntegratedGradients
from scipy.stats import spearmanr
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.errors import NotFittedError
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.metrics import patch_agreement
from captum_xnn.metrics._controls import random_maps, random_partition
from captum_xnn.metrics._patches import drop_orthogonality, map_identification
from captum_xnn.models import ContributionGroups, ConvSRAE
from captum_xnn.patch_scores import CoveredBatch, patch_scores, patch_scores_of

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
    assert found.examples == 5
    assert found.agreement == pytest.approx(patch_agreement(maps, drops, contributions=own), abs=1e-6)
    assert found.drops.o1 == pytest.approx(drop_orthogonality(drops, contributions=own).o1, abs=1e-5)
    side = own.sign()[..., None]
    assert found.identified == map_identification(maps * side[..., None], drops * side)
    assert found.movement == pytest.approx(float(drops.abs().sum() / drops.sum(1).abs().sum()), abs=1e-4)
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

    agreement, o1, identified = [], [], []
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
        side = c_k.sign()[..., None]
        identified.append(map_identification(drawn * side[..., None], lost_k * side))
    assert found.agreement_random_groups == pytest.approx(sum(agreement) / 3, abs=0.03)
    assert found.drops_random_groups.o1 == pytest.approx(sum(o1) / 3, abs=0.03)
    assert found.identified_random_groups == pytest.approx(sum(identified) / 3, abs=0.1)


def test_one_x_feature_agrees_as_the_1_heatmap_where_the_integral_is_fine(model):
    """The docstring's remedy: with the default tolerance, the two numbers may differ by the error of the integral."""
    data = torch.randn(90, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    form = partial(ContributionGroups, tolerance=1e-5, most=4096)
    xnn = XNNAttribution(model, "1", 1, autoencoder=form).fit(data, 0, progress=False)
    found = patch_scores(xnn, data[:6], 0, grid=2)
    assert found.agreement == pytest.approx(found.agreement_one_heatmap, abs=1e-6) and found.movement > 0.999


def test_a_learned_form_without_contributions_has_no_random_groups(model):
    """Nothing can be put back into a layer of which a mean is explained."""
    settings = {"heatmap": FromCaptum(InputXGradient), "output_transform": lambda Z: Z.mean((2, 3))}
    xnn = XNNAttribution(model, "1", 2, autoencoder=partial(SRAE, hidden=(8,)), recipe=Recipe(steps=20), **settings)
    xnn.fit(DATA, positives=torch.ones(60, dtype=torch.bool), progress=False)
    found = patch_scores(xnn, SOME)
    assert found.agreement_random_groups is found.drops_random_groups is found.identified_random_groups is None
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


class Words(nn.Module):
    """Two outputs of a text by the mean of its words, where the mask has them."""

    def __init__(self):
        super().__init__()
        self.place = nn.Embedding(9, 6)
        self.embedding, self.act = nn.Embedding(11, 6, padding_idx=0), nn.Tanh()
        self.out = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def pooled(self, vectors, mask):
        z = self.act(vectors + self.place(torch.arange(vectors.shape[1])))
        return (z * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids, mask):
        return self.out(self.pooled(self.embedding(ids), mask.to(self.place.weight)))


def _texts(L, lengths):
    ids = torch.randint(1, 11, (len(lengths), L), generator=torch.Generator().manual_seed(L))
    mask = (torch.arange(L) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@pytest.fixture
def words():
    torch.manual_seed(3)
    model = Words().double().eval()
    ids, mask = _texts(9, [9] * 60)
    backend = FromCaptum(LayerIntegratedGradients, layer="embedding", n_steps=8)
    xnn = XNNAttribution(model, "out.1", 2, heatmap=backend, unpack=lambda b: (b[0], (b[1],)))
    return model, xnn.fit([(ids, mask)], target=0, progress=False)


@pytest.mark.parametrize("fill", [None, 0])
def test_tokens_are_covered_by_the_mean_embedding_or_an_id(words, fill):
    """Texts of two lengths with padding, by loops over the tokens of each."""
    model, xnn = words
    lengths = [[9, 5, 6], [4, 7]]
    batches = [_texts(9, lengths[0]), _texts(7, lengths[1])]
    covered = [CoveredBatch((ids,), (mask,), of) for (ids, mask), of in zip(batches, lengths, strict=True)]
    found = patch_scores_of(xnn, covered, 0, fill=fill, internal_batch_size=4)
    mean = model.embedding.weight[1:].mean(0)
    form = xnn.explainer(0).form

    def contributions(vectors, mask):
        """Contributions and output: what the last layer is given, times its weights."""
        with torch.no_grad():
            h = model.out[:2](model.pooled(vectors, mask))
            return ((h - form.base) * model.out[2].weight[0]) @ form.groups, model.out[2](h)[:, :1]

    correlations, shares, of_one, drops_padded, every, fits = [], [], [], [], [], []
    for (ids, mask), of in zip(batches, lengths, strict=True):
        why = xnn.explain(ids, 0, (mask,))
        maps, single = why.maps.sum(3), xnn.one_heatmap(ids, 0, (mask,)).sum(3)
        for n, length in enumerate(of):
            whole, output = contributions(model.embedding(ids[n : n + 1]), mask[n : n + 1].double())
            drops, lost = torch.zeros(2, 9, dtype=torch.float64), []
            for p in range(length):
                vectors = model.embedding(ids[n : n + 1]).detach().clone()
                vectors[0, p] = mean if fill is None else model.embedding.weight[fill]
                less, other = contributions(vectors, mask[n : n + 1].double())
                drops[:, p], lost = (whole - less)[0], [*lost, float(output - other)]
            correlations.append(
                [spearmanr(maps[n, k, :length].detach(), drops[k, :length]).statistic for k in range(2)]
            )
            side = [1 if c >= 0 else -1 for c in whole[0]]
            for k in range(2):
                own, other = (
                    side[j] * np.corrcoef(side[k] * maps[n, k, :length].detach(), drops[j, :length])[0, 1]
                    for j in (k, 1 - k)
                )
                fits.append(own > max(other, 0))
            shares.append((whole.abs() / whole.abs().sum())[0].tolist())
            of_one.append(spearmanr(single[n, 0, :length].detach(), lost).statistic)
            drops_padded.append(drops)
            every.append(whole[0])
    assert found.examples == 5
    expected = (torch.tensor(correlations) * torch.tensor(shares)).sum() / 5
    assert found.agreement == pytest.approx(float(expected), abs=1e-6)
    assert found.identified == pytest.approx(sum(fits) / 10)
    assert found.agreement_one_heatmap == pytest.approx(sum(of_one) / 5, abs=1e-6)
    o1 = drop_orthogonality(torch.stack(drops_padded), contributions=torch.stack(every)).o1
    assert found.drops.o1 == pytest.approx(o1, abs=1e-6)
    assert found.agreement_random_groups is not None and abs(found.agreement_random_maps) < 0.5
    assert not model.embedding._forward_hooks
    # Padding at the end is not covered, also where nobody counts it.
    unsaid = patch_scores_of(xnn, [batch._replace(lengths=None) for batch in covered], 0, fill=fill)
    assert (unsaid.agreement, *unsaid.drops) == pytest.approx((found.agreement, *found.drops), rel=1e-9)


def test_columns_are_covered_by_their_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 1)).double()
    data = torch.randn(100, 5, dtype=torch.float64)
    xnn = XNNAttribution(model, "1", 2, heatmap=FromCaptum(InputXGradient)).fit(data, progress=False)
    some, mean = data[:6], data.mean(0)
    found = patch_scores(xnn, some, fill=mean)
    why = xnn.explain(some)
    drops = []
    for p in range(5):
        hidden = some.clone()
        hidden[:, p] = mean[p]
        drops.append(why.contributions - xnn.contributions(hidden).contributions)
    drops = torch.stack(drops, 2)
    share = why.contributions.abs() / why.contributions.abs().sum(1, keepdim=True)
    pairs = [[spearmanr(why.maps[n, k], drops[n, k]).statistic for k in range(2)] for n in range(6)]
    assert found.agreement == pytest.approx(float((share * torch.tensor(pairs)).sum() / 6), abs=1e-6)
    assert found.drops.o1 == pytest.approx(drop_orthogonality(drops, contributions=why.contributions).o1, abs=1e-6)


def test_ids_that_go_into_no_embedding_need_a_fill():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(6, 4), nn.Linear(4, 1)

        def forward(self, ids):
            return self.out(self.layer(nn.functional.one_hot(ids, 6).float().mean(1)))

    ids = torch.randint(0, 6, (40, 5), generator=torch.Generator().manual_seed(0))
    xnn = XNNAttribution(Counts(), "layer", 2).fit(ids, progress=False)
    even = xnn.with_heatmap(Even())
    with pytest.raises(ValueError, match=r"no nn.Embedding of the model takes the ids \(1, 5\), .* pass fill=, the id"):
        patch_scores(even, ids[:1])
    assert patch_scores(even, ids[:1], fill=0).agreement == 0  # even maps rank nothing


class Even:
    """Maps that are the same everywhere."""

    def __call__(self, network, inputs, features, **options):
        return tuple(torch.ones(len(x), len(features), *x.shape[1:]) for x in inputs)


class Minus(nn.Module):
    """The difference of two outputs of a model, as its only output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        y = self.model(x)
        return y[:, :1] - y[:, 1:2]


def two_outputs(seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 8), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    with torch.no_grad():
        model[-1].bias -= model(DATA).mean(0)
    return model


def test_a_difference_is_judged_by_its_own_drops():
    """The same as of a model that has the difference as its only output, and other than of the target alone."""
    model = two_outputs(6)
    fine = partial(ContributionGroups, intervals=256, tolerance=1e-5)  # ranks of drops follow small errors
    xnn = XNNAttribution(model, "1", 3, autoencoder=fine).fit(DATA, 0, progress=False)
    found = patch_scores(xnn, SOME, 0, against=1, seed=3)
    alone = XNNAttribution(Minus(model), "model.1", 3, autoencoder=fine).fit(DATA, progress=False)
    form = alone.explainer().form
    form.groups, form.base = xnn.explainer(0).form.groups, xnn.explainer(0).form.base
    form.config["n_features"] = form.groups.shape[1]
    wanted = patch_scores(alone, SOME, seed=3)
    for name, value in wanted._asdict().items():
        assert getattr(found, name) == pytest.approx(value, abs=2e-3), name
    target = patch_scores(xnn, SOME, 0, seed=3)
    assert found.agreement_one_heatmap != pytest.approx(target.agreement_one_heatmap, abs=0.01)
    # By loops, with the contributions of the difference.
    own = xnn.contributions(SOME, 0, against=1).contributions
    drops = drops_of(lambda x: xnn.contributions(x, 0, against=1).contributions)
    assert found.drops.o1 == pytest.approx(drop_orthogonality(drops, contributions=own).o1, abs=1e-4)


def test_a_learned_difference_needs_a_joint_fit():
    model = two_outputs(6)
    settings = {"autoencoder": partial(SRAE, hidden=(8,)), "recipe": Recipe(steps=20), "heatmap": InputXGradient}
    xnn = XNNAttribution(model, "5", 2, **settings).fit(DATA, (0, 1), joint=True, progress=False)
    found = patch_scores(xnn, SOME, 0, against=1)
    drops = drops_of(lambda x: xnn.contributions(x, 0, against=1).contributions)
    own = xnn.contributions(SOME, 0, against=1).contributions
    assert found.drops.o1 == pytest.approx(drop_orthogonality(drops, contributions=own).o1, abs=1e-4)
    alone = XNNAttribution(model, "5", 2, **settings).fit(DATA, [0, 1], progress=False)
    with pytest.raises(NotFittedError, match="no joint explainer"):
        patch_scores(alone, SOME, 0, against=1)


class OfBytes(nn.Module):
    """A model of images in bytes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.double() / 255)


@pytest.mark.parametrize("size", [12, 72])
def test_images_in_bytes_are_covered_as_others_are(size):
    """Their fits learned from no patches, and their scores took them for ids of tokens."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    model = nn.Sequential(*convolutions, nn.Linear(128, 3)).double().eval()
    images = (torch.rand(40, 3, size, size) * 255).round().byte()
    every = torch.ones(40, dtype=torch.bool)
    real, whole = (
        XNNAttribution(m, layer, 3).fit(x, 0, positives=every, progress=False)
        for m, layer, x in ((model, "3", images.double() / 255), (OfBytes(model), "model.3", images))
    )
    torch.testing.assert_close(whole.explainer(0).form.groups, real.explainer(0).form.groups, rtol=0, atol=0.05)
    wanted = patch_scores(real, images[:4].double() / 255, 0, fill=128 / 255)
    assert patch_scores(whole, images[:4], 0, fill=128).drops.o1 == pytest.approx(wanted.drops.o1, abs=0.1)
    assert patch_scores(whole, images[:4], 0).identified is not None


@pytest.mark.parametrize("shape", [(1, 6, 6, 6), (2, 6, 6, 6), (1, 30)], ids=str)
def test_inputs_without_patches_are_refused(shape):
    """Rather than given 0, the best O1."""
    torch.manual_seed(0)
    convolution = {4: nn.Conv3d, 2: nn.Conv1d}[len(shape)](shape[0], 4, 3)
    model = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    data = torch.randn(40, *shape)
    model(data)
    xnn = XNNAttribution(model, "1", 2).fit(data, 0, positives=torch.ones(40).bool(), progress=False)
    with pytest.raises(ValueError, match=r"dimension 1 holds channels in place of patches; explain a module whose"):
        patch_scores(xnn, data[:3], 0)


def test_a_single_patch_of_an_image_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    data = torch.randn(40, 1, 8, 8)
    xnn = XNNAttribution(model, "1", 2).fit(data, 0, positives=torch.ones(40).bool(), progress=False)
    with pytest.raises(
        ValueError, match="grid is 1, and a single patch cannot be compared with others; pass grid >= 2"
    ):
        patch_scores(xnn, data[:3], 0, grid=1)
