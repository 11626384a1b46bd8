"""The page "Models that need care": every kind of model is right, right with an argument, or refused. Writes its table.

A kind is right where the model's own code, run by torch alone, gives the same numbers: a hook that puts the mean of
the layer's output in its place gives the bias, and contributions are what the output is above it. x-features of learned
forms are those of their encoder on the layer's output that a hook reads.

    python tests/test_models_page.py       # writes docs/models_that_need_care.inc anew
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.layers import EveryCall
from captum_xnn.models import ContributionGroups

TABLE = Path(__file__).resolve().parents[1] / "docs" / "models_that_need_care.inc"
N = 40
LEARNED = partial(SRAE, hidden=(8,))
ALL = torch.ones(N, dtype=torch.bool)


class Net(nn.Module):
    """Modules by name, and the code of a forward pass."""

    def __init__(self, code, **modules):
        super().__init__()
        self.code = code
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self.code(self, *inputs)


class Masked(nn.Module):
    """A text model with an optional mask."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids, mask=None):
        mask = torch.ones_like(ids) if mask is None else mask
        h = self.mix(self.embedding(ids)).relu()
        return self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Pair(nn.Module):
    """Needs an image and a table."""

    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(1, 3, 3), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, image, table):
        h = torch.cat([self.conv(image).relu().mean((2, 3)), table], 1)
        return self.head(self.hidden(h).tanh())


class Kind(NamedTuple):
    """One kind of model."""

    make: Callable[[], nn.Module]
    layer: str
    inputs: tuple[torch.Tensor, ...]
    """As the model takes them."""
    data: Any = None
    """What fit is given, where it is not the inputs."""
    argument: str = ""
    """How the settings are written."""
    settings: dict[str, Any] | None = None
    raw: Callable[[Any], torch.Tensor] = lambda output: output
    """Makes the layer's output the tensor Z."""
    put: Callable[[Any, torch.Tensor], Any] = lambda _output, Z: Z
    """Puts another Z into the layer's output."""
    logits: Callable[[Any], torch.Tensor] = lambda output: output
    target: Any = 0
    over: tuple[int, ...] = (0,)
    """Dimensions of Z over which the base is one number."""


def rand(*shape):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(3))


def ids():
    return torch.randint(1, 20, (N, 6), generator=torch.Generator().manual_seed(3))


def mask():
    made = torch.ones(N, 6, dtype=torch.long)
    made[::2, 3:] = 0
    return made


def mlp(*end):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), *end)


def cnn():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(mlp(), rand(6))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.ReLU(), nn.Linear(5, 3)))


class Augmented:
    """Batches with other noise each time they are read."""

    runs = 0

    def __iter__(self):
        self.runs += 1
        yield rand(6) + 0.1 * self.runs


def residual(self, x):
    h = self.first(x).relu()
    return self.head((h + self.block(h)).relu())


def vit(self, x):
    cells = self.patch(x).flatten(2).mT
    return self.head(self.encoder(torch.cat([cells[:, :1] * 0, cells], 1))[:, 0])


def channels_last(self, x):
    return self.head(self.act(self.norm(self.patch(x).permute(0, 2, 3, 1))).mean((1, 2)))


def permuted(self, x):
    return self.head(self.act(self.conv(x.permute(0, 3, 1, 2))).mean((2, 3)))


def in_place(self, x):
    x = x.view(x.shape)  # of the same memory
    x.mul_(2)
    return self.head(self.layer(x).tanh())


def padded(self, x):
    padding = x == 0
    h = self.encoder(self.embedding(x), src_key_padding_mask=padding)
    return self.head(h.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True))


def steps(self, x):
    state = torch.zeros(len(x), 5)
    for step in x.unbind(1):
        state = self.layer(step, state)
    return self.head(state)


def neighbours(self, x):
    h = self.layer(x)
    return self.head((h @ h.mT).softmax(1) @ h)


def routed(self, x):
    return F.one_hot(self.layer(x).argmax(1), 5).float() @ self.head.weight.T


def frozen(self, x):
    h = self.layer(x)
    with torch.no_grad():
        return self.head(h.tanh())


def switching(self, x):
    h = self.layer(x)
    return self.head(h if torch.is_grad_enabled() else (h * 4).round() / 4)


@dataclass(frozen=True)
class Made:
    """What a layer or a model of research code returns."""

    hidden: torch.Tensor | None
    logits: torch.Tensor | None


def hidden(made):
    return made.hidden


def first(output):
    return output[0]


def time_first(output):
    return output[0].transpose(0, 1)


def centred(y):
    return y - y.mean(1, keepdim=True)


def log_centred(y):
    return centred(y.log())


