"""The messages in the docs' page for Captum users: Captum's are its exact words, and what is said to happen here does.

Every message on the page is provoked, and every one provoked here is on the page.
"""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import (
    LRP,
    Attribution,
    DeepLift,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerGradCam,
    LayerIntegratedGradients,
    LayerLRP,
    NoiseTunnel,
    Saliency,
    visualization,
)
from captum.metrics import sensitivity_max
from torch import nn

from captum_xnn import SRAE, OneHeatmap, Recipe, XNNAttribution
from captum_xnn.heatmaps import FromCaptum

pytestmark = pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:Setting", "ignore:Input Tensor")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "captum_users.rst"


def on_the_page():
    """The messages of the page, ours and Captum's."""
    section = PAGE.read_text().split("Messages, and what to do\n")[1]
    ours, captums = section.split("Captum's own messages")
    return tuple(re.findall(r"^``(.+)``$", part, re.MULTILINE) for part in (ours, captums))


def flat():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


def pictures():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3)
    ).eval()


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.relu, self.out = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.relu(self.a(self.relu(self.a(x)))))


class ByKeyword(Reused):
    def forward(self, x):
        return self.out(self.relu(input=self.a(x)))


class Unused(Reused):
    def forward(self, x):
        return self.out(self.a(x))


class Decides(Reused):
    def forward(self, x):
        return self.out(self.relu(self.a(x)) if x.sum() < 1e9 else x)


class Undecorated(Attribution):
    def attribute(self, inputs, target=None, additional_forward_args=None):
        return InputXGradient(self.forward_func).attribute(inputs, target, additional_forward_args)


class Infinite(Attribution):
    def attribute(self, inputs, target=None):
        return inputs / 0


def rows(n=4):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1))


def images(n=4):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def ids(n=4):
    return torch.randint(0, 5, (n, 2), generator=torch.Generator().manual_seed(3))


def words():
    return nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def maps(model, layer, heatmap, x, target=1, **settings):
    """Of an explainer fitted to a few inputs like x."""
    xnn = XNNAttribution(model, layer, 2, heatmap=heatmap, autoencoder=partial(SRAE, hidden=()), recipe=Recipe(steps=5))
    many = x[torch.arange(40) % len(x)]
    many = many + torch.randn(many.shape).to(many.dtype) if many.is_floating_point() else ids(40)
    every = torch.ones(40, dtype=torch.bool)
    return xnn.fit(many, 1, positives=every, progress=False).attribute(x, target=target, **settings)


def after_an_error():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(5, 3))
    with pytest.raises(TypeError, match="has no rule defined"):
        LRP(model).attribute(rows(), target=0)
    LRP(nn.Sequential(model[0], model[1], model[3])).attribute(rows(), target=0)


def after_an_error_here():
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with pytest.raises(RuntimeError, match="LRP has no rule for LayerNorm"):
        maps(model, "2", LRP, rows())
    return LRP(nn.Sequential(model[0], model[2], model[3])).attribute(rows(), target=0)


def under_inference(attribute):
    with torch.inference_mode():
        return attribute(rows(), target=1)


def made_under_inference(make):
    with torch.inference_mode():
        return make()


def last(x):
    return x.to(memory_format=torch.channels_last)


