"""Fit DRSA: compute activations and slopes of a few hundred examples with the model, and learn the subspaces.

Conventions:
    M examples, D dimensions or channels of Z, C outputs of an explainer. Places of feature maps and tokens are rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from captum_xnn.activations._activations import ChosenRows, Source
from captum_xnn.activations._batches import Batches, refuse_changed, refuse_lack
from captum_xnn.activations._memmap import Rows, chunks
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._state import untouched
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._targets import Target
from captum_xnn.models.baselines._subspaces import DRSA

__all__ = ["evenly", "fit_subspaces"]

# Examples in one batch of the model, and rows from which subspaces and dictionaries are learned.
_BATCH, _ROWS = 64, 2000


def fit_subspaces(
    forms: Sequence[DRSA],
    tail: Tail,
    Z: Tensor | Rows,
    ys: Sequence[Tensor],
    source: Source | None,
    targets: Sequence[tuple[Target, ...]],
    *,
    marks: Sequence[Tensor | None],
    seed: int,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Fit subspaces in place, one explainer after another. Yield what contributions leave unexplained, (C, m).

    Args:
        forms: One for each explainer.
        tail: The model's rest.
        Z: Activations of all examples, (M, ...).
        ys: For each explainer the outputs of all examples, (M, C).
        source: Source of the examples' inputs, in the order of Z.
        targets: For each explainer its targets.
        marks: For each explainer a boolean (M,) of positives.
        seed: Seed of the random start.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If Z or an output does not vary, if the output does not depend on the layer, or without a source.
    """
    if source is None:
        raise ValueError(
            "DRSA needs the inputs again, but these activations do not say which inputs they come from; pass the data "
            "themselves, as in fit(loader, target)"
        )
    base = forms[0].mean_of(chunks(Z), len(Z))
    with closing(tqdm(desc=f"slopes at {tail.name}", unit=" examples", disable=not progress, leave=False)) as bar:
        for form, y, of, mark in zip(forms, ys, targets, marks, strict=True):
            form.base.copy_(base)
            form.scale.copy_(y.double().std(0))
            chosen = ChosenRows.choose([mark], len(Z), form.config["positives"], form.config["others"])
            yield _fit(form, tail, Z, source, of, chosen, seed, bar)


def _fit(
    form: DRSA,
    tail: Tail,
    Z: Tensor | Rows,
    source: Source,
    targets: tuple[Target, ...],
    chosen: ChosenRows,
    seed: int,
    bar: tqdm[Any],
) -> Tensor:
    """Fit one form, and return what contributions leave unexplained."""
    (positives,) = chosen.positives
    rows = torch.unique(torch.cat([positives, chosen.others]))
    device = form.directions.device
    a, c, off = [], [], []
    tail.forget()
    with torch.inference_mode(False), untouched(tail.model), torch.no_grad():
        for picked in Batches(source.data, _BATCH, source.unpack).picked(rows):
            inputs, additional = picked.on(device)
            for rows_of_batch in torch.split(picked.among(rows), _BATCH):
                x, more = rows_of(inputs, additional, torch.searchsorted(picked.rows, rows_of_batch))
                integral = form.integral(tail, x, more, [[target] * len(rows_of_batch) for target in targets])
                refuse_changed(Z[rows_of_batch].to(integral.Z.device), integral.Z, rows_of_batch)
                activations, slopes = form.factors(integral)
                a.append(activations.cpu())
                c.append(slopes.cpu())
                off.append((integral.end - integral.start - (activations * slopes).sum((2, 3))).cpu())
                bar.update(len(rows_of_batch))
    refuse_lack(sum(map(len, a)), rows)
    activations, slopes = torch.cat(a), torch.cat(c, 1)
    tail.check_contributions(activations * slopes)
    C, M, P, _ = slopes.shape
    slopes = slopes / form.scale.to(slopes)[:, None, None, None]
    marked = torch.isin(rows, positives)[:, None].expand(M, P).repeat(C, 1, 1)
    flat = activations.expand(C, -1, -1, -1).flatten(0, 2), slopes.flatten(0, 2), marked.flatten()
    form.learn(*(evenly(values) for values in flat), seed=seed)
    return torch.cat(off, 1)


def evenly(rows: Tensor) -> Tensor:
    """Select at most as many rows as subspaces and dictionaries are learned from, evenly spread.

    Args:
        rows: (M, ...).
    """
    count = min(len(rows), _ROWS)
    some: Tensor = rows[torch.linspace(0, len(rows) - 1, count, dtype=torch.float64, device="cpu").round().long()]
    return some
