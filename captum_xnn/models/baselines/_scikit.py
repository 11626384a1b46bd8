"""Import scikit-learn, from the extra ``baselines``, with an error that names the extra."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["ScikitLearn", "scikit_learn"]


class ScikitLearn(NamedTuple):
    """The functions of scikit-learn that forms use."""

    factorise: Any
    """``NMF``."""
    lasso_path: Any
    """``lasso_path``."""


def scikit_learn() -> ScikitLearn:
    """Import scikit-learn.

    Raises:
        ImportError: If it is not installed.

    Example:
        >>> scikit_learn().lasso_path.__name__
        'lasso_path'
    """
    try:
        from sklearn.decomposition import NMF
        from sklearn.linear_model import lasso_path
    except ImportError as error:
        raise ImportError(
            "this form needs scikit-learn, which is not installed; run `pip install captum-xnn[baselines]`"
        ) from error
    return ScikitLearn(NMF, lasso_path)
