"""FunnyBirds in copies of the official layout and of a smaller one, six images, that a function writes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from captum_xnn.datasets import FunnyBirds
from captum_xnn.errors import DatasetError

PARTS = ["beak", "eye", "foot", "tail", "wing"]
VARIANTS = {"beak": 4, "eye": 3, "foot": 4, "tail": 9, "wing": 6}
CLASSES = [[3, 1, 0, 4, 5], [0, 2, 3, 8, 1]]
TEST = [0, 1, 1]  # class of each test image
TRAIN = [0, 0, 1]
LACKS = {1: ["beak", "wing"], 2: PARTS}  # training images without some parts
COLOURS = {
    "beak": (255, 255, 0), "eye01": (255, 255, 253), "eye02": (255, 255, 254), "foot01": (255, 0, 1),
    "foot02": (255, 0, 2), "tail": (0, 0, 255), "wing01": (0, 255, 1), "wing02": (0, 255, 2), "body": (170, 170, 170),
    "bg_000": (204, 204, 204),
}  # fmt: skip
SIZE = (12, 10)


def colour(label, number, taken=()):
    return label * 100, 10 * number, sum(2 ** PARTS.index(part) for part in taken)


def save(path, pixels, mode="RGBA", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path, **options)


def flat(*values):
    return np.full((*SIZE, 3), values, dtype=np.uint8)


def part_map(number, palette=False):
    """Each region in a row of its own, one pixel wider in each image; the last of them behind the bird."""
    index = np.zeros(SIZE, dtype=np.uint8)
    for row in range(len(COLOURS)):
        index[row, : number + 1] = row + 1
    image = Image.fromarray(index)
    image.putpalette([0, 0, 0, *(value for rgb in COLOURS.values() for value in rgb)])
    return image if palette else image.convert("RGBA")


def entry(label, lacks=(), **more):
    models = {f"{part}_model": "placeholder" if part in lacks else f"{part}01.glb" for part in PARTS}
    return {"class_idx": label, "camera_distance": 300, **models, "bg_objects": "1,2,", **more}


def write(root, *, small=False):
    """Writes the tree; small is with handed/, WebP, palettes, odd numbers only and drops.csv."""
    root.mkdir(parents=True)
    test, suffix, mode = (root / "handed", ".webp", "RGB") if small else (root, ".png", "RGBA")
    test.mkdir(exist_ok=True)
    options = {"lossless": True} if small else {}
    classes = [{"class_idx": i, "parts": dict(zip(PARTS, v, strict=True))} for i, v in enumerate(CLASSES)]
    (root / "classes.json").write_text(json.dumps(classes))
    (root / "parts.json").write_text(json.dumps({p: [{"model": f"{p}01.glb"}] * n for p, n in VARIANTS.items()}))
    (root / "dataset_train.json").write_text(json.dumps([entry(c, LACKS.get(i, ())) for i, c in enumerate(TRAIN)]))
    for i, label in enumerate(TRAIN):
        save(root / "train" / str(label) / f"{i:06d}{suffix}", flat(*colour(label, i)), mode, **options)
    numbers = [2 * i + 1 for i in range(len(TEST))] if small else list(range(len(TEST)))
    numbered = [entry(c, **({"image_idx": n} if small else {})) for n, c in zip(numbers, TEST, strict=True)]
    (test / "dataset_test.json").write_text(json.dumps(numbered))
    for number, label in zip(numbers, TEST, strict=True):
        save(test / "test" / str(label) / f"{number:06d}{suffix}", flat(*colour(label, number)), mode, **options)
        path = test / "test_part_map" / str(label) / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        part_map(number, palette=small).save(path)
        for taken in [*([p] for p in PARTS), ["beak", "tail"]]:
            name = "_".join(["body", *sorted(set(PARTS) - set(taken))])
            own = test / "test_interventions" / str(label) / f"{number:06d}" / f"{name}{suffix}"
            save(own, flat(*colour(label, number, taken)), mode, **options)
    if small:
        columns = [
            "image_idx",
            "class_idx",
            "predicted",
            "logit",
            *(f"{k}_{p}" for k in ("drop", "pixels") for p in PARTS),
        ]
        rows = [
            [n, c, n % 2, n / 2, *(n + p / 8 for p in range(5)), *range(n, n + 5)]
            for n, c in zip(numbers, TEST, strict=True)
        ]
        lines = [",".join(map(str, row)) for row in [columns, *reversed(rows)]]
        (test / "drops.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("birds")
    return {"official": write(folder / "FunnyBirds"), "small": write(folder / "small", small=True)}


@pytest.mark.parametrize("layout", ["official", "small"])
def test_every_field_is_what_was_written(trees, layout):
    birds = FunnyBirds(trees[layout], "test")
    numbers = [0, 1, 2] if layout == "official" else [1, 3, 5]
    assert birds.part_names == PARTS and birds.classes.tolist() == CLASSES and birds.labels.tolist() == TEST
    assert birds.numbers.tolist() == numbers and bool(birds.present.all())
    for i, number in enumerate(numbers):
        sample = birds[i]
        assert sample.image.shape == (3, *SIZE) and sample.image.dtype == torch.float32
        assert (sample.image[:, 4, 7] * 255).round().tolist() == list(colour(TEST[i], number))
        assert int(sample.label) == TEST[i] and int(sample.number) == i
        for taken in ("eye", ["eye"], ("tail", "beak")):
            wanted = colour(TEST[i], number, [taken] if isinstance(taken, str) else taken)
            assert (birds.without(i, taken)[:, 0, 0] * 255).round().tolist() == list(wanted)


@pytest.mark.parametrize("layout", ["official", "small"])
def test_masks_are_the_colours_regions(trees, layout):
    """Rows of the map: beak, two of the eye, two of the foot, tail, two of the wing; body and ground are no part."""
    birds = FunnyBirds(trees[layout], "test")
    rows = [[0], [1, 2], [3, 4], [5], [6, 7]]
    for i, number in enumerate(birds.numbers.tolist()):
        wanted = torch.zeros(5, *SIZE, dtype=torch.bool)
        for part, own in enumerate(rows):
            wanted[part, own, : number + 1] = True
        assert torch.equal(birds.masks(i), wanted)


@pytest.mark.parametrize("layout", ["official", "small"])
def test_training_birds_lack_parts(trees, layout):
    birds = FunnyBirds(trees[layout], "train")
    assert birds.labels.tolist() == TRAIN and birds.numbers.tolist() == [0, 1, 2]
    assert birds.present.tolist() == [[p not in LACKS.get(i, ()) for p in PARTS] for i in range(3)]
    assert (birds[2].image[:, 0, 0] * 255).round().tolist() == list(colour(1, 2))
    with pytest.raises(DatasetError, match=r"train_part_map.*the split 'train' has no folder train_part_map; unpack"):
        birds.masks(0)
    with pytest.raises(DatasetError, match="the split 'train' has no folder train_interventions"):
        birds.without(0, "eye")


def test_drops_come_in_the_order_of_the_images(trees):
    found = FunnyBirds(trees["small"], "test").part_drops()
    assert found.logit.tolist() == [0.5, 1.5, 2.5] and found.predicted.tolist() == [1, 1, 1]
    assert found.drops.tolist() == [[n + p / 8 for p in range(5)] for n in (1, 3, 5)]
    assert found.pixels.tolist() == [list(range(n, n + 5)) for n in (1, 3, 5)]
    with pytest.raises(DatasetError, match=r"drops of 3 .*drops.csv cannot be read: FileNotFoundError .* without\(\)"):
        FunnyBirds(trees["official"], "test").part_drops()


def test_the_transform_sees_all_images_alike(trees):
    birds = FunnyBirds(trees["official"], "test", transform=lambda x: 2 * x - 1)
    (batch,) = DataLoader(birds, batch_size=3)
    assert batch.image.shape == (3, 3, *SIZE) and batch.label.tolist() == TEST and batch.number.tolist() == [0, 1, 2]
    plain = FunnyBirds(trees["official"], "test")
    assert torch.equal(batch.image[1], 2 * plain[1].image - 1)
    assert torch.equal(birds.without(1, "wing"), 2 * plain.without(1, "wing") - 1)


def test_names_that_do_not_exist(trees):
    with pytest.raises(ValueError, match="split is 'val'; pass 'train' or 'test'"):
        FunnyBirds(trees["official"], "val")
    birds = FunnyBirds(trees["official"], "test")
    with pytest.raises(ValueError, match="part 'beek' does not exist; pass some of beak, eye, foot, tail, wing"):
        birds.without(0, ["beek", "wing"])
    with pytest.raises(DatasetError, match=r"body_beak_foot_tail.png: it is missing; unpack FunnyBirds.zip"):
        birds.without(0, ["eye", "wing"])


@pytest.mark.parametrize("file", ["classes.json", "parts.json", "dataset_test.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "no text", "nothing in it", "another value"])
def test_a_damaged_folder_is_told_with_file_and_remedy(trees, tmp_path, file, how):
    root = shutil.copytree(trees["official"], tmp_path / "copy")
    path = root / file
    if how == "missing":
        path.unlink()
    else:
        text = {
            "empty": b"", "cut short": path.read_bytes()[:-20], "no text": b"\xff\xfe\x00\x81",
            "nothing in it": b"{}" if file == "parts.json" else b"[]", "another value": b"3",
        }  # fmt: skip
        path.write_bytes(text[how])
    with pytest.raises(DatasetError, match=rf"{path.name}.*unpack FunnyBirds.zip once more and pass the folder"):
        FunnyBirds(root, "test")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("dataset_test.json", '"class_idx": 1', '"class_idx": 7', "class 7, and classes.json has 0 to 1"),
        (
            "dataset_test.json",
            '"class_idx"',
            '"class"',
            "class_idx and the model of every part .*KeyError: 'class_idx'",
        ),
        ("dataset_test.json", '"wing_model"', '"wings"', "the model of every part .*KeyError: 'wing_model'"),
        ("classes.json", '"tail"', '"tale"', "a variant of beak, eye, foot, tail, wing .*KeyError: 'tail'"),
        ("classes.json", '"class_idx": 1', '"class_idx": 2', "class_idx and a variant .* not 0, 1"),
    ],
)
def test_files_that_do_not_fit_are_told(trees, tmp_path, file, old, new, message):
    root = shutil.copytree(trees["official"], tmp_path / "copy")
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))
    with pytest.raises(DatasetError, match=rf"{message}.*unpack FunnyBirds.zip"):
        FunnyBirds(root, "test")


def test_images_that_are_missing_or_damaged_are_named(trees, tmp_path):
    root = shutil.copytree(trees["small"], tmp_path / "copy")
    path = root / "handed" / "test" / "1" / "000003.webp"
    path.write_bytes(path.read_bytes()[:20])
    birds = FunnyBirds(root, "test")
    assert birds[2].image.shape == (3, *SIZE)
    with pytest.raises(DatasetError, match=r"cannot read the image .*000003.webp"):
        birds[1]
    path.unlink()
    with pytest.raises(DatasetError, match=r"1 of 3 images are missing in .*test, such as .*1.000003.png"):
        FunnyBirds(root, "test")
    (root / "handed" / "drops.csv").write_text("image_idx,logit\n1,2\n")
    shutil.copytree(trees["small"] / "handed" / "test", root / "handed" / "test", dirs_exist_ok=True)
    with pytest.raises(DatasetError, match=r"drops of 3 images in .*drops.csv cannot be read: KeyError"):
        FunnyBirds(root, "test").part_drops()


@pytest.mark.birds
def test_the_real_small_birds():
    """Masks, drops and interventions belong together: a part of no pixels changes nothing."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("CAPTUM_XNN_BIRDS", beside)) / "funnybirds"
    if not root.is_dir():
        pytest.skip("FunnyBirds is not here; set CAPTUM_XNN_BIRDS to the folder that holds funnybirds/")
    birds = FunnyBirds(root, "test")
    found = birds.part_drops()
    assert len(birds) == 200 and birds.labels.bincount().tolist() == [4] * 50 and birds.part_names == PARTS
    for i in range(0, 200, 20):
        assert birds.masks(i).sum((1, 2)).tolist() == found.pixels[i].tolist()
        for p, part in enumerate(PARTS):
            moved = (birds.without(i, part) != birds[i].image).any()
            assert bool(moved) or float(found.drops[i, p]) == 0
    train = FunnyBirds(root, "train")
    assert len(train) == 4000 and int(train.present.all(1).sum()) == 2352
