r"""Baselines for the SRAE: forms of explanation network that leave out some or all terms of its objective.

================  ===============================================================  =================
form              x-features                                                       head
================  ===============================================================  =================
NN                learned for faithfulness alone                                   learned with them
SAE               learned for faithfulness and plain reconstruction                learned with them
CAE               learned for plain reconstruction alone                           least squares
Lasso             dimensions of Z selected by an L1 penalty                        the Lasso's own
SingleDimensions  given dimensions of Z, or the most correlated with the output    least squares
RandomEncoder     a random network without training                                least squares
RandomDecoder     learned by Eq. 5 against a decoder that stays random             learned with them
NMF               coefficients of non-negative parts of Z                          least squares
DRSA              relevance of orthogonal subspaces of Z, and the remainder        none: exact
================  ===============================================================  =================

The first four and SingleDimensions come from the paper. The random controls and NMF do not: a method must score better
than random x-features to show anything, and most concept methods of today start from NMF.

All forms weight the data as the SRAE does. Positives count for their share of the batches, also in least squares, in
the Lasso and in NMF. A fit rewrites x-features to mean 0, standard deviation 1, positive v and the order of their
contributions. In NN, Lasso, SingleDimensions and RandomEncoder the decoder takes no part in learning. It is fitted
afterwards as the best linear map from x-features to Z, so that reconstructions can be compared.

DRSA divides path-integrated contributions, as the default form does, and has neither decoder nor head.

Functions that group the contributions of Z's dimensions are in :mod:`captum_xnn.models.baselines._partitions`. Those
that rebuild Z from concepts, as CRAFT does, are in :mod:`captum_xnn.models.baselines._dictionaries`.

Conventions:
    M examples, D dimensions of Z, n x-features, C explained outputs. Z is flattened to (M, D).

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2,
    Tables 1, 2, .4 and .6.
"""

from captum_xnn.models.baselines._learned import CAE, NN, SAE, RandomDecoder, RandomEncoder
from captum_xnn.models.baselines._nmf import NMF
from captum_xnn.models.baselines._selection import Lasso, SingleDimensions
from captum_xnn.models.baselines._subspaces import DRSA

__all__ = ["CAE", "DRSA", "NMF", "NN", "SAE", "Lasso", "RandomDecoder", "RandomEncoder", "SingleDimensions"]
