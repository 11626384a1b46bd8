"""Compare methods on your own model and data: one table with controls and intervals."""

from captum_xnn.comparison._compare import compare

__all__ = ["compare"]
