"""Threads for small products: one, because several wait for each other longer than they compute.

Each product of several threads ends when its last thread ends. If another process holds a core, the other threads wait
for that core each time, some milliseconds. A fit of 600 steps has ten thousand small products, and the path integral
of a small network some hundred.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["one_thread_if_small", "pass_flops"]

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


def pass_flops(model: nn.Module, inputs: Any) -> float:
    """Estimate the additions and multiplications of one forward pass, rather too many than too few.

    Each weight serves one product for each example of vectors, and one for each number of an example of any other
    shape: a convolution uses its weights at no more places than an image has numbers. Lazy weights without a size do
    not count.

    Args:
        model: The model.
        inputs: Its inputs, tensors (N, ...) or other values. Only tensors count.

    Example:
        >>> pass_flops(nn.Linear(6, 2, bias=False), (torch.zeros(10, 6),))
        240.0
        >>> pass_flops(nn.Conv2d(1, 2, 3, bias=False), (torch.zeros(10, 1, 8, 8),))
        23040.0
    """
    values = inputs if isinstance(inputs, tuple) else (inputs,)
    tensors = [x for x in values if isinstance(x, Tensor)]
    products = max((len(x) if x.dim() == 2 and x.is_floating_point() else x.numel() for x in tensors), default=0)
    return 2.0 * products * sum(p.numel() for p in model.parameters() if not is_lazy(p))
