"""Measures of explainers on a data set: faithfulness, x-features in use, orthogonality of maps, covered patches.

Conventions:
    M inputs, C outputs of the model. One pass over the data serves all targets; groups of contributions add one pass
    for each target. Maps add one pass, and patches add one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from captum_xnn._files import file_to_write, replace_file
from captum_xnn.activations import collect
from captum_xnn.attribution import XNNAttribution
from captum_xnn.cli._model_and_inputs import ModelAndInputs
from captum_xnn.cli._saved_explainers import model_and_explainers, output_to_compare
from captum_xnn.cli._tables import aligned, number, targets_cells, targets_header
from captum_xnn.heatmaps._numbers import Numbers
from captum_xnn.layers._pixels import channels_first
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._targets import Difference, Target, positives_of, predicted_classes, select
from captum_xnn.metrics._faithfulness import Faithfulness
from captum_xnn.metrics._overlap import Orthogonality, OrthogonalityStream
from captum_xnn.metrics._sparsity import effective_number
from captum_xnn.patch_scores import PatchScores, patch_scores

__all__ = ["Evaluation", "evaluate", "run_evaluation"]


class Evaluation(NamedTuple):
    """Measures of one target's explainer on some data.

    Positives are the inputs to which the model gives the class, or all inputs if the outputs are not classes.
    """

    target: Target
    """The explained output, or the output that another one is subtracted from."""
    name: str
    """Name of the target."""
    f_reg: float
    """Mean absolute difference between surrogate and prediction, in logits."""
    f_cls: float | None
    """Share of inputs that keep their predicted class, in [0, 1]; None if the outputs are not classes, and for
    differences."""
    effective: float | None
    """Effective number of x-features, from their mean absolute contributions to the positives. It describes the
    explainer and does not rate it. None without positives."""
    positives: int
    """Number of positives among the inputs."""
    inputs: int
    """Number of inputs M."""
    o1: float | None = None
    """Orthogonality O1 of the maps of some positives; 0 is best. None if no maps were drawn."""
    o2: float | None = None
    """Orthogonality O2 of the same maps; infinite if a map is a combination of others."""
    o1_weighted: float | None = None
    """O1 with each map weighted by its share of the contributions, so that x-features with small contributions count
    little."""
    o2_weighted: float | None = None
    """O2 with the same weights."""
    patches: PatchScores | None = None
    """Measures on covered patches of some positives, with their controls; None if no patches were covered."""


def run_evaluation(arguments: argparse.Namespace) -> str:
    """Measure explainers, write the measures, and return the text to print.

    Args:
        arguments: Arguments of the command.
    """
    written = Path(arguments.explainer, "evaluation.json") if arguments.out is None else arguments.out
    opened, xnn = model_and_explainers(arguments)
    path = file_to_write(written)  # after the check of the explainers' folder, and before the work
    quiet = arguments.quiet
    targets = opened.targets(xnn)
    against = None if arguments.against is None else output_to_compare(opened, targets, arguments.against)
    found = evaluate(
        opened,
        xnn,
        targets,
        maps=arguments.maps,
        patches=arguments.patches,
        against=against,
        progress=not quiet,
    )
    entries = [_finite(result._asdict()) for result in found]
    content = {"data": arguments.data, **({} if against is None else {"against": against}), "targets": entries}
    replace_file(path, json.dumps(content, indent=1).encode())
    columns = {"F_reg": "f_reg", "F_cls": "f_cls", "effective": "effective", "positives": "positives"}
    if arguments.maps:
        columns |= {"O1": "o1", "O2": "o2", "O1_weighted": "o1_weighted", "O2_weighted": "o2_weighted"}
    rows = [
        [*targets_cells(opened, [r.target]), *(number(getattr(r, name)) for name in columns.values())] for r in found
    ]
    tables = [aligned([*targets_header(opened), *columns], rows)]
    if arguments.patches:
        tables += ["", _patches_table(opened, found)]
    return "\n".join([*tables, "", f"{found[0].inputs} inputs. Written: {path}"])


def evaluate(
    opened: ModelAndInputs,
    xnn: XNNAttribution,
    targets: Sequence[Target],
    *,
    maps: int = 0,
    patches: int = 0,
    against: int | None = None,
    progress: bool = True,
) -> list[Evaluation]:
    r"""Measure explainers on the opened inputs; return one entry for each target.

    Args:
        opened: The model and its inputs.
        xnn: The explainers.
        targets: Fitted targets.
        maps: Number of positives of each target to draw maps of, for O1 and O2. The first positives are used.
        patches: Number of positives of each target to cover patch by patch (:mod:`captum_xnn.patch_scores`). A column
            of a table is covered by its mean over all inputs.
        against: Output to subtract: all measures are then of the difference, why the target rather than this output.
            Targets that are this output are left out.
        progress: Whether to show progress bars.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from captum_xnn.cli._configuration import Configuration
        >>> code = "import torch\ntorch.manual_seed(0)\nload = lambda: torch.nn.Sequential("
        >>> code += "torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = Path(folder, "net.py").write_text(code)
        ...     torch.save(torch.randn(100, 4), Path(folder, "inputs.pt"))
        ...     settings = Configuration(model=f"{folder}/net.py", data=f"{folder}/inputs.pt", device="cpu")
        ...     opened = ModelAndInputs.of(settings)
        ...     xnn = XNNAttribution(opened.model, "1", 2).fit(opened.inputs, [0, 1, 2], progress=False)
        ...     results = evaluate(opened, xnn, [0, 1, 2], progress=False)
        >>> [result.inputs for result in results], sum(result.positives for result in results)
        ([100, 100, 100], 100)
    """
    transform = opened.prediction_transform
    found = collect(opened.model, xnn.layer, opened.inputs, progress=progress, prediction_transform=transform)
    reader = Reader.of(opened.model, xnn.layer, prediction_transform=transform)
    y_hat = found.y_hat[:]
    results, rows = [], {}
    for target in targets:
        if against is not None and target == against:
            continue
        asked = target if against is None else Difference(target, against)  # type: ignore[arg-type]
        positives = _positives(y_hat, target)
        predictions = select(y_hat, asked)
        numbers = xnn.explainer(target, against=against).numbers(asked, found, predictions, reader)
        results.append(
            _evaluated(numbers, predictions, asked, opened.name_of(asked), y_hat, positives)._replace(target=target)
        )
        rows[target] = positives
    if maps > 0:
        some = {target: of[:maps].tolist() for target, of in rows.items()}
        drawn = _orthogonality(opened, xnn, some, against, progress)
        results = [_with_orthogonality(r, *drawn[r.target]) if r.target in drawn else r for r in results]
    if patches > 0:
        some = {target: of[:patches].tolist() for target, of in rows.items()}
        covered = _patches(opened, xnn, some, against, progress)
        results = [r._replace(patches=covered.get(r.target)) for r in results]
    return results


def _with_orthogonality(result: Evaluation, plain: Orthogonality, weighted: Orthogonality) -> Evaluation:
    return result._replace(o1=plain.o1, o2=plain.o2, o1_weighted=weighted.o1, o2_weighted=weighted.o2)


def _positives(y_hat: Tensor, target: Target) -> Tensor:
    """Return the rows of the positives; all rows if there are no classes."""
    marked = positives_of(predicted_classes(y_hat), [target])
    return torch.arange(len(y_hat)) if marked is None else marked.nonzero()[:, 0]


def _evaluated(
    numbers: Numbers, predictions: Tensor, target: Target, name: str, y_hat: Tensor, positives: Tensor
) -> Evaluation:
    """Compute the measures of one target that need no maps; ``predictions`` are its outputs, (M,)."""
    y_bar = numbers.surrogate
    mean = numbers.contributions[positives].abs().mean(0, keepdim=True)
    faithfulness = Faithfulness.of(y_bar, predictions.to(y_bar.dtype), [y_hat], target)
    return Evaluation(
        target=target,
        name=name,
        f_reg=faithfulness.f_reg,
        f_cls=faithfulness.f_cls,
        effective=float(effective_number(mean)) if len(positives) else None,
        positives=len(positives),
        inputs=len(y_bar),
    )


def _orthogonality(
    opened: ModelAndInputs,
    xnn: XNNAttribution,
    rows: Mapping[Target, Sequence[int]],
    against: int | None,
    progress: bool,
) -> dict[Target, tuple[Orthogonality, Orthogonality]]:
    """Compute O1 and O2, plain and weighted, over the maps of each target's rows. Skip targets without rows."""
    streams: dict[Target, tuple[OrthogonalityStream, OrthogonalityStream]] = {}
    for target, some in _some(opened, rows, "maps", progress):
        why = xnn.explain(some, target, against=against, internal_batch_size=opened.configuration.batch_size)
        plain, weighted = streams.setdefault(target, (OrthogonalityStream(), OrthogonalityStream()))
        assert isinstance(why.maps, Tensor)  # because the input is a single tensor
        heat = channels_first(why.maps, some).sum(2) if some.dim() == 4 else why.maps
        plain.update(heat)
        weighted.update(heat, contributions=why.contributions)
    return {target: (plain.compute(), weighted.compute()) for target, (plain, weighted) in streams.items()}


