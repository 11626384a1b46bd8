"""Read from a data set the names of its classes and files, and the normalisation that its transform applies.

The functions read the attributes of torchvision's data sets and of :mod:`captum_xnn.datasets`: ``classes``, ``names``,
``samples`` or ``files``, and a ``Normalize`` among the steps of ``transform``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler, Subset

from captum_xnn.plots._names import check_class_names
from captum_xnn.report._inputs import model_outputs, row_batches

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.attribution import XNNAttribution
    from captum_xnn.report._options import ReportOptions

__all__ = ["captions_of", "classes_of", "completed", "display_of"]

_log = logging.getLogger(__name__)


def completed(xnn: XNNAttribution, inputs: Any, options: ReportOptions) -> ReportOptions:
    """Fill options that were left open with what inputs and data describe.

    Names of classes are taken only if the model has as many outputs: a data set may have other classes than the model.

    Args:
        xnn: The explainers.
        inputs: Inputs of the report, with a loader in place of a data set.
        options: Options of the report.

    Raises:
        ValueError: If names of classes were given that do not fit the model's outputs.
    """
    found: dict[str, Any] = {}
    if options.captions is None:
        found["captions"] = captions_of(inputs)
    if options.data is not None and options.data_captions is None:
        found["data_captions"] = captions_of(options.data)
    if options.display is None:
        found["display"] = display_of(inputs)
    classes = classes_of(inputs) if options.class_names is None else options.class_names
    if classes is not None and (first := next(row_batches(xnn, inputs), None)) is not None:
        y_hat = model_outputs(xnn, *first.arguments)
        if options.class_names is not None:
            check_class_names(classes, y_hat.shape[1:])
        elif _fit(classes, y_hat):
            found["class_names"] = classes
        elif y_hat.dim() == 2 and y_hat.shape[1] > 1:
            _log.warning(
                "the data set has %d classes and the model %d outputs, so the report has numbers in place of names; "
                "pass class_names= with a name for each output",
                len(classes),
                y_hat.shape[1],
            )
    return replace(options, **{name: value for name, value in found.items() if value is not None})


def _fit(classes: Mapping[int, str] | Sequence[str], y_hat: Tensor) -> bool:
    """Whether a model with these outputs may have these classes."""
    if y_hat.dim() != 2:
        return False
    if isinstance(classes, Mapping):
        return all(0 <= number < y_hat.shape[1] for number in classes)
    return len(classes) == y_hat.shape[1]


def _dataset(data: Any) -> Any:
    return data.dataset if isinstance(data, DataLoader) else data


def classes_of(data: Any) -> Mapping[int, str] | Sequence[str] | None:
    """Return the names of a data set's classes; None if it has none.

    Args:
        data: A data set, a loader of one, or anything else.
    """
    data = _dataset(data)
    if isinstance(data, Subset):
        return classes_of(data.dataset)
    classes = getattr(data, "classes", None)
    if isinstance(classes, Mapping) and all(isinstance(k, int) and isinstance(v, str) for k, v in classes.items()):
        return classes
    if isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes):
        return classes
    return None


def captions_of(data: Any) -> list[str] | None:
    """Return the file names of a data set's examples, in the order of its batches; None if they are not known.

    Args:
        data: A data set, a loader of one, or anything else.
    """
    if isinstance(data, DataLoader):
        return captions_of(data.dataset) if isinstance(data.sampler, SequentialSampler) and not data.drop_last else None
    if isinstance(data, Subset):
        names = captions_of(data.dataset)
        return None if names is None else [names[i] for i in data.indices]
    names = next((found for key in ("names", "samples", "files") if (found := getattr(data, key, None))), None)
    if not isinstance(names, (list, tuple)):
        return None
    files = [entry[0] if isinstance(entry, tuple) and entry else entry for entry in names]
    if not all(isinstance(file, (str, os.PathLike)) for file in files):
        return None
    return [Path(file).name if os.path.isabs(file) or hasattr(data, "samples") else str(file) for file in files]


def display_of(data: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the function that undoes the normalisation of a data set's transform; None if there is none.

    Args:
        data: A data set, a loader of one, or anything else.

    Example:
        >>> from types import SimpleNamespace
        >>> class Normalize:
        ...     mean, std = (0.5,), (0.25,)
        >>> display_of(SimpleNamespace(transform=Normalize()))(torch.tensor([[[2.0, -2.0]]]))
        tensor([[[1., 0.]]])
    """
    data = _dataset(data)
    if isinstance(data, Subset):
        return display_of(data.dataset)
    last = None
    for step in _steps(getattr(data, "transform", None)):
        if type(step).__name__ == "Normalize" and hasattr(step, "mean") and hasattr(step, "std"):
            last = step
    if last is None:
        return None
    mean, std = (
        torch.as_tensor(values, dtype=torch.float32, device="cpu").reshape(-1, 1, 1) for values in (last.mean, last.std)
    )

    def display(image: Tensor) -> Tensor:
        return (image.float() * std + mean).clamp(0, 1)

    return display


def _steps(transform: Any) -> Iterator[Any]:
    """Yield a transform and all the steps that it is composed of."""
    if transform is None:
        return
    yield transform
    for step in getattr(transform, "transforms", None) or ():
        yield from _steps(step)
