"""Show examples that are not images in a report: texts as tokens, and rows of a table as input features.

Conventions:
    N examples, K x-features, L cells of an example: tokens, or input features. Maps (N, K, L, ...) are summed over
    the dimensions after the cells, such as those of embeddings. On the page they are scaled like maps of images. A
    table also has parts, which add up to its contributions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._forward_args import format_forward_args
from captum_xnn.layers._targets import Target, positives_of, predicted_classes
from captum_xnn.metrics._faithfulness import FaithfulnessStream
from captum_xnn.patch_scores import CoveredBatch, PatchScores, patch_scores_of
from captum_xnn.report._cards import count_examples
from captum_xnn.report._examples import (
    ExampleExplanations,
    TargetContent,
    captioned,
    compare,
    explain_examples,
    numbers_of,
    scaled,
    short,
    strengths,
)
from captum_xnn.report._inputs import RowBatch, displayed, model_outputs, row_batches, texts_of
from captum_xnn.report._output_names import OutputNames
from captum_xnn.report._parts import add_up, directions, parts_of

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.attribution import XNNAttribution
    from captum_xnn.explanation import Contributions, Explanation
    from captum_xnn.report._options import ReportOptions

__all__ = ["CellsOfTarget", "CellsRun"]

# Cells on a card.
_CELLS = 8
# Cells of an example that is covered: fewer have no order to speak of.
_LEAST = 3
# Rows of a table's data that cards get maps of. Correlations of as many are within .07 or so.
_MAPPED = 200
_BATCH = 64


class CellsOfTarget:
    """Collects the numbers and maps of one target, and the contents of each x-feature's card."""

    def __init__(self, target: Target, K: int, words: bool, apart: bool) -> None:
        self.target, self.words = target, words
        self.apart = apart
        """Whether cards are about data, and not about the examples that the page shows."""
        self.rows: list[dict[str, Any]] = []
        self.contributions: list[tuple[Tensor, Tensor]] = []
        """Contributions by this fit and by another one, batch by batch."""
        self.classes = False
        self.faithfulness = FaithfulnessStream(target)
        self.positive_contributions: list[Tensor] = []
        self.covered: list[CoveredBatch] = []
        """Positives to cover token by token, or column by column."""
        self.spread: list[Tensor] = []
        """Contributions of the positives of a table, each spread over its inputs in proportion to its map, (K, L)."""
        self.values: list[list[float]] = []
        """Values of these positives, as the page shows them."""
        self.sums: list[dict[str, list[float]]] = [defaultdict(lambda: [0.0, 0.0, 0.0]) for _ in range(K)]

    def add_data(self, numbers: Contributions | Explanation, y_hat: Tensor) -> None:
        """Add examples of the data to the faithfulness, and positives to the shares."""
        self.faithfulness.update(numbers.surrogate.cpu(), numbers.prediction.cpu(), y_hat)
        positives, contributions = positives_of(predicted_classes(y_hat), [self.target]), numbers.contributions
        self.classes = positives is not None
        if positives is not None:
            contributions = contributions[positives.to(contributions.device)]
        self.positive_contributions.append(contributions.double().cpu())

    def add_examples(
        self,
        explanations: ExampleExplanations,
        given: Sequence[int | None],
        cells: Sequence[Sequence[str]],
        names: OutputNames,
        values: Sequence[list[float] | None],
    ) -> None:
        """Add examples that the page shows, with the texts of their cells, and of a table their values."""
        positives = [not self.classes or c == self.target for c in given]
        rows = []
        for i, (row, maps) in enumerate(
            _rows_of_cells(explanations.why, explanations.one_heatmaps, positives, cells, self.words)
        ):
            rows.append(row)
            if positives[i] and not self.apart:
                self._add_cells(maps, explanations.why.contributions[i], cells[i], values[i])
        if explanations.against is not None:
            against = _rows_of_cells(
                explanations.against, explanations.one_heatmaps_against, [True] * len(cells), cells, self.words
            )
            compare(rows, (row for row, _ in against), names.of(explanations.against.target[0]))
        self.rows.extend(rows)
        if explanations.contributions is not None:
            self.contributions.append(explanations.contributions)

    @property
    def needs_maps(self) -> bool:
        """Whether cards need maps of further data."""
        return self.apart and len(self.values) < _MAPPED

    def add_mapped(
        self,
        why: Explanation,
        predicted: Tensor | None,
        cells: Sequence[Sequence[str]],
        values: Sequence[list[float] | None],
    ) -> None:
        """Add the maps of a table's data, (n, K, L), to the cards."""
        heat, contributions = _over_cells(why.directed_maps()).cpu(), why.contributions.detach().double().cpu()
        for i, texts in enumerate(cells):
            if predicted is None or int(predicted[i]) == self.target:
                maps = scaled(heat[i][:, None, : len(texts)], contributions[i])[:, 0]
                self._add_cells(maps, contributions[i], texts, values[i])

    def add_covered(self, batch: RowBatch, cells: Sequence[Sequence[str]], most: int) -> None:
        """Keep the last positives of a batch whose cells have an order, until there are ``most`` of them."""
        positives = [row["is_positive"] for row in self.rows[-len(cells) :]]
        some = [i for i, texts in enumerate(cells) if positives[i] and len(texts) >= _LEAST]
        some = some[: most - sum(len(covered.first) for covered in self.covered)]
        if some:
            inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
            x, more = rows_of(inputs, format_forward_args(batch.additional), torch.tensor(some, device="cpu"))
            self.covered.append(CoveredBatch(x, more, [len(cells[i]) for i in some]))

    def drop_parts(self) -> None:
        """Take the parts from all rows unless they add up to the contributions."""
        if not self.rows or "parts" not in self.rows[0]:
            return
        parts = [torch.tensor(row["parts"], dtype=torch.double, device="cpu") for row in self.rows]
        if not add_up(parts, [torch.tensor(row["c"], dtype=torch.double, device="cpu") for row in self.rows]):
            for row in self.rows:
                row.pop("parts")
                row.get("rather", {}).pop("parts", None)

    def _add_cells(self, maps: Tensor, contributions: Tensor, texts: Sequence[str], values: list[float] | None) -> None:
        """Spread each contribution over the cells in proportion to its map, (K, L), and add up by text."""
        contributions, mass = contributions.detach().double().cpu(), maps.double().abs().sum(1)
        spread = maps.double() * torch.where(mass > 0, contributions.abs() / torch.where(mass > 0, mass, 1), 0)[:, None]
        for sums, of_feature in zip(self.sums, spread.tolist(), strict=True):
            for text, value in zip(texts, of_feature, strict=True):
                entry = sums[text]
                entry[0] += value
                entry[1] += abs(value)
                entry[2] += 1
        if values is not None:
            self.spread.append(spread)
            self.values.append(values)

    def cards(self) -> list[dict[str, Any]]:
        """Return share, contribution and strongest cells of each x-feature.

        Raises:
            ValueError: If the model gives the class to none of the data.
        """
        contributions = torch.cat(self.positive_contributions)
        examples = self.faithfulness.examples
        if not len(contributions):
            raise ValueError(
                f"the model gives class {self.target} to none of the {examples} examples; pass data with examples of "
                "the class"
            )
        size = contributions.abs().sum(0)
        total = float(size.sum())
        return [
            {
                "feature": k,
                "share": float(size[k]) / total if total else 0.0,
                "contribution": float(contributions[:, k].mean()),
                "deviation": float(contributions[:, k].std(correction=0)),
                "examples": examples,
                "positives": len(contributions),
                "cells": self._cells(k),
                # Of images only.
                "lists": [],
                "features": [],
                "outputs": [],
                "places": [],
            }
            for k in range(contributions.shape[1])
        ]

    def _cells(self, k: int) -> list[tuple[str, float, float | str]]:
        """Return the strongest cells of an x-feature: text, length of the bar in [0, 1], and a number or a direction.

        A word's number is its mean contribution where it occurs, so that a frequent word does not win by its number. A
        single text proves little: words that occur once are left out if others are left. All input features of a table
        occur equally often, so they are ranked by their share of the maps. Their mean contribution is near 0, as
        contributions count from the average row: whether higher values raise or lower the output takes its place.
        """
        if self.words:
            often = {text: of for text, of in self.sums[k].items() if of[2] > 1} or self.sums[k]
            means = {text: signed / count for text, (signed, _, count) in often.items()}
            largest = max(map(abs, means.values()), default=0.0)
            ranked = sorted(means.items(), key=lambda item: -abs(item[1]))[:_CELLS]
            return [(text, abs(mean) / largest, mean) for text, mean in ranked if mean]
        total = sum(size for _, size, _ in self.sums[k].values())
        by_size = sorted(self.sums[k].items(), key=lambda item: -item[1][1])[:_CELLS]
        said = self._directions(k)
        return [(text, size / total, said.get(text, "")) for text, (_, size, _) in by_size if size > 0]

    def _directions(self, k: int) -> dict[str, str]:
        """Return by input whether higher values raise or lower the output through an x-feature; empty if not clear."""
        if not self.values:
            return {}
        found = directions(torch.tensor(self.values, device="cpu"), torch.stack([spread[k] for spread in self.spread]))
        return dict(zip(self.sums[k], found, strict=True)) if len(found) == len(self.sums[k]) else {}


