"""Additive maps, completeness over a zoo of models, invariances, and errors of groups of contributions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from captum.attr import (
    LRP,
    DeepLift,
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    LayerGradientXActivation,
    Occlusion,
    Saliency,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from captum_xnn import SRAE, OneHeatmap, XNNAttribution
from captum_xnn.activations import Activations, collect
from captum_xnn.errors import LayerNotReachedError
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.layers import EveryCall
from captum_xnn.models import ContributionGroups


class Residual(nn.Module):
    """Something else than the layer's output reaches the head, through a ReLU in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu_(x + self.inner(x)).mean((2, 3)))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        z = self.first(x)
        F.relu_(z)
        return self.head(torch.tanh(self.second(z)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.middle, self.head = nn.LSTM(3, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        out, _ = self.lstm(x.transpose(0, 1))
        return self.head(torch.relu(self.middle(out)).mean(0))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.head(self.block(self.embed(x)).mean(1))


class Several(nn.Module):
    """Two inputs, of which the second passes by the layer, and a factor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mix, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, y, scale=1.0, shift=None):
        z = self.a(x) * scale
        z = torch.relu(z + self.b(y))
        return self.head(torch.relu(self.mix(z))) + (0 if shift is None else shift)


def mlp():
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(6, 3),
    )  # fmt: skip


def time_first_to_last(output):
    return output[0].transpose(0, 1)


ZOO = {
    "mlp early": (mlp, "0", (6,), None),
    "mlp late": (mlp, "3", (6,), None),
    "cnn early": (cnn, "0", (1, 8, 8), None),
    "cnn late": (cnn, "5", (1, 8, 8), None),
    "residual": (Residual, "inner", (1, 6, 6), None),
    "in place": (InPlace, "first", (6,), None),
    "lstm": (Recurrent, "lstm", (5, 3), time_first_to_last),
    "tokens": (Transformer, "embed", (4, 3), None),
    "behind attention": (Transformer, "block", (4, 3), None),
}


def everything(n):
    return torch.ones(n, dtype=torch.bool)


def fitted(model, layer, data, target=0, K=3, fit=None, **options):
    """An explainer of few examples, with small grids of patches."""
    from captum_xnn.models import ContributionGroups

    make = partial(ContributionGroups, grid=2, positives=8, others=24)
    first = data[0] if isinstance(data, tuple) else data
    own = {"positives": everything(len(first))} if isinstance(first, torch.Tensor) else {}
    return XNNAttribution(model, layer, K, autoencoder=make, **options).fit(
        data, target, progress=False, **{**own, **(fit or {})}
    )


def state(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
    )


def largest_off(made):
    """What bias and contributions fail to give of the output, in its standard deviations."""
    off = made.bias.double() + made.contributions.double().sum(1) - made.prediction.double()
    return float(off.abs().max() / made.prediction.double().std())


@pytest.mark.parametrize("name", ZOO)
def test_complete_and_left_as_found(name):
    build, layer, shape, transform = ZOO[name]
    model, data = build(), torch.randn(40, *shape)
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    with torch.no_grad():
        xnn = fitted(model, layer, data, 1, output_transform=transform)
        made = xnn.contributions(data, 1)
    after = state(model)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1:] == after[1:]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(made.prediction, model(data)[:, 1])
    assert made.contributions.abs().sum() > 0
    assert largest_off(made) < 0.0101


def test_bias_is_of_each_example_only_where_something_crosses():
    x = torch.randn(20, 1, 6, 6)
    crossed = fitted(Residual(), "inner", x).contributions(x, 0).bias
    plain = fitted(cnn(), "5", torch.randn(20, 1, 8, 8)).contributions(torch.randn(4, 1, 8, 8), 0).bias
    assert crossed.std() > 1e-3
    torch.testing.assert_close(plain, plain[:1].expand(4))


def test_bias_of_a_residual_block_is_the_output_with_the_mean_in_the_layers_place():
    model, x = Residual(), torch.randn(20, 1, 6, 6)
    mean = model.inner(F.relu(model.stem(x))).mean((0, 2, 3), keepdim=True)
    expected = model.head(F.relu(F.relu(model.stem(x)) + mean).mean((2, 3)))[:, 2]
    torch.testing.assert_close(fitted(model, "inner", x, 2).contributions(x, 2).bias, expected.detach())


def test_several_inputs_and_further_arguments():
    model, x, y = Several(), torch.randn(40, 4), torch.randn(40, 3)
    shift = torch.randn(40, 3)
    xnn = fitted(model, "a", [((x[i : i + 10], y[i : i + 10]), (2.0, shift[i : i + 10])) for i in range(0, 40, 10)],
                 fit={"positives": everything(40)}, unpack=lambda batch: batch)  # fmt: skip
    made = xnn.contributions((x, y), 0, (2.0, shift))
    torch.testing.assert_close(made.prediction, model(x, y, 2.0, shift)[:, 0].detach())
    assert largest_off(made) < 0.0101
    base = model.a(x).mean(0)
    bias = model.head(F.relu(model.mix(F.relu(2 * base + model.b(y)))))[:, 0] + shift[:, 0]
    torch.testing.assert_close(made.bias, bias.detach())


@pytest.mark.parametrize("layer", ["0", "5"])
def test_joint_groups_are_shared_and_add_up_for_each_output(tmp_path, layer):
    """Contributions differ between outputs, by the groups of one matrix; files keep it; outputs count alike."""
    model, x = cnn().eval(), torch.randn(40, 1, 8, 8)
    model[7].weight.data[2] *= 1000
    joint = fitted(model, layer, x, (0, 2), fit={"joint": True})
    (explainer,) = joint.explainers_.values()
    a = explainer.form.groups
    torch.testing.assert_close(a.sum(1), torch.ones(len(a)))
    for target in (0, 2):
        made = joint.contributions(x, target)
        assert largest_off(made) < 0.0101
        torch.testing.assert_close(made.prediction, model(x)[:, target].detach())
        alone = fitted(model, layer, x, target)
        alone.explainer(target).form.groups = a  # contributions of the output alone, by the same groups
        torch.testing.assert_close(
            made.contributions, alone.contributions(x, target).contributions, rtol=1e-4, atol=1e-4
        )
        back = XNNAttribution.load(joint.save(tmp_path), model)
        torch.testing.assert_close(back.contributions(x, target).contributions, made.contributions)
    mixed = joint.contributions(x[:2], [0, 2]).contributions
    expected = [joint.contributions(x[:2], target).contributions[i] for i, target in enumerate((0, 2))]
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-4, atol=1e-4)
    model[7].weight.data[2] /= 500
    model[7].bias.data[2] /= 500
    scaled = fitted(model, layer, x, (0, 2), fit={"joint": True})
    torch.testing.assert_close(next(iter(scaled.explainers_.values())).form.groups, a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 0.0101), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_dtypes(dtype, bound):
    model, x = mlp().to(dtype), torch.randn(40, 6).to(dtype)
    made = fitted(model, "1", x).contributions(x, 0)
    assert made.contributions.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert largest_off(made) < bound


# Maps


def sums(model, layer, x, heatmap, target=1, **options):
    """The sum of the x-features' maps, and the map of the output by the same backend."""
    xnn = fitted(model, layer, x, target, heatmap=heatmap, **options)
    assert xnn.explainer(target).form.n_features > 1
    return xnn.attribute(x[:5], target).sum(1), OneHeatmap(model, heatmap).attribute(x[:5], target)[:, 0]


def close(found, expected, relative=1e-5):
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize(
    "heatmap",
    [
        FromCaptum(InputXGradient),
        FromCaptum(IntegratedGradients, n_steps=20),
        FromCaptum(Saliency, abs=False),
        FromCaptum(LayerGradCam, layer="3"),
        FromCaptum(LayerGradientXActivation, layer="3"),
    ],
    ids=["ixg", "ig", "saliency", "gradcam", "layer gradient"],
)
def test_maps_of_gradients_sum_to_that_of_the_output(heatmap):
    model = nn.Sequential(*cnn().double().eval()[:-1], nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    close(*sums(model, "5", torch.randn(20, 1, 8, 8).double(), heatmap))


@pytest.mark.parametrize("heatmap", [FromCaptum(DeepLift), FromCaptum(LRP)], ids=["deeplift", "lrp"])
def test_maps_of_rules_sum_to_that_of_the_output_where_the_rest_is_linear(heatmap):
    close(*sums(mlp().double(), "3", 3 * torch.randn(20, 6).double(), heatmap))


@pytest.mark.parametrize("heatmap", [FromCaptum(FeatureAblation), FromCaptum(Occlusion, sliding_window_shapes=(2,))])
def test_maps_of_replaced_inputs_sum_to_that_of_the_output(heatmap):
    model, x = mlp().double(), torch.randn(20, 6).double()
    found, expected = sums(model, "1", x, heatmap)
    assert (found - expected).abs().max() < 0.02 * model(x)[:, 1].std()


# Invariances


def test_linear_rest_in_closed_form():
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double(), torch.randn(30, 6).double()
    xnn = fitted(model, "1", x, 2)
    Z, made = model[:2](x), xnn.contributions(x, 2)
    c = (Z - Z.mean(0)) * model[2].weight[2]
    groups = xnn.explainer(2).form.groups.double()
    torch.testing.assert_close(made.contributions, (c @ groups).detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(made.bias, model[2](Z.mean(0))[2].expand(30).detach(), rtol=0, atol=1e-6)


def changed(model, factor=None, order=None):
    """The same function with the layer's units scaled or permuted, and their reader put right."""
    other = mlp().double()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        if factor is not None:
            other[0].weight.mul_(factor[:, None])
            other[0].bias.mul_(factor)
            other[2].weight.div_(factor)
        if order is not None:
            other[0].weight.copy_(other[0].weight[order])
            other[0].bias.copy_(other[0].bias[order])
            other[2].weight.copy_(other[2].weight[:, order])
    return other


def test_scaling_units_changes_nothing():
    model, x = mlp().double(), torch.randn(40, 6).double()
    factor = torch.linspace(0.1, 20, 10).double()
    ours, theirs = (fitted(m, "1", x, 1) for m in (model, changed(model, factor=factor)))
    torch.testing.assert_close(theirs.explainer(1).form.groups, ours.explainer(1).form.groups)
    torch.testing.assert_close(theirs.contributions(x, 1).contributions, ours.contributions(x, 1).contributions)


def test_permuting_dimensions_permutes_the_groups_alone():
    model, x = mlp().double(), torch.randn(40, 6).double()
    order = torch.tensor([3, 1, 4, 0, 9, 8, 2, 6, 5, 7])
    ours, theirs = (fitted(m, "1", x, 1) for m in (model, changed(model, order=order)))
    a, b = (e.contributions(x, 1).contributions for e in (ours, theirs))
    match = torch.corrcoef(torch.cat([a, b], 1).T)[a.shape[1] :, : a.shape[1]].argmax(1)
    assert match.sort().values.tolist() == list(range(a.shape[1]))
    torch.testing.assert_close(b, a[:, match])
    torch.testing.assert_close(theirs.explainer(1).form.groups, ours.explainer(1).form.groups[order][:, match])


@pytest.mark.filterwarnings("ignore:maps are zero")  # in one example an x-feature may have none
@pytest.mark.parametrize("name", ["mlp early", "cnn early", "residual", "tokens"])
def test_batch_equals_singles(name):
    build, layer, shape, _ = ZOO[name]
    model, data = build().double(), torch.randn(24, *shape).double()
    xnn = fitted(model, layer, data, 1, heatmap=InputXGradient)
    whole = xnn.explain(data[:4], 1)
    for i in range(4):
        one = xnn.explain(data[i : i + 1], 1)
        torch.testing.assert_close(one.contributions[0], whole.contributions[i])
        torch.testing.assert_close(one.bias[0], whole.bias[i])
        torch.testing.assert_close(one.maps[0], whole.maps[i])


# Data, files, targets


def test_loaders_and_generators_fit_as_the_tensor_does():
    model, x = mlp(), torch.randn(40, 6)
    options = {"fit": {"positives": everything(40)}}
    plain = fitted(model, "1", x, 1, **options)
    shuffled = DataLoader(TensorDataset(x), batch_size=9, shuffle=True)
    for data in (shuffled, iter(x.split(7)), DataLoader(x, batch_size=11)):
        other = fitted(model, "1", data, 1, **options)
        torch.testing.assert_close(other.explainer(1).form.base, plain.explainer(1).form.base)
        torch.testing.assert_close(other.explainer(1).form.groups, plain.explainer(1).form.groups, atol=1e-4, rtol=0)
        assert other.explainer(1).examples == 40


def test_a_fit_is_the_same_twice_and_leaves_the_generator():
    model, x = mlp(), torch.randn(40, 6)
    before = torch.get_rng_state()
    first, second = (fitted(model, "1", x, 1).explainer(1).form.groups for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_saved_explainers_give_the_same_maps(tmp_path):
    model, x = cnn().eval(), torch.randn(20, 1, 8, 8)
    xnn = fitted(model, "2", x, [0, 1], heatmap=InputXGradient)
    xnn.save(tmp_path / "saved")
    loaded = XNNAttribution.load(tmp_path / "saved", model, heatmap=InputXGradient)
    for target in (0, 1):
        assert torch.equal(loaded.attribute(x[:3], target), xnn.attribute(x[:3], target))
        assert torch.equal(loaded.contributions(x[:3], target).bias, xnn.contributions(x[:3], target).bias)


def test_targets_of_several_widths_are_padded_with_zeros():
    model, x = mlp(), torch.randn(40, 6)
    xnn = fitted(model, "1", x, 0, K=1, heatmap=InputXGradient)
    three = fitted(model, "1", x, 1, K=3, heatmap=InputXGradient)
    xnn.explainers_.update(three.explainers_)
    why = xnn.explain(x[:4], [0, 1, 0, 1])
    K = three.explainer(1).form.n_features
    assert K > 1
    assert why.contributions.shape == (4, K)
    assert why.contributions[::2, 1:].abs().max() == 0
    assert why.maps[::2, 1:].abs().max() == 0
    torch.testing.assert_close(why.contributions[1::2], three.contributions(x[1:4:2], 1).contributions)
    torch.testing.assert_close(why.maps[1::2], three.attribute(x[1:4:2], 1))
    torch.testing.assert_close(why.contributions.sum(1), why.prediction - why.bias, atol=0.02, rtol=0)


# Errors


class Argmax(nn.Module):
    def __init__(self, off):
        super().__init__()
        self.first, self.head, self.off = nn.Linear(6, 5), nn.Linear(5, 3), off

    def forward(self, x):
        z = self.first(x)
        if self.off == "argmax":
            return self.head(F.one_hot(z.argmax(1), 5).to(z))
        if self.off == "no_grad":
            with torch.no_grad():
                return self.head(z)
        if self.off == "path":
            return self.head(x[:, :5])
        if self.off == "constant":
            return self.head(z) * 0 + 1
        return self.head(torch.relu(self.first(torch.cat([z, z[:, :1]], 1))))


@pytest.mark.parametrize(
    ("off", "layer", "message"),
    [
        ("argmax", "first", r"does not depend on layer 'first'.*gradients; choose a layer.*SRAE"),
        ("no_grad", "first", r"does not depend on layer 'first'.*remove torch.no_grad"),
        ("path", "first", r"does not depend on layer 'first'.*choose a layer on the way"),
        ("constant", "first", r"the same for every example.*check the target and the inputs"),
    ],
)
def test_refuses_a_rest_that_has_no_contributions(off, layer, message):
    with pytest.raises(Exception, match=message) as caught:
        fitted(Argmax(off), layer, torch.randn(20, 6))
    assert isinstance(caught.value, (ValueError, RuntimeError))


class InARow(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.block(self.block(x)).tanh())


def test_of_calls_in_a_row_the_last_counts():
    model, x = InARow(), torch.randn(60, 6)
    made = fitted(model, "block", x, 1).contributions(x[:9], 1)
    with torch.no_grad():
        y, base = model(x)[:, 1], model.block(model.block(x)).mean(0)
        at_base = model.head(base.tanh())[1]
    torch.testing.assert_close(made.bias, at_base.expand(9), rtol=0, atol=1e-5)
    assert float((made.bias + made.contributions.sum(1) - y[:9]).abs().max()) < 0.011 * float(y.std())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.ids, self.embed, self.head = nn.Identity(), nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.embed(self.ids(x)).mean(1))


def test_refuses_an_integer_layer():
    with pytest.raises((ValueError, TypeError), match=r"'ids'.*torch\.int64.*; .*layer"):
        fitted(Tokens(), "ids", torch.randint(0, 9, (20, 5)))


def test_refuses_an_output_transform_that_calculates():
    with pytest.raises(ValueError, match=r"output_transform calculates with the output of layer 'lstm'.*SRAE"):
        fitted(Recurrent(), "lstm", torch.randn(20, 5, 3), output_transform=lambda out: out[0].mean(0))


def test_refuses_activations_without_inputs():
    model, x = mlp(), torch.randn(20, 6)
    found = collect(model, "1", x)
    bare = Activations(found.Z, found.y_hat, found.layer)
    with pytest.raises(ValueError, match=r"do not say which inputs.*pass the data themselves"):
        XNNAttribution(model, "1", 2).fit(bare, 0, positives=everything(20), progress=False)


@pytest.mark.parametrize("form", [None, SRAE])
def test_refuses_fewer_examples_than_features(form):
    data, everything = torch.randn(3, 6), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"n_features is 6, and the data have only 3 examples; .*n_features=3"):
        XNNAttribution(mlp(), "1", 6, autoencoder=form).fit(data, 1, positives=everything, progress=False)


def test_as_many_examples_as_features_add_up():
    model, x = mlp(), torch.randn(3, 6)
    xnn = fitted(model, "1", x, 1, K=3)
    assert largest_off(xnn.contributions(x, 1)) < 0.0101


def test_refuses_nan_activations():
    x = torch.randn(20, 6)
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN.*; "):
        fitted(mlp(), "1", x)


class Convolution1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean(2))


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.mix = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 16)
        self.act, self.head = nn.GELU(), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.act(self.mix(self.norm(self.patch(x).permute(0, 2, 3, 1)))).mean((1, 2)))


@pytest.mark.parametrize(
    ("build", "layer", "shape", "channels"),
    [
        (Convolution1d, "act", (2, 12), 6),
        (Convolution1d, "conv", (2, 12), 6),
        (ChannelsLast, "act", (3, 32, 32), 16),
        (cnn, "2", (1, 8, 8), 4),
    ],
)
def test_groups_are_of_channels_wherever_these_lie(build, layer, shape, channels):
    """And of whatever dimension the user names."""
    model, x = build().eval(), torch.randn(40, *shape)
    xnn = fitted(model, layer, x, 1)
    assert len(xnn.explainer(1).form.groups) == channels
    told = XNNAttribution(model, layer, 3, autoencoder=partial(ContributionGroups, channels=1))
    told.fit(x, 1, positives=torch.ones(40, dtype=torch.bool), progress=False)
    Z = collect(model, layer, x).Z
    assert len(told.explainer(1).form.groups) == Z.shape[1]


def test_all_calls_of_a_layer_have_no_contributions():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, a, b):
            return self.head((self.tower(a) - self.tower(b)).abs())

    x = (torch.randn(40, 6), torch.randn(40, 6))
    xnn = XNNAttribution(Siamese(), "tower", 2, output_transform=EveryCall())
    with pytest.raises(ValueError, match="groups of contributions explain one call; fit with autoencoder=SRAE"):
        xnn.fit(x, 1, positives=torch.ones(40, dtype=torch.bool), progress=False)


