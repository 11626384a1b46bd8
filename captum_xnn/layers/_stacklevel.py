"""Find the user's own line, so that a warning points to it."""

from __future__ import annotations

import inspect

__all__ = ["levels_up"]

# Packages whose frames lie between the user's line and a warning of this package.
_PASSED = ("captum", "captum_xnn", "tqdm")


def levels_up() -> int:
    """Count the stacklevel at which a warning of the calling function points to the user's own line.

    Example:
        >>> levels_up() >= 1
        True
    """
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        level, frame = level + 1, frame.f_back
    return level
