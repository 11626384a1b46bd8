"""The default backends, which attributions use without the argument ``heatmap=``."""

from __future__ import annotations

from captum.attr import Attribution

from captum_xnn.heatmaps._excitation_maps import ExcitationMaps
from captum_xnn.heatmaps._from_captum import as_heatmap
from captum_xnn.heatmaps._gradient_maps import GradientMaps
from captum_xnn.heatmaps._heatmap import Heatmap

__all__ = ["DefaultMaps", "heatmap_or_default"]


class DefaultMaps:
    """The default backends: one for groups of contributions, one for learned networks and for the model's outputs.

    Example:
        >>> DefaultMaps()
        DefaultMaps()
    """

    def __init__(self) -> None:
        self.of_groups, self.of_networks = GradientMaps(), ExcitationMaps()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def heatmap_or_default(heatmap: type[Attribution] | Heatmap | DefaultMaps | None) -> Heatmap | DefaultMaps:
    """Turn the argument ``heatmap=`` of an attribution into a backend, or into the default ones.

    Args:
        heatmap: A Captum attribution class, a backend object, or None or :class:`DefaultMaps` for the default.

    Raises:
        TypeError: If ``heatmap`` is neither a class of Captum nor callable.

    Example:
        >>> heatmap_or_default(None)
        DefaultMaps()
    """
    if heatmap is None:
        return DefaultMaps()
    return heatmap if isinstance(heatmap, DefaultMaps) else as_heatmap(heatmap)
