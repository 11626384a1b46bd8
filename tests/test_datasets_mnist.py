"""MNIST in its own files, of which a function writes small ones."""

import gzip
import struct

import pytest
import torch

from captum_xnn.datasets import load_mnist
from captum_xnn.errors import DatasetError

IMAGES = {"train": torch.arange(2 * 28 * 28).reshape(2, 28, 28) % 251, "t10k": torch.full((1, 28, 28), 255)}
LABELS = {"train": [7, 0], "t10k": [9]}


def write(folder, *, packed=()):
    """Writes the four files, some of them packed."""
    folder.mkdir(parents=True)
    for name in ("train", "t10k"):
        N = len(LABELS[name])
        images = struct.pack(">HBBIII", 0, 8, 3, N, 28, 28) + bytes(IMAGES[name].flatten().tolist())
        labels = struct.pack(">HBBI", 0, 8, 1, N) + bytes(LABELS[name])
        for file, data in ((f"{name}-images-idx3-ubyte", images), (f"{name}-labels-idx1-ubyte", labels)):
            if file in packed:
                (folder / f"{file}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / file).write_bytes(data)
    return folder


@pytest.mark.parametrize("below", ["", "MNIST/raw"])
@pytest.mark.parametrize("packed", [(), ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte")])
def test_pixels_and_labels(tmp_path, below, packed):
    write(tmp_path / "mnist" / below, packed=packed)
    digits = load_mnist(tmp_path / "mnist")
    torch.testing.assert_close(digits.train_images, IMAGES["train"][:, None].float() / 255)
    assert (digits.test_images == 1).all() and digits.test_images.shape == (1, 1, 28, 28)
    assert digits.train_labels.tolist() == [7, 0] and digits.test_labels.tolist() == [9]
    assert digits.train_labels.dtype == torch.int64


def damaged(folder, file, change):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(change(data))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("train-images-idx3-ubyte", lambda d: d[:-1], "whole IDX file .* 3 dimensions: it has 1583 bytes"),
        ("train-images-idx3-ubyte", lambda d: b"", "it has 0 bytes and begins with ''"),
        ("t10k-labels-idx1-ubyte", lambda d: b"\x1f\x8b" + d[2:], "begins with '1f8b0801'"),  # packed, but not named so
        (
            "t10k-labels-idx1-ubyte",
            lambda d: d[:-1] + bytes([10]),
            r"up to 10, not images .* one label from 0 to 9",
        ),
        (
            "train-labels-idx1-ubyte",
            lambda d: struct.pack(">HBBI", 0, 8, 1, 1) + b"3",
            r"\(2, 28, 28\) and labels \(1,\)",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, file, change, said):
    folder = write(tmp_path / "mnist")
    damaged(folder, file, change)
    with pytest.raises(DatasetError, match=said) as told:
        load_mnist(folder)
    assert "once more" in str(told.value)


def test_missing_and_broken_archives_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"train-images-idx3-ubyte or train-images-idx3-ubyte\.gz"):
        load_mnist(tmp_path)
    folder = write(tmp_path / "mnist", packed=("train-labels-idx1-ubyte",))
    damaged(folder, "train-labels-idx1-ubyte.gz", lambda d: d[: len(d) // 2])
    with pytest.raises(DatasetError, match="train-labels-idx1-ubyte"):
        load_mnist(folder)
