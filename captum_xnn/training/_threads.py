"""Threads for small products: one, because several wait for each other longer than they compute.

Each product of several threads ends when its last thread ends. If another process holds a core, the other threads wait
for that core each time, some milliseconds. A fit of 600 steps has ten thousand small products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread_if_small"]

# Additions and multiplications between two decisions that one thread does in a few milliseconds.
_SMALL = 3e8


@contextmanager
def one_thread_if_small(flops: float) -> Iterator[None]:
    """Limit torch to one thread within a context if the work is small, and restore the number afterwards.

    The choice depends on the size of the problem alone. The same problem therefore gives the same numbers, bit for bit,
    on a busy machine.

    Args:
        flops: Additions and multiplications of a step.

    Example:
        >>> before = torch.get_num_threads()
        >>> with one_thread_if_small(1e6):
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    before = torch.get_num_threads()
    if flops >= _SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
