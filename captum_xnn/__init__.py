"""Explanation networks for Captum: a few x-features of a prediction, with maps and contributions that add up.

Names are imported when they are first used, so that ``captum-xnn --version`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_xnn.attribution import XNNAttribution
    from captum_xnn.comparison import compare
    from captum_xnn.excitation_bp import ExcitationBP, LayerExcitationBP, NeuronExcitationBP
    from captum_xnn.explainer import Explainer
    from captum_xnn.explanation import Explanation
    from captum_xnn.heatmaps._one_heatmap import OneHeatmap
    from captum_xnn.models import SRAE, ContributionGroups, ConvSRAE, PaperSRAE
    from captum_xnn.training._recipe import Recipe

__all__ = [
    "SRAE",
    "ContributionGroups",
    "ConvSRAE",
    "ExcitationBP",
    "Explainer",
    "Explanation",
    "LayerExcitationBP",
    "NeuronExcitationBP",
    "OneHeatmap",
    "PaperSRAE",
    "Recipe",
    "XNNAttribution",
    "__version__",
    "compare",
]

__version__ = "0.1.0"

_PLACES = {
    "attribution": ("XNNAttribution",),
    "comparison": ("compare",),
    "excitation_bp": ("ExcitationBP", "LayerExcitationBP", "NeuronExcitationBP"),
    "explainer": ("Explainer",),
    "explanation": ("Explanation",),
    "heatmaps": ("OneHeatmap",),
    "models": ("SRAE", "ContributionGroups", "ConvSRAE", "PaperSRAE"),
    "training": ("Recipe",),
}
_MODULES = (
    "activations", "attribution", "cli", "comparison", "datasets", "errors", "excitation_bp", "explainer",
    "explanation", "heatmaps", "layers", "metrics", "models", "patch_scores", "plots", "report", "study", "training",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name or module when it is first used."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    for module, names in _PLACES.items():
        if name in names:
            globals()[name] = found = getattr(import_module(f"{__name__}.{module}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, also those that were not imported yet."""
    return sorted({*globals(), *__all__, *_MODULES})
