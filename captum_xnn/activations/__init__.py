"""Activations of a layer and the outputs of a model on some data, in memory or on disk.

:mod:`~captum_xnn.activations._activations` holds the result. :mod:`~captum_xnn.activations._collecting` runs the model,
:mod:`~captum_xnn.activations._batches` and :mod:`~captum_xnn.activations._unpacking` read a user's data, and
:mod:`~captum_xnn.activations._store` and :mod:`~captum_xnn.activations._memmap` write and read files.
:mod:`~captum_xnn.activations._filling` runs the model for the missing files of a store.
"""

from captum_xnn.activations._activations import Activations
from captum_xnn.activations._collecting import collect, collect_part

__all__ = ["Activations", "collect", "collect_part"]
