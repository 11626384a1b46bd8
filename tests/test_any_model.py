"""One life cycle on models of every build: fit, explain, numbers that add up, and a model that is exactly as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from captum.attr import DeepLift, GuidedBackprop, InputXGradient, Occlusion, Saliency
from torch import nn
from torch.nn import functional as F

from captum_xnn import SRAE, ConvSRAE, Recipe, XNNAttribution
from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.heatmaps import FromCaptum

K = 2


class Residual(nn.Module):
    """A functional sum, and one ReLU in place that is used three times."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, 4, 3, padding=1) for i in (1, 4, 4))
        self.norm, self.relu, self.head = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(x + self.norm(self.b(self.relu(self.a(x)))))
        return self.head(x.mean((2, 3)))


class Functional(nn.Module):
    """Operations only, but for one module that can be hooked."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 1, 3, 3)), nn.Parameter(torch.randn(3, 36) / 6)
        self.layer = nn.Identity()

    def forward(self, x):
        x = F.relu_(F.conv2d(x, self.w1))
        return F.linear(self.layer(F.max_pool2d(x, 2)).flatten(1), self.w2)


class Reused(nn.Module):
    """The explained layer runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.block, self.head = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5), nn.ReLU()), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.block(self.block(self.first(x))))


class Backbone(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(6, 5), form

    def forward(self, x):
        x = self.linear(x).tanh()
        return {"deep": x, "shape": x.shape} if self.form == "dict" else (x, None)


class Container(nn.Module):
    """The explained layer gives a dict or a tuple, and so may the model."""

    def __init__(self, form, output=None):
        super().__init__()
        self.backbone, self.head, self.output = Backbone(form), nn.Linear(5, 3), output

    def forward(self, x):
        found = self.backbone(x)
        y = self.head(found["deep"] if isinstance(found, dict) else found[0])
        return {"logits": y, "loss": None} if self.output else y


class TwoInputs(nn.Module):
    """Two inputs, one further tensor with a row for each example, and a number."""

    def __init__(self):
        super().__init__()
        self.image, self.table = nn.Conv2d(1, 2, 3), nn.Linear(4, 8)
        self.layer, self.head = nn.ReLU(), nn.Linear(8, 3)

    def forward(self, image, table, scale, power):
        x = F.max_pool2d(self.image(image), 2).flatten(1) + self.table(table)
        return self.head(self.layer(x * scale[:, None]) ** power)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)
        self.encoder, self.pooled = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Identity()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.pooled(self.encoder(x).mean(1)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Table(nn.Module):
    """Regression: outputs (N, 1) or (N,)."""

    def __init__(self, flat):
        super().__init__()
        self.layers, self.flat = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), flat

    def forward(self, x):
        y = self.layers(x)
        return y[:, 0] if self.flat else y


def plain():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 6), nn.ReLU(),
        nn.Linear(6, 3),
    )  # fmt: skip


def in_training():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)
    ).train()


def dictionaries(output):
    return output["deep"]


@dataclass
class Case:
    make: Callable[[], nn.Module]
    layer: str
    shapes: tuple[tuple[int, ...], ...]
    target: Any = 0
    settings: dict[str, Any] = field(default_factory=dict)
    further: bool = False
    conv: bool = False


IMAGE, VECTOR = ((1, 8, 8),), ((6,),)
CASES = {
    "plain CNN": Case(plain, "5", IMAGE),
    "plain CNN, feature maps": Case(plain, "1", IMAGE, conv=True),
    "plain CNN, feature maps as vectors": Case(plain, "2", IMAGE),
    "residual, reused ReLU in place": Case(Residual, "relu", IMAGE, conv=True),
    "residual, a convolution": Case(Residual, "a", IMAGE, conv=True),
    "functional": Case(Functional, "layer", IMAGE, conv=True),
    "reused layer": Case(Reused, "block", VECTOR),
    "dict layer": Case(partial(Container, "dict"), "backbone", VECTOR, 1, {"output_transform": dictionaries}),
    "tuple layer": Case(partial(Container, "tuple"), "backbone", VECTOR, 1, {"output_transform": lambda o: o[0]}),
    "dict output": Case(
        partial(Container, "dict", "dict"),
        "backbone.linear",
        VECTOR,
        2,
        {"prediction_transform": lambda o: o["logits"]},
    ),
    "two inputs": Case(TwoInputs, "layer", ((1, 6, 6), (4,)), further=True),
    "transformer, pooled": Case(Tokens, "pooled", ((4, 6),)),
    "transformer, tokens": Case(Tokens, "encoder", ((4, 6),)),
    "transformer, inside": Case(
        Tokens, "encoder.layers.1.linear2", ((4, 6),), settings={"output_transform": lambda o: o.mean(1)}
    ),
    "LSTM": Case(Recurrent, "lstm", ((5, 3),), settings={"output_transform": lambda o: o[0][:, -1]}),
    "regression (N, 1)": Case(partial(Table, False), "layers.1", VECTOR, None),
    "regression (N,)": Case(partial(Table, True), "layers.1", VECTOR, None),
    "batch norm in training": Case(in_training, "5", VECTOR),
}


