"""Leave a model as it was found: its modes, buffers, hooks and random streams; run one implementation of its layers."""

from __future__ import annotations

import operator
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["devices_of", "eager", "one_path", "untouched"]

# All threads share the model's modes and hooks and torch's compilation stance: one thread at a time may change them.
_LOCK = threading.RLock()

_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    *_BACKWARD_HOOKS,
)


# Containers that torch fills. The user's own lists and dicts may be shared with other code, and are left alone.
_DICTS = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (*_DICTS, "_non_persistent_buffers_set")
_HELD = (*_CONTAINERS, *_HOOKS)
_NOTHING: tuple[tuple[Any, ...], ...] = ((),) * len(_HELD)


class _References(NamedTuple):
    """Everything that modules hold, in flat lists, which are quicker to make and to compare than a dict for each."""

    kinds: list[tuple[type[nn.Module], bool]]
    """Class and mode of each module; lazy modules change their class at their first call."""
    sizes: list[int]
    """For each module the number of its attributes, and of entries in each container and each dict of hooks."""
    names: list[Any]
    """Names of the attributes and of the entries."""
    values: list[Any]
    """Values of the attributes, and of the entries of dicts."""

    @classmethod
    def of(cls, modules: list[nn.Module]) -> _References:
        """Collect the references of some modules."""
        found = cls([(type(m), m.training) for m in modules], [], [], [])
        sizes, names, values = found.sizes, found.names, found.values
        for module in modules:
            own = vars(module)
            sizes.append(len(own))
            names += own
            values += own.values()
            held = {name: own[name] for name in _HOOKS if name in own} if _is_scripted(module) else own
            sizes += map(len, map(held.get, _HELD, _NOTHING))
            names += chain.from_iterable(map(held.get, _HELD, _NOTHING))
            for entries in map(held.get, _DICTS):
                values += entries.values() if entries else ()
        return found

    def equal(self, other: _References) -> bool:
        """Whether modules hold the very same objects under the same names."""
        same = self.kinds == other.kinds and self.sizes == other.sizes and self.names == other.names
        return same and all(map(operator.is_, self.values, other.values))

    def states(self, modules: list[nn.Module]) -> Iterator[_State]:
        """Yield the state of each module that is recorded here."""
        sizes, names, values = iter(self.sizes), iter(self.names), iter(self.values)
        for module, (kind, training) in zip(modules, self.kinds, strict=True):
            own = list(islice(names, next(sizes)))
            attributes = dict(zip(own, islice(values, len(own)), strict=True))
            keys = {name: list(islice(names, next(sizes))) for name in _HELD}
            entries = {name: dict(zip(keys[name], islice(values, len(keys[name])), strict=True)) for name in _DICTS}
            yield _State(module, kind, training, attributes, keys, entries)


