"""What must not change the results of excitation backprop: equivalent nets, and other ways of writing the same net."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from captum_xnn import ExcitationBP, LayerExcitationBP, NeuronExcitationBP
from captum_xnn.excitation_bp._attribution import total_mass
from captum_xnn.excitation_bp._workspace import Workspace

# What small random nets lose is no matter here but where it is asked about.
LOSS = "probabilities sum to"
lossy = pytest.mark.filterwarnings(f"ignore:{LOSS}")
# Dynamo asks every tensor for its .grad, in plain torch too.
dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
few = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
MWP = partial(ExcitationBP, contrastive=False)
LayerMWP = partial(LayerExcitationBP, contrastive=False)
NeuronMWP = partial(NeuronExcitationBP, contrastive=False)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(model, seed=0, dtype=torch.float64):
    """The model with weights and statistics from the seed; biases are negative, so that only children excite."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5)
            if name.endswith("bias"):
                p.copy_(-0.05 * p.abs())
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) / 5)
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.5)
                m.weight.copy_(torch.randn(m.weight.shape, generator=g))
    return model.to(dtype).eval()


def mlp(seed=0, dtype=torch.float64, classes=4):
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, classes))
    return filled(net, seed, dtype)


def cnn(seed=0, dtype=torch.float64, inplace=False):
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1),
        nn.ReLU(inplace),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.ReLU(inplace),
        nn.Linear(10, 4),
    )
    return filled(net, seed, dtype)


def images(n=2, seed=1, dtype=torch.float64):
    return randn(n, 2, 8, 8, seed=seed, dtype=dtype)


class Residual(nn.Module):
    """A residual net, written in one of several ways."""

    def __init__(self, way="+", norm=True):
        super().__init__()
        self.way = way
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.na, self.nb = (nn.BatchNorm2d(4), nn.BatchNorm2d(4)) if norm else (nn.Identity(), nn.Identity())
        self.relu = nn.ReLU(inplace=way not in ("+", "stack", "F"))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.relu(self.stem(x))
        skip = x
        out = self.nb(self.b(self.relu(self.na(self.a(x)))))
        match self.way:
            case "+" | "F":
                out = out + skip
            case "+=":
                out += skip
            case "bare":
                out.add_(skip)
            case "torch.add":
                out = torch.add(input=out, other=skip)
            case "method":
                out = out.add(skip)
            case "reversed":
                out = skip + out
            case "sum":
                out = sum([out, skip])
            case "stack":
                out = torch.stack([out, skip]).sum(0)
            case "alpha":
                out = torch.add(out, skip, alpha=1)
            case "slice":
                out[:] += skip
            case "view":
                out.view(-1).add_(skip.view(-1))
        return self.head(self.relu(out).mean((2, 3)))


WAYS = ["+=", "bare", "torch.add", "method", "reversed", "sum", "stack", "alpha", "slice", "view"]


def residual(way="+", seed=0, norm=True, dtype=torch.float64):
    return filled(Residual(way, norm), seed, dtype)


def both(net, x, target, **kwargs):
    """MWP and c-MWP."""
    return torch.stack([ExcitationBP(net, contrastive=c, **kwargs).attribute(x, target) for c in (False, True)])


def share(op, a, W, p):
    """The excitatory rule, by autograd: W+ counts on a+, W- on a-."""
    p = torch.as_tensor(p, dtype=a.dtype)
    parts = [(a.clamp(min=0), W.clamp(min=0)), (a.clamp(max=0), W.clamp(max=0))]
    parts = [(a.detach().requires_grad_(), W.detach()) for a, W in parts]
    Z = sum(op(a, W) for a, W in parts)
    s = torch.where(Z.detach() != 0, p / Z.detach(), 0)
    grads = torch.autograd.grad((Z * s).sum(), [a for a, _ in parts])
    return sum(a.detach() * g for (a, _), g in zip(parts, grads, strict=True))


def prior(n, k, target):
    return F.one_hot(torch.full((n,), target), k).double()


def contrast(a, W, target):
    p = prior(len(a), len(W), target)
    return share(F.linear, a, W, p) - share(F.linear, a, -W, p)


# Equivalent nets


@lossy
@few
@given(seed=seeds, factor=st.floats(0.1, 10), layer=st.sampled_from([0, 2]))
def test_scaling_a_row_and_unscaling_the_next_column(seed, factor, layer):
    net, x = mlp(seed), randn(3, 6, seed=seed + 1)
    scaled = copy.deepcopy(net)
    row = seed % 8
    with torch.no_grad():
        scaled[layer].weight[row] *= factor
        scaled[layer].bias[row] *= factor
        scaled[layer + 2].weight[:, row] /= factor
    close(both(scaled, x, seed % 4), both(net, x, seed % 4))


