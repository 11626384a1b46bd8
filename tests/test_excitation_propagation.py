"""Invariances of excitation backprop, the code it must see through, and what it must refuse."""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from captum_xnn import ExcitationBP, LayerExcitationBP, NeuronExcitationBP
from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.excitation_bp import total_mass

# Small random nets lose mass at neurons that only their bias excites.
pytestmark = pytest.mark.filterwarnings("ignore:expected probabilities that sum to 1")
seeds = st.integers(0, 10_000)
few = settings(max_examples=15, deadline=None, derandomize=True)


def cnn(seed=0, dtype=torch.float64, inplace=False):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(inplace),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.ReLU(inplace),
        nn.Linear(5, 3),
    )
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].running_mean)
    nn.init.uniform_(net[1].running_var, 0.5, 2)
    return net.eval().to(dtype)


def images(n=2, seed=0, dtype=torch.float64):
    return torch.randn(n, 2, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def both(net, x, target, **kwargs):
    """MWP and c-MWP."""
    return torch.stack([ExcitationBP(net, contrastive=c, **kwargs).attribute(x, target) for c in (False, True)])


# Invariances


@few
@given(seeds, st.floats(0.01, 100), st.sampled_from([(0, 4), (4, 8), (8, 10)]))
def test_scaling_a_row_and_unscaling_the_next_column_changes_nothing(seed, factor, layers):
    net, x = cnn(seed), images(seed=seed)
    net[1] = nn.Identity()
    before = both(net, x, 1)
    upper, lower = net[layers[0]], net[layers[1]]
    with torch.no_grad():
        upper.weight[2] *= factor
        upper.bias[2] *= factor
        lower.weight[:, 2] /= factor
    assert torch.allclose(both(net, x, 1), before, atol=1e-10)


@few
@given(seeds)
def test_folding_batch_norm_changes_nothing(seed):
    net, x = cnn(seed), images(seed=seed)
    before = both(net, x, 0)
    folded = nn.utils.fuse_conv_bn_eval(net[0], net[1])
    assert torch.allclose(both(nn.Sequential(folded, *list(net)[2:]), x, 0), before, atol=1e-10)


@few
@given(seeds)
def test_functional_twin(seed):
    net, x = cnn(seed), images(seed=seed)

    def twin(x):
        x = F.conv2d(input=x, weight=net[0].weight, bias=net[0].bias, padding="same")
        x = F.batch_norm(x, net[1].running_mean, net[1].running_var, weight=net[1].weight, bias=net[1].bias)
        x = torch.max_pool2d(x.relu_(), 2)
        x = torch.conv2d(x, net[4].weight, net[4].bias).clamp(min=0)
        x = x.mean((2, 3)) if x.shape[2] == 2 else F.avg_pool2d(x, 2).view(len(x), -1)
        x = torch.relu(x @ net[8].weight.T + net[8].bias)
        return torch.addmm(net[10].bias, x, net[10].weight.T)

    assert torch.allclose(twin(x.clone()), net(x))
    assert torch.allclose(both(twin, x, 2), both(net, x, 2), atol=1e-12)


@few
@given(seeds, st.integers(1, 4))
def test_batch_equals_singles(seed, n):
    net, x = cnn(seed), images(n, seed)
    targets = torch.arange(n) % 3
    whole = both(net, x, targets)
    for i in range(n):
        assert torch.allclose(whole[:, i : i + 1], both(net, x[i : i + 1], int(targets[i])), atol=1e-12)


@few
@given(
    seeds, st.sampled_from([torch.float32, torch.float64]), st.integers(1, 3), st.lists(st.integers(0, 2), min_size=1)
)
def test_many_targets_equal_single_ones_bitwise(seed, dtype, n, targets):
    net, x = cnn(seed, dtype), images(n, seed, dtype)
    for contrastive in (False, True):
        pixels, layer = ExcitationBP(net, contrastive=contrastive), LayerExcitationBP(net, "3", contrastive=contrastive)
        for ebp in (pixels, layer):
            together = ebp.attribute_targets(x, targets)
            for k, target in enumerate(targets):
                assert torch.equal(together[:, k], ebp.attribute(x, target))


@few
@given(seeds, st.sampled_from(["signed", "excitatory"]))
def test_order_of_branches_does_not_matter(seed, add):
    torch.manual_seed(seed)
    a, b, head = (nn.Linear(4, 4).double() for _ in range(3))
    x = torch.randn(2, 4, dtype=torch.float64)
    one = both(lambda x: head(a(x).relu() + b(x).relu()), x, 0, add=add)
    assert torch.allclose(both(lambda x: head(b(x).relu() + a(x).relu()), x, 0, add=add), one, atol=1e-12)


@few
@given(seeds)
def test_mass_is_one_at_every_cut_and_probabilities_are_not_negative(seed):
    net, x = cnn(seed), images(seed=seed).abs()
    for layer in (net[0], net[4], net[8]):
        # Every unit that is on has an active child.
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(net[1].running_mean)
    nn.init.zeros_(net[1].bias)
    nn.init.uniform_(net[10].weight, 0.1, 1)
    net[8].weight.data.abs_()
    for layer in "023456789":
        P, delta = LayerExcitationBP(net, layer, contrastive=False).attribute(x, 1, return_convergence_delta=True)
        assert bool((P >= 0).all())
        assert torch.allclose(total_mass(P), torch.ones(2, dtype=torch.float64))
        assert torch.allclose(delta, torch.zeros(2, dtype=torch.float64), atol=1e-12)


# Code that it must see through


class Block(nn.Module):
    """A residual block with everything in place and one ReLU for all."""

    def __init__(self, way):
        super().__init__()
        self.first, self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.head, self.way = nn.ReLU(inplace=True), nn.Linear(4, 3), way
        nn.init.normal_(self.bn.weight)
        nn.init.uniform_(self.bn.running_var, 0.5, 2)

    def forward(self, x):
        x = self.relu(self.first(x))
        out = self.bn(self.conv(x))
        if self.way == "+":
            out = out + x
        elif self.way == "+=":
            out += x
        elif self.way == "statement":
            out.add_(x)
        elif self.way == "sum":
            out = sum([out, x])
        elif self.way == "stack":
            out = torch.stack([out, x]).sum(0)
        else:
            out = torch.add(input=x, other=out)
        return self.head(self.relu(out).mean((2, 3)))


def block(way, seed=0):
    torch.manual_seed(seed)
    return Block(way).double().eval()


@pytest.mark.parametrize("way", ["+=", "statement", "sum", "keywords"])
def test_ways_to_write_a_residual_sum(way):
    x = images()
    assert torch.allclose(both(block(way), x, 1), both(block("+"), x, 1), atol=1e-12)


@pytest.mark.parametrize(
    "make", [cnn, partial(cnn, inplace=True), *(partial(block, w) for w in ("+", "+=", "statement"))]
)
def test_the_model_computes_the_same_bits(make):
    net, x, seen = make(), images(), []
    want = net(x)
    handle = net.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
    ExcitationBP(net).attribute(x, 0)
    LayerExcitationBP(net, next(iter(net._modules))).attribute(x, 0)
    handle.remove()
    assert len(seen) == 2 and all(torch.equal(out, want) for out in seen)


def test_in_place_equals_out_of_place():
    assert torch.equal(both(cnn(inplace=True), images(), 0), both(cnn(), images(), 0))


class Overwriting(nn.Module):
    """What no training would allow: an input of a layer is overwritten after use."""

    def __init__(self, overwrite):
        super().__init__()
        self.a, self.b, self.overwrite = nn.Linear(4, 4), nn.Linear(4, 3), overwrite

    def forward(self, x):
        h = self.a(x).relu()
        y = self.b(h)
        if self.overwrite:
            h.zero_()
        return y


def test_overwritten_activations():
    x = torch.rand(2, 4)
    nets = []
    for overwrite in (False, True):
        torch.manual_seed(0)
        nets.append(Overwriting(overwrite))
    assert torch.equal(both(nets[1], x, 0), both(nets[0], x, 0))


def test_modules_used_twice():
    torch.manual_seed(0)
    layer, head, relu = nn.Linear(4, 4), nn.Linear(4, 2), nn.ReLU(inplace=True)
    twice = nn.Sequential(layer, relu, layer, relu, head).double()
    copies = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), head).double()
    copies[2].load_state_dict(layer.state_dict())
    x = torch.rand(3, 4, dtype=torch.float64)
    assert torch.equal(both(twice, x, 1), both(copies, x, 1))
    # The last call is the one to stop at.
    assert torch.equal(
        LayerExcitationBP(twice, layer).attribute(x, 1), LayerExcitationBP(copies, copies[2]).attribute(x, 1)
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend):
    net, x = cnn(), images()
    assert torch.equal(both(torch.compile(net, backend=backend), x, 0), both(net, x, 0))
    parts = nn.Sequential(torch.compile(net[:4], backend=backend), net[4:])
    assert torch.equal(both(parts, x, 0), both(net, x, 0))


