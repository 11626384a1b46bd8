"""Explanation networks for Captum: a few learned x-features with maps and contributions that add up."""

from captum_xnn.attribution import Faithfulness, XNNAttribution
from captum_xnn.excitation_bp import ExcitationBP, LayerExcitationBP, NeuronExcitationBP
from captum_xnn.explainer import Explainer
from captum_xnn.explanation import Explanation
from captum_xnn.heatmaps.one_heatmap import OneHeatmap
from captum_xnn.models.srae import SRAE, ConvSRAE, PaperSRAE
from captum_xnn.training.problem import Recipe

__all__ = [
    "SRAE",
    "ConvSRAE",
    "ExcitationBP",
    "Explainer",
    "Explanation",
    "Faithfulness",
    "LayerExcitationBP",
    "NeuronExcitationBP",
    "OneHeatmap",
    "PaperSRAE",
    "Recipe",
    "XNNAttribution",
    "__version__",
]

__version__ = "0.1.0"