@lossy
@few
@given(seed=seeds, factor=st.floats(0.1, 10))
def test_scaling_a_channel_and_unscaling_the_next_one(seed, factor):
    net, x = cnn(seed), images(seed=seed + 1)
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled[0].weight[3] *= factor
        scaled[0].bias[3] *= factor
        scaled[3].weight[:, 3] /= factor
    close(both(scaled, x, 1), both(net, x, 1))


@few
@given(seed=seeds, factor=st.floats(0.1, 10))
def test_scale_of_inputs_does_not_matter_without_biases(seed, factor):
    net, x = mlp(seed), randn(3, 6, seed=seed + 1)
    for m in net[::2]:
        m.bias = None
    target = net(x).argmax(1)
    assume(net(x).amax(1).min() > 0)
    close(MWP(net).attribute(factor * x, target), MWP(net).attribute(x, target))


AFFINE = {
    "linear": (lambda: nn.Linear(6, 7), lambda: nn.BatchNorm1d(7), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 7, bias=False), lambda: nn.BatchNorm1d(7), (6,)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), lambda: nn.BatchNorm1d(4), (2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2), lambda: nn.BatchNorm2d(4), (2, 7, 7)),
    "grouped": (lambda: nn.Conv2d(2, 4, 3, groups=2, bias=False), lambda: nn.BatchNorm2d(4), (2, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: nn.BatchNorm3d(3), (2, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3), lambda: nn.BatchNorm2d(3), (2, 4, 4)),
}


@lossy
@pytest.mark.parametrize("name", AFFINE)
@few
@given(seed=seeds, negative=st.sampled_from(["excitatory", "clamp", "raw"]))
def test_folding_batch_norm_changes_nothing(name, seed, negative):
    layer, norm, shape = AFFINE[name]
    layer, norm, x = layer(), norm(), randn(2, *shape, seed=seed)
    filled(nn.ModuleList([layer, norm]), seed)
    n = norm(layer(x)).flatten(1).shape[1]
    tail = filled(nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(n, 3)), seed + 1)
    folded = copy.deepcopy(layer)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        rows = layer.weight.transpose(0, 1) if name == "transposed" else layer.weight
        rows = rows * scale.view(-1, *[1] * (rows.dim() - 1))
        folded.weight.copy_(rows.transpose(0, 1) if name == "transposed" else rows)
        bias = 0 if layer.bias is None else layer.bias
        folded.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias)
    close(folded(x), norm(layer(x)))
    given, wanted = (
        both(net, x, 2, negative=negative) for net in (nn.Sequential(layer, norm, tail), nn.Sequential(folded, tail))
    )
    close(given, wanted, rtol=1e-6, atol=1e-9 * wanted.abs().max().item())


def conv_relu_add(m, x, style):
    """cnn's first layers and a residual sum, written in several styles."""
    a, b, head = m
    match style:
        case "module":
            h = nn.functional.relu(a(x))
            return head((h + F.relu(b(h))).mean((2, 3)))
        case "functional":
            h = torch.relu(F.conv2d(x, a.weight, a.bias, padding=1))
            h = torch.add(h, torch.relu(torch.conv2d(h, b.weight, b.bias, padding=1)))
            return F.linear(F.adaptive_avg_pool2d(h, 1).flatten(1), head.weight, head.bias)
        case "method":
            h = F.conv2d(x, a.weight, a.bias, padding=1).relu()
            h = h.add(F.conv2d(h, b.weight, b.bias, padding=1).clamp(min=0))
            return h.mean(3).mean(2).matmul(head.weight.t()) + head.bias
        case "in place":
            h = F.conv2d(x, a.weight, a.bias, 1, 1)
            h.relu_()
            y = F.relu_(F.conv2d(h, b.weight, b.bias, 1, 1))
            y += h
            return torch.addmm(head.bias, torch.mean(y, dim=(-1, -2)), head.weight.T)
        case "keywords":
            h = F.relu(input=F.conv2d(input=x, weight=a.weight, bias=a.bias, padding="same"), inplace=True)
            y = F.conv2d(bias=b.bias, weight=b.weight, input=h, padding="same")
            y = torch.clamp(input=y, min=0).add(other=h)
            y = F.adaptive_avg_pool2d(y, output_size=1).flatten(1)
            return F.linear(bias=head.bias, weight=head.weight, input=y)
        case "products":
            cols = [F.unfold(x, 3, padding=1)]
            h = (a.weight.flatten(1) @ cols[0] + a.bias[:, None]).unflatten(2, x.shape[2:]).relu()
            y = torch.einsum("ok,nkl->nol", b.weight.flatten(1), F.unfold(h, 3, padding=1)) + b.bias[:, None]
            y = torch.maximum(y.reshape_as(h), torch.zeros(()).double()) + h
            return (y.sum((2, 3)) / y[0, 0].numel()) @ head.weight.T + head.bias