def test_fit_says_what_it_does_not_use():
    xnn = XNNAttribution(mlp(), "1", 2)
    with pytest.warns(UserWarning, match="fit does not use log: groups of contributions are a closed form"):
        xnn.fit(torch.randn(40, 6), 1, log=print, progress=False)


def test_fit_says_where_contributions_do_not_add_up():
    torch.manual_seed(0)
    model, x = cnn().eval(), torch.randn(40, 1, 8, 8)
    few = XNNAttribution(model, "0", 3, autoencoder=partial(ContributionGroups, intervals=1, most=1))
    with pytest.warns(
        UserWarning, match=r"miss the output by up to [\d.]+% .* in \d+ of \d+ examples, after 1 intervals"
    ):
        few.fit(x, 1, positives=everything(40), progress=False)
    fitted(model, "0", x, 1)  # says nothing


@pytest.mark.parametrize("method", [LayerGradCam, LayerGradientXActivation])
@pytest.mark.parametrize("layer", ["4", "7"])
def test_a_layer_of_maps_behind_the_explained_one_is_refused(method, layer):
    """The whole model runs for contributions, so that such a layer has activations, and maps that mean nothing."""
    model, x = cnn().eval(), torch.randn(40, 1, 8, 8)
    xnn = fitted(model, "3", x, 1, heatmap=FromCaptum(method, layer=layer))
    with pytest.raises(LayerNotReachedError, match=f"layer '{layer}' does not run before the explained layer '3'"):
        xnn.attribute(x[:2], 1)
    assert xnn.with_heatmap(FromCaptum(method, layer="2")).attribute(x[:2], 1).shape == (2, 3, 1, 8, 8)


