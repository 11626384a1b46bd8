"""Activations of a layer and the outputs of a model on some data, in memory or on disk.

:mod:`~captum_xnn.activations.collecting` runs the model, :mod:`~captum_xnn.activations.batches` and
:mod:`~captum_xnn.activations.unpacking` read a user's data, and :mod:`~captum_xnn.activations.store` and
:mod:`~captum_xnn.activations.memmap` write and read files.
"""

from captum_xnn.activations.collecting import (
    Activations,
    Source,
    Unpack,
    checked,
    collect,
    collect_part,
    collect_together,
    first_of_batch,
)

__all__ = [
    "Activations",
    "Source",
    "Unpack",
    "checked",
    "collect",
    "collect_part",
    "collect_together",
    "first_of_batch",
]
