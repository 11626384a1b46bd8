"""Gini index, Hoyer's measure and the effective number: by loops, by hand and at their ends."""

import math

import pytest
import torch

from captum_xnn.metrics import effective_number
from captum_xnn.metrics._sparsity import gini, hoyer


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_gini_is_the_mean_difference():
    """By its other definition: the mean absolute difference of two pixels over twice their mean."""
    maps = drawn(2, 3, 4, 5)
    found = gini(maps)
    for n in range(2):
        for k in range(3):
            c = maps[n, k].abs().flatten().tolist()
            wanted = sum(abs(a - b) for a in c for b in c) / (2 * len(c) * sum(c))
            assert float(found[n, k]) == pytest.approx(wanted, rel=1e-12)


def test_hoyer_by_loops():
    maps = drawn(2, 3, 4, 5)
    found = hoyer(maps)
    for n in range(2):
        for k in range(3):
            c = maps[n, k].abs().flatten().tolist()
            ratio = sum(c) / math.sqrt(sum(x * x for x in c))
            wanted = (math.sqrt(len(c)) - ratio) / (math.sqrt(len(c)) - 1)
            assert float(found[n, k]) == pytest.approx(wanted, rel=1e-12)


def test_by_hand():
    maps = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0], [-1.0, 0.0, 0.0, 0.0], [7.0, 7.0, -7.0, 7.0]]])
    assert gini(maps).tolist()[0] == pytest.approx([0.5, 0.25, 0.75, 0.0])
    assert hoyer(maps).tolist()[0] == pytest.approx([2 - math.sqrt(2), 2 - 10 / math.sqrt(30), 1.0, 0.0])


@pytest.mark.parametrize("measure", [gini, hoyer])
def test_empty_constant_and_tiny_maps(measure):
    maps = torch.stack([torch.zeros(6), torch.full((6,), 0.3), torch.full((6,), -1e-30)])[None]
    assert measure(maps).tolist()[0] == pytest.approx([0, 0, 0], abs=1e-12)
    assert measure(maps).amin() >= 0
    assert measure(torch.tensor([[[5.0], [0.0]]])).tolist() == [[0.0, 0.0]]  # maps of one pixel
    assert measure(torch.zeros(0, 3, 4, 4)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"maps are \(3, 4\), not \(N, K, \.\.\.\) with pixels"):
        measure(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"maps are \(3, 4, 0\), not \(N, K, \.\.\.\) with pixels"):
        measure(torch.zeros(3, 4, 0))


@pytest.mark.parametrize("measure", [gini, hoyer])
def test_scale_sign_and_place_make_no_difference(measure):
    maps = drawn(1, 2, 5, 5)
    found = measure(maps)
    assert torch.allclose(measure(maps.flip(2, 3) * -1e200), found, rtol=1e-9)
    assert torch.allclose(measure(maps * 1e-200), found, rtol=1e-9)
    assert torch.allclose(measure(maps.reshape(1, 2, 1, 25)), found, rtol=1e-9)
    spread = maps.clone()
    spread[:, :, 0, 0], spread[:, :, 0, 1] = [spread[:, :, 0, :2].abs().mean(2)] * 2  # from the rich to the poor
    assert (measure(spread) < found).all()


def test_effective_number_by_loops():
    contributions = drawn(5, 4)
    for row, found in zip(contributions.abs().tolist(), effective_number(contributions).tolist(), strict=True):
        p = [x / sum(row) for x in row]
        assert found == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-12)


def test_effective_number_by_hand():
    contributions = torch.tensor([[1.0, -1, 0], [0, 0, -9], [2, 2, 2], [0, 0, 0], [1e-30, 1e-30, 0]])
    assert effective_number(contributions).tolist() == pytest.approx([2, 1, 3, 0, 2])
    assert effective_number(contributions.abs().mean(0, keepdim=True)) > 2
    assert effective_number(torch.zeros(0, 3)).shape == (0,)
    with pytest.raises(
        ValueError, match=r"contributions are \(3,\), not \(N, K\) of K > 0 x-features; add a first dimension"
    ):
        effective_number(torch.zeros(3))
    with pytest.raises(ValueError, match=r"contributions are \(3, 0\), not \(N, K\) of K > 0 x-features"):
        effective_number(torch.zeros(3, 0))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_is_told(wrong):
    """It would have been 0: no sparsity, no x-feature."""
    values = torch.rand(2, 3, 4)
    values[1, 2, 0] = wrong
    for measure in (gini, hoyer):
        with pytest.raises(ValueError, match="values are NaN or infinite"):
            measure(values)
    with pytest.raises(ValueError, match="values are NaN or infinite"):
        effective_number(values[1])
