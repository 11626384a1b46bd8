"""Places365 and ADE20K in copies of their official layouts, a few images each, that functions write."""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from captum_xnn.datasets import ADE20KScenes, Places365
from captum_xnn.datasets._places import PLACES_OF_ADE, ROOMS, PlacesSample, SceneSample, object_masks, resized
from captum_xnn.errors import DatasetError
from captum_xnn.metrics import locality, object_probabilities

# Label, official line, folder in the easy layout, images in training and validation.
CATEGORIES = {
    8: ("/a/apartment_building/outdoor", "apartment_building-outdoor", 1, 2),
    45: ("/b/bathroom", "bathroom", 3, 1),
    203: ("/k/kitchen", "kitchen", 2, 1),
}
# Image of the challenge: scene, width and height, rows of its mask.
SCENES = {
    "ADE_train_00000001": ("airport_terminal", [[1, 1, 2, 2]]),
    "ADE_train_00000002": ("bathroom", [[4, 4, 66, 66], [0, 4, 66, 150]]),
    "ADE_train_00000003": ("living_room", [[1], [2], [3]]),
    "ADE_val_00000001": ("bathroom", [[48, 0], [48, 1]]),
}
# The same in the full release: folder, scene as it is named here, rows of its mask.
FULL = {
    "training/home_or_hotel/bathroom/ADE_train_00000002": ("bathroom", [[401, 3050, 0], [401, 401, 255]]),
    "training/urban/diner__outdoor/ADE_frame_00000009": ("diner_outdoor", [[1, 256]]),
    "validation/home_or_hotel/bathroom/ADE_val_00000001": ("bathroom", [[2836], [6655]]),
}


def grey(*parts):
    """A level that tells images apart, from names."""
    return sum(map(ord, "".join(parts))) % 200 + 20


def save(path, level, size=(4, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, dtype=np.uint8)).save(path, **options)


def write_lists(root):
    """The lists, in which images of training and validation alternate between categories."""
    root.mkdir(parents=True, exist_ok=True)
    lines = {"train": [], "val": []}
    for label, (name, _, train, val) in CATEGORIES.items():
        lines["train"] += [(i, f"{name}/{i:08}.jpg {label}") for i in range(1, train + 1)]
        lines["val"] += [(i, f"Places365_val_{label:05}{i:03}.jpg {label}") for i in range(1, val + 1)]
    (root / "categories_places365.txt").write_text("".join(f"{c[0]} {label}\n" for label, c in CATEGORIES.items()))
    (root / "places365_train_standard.txt").write_text("\n".join(line for _, line in lines["train"]) + "\n")
    (root / "places365_val.txt").write_text("\n".join(line for _, line in sorted(lines["val"])) + "\n")
    return root


def write_places(root, train="data_256_standard", val="val_256"):
    """The layout with lists."""
    write_lists(root)
    for file, folder in (("places365_train_standard.txt", train), ("places365_val.txt", val)):
        for line in (root / file).read_text().splitlines():
            name = line.split()[0].lstrip("/")
            save(root / folder / name, grey(name))
    return root


def write_easy(root):
    """The easy layout, with the list of categories put into it."""
    write_lists(root)
    for split, file in (("train", "places365_train_standard.txt"), ("val", "places365_val.txt")):
        for line in (root / file).read_text().splitlines():
            name, label = line.split()
            path = root / split / CATEGORIES[int(label)][1] / name.rpartition("/")[2]
            save(path, grey(name.lstrip("/")))
        (root / file).unlink()
    return root


def write_challenge(root):
    (root / "annotations").mkdir(parents=True)
    for name, (_, mask) in SCENES.items():
        split = "training" if "train" in name else "validation"
        save(root / "images" / split / f"{name}.jpg", grey(name), np.shape(mask))
        path = root / "annotations" / split / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.array(mask, dtype=np.uint8)).save(path)
    (root / "sceneCategories.txt").write_text("".join(f"{name} {scene}\n" for name, (scene, _) in SCENES.items()))
    # As in the official file: a head, tabs, now and then a blank too many, and commas and blanks in names.
    rows = "".join(f"{i}{' ' * (i % 20 == 2)}\t0.1\t2\t3\tobject {i}, thing \n" for i in range(1, 151))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
    return root


