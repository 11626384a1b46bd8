"""Kinds of models on which an explanation was wrong or an error misled, each with the right value or the refusal."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, LayerGradientXActivation, Saliency
from torch import nn
from torch.nn import functional as F

from captum_xnn import SRAE, LayerExcitationBP, Recipe, XNNAttribution
from captum_xnn.heatmaps import ExcitationMaps, FromCaptum
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers import EveryCall
from captum_xnn.layers._logits import OutputRange, no_logits
from captum_xnn.models import ConvSRAE
from captum_xnn.models._srae import by_shape
from captum_xnn.training._directions import directions

K = 2


def made(model, layer, **settings):
    settings = {"heatmap": FromCaptum(Saliency, abs=False), "recipe": Recipe(steps=12), **settings}
    settings.setdefault("autoencoder", partial(SRAE, hidden=(8,)))
    return XNNAttribution(model, layer, K, **settings)


# --- two implementations of one model


class PaddedTokens(nn.Module):
    """Token ids of which 0 is padding, as text models have them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, ids):
        padding = ids == 0
        h = self.encoder(self.embedding(ids), src_key_padding_mask=padding)
        return self.head(h.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True))


def padded(n):
    ids = torch.randint(1, 20, (n, 6))
    ids[::2, 4:] = 0
    return ids


