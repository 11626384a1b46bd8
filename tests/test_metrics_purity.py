"""Purity by hand, by another library, and against its chance level."""

import itertools

import pytest
import torch
from sklearn.metrics.cluster import contingency_matrix

from captum_xnn.metrics._purity import chance_purity, clustering_purity


def test_the_textbook_example():
    """Manning et al., Fig. 16.4: 17 objects, majority classes 5, 4 and 3 of their groups."""
    clusters = [1] * 6 + [2] * 6 + [3] * 5
    labels = list("xxxxxo") + list("xoooo+") + list("xx+++")
    assert clustering_purity(clusters, labels) == pytest.approx(12 / 17)


def test_purity_beside_sklearn():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        clusters = torch.randint(0, 5, (37,), generator=generator)
        labels = torch.randint(0, 4, (37,), generator=generator)
        wanted = contingency_matrix(labels.numpy(), clusters.numpy()).max(0).sum() / 37
        assert clustering_purity(clusters, labels) == pytest.approx(wanted)
        assert clustering_purity(clusters.tolist(), labels) == pytest.approx(wanted)


def test_names_do_not_matter():
    clusters, labels = [0, 0, 1, 1, 2], [3, 3, 3, 4, 4]
    assert clustering_purity(clusters, labels) == 0.8
    assert clustering_purity([{0: 9, 1: "b", 2: None}[c] for c in clusters], [-x for x in labels]) == 0.8


def test_degenerate_groups():
    labels = [0, 0, 0, 1]
    assert clustering_purity([5, 5, 5, 5], labels) == 0.75  # one group: the commonest class
    assert clustering_purity([1, 2, 3, 4], labels) == 1.0
    assert clustering_purity([0], [1]) == 1.0
    with pytest.raises(ValueError, match="there are 0 groups and 0 classes"):
        clustering_purity([], [])
    with pytest.raises(ValueError, match="there are 2 groups and 3 classes"):
        clustering_purity([0, 1], [0, 1, 2])


def test_chance_is_the_mean_over_all_dealings():
    clusters, labels = [0, 0, 0, 1, 1], [0, 0, 1, 1, 2]
    dealings = [clustering_purity(clusters, hand) for hand in itertools.permutations(labels)]
    assert min(dealings) < max(dealings)
    found = chance_purity(clusters, torch.tensor(labels), seed=0, draws=20000)
    assert found == pytest.approx(sum(dealings) / len(dealings), abs=0.005)
    assert chance_purity(clusters, labels, seed=1, draws=5) == chance_purity(clusters, labels, seed=1, draws=5)
    assert chance_purity([0, 1, 2], [0, 1, 1], seed=0, draws=3) == 1.0
    with pytest.raises(ValueError, match="there are 1 groups and 2 classes"):
        chance_purity([0], [0, 1], seed=0)