def told(run):
    """What a call warns of, as an error."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    raise UserWarning("".join(str(w.message) for w in found))


OURS = {
    "maps are zero for x-feature ... in ... of ... examples": lambda: told(
        lambda: maps(flat(), "1", Undecorated, torch.zeros(2, 6))
    ),
    "... maps have NaN or infinite values": lambda: told(lambda: maps(flat(), "1", Infinite, rows())),
    "outputs are non-negative and sum to 1 in every example": lambda: XNNAttribution(
        nn.Sequential(flat(), nn.Softmax(1)), "0.1", 2
    ).fit(torch.randn(40, 6), 0, progress=False),
    "torch.fx cannot follow the model up to layer ...": lambda: maps(Decides(), "relu", LRP, rows()),
    "GuidedBackprop has no rule for ...": lambda: maps(
        nn.Sequential(nn.Linear(6, 5), nn.ReLU6(), nn.Linear(5, 3)), "1", GuidedBackprop, rows()
    ),
    "attributions of DeepLift should sum to the x-feature's difference from the baseline, and are ...": lambda: maps(
        nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)), "1", DeepLift, rows()
    ),
    "... needs floating-point inputs, and input ... is torch.int64": lambda: maps(words(), "3", Saliency, ids()),
    "LayerGradCam needs a layer with feature maps (N, C, H, W), ...": lambda: maps(flat(), "3", LayerGradCam, rows()),
    "layer ... does not run before the explained layer ...": lambda: maps(
        flat(), "1", FromCaptum(LayerIntegratedGradients, layer="3"), rows()
    ),
}

WORKS = None
# Captum's words: how to get them, the same here, and what is said here, if not the maps.
CAPTUMS = {
    "Forward hook did not obtain any outputs for given layer": (
        lambda: LayerGradCam(m := Unused(), m.relu).attribute(rows(), target=0),
        lambda: maps(Unused(), "relu", InputXGradient, rows()),
        "layer 'relu' never ran in the forward pass of Unused",
    ),
    "A Module ReLU() was detected that does not contain some of the input/output attributes": (
        lambda: DeepLift(Reused()).attribute(rows(), target=0),
        lambda: maps(Reused(), "relu", DeepLift, rows()),
        WORKS,
    ),
    "is being used more than once in the network, which is not supported by LRP": (
        lambda: LRP(Reused()).attribute(rows(), target=0),
        lambda: maps(Reused(), "relu", LRP, rows()),
        WORKS,
    ),
    "Module of type <class 'torch.nn.modules.flatten.Flatten'> has no rule defined and nodefault rule exists": (
        lambda: LRP(pictures()).attribute(images(), target=0),
        lambda: maps(pictures(), "4", LRP, images()),
        WORKS,
    ),
    "'NoneType' object has no attribute 'relevance_input'": (after_an_error, after_an_error_here, WORKS),
    "'NoneType' object has no attribute 'relevance_output'": (
        lambda: LayerLRP(m := flat(), m[1]).attribute(rows(), target=0),
        lambda: maps(flat(), "3", FromCaptum(LayerLRP, layer="1"), rows()),
        "LayerLRP cannot stop at layer '1', a ReLU, .* name the layer before it",
    ),
    "Given model must be an instance of torch.nn.Module to properly hook ReLU layers.": (
        lambda: GuidedBackprop(lambda x: x),
        lambda: XNNAttribution(lambda x: x, "1"),
        "wrap the function in a module",
    ),
    "Backward hooks not supported for module with >1 input": (
        lambda: GuidedBackprop(ByKeyword()).attribute(rows(), target=0),
        lambda: maps(ByKeyword(), "relu", GuidedBackprop, rows()),
        WORKS,
    ),
    "'str' object has no attribute 'register_forward_hook'": (
        lambda: LayerGradCam(pictures(), "1").attribute(images(), target=0),
        lambda: maps(pictures(), "4", FromCaptum(LayerGradCam, layer="1"), images()),
        WORKS,
    ),
    "`inputs` must be a torch.Tensor or a tuple[torch.Tensor] but found: <class 'list'>": (
        lambda: Saliency(flat()).attribute([rows()], target=0),
        lambda: OneHeatmap(flat()).attribute([rows()], target=0),
        r"`inputs` must be a torch.Tensor or a tuple\[torch.Tensor\] but found: <class 'list'>",
    ),
    "Target type <class 'numpy.int64'> is not valid.": (
        lambda: Saliency(flat()).attribute(rows(), target=np.int64(1)),
        lambda: maps(flat(), "1", Saliency, rows(), target=np.int64(1)),
        WORKS,
    ),
    "Target not provided when necessary, cannot take gradient with respect to multiple outputs.": (
        lambda: Saliency(flat()).attribute(rows()),
        lambda: maps(flat(), "1", Saliency, rows(), target=None),
        r"target None does not pick one of the model's outputs \(3,\) per example",
    ),
    "Target list length does not match output!": (
        lambda: Saliency(flat()).attribute(rows(), target=[0, 1, 2]),
        lambda: maps(flat(), "1", Saliency, rows(), target=[1, 1, 1]),
        "there are 3 targets for 4 examples; pass one for each",
    ),
    "Cannot choose target column with output shape torch.Size([2]).": (
        lambda: Saliency(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))).attribute(rows(2), target=0),
        lambda: OneHeatmap(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), Saliency).attribute(rows(2), target=0),
        r"target is 0, and a model with outputs \(N,\) or \(N, 1\) takes no target; leave target out",
    ),
    "element 0 of tensors does not require grad and does not have a grad_fn": (
        lambda: under_inference(IntegratedGradients(flat()).attribute),
        lambda: under_inference(partial(maps, flat(), "1", IntegratedGradients)),
        WORKS,
    ),
    "Setting requires_grad=True on inference tensor outside InferenceMode is not allowed.": (
        lambda: Saliency(flat()).attribute(made_under_inference(rows), target=0),
        lambda: maps(flat(), "1", Saliency, made_under_inference(rows)),
        WORKS,
    ),
    "One of the differentiated Tensors does not require grad": (
        lambda: Saliency(words()).attribute(ids(), target=0),
        lambda: maps(words(), "3", Saliency, ids()),
        "where they are token ids, draw the maps at the embedding",
    ),
    "'function' object has no attribute '__wrapped__'": (
        lambda: NoiseTunnel(Undecorated(flat())).attribute(rows(), target=0, nt_samples=2),
        lambda: maps(flat(), "1", FromCaptum(NoiseTunnel, attribution_method=Undecorated, nt_samples=2), rows()),
        WORKS,
    ),
    "view size is not compatible with input tensor's size and stride": (
        lambda: sensitivity_max(Saliency(pictures()).attribute, last(images()), target=0),
        lambda: sensitivity_max(OneHeatmap(pictures(), Saliency).attribute, last(images()), target=0, feature=0),
        WORKS,
    ),
    "Input type (float) and bias type (c10::BFloat16) should be the same": (
        lambda: NoiseTunnel(Saliency(pictures().bfloat16())).attribute(images().bfloat16(), target=0, nt_samples=2),
        lambda: maps(
            pictures().bfloat16(),
            "4",
            FromCaptum(NoiseTunnel, attribution_method=Saliency, nt_samples=2),
            images().bfloat16(),
        ),
        WORKS,
    ),
    "Cannot normalize by scale factor = 0": (
        lambda: visualization.visualize_image_attr(np.zeros((4, 4, 1)), use_pyplot=False),
        lambda: torch.ones(1),  # a picture, in test_captum_integration
        WORKS,
    ),
}


def test_the_page_has_these_messages():
    ours, captums = on_the_page()
    assert ours == list(OURS) and captums == list(CAPTUMS)


@pytest.mark.parametrize("message", OURS)
def test_our_messages(message):
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    with pytest.raises(Exception, match=pattern) as error:
        OURS[message]()
    assert re.match(pattern, str(error.value)), "the page quotes the beginning"


@pytest.mark.parametrize("message", CAPTUMS)
def test_captums_messages(message):
    """The words are Captum's; here is something else, as the page says."""
    captums, same, said = CAPTUMS[message]
    with pytest.raises(Exception, match=re.escape(message)):
        captums()
    if said is WORKS:
        result = same()
        assert bool(result.isfinite().all())
    else:
        with pytest.raises((AssertionError, LookupError, RuntimeError, TypeError, ValueError), match=said):
            same()


def test_layers_that_captum_reads_by_name_alone():
    """As the page says of layers, by name or as a module."""
    assert issubclass(XNNAttribution, LayerAttribution)
    model = flat()
    assert XNNAttribution(model, "1").layer is XNNAttribution(model, model[1]).layer is model[1]
