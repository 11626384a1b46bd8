"""Captum's own generated test configurations, applied to the classes here.

Those of InputXGradient and of layer and neuron gradients are of the same call shape: targets in every form, several
inputs, further arguments, layers with several tensors. Captum runs its classes through them for targets, for hooks
after success, a wrong target and a module that raises, and for DataParallel; so do these tests.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from captum.attr import InputXGradient, LayerGradientXActivation, NeuronGradient
from captum.attr._models.base import _get_deep_layer_name
from captum.testing.attr.helpers.test_config import config
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
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._read import read_layer

# Of random weights: probability is lost, maps are zero, outputs are no classes.
pytestmark = pytest.mark.filterwarnings(
    "ignore:probabilities sum to",
    "ignore:maps are zero",
    "ignore:outputs are non-negative",
    "ignore:Setting",
    "ignore:Internal batch size",
    "ignore:winning probabilities of opposite",
)

CALLS = ("inputs", "target", "additional_forward_args", "attribute_to_layer_input", "neuron_selector")


def configs(algorithm, *, floats=True):
    """Captum's configurations of a class, whose settings all classes here take too."""
    for given in config:
        plain = not given.get("noise_tunnel") and set(given["attribute_args"]) <= set(CALLS)
        inputs = given["attribute_args"]["inputs"]
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        if algorithm in given["algorithms"] and plain and (not floats or all(x.is_floating_point() for x in tensors)):
            yield given


def layer_of(given, model):
    """One layer; of several, which Captum takes too, the last."""
    name = given["layer"] if isinstance(given["layer"], str) else given["layer"][-1]
    return _get_deep_layer_name(unwrap(model), name)


def first_tensor(output):
    return output[0] if isinstance(output, (tuple, list)) else output


def explained(given, model):
    """An XNNAttribution of the configuration's layer, fitted to inputs around those given."""
    args = given["attribute_args"]
    inputs = args["inputs"] if isinstance(args["inputs"], tuple) else (args["inputs"],)
    more = args.get("additional_forward_args", ())
    more = more if isinstance(more, tuple) else (more,)
    layer = find_layer(model, layer_of(given, model))[1]
    targets = args.get("target")
    if isinstance(targets, torch.Tensor):
        targets = targets.tolist()
    targets = list(dict.fromkeys(targets)) if isinstance(targets, list) else [targets]
    xnn = XNNAttribution(
        model,
        layer,
        2,
        heatmap=InputXGradient,
        autoencoder=partial(SRAE, hidden=()),
        recipe=Recipe(steps=5),
        output_transform=lambda output: first_tensor(output).flatten(1),
        prediction_transform=lambda y: y,  # some end in a softmax
        unpack=lambda batch: batch,
    )
    n, times = len(inputs[0]), 12

    def spread(value):
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) != n:
            return value
        value = value.repeat_interleave(times, 0)
        return value + torch.randn(value.shape) if value.is_floating_point() else value

    batch = tuple(spread(x) for x in inputs), tuple(spread(a) for a in more) or None
    return xnn.fit([batch], targets, positives=torch.ones(n * times, dtype=torch.bool), progress=False)


def cases():
    for given in configs(InputXGradient):
        for make in (ExcitationBP, OneHeatmap, partial(OneHeatmap, heatmap=InputXGradient)):
            name = getattr(make, "__name__", "OneHeatmap-InputXGradient")
            yield pytest.param(given, lambda model, _given, make=make: make(model), id=f"{given['name']}-{name}")
    for given in configs(LayerGradientXActivation):
        make = lambda model, given: LayerExcitationBP(model, layer_of(given, model))  # noqa: E731
        yield pytest.param(given, make, id=f"{given['name']}-LayerExcitationBP")
        if "attribute_to_layer_input" not in given["attribute_args"]:
            make = lambda model, given: explained(given, model)  # noqa: E731
            yield pytest.param(given, make, id=f"{given['name']}-XNNAttribution")
    for given in configs(NeuronGradient):
        make = lambda model, given: NeuronExcitationBP(model, layer_of(given, model))  # noqa: E731
        yield pytest.param(given, make, id=f"{given['name']}-NeuronExcitationBP")


def fresh(given):
    """A copy of the configuration's model and arguments: Captum's are shared by all tests."""
    return copy.deepcopy(given["model"]), copy.deepcopy(given["attribute_args"])


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [t for r in result for t in tensors(r)]