logit = partial(torch.logit, eps=1e-6)
encoder = partial(nn.TransformerEncoderLayer, 8, 2, 16, batch_first=True)
TEXTS = [{"labels": torch.arange(20) % 3, "mask": mask()[i : i + 20], "ids": ids()[i : i + 20]} for i in (0, 20)]

KINDS = {
    "a perceptron": Kind(mlp, "1", (rand(6),)),
    "a convolutional network with ReLU in place": Kind(cnn, "1", (rand(3, 8, 8),), over=(0, 2, 3)),
    "instance norm behind feature maps": Kind(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True),
                              nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        "1", (rand(3, 8, 8),), over=(0, 2, 3)),
    "one branch of a residual block (the bias differs between examples)": Kind(
        lambda: Net(residual, first=nn.Linear(6, 8), block=nn.Linear(8, 8), head=nn.Linear(8, 3)), "block", (rand(6),)),
    "a vision transformer, at its tokens": Kind(
        lambda: Net(vit, patch=nn.Conv2d(3, 8, 4, 4), encoder=encoder(), head=nn.Linear(8, 3)),
        "encoder", (rand(3, 8, 12),)),
    "channels last, as in Swin and inside ConvNeXt": Kind(
        lambda: Net(channels_last, patch=nn.Conv2d(3, 8, 4, 4), norm=nn.LayerNorm(8), act=nn.GELU(),
                    head=nn.Linear(8, 3)), "act", (rand(3, 32, 32),), over=(0, 1, 2)),
    "images given as (N, H, W, C), which the model permutes": Kind(
        lambda: Net(permuted, conv=nn.Conv2d(3, 4, 3), act=nn.ReLU(), head=nn.Linear(4, 3)), "act",
        (rand(9, 12, 3),), over=(0, 2, 3)),
    "work in place on the inputs": Kind(
        lambda: Net(in_place, layer=nn.Linear(6, 5), head=nn.Linear(5, 3)), "layer", (rand(6),)),
    "a padded transformer of token ids": Kind(
        lambda: Net(padded, embedding=nn.Embedding(20, 8), encoder=nn.TransformerEncoder(encoder(), 1),
                    head=nn.Linear(8, 3)), "encoder", (ids() * mask(),)),
    "segmentation, one pixel": Kind(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)), "1", (rand(3, 8, 8),),
        target=(1, 2, 2), over=(0, 2, 3)),
    "regression with outputs (N,)": Kind(
        lambda: nn.Sequential(*mlp()[:2], nn.Linear(8, 1), nn.Flatten(0)), "1", (rand(6),), target=None),
    "two inputs": Kind(Pair, "hidden", (rand(1, 6, 6), rand(5))),
    "weights by a parametrization": Kind(
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), *mlp()[1:]), "1", (rand(6),)),
    "nn.DataParallel around the model": Kind(lambda: nn.DataParallel(mlp()), "1", (rand(6),)),
    "a recurrent cell, called step by step": Kind(
        lambda: Net(steps, layer=nn.GRUCell(2, 5), head=nn.Linear(5, 3)), "layer", (rand(4, 2),)),
    "a layer that returns a tuple, as an LSTM": Kind(
        lambda: Net(lambda self, x: self.head(self.layer(x)[0][:, -1].relu()), layer=nn.LSTM(3, 5, batch_first=True),
                    head=nn.Linear(5, 3)), "layer", (rand(4, 3),), raw=first, put=lambda made, Z: (Z, made[1]),
        argument="output_transform=lambda output: output[0]", settings={"output_transform": first}),
    "a layer whose examples come second, as an LSTM by default": Kind(
        lambda: Net(lambda self, x: self.head(self.layer(x.transpose(0, 1))[0][-1].relu()), layer=nn.LSTM(3, 5),
                    head=nn.Linear(5, 3)), "layer", (rand(4, 3),), raw=time_first,
        put=lambda made, Z: (Z.transpose(0, 1), made[1]),
        argument="output_transform=lambda output: output[0].transpose(0, 1)",
        settings={"output_transform": time_first}),
    "a layer and a model that return dataclasses": Kind(
        lambda: Net(lambda self, x: Made(None, self.head(self.layer(x).hidden.relu())),
                    layer=Net(lambda self, x: Made(self.linear(x), None), linear=nn.Linear(6, 8)),
                    head=nn.Linear(8, 3)), "layer", (rand(6),), raw=hidden, put=lambda made, Z: Made(Z, made.logits),
        logits=lambda made: made.logits,
        argument="output_transform=lambda output: output.hidden, prediction_transform=lambda output: output.logits",
        settings={"output_transform": hidden, "prediction_transform": lambda made: made.logits}),
    "an output that is a dict": Kind(
        lambda: Net(lambda self, x: {"logits": self.head(self.layer(x).relu())}, layer=nn.Linear(6, 8),
                    head=nn.Linear(8, 3)), "layer", (rand(6),), logits=lambda made: made["logits"],
        argument='prediction_transform=lambda output: output["logits"]',
        settings={"prediction_transform": lambda made: made["logits"]}),
    "batches that are dicts with the names of arguments": Kind(Masked, "mix", (ids(), mask()), data=TEXTS),
    "batches of (ids, mask, labels) for an optional mask": Kind(
        Masked, "mix", (ids(), mask()), data=[(ids(), mask(), torch.arange(N))],
        argument="unpack=lambda batch: (batch[0], batch[1])", settings={"unpack": lambda batch: (batch[0], batch[1])}),
    "batches of (image, table, label) for two inputs": Kind(
        Pair, "hidden", (rand(1, 6, 6), rand(5)), data=[(rand(1, 6, 6), rand(5), torch.arange(N))],
        argument="unpack=lambda batch: (tuple(batch[:2]), None)",
        settings={"unpack": lambda batch: (tuple(batch[:2]), None)}),
    "a softmax at the end": Kind(
        lambda: mlp(nn.Softmax(1)), "1", (rand(6),), logits=log_centred,
        argument="prediction_transform=lambda y: y.log() - y.log().mean(1, keepdim=True)",
        settings={"prediction_transform": log_centred}),
    "a log_softmax at the end": Kind(
        lambda: mlp(nn.LogSoftmax(1)), "1", (rand(6),), logits=centred,
        argument="prediction_transform=lambda y: y - y.mean(1, keepdim=True)",
        settings={"prediction_transform": centred}),
    "a sigmoid at the end": Kind(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), Net(lambda _, y: 9 * y), nn.Sigmoid()), "1",
        (rand(6),), logits=logit, target=None, argument="prediction_transform=functools.partial(torch.logit, eps=1e-6)",
        settings={"prediction_transform": logit}),
    "a layer called side by side, as in Siamese towers": Kind(
        lambda: Net(lambda self, a, b: self.head(torch.cat([self.layer(a), self.layer(b)], 1).tanh()),
                    layer=nn.Linear(6, 5), head=nn.Linear(10, 3)), "layer", (rand(6), rand(7)[:, 1:]),
        argument="output_transform=EveryCall(), autoencoder=SRAE",
        settings={"output_transform": EveryCall(), "autoencoder": LEARNED}),
    "argmax or hard routing behind the layer": Kind(
        lambda: Net(routed, layer=nn.Linear(6, 5), head=nn.Linear(5, 3)), "layer", (rand(6),),
        argument="autoencoder=SRAE", settings={"autoencoder": LEARNED}),
    "torch.no_grad behind the layer": Kind(
        lambda: Net(frozen, layer=nn.Linear(6, 5), head=nn.Linear(5, 3)), "layer", (rand(6),),
        argument="autoencoder=SRAE", settings={"autoencoder": LEARNED}),
    "a scripted part behind the layer": Kind(
        lambda: Net(lambda self, x: self.rest(self.layer(x)), layer=nn.Linear(6, 5), rest=scripted()), "layer",
        (rand(6),)),
    "torch.inference_mode around the model's own forward": Kind(
        lambda: Net(torch.inference_mode()(lambda self, x: self.head(self.layer(x).relu())), layer=nn.Linear(6, 5),
                    head=nn.Linear(5, 3)), "layer", (rand(6),)),
    "data with random augmentation, or in another order each time": Kind(mlp, "1", (rand(6),), data=Augmented()),
    "examples that depend on each other, as in a graph over the batch": Kind(
        lambda: Net(neighbours, layer=nn.Linear(6, 5), head=nn.Linear(5, 3)), "layer", (rand(6),)),
    "batch norm without running statistics": Kind(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), *mlp()[1:]), "2",
        (rand(6),)),
    "another implementation without gradients": Kind(
        lambda: Net(switching, layer=nn.Linear(6, 5), head=nn.Linear(5, 3)), "layer", (rand(6),)),
    "a layer that is used as a weight and never called": Kind(
        lambda: Net(lambda self, x: self.head(F.linear(x, self.layer.weight).relu()), layer=nn.Linear(6, 5),
                    head=nn.Linear(5, 3)), "layer", (rand(6),)),
    "a layer beside the way to the output": Kind(
        lambda: Net(lambda self, x: (self.layer(x), self.head(x))[1], layer=nn.Linear(6, 5), head=nn.Linear(6, 3)),
        "layer", (rand(6),)),
    "torch.jit.trace": Kind(traced, "1", (rand(6),)),
}  # fmt: skip


