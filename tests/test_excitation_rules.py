"""Excitation backprop against its equations written out as dense matrices in float64, one example at a time."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_xnn import ExcitationBP, LayerExcitationBP, NeuronExcitationBP
from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.excitation_bp._attribution import total_mass

# Single operations often lose probability, by the equations; one test below asks for the warning itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore:probabilities sum to",
    "ignore:Using padding='same'",
    "ignore:winning probabilities of opposite signs cancel",
)

NEGATIVES = ("excitatory", "clamp", "raw")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def matrix(linear, shape):
    """The dense matrix of a linear function of one example of that shape: its values on the basis vectors."""
    with torch.no_grad():
        basis = torch.eye(math.prod(shape)).unbind()
        return torch.stack([linear(e.reshape(1, *shape)).reshape(-1) for e in basis], 1)


def unbiased(module):
    module = copy.deepcopy(module)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    return module


def divided(p, Z):
    """p / Z, and 0 where Z is exactly 0."""
    some = Z != 0
    ratio = torch.zeros_like(Z)
    ratio[some] = p[some] / Z[some]
    return ratio


def share(W, a, p, negative="excitatory"):
    """P of the children a, given P of their parents W a: a_j w+_ij / sum_k a_k w+_ik."""
    W, a, p = W.detach(), a.detach().reshape(-1), p.reshape(-1)
    positive, opposite = W.clamp(min=0), (-W).clamp(min=0)
    if negative == "raw":
        return a * (positive.T @ divided(p, positive @ a))
    up, down = a.clamp(min=0), (-a).clamp(min=0)
    if negative == "clamp":
        return up * (positive.T @ divided(p, positive @ up))
    ratio = divided(p, positive @ up + opposite @ down)
    return up * (positive.T @ ratio) + down * (opposite.T @ ratio)


def contrast(W, a, p, negative="excitatory"):
    return share(W, a, p, negative) - share(-W, a, p, negative)


def add_shares(parts, p, add="signed"):
    """P of the summands, each flat and of full size."""
    parts = [part.detach().reshape(-1) for part in parts]
    if add == "excitatory":
        parts = [part.clamp(min=0) for part in parts]
    return [part * divided(p.reshape(-1), sum(parts)) for part in parts]


def value_shares(A, v, p):
    """P of values v (S, D), given P (L, D) of their averages A v: by those on the same side of 0 as the average."""
    P = torch.zeros_like(v)
    mean = A @ v
    for i, d in itertools.product(*map(range, mean.shape)):
        products = A[i] * v[:, d]
        side = products * (products.sign() == mean[i, d].sign())
        if side.sum() != 0:
            P[:, d] += p[i, d] * side / side.sum()
    return P


def winners(f, *inputs, contrastive=False, **settings):
    """P of all inputs, (N, outputs, inputs), for each flat output of f as the target."""

    def flat(*inputs):
        return f(*inputs).flatten(1)

    with torch.no_grad():
        N, K = flat(*inputs).shape
    many = tuple(x.repeat_interleave(K, 0) for x in inputs)
    ebp = ExcitationBP(flat, contrastive=contrastive, strict=True, **settings)
    found = ebp.attribute(many, target=torch.arange(K).repeat(N))
    assert all(P.shape == x.shape for P, x in zip(found, many, strict=True))
    found = tuple(P.reshape(N, K, -1) for P in found)
    return found[0] if len(found) == 1 else found


def all_targets(rule, *inputs, outputs):
    """What `winners` returns, with rule(example, p) -> P of the example, or a list of P of several."""
    table = []
    for n in range(len(inputs[0])):
        rows = [rule(*(x[n : n + 1] for x in inputs), p) for p in torch.eye(outputs)]
        table.append([[P.reshape(-1) for P in (row if isinstance(row, list) else [row])] for row in rows])
    found = tuple(torch.stack([torch.stack([row[i] for row in rows]) for rows in table]) for i in range(len(inputs)))
    return found[0] if len(found) == 1 else found


def agree(found, wanted):
    if isinstance(found, tuple):
        assert len(found) == len(wanted)
        for f, w in zip(found, wanted, strict=True):
            agree(f, w)
        return
    assert found.isfinite().all() and wanted.isfinite().all()
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-12, atol=1e-12)


AFFINE = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear on a sequence": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 6)),
    "conv1d same, even": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 6)),
    "conv1d same, even, dilated": (lambda: nn.Conv1d(2, 2, 2, padding="same", dilation=3), (2, 6)),
    "conv1d strided, dilated": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 4, 5)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 4, 5)),
    "conv2d strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 5)),
    "conv2d strided, rows left over": (lambda: nn.Conv2d(2, 2, 2, stride=3), (2, 7, 6)),
    "conv2d oblong": (lambda: nn.Conv2d(1, 2, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (1, 5, 5)),
    "conv2d valid": (lambda: nn.Conv2d(2, 2, 3, padding="valid"), (2, 4, 4)),
    "conv2d same": (lambda: nn.Conv2d(2, 2, 3, padding="same", dilation=2), (2, 4, 4)),
    "conv2d same, even": (lambda: nn.Conv2d(1, 2, (2, 4), padding="same"), (1, 4, 4)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 3, 3)),
    "conv2d dilated": (lambda: nn.Conv2d(2, 2, 2, dilation=2), (2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, padding=1, stride=2), (1, 3, 3, 4)),
    "conv3d grouped": (lambda: nn.Conv3d(2, 2, 2, groups=2, padding="same"), (2, 2, 2, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3), (2, 4)),
    "transposed 1d strided": (
        lambda: nn.ConvTranspose1d(2, 4, 3, stride=3, padding=1, output_padding=2, groups=2, dilation=2),
        (2, 3),
    ),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 2, 3)),
    "transposed 2d padded": (
        lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1, dilation=2, groups=2),
        (2, 3, 2),
    ),
    # Kernel 1 at stride 2: three quarters of the outputs see nothing but the bias.
    "transposed 2d with gaps": (lambda: nn.ConvTranspose2d(1, 1, 1, stride=2, output_padding=1), (1, 2, 2)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=2, padding=1, groups=2), (2, 2, 2, 2)),
}


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("name", AFFINE)
def test_affine(name, negative):
    make, shape = AFFINE[name]
    layer, x = make(), torch.randn(2, *shape)
    W = matrix(unbiased(layer), shape)
    wanted = all_targets(lambda x, p: share(W, x, p, negative), x, outputs=len(W))
    agree(winners(layer, x, negative=negative), wanted)


@pytest.mark.parametrize("name", AFFINE)
def test_settings_agree_where_inputs_are_not_negative(name):
    make, shape = AFFINE[name]
    layer, x = make(), torch.rand(1, *shape)
    W = matrix(unbiased(layer), shape)
    wanted = all_targets(lambda x, p: x.flatten() * (W.clamp(min=0).T @ divided(p, W.clamp(min=0) @ x.flatten())), x,
                         outputs=len(W))  # fmt: skip
    for negative in NEGATIVES:
        agree(winners(layer, x, negative=negative), wanted)


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_modes_are_a_copy_and_a_convolution(dims, mode, negative):
    """A pixel and its copy are two children: their weights do not add up before the sign is asked for."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(1, 2, 3, padding=1, padding_mode=mode, stride=2)
    shape = (1, 4, 3, 3)[: dims + 1]
    x = torch.randn(2, *shape)
    pad = matrix(lambda e: F.pad(e, (1, 1) * dims, mode=mode), shape)
    plain = kind(1, 2, 3, stride=2, bias=False)
    plain.weight.data.copy_(layer.weight)
    W = matrix(plain, (1, *(s + 2 for s in shape[1:])))
    wanted = all_targets(lambda x, p: pad.T @ share(W, pad @ x.flatten(), p, negative), x, outputs=len(W))
    agree(winners(layer, x, negative=negative), wanted)