def write_full(root):
    """Red holds the hundreds, tens of it; its last digit and blue mean nothing to the index."""
    for name, (_, mask) in FULL.items():
        path = root / "images" / "ADE" / f"{name}.jpg"
        save(path, grey(name), np.shape(mask))
        index = np.array(mask)
        colour = np.stack([index // 256 * 10 + (index > 0) * 5, index % 256, index * 0 + 77], -1)
        Image.fromarray(colour.astype(np.uint8)).save(path.with_name(f"{path.stem}_seg.png"))
        (path.parent / path.stem).mkdir()
        save(path.parent / path.stem / f"instance_000_{path.stem}.png", 255)
        objects = [
            {"name": f"name {i}", "name_ndx": int(i)} for i in sorted({*index.flatten().tolist(), 999} - {0, 255})
        ]
        text = json.dumps({"annotation": {"object": objects, "source": "caf\xe9"}})
        path.with_suffix(".json").write_bytes(text.replace("\\u00e9", "\xe9").encode("latin-1"))
    return root


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    return {
        "lists": write_places(root / "lists"),
        "easy": write_easy(root / "easy"),
        "challenge": write_challenge(root / "ADEChallengeData2016"),
        "full": write_full(root / "ADE20K_2021_17_01"),
    }


@pytest.fixture
def copied(trees, tmp_path):
    return lambda name: shutil.copytree(trees[name], tmp_path / name)


# Places365


@pytest.mark.parametrize("layout", ["lists", "easy"])
def test_both_layouts_have_the_images_and_official_labels(trees, layout):
    for split, column in (("train", 2), ("val", 3)):
        places = Places365(trees[layout], split)
        assert places.classes == {8: "apartment_building/outdoor", 45: "bathroom", 203: "kitchen"}
        wanted = [label for label, c in CATEGORIES.items() for _ in range(c[column])]
        assert sorted(places.labels.tolist()) == wanted and places.labels.dtype == torch.int64
        for i, one in enumerate(places):
            name, label = places.names[i], int(places.labels[i])
            assert (int(one.label), int(one.number)) == (label, i) and (trees[layout] / name).is_file()
            official = name.rpartition("/")[2]
            if split == "train":
                official = f"{CATEGORIES[label][0][1:]}/{official}"
            assert one.image.dtype == torch.float32 and one.image.shape == (3, 4, 4)
            torch.testing.assert_close(one.image, torch.full((3, 4, 4), grey(official) / 255), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["lists", "easy"])
def test_categories_restrict_images_but_not_labels(trees, layout):
    places = Places365(trees[layout], "train", categories=["kitchen", "apartment_building/outdoor"])
    assert sorted(places.labels.tolist()) == [8, 203, 203] and len(places.classes) == 3 and len(places.names) == 3
    assert Places365(trees[layout], "train", categories="bathroom").labels.tolist() == [45, 45, 45]
    with pytest.raises(ValueError, match=r"unknown categories \['kitchn'\].*places365.txt lists them"):
        Places365(trees[layout], "train", categories=["bathroom", "kitchn"])
    with pytest.raises(ValueError, match="the list of categories is empty"):
        Places365(trees[layout], "train", categories=[])


@pytest.mark.parametrize(
    "train, val", [("data_256", "val_256"), ("data_large_standard", "val_large"), ("data_large", "val_large")]
)
def test_folders_as_they_are_unpacked_or_renamed(tmp_path, train, val):
    root = write_places(tmp_path / "places", train, val)
    assert Places365(root, "train").names[0].startswith(f"{train}/a/apartment_building/outdoor/")
    assert Places365(root, "val").names[0].startswith(f"{val}/Places365_val_")


def test_small_images_are_taken_where_both_are(copied):
    root = copied("lists")
    shutil.copytree(root / "val_256", root / "val_large")
    assert all(name.startswith("val_256/") for name in Places365(root, "val").names)


def test_the_easy_layout_has_one_order_on_every_disk(copied):
    root = copied("easy")
    for i in (7, 3, 19, 11, 5, 23, 2, 17, 13):
        save(root / "val" / "kitchen" / f"Places365_val_{i:08}.jpg", i)
    names = Places365(root, "val", categories="kitchen").names
    assert len(names) == 10 and names == sorted(names)


def test_images_without_colours(copied):
    root = copied("lists")
    places = Places365(root, "val")
    Image.fromarray(np.full((2, 5), 51, np.uint8)).save(root / places.names[0])
    torch.testing.assert_close(places[0].image, torch.full((3, 2, 5), 0.2))


def test_splits(trees):
    train, val = Places365(trees["lists"], "train"), Places365(trees["lists"], "val")
    assert len(train) == 6 and len(val) == 4 and not set(train.names) & set(val.names)
    with pytest.raises(ValueError, match="split is 'test'; pass 'train' or 'val', as test images have no labels"):
        Places365(trees["lists"], "test")


def test_batches_of_places(trees):
    places = Places365(trees["lists"], "train", size=(6, 2), transform=lambda x: x * 2 - 1)
    (batch,) = DataLoader(places, batch_size=6)
    assert isinstance(batch, PlacesSample) and batch.image.shape == (6, 3, 6, 2) and float(batch.image.min()) < 0
    assert batch.label.tolist() == places.labels.tolist() and batch.number.tolist() == list(range(6))


def test_rooms_are_the_ten_of_the_paper():
    assert len(ROOMS) == 10 and set(PLACES_OF_ADE.values()) == set(ROOMS)
    # Line numbers of the official list, less one.
    assert list(ROOMS.values()) == [45, 52, 102, 121, 176, 182, 203, 215, 244, 352]
    assert list(ROOMS) == sorted(ROOMS)


@pytest.mark.parametrize("file", ["categories_places365.txt", "places365_train_standard.txt", "places365_val.txt"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "no text"])
def test_damaged_lists_are_told_with_file_and_remedy(copied, file, how):
    root = copied("lists")
    damage(root / file, how)
    with pytest.raises(DatasetError, match=rf"(?s){file}.*unpack filelist_places365-standard.tar"):
        Places365(root, "val" if file == "places365_val.txt" else "train")


def damage(path, how):
    """Damages a file of lines; what is cut short ends within the last line's last word but one."""
    text = path.read_text()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_text("\n")
    elif how == "cut short":
        path.write_text(text.rstrip("\n").rpartition("\n")[0] + "\n" + text.rstrip("\n").rpartition("\n")[2].split()[0])
    else:
        path.write_bytes(b"\xff\xfe\x00\x81")


@pytest.mark.parametrize(
    "old, new, told",
    [
        (
            "/00000001.jpg 45",
            "/00000001.jpg 46",
            r"line 2 of .*places365_train_standard\.txt is '/b/bathroom/00000001\.jpg 46', not like",
        ),
        (
            "/00000001.jpg 45",
            "/00000001.jpg 203",
            r"line 2 of .*places365_train_standard\.txt is '/b/bathroom/00000001\.jpg 203', not like",
        ),
        (
            "/00000001.jpg 45",
            "/00000001.jpg x",
            r"line 2 of .*places365_train_standard\.txt is '/b/bathroom/00000001\.jpg x', not like",
        ),
        (
            "/00000001.jpg 45",
            "/00000001.jpg 4 45",
            r"line 2 of .*places365_train_standard\.txt is '/b/bathroom/00000001\.jpg 4 45', not like",
        ),
    ],
)
def test_a_line_of_another_form_is_told(copied, old, new, told):
    """Also where a category's folder and its label do not belong together."""
    root = copied("lists")
    path = root / "places365_train_standard.txt"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DatasetError, match=told):
        Places365(root, "train")


@pytest.mark.parametrize("line", ["/b/bathroom x", "bathroom 45", "bb/bathroom 45", "/b/bathroom 45 6", "/bathroom 45"])
def test_a_category_of_another_form_is_told(copied, line):
    root = copied("lists")
    path = root / "categories_places365.txt"
    path.write_text(path.read_text().replace("/b/bathroom 45", line))
    with pytest.raises(DatasetError, match=rf"line 2 of .*txt is '{line}', not like '/a/airfield 0'"):
        Places365(root, "train")


def test_missing_images_of_places_are_told(copied):
    root = copied("lists")
    (root / "data_256_standard" / "k" / "kitchen" / "00000002.jpg").unlink()
    with pytest.raises(
        DatasetError, match=r"1 of 3 categories .* last image, .* data_256_standard/k/kitchen/00000002.jpg"
    ):
        Places365(root, "train")
    places = Places365(root, "train", categories=["bathroom"])  # what is left out need not be there
    (root / places.names[0]).unlink()
    (root / places.names[1]).write_bytes((root / places.names[2]).read_bytes()[:300])
    places = Places365(root, "train", categories=["bathroom"])
    assert places[2].image.shape == (3, 4, 4)
    for i in (0, 1):
        with pytest.raises(DatasetError, match=r"cannot read the image .*0000000.*jpg.*unpack filelist"):
            places[i]
    shutil.rmtree(root / "data_256_standard")
    with pytest.raises(DatasetError, match=r"no folder data_256_standard, .* or train in "):
        Places365(root, "train")


def test_missing_folders_of_the_easy_layout_are_told(copied):
    root = copied("easy")
    shutil.rmtree(root / "train" / "apartment_building-outdoor")
    assert len(Places365(root, "train", categories=["kitchen"])) == 2
    with pytest.raises(DatasetError, match=r"no images in .*apartment_building-outdoor; unpack"):
        Places365(root, "train")
    shutil.rmtree(root / "val")
    with pytest.raises(DatasetError, match=r"no folder val_256, val_large or val in "):
        Places365(root, "val")


# ADE20K


def mask_of(rows):
    return torch.tensor(rows, dtype=torch.int64)


def test_the_challenge_is_what_was_written(trees):
    scenes = ADE20KScenes(trees["challenge"])
    assert scenes.scenes == [scene for scene, _ in SCENES.values()] and len(scenes) == 4
    assert scenes.labels.tolist() == [-1, ROOMS["bathroom"], ROOMS["living_room"], ROOMS["bathroom"]]
    assert len(scenes.objects) == 150 and scenes.objects[22] == "object 22, thing"
    for i, (name, (_, mask)) in enumerate(SCENES.items()):
        one = scenes[i]
        assert scenes.names[i].endswith(f"{name}.jpg") and int(one.number) == i and one.label == scenes.labels[i]
        assert one.mask.dtype == torch.int64 and torch.equal(one.mask, mask_of(mask))
        assert one.image.shape == (3, *one.mask.shape)
        torch.testing.assert_close(one.image, torch.full_like(one.image, grey(name) / 255), atol=1e-6, rtol=0)
    assert scenes.objects_of(1) == {4: "object 4, thing", 66: "object 66, thing", 150: "object 150, thing"}


def test_the_full_release_is_what_was_written(trees):
    scenes = ADE20KScenes(trees["full"])
    order = [n for split in ("training", "validation") for n in sorted(FULL) if n.startswith(split)]
    assert scenes.names == [f"images/ADE/{n}.jpg" for n in order]
    assert scenes.scenes == [FULL[n][0] for n in order] and scenes.labels.tolist() == [45, -1, 45]
    for i, name in enumerate(order):
        assert torch.equal(scenes[i].mask, mask_of(FULL[name][1]))
        torch.testing.assert_close(scenes[i].image.mean(), torch.tensor(grey(name) / 255), atol=1e-6, rtol=0)
    # Not 255, which the JSON file lacks, nor 999, which the mask lacks.
    assert scenes.objects_of(0) == {401: "name 401", 3050: "name 3050"}
    assert scenes.objects == {}


@pytest.mark.parametrize("release", ["challenge", "full"])
def test_splits_and_categories_of_scenes(trees, release):
    root = trees[release]
    every, train, val = ADE20KScenes(root), ADE20KScenes(root, split="training"), ADE20KScenes(root, split="validation")
    assert train.names + val.names == every.names and len(val) == 1 and "/validation/" in val.names[0]
    assert set(ADE20KScenes(root, categories=["bathroom"]).scenes) == {"bathroom"}
    assert len(ADE20KScenes(root, split="training", categories="bathroom")) == 1
    # A scene that one split lacks is a scene.
    other = next(s for s in every.scenes if s != "bathroom")
    assert ADE20KScenes(root, split="validation", categories=["bathroom", other]).names == val.names
    with pytest.raises(ValueError, match=r"unknown categories \['bath'\]; ADE20K names scenes as Places365 does"):
        ADE20KScenes(root, categories=["bath"])
    with pytest.raises(ValueError, match="split is 'val'; pass 'training', 'validation', or None"):
        ADE20KScenes(root, split="val")


@pytest.mark.parametrize("release", ["challenge", "full"])
def test_data_sets_go_to_workers(trees, release):
    scenes = pickle.loads(pickle.dumps(ADE20KScenes(trees[release], size=(3, 3))))
    assert scenes[0].mask.shape == (3, 3)
    (batch,) = DataLoader(scenes, batch_size=len(scenes))
    assert isinstance(batch, SceneSample) and batch.mask.shape == (len(scenes), 3, 3)
    assert batch.image.shape == (len(scenes), 3, 3, 3) and torch.equal(batch.label, scenes.labels)
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        next(iter(DataLoader(ADE20KScenes(trees[release]), batch_size=2)))


def test_the_transform_changes_the_image_alone(trees):
    plain = ADE20KScenes(trees["challenge"], size=(2, 2))[1]
    other = ADE20KScenes(trees["challenge"], size=(2, 2), transform=lambda x: -x)[1]
    assert torch.equal(other.image, -plain.image) and torch.equal(other.mask, plain.mask)


FILES = ["sceneCategories.txt", "objectInfo150.txt"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "no text"])
def test_damaged_lists_of_the_challenge_are_told(copied, file, how):
    root = copied("challenge")
    damage(root / file, how)
    with pytest.raises(DatasetError, match=rf"(?s){file}.*unpack ADEChallengeData2016.zip once more"):
        ADE20KScenes(root)