@lossy
@pytest.mark.parametrize("style", ["functional", "method", "in place", "keywords", "products"])
@few
@given(seed=seeds)
def test_functional_twins(style, seed):
    layers = nn.ModuleList([nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)])
    layers, x = filled(layers, seed), randn(2, 2, 5, 5, seed=seed)
    close(
        both(lambda x: conv_relu_add(layers, x, style), x, 1), both(lambda x: conv_relu_add(layers, x, "module"), x, 1)
    )


NETS = {
    "mlp": (mlp, lambda n, dtype=torch.float64: randn(n, 6, seed=3, dtype=dtype)),
    "cnn": (cnn, lambda n, dtype=torch.float64: images(n, dtype=dtype)),
    "residual": (partial(residual, "+="), lambda n, dtype=torch.float64: images(n, dtype=dtype)),
    "many classes": (partial(mlp, classes=20), lambda n, dtype=torch.float64: randn(n, 6, dtype=dtype)),
}


@lossy
@pytest.mark.parametrize("name", NETS)
def test_batch_equals_singles(name):
    make, inputs = NETS[name]
    net, x = make(), inputs(5)
    targets = [0, 3, 1, 1, 2]
    for ebp in (ExcitationBP(net), MWP(net)):
        singles = [ebp.attribute(x[i : i + 1], t) for i, t in enumerate(targets)]
        close(ebp.attribute(x, targets), torch.cat(singles))
        order = torch.tensor([4, 2, 0, 1, 3])
        close(ebp.attribute(x[order], torch.tensor(targets)[order]), ebp.attribute(x, targets)[order])