CONSTANT = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CONSTANT_MAPS = {
    "x @ W": lambda x: x @ CONSTANT,
    "W @ x": lambda x: CONSTANT.T @ x.transpose(1, 2),
    "matmul": lambda x: torch.matmul(x, CONSTANT),
    "einsum": lambda x: torch.einsum("bic,cd->bid", x, CONSTANT),
    "einsum, constant first": lambda x: torch.einsum("cd,bic->bdi", CONSTANT, x),
    "einsum, listed": lambda x: torch.einsum("bic,cd->bid", [x, CONSTANT]),
    "bmm": lambda x: torch.bmm(x, CONSTANT.expand(len(x), 4, 3)),
    "bmm, constant first": lambda x: torch.bmm(CONSTANT.T.expand(len(x), 3, 4), x.transpose(1, 2)),
    "F.linear": lambda x: F.linear(x, CONSTANT.T),
    "F.linear by keyword": lambda x: F.linear(input=x, weight=CONSTANT.T, bias=None),
    "F.conv1d": lambda x: F.conv1d(input=x, weight=CONSTANT[:, :2, None].repeat(1, 1, 2), padding="same"),
    "torch.conv1d, one by one": lambda x: torch.stack([torch.conv1d(one, CONSTANT[:, :2, None]) for one in x]),
    "torch.conv1d": lambda x: torch.conv1d(x, CONSTANT[:, :2, None].repeat(1, 1, 2), None, 2),
}


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("name", CONSTANT_MAPS)
def test_products_with_a_constant(name, negative):
    f, x = CONSTANT_MAPS[name], torch.randn(2, 2, 4)
    W = matrix(f, (2, 4))
    agree(winners(f, x, negative=negative), all_targets(lambda x, p: share(W, x, p, negative), x, outputs=len(W)))


AVERAGES = {
    "avg1d": (nn.AvgPool1d(3, 2, padding=1, ceil_mode=True), (2, 6)),
    "avg1d, pad not counted": (nn.AvgPool1d(2, padding=1, count_include_pad=False), (2, 5)),
    "avg2d": (nn.AvgPool2d(2), (2, 4, 4)),
    "avg2d ceil": (nn.AvgPool2d(3, 2, ceil_mode=True), (2, 4, 6)),
    "avg2d ceil, padded": (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), (1, 4, 5)),
    "avg2d ceil, pad not counted": (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False), (1, 4, 5)),
    "avg2d overlapping": (nn.AvgPool2d((3, 2), 1, padding=(1, 0), divisor_override=5), (1, 4, 4)),
    "avg3d": (nn.AvgPool3d(2, padding=1, ceil_mode=True), (1, 3, 3, 4)),
    "avg3d, pad not counted": (nn.AvgPool3d(2, padding=1, count_include_pad=False), (1, 3, 3, 4)),
    "adaptive avg1d": (nn.AdaptiveAvgPool1d(3), (2, 5)),
    "adaptive avg2d": (nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 4)),
    "adaptive avg2d to larger": (nn.AdaptiveAvgPool2d(5), (1, 3, 2)),
    "adaptive avg2d, None": (nn.AdaptiveAvgPool2d((None, 1)), (2, 3, 4)),
    "adaptive avg3d": (nn.AdaptiveAvgPool3d(2), (1, 3, 3, 2)),
    "mean": (lambda x: x.mean((2, 3)), (2, 3, 3)),
    "mean, kept": (lambda x: torch.mean(x, dim=-1, keepdim=True), (2, 3, 3)),
    "mean over channels": (lambda x: x.mean(dim=1), (3, 2, 2)),
    "sum": (lambda x: x.sum((2, 3)), (2, 3, 3)),
    "sum, kept": (lambda x: torch.sum(x, 1, keepdim=True), (3, 2, 2)),
    "nearest": (nn.Upsample(scale_factor=2), (2, 2, 3)),
    "nearest, uneven": (lambda x: F.interpolate(x, size=(5, 2), mode="nearest"), (1, 3, 4)),
    "nearest-exact": (lambda x: F.interpolate(x, size=(5, 2), mode="nearest-exact"), (1, 3, 4)),
    "linear": (nn.Upsample(size=7, mode="linear"), (2, 4)),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 3, 3)),
    "bilinear, corners": (nn.Upsample(size=(5, 4), mode="bilinear", align_corners=True), (1, 3, 3)),
    "bilinear down": (lambda x: F.interpolate(x, scale_factor=0.6, mode="bilinear"), (1, 5, 5)),
    "bilinear, antialias": (lambda x: F.interpolate(x, size=(2, 3), mode="bilinear", antialias=True), (1, 5, 5)),
    "trilinear": (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 2, 2)),
    "area": (lambda x: F.interpolate(x, size=(2, 3), mode="area"), (1, 5, 4)),
}


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("name", AVERAGES)
def test_averages(name, negative):
    f, shape = AVERAGES[name]
    x = torch.randn(2, *shape)
    W = matrix(f, shape)
    assert (W >= 0).all()
    agree(winners(f, x, negative=negative), all_targets(lambda x, p: share(W, x, p, negative), x, outputs=len(W)))


def test_shares_of_an_average_cancel_padding_and_divisor():
    """The formula in words: a_j / sum of the window, whatever the average divides by."""
    x = torch.rand(1, 1, 4)
    _, b, c, _ = x.flatten()
    wanted = torch.tensor([[[1, 0, 0, 0], [0, b / (b + c), c / (b + c), 0], [0, 0, 0, 1]]])
    for counted in (True, False):
        agree(winners(nn.AvgPool1d(2, padding=1, count_include_pad=counted), x), wanted)