def fitted(kind, model, settings):
    """Return an XNN that was fitted, and the first warning or error."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            xnn = XNNAttribution(model, kind.layer, 3, recipe=Recipe(steps=12), **settings)
            data = kind.inputs if kind.data is None else kind.data
            xnn.fit(data, kind.target, positives=ALL, progress=False)
        except (TypeError, ValueError, RuntimeError) as error:
            return None, str(error)
    told = next((str(w.message) for w in seen if issubclass(w.category, UserWarning)), "")
    return xnn, told


def copies(inputs):
    """Copy inputs, as a model may work in place."""
    return tuple(x.clone() for x in inputs)


def chosen(kind, output):
    """Return the explained output of all examples, (N,)."""
    y, target = kind.logits(output), kind.target
    index = () if target is None else (target,) if isinstance(target, int) else target
    return y.reshape(N) if target is None else y[(slice(None), *index)]


@contextmanager
def hooked(layer, hook):
    """A hook on a layer, and torch's fused transformer off, which skips layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    handle = layer.register_forward_hook(hook)
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()
        torch.backends.mha.set_fastpath_enabled(before)


def is_right(kind, model, xnn):
    """Whether numbers are those that torch alone gives with hooks on the layer."""
    plain = (model.module if isinstance(model, nn.DataParallel) else model).eval()
    layer, calls = plain.get_submodule(kind.layer), []
    with hooked(layer, lambda _m, _i, output: calls.append(kind.raw(output).clone())):
        y = chosen(kind, plain(*copies(kind.inputs)))
    inputs, additional = kind.inputs if len(kind.inputs) > 1 else kind.inputs[0], None
    if isinstance(plain, Masked):
        inputs, additional = kind.inputs
    why = xnn.contributions(inputs, kind.target, additional)
    assert torch.allclose(why.prediction, y, atol=1e-4)
    form = xnn.explainer(kind.target).form
    if not isinstance(form, ContributionGroups):
        Z = torch.stack(calls, 1) if len(calls) > 1 else calls[0]
        return torch.allclose(why.features, form.encode(Z), atol=1e-4)
    base = calls[-1].mean(kind.over, keepdim=True).expand_as(calls[-1])
    count = 0

    def replace(_module, _inputs, output):
        nonlocal count
        count += 1
        return kind.put(output, base.clone()) if count == len(calls) else None

    with hooked(layer, replace):
        bias = chosen(kind, plain(*copies(kind.inputs)))
    deviation = float(y.std())
    adds_up = torch.allclose(why.contributions.sum(1), y - bias, atol=0.03 * deviation)
    return adds_up and torch.allclose(why.bias, bias, atol=1e-3 * deviation + 1e-5)


