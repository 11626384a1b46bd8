"""Excitation backprop as a Captum user meets it: what the classes promise, where they stop, and what they refuse."""

import copy
import gc
import inspect
import pickle
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import get_type_hints

import numpy as np
import pytest
import torch
from captum.attr import (
    GradientAttribution,
    InputXGradient,
    LayerAttribution,
    LayerGradCam,
    NeuronAttribution,
    NeuronGradient,
    NoiseTunnel,
)
from captum.metrics import infidelity, sensitivity_max
from torch import nn
from torch.utils.checkpoint import checkpoint

from captum_xnn import ExcitationBP, LayerExcitationBP, NeuronExcitationBP
from captum_xnn.errors import LayerNotFoundError, LayerNotReachedError, UnsupportedOperationError
from captum_xnn.excitation_bp._attribution import total_mass
from captum_xnn.excitation_bp._settings import SettingNames, Settings
from captum_xnn.heatmaps import ExcitationMaps

# Small random nets lose mass at neurons that only their bias excites.
pytestmark = pytest.mark.filterwarnings("ignore:probabilities sum to")


def cnn(dtype=torch.float64, inplace=False):
    torch.manual_seed(0)
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
    return net.eval().to(dtype)


def images(n=2, dtype=torch.float64):
    return torch.randn(n, 2, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))


def both(net, x, target, **kwargs):
    """MWP and c-MWP."""
    return torch.stack([ExcitationBP(net, contrastive=c, **kwargs).attribute(x, target) for c in (False, True)])


def callers(net):
    """Each class with a call that needs nothing but inputs."""
    return {
        "inputs": (ExcitationBP(net), lambda ebp, x: ebp.attribute(x, 1)),
        "targets": (ExcitationBP(net), lambda ebp, x: ebp.attribute_targets(x, [0, 2])),
        "layer": (LayerExcitationBP(net, "2"), lambda ebp, x: ebp.attribute(x, 1)),
        "layer's targets": (LayerExcitationBP(net, "2"), lambda ebp, x: ebp.attribute_targets(x, [0, 2])),
        "neuron": (NeuronExcitationBP(net, "4"), lambda ebp, x: ebp.attribute(x, (1, 0, 0))),
    }


# What Captum promises


def parameters(method):
    return [p.name for p in inspect.signature(method).parameters.values() if p.kind is not p.KEYWORD_ONLY]


def test_the_classes_are_captums_and_take_its_arguments_in_its_order():
    for ours, theirs, kind in (
        (ExcitationBP, InputXGradient, GradientAttribution),
        (LayerExcitationBP, LayerGradCam, LayerAttribution),
        (NeuronExcitationBP, NeuronGradient, NeuronAttribution),
    ):
        assert issubclass(ours, kind) and issubclass(ours, GradientAttribution)
        assert parameters(ours.__init__) == parameters(theirs.__init__)[: len(parameters(ours.__init__))]
        wanted = [n for n in parameters(theirs.attribute) if n not in ("relu_attributions", "attr_dim_summation")]
        given = parameters(ours.attribute)
        assert given == wanted[: len(given)]
        # Captum's wrappers call the function behind the logging.
        assert callable(ours.attribute.__wrapped__)
    ebp = ExcitationBP(cnn())
    assert ebp.multiplies_by_inputs and ebp.has_convergence_delta()
    assert [c.get_name() for c in (ExcitationBP, LayerExcitationBP)] == ["Excitation BP", "Layer Excitation BP"]
    with pytest.raises(NotImplementedError, match="attribute_future is not implemented for ExcitationBP"):
        ebp.attribute_future(images(), 1)


