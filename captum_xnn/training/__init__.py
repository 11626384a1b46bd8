"""Fitting of explanation networks: recipe, batches, gradient descent, checkpoints, and groups of contributions."""

from captum_xnn.models.base import encode_all
from captum_xnn.training.fitting import fit, fit_together
from captum_xnn.training.problem import Recipe, Step

__all__ = ["Recipe", "Step", "encode_all", "fit", "fit_together"]
