"""XNNAttribution: Captum's contract, and numbers that can be computed again from the weights."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import LRP, DeepLift, IntegratedGradients, LayerGradCam, NoiseTunnel, Saliency
from captum.metrics import infidelity, sensitivity_max
from torch import nn

from captum_xnn import SRAE, Explanation, Recipe, XNNAttribution
from captum_xnn.errors import LayerNotFoundError, LayerNotReachedError, NotFittedError
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.layers._fingerprint import WeightSamples
from captum_xnn.models import ContributionGroups
from captum_xnn.models._srae import by_shape
from captum_xnn.models.baselines import DRSA

QUICK = Recipe(steps=30)
K = 2
small = partial(SRAE, hidden=(8,))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def net(*last):
    """A network whose weights do not depend on the order of the tests."""
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4), *last)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, seed=i) / 2)
    return model


DATA = randn(160, 6, seed=10)
X = randn(5, 6, seed=11)


def made(model=None, layer="1", n_features=K, **settings):
    settings = {"autoencoder": small, "recipe": QUICK, "heatmap": FromCaptum(IntegratedGradients, n_steps=5)} | settings
    return XNNAttribution(model or net(), layer, n_features, **settings)


@pytest.fixture(scope="module")
def xnn():
    return made().fit(DATA, target=[0, 1, 2], progress=False)


def by_hand(xnn, x, target):
    """E, contributions, bias and surrogate from the weights of the explainer's network."""
    srae = xnn.explainer(target).form
    model = xnn.model
    Z = (x @ model[0].weight.T + model[0].bias).clamp(min=0)
    E = (Z @ srae.encoder[0].weight.T + srae.encoder[0].bias).clamp(min=0)
    E = E @ srae.encoder[2].weight.T + srae.encoder[2].bias
    v, b = srae.head.weight[0], srae.head.bias[0]
    return E, E * v, b, E @ v + b