def windows(pool, shape, outputs):
    """For each place of the output, the places of the input that it looks at, in row-major order."""
    for place in itertools.product(*map(range, outputs)):
        axes = []
        for d, (o, size) in enumerate(zip(place, shape, strict=True)):
            if hasattr(pool, "output_size"):
                axes.append(range(o * size // outputs[d], -(-(o + 1) * size // outputs[d])))
                continue
            k, s, pad, step = (
                v if isinstance(v, int) else v[d] for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
            )
            start = o * s - pad
            axes.append([i for i in range(start, start + k * step, step) if 0 <= i < size])
        yield list(itertools.product(*axes))


def winner_matrix(pool, x):
    """1 where an input of the single example x is the first of the largest in its window."""
    outputs = pool(x).shape[2:]
    number = torch.arange(x[0].numel()).reshape(x.shape[1:])
    rows = []
    for c in range(x.shape[1]):
        for window in windows(pool, x.shape[2:], outputs):
            values = [x[0, c][place].item() for place in window]
            row = torch.zeros(x[0].numel())
            row[number[c][window[values.index(max(values))]]] = 1
            rows.append(row)
    return torch.stack(rows)


MAXIMA = {
    "max1d": (nn.MaxPool1d(3, 2, padding=1, ceil_mode=True), (2, 6)),
    "max1d dilated": (nn.MaxPool1d(2, 1, dilation=3), (2, 6)),
    "max2d": (nn.MaxPool2d(2), (2, 4, 5)),
    "max2d ceil": (nn.MaxPool2d(2, ceil_mode=True), (2, 5, 3)),
    "max2d padded": (nn.MaxPool2d(3, 2, padding=1), (2, 4, 5)),
    "max2d oblong": (nn.MaxPool2d((1, 3), (2, 1), padding=(0, 1), dilation=(1, 2), ceil_mode=True), (1, 5, 6)),
    "max3d": (nn.MaxPool3d(2, 2, padding=1, ceil_mode=True), (1, 3, 4, 3)),
    "adaptive max1d": (nn.AdaptiveMaxPool1d(3), (2, 5)),
    "adaptive max2d": (nn.AdaptiveMaxPool2d((2, 3)), (2, 5, 4)),
    "adaptive max3d": (nn.AdaptiveMaxPool3d(2), (1, 3, 3, 2)),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", MAXIMA)
def test_maxima(name, ties):
    pool, shape = MAXIMA[name]
    x = torch.randn(2, *shape)
    if ties:
        x = x.clamp(min=0)
    outputs = pool(x[:1]).numel()
    wanted = all_targets(lambda x, p: winner_matrix(pool, x).T @ p, x, outputs=outputs)
    agree(winners(pool, x), wanted)


def test_amax_has_one_winner():
    x = torch.randn(2, 3, 4)
    wanted = torch.stack([F.one_hot(row.argmax(1), 4).double().flatten() for row in x])
    for f in (lambda x: x.amax(2), lambda x: x.max(2).values, lambda x: torch.max(x, dim=2)[0]):
        P = winners(f, x)
        agree(P.sum(1), wanted)
        assert ((P == 0) | (P == 1)).all() and (P.sum(2) == 1).all()


ROUTES = {
    "flatten": lambda x: x.flatten(1),
    "reshape": lambda x: x.reshape(len(x), 6, 8),
    "view": lambda x: x.view(len(x), -1, 3, 2),
    "permute": lambda x: x.permute(0, 3, 1, 2),
    "transpose": lambda x: x.transpose(1, 3),
    "index": lambda x: x[:, 1, 1:, ::2],
    "index, repeated": lambda x: x[:, [2, 0, 2]],
    "index, last": lambda x: x[..., -1],
    "select": lambda x: x.select(2, 1),
    "narrow": lambda x: x.narrow(3, 1, 2),
    "gather": lambda x: x.index_select(3, torch.tensor([3, 3, 0])),
    "squeeze": lambda x: x[:, :, :1].squeeze(2).unsqueeze(1),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 2, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "chunk": lambda x: x.chunk(2, 2)[1],
    "split": lambda x: x.split([1, 3], 3)[1],
    "split and cat": lambda x: torch.cat(x.split(1, 1)[::-1], 1),
    "unbind": lambda x: torch.stack(x.unbind(1)[1:], 3),
    "cat": lambda x: torch.cat([x, x[:, :1]], 1),
    "concat with a constant": lambda x: torch.concat([torch.zeros_like(x[:, :1]), x], 1),
    "stack": lambda x: torch.stack([x, x], 1),
    "zero pad": lambda x: F.pad(x, (1, 0, 0, 2)),
    "crop by padding": lambda x: F.pad(x, (-1, 1, 0, 0)),
    "reflection pad": nn.ReflectionPad2d(1),
    "ZeroPad2d": nn.ZeroPad2d((0, 1, 2, 0)),
    "pixel shuffle": lambda x: F.pixel_shuffle(x[:, :1].repeat(1, 4, 1, 1), 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel shuffle": lambda x: x.view(len(x), 3, 2, 2, 4).transpose(1, 2).reshape(len(x), 6, 2, 4),
    "unfold": lambda x: F.unfold(x, 2),
    "dropout": nn.Dropout(0.5).eval(),
    "identity": nn.Identity(),
    "contiguous": lambda x: x.transpose(2, 3).contiguous().clone(),
}


@pytest.mark.parametrize("name", ROUTES)
def test_routes(name):
    f, x = ROUTES[name], torch.randn(2, 3, 4, 4)
    R = matrix(f, (3, 4, 4))
    assert ((R == 0) | (R == 1)).all() and (R.sum(1) <= 1).all()
    agree(winners(f, x), R.expand(2, *R.shape))


ACTIVATIONS = {
    "ReLU": nn.ReLU(),
    "ReLU6": nn.ReLU6(),
    "LeakyReLU": nn.LeakyReLU(0.2),
    "PReLU": nn.PReLU(init=0.3),
    "RReLU": nn.RReLU().eval(),
    "ELU": nn.ELU(),
    "SELU": nn.SELU(),
    "CELU": nn.CELU(0.7),
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU("tanh"),
    "SiLU": nn.SiLU(),
    "Mish": nn.Mish(),
    "Softplus": nn.Softplus(),
    "Softsign": nn.Softsign(),
    "sigmoid": nn.Sigmoid(),
    "LogSigmoid": nn.LogSigmoid(),
    "tanh": nn.Tanh(),
    "Hardswish": nn.Hardswish(),
    "Hardsigmoid": nn.Hardsigmoid(),
    "Hardtanh": nn.Hardtanh(),
    "Threshold": nn.Threshold(0.1, 0.0),
    "torch.relu": torch.relu,
    "F.relu": F.relu,
    "relu_": lambda x: x.clone().relu_(),
    "ReLU in place": lambda x: nn.ReLU(inplace=True)(x.clone()),
    "x.relu": lambda x: x.relu(),
    "x.sigmoid": lambda x: x.sigmoid(),
    "torch.tanh": torch.tanh,
    "clamp": lambda x: x.clamp(min=0),
    "clamp both": lambda x: torch.clamp(x, -0.5, 0.5),
    "clamp_": lambda x: x.clone().clamp_(0, 1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_pass(name):
    """Also where the activation is 0 or saturates, and where its slope is negative."""
    x = torch.cat([torch.linspace(-8, 8, 12), torch.tensor([0.0, -0.75])]).reshape(1, 2, 7)
    f = copy.deepcopy(ACTIVATIONS[name])
    f = f.double() if isinstance(f, nn.Module) else f
    agree(winners(f, x), torch.eye(14)[None])


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("name", ["LeakyReLU", "GELU", "tanh", "sigmoid", "Hardswish"])
def test_layer_above_an_activation_sees_its_values(name, negative):
    f = copy.deepcopy(ACTIVATIONS[name])
    first, second, x = nn.Linear(5, 6), nn.Linear(6, 3), torch.randn(2, 5)

    def rule(x, p):
        h = f(first(x))
        return share(first.weight, x, share(second.weight, h, p, negative), negative)

    agree(winners(nn.Sequential(first, f, second), x, negative=negative), all_targets(rule, x, outputs=3))


def signed_norm(norm, signs):
    """Random statistics, and scales of these signs."""
    n = norm.weight.numel()
    signs = torch.tensor(signs, dtype=torch.float64)[:n].reshape(norm.weight.shape)
    norm.weight.data = torch.empty_like(norm.weight).uniform_(0.5, 2) * signs
    nn.init.normal_(norm.bias)
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.eval()


SIGNS = (1, -1, 0, -1, 1, 1, -1)
FOLDED = {
    "linear": (lambda: nn.Linear(5, 6), nn.BatchNorm1d, 6, (5,)),
    # Channels are the sequence here, and each row of the matrix has the sign of its place in it.
    "linear on a sequence": (lambda: nn.Linear(4, 2), nn.BatchNorm1d, 3, (3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d, 4, (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.BatchNorm2d, 4, (2, 4, 4)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d, 4, (2, 4, 4)),
    "conv2d grouped": (lambda: nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d, 4, (2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 3, 2), nn.BatchNorm3d, 3, (1, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 2, stride=2), nn.BatchNorm2d, 4, (2, 2, 2)),
}


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("setting", ["sign", "pass"])
@pytest.mark.parametrize("name", FOLDED)
def test_batch_norm_after_an_affine_layer(name, setting, negative):
    make, kind, channels, shape = FOLDED[name]
    layer, norm, x = make(), signed_norm(kind(channels), SIGNS), torch.randn(2, *shape)
    W = matrix(unbiased(layer), shape)
    if setting == "sign":
        per_channel = len(W) // channels
        W = torch.tensor(SIGNS, dtype=torch.float64)[:channels].repeat_interleave(per_channel)[:, None] * W
    wanted = all_targets(lambda x, p: share(W, x, p, negative), x, outputs=len(W))
    agree(winners(nn.Sequential(layer, norm), x, batch_norm=setting, negative=negative), wanted)


def test_batch_norm_is_folding_it_into_the_layer():
    conv, norm = nn.Conv2d(2, 4, 3), signed_norm(nn.BatchNorm2d(4), SIGNS)
    x = torch.randn(2, 2, 4, 4)
    folded = nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm)
    torch.testing.assert_close(folded(x), norm(conv(x)))
    agree(winners(nn.Sequential(conv, norm), x), winners(folded, x))


@pytest.mark.parametrize("setting", ["sign", "pass"])
def test_batch_norm_elsewhere_passes(setting):
    x = torch.randn(2, 3, 2, 2)
    norm = signed_norm(nn.BatchNorm2d(3), SIGNS)
    agree(winners(norm, x, batch_norm=setting), torch.eye(12).expand(2, 12, 12))

    conv, norm = nn.Conv2d(3, 4, 2), signed_norm(nn.BatchNorm2d(4), SIGNS)
    W = matrix(unbiased(conv), (3, 2, 2))
    wanted = all_targets(lambda x, p: share(W, x, p), x, outputs=4)
    agree(winners(nn.Sequential(conv, nn.ReLU(), norm), x, batch_norm=setting), wanted)
    agree(winners(nn.Sequential(conv, nn.MaxPool2d(1), nn.ReLU(), norm), x, batch_norm=setting), wanted)


@pytest.mark.parametrize("setting", ["sign", "pass"])
def test_pre_activation(setting):
    """Batch norm, ReLU, convolution: the batch norm belongs to no affine layer, and its negative values are cut."""
    norm, conv = signed_norm(nn.BatchNorm2d(3), (1, -1, -1)), nn.Conv2d(3, 2, 2)
    x = torch.randn(2, 3, 3, 3)
    W = matrix(unbiased(conv), (3, 3, 3))
    wanted = all_targets(lambda x, p: share(W, norm(x).relu(), p), x, outputs=len(W))
    agree(winners(nn.Sequential(norm, nn.ReLU(), conv), x, batch_norm=setting), wanted)


@pytest.mark.parametrize("setting", ["sign", "pass"])
def test_each_batch_norm_turns_its_own_layer(setting):
    layers = [nn.Linear(5, 6), nn.Linear(6, 4)]
    norms = [signed_norm(nn.BatchNorm1d(6), (-1, 1, -1, 1, 1, -1)), signed_norm(nn.BatchNorm1d(4), (1, -1, -1, 1))]
    x = torch.randn(2, 5)
    W = [layer.weight * (norm.weight.sign()[:, None] if setting == "sign" else 1)
         for layer, norm in zip(layers, norms, strict=True)]  # fmt: skip

    def rule(x, p):
        return share(W[0], x, share(W[1], norms[0](layers[0](x)).relu(), p))

    model = nn.Sequential(layers[0], norms[0], nn.ReLU(), layers[1], norms[1])
    agree(winners(model, x, batch_norm=setting), all_targets(rule, x, outputs=4))


def in_place_add(a, b):
    h = a * 1
    h += b
    return h


def bare_in_place_add(a, b):
    h = a.clone()
    h.add_(b)
    return h


SUMS = {
    "a + b": (lambda a, b: a + b, 1, 1),
    "a += b": (in_place_add, 1, 1),
    "a.add_(b)": (bare_in_place_add, 1, 1),
    "torch.add": (torch.add, 1, 1),
    "torch.add, keywords": (lambda a, b: torch.add(input=a, other=b, alpha=0.5), 1, 0.5),
    "torch.add, alpha": (lambda a, b: torch.add(a, b, alpha=3), 1, 3),
    "torch.add, negative alpha": (lambda a, b: torch.add(a, b, alpha=-2), 1, -2),
    "a.add, alpha": (lambda a, b: a.add(b, alpha=0.25), 1, 0.25),
    "a - b": (lambda a, b: a - b, 1, -1),
    "torch.sub": (torch.sub, 1, -1),
    "torch.sub, alpha": (lambda a, b: torch.sub(a, b, alpha=2), 1, -2),
    "sum of a list": (lambda a, b: sum([a, b]), 1, 1),
}


@pytest.mark.parametrize("add", ["signed", "excitatory"])
@pytest.mark.parametrize("name", SUMS)
def test_sums(name, add):
    f, alpha, beta = SUMS[name]
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    # Two zeros, an exact cancellation, and one summand 0.
    a[:, 0, 0], b[:, 0, 0] = 0, 0
    a[:, 0, 1], b[:, 0, 1] = -beta, alpha
    a[:, 0, 2] = 0
    a[:, 0, 3], b[:, 0, 3] = -1, -abs(1 / beta) * math.copysign(1, beta)
    assert (f(a, b)[:, 0, :2] == 0).all()
    wanted = all_targets(lambda a, b, p: add_shares([alpha * a, beta * b], p, add), a, b, outputs=12)
    for negative in NEGATIVES:
        agree(winners(f, a, b, add=add, negative=negative), wanted)


@pytest.mark.parametrize("add", ["signed", "excitatory"])
def test_sums_of_three_and_of_one_twice(add):
    a, b, c = torch.rand(3, 2, 5)
    wanted = all_targets(lambda a, b, c, p: add_shares([a, b, c], p, add), a, b, c, outputs=5)
    agree(winners(lambda a, b, c: a + b + c, a, b, c, add=add), wanted)
    agree(winners(lambda a, b, c: a + (b + c), a, b, c, add=add), wanted)
    a[:, 2] = 0
    wanted = all_targets(lambda a, p: p * (a != 0), a, outputs=5)
    agree(winners(lambda a: a + a, a, add=add), wanted)


@pytest.mark.parametrize("add", ["signed", "excitatory"])
@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 2, 4), (3, 2, 1), (1, 1, 1), (2, 4)])
def test_sum_with_a_broadcast_signal(shape, add):
    """Only the batch is kept apart; what a broadcast summand wins everywhere adds up."""
    a, b = torch.randn(2, 3, 2, 4), torch.randn(2, *shape)
    wide = matrix(lambda e: e.reshape(1, *(1,) * (3 - len(shape)), *shape).expand(1, 3, 2, 4), shape)

    def f(a, b):
        return a + b.reshape(len(b), *(1,) * (3 - len(shape)), *shape)

    def rule(a, b, p):
        P_a, P_b = add_shares([a, wide @ b.flatten()], p, add)
        return [P_a, wide.T @ P_b]

    agree(winners(f, a, b, add=add), all_targets(rule, a, b, outputs=24))


@pytest.mark.parametrize("add", ["signed", "excitatory"])
def test_constants_take_no_share(add):
    x, c = torch.randn(2, 4), torch.tensor([1.0, -2.0, 0.0, 0.5])
    x[:, 1] = 2
    table = torch.nn.Parameter(c.clone())
    for f in (lambda x: x + c, lambda x: c + x, lambda x: x + 1, lambda x: 1 + x, lambda x: x - c, lambda x: x - 0.5,
              lambda x: x + table, lambda x: torch.add(c, x, alpha=2), lambda x: x * 3, lambda x: 3 * x,
              lambda x: x / 4, lambda x: x * c.abs(), lambda x: torch.mul(x, 0.5), lambda x: torch.div(x, 2),
              lambda x: (x - 0.4) / 0.2, lambda x: x.mul(2).add_(1)):  # fmt: skip
        agree(winners(f, x, add=add), torch.eye(4).expand(2, 4, 4))


def test_constant_scale_of_a_signal_that_is_not_affine_passes():
    x, c = torch.randn(2, 4), torch.tensor([1.0, -2.0, -3.0, 0.5])
    for f in (lambda x: x * c, lambda x: x * -1, lambda x: -x, lambda x: x / -2, lambda x: x.relu() * c):
        agree(winners(f, x), torch.eye(4).expand(2, 4, 4))


@pytest.mark.parametrize("negative", NEGATIVES)
def test_negative_scale_after_an_affine_layer_turns_its_rows(negative):
    layer, x, c = nn.Linear(5, 4), torch.randn(2, 5), torch.tensor([1.0, -2.0, -3.0, 0.5])
    scales = [(lambda y: y * c, c.sign()), (lambda y: c * y, c.sign()), (lambda y: y / c, c.sign()),
              (lambda y: y * -0.1, -torch.ones(4)), (lambda y: y / -3, -torch.ones(4)), (lambda y: -y, -torch.ones(4)),
              (lambda y: torch.mul(y, -2), -torch.ones(4)), (lambda y: y * 5, torch.ones(4)),
              (lambda y: 1 - y, -torch.ones(4)), (lambda y: torch.rsub(y, 2), -torch.ones(4)),
              (lambda y: y.mul_(c), c.sign()), (lambda y: y.neg_(), -torch.ones(4)),
              (lambda y: y.mul_(2).neg_(), -torch.ones(4)), (lambda y: y.neg_().div_(-2), torch.ones(4))]  # fmt: skip
    for f, signs in scales:
        W = signs[:, None] * layer.weight
        wanted = all_targets(lambda x, p, W=W: share(W, x, p, negative), x, outputs=4)
        agree(winners(lambda x, f=f: f(layer(x)), x, negative=negative), wanted)


CHAINS = {
    "-1 * 2": (lambda y: y * -1 * 2, -1),
    "2 * -1": (lambda y: y * 2 * -1, -1),
    "-1 * -1": (lambda y: y * -1 * -1, 1),
    "1/2 * -1": (lambda y: y / 2 * -1, -1),
    "batch norm, -1": (lambda y: -F.batch_norm(y, torch.zeros(4), torch.ones(4), torch.ones(4)), -1),
    "negative batch norm, -1": (lambda y: -F.batch_norm(y, torch.zeros(4), torch.ones(4), -torch.ones(4)), 1),
    "-1, batch norm": (lambda y: F.batch_norm(-y, torch.zeros(4), torch.ones(4), torch.ones(4)), -1),
    "-1, negative batch norm": (lambda y: F.batch_norm(-y, torch.zeros(4), torch.ones(4), -torch.ones(4)), 1),
}


@pytest.mark.parametrize("name", CHAINS)
def test_scales_after_an_affine_layer_commute(name):
    """Two scales are one, their product, in whatever order."""
    (f, sign), layer, x = CHAINS[name], nn.Linear(5, 4), torch.randn(2, 5)
    wanted = all_targets(lambda x, p: share(sign * layer.weight, x, p), x, outputs=4)
    agree(winners(lambda x: f(layer(x)), x), wanted)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_negative_scale_that_differs_between_the_places_of_an_output(kind):
    """Each row of the dense matrix has its own sign, also where a linear layer shares its weights among places."""
    layer = nn.Linear(4, 2) if kind == "linear" else nn.Conv1d(3, 2, 2)
    x = torch.randn(2, 3, 4)
    c = torch.tensor([[-1.0], [2.0], [-3.0]]) if kind == "linear" else torch.tensor([-1.0, 2.0, -3.0])
    W = matrix(unbiased(layer), (3, 4))
    W = c.expand(layer(x).shape[1:]).reshape(-1, 1).sign() * W
    wanted = all_targets(lambda x, p: share(W, x, p), x, outputs=len(W))
    agree(winners(lambda x: layer(x) * c, x), wanted)
    agree(winners(lambda x: -2 * (layer(x) * c).neg(), x), wanted)
    against = all_targets(lambda x, p: contrast(W, x, p), x, outputs=len(W))
    agree(winners(lambda x: layer(x) * c, x, contrastive=True), against)


def test_negative_scale_that_repeats_an_output():
    layer, x, c = nn.Linear(5, 1), torch.randn(2, 5), torch.tensor([1.0, -2.0, 0.0, -0.5])
    W = c.sign()[:, None] * layer.weight
    agree(winners(lambda x: layer(x) * c, x), all_targets(lambda x, p: share(W, x, p), x, outputs=4))


def test_both_signs_of_one_layer():
    """The same output, turned for one of its parents and not for the other (CReLU)."""
    layer, x = nn.Linear(5, 4), torch.randn(2, 5)
    W = torch.cat([layer.weight, -layer.weight])

    def f(x):
        h = layer(x)
        return torch.cat([h.relu(), (-h).relu()], 1)

    agree(winners(f, x), all_targets(lambda x, p: share(W, x, p), x, outputs=8))


def test_norms_pass():
    x, E = torch.randn(2, 4, 3, 3), torch.eye(36).expand(2, 36, 36)
    norms = [nn.LocalResponseNorm(3), nn.LocalResponseNorm(2, alpha=0.5, k=2.0), nn.LayerNorm(3),
             nn.LayerNorm((4, 3, 3)), nn.GroupNorm(2, 4), nn.GroupNorm(1, 4), nn.GroupNorm(4, 4), nn.InstanceNorm2d(4),
             nn.LayerNorm(3, elementwise_affine=False)]  # fmt: skip
    for norm in norms:
        if getattr(norm, "weight", None) is not None:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        for negative in NEGATIVES:
            agree(winners(norm, x, negative=negative), E)


@pytest.mark.parametrize("kind", ["layer", "group", "lrn"])
def test_net_with_a_norm(kind):
    norm = {"layer": nn.LayerNorm((4, 2, 2)), "group": nn.GroupNorm(2, 4), "lrn": nn.LocalResponseNorm(3)}[kind]
    conv, fc, x = nn.Conv2d(2, 4, 2), nn.Linear(16, 3), torch.randn(2, 2, 3, 3)
    W = matrix(unbiased(conv), (2, 3, 3))

    def rule(x, p):
        return share(W, x, share(fc.weight, norm(conv(x)).relu(), p))

    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), fc)
    agree(winners(model, x), all_targets(rule, x, outputs=3))


def test_gates_take_nothing():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for f in (lambda a, b: a * b.sigmoid(), lambda a, b: torch.sigmoid(b) * a, lambda a, b: torch.mul(a, F.sigmoid(b)),
              lambda a, b: a * nn.Sigmoid()(b), lambda a, b: F.glu(torch.cat([a, b], 1), 1),
              lambda a, b: nn.GLU(2)(torch.cat([a, b], 2)), lambda a, b: a * F.hardsigmoid(b)):  # fmt: skip
        wanted = all_targets(lambda a, b, p: [p, 0 * p], a, b, outputs=12)
        agree(winners(f, a, b), wanted)
    for f in (lambda x: x * x.sigmoid(), lambda x: torch.sigmoid(x) * x, lambda x: x * torch.sigmoid(1.702 * x)):
        agree(winners(f, a), torch.eye(12).expand(2, 12, 12))


def test_gate_that_is_broadcast():
    a, b = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 1, 1)
    agree(winners(lambda a, b: a * b.sigmoid(), a, b), (torch.eye(12).expand(2, 12, 12), torch.zeros(2, 12, 3)))
    agree(winners(lambda a, b: b.sigmoid() * a, a, b), (torch.eye(12).expand(2, 12, 12), torch.zeros(2, 12, 3)))


def test_squeeze_and_excitation():
    conv, down, up, fc = nn.Conv2d(2, 4, 2), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), nn.Linear(4, 3)
    x = torch.rand(2, 2, 3, 3)

    def f(x):
        h = conv(x).relu()
        gate = torch.sigmoid(up(down(F.adaptive_avg_pool2d(h, 1)).relu()))
        return fc((h * gate).mean((2, 3)))

    W, mean = matrix(unbiased(conv), (2, 3, 3)), matrix(lambda e: e.mean((2, 3)), (4, 2, 2))

    def rule(x, p):
        h = conv(x).relu()
        h = h * torch.sigmoid(up(down(h.mean((2, 3), keepdim=True)).relu()))
        return share(W, x, share(mean, h, share(fc.weight, h.mean((2, 3)), p)))

    agree(winners(f, x), all_targets(rule, x, outputs=3))