def _patches(
    opened: ModelAndInputs,
    xnn: XNNAttribution,
    rows: Mapping[Target, Sequence[int]],
    against: int | None,
    progress: bool,
) -> dict[Target, PatchScores]:
    """Compute the measures on covered patches over each target's rows."""
    found: dict[Target, list[Tensor]] = {}
    for target, some in _some(opened, rows, "inputs", progress):
        found.setdefault(target, []).append(some)
    bar = tqdm(found.items(), "patches", disable=not progress, leave=False)
    batch_size, fill, tokens = opened.configuration.batch_size, _column_means(opened), opened.inputs.preparation.tokens
    scores = {}
    for t, parts in bar:
        some = torch.cat(parts)
        lengths = None if tokens is None else [len(tokens(ids.cpu())) for ids in some]
        scores[t] = patch_scores(
            xnn, some, t, against=against, fill=fill, lengths=lengths, internal_batch_size=batch_size
        )
    return scores


def _column_means(opened: ModelAndInputs) -> Tensor | None:
    """Compute the mean of each column of a table; None for other inputs."""
    total, count = torch.zeros(()), 0
    for batch in opened.inputs:
        if batch.inputs.dim() != 2 or not batch.inputs.is_floating_point():
            return None
        total, count = total + batch.inputs.double().sum(0), count + len(batch.inputs)
    if count == 1:
        raise ValueError(
            "--data is 1 row, and the mean of each column over 1 row is its own value, so --patches would cover "
            "nothing; pass more rows, or leave --patches out"
        )
    return total / count