@lossy
@pytest.mark.parametrize("negative", ["excitatory", "clamp", "raw"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("make", [residual, cnn])
def test_large_layers_go_in_pieces(make, activation, negative, monkeypatch):
    """Which overwrite what has gone by: several targets, several examples, tensors that two branches share."""
    net, x, targets = make(), images(3), [0, 3, 1]
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.ReLU):
            net.set_submodule(name, activation())
    for contrastive in (False, True):
        ebp = ExcitationBP(net, contrastive=contrastive, negative=negative)
        whole = ebp.attribute_targets(x, targets)
        for piece in (1, 200):
            with monkeypatch.context() as m:
                m.setattr(Workspace, "PIECE", piece)
                close(ebp.attribute_targets(x, targets), whole)


class Joined(torch.autograd.Function):
    """A sum whose derivative gives both terms the same memory, or each its own."""

    @staticmethod
    def forward(ctx, a, b, is_shared):
        ctx.is_shared = is_shared
        return a + b

    @staticmethod
    def backward(ctx, g):
        return g, g if ctx.is_shared else g.clone(), None


@pytest.mark.filterwarnings(f"ignore:{LOSS}", "ignore:excitation backprop has no rule")
@pytest.mark.parametrize("last", ["conv", "relu"])
def test_shared_memory_is_not_overwritten(last, monkeypatch):
    monkeypatch.setattr(Workspace, "PIECE", 1)
    net, x = cnn(), images(3)
    one, other = (filled(nn.Conv2d(5, 5, 3, padding=1), seed) for seed in (1, 2))

    def f(x, is_shared):
        h = net[:3](x)
        joined = Joined.apply(one(h), h if last == "relu" else other(h), is_shared)
        return net[3:](Joined.apply(joined, joined, is_shared).relu())

    wanted = MWP(lambda x: f(x, False)).attribute_targets(x, [0, 3])
    assert torch.equal(MWP(lambda x: f(x, True)).attribute_targets(x, [0, 3]), wanted)


def products_keep_their_bits(net, n, K):
    """Whether this processor multiplies n rows with weights to the same bits alone and among those of K targets."""

    def keeps(W):
        rows = randn(n, len(W)).to(W)
        return torch.equal(rows.repeat(K, 1) @ W, (rows @ W).repeat(K, 1))

    weights = [m.weight.detach() for m in net.modules() if isinstance(m, nn.Linear)]
    return all(keeps(W) and keeps(W.T.contiguous()) for W in weights)


@lossy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("piece", [1, 1 << 22])
def test_targets_at_once_equal_single_ones_bitwise(name, dtype, n, piece, monkeypatch):
    """Where the processor's products allow it. Elsewhere they differ by some units in the last place."""
    monkeypatch.setattr(Workspace, "PIECE", piece)  # how many numbers are worked on at once
    make, inputs = NETS[name]
    net, x = make(dtype=dtype), inputs(n, dtype)
    per_example = torch.arange(n) % 4
    for targets in ([2], [0, 3], [1, 1, 0, 2, 3], [per_example, 2, per_example.tolist()]):
        bits = products_keep_their_bits(net, n, len(targets))
        same = torch.equal if bits else partial(torch.allclose, rtol=1e2 * torch.finfo(dtype).eps)
        for contrastive in (False, True):
            ebp = ExcitationBP(net, contrastive=contrastive)
            at_once = ebp.attribute_targets(x, targets)
            assert at_once.shape == (n, len(targets), *x.shape[1:])
            assert same(at_once, torch.stack([ebp.attribute(x, t) for t in targets], 1))
            layer = LayerExcitationBP(net, "stem" if name == "residual" else "1", contrastive=contrastive)
            at_once = layer.attribute_targets(x, targets)
            assert same(at_once, torch.stack([layer.attribute(x, t) for t in targets], 1))


@lossy
@few
@given(seed=seeds, add=st.sampled_from(["signed", "excitatory"]), order=st.permutations([0, 1, 2]))
def test_order_of_branches_does_not_matter(seed, add, order):
    layers = filled(nn.ModuleList([nn.Linear(5, 6) for _ in range(3)] + [nn.Linear(6, 3)]), seed)
    x = randn(2, 5, seed=seed)

    def net(order, x):
        first, second, third = (layers[i](x).relu() for i in order)
        return layers[3](first + second + third)

    close(both(partial(net, order), x, 0, add=add), both(partial(net, [0, 1, 2]), x, 0, add=add))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@few
@given(seed=seeds)
def test_mass_is_one_at_every_cut_and_never_negative(name, seed):
    make, inputs = NETS[name]
    net, x = make(seed), inputs(3)
    y = net(x)
    assume(y.amax(1).min() > 0)  # biases are negative: a positive logit has an active child of positive weight
    for layer in [str(i) for i in range(len(net))]:
        P, delta = LayerMWP(net, layer).attribute(x, y.argmax(1), return_convergence_delta=True)
        close(total_mass(P), torch.ones(3).double())
        close(delta, torch.zeros(3).double())
        assert P.min() >= 0
    P = MWP(net).attribute(x, y.argmax(1))
    close(total_mass(P), torch.ones(3).double())
    assert P.min() >= 0


def test_mass_of_a_residual_net_is_one_at_every_cut():
    net, x = residual("+=", norm=False), images(3)
    target = net(x).argmax(1)
    for layer in ("head", "relu", "stem"):
        P = LayerMWP(net, layer).attribute(x, target)
        close(total_mass(P), torch.full_like(total_mass(P), 1))
    for add in ("signed", "excitatory"):
        close(total_mass(MWP(net, add=add).attribute(x, target)), torch.ones(3).double())


@lossy
@few
@given(seed=seeds, order=st.permutations(range(4)))
def test_permuted_classes_permute_results(seed, order):
    net, x = cnn(seed), images()
    permuted = copy.deepcopy(net)
    with torch.no_grad():
        permuted[-1].weight.copy_(net[-1].weight[order])
        permuted[-1].bias.copy_(net[-1].bias[order])
    close(
        ExcitationBP(permuted).attribute_targets(x, list(range(4))), ExcitationBP(net).attribute_targets(x, list(order))
    )


@lossy
@few
@given(seed=seeds, order=st.permutations(range(9)))
def test_permuted_neurons_permute_results(seed, order):
    net, x = mlp(seed), randn(2, 6, seed=seed)
    permuted = copy.deepcopy(net)
    with torch.no_grad():
        permuted[0].weight.copy_(net[0].weight[order])
        permuted[0].bias.copy_(net[0].bias[order])
        permuted[2].weight.copy_(net[2].weight[:, order])
    close(both(permuted, x, 3), both(net, x, 3))
    close(LayerExcitationBP(permuted, "1").attribute(x, 3), LayerExcitationBP(net, "1").attribute(x, 3)[:, list(order)])


def test_rules_worked_out_by_autograd():
    net, x = cnn(), images()
    acts = [x]
    for m in net:
        acts.append(m(acts[-1]).detach())
    for contrastive in (False, True):
        W = net[9].weight
        p = contrast(acts[9], W, 2) if contrastive else share(F.linear, acts[9], W, prior(2, 4, 2))
        p = share(F.linear, acts[7], net[7].weight, p).unflatten(1, (6, 2, 2))
        p = share(lambda a, _: F.avg_pool2d(a, 2), acts[5], torch.zeros(()), p)
        p = share(partial(F.conv2d, padding=1), acts[3], net[3].weight, p)
        pooled = acts[2].requires_grad_()
        (p,) = torch.autograd.grad(F.max_pool2d(pooled, 2), pooled, p)
        p = share(partial(F.conv2d, padding=1), acts[0], net[0].weight, p)
        close(ExcitationBP(net, contrastive=contrastive).attribute(x, 2), p)


# Other ways of writing a net


@lossy
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_a_residual_sum(way, norm):
    x = images()
    net, plain = residual(way, norm=norm), residual(norm=norm)
    close(net(x), plain(x))
    for add in ("signed", "excitatory")[way == "stack" :]:  # a sum over a dimension shares as affine operations do
        # Below a sum of signed branches shares may cancel, and rounding grows with them.
        close(both(net, x, 1, add=add), both(plain, x, 1, add=add), rtol=1e-6, atol=1e-9)
        layers = (LayerExcitationBP(n, "stem", add=add) for n in (net, plain))
        close(*(layer.attribute(x, 1) for layer in layers), rtol=1e-6, atol=1e-9)


@lossy
def test_in_place_equals_out_of_place():
    x = images()
    assert torch.equal(both(cnn(inplace=True), x, 3), both(cnn(), x, 3))
    for layer in map(str, range(10)):
        given, wanted = (LayerExcitationBP(cnn(inplace=i), layer, contrastive=layer != "9") for i in (True, False))
        if layer != "9":
            close(given.attribute(x, 3), wanted.attribute(x, 3))


class TwoLinears(nn.Module):
    """A sum of a hidden layer, written out of place or with views that are overwritten."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.a(x)
        match self.way:
            case "relu":
                return self.head(torch.cat([h[:, :3].relu(), h[:, 3:].sigmoid()], 1))
            case "relu in place":
                h[:, :3].relu_()
                h[:, 3:] = h[:, 3:].sigmoid()
                return self.head(h)
            case "relu in place of a view":
                F.relu(h.view(-1, 2, 4)[:, 0, :3], inplace=True)
                torch.sigmoid_(h.narrow(1, 3, 5))
                return self.head(h)
            case "mask":
                return self.head(h.relu() * (torch.arange(8) % 2))
            case "mask in place":
                h = h.relu()
                h[:, ::2] = 0
                return self.head(h)
            case "mask filled":
                h = h.relu().masked_fill_(torch.arange(8) % 2 == 0, 0.0)
                return self.head(h)
            case "sum":
                h = h.relu()
                y = self.b(h).relu()
                return self.head(torch.cat([h[:, :4] + y[:, 4:], h[:, 4:]], 1))
            case "sum in place":
                h = h.relu()
                y = self.b(h.clone()).relu()
                h[:, :4] += y[:, 4:]
                return self.head(h)
            case "sum in place of a view":
                h = h.relu()
                y = self.b(h.clone()).relu()
                part = h[:, :4]
                part.add_(y[:, 4:])
                return self.head(h)
            case "overwritten":
                h = h.relu_()
                y = F.relu(self.b(h), inplace=True)
                h[:, :4] += y[:, 4:]  # autograd itself would refuse: b needs h as it was
                return self.head(h)
            case "scale":
                return self.head(h.relu() * 0.5 + 1)
            case "scale in place":
                h.relu_().mul_(0.5).add_(1)
                return self.head(h)
            case "buffer":
                h = h.relu()
                y = self.b(h).relu()
                out = torch.zeros_like(h)
                out[:, :4] = h[:, :4] + y[:, 4:]
                out[:, 4:] = h[:, 4:]
                return self.head(out)


@lossy
@pytest.mark.parametrize(
    ("way", "plain"),
    [
        ("relu in place", "relu"),
        ("relu in place of a view", "relu"),
        ("mask in place", "mask"),
        ("mask filled", "mask"),
        ("sum in place", "sum"),
        ("sum in place of a view", "sum"),
        ("overwritten", "sum"),
        ("scale in place", "scale"),
        ("buffer", "sum"),
    ],
)
@pytest.mark.parametrize("negative", ["excitatory", "clamp"])
def test_views_that_are_overwritten(way, plain, negative):
    net, plain, x = filled(TwoLinears(way)), filled(TwoLinears(plain)), randn(3, 6)
    with torch.no_grad():
        close(net(x), plain(x))
    close(both(net, x, 1, negative=negative), both(plain, x, 1, negative=negative))
    close(LayerExcitationBP(net, "a").attribute(x, 1), LayerExcitationBP(plain, "a").attribute(x, 1))


class Twice(nn.Module):
    def __init__(self, unrolled=False):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6) if unrolled else self.first
        self.relu, self.head = nn.ReLU(inplace=not unrolled), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.relu(self.second(self.relu(self.first(x)))))


@lossy
def test_modules_used_twice():
    net, x = filled(Twice()), randn(3, 6)
    copied = Twice(unrolled=True).double().eval()
    copied.load_state_dict({**net.state_dict()})
    close(both(net, x, 1), both(copied, x, 1))
    close(LayerExcitationBP(net, "first").attribute(x, 1), LayerExcitationBP(copied, "second").attribute(x, 1))


@lossy
@pytest.mark.parametrize("name", NETS)
def test_channels_last_and_other_strides(name):
    make, inputs = NETS[name]
    net, x = make(), inputs(3)
    wanted = both(net, x, 1)
    strided = torch.empty(*x.shape[:-1], 2 * x.shape[-1]).double()[..., ::2].copy_(x)
    close(both(net, strided, 1), wanted)
    close(both(net, x.transpose(0, -1).contiguous().transpose(0, -1), 1), wanted)
    if x.dim() == 4:
        last = copy.deepcopy(net).to(memory_format=torch.channels_last)
        given = ExcitationBP(last).attribute(x.contiguous(memory_format=torch.channels_last), 1)
        assert given.is_contiguous()
        close(given, wanted[1])
    expanded = x[:1].expand_as(x)
    close(both(net, expanded, 1), both(net, expanded.contiguous(), 1))


@lossy
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_layers(kind):
    plain, x = mlp(), randn(3, 6)
    net = copy.deepcopy(plain)
    getattr(parametrizations, kind)(net[2])
    net.eval()
    with torch.no_grad():
        plain[2].weight.copy_(net[2].weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    close(both(net, x, 1), both(plain, x, 1))
    with parametrize.cached():
        close(both(net, x, 1), both(plain, x, 1))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@lossy
def test_weights_that_a_hook_computes():
    plain, x = mlp(), randn(3, 6)
    net = copy.deepcopy(plain)
    torch.nn.utils.weight_norm(net[2])
    close(both(net, x, 1), both(plain, x, 1))


@dynamo
@lossy
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend):
    net, x = cnn(), images()
    compiled = torch.compile(net, backend=backend)
    close(compiled(x), net(x))
    close(both(compiled, x, 1), both(net, x, 1))
    close(LayerExcitationBP(compiled, "4").attribute(x, 1), LayerExcitationBP(net, "4").attribute(x, 1))
    close(LayerExcitationBP(compiled, net[4]).attribute(x, 1), LayerExcitationBP(net, "4").attribute(x, 1))
    close(NeuronMWP(compiled, "7").attribute(x, 1), NeuronMWP(net, "7").attribute(x, 1))
    close(both(lambda x: compiled(x), x, 1), both(net, x, 1))


@dynamo
@lossy
def test_compiled_parts_and_functions():
    net, x = mlp(), randn(3, 6)
    inner = nn.Sequential(net[0], torch.compile(net[1:], backend="eager"))
    close(inner(x), net(x))
    close(both(inner, x, 1), both(net, x, 1))
    function = torch.compile(lambda x: net(x), backend="eager")
    close(function(x), net(x))
    close(both(function, x, 1), both(net, x, 1))
    close(both(lambda x: function(x), x, 1), both(net, x, 1))
    in_place = copy.deepcopy(net)
    in_place.compile(backend="eager")
    close(in_place(x), net(x))
    close(both(in_place, x, 1), both(net, x, 1))
    close(LayerExcitationBP(in_place, "1").attribute(x, 1), LayerExcitationBP(net, "1").attribute(x, 1))


@lossy
def test_data_parallel_and_nested_modules():
    net, x = mlp(), randn(3, 6)
    nested = nn.Sequential(nn.ModuleDict({"a": net[:2]})["a"], nn.Sequential(nn.Sequential(*net[2:4]), net[4]))
    for model, layer in ((nn.DataParallel(net), "1"), (nested, "0.1"), (nn.DataParallel(nested), "0")):
        assert torch.equal(both(model, x, 1), both(net, x, 1))
        wanted = LayerExcitationBP(net, "1").attribute(x, 1)
        assert torch.equal(LayerExcitationBP(model, layer).attribute(x, 1), wanted)
        assert torch.equal(LayerExcitationBP(model, net[1]).attribute(x, 1), wanted)
    assert torch.equal(LayerExcitationBP(nested, "1.0").attribute(x, 1), LayerExcitationBP(net, "3").attribute(x, 1))


@lossy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETS)
def test_half_precision(name, dtype):
    make, inputs = NETS[name]
    net, x = make(dtype=dtype), inputs(4, dtype)
    reference = copy.deepcopy(net).float()
    for contrastive in (False, True):
        given = ExcitationBP(net, contrastive=contrastive).attribute(x, 1)
        wanted = ExcitationBP(reference, contrastive=contrastive).attribute(x.float(), 1)
        assert given.dtype == dtype
        assert given.isfinite().all()
        # A unit whose activation rounding turns from 0 to more moves a map by a few percent.
        assert (given.float() - wanted).abs().sum() < 0.1 * wanted.abs().sum()
    given = MWP(net).attribute_targets(x, [0, 1])
    wanted = MWP(reference).attribute_targets(x.float(), [0, 1])
    assert (given.float() - wanted).abs().sum() < 0.1 * wanted.abs().sum()


@lossy
@pytest.mark.parametrize("name", NETS)
def test_autocast(name):
    make, inputs = NETS[name]
    net, x = make(dtype=torch.float32), inputs(4, torch.float32)
    wanted = ExcitationBP(net).attribute(x, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = ExcitationBP(net).attribute(x, 1)
        stem = LayerExcitationBP(net, "stem" if name == "residual" else "0").attribute(x, 1)

    def inside(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x).float()

    # Probability is handed down in full precision in any case.
    close(ExcitationBP(inside).attribute(x, 1), given, rtol=1e-4, atol=1e-7)
    for P in (given, ExcitationBP(inside).attribute(x, 1)):
        assert P.dtype == torch.float32
        assert (P - wanted).abs().sum() < 0.1 * wanted.abs().sum()
    assert stem.isfinite().all()


@lossy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETS)
def test_half_precision_inside_of_single(name, dtype):
    """Probability is handed down many times larger, which float16 has no numbers for, wherever on the way it is."""
    make, inputs = NETS[name]
    net, x = make(dtype=torch.float32), inputs(4, torch.float32)
    wanted = ExcitationBP(net).attribute(x, 1)
    halved = copy.deepcopy(net).to(dtype)
    given = ExcitationBP(lambda x: halved(x.to(dtype)).float()).attribute(x, 1)
    assert given.isfinite().all() and (given - wanted).abs().sum() < 0.1 * wanted.abs().sum()


def test_single_precision_is_close_to_double():
    for make, inputs in NETS.values():
        net, x = make(dtype=torch.float32), inputs(3, torch.float32)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", LOSS)
            given, wanted = both(copy.deepcopy(net), x, 1), both(net.double(), x.double(), 1)
        assert given.dtype == torch.float32
        torch.testing.assert_close(given.double(), wanted, rtol=1e-3, atol=1e-5)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 7), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x, y, scale=1.0, mask=None, *, unused=None):
        h = self.a(x).relu() + scale * self.b(y).relu()
        return self.head(h if mask is None else h * mask)


@lossy
def test_tuples_of_inputs_and_additional_arguments():
    net, x, y = filled(TwoInputs()), randn(4, 3), randn(4, 5, seed=1)
    P = ExcitationBP(net).attribute((x, y), 1)
    assert isinstance(P, tuple)
    assert [p.shape for p in P] == [x.shape, y.shape]
    joined = MWP(lambda z: net(z[:, :3], z[:, 3:])).attribute(torch.cat([x, y], 1), 1)
    parts, delta = MWP(net).attribute((x, y), 1, return_convergence_delta=True)
    close(torch.cat(parts, 1), joined)
    close(delta, 1 - total_mass(parts))
    close(total_mass(parts), joined.sum(1))
    at_once = MWP(net).attribute_targets((x, y), [2, 0])
    assert [p.shape for p in at_once] == [(4, 2, 3), (4, 2, 5)]
    for i, t in enumerate((2, 0)):
        assert all(torch.equal(p[:, i], q) for p, q in zip(at_once, MWP(net).attribute((x, y), t), strict=True))
    (one,) = MWP(lambda x, y: net(x, y)).attribute((x,), 1, y)
    close(one, MWP(net).attribute(x, 1, additional_forward_args=(y,)))
    assert not torch.equal(one, parts[0]), "what is additional takes no share"
    mask = (torch.arange(7) % 2).double().expand(4, 7)
    for scale in (0.5, torch.tensor(0.5).double(), torch.full((4, 1), 0.5).double()):
        close(
            MWP(net).attribute((x, y), 1, (scale, mask))[1],
            MWP(lambda x, y: net.head(mask * (net.a(x).relu() + 0.5 * net.b(y).relu()))).attribute((x, y), 1)[1],
        )


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 7), nn.Linear(6, 5)

    def forward(self, x):
        return self.a(x).relu(), self.b(x).relu()


class TakesPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(12, 4)

    def forward(self, x):
        a, b = self.pair(x)
        return self.head(torch.cat([a, b], 1))


@lossy
def test_layers_that_return_tuples():
    net, x = filled(TakesPair()), randn(3, 6)
    P = LayerExcitationBP(net, "pair").attribute(x, 2)
    assert isinstance(P, tuple)
    assert [p.shape for p in P] == [(3, 7), (3, 5)]
    wanted = LayerExcitationBP(net, "head").attribute(x, 2, attribute_to_layer_input=True)
    close(torch.cat(P, 1), wanted)
    assert [p.shape for p in LayerExcitationBP(net, net.pair).attribute_targets(x, [0, 1])] == [(3, 2, 7), (3, 2, 5)]


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6, padding_idx=0)
        self.conv, self.head = nn.Conv1d(6, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, ids):
        x = self.embedding(ids).transpose(1, 2)
        return self.head(self.conv(x).relu().amax(2))


@lossy
def test_text_stops_at_the_embedding():
    net = filled(Text())
    ids = torch.randint(20, (3, 7))
    P = LayerExcitationBP(net, "embedding").attribute(ids, 1)
    assert P.shape == (3, 7, 6)

    def rest(e):
        return net.head(net.conv(e.transpose(1, 2)).relu().amax(2))

    close(P, ExcitationBP(rest).attribute(net.embedding(ids).detach(), 1))
    at_once = LayerExcitationBP(net, "embedding").attribute_targets(ids, [1, 3])
    assert torch.equal(at_once[:, 0], P)


@lossy
@pytest.mark.parametrize("name", NETS)
def test_grad_modes_make_no_difference(name):
    make, inputs = NETS[name]
    net, x = make(), inputs(2)
    layer = "stem" if name == "residual" else "1"

    def all_of(net, x):
        return (
            both(net, x, 1),
            LayerExcitationBP(net, layer).attribute(x, 1),
            ExcitationBP(net).attribute_targets(x, [0, 1]),
            NeuronMWP(net, layer).attribute(x, (2,) if x.dim() == 2 else (2, 3, 3)),
        )

    wanted = all_of(net, x)
    with torch.no_grad():
        given = [all_of(net, x)]
    with torch.inference_mode():
        given.append(all_of(net, x))
        made_inside = inputs(2)
        given.append(all_of(net, made_inside))
    given.append(all_of(net, made_inside))
    given.append(all_of(copy.deepcopy(net).requires_grad_(False), x))
    given.append(all_of(net, x.clone().requires_grad_()))
    for values in given:
        assert all(torch.equal(a, b) for a, b in zip(values, wanted, strict=True))


class NoGradPart(nn.Module):
    """Positions and a mask without gradients, and a backbone as well where it is frozen."""

    def __init__(self, frozen=False, plain=False):
        super().__init__()
        self.frozen, self.plain = frozen, plain
        self.backbone, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 4)

    def forward(self, x):
        with torch.set_grad_enabled(not self.frozen):
            h = self.backbone(x)
        with torch.set_grad_enabled(self.plain):
            mask = torch.linspace(0, 1, 8).double() + 0.1
        return self.head(h * mask)


@lossy
def test_parts_without_gradients():
    x = randn(3, 6)
    close(both(filled(NoGradPart()), x, 1), both(filled(NoGradPart(plain=True)), x, 1))
    frozen = filled(NoGradPart(frozen=True))
    close(both(frozen, x, 1), both(filled(NoGradPart()), x, 1))
    close(
        LayerExcitationBP(frozen, "backbone").attribute(x, 1),
        LayerExcitationBP(filled(NoGradPart()), "backbone").attribute(x, 1),
    )


MODELS = {
    **{f"residual {way}": partial(residual, way) for way in ["+", *WAYS]},
    "cnn": cnn,
    "cnn in place": partial(cnn, inplace=True),
    "cnn float32": partial(cnn, dtype=torch.float32),
    "cnn bfloat16": partial(cnn, dtype=torch.bfloat16),
    "residual float32": partial(residual, "bare", dtype=torch.float32),
    **{
        way: (lambda way=way: nn.Sequential(nn.Flatten(), nn.Linear(128, 6).double(), filled(TwoLinears(way))).eval())
        for way in ["relu in place", "relu in place of a view", "mask filled", "sum in place", "buffer"]
    },
    "used twice": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 6).double(), filled(Twice())).eval(),
    "attention": lambda: (
        nn.Sequential(
            nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 16, batch_first=True), nn.Flatten(), nn.Linear(128, 4)
        )
        .double()
        .eval()
    ),
}


@lossy
@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_the_same_bits(name):
    net = MODELS[name]()
    x = images(dtype=next(net.parameters()).dtype)
    wanted = net(x).detach()
    seen = []
    net.register_forward_hook(lambda _m, _args, y: seen.append(y.detach().clone()))
    kept = x.clone()
    ExcitationBP(net).attribute(x, 1)
    MWP(net).attribute(x, 1)
    ExcitationBP(net).attribute_targets(x, [0, 1])
    layers = list(net.named_modules())
    LayerMWP(net, layers[len(layers) // 2][0]).attribute(x, 1)
    assert len(seen) >= 4
    assert all(torch.equal(y, wanted) for y in seen)
    assert torch.equal(x, kept)
    assert torch.equal(net(x), wanted)


@lossy
def test_inputs_that_the_model_overwrites():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            x.relu_()
            x += 0
            return self.head(x)

    net, x = filled(Overwrites()), randn(3, 6)
    before = x.clone()
    close(both(net, x, 1), both(lambda x: net.head(x.relu()), x, 1))
    assert torch.equal(x, before)


def test_plain_functions():
    W, x = randn(6, 4).abs(), randn(3, 6).abs()
    P = MWP(lambda x: x @ W).attribute(x, 1)
    close(P, x * W[:, 1] / (x @ W)[:, 1:2])
    net = mlp()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", LOSS)
        assert torch.equal(both(net.forward, x, 1), both(net, x, 1))
        assert torch.equal(both(partial(net), x, 1), both(net, x, 1))
