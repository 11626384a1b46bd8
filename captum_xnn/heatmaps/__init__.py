"""Heatmaps of x-features: excitation backprop, gradients, and any method of Captum."""

from captum_xnn.heatmaps._backends import (
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
from captum_xnn.heatmaps._one_heatmap import OneHeatmap

__all__ = [
    "TOKENS",
    "DefaultMaps",
    "ExcitationMaps",
    "FromCaptum",
    "GradientMaps",
    "Heatmap",
    "OneHeatmap",
    "TokenGrid",
    "as_heatmap",
    "rows_of_settings",
]
