"""Heatmaps of x-features: excitation backprop, gradients, and any method of Captum."""

from captum_xnn.heatmaps.backends import (
    TOKENS,
    DefaultMaps,
    ExcitationMaps,
    FromCaptum,
    GradientMaps,
    Heatmap,
    TokenGrid,
    as_heatmap,
    rows_of_settings,
)

__all__ = [
    "TOKENS",
    "DefaultMaps",
    "ExcitationMaps",
    "FromCaptum",
    "GradientMaps",
    "Heatmap",
    "TokenGrid",
    "as_heatmap",
    "rows_of_settings",
]
