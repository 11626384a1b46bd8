"""Data sets on which to explain models, each read from its official layout."""