class CellsRun:
    """Explains the inputs of a page about texts or a table, and the data of its cards."""

    def __init__(self, xnn: XNNAttribution, inputs: Any, targets: Sequence[Target], options: ReportOptions) -> None:
        self.xnn, self.inputs, self.targets, self.options = xnn, inputs, targets, options
        self.names = OutputNames.of_targets(options.class_names, xnn, targets)
        self.kind = "table" if options.tokens is None else "texts"
        words = self.kind == "texts"
        self.apart = options.data is not None and options.data is not inputs
        """Whether faithfulness and cards come from other data than the inputs."""
        self.of_targets = [
            CellsOfTarget(t, xnn.explainer(t).form.n_features, words, self.apart and not words) for t in targets
        ]
        self.shown: list[dict[str, Any]] = []
        self.sum: Tensor | float = 0.0
        """Sum of the data of a table, over examples."""
        self.shown_sum: Tensor | float = 0.0
        """The same of the values that the page shows."""
        self.examples = 0

    def explain(self) -> None:
        """Explain all inputs and data."""
        for batch in self._bar(self.inputs, "explaining"):
            self._explain(batch)
        if not self.apart:
            return
        for batch in self._bar(self.options.data, "reading the data"):
            self._add(batch)
            y_hat = model_outputs(self.xnn, *batch.arguments)
            for rows in self.of_targets:
                rows.add_data(self._read(batch, rows, y_hat), y_hat)

    def _read(self, batch: RowBatch, rows: CellsOfTarget, y_hat: Tensor) -> Contributions | Explanation:
        """Explain a batch of the data, with maps while the cards need them."""
        arguments, size = (batch.inputs, rows.target, batch.additional), self.options.internal_batch_size
        if not rows.needs_maps or batch.first.dim() != 2:
            return self.xnn.contributions(*arguments, internal_batch_size=size)
        why = self.xnn.explain(*arguments, internal_batch_size=size)
        predicted = predicted_classes(y_hat) if isinstance(rows.target, int) else None
        cells = texts_of(batch, 0, None, self.options.input_names)
        rows.add_mapped(why, predicted, cells, displayed(batch.first, self.options.display).tolist())
        return why

    def contents(self) -> Iterator[TargetContent]:
        """Yield rows, cards and figures of each target."""
        for rows in self.of_targets:
            rows.drop_parts()
            yield TargetContent(
                target=rows.target,
                label=self.names.of(rows.target),
                classes=rows.classes,
                rows=rows.rows,
                cards=rows.cards(),
                faithfulness=rows.faithfulness,
                positive_contributions=torch.cat(rows.positive_contributions),
                contributions=rows.contributions,
                patches=self._patch_scores(rows),
            )

    def _bar(self, data: Any, what: str) -> Iterator[RowBatch]:
        """Yield batches, and advance the progress bar."""
        total, quiet = count_examples(data), not self.options.progress
        with tqdm(total=total, desc=what, unit="example", disable=quiet, leave=False) as bar:
            for batch in row_batches(self.xnn, data):
                yield batch
                bar.update(len(batch.first))

    def _explain(self, batch: RowBatch) -> None:
        """Explain a batch. Add it to the numbers of the cards if the report has no other data."""
        xnn, options = self.xnn, self.options
        y_hat = model_outputs(xnn, *batch.arguments)
        predicted = predicted_classes(y_hat)
        given = [None] * len(y_hat) if predicted is None else predicted.tolist()
        cells = texts_of(batch, len(self.shown), options.tokens, options.input_names)
        values = self._show(batch, given, cells)
        if not self.apart:
            self._add(batch)
        for rows, t in zip(self.of_targets, self.targets, strict=True):
            explanations = explain_examples(xnn, batch.inputs, t, options, batch.additional)
            rows.classes = predicted is not None and isinstance(t, int)
            rows.add_examples(explanations, given, cells, self.names, values)
            rows.add_covered(batch, cells, options.patches)
            if not self.apart:
                rows.add_data(explanations.why, y_hat)

    def _add(self, batch: RowBatch) -> None:
        """Add the data of a table to the means of its columns."""
        if self.kind == "table":
            self.sum = self.sum + batch.first.detach().double().cpu().sum(0)
            if batch.first.dim() == 2:
                self.shown_sum = self.shown_sum + displayed(batch.first, self.options.display).double().sum(0)
            self.examples += len(batch.first)

    def _patch_scores(self, rows: CellsOfTarget) -> PatchScores | None:
        """Cover the kept positives of a target; return None without any."""
        if not rows.covered:
            return None
        fill = self.options.fill
        if fill is None and self.kind == "table":
            if self.examples < 2:
                raise ValueError(
                    "patches= covers each column by its mean, and the mean over 1 row is the row's own value; pass "
                    "data= with more rows, a value as fill=, or leave patches out"
                )
            fill = self.sum / self.examples
        with tqdm(total=1, desc="covering patches", disable=not self.options.progress, leave=False) as bar:
            size = self.options.internal_batch_size or _BATCH
            scores = patch_scores_of(self.xnn, rows.covered, rows.target, fill=fill, internal_batch_size=size)
            bar.update()
        return scores

    def means(self) -> list[float] | None:
        """Return the mean of each column of a table over the data, as the page shows it; None of texts."""
        return (
            [short(v) for v in (self.shown_sum / self.examples).tolist()]
            if isinstance(self.shown_sum, Tensor)
            else None
        )

    def _show(
        self, batch: RowBatch, given: Sequence[int | None], cells: Sequence[list[str]]
    ) -> Sequence[list[float] | None]:
        """Keep texts and, of a table, values; return the values."""
        valued = self.kind == "table" and batch.first.dim() == 2
        values = displayed(batch.first, self.options.display).tolist() if valued else [None] * len(cells)
        for texts, c, numbers in zip(cells, given, values, strict=True):
            row: dict[str, Any] = {"predicted_class": "" if c is None else self.names.of(c), "cells": texts}
            self.shown.append(row if numbers is None else {**row, "values": [float(f"{v:.9g}") for v in numbers]})
        return values

    def captioned(self) -> list[dict[str, Any]]:
        """Return all examples with their captions."""
        return captioned(self.shown, self.options.captions, "text" if self.kind == "texts" else "example")


