r"""What the SRAE is compared with: forms of explanation network that leave out some, or all, of what it asks for.

================  ===============================================================  =================
form              x-features                                                       head
================  ===============================================================  =================
NN                learned for faithfulness alone                                   learned with them
SAE               learned for faithfulness and plain reconstruction                learned with them
CAE               learned for plain reconstruction alone                           least squares
Lasso             those dimensions of Z that an L1 penalty leaves                  the Lasso's own
SingleDimensions  given dimensions of Z, or those most correlated with the output  least squares
RandomEncoder     a random network, as drawn                                       least squares
RandomDecoder     learned by Eq. 5 against a decoder that stays as drawn           learned with them
NMF               coefficients of non-negative parts of Z                          least squares
================  ===============================================================  =================

The first four and single dimensions are the paper's, the random controls and NMF are not: a method whose x-features
score no better than random ones has shown nothing, and NMF is how most concept methods of today begin.

All of them see the data as the SRAE does: positives count for their share of the batches, also in least squares, in
the Lasso and in NMF; x-features are rewritten to mean 0, standard deviation 1, positive v and the order of their
contributions. Where the decoder plays no part in learning (NN, Lasso, SingleDimensions, RandomEncoder) it is the best
linear map from x-features to Z, fitted afterwards, so that reconstructions can be compared.

Groups of the contributions of Z's dimensions, which are no forms but functions, are in
:mod:`captum_xnn.models.baselines.partitions`.

Conventions:
    M examples, D dimensions of Z, n x-features, C explained outputs. Z is flattened to (M, D).

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2,
    Tables 1, 2, .4 and .6.
"""

from captum_xnn.models.baselines.learned import CAE, NN, SAE, RandomDecoder, RandomEncoder
from captum_xnn.models.baselines.nmf import NMF
from captum_xnn.models.baselines.partitions import (
    drsa,
    nmf_partition,
    prca,
    random_partition,
    single_dimensions,
    spectral_partition,
    subspace_relevances,
)
from captum_xnn.models.baselines.selection import Lasso, LinearModel, SingleDimensions, lasso, lasso_of_size

__all__ = [
    "CAE",
    "NMF",
    "NN",
    "SAE",
    "Lasso",
    "LinearModel",
    "RandomDecoder",
    "RandomEncoder",
    "SingleDimensions",
    "drsa",
    "lasso",
    "lasso_of_size",
    "nmf_partition",
    "prca",
    "random_partition",
    "single_dimensions",
    "spectral_partition",
    "subspace_relevances",
]
