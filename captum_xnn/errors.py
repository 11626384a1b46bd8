"""Error classes of captum_xnn, beside ValueError and TypeError."""

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
]


class NotFittedError(ValueError):
    """Raised if no explainer was fitted for the requested target."""


class LayerNotFoundError(ValueError):
    """Raised if the model has no layer of the given name, or does not contain the given module."""


class LayerNotReachedError(RuntimeError):
    """Raised if the model's forward pass never calls the explained layer."""


class ExplainerFileError(ValueError):
    """Raised if a saved explainer is missing, truncated or altered, or if the file is not an explainer at all."""


class ModelMismatchError(ValueError):
    """Raised if a saved explainer is loaded for a model other than the one it was fitted to."""


class CheckpointError(ValueError):
    """Raised if a checkpoint cannot be written or is damaged."""


class NamesFileError(ValueError):
    """Raised if a file of names is missing, is not a file of names, or names x-features of another layer or target."""


class UnsupportedOperationError(RuntimeError):
    """Raised if a heatmap method meets an operation that it has no rule for or cannot see."""


class StoreError(ValueError):
    """Raised if stored activations are missing, damaged, unfinished, or of other data; the message says which."""


class DatasetError(ValueError):
    """Raised if a file of a data set is missing or damaged; the message names the file."""
