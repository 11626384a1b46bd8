"""Arrange a transformer's tokens as feature maps.

Conventions:
    N examples, C channels of a token, H x W cells of an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._grid import Cells

__all__ = ["TOKENS", "TokenGrid", "checked_grid", "checked_tokens"]

TOKENS = {"vit": 3, "swin": 4, "sequence": 3}
"""The known orders of tokens, each with the number of dimensions of such a layer's output."""


class TokenGrid(nn.Module):
    """Arranges tokens as feature maps, for methods that need channels first.

    Args:
        kind: ``"vit"`` for (N, tokens, C), where some tokens are the cells of an image; ``"swin"`` for (N, H, W, C);
            ``"sequence"`` for (N, tokens, C) without an image.
        cells: The token of each cell, for ``"vit"``. A height and width mean the last tokens, row by row.

    Example:
        >>> TokenGrid("vit", (4, 4))(torch.zeros(2, 17, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, kind: str, cells: Cells | tuple[int, int] | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.cells = cells

    def forward(self, tokens: Tensor) -> Tensor:
        """Arrange tokens as feature maps (N, C, H, W); a sequence becomes (N, C, tokens).

        Args:
            tokens: Output of the layer.

        Raises:
            ValueError: If the output has another number of dimensions.
        """
        if tokens.dim() != TOKENS[self.kind]:
            raise ValueError(
                f"tokens={self.kind!r} needs tokens of {TOKENS[self.kind]} dimensions, and the layer's output is "
                f"{tuple(tokens.shape)}; choose another of {', '.join(map(repr, TOKENS))}, or another layer"
            )
        if self.kind == "swin":
            return tokens.permute(0, 3, 1, 2)
        if self.kind == "sequence":
            return tokens.transpose(1, 2)
        height, width, own = self._cells_of(tokens)
        return tokens[:, own].transpose(1, 2).reshape(len(tokens), -1, height, width)

    def back(self, maps: Tensor, tokens: Tensor) -> Tensor:
        """Put feature maps back in the place of the tokens.

        Args:
            maps: Result of :meth:`forward`.
            tokens: Argument of :meth:`forward`.
        """
        if self.kind == "swin":
            return maps.permute(0, 2, 3, 1)
        if self.kind == "sequence":
            return maps.transpose(1, 2)
        return tokens.index_copy(1, self._cells_of(tokens)[2], maps.flatten(2).transpose(1, 2))

    def _cells_of(self, tokens: Tensor) -> Cells:
        """Find the token of each cell, on the device of the tokens."""
        assert self.cells is not None
        count = tokens.shape[1]
        if isinstance(self.cells, Cells):
            return self.cells._replace(tokens=self.cells.tokens.to(tokens.device))
        height, width = self.cells
        return Cells(height, width, torch.arange(count - height * width, count, device=tokens.device))

    @contextmanager
    def after(self, layer: nn.Module) -> Iterator[None]:
        """Send the output of a layer through this module while the context is open.

        Args:
            layer: A layer whose output is tokens.
        """
        handle = layer.register_forward_hook(lambda _module, _inputs, tokens: self.back(self(tokens), tokens))
        try:
            yield
        finally:
            handle.remove()


def checked_tokens(tokens: str | None) -> str | None:
    """Check the setting ``tokens=`` of a backend, and return it.

    Args:
        tokens: One of :data:`TOKENS`, or None.

    Raises:
        ValueError: If the order is unknown.
    """
    if tokens is not None and tokens not in TOKENS:
        raise ValueError(f"tokens is {tokens!r}; pass one of {', '.join(map(repr, TOKENS))}")
    return tokens


def checked_grid(grid: Any, tokens: str | None) -> tuple[int, int] | None:
    """Check the setting ``grid=`` of a backend, and return it as a tuple.

    Args:
        grid: Cells along height and width, or None.
        tokens: The setting ``tokens=``.

    Raises:
        ValueError: If the grid is not two positive integers, or tokens are not ``"vit"``.
    """
    if grid is None:
        return None
    if tokens != "vit":
        raise ValueError(f"grid={grid!r} is for tokens='vit', and tokens is {tokens!r}; pass both, or leave grid out")
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)):
        raise ValueError(f"grid is {grid!r}; pass cells along height and width, such as grid=(14, 14)")
    return grid[0], grid[1]
