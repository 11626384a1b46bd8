r"""Purity of the groups into which people sort images, against the classes that the model predicts (Fig. 4).

In the paper's study a participant sorts ten images of four classes, in three stages: without explanation (*NoVis*),
with one map of the model's output (*1-Heatmap*), and with a map of each x-feature (*XNN*). The study has two sets of
images: *CUB*, four kinds of gulls, and *CEL*, four kinds of breast cancer cells.

Conventions:
    N images. Groups and classes are any hashable values, one for each image; only their equality counts.
    Purity is in (0, 1], 1 is best. Splitting a group never lowers it, and N groups of one image each have purity 1.
    So compare sortings with the same number of groups, and with :func:`chance_purity`.

To compare stages of the same people, use :func:`captum_xnn.metrics.paired_test`.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from torch import Tensor

__all__ = ["chance_purity", "clustering_purity"]


def clustering_purity(clusters: Sequence[Hashable] | Tensor, labels: Sequence[Hashable] | Tensor) -> float:
    r"""Compute the share of images that belong to the commonest class of their group, in (0, 1].

    .. math:: \frac1N \sum_k \max_j |\omega_k \cap c_j|

    Args:
        clusters: The group :math:`\omega_k` of each image, (N,). Give each unsorted image a group of its own.
        labels: The class :math:`c_j` of each image, (N,): in the paper the network's prediction, not the true class.

    Raises:
        ValueError: If lengths differ or there are no images.

    Example:
        >>> clustering_purity(["a", "a", "a", "b"], [7, 7, 8, 8])
        0.75

    Reference:
        Manning, Raghavan, Schütze, "Introduction to Information Retrieval", 2008, section 16.3.
    """
    clusters, labels = _values(clusters), _values(labels)
    if len(clusters) != len(labels) or not labels:
        raise ValueError(
            f"there are {len(clusters)} groups and {len(labels)} classes; pass one group and one class for each image, "
            "and leave out images that were not shown"
        )
    counts: dict[Hashable, Counter[Hashable]] = {}
    for cluster, label in zip(clusters, labels, strict=True):
        counts.setdefault(cluster, Counter())[label] += 1
    return sum(max(count.values()) for count in counts.values()) / len(labels)


def chance_purity(
    clusters: Sequence[Hashable] | Tensor, labels: Sequence[Hashable] | Tensor, *, seed: int, draws: int = 1000
) -> float:
    """Deal the images at random into groups of the same sizes, and compute the mean purity, in (0, 1].

    It is far above 1/classes if groups are small: ten images of four classes in groups of 2 or 3 have about 0.54.

    Args:
        clusters: The group of each image, (N,).
        labels: The class of each image, (N,).
        seed: Seeds the random deals.
        draws: Number of random deals.

    Raises:
        ValueError: If lengths differ or there are no images.

    Example:
        >>> round(chance_purity([0, 0, 1, 1], [0, 0, 1, 1], seed=0, draws=10000), 1)
        0.7
    """
    labels, generator = _values(labels), np.random.default_rng(seed)
    dealt = ([labels[i] for i in generator.permutation(len(labels))] for _ in range(draws))
    return sum(clustering_purity(clusters, hand) for hand in dealt) / draws


def _values(given: Sequence[Hashable] | Tensor) -> list[Hashable]:
    return given.tolist() if isinstance(given, Tensor) else list(given)
