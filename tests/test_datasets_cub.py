"""CUB-200-2011 in a copy of the official layout, five images, that a function writes."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from captum_xnn.datasets import CUB200
from captum_xnn.datasets._parts import PartsSample, resized
from captum_xnn.errors import DatasetError

PARTS = ["back", "left eye", "tail"]
# Official number, class, in training, width and height, box, parts with their visibility.
IMAGES = {
    3: (2, 1, (20, 10), (1.0, 2.0, 8.0, 5.0), [(3.0, 4.0, 1), (0.0, 0.0, 0), (8.5, 6.0, 1)]),
    4: (2, 0, (20, 10), (0.0, 0.0, 20.0, 10.0), [(1.0, 1.0, 1), (2.0, 2.0, 1), (3.0, 3.0, 1)]),
    9: (5, 1, (12, 16), (2.5, 3.5, 4.0, 4.0), [(0.0, 0.0, 0)] * 3),
    10: (5, 0, (12, 16), (1.0, 1.0, 2.0, 2.0), [(5.0, 6.0, 1), (5.0, 6.0, 1), (0.0, 0.0, 0)]),
    11: (7, 1, (8, 8), (0.0, 0.0, 9.5, 8.0), [(7.5, 7.5, 1), (0.5, 0.5, 1), (0.0, 0.0, 0)]),
}
NAMES = {2: "002.Black footed", 5: "005.Crested_Auklet", 7: "007.Parakeet_Auklet"}


def colour(number):
    return number * 20, number * 5, 255 - number * 20


def write(root):
    """Writes the tree; images are of one colour, but for a corner."""
    (root / "parts").mkdir(parents=True)
    lines = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")}
    located = []
    for number, (label, train, size, box, parts) in IMAGES.items():
        name = f"{NAMES[label].replace(' ', '_')}/bird_{number}.png"
        lines["images"].append(f"{number} {name}")
        lines["image_class_labels"].append(f"{number} {label}")
        lines["train_test_split"].append(f"{number} {train}")
        lines["bounding_boxes"].append(f"{number} {' '.join(map(str, box))}")
        located += [f"{number} {p} {x} {y} {seen}" for p, (x, y, seen) in enumerate(parts, 1)]
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((size[1], size[0], 3), colour(number), dtype=np.uint8)
        pixels[0, 0] = 255
        Image.fromarray(pixels).save(path)
    for name, rows in lines.items():
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    (root / "classes.txt").write_text("".join(f"{i} {name}\n" for i, name in NAMES.items()))
    (root / "parts" / "parts.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(PARTS, 1)))
    (root / "parts" / "part_locs.txt").write_text("\n".join(located) + "\n")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cub") / "CUB_200_2011")


def test_every_field_is_what_was_written(tree):
    birds = CUB200(tree)
    assert len(birds) == 5 and birds.part_names == PARTS
    assert birds.classes == {1: "002.Black footed", 4: "005.Crested_Auklet", 6: "007.Parakeet_Auklet"}
    for i, (number, (label, _, size, box, parts)) in enumerate(IMAGES.items()):
        one = birds[i]
        assert birds.names[i].endswith(f"bird_{number}.png") and int(one.number) == i
        assert int(one.label) == int(birds.labels[i]) == label - 1
        assert one.image.shape == (3, size[1], size[0]) and one.image.dtype == torch.float32
        wanted = torch.tensor(colour(number)) / 255
        assert torch.equal(one.image[:, 1, 1], wanted) and torch.equal(one.image[:, 0, 0], torch.ones(3))
        x, y, w, h = box
        assert one.box.tolist() == [x, y, x + w, y + h]
        for (px, py, seen), point in zip(parts, one.points.tolist(), strict=True):
            assert point == [px, py] if seen else all(map(math.isnan, point))


def test_splits_share_no_image_and_miss_none(tree):
    train, test = CUB200(tree, "train"), CUB200(tree, "test")
    assert train.labels.tolist() == [1, 4, 6] and test.labels.tolist() == [1, 4]
    assert sorted(train.names + test.names) == sorted(CUB200(tree).names)
    assert test[1].points[0].tolist() == [5.0, 6.0]
    with pytest.raises(ValueError, match="split is 'val'; pass 'train', 'test', or None"):
        CUB200(tree, "val")


def test_points_and_boxes_scale_with_the_image(tree):
    """20 x 10 to 10 wide and 20 high: x halves, y doubles."""
    one = CUB200(tree, size=(20, 10))[0]
    assert one.image.shape == (3, 20, 10)
    assert one.box.tolist() == [0.5, 4.0, 4.5, 14.0]
    assert one.points[0].tolist() == [1.5, 8.0] and bool(one.points[1].isnan().all())


def test_a_marked_pixel_stays_under_its_point():
    """The convention of coordinates: the mark's centre of mass is where the point goes."""
    image = torch.zeros(1, 8, 8)
    image[0, 2, 5] = 1
    sample = PartsSample(image, torch.tensor(0), torch.tensor([[5.5, 2.5]]), torch.zeros(4), torch.tensor(0))
    for size in ((16, 24), (4, 4), (8, 8)):
        big = resized(sample, size)
        mass = big.image[0] / big.image.sum()
        y = (mass.sum(1) * (torch.arange(size[0]) + 0.5)).sum()
        x = (mass.sum(0) * (torch.arange(size[1]) + 0.5)).sum()
        torch.testing.assert_close(torch.stack([x, y]), big.points[0], rtol=0.02, atol=0.02)


