"""Parts and locality against Algorithm 1 written as loops, a tree of nearest neighbours, and cases worked by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from captum_xnn.metrics import locality, object_probabilities, part_probabilities
from captum_xnn.metrics._localisation import mean_locality, pixel_probabilities

NAN = math.nan


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(maps, points, boxes):
    """Algorithm 1, pixel by pixel."""
    N, K, H, W = maps.shape
    P = points.shape[1]
    S = np.zeros((N, K, P + 1))
    for m in range(N):
        x0, y0, x1, y1 = boxes[m].tolist()
        belongs = {}
        for i in range(H):
            for j in range(W):
                if not (x0 <= j + 0.5 < x1 and y0 <= i + 0.5 < y1):
                    continue
                each = [
                    (math.hypot(i + 0.5 - y, j + 0.5 - x), p)
                    for p, (x, y) in enumerate(points[m].tolist())
                    if not math.isnan(x)
                ]
                belongs[i, j] = min(each) if each else None
        largest = max((d for one in belongs.values() if one for d in one[:1]), default=0)
        for k in range(K):
            total = float(maps[m, k].sum())
            for i in range(H):
                for j in range(W):
                    p_pixel = float(maps[m, k, i, j]) / total if total else 0.0
                    if (i, j) not in belongs:
                        S[m, k, P] += p_pixel
                    elif belongs[i, j]:
                        d, p = belongs[i, j]
                        S[m, k, p] += p_pixel * (1 - (d / largest if largest else 0))
    return S


def case(seed=0, N=3, K=2, H=9, W=11, P=4):
    points = rand(N, P, 2, seed=seed + 1) * torch.tensor([W, H])
    points[0, 1] = NAN
    points[1] = NAN
    points[2, 2] = points[2, 0]  # two on one point
    boxes = torch.tensor([[1.0, 2.0, 8.5, 7.0], [0.0, 0.0, 5.0, 5.0], [2.2, 0.4, 10.9, 8.6]])
    maps = rand(N, K, H, W, seed=seed)
    maps[0, 1] = 0
    return maps, points, boxes


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_algorithm_1_as_loops(seed):
    """With an invisible part, an image without any, two parts on one point, and a map of zeros."""
    maps, points, boxes = case(seed)
    found = part_probabilities(maps, points, boxes)
    np.testing.assert_allclose(found.numpy(), by_loops(maps, points, boxes), atol=1e-6)
    assert not bool(found[0, 1].any()) and not bool(found[2, :, 2].any()) and bool(found[2, :, 0].all())
    assert not bool(found[1, :, :4].any()) and bool(found[1, :, 4].all())


def test_nearest_parts_as_a_tree_finds_them():
    """A map of one pixel belongs to the part that scipy says is nearest."""
    H, W, points = 12, 15, rand(1, 6, 2, seed=3) * 12
    maps = torch.eye(H * W, dtype=torch.float64).reshape(1, H * W, H, W)
    found = part_probabilities(maps, points, torch.tensor([[0.0, 0.0, W, H]]))[0]
    y, x = np.divmod(np.arange(H * W), W)
    distance, nearest = cKDTree(points[0].numpy()).query(np.stack([x + 0.5, y + 0.5], 1))
    belongs = found[:, :6].argmax(1).numpy()
    farthest = distance == distance.max()
    assert (belongs == nearest)[~farthest].all()
    np.testing.assert_allclose(found[:, :6].sum(1).numpy(), 1 - distance / distance.max(), atol=1e-6)


def test_worked_by_hand():
    """Pixels of a row at distances 0, 1, 0 and, outside of the box, context; the farthest counts for nothing."""
    maps = torch.tensor([[[[4.0, 3.0, 2.0, 1.0]], [[0.0, 1.0, 0.0, 0.0]]]])
    points = torch.tensor([[[0.5, 0.5], [2.5, 0.5]]])
    found = part_probabilities(maps, points, torch.tensor([[0.0, 0.0, 3.0, 1.0]]))
    torch.testing.assert_close(found[0, 0], torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64))
    assert found[0, 1].tolist() == [0, 0, 0]
    # The pixel between them is the first part's, as far as it counts.
    wide = torch.tensor([[[[0.0, 1.0, 0.0, 0.0]]]])
    found = part_probabilities(wide, points, torch.tensor([[0.0, 0.0, 4.0, 1.0]]))
    assert found.flatten().tolist() == [0, 0, 0]  # distances 0, 1, 0, 1: both farthest
    far = part_probabilities(wide, points, torch.tensor([[0.0, 0.0, 4.0, 2.0]]))
    assert far.flatten().tolist() == [0, 0, 0]
    wide = torch.tensor([[[[0.0, 1.0, 0.0, 0.0, 0.0]]]])
    found = part_probabilities(wide, points, torch.tensor([[0.0, 0.0, 5.0, 1.0]]))
    assert found.flatten().tolist() == [0.5, 0, 0]  # the tie goes to the first, and the last pixel is two away


def test_boxes():
    """Centres from the lower end on, up to and without the upper one, cut off at the image, or empty."""
    maps, points = torch.ones(1, 1, 1, 4), torch.tensor([[[NAN, NAN]]])
    for box, outside in (
        ((0.5, 0, 2.5, 1), 2),
        ((0.6, 0, 2.6, 1), 2),
        ((-9, -9, 99, 99), 0),
        ((2, 0, 2, 1), 4),
        ((7, 0, 9, 1), 4),
    ):
        context = part_probabilities(maps, points, torch.tensor([box], dtype=torch.float32))[0, 0, 1]
        assert context.item() == pytest.approx(outside / 4), box


def test_scale_order_and_precision():
    maps, points, boxes = case()
    found = part_probabilities(maps, points, boxes)
    torch.testing.assert_close(part_probabilities(maps * 1e-9, points, boxes), found)
    torch.testing.assert_close(part_probabilities(maps[:, [1, 0]], points, boxes), found[:, [1, 0]])
    torch.testing.assert_close(part_probabilities(maps.float(), points.float(), boxes), found, rtol=1e-4, atol=1e-6)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(part_probabilities(maps[order], points[order], boxes[order]), found[order])
    assert bool((found.sum(2) <= 1 + 1e-6).all())


def test_shifting_everything_shifts_nothing():
    maps, points, boxes = case()
    padded = torch.nn.functional.pad(maps, (3, 0, 2, 0))
    move = torch.tensor([3.0, 2.0])
    shifted = part_probabilities(padded, points + move, boxes + move.repeat(2))
    torch.testing.assert_close(shifted, part_probabilities(maps, points, boxes), rtol=1e-5, atol=1e-6)


def test_objects_as_loops():
    maps = rand(3, 2, 5, 6)
    masks = torch.randint(0, 4, (3, 5, 6), generator=torch.Generator().manual_seed(1))
    found = object_probabilities(maps, masks, objects=5)
    for m in range(3):
        for k in range(2):
            for o in range(1, 6):
                wanted = maps[m, k][masks[m] == o].sum() / maps[m, k].sum()
                assert float(found[m, k, o - 1]) == pytest.approx(float(wanted))
    several = torch.stack([masks == o for o in range(1, 6)], 1)
    torch.testing.assert_close(object_probabilities(maps, several), found)
    assert object_probabilities(maps, masks * 0).shape == (3, 2, 0)
    overlapping = several | (masks == 1)[:, None]
    assert bool((object_probabilities(maps, overlapping).sum(2) > found.sum(2) + 0.1).any())


def test_locality_as_loops():
    S, contributions = rand(4, 3, 5), rand(4, 3, seed=1) - 0.5
    S[:, 2] = 0
    for weights in (None, contributions):
        found = locality(S, contributions=weights)
        for k in range(2):
            mean = [0.0] * 5
            for m in range(4):
                row = [1.0] * 3 if weights is None else weights[m].abs().tolist()
                for p in range(5):
                    mean[p] += row[k] / sum(row) * float(S[m, k, p])
            h = [v / sum(mean) for v in mean]
            assert float(found[k]) == pytest.approx(-sum(v * math.log(v) for v in h))
        assert found[2].isnan()


def test_locality_is_the_logarithm_of_the_number_of_parts():
    S = torch.zeros(2, 3, 16)
    S[:, 0, 4], S[:, 1, :8], S[:, 2, :] = 0.3, 0.1, 0.01
    torch.testing.assert_close(locality(S), torch.tensor([0, math.log(8), math.log(16)], dtype=torch.float64))
    # The entropy of the mean, not the mean of entropies.
    moving = torch.eye(2).reshape(2, 1, 2)
    assert float(locality(moving)) == pytest.approx(math.log(2))


def test_a_negligible_x_feature_counts_in_the_plain_mean_only():
    S = torch.zeros(2, 3, 4)
    S[:, 0, 0], S[:, 1], S[:, 2] = 1.0, 0.25, 0.0
    assert mean_locality(S) == pytest.approx(math.log(4) / 2)
    contributions = torch.tensor([[3.0, 1.0, 0.0], [-3.0, 1.0, 0.0]])
    assert mean_locality(S, contributions=contributions) == pytest.approx(math.log(4) / 4)
    equal = torch.ones(2, 3)
    assert mean_locality(S, contributions=equal) == pytest.approx(mean_locality(S))
    assert math.isnan(mean_locality(S * 0))
    # An image in which it contributes nothing does not count.
    S = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).expand(-1, 2, -1)
    contributions = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert locality(S, contributions=contributions)[0].item() == pytest.approx(0)
    assert float(locality(S)[0]) == pytest.approx(math.log(2))


def test_one_image():
    assert locality(torch.tensor([[[0.2, 0.2]]])).item() == pytest.approx(math.log(2))


def test_halves_neither_overflow_nor_lose_digits():
    """The sum of 60,000 values above 2 is no number in float16, and the map would be one of zeros."""
    maps = torch.rand(1, 2, 245, 245, generator=torch.Generator().manual_seed(0)).half() + 2
    found = pixel_probabilities(maps)
    assert found.dtype == torch.float32 and found.sum((2, 3)) == pytest.approx(torch.ones(1, 2), abs=1e-5)
    assert torch.allclose(found.double(), pixel_probabilities(maps.double()), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"sums beyond the range of torch\.float32; divide"):
        pixel_probabilities(torch.full((1, 1, 2, 2), 3e38))


def test_no_part_anywhere_is_no_locality():
    """Rather than one of 0, which would be the best there is."""
    maps = torch.rand(2, 3, 4, 4)
    nothing = object_probabilities(maps, torch.zeros(2, 4, 4, dtype=torch.long))
    assert nothing.shape == (2, 3, 0) and locality(nothing).isnan().all()
    nothing = object_probabilities(maps, torch.zeros(2, 4, 4, dtype=torch.long), objects=5)
    assert locality(nothing).isnan().all() and math.isnan(mean_locality(nothing))
    hidden = part_probabilities(
        maps, torch.full((2, 3, 2), torch.nan), torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(2, 1)
    )
    assert locality(hidden).isnan().all()


@pytest.mark.parametrize("box", [[6.0, 1.0, 3.0, 2.0], [1.0, 6.0, 3.0, 2.0], [math.nan, 0, 3, 3], [0, 0, math.inf, 3]])
def test_boxes_that_are_none_are_told(box):
    """x, y, width and height would leave an empty box, and all of the map to the context."""
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], box])
    with pytest.raises(
        ValueError, match=r"box .* of image 1 ends before it begins; .* If boxes are x, y, width, height, add"
    ):
        part_probabilities(torch.rand(2, 1, 8, 8), torch.rand(2, 3, 2), boxes)


def test_what_is_not_finite_is_told():
    S, contributions = torch.rand(2, 3, 4), torch.ones(2, 3)
    S[1, 1, 1], contributions[0, 0] = math.nan, math.nan
    with pytest.raises(ValueError, match="finite: False"):
        locality(S)
    with pytest.raises(ValueError, match="contributions are NaN or infinite"):
        mean_locality(torch.rand(2, 3, 4), contributions=contributions)
    with pytest.raises(ValueError, match=r"probabilities are \(3, 4\), finite: True"):
        locality(torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"masks are torch\.float32 \(1, 2, 2\)"):
        object_probabilities(torch.rand(1, 1, 2, 2), torch.ones(1, 2, 2))


def test_wrong_arguments():
    maps, points, boxes = case()
    with pytest.raises(ValueError, match=r"maps have values from -1 .*not negative, as maps.clamp\(min=0\)"):
        part_probabilities(-torch.ones(3, 2, 9, 11), points, boxes)
    for bad in (NAN, math.inf):
        with pytest.raises(ValueError, match=r"maps have values from .*; pass finite ones that are not negative"):
            pixel_probabilities(torch.full((1, 1, 2, 2), bad))
    with pytest.raises(ValueError, match=r"maps are \(3, 2, 99\), not \(N, K, H, W\)"):
        part_probabilities(maps.flatten(2), points, boxes)
    with pytest.raises(ValueError, match=r"points are \(2, 4, 2\) and boxes \(3, 4\) for 3 images"):
        part_probabilities(maps, points[:2], boxes)
    with pytest.raises(ValueError, match=r"masks are torch\.int64 \(3, 8, 11\); .* resized to the maps"):
        object_probabilities(maps, torch.zeros(3, 8, 11, dtype=torch.long))
    with pytest.raises(ValueError, match="masks hold objects from 0 to 4, and objects is 2; raise objects="):
        object_probabilities(maps, torch.arange(3)[:, None, None].expand(3, 9, 11) * 2, objects=2)
    with pytest.raises(ValueError, match=r"contributions \(N, K\)"):
        locality(rand(2, 3, 4), contributions=rand(3, 2))