def test_products_of_two_signals_go_by_halves():
    a, b = torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    a[:, 0, 0] = 0
    wanted = all_targets(lambda a, b, p: [p / 2, p / 2], a, b, outputs=6)
    for f in (lambda a, b: a * b, torch.mul, lambda a, b: a.relu() * b, lambda a, b: a.clone().mul_(b)):
        agree(winners(f, a, b), wanted)
    agree(winners(lambda a: a * a, a), torch.eye(6).expand(2, 6, 6))


ATTENTION = {
    "@": lambda q, k, v: torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v,
    "matmul": lambda q, k, v: torch.matmul((q * 0.5 @ k.mT).softmax(dim=-1), v),
    "bmm": lambda q, k, v: torch.bmm(F.dropout(F.softmax(torch.bmm(q, k.mT) * 0.5, dim=2), 0.5, False), v),
    "einsum": lambda q, k, v: torch.einsum("bij,bjd->bid", (torch.einsum("bid,bjd->bij", q, k) / 2).softmax(-1), v),
    "values first": lambda q, k, v: (v.mT @ torch.softmax(k @ q.mT / 2, 1)).mT,
}


def values_of_both_signs(*shape):
    """Averages of the first are mostly positive, and of the last mostly negative."""
    return torch.randn(*shape) + torch.linspace(1, -1, shape[-1])


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_by_hand_gives_all_to_the_values(name):
    q, k, v = torch.randn(2, 3, 4), torch.randn(2, 5, 4), values_of_both_signs(2, 5, 2)

    def rule(q, k, v, p):
        A = torch.softmax(q[0] @ k[0].T / 2, -1)
        return [torch.zeros(12), torch.zeros(20), value_shares(A, v[0], p.reshape(3, 2))]

    wanted = all_targets(rule, q, k, v, outputs=6)
    agree(wanted[2].sum(2), torch.ones(2, 6))
    averages = ATTENTION[name](q, k, v)
    assert (averages > 0).any() and (averages < 0).any()
    agree(winners(ATTENTION[name], q, k, v), wanted)