@pytest.mark.parametrize("layer", ["encoder", "encoder.layers.0", "encoder.layers.1.linear1", "encoder.layers.1.norm2"])
def test_a_padded_transformer_has_the_same_numbers_with_and_without_gradients(layer):
    """Without gradients torch has a fused implementation, which skips layers and zeroes padded positions."""
    model, ids = PaddedTokens().eval(), padded(80)
    heatmap = FromCaptum(LayerGradientXActivation, layer="embedding")
    xnn = made(model, layer, heatmap=heatmap).fit(ids, 0, positives=torch.ones(80).bool(), progress=False)
    assert torch.backends.mha.get_fastpath_enabled()
    some = ids[:5]
    why = xnn.explain(some, 0)
    network = ExplanationNetwork(model, layer, xnn.explainer(0).form)
    torch.testing.assert_close(why.features, network(some).detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(why.features, network(some), rtol=1e-4, atol=1e-5)
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    model(some)  # with gradients, by torch alone
    handle.remove()
    torch.testing.assert_close(why.features, xnn.explainer(0).form.encode(seen[0]), rtol=1e-4, atol=1e-5)


# --- a layer that runs several times in one pass


class Towers(nn.Module):
    """One encoder for two images, compared."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(10, 3)

    def forward(self, a, b):
        return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))


class Frames(nn.Module):
    """An encoder of frames, whose outputs are averaged; under no_grad, as frozen encoders run."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, frames):
        with torch.no_grad():
            seen = [self.encoder(frame) for frame in frames.unbind(1)]
        return self.head(torch.stack(seen).mean(0).tanh())


class Pyramid(nn.Module):
    """One head over two sizes of feature maps."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1), nn.Linear(160, 3)

    def forward(self, x):
        fine = self.stem(x).relu()
        coarse = fine[..., ::2, ::2]
        return self.head(torch.cat([self.shared(level).flatten(1) for level in (fine, coarse)], 1))


class Steps(nn.Module):
    """A cell whose state goes from call to call, in place."""

    def __init__(self, attention):
        super().__init__()
        self.cell, self.head, self.attention = nn.GRUCell(2, 5), nn.Linear(5, 3), attention

    def forward(self, x):
        states = [torch.zeros(len(x), 5)]
        for step in x.unbind(1):
            states.append(self.cell(step, states[-1]))
        return self.head(sum(states) if self.attention else states[-1].relu_())


SIDE_BY_SIDE = {
    "Siamese towers": (Towers, "encoder", ((6,), (6,)), (2, 5)),
    "frame encoder": (Frames, "encoder", ((3, 6),), (3, 5)),
    "pyramid levels": (Pyramid, "shared", ((1, 8, 8),), (160,)),
    "states that are summed": (partial(Steps, True), "cell", ((4, 2),), (4, 5)),
}


def batches(shapes, n=60):
    made = tuple(torch.randn(n, *shape) for shape in shapes)
    return made if len(made) > 1 else made[0]


@pytest.mark.parametrize("kind", SIDE_BY_SIDE)
def test_calls_side_by_side_are_refused(kind):
    make, layer, shapes, _ = SIDE_BY_SIDE[kind]
    model, data = make(), batches(shapes)
    with pytest.raises(ValueError, match=r"runs \d times side by side in a forward pass, .*EveryCall\(\)"):
        made(model, layer).fit(data, 0, positives=torch.ones(60).bool(), progress=False)
    assert not model.get_submodule(layer)._forward_hooks


def test_calls_in_a_row_are_read_at_the_last_one():
    model, data = Steps(False), batches(((4, 2),))
    xnn = made(model, "cell").fit(data, 0, positives=torch.ones(60).bool(), progress=False)
    state = torch.zeros(3, 5)
    for step in data[:3].unbind(1):
        state = model.cell(step, state)
    torch.testing.assert_close(xnn.explain(data[:3], 0).features, xnn.explainer(0).form.encode(state))


@pytest.mark.parametrize("kind", SIDE_BY_SIDE)
def test_every_call_is_explained(kind):
    """X-features and their gradients are those of all calls' outputs, put together by hand."""
    make, layer, shapes, shape = SIDE_BY_SIDE[kind]
    model, data = make(), batches(shapes)
    xnn = made(model, layer, output_transform=EveryCall())
    xnn.fit(data, 0, positives=torch.ones(60).bool(), progress=False)
    some = tuple(x[:3].clone().requires_grad_() for x in (data if isinstance(data, tuple) else (data,)))
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: seen.append(output))
    model(*some)
    handle.remove()
    Z = torch.stack(seen, 1) if len(shape) > 1 else torch.cat([z.flatten(1) for z in seen], 1)
    assert Z.shape[1:] == shape
    E = xnn.explainer(0).form.encode(Z)
    plain = tuple(x.detach() for x in some)
    if kind == "frame encoder":  # without gradients by its own will
        torch.testing.assert_close(xnn.contributions(plain[0], 0).features, E)
        return
    why = xnn.explain(plain if len(plain) > 1 else plain[0], 0)
    torch.testing.assert_close(why.features, E.detach())
    for k in range(K):
        wanted = torch.autograd.grad(E[:, k].sum(), some, retain_graph=True)
        for maps, grad in zip(why.maps if len(some) > 1 else (why.maps,), wanted, strict=True):
            assert bool(grad.any())
            torch.testing.assert_close(maps[:, k], grad)


def test_a_layer_whose_earlier_calls_count_for_nothing():
    """An auxiliary branch in the output that prediction_transform leaves out is no reason to refuse."""

    class Auxiliary(Towers):
        def forward(self, a, b):
            return {"aux": self.encoder(a), "logits": self.head(self.encoder(b).repeat(1, 2))}

    model, data = Auxiliary(), batches(((6,), (6,)))
    xnn = made(model, "encoder", prediction_transform=lambda output: output["logits"])
    assert len(xnn.fit(data, 0, positives=torch.ones(60).bool(), progress=False).explainers_) == 1


# --- how channels, cells and tokens lie


class PatchTokens(nn.Module):
    """A class token and those of 14 x 14 patches, of which a linear layer sees each alone."""

    def __init__(self, ahead=1):
        super().__init__()
        self.patch, self.mix, self.head = nn.Conv2d(3, 6, 14, 14), nn.Linear(6, 5), nn.Linear(5, 3)
        self.extra = nn.Parameter(torch.randn(1, ahead, 6))

    def forward(self, x):
        tokens = torch.cat([self.extra.expand(len(x), -1, -1), self.patch(x).flatten(2).mT], 1)
        return self.head(self.mix(tokens).tanh().mean(1))


