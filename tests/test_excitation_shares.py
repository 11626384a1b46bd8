"""Every rule against the same equation written a second time, with dense matrices in float64."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_xnn import ExcitationBP, LayerExcitationBP
from captum_xnn.excitation_bp import total_mass

# What single operations lose is part of what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:expected probabilities that sum to 1", "ignore:Using padding='same'")

NEGATIVES = ("excitatory", "clamp", "raw")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def matrix(linear, shape):
    """W of a linear function, column by column."""
    n = math.prod(shape)
    return torch.stack([linear(e.reshape(1, *shape)).flatten() for e in torch.eye(n)], 1)


def shared(W, a, p, negative="excitatory"):
    """P_j = sum_i p_i c_ij / sum_k c_ik with contributions c."""
    if negative == "excitatory":
        c = (a * W).clamp(min=0)
    else:
        c = (a.clamp(min=0) if negative == "clamp" else a) * W.clamp(min=0)
    Z = c.sum(1)
    return c.T @ torch.where(Z == 0, 0, p / torch.where(Z == 0, 1, Z))


def every_target(f, x, **settings):
    """MWP of all flat outputs of f, (outputs, inputs)."""

    def flat(x):
        return f(x).flatten(1)

    targets = list(range(flat(x).shape[1]))
    ebp = ExcitationBP(flat, contrastive=False, strict=True, **settings)
    return ebp.attribute_targets(x, targets)[0].flatten(1)


def expected(f, x, negative):
    """The same by dense algebra, for an affine f."""
    W = matrix(lambda e: f(e) - f(torch.zeros_like(e)), x.shape[1:])
    return torch.stack([shared(W, x.flatten(), p, negative) for p in torch.eye(len(W))])


def conv(kind, *args, **kwargs):
    module = kind(*args, **kwargs)
    nn.init.normal_(module.weight)
    return module.requires_grad_(False)


AFFINE = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear on rows": (lambda: nn.Linear(3, 2), (4, 3)),
    "conv1d": (lambda: conv(nn.Conv1d, 2, 4, 3, stride=2, padding=1), (2, 8)),
    "conv2d": (lambda: conv(nn.Conv2d, 2, 3, 3), (2, 5, 5)),
    "stride leaves cells unseen": (lambda: conv(nn.Conv2d, 2, 2, 2, stride=3), (2, 7, 6)),
    "dilation": (lambda: conv(nn.Conv2d, 2, 2, 3, dilation=2, padding=2), (2, 5, 5)),
    "groups": (lambda: conv(nn.Conv2d, 4, 6, 3, groups=2, padding=1), (4, 4, 4)),
    "depthwise": (lambda: conv(nn.Conv2d, 3, 3, 3, groups=3, stride=2), (3, 5, 5)),
    "same": (lambda: conv(nn.Conv2d, 1, 2, (2, 3), padding="same"), (1, 4, 5)),
    "same, dilated": (lambda: conv(nn.Conv1d, 1, 2, 4, padding="same", dilation=3), (1, 10)),
    "valid": (lambda: conv(nn.Conv2d, 1, 2, 2, padding="valid"), (1, 4, 4)),
    "conv3d": (lambda: conv(nn.Conv3d, 1, 2, 2, stride=(1, 2, 1)), (1, 3, 4, 3)),
    "transposed1d": (lambda: conv(nn.ConvTranspose1d, 2, 4, 3, stride=2, groups=2), (2, 4)),
    "transposed2d": (lambda: conv(nn.ConvTranspose2d, 2, 3, 3, stride=2, padding=1, output_padding=1), (2, 3, 3)),
    "transposed, dilated": (lambda: conv(nn.ConvTranspose2d, 2, 2, 2, dilation=2, padding=1), (2, 3, 3)),
    "transposed3d": (lambda: conv(nn.ConvTranspose3d, 1, 2, 2), (1, 2, 2, 3)),
    "matmul": (lambda: lambda x: x @ torch.linspace(-1, 1, 6).reshape(3, 2), (4, 3)),
    "matmul from the left": (lambda: lambda x: torch.linspace(-1, 1, 8).reshape(2, 4) @ x, (4, 3)),
    "bmm": (lambda: lambda x: torch.bmm(x, torch.linspace(-1, 1, 6).reshape(1, 3, 2)), (4, 3)),
    "addmm": (lambda: lambda x: torch.addmm(torch.ones(2), x, torch.linspace(-1, 1, 6).reshape(3, 2)), (3,)),
    "einsum": (lambda: lambda x: torch.einsum("ntd,de->nte", x, torch.linspace(-1, 1, 6).reshape(3, 2)), (4, 3)),
    "avg_pool1d": (lambda: nn.AvgPool1d(3, stride=2, padding=1), (2, 7)),
    "avg_pool2d": (lambda: nn.AvgPool2d(2), (2, 4, 4)),
    "avg_pool, ceil": (lambda: nn.AvgPool2d(2, ceil_mode=True), (1, 5, 3)),
    "avg_pool, padding not counted": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), (1, 5, 5)),
    "avg_pool3d": (lambda: nn.AvgPool3d(2), (1, 2, 4, 2)),
    "adaptive_avg_pool": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 4)),
    "mean": (lambda: lambda x: x.mean((2, 3)), (3, 2, 2)),
    "sum": (lambda: lambda x: torch.sum(x, dim=1, keepdim=True), (3, 4)),
    "nearest": (lambda: nn.Upsample(scale_factor=2), (1, 3, 2)),
    "bilinear": (lambda: partial(F.interpolate, size=(5, 4), mode="bilinear"), (1, 3, 2)),
    "trilinear": (lambda: partial(F.interpolate, scale_factor=2, mode="trilinear", align_corners=True), (1, 2, 2, 2)),
}
OWN_POSITIVE_WEIGHTS = ("avg", "adaptive", "mean", "sum", "nearest", "bilinear", "trilinear")


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("sign", ["positive", "signed"])
@pytest.mark.parametrize("name", AFFINE)
def test_affine_operations(name, sign, negative):
    make, shape = AFFINE[name]
    f, x = make(), torch.randn(1, *shape)
    x = x.abs() if sign == "positive" else x
    with torch.no_grad():
        want = expected(f, x, negative)
        got = every_target(f, x, negative=negative)
    # Raw shares are as large as their denominators are small.
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    if sign == "positive" and name.startswith(OWN_POSITIVE_WEIGHTS):
        assert torch.allclose(got.sum(1), torch.ones(len(got)), atol=1e-12)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_padded_cells_are_children_of_their_own(mode):
    layer, x = conv(nn.Conv2d, 1, 2, 3, padding=2, padding_mode=mode), torch.randn(1, 1, 4, 4)

    def pad(x):
        return F.pad(x, (2, 2, 2, 2), mode="constant" if mode == "zeros" else mode)

    want = expected(lambda e: F.conv2d(e, layer.weight), pad(x), "excitatory") @ matrix(pad, x.shape[1:])
    assert torch.allclose(every_target(layer, x), want, atol=1e-12)


SIGNED = torch.tensor([[-1.5, 0.5, -0.2, 2.0, 0.0, 1.0]], dtype=torch.float64)
ACTIVATIONS = (
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.mish,
    F.softplus,
    F.hardswish,
    F.hardtanh,
    torch.sigmoid,
    torch.tanh,
    torch.exp,
    torch.relu,
    lambda x: x.relu(),
    lambda x: x.clamp(min=0),
    lambda x: F.prelu(x, x.new_tensor([0.3])),
    lambda x: x**2,
    lambda x: x * 3,
    lambda x: 2 * x + 1,
    lambda x: x / torch.arange(1.0, 7.0),
    lambda x: (x - 0.5).clone(),
    lambda x: 1 - x,
    lambda x: -x,
    lambda x: F.dropout(x, training=False),
    lambda x: F.layer_norm(x, (6,), x.new_tensor([1, 2, -3, 0, 1, -1])),
    lambda x: F.group_norm(x, 2),
    lambda x: F.local_response_norm(x[..., None, None], 3),
    lambda x: F.instance_norm(x[:, None]),
    lambda x: F.normalize(x, dim=1),
    lambda x: x / x.norm(dim=1, keepdim=True),
    lambda x: torch.softmax(x, 1),
    lambda x: x * torch.sigmoid(x),
    lambda x: torch.sigmoid(x) * x,
    lambda x: x * x,
)


@pytest.mark.parametrize("f", ACTIVATIONS)
def test_operations_with_one_input_for_each_output_pass(f):
    assert torch.equal(every_target(f, SIGNED), torch.eye(6))


ROUTES = {
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(1)[:, None], 3, 2, 1),
    "max_pool2d": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "max_pool3d": lambda x: F.max_pool3d(x[:, None], 2),
    "max_pool, padded": lambda x: F.max_pool2d(x, 3, 2, 1, dilation=1),
    "max_pool with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, (2, 1)),
    "amax": lambda x: x.amax((2, 3)),
    "max over a dim": lambda x: x.max(2).values,
    "cat": lambda x: torch.cat([x[:, :1], x[:, 1:]], 1),
    "stack": lambda x: torch.stack([x[:, 1], x[:, 0]], 1),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "split": lambda x: x.split([1, 1], 1)[0],
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "reshape": lambda x: x.reshape(1, -1, 3),
    "unflatten": lambda x: x.flatten(1).unflatten(1, (2, 9)),
    "flip": lambda x: x.flip(2),
    "roll": lambda x: x.roll(1, 3),
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)),
    "gather": lambda x: x.flatten(1).gather(1, torch.tensor([[3, 0, 17]])),
    "pixel_shuffle": lambda x: F.pixel_shuffle(torch.cat([x, x], 1), 2),
    "unfold": lambda x: F.unfold(x, 2),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
    "where": lambda x: torch.where(torch.arange(3) > 0, x, x.flip(3)),
    "assignment": lambda x: assigned(x),
}


def assigned(x):
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1]
    return y


@pytest.mark.parametrize("name", ROUTES)
def test_routing(name):
    f, x = ROUTES[name], torch.rand(1, 2, 3, 3) + 0.1
    leaf = x.clone().requires_grad_()
    jacobian = torch.stack([torch.autograd.grad(y, leaf, retain_graph=True)[0].flatten() for y in f(leaf).flatten()])
    assert torch.equal(every_target(f, x), jacobian)


def norm(channels, kind=nn.BatchNorm2d):
    module = kind(channels).eval()
    nn.init.normal_(module.weight)
    nn.init.normal_(module.running_mean)
    nn.init.uniform_(module.running_var, 0.5, 2)
    module.weight.data[0] = -0.7
    return module


@pytest.mark.parametrize("setting", ["sign", "pass"])
def test_batch_norm_after_an_affine_layer(setting):
    layers = [
        (conv(nn.Conv2d, 2, 4, 3), norm(4), (2, 4, 4)),
        (conv(nn.ConvTranspose2d, 2, 4, 2, groups=2), norm(4), (2, 3, 3)),
        (nn.Linear(5, 4), norm(4, nn.BatchNorm1d), (5,)),
    ]
    for layer, bn, shape in layers:
        x = torch.randn(1, *shape)
        sign = bn.weight.sign() if setting == "sign" else torch.ones(4)

        def turned(e, layer=layer, sign=sign):
            y = layer(e)
            return y * sign.reshape(1, -1, *[1] * (y.dim() - 2))

        with torch.no_grad():
            want = expected(turned, x, "excitatory")
        assert torch.allclose(every_target(nn.Sequential(layer, bn), x, batch_norm=setting), want, atol=1e-12)


def test_batch_norm_elsewhere_passes():
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(every_target(norm(4), x), torch.eye(16))


def test_a_negative_factor_turns_the_layer_below():
    layer, x = nn.Linear(3, 2), torch.rand(1, 3)
    for f in (
        lambda x: -layer(x),
        lambda x: layer(x) * -2,
        lambda x: 1 - layer(x),
        lambda x: layer(x) / torch.tensor(-3),
    ):
        with torch.no_grad():
            want = expected(lambda x: -layer(x), x, "excitatory")
        assert torch.allclose(every_target(f, x), want, atol=1e-12)


@pytest.mark.parametrize("setting", ["signed", "excitatory"])
@pytest.mark.parametrize("factor", [1, -1, 2.5])
def test_sums(setting, factor):
    a, b = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([3.0, 0.5, -2.0, 0.0])

    def f(x):
        one, other = x.chunk(2, 1)
        return one - other if factor == -1 else torch.add(one, other, alpha=factor)

    parts = torch.stack([a, factor * b])
    if setting == "excitatory":
        parts = parts.clamp(min=0)
    total = parts.sum(0)
    share = torch.where(total == 0, 0, parts / torch.where(total == 0, 1, total))
    want = torch.cat([share[0].diag(), share[1].diag()], 1)
    got = every_target(f, torch.cat([a, b])[None], add=setting)
    assert torch.allclose(got, want, atol=1e-12)


def test_sums_of_broadcast_signals():
    x = torch.rand(1, 6)

    def f(x):
        return x[:, :4].reshape(1, 2, 2) + x[:, 4:].reshape(1, 2, 1)

    grid, column = x[0, :4].reshape(2, 2), x[0, 4:].reshape(2, 1)
    want = torch.zeros(4, 6)
    for i in range(4):
        row, total = i // 2, (grid + column).flatten()[i]
        want[i, i], want[i, 4 + row] = grid.flatten()[i] / total, column[row, 0] / total
    assert torch.allclose(every_target(f, x), want, atol=1e-12)


def test_constants_take_nothing():
    bias = nn.Parameter(torch.ones(3))
    for f in (lambda x: x + bias, lambda x: bias + x, lambda x: x.add_(bias), lambda x: torch.zeros(1, 3).add_(x)):
        assert torch.equal(every_target(f, torch.rand(1, 3)), torch.eye(3))


def test_gates_take_nothing():
    x = torch.rand(1, 4, 3, 3)
    excitation = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid())
    assert torch.equal(every_target(lambda x: x * excitation(x), x), torch.eye(36))
    assert torch.equal(every_target(lambda x: excitation(x) * x, x), torch.eye(36))
    got = every_target(F.glu, torch.randn(1, 6))
    assert torch.equal(got, torch.cat([torch.eye(3), torch.zeros(3, 3)], 1))


def test_a_product_of_two_alike_halves():
    got = every_target(lambda x: x[:, :2] * x[:, 2:], torch.randn(1, 4))
    assert torch.equal(got, torch.cat([torch.eye(2), torch.eye(2)], 1) / 2)


def attention_shares(A, v, p):
    """Values on the attended average's side of 0 share what it won."""
    y = A @ v
    P = torch.zeros_like(v)
    for i in range(y.shape[0]):
        for d in range(y.shape[1]):
            c = A[i] * (v[:, d].clamp(min=0) if y[i, d] > 0 else v[:, d].clamp(max=0))
            P[:, d] += p[i, d] * c / c.sum()
    return P


