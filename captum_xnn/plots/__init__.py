"""Pictures and sentences of explanations, and names of x-features."""

from captum_xnn.plots.explanation import show_contributions, show_explanation, show_gallery
from captum_xnn.plots.names import read_names, write_names

__all__ = ["read_names", "show_contributions", "show_explanation", "show_gallery", "write_names"]
