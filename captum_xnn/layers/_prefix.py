"""Keep the outputs of the modules up to a layer, so that a later pass with the same example does not compute them.

Explaining one image takes two passes: one for maps, activations and outputs, and one for the rest of the model at
points of the path integral. The modules up to the layer would compute the same in both. The second pass takes their
outputs from memory instead. Code outside of modules runs again.

Kept are the outputs of the outermost modules that do not hold the layer, and of the layer itself. A module may change
its input in place, and the model may use that input behind the layer. The later pass then lacks the change. The
comparison of outputs at the layer's own activations finds such models
(:func:`captum_xnn.models._contribution_groups.integrate`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Prefix"]

# Most bytes of outputs to keep.
_BYTES = 1 << 28


class _Unkept(Exception):
    """Raised for an output that cannot be copied."""


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
        self._outputs: dict[int, list[Any]] = {}
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
            return _copied(outputs.popleft()) if outputs else forward(*args, **kwargs)

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
            try:
                self._outputs.setdefault(id(module), []).append(_copied(output, self._count))
            except _Unkept:
                self._is_broken = True
        return output

    def _count(self, x: Tensor) -> None:
        """Count the bytes of an output, and raise if there are too many."""
        self._bytes += x.numel() * x.element_size()
        if self._bytes > _BYTES:
            self._outputs.clear()
            raise _Unkept

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
    holders = {m for m in model.modules() if any(part is layer for part in m.modules())}
    around = dict.fromkeys(child for m in holders if m is not layer for child in m.children() if child not in holders)
    return [m for m in (*around, layer) if not isinstance(m, torch.jit.ScriptModule)]


def _copied(output: Any, count: Callable[[Tensor], None] = lambda x: None) -> Any:
    """Copy the tensors of an output: later code may work in place.

    Args:
        output: A tensor, None, or tuples, lists and dicts of these.
        count: Is called with each tensor.
    """
    if isinstance(output, Tensor):
        count(output)
        return output.detach().clone()
    if type(output) in (tuple, list):
        return type(output)(_copied(value, count) for value in output)
    if type(output) is dict:
        return {key: _copied(value, count) for key, value in output.items()}
    if output is None:
        return None
    raise _Unkept
