"""Fitting of explanation networks: recipe, batches, gradient descent, checkpoints, and groups of contributions."""

from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._logs import JSONLines, TensorBoard
from captum_xnn.training._recipe import Recipe
from captum_xnn.training._tuning import choose_n, tune

__all__ = ["Checkpoint", "JSONLines", "Recipe", "TensorBoard", "choose_n", "tune"]