SIZES = {"2:3": (56, 84, 4, 6), "3:4": (96, 128, 6, 9), "no multiple": (120, 160, 8, 11)}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_grad_cam_of_a_vision_transformer_lies_where_its_tokens_lie(size, given):
    """By hand from the convolution's own cells, which need not have the ratio of the image."""
    height, width, rows, columns = SIZES[size]
    model, x = PatchTokens(), torch.randn(24, 3, height, width)
    settings = {"layer": "mix", "tokens": "vit", **({"grid": (rows, columns)} if given else {})}
    xnn = made(model, "head", heatmap=FromCaptum(LayerGradCam, **settings))
    xnn.fit(x, 0, positives=torch.ones(24).bool(), progress=False)
    maps = xnn.attribute(x[:2], 0)
    cells = model.patch(x[:2])
    assert cells.shape[2:] == (rows, columns)
    a = model.mix(cells.permute(0, 2, 3, 1)).detach().requires_grad_()
    extra = model.mix(model.extra.expand(2, -1, -1)).detach()
    E = xnn.explainer(0).form.encode(model.head(torch.cat([extra, a.flatten(1, 2)], 1).tanh().mean(1)))
    for k in range(K):
        (grad,) = torch.autograd.grad(E[:, k].sum(), a, retain_graph=True)
        cam = (grad.mean((1, 2), keepdim=True) * a).sum(3)[:, None].detach()
        torch.testing.assert_close(
            maps[:, k], F.interpolate(cam, (height, width), mode="bilinear"), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("make", [partial(FromCaptum, LayerGradCam, layer="mix"), partial(ExcitationMaps, "mix")])
def test_a_grid_that_the_tokens_contradict(make):
    """Leftovers that are no class or register tokens, or more cells than tokens."""
    model, x = PatchTokens(), torch.randn(24, 3, 96, 128)
    xnn = made(model, "head").fit(x, 0, positives=torch.ones(24).bool(), progress=False)
    for grid in ((6, 8), (5, 11), (9, 6)):
        wrong = (
            rf"grid is \({grid[0]}, {grid[1]}\), and the 55 tokens of layer 'mix' are 6 x 9 cells of .* with 1 class"
        )
        with pytest.raises(ValueError, match=wrong):
            xnn.with_heatmap(make(tokens="vit", grid=grid)).attribute(x[:2], 0)
    with pytest.raises(ValueError, match="grid is 14; pass cells along height and width"):
        make(tokens="vit", grid=14)
    with pytest.raises(ValueError, match=r"grid=\(6, 9\) is for tokens='vit', and tokens is 'swin'"):
        make(tokens="swin", grid=(6, 9))


def test_tokens_whose_grid_the_model_does_not_show():
    """Patches cut out by a reshape; the grid has to be given."""

    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(12, 5), nn.Linear(5, 3)

        def forward(self, x):
            patches = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
            return self.head(self.embed(patches.flatten(3).flatten(1, 2)).tanh().mean(1))

    model, x = Reshaped(), torch.randn(24, 3, 6, 8)
    xnn = made(model, "head").fit(x, 0, positives=torch.ones(24).bool(), progress=False)
    cam = partial(FromCaptum, LayerGradCam, layer="embed", tokens="vit")
    with pytest.raises(ValueError, match=r"'embed' gives 12 tokens, and no convolution .* pass it, .*grid=\(height"):
        xnn.with_heatmap(cam()).attribute(x[:2], 0)
    with pytest.raises(ValueError, match=r"grid is \(4, 4\), 16 cells, and layer 'embed' gives 12 tokens"):
        xnn.with_heatmap(cam(grid=(4, 4))).attribute(x[:2], 0)
    maps = xnn.with_heatmap(cam(grid=(3, 4))).attribute(x[:2], 0)
    patches = F.unfold(x[:2], 2, stride=2).mT
    a = model.embed(patches).detach().requires_grad_()
    E = xnn.explainer(0).form.encode(model.head(a.tanh().mean(1)))
    for k in range(K):
        (grad,) = torch.autograd.grad(E[:, k].sum(), a, retain_graph=True)
        wanted = (grad.mean(1, keepdim=True) * a).sum(2).detach().reshape(2, 1, 3, 4)
        torch.testing.assert_close(maps[:, k], F.interpolate(wanted, (6, 8), mode="bilinear"), rtol=1e-4, atol=1e-6)


class Cube(nn.Module):
    """As many channels as rows and columns, last, as a small Swin has them."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.act, self.head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.act(self.norm(self.patch(x).permute(0, 2, 3, 1))).mean((1, 2)))


@pytest.mark.filterwarnings("ignore:probabilities sum to")
def test_channels_last_are_summed_over_channels_by_every_backend():
    model, x = Cube(), torch.randn(24, 3, 32, 32)
    xnn = made(model, "head").fit(x, 0, positives=torch.ones(24).bool(), progress=False)
    maps = xnn.with_heatmap(FromCaptum(LayerGradientXActivation, layer="act")).attribute(x[:2], 0)
    a = model.act(model.norm(model.patch(x[:2]).permute(0, 2, 3, 1))).detach().requires_grad_()
    E = xnn.explainer(0).form.encode(model.head(a.mean((1, 2))))
    for k in range(K):
        (grad,) = torch.autograd.grad(E[:, k].sum(), a, retain_graph=True)
        wanted = F.interpolate((a * grad).sum(3)[:, None], (32, 32), mode="bilinear").detach()
        torch.testing.assert_close(maps[:, k], wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="a layer with feature maps"):
        xnn.with_heatmap(FromCaptum(LayerGradCam, layer="act")).attribute(x[:2], 0)
    network = ExplanationNetwork(model, "head", xnn.explainer(0).form)
    (p,) = ExcitationMaps("act", contrastive=False)(network, (x[:1],), [0])
    own = LayerExcitationBP(network, model.act, contrastive=False).attribute(x[:1], target=0)
    torch.testing.assert_close(p[:, 0], F.interpolate(own.sum(3)[:, None], (32, 32), mode="bilinear"))


def test_learned_forms_do_not_take_rows_for_channels():
    model, x, everything = Cube(), torch.randn(40, 3, 32, 32), torch.ones(40).bool()
    with pytest.raises(ValueError, match=r"layer 'act' gives \(8, 8, 8\) .* channels last, and ConvSRAE takes"):
        made(model, "act", autoencoder=ConvSRAE).fit(x, 0, positives=everything, progress=False)
    turned = made(model, "act", autoencoder=by_shape, output_transform=lambda output: output.movedim(-1, 1))
    assert isinstance(turned.fit(x, 0, positives=everything, progress=False).explainer(0).form, ConvSRAE)
    flat = made(model, "act", autoencoder=by_shape).fit(x, 0, positives=everything, progress=False)
    assert isinstance(flat.explainer(0).form, SRAE)
    assert isinstance(made(model, "patch", autoencoder=by_shape).fit(x, 0, positives=everything, progress=False)
                      .explainer(0).form, ConvSRAE)  # fmt: skip
    groups = XNNAttribution(model, "act", K).fit(x, 0, positives=everything, progress=False).explainer(0).form
    assert groups.channels == 3


def test_steps_that_are_as_many_as_the_examples_are_no_examples():
    """An LSTM gives (T, N, D) unless told otherwise; of T = N examples the shape says nothing."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.turn, self.lstm, self.head = nn.Linear(4, 4), nn.LSTM(4, 5), nn.Linear(5, 3)
            self.out = nn.Identity()

        def forward(self, x):
            return self.head(self.out(self.lstm(self.turn(x).transpose(0, 1))[0])[-1])

    model, x = Steps(), torch.randn(6, 6, 4)
    for form in (None, partial(SRAE, hidden=(8,))):
        xnn = XNNAttribution(model, "out", K, autoencoder=form, recipe=Recipe(steps=12))
        with pytest.raises(ValueError, match=r"put examples first in output_transform="):
            xnn.fit(x, 0, positives=torch.ones(6).bool(), progress=False)
        for n in (1, 2, 6):  # the probe has two examples, or one of two
            with pytest.raises(ValueError, match="examples"):
                xnn.fit(x[:n], 0, positives=torch.ones(n).bool(), progress=False)
    swapped = made(model, "head").fit(torch.randn(40, 6, 4), 0, positives=torch.ones(40).bool(), progress=False)
    for heatmap in (
        FromCaptum(LayerGradCam, layer="out", tokens="sequence"),
        ExcitationMaps("out", tokens="vit", strict=False),
    ):
        with pytest.raises(ValueError, match=r"layer 'out' gives shape \(6, 1, 5\) for 1 example"):
            swapped.with_heatmap(heatmap).attribute(x, 0)
    chance = r"layer 'out' gives shape \(6, 1, 5\) for 1 example, so its examples do not come first"
    gradients = swapped.with_heatmap(FromCaptum(LayerGradientXActivation, layer="out"))
    with pytest.raises(ValueError, match=chance):
        gradients.attribute(x[:3], 0)  # 3 examples with 2 maps each are 6 rows
    with pytest.raises(ValueError, match=r"layer 'out' gives shape \(6, 8, 5\) for 8 examples, so its examples"):
        gradients.attribute(x[:4], 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "probabilities sum to")
        with pytest.raises(ValueError, match=chance):
            swapped.with_heatmap(ExcitationMaps("out")).attribute(x, 0)


# --- outputs that are no logits


def classifier(*end):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), *end)


