"""Numbers that pictures take, as tensors or arrays: turned into float64 arrays, and checked.

Conventions:
    N examples, K x-features.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = ["Array", "Numbers", "as_array", "examples_of", "finite", "table_of"]

Array: TypeAlias = NDArray[np.float64]
Numbers: TypeAlias = Tensor | ArrayLike


def as_array(values: Numbers) -> NDArray[Any]:
    """Turn the values into an array; floats become float64, because numpy has no bfloat16.

    Args:
        values: A tensor on any device, or anything that numpy takes.
    """
    if isinstance(values, Tensor):
        values = (values.double() if values.is_floating_point() else values).detach().cpu().numpy()
    return np.asarray(values)


def finite(values: Numbers, noun: str) -> Array:
    """Turn the values into a float64 array.

    Args:
        values: A tensor on any device, or anything that numpy takes.
        noun: Name of the values in an error.

    Raises:
        ValueError: If a value is not finite.
    """
    array = as_array(values).astype(np.float64)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {array.size} values of {noun} are NaN or infinite; look for an overflow in the model or the "
            "heatmap backend: half precision is the usual cause"
        )
    return array


def table_of(contributions: Numbers) -> Array:
    """Check the contributions (N, K) of several examples.

    Args:
        contributions: The contributions.

    Raises:
        ValueError: If they have another shape, or a value is not finite.
    """
    array = finite(contributions, "contributions")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"contributions are {array.shape}, not (N, K) of N examples; give every example a row, or use "
            "show_explanation for a single example"
        )
    return array


def examples_of(values: Numbers, n_examples: int, noun: str) -> NDArray[Any]:
    """Turn images or maps of N examples into an array.

    Args:
        values: The images or maps (N, ...).
        n_examples: N.
        noun: Name of the values in an error.

    Raises:
        ValueError: If there are not N of them.
    """
    array = as_array(values)
    if array.ndim < 3 or len(array) != n_examples:
        raise ValueError(
            f"{noun} are {array.shape} for N = {n_examples} examples with contributions; put the examples first and "
            f"pass {noun} of the same examples"
        )
    return array