def test_wrappers_layouts_and_parametrizations():
    net, x = cnn(), images()
    want = both(net, x, 0)
    assert torch.equal(both(nn.DataParallel(net), x, 0), want)
    spread = both(net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), 0)
    assert torch.allclose(spread, want, atol=1e-12) and spread[0].is_contiguous()
    net[8] = parametrizations.weight_norm(net[8])
    assert torch.allclose(both(net, x, 0), want, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    net, x = cnn(dtype=torch.float32), images(dtype=torch.float32)
    want = both(net, x, 0)
    got = both(cnn(dtype=dtype), x.to(dtype), 0)
    assert got.dtype == dtype
    assert float((got.float() - want).abs().sum() / want.abs().sum()) < 0.15
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = both(net, x, 0)
    assert cast.dtype == torch.float32
    assert float((cast - want).abs().sum() / want.abs().sum()) < 0.15


def test_grad_modes_make_no_difference():
    net, x = cnn(), images()
    want = both(net, x, 0)
    with torch.no_grad():
        assert torch.equal(both(net, x, 0), want)
    with torch.inference_mode():
        assert torch.equal(both(net, x, 0), want)

    def half_frozen(x):
        with torch.no_grad():
            x = net[:4](x)
        return net[4:](x)

    assert torch.equal(both(half_frozen, x, 0), want)


def test_text_stops_at_the_embedding():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    ids = torch.tensor([[1, 2, 3], [4, 4, 0]])
    P = LayerExcitationBP(net, "0", contrastive=False).attribute(ids, 1)
    W = net[2].weight[1]
    c = (net[0](ids).flatten(1) * W).clamp(min=0)
    assert torch.allclose(P.flatten(1), c / c.sum(1, keepdim=True))
    with pytest.raises(TypeError, match=r"floating-point inputs, got torch.int64 .* stop at the embedding"):
        ExcitationBP(net).attribute(ids, 1)


def test_nothing_is_kept_alive():
    net = block("+=")
    big = images()
    done = []
    handle = net.conv.register_forward_hook(lambda _m, inputs, _o: done.append(weakref.ref(inputs[0])))
    gc.collect()
    gc.disable()
    try:
        for ebp in (ExcitationBP(net), LayerExcitationBP(net, "conv")):
            ebp.attribute(big, 0)
            ebp.attribute_targets(big, [0, 1])
            assert all(ref() is None for ref in done)
    finally:
        gc.enable()
        handle.remove()


# Stopping


def test_stopping_at_a_layers_input():
    net, x = cnn(), images()
    at_input = LayerExcitationBP(net, "4").attribute(x, 0, attribute_to_layer_input=True)
    assert torch.equal(at_input, LayerExcitationBP(net, "3").attribute(x, 0))


def test_layers_that_return_several_tensors():
    class Two(nn.Module):
        def forward(self, x):
            return x[:, :2], x[:, 2:]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.head = Two(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.cat(self.two(x), 1))

    torch.manual_seed(0)
    net, x = Net(), torch.rand(3, 4)
    one, other = LayerExcitationBP(net, "two").attribute(x, 0)
    assert torch.equal(torch.cat([one, other], 1), ExcitationBP(net).attribute(x, 0))


def test_neurons():
    net, x = cnn(), images()
    part = nn.Sequential(*list(net)[:5])
    for selector, target in (((2, 1, 0), (2, 1, 0)), (lambda z: z[:, 2, 1, 0], (2, 1, 0))):
        got = NeuronExcitationBP(net, "4").attribute(x, selector)
        assert torch.equal(got, ExcitationBP(part).attribute(x, target))
    assert torch.equal(NeuronExcitationBP(net, "10").attribute(x, 1), ExcitationBP(net).attribute(x, 1))
    assert torch.equal(
        NeuronExcitationBP(net, "4").attribute(x, (1, 0, 0), attribute_to_neuron_input=True),
        NeuronExcitationBP(net, "3").attribute(x, (1, 0, 0)),
    )
    # Neurons of a slice share alike.
    several = NeuronExcitationBP(net, "4", contrastive=False).attribute(x, (slice(0, 2), 0, 0))
    singles = [NeuronExcitationBP(net, "4", contrastive=False).attribute(x, (c, 0, 0)) for c in (0, 1)]
    assert torch.allclose(several, sum(singles) / 2, atol=1e-12)


# What it must refuse


def test_scripted_and_traced_models_are_refused():
    net, x = cnn(), images()
    with pytest.warns(DeprecationWarning):
        scripted, traced = torch.jit.script(net), torch.jit.trace(net, x)
    for model in (scripted, traced, nn.Sequential(traced, nn.Identity())):
        with pytest.raises(TypeError, match="runs as Python code"):
            ExcitationBP(model)
    with pytest.raises(UnsupportedOperationError, match="scripted and traced parts"):
        ExcitationBP(lambda x: scripted(x) * 2).attribute(x, 0)


def test_what_runs_in_other_threads_is_refused():
    net, x = cnn(), images()

    def elsewhere(x):
        out = []

        def work():
            with torch.enable_grad():
                out.append(net[:4](x))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return net[4:](out[0])

    with pytest.raises(UnsupportedOperationError, match="parts that run in other threads"):
        ExcitationBP(elsewhere).attribute(x, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_right_or_refused(reentrant):
    net, x = cnn(), images()

    def checkpointed(x):
        return net[4:](checkpoint(net[:4], x, use_reentrant=reentrant))

    try:
        got = both(checkpointed, x, 0)
    except UnsupportedOperationError as error:
        assert "turn checkpointing off" in str(error)
    else:
        assert torch.allclose(got, both(net, x, 0), atol=1e-12)


class Odd(nn.Module):
    def forward(self, x):
        return x.cumprod(1)


def test_operations_without_a_rule_are_named():
    net, x = nn.Sequential(nn.Linear(3, 3), Odd(), nn.Linear(3, 2)), torch.rand(2, 3)
    with pytest.warns(UserWarning, match=r"got .*cumprod in '1': their gradient is taken") as caught:
        ExcitationBP(net).attribute(x, 0)
    assert len([w for w in caught if "operations with a rule" in str(w.message)]) == 1
    with pytest.raises(UnsupportedOperationError, match="cumprod in '1'; strict=False takes"):
        ExcitationBP(net, strict=True).attribute(x, 0)
    # Below the layer to stop at it does not matter.
    LayerExcitationBP(net, "1", strict=True).attribute(x, 0)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_custom_functions_are_named():
    net, x = nn.Linear(3, 2), torch.rand(2, 3)
    with pytest.warns(UserWarning, match=r"got Doubled\.apply"):
        ExcitationBP(lambda x: net(Doubled.apply(x))).attribute(x, 0)


def test_wrong_arguments():
    net, x = cnn(), images()
    with pytest.raises(ValueError, match="expected negative to be one of 'excitatory'"):
        ExcitationBP(net, negative="shift")
    with pytest.raises(ValueError, match="within the model's outputs"):
        ExcitationBP(net).attribute(x, 3)
    with pytest.raises(ValueError, match="picks one of the model's outputs"):
        ExcitationBP(net).attribute(x)
    with pytest.raises(ValueError, match=r"weights to contrast .* contrastive=False"):
        LayerExcitationBP(net, "10").attribute(x, 0)
    with pytest.raises(ValueError, match="depends on the inputs"):
        ExcitationBP(lambda x: net(torch.ones_like(x))).attribute(x, 0)
    with pytest.raises(ValueError, match="near names"):
        LayerExcitationBP(net, "11")
    with pytest.raises(TypeError, match="returns one tensor, got tuple"):
        ExcitationBP(lambda x: (net(x),)).attribute(x, 0)
    unused = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="to call layer 'Linear'"):
        LayerExcitationBP(net, unused).attribute(x, 0)