def maps_by_hand(xnn, x, target, steps=5):
    """Integrated gradients of every x-feature by autograd, with Captum's quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    whole = []
    for k in range(K):
        total = torch.zeros_like(x)
        for node, weight in zip(nodes, weights, strict=True):
            at = (x * (node + 1) / 2).to(x.dtype).requires_grad_()
            total += weight / 2 * torch.autograd.grad(by_hand(xnn, at, target)[0][:, k].sum(), at)[0]
        whole.append(x * total)
    return torch.stack(whole, 1)


# --- numbers


def test_an_autoencoder_by_name_is_told(xnn):
    with pytest.raises(TypeError, match="autoencoder is 'NN', and cannot be called; pass a class such as SRAE"):
        XNNAttribution(xnn.model, xnn.layer, autoencoder="NN")


@pytest.mark.parametrize("target", [0, 2])
def test_explain_equals_recomputation_from_the_weights(xnn, target):
    why = xnn.explain(X, target)
    with torch.no_grad():
        E, given, b, total = by_hand(xnn, X, target)
        prediction = xnn.model(X)[:, target]
    torch.testing.assert_close(why.features, E)
    torch.testing.assert_close(why.contributions, given)
    torch.testing.assert_close(why.bias, b.expand(5))
    torch.testing.assert_close(why.surrogate, total)
    torch.testing.assert_close(why.prediction, prediction)
    torch.testing.assert_close(why.unexplained, prediction - total)
    torch.testing.assert_close(why.maps, maps_by_hand(xnn, X, target), rtol=1e-4, atol=1e-6)
    assert why.target == (target,) * 5 and why.inputs is X and len(why) == 5


def test_attribute_equals_the_maps_of_explain(xnn):
    torch.testing.assert_close(xnn.attribute(X, 1), xnn.explain(X, 1).maps, rtol=0, atol=0)
    torch.testing.assert_close(xnn.attribute(X, 1), maps_by_hand(xnn, X, 1), rtol=1e-4, atol=1e-6)


def test_delta_is_prediction_minus_surrogate(xnn):
    maps, delta = xnn.attribute(X, 1, return_convergence_delta=True)
    torch.testing.assert_close(maps, xnn.attribute(X, 1))
    with torch.no_grad():
        wanted = xnn.model(X)[:, 1] - by_hand(xnn, X, 1)[3]
    torch.testing.assert_close(delta, wanted)
    assert bool(delta.abs().max() > 1e-4)
    torch.testing.assert_close(xnn.compute_convergence_delta(maps, X, 1), wanted)
    assert xnn.has_convergence_delta()


def test_score_equals_recomputation(xnn):
    data = randn(90, 6, seed=12)
    score = xnn.score(data, 1)
    with torch.no_grad():
        y_hat, y_bar = xnn.model(data), by_hand(xnn, data, 1)[3]
    assert score.examples == 90
    assert score.f_reg == pytest.approx(float((y_bar - y_hat[:, 1]).abs().mean()), rel=1e-5)
    replaced = y_hat.clone()
    replaced[:, 1] = y_bar
    assert score.f_cls == pytest.approx(float((replaced.argmax(1) == y_hat.argmax(1)).float().mean()))


def test_the_explainer_knows_its_fit(xnn):
    explainer = xnn.explainer(1)
    with torch.no_grad():
        y_hat, (E, given, _, y_bar) = xnn.model(DATA), by_hand(xnn, DATA, 1)
    assert explainer.f_reg == pytest.approx(float((y_bar - y_hat[:, 1]).abs().mean()), rel=1e-4)
    assert explainer.examples == 160 and explainer.layer == "1" and explainer.targets == (1,)
    marked = y_hat.argmax(1) == 1
    assert explainer.positives == int(marked.sum())
    torch.testing.assert_close(E.mean(0), torch.zeros(K), atol=1e-4, rtol=0)
    torch.testing.assert_close(E.std(0), torch.ones(K), atol=1e-4, rtol=0)
    means = given[marked].mean(0).tolist()
    assert means == sorted(means, reverse=True)
    assert explainer.floor is None
    assert not any(p.requires_grad for p in explainer.form.parameters())


# --- targets


class Planes(nn.Module):
    """Outputs (N, 2, 3), for targets that are tuples."""

    def __init__(self):
        super().__init__()
        self.layers = net(nn.ReLU(), nn.Linear(4, 6))

    def forward(self, x):
        return self.layers(x).reshape(-1, 2, 3)


FORMS = {
    "int": (2, [2] * 5),
    "tensor of one": (torch.tensor(2), [2] * 5),
    "tensor (1,)": (torch.tensor([2]), [2] * 5),
    "numpy int": (np.int64(2), [2] * 5),
    "tensor": (torch.tensor([1, 0, 2, 0, 1]), [1, 0, 2, 0, 1]),
    "list": ([1, 0, 2, 0, 1], [1, 0, 2, 0, 1]),
    "list of numpy ints": (list(np.array([1, 0, 2, 0, 1])), [1, 0, 2, 0, 1]),
    "list of tensors": (list(torch.tensor([1, 0, 2, 0, 1])), [1, 0, 2, 0, 1]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_target_equals_calls_for_each_example(xnn, form):
    target, each = FORMS[form]
    maps, delta = xnn.attribute(X, target, return_convergence_delta=True)
    why = xnn.explain(X, target)
    assert why.target == tuple(each)
    for i, t in enumerate(each):
        one = xnn.explain(X[i : i + 1], t)
        torch.testing.assert_close(maps[i : i + 1], one.maps, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(delta[i : i + 1], one.unexplained)
        torch.testing.assert_close(why.contributions[i : i + 1], one.contributions)
        torch.testing.assert_close(why.bias[i : i + 1], one.bias)
        torch.testing.assert_close(why.prediction[i : i + 1], one.prediction)


@pytest.fixture(scope="module")
def planes():
    model = Planes()
    with torch.no_grad():
        for i, p in enumerate(model.layers[4].parameters()):
            p.copy_(randn(*p.shape, seed=20 + i))
    return made(model, "layers.1").fit(DATA, target=[(0, 1), (1, 2)], progress=False)


def test_targets_that_are_tuples(planes):
    target = [(0, 1), (1, 2), (0, 1), (1, 2), (1, 2)]
    why = planes.explain(X, target)
    assert why.target == tuple(target)
    y_hat = planes.model(X)
    for i, t in enumerate(target):
        one = planes.explain(X[i : i + 1], t)
        torch.testing.assert_close(why.maps[i : i + 1], one.maps, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(why.prediction[i], y_hat[i][t])
    torch.testing.assert_close(planes.attribute(X, (1, 2)), planes.attribute(X, [(1, 2)] * 5))
    assert planes.explainer((0, 1)).positives is None


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (4, r"target 4 is outside the model's outputs \(4,\)"),
        (-1, r"target -1 is outside the model's outputs \(4,\)"),
        (None, r"target None does not pick one of the model's outputs \(4,\) per example; pass an int"),
        ((0, 1), r"target \(0, 1\) does not pick one of the model's outputs \(4,\) per example"),
        ([0, 1], "there are 2 targets for 5 examples; pass one for each"),
        (torch.tensor([0, 1, 2]), "there are 3 targets for 5 examples; pass one for each"),
        (torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]), "float32 tensor"),
        (torch.tensor(1.0), "float32 tensor"),
        (torch.zeros(5, 2, dtype=torch.long), r"int64 tensor \(2,\)"),
        ("goldfinch", "the target 'goldfinch' is not an int, a tuple of ints or None; pass the index"),
        (1.5, "the target 1.5 is not an int"),
        ([0, 1, 2, 0, "a"], "the target 'a' is not an int"),
    ],
)
def test_wrong_targets_are_rejected(xnn, target, told):
    for method in (xnn.attribute, xnn.explain):
        with pytest.raises(ValueError, match=told):
            method(X, target)


def test_a_range_is_a_list_of_targets():
    assert [e.targets for e in made().fit(DATA, range(3), progress=False).explainers_.values()] == [(0,), (1,), (2,)]
    (joint,) = made(n_features=3).fit(DATA, range(3), joint=True, progress=False).explainers_.values()
    assert joint.targets == (0, 1, 2)


def test_wrong_targets_of_fit():
    xnn = made()
    for target, told in (
        (9, "target 9 is outside .*; targets count from 0"),
        ([], "list of targets to fit is empty"),
        (None, "target None does not pick one .*; pass an int"),
    ):
        with pytest.raises(ValueError, match=told):
            xnn.fit(DATA, target, progress=False)
    with pytest.raises(ValueError, match="target is 0, and a joint explainer needs several; pass a tuple"):
        xnn.fit(DATA, 0, joint=True, progress=False)
    assert not xnn.explainers_


# --- Captum's call


@pytest.mark.parametrize("forms", [(None, None, None), (small, small, small), (None, small, None)])
def test_examples_with_other_forms_equal_calls_for_each_example(forms):
    xnn = made(heatmap=DeepLift)  # draws groups by the slopes of each example
    for target, (xnn.autoencoder, xnn.n_features) in enumerate(zip(forms, (1, 3, 2), strict=True)):
        xnn.fit(DATA, target, progress=False)
    targets, baselines = [1, 0, 2, 1, 0], randn(5, 6, seed=13) / 3
    for size in (None, 2):
        why = xnn.explain(X, targets, internal_batch_size=size, baselines=baselines)
        for i, target in enumerate(targets):
            own = xnn.explain(X[i : i + 1], target, baselines=baselines[i : i + 1])
            n = own.features.shape[1]
            for name in ("features", "contributions", "maps"):
                value = getattr(why, name)[i]
                torch.testing.assert_close(value[:n], getattr(own, name)[0], rtol=1e-4, atol=1e-5)
                assert not bool(value[n:].any())
            for name in ("bias", "surrogate", "prediction"):
                torch.testing.assert_close(getattr(why, name)[i], getattr(own, name)[0], rtol=1e-4, atol=1e-5)
        for k in range(3):
            one = xnn.attribute(X, targets, feature=k, baselines=baselines)
            torch.testing.assert_close(one, why.maps[:, k], rtol=1e-4, atol=1e-5)


def test_the_second_positional_argument_is_the_target(xnn):
    assert torch.equal(xnn.attribute(X, 2), xnn.attribute(X, target=2))
    assert not torch.equal(xnn.attribute(X, 2), xnn.attribute(X, 0))


def test_captums_wrapping(xnn):
    unwrapped = type(xnn).attribute.__wrapped__
    assert torch.equal(unwrapped(xnn, X, target=1), xnn.attribute(X, 1))
    assert xnn.get_name() == "XNN Attribution"
    with pytest.raises(NotImplementedError, match="attribute_future is not implemented for XNNAttribution"):
        xnn.attribute_future(X)


def test_a_tuple_gives_a_tuple(xnn):
    maps = xnn.attribute((X,), 1)
    assert isinstance(maps, tuple) and len(maps) == 1
    assert torch.equal(maps[0], xnn.attribute(X, 1))
    assert isinstance(xnn.explain((X,), 1).maps, tuple)


@pytest.mark.parametrize("k", range(K))
def test_one_feature_is_one_map_in_the_inputs_shape(xnn, k):
    target = [1, 0, 2, 0, 1]
    given = xnn.attribute(X, target, feature=k)
    assert given.shape == X.shape and given.is_contiguous()
    torch.testing.assert_close(given, xnn.attribute(X, target)[:, k], rtol=1e-5, atol=1e-6)
    (one,) = xnn.attribute((X,), target, feature=k)
    assert torch.equal(one, given)


def test_features_out_of_range(xnn):
    for k in (-1, K):
        with pytest.raises(ValueError, match=f"feature is {k}, the index of no x-feature; pass 0 to {K - 1}"):
            xnn.attribute(X, 0, feature=k)


def test_permuting_the_batch_permutes_everything(xnn):
    order, target = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1, 0, 2, 0, 1])
    a, b = xnn.explain(X, target), xnn.explain(X[order], target[order])
    for name in ("maps", "features", "contributions", "bias", "surrogate", "prediction"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_internal_batch_size(xnn, size):
    target = [1, 0, 2, 0, 1]
    wanted = xnn.attribute(X, target)
    rows = []
    handle = xnn.model[0].register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    try:
        given = xnn.attribute(X, target, internal_batch_size=size)
    finally:
        handle.remove()
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)
    assert max(rows) <= size


def test_settings_of_one_call(xnn):
    torch.testing.assert_close(xnn.attribute(X, 1, n_steps=9), maps_by_hand(xnn, X, 1, 9), rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match="IntegratedGradients has no setting 'n_step'"):
        xnn.attribute(X, 1, n_step=9)


def test_baselines_of_one_example_each(xnn):
    """A baseline for each example, as Captum takes it, with explainers of several targets."""
    baselines, target = randn(5, 6, seed=13), [1, 0, 2, 0, 1]
    given = xnn.attribute(X, target, baselines=baselines)
    for i, t in enumerate(target):
        one = xnn.attribute(X[i : i + 1], t, baselines=baselines[i : i + 1])
        torch.testing.assert_close(given[i : i + 1], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heatmap", [None, Saliency, FromCaptum(IntegratedGradients, n_steps=4)])
@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:Internal batch size cannot be less")
def test_the_model_never_sees_more_rows_than_the_internal_batch_size(heatmap):
    xnn = made(heatmap=heatmap).fit(DATA, target=[0, 1], progress=False)
    whole = xnn.explain(X, [0, 1, 0, 1, 1])
    rows = []
    handle = xnn.model[0].register_forward_hook(lambda _module, given, _output: rows.append(len(given[0])))
    why = xnn.explain(X, [0, 1, 0, 1, 1], internal_batch_size=2)
    handle.remove()
    assert max(rows) == 2
    for name in ("maps", "features", "contributions", "bias", "surrogate", "prediction"):
        torch.testing.assert_close(getattr(why, name), getattr(whole, name), msg=name)


def test_a_target_out_of_range_is_told_before_others_are_fitted():
    xnn = made(train_data=DATA)
    with pytest.raises((ValueError, IndexError), match="9"):
        xnn.attribute(X, [0, 1, 0, 1, 9], internal_batch_size=2)
    assert not xnn.explainers_


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(xnn, context):
    wanted = xnn.explain(X, 1)
    with context():
        x = X.clone()
        given = xnn.explain(x, 1)
        assert torch.equal(xnn.attribute(x, 1), wanted.maps)
    assert torch.equal(given.maps, wanted.maps) and torch.equal(given.surrogate, wanted.surrogate)
    assert torch.equal(xnn.attribute(x, 1), wanted.maps), "an inference tensor outside of inference mode"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_fitting_without_gradients(context):
    wanted = made().fit(DATA, 0, progress=False).explain(X, 0).surrogate
    eager, lazy = made(), made(train_data=DATA)  # outside: a model made in inference mode takes no gradients at all
    with context():
        xnn = eager.fit(DATA, 0, progress=False)
        torch.testing.assert_close(xnn.explain(X, 0).surrogate, wanted)
        lazily = lazy.explain(X, 0)
    torch.testing.assert_close(lazily.surrogate, wanted)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = net()

    def forward(self, x, scale):
        return self.layers(x * scale)


def test_further_arguments_made_in_inference_mode():
    xnn = made(Scaled(), "layers.1", unpack=lambda x: (x, torch.tensor(2.0)))
    xnn.fit([DATA], 0, progress=False)
    wanted = xnn.attribute(X, 0, torch.tensor(2.0))
    with torch.inference_mode():
        given = xnn.attribute(X, 0, torch.tensor(2.0))
    assert torch.equal(given, wanted)


def test_under_autocast(xnn):
    """Rounding in half precision is no damage to the explainer."""
    wanted = xnn.explain(X, 0)
    with torch.autocast("cpu", torch.bfloat16):
        given = xnn.explain(X, 0)
    torch.testing.assert_close(given.surrogate.float(), wanted.surrogate, rtol=0.05, atol=0.05)
    torch.testing.assert_close(given.bias + given.contributions.sum(1), given.surrogate)


@pytest.mark.parametrize("form", [ContributionGroups, DRSA])
def test_contributions_under_autocast_explain_the_output_that_autocast_gives(form):
    """The rest of the model runs under autocast too. Its own output then comes back where the layer gets its own."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    every = torch.ones(40, dtype=torch.bool)
    xnn = XNNAttribution(model, "1", 3, autoencoder=form).fit(x, 0, positives=every, progress=False)
    wanted = xnn.explain(x, 0)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)[:, 0]
        given = xnn.explain(x, 0)
        again = XNNAttribution(model, "1", 3, autoencoder=form).fit(x, 0, positives=every, progress=False)
    assert y.dtype == torch.bfloat16
    assert torch.equal(given.prediction, y.to(given.prediction))
    assert given.unexplained.abs().max() < 0.05 * y.float().std()
    torch.testing.assert_close(given.contributions, wanted.contributions, rtol=0.05, atol=0.02)
    # Sums and products of the explanation itself are not rounded to half precision.
    torch.testing.assert_close(given.bias + given.contributions.sum(1), given.surrogate, rtol=1e-6, atol=1e-6)
    assert torch.allclose(again.explainer(0).form.base, xnn.explainer(0).form.base, atol=0.02)


