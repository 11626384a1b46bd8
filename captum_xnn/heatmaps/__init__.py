"""Heatmaps of x-features: excitation backprop, gradients, and any method of Captum."""

from captum_xnn.heatmaps._backends import DefaultMaps, ExcitationMaps, FromCaptum, GradientMaps, Heatmap, TokenGrid
from captum_xnn.heatmaps._one_heatmap import OneHeatmap

__all__ = ["DefaultMaps", "ExcitationMaps", "FromCaptum", "GradientMaps", "Heatmap", "OneHeatmap", "TokenGrid"]
