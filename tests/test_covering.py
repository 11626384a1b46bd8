"""Covers: which patches of which image are in its mean colour, and that four images in a row share all patches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from captum_xnn.training._covering import Grid, ImageCovers, images_among, patch_bounds


def test_bounds_cut_a_side_into_nearly_equal_parts():
    bounds = patch_bounds(227, 8)
    assert bounds[0][0] == 0 and bounds[-1][1] == 227
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    assert {end - begin for begin, end in bounds} == {28, 29}
    assert patch_bounds(3, 8) == [(0, 1), (1, 2), (2, 3)]


def test_a_cover_changes_its_patch_alone():
    images, other = torch.rand(3, 2, 9, 7), torch.rand(3, 4)
    made = ImageCovers((other, images), 1, 3)
    pairs = made.grid.pairs(1, [None, None, None])
    assert pairs == [(i, p) for i in range(3) for p in range(9)]
    before = images.clone()
    for (i, p), x, row in zip(pairs, *reversed(made.covered(pairs)), strict=True):
        (top, bottom), (left, right) = patch_bounds(9, 3)[p // 3], patch_bounds(7, 3)[p % 3]
        expected = images[i].clone()
        expected[:, top:bottom, left:right] = images[i].mean((1, 2))[:, None, None]
        torch.testing.assert_close(x, expected)
        assert torch.equal(row, other[i])
    assert torch.equal(images, before)


@pytest.mark.parametrize("size", [8, 5])
def test_four_images_in_a_row_share_the_patches(size):
    pairs = Grid(size, size, 8).pairs(2, [4, 5, 6, 7])
    assert sorted(p for _, p in pairs) == list(range(min(size, 8) ** 2))
    counts = [sum(i == n for i, _ in pairs) for n in range(4)]
    assert max(counts) <= 9 + 7 * (size == 8)
    assert Grid(size, size, 8).pairs(2, [9]) == [(0, p) for i, p in pairs if i == 1]


def test_one_patch_is_covered_in_every_image():
    assert [Grid(4, 4, 1).pairs(2, [n]) for n in range(3)] == [[(0, 0)]] * 3


def test_inputs_without_images():
    assert images_among((torch.rand(2, 5),)) is None
    assert images_among((torch.ones(2, 1, 4, 4, dtype=torch.long),)) is None
    assert images_among((torch.rand(2, 3, 1, 9),)) is None
    assert images_among((torch.rand(2, 5), torch.rand(2, 1, 4, 4), torch.rand(2, 1, 9, 9))) == 1


def test_without_thinning_every_image_has_all_patches_covered():
    assert Grid(4, 4, 2).pairs(1, [3, 4]) == [(i, p) for i in range(2) for p in range(4)]
    assert all(sum(i == n for i, _ in Grid(9, 9, 9).pairs(3, list(range(9)))) == 9 for n in range(9))
