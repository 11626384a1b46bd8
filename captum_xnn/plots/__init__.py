"""Pictures and sentences of explanations, and names of x-features."""

from captum_xnn.plots._explanation import (
    show_contributions,
    show_explanation,
    show_gallery,
)
from captum_xnn.plots._names import write_names
from captum_xnn.plots._panels import contours
from captum_xnn.plots._scales import own_scale
from captum_xnn.plots._tokens import show_tokens

__all__ = [
    "contours",
    "own_scale",
    "show_contributions",
    "show_explanation",
    "show_gallery",
    "show_tokens",
    "write_names",
]
