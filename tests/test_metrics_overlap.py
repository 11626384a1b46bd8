"""O1 and O2 against NumPy's covariances and determinants, and where they must be 0, infinite, or unchanged."""

import math

import numpy as np
import pytest
import torch

from captum_xnn.metrics import orthogonality
from captum_xnn.metrics._overlap import OrthogonalityStream, contribution_shares


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(maps):
    """The definition by numpy.cov, image after image."""
    C = sum(np.atleast_2d(np.cov(image.reshape(len(image), -1), bias=True)) for image in maps.numpy())
    P = np.diag(np.diag(C) ** -0.5) @ C @ np.diag(np.diag(C) ** -0.5)
    return np.linalg.norm(P) - math.sqrt(len(P)), -math.log(np.linalg.det(P))


@pytest.mark.parametrize("K", [1, 2, 5])
def test_the_definition_written_again(K):
    maps = rand(4, K, 6, 7) ** 3
    assert orthogonality(maps) == pytest.approx(by_hand(maps), abs=1e-10)


def test_worked_by_hand():
    """Two maps with a correlation of 1/2: deviations (1, -1, 0, 0) and (1, 0, -1, 0) over four pixels."""
    maps = torch.tensor([[[[2.0, 0.0, 1.0, 1.0]], [[2.0, 1.0, 0.0, 1.0]]]])
    o1, o2 = orthogonality(maps)
    assert o1 == pytest.approx(math.sqrt(2 + 2 * 0.25) - math.sqrt(2)) and o2 == pytest.approx(-math.log(0.75))


def test_maps_on_different_regions_of_different_images_do_not_correlate():
    """Orthogonal deviations: 0 in both."""
    maps = torch.tensor([[[[1.0, -1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, -1.0]]]])
    assert orthogonality(maps) == pytest.approx((0, 0))


def test_strong_images_do_not_correlate_all_maps():
    """A constant added to all maps of an image, as of one with stronger maps, changes nothing."""
    maps = rand(3, 4, 5, 5)
    stronger = maps + torch.tensor([0.0, 10.0, 100.0])[:, None, None, None]
    assert orthogonality(stronger) == pytest.approx(orthogonality(maps), abs=1e-9)


def test_order_scale_and_sign():
    maps = rand(3, 4, 5, 5)
    wanted = orthogonality(maps)
    assert orthogonality(maps[:, [2, 0, 3, 1]]) == pytest.approx(wanted, abs=1e-10)
    assert orthogonality(maps * torch.tensor([1e-6, 5.0, -2.0, 1e6])[:, None, None]) == pytest.approx(wanted, abs=1e-9)
    assert orthogonality(maps.float()) == pytest.approx(wanted, abs=1e-5)


def test_batches_are_the_whole_and_memory_does_not_grow():
    maps, contributions = rand(7, 3, 5, 5), rand(7, 3, seed=1) - 0.5
    plain, weighted = OrthogonalityStream(), OrthogonalityStream()
    for i in (0, 3, 4):
        rows = slice(i, {0: 3, 3: 4, 4: 7}[i])
        plain.update(maps[rows])
        weighted.update(maps[rows], contributions=contributions[rows])
    assert plain.compute() == pytest.approx(orthogonality(maps), abs=1e-12)
    assert weighted.compute() == pytest.approx(orthogonality(maps, contributions=contributions), abs=1e-12)
    assert plain.covariance.shape == (3, 3) and plain.images == 7 and plain.shares is None


def test_a_duplicate_is_no_basis():
    maps = rand(2, 3, 5, 5)
    for copied in (maps[:, :1], 3 * maps[:, :1] + 1, maps[:, :1] - 2 * maps[:, 1:2]):
        o1, o2 = orthogonality(torch.cat([maps, copied], 1))
        assert o2 == math.inf and math.isfinite(o1)
    everything = orthogonality(maps[:, :1].expand(-1, 5, -1, -1))
    assert everything.o1 == pytest.approx(5 - math.sqrt(5)) and everything.o2 == math.inf


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_a_dead_map_correlates_with_none(value):
    """So the plain O2 is that of the others, and O1 a little better; the weighted form leaves it out."""
    maps = rand(2, 3, 5, 5)
    dead = torch.cat([maps, torch.full((2, 1, 5, 5), value)], 1)
    found, others = orthogonality(dead), orthogonality(maps)
    assert found.o2 == pytest.approx(others.o2) and 0 < found.o1 < others.o1
    contributions = torch.tensor([[1.0, -1.0, 1.0, 0.0]]).expand(2, -1)
    assert orthogonality(dead, contributions=contributions) == pytest.approx(others, abs=1e-12)