@pytest.mark.parametrize(
    "file, old, new, told",
    [
        (
            FILES[0],
            "ADE_val_00000001 bath",
            "ADE_test_00000001 bath",
            r"line 4 of .*sceneCategories\.txt is 'ADE_test_00000001 bathroom', not like 'ADE_train_00000001",
        ),
        (
            FILES[0],
            "00002 bathroom",
            "00002 bath room",
            r"line 2 of .*sceneCategories\.txt is 'ADE_train_00000002 bath room', not like",
        ),
        (FILES[1], "150\t0.1\t2\t3\tobject 150, thing \n", "", "lists 149 objects, not 150"),
        (
            FILES[1],
            "7\t0.1\t2\t3\tobject 7, thing \n",
            "",
            r"line 8 of .*objectInfo150\.txt is '8 0\.1 2 3 object 8, thing', not like '7 0\.1576 11664 1172",
        ),
        (
            FILES[1],
            "7\t0.1\t2\t3\tobject 7, thing ",
            "7\t0.1\t2\t3",
            r"line 8 of .*objectInfo150\.txt is '7 0\.1 2 3', not like '7 0\.1576 11664 1172 wall'",
        ),
    ],
)
def test_a_line_of_the_challenge_of_another_form_is_told(copied, file, old, new, told):
    root = copied("challenge")
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    with pytest.raises(DatasetError, match=told):
        ADE20KScenes(root)