def _rows_of_cells(
    why: Explanation, one_heatmaps: Any, positives: Sequence[bool], cells: Sequence[Sequence[str]], words: bool
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield the numbers and maps of each example for one target, as the page has them, and its scaled maps (K, L)."""
    single = one_heatmaps[0] if isinstance(one_heatmaps, tuple) else one_heatmaps
    heat, whole = _over_cells(why.directed_maps()).cpu(), _over_cells(single.detach()).cpu()
    given = why.maps[0] if isinstance(why.maps, tuple) else why.maps
    parts = parts_of(*(v.detach().cpu() for v in (_over_cells(given), why.features, why.contributions)))
    for i, texts in enumerate(cells):
        contributions = why.contributions[i].detach().double().cpu()
        maps = scaled(heat[i][:, None, : len(texts)], contributions)[:, 0]
        row = {
            **numbers_of(why, i, positives[i]),
            "maps": [[short(v) for v in values.tolist()] for values in maps],
            "one": [
                short(v) for v in scaled(whole[i][:, None, : len(texts)], torch.ones(1, device="cpu"))[0, 0].tolist()
            ],
            "strength": [round(s, 3) for s in strengths(maps[:, None], contributions)],
        }
        if not words:
            row["parts"] = [[short(v) for v in values] for values in parts[i, :, : len(texts)].tolist()]
        yield row, maps


def _over_cells(maps: Tensor) -> Tensor:
    """Sum maps (n, K, L, ...) over the dimensions after the cells, (n, K, L)."""
    return maps.flatten(3).sum(3) if maps.dim() > 3 else maps