def test_self_attention_by_hand():
    to_q, to_k, to_v, out = (nn.Linear(4, 4) for _ in range(4))
    x = torch.randn(2, 3, 4)
    causal = torch.ones(3, 3).tril() == 0

    def weights(x):
        return (to_q(x) @ to_k(x).transpose(-2, -1) / 2).masked_fill(causal, -math.inf).softmax(-1)

    out_W, v_W = matrix(unbiased(out), (3, 4)), matrix(unbiased(to_v), (3, 4))

    def rule(x, p):
        A, v = weights(x)[0].detach(), to_v(x)[0].detach()
        P = share(out_W, A @ v, p).reshape(3, 4)
        return share(v_W, x, value_shares(A, v, P))

    agree(winners(lambda x: out(weights(x) @ to_v(x)), x), all_targets(rule, x, outputs=12))


@pytest.mark.parametrize("kind", ["plain", "causal", "bool mask", "float mask", "scale", "shared values"])
def test_scaled_dot_product_attention(kind):
    q, k, v = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4), values_of_both_signs(2, 2, 3, 2)
    settings, bias, scale = {}, torch.zeros(3, 3), 0.5
    if kind == "causal":
        settings, bias = {"is_causal": True}, bias.masked_fill(torch.ones(3, 3).tril() == 0, -math.inf)
    if kind == "bool mask":
        mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1]]) == 1
        settings, bias = {"attn_mask": mask}, bias.masked_fill(~mask, -math.inf)
    if kind == "float mask":
        bias = torch.randn(3, 3)
        settings = {"attn_mask": bias}
    if kind == "scale":
        settings, scale = {"scale": 2.0}, 2.0

    def rule(q, k, v, p):
        p = p.reshape(2, 3, 2)
        heads = [value_shares(torch.softmax(q[0, h] @ k[0, h].T * scale + bias, -1), v[0, h], p[h]) for h in range(2)]
        return [torch.zeros(24), torch.zeros(24), torch.stack(heads)]

    if kind == "shared values":
        k, v = k[:, :1], v[:, :1]
        f = partial(F.scaled_dot_product_attention, enable_gqa=True)

        def shared(q, k, v, p):
            P = rule(q, k.expand_as(q), v.expand(-1, 2, -1, -1), p)
            return [P[0], torch.zeros(12), P[2].sum(0)]

        agree(winners(f, q, k, v), all_targets(shared, q, k, v, outputs=12))
        return
    found = winners(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **settings), q, k, v)
    agree(found, all_targets(rule, q, k, v, outputs=12))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_multihead_attention(masked, need_weights):
    mha, x = nn.MultiheadAttention(4, 2, batch_first=True).eval(), torch.randn(2, 3, 4)
    nn.init.normal_(mha.in_proj_bias)
    nn.init.normal_(mha.out_proj.bias)
    mask = torch.triu(torch.full((3, 3), -math.inf), 1) if masked else None

    def f(x):
        return mha(x, x, x, attn_mask=mask, need_weights=need_weights)[0]

    out_W = matrix(unbiased(mha.out_proj), (3, 4))
    v_W = matrix(lambda e: e @ mha.in_proj_weight[8:].T, (3, 4))

    def rule(x, p):
        q, k, v = (t.detach() for t in (x[0] @ mha.in_proj_weight.T + mha.in_proj_bias).chunk(3, 1))
        A = []
        for h in (slice(0, 2), slice(2, 4)):
            A.append(torch.softmax(q[:, h] @ k[:, h].T / math.sqrt(2) + (0 if mask is None else mask), -1))
        mean = torch.cat([A[0] @ v[:, :2], A[1] @ v[:, 2:]], 1)
        torch.testing.assert_close(mha.out_proj(mean), f(x)[0])
        P = share(out_W, mean, p).reshape(3, 4)
        P = torch.cat([value_shares(A[0], v[:, :2], P[:, :2]), value_shares(A[1], v[:, 2:], P[:, 2:])], 1)
        return share(v_W, x, P)

    agree(winners(f, x), all_targets(rule, x, outputs=12))