def test_maps_are_detached_and_the_input_is_left_alone(xnn):
    x = X.clone().requires_grad_()
    x.grad = grad = torch.ones_like(x)
    maps, delta = xnn.attribute(x, 1, return_convergence_delta=True)
    assert not maps.requires_grad and not delta.requires_grad
    assert x.grad is grad and x.requires_grad and torch.equal(x.detach(), X)


def test_a_model_that_works_in_place_does_not_change_the_users_data():
    model = nn.Sequential(nn.ReLU(inplace=True), *net())
    data, x = DATA.clone(), X.clone()
    xnn = made(model, "2").fit(data, 0, progress=False)
    assert torch.equal(data, DATA), "fit changed the training data"
    xnn.explain(x, 0)
    assert torch.equal(x, X), "explain changed its inputs"


class Doubling(nn.Module):
    """Doubles its input in place, and leads it past the explained layer as well."""

    def __init__(self):
        super().__init__()
        self.hidden, self.relu, self.head, self.past = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.relu(self.hidden(x.mul_(2)))) + self.past(x)


def test_a_model_that_works_in_place_gets_the_inputs_anew_for_every_number():
    xnn = XNNAttribution(Doubling(), "relu", K).fit(DATA, 0, progress=False)
    with torch.no_grad():
        wanted = xnn.model(X.clone())[:, 0]
    for _ in range(2):
        for size in (None, 2):
            made = xnn.contributions(X, 0, internal_batch_size=size)
            torch.testing.assert_close(made.prediction, wanted)
            torch.testing.assert_close(made.surrogate, wanted)
        torch.testing.assert_close(xnn.explain(X, 0).surrogate, wanted)
    assert xnn.score(DATA, 0).f_reg < 1e-5


