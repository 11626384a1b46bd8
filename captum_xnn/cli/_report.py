"""The command ``report``: one HTML page that explains a model's outputs for the user's inputs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from captum_xnn.attribution import XNNAttribution
from captum_xnn.cli._inputs import Inputs
from captum_xnn.cli._saved_explainers import model_and_explainers, output_to_compare
from captum_xnn.cli._tables import shortfalls
from captum_xnn.report import ReportOptions
from captum_xnn.report._page import write_report

__all__ = ["run_report"]


def run_report(arguments: argparse.Namespace) -> str:
    """Write the page, and return the text to print.

    Args:
        arguments: Arguments of the command.

    Raises:
        ValueError: If the inputs can neither be shown as images nor as words.
    """
    opened, xnn = model_and_explainers(arguments)
    targets = opened.targets(xnn)
    against = arguments.against

    def shown(image: Tensor) -> Tensor:
        images = opened.inputs.preparation.displayable(image[None])
        if images is None:
            raise ValueError(f"inputs are {tuple(image.shape)}, and this report needs images; pass a folder of images")
        return images[0]

    first = next(iter(opened.inputs)).inputs
    tokens = opened.inputs.preparation.tokens
    if tokens is None and not first.is_floating_point():
        raise ValueError(
            f"the inputs are ids {tuple(first.shape)}, whose words are not known; define tokens(ids) in the model's "
            "file, which returns the words of one text without padding"
        )
    again = None
    if arguments.again is not None:
        again = XNNAttribution.load(arguments.again, opened.model, prediction_transform=opened.prediction_transform)
    options = ReportOptions(
        captions=_ReadNames(opened.inputs),
        tokens=tokens,
        class_names=opened.model_file.classes,
        names=arguments.names,
        title=arguments.title,
        display=shown if first.dim() > 2 else None,
        against=None if against is None else output_to_compare(opened, targets, against),
        patches=arguments.patches,
        again=again,
        internal_batch_size=opened.configuration.batch_size,
        cache=Path(arguments.explainer, "report-cache") if arguments.cache else None,
        progress=not arguments.quiet,
    )
    path = write_report(arguments.out, xnn, opened.inputs, targets, options)
    explainers = dict.fromkeys(xnn.explainer(target) for target in targets)
    return "\n".join([*shortfalls(opened, explainers), f"Open this: {path}"])


class _ReadNames(Sequence[str]):
    """Names of the inputs without the damaged images, which are known once the inputs have been read."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def _names(self) -> list[str]:
        skipped = set(self.inputs.skipped)
        return [name for name in self.inputs.names if name not in skipped]

    def __len__(self) -> int:
        return len(self._names())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __getitem__(self, index: Any) -> Any:
        return self._names()[index]
