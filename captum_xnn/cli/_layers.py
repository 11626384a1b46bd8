"""List the layers of a model with type and output shape, and recommend layers to explain.

Two layers are recommended, where the model has them:

- *places*: the last layer whose output still has places (cells of an image, or tokens), and whose places matter;
- *vector*: the last hidden layer without places.

Everything that the output needs must pass through a recommended layer, and the forward pass must call it once. The
places of a layer matter where the gradient of the output reaches at least half of them. The last block of a vision
transformer fails this test: only its class token is read, so the block before is recommended.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.cli._configuration import Configuration, settings_in
from captum_xnn.cli._model_and_inputs import ModelAndInputs, needed, number_of
from captum_xnn.cli._model_files import IMAGENET_MEAN, load_model, torchvision_models
from captum_xnn.layers._grid import has_channels_last
from captum_xnn.layers._lookup import unwrap
from captum_xnn.layers._state import eager, untouched

__all__ = ["ListedLayer", "Recommended", "list_layers", "listed", "recommend", "run_layers", "table"]

# Share of a layer's places that the gradient must reach.
_REACHED = 0.5


class ListedLayer(NamedTuple):
    """One layer, as a forward pass left it."""

    name: str
    """Dotted name."""
    kind: str
    """Class of the module."""
    shape: tuple[int, ...] | None
    """Shape of the output for one input; of the first tensor where the layer returns several; None without a tensor."""
    calls: int
    """How often the forward pass called the layer."""
    several: bool
    """Whether the layer returns more than one tensor, so that it needs ``output_transform=``."""


class Recommended(NamedTuple):
    """Names of the layers to explain first."""

    places: str | None
    """The last layer whose places matter; None if the model has no such layer."""
    vector: str | None
    """The last hidden layer without places; None if the model has no such layer."""


class _Seen(NamedTuple):
    row: ListedLayer
    module: nn.Module
    output: Tensor | None
    order: int


def run_layers(arguments: argparse.Namespace) -> str:
    """List the layers, and return the text to print.

    Args:
        arguments: Arguments of the command.
    """
    return listed(Configuration.read(None, settings_in(arguments)))


def listed(configuration: Configuration) -> str:
    """List the layers of a configuration's model as text, with recommendations.

    The first input of ``data`` runs through the model. Without data it is one image of random numbers, of the size in
    the configuration or in the model's file. A torchvision model needs no weights.

    Args:
        configuration: Settings with at least a model.

    Raises:
        ValueError: If no model is named, the size of the images is unknown, or the model does not accept the input.
    """
    if configuration.data is not None and (configuration.torchvision is None or configuration.weights is not None):
        opened = ModelAndInputs.of(configuration)
        model, inputs = opened.model, next(iter(opened.inputs)).inputs[:1].to(opened.device)
    else:
        model, inputs = _without_data(configuration)
    try:
        return table(list_layers(model, inputs), recommend(model, inputs))
    except (IndexError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the model fails on an input {tuple(inputs.shape)} ({type(error).__name__}: {reason}); pass --size, or "
            "--data with inputs that the model takes"
        ) from error


def _without_data(configuration: Configuration) -> tuple[nn.Module, Tensor]:
    """Load the model, and make one image of random numbers."""
    size, channels = configuration.size, len(configuration.mean or IMAGENET_MEAN)
    if configuration.model is not None:
        file = load_model(configuration.model)
        model, size = file.model, size or file.preparation.size
        if file.preparation.encode is not None:
            raise ValueError("the model reads texts, and none are given; pass --data texts.txt, a text on each line")
        channels = len(configuration.mean or file.preparation.mean or IMAGENET_MEAN)
    else:
        name = needed(configuration, "torchvision", "--model FILE.py or --torchvision NAME")
        model, size = _torchvision(name, number_of(configuration.classes)), size or (224, 224)
    if size is None:
        raise ValueError("the size of the images is unknown; pass --size 224, or define SIZE in the model's file")
    generator = torch.Generator().manual_seed(0)
    return model, torch.rand(1, channels, *size, generator=generator)


def _torchvision(name: str, classes: int | None) -> nn.Module:
    """Make a torchvision model of some classes with random weights."""
    models = torchvision_models(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = models.get_model(name, weights=None, **({} if classes is None else {"num_classes": classes}))
        for parameter in model.parameters():
            if not bool(parameter.any()):  # a head of zeros, as in vision transformers, has no gradient
                nn.init.normal_(parameter, std=0.02)
    return model.eval()


def list_layers(model: nn.Module, inputs: Tensor) -> list[ListedLayer]:
    """List the layers that a forward pass runs, in the order of ``named_modules``.

    Args:
        model: Any trained module.
        inputs: One input, (1, ...).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> for row in list_layers(model, torch.zeros(1, 1, 8, 8)):
        ...     print(row.name, row.kind, row.shape)
        0 Conv2d (1, 4, 6, 6)
        1 ReLU (1, 4, 6, 6)
        2 Flatten (1, 144)
        3 Linear (1, 2)
    """
    plain = unwrap(model)
    seen, _ = _run(plain, inputs)
    return [seen[name].row for name, _ in plain.named_modules() if name in seen]


def recommend(model: nn.Module, inputs: Tensor) -> Recommended:
    """Recommend layers to explain, from one input.

    Args:
        model: Any trained module.
        inputs: One input, (1, ...), with values as the model takes them.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        >>> model = nn.Sequential(features, nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> recommend(model, torch.rand(1, 1, 8, 8))
        Recommended(places='0', vector='3')
    """
    plain = unwrap(model)
    seen, y = _run(plain, inputs)
    late = sorted((s for s in seen.values() if s.output is not None), key=lambda s: -s.order)
    weighted = [s.order for s in late if any(True for _ in s.module.parameters(recurse=False))]
    head = max(weighted, default=0)
    image = inputs if inputs.dim() == 4 else None
    found: dict[str, str] = {}
    for candidate in late:
        kind = "places" if _places(candidate, image) else "vector"
        is_fit = candidate.order < head and candidate.row.calls == 1 and not candidate.row.several
        if kind in found or not is_fit or isinstance(candidate.module, nn.Embedding):
            continue
        if kind == "places" and _reached(candidate, y, image) < _REACHED:
            continue
        if _is_crossed(plain, inputs, candidate.module):
            found[kind] = _short(candidate, late)
        if len(found) == 2 or (kind == "places" and "places" in found):
            break  # vectors before the last places belong to gates and the like
    return Recommended(found.get("places"), found.get("vector"))


def table(rows: Sequence[ListedLayer], chosen: Recommended) -> str:
    """Format layers as a table with a mark at the recommended ones, and say below what to do with them.

    Args:
        rows: The layers.
        chosen: The recommended ones.

    Example:
        >>> print(table([ListedLayer("0", "Conv2d", (1, 4, 6, 6), 1, False)], Recommended("0", None)))
           layer  type    output
        *  0      Conv2d  4 x 6 x 6
        <BLANKLINE>
        * --layer 0: the last layer with places that matter
    """
    cells = [("", "layer", "type", "output")]
    for row in rows:
        mark = "*" if row.name in chosen else ""
        shape = "-" if row.shape is None else " x ".join(map(str, row.shape[1:]))
        notes = [f"called {row.calls} times"] if row.calls > 1 else []
        notes += ["returns several"] if row.several else []
        cells.append((mark, row.name, row.kind, f"{shape} ({', '.join(notes)})" if notes else shape))
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    drawn = "; maps are drawn at an earlier layer with places"
    has_places = any(row.shape is not None and len(row.shape) > 2 for row in rows)
    reasons = (
        (chosen.places, "the last layer with places that matter"),
        (chosen.vector, f"the last hidden layer{drawn if has_places else ''}"),
    )
    lines += ["", *(f"* --layer {name}: {reason}" for name, reason in reasons if name is not None)]
    if chosen == (None, None):
        lines.append("No layer is recommended: name the last one before the head through which everything passes.")
    return "\n".join(lines)


def _run(model: nn.Module, inputs: Tensor) -> tuple[dict[str, _Seen], Tensor]:
    """Run the model once with gradients; return its layers and its output."""
    seen: dict[str, _Seen] = {}
    sources: list[Tensor] = []
    x = inputs.detach().clone()
    if x.is_floating_point():
        sources.append(x.requires_grad_())
        x = x.clone()  # a model may work in place, which a leaf does not allow

    def note(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> Any:
            tensors = [t for t in _tensors(output) if t.is_floating_point()]
            first = tensors[0] if tensors else None
            given = None
            if isinstance(output, Tensor) and first is output and not sources:
                sources.append(output if output.requires_grad else output.requires_grad_())
                given = output.clone()
            calls = seen[name].row.calls + 1 if name in seen else 1
            shape = None if first is None else tuple(first.shape)
            row = ListedLayer(name, type(module).__name__, shape, calls, not isinstance(output, Tensor))
            seen[name] = _Seen(row, module, given if given is not None else first, len(order))
            order.append(name)
            return given

        return hook

    order: list[str] = []
    with _hooked((module, note(name)) for name, module in model.named_modules() if name), _graded(model):
        output = model(x)
    floats = [t for t in _tensors(output) if t.is_floating_point()]
    if not floats or not sources:
        raise ValueError(
            f"the model returned {type(output).__name__} without a tensor of numbers; return the logits from load()"
        )
    return seen, floats[0]


def _places(seen: _Seen, image: Tensor | None) -> tuple[int, ...]:
    """Return the dimensions of a layer's places, or () if its output has one place at most."""
    output = seen.output
    assert output is not None
    if output.dim() == 3:
        dimensions: tuple[int, ...] = (2,) if isinstance(seen.module, _ALONG_TIME) else (1,)
    elif output.dim() in (4, 5):
        dimensions = tuple(range(1, 3)) if has_channels_last(output.shape, image) else tuple(range(2, output.dim()))
    else:
        return ()
    several = 1
    for d in dimensions:
        several *= output.shape[d]
    return dimensions if several > 1 else ()


_ALONG_TIME = (
    nn.Conv1d,
    nn.BatchNorm1d,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool1d,
)


def _reached(seen: _Seen, y: Tensor, image: Tensor | None) -> float:
    """Return the share of a layer's places that have a gradient of the highest output."""
    assert seen.output is not None
    if not seen.output.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(y.max(), seen.output, retain_graph=True, allow_unused=True)
    if gradient is None:
        return 0.0
    others = [d for d in range(1, gradient.dim()) if d not in _places(seen, image)]
    strength = gradient.abs().sum(others) if others else gradient.abs()
    return float((strength > 0).double().mean())


def _is_crossed(model: nn.Module, inputs: Tensor, layer: nn.Module) -> bool:
    """Whether everything passes through a layer: with its output cut off, no gradient reaches the input."""
    sources: list[Tensor] = []
    x = inputs.detach().clone()
    if x.is_floating_point():
        sources.append(x.requires_grad_())
        x = x.clone()

    def begin(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not sources and isinstance(output, Tensor) and output.is_floating_point():
            sources.append(output.detach().requires_grad_())
            return sources[0].clone()
        return None

    def cut(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output.detach()

    hooks = [(module, begin) for name, module in model.named_modules() if name]
    with _hooked([*hooks, (layer, cut)]), _graded(model):
        output = model(x)
    y = next(t for t in _tensors(output) if t.is_floating_point())
    if not y.requires_grad:
        return True
    (gradient,) = torch.autograd.grad(y.max(), sources[0], allow_unused=True)
    return gradient is None


def _short(seen: _Seen, others: Sequence[_Seen]) -> str:
    """Return the shortest name among layers that returned the same tensor and were called once."""
    same = [s.row.name for s in others if s.output is seen.output and s.row.calls == 1]
    return min(same, key=lambda name: (name.count("."), len(name)))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


@contextmanager
def _hooked(hooks: Any) -> Iterator[None]:
    scripted = torch.jit.ScriptModule  # takes no hooks
    handles = [module.register_forward_hook(hook) for module, hook in hooks if not isinstance(module, scripted)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _graded(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode with gradients, and leave it as it was found."""
    with torch.inference_mode(False), untouched(model), torch.enable_grad(), eager():
        yield
