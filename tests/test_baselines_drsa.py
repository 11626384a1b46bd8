"""DRSA as a form: the formula written again, exact sums at vectors, maps and tokens, maps that add up, and files."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from captum.attr import InputXGradient
from command_line import write
from torch import nn

from captum_xnn import XNNAttribution
from captum_xnn.__main__ import main
from captum_xnn.cli._model_files import load_model
from captum_xnn.errors import NotFittedError
from captum_xnn.heatmaps import GradientMaps
from captum_xnn.models.baselines import DRSA
from captum_xnn.models.baselines._partitions import subspace_relevances
from captum_xnn.patch_scores import patch_scores
from captum_xnn.training import _subspaces


def vectors():
    return torch.randn(200, 6, generator=torch.Generator().manual_seed(2))


def images():
    return torch.randn(80, 2, 8, 8, generator=torch.Generator().manual_seed(3))


def even(model, data):
    """A network that gives every class to some of the data."""
    with torch.no_grad():
        model[-1].bias -= model(data).mean(0)
    return model.eval()


def dense():
    torch.manual_seed(0)
    return even(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)), vectors())


def convolutional():
    torch.manual_seed(1)
    features = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten()]
    return even(nn.Sequential(*features, nn.Linear(96, 3)), images())


@pytest.fixture(scope="module")
def fitted():
    data = vectors()
    xnn = XNNAttribution(dense(), "1", 4, autoencoder=partial(DRSA, size=3, tolerance=1e-4)).fit(
        data, [0, 1], progress=False
    )
    return xnn, data


def test_contributions_are_the_formula_by_hand(fitted):
    """Slopes by a fine Riemann sum of gradients in place of the library's integral."""
    xnn, data = fitted
    model, form = xnn.model, xnn.explainer(1).form
    Z, base = model[:2](data[:5]).detach().double(), form.base.double()
    rest = copy.deepcopy(model[2:]).double()
    G = torch.zeros_like(Z)
    for t in (torch.arange(2000).double() + 0.5) / 2000:
        z = (base + t * (Z - base)).requires_grad_()
        G += torch.autograd.grad(rest(z)[:, 1].sum(), z)[0] / 2000
    U = form.directions.double().reshape(16, 3, 3)
    a = Z - base
    wanted = torch.stack([((a @ U[:, k]) * (G @ U[:, k])).sum(1) for k in range(3)], 1)
    wanted = torch.cat([wanted, (a * G).sum(1, keepdim=True) - wanted.sum(1, keepdim=True)], 1)
    made = xnn.contributions(data[:5], 1)
    spread = float(model(data)[:, 1].detach().std())
    torch.testing.assert_close(made.contributions.double(), wanted, atol=0.005 * spread, rtol=0)
    torch.testing.assert_close(
        made.contributions.double(), subspace_relevances(U.transpose(0, 1), a, G), atol=0.005 * spread, rtol=0
    )


def test_subspaces_are_orthogonal_ordered_and_the_rest_is_last(fitted):
    xnn, data = fitted
    for target in (0, 1):
        U = xnn.explainer(target).form.directions
        torch.testing.assert_close(U.T @ U, torch.eye(9), atol=1e-5, rtol=0)
    own = data[xnn.model(data).argmax(1) == 0]
    mean = xnn.contributions(own, 0).contributions.mean(0)
    assert bool((mean[:2] >= mean[1:3] - 0.1 * mean.abs().max()).all())  # of all positives, and the fit takes 30