def test_batches(tree):
    loader = DataLoader(CUB200(tree, size=(8, 8), transform=lambda x: x * 2 - 1), batch_size=5)
    (batch,) = loader
    assert batch.image.shape == (5, 3, 8, 8) and float(batch.image.min()) < -0.5
    assert batch.label.tolist() == [1, 1, 4, 4, 6] and batch.points.shape == (5, 3, 2) and batch.box.shape == (5, 4)
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        next(iter(DataLoader(CUB200(tree), batch_size=3)))


FILES = [
    "images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt", "classes.txt",
    "parts/parts.txt", "parts/part_locs.txt",
]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "no text"])
def test_a_damaged_folder_is_told_with_file_and_remedy(tree, tmp_path, file, how):
    root = shutil.copytree(tree, tmp_path / "copy")
    path, text = root / file, (tree / file).read_text()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_text("")
    elif how == "cut short":
        path.write_text("\n".join(text.splitlines()[:-1]) + "\n" + text.splitlines()[-1].split()[0])
    else:
        path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DatasetError, match=rf"{path.name}.*unpack CUB_200_2011.tgz once more"):
        CUB200(root)


@pytest.mark.parametrize("file", FILES[1:4])
def test_files_of_different_images_are_told(tree, tmp_path, file):
    root = shutil.copytree(tree, tmp_path / "copy")
    (root / file).write_text("".join((tree / file).read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DatasetError, match=rf"{file} and images.txt list different images: 1 are in .* such as 11"):
        CUB200(root)


def test_a_missing_part_and_a_word_for_a_number_are_told(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "copy")
    lines = (tree / "parts" / "part_locs.txt").read_text().splitlines(keepends=True)
    (root / "parts" / "part_locs.txt").write_text("".join(lines[1:]))
    with pytest.raises(DatasetError, match=r"has 14 lines of parts for 5 images with 3 parts each"):
        CUB200(root)
    (root / "bounding_boxes.txt").write_text((tree / "bounding_boxes.txt").read_text().replace("2.5", "two"))
    with pytest.raises(DatasetError, match=r"cannot read the numbers in .*bounding_boxes.txt \("):
        CUB200(root)


@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_an_image_that_cannot_be_read_is_named(tree, tmp_path, how):
    root = shutil.copytree(tree, tmp_path / "copy")
    path = next((root / "images").rglob("bird_9.png"))
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
        with pytest.raises(DatasetError, match=r"1 of 5 images are missing in .*, such as .*bird_9.png"):
            CUB200(root)
        assert len(CUB200(root, "test")) == 2  # bird 9 is to train on
        return
    path.write_bytes(data[: len(data) // 2])
    birds = CUB200(root)
    assert birds[0].image.shape == (3, 10, 20)
    with pytest.raises(DatasetError, match=r"cannot read the image .*bird_9.png"):
        birds[2]


def test_lists_without_the_images_are_told(tree, tmp_path):
    """As of an archive whose unpacking stopped after the text files."""
    root = shutil.copytree(tree, tmp_path / "copy")
    shutil.rmtree(root / "images")
    with pytest.raises(DatasetError, match=r"5 of 5 images are missing in .*images, .*; unpack CUB"):
        CUB200(root)


@pytest.mark.parametrize(("old", "new"), [("1 1 ", "one 1 "), (" 1 1.0", " first 1.0"), ("2.0 2.0 1", "2.0 two 1")])
def test_a_word_for_a_number_among_the_parts_is_told(tree, tmp_path, old, new):
    path = shutil.copytree(tree, tmp_path / "copy") / "parts" / "part_locs.txt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DatasetError, match=r"cannot read the numbers in .*part_locs.txt \(.*; unpack CUB"):
        CUB200(path.parents[1])


def test_a_class_without_a_name_is_told(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "copy")
    (root / "classes.txt").write_text("2 002.Black footed\n5 005.Crested_Auklet\n")
    with pytest.raises(DatasetError, match=r"classes.txt has no name for class 7; unpack"):
        CUB200(root)


def test_the_wrong_folder(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot read the file .*images.txt \(FileNotFoundError"):
        CUB200(tmp_path)


def test_the_real_birds(birds):
    """Against the raw lines of the files."""
    root = birds / "cub_200_2011_even"
    every = CUB200(root)
    assert len(every) == 5903 and len(every.classes) == 100 and len(every.part_names) == 15
    assert len(CUB200(root, "train")) + len(CUB200(root, "test")) == 5903
    lines = [line.split() for line in (root / "parts" / "part_locs.txt").read_text().splitlines()]
    assert int(every.points.isfinite().all(2).sum()) == sum(line[4] != "0" for line in lines)
    number, name = (root / "images.txt").read_text().splitlines()[4321].split()
    assert every.names[4321] == name
    for line in lines:
        if line[0] == number and line[4] != "0":
            torch.testing.assert_close(
                every.points[4321, int(line[1]) - 1], torch.tensor([float(line[2]), float(line[3])])
            )
    assert every[4321].image.shape == (3, 227, 227)
    low, high = every.boxes[:, :2], every.boxes[:, 2:]
    assert bool((low < high).all()) and bool((low >= 0).all())
