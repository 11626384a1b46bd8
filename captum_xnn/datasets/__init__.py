"""Data sets to explain models on, each with the conventions of its official layout."""
