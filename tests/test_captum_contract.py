"""What a Captum attribution class promises, for every class and backend here.

The numbers are of captum 0.9's behaviour, read in its source. Tested here for all subjects at once: the constructors'
and calls' signatures, what comes back (container, dtype, contiguity, no graph), what stays as it was (inputs, model,
random numbers), wrong arguments, and the modes of autograd. Elsewhere: targets in every form, hooks, DataParallel
(test_captum_configs), deltas and layers that are replaced (test_attribution, test_excitation_bp), several inputs and
further arguments (test_any_model), batches of any size against the loop (test_from_captum).
"""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import (
    LRP,
    Attribution,
    DeepLift,
    GradientAttribution,
    GradientShap,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerGradCam,
    NeuronAttribution,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum.metrics import infidelity, sensitivity_max
from torch import nn

from captum_xnn import (
    SRAE,
    ExcitationBP,
    LayerExcitationBP,
    NeuronExcitationBP,
    OneHeatmap,
    Recipe,
    XNNAttribution,
)
from captum_xnn.heatmaps import FromCaptum

pytestmark = pytest.mark.filterwarnings(
    "ignore:probabilities sum to", "ignore:maps are zero", "ignore:Setting", "ignore:Input Tensor"
)

C, SHAPE = 4, (2, 6, 6)


def network(dtype=torch.float32):
    """A model with batch norm and dropout, in training."""
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(),
        nn.Linear(180, 8), nn.ReLU(), nn.Linear(8, C),
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (*model.parameters(), model[1].running_mean):
            p.copy_(torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5)
    return model.to(dtype)


def images(n=3, seed=5, dtype=torch.float32):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fitted(model, heatmap):
    xnn = XNNAttribution(
        model, "6", 2, heatmap=heatmap, autoencoder=partial(SRAE, hidden=(6,)), recipe=Recipe(steps=10)
    )
    data = images(40, 6, next(model.parameters()).dtype)
    return xnn.fit(data, range(C), positives=torch.ones(40, dtype=torch.bool), progress=False)


HEATMAPS = {
    "default": None,
    "InputXGradient": InputXGradient,
    "IntegratedGradients": FromCaptum(IntegratedGradients, n_steps=4),
    "DeepLift": DeepLift,
    "LRP": LRP,
    "GuidedBackprop": GuidedBackprop,
    "Occlusion": FromCaptum(Occlusion, sliding_window_shapes=(2, 3, 3), strides=(2, 3, 3)),
    "LayerGradCam": LayerGradCam,
    "NoiseTunnel": FromCaptum(NoiseTunnel, attribution_method=Saliency, nt_samples=2, stdevs=0.0),
}
MAKERS = {
    **{f"XNNAttribution, {k}": partial(fitted, heatmap=v) for k, v in HEATMAPS.items()},
    "OneHeatmap": lambda model: OneHeatmap(model, InputXGradient),
    "OneHeatmap, default": OneHeatmap,
    "ExcitationBP": ExcitationBP,
    "LayerExcitationBP": lambda model: LayerExcitationBP(model, "2"),
    "NeuronExcitationBP": lambda model: Selecting(model, "6"),
}


class Selecting(NeuronExcitationBP):
    """One hidden neuron, where the others have a target."""

    def attribute(self, inputs, target=None, additional_forward_args=None, **settings):
        if type(target) is int and target >= C:
            raise IndexError(target)
        return super().attribute(inputs, (int(target),), additional_forward_args, **settings)


@pytest.fixture(scope="module", params=MAKERS)
def subject(request):
    return MAKERS[request.param](network())


def parameters(function):
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


def test_constructors_and_calls_have_captums_names_order_and_defaults():
    """C1, C2, C6, C7: the model, then the layer; positional are inputs, target, additional_forward_args alone."""
    for cls, first in (
        (XNNAttribution, ["model", "layer"]),
        (OneHeatmap, ["model"]),
        (ExcitationBP, ["forward_func"]),
        (LayerExcitationBP, ["forward_func", "layer", "device_ids"]),
        (NeuronExcitationBP, ["forward_func", "layer", "device_ids"]),
    ):
        own = parameters(cls.__init__)
        assert [p.name for p in own[: len(first)]] == first
        assert all(p.default is None for p in own if p.name == "device_ids")
        call = [p for p in parameters(cls.attribute) if p.kind is p.POSITIONAL_OR_KEYWORD]
        wanted = ["inputs", "target", "additional_forward_args"]
        if cls is NeuronExcitationBP:
            wanted[1] = "neuron_selector"
        assert [p.name for p in call[:3]] == wanted
        assert [p.default for p in call[2:]] == [None, *[False] * len(call[3:])]
        assert all(p.name.startswith("attribute_to_") for p in call[3:])
    assert "device_ids" in [p.name for p in parameters(XNNAttribution)]
    assert issubclass(XNNAttribution, LayerAttribution) and issubclass(LayerExcitationBP, LayerAttribution)
    assert issubclass(ExcitationBP, GradientAttribution) and issubclass(NeuronExcitationBP, NeuronAttribution)


def test_what_captum_reads_of_an_object(subject):
    """C1, C4, C8, C9, C25."""
    assert subject.forward_func is not None and isinstance(subject, Attribution)
    assert "  " not in subject.get_name() and "X N N" not in subject.get_name()
    assert isinstance(subject.multiplies_by_inputs, bool)
    assert subject.has_convergence_delta() == hasattr(subject, "compute_convergence_delta")
    if not isinstance(subject, Selecting):
        assert hasattr(type(subject).attribute, "__wrapped__")
    name = type(subject).__name__
    with pytest.raises(NotImplementedError, match=f"attribute_future is not implemented for {name}"):
        subject.attribute_future()


@pytest.mark.parametrize("make", [XNNAttribution, LayerExcitationBP, NeuronExcitationBP])
def test_a_function_is_no_model_with_layers(make):
    """C3: where Captum fails with an AttributeError."""
    with pytest.raises(TypeError, match=r"the model is a function, not a torch.nn.Module whose layers can be hooked"):
        make(lambda x: x, "1")


def test_a_function_has_no_output_modules_either():
    with pytest.raises(TypeError, match=r"the model is a function, not a torch.nn.Module whose layers can be hooked"):
        OneHeatmap(lambda x: x)


@pytest.mark.parametrize("inputs", [[images()], {"x": images()}, images().numpy()])
def test_other_containers_are_refused(subject, inputs):
    """C10, with Captum's own words."""
    with pytest.raises((AssertionError, TypeError), match=r"torch.Tensor or a tuple\[torch.Tensor|got ndarray"):
        subject.attribute(inputs, target=1)


def test_a_tuple_of_one_gives_a_tuple_of_one(subject):
    """C11. Layer attributions have the container of the layer's output."""
    alone, one = subject.attribute(images(), target=1), subject.attribute((images(),), target=1)
    assert isinstance(one, torch.Tensor) == isinstance(subject, LayerExcitationBP)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, one if isinstance(one, torch.Tensor) else one[0])