def centred(y):
    return y - y.mean(1, keepdim=True)


NO_LOGITS = {
    "softmax": (nn.Softmax(1), r"non-negative and sum to 1 .* pass prediction_transform=lambda y: y.log\(\) - ",
                lambda y: centred(y.log()), centred),
    "log_softmax": (nn.LogSoftmax(1), r"exponentials .* sum to 1 .* prediction_transform=lambda y: y - y.mean\(1, ",
                    centred, centred),
    "sigmoid": (nn.Sigmoid(), r"between 0 and 1 \(.*\), and may be probabilities after a sigmoid, .*torch.logit, eps",
                partial(torch.logit, eps=1e-6), lambda y: y),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_LOGITS)
def test_outputs_that_are_no_logits_are_told_with_a_remedy_that_is_right(kind):
    """With the remedy contributions are those to the logits before, which a softmax gives up to their mean."""
    end, told, remedy, same = NO_LOGITS[kind]
    logits, x = classifier(), torch.randn(80, 6)
    with torch.no_grad():
        logits[2].weight.mul_(4)
    model, everything = nn.Sequential(*logits, end), torch.ones(80).bool()
    refused = kind == "softmax"
    with pytest.raises(ValueError, match=told) if refused else pytest.warns(UserWarning, match=told) as seen:
        XNNAttribution(model, "1", K).fit(x, [0, 1], positives=everything, progress=False)
    assert refused or len(seen) == 1
    given = XNNAttribution(model, "1", K, prediction_transform=remedy)
    wanted = XNNAttribution(logits, "1", K, prediction_transform=same)
    for xnn in (given, wanted):
        xnn.fit(x, 0, positives=everything, progress=False)
    one, other = (xnn.explain(x[:5], 0) for xnn in (given, wanted))
    torch.testing.assert_close(one.prediction, same(logits(x[:5]))[:, 0].detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.bias + one.contributions.sum(1), one.prediction, rtol=0.02, atol=0.02)
    torch.testing.assert_close(one.bias, other.bias, rtol=0.02, atol=0.02)