def test_two_dead_maps_that_are_constant_but_for_rounding_correlate_with_none():
    """In double precision the mean of 50,176 times 0.1 is not 0.1, and what is left of both is the same everywhere."""
    maps = rand(3, 5, 224, 224)
    maps[:, 0], maps[:, 1] = 0.1, 1 / 3
    K, live = 5, orthogonality(maps[:, 2:])
    found = orthogonality(maps)
    assert found.o2 == pytest.approx(live.o2, abs=1e-12)
    assert found.o1 == pytest.approx(math.sqrt((live.o1 + math.sqrt(3)) ** 2 + 2) - math.sqrt(K), abs=1e-12)
    noise = maps.float()
    noise[:, 0] *= 1 + torch.finfo(torch.float32).eps * (rand(224, 224) > 0.5)  # as of an enlarged constant map
    noise[:, 1] = noise[:, 0]
    assert orthogonality(noise).o2 == pytest.approx(live.o2, abs=1e-5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_is_told(wrong):
    """A NaN among the contributions would count as a share of 0, and the explainer as perfectly orthogonal."""
    maps, contributions = rand(2, 3, 4, 4), rand(2, 3, seed=1)
    bad_maps, bad = maps.clone(), contributions.clone()
    bad_maps[1, 2, 0, 0], bad[1, 0] = wrong, wrong
    with pytest.raises(ValueError, match="maps are NaN or infinite"):
        orthogonality(bad_maps)
    with pytest.raises(ValueError, match="contributions are NaN or infinite"):
        orthogonality(maps, contributions=bad)
    stream = OrthogonalityStream()
    stream.update(maps)
    with pytest.raises(ValueError, match="maps are NaN or infinite"):
        stream.update(bad_maps)
    assert stream.compute() == orthogonality(maps)  # as before


def test_equal_shares_are_the_plain_form_and_none_leaves_out():
    maps = rand(3, 4, 5, 5)
    equal = torch.tensor([2.0, -2.0, 2.0, -2.0]).expand(3, -1)
    assert orthogonality(maps, contributions=equal) == pytest.approx(orthogonality(maps), abs=1e-12)
    without = equal * torch.tensor([1.0, 1.0, 0.0, 1.0])
    wanted = orthogonality(maps[:, [0, 1, 3]])
    assert orthogonality(maps, contributions=without) == pytest.approx(wanted, abs=1e-12)


def test_the_weighted_form_written_again():
    """Shares .5, .3, .2 of one image: correlations times sqrt(t_i t_j), K as the sum of t = 1, .6, .4."""
    maps = rand(1, 3, 5, 5)
    P = np.corrcoef(maps[0].reshape(3, -1).numpy())
    t = np.array([1, 0.6, 0.4])
    for i in range(3):
        for j in range(3):
            P[i, j] *= math.sqrt(t[i] * t[j]) if i != j else 1
    off = P - np.eye(3)
    wanted = math.sqrt(2.0 + (off**2).sum()) - math.sqrt(2.0), -math.log(np.linalg.det(P))
    assert orthogonality(maps, contributions=torch.tensor([[-5.0, 3.0, 2.0]])) == pytest.approx(wanted, abs=1e-10)


def test_one_that_does_everything_is_perfectly_orthogonal():
    """Which is why it is read beside the effective number."""
    found = orthogonality(rand(2, 3, 4, 4), contributions=torch.tensor([[4.0, 0.0, 0.0]]).expand(2, -1))
    assert found == pytest.approx((0, 0), abs=1e-12)
    assert orthogonality(rand(2, 3, 4, 4), contributions=torch.zeros(2, 3)) == pytest.approx((0, 0), abs=1e-12)


def test_shares():
    shares = contribution_shares(torch.tensor([[1.0, -3.0], [0.0, 0.0]]))
    assert shares.tolist() == [[0.25, 0.75], [0.0, 0.0]]


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"maps are \(2, 3\), not \(N, K, \.\.\.\)"):
        orthogonality(rand(2, 3))
    with pytest.raises(ValueError, match=r"contributions are \(3, 2\), not \(2, 3\) with one for each map"):
        orthogonality(rand(2, 3, 4, 4), contributions=rand(3, 2))
    with pytest.raises(ValueError, match=r"at least one image; call update\(\)"):
        OrthogonalityStream().compute()
    stream = OrthogonalityStream()
    stream.update(rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"maps are \(2, 4, 4, 4\), not \(N, 3, \.\.\.\)"):
        stream.update(rand(2, 4, 4, 4))
    with pytest.raises(ValueError, match="some batches came with contributions and some without"):
        stream.update(rand(2, 3, 4, 4), contributions=rand(2, 3))