def test_results_are_detached_contiguous_and_of_the_inputs_kind(subject):
    """C13 to C16: Captum's own classes keep graphs, and are not contiguous on images with the channels last."""
    plain = subject.attribute(images(), target=1)
    last = subject.attribute(images().to(memory_format=torch.channels_last), target=1)
    for result in (plain, last):
        assert not result.requires_grad and result.grad_fn is None and result.is_contiguous()
        assert result.dtype == torch.float32 and result.device == images().device and len(result) == 3
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-6)


RANDOM = {"GradientShap": FromCaptum(GradientShap, baselines=torch.zeros(2, *SHAPE), n_samples=2)}


@pytest.mark.parametrize("name", [*MAKERS, *RANDOM])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_results_have_the_inputs_dtype(name, dtype):
    """C13: Captum's Occlusion gives float32 of float64, its IntegratedGradients of bfloat16, its DeepLift NaN of
    float16."""
    make = MAKERS.get(name) or partial(fitted, heatmap=RANDOM[name])
    result = make(network(dtype)).attribute(images(dtype=dtype), target=1)
    assert result.dtype == dtype and bool(result.isfinite().all()) and bool(result.any())


@pytest.mark.parametrize("name", HEATMAPS)
def test_float16_maps_are_those_of_float32(name):
    """By the same explainer, whose encoder computes in float32 behind the model."""
    half = fitted(network(torch.float16), HEATMAPS[name])
    single = fitted(network(), HEATMAPS[name])
    single.explainers_ = half.explainers_
    x = images(dtype=torch.float16)
    given, wanted = half.attribute(x, target=1).float(), single.attribute(x.float(), target=1)
    assert float((given - wanted).norm()) < 0.02 * float(wanted.norm())


