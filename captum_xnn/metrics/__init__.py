"""Metrics of explanations: plain functions of tensors. Import any of them from here."""

from captum_xnn.metrics._concepts import deletion, insertion, surrogate_score
from captum_xnn.metrics._controls import random_maps
from captum_xnn.metrics._faithfulness import classification_faithfulness, regression_faithfulness
from captum_xnn.metrics._keeping import combined, keep_top_accuracy, telea
from captum_xnn.metrics._localisation import locality, mean_locality, object_probabilities, part_probabilities
from captum_xnn.metrics._overlap import orthogonality
from captum_xnn.metrics._paired import paired_test
from captum_xnn.metrics._patches import drop_orthogonality, map_identification, patch_agreement, patch_drops
from captum_xnn.metrics._pointing import pointing_accuracy
from captum_xnn.metrics._purity import clustering_purity
from captum_xnn.metrics._randomisation import randomised, similarity
from captum_xnn.metrics._removal import pair_share, selectivity
from captum_xnn.metrics._sparsity import effective_number
from captum_xnn.metrics._stability import matched_features
from captum_xnn.metrics._typicality import typicality

__all__ = [
    "classification_faithfulness",
    "clustering_purity",
    "combined",
    "deletion",
    "drop_orthogonality",
    "effective_number",
    "insertion",
    "keep_top_accuracy",
    "locality",
    "map_identification",
    "matched_features",
    "mean_locality",
    "object_probabilities",
    "orthogonality",
    "pair_share",
    "paired_test",
    "part_probabilities",
    "patch_agreement",
    "patch_drops",
    "pointing_accuracy",
    "random_maps",
    "randomised",
    "regression_faithfulness",
    "selectivity",
    "similarity",
    "surrogate_score",
    "telea",
    "typicality",
]
