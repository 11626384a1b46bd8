"""Forms of explanation network: groups of contributions, the SRAE of the paper, and baselines for comparison."""

from captum_xnn.models.base import Autoencoder, Dense
from captum_xnn.models.contribution_groups import ContributionGroups
from captum_xnn.models.srae import SRAE, ConvSRAE, PaperSRAE

__all__ = ["SRAE", "Autoencoder", "ContributionGroups", "ConvSRAE", "Dense", "PaperSRAE"]
