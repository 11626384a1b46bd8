"""Metrics of explanations: plain functions of tensors. Import any of them from here."""

from captum_xnn.metrics._concepts import (
    area,
    completeness,
    contribution_order,
    deletion,
    insertion,
    random_order,
    shapley_values,
    surrogate_score,
)
from captum_xnn.metrics._controls import random_maps, random_partition
from captum_xnn.metrics._faithfulness import (
    Faithfulness,
    classification_faithfulness,
    error_floor,
    regression_faithfulness,
)
from captum_xnn.metrics._keeping import (
    biharmonic,
    combined,
    constant,
    keep_top,
    keep_top_accuracy,
    mean_colour,
    telea,
    top_pixels,
)
from captum_xnn.metrics._localisation import (
    locality,
    mean_locality,
    object_probabilities,
    part_probabilities,
    pixel_probabilities,
)
from captum_xnn.metrics._overlap import Orthogonality, OrthogonalityStream, contribution_shares, orthogonality
from captum_xnn.metrics._paired import Comparison, paired_test
from captum_xnn.metrics._patches import (
    blurred,
    drop_orthogonality,
    patch_agreement,
    patch_correlations,
    patch_drops,
    patch_masks,
    rank_correlation,
)
from captum_xnn.metrics._pointing import pointing_accuracy
from captum_xnn.metrics._purity import chance_purity, clustering_purity
from captum_xnn.metrics._randomisation import Similarity, randomised, similarity, top_down
from captum_xnn.metrics._removal import Selectivity, selectivity, single_deletion, within_part
from captum_xnn.metrics._sparsity import effective_number, gini, hoyer
from captum_xnn.metrics._stability import Matching, linear_cka, matched_features

__all__ = [
    "Comparison",
    "Faithfulness",
    "Matching",
    "Orthogonality",
    "OrthogonalityStream",
    "Selectivity",
    "Similarity",
    "area",
    "biharmonic",
    "blurred",
    "chance_purity",
    "classification_faithfulness",
    "clustering_purity",
    "combined",
    "completeness",
    "constant",
    "contribution_order",
    "contribution_shares",
    "deletion",
    "drop_orthogonality",
    "effective_number",
    "error_floor",
    "gini",
    "hoyer",
    "insertion",
    "keep_top",
    "keep_top_accuracy",
    "linear_cka",
    "locality",
    "matched_features",
    "mean_colour",
    "mean_locality",
    "object_probabilities",
    "orthogonality",
    "paired_test",
    "part_probabilities",
    "patch_agreement",
    "patch_correlations",
    "patch_drops",
    "patch_masks",
    "pixel_probabilities",
    "pointing_accuracy",
    "random_maps",
    "random_order",
    "random_partition",
    "randomised",
    "rank_correlation",
    "regression_faithfulness",
    "selectivity",
    "shapley_values",
    "similarity",
    "single_deletion",
    "surrogate_score",
    "telea",
    "top_down",
    "top_pixels",
    "within_part",
]
