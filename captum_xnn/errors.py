"""Errors that captum_xnn raises beside ValueError and TypeError, and where its warnings are shown."""

import inspect

__all__ = [
    "CheckpointError",
    "DatasetError",
    "ExplainerFileError",
    "LayerNotFoundError",
    "LayerNotReachedError",
    "ModelMismatchError",
    "NamesFileError",
    "NotFittedError",
    "StoreError",
    "UnsupportedOperationError",
    "levels_up",
]


# Packages whose frames lie between the user's line and a warning of ours.
_PASSED = ("captum", "captum_xnn", "tqdm")


class NotFittedError(ValueError):
    """Raised where an explanation is asked of a target that no explainer was fitted to."""


class LayerNotFoundError(ValueError):
    """Raised where the model has no layer of the given name, or does not hold the given module."""


class LayerNotReachedError(RuntimeError):
    """Raised where the model's forward pass never calls the explained layer."""


class ExplainerFileError(ValueError):
    """Raised where a saved explainer is missing, truncated, altered or not an explainer at all."""


class ModelMismatchError(ValueError):
    """Raised where a saved explainer is loaded into another model than it was fitted to."""


class CheckpointError(ValueError):
    """Raised where a checkpoint cannot be written, or is damaged."""


class NamesFileError(ValueError):
    """Raised where a file of names is missing, foreign, or made for x-features of another layer or target."""


class UnsupportedOperationError(RuntimeError):
    """Raised where a heatmap's method meets an operation that it has no rule for, or cannot see."""


class StoreError(ValueError):
    """Raised where activations on disk are missing, damaged, unfinished, or of other data; the message says which."""


class DatasetError(ValueError):
    """Raised where a data set's folder lacks a file, or holds one that is damaged; the message names it."""


def levels_up() -> int:
    """Return the stacklevel at which a warning of the calling function is shown beside the user's own line.

    Example:
        >>> levels_up() >= 1
        True
    """
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        level, frame = level + 1, frame.f_back
    return level