@pytest.mark.parametrize("form", ["by hand", "sdpa", "masked", "causal"])
def test_attention(form):
    q, k, x = torch.randn(3, 4), torch.randn(3, 4), torch.randn(1, 3, 2)
    mask = {"masked": torch.tensor([[True, False, True]] * 3), "causal": torch.ones(3, 3).tril().bool()}.get(form)
    scores = q @ k.T / 2
    A = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(1)

    def f(x):
        # Queries and keys depend on the input too, and take nothing all the same.
        query, key = q[None] + 0 * x.sum(), k[None] + 0 * x.sum()
        if form == "by hand":
            return torch.softmax(query @ key.transpose(1, 2) / 2, -1) @ x
        return F.scaled_dot_product_attention(
            query, key, x, attn_mask=mask if form == "masked" else None, is_causal=form == "causal"
        )

    want = torch.stack([attention_shares(A, x[0], p.reshape(3, 2)).flatten() for p in torch.eye(6)])
    assert torch.allclose(every_target(f, x), want, atol=1e-12)


def test_multi_head_attention_hands_down_by_values_and_projections():
    mha = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    x = torch.randn(1, 3, 4)
    _, A = mha(x, x, x, average_attn_weights=False)
    V = mha.in_proj_weight[8:]
    for need_weights in (True, False):
        got = every_target(lambda x, w=need_weights: mha(x, x, x, need_weights=w)[0], x)
        v = x[0] @ V.T + mha.in_proj_bias[8:]
        heads = torch.cat([A[0, h] @ v[:, 2 * h : 2 * h + 2] for h in range(2)], 1)
        out = mha.out_proj.weight
        for target in range(12):
            p = torch.zeros(3, 4)
            i, o = divmod(target, 4)
            p[i] = shared(out, heads[i], torch.eye(4)[o])
            pv = torch.cat(
                [attention_shares(A[0, h], v[:, 2 * h : 2 * h + 2], p[:, 2 * h : 2 * h + 2]) for h in (0, 1)], 1
            )
            want = torch.stack([shared(V, x[0, j], pv[j]) for j in range(3)])
            assert torch.allclose(got[target].reshape(3, 4), want.detach(), atol=1e-12)


