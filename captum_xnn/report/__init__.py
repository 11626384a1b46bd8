"""Reports: one HTML page about the x-features of a model, with a card for each x-feature."""

from captum_xnn.report._cards import ConceptCard, Example, PlacesOfMaps, concept_cards, on_objects, on_parts
from captum_xnn.report._options import ReportOptions
from captum_xnn.report._page import write_report

__all__ = [
    "ConceptCard",
    "Example",
    "PlacesOfMaps",
    "ReportOptions",
    "concept_cards",
    "on_objects",
    "on_parts",
    "write_report",
]
