"""Compare methods on your own model and data: one table with controls and intervals."""

from captum_xnn.comparison._compare import DEFAULT_METHODS, compare
from captum_xnn.comparison._compared import MethodComparison

__all__ = ["DEFAULT_METHODS", "MethodComparison", "compare"]
