"""Activations of a layer and the outputs of a model on some data, in memory or on disk.

Collecting is in :mod:`~captum_xnn.activations.collecting`, reading a user's data in
:mod:`~captum_xnn.activations.batches`, files in :mod:`~captum_xnn.activations.store` and
:mod:`~captum_xnn.activations.memmap`.
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
