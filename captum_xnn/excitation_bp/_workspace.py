"""Reuse memory for intermediate results."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Workspace"]


class Workspace:
    """Memory for intermediate results, used by all layers in turn: new memory costs more time than the work in it."""

    PIECE = 1 << 22
    """Numbers to work on at once, 16 MiB. The rectified weights of linear layers then stay in the processor's cache for
    both products. The results of convolutions stay in memory that the process keeps."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._free: list[Tensor] = []

    def give(self, x: Tensor) -> None:
        """Take back the memory of a tensor that nothing uses any more.

        Args:
            x: The tensor.
        """
        # The allocator keeps smaller tensors itself; on CUDA it keeps all.
        if x.device.type == "cpu" and 4 * x.numel() >= self.PIECE and x.is_contiguous():
            self._free.append(x.view(-1))

    def take(self, like: Tensor) -> Tensor:
        """Provide memory in the shape, dtype and device of a tensor, with undefined contents.

        Args:
            like: A tensor of the wanted shape.
        """
        if not like.is_contiguous():
            return torch.empty_like(like)
        for i, x in enumerate(self._free):
            if x.numel() >= like.numel() and x.dtype == like.dtype and x.device == like.device:
                return self._free.pop(i)[: like.numel()].view(like.shape)
        self._free.clear()  # further down the graph, tensors are usually larger
        return torch.empty_like(like)

    def like(self, x: Tensor, dtype: torch.dtype, *, purpose: str = "weights") -> Tensor:
        """Provide memory in the shape and on the device of x, with undefined contents.

        Args:
            x: A tensor of the wanted shape.
            dtype: The wanted dtype.
            purpose: Name of the piece of memory; each purpose has one piece.
        """
        key = purpose, x.device, dtype
        memory = self._memory.get(key)
        if memory is None or memory.numel() < x.numel():
            memory = self._memory[key] = torch.empty(x.numel(), dtype=dtype, device=x.device)
        return memory[: x.numel()].view(x.shape)