@pytest.mark.parametrize("layer", ["1", "3"])
def test_contributions_and_maps_add_up_at_feature_maps(layer):
    model = convolutional()
    data = images()
    xnn = XNNAttribution(model, layer, 3, autoencoder=partial(DRSA, size=2), heatmap=InputXGradient)
    xnn = xnn.fit(data, 2, progress=False)
    why = xnn.explain(data[:6], 2)
    spread = float(model(data)[:, 2].detach().std())
    assert float(why.unexplained.abs().max()) < 0.02 * spread
    assert float(why.contributions.std(0).min()) > 1e-3 * spread  # none is empty
    whole = InputXGradient(model).attribute(data[:6].clone().requires_grad_(), target=2).detach()
    torch.testing.assert_close(why.maps.sum(1), whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-4)
    # By gradients, maps at the layer sum to the map of the output; the default maps are the contributions' own terms.
    at_layer = xnn.with_heatmap(GradientMaps())
    own, one = at_layer.explain(data[:6], 2).maps, at_layer.one_heatmap(data[:6], 2)
    assert own.shape[:2] == (6, 3) and float((own[:, 0] - own[:, 1]).abs().max()) > 0
    torch.testing.assert_close(own.sum(1), one[:, 0], atol=1e-4 * float(one.abs().max()), rtol=1e-3)
    by_place = xnn.with_heatmap(None).explain(data[:6], 2)
    torch.testing.assert_close(by_place.maps.sum((2, 3, 4)), by_place.contributions, atol=1e-5, rtol=1e-4)


def test_tokens_and_other_numbers_of_x_features():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Tanh(), nn.Flatten(), nn.Linear(40, 2)).eval()
    data = torch.randint(20, (100, 5), generator=torch.Generator().manual_seed(5))
    for n in (1, 2, 5):
        xnn = XNNAttribution(model, "1", n, autoencoder=DRSA).fit(data, 0, progress=False)
        made = xnn.contributions(data, 0)
        assert made.contributions.shape == (100, n)
        assert float((made.prediction - made.surrogate).abs().mean()) < 0.02 * float(made.prediction.std())
    with pytest.raises(ValueError, match="n_features is 9, but the layer has 8 dimensions; pass at most 8"):
        XNNAttribution(model, "1", 9, autoencoder=DRSA).fit(data, 0, progress=False)


@pytest.mark.parametrize(("n", "width"), [(2, 8), (4, 4), (5, 3), (16, 1)])
def test_the_remainder_has_as_many_directions_as_a_subspace(n, width):
    """Four subspaces of a fourth each filled the layer, and left a fifth x-feature of zeros."""
    model, data = dense(), vectors()
    xnn = XNNAttribution(model, "1", n, autoencoder=DRSA).fit(data, 0, progress=False)
    U = xnn.explainer(0).form.directions
    assert U.shape == (16, (n - 1) * width) and width <= 16 - U.shape[1]
    found = xnn.contributions(data, 0).contributions
    assert float(found[:, -1].std()) > 1e-3 * float(found.std())


def test_subspaces_of_a_wide_layer_have_the_given_size():
    assert [DRSA(40, n, size=8).width for n in (2, 5)] == [8, 8] and DRSA(40, 6, size=8).width == 6


def test_saved_and_loaded_gives_the_same(fitted, tmp_path):
    xnn, data = fitted
    again = XNNAttribution.load(xnn.save(tmp_path / "drsa"), xnn.model)
    form = again.explainer(1).form
    assert isinstance(form, DRSA) and form.config == xnn.explainer(1).form.config
    one, other = (x.explain(data[:7], 1) for x in (xnn, again))
    assert torch.equal(one.contributions, other.contributions) and torch.equal(one.maps, other.maps)
    with pytest.raises(NotFittedError):
        again.explain(data[:2], 2)


def test_the_seed_decides_the_start_and_differences_are_divided(fitted):
    xnn, data = fitted
    same, other = (
        XNNAttribution(xnn.model, "1", 4, autoencoder=partial(DRSA, size=3, tolerance=1e-4), seed=seed).fit(
            data, 0, progress=False
        )
        for seed in (0, 7)
    )
    U = xnn.explainer(0).form.directions
    assert torch.equal(same.explainer(0).form.directions, U)
    assert not torch.allclose(other.explainer(0).form.directions, U, atol=1e-3)
    made = xnn.contributions(data[:5], 0, against=1)
    y = xnn.model(data)
    torch.testing.assert_close(
        made.surrogate, (y[:5, 0] - y[:5, 1]).detach(), atol=0.05 * float(y.detach().std()), rtol=0
    )


