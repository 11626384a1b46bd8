"""Find the user's own line, beside which a warning is shown."""

from __future__ import annotations

import inspect

__all__ = ["levels_up"]

# Packages whose frames lie between the user's line and a warning of ours.
_PASSED = ("captum", "captum_xnn", "tqdm")


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
