"""Every backend on every kind of model: right, repaired, or refused with its reason. Writes the table of the docs.

A backend is right where it equals Captum's own class, called once for each x-feature on a network that runs the model
as it is, and repaired where that class alone is wrong. What is right for the methods that replace derivatives, an
oracle of another kind tells: DeepLift sums to a difference; LRP with its default rules is input times gradient on
networks of ReLUs; guided methods are derivatives by a ReLU with another derivative.

    python tests/test_backends.py       # writes docs/backends.inc anew
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._trace import trace
from captum_xnn.models import SRAE

K = 2
TABLE = Path(__file__).resolve().parents[1] / "docs" / "backends.inc"
close = {"rtol": 1e-4, "atol": 1e-5}


class Own(ca.Attribution):
    """A user's own class: the derivative by finite differences, along the input."""

    def attribute(self, inputs, target=None, additional_forward_args=None, step=1e-4):
        with torch.no_grad():
            rows = torch.arange(len(inputs))
            ahead, behind = (self.forward_func(inputs * (1 + s))[rows, target] for s in (step, -step))
        return ((ahead - behind) / (2 * step)).reshape(-1, *[1] * (inputs.dim() - 1)).expand_as(inputs)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(11, 6), nn.LSTM(6, 8, batch_first=True)
        self.hidden, self.head = nn.Sequential(nn.Linear(8, 7), nn.ReLU()), nn.Linear(7, 3)

    def forward(self, ids):
        return self.head(self.hidden(self.lstm(self.embedding(ids))[0][:, -1]))


@dataclass(frozen=True)
class Case:
    model: nn.Module
    layer: str
    x: torch.Tensor
    inner: str | None = None
    """The layer that layer methods explain, the backend's own choice if None."""
    mask: torch.Tensor | None = None
    window: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def cases(torchvision):
    models, g = torchvision.models, torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    def images(size):
        cells = torch.arange(size * size).reshape(1, 1, size, size)
        mask = 2 * (cells // size // (size // 2)) + cells % size // (size // 2)
        x = torch.randn(2, 3, size, size, generator=g, dtype=torch.float64)
        return {"x": x, "mask": mask, "window": (3, size // 2, size // 2)}

    cnn = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 9),
        nn.ReLU(), nn.Linear(9, 4),
    )  # fmt: skip
    mlp = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    vgg = models.vgg11(weights=None)
    vgg.classifier = nn.Linear(25088, 10)
    dense = models.DenseNet(8, (2, 2), 8, num_classes=10)
    vit = models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=6)
    nn.init.normal_(vit.heads.head.weight)
    found = {
        "CNN": Case(cnn, "7", **images(14)),
        "VGG": Case(vgg, "avgpool", **images(32)),
        "ResNet": Case(models.resnet18(weights=None, num_classes=10), "avgpool", **images(32)),
        "DenseNet": Case(dense, "features", inner="features.transition1.conv", **images(32)),
        "ViT": Case(vit, "heads", **images(16)),
        "LSTM": Case(Text(), "hidden", torch.randint(1, 11, (2, 5), generator=g), "embedding", None, (2,)),
        "MLP": Case(mlp, "3", torch.randn(2, 10, generator=g, dtype=torch.float64), "0", None, (2,)),
    }
    for case in found.values():
        for module in case.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.2, generator=g)
        case.model.to(torch.float64).eval()
    return found