def test_outputs_over_positions_that_are_no_logits():
    """Of a segmentation network classes are in dimension 1, of a language model in the last one."""
    x, everything = torch.rand(24, 3, 6, 6), torch.ones(24).bool()
    maps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.LogSoftmax(1))
    with pytest.warns(UserWarning, match=r"exponentials of the outputs sum to 1 .* y - y.mean\(1, keepdim=True\)"):
        XNNAttribution(maps, "1", K).fit(x, (0, 1, 1), positives=everything, progress=False)
    tokens = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Softmax(-1))
    with pytest.raises(ValueError, match=r"sum to 1 .* y.log\(\).mean\(2, keepdim=True\)"):
        XNNAttribution(tokens, "1", K).fit(torch.randn(24, 4, 6), (2, 1), positives=everything, progress=False)


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        (torch.linspace(0, 1, 40), "may be"),  # a regression too, which is why it says so
        (torch.linspace(0, 1, 40)[:, None], "may be"),
        (torch.linspace(0.2, 0.6, 40)[:, None], None),  # close together, as outputs of a regression or small logits
        (torch.linspace(0, 1, 8)[:, None], None),  # few
        (torch.linspace(0, 1.01, 40)[:, None], None),
        (torch.linspace(-0.01, 1, 40)[:, None], None),
        (torch.linspace(-3, 3, 40)[:, None].expand(-1, 3), None),
        (torch.eye(3).repeat(9, 1), "sum to 1"),
        (torch.cat([torch.eye(3).repeat(9, 1), torch.tensor([[0.5, 0.5, 0.1]])]), "may be"),
        (torch.cat([torch.randn(9, 3).log_softmax(1), torch.tensor([[-1.0, -1.0, -1.0]])]), None),
        (torch.randn(40, 4).half().log_softmax(1), "exponentials"),
    ],
)
def test_which_outputs_are_told_to_be_no_logits(outputs, told):
    seen = OutputRange()
    for part in outputs.split(7):
        seen.add(part)
    given = no_logits(seen)
    assert given is None if told is None else told in given