@functools.cache
def verdict(name):
    """Return what a kind comes to, and what is told of it without the argument."""
    kind = KINDS[name]
    torch.manual_seed(0)
    model = kind.make()
    xnn, told = fitted(kind, model, {})
    if not kind.argument:
        if xnn is None:
            return "refused", told
        assert not told, (name, told)
        assert is_right(kind, model, xnn), name
        return "right", ""
    assert told, f"{name} needs {kind.argument}, and nobody is told"
    xnn, more = fitted(kind, model, kind.settings or {})
    assert xnn is not None, (name, more)
    assert not more, (name, more)
    assert is_right(kind, model, xnn), name
    return f"right with ``{kind.argument}``", told


def table():
    """Return the text of the page's table."""
    lines = [".. Written by tests/test_models_page.py.", "", ".. list-table::", "   :header-rows: 1"]
    lines += ["   :widths: 30 30 40", ""]
    lines += ["   * - model or data", "     - fit and explain", "     - message"]
    for name in KINDS:
        outcome, told = verdict(name)
        told = re.sub(r"`([^`]*)`", r"``\1``", re.sub(r"0\.\d+", "...", told))
        lines += [f"   * - {name}", f"     - {outcome}", f"     - {told}"]
    return "\n".join(line.rstrip() for line in lines) + "\n"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_right_or_told(kind):
    outcome, told = verdict(kind)
    row = TABLE.read_text().partition(f"* - {kind}\n")[2]
    assert row.lstrip().startswith(f"- {outcome}\n"), f"{outcome}; write it anew: python tests/test_models_page.py"
    assert (outcome == "right") == (not told)


def test_the_table_of_the_docs_is_true():
    assert TABLE.read_text() == table(), "write it anew: python tests/test_models_page.py"


if __name__ == "__main__":
    TABLE.write_text(table())
    sys.stdout.write(TABLE.read_text())
