"""Pick the settings of an attribution method that belong to some of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["rows_of_settings"]


def rows_of_settings(settings: dict[str, Any], n: int, rows: Sequence[int]) -> dict[str, Any]:
    """Pick rows of baselines and feature masks that have a row for each example; keep all other settings.

    Args:
        settings: Settings of a call of an attribution method.
        n: Number of examples N.
        rows: Row indices of the examples, which may repeat.

    Example:
        >>> rows_of_settings({"baselines": torch.tensor([[1.0], [2.0]]), "n_steps": 8}, 2, [1])
        {'baselines': tensor([[2.]]), 'n_steps': 8}
    """
    index = torch.tensor(list(rows), device="cpu")

    def pick(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(pick(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        has_rows = value.dim() > 0 and len(value) == n > 1
        # Captum calls view() on masks, and view() fails on expanded tensors.
        return (value[index.to(value.device)] if has_rows else value).contiguous()

    return {k: pick(v) if k in ("baselines", "feature_mask") else v for k, v in settings.items()}