def _some(
    opened: ModelAndInputs, rows: Mapping[Target, Sequence[int]], what: str, progress: bool
) -> Iterator[tuple[Target, Tensor]]:
    """Yield the inputs in each target's rows, batch by batch, on the model's device."""
    first = 0
    for batch in tqdm(opened.inputs, what, disable=not progress, leave=False):
        for target, wanted in rows.items():
            own = [row - first for row in wanted if first <= row < first + len(batch.inputs)]
            if own:
                yield target, batch.inputs[own].to(opened.device)
        first += len(batch.inputs)


def _finite(value: Any) -> Any:
    """Convert a value for JSON: named tuples to dicts, and infinite numbers, which O2 may be, to null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if value == math.inf else value


def _patches_table(opened: ModelAndInputs, found: Sequence[Evaluation]) -> str:
    """Format a table of the measures on covered patches, each followed by its controls."""
    header = [
        *targets_header(opened),
        "inputs",
        "agreement",
        "random groups",
        "random maps",
        "1-Heatmap",
        "identified",
        "random groups",
        "movement",
        "O1 of drops",
        "random groups",
    ]
    rows = []
    for result in found:
        of = result.patches
        if of is not None:
            by_chance = None if of.drops_random_groups is None else of.drops_random_groups.o1
            figures = [of.agreement, of.agreement_random_groups, of.agreement_random_maps, of.agreement_one_heatmap]
            figures += [of.identified, of.identified_random_groups, of.movement, of.drops.o1, by_chance]
            rows.append([*targets_cells(opened, [result.target]), str(of.examples), *map(number, figures)])
    return aligned(header, rows)