def test_cross_attention_module_gives_nothing_to_the_queries():
    mha = nn.MultiheadAttention(4, 1, batch_first=True).eval()
    for parameter in mha.parameters():
        parameter.data.abs_()
    x, y = torch.randn(2, 2, 4), torch.rand(2, 3, 4)
    P_x, P_y = winners(lambda x, y: mha(x, y, y)[0], x, y)
    assert (P_x == 0).all()
    agree(P_y.sum(2), torch.ones(2, 8))


def positive_net(*sizes):
    """Linear layers and ReLUs between them, mostly alive."""
    layers = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), nn.ReLU()]
        nn.init.uniform_(layers[-2].weight, -0.6, 1)
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("contrastive", [False, True])
def test_three_layers_and_a_stop_at_each(contrastive, negative):
    net, x = positive_net(6, 8, 7, 4), torch.randn(3, 6)
    top = contrast if contrastive else share

    def down_to(layer):
        def rule(x, p):
            h1 = net[0](x).relu()
            P = top(net[4].weight, net[2](h1).relu(), p, negative)
            if layer >= 2:
                return P
            P = share(net[2].weight, h1, P, negative)
            return P if layer >= 0 else share(net[0].weight, x, P, negative)

        return rule

    settings = {"contrastive": contrastive, "negative": negative}
    agree(winners(net, x, **settings), all_targets(down_to(-1), x, outputs=4))
    for layer in range(4):
        ebp = LayerExcitationBP(net, str(layer), strict=True, **settings)
        wanted = all_targets(down_to(layer), x, outputs=4)
        for k in range(4):
            agree(ebp.attribute(x, target=k), wanted[:, k])
        agree(ebp.attribute(x, target=torch.tensor([3, 0, 2])), wanted[range(3), [3, 0, 2]])
        agree(ebp.attribute_targets(x, [0, 1, 2, 3]), wanted)
    ebp = LayerExcitationBP(net, "4", strict=True, **settings)
    agree(ebp.attribute(x, 1, attribute_to_layer_input=True), all_targets(down_to(3), x, outputs=4)[:, 1])


def test_contrast_in_closed_form_at_the_classifier():
    net, x = positive_net(6, 8, 5), torch.randn(3, 6)
    # Classes of both signs, and no hidden unit dead: the formula as it stands has no zero denominators.
    net[0].bias.data += 5
    net[2].weight.data -= 0.2
    ebp = LayerExcitationBP(net, "1")
    for k in range(5):
        D = ebp.attribute(x, target=k)
        for n in range(3):
            a, w = net[:2](x)[n], net[2].weight[k]
            up, down = w.clamp(min=0), (-w).clamp(min=0)
            agree(D[n], a * (up / (up @ a) - down / (down @ a)))
        agree(total_mass(D), torch.zeros(3))


@pytest.mark.parametrize("sign", [1, -1])
def test_contrast_of_a_class_without_weights_of_one_sign(sign):
    net, x = positive_net(6, 8, 3), torch.rand(2, 6)
    net[2].weight.data[1] = sign * net[2].weight[1].abs()
    D = LayerExcitationBP(net, "1").attribute(x, target=1)
    agree(total_mass(D), sign * torch.ones(2))
    a = net[:2](x)
    agree(D, a * net[2].weight[1] / (a @ net[2].weight[1].abs())[:, None])
    net[2].weight.data[1] = 0
    assert (LayerExcitationBP(net, "1").attribute(x, target=1) == 0).all()


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("setting", ["sign", "pass"])
def test_contrast_with_batch_norm_after_the_last_layer(setting, negative):
    net, norm, x = positive_net(6, 8, 5), signed_norm(nn.BatchNorm1d(5), SIGNS), torch.randn(2, 6)
    W = net[2].weight
    if setting == "sign":
        W = W * norm.weight.sign()[:, None]

    def rule(x, p):
        return share(net[0].weight, x, contrast(W, net[0](x).relu(), p, negative), negative)

    model = nn.Sequential(*net, norm)
    found = winners(model, x, contrastive=True, batch_norm=setting, negative=negative)
    agree(found, all_targets(rule, x, outputs=5))


