"""Forms of explanation network: groups of contributions, the SRAE of the paper, and baselines for comparison."""

from captum_xnn.models._base import Autoencoder
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._srae import SRAE, ConvSRAE, PaperSRAE

__all__ = ["SRAE", "Autoencoder", "ContributionGroups", "ConvSRAE", "PaperSRAE"]