def methods(case):
    masked = {} if case.mask is None else {"feature_mask": case.mask}
    baseline = {"baselines": torch.zeros_like(case.x[:1])}
    return {
        "Saliency": {},
        "InputXGradient": {},
        "IntegratedGradients": {"n_steps": 8},
        "GradientShap": {"n_samples": 3, **baseline},
        "DeepLift": {},
        "DeepLiftShap": {"baselines": torch.zeros_like(case.x)},
        "GuidedBackprop": {},
        "Deconvolution": {},
        "LRP": {},
        "GuidedGradCam": {"layer": case.inner} if case.inner else {},
        "LayerGradCam": {"layer": case.inner} if case.inner else {},
        "LayerIntegratedGradients": {"n_steps": 8, **({"layer": case.inner} if case.inner else {})},
        "LayerGradientXActivation": {"layer": case.inner} if case.inner else {},
        "LayerConductance": {"n_steps": 8, **({"layer": case.inner} if case.inner else {})},
        "InternalInfluence": {"n_steps": 8, **({"layer": case.inner} if case.inner else {})},
        "LayerActivation": {},
        "Occlusion": {"sliding_window_shapes": case.window, "strides": case.window},
        "FeatureAblation": masked,
        "ShapleyValueSampling": {"n_samples": 2, **masked},
        "KernelShap": {"n_samples": 12, **masked},
        "Lime": {"n_samples": 12, "interpretable_model": SkLearnLinearRegression(), **masked},
        "NoiseTunnel": {"attribution_method": ca.Saliency, "nt_samples": 3},
        "a class of one's own": {},
    }


class Whole(nn.Module):
    """The whole model, and the encoder on what a hook sees."""

    def __init__(self, model, layer, srae):
        super().__init__()
        self.model, self.form, self.kept = model, srae, [layer]

    def forward(self, *inputs):
        seen = []
        handle = self.kept[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
        try:
            self.model(*inputs)
        finally:
            handle.remove()
        return self.form.encode(seen[-1])


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward_mask):
        ctx.save_for_backward(x)
        ctx.forward_mask = forward_mask
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        return g.clamp(min=0) * ((ctx.saved_tensors[0] > 0) if ctx.forward_mask else 1), None


class GuidedMode(TorchFunctionMode):
    """Replaces every ReLU, by whatever name it is called."""

    def __init__(self, forward_mask):
        super().__init__()
        self.forward_mask = forward_mask

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("relu", "relu_"):
            return Guided.apply(args[0], self.forward_mask)
        return func(*args, **(kwargs or {}))


def guided(whole, x, k, forward_mask=True):
    leaf = x.clone().requires_grad_()
    with GuidedMode(forward_mask):
        E = whole(leaf)
    return torch.autograd.grad(E[:, k].sum(), leaf)[0]


def by_captum(name, whole, x, k, settings, inner):
    """Captum's class on the whole model."""
    rest = {key: v for key, v in settings.items() if key not in ("layer", "attribution_method", "interpretable_model")}
    if name == "NoiseTunnel":
        return ca.NoiseTunnel(ca.Saliency(whole)).attribute(x, target=k, **rest)
    method = Own if name.startswith("a class") else getattr(ca, name)
    construct = [inner] if "layer" in inspect.signature(method).parameters else []
    construct += [settings["interpretable_model"]] if name == "Lime" else []
    return method(whole, *construct).attribute(x, target=k, **rest)


def oracle(name, whole, x, k, settings, inner, case):
    """What the methods that replace derivatives must give; None where Captum's own word counts."""
    if name == "LRP":
        return ca.InputXGradient(whole).attribute(x, target=k)
    if name in ("GuidedBackprop", "Deconvolution"):
        return guided(whole, x, k, name == "GuidedBackprop")
    if name == "GuidedGradCam":
        cam = ca.LayerGradCam(whole, inner).attribute(x, target=k, relu_attributions=True)
        return F.interpolate(cam, x.shape[2:]) * guided(whole, x, k)
    return None


def sized(maps, x):
    if maps.shape[1:] != x.shape[1:] and maps.dim() == 4 == x.dim():
        return F.interpolate(maps.sum(1, keepdim=True), x.shape[2:], mode="bilinear", align_corners=False)
    return maps


def adds_up(maps, whole, x):
    with torch.no_grad():
        difference = (whole(x) - whole(0 * x))[:, :K]
    return torch.allclose(maps.flatten(2).sum(2), difference, rtol=1e-4, atol=1e-8)