class Jumps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        z = self.a(x)
        return self.b(torch.sign(z) + 0.01 * z)


def test_the_advice_where_contributions_do_not_add_up_fits_the_cause():
    x = torch.randn(40, 6)
    few = partial(ContributionGroups, intervals=8, most=16)
    xnn = XNNAttribution(Jumps().eval(), "a", 2, autoencoder=few)
    with pytest.warns(UserWarning, match=r"most=32\), or, where the rest of the model jumps, .*autoencoder=SRAE"):
        xnn.fit(x, 1, positives=everything(40), progress=False)
    torch.manual_seed(0)
    model, images = cnn().bfloat16().eval(), torch.randn(40, 1, 8, 8).bfloat16()
    xnn = XNNAttribution(model, "0", 2, autoencoder=few)
    with pytest.warns(UserWarning, match=r"run the model in float32, as torch.bfloat16 rounds its outputs"):
        xnn.fit(images, 1, positives=everything(40), progress=False)


@pytest.mark.filterwarnings("error")
def test_a_map_that_is_zero_says_that_the_x_feature_may_contribute():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.fill_(1.0)
    x = torch.rand(40, 2)
    xnn = XNNAttribution(model, "1", 2, heatmap=InputXGradient).fit(x, progress=False)
    off = -x[:3]  # both units are inactive, and say so: each adds 0 - base
    assert bool((xnn.contributions(off).contributions < -0.1).all())
    with pytest.raises(
        UserWarning,
        match=r"zero for x-feature 1 \(feature=0\), 2 \(feature=1\) in 3 of 3 examples: it may contribute by",
    ):
        xnn.attribute(off)


def test_outliers_that_decide_the_unit_of_errors_are_told():
    """Contributions of all other examples were off by a hundred of their standard deviations, without a word."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 1)).eval()
    data = torch.randn(160, 6)
    damaged = torch.cat([data, torch.full((1, 6), 1e5)])
    with pytest.warns(
        UserWarning, match=r"output 0 is [\d.e+]+, and 0\.\d+ without 1 of 161 .* example 160 with output"
    ):
        fitted(model, "1", damaged)
    fitted(model, "1", data)
    rare = torch.where(torch.arange(160)[:, None] < 5, 9 * data, 0.1 * data)  # a hundredth does not decide
    fitted(model, "1", rare)