def test_a_model_in_training_is_evaluated_and_restored():
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3)).train()
    with torch.no_grad():
        model(DATA)
    model[3].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    xnn = made(model, "2").fit(DATA, 0, positives=torch.ones(160, dtype=torch.bool), progress=False)
    why = xnn.explain(X, 0)
    assert modes == [m.training for m in model.modules()] == [True, True, True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    torch.testing.assert_close(why.prediction, model(X)[:, 0].detach())
    torch.testing.assert_close(xnn.explain(X, 0).maps, why.maps)


def test_random_numbers_are_left_alone(tmp_path):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002

    xnn = made()
    before = states()
    xnn.fit(DATA, 0, progress=False)
    assert states() == before, "fit"
    xnn.explain(X, 0)
    assert states() == before, "explain"
    XNNAttribution.load(xnn.save(tmp_path), xnn.model)
    assert states() == before, "load"


def test_calls_repeat_and_leave_nothing_behind(xnn):
    srae = xnn.explainer(0).form
    before = [sorted(vars(m)) for m in [*xnn.model.modules(), *srae.modules()]]
    for heatmap in (LRP, Saliency):
        other = xnn.with_heatmap(heatmap)
        assert torch.equal(other.attribute(X, 0), other.attribute(X, 0))
    assert [sorted(vars(m)) for m in [*xnn.model.modules(), *srae.modules()]] == before


@pytest.mark.parametrize("method", [Saliency, LRP])
def test_nothing_is_left_after_an_exception_in_the_heatmap(method):
    model = net(nn.ReLU())
    xnn = made(model, "1").fit(DATA, 0, progress=False)
    before = [(sorted(vars(m)), m.training, dict(m._forward_hooks)) for m in model.modules()]
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > 1:  # the forward pass for the numbers goes well
            raise RuntimeError("on purpose")

    handle = model[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        xnn.with_heatmap(method).attribute(X, 0)
    handle.remove()
    assert [(sorted(vars(m)), m.training, dict(m._forward_hooks)) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_attribution_in_threads(xnn):
    """A server explains in threads; one must not take away the hooks or the mode of another."""
    wanted = {t: xnn.explain(X, t) for t in (0, 1)}
    wrong: list[str] = []

    def work(t):
        for _ in range(15):
            try:
                why = xnn.explain(X, t)
                if not torch.allclose(why.maps, wanted[t].maps, atol=1e-6):
                    wrong.append("other maps")
            except BaseException as error:
                wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    torch.compiler.set_stance("default")
    assert not wrong


def test_it_pickles(xnn):
    again = pickle.loads(pickle.dumps(xnn))
    assert torch.equal(again.attribute(X, 1), xnn.attribute(X, 1))


def test_noise_tunnel_and_metrics_of_captum(xnn):
    torch.manual_seed(1)
    smooth = NoiseTunnel(xnn).attribute(X, nt_samples=3, stdevs=0.0, target=1)
    torch.testing.assert_close(smooth, xnn.attribute(X, 1), rtol=1e-4, atol=1e-6)
    one = partial(xnn.attribute, feature=0)
    assert sensitivity_max(one, X, target=1, n_perturb_samples=2).shape == (5,)
    infidel = infidelity(
        xnn.model, lambda x: (0.01 * torch.ones_like(x), x - 0.01), X, xnn.attribute(X, 1, feature=0), target=1
    )
    assert infidel.shape == (5,)


def test_another_layer_can_be_set():
    xnn = made().fit(DATA, 0, progress=False)
    at_relu = xnn.attribute(X, 0)
    xnn.layer = xnn.model[2]
    with pytest.raises(NotFittedError, match=r"has no explainer at layer '2' \(fitted: none\)"):
        xnn.attribute(X, 0)
    xnn.fit(DATA, 0, progress=False)
    assert xnn.explainer(0).layer == "2"
    xnn.layer = xnn.model[1]
    assert torch.equal(xnn.attribute(X, 0), at_relu)


def test_the_layer_as_a_module_and_wrapped_models(xnn):
    wanted = xnn.attribute(X, 0)
    for model, layer in ((xnn.model, xnn.model[1]), (nn.DataParallel(xnn.model), "1")):
        other = made(model, layer)
        other.explainers_.update(xnn.explainers_)
        assert torch.equal(other.attribute(X, 0), wanted)


# --- fitting


def test_not_fitted():
    xnn = made()
    told = r"target 46 has no explainer at layer '1' \(fitted: none\); call xnn.fit\(train_loader, target=46\)"
    with pytest.raises(NotFittedError, match=told):
        xnn.explainer(46)
    for method in (xnn.attribute, xnn.explain, partial(xnn.score, DATA)):
        with pytest.raises(NotFittedError, match="first, or pass train_data= to XNNAttribution"):
            method(*(() if isinstance(method, partial) else (X,)), target=0)
    xnn.fit(DATA, 0, progress=False)
    with pytest.raises(
        NotFittedError,
        match=r"target \[1, 2\] has no explainer at layer '1' \(fitted: 0\); .*target=\[1, 2\]",
    ):
        xnn.attribute(X, [0, 1, 2, 0, 0])


def test_train_data_fit_lazily_and_once(capsys):
    passes = []

    class Loader:
        def __iter__(self):
            passes.append(1)
            return iter(DATA.split(50))

    xnn = made(train_data=Loader())
    first = xnn.attribute(X, 0)
    explainer = xnn.explainer(0)
    assert len(passes) == 1
    assert torch.equal(xnn.attribute(X, 0), first) and xnn.explainer(0) is explainer
    assert len(passes) == 1
    xnn.attribute(X, [0, 1, 2, 1, 1])
    assert len(passes) == 2, "both missing targets are fitted from one pass"
    assert xnn.explainer(0) is explainer and len(xnn.explainers_) == 3
    separate = made().fit(DATA, 0, progress=False)
    torch.testing.assert_close(first, separate.attribute(X, 0))
    capsys.readouterr()


def test_fitting_several_targets_equals_separate_fits(xnn):
    for target in (0, 1, 2):
        one = made().fit(DATA, target, progress=False)
        together = xnn.explainer(target).form.state_dict()
        for name, weights in one.explainer(target).form.state_dict().items():
            torch.testing.assert_close(weights, together[name], rtol=1e-4, atol=1e-4, msg=name)


def test_forms_of_data_give_the_same():
    wanted = made().fit(DATA, 0, progress=False).explain(X, 0).surrogate
    labelled = torch.utils.data.TensorDataset(DATA, torch.zeros(160))
    for data in (
        (DATA,),
        [DATA[:100], DATA[100:]],
        torch.utils.data.DataLoader(labelled, batch_size=33),
        iter(DATA.split(7)),
    ):
        torch.testing.assert_close(made().fit(data, 0, progress=False).explain(X, 0).surrogate, wanted)


def test_the_same_seed_gives_the_same(xnn):
    a, b, c = (made(seed=s).fit(DATA, 0, progress=False).explain(X, 0).surrogate for s in (0, 1, 0))
    assert torch.equal(a, c)
    torch.testing.assert_close(a, xnn.explain(X, 0).surrogate, rtol=1e-4, atol=1e-4)  # learned beside others
    assert not torch.equal(a, b)


def test_fitting_is_faithful():
    recipe = Recipe(steps=150, learning_rate=1e-2)
    xnn = made(recipe=recipe, autoencoder=partial(SRAE, hidden=(32,))).fit(DATA, 1, progress=False)
    with torch.no_grad():
        spread = float(xnn.model(DATA)[:, 1].std())
    assert xnn.explainer(1).f_reg < 0.15 * spread


def test_with_heatmap_shares_explainers(xnn):
    other = xnn.with_heatmap(Saliency)
    assert other.explainers_ is xnn.explainers_ and xnn.heatmap.method is IntegratedGradients
    torch.testing.assert_close(other.explain(X, 1).surrogate, xnn.explain(X, 1).surrogate)
    for k in range(K):
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(by_hand(xnn, x, 1)[0][:, k].sum(), x)
        torch.testing.assert_close(other.attribute(X, 1)[:, k], grad.abs())


def test_a_copy_draws_with_its_own_heatmap(xnn):
    maps, other = xnn.attribute(X, 1), copy.copy(xnn)
    other.heatmap = FromCaptum(Saliency)
    torch.testing.assert_close(other.attribute(X, 1), xnn.with_heatmap(Saliency).attribute(X, 1))
    torch.testing.assert_close(xnn.attribute(X, 1), maps)
    deep = copy.deepcopy(xnn)
    deep.heatmap = FromCaptum(Saliency)
    torch.testing.assert_close(deep.attribute(X, 1), other.attribute(X, 1))
    torch.testing.assert_close(xnn.attribute(X, 1), maps)


@pytest.mark.filterwarnings("ignore:probabilities sum")
@pytest.mark.parametrize("form", [None, small])
def test_attributions_and_models_are_freed_where_nothing_uses_them(form):
    model = net()
    xnn = made(model, autoencoder=form, heatmap=None).fit(DATA, target=0, progress=False)
    for _ in range(2):
        xnn.explain(X, 0)
    kept = weakref.ref(xnn), weakref.ref(model)
    gc.disable()  # a model may fill the memory of its device, which does not wait for the collector
    try:
        del xnn, model
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


def test_a_heatmap_of_ones_own(xnn):
    def flat(network, inputs, features, *, additional_forward_args=None, internal_batch_size=None, **settings):
        assert settings == {"tone": 3} and network(*inputs).shape == (len(inputs[0]), K)
        return tuple(x[:, None] * torch.tensor([[float(k) + 1] for k in features]) for x in inputs)

    other = xnn.with_heatmap(flat)
    torch.testing.assert_close(other.attribute(X, 1, tone=3), torch.stack([X, 2 * X], 1))
    torch.testing.assert_close(other.attribute(X, 1, feature=1, tone=3), 2 * X)


# --- joint explainers


def test_a_joint_explainer_covers_its_targets():
    xnn = made(n_features=3).fit(DATA, (0, 2, 3), joint=True, progress=False)
    assert len(xnn.explainers_) == 1
    explainer = xnn.explainer(2)
    assert explainer.targets == (0, 2, 3) and explainer.floor is None and explainer is xnn.explainer(3)
    srae = explainer.form
    target = [3, 0, 2, 2, 3]
    why = xnn.explain(X, target)
    with torch.no_grad():
        E = srae.encode(xnn.model[:2](X))
        for i, t in enumerate(target):
            row = {0: 0, 2: 1, 3: 2}[t]
            torch.testing.assert_close(why.contributions[i], srae.head.weight[row] * E[i])
            torch.testing.assert_close(why.bias[i], srae.head.bias[row])
            torch.testing.assert_close(why.prediction[i], xnn.model(X)[i, t])
    with pytest.raises(NotFittedError, match="fitted: 0, 2, 3"):
        xnn.explain(X, 1)
    scored = xnn.score(DATA, 2)
    with torch.no_grad():
        y_bar = srae(xnn.model[:2](DATA)).y_bar[:, 1]
        assert scored.f_reg == pytest.approx(float((y_bar - xnn.model(DATA)[:, 2]).abs().mean()), rel=1e-4)
    assert explainer.positives == int(torch.isin(xnn.model(DATA).argmax(1), torch.tensor([0, 2, 3])).sum())


def test_a_learned_difference_is_the_difference_of_its_outputs():
    xnn = made(n_features=3).fit(DATA, (0, 2, 3), joint=True, progress=False)
    one, other, both = (xnn.contributions(X, *args, against=b) for *args, b in ((2, None), (0, None), (2, 0)))
    torch.testing.assert_close(both.features, one.features)
    for name in ("contributions", "bias", "surrogate", "prediction"):
        torch.testing.assert_close(getattr(both, name), getattr(one, name) - getattr(other, name))


def test_an_explainer_of_its_own_goes_before_a_joint_one():
    xnn = made(n_features=2).fit(DATA, [0, 2], joint=True, progress=False).fit(DATA, 2, progress=False)
    assert xnn.explainer(2).targets == (2,) and xnn.explainer(0).targets == (0, 2)
    why = xnn.explain(X, [2, 0, 2, 0, 0])
    torch.testing.assert_close(why.surrogate[1:2], xnn.explain(X[1:2], 0).surrogate)


def test_too_few_features_have_an_error_floor():
    model = net()
    with torch.no_grad():
        y = model(DATA)[:, [0, 1, 3]].double().numpy()
    values = np.linalg.eigvalsh(np.cov(y.T, bias=True))
    floor = values[0] + values[1]  # the two smallest of three: a single x-feature is left the largest
    with pytest.warns(
        UserWarning, match=f"1 x-features explain 3 outputs jointly, .* below {floor:.3g}. Raise n_features to 3"
    ):
        xnn = made(model, n_features=1).fit(DATA, (0, 1, 3), joint=True, progress=False)
    assert xnn.explainer(0).floor == pytest.approx(floor, rel=1e-4)
    with torch.no_grad():
        y_bar = xnn.explainer(0).form(model[:2](DATA)).y_bar.double().numpy()
    assert ((y_bar - y) ** 2).sum(1).mean() >= floor * (1 - 1e-6)


# --- what an explanation carries


def test_an_explanation_knows_its_layer_and_has_the_one_heatmap_where_asked(xnn):
    assert xnn.explain(X, 1).one_heatmap is None
    why = xnn.explain(X, 1, one_heatmap=True)
    assert torch.equal(why.one_heatmap, xnn.one_heatmap(X, 1)) and why.one_heatmap.shape == (len(X), 1, *X.shape[1:])
    assert torch.equal(why.maps, xnn.explain(X, 1).maps)
    assert why.layer == xnn.explainer(1).layer


# --- what cannot be explained


@pytest.mark.parametrize("what", ["bias", "surrogate", "nan"])
def test_an_explanation_that_does_not_add_up_is_refused(xnn, what):
    why = xnn.explain(X, 1)
    parts = {name: getattr(why, name) for name in Explanation.__dataclass_fields__}
    if what == "nan":
        parts["contributions"] = parts["contributions"].clone()
        parts["contributions"][3, 0] = float("nan")
    else:
        parts[what] = parts[what].clone()
        parts[what][3] += 0.01
    with pytest.raises(ValueError, match=r"of the example with index 3 sum to .*, but the surrogate is .*; the"):
        Explanation(**parts)


def test_outputs_after_a_softmax_are_refused_unless_they_are_asked_for():
    softmax = net(nn.Softmax(1))
    with pytest.raises(
        ValueError, match=r"outputs are non-negative and sum to 1.* all the same, pass prediction_trans"
    ):
        made(softmax).fit(DATA, 0, progress=False)
    with pytest.warns(UserWarning, match="outputs are non-negative and sum to 1"):
        xnn = made(softmax, prediction_transform=lambda y: y).fit(DATA, 0, progress=False)
    why = xnn.explain(DATA[:5], 0)
    torch.testing.assert_close(why.prediction, softmax(DATA[:5])[:, 0].detach())


def test_a_class_that_the_model_never_gives():
    model = net()
    with torch.no_grad():
        model[2].bias[3] -= 100
    told = r"the model gives class 3 to none of 160 examples; .*positives=torch.ones\(160"
    with pytest.raises(ValueError, match=told):
        made(model).fit(DATA, 3, progress=False)
    xnn = made(model).fit(DATA, 3, positives=torch.ones(160, dtype=torch.bool), progress=False)
    assert xnn.explainer(3).positives == 160


def test_wrong_positives():
    for positives in (torch.ones(160), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"positives are .*, not booleans \(160,\)"):
            made().fit(DATA, 0, positives=positives, progress=False)


@pytest.mark.parametrize(
    ("data", "error", "told"),
    [
        ([], ValueError, "the data have no examples to collect activations from"),
        (torch.zeros(0, 6), ValueError, "the data have no examples to collect activations from"),
        (DATA[:1], ValueError, "needs at least two examples, not 1; pass more data"),
        (torch.ones(20, 6), ValueError, "activations are the same for every example; check"),
        (torch.cat([DATA, torch.full((1, 6), float("nan"))]), ValueError, "is NaN or infinite in example 160"),
        (3, TypeError, "the data are of type int; pass a tensor"),
        ([{"x": DATA}], TypeError, "has the keys x, and forward of Sequential takes input; it lacks input: .* unpack="),
    ],
)
def test_data_that_cannot_be_learned_from(data, error, told):
    with pytest.raises(error, match=told):
        positives = torch.ones(len(data), dtype=torch.bool) if isinstance(data, torch.Tensor) else None
        made().fit(data, 0, positives=positives, progress=False)


def test_one_example_without_classes():
    with pytest.raises(ValueError, match="needs at least two examples, not 1; pass more data"):
        made(net(nn.ReLU(), nn.Linear(4, 1))).fit(DATA[:1], progress=False)


def test_an_output_that_does_not_vary():
    model = net()
    with torch.no_grad():
        model[2].weight[1] = 0
    with pytest.raises(ValueError, match="output is the same for every example; check"):
        made(model).fit(DATA, 1, positives=torch.ones(160, dtype=torch.bool), progress=False)


def test_nan_where_it_is_explained(xnn):
    x = X.clone()
    x[2] = float("nan")
    with pytest.raises(ValueError, match="output of layer '1' is NaN or infinite in example 2"):
        xnn.explain(x, 0)


def test_layers_that_cannot_be_explained():
    with pytest.raises(LayerNotFoundError, match="has no layer 'fc'; near names: '0', '1', '2'"):
        made(layer="fc")
    model = net()
    model.add_module("unused", nn.Linear(2, 2))
    model.forward = lambda x: nn.Sequential(*list(model)[:3])(x)
    xnn = made(model, "unused")
    with pytest.raises(LayerNotReachedError, match="layer 'unused' never ran"):
        xnn.fit(DATA, 0, progress=False)
    with pytest.raises(TypeError, match="the model is a function, not"):
        XNNAttribution(lambda x: x, "1")
    with pytest.raises(ValueError, match="n_features is 0; pass at least 1 x-feature"):
        made(n_features=0)


@pytest.mark.parametrize("x", [torch.zeros(0, 6), torch.tensor(1.0)])
def test_inputs_without_examples(xnn, x):
    with pytest.raises(ValueError, match="inputs need examples in dimension 0, at least one"):
        xnn.attribute(x, 0)


def test_more_inputs_than_the_model_takes(xnn):
    with pytest.raises(TypeError, match=r"a tuple of 2 tensors is 2 inputs of the model, and forward of .* takes 1"):
        xnn.attribute((torch.zeros(2, 6), torch.zeros(3, 6)), 0)


# --- regression


class Single(nn.Module):
    def __init__(self, flat):
        super().__init__()
        self.layers, self.flat = net(nn.ReLU(), nn.Linear(4, 1)), flat
        with torch.no_grad():
            self.layers[4].weight.copy_(randn(1, 4, seed=30))

    def forward(self, x):
        y = self.layers(x)
        return y[:, 0] if self.flat else y


@pytest.mark.parametrize("flat", [False, True])
def test_models_with_a_single_output(flat):
    model = Single(flat)
    xnn = made(model, "layers.1").fit(DATA, progress=False)
    assert xnn.explainer(None).positives is None
    maps, delta = xnn.attribute(X, return_convergence_delta=True)
    why = xnn.explain(X)
    assert maps.shape == (5, K, 6) and why.target == (None,) * 5
    torch.testing.assert_close(why.prediction, model(X).reshape(5).detach())
    torch.testing.assert_close(delta, why.unexplained)
    score = xnn.score(DATA)
    assert score.f_cls is None and score.f_reg == pytest.approx(xnn.explainer().f_reg, rel=1e-4)
    if flat:
        with pytest.raises(
            ValueError, match=r"target is 0, and a model with outputs \(N,\) or \(N, 1\) takes no target"
        ):
            xnn.attribute(X, 0)
    else:
        torch.testing.assert_close(xnn.attribute(X, 0), maps)


def test_regression_with_several_outputs():
    everything = torch.ones(160, dtype=torch.bool)
    xnn = made().fit(DATA, [0, 3], positives=everything, progress=False)
    weighted = made().fit(DATA, 0, progress=False)
    assert xnn.explainer(0).positives == 160
    assert not torch.equal(xnn.explain(X, 0).surrogate, weighted.explain(X, 0).surrogate)


# --- layer methods


def test_a_layer_method_on_several_inputs_or_a_layer_with_two_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.q = nn.Linear(6, 12), nn.Linear(6, 12)

        def forward(self, x):
            return self.p(x), self.q(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.relu, self.head = Two(), nn.ReLU(), nn.Linear(12, 3)

        def forward(self, x):
            p, q = self.two(x)
            return self.head(self.relu(p + q))

    from captum.attr import LayerGradientXActivation

    xnn = made(Net(), "relu", heatmap=FromCaptum(LayerGradientXActivation, layer="two"))
    xnn.fit(DATA, 0, positives=torch.ones(160, dtype=torch.bool), progress=False)
    maps = xnn.attribute(X, 0)
    assert isinstance(maps, tuple) and [m.shape for m in maps] == [(5, K, 12)] * 2


def test_a_layer_method_on_images():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    images = randn(60, 1, 6, 6, seed=40)
    xnn = XNNAttribution(model, "1", K, recipe=QUICK, heatmap=LayerGradCam, autoencoder=by_shape)
    xnn.fit(images, 0, positives=torch.ones(60, dtype=torch.bool), progress=False)
    assert xnn.attribute(images[:4], 0).shape == (4, K, 1, 6, 6)
    assert xnn.attribute(images[:4], 0, feature=1).shape == (4, 1, 6, 6)
    assert type(xnn.explainer(0).form).__name__ == "ConvSRAE"


def test_one_map_has_the_shape_of_a_coloured_image():
    """As Captum's metrics demand."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    images = randn(60, 3, 6, 6, seed=40)
    xnn = XNNAttribution(model, "1", K, recipe=QUICK, heatmap=LayerGradCam, autoencoder=by_shape)
    xnn.fit(images, 0, positives=torch.ones(60, dtype=torch.bool), progress=False)
    one = xnn.attribute(images[:4], 0, feature=1)
    torch.testing.assert_close(one.sum(1), xnn.attribute(images[:4], 0)[:, 1, 0])
    assert torch.equal(one[:, 0], one[:, 2])
    # A shift by c in every pixel: the infidelity is (c * sum of the map - change of the output)^2.
    found = infidelity(model, lambda x: (0.01 * torch.ones_like(x), x - 0.01), images[:4], one, target=0)
    with torch.no_grad():
        change = (model(images[:4]) - model(images[:4] - 0.01))[:, 0]
    torch.testing.assert_close(found, (0.01 * one.flatten(1).sum(1) - change) ** 2)


@pytest.mark.filterwarnings("ignore:probabilities sum to")  # so small a model has neurons that only a bias excites
@pytest.mark.parametrize("settings", [{"n_features": np.int64(2)}, {"seed": np.int64(1)}])
def test_numbers_may_be_numpy_integers(tmp_path, settings):
    xnn = made(**settings).fit(DATA, 0, progress=False)
    again = XNNAttribution.load(xnn.save(tmp_path), xnn.model)
    assert torch.equal(again.explain(X, 0).contributions, xnn.explain(X, 0).contributions)


@pytest.mark.parametrize("form", [None, by_shape])
def test_weights_that_change_after_the_fit_are_told(form, tmp_path):
    """Further training, and weights of another checkpoint. The same weights again are no change."""
    model = nn.Sequential(*net())
    xnn = made(model, "1", autoencoder=form).fit(DATA, 0, progress=False)
    before = copy.deepcopy(model.state_dict())
    copied, pickled = copy.deepcopy(xnn), pickle.loads(pickle.dumps(xnn))
    model.load_state_dict(before)
    xnn.explain(X, 0)
    for other in (copied, pickled):
        other.explain(X, 0)
        with torch.no_grad():
            other.model[2].bias.add_(1e-3)
        with pytest.warns(
            UserWarning, match=r"2\.bias changed after the explainer of target 0 was fitted: .* fit again"
        ):
            other.explain(X, 0)
    xnn.save(tmp_path / "fitted")
    torch.optim.SGD(model.parameters(), 1e-3).step(
        lambda: (model(X).square().sum(), model(X).square().sum().backward())[0]
    )
    told = pytest.warns(UserWarning, match=r"0\.weight and 3 more changed after the explainer of target 0")
    with told:
        why = xnn.contributions(X, 0)
    assert torch.equal(why.prediction, model(X)[:, 0])
    with told:
        xnn.save(tmp_path / "trained")
    model.load_state_dict(before)
    again = XNNAttribution.load(tmp_path / "fitted", model)
    again.explain(X, 0)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.warns(UserWarning, match=r"0\.weight changed"):
        again.explain(X, 0)
    again.fit(DATA, 0, progress=False).explain(X, 0)
    model.double()  # another dtype is no change, and none of the warnings is raised
    again.explain(X.double(), 0)


def test_changes_that_torch_does_not_count_are_told(tmp_path):
    """Averaged weights swapped in by ``.data``, a conversion that rounds, and running statistics of batch norm."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    xnn = made(model, "2").fit(DATA, 0, positives=torch.ones(len(DATA)).bool(), progress=False)
    before = copy.deepcopy(model.state_dict())

    def average():
        for p in model.parameters():
            p.data.mul_(0.9)

    def adapt():
        model.train()(X + 1)
        model.eval()

    for change, told in (
        (average, r"0\.weight and 4 more changed"),
        (lambda: model.bfloat16().float(), r"0\.weight and \d more changed"),
        (adapt, r"1\.running_mean and 1 more changed"),
    ):
        change()
        with pytest.warns(UserWarning, match=told):
            xnn.contributions(X, 0)
        with pytest.warns(UserWarning, match=told):
            xnn.save(tmp_path / "as if of the new weights")
        model.load_state_dict(before)
    xnn.contributions(X, 0)


def test_another_memory_format_is_no_change():
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(360, 3)).eval()
    samples = WeightSamples.of(model)
    model.to(memory_format=torch.channels_last)
    assert not samples.changed(model)
    model[0].weight.data.neg_()
    assert samples.changed(model) == ["0.weight"]