@pytest.mark.parametrize("kind", callers(nn.Sequential(*[nn.Identity() for _ in range(6)])))
def test_nothing_of_the_model_or_the_inputs_changes(kind):
    net = cnn().train()
    ebp, call = callers(net)[kind]
    x = images()
    before = copy.deepcopy(net.state_dict()), x.clone(), [set(vars(m)) for m in net.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert torch.equal(call(ebp, x), call(ebp, x)), "an object remembers nothing of its calls"
    assert net.training and all(m.training for m in net.modules())
    assert all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())
    assert torch.equal(x, before[1]) and not x.requires_grad
    assert [set(vars(m)) for m in net.modules()] == before[2]
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks) for m in net.modules())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


@pytest.mark.parametrize("kind", callers(nn.Sequential(*[nn.Identity() for _ in range(6)])))
def test_results_are_detached_contiguous_and_like_the_input(kind):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        ebp, call = callers(cnn(dtype))[kind]
        for x in (images(dtype=dtype), images(dtype=dtype).contiguous(memory_format=torch.channels_last)):
            P = call(ebp, x)
            assert not P.requires_grad and P.is_contiguous() and P.dtype == dtype and P.device == x.device


class Raising(nn.Module):
    def forward(self, x):
        raise ArithmeticError("no such thing")


def test_an_exception_leaves_no_trace():
    net = cnn().train()
    broken = nn.Sequential(*net[:8], Raising()).train()
    x = images()
    for run in (
        lambda: ExcitationBP(broken).attribute(x, 0),
        lambda: LayerExcitationBP(broken, "2").attribute(x, 0),
        lambda: NeuronExcitationBP(broken, "7").attribute(x, 0),
        lambda: LayerExcitationBP(net, "2").attribute(x, 99),
    ):
        with pytest.raises((ArithmeticError, ValueError)):
            run()
        for model in (net, broken):
            assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
            assert all(p.requires_grad for p in model.parameters())
        assert not x.requires_grad
    assert not torch.overrides._get_current_function_mode_stack()


