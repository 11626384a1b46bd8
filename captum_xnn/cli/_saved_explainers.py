"""The model, the inputs and the saved explainers that the arguments of a command name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from captum_xnn import _serialization
from captum_xnn.attribution import XNNAttribution
from captum_xnn.cli._configuration import CONFIGURATION_FILE, Configuration, settings_in, targets_of
from captum_xnn.cli._model_and_inputs import ModelAndInputs, heatmap_named
from captum_xnn.errors import ExplainerFileError
from captum_xnn.layers._targets import Target, select

__all__ = ["model_and_explainers", "output_to_compare"]


def model_and_explainers(arguments: argparse.Namespace) -> tuple[ModelAndInputs, XNNAttribution]:
    """Open the model, its inputs and the explainers that a command's arguments name.

    The configuration beside the explainers gives the model and the conversion of images to inputs, unless options
    override it. Data and targets come from the options.

    Args:
        arguments: Arguments of the command.

    Raises:
        ExplainerFileError: If the folder holds no explainers.
    """
    heatmap = None if arguments.heatmap is None else heatmap_named(arguments.heatmap)
    if not _serialization.is_saved(arguments.explainer):
        raise ExplainerFileError(
            f"{arguments.explainer!r} has no explainer.json; fit explainers first, by captum-xnn fit --out "
            f"{arguments.explainer} ..., or pass the folder that they were saved to"
        )
    _serialization.read(arguments.explainer)  # so that a damaged folder raises its own error before the model is loaded
    beside = Path(arguments.explainer, CONFIGURATION_FILE)
    settings = {"targets": "all", **settings_in(arguments)}
    settings.pop("out", None)
    opened = ModelAndInputs.of(Configuration.read(beside if beside.is_file() else None, settings))
    return opened, XNNAttribution.load(
        arguments.explainer,
        opened.model,
        heatmap=opened.heatmap_or_default(heatmap),
        prediction_transform=opened.prediction_transform,
    )


def output_to_compare(opened: ModelAndInputs, targets: Sequence[Target], against: str) -> int:
    """Return the output to compare with.

    Args:
        opened: The model and its inputs.
        targets: Fitted targets.
        against: Number or name of the output.

    Raises:
        ValueError: If there is no such output, or it is the only target.
    """
    asked = targets_of(against, opened.model_file.classes)
    if not isinstance(asked, list) or len(asked) != 1:
        raise ValueError(f"--against is {against!r}, and not one output; pass the index of an output, or its name")
    select(torch.zeros(1, *opened.output_shape), asked[0])
    if list(targets) == asked:
        name = opened.name_of(asked[0])
        raise ValueError(f"the only target is --against {against} itself ({name}); pass another --target, or fit one")
    return asked[0]
