"""Fitting of explanation networks: recipe, batches, gradient descent, checkpoints, and groups of contributions."""

from captum_xnn.models._base import encode_all
from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._fitting import fit, fit_together
from captum_xnn.training._logs import JSONLines, TensorBoard
from captum_xnn.training._problem import Recipe, Step
from captum_xnn.training._tuning import Trial, Tuning, choose_n, held_out_f_reg, tune, tune_alpha

__all__ = [
    "Checkpoint",
    "JSONLines",
    "Recipe",
    "Step",
    "TensorBoard",
    "Trial",
    "Tuning",
    "choose_n",
    "encode_all",
    "fit",
    "fit_together",
    "held_out_f_reg",
    "tune",
    "tune_alpha",
]
