"""Embeddings of models that take ids of tokens: find the layer, and put the mean embedding in a token's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._state import untouched

__all__ = ["covered_token", "embedding_of", "lengths_of"]


@contextmanager
def covered_token(model: nn.Module, ids: Tensor, token: int) -> Iterator[None]:
    """Replace the embedding of one token of each example by the mean over the vocabulary in this context.

    It changes the output of embedding layers that get rows of these ids, also repeated ones, as paths of integration
    have them. Embeddings of positions get other numbers. The row of padding does not count for the mean.

    Args:
        model: A plain module.
        ids: Ids of the tokens (n, L) that go into the model in this context.
        token: Index of the token to replace.

    Raises:
        ValueError: If no embedding layer got these ids.

    Example:
        >>> layer = nn.Embedding.from_pretrained(torch.tensor([[1.0], [3.0]]))
        >>> with covered_token(layer, torch.tensor([[0, 1]]), 1):
        ...     layer(torch.tensor([[0, 1]])).flatten()
        tensor([1., 2.])
    """
    replaced = False

    def replace(layer: nn.Embedding, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        nonlocal replaced
        given = arguments[0] if arguments else None
        if not isinstance(given, Tensor) or given.shape[1:] != ids.shape[1:]:
            return None
        if not bool((given[:, None] == ids.to(given)).all(2).any(1).all()):
            return None
        replaced = True
        covered = output.clone()
        covered[:, token] = _mean(layer).to(covered)
        return covered

    handles = [m.register_forward_hook(replace) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not replaced:
        raise ValueError(
            f"no nn.Embedding of the model takes the ids {tuple(ids.shape)}, so a token has no mean; pass fill=, the "
            "id of padding or of unknown words"
        )


@torch.no_grad()
def embedding_of(model: nn.Module, arguments: tuple[Any, ...]) -> str | None:
    """Find the dotted name of the first embedding layer that gets the ids of the tokens; None if there is none.

    Args:
        model: A plain module.
        arguments: Arguments of the model, on its device. The first are ids of tokens (n, L).

    Example:
        >>> embedding_of(nn.Sequential(nn.Embedding(3, 2), nn.ReLU()), (torch.tensor([[0, 2]]),))
        '0'
    """
    found: list[str] = []

    def note(name: str) -> Any:
        def hook(_layer: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor) and torch.equal(given[0], arguments[0]):
                found.append(name)

        return hook

    handles = [
        m.register_forward_pre_hook(note(name)) for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    ]
    try:
        with untouched(model):
            model(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def lengths_of(model: nn.Module, arguments: tuple[Any, ...]) -> list[int] | None:
    """Count the tokens of each text up to the padding at its end; None if the embedding layer has no padding.

    Args:
        model: A plain module.
        arguments: Arguments of the model, on its device. The first are ids of tokens (n, L).

    Example:
        >>> layer = nn.Embedding(3, 2, padding_idx=0)
        >>> lengths_of(layer, (torch.tensor([[0, 2, 0], [1, 1, 2]]),))
        [2, 3]
    """
    name, ids = embedding_of(model, arguments), arguments[0]
    padding = None if name is None else model.get_submodule(name).padding_idx
    if padding is None:
        return None
    last = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return [max(1, n) for n in torch.where(ids != padding, last, 0).amax(1).tolist()]


def _mean(layer: nn.Embedding) -> Tensor:
    """Compute the mean embedding, (E,)."""
    rows = layer.weight.detach()
    if layer.padding_idx is not None and len(rows) > 1:
        keep = torch.arange(len(rows), device=rows.device) != layer.padding_idx
        rows = rows[keep]
    return rows.mean(0)