# --- more x-features than a layer has directions


def test_more_x_features_than_directions_are_told_where_they_cost():
    """A layer of one direction and a little noise, as the last of a binary classifier."""
    x, everything = torch.randn(300, 6), torch.ones(300).bool()
    model = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 8), nn.Linear(8, 1))
    with torch.no_grad():
        model[1].bias.zero_()

    def fitted(K):
        xnn = XNNAttribution(model, "1", K, autoencoder=partial(SRAE, hidden=(8,)), recipe=Recipe(steps=12))
        return xnn.fit(x, positives=everything, progress=False)

    deviation = float(model(x).detach().std())
    with pytest.warns(UserWarning, match="n_features is 5, and 99 % .* layer '1' lies in 1 direction: .*n_features=1"):
        assert fitted(5).explainer().f_reg > 0.02 * deviation
    fitted(1)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_directions_are_counted_by_their_variance(count):
    basis = torch.linalg.qr(torch.randn(9, 9))[0][:, :count]
    Z = torch.randn(700, count) @ basis.mT + 0.01 * torch.randn(700, 9) + 40
    assert directions(Z.unflatten(1, (3, 3))) == count
    values = np.linalg.eigvalsh(np.cov(Z.numpy().T))[::-1]
    assert int((values.cumsum() < 0.99 * values.sum()).sum()) + 1 == count


def test_groups_that_add_nothing_are_merged_and_logged(caplog):
    """Of four dimensions two reach the output."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(80, 4)
    with torch.no_grad():
        model[2].weight[0, 2:] = 0
    xnn = XNNAttribution(model, "1", 4)
    with caplog.at_level("INFO", "captum_xnn"):
        xnn.fit(x, positives=torch.ones(80).bool(), progress=False)
    left = xnn.explainer().form.n_features
    assert left <= 2
    assert f"{left} of 4 x-features were left after merging" in caplog.text
    why = xnn.contributions(x[:5])
    torch.testing.assert_close(why.bias + why.contributions.sum(1), model(x[:5])[:, 0].detach(), rtol=0.02, atol=0.02)


class Packed(nn.Module):
    """A recurrent layer over packed sequences, whose last steps a head reads."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True, bidirectional=True), nn.Linear(10, 2)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(h.tanh().sum(1) / lengths[:, None])


