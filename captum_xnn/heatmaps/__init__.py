"""Heatmaps of x-features: excitation backprop, gradients, and any method of Captum."""

from captum_xnn.heatmaps._excitation_maps import ExcitationMaps
from captum_xnn.heatmaps._from_captum import FromCaptum
from captum_xnn.heatmaps._group_maps import ContributionMaps, GradientMaps
from captum_xnn.heatmaps._heatmap import Heatmap
from captum_xnn.heatmaps._one_heatmap import OneHeatmap

__all__ = ["ContributionMaps", "ExcitationMaps", "FromCaptum", "GradientMaps", "Heatmap", "OneHeatmap"]
