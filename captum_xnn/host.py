"""The explained model as a host: finding a layer in it, reading that layer, and leaving the model as it was found.

The layer is read by a forward hook that is registered for the length of one forward pass only. A hook placed earlier
fires before Captum's own and makes DeepLift and the guided methods silently wrong at that very layer; running the model
past the layer makes LRP silently wrong. :func:`run_to_layer` therefore leaves the model by a private exception at the
layer's last call, and :func:`read_layer` runs the whole model where its output is wanted as well.
"""

from __future__ import annotations

import copy
import difflib
import operator
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from captum_xnn.errors import LayerNotFoundError, LayerNotReachedError

__all__ = [
    "EveryCall",
    "Trace",
    "calls_of",
    "eager",
    "find_layer",
    "gathered",
    "has_channels_last",
    "is_grid",
    "not_reached",
    "one_path",
    "quantised",
    "read_layer",
    "refuse_integers",
    "replacing",
    "rows_of",
    "run_to_layer",
    "trace",
    "untouched",
    "unwrap",
]

OutputTransform = Callable[[Any], Tensor]


class EveryCall:
    """An ``output_transform`` that explains all calls of a layer in one forward pass, not the last alone.

    It is for a layer that runs side by side on several inputs or parts of one: the towers of a Siamese network, an
    encoder of frames, a head over pyramid levels. Outputs (N, ...) of one shape become Z of shape (N, calls, ...);
    those of several shapes are flattened and joined.

    Args:
        transform: Turns the raw output of each call into one tensor (N, ...).

    Example:
        >>> EveryCall().joined([torch.zeros(2, 3), torch.ones(2, 3)]).shape
        torch.Size([2, 2, 3])
        >>> EveryCall().joined([torch.zeros(2, 3), torch.ones(2, 4, 4)]).shape
        torch.Size([2, 19])
    """

    def __init__(self, transform: OutputTransform | None = None) -> None:
        self.transform = transform

    def __call__(self, output: Any) -> Tensor:
        """Return the tensor of one call.

        Args:
            output: The layer's raw output.
        """
        made: Tensor = output if self.transform is None else self.transform(output)
        return made

    def joined(self, outputs: Sequence[Any]) -> Tensor:
        """Return Z of all calls.

        Args:
            outputs: Raw outputs of the layer, in the order of its calls.
        """
        parts = [_as_tensor(output, "of every call", self) for output in outputs]
        if len({part.shape for part in parts}) == 1:
            return torch.stack(parts, 1)
        return torch.cat([part.flatten(1) for part in parts], 1)