def raised_here(error):
    """Whether the line that raised is this package's, and not Captum's."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals["__name__"].startswith("captum_xnn.")


def verdict(name, case):
    """Returns right, repaired, or the reason of a refusal; fails where it is none of these."""
    settings = methods(case)[name]
    torch.manual_seed(1)
    layer = find_layer(case.model, case.layer)[1]
    ran = trace(case.model, layer, (case.x[:1],))
    with torch.no_grad():
        width = ExplanationNetwork(case.model, layer, SRAE(1, K, hidden=()), trace=ran).activations(case.x[:1]).numel()
    srae = SRAE(width, K, hidden=(6,)).to(torch.float64).eval()
    network = ExplanationNetwork(case.model, layer, srae, trace=ran)
    inner = find_layer(case.model, case.inner or network.spatial_layer_name)[1]
    method = Own if name.startswith("a class") else getattr(ca, name)
    x = case.x[:1] if name in RANDOM else case.x

    def seeded():
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002 - some methods draw from the global state

    try:
        backend = FromCaptum(method, **settings)
        parts = []
        for features in [[k] for k in range(K)] if name in RANDOM else [range(K)]:
            seeded()
            parts.append(backend(network, (x,), features)[0])
        given = torch.cat(parts, 1)
    except (TypeError, ValueError, UnsupportedOperationError) as error:
        assert raised_here(error), error
        return str(error)
    assert bool(torch.isfinite(given).all())
    assert bool(given.any())
    whole = Whole(case.model, layer, srae)
    floating = x.is_floating_point()
    given_x = [x.clone().requires_grad_(floating) for _ in range(K)]
    sure = [oracle(name, whole, given_x[k], k, settings, inner, case) for k in range(K)]
    try:
        seen = []
        for k in range(K):
            seeded()
            made = sized(by_captum(name, whole, given_x[k], k, settings, inner), x).detach()
            seen.append(made.to(given.dtype))  # some give float32, whatever the input
        captums = torch.stack(seen, 1)
    except (RuntimeError, TypeError, AttributeError, AssertionError):
        captums = None
    scale = given.abs().max()
    if sure[0] is not None:
        wanted = torch.stack([sized(s, x).detach() for s in sure], 1)
        torch.testing.assert_close(given / scale, wanted / scale, **close)
    elif name.startswith("DeepLift"):
        assert adds_up(given, whole, x)
        wanted = given
    else:
        assert captums is not None
        torch.testing.assert_close(given / scale, captums / scale, **close)
        return "right"
    same = (
        captums is not None
        and captums.shape == wanted.shape
        and torch.allclose(captums / scale, wanted / scale, **close)
    )
    return "right" if same else "repaired"


RANDOM = ("GradientShap", "ShapleyValueSampling", "KernelShap", "Lime", "NoiseTunnel")


def table(torchvision):
    """Returns the text of the page's table, and the reasons below it."""
    found, reasons = {}, []
    for column, case in cases(torchvision).items():
        for name in methods(case):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = verdict(name, case)
            if said not in ("right", "repaired"):
                said = said.replace("Own" if name.startswith("a ") else name, "...").replace(
                    "Saliency needs", "... needs"
                )
                said = re.sub(r"\d+%", "... %", said)
                if said not in reasons:
                    reasons.append(said)
                said = f"refused [{reasons.index(said) + 1}]"
            found[name, column] = said
    columns = list(dict.fromkeys(column for _, column in found))
    lines = [".. Written by tests/test_backends.py.", "", ".. list-table::", "   :header-rows: 1", ""]
    lines += ["   * - backend", *(f"     - {column}" for column in columns)]
    for name in dict.fromkeys(name for name, _ in found):
        lines += [f"   * - {name}", *(f"     - {found[name, column]}" for column in columns)]
    lines += ["", "Refused with:", ""]
    lines += [f"{i}. ``{reason}``" for i, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_the_table_of_the_docs_is_true(torchvision):
    assert TABLE.read_text() == table(torchvision), "write it anew: python tests/test_backends.py"


if __name__ == "__main__":
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    text = table(torchvision)
    TABLE.write_text(text)
    sys.stdout.write(text)