def test_missing_images_and_annotations_are_told(copied):
    root = copied("challenge")
    (root / "annotations" / "training" / "ADE_train_00000002.png").unlink()
    with pytest.raises(DatasetError, match=r"1 files of 4 images .*annotations/training/ADE_train_00000002.png; unp"):
        ADE20KScenes(root)
    assert len(ADE20KScenes(root, split="validation")) == 1
    shutil.rmtree(root / "images" / "training")
    with pytest.raises(DatasetError, match=r"4 files of .* missing in .*, such as images/training/ADE_train_00000001"):
        ADE20KScenes(root)
    root = copied("full")
    shutil.rmtree(root / "images" / "ADE" / "validation")
    assert len(ADE20KScenes(root, split="training")) == 2
    with pytest.raises(DatasetError, match=r"no validation images in .*; pass the split that is there"):
        ADE20KScenes(root)
    (root / "images/ADE/training/urban/diner__outdoor/ADE_frame_00000009_seg.png").unlink()
    with pytest.raises(DatasetError, match=r"1 files of 2 images .*diner__outdoor/ADE_frame_00000009_seg.png"):
        ADE20KScenes(root, split="training")


@pytest.mark.parametrize("release", ["challenge", "full"])
@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_what_cannot_be_read_is_named(copied, release, how):
    root = copied(release)
    scenes = ADE20KScenes(root)
    for path in root.rglob("ADE_val_00000001*.png"):
        data = path.read_bytes()
        path.unlink()
        if how == "cut short":
            path.write_bytes(data[: len(data) // 2])
    assert scenes[0].mask.dim() == 2
    with pytest.raises(DatasetError, match=r"cannot read the image .*ADE_val_00000001.*png .*; unpack ADE"):
        scenes[len(scenes) - 1]


@pytest.mark.parametrize("byte, value", [(11, 1), (36, 1)])
def test_a_damaged_head_of_an_annotation_is_named(copied, byte, value):
    """Lengths of the first two chunks, of which PIL says ValueError and SyntaxError."""
    root = copied("challenge")
    path = root / "annotations" / "validation" / "ADE_val_00000001.png"
    data = bytearray(path.read_bytes())
    data[byte] = value
    path.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match=r"cannot read the image .*ADE_val_00000001.png .*; unpack ADE"):
        ADE20KScenes(root, split="validation")[0]


def test_annotations_that_are_not_the_images_are_told(copied):
    root = copied("challenge")
    path = root / "annotations" / "validation" / "ADE_val_00000001.png"
    scenes = ADE20KScenes(root, split="validation")
    for pixels, told in (
        (np.zeros((2, 3), np.uint8), r"\.png is \(2, 3\), and its image .*ADE_val_00000001.jpg is \(2, 2\)"),
        (np.full((2, 2), 151, np.uint8), r"ADE_val_00000001.png has \(2, 2\) values up to 151, not .* from 0 to 150"),
        (np.zeros((2, 2, 3), np.uint8), r"ADE_val_00000001.png has \(2, 2, 3\) values .*, not indices \(H, W\)"),
    ):
        Image.fromarray(pixels).save(path)
        with pytest.raises(DatasetError, match=told):
            scenes[0]
    root = copied("full")
    path = next(root.rglob("ADE_val_00000001_seg.png"))
    Image.fromarray(np.zeros((2, 1), np.uint8)).save(path)
    with pytest.raises(DatasetError, match=r"_seg.png has \(2, 1\) values, not colours \(H, W, 3\)"):
        ADE20KScenes(root, split="validation")[0]


@pytest.mark.parametrize("text", [None, "{", "{}", '{"annotation": {"object": [{"name": "bed"}]}}', "[]"])
def test_a_damaged_description_is_told(copied, text):
    root = copied("full")
    path = next(root.rglob("ADE_val_00000001.json"))
    path.unlink() if text is None else path.write_text(text)
    scenes = ADE20KScenes(root, split="validation")
    assert scenes[0].mask.shape == (2, 1)
    with pytest.raises(DatasetError, match=r"names of objects in .*ADE_val_00000001.json cannot be read: .*; unpack"):
        scenes.objects_of(0)


def test_a_description_of_one_object(copied):
    """MATLAB, which wrote these files, writes a list of one as its element."""
    root = copied("full")
    one = {"annotation": {"object": {"name": "tree", "name_ndx": 2836}}}
    next(root.rglob("ADE_val_00000001.json")).write_text(json.dumps(one))
    assert ADE20KScenes(root, split="validation").objects_of(0) == {2836: "tree"}


@pytest.mark.parametrize("data", [Places365, ADE20KScenes])
def test_the_wrong_folder(tmp_path, data):
    file = {"Places365": "categories_places365.txt", "ADE20KScenes": "sceneCategories.txt"}[data.__name__]
    with pytest.raises(DatasetError, match=rf"cannot read the file .*{file} \(FileNotFoundError\); unpack"):
        data(tmp_path, split="train" if data is Places365 else None)


# Sizes and masks


def scene(mask, image=None):
    mask = mask_of(mask)
    image = torch.zeros(3, *mask.shape) if image is None else image
    return SceneSample(image, torch.tensor(45), mask, torch.tensor(0))


def test_masks_are_resized_by_hand():
    """Centres of 3 pixels on 5 are at 0.83, 2.5 and 4.17, of 5 on 3 at 0.3, 0.9, 1.5, 2.1, 2.7."""
    assert resized(scene([[1, 2, 3, 4, 5]]), (1, 3)).mask.tolist() == [[1, 3, 5]]
    assert resized(scene([[1, 2, 3]]), (2, 5)).mask.tolist() == [[1, 1, 2, 3, 3]] * 2
    assert resized(scene([[1], [2], [3], [4]]), (2, 1)).mask.tolist() == [[2], [4]]
    assert resized(scene([[1, 150]]), (1, 2)).mask.tolist() == [[1, 150]]


@pytest.mark.parametrize("size", [(7, 5), (13, 31), (1, 1), (20, 3), (10, 22)])
def test_masks_are_resized_as_torch_does_with_exact_centres(size):
    mask = torch.arange(110).reshape(10, 11)
    found = resized(scene(mask.tolist()), size).mask
    wanted = torch.nn.functional.interpolate(mask[None, None].double(), size, mode="nearest-exact")[0, 0]
    assert torch.equal(found, wanted.long())


@pytest.mark.parametrize("size", [(16, 24), (4, 4), (8, 8), (12, 4)])
def test_image_and_mask_stay_upon_each_other(size):
    """An object that is drawn white has the same centre of mass in both."""
    mask = torch.zeros(8, 8, dtype=torch.int64)
    mask[2:6, 4:8] = 3
    big = resized(scene(mask.tolist(), (mask == 3).float().expand(3, 8, 8)), size)
    assert big.image.shape[1:] == big.mask.shape == size and set(big.mask.unique().tolist()) == {0, 3}
    for weights in (big.image[0], (big.mask == 3).float()):
        mass = weights / weights.sum()
        y = float((mass.sum(1) * (torch.arange(size[0]) + 0.5)).sum()) * 8 / size[0]
        x = float((mass.sum(0) * (torch.arange(size[1]) + 0.5)).sum()) * 8 / size[1]
        assert y == pytest.approx(4, abs=0.05) and x == pytest.approx(6, abs=0.25)


def test_images_are_resized_by_hand():
    """Two pixels to four: bilinear between centres, the outer ones held. Four to two: a triangle, two pixels each way.

    The latter weighs the last three pixels by 1/4, 3/4 and 3/4 for the second one.
    """
    image = torch.tensor([0.0, 1.0]).expand(3, 1, 2)
    found = resized(PlacesSample(image, torch.tensor(1), torch.tensor(0)), (1, 4))
    assert isinstance(found, PlacesSample) and found.image[0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]
    assert int(found.label) == 1
    image = torch.tensor([0.0, 0.0, 0.0, 7.0]).expand(3, 1, 4)
    found = resized(PlacesSample(image, torch.tensor(1), torch.tensor(0)), (1, 2))
    torch.testing.assert_close(found.image[0, 0], torch.tensor([0.0, 3.0]))


def test_object_masks_are_the_definition():
    mask = torch.randint(0, 6, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    objects = [4, 0, 2, 77]
    found = object_masks(mask, objects)
    assert found.shape == (2, 4, 5, 4) and found.dtype == torch.bool
    for n in range(2):
        assert torch.equal(object_masks(mask[n].to(torch.uint8), objects), found[n])
        for p, o in enumerate(objects):
            for i in range(5):
                for j in range(4):
                    assert bool(found[n, p, i, j]) == (int(mask[n, i, j]) == o)


def test_object_masks_refuse_what_is_no_mask():
    mask = torch.zeros(2, 2, dtype=torch.int64)
    for objects in ([], [1, 2, 1]):
        with pytest.raises(ValueError, match=r"indices of objects are .*; pass at least one and no index twice"):
            object_masks(mask, objects)
    for wrong in (mask.float(), mask.bool(), mask[0], mask[None, None]):
        with pytest.raises(ValueError, match=r"mask is torch\..*, not integers \(H, W\) or \(N, H, W\)"):
            object_masks(wrong, [1])


@pytest.mark.parametrize("release", ["challenge", "full"])
def test_a_map_within_one_object_is_local(trees, release):
    """All its probability is that object's and its locality is 0; a map over two halves has log 2."""
    scenes = ADE20KScenes(trees[release], split="training", size=(8, 12))
    mask = scenes[0].mask if release == "full" else scenes[1].mask
    inside, other = (401, 3050) if release == "full" else (66, 4)
    objects = [other, inside]
    areas = object_masks(mask, objects).float()
    assert bool((areas.sum((1, 2)) > 0).all())
    halves = (areas / areas.sum((1, 2), keepdim=True)).sum(0)
    maps = torch.stack([areas[1], halves])[None]
    S = object_probabilities(maps, object_masks(mask[None], objects))
    torch.testing.assert_close(S, torch.tensor([[[0.0, 1.0], [0.5, 0.5]]], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(locality(S), torch.tensor([0.0, math.log(2)], dtype=torch.float64), atol=1e-6, rtol=0)
    # The indices themselves, where all objects count, say the same.
    every = object_probabilities(maps, mask[None], objects=6655)
    torch.testing.assert_close(every[..., [o - 1 for o in objects]], S)
    assert float(locality(every)[0]) == pytest.approx(0, abs=1e-6)