def snapshot(model):
    return (
        {k: (v.dtype, v.tolist()) for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [(sorted(vars(m)), *(list(getattr(m, h)) for h in vars(m) if h.endswith("hooks"))) for m in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [p.data_ptr() for p in model.parameters()],
    )


def drawn(case, n, dtype, device):
    inputs = tuple(torch.randn(n, *shape).to(device, dtype) for shape in case.shapes)
    further = ((torch.rand(n) + 0.5).to(device, dtype), 2) if case.further else None
    return inputs, further


def life(case, dtype, device, heatmap=None):
    """Fits, explains and checks everything that can be checked from outside; returns the explanation."""
    torch.manual_seed(4)  # weights with positives for every class
    model = case.make().to(device, dtype)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i != 1)
    before = snapshot(model)
    inputs, further = drawn(case, 64, dtype, device)
    rows = [slice(0, 40), slice(40, 64)]
    batches = [(tuple(x[r] for x in inputs), None if further is None else (further[0][r], further[1])) for r in rows]
    xnn = XNNAttribution(
        model,
        case.layer,
        K,
        recipe=Recipe(steps=12),
        autoencoder=ConvSRAE if case.conv else partial(SRAE, hidden=(8,)),
        heatmap=heatmap or FromCaptum(Saliency, abs=False),
        unpack=lambda batch: batch,
        **case.settings,
    )
    positives = None if case.target is None else torch.arange(64) % 2 == 0
    xnn.fit(batches, case.target, positives=positives, progress=False)
    some = tuple(x[:3].clone() for x in inputs)
    more = None if further is None else (further[0][:3], further[1])
    given = some if len(some) > 1 else some[0]
    why = xnn.explain(given, case.target, more)
    maps, delta = xnn.attribute(given, case.target, more, return_convergence_delta=True)
    assert snapshot(model) == before

    loose = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(why.bias + why.contributions.sum(1), why.surrogate, **loose)
    torch.testing.assert_close(delta, why.prediction - why.surrogate)
    for one, other, x in zip(*((m if isinstance(m, tuple) else (m,)) for m in (why.maps, maps, given)), strict=True):
        assert one.shape == (3, K, *x.shape[1:]) and one.dtype == dtype and one.device == x.device
        assert bool(torch.isfinite(one).all()) and not one.requires_grad and one.is_contiguous()
        assert torch.equal(one, other)
    reads_back(xnn, model, case, some, more, why)
    return xnn, why, some, more


def reads_back(xnn, model, case, inputs, more, why):
    """Prediction, x-features and surrogate from a plain forward pass with a hook of our own."""
    modes = [m.training for m in model.modules()]
    model.eval()
    seen = []
    handle = model.get_submodule(case.layer).register_forward_hook(
        lambda _m, _i, o: seen.append(o.clone() if isinstance(o, torch.Tensor) else o)
    )
    with torch.no_grad():
        output = model(*inputs, *(more or ()))
        handle.remove()
        for m, mode in zip(model.modules(), modes, strict=True):
            m.training = mode
        Z = case.settings.get("output_transform", lambda o: o)(seen[-1])
        y = case.settings.get("prediction_transform", lambda o: o)(output)
        y = y if y.dim() == 1 else y[:, case.target or 0]
        srae = xnn.explainer(case.target).form
        E = srae.encode(Z.to(why.surrogate.dtype))
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if Z.dtype not in HALF else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(why.prediction, y.to(why.prediction.dtype), **tolerance)
        torch.testing.assert_close(why.features, E, **tolerance)
        torch.testing.assert_close(why.surrogate, srae.head(E)[:, 0], **tolerance)


HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_life_in_float32(name):
    case = CASES[name]
    xnn, why, inputs, more = life(case, torch.float32, "cpu")
    assert why.surrogate.dtype == torch.float32
    gradients_by_hand(xnn, case, why, inputs, more)


def gradients_by_hand(xnn, case, why, inputs, more):
    """The maps are the gradients of the x-features, through the whole forward pass of the model."""
    model, seen = xnn.model, []
    modes = [m.training for m in model.modules()]
    model.eval()
    handle = model.get_submodule(case.layer).register_forward_hook(
        lambda _m, _i, o: seen.append(o.clone() if isinstance(o, torch.Tensor) else o)
    )
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    model(*leaves, *(more or ()))
    handle.remove()
    for m, mode in zip(model.modules(), modes, strict=True):
        m.training = mode
    E = xnn.explainer(case.target).form.encode(case.settings.get("output_transform", lambda o: o)(seen[-1]))
    for k in range(K):
        grads = torch.autograd.grad(E[:, k].sum(), leaves, retain_graph=True)
        for maps, grad in zip(why.maps if len(inputs) > 1 else (why.maps,), grads, strict=True):
            torch.testing.assert_close(maps[:, k], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_life_in_other_dtypes(name, dtype):
    _, why, *_ = life(CASES[name], dtype, "cpu")
    assert why.surrogate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_life_on_cuda(name, dtype):
    life(CASES[name], dtype, "cuda")


@pytest.mark.parametrize("method", [InputXGradient, GuidedBackprop, DeepLift])
@pytest.mark.parametrize("name", ["plain CNN", "two inputs", "batch norm in training", "LSTM"])
def test_life_with_methods_that_hook(name, method):
    if name == "LSTM" and method is not InputXGradient:  # which do not know the non-linearities inside
        with pytest.raises(
            UnsupportedOperationError, match=r"attributions of DeepLift should sum|has no rule for LSTM"
        ):
            life(CASES[name], torch.float32, "cpu", FromCaptum(method))
    else:
        life(CASES[name], torch.float32, "cpu", FromCaptum(method))


def test_life_with_occlusion():
    life(CASES["functional"], torch.float64, "cpu", FromCaptum(Occlusion, sliding_window_shapes=(1, 4, 4), strides=4))