@pytest.mark.parametrize("name", ["sigmoid", "LeakyReLU", "Softplus"])
def test_contrast_below_an_activation(name):
    net, x = positive_net(6, 8, 3), torch.randn(2, 6)
    f = ACTIVATIONS[name]
    agree(winners(lambda x: f(net(x)), x, contrastive=True), winners(net, x, contrastive=True))


def test_contrast_below_a_pooling_head():
    """The pooling shares by the scores as they are; the convolution below it has W and -W."""
    stem, head, x = nn.Conv2d(1, 3, 2), nn.Conv2d(3, 4, 2), torch.randn(2, 1, 4, 4)
    W, mean = matrix(unbiased(head), (3, 3, 3)), matrix(lambda e: e.mean((2, 3)), (4, 2, 2))
    stem_W = matrix(unbiased(stem), (1, 4, 4))

    def rule(x, p):
        h = stem(x).relu()
        return share(stem_W, x, contrast(W, h, share(mean, head(h), p)))

    for pool in (nn.AdaptiveAvgPool2d(1), lambda h: h.mean((2, 3))):
        found = winners(lambda x, pool=pool: pool(head(stem(x).relu())), x, contrastive=True)
        agree(found, all_targets(rule, x, outputs=4))


def test_contrast_of_every_output_of_a_convolution_and_of_a_constant_product():
    x = torch.randn(2, 2, 3, 4)
    conv = nn.Conv2d(2, 2, 2)
    W = matrix(unbiased(conv), (2, 3, 4))
    agree(winners(conv, x, contrastive=True), all_targets(lambda x, p: contrast(W, x, p), x, outputs=len(W)))
    W = matrix(lambda e: e @ CONSTANT, (2, 3, 4))
    found = winners(lambda x: x @ CONSTANT, x, contrastive=True)
    agree(found, all_targets(lambda x, p: contrast(W, x, p), x, outputs=len(W)))


def test_contrast_cancels_on_the_way_beside_the_last_layer():
    """What a skip past the last affine layer wins is the same with W and with -W."""
    first, last, x = nn.Linear(5, 4), nn.Linear(4, 4), torch.randn(2, 5)

    def rule(x, p):
        h = first(x).relu()
        return share(first.weight, x, contrast(last.weight, h, add_shares([h, last(h)], p)[1]))

    def f(x):
        h = first(x).relu()
        return h + last(h)

    agree(winners(f, x, contrastive=True), all_targets(rule, x, outputs=4))


def test_contrast_of_two_last_layers_side_by_side_is_that_of_both():
    one, two, x = nn.Linear(5, 4), nn.Linear(5, 4), torch.randn(2, 5)

    def rule(x, p):
        P_one, P_two = add_shares([one(x), two(x)], p)
        return contrast(one.weight, x, P_one) + contrast(two.weight, x, P_two)

    agree(winners(lambda x: one(x) + two(x), x, contrastive=True), all_targets(rule, x, outputs=4))


class Block(nn.Module):
    def __init__(self, n, m, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n, m, 3, stride, 1, bias=False)
        self.bn1 = signed_norm(nn.BatchNorm2d(m), (1, -1, 1, -1))
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(m, m, 3, 1, 1, bias=False)
        self.bn2 = signed_norm(nn.BatchNorm2d(m), (-1, 1, 1, 1))
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(n, m, 1, stride, bias=False), signed_norm(nn.BatchNorm2d(m), (1, 1, -1, -1))
            )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.act(out)


class SmallResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, 1, 1)
        self.bn = signed_norm(nn.BatchNorm2d(2), (1, -1))
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.one = Block(2, 2, 1)
        self.two = Block(2, 4, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.conv(x))))
        return self.fc(torch.flatten(self.avgpool(self.two(self.one(x))), 1))


def turned(conv, norm, shape, batch_norm):
    W = matrix(unbiased(conv), shape)
    if batch_norm == "pass":
        return W
    signs = norm.weight.sign().detach()
    return W * signs.repeat_interleave(len(W) // len(signs))[:, None]


def block_winners(block, name, x, p, add, batch_norm):
    """P at every layer of the block, from P of its output; x is its input (1, C, H, W)."""
    shape = tuple(x.shape[1:])
    middle = block.bn1(block.conv1(x)).relu()
    branch = block.bn2(block.conv2(middle))
    skip = x if block.downsample is None else block.downsample(x)
    P_branch, P_skip = add_shares([branch, skip], p, add)
    P = {f"{name}.act": p, name: p, f"{name}.bn2": P_branch, f"{name}.conv2": P_branch}
    P_middle = share(turned(block.conv2, block.bn2, middle.shape[1:], batch_norm), middle, P_branch)
    P |= dict.fromkeys((f"{name}.relu", f"{name}.bn1", f"{name}.conv1"), P_middle)
    below = share(turned(block.conv1, block.bn1, shape, batch_norm), x, P_middle)
    if block.downsample is None:
        return P, below + P_skip
    P |= dict.fromkeys((f"{name}.downsample", f"{name}.downsample.0", f"{name}.downsample.1"), P_skip)
    return P, below + share(turned(*block.downsample, shape, batch_norm), x, P_skip)


def resnet_winners(net, x, target, contrastive, add, batch_norm):
    with torch.no_grad():
        first = net.bn(net.conv(x)).relu()
        pooled = net.pool(first)
        one = net.one(pooled)
        two = net.two(one)
        mean = matrix(lambda e: e.mean((2, 3)), two.shape[1:])
        P = {
            "avgpool": (contrast if contrastive else share)(
                net.fc.weight, mean @ two.flatten(), F.one_hot(target, 3) * 1.0
            )
        }
        P_two, p = block_winners(net.two, "two", one, share(mean, two, P["avgpool"]), add, batch_norm)
        P_one, p = block_winners(net.one, "one", pooled, p, add, batch_norm)
        P |= P_two | P_one | {"pool": p}
        P |= dict.fromkeys(("relu", "bn", "conv"), winner_matrix(net.pool, first).T @ p)
        P["input"] = share(turned(net.conv, net.bn, x.shape[1:], batch_norm), x, P["conv"])
    return P


@pytest.mark.parametrize("batch_norm", ["sign", "pass"])
@pytest.mark.parametrize("add", ["signed", "excitatory"])
@pytest.mark.parametrize("contrastive", [False, True])
def test_stop_at_each_layer_of_a_small_resnet(contrastive, add, batch_norm):
    net, x, target = SmallResNet().eval(), torch.randn(2, 1, 8, 8), torch.tensor([2, 0])
    logits = net(x)
    settings = {"contrastive": contrastive, "add": add, "batch_norm": batch_norm, "strict": True}
    wanted = [resnet_winners(net, x[n : n + 1], target[n], contrastive, add, batch_norm) for n in range(2)]
    agree(ExcitationBP(net, **settings).attribute(x, target).flatten(1), torch.stack([w.pop("input") for w in wanted]))
    names = {name for name, _ in net.named_modules()} - {"", "fc"}
    assert names == set(wanted[0])
    for name in sorted(names):
        P = LayerExcitationBP(net, name, **settings).attribute(x, target)
        agree(P.flatten(1), torch.stack([w[name] for w in wanted]))
    assert torch.equal(net(x), logits)
    if not contrastive:
        # The two ways through a block share what the block holds.
        both = wanted[0]["two.bn2"] + wanted[0]["two.downsample"]
        alive = both != 0
        agree(both[alive], wanted[0]["two"][alive])


def test_a_layer_used_twice_and_a_concatenation():
    shared, other, fc = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(7, 3)
    x = torch.randn(2, 4)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.other, self.fc = shared, other, fc

        def forward(self, x):
            h = self.shared(self.shared(x).relu()).relu()
            return self.fc(torch.cat([h, self.other(x).relu()], 1))

    def parts(x, p):
        h1 = shared(x).relu()
        P = contrast(fc.weight, torch.cat([shared(h1).relu(), other(x).relu()], 1), p)
        return h1, P[:4], P[4:]

    def rule(x, p):
        h1, P_h, P_o = parts(x, p)
        return share(shared.weight, x, share(shared.weight, h1, P_h)) + share(other.weight, x, P_o)

    agree(winners(Net(), x, contrastive=True), all_targets(rule, x, outputs=3))
    for layer, i in (("shared", 1), ("other", 2)):
        wanted = torch.stack([parts(x[n : n + 1], torch.eye(3)[1])[i] for n in range(2)])
        agree(LayerExcitationBP(Net(), layer).attribute(x, 1), wanted)


@pytest.mark.parametrize("contrastive", [False, True])
def test_neurons(contrastive):
    """A neuron wins as the target of the net that ends with it."""
    net, x = positive_net(6, 8, 7, 4), torch.randn(2, 6)
    top = contrast if contrastive else share
    for layer in ("2", "3"):
        ebp = NeuronExcitationBP(net, layer, contrastive=contrastive, strict=True)
        wanted = all_targets(
            lambda x, p: share(net[0].weight, x, top(net[2].weight, net[0](x).relu(), p)), x, outputs=7
        )
        for k in range(7):
            agree(ebp.attribute(x, k), wanted[:, k])
        agree(ebp.attribute(x, (5,)), wanted[:, 5])


@pytest.mark.parametrize("negative", NEGATIVES)
def test_nothing_active_loses_all_and_gives_no_nan(negative):
    conv, x = nn.Conv2d(2, 3, 3, padding=1), torch.zeros(2, 2, 4, 4)
    operations = (
        conv,
        nn.Conv2d(2, 2, 2, padding_mode="circular", padding=1),
        nn.ConvTranspose2d(2, 2, 2),
        nn.Linear(4, 3),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        lambda x: x.mean((2, 3)),
        lambda x: x.sum(1),
        lambda x: x + x,
        lambda x: x - 2 * x,
        lambda x: torch.softmax(x, -1) @ x,
        nn.Sequential(conv, signed_norm(nn.BatchNorm2d(3), SIGNS)),
    )
    for f in operations:
        for contrastive in (False, True)[: 1 + (f is conv)]:
            P = winners(f, x, contrastive=contrastive, negative=negative)
            assert (P == 0).all()


@pytest.mark.parametrize("negative", NEGATIVES)
def test_dead_units_lose_their_part_and_no_more(negative):
    """Unit 0 has no positive weight on an active child but a positive bias, unit 1 has; the class sees both."""
    net, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), torch.tensor([[1.0, 0.0, 2.0]])
    net[0].weight.data = torch.tensor([[-1.0, 4.0, -1.0], [1.0, 5.0, 1.0]])
    net[0].bias.data = torch.tensor([4.0, 0.0])
    net[2].weight.data = torch.tensor([[1.0, 1.0]])
    # h = (1, 3): P = (1/4, 3/4), of which 1/4 is lost.
    ebp = ExcitationBP(net, contrastive=False, negative=negative)
    with pytest.warns(UserWarning, match="probabilities sum to"):
        P, delta = ebp.attribute(x, 0, return_convergence_delta=True)
    agree(P, torch.tensor([[0.25, 0.0, 0.5]]))
    agree(delta, torch.tensor([0.25]))