def test_steps_of_a_packed_sequence_are_explained_and_its_padding_is_not():
    """The base of each step is the mean over examples, and the padding stays 0 on the whole path."""
    model, x = Packed(), torch.randn(30, 6, 3)
    lengths = torch.arange(30) % 6 + 1
    lengths[-1] = 6
    data = [(x, lengths)]

    def made(**settings):
        xnn = XNNAttribution(model, "lstm", 2, unpack=lambda batch: (batch[0], batch[1]), **settings)
        return xnn.fit(data, 0, positives=torch.ones(30, dtype=torch.bool), progress=False)

    told = r"lambda output: torch\.nn\.utils\.rnn\.pad_packed_sequence\(output\[0\], batch_first=True\)\[0\]"
    with pytest.raises(TypeError, match=told):
        made()
    xnn = made(
        output_transform=lambda output: nn.utils.rnn.pad_packed_sequence(output[0], batch_first=True, total_length=6)[0]
    )
    why = xnn.contributions(x, 0, lengths)
    with torch.no_grad():
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        Z = nn.utils.rnn.pad_packed_sequence(model.lstm(packed)[0], batch_first=True)[0]
        here = (torch.arange(6) < lengths[:, None])[..., None]
        y = model(x, lengths)[:, 0]
        bias = model.head(torch.where(here, Z.mean(0), 0).tanh().sum(1) / lengths[:, None])[:, 0]
    torch.testing.assert_close(why.prediction, y)
    torch.testing.assert_close(why.bias, bias, rtol=1e-4, atol=1e-5)
    assert (y - why.surrogate).abs().max() < 0.03 * y.std()
    alone = xnn.contributions(x[:1], 0, lengths[:1])
    torch.testing.assert_close(alone.contributions, why.contributions[:1], rtol=1e-3, atol=1e-4)


def test_contributions_without_a_finite_slope_are_told():
    """The square root of an inactive ReLU: only the second example has one."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Root(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias.fill_(9.0)
    x = torch.randn(30, 6)
    xnn = XNNAttribution(model, "1", 2).fit(x, 0, positives=torch.ones(30, dtype=torch.bool), progress=False)
    x[1] = -50 * model[0].weight[0].detach()
    with pytest.warns(UserWarning, match=r"at layer '1' are NaN or infinite in 1 of 3 examples: .* square root"):
        why = xnn.contributions(x[:3], 0)
    assert why.contributions.isfinite().all(1).tolist() == [True, False, True]
    torch.testing.assert_close(why.surrogate[::2], why.prediction[::2], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model[0].bias[3] = -100.0  # dead in all examples
    with pytest.raises(ValueError, match=r"contributions at layer '1' are NaN or infinite; .* within a square root"):
        XNNAttribution(model, "1", 2).fit(x, 0, positives=torch.ones(30, dtype=torch.bool), progress=False)


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


class OneAtATime(nn.Module):
    """A forward pass written for a single example."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).tanh().view(1, -1))


def test_a_model_of_one_example_at_a_time_is_refused_and_what_is_advised_works():
    model, x = OneAtATime(), torch.randn(30, 6)
    data, every = list(x.split(1)), torch.ones(30, dtype=torch.bool)
    told = (
        r"OneAtATime runs on a batch of 1, but not on 9 rows, 9 points .*: mat1 .*any number of rows, or fit with auto"
    )
    with pytest.raises(RuntimeError, match=told):
        XNNAttribution(model, "layer", 2).fit(data, 0, positives=every, progress=False)
    xnn = XNNAttribution(model, "layer", 2, autoencoder=partial(SRAE, hidden=(4,)), recipe=Recipe(steps=10))
    why = xnn.fit(data, 0, positives=every, progress=False).contributions(x[:1], 0)
    torch.testing.assert_close(why.prediction, model(x[:1])[:, 0])
