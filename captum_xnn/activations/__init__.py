"""Activations of a layer and the outputs of a model on some data, in memory or on disk.

:mod:`~captum_xnn.activations._collecting` runs the model, :mod:`~captum_xnn.activations._batches` and
:mod:`~captum_xnn.activations._unpacking` read a user's data, and :mod:`~captum_xnn.activations._store` and
:mod:`~captum_xnn.activations._memmap` write and read files.
"""

from captum_xnn.activations._collecting import (
    Activations,
    Source,
    Unpack,
    collect,
    collect_part,
    collect_together,
    first_of_batch,
)

__all__ = [
    "Activations",
    "Source",
    "Unpack",
    "collect",
    "collect_part",
    "collect_together",
    "first_of_batch",
]