def test_dead_denominators_lose_mass_without_nan():
    layer = nn.Linear(2, 2, bias=True)
    layer.weight.data = torch.tensor([[-1.0, -2.0], [1.0, 0.0]])
    layer.bias.data = torch.tensor([5.0, 0.0])
    got = every_target(layer, torch.tensor([[1.0, 1.0]]))
    assert torch.equal(got, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert torch.equal(every_target(nn.AvgPool1d(2), torch.zeros(1, 1, 4)), torch.zeros(2, 4))
    with pytest.warns(UserWarning, match=r"got 0\.000 of it"):
        delta = ExcitationBP(layer, contrastive=False).attribute(torch.ones(1, 2), 0, return_convergence_delta=True)[1]
    assert delta.tolist() == [1.0]


def mlp():
    """A net of which every unit is active, and loses nothing."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    net[0].weight.data.abs_()
    net[2].weight.data += 0.2
    net[2].bias.data += 1
    net[4].weight.data[:, 0].abs_()
    net[4].weight.data[:, 1].abs_().neg_()
    return net


def test_contrast():
    net, x = mlp(), torch.rand(1, 4)
    h1 = net[1](net[0](x))
    h2 = net[3](net[2](h1))
    for k in range(3):
        w, a = net[4].weight[k], h2[0]
        plus, minus = w.clamp(min=0), (-w).clamp(min=0)
        assert plus @ a > 0 and minus @ a > 0
        D = a * (plus / (plus @ a) - minus / (minus @ a))
        want = shared(net[0].weight, x[0], shared(net[2].weight, h1[0], D))
        got = ExcitationBP(net).attribute(x, k)
        assert torch.allclose(got[0], want.detach(), atol=1e-12)
        assert torch.allclose(
            LayerExcitationBP(net, "1").attribute(x, k)[0], shared(net[2].weight, h1[0], D), atol=1e-12
        )


def test_contrast_with_a_batch_norm_after_the_last_layer():
    net, x = nn.Sequential(*mlp(), norm(3, nn.BatchNorm1d)).eval(), torch.rand(1, 4)
    folded = nn.Sequential(*list(net)[:-1][:4], nn.Linear(5, 3))
    folded[4].weight.data = net[4].weight * (net[5].weight / (net[5].running_var + net[5].eps).sqrt())[:, None]
    for k in range(3):
        assert torch.allclose(ExcitationBP(net).attribute(x, k), ExcitationBP(folded).attribute(x, k), atol=1e-12)


def test_contrast_of_one_sided_weights_has_no_opposite():
    net, x = mlp(), torch.rand(1, 4)
    net[4].weight.data[0].abs_()
    net[4].weight.data[1].abs_().neg_()
    mass = total_mass(ExcitationBP(net).attribute(x.expand(2, -1), [0, 1]))
    assert torch.allclose(mass, torch.tensor([1.0, -1.0]), atol=1e-12)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        for layer in (self.first, self.a, self.b):
            nn.init.uniform_(layer.weight, 0, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(self.b(self.a(x).relu()) + x)


def test_a_layer_in_a_branch_gets_its_share():
    net, x = Residual(), torch.rand(1, 3)
    with torch.no_grad():
        h = net.first(x).relu()
        inner = net.a(h).relu()
        branch = net.b(inner)
        total = branch + h
        P = shared(net.head.weight, total[0], torch.tensor([1.0, 0.0]))
        in_branch = P * (branch / total)[0]
        in_inner = shared(net.b.weight, inner[0], in_branch)
        whole = P * (h / total)[0] + shared(net.a.weight, h[0], in_inner)
    for layer, want in (("b", in_branch), ("a", in_inner), ("first", whole)):
        got = LayerExcitationBP(net, layer, contrastive=False).attribute(x, 0)
        assert torch.allclose(got[0], want, atol=1e-12)


def test_worked_by_hand():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    net[2].weight.data = torch.tensor([[1.0, 1.0], [1.0, -2.0]])
    x = torch.tensor([[1.0, 1.0]])
    # Hidden: 4 and 1. Output 0: shares 4/5 and 1/5. Hidden 0: 1/4 and 3/4; hidden 1: all to input 0.
    P = ExcitationBP(net, contrastive=False).attribute(x, 0)
    assert torch.allclose(P, torch.tensor([[0.8 / 4 + 0.2, 0.8 * 3 / 4]]))
    # Output 1: hidden 0 wins, its opposite: hidden 1. D = (1, -1).
    D = ExcitationBP(net).attribute(x, 1)
    assert torch.allclose(D, torch.tensor([[1 / 4 - 1, 3 / 4]]))
