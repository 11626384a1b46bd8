"""Covers: which patch of which image is in its mean colour."""

from __future__ import annotations

from itertools import pairwise

import torch

from captum_xnn.metrics._patches import patch_bounds
from captum_xnn.training._drops import CoveredImages, images_among


def test_bounds_cut_a_side_into_nearly_equal_parts():
    bounds = patch_bounds(227, 8)
    assert bounds[0][0] == 0 and bounds[-1][1] == 227
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    assert {end - begin for begin, end in bounds} == {28, 29}
    assert patch_bounds(3, 8) == [(0, 1), (1, 2), (2, 3)]


def test_a_cover_changes_its_patch_alone():
    images, other = torch.rand(3, 2, 9, 7), torch.rand(3, 4)
    made = CoveredImages((other, images), 1, 3)
    pairs = made.grid.pairs(3)
    assert pairs == [(i, p) for i in range(3) for p in range(9)]
    before = images.clone()
    for (i, p), x, row in zip(pairs, *reversed(made.covered(pairs)), strict=True):
        (top, bottom), (left, right) = patch_bounds(9, 3)[p // 3], patch_bounds(7, 3)[p % 3]
        expected = images[i].clone()
        expected[:, top:bottom, left:right] = images[i].mean((1, 2))[:, None, None]
        torch.testing.assert_close(x, expected)
        assert torch.equal(row, other[i])
    assert torch.equal(images, before)


def test_inputs_without_images():
    assert images_among((torch.rand(2, 5),)) is None
    assert images_among((torch.ones(2, 1, 4, 4, dtype=torch.long),)) is None
    assert images_among((torch.rand(2, 3, 1, 9),)) is None
    assert images_among((torch.rand(2, 5), torch.rand(2, 1, 4, 4), torch.rand(2, 1, 9, 9))) == 1