def test_by_hand_two_layers():
    net, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.tensor([[1.0, 2.0]])
    net[0].weight.data = torch.tensor([[1.0, 1.0], [2.0, -1.0], [-1.0, 1.0]])
    net[2].weight.data = torch.tensor([[2.0, 5.0, 3.0], [1.0, -4.0, -1.0]])
    net[0].bias.data.zero_()
    # Hidden (3, 0, 1). Class 0: products 6, 0, 3. Unit 0 passes 1 : 2 on, unit 2 all to the second input.
    agree(LayerExcitationBP(net, "1", contrastive=False).attribute(x, 0), torch.tensor([[2 / 3, 0, 1 / 3]]))
    agree(ExcitationBP(net, contrastive=False).attribute(x, 0), torch.tensor([[2 / 9, 4 / 9 + 3 / 9]]))
    # Class 1: unit 0 speaks for it, unit 2 against it.
    agree(LayerExcitationBP(net, "1").attribute(x, 1), torch.tensor([[1.0, 0.0, -1.0]]))
    agree(ExcitationBP(net).attribute(x, 1), torch.tensor([[1 / 3, 2 / 3 - 1]]))
    agree(ExcitationBP(net).attribute(x, 0), torch.tensor([[2 / 9, 7 / 9]]))


def test_by_hand_residual():
    branch, head, x = nn.Linear(2, 2), nn.Linear(2, 1), torch.tensor([[2.0, 1.0]])
    branch.weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    branch.bias.data.zero_()
    head.weight.data = torch.tensor([[1.0, 1.0]])
    # Branch (3, 1), sum (5, 2) with P = (5, 2) / 7: the skip holds (2, 1) / 7 and the branch (3, 1) / 7.
    # The branch passes (2, 1) / 7 on from its unit 0, and (1, 0) / 7 from its unit 1.
    found = ExcitationBP(lambda x: head(x + branch(x)), contrastive=False).attribute(x, 0)
    agree(found, torch.tensor([[5 / 7, 2 / 7]]))


def test_by_hand_negative_inputs():
    layer, x = nn.Linear(4, 1), torch.tensor([[-1.0, 2.0, -3.0, 1.0]])
    layer.weight.data = torch.tensor([[1.0, 0.0, -2.0, 3.0]])
    # Products -1, 0, 6, 3.
    wanted = {"excitatory": [0, 0, 2 / 3, 1 / 3], "clamp": [0, 0, 0, 1], "raw": [-1 / 2, 0, 0, 3 / 2]}
    against = {"excitatory": [1, 0, 0, 0], "clamp": [0, 0, 0, 0], "raw": [0, 0, 1, 0]}
    for negative in NEGATIVES:
        P = torch.tensor([wanted[negative]], dtype=torch.float64)
        agree(ExcitationBP(layer, contrastive=False, negative=negative).attribute(x, 0), P)
        D = P - torch.tensor([against[negative]])
        agree(ExcitationBP(layer, negative=negative).attribute(x, 0), D)


@pytest.mark.parametrize("antialias", [False, True])
def test_bicubic_resizing_has_no_rule(antialias):
    resize = nn.Upsample(size=(3, 7), mode="bicubic")
    resize.forward = partial(F.interpolate, size=(3, 7), mode="bicubic", antialias=antialias)
    x = torch.rand(2, 1, 4, 5)
    with pytest.raises(UnsupportedOperationError, match=r"_?upsample_bicubic2d.* in 'Upsample'"):
        ExcitationBP(resize, contrastive=False, strict=True).attribute(x, (0, 0, 0))
    with pytest.warns(UserWarning, match=r"upsample_bicubic2d.* takes their gradient"):
        P = ExcitationBP(resize, contrastive=False).attribute(x, (0, 0, 0))
    leaf = x.requires_grad_()
    assert torch.equal(P, torch.autograd.grad(resize(leaf)[:, 0, 0, 0].sum(), leaf)[0])


def test_probability_is_kept_at_every_cut():
    """Section 9 of the equations: padding, stride, groups and pooling lose nothing where children are active."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
        nn.ConvTranspose2d(4, 4, 2, stride=2), nn.ReLU(), nn.AvgPool2d(3, 2, padding=1, ceil_mode=True),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    for layer in (net[0], net[3], net[7]):
        nn.init.uniform_(layer.weight, -0.2, 1)
    x = torch.rand(2, 2, 5, 5)
    for layer in range(6):
        for k in range(3):
            P = LayerExcitationBP(net, str(layer), contrastive=False, strict=True).attribute(x, k)
            agree(total_mass(P), torch.ones(2))
            D = LayerExcitationBP(net, str(layer), strict=True).attribute(x, k)
            agree(total_mass(D), torch.zeros(2))