def test_units_of_an_output_do_not_matter_to_joint_subspaces():
    """Each output counts in its standard deviations: a hundred times as large, it weighs no more."""
    found = []
    for size in (1.0, 100.0):
        model, data = dense(), vectors()
        with torch.no_grad():
            model[-1].weight[1] *= size
            model[-1].bias[1] *= size
        marks = torch.ones(len(data), dtype=torch.bool)
        form = partial(DRSA, size=2, tolerance=1e-4)
        xnn = XNNAttribution(model, "1", 3, autoencoder=form).fit(
            data, [0, 1], positives=marks, joint=True, progress=False
        )
        found.append(xnn.explainer(0).form.directions)
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=0)


def test_random_groups_of_dimensions_are_its_control():
    model = convolutional()
    data = images()
    scores = [
        patch_scores(XNNAttribution(model, "3", 3, autoencoder=form).fit(data, 0, progress=False), data[:3], 0)
        for form in (partial(DRSA, size=2), None)
    ]
    assert scores[0].agreement_random_groups == pytest.approx(scores[1].agreement_random_groups, abs=1e-4)
    assert scores[0].drops_random_groups == pytest.approx(scores[1].drops_random_groups, abs=1e-4)
    assert scores[0].agreement_one_heatmap == pytest.approx(scores[1].agreement_one_heatmap, abs=1e-6)
    assert scores[0].drops != scores[1].drops


def test_activations_without_inputs_are_refused():
    from captum_xnn.activations import Activations

    model, data = dense(), vectors()
    known = Activations(model[:2](data).detach(), model(data).detach(), "1")
    with pytest.raises(ValueError, match="DRSA needs the inputs again"):
        XNNAttribution(model, "1", 3, autoencoder=DRSA).fit(known, 0, progress=False)


def test_command_line_fits_it_with_its_seed(tmp_path, capsys):
    folder = write(tmp_path)
    arguments = ["--model", f"{folder}/net.py", "--layer", "1", "--data", f"{folder}/images", "--target", "0"]
    run = [*arguments, "--n-features", "3", "--form", "drsa", "--seed", "4", "--out", f"{tmp_path}/out", "--quiet"]
    assert main(["fit", *run]) == 0
    model = load_model(f"{folder}/net.py").model
    form = XNNAttribution.load(tmp_path / "out", model).explainer(0).form
    assert isinstance(form, DRSA) and form.n_features == 3
    assert main(["fit", *run[:-4], "5", "--out", f"{tmp_path}/other", "--quiet"]) == 0
    other = XNNAttribution.load(tmp_path / "other", model).explainer(0).form
    assert not torch.allclose(form.directions, other.directions, atol=1e-3)
    capsys.readouterr()


def test_a_bar_counts_the_examples_whose_slopes_are_computed(monkeypatch):
    """All 80 examples with 80 others at most; the 20 positives alone with one other, which is the first of them."""
    bars = []

    class Bar:
        def __init__(self, **settings):
            self.shown, self.count = not settings["disable"], 0
            bars.append(self)

        def update(self, count):
            self.count += count

        def close(self):
            pass

    monkeypatch.setattr(_subspaces, "tqdm", Bar)
    data, positives = vectors()[:80], torch.arange(80) < 20
    for others, progress in ((80, False), (1, True)):
        form = partial(DRSA, size=3, positives=30, others=others)
        XNNAttribution(dense(), "1", 4, autoencoder=form).fit(data, 0, positives=positives, progress=progress)
    assert [(bar.shown, bar.count) for bar in bars] == [(False, 80), (True, 20)]