def row(args, i):
    """The arguments of one example alone."""
    inputs = args["inputs"] if isinstance(args["inputs"], tuple) else (args["inputs"],)
    n = len(inputs[0])

    def pick(value):
        has_rows = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == n
        return value[i : i + 1] if has_rows else value

    own = dict(args)
    own["inputs"] = (
        tuple(pick(x) for x in args["inputs"]) if isinstance(args["inputs"], tuple) else pick(args["inputs"])
    )
    if "additional_forward_args" in args:
        more = args["additional_forward_args"]
        own["additional_forward_args"] = tuple(map(pick, more)) if isinstance(more, tuple) else pick(more)
    target = args.get("target")
    if isinstance(target, list) or (isinstance(target, torch.Tensor) and target.numel() > 1):
        own["target"] = target[i] if isinstance(target, list) else int(target[i])
    return own


@pytest.mark.parametrize(("given", "make"), list(cases()))
def test_a_batch_is_its_examples(given, make):
    model, args = fresh(given)
    model.eval()
    attribution = make(model, given)
    whole = tensors(attribution.attribute(**args))
    n = len(tensors(args["inputs"])[0])
    assert any(bool(w.any()) for w in whole) or "XNN" not in type(attribution).__name__
    for i in range(n):
        for all_rows, own in zip(whole, tensors(attribution.attribute(**row(args, i))), strict=True):
            torch.testing.assert_close(all_rows[i : i + 1], own, rtol=1e-4, atol=1e-5)


def state(model):
    hooks = ("_forward_hooks", "_backward_hooks", "_forward_pre_hooks")
    return {
        name: (m.training, sorted(vars(m)), [len(vars(m).get(h, ())) for h in hooks])
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("how", ["success", "wrong target", "raising module"])
@pytest.mark.parametrize(("given", "make"), list(cases()))
def test_nothing_is_left_in_the_model(given, make, how):
    model, args = fresh(given)
    attribution = make(model, given)
    before = state(model)
    if how == "success":
        attribution.attribute(**args)
    elif how == "wrong target":
        if "neuron_selector" in args:
            args["neuron_selector"] = (9999, 20, 999)
        else:
            args["target"] = (9999, 20, 999)
        with pytest.raises(Exception, match=r"\w"):
            attribution.attribute(**args)
    else:
        ran = []
        handles = [m.register_forward_hook(lambda m, _i, _o: ran.append(m)) for m in model.modules()]
        attribution.attribute(**args)
        for handle in handles:
            handle.remove()

        def fail(_module, _inputs):
            raise ValueError("a module that raises")

        handle = ran[0].register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="a module that raises"):
            attribution.attribute(**args)
        handle.remove()
    assert state(model) == before


@pytest.mark.parametrize(("given", "make"), list(cases()))
def test_wrapped_models_and_repeated_calls_give_the_same(given, make):
    model, args = fresh(given)
    attribution = make(model, given)
    first = tensors(attribution.attribute(**args))
    assert all(torch.equal(a, b) for a, b in zip(first, tensors(attribution.attribute(**args)), strict=True))
    wrapped = make(nn.DataParallel(model), given) if not isinstance(attribution, XNNAttribution) else attribution
    if isinstance(attribution, XNNAttribution):
        wrapped = attribution.with_heatmap(attribution.heatmap)
        wrapped.model = wrapped.forward_func = nn.DataParallel(model)
    for a, b in zip(first, tensors(wrapped.attribute(**args)), strict=True):
        torch.testing.assert_close(a, b)


def test_there_are_many_configurations_of_every_form_of_target():
    given = [g["attribute_args"] for kind in (InputXGradient, LayerGradientXActivation) for g in configs(kind)]
    forms = {type(args.get("target")).__name__ for args in given}
    lists = {type(args["target"][0]).__name__ for args in given if isinstance(args.get("target"), list)}
    assert len(given) >= 15 and forms >= {"int", "list", "Tensor"} and lists >= {"int", "tuple"}
    assert sum(isinstance(args["inputs"], tuple) for args in given) >= 3


def test_the_layer_is_read_where_captum_reads_it():
    """So that the tests above explain what the configurations mean."""
    for given in configs(LayerGradientXActivation):
        model, args = fresh(given)
        if args.get("attribute_to_layer_input"):
            continue
        inputs = args["inputs"] if isinstance(args["inputs"], tuple) else (args["inputs"],)
        more = args.get("additional_forward_args", ())
        more = more if isinstance(more, tuple) else (more,)
        layer = find_layer(model, layer_of(given, model))[1]
        Z, _ = read_layer(model, layer, (*inputs, *more), output_transform=lambda o: first_tensor(o).flatten(1))
        own = {k: v for k, v in args.items() if k != "attribute_to_layer_input"}
        found = LayerGradientXActivation(model, layer).attribute(**own)
        assert tensors(found)[0].flatten(1).shape == Z.shape