class _State(NamedTuple):
    """The state of one module."""

    module: nn.Module
    kind: type[nn.Module]
    training: bool
    attributes: dict[str, Any]
    keys: dict[str, list[Any]]
    """Entries of each container and each dict of hooks."""
    entries: dict[str, dict[str, Any]]
    """The dicts of parameters, buffers and submodules."""


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode in this context; restore it exactly at the end, also after an exception.

    The context restores the mode of every submodule, buffers, ``requires_grad`` and ``grad`` of every parameter, all
    other attributes, submodules and parameters, and the random number generators of torch, numpy and Python. It removes
    hooks that appeared meanwhile. It does not restore the contents of the user's own lists and dicts. Other threads
    wait for the context to end. Inside, the model has only one implementation, see :func:`one_path`, and its backward
    hooks are off, because they may change gradients.

    Args:
        model: A plain module.

    Raises:
        ValueError: If parameters appeared meanwhile: a model that has never run is not trained. Also if weights have
            no values, or were made under ``torch.inference_mode``.

    Example:
        >>> model = nn.Dropout().train()
        >>> with untouched(model):
        ...     print(model.training)
        False
        >>> model.training
        True
    """
    modules = list(model.modules())
    _refuse_unusable(model, modules)
    with _LOCK, one_path(), _kept(modules), _without_backward_hooks(modules):
        trained = [module for module in modules if module.training]
        try:
            for module in trained:
                module.training = False
            yield
        finally:
            for module in trained:
                module.training = True


def _refuse_unusable(model: nn.Module, modules: list[nn.Module]) -> None:
    """Raise where weights have no values, or can take no part in gradients."""
    weights = (p for m in modules for p in m._parameters.values() if p is not None)  # names take long
    if not any(p.is_meta or p.is_inference() for p in weights if not is_lazy(p)):
        return
    for name, p in model.named_parameters():
        if is_lazy(p):
            continue
        if p.is_meta:
            raise ValueError(
                f"weight {name!r} is on the meta device and has no values; load the model's weights, as in "
                "model.to_empty(device='cpu') and model.load_state_dict(torch.load(file))"
            )
        if p.is_inference():
            raise ValueError(
                f"weight {name!r} was made under torch.inference_mode, and such tensors take no part in gradients; "
                "make or load the model outside of it, or pass copy.deepcopy(model)"
            )


@contextmanager
def _kept(modules: list[nn.Module]) -> Iterator[None]:
    """Record the state of a model's modules, and restore it at the end of this context."""
    before = _References.of(modules)
    buffers = [(b, b.detach().clone()) for m in modules for b in _changeable(m)]
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    needed, grads = [p.requires_grad for p in parameters], [p.grad for p in parameters]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's global state
    grown: list[str] = []
    try:
        with torch.random.fork_rng(devices_of(parameters)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for p, requires_grad, grad in zip(parameters, needed, grads, strict=True):
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not grad:
                p.grad = grad
        if not before.equal(_References.of(modules)):
            for state in before.states(modules):
                grown += _grown(state)
                _restore(state)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
    if grown:
        raise ValueError(
            f"the forward pass made new parameters ({', '.join(grown[:3])}), so their values are untrained and change "
            "with every pass; run the model once and load its trained weights before explaining it"
        )


@contextmanager
def _without_backward_hooks(modules: list[nn.Module]) -> Iterator[None]:
    """Take off the backward hooks of a model's modules in this context. :func:`_kept` removes those added meanwhile."""
    own = [hooks for m in modules for kind in _BACKWARD_HOOKS if (hooks := vars(m).get(kind))]
    contents = [dict(hooks) for hooks in own]
    for hooks in own:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in zip(own, contents, strict=True):
            hooks.update(content)


def _is_scripted(module: nn.Module) -> bool:
    """Whether a module was scripted or traced. Its submodules, parameters and buffers are fixed."""
    return isinstance(module, torch.jit.ScriptModule)


def _changeable(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a forward pass may change: buffers, and embeddings that are renormed as they are used."""
    for b in module._buffers.values():
        if b is not None:
            yield b
    if vars(module).get("max_norm") is not None:  # getattr searches long for names that a module lacks
        yield from (p for p in module._parameters.values() if p is not None)


def _grown(state: _State) -> list[str]:
    """List the names of parameters that a module did not have before, including those that a lazy module has made."""
    if type(state.module) is not state.kind:
        return [f"those of {state.kind.__name__}"]
    if _is_scripted(state.module):
        return []
    kind, parameters, modules = state.kind.__name__, state.entries["_parameters"], state.entries["_modules"]
    own = [k for k, p in state.module._parameters.items() if p is not None and parameters.get(k) is None]
    new = [(k, m) for k, m in state.module._modules.items() if m is not None and modules.get(k) is None]
    return [f"{kind}.{k}" for k in own] + [f"{kind}.{k}.{name}" for k, m in new for name, _ in m.named_parameters()]


def devices_of(parameters: Iterable[Tensor]) -> list[int]:
    """List the indices of the GPUs that hold parameters.

    Args:
        parameters: Those of a model.
    """
    found = {p.device for p in parameters}
    return sorted({d.index for d in found if d.type == "cuda" and d.index is not None})


def _restore(state: _State) -> None:
    """Restore the state of one module."""
    if "training" in state.attributes:
        vars(state.module)["training"] = state.training
    else:
        state.module.training = state.training  # a property, of compiled modules
    own = vars(state.module)
    if type(state.module) is state.kind:
        for name, value in state.attributes.items():
            if name not in _HOOKS and own.get(name) is not value:
                own[name] = value
        for name in () if _is_scripted(state.module) else _CONTAINERS:
            _refill(own[name], state.entries.get(name, state.keys[name]))
    for name in own.keys() - state.attributes.keys():
        delattr(state.module, name)
    for kind in _HOOKS:
        if hooks := own.get(kind):
            for key in hooks.keys() - state.keys[kind]:
                del hooks[key]


def _refill(container: Any, contents: Any) -> None:
    """Restore the contents of a dict or set, where they changed."""
    same = list(container) == list(contents)
    if isinstance(contents, dict):
        same = same and all(map(operator.is_, container.values(), contents.values()))
    if not same:
        container.clear()
        container.update(contents)


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules and functions as plain Python in this context, so that hooks fire.

    Like :func:`untouched`, it includes :func:`one_path`.

    Example:
        >>> with eager() as nothing:
        ...     print(nothing)
        None
    """
    with one_path():
        if "torch._dynamo" not in sys.modules:  # the compiler, which takes seconds to import
            yield
            return
        with _LOCK, torch.compiler.set_stance("force_eager"):
            yield


class _FusedAttention:
    """Switches torch's fused transformer layers off while any thread needs it; the last thread restores them.

    Holding a lock meanwhile would block replicas of a model that run in threads of their own.
    """

    def __init__(self) -> None:
        self.lock, self.users, self.before = threading.Lock(), 0, True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Keep the fused layers off in this context."""
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
    an explanation are read without gradients and its maps with gradients. Both must come from the same values.

    Example:
        >>> with one_path():
        ...     print(torch.backends.mha.get_fastpath_enabled())
        False
        >>> torch.backends.mha.get_fastpath_enabled()
        True
    """
    with _FUSED_ATTENTION.off():
        yield
