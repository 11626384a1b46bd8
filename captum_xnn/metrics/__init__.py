"""Metrics of explanations: plain functions of tensors. Import any of them from here."""

from captum_xnn.metrics._concepts import deletion, insertion
from captum_xnn.metrics._faithfulness import classification_faithfulness, regression_faithfulness
from captum_xnn.metrics._keeping import keep_top_accuracy
from captum_xnn.metrics._localisation import locality, object_probabilities, part_probabilities
from captum_xnn.metrics._overlap import orthogonality
from captum_xnn.metrics._paired import paired_test
from captum_xnn.metrics._patches import drop_orthogonality, patch_agreement, patch_drops
from captum_xnn.metrics._pointing import pointing_accuracy
from captum_xnn.metrics._randomisation import randomised, similarity
from captum_xnn.metrics._removal import selectivity
from captum_xnn.metrics._sparsity import effective_number
from captum_xnn.metrics._stability import matched_features
from captum_xnn.metrics._typicality import typicality

__all__ = [
    "classification_faithfulness",
    "deletion",
    "drop_orthogonality",
    "effective_number",
    "insertion",
    "keep_top_accuracy",
    "locality",
    "matched_features",
    "object_probabilities",
    "orthogonality",
    "paired_test",
    "part_probabilities",
    "patch_agreement",
    "patch_drops",
    "pointing_accuracy",
    "randomised",
    "regression_faithfulness",
    "selectivity",
    "similarity",
    "typicality",
]
