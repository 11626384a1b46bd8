"""Work on one layer of any model: find it, read it, run the rest of the model from it on, and leave all as it was."""

from captum_xnn.layers.lookup import find_layer
from captum_xnn.layers.read import EveryCall

__all__ = ["EveryCall", "find_layer"]