# The model's modes and hooks, and torch's compilation stance, are shared by all threads: one of them at a time.
_LOCK = threading.RLock()

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_CONTAINERS = (dict, OrderedDict, list, set)


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the plain module behind ``torch.compile`` and ``DataParallel`` wrappers, in which layers can be hooked.

    Args:
        model: The user's model.

    Raises:
        TypeError: If the model is no module, or a scripted or traced one, whose layers cannot be seen.

    Example:
        >>> unwrap(nn.DataParallel(nn.Linear(2, 1)))
        Linear(in_features=2, out_features=1, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module whose layers can be hooked, got {type(model).__name__}; "
            "pass the model itself, or wrap the function in a module that holds the layers"
        )
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"expected a module that runs as Python code, got {type(model).__name__}; the layers of scripted and "
                "traced modules cannot be read, pass the module that was scripted"
            )
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def find_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Returns the dotted name and the module of a layer of the model.

    Args:
        model: A plain module.
        layer: A dotted name as in ``model.named_modules()``, or the module itself.

    Raises:
        LayerNotFoundError: If there is no such layer; near names are listed.
        TypeError: If layer is neither a name nor a module.

    Example:
        >>> find_layer(nn.Sequential(nn.Linear(2, 1), nn.ReLU()), "1")
        ('1', ReLU())
    """
    named = dict(model.named_modules())
    if isinstance(layer, str):
        if layer in named and layer:
            return layer, named[layer]
        names = [name for name in named if name]
        near = difflib.get_close_matches(layer, names, n=5, cutoff=0.4) or names[:5]
        raise LayerNotFoundError(
            f"expected the name of a layer of {type(model).__name__}, got {layer!r}; near names: "
            f"{', '.join(map(repr, near))} (all of them: `dict(model.named_modules())`)"
        )
    if not isinstance(layer, nn.Module):
        raise TypeError(f"expected a layer as a dotted name or a module, got {type(layer).__name__}; pass one of them")
    wanted = unwrap(layer)
    for name, module in named.items():
        if module is wanted:
            return name, module
    raise LayerNotFoundError(
        f"expected a layer of {type(model).__name__}, got a {type(layer).__name__} that the model does not hold; "
        "pass the layer of this very model object, or its dotted name"
    )


class _State(NamedTuple):
    module: nn.Module
    kind: type[nn.Module]
    """Its class, which lazy modules change at their first call."""
    training: bool
    attributes: dict[str, Any]
    contents: dict[str, Any]
    """Copies of the attributes that are dicts, lists or sets: submodules, parameters, buffers, and the user's own."""
    buffers: dict[str, tuple[Tensor, Tensor]]
    hooks: dict[str, frozenset[int]]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Returns a context in which the model evaluates, and after which it is exactly as before, also on an exception.

    Restored are the mode of every submodule, buffers, ``requires_grad`` and ``grad`` of every parameter, hooks that
    appeared meanwhile, all other attributes with what the dicts, lists and sets among them hold, and the random number
    generators of torch, numpy and Python. Other threads wait for the context to end. Inside, the model has one
    implementation only, see :func:`one_path`.

    Args:
        model: A plain module.

    Raises:
        ValueError: If parameters appeared meanwhile: a model that was never run is not trained.

    Example:
        >>> model = nn.Dropout().train()
        >>> with untouched(model):
        ...     print(model.training)
        False
        >>> model.training
        True
    """
    with _LOCK, one_path(), _kept(list(model.modules())) as modules:
        for module in modules:
            if module.training:
                module.training = False
        yield


@contextmanager
def _kept(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Takes down the state of a model's modules and brings it back at the end."""
    states = [
        _State(
            m,
            type(m),
            m.training,
            dict(vars(m)),
            {name: copy.copy(v) for name, v in vars(m).items() if name not in _HOOKS and type(v) in _CONTAINERS},
            {name: (b, b.detach().clone()) for name, b in m._buffers.items() if b is not None},
            {h: frozenset(hooks) for h in _HOOKS if (hooks := vars(m).get(h))},
        )
        for m in modules
    ]
    parameters = [(p, p.requires_grad, p.grad) for m in modules for p in m._parameters.values() if p is not None]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's global state
    grown: list[str] = []
    try:
        with torch.random.fork_rng(_devices(modules)):
            yield modules
        grown = [name for state in states for name in _grown(state)]
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for p, requires_grad, grad in parameters:
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not grad:
                p.grad = grad
        for state in states:
            _restore(state)
    if grown:
        raise ValueError(
            f"the forward pass made new parameters ({', '.join(grown[:3])}), so their values are those of no training "
            "and change with every pass; run the model once and load its trained weights before explaining it"
        )


def _grown(state: _State) -> list[str]:
    """Returns what names parameters that a module did not have before, also those that a lazy module has made."""
    if type(state.module) is not state.kind:
        return [f"those of {state.kind.__name__}"]
    kind, had = state.kind.__name__, state.contents
    own = [k for k, p in state.module._parameters.items() if p is not None and had["_parameters"].get(k) is None]
    new = [(k, m) for k, m in state.module._modules.items() if m is not None and had["_modules"].get(k) is None]
    return [f"{kind}.{k}" for k in own] + [f"{kind}.{k}.{name}" for k, m in new for name, _ in m.named_parameters()]


def _devices(modules: Iterable[nn.Module]) -> list[int]:
    """Returns the numbers of the GPUs that hold a model."""
    found = {p.device for m in modules for p in m._parameters.values() if p is not None}
    return sorted({d.index for d in found if d.type == "cuda" and d.index is not None})


def _restore(state: _State) -> None:
    if "training" in state.attributes:
        vars(state.module)["training"] = state.training
    else:
        state.module.training = state.training  # a property, of compiled modules
    own = vars(state.module)
    if type(state.module) is state.kind:
        for name, value in state.attributes.items():
            if name not in _HOOKS and own.get(name) is not value:
                own[name] = value
        for name, contents in state.contents.items():
            _refill(own[name], contents)
    for name in own.keys() - state.attributes.keys():
        delattr(state.module, name)
    for buffer, value in state.buffers.values():
        if not torch.equal(buffer, value):
            with torch.no_grad():
                buffer.copy_(value)
    for kind in _HOOKS:
        hooks = vars(state.module).get(kind)
        if hooks:
            for key in hooks.keys() - state.hooks.get(kind, frozenset()):
                del hooks[key]


