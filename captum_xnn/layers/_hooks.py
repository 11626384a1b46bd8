"""Hook modules for one context and one thread. Replicas of a model run the same modules in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["hooked"]


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Call a function after each call of some modules, in this context and in this thread.

    Args:
        modules: The modules.
        hook: Gets the module, its positional arguments and its output. Anything that it returns, except None, takes the
            output's place.

    Example:
        >>> import torch
        >>> layer = nn.ReLU()
        >>> with hooked([layer], lambda _module, _arguments, output: output + 1):
        ...     layer(torch.tensor([-1.0, 2.0]))
        tensor([1., 3.])
        >>> layer(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    thread = threading.get_ident()

    def here(module: nn.Module, arguments: Any, output: Any) -> Any:
        return hook(module, arguments, output) if threading.get_ident() == thread else None

    handles = [module.register_forward_hook(here) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