class Places(nn.Module):
    """An output for each place: (N, 3, 2, 2)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 4, stride=4).double()

    def forward(self, x):
        return self.conv(x)


def test_targets_as_everywhere_in_captum():
    net, x = cnn(), images(3)
    ebp = ExcitationBP(net)
    singles = torch.cat([ebp.attribute(x[i : i + 1], t) for i, t in enumerate((2, 0, 1))])
    for target in ([2, 0, 1], torch.tensor([2, 0, 1]), [(2,), (0,), (1,)]):
        torch.testing.assert_close(ebp.attribute(x, target), singles)
    for target in (1, torch.tensor(1), torch.tensor([1]), np.int64(1), (1,), [1, 1, 1]):
        assert torch.equal(ebp.attribute(x, target), ebp.attribute(x, 1))
    one = nn.Sequential(*net[:-1], nn.Linear(5, 1).double())
    assert torch.equal(ExcitationBP(one).attribute(x), ExcitationBP(one).attribute(x, 0))
    assert torch.equal(ExcitationBP(lambda x: one(x)[:, 0]).attribute(x), ExcitationBP(one).attribute(x, 0))
    places = ExcitationBP(Places())
    each = torch.cat([places.attribute(x[i : i + 1], t) for i, t in enumerate([(0, 1, 1), (2, 0, 0), (1, 0, 1)])])
    torch.testing.assert_close(places.attribute(x, [(0, 1, 1), (2, 0, 0), (1, 0, 1)]), each)
    # What a place of a convolution does not see takes nothing.
    P = places.attribute(x, (0, 1, 0))
    assert P[:, :, 4:, :4].abs().sum() > 0 and P[:, :, :4].abs().sum() == P[:, :, :, 4:].abs().sum() == 0


def test_the_delta_is_what_was_lost():
    net, x = cnn(), images(4)
    for ebp in (ExcitationBP(net, contrastive=False), LayerExcitationBP(net, "2", contrastive=False)):
        P, delta = ebp.attribute(x, 1, return_convergence_delta=True)
        torch.testing.assert_close(delta, 1 - total_mass(P))
        torch.testing.assert_close(ebp.compute_convergence_delta(P), delta)
        assert delta.shape == (4,)
    P, delta = ExcitationBP(net).attribute(x, 1, return_convergence_delta=True)
    torch.testing.assert_close(delta, -total_mass(P))


@pytest.mark.filterwarnings("default:probabilities sum to")
def test_a_loss_is_told():
    dead = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        dead[0].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        dead[0].bias.copy_(torch.tensor([0.0, 3.0]))  # the second is active by its bias alone
        dead[2].weight.copy_(torch.tensor([[1.0, 3.0], [1.0, -1.0]]))
    x = torch.ones(1, 2)
    with pytest.warns(UserWarning, match=r"probabilities sum to 0\.400 where they arrive"):
        P, delta = ExcitationBP(dead, contrastive=False).attribute(x, 0, return_convergence_delta=True)
    torch.testing.assert_close(P, torch.tensor([[0.2, 0.2]]))  # 2 of 5 come from the first, half from either input
    torch.testing.assert_close(delta, torch.tensor([0.6]))


def test_captums_tools_take_it():
    net, x = cnn(torch.float32), images(dtype=torch.float32)
    ebp = ExcitationBP(net)
    smoothed = NoiseTunnel(ebp).attribute(x, nt_samples=4, stdevs=1e-6, target=1)
    torch.testing.assert_close(smoothed, ebp.attribute(x, 1), rtol=0.05, atol=1e-3)
    P, deltas = NoiseTunnel(ebp).attribute(x, nt_samples=2, stdevs=1e-6, target=1, return_convergence_delta=True)
    assert P.shape == x.shape and deltas.shape == (4,)
    at_layer = NoiseTunnel(LayerExcitationBP(net, "2")).attribute(x, nt_samples=4, stdevs=1e-6, target=1)
    torch.testing.assert_close(at_layer, LayerExcitationBP(net, "2").attribute(x, 1), rtol=0.05, atol=1e-3)
    sensitivity = sensitivity_max(ebp.attribute, x, target=1, perturb_radius=1e-6)
    assert sensitivity.shape == (2,) and bool((sensitivity < 0.05).all())
    # Where every product excites, P f(x) / x is the gradient, and infidelity nil.
    linear, x = nn.Linear(6, 2, bias=False), torch.rand(4, 6) + 0.1
    nn.init.uniform_(linear.weight)
    P = ExcitationBP(linear, contrastive=False).attribute(x, 1)
    gradient = P * linear(x)[:, 1:].detach() / x

    def perturbed(x):
        noise = torch.rand_like(x)
        return noise, x - noise

    error = infidelity(linear, perturbed, x, gradient, target=1)
    torch.testing.assert_close(error, torch.zeros(4), rtol=0, atol=1e-10)


def test_objects_pickle_and_copy():
    net, x = cnn(), images()
    for ebp, call in callers(net).values():
        ebp.settings = ebp.settings.__class__(negative="clamp")
        for again in (pickle.loads(pickle.dumps(ebp)), copy.deepcopy(ebp)):
            assert again.settings == ebp.settings
            assert torch.equal(call(again, x), call(ebp, x))


def test_no_examples_have_no_attributions():
    net, x = cnn(), images()[:0]
    for ebp, call in callers(net).values():
        P = call(ebp, x)
        assert len(P) == 0 and P.shape[1:] == call(ebp, images()).shape[1:]


def test_the_layer_may_be_replaced():
    net, x = cnn(), images()
    ebp = LayerExcitationBP(net, "2")
    ebp.layer = net[5]  # as Captum's TCAV does
    assert torch.equal(ebp.attribute(x, 0), LayerExcitationBP(net, "5").attribute(x, 0))


def test_threads_do_not_disturb_each_other():
    net, x = cnn(), images(8)
    calls = [call for call in callers(net).values()] * 4
    wanted = [call(ebp, x) for ebp, call in calls]
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(lambda call: call[1](call[0], x), calls))
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_nothing_is_kept_alive():
    net, x, seen = cnn(inplace=True), images(), []
    handle = net[4].register_forward_hook(lambda _m, inputs, _o: seen.append(weakref.ref(inputs[0])))
    gc.collect()
    gc.disable()
    try:
        for ebp, call in callers(net).values():
            call(ebp, x)
            assert seen and all(ref() is None for ref in seen)
    finally:
        gc.enable()
        handle.remove()


def families(models):
    """Small members of the families that have no accepted rules, and a layer of each."""
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.efficientnet import MBConvConfig

    return {
        "vit": (models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3), "encoder.layers.encoder_layer_1"),
        "swin": (models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [2, 2], num_classes=3), "features.1"),
        "convnext": (
            models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3),
            "features.1",
        ),
        "efficientnet": (
            models.EfficientNet([MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 5, 2, 8, 16, 2)], 0.2, num_classes=3),
            "features.2",
        ),
        "densenet": (models.DenseNet(4, (2, 2), 8, num_classes=3), "features.transition1"),
        "googlenet": (models.GoogLeNet(num_classes=3, aux_logits=False, init_weights=False), "inception4a"),
        "shufflenet": (models.shufflenet_v2_x0_5(num_classes=3), "stage3"),
    }


@pytest.mark.filterwarnings("ignore:winning probabilities of opposite signs cancel")
@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "efficientnet", "densenet", "googlenet", "shufflenet"])
def test_families_of_torchvision(torchvision, family):
    """Every operation has a rule, everything is finite, and what is lost is reported."""
    net, layer = families(torchvision.models)[family]
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)  # torchvision starts the heads of some with 0
    net, x = net.eval(), torch.randn(2, 3, 32, 32)
    for contrastive in (False, True):
        for ebp in (
            ExcitationBP(net, contrastive=contrastive, strict=True),
            LayerExcitationBP(net, layer, contrastive=contrastive, strict=True),
        ):
            P, delta = ebp.attribute(x, 1, return_convergence_delta=True)
            assert P.isfinite().all() and P.abs().max() > 0
            torch.testing.assert_close(total_mass(P) + delta, torch.full((2,), 0.0 if contrastive else 1.0))
            if not contrastive and family in ("densenet", "googlenet", "shufflenet"):  # rectified throughout
                assert P.min() >= 0 and delta.min() > -1e-5


# Where it stops


def test_stopping_at_a_layers_input():
    net, x = cnn(), images()
    at_input = LayerExcitationBP(net, "4").attribute(x, 0, attribute_to_layer_input=True)
    assert torch.equal(at_input, LayerExcitationBP(net, "3").attribute(x, 0))
    both_targets = LayerExcitationBP(net, "4").attribute_targets(x, [0, 1], attribute_to_layer_input=True)
    assert torch.equal(both_targets[:, 0], at_input)


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


class Recurrent(nn.Module):
    """Its layer returns a sequence of states and the last ones, (1, N, H)."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def test_a_layer_with_states_that_are_no_examples():
    net, x = Recurrent(), torch.rand(5, 6, 3)
    P = LayerExcitationBP(net, "rnn", contrastive=False).attribute(x, 1)
    assert P.shape == (5, 6, 4)
    contributions = (net.rnn(x)[0][:, -1] * net.head.weight[1]).clamp(min=0).detach()
    torch.testing.assert_close(P[:, -1], contributions / contributions.sum(1, keepdim=True))
    assert P[:, :-1].abs().max() == 0
    with pytest.warns(UserWarning, match=r"has no rule for lstm in 'rnn' and takes their gradient"):
        ExcitationBP(net).attribute(x, 1)