def _refill(container: Any, contents: Any) -> None:
    """Gives a dict, list or set the contents back that it had, where they changed."""
    before, after = (
        [x for pair in c.items() for x in pair] if isinstance(c, dict) else list(c) for c in (contents, container)
    )
    if len(before) == len(after) and all(map(operator.is_, before, after)):
        return
    container.clear()
    container.extend(contents) if isinstance(container, list) else container.update(contents)


def rows_of(
    inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, rows: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """Returns copies of some rows of the inputs, and of those additional arguments that have a row for each example.

    Args:
        inputs: Tensors (N, ...).
        additional: Further arguments of the model; others than tensors of N rows are passed on as they are.
        rows: Row numbers (R,), which may repeat.

    Example:
        >>> rows_of((torch.tensor([[1.0], [2.0]]),), (torch.tensor([5, 6]), "mean"), torch.tensor([1, 1]))
        ((tensor([[2.],
                [2.]]),), (tensor([6, 6]), 'mean'))
    """
    n = len(inputs[0])

    def pick(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) == n
        return value[rows.to(value.device)] if has_rows else value

    return tuple(pick(x) for x in inputs), None if additional is None else tuple(pick(x) for x in additional)


def quantised(model: nn.Module) -> list[str]:
    """Return the names of quantised modules, whose kernels have no gradients and round, dynamic ones by the batch.

    Args:
        model: A plain module.

    Example:
        >>> quantised(nn.Sequential(nn.Linear(2, 1)))
        []
    """
    return [
        name
        for name, module in model.named_modules()
        if ".quantized." in f"{type(module).__module__}." and not name.endswith("_packed_params")
    ]


def refuse_integers(inputs: Sequence[Tensor], method: str, otherwise: str) -> None:
    """Raise where an input has no gradients, and say how to pass it.

    Args:
        inputs: What a method is to attribute to.
        method: Its name.
        otherwise: How to explain token ids instead.

    Raises:
        TypeError: If an input holds integers or booleans.

    Example:
        >>> refuse_integers((torch.ones(2, 3), torch.tensor([3, 1])), "Saliency", "explain the embedding")
        Traceback (most recent call last):
        ...
        TypeError: expected floating-point inputs for Saliency, got torch.int64 as input 1; if it says how to read the
        other inputs, such as lengths, a mask or indices, pass it as additional_forward_args: attribute(x, target,
        lengths). If it holds token ids, explain the embedding
    """
    for i, x in enumerate(inputs):
        if x.is_floating_point() or x.is_complex():
            continue
        fix = f"convert them with .float(), or, where they are token ids, {otherwise}"
        if any(other.is_floating_point() for other in inputs):
            fix = f"{_AS_ARGUMENT}. If it holds token ids, {otherwise}"
        raise TypeError(f"expected floating-point inputs for {method}, got {x.dtype} as input {i}; {fix}")


_AS_ARGUMENT = (
    "if it says how to read the other inputs, such as lengths, a mask or indices, pass it as additional_forward_args: "
    "attribute(x, target, lengths)"
)


@contextmanager
def replacing(inputs: Sequence[Tensor], method: str) -> Iterator[None]:
    """Return a context in which a method runs a model on replaced inputs; say which of them the model may not take.

    Args:
        inputs: What the method replaces.
        method: Its name.

    Raises:
        ValueError: If the model fails, and integers beside floating-point inputs may be why.
    """
    integers = [i for i, x in enumerate(inputs) if not x.is_floating_point()]
    try:
        yield
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if not integers or len(integers) == len(inputs):
            raise
        raise ValueError(
            f"{method} replaces numbers of every input, and the model fails where it does so ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Input {integers[0]} is {inputs[integers[0]].dtype}: {_AS_ARGUMENT}"
        ) from error


def gathered(parts: Iterable[tuple[Sequence[int], Sequence[Tensor]]], n: int) -> tuple[Tensor, ...]:
    """Returns tensors of n rows from parts as they come, none of which is held any longer.

    Args:
        parts: Row numbers R, with tensors (R, ...); together each of the n rows once.
        n: Number of rows.

    Example:
        >>> gathered([([0, 2], [torch.tensor([1.0, 3.0])]), ([1], [torch.tensor([2.0])])], 3)
        (tensor([1., 2., 3.]),)
    """
    whole: tuple[Tensor, ...] = ()
    for rows, made in parts:
        if list(rows) == list(range(n)):
            return tuple(made)
        if not whole:
            whole = tuple(m.new_empty(n, *m.shape[1:]) for m in made)
        index = torch.tensor(list(rows))
        for all_rows, some in zip(whole, made, strict=True):
            all_rows[index.to(all_rows.device)] = some
        del made, some  # before the next part is made
    return whole


@contextmanager
def eager() -> Iterator[None]:
    """Returns a context in which compiled modules and functions run as the Python they were, and hooks as they should.

    Like :func:`untouched` it includes :func:`one_path`.

    Example:
        >>> with eager() as nothing:
        ...     print(nothing)
        None
    """
    with one_path():
        if "torch._dynamo" not in sys.modules:  # which compiles, and takes seconds to import
            yield
            return
        with _LOCK, torch.compiler.set_stance("force_eager"):
            yield


class _FusedAttention:
    """Counts who needs torch's fused transformer layers to be off, over all threads; the last to leave restores them.

    A lock held meanwhile would stop replicas of a model that run in threads of their own.
    """

    def __init__(self) -> None:
        self.lock, self.users, self.before = threading.Lock(), 0, True

    @contextmanager
    def off(self) -> Iterator[None]:
        with self.lock:
            if not self.users:
                self.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    torch.backends.mha.set_fastpath_enabled(self.before)


_FUSED_ATTENTION = _FusedAttention()


@contextmanager
def one_path() -> Iterator[None]:
    """Keep torch from switching a model between implementations with and without gradients.

    Without gradients, ``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` otherwise take a fused path that skips
    their submodules, turns padded batches into nested tensors and fills padded positions with zeros. The numbers of
    an explanation are read without gradients and its maps with them, and both must be of the same values.

    Example:
        >>> with one_path():
        ...     print(torch.backends.mha.get_fastpath_enabled())
        False
        >>> torch.backends.mha.get_fastpath_enabled()
        True
    """
    with _FUSED_ATTENTION.off():
        yield


class _LayerReached(BaseException):
    """Carries the layer's output out of the model. Not an Exception, so that no model's own handler swallows it."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _as_tensor(output: Any, name: str, transform: OutputTransform | None) -> Tensor:
    """Returns the layer's output as the one tensor Z with examples first."""
    Z = output if transform is None else transform(output)
    if not isinstance(Z, Tensor):
        kind = type(Z).__name__
        keys = f" with keys {', '.join(map(str, Z))}" if isinstance(Z, dict) else ""
        raise TypeError(
            f"expected the output of layer {name!r} to be one tensor, got a {kind}{keys}; pass output_transform=, "
            "a function that picks or builds the tensor, such as `lambda output: output[0]`"
        )
    if Z.dim() < 2:
        raise ValueError(
            f"expected the output of layer {name!r} to be (N, ...) with one row per example, got shape "
            f"{tuple(Z.shape)}; choose another layer or reshape it in output_transform="
        )
    return Z


def read_layer(
    model: nn.Module,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    *,
    name: str = "layer",
    output_transform: OutputTransform | None = None,
) -> tuple[Tensor, Any]:
    """Returns the layer's output Z at its last call, copied, and the model's output, from one forward pass.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model.
        name: What to call the layer in errors.
        output_transform: Turns the layer's raw output into one tensor (N, ...). With :class:`EveryCall` Z is of all
            calls.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer.
        TypeError: If the layer's output is no tensor and there is no output_transform.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))
        >>> read_layer(model, model[0], (torch.tensor([[-1.0, 2.0]]),))
        (tensor([[-1.,  2.]]), tensor([[0., 2.]]))
    """
    seen: list[Tensor] = []
    every = isinstance(output_transform, EveryCall)
    thread = threading.get_ident()

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            # A copy, because the next operation may be in place.
            seen[:] = [*(seen if every else ()), _as_tensor(output, name, output_transform).clone()]

    handle = layer.register_forward_hook(keep)
    try:
        with eager():
            output = model(*inputs)
    finally:
        handle.remove()
    if not seen:
        raise not_reached(model, name)
    return (EveryCall().joined(seen) if every else seen[0]), output


def run_to_layer(
    model: nn.Module,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    *,
    calls: int = 1,
    name: str = "layer",
    output_transform: OutputTransform | None = None,
) -> Tensor:
    """Returns the layer's output Z, with its graph, from a forward pass that ends at the layer.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model.
        calls: How often the forward pass calls the layer; it ends at the last call. See :func:`trace`.
        name: What to call the layer in errors.
        output_transform: Turns the layer's raw output into one tensor (N, ...).

    Raises:
        LayerNotReachedError: If the forward pass calls the layer less often than that.

    Example:
        >>> model = nn.Sequential(nn.ReLU(), nn.Linear(3, 1))  # the second layer would fail, and never runs
        >>> run_to_layer(model, model[0], (torch.tensor([[-1.0, 2.0]]),))
        tensor([[0., 2.]])
    """
    count = 0
    every = output_transform if isinstance(output_transform, EveryCall) else None
    earlier: list[Tensor] = []
    thread = threading.get_ident()

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal count
        if threading.get_ident() != thread:
            return
        count += 1
        if every is not None:
            earlier.append(_as_tensor(output, name, every).clone())  # the next operation may be in place
        if count == calls:
            raise _LayerReached(output)

    handle = layer.register_forward_hook(leave)
    try:
        with eager():
            model(*inputs)
    except _LayerReached as reached:
        return EveryCall().joined(earlier) if every else _as_tensor(reached.output, name, output_transform)
    finally:
        handle.remove()
    raise not_reached(model, name)


def not_reached(model: nn.Module, name: str) -> LayerNotReachedError:
    """Returns the error for a layer that the forward pass never calls.

    Args:
        model: A plain module.
        name: The layer's name.
    """
    return LayerNotReachedError(
        f"expected the forward pass of {type(model).__name__} to call layer {name!r}, but it never did; choose a layer "
        "that runs for these inputs (attention projections, for one, are used as weights and not called)"
    )


def calls_of(
    model: nn.Module,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    *,
    name: str = "layer",
    output_transform: OutputTransform | None = None,
    prediction_transform: OutputTransform | None = None,
) -> int:
    """Count the calls of a layer in one forward pass; raise where only the last of several would be explained.

    Calls in a row are right: what the model makes of the first call goes through the last one. Of calls side by side,
    as in Siamese towers, the last one knows nothing of the others. To tell them apart, the model runs a second time
    with noise on all calls but the last, and with the first pass's output of the last call.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model; few examples will do. They are copied.
        name: What to call the layer in errors.
        output_transform: The layer's; with :class:`EveryCall` nothing is refused.
        prediction_transform: Turns the model's raw output into the tensor that is explained.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer.
        ValueError: If the model's output depends on an earlier call other than through the last one.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> calls_of(nn.Sequential(layer, nn.ReLU(), layer), layer, (torch.ones(3, 2),))
        2
    """
    last: Any = None
    count, calls = 0, 0
    thread = threading.get_ident()

    def see(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal last, count
        if threading.get_ident() != thread:
            return None
        count += 1
        if not calls:
            last = _mapped(torch.clone, output)
            return None
        return last if count == calls else _mapped(_noisy, output)

    def ran() -> list[Tensor]:
        nonlocal count
        count = 0
        copies = tuple(_mapped(torch.clone, x) for x in inputs)
        with torch.random.fork_rng(_devices(model.modules())):
            torch.manual_seed(0)
            output = model(*copies)
        return _tensors(output if prediction_transform is None else prediction_transform(output))

    handle = layer.register_forward_hook(see)
    try:
        with torch.no_grad(), eager():
            usual = ran()
            if not count:
                raise not_reached(model, name)
            calls = count
            if calls == 1 or layer is model or isinstance(output_transform, EveryCall):
                return calls
            try:
                disturbed = ran()
            except Exception:
                return calls  # noise may lead the model's own code astray, and says nothing then
    finally:
        handle.remove()
    if count == calls and not all(map(_is_close, usual, disturbed)):
        raise ValueError(
            f"expected layer {name!r} to run once in a forward pass, got {calls} calls side by side, as in the towers "
            "of a Siamese network or an encoder of frames, of which only the last would be explained; explain all of "
            "them with output_transform=captum_xnn.host.EveryCall(), or a layer that runs once after they are joined"
        )
    return calls


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Returns a value with all tensors in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        made = copy.copy(value)
        for key, one in value.items():
            made[key] = _mapped(change, one)
        return made
    if isinstance(value, (tuple, list)):
        many = [_mapped(change, one) for one in value]
        return type(value)(*many) if hasattr(value, "_fields") else type(value)(many)
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(lambda x: found.append(x) or x, value)  # type: ignore[func-returns-value]
    return found


def _noisy(x: Tensor) -> Tensor:
    """Returns a tensor with as much noise as it has spread."""
    if not x.is_floating_point() or not x.numel():
        return x.clone()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(x)
    spread = x.double().std(correction=0).to(x)
    return x + noise * torch.where(spread > 0, spread, torch.ones_like(spread))


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = 1e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return torch.allclose(a, b, tolerance, tolerance * float(a.abs().amax()) if a.numel() else 0, equal_nan=True)


def is_grid(height: int, width: int, image: Tensor) -> bool:
    """Returns whether two dimensions of a layer's output are cells of an image, by their ratio.

    Args:
        height: The first of them.
        width: The second.
        image: Images (N, C, H, W).

    Example:
        >>> is_grid(14, 14, torch.zeros(1, 3, 224, 224)), is_grid(14, 96, torch.zeros(1, 3, 224, 224))
        (True, False)
    """
    return min(height, width) > 1 and 0.8 <= (height / image.shape[2]) / (width / image.shape[3]) <= 1.25


def has_channels_last(shape: Sequence[int], image: Tensor | None) -> bool:
    """Returns whether a layer's output of this shape is (N, H, W, C), as in Swin and ConvNeXt, by the image's ratio.

    Args:
        shape: Of the layer's output.
        image: Images (N, C, H, W), or another input, or None.

    Example:
        >>> image = torch.zeros(1, 3, 224, 224)
        >>> has_channels_last((1, 7, 7, 768), image), has_channels_last((1, 768, 7, 7), image)
        (True, False)
    """
    if image is None or image.dim() != 4 or len(shape) != 4:
        return False
    return is_grid(shape[1], shape[2], image) and not is_grid(shape[2], shape[3], image)


class Trace(NamedTuple):
    """What one forward pass up to the layer executed."""

    leaves: tuple[nn.Module, ...]
    """Modules without children, each once, in the order of their first call."""
    calls: int
    """How often the layer was called."""
    spatial: nn.Module | None
    """The last module before the layer whose output was (N, C, H, W) with several cells, or None. Of a block that
    returns what its last leaf did, that leaf. Dropout and identities, which change nothing, are passed over."""


def trace(model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], *, name: str = "layer") -> Trace:
    """Returns which leaf modules a forward pass executes up to the layer, and how often it calls the layer.

    Captum's DeepLift and LRP walk the registered modules, not the executed ones, so a network composed of this model
    must register just these.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model.
        name: What to call the layer in errors.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> trace(model, model[1], (torch.zeros(1, 2),)).leaves
        (Linear(in_features=2, out_features=3, bias=True), ReLU())
    """
    order: list[nn.Module] = []
    grids: list[tuple[nn.Module, Tensor, int]] = []
    ends: list[tuple[int, nn.Module | None]] = []
    thread = threading.get_ident()
    image = next((x for x in inputs if isinstance(x, Tensor) and x.dim() == 4), None)

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        is_block = any(True for _ in module.children())
        if not is_block:
            order.append(module)
        if module is not model and _is_spatial(output, image):
            same = bool(grids) and (isinstance(module, _IDLE) or (is_block and _is_unchanged(output, *grids[0][1:])))
            grids[:] = [(grids[0][0] if same else module, output, _version(output))]
        if module is layer:
            ends.append((len(order), grids[0][0] if grids else None))

    handles = [module.register_forward_hook(note) for module in dict.fromkeys([*model.modules(), *layer.modules()])]
    try:
        with torch.no_grad(), eager():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not ends:
        raise not_reached(model, name)
    count, spatial = ends[-1]
    return Trace(tuple(dict.fromkeys(order[:count])), len(ends), spatial)


_IDLE = (nn.Identity, nn.modules.dropout._DropoutNd)


def _is_spatial(output: Any, image: Tensor | None) -> bool:
    """Whether a layer's output is feature maps (N, C, H, W) of several cells."""
    several = isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1
    return several and not has_channels_last(output.shape, image)


def _is_unchanged(output: Tensor, before: Tensor, version: int) -> bool:
    """Whether a tensor is another, which nothing has overwritten since."""
    return output is before and _version(output) == version


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # which inference tensors do not count
