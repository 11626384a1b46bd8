"""Heatmaps of x-features: excitation backprop, gradients, and any method of Captum."""

from captum_xnn.heatmaps._excitation_maps import ExcitationMaps
from captum_xnn.heatmaps._feature_maps import DefaultMaps
from captum_xnn.heatmaps._from_captum import FromCaptum
from captum_xnn.heatmaps._gradient_maps import GradientMaps
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.heatmaps._one_heatmap import OneHeatmap
from captum_xnn.heatmaps._token_grid import TokenGrid

__all__ = ["DefaultMaps", "ExcitationMaps", "FromCaptum", "GradientMaps", "Heatmap", "OneHeatmap", "TokenGrid"]