class Branches(nn.Module):
    """Two branches and a sum, below which the branches' inputs are one and the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right, self.head = (nn.Linear(4, 4).double() for _ in range(4))
        with torch.no_grad():
            for p in self.parameters():
                p.abs_()

    def forward(self, x):
        h = self.stem(x).relu()
        return self.head(self.left(h).relu() + self.right(h).relu())


def test_a_layer_in_a_branch_gets_the_share_of_that_branch():
    net, x = Branches(), torch.rand(3, 4, dtype=torch.float64)
    for contrastive in (False, True):
        shares = [LayerExcitationBP(net, n, contrastive=contrastive).attribute(x, 1) for n in ("left", "right")]
        whole = LayerExcitationBP(net, "head", contrastive=contrastive).attribute(x, 1, attribute_to_layer_input=True)
        torch.testing.assert_close(sum(shares), whole)
    P = LayerExcitationBP(net, "left", contrastive=False).attribute(x, 1)
    h = net.stem(x).relu()
    a, b, w = net.left(h).relu(), net.right(h).relu(), net.head.weight[1]
    torch.testing.assert_close(P, a * w / ((a + b) * w).sum(1, keepdim=True))
    assert bool((total_mass(P) < 0.9).all())


# What it refuses


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_scripted_and_traced_models_are_refused():
    net, x = cnn(), images()
    scripted, traced = torch.jit.script(net), torch.jit.trace(net, x)
    for model in (scripted, traced, nn.Sequential(traced, nn.Identity())):
        with pytest.raises(TypeError, match=r"runs as Python code|layers of scripted and traced modules"):
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
    with pytest.warns(UserWarning, match=r"no rule for .*cumprod in '1' and takes their gradient") as caught:
        ExcitationBP(net).attribute(x, 0)
    assert len([w for w in caught if "has no rule for" in str(w.message)]) == 1
    with pytest.raises(UnsupportedOperationError, match=r"cumprod in '1'; strict=False takes"):
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
    with pytest.warns(UserWarning, match=r"no rule for Doubled\.apply"):
        ExcitationBP(lambda x: net(Doubled.apply(x))).attribute(x, 0)


class Parted(torch.autograd.Function):
    """Two outputs, arguments of all kinds, and a derivative that returns what others use too."""

    @staticmethod
    def forward(ctx, offset, x, scale, y):
        return offset + x, scale * y, torch.zeros(1)

    @staticmethod
    def backward(ctx, g, h, unused):
        return None, g, None, 3 * h


@pytest.mark.filterwarnings("ignore:excitation backprop has no rule")
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_custom_functions_of_several_tensors(used):
    net, x = nn.Linear(6, 2, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)

    def f(x):
        made = Parted.apply(torch.ones(1), x, 3.0, 2 * x)
        return net(torch.cat([made[i] if i in used else torch.zeros(2, 3, dtype=torch.float64) for i in (0, 1)], 1))

    both = torch.cat([(1 + x) if 0 in used else 0 * x, 6 * x if 1 in used else 0 * x], 1)
    P = ExcitationBP(net, contrastive=False).attribute_targets(both, [0, 1])
    wanted = (P[..., :3] if 0 in used else 0) + (3 * P[..., 3:] if 1 in used else 0)
    torch.testing.assert_close(ExcitationBP(f, contrastive=False).attribute_targets(x, [0, 1]), wanted)


def test_settings_are_the_same_everywhere():
    """Written once; signatures, and the names that type checkers read, agree with it."""
    assert get_type_hints(SettingNames) == get_type_hints(Settings)
    for method in (ExcitationBP, LayerExcitationBP, NeuronExcitationBP, ExcitationMaps):
        parameters = inspect.signature(method).parameters
        own = {name: p.default for name, p in parameters.items() if name in asdict(Settings())}
        assert own == asdict(Settings())
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)
        assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


class Batch(nn.Module):
    """One row for all examples."""

    def forward(self, y):
        return y.mean(0, keepdim=True)


def test_wrong_arguments():
    net, x = cnn(), images()
    for setting in ({"negative": "shift"}, {"add": "both"}, {"batch_norm": "fold"}):
        ((name, value),) = setting.items()
        with pytest.raises(ValueError, match=f"{name} is '{value}'; pass one of"):
            LayerExcitationBP(net, "2", **setting)
    with pytest.raises(TypeError, match="LayerExcitationBP has no setting 'contrast'; it takes: add, batch_norm"):
        LayerExcitationBP(net, "2", contrast=True)
    with pytest.raises(ValueError, match="outside the model's outputs"):
        ExcitationBP(net).attribute(x, 3)
    with pytest.raises(ValueError, match="does not pick one of the model's outputs"):
        ExcitationBP(net).attribute(x)
    with pytest.raises(ValueError, match=r"weights to contrast .* contrastive=False"):
        LayerExcitationBP(net, "10").attribute(x, 0)
    with pytest.raises(ValueError, match="does not depend on the inputs"):
        ExcitationBP(lambda x: net(torch.ones_like(x))).attribute(x, 0)
    with pytest.raises(LayerNotFoundError, match="near names"):
        LayerExcitationBP(net, "11")
    with pytest.raises(TypeError, match="returns a tuple instead of one tensor with a row for each example"):
        ExcitationBP(lambda x: (net(x),)).attribute(x, 0)
    with pytest.raises(TypeError, match="returns one number for all examples instead"):
        ExcitationBP(lambda x: net(x).sum()).attribute(x)
    with pytest.raises(ValueError, match=r"outputs of shape \[\(2, 4, 4, 4\)\], without a row for each of 1 examples"):
        LayerExcitationBP(nn.Sequential(*net, Batch()), "3").attribute(x, 0)
    with pytest.raises(LayerNotReachedError, match="did not call layer 'Linear'"):
        LayerExcitationBP(net, nn.Linear(2, 2)).attribute(x, 0)
    with pytest.raises(
        TypeError, match=r"needs floating-point inputs, and input 0 is torch.int64; .* stop at the embedding"
    ):
        ExcitationBP(net).attribute(x.long(), 1)
    for inputs in ([x], {"x": x}, x.numpy()):
        with pytest.raises((AssertionError, TypeError), match=r"found|expected"):
            ExcitationBP(net).attribute(inputs, 1)


# --- differences


class Difference(nn.Module):
    """f(a) - f(b), weighted or as it is, by an operator or a function."""

    def __init__(self, way, weighted=True):
        super().__init__()
        self.f, self.head, self.way = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), way
        nn.init.ones_(self.f.weight)
        nn.init.ones_(self.head.weight)
        self.weighted = weighted

    def forward(self, a, b):
        u, v = self.f(a), self.f(b)
        made = {
            "-": lambda: u - v,
            "sub": lambda: torch.sub(u, v),
            "alpha": lambda: u.add(v, alpha=-1),
        }
        difference = made[self.way]()
        return self.head(difference) if self.weighted else difference


@pytest.mark.parametrize("way", ["-", "sub", "alpha"])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_difference_of_near_signals_is_warned_of(way, weighted):
    """12 - 11 shares 1 out as 12 and -11: the sum is 1, and the absolute sum 23."""
    model, a, b = Difference(way, weighted), torch.tensor([[12.0]]), torch.tensor([[11.0]])
    method = ExcitationBP(model, contrastive=False)
    with pytest.warns(UserWarning, match=r"opposite signs cancel: their absolute values sum to 23 .* add='excitatory'"):
        p = method.attribute((a, b), 0)
    torch.testing.assert_close(torch.cat(p, 1), torch.tensor([[12.0, -11.0]]))
    (first, second) = ExcitationBP(model, contrastive=False, add="excitatory").attribute((a, b), 0)
    assert (float(first), float(second)) == (1.0, 0.0)


def test_a_difference_of_far_signals_is_not_warned_of():
    """12 - 1 shares 1 out as 12/11 and -1/11, and warnings are errors here."""
    a, b = torch.tensor([[12.0]]), torch.tensor([[1.0]])
    p = ExcitationBP(Difference("-"), contrastive=False).attribute((a, b), 0)
    torch.testing.assert_close(torch.cat(p, 1), torch.tensor([[12.0, -1.0]]) / 11)
