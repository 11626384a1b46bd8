"""Leave a model as it was found: its modes, buffers, hooks and random streams; run one implementation of its layers."""

from __future__ import annotations

import copy
import operator
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["devices_of", "eager", "one_path", "untouched"]

# All threads share the model's modes and hooks and torch's compilation stance: one thread at a time may change them.
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


# Containers that torch fills. The user's own lists and dicts may be shared with other code, and are left alone.
_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class _State(NamedTuple):
    module: nn.Module
    kind: type[nn.Module]
    """Class of the module; lazy modules change it at their first call."""
    training: bool
    attributes: dict[str, Any]
    contents: dict[str, Any]
    """Copies of the module's dicts of submodules, parameters and buffers; empty for scripted modules."""
    buffers: dict[str, tuple[Tensor, Tensor]]
    hooks: dict[str, frozenset[int]]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode in this context; restore it exactly at the end, also after an exception.

    The context restores the mode of every submodule, buffers, ``requires_grad`` and ``grad`` of every parameter, all
    other attributes, submodules and parameters, and the random number generators of torch, numpy and Python. It removes
    hooks that appeared meanwhile. It does not restore the contents of the user's own lists and dicts. Other threads
    wait for the context to end. Inside, the model has only one implementation, see :func:`one_path`.

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
    _refuse_unusable(model)
    with _LOCK, one_path(), _kept(list(model.modules())) as modules:
        for module in modules:
            if module.training:
                module.training = False
        yield


def _refuse_unusable(model: nn.Module) -> None:
    """Raise where weights have no values, or can take no part in gradients."""
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
def _kept(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Record the state of a model's modules, and restore it at the end of this context."""
    states = [
        _State(
            m,
            type(m),
            m.training,
            dict(vars(m)),
            {} if _is_scripted(m) else {name: copy.copy(vars(m)[name]) for name in _CONTAINERS},
            {name: (b, b.detach().clone()) for name, b in _changeable(m).items()},
            {h: frozenset(hooks) for h in _HOOKS if (hooks := vars(m).get(h))},
        )
        for m in modules
    ]
    parameters = [(p, p.requires_grad, p.grad) for m in modules for p in m._parameters.values() if p is not None]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's global state
    grown: list[str] = []
    try:
        with torch.random.fork_rng(devices_of(modules)):
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
            f"the forward pass made new parameters ({', '.join(grown[:3])}), so their values are untrained and change "
            "with every pass; run the model once and load its trained weights before explaining it"
        )


def _is_scripted(module: nn.Module) -> bool:
    """Whether a module was scripted or traced. Its submodules, parameters and buffers are fixed."""
    return isinstance(module, torch.jit.ScriptModule)


def _changeable(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a forward pass may change: buffers, and embeddings that are renormed as they are used."""
    found = {name: b for name, b in module._buffers.items() if b is not None}
    if getattr(module, "max_norm", None) is not None:
        found |= {name: p for name, p in module._parameters.items() if p is not None}
    return found


def _grown(state: _State) -> list[str]:
    """List the names of parameters that a module did not have before, including those that a lazy module has made."""
    if type(state.module) is not state.kind:
        return [f"those of {state.kind.__name__}"]
    if not state.contents:
        return []
    kind, had = state.kind.__name__, state.contents
    own = [k for k, p in state.module._parameters.items() if p is not None and had["_parameters"].get(k) is None]
    new = [(k, m) for k, m in state.module._modules.items() if m is not None and had["_modules"].get(k) is None]
    return [f"{kind}.{k}" for k in own] + [f"{kind}.{k}.{name}" for k, m in new for name, _ in m.named_parameters()]


def devices_of(modules: Iterable[nn.Module]) -> list[int]:
    """List the indices of the GPUs that hold a model."""
    found = {p.device for m in modules for p in m._parameters.values() if p is not None}
    return sorted({d.index for d in found if d.type == "cuda" and d.index is not None})


def _restore(state: _State) -> None:
    """Restore the state of one module."""
    if "training" in state.attributes:
        vars(state.module)["training"] = state.training
    else:
        state.module.training = state.training  # a property, of compiled modules
    own = vars(state.module)
    if type(state.module) is state.kind:
        if not (len(own) == len(state.attributes) and all(map(operator.is_, own.values(), state.attributes.values()))):
            for name, value in state.attributes.items():
                if name not in _HOOKS and own.get(name) is not value:
                    own[name] = value
        for name, contents in state.contents.items():
            if contents or own[name]:
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
    """Restore the contents of a dict or set, where they changed."""
    if isinstance(contents, dict):
        same = list(container) == list(contents) and all(map(operator.is_, container.values(), contents.values()))
    else:
        same = container == contents
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
