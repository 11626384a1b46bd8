"""Keep the outputs of the modules up to a layer, so that a later pass with the same example does not compute them.

Explaining one image takes two passes: one for maps, activations and outputs, and one for the rest of the model at
points of the path integral. The modules up to the layer would compute the same in both. The second pass takes their
outputs from memory instead. Code outside of modules runs again.

Kept are the outputs of the outermost modules that do not hold the layer, and of the layer itself. They are not copied.
An output that later code changed in place counts as lost, and its module runs again. A module may change
its input in place, and the model may use that input behind the layer. The later pass then lacks the change. The
comparison of outputs at the layer's own activations finds such models
(:func:`captum_xnn.models._contribution_groups.integrate`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Prefix"]

# Most bytes of outputs to keep.
_BYTES = 1 << 28


class _Unkept(Exception):
    """Raised for an output that cannot be kept."""


class _Kept(NamedTuple):
    """An output of a module."""

    output: Any
    """A tensor, None, or tuples, lists and dicts of these."""
    tensors: list[Tensor]
    """The tensors in it."""
    versions: list[int]
    """How often each tensor had been changed in place when it was kept."""

    @classmethod
    def of(cls, output: Any) -> _Kept:
        """Keep an output, without its graph."""
        tensors: list[Tensor] = []
        kept = _detached(output, tensors)
        return cls(kept, tensors, [x._version for x in tensors])

    @property
    def is_unchanged(self) -> bool:
        """Whether no tensor was changed in place since."""
        return self.versions == [x._version for x in self.tensors]


class Prefix:
    """The outputs of the modules up to a layer in one pass.

    Args:
        model: A plain module.
        layer: One of its modules.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.ones(1, 2)
        >>> prefix = Prefix(model, model[1])
        >>> with prefix.kept():
        ...     y = model(x)
        >>> _ = nn.init.zeros_(model[0].weight)
        >>> with prefix.returned():  # the first module does not run
        ...     torch.equal(model(x), y)
        True
    """

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self._layer, self._modules = layer, _outermost(model, layer)
        self._outputs: dict[int, list[_Kept]] = {}
        self._bytes = self._running = 0
        self._is_over = self._is_broken = False

    @property
    def is_complete(self) -> bool:
        """Whether the pass reached the layer once, with outputs that could be kept."""
        return self._is_over and not self._is_broken

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the outputs of a pass in this context."""
        with self._replaced(self._keep):
            yield

    @contextmanager
    def returned(self) -> Iterator[None]:
        """Return the kept outputs in place of new ones, for the first pass in this context."""
        left = {key: deque(outputs) for key, outputs in self._outputs.items()}

        def take(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outputs = left.get(id(module))
            kept = outputs.popleft() if outputs else None
            return forward(*args, **kwargs) if kept is None or not kept.is_unchanged else kept.output

        with self._replaced(take):
            yield

    def _keep(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the forward function of a module, and keep its output."""
        if self._running or self._is_over:
            # A layer that runs inside of another module, or twice, would be missing in a later pass.
            self._is_broken |= module is self._layer
            return forward(*args, **kwargs)
        self._running += 1
        try:
            output = forward(*args, **kwargs)
        finally:
            self._running -= 1
        self._is_over = module is self._layer
        if not self._is_broken:
            self._add(module, output)
        return output

    def _add(self, module: nn.Module, output: Any) -> None:
        """Add an output, unless it cannot be kept or there are too many."""
        try:
            kept = _Kept.of(output)
        except _Unkept:
            self._is_broken = True
            return
        self._outputs.setdefault(id(module), []).append(kept)
        self._bytes += sum(x.numel() * x.element_size() for x in kept.tensors)
        if self._bytes > _BYTES:
            self._is_broken = True
            self._outputs.clear()

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Replace the forward functions of the modules in this context."""
        before = [(vars(m), vars(m).get("forward")) for m in self._modules]
        try:
            for module in self._modules:
                vars(module)["forward"] = partial(forward, module, module.forward)
            yield
        finally:
            for own, known in before:
                own.pop("forward", None)
                if known is not None:
                    own["forward"] = known


def _outermost(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """List the outermost modules that do not hold the layer, and the layer."""
    holds: dict[nn.Module, bool] = {}

    def look(module: nn.Module) -> bool:
        """Find out whether a module is the layer or holds it."""
        if module not in holds:
            holds[module] = module is layer
            holds[module] = any([look(child) for child in module.children()]) or module is layer
        return holds[module]

    look(model)
    holders = [m for m, is_holder in holds.items() if is_holder and m is not layer]
    around = dict.fromkeys(child for m in holders for child in m.children() if not holds[child])
    return [m for m in (*around, layer) if not isinstance(m, torch.jit.ScriptModule)]


def _detached(output: Any, tensors: list[Tensor]) -> Any:
    """Return an output without its graph, and add its tensors to a list."""
    if isinstance(output, Tensor):
        tensors.append(output.detach())
        return tensors[-1]
    if type(output) in (tuple, list):
        return type(output)(_detached(value, tensors) for value in output)
    if type(output) is dict:
        return {key: _detached(value, tensors) for key, value in output.items()}
    if output is None:
        return None
    raise _Unkept
