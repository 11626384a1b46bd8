"""Work on one layer of any model: find it, read it, run the rest of the model, and leave the model unchanged."""

from captum_xnn.layers._read import EveryCall

__all__ = ["EveryCall"]