def test_targets_that_captum_refuses_are_refused(subject):
    """C18. NumPy's integers, of which Captum says that they are no valid type, are integers here."""
    if not isinstance(subject, Selecting):
        wanted = subject.attribute(images(), target=2)
        assert torch.equal(subject.attribute(images(), target=np.int64(2)), wanted)
        for wrong in (torch.zeros(2, 2), [0, 1], None, 0.5, "1"):
            with pytest.raises((AssertionError, ValueError, TypeError, RuntimeError), match=r"[Tt]arget|explainer"):
                subject.attribute(images(), target=wrong)
    with pytest.raises((IndexError, ValueError, RuntimeError), match=str(C)):
        subject.attribute(images(), target=C)


def snapshot(model):
    return {
        name: (m.training, sorted(vars(m)), [len(vars(m)[h]) for h in sorted(vars(m)) if h.endswith("_hooks")])
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_everything_stays_as_it_was(subject, fails, context):
    """C27 to C31: hooks, attributes, modes, weights and statistics, gradients, the user's input, random numbers."""
    model, x = subject.forward_func, images().requires_grad_()
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    asked = [p.requires_grad for p in model.parameters()]
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    with context():
        if fails:
            with pytest.raises((IndexError, ValueError, RuntimeError), match=str(C)):
                subject.attribute(x, target=C)
        else:
            assert not subject.attribute(x, target=1).requires_grad
    assert snapshot(model) == before and all(m.training for m in model.modules())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == asked and all(p.grad is None for p in model.parameters())
    assert x.requires_grad and x.is_leaf and x.grad is None
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[2]
    assert np.array_equal(np.random.get_state()[1], generators[1])  # noqa: NPY002


def test_calls_and_copies_agree(subject):
    """C5: Captum's DeepLift grows with every call, and its LRP forgets rules after the first."""
    first = subject.attribute(images(), target=1)
    assert torch.equal(first, subject.attribute(images(), target=1))
    if not isinstance(subject, Selecting):
        size = len(pickle.dumps(subject))
        assert torch.equal(first, pickle.loads(pickle.dumps(subject)).attribute(images(), target=1))
        assert len(pickle.dumps(subject)) == size
    assert torch.equal(first, copy.deepcopy(subject).attribute(images(), target=1))


def test_rows_do_not_know_of_each_other(subject):
    """C33, also where the model is in training with batch norm."""
    whole = subject.attribute(images(4), target=1)
    for i in range(4):
        torch.testing.assert_close(
            subject.attribute(images(4)[i : i + 1], target=1), whole[i : i + 1], rtol=1e-4, atol=1e-6
        )


def test_no_examples_are_told(subject):
    """C33: an IndexError in Captum. The excitation family gives no attributions for no examples."""
    if isinstance(subject, (XNNAttribution, OneHeatmap)):
        with pytest.raises(ValueError, match="at least one"):
            subject.attribute(images()[:0], target=1)
    else:
        assert len(subject.attribute(images()[:0], target=1)) == 0


def test_captums_metrics_take_every_class_that_gives_the_inputs_shape(subject):
    """C40: infidelity as its definition says, for a perturbation that is the same each time."""
    if isinstance(subject, (LayerExcitationBP, Selecting)):
        pytest.skip("of a layer's or neuron's shape")
    more = {"feature": 0} if isinstance(subject, (XNNAttribution, OneHeatmap)) else {}
    maps = subject.attribute(images(), target=1, **more)
    assert maps.shape == images().shape
    model = copy.deepcopy(subject.forward_func).eval()
    step = images(seed=9) * 0.1

    def perturb(x):
        times = len(x) // 3
        noise = step.repeat_interleave(times, 0)
        return noise, x - noise

    with torch.no_grad():
        found = infidelity(model, perturb, images(), maps, target=1, n_perturb_samples=2)
        change = (model(images()) - model(images() - step))[:, 1]
    torch.testing.assert_close(found, ((step * maps).flatten(1).sum(1) - change) ** 2, rtol=1e-3, atol=1e-6)
    still = sensitivity_max(partial(subject.attribute, **more), images(), perturb_func=lambda x: x, target=1)
    assert still.shape == (3,) and float(still.max()) < 1e-5
