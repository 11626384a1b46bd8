"""Comparison of methods: every number is the one that fit, score, explain and patch_scores give by hand."""

from __future__ import annotations

import csv
import math
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, LayerIntegratedGradients
from command_line import write
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_xnn import SRAE, ContributionGroups, Recipe, XNNAttribution, compare
from captum_xnn.__main__ import main
from captum_xnn.activations._activations import Source
from captum_xnn.activations._collecting import collect
from captum_xnn.cli._compare import _selected
from captum_xnn.comparison._methods import METHODS, SelectedRows
from captum_xnn.comparison._table import Estimate, MethodComparison
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.metrics import drop_orthogonality, matched_features, orthogonality
from captum_xnn.models.baselines import NN
from captum_xnn.models.baselines._partitions import prca, random_partition, spectral_partition, subspace_relevances
from captum_xnn.patch_scores import patch_scores

IMAGES = torch.rand(150, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LEARNED = partial(NN, hidden=(8,))
RECIPE = Recipe(steps=30)
SETTINGS = {"n_features": 2, "heatmap": InputXGradient, "recipe": RECIPE, "progress": False}


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 8), nn.ReLU(), nn.Linear(8, 3)
        )
    with torch.no_grad():
        made[-1].bias -= made(IMAGES).mean(0)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def tabular():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():  # two reasons: each half of the dimensions reads one half of the inputs
        for layer in (made[0], made[2]):
            layer.weight[:8, layer.in_features // 2 :] = 0
            layer.weight[8:, : layer.in_features // 2] = 0
        made[4].weight.abs_()
    return made.requires_grad_(False), torch.randn(120, 6, generator=torch.Generator().manual_seed(2))


def folds(classes, seed=0):
    """The fold of each example among ten: shuffled, sorted by class, counted off."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
    fold = torch.empty(len(classes), dtype=torch.long)
    for place, row in enumerate(sorted(order, key=lambda row: int(classes[row]))):
        fold[row] = place % 10
    return fold


@pytest.fixture(scope="module")
def two_targets(model):
    return compare(
        model, "5", IMAGES, [2, 0], {"groups": "groups", "NN": LEARNED, "random": "random groups", "one": "1-Heatmap"},
        images=3, repeats=2, seed=4, **SETTINGS,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "form"), [("groups", None), ("NN", LEARNED)])
def test_numbers_are_those_by_hand(model, two_targets, name, form):
    classes = model(IMAGES).argmax(1)
    fold = folds(classes, seed=4)
    i = 0
    for repeat in range(2):
        held = fold % 5 == repeat
        train, test = IMAGES[~held], IMAGES[held]
        make = partial(XNNAttribution, model, "5", 2, autoencoder=form, heatmap=InputXGradient, recipe=RECIPE)
        xnn = make(seed=4 + repeat).fit(train, target=[2, 0], progress=False)
        first = fold[~held] < 5
        again = [
            make(seed=4 + repeat + k).fit(train[half], target=[2, 0], progress=False)
            for k, half in enumerate((first, ~first))
        ]
        for target in (2, 0):
            values = {key: own[i] for key, own in two_targets.values[name].items()}
            i += 1
            score = xnn.score(test, target)
            shown = test[classes[held] == target][:3]
            why = xnn.explain(shown, target)
            patches = patch_scores(xnn, shown, target, seed=4 + repeat)
            first_method = make(seed=4 + repeat, autoencoder=None).fit(train, target=[2, 0], progress=False)
            shared = patch_scores(first_method, shown, target, seed=4 + repeat)  # as many x-features, so one control
            features = [other.contributions(test, target).features for other in again]
            expected = {
                "f_reg": score.f_reg,
                "f_cls": score.f_cls,
                "x_features": 2,
                "stability": matched_features(*features).mean,
                "maps_o1": orthogonality(why.maps, contributions=why.contributions).o1,
                "agreement": patches.agreement,
                "agreement_random_groups": shared.agreement_random_groups,
                "agreement_random_maps": patches.agreement_random_maps,
                "identified": patches.identified,
                "movement": patches.movement,
                "identified_random_groups": shared.identified_random_groups,
                "drops_o1": patches.drops.o1,
                "drops_o1_random_groups": shared.drops_random_groups.o1,
            }
            assert {key: values[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
            assert set(values) - set(expected) == {"fit_seconds", "explain_seconds"}
            assert values["fit_seconds"] > 0 and values["explain_seconds"] > 0
            if form is None:
                one = two_targets.values["one"]["agreement"][i - 1]
                assert one == pytest.approx(patches.agreement_one_heatmap, abs=1e-6)
    assert i == 4 == len(two_targets.values[name]["f_reg"])


def _by_number(shape, n_features=5, *, number, **settings):
    return ContributionGroups(shape, number, **settings)


@pytest.mark.filterwarnings("ignore:random. maps are zero")
def test_random_groups_are_as_many_as_the_rows_x_features_whatever_the_order(model):
    methods = {"two": partial(_by_number, number=2), "random": "random groups", "NN": LEARNED}
    settings = SETTINGS | {"n_features": 4}
    found, turned = (
        compare(model, "5", IMAGES, 0, dict(some), images=3, **settings)
        for some in (methods.items(), reversed(methods.items()))
    )
    assert [row["x_features"] for row in found.table] == [2, 4, 4]
    controls = [key for key in found.values["two"] if key.endswith("random_groups")]
    for name in methods:
        for key in controls:
            assert found.values[name][key] == pytest.approx(turned.values[name][key], abs=1e-5)
    assert found.values["NN"]["drops_o1_random_groups"] == found.values["random"]["drops_o1_random_groups"]
    held = folds(model(IMAGES).argmax(1)) % 5 == 0
    xnn = XNNAttribution(model, "5", 2, heatmap=InputXGradient).fit(IMAGES[~held], target=0, progress=False)
    two = patch_scores(xnn, IMAGES[held][model(IMAGES[held]).argmax(1) == 0][:3], 0)
    assert found.values["two"]["drops_o1_random_groups"][0] == pytest.approx(two.drops_random_groups.o1, abs=1e-5)


def test_one_x_feature_is_not_identified_and_subspaces_count_their_remainder(model):
    settings = SETTINGS | {"n_features": 1}
    found = compare(model, "5", IMAGES, 0, ["groups", "PRCA", "TopK SAE"], images=3, **settings)
    assert [row["x_features"] for row in found.table] == [1, 2, 1]
    assert not {"identified", "identified_random_groups"} & set(found.values["groups"])


def test_random_groups_are_as_faithful_as_groups_and_as_stable_as_chance(model, two_targets):
    own, by_chance = two_targets.values["groups"], two_targets.values["random"]
    assert by_chance["f_reg"] == pytest.approx(own["f_reg"], abs=1e-6) and by_chance["f_cls"] == own["f_cls"]
    fold = folds(model(IMAGES).argmax(1), seed=4)
    held = fold % 5 == 0
    train, some = IMAGES[~held], IMAGES[held]
    features = []
    for seed, half in ((4, fold[~held] < 5), (5, fold[~held] >= 5)):  # each half with a draw of its own
        xnn = XNNAttribution(model, "5", 2).fit(train[half], target=2, progress=False)
        xnn.explainer(2).form.groups = random_partition(8, 2, torch.Generator().manual_seed(seed))
        features.append(xnn.contributions(some, 2).features)
    assert by_chance["stability"][0] == pytest.approx(matched_features(*features).mean, abs=1e-5)
    assert by_chance["stability"] != own["stability"]
    xnn = XNNAttribution(model, "5", 2, heatmap=InputXGradient).fit(train, target=2, progress=False)
    form = xnn.explainer(2).form
    form.groups = random_partition(8, 2, torch.Generator().manual_seed(4))
    shown = some[model(some).argmax(1) == 2][:3]
    assert by_chance["agreement"][0] == pytest.approx(patch_scores(xnn, shown, 2, seed=4).agreement, abs=1e-5)


def test_partition_divides_the_contributions_of_training_examples(model):
    """With all 120 training examples in the sample, spectral groups are those of their contributions by hand."""
    make = partial(ContributionGroups, positives=1000, others=1000)
    found = compare(model, "5", IMAGES, 1, ["spectral groups"], images=3, **SETTINGS)
    held = folds(model(IMAGES).argmax(1)) % 5 == 0
    xnn = XNNAttribution(model, "5", 2, autoencoder=make).fit(IMAGES[~held], target=1, progress=False)
    form = xnn.explainer(1).form
    Z, linear = model[:6](IMAGES[~held]), model[6].weight[1]
    c = (Z - Z.mean(0)) * linear
    form.groups = spectral_partition(c, 2).float()
    shown = IMAGES[held][model(IMAGES[held]).argmax(1) == 1][:3]
    expected = patch_scores(xnn, shown, 1)
    assert found.values["spectral groups"]["drops_o1"][0] == pytest.approx(expected.drops.o1, abs=1e-4)


def test_subspaces_are_those_of_activations_and_contexts(model):
    """Contexts are mean slopes along the path from the mean activation, here by a fine sum."""
    found = compare(model, "3", IMAGES, 1, ["PRCA"], images=3, **SETTINGS)
    fold = folds(model(IMAGES).argmax(1))
    held = fold % 5 == 0
    shown = IMAGES[held][model(IMAGES[held]).argmax(1) == 1][:3]

    def factors(x, base):
        Z, slopes = model[:4](x), 0
        for i in range(200):
            z = (base + (i + 0.5) / 200 * (Z - base)).requires_grad_()
            slopes = slopes + torch.autograd.grad(model[4:](z)[:, 1].sum(), z)[0] / 200
        return Z - base, slopes

    def fitted(train):  # all training examples are in the sample of a rule, which takes 200 of all at most
        base = model[:4](train).mean(0)
        U = prca(*factors(train, base), 2)
        return lambda x: subspace_relevances(U, *factors(x, base))

    own = fitted(IMAGES[~held])

    def drop(p):
        hidden, (row, column) = shown.clone(), divmod(p, 4)
        hidden[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = shown.mean((2, 3), keepdim=True)
        return own(shown) - own(hidden)

    values = found.values["PRCA"]
    drops = torch.stack([drop(p) for p in range(16)], 2)
    assert values["drops_o1"][0] == pytest.approx(drop_orthogonality(drops, contributions=own(shown)).o1, abs=5e-3)
    halves = [fitted(IMAGES[~held][part])(IMAGES[held]) for part in (fold[~held] < 5, fold[~held] >= 5)]
    assert values["stability"][0] == pytest.approx(matched_features(*halves).mean, abs=2e-2)  # integrals differ by 1 %
    assert values["f_reg"][0] < 1e-3 and "maps_o1" not in values


def test_subspaces_of_feature_maps_add_up(model):
    xnn = XNNAttribution(model, "1", 2)
    made = METHODS["PRCA"].fit(xnn, collect(model, "1", IMAGES), [0, 2])
    for target in (0, 2):
        contributions = xnn.contributions(IMAGES[:5], target).contributions
        parts = made.contributions(IMAGES[:5], target)
        assert parts.shape == (5, 3) and bool((parts.abs() > 1e-6).any(0).all())
        assert torch.allclose(parts.sum(1), contributions.sum(1).double(), atol=1e-5)


def test_concepts_of_feature_maps_leave_over_what_they_do_not_rebuild(model):
    """Every place is coded by itself, as scipy codes it, and contributions are sums over places."""
    optimize = pytest.importorskip("scipy.optimize")
    pytest.importorskip("sklearn")
    xnn = XNNAttribution(model, "1", 2)
    made = METHODS["CRAFT"].fit(xnn, collect(model, "1", IMAGES), [0, 2])
    H = made.concepts[2].concepts.double()
    E, left = (x.double() for x in made.contributions_and_rest(IMAGES[:3], 2))
    contributions = xnn.contributions(IMAGES[:3], 2).contributions
    torch.testing.assert_close(E.sum(1) + left, contributions.sum(1).double(), atol=1e-4, rtol=1e-4)
    a, slopes = made.factors(IMAGES[:3], 2, None)
    base = made.base(2).reshape(-1)
    Z = (a + base).double()

    def code(z):
        return torch.from_numpy(optimize.nnls(H.T.numpy(), z.detach().numpy())[0])

    codes = torch.stack([torch.stack([code(z) - code(base.double()) for z in of]) for of in Z])
    wanted = (codes * (slopes.double() @ H.T)).sum(1)
    torch.testing.assert_close(E, wanted, atol=1e-4, rtol=1e-3)
    assert float(left.abs().mean()) > 0.01 * float(E.abs().mean())


@pytest.mark.parametrize("method", ["CRAFT", "TopK SAE"])
def test_what_concepts_leave_over_is_their_error(model, method):
    if method == "CRAFT":
        pytest.importorskip("sklearn")
    found = compare(model, "5", IMAGES, 0, {"it": method}, images=2, **SETTINGS)
    with torch.no_grad():
        classes, y = model(IMAGES).argmax(1), model(IMAGES)[:, 0]
    held = folds(classes) % 5 == 0
    xnn = XNNAttribution(model, "5", 2)
    source = collect(model, "5", IMAGES)
    train = source._replace(Z=source.Z[~held], y_hat=source.y_hat[~held], source=Source(IMAGES[~held], None))
    made = METHODS[method].fit(xnn, train, [0])
    numbers = made.xnn.contributions(IMAGES[held], 0)
    surrogate = numbers.bias + made.contributions(IMAGES[held], 0).sum(1)
    assert found.values["it"]["f_reg"][0] == pytest.approx(float((surrogate - y[held]).abs().mean()), abs=1e-2)
    assert found.values["it"]["f_reg"][0] > 0.01 and "maps_o1" not in found.values["it"]


def test_tabular_regression_has_no_classes_and_its_columns_are_patches(tabular):
    model, data = tabular
    found = compare(model, "3", data, None, ["groups", "1-Heatmap"], images=4, **SETTINGS)
    fold = folds(torch.zeros(len(data)))
    held = fold % 5 == 0
    xnn = XNNAttribution(model, "3", 2, heatmap=InputXGradient).fit(data[~held], progress=False)
    why = xnn.explain(data[held][:4])
    values = found.values["groups"]
    assert values["f_reg"][0] == pytest.approx(xnn.score(data[held]).f_reg, abs=1e-6)
    assert values["maps_o1"][0] == pytest.approx(orthogonality(why.maps, contributions=why.contributions).o1, abs=1e-4)
    patches = patch_scores(xnn, data[held][:4], fill=data[~held].mean(0))
    assert values["agreement"][0] == pytest.approx(patches.agreement, abs=1e-6)
    assert values["drops_o1"][0] == pytest.approx(patches.drops.o1, abs=1e-5)
    assert values["agreement_random_groups"][0] == pytest.approx(patches.agreement_random_groups, abs=1e-6)
    assert found.values["1-Heatmap"]["agreement"][0] == pytest.approx(patches.agreement_one_heatmap, abs=1e-6)
    assert (found.train, found.test, found.targets) == (96, 24, (None,))
    assert "f_cls" not in values and "selectivity" not in values


def test_texts_are_covered_token_by_token():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.act, self.out = nn.Embedding(9, 8), nn.Tanh(), nn.Linear(8, 1)

        def forward(self, ids, mask):
            z = self.embedding(ids) * mask[..., None]
            return self.out(self.act(z.sum(1)))

    torch.manual_seed(0)
    model, ids = Words(), torch.randint(0, 9, (60, 6))
    mask = (torch.rand(60, 6) < 0.8).float()
    backend = FromCaptum(LayerIntegratedGradients, layer="embedding", n_steps=8)
    settings = SETTINGS | {"heatmap": backend, "unpack": lambda batch: (batch[0], (batch[1],))}
    found = compare(model, "act", [(ids, mask)], None, ["groups", "spectral groups", "1-Heatmap"], images=4, **settings)
    held = folds(torch.zeros(60)) % 5 == 0
    xnn = XNNAttribution(model, "act", 2, heatmap=backend, unpack=settings["unpack"])
    xnn.fit([(ids[~held], mask[~held])], progress=False)
    expected = patch_scores(xnn, ids[held][:4], None, (mask[held][:4],))
    assert found.values["groups"]["agreement"][0] == pytest.approx(expected.agreement, abs=1e-6)
    shared = expected.agreement_random_groups
    for name in ("groups", "spectral groups"):
        assert found.values[name]["agreement_random_groups"][0] == pytest.approx(shared, abs=1e-6)
    # The single map of the output, by integrated gradients alone, is measured by the same patches.
    assert set(found.values["1-Heatmap"]) == {"explain_seconds", "agreement"}
    assert found.values["1-Heatmap"]["agreement"][0] == pytest.approx(expected.agreement_one_heatmap, abs=1e-6)


@pytest.mark.parametrize("kind", ["integers", "boolean"])
def test_known_parts_give_selectivity_and_locality(model, kind):
    """Quarters of the image as parts, of which the last is in every other image only."""
    quarters = 1 + 2 * (torch.arange(8) > 3)[:, None] + (torch.arange(8) > 3)
    masks = quarters.repeat(150, 1, 1)
    masks[::2][masks[::2] == 4] = 0
    marks = masks[:, None] == torch.arange(1, 5)[:, None, None]
    found = compare(
        model, "5", IMAGES, 2, ["groups", "PRCA", "1-Heatmap"], images=5,
        masks=masks if kind == "integers" else marks, **SETTINGS,
    )  # fmt: skip
    held = folds(model(IMAGES).argmax(1)) % 5 == 0
    xnn = XNNAttribution(model, "5", 2, heatmap=InputXGradient).fit(IMAGES[~held], target=2, progress=False)
    rows = (held & (model(IMAGES).argmax(1) == 2)).nonzero()[:5, 0]
    shown, parts = IMAGES[rows], marks[rows]
    changes = torch.zeros(5, 2, 4)
    for p in range(4):
        hidden = torch.where(parts[:, p][:, None], shown.mean((2, 3), keepdim=True), shown)
        changes[:, :, p] = xnn.contributions(shown, 2).contributions - xnn.contributions(hidden, 2).contributions
    assert not changes[~parts.flatten(2).any(2)[:, None].expand(5, 2, 4)].any()
    size = changes.abs()
    assert found.values["groups"]["selectivity"][0] == pytest.approx(float(size.amax(2).sum() / size.sum()), abs=1e-4)
    whole = changes.sum(1).abs()
    expected = float(whole.amax(1).sum() / whole.sum())
    assert found.values["groups"]["selectivity_whole"][0] == pytest.approx(expected, abs=1e-4)
    assert found.values["PRCA"]["selectivity_whole"][0] == pytest.approx(expected, abs=1e-3)  # it adds up to the same
    why = xnn.explain(shown, 2)
    maps = why.directed_maps()[:, :, 0].clamp(min=0)
    on_parts = torch.einsum("nkhw,nphw->nkp", maps / maps.sum((2, 3), keepdim=True), parts.float())
    share = why.contributions.abs() / why.contributions.abs().sum(1, keepdim=True)
    mean = (share[..., None] * on_parts).sum(0) / share.sum(0)[:, None]
    h = mean / mean.sum(1, keepdim=True)
    entropy = -(h * h.log()).nan_to_num().sum(1)
    assert found.values["groups"]["locality"][0] == pytest.approx(float((share.mean(0) * entropy).sum()), abs=1e-4)
    assert "locality" not in found.values["PRCA"]
    assert [m.key for m in found.measures if m.key.startswith(("select", "local"))] == [
        "selectivity", "selectivity_whole", "locality",
    ]  # fmt: skip


def test_wrong_masks_are_refused(model):
    for masks, said in [
        (
            torch.ones(149, 8, 8, dtype=torch.long),
            "masks of 149 examples, and methods are measured on 150 examples; pass one for each example of data",
        ),
        (torch.ones(150, 8, 8), r"masks are torch\.float32 \(150, 8, 8\); pass integers from 1 to P for parts"),
        (torch.zeros(150, 8, 8, dtype=torch.long), "mark no part, as all values are below 1; pass integers"),
        (np.ones((149, 8, 8), np.int64), "masks of 149 examples, and methods are measured on 150 examples"),
        (np.ones((150, 8, 6), np.int64), r"masks are 8 x 6, and an image has shape \(1, 8, 8\); pass masks of the"),
    ]:
        with pytest.raises(ValueError, match=said):
            compare(model, "5", IMAGES, 2, "groups", masks=masks, **SETTINGS)


def test_test_data_of_ones_own_and_loaders(tabular):
    model, data = tabular
    train, test = data[:80], data[80:]
    found = compare(model, "3", train, None, "groups", test=test, images=0, **SETTINGS)
    xnn = XNNAttribution(model, "3", 2).fit(train, progress=False)
    assert found.values["groups"]["f_reg"][0] == pytest.approx(xnn.score(test).f_reg, abs=1e-7)
    assert (found.train, found.test) == (80, 40)
    loaders = [DataLoader(TensorDataset(part), batch_size=7) for part in (train, test)]
    other = compare(model, "3", loaders[0], None, "groups", test=loaders[1], images=0, **SETTINGS)
    sets = compare(model, "3", TensorDataset(train), None, "groups", test=TensorDataset(test), images=0, **SETTINGS)
    for key in ("f_reg", "stability"):
        assert sets.values["groups"][key] == pytest.approx(found.values["groups"][key], abs=1e-5)
        assert other.values["groups"][key] == pytest.approx(found.values["groups"][key], abs=1e-5)


class Sum(nn.Module):
    """A network of the sum of two tables."""

    def __init__(self, network, added=lambda b: b):
        super().__init__()
        self.network, self.added = network, added

    def forward(self, a, b):
        return self.network(a + self.added(b))


@pytest.mark.filterwarnings("ignore:groups. maps are zero")
def test_columns_of_the_first_of_two_tables_are_covered_by_their_means(tabular):
    """Also where a batch holds one of the covered examples, whose own mean would cover nothing."""
    model, data = tabular
    parts = data, torch.zeros_like(data)
    loader = [
        {"a": a, "b": b, "labels": torch.zeros(len(a))} for a, b in zip(*(x.split(5) for x in parts), strict=True)
    ]
    one = compare(model, "3", data, None, ["groups", "1-Heatmap"], images=4, **SETTINGS)
    for two in (parts, loader):
        both = compare(Sum(model), "network.3", two, None, ["groups", "1-Heatmap"], images=4, **SETTINGS)
        for key in ("agreement", "identified", "movement", "drops_o1"):
            assert both.values["groups"][key] == pytest.approx(one.values["groups"][key], abs=1e-4)
        assert both.values["1-Heatmap"]["agreement"] == pytest.approx(one.values["1-Heatmap"]["agreement"], abs=1e-4)


@pytest.mark.filterwarnings("ignore:groups. maps are zero")
def test_one_of_the_inputs_may_be_a_number_for_each_example(tabular):
    model, data = tabular
    loader = [{"a": a, "b": torch.zeros(len(a))[:, None]} for a in data.split(40)]
    numbers = [{"a": a, "b": torch.zeros(len(a))} for a in data.split(40)]
    columns, found = (
        compare(Sum(model, added), "network.3", given, None, "groups", images=4, **SETTINGS)
        for added, given in ((lambda b: b, loader), (lambda b: b[:, None], numbers))
    )
    assert found.values["groups"]["maps_o1"] == pytest.approx(columns.values["groups"]["maps_o1"], abs=1e-6)


def test_a_single_row_is_not_covered_by_its_own_mean(tabular):
    model, data = tabular
    xnn = XNNAttribution(model, "3", 2, heatmap=InputXGradient).fit(data, progress=False)
    with pytest.raises(ValueError, match=r"inputs are 1 row of 6 columns.*so nothing would be covered; pass fill="):
        patch_scores(xnn, data[:1])
    assert patch_scores(xnn, data[:1], fill=data.mean(0)).drops.o1 > 0


def test_the_same_call_gives_the_same_numbers(model):
    calls = [
        compare(model, "5", IMAGES, 0, ["groups", "random groups", "SRAE"], images=2, seed=3, **SETTINGS)
        for _ in range(2)
    ]
    kept = [
        {name: {k: v for k, v in of.items() if not k.endswith("seconds")} for name, of in found.values.items()}
        for found in calls
    ]
    assert kept[0] == kept[1] and len(kept[0]["SRAE"]) == 13


def test_rows_of_tensors_and_of_batches_are_the_same():
    x, more = torch.arange(200.0).reshape(100, 2), torch.arange(100)
    wanted = torch.tensor([0, 3, 63, 64, 99])
    loader = [(x[i : i + 9], (more[i : i + 9], "mean")) for i in range(0, 100, 9)]
    found = list(SelectedRows(Source(loader, lambda batch: batch), wanted))
    assert torch.equal(torch.cat([inputs for inputs, _ in found]), x[wanted])
    assert torch.equal(torch.cat([additional[0] for _, additional in found]), wanted)
    pairs = list(SelectedRows(Source((x, x + 1), None), wanted))
    assert torch.equal(torch.cat([inputs[1] for inputs, _ in pairs]), x[wanted] + 1)


@pytest.mark.filterwarnings("ignore:it. maps are zero")
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("groups", "SRAE", "1-Heatmap")])
def test_every_name_is_a_method(tabular, method):
    if "NMF" in method or method in ("Lasso", "CRAFT"):
        pytest.importorskip("sklearn")
    model, data = tabular
    found = compare(model, "3", data, None, {"it": method}, images=2, **SETTINGS)
    assert 0 <= found.values["it"]["f_reg"][0] < 1 and 0 <= found.values["it"]["stability"][0] <= 1
    if method in ("random groups", "spectral groups", "NMF of contributions", "largest dimensions", "PRCA", "DRSA"):
        assert found.values["it"]["f_reg"][0] < 1e-3


def test_a_more_faithful_method_raises_a_warning(tabular):
    model, data = tabular
    with pytest.warns(UserWarning, match=r"groups \(.*\) is clearly more faithful at layer '3' than random encoder"):
        compare(model, "3", data, None, ["random encoder", "groups"], images=0, repeats=3, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(model, "3", data, None, ["groups", "random encoder"], images=0, repeats=3, **SETTINGS)
        compare(model, "3", data, None, ["random encoder", "groups"], images=0, **SETTINGS)  # no intervals


def test_a_method_that_fails_leaves_its_row_empty(tabular):
    pytest.importorskip("sklearn")
    model, data = tabular
    with pytest.warns(UserWarning, match=r"NMF: a repeat is left out of the table.*NMF needs non-negative"):
        found = compare(model, "2", data, None, ["groups", "NMF"], images=0, **SETTINGS)
    assert found.table[1]["f_reg"] is None and found.table[0]["f_reg"] is not None
    with pytest.raises(ValueError, match="NMF needs non-negative"):
        compare(model, "2", data, None, ["NMF", "groups"], images=0, **SETTINGS)


def test_wrong_arguments(tabular, model):
    net, data = tabular
    for methods, said in [
        (["grups"], "method 'grups' does not exist; pass a form, or one of groups, SRAE"),
        (["SRAE", SRAE], "two methods are named 'SRAE'"),
        ([], "no methods to compare"),
    ]:
        with pytest.raises(ValueError, match=said):
            compare(net, "3", data, None, methods, **SETTINGS)
    with pytest.raises(TypeError, match="3 is not a method"):
        compare(net, "3", data, None, {"three": 3}, **SETTINGS)
    with pytest.raises(ValueError, match="pass 1 to 5, as each repeat holds out another fifth"):
        compare(net, "3", data, repeats=6, **SETTINGS)
    few = torch.cat([IMAGES[model(IMAGES).argmax(1) == c][: 4 + 20 * c] for c in (0, 1)])
    with pytest.raises(ValueError, match="the model gives class 0 to only 4 examples, and a comparison needs 10"):
        compare(model, "5", few, 0, **SETTINGS)


VALUES = {
    "groups": {"f_reg": (1.0, 2.0, 4.0), "agreement": (0.5, 0.25, 0.0), "agreement_random_maps": (0.0, 0.1, 0.2)},
    "a & b_c|d": {"f_reg": (3.0,)},
}
MADE = MethodComparison("fc", (0, 1, 2), 5, 80, 20, 1, VALUES)


def test_intervals_are_those_of_students_t():
    low, high = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1, 2, 4]))
    row, other = MADE.table
    assert (row["f_reg"], row["f_reg_low"], row["f_reg_high"]) == pytest.approx((7 / 3, low, high))
    assert (other["f_reg"], other["f_reg_low"], other["agreement"]) == (3.0, None, None)
    assert Estimate(1.0, 0.5).below(Estimate(3.0, 1.4)) and not Estimate(1.0, 0.5).below(Estimate(3.0, 1.6))
    assert Estimate.of([math.inf, 1.0]).half is None


def test_formats_parse_back(tmp_path):
    half = stats.sem([1, 2, 4]) * stats.t.ppf(0.975, 2)
    header, rule, *rows = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in MADE.to_markdown().splitlines()]
    assert header == ["method", "F_reg", "patch agreement", "agreement, noise"] and len(rule) == 4
    assert rows[0] == ["groups", f"{7 / 3:.3g} ± {half:.2g}", "0.25 ± 0.62", "0.1"]
    assert rows[1] == [r"a & b_c\|d", "3", "-", "-"]

    begin, _, head, _, *body, _, end = MADE.to_latex().splitlines()
    assert (begin, end) == (r"\begin{tabular}{lrrr}", r"\end{tabular}")
    assert [re.split(r" (?<!\\)& ", line.removesuffix(r" \\")) for line in body] == [
        ["groups", f"{7 / 3:.3g} $\\pm$ {half:.2g}", r"0.25 $\pm$ 0.62", "0.1"],
        [r"a \& b\_c|d", "3", "-", "-"],
    ]
    assert head == r"method & F\_reg & patch agreement & agreement, noise \\"

    with MADE.to_csv(tmp_path / "table.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in MADE.table] == read

    shown = repr(MADE).splitlines()
    assert shown[1].split() == ["groups", *rows[0][1].split(), *rows[0][2].split(), "0.1"]
    assert shown[-1] == (
        "Layer fc, targets 0, 1, 2, 5 x-features asked for; fitted on 80 examples and measured on 20 others; means "
        "with 95 % intervals over 3 targets and 1 repeat."
    )


def test_selected_columns_stand_in_their_order_in_every_format():
    some = MADE.select("agreement", "F_reg")
    assert [m.key for m in some.measures] == ["agreement", "f_reg"] and MADE.selected is None
    whole = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in MADE.to_markdown().splitlines()]
    found = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in some.to_markdown().splitlines()]
    for line, narrow in zip(whole, found, strict=True):
        if not line[0].startswith(":"):
            assert narrow == [line[0], line[2], line[1]]
    assert some.to_latex().splitlines()[2] == r"method & patch agreement & F\_reg \\"
    assert list(some.table[0]) == [
        "method",
        "agreement",
        "agreement_low",
        "agreement_high",
        "f_reg",
        "f_reg_low",
        "f_reg_high",
    ]
    assert some.csv().splitlines()[0] == ",".join(some.table[0])
    assert [axes.get_title().split("\n")[0] for axes in some.show().axes] == ["patch agreement", "F_reg"]
    assert some.select("F_reg").to_markdown() == MADE.select("f_reg").to_markdown()
    for wrong, said in (
        (["f_rag"], "no column 'f_rag'; its columns are f_reg, agreement, agreement_random_maps"),
        ([], "name at least one"),
        (["f_reg", "F_reg"], "each of them once"),
        (["stability"], "no column 'stability'"),  # not measured
    ):
        with pytest.raises(ValueError, match=said):
            MADE.select(*wrong)
    with pytest.raises(ValueError, match="controls only"):
        MADE.select("agreement_random_maps").show()


def test_a_single_value_has_no_interval_and_the_caption_says_how_to_get_one():
    one = MethodComparison("fc", (2,), 5, 80, 20, 1, {"groups": {"f_reg": (1.0,)}})
    assert one.caption == (
        "Layer fc, target 2, 5 x-features asked for; fitted on 80 examples and measured on 20 others; one value each. "
        "For 95 % intervals, and a warning where another method is clearly more faithful, pass repeats=3 (--repeats 3) "
        "or several targets."
    )
    assert "±" not in one.to_markdown()
    again = MethodComparison("fc", (2,), 5, 80, 20, 2, {"groups": {"f_reg": (1.0, 3.0)}})
    assert (
        again.caption.endswith("means with 95 % intervals over 1 target and 2 repeats.") and "±" in again.to_markdown()
    )


def test_pandas_frame_or_an_error_that_says_what_to_do(monkeypatch):
    try:
        import pandas
    except ImportError:
        pandas = None
    if pandas is not None:
        frame = MADE.to_pandas()
        assert frame["f_reg"].tolist() == [7 / 3, 3.0] and frame["method"].tolist() == ["groups", "a & b_c|d"]
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_pandas needs pandas, which is not installed; run pip install pandas"):
        MADE.to_pandas()


def test_the_figure_has_a_point_and_an_interval_for_each_method():
    panels = MADE.show().axes
    assert [axes.get_title().splitlines()[0] for axes in panels] == ["F_reg", "patch agreement"]
    first, second = panels
    points = [line.get_xdata()[0] for line in first.lines if line.get_marker() == "o"]
    assert points == pytest.approx([7 / 3, 3.0])
    assert sorted(line.get_xdata()[0] for line in second.lines if line.get_marker() == "o") == pytest.approx(
        [0.1, 0.25]
    )
    assert [label.get_text() for label in first.get_yticklabels()] == ["groups", "a & b_c|d"]


@pytest.mark.parametrize("ending", ["md", "tex", "csv"])
def test_command_writes_the_table(tmp_path, capsys, ending):
    folder = write(tmp_path)
    out = tmp_path / "made" / f"table.{ending}"
    np.save(tmp_path / "masks.npy", np.repeat(np.repeat([[1, 2], [3, 0]], 3, 0), 3, 1)[None].repeat(60, 0))
    code = main(
        [
            "compare", "--model", f"{folder}/net.py", "--layer", "3", "--data", f"{folder}/images", "--target", "all",
            "--methods", "groups", "random groups", "--images", "2", "--n-features", "2", "--device", "cpu", "--quiet",
            "--masks", f"{tmp_path}/masks.npy", "--out", str(out), "--figure", str(tmp_path / "figure.png"),
            "--seed", "3", *(("--columns", "locality", "agreement") if ending == "csv" else ()),
        ]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    text = out.read_text(encoding="utf-8")
    assert {"md": "| groups ", "tex": r"\begin{tabular}", "csv": "\ngroups,"}[ending] in text
    if ending == "csv":
        assert re.sub(r",\w+_(low|high)", "", text.splitlines()[0]) == "method,locality,agreement"
        assert said.out.splitlines()[0].split() == ["method", "locality", "patch", "agreement"]
    assert ("selectivity" in text) is (ending != "csv") and "locality" in said.out
    assert "random groups" in text and "Layer 3, targets 0, 1, 2, 2 x-features" in said.out
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_command_refuses_unknown_columns_before_the_work(tmp_path, capsys):
    arguments = ["compare", "--model", "none.py", "--layer", "3", "--data", "x", "--out", str(tmp_path / "table.md")]
    assert main([*arguments, "--columns", "f_reg", "agrement"]) == 1
    assert "'agrement' in --columns is no column; names are agreement" in capsys.readouterr().err


def test_columns_that_were_not_measured_are_left_out_with_a_warning(caplog):
    assert [m.key for m in _selected(MADE, ["stability", "f_reg"]).measures] == ["f_reg"]
    assert "left out stability, which the comparison did not measure" in caplog.text
    assert _selected(MADE, ["stability"]) is MADE


def test_command_refuses_another_ending_before_the_work(tmp_path, capsys):
    arguments = ["compare", "--model", "none.py", "--layer", "3", "--data", "x", "--out", str(tmp_path / "table.txt")]
    assert main(arguments) == 1
    assert "has an unknown ending; end the table's name in .md, .tex, .csv" in capsys.readouterr().err
