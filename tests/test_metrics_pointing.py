"""Pointing accuracy in loops, and where it is defined by words only."""

import math

import pytest
import torch

from captum_xnn.metrics import part_probabilities, pointing_accuracy


def by_loops(maps, points, tolerance):
    N, K, H, W = maps.shape
    made = torch.full((K, points.shape[1]), math.nan, dtype=torch.float64)
    for k in range(K):
        for p in range(points.shape[1]):
            hits, seen = 0, 0
            for n in range(N):
                x, y = points[n, p].tolist()
                if math.isnan(x) or math.isnan(y):
                    continue
                seen += 1
                best = max(((i, j) for i in range(H) for j in range(W)), key=lambda ij: float(maps[n, k, ij[0], ij[1]]))
                hits += math.hypot(best[1] + 0.5 - x, best[0] + 0.5 - y) <= tolerance
            if seen:
                made[k, p] = hits / seen
    return made


@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pointing_by_loops(tolerance, dtype):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 40, (9, 3, 6, 8), generator=generator).to(dtype)  # with ties
    points = torch.randint(0, 8, (9, 5, 2), generator=generator).double() + 0.5
    points[torch.rand(9, 5, generator=generator) < 0.3] = torch.nan
    points[:, 4] = torch.nan
    points[2, 0, 1] = torch.nan  # half a point is none
    found = pointing_accuracy(maps, points, tolerance)
    assert torch.equal(found.isnan(), by_loops(maps, points, tolerance).isnan()) and found[:, 4].isnan().all()
    assert torch.allclose(found, by_loops(maps, points, tolerance), equal_nan=True)


def test_x_is_to_the_right_and_y_down():
    maps = torch.zeros(1, 1, 4, 10)
    maps[0, 0, 1, 7] = 1
    points = torch.tensor([[[7.0, 1.0], [1.0, 7.0], [7.0, 3.0], [9.0, 1.0], [8.0, 2.0]]]) + 0.5
    assert pointing_accuracy(maps, points, 0).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    assert pointing_accuracy(maps, points, 2).tolist() == [[1.0, 0.0, 1.0, 1.0, 1.0]]  # on the edge counts
    assert pointing_accuracy(maps, points, 1.4).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


def test_the_peak_on_a_parts_pixel_is_of_that_part_by_algorithm_1_too():
    """One convention of coordinates: a part at the centre of a pixel is at distance 0 in both metrics."""
    maps = torch.zeros(1, 1, 6, 9)
    maps[0, 0, 2, 5] = 1
    point = torch.tensor([[[5.5, 2.5]]])
    assert pointing_accuracy(maps, point, 0).tolist() == [[1.0]]
    S = part_probabilities(maps, point, torch.tensor([[0.0, 0.0, 9.0, 6.0]]))
    assert S.tolist() == [[[1.0, 0.0]]]  # 1 - distance, nothing of the context


def test_only_images_that_show_the_part_count():
    maps = torch.zeros(3, 1, 3, 3)
    maps[:, 0, 0, 0] = 1
    points = torch.tensor([[[0.0, 0.0]], [[2.0, 2.0]], [[torch.nan, torch.nan]]])
    assert pointing_accuracy(maps, points, 1).tolist() == [[0.5]]
    assert pointing_accuracy(maps[:1], points[:1], 1).tolist() == [[1.0]]


def test_a_constant_map_points_nowhere():
    maps = torch.zeros(2, 2, 3, 3)
    maps[:, 1, 0, 0] = -1.0  # what is left is the first of the others, at (1, 0)
    points = torch.tensor([[0.5, 0.5], [1.5, 0.5]]).expand(2, 2, 2)
    assert pointing_accuracy(maps, points, 0).tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_nothing_visible_and_no_images():
    maps = torch.rand(2, 3, 4, 4)
    assert pointing_accuracy(maps, torch.full((2, 5, 2), torch.nan)).isnan().all()
    assert pointing_accuracy(maps, torch.full((2, 5, 2), torch.inf)).isnan().all()
    assert pointing_accuracy(maps[:0], torch.zeros(0, 5, 2)).isnan().all()
    assert pointing_accuracy(maps, torch.zeros(2, 5, 2)).shape == (3, 5)


def test_errors():
    with pytest.raises(
        ValueError,
        match=r"maps are \(2, 1, 4\) and points \(2, 5, 2\), not \(N, K, H, W\) and \(N, P, 2\) .*; enlarge",
    ):
        pointing_accuracy(torch.zeros(2, 1, 4), torch.zeros(2, 5, 2))
    with pytest.raises(ValueError, match="of the same images"):
        pointing_accuracy(torch.zeros(2, 1, 4, 4), torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="of the same images"):
        pointing_accuracy(torch.zeros(2, 1, 4, 4), torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="finite: False"):
        pointing_accuracy(torch.full((1, 1, 2, 2), torch.nan), torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="maps are finite: True, and tolerance is -1 pixels"):
        pointing_accuracy(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2), -1)
