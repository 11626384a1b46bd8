"""Inputs from files: the right pixels under the right name in the right order, and damaged files named."""

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_xnn.activations._batches import Batches
from captum_xnn.cli._inputs import Inputs, Preparation, as_channels, as_size
from captum_xnn.datasets._parts import PartsSample, resized
from captum_xnn.errors import DatasetError

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


def pixels(seed, height=6, width=8, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for seed, name in enumerate(("finch/b.png", "finch/a.PNG", "crow/c.png", "top.png", "crow/old/d.bmp")):
        save(root / name, pixels(seed))
    (root / "labels.txt").write_text("finch crow")
    (root / ".hidden.png").write_text("no image")
    (root / ".cache").mkdir()
    (root / ".cache" / "e.png").write_text("no image")
    return root


NAMES = ("crow/c.png", "crow/old/d.bmp", "finch/a.PNG", "finch/b.png", "top.png")
SEEDS = (2, 4, 1, 0, 3)


def test_all_images_in_order_with_their_names(folder):
    inputs = Inputs(folder, batch_size=2)
    assert inputs.names == NAMES and len(inputs) == 3
    for _ in range(2):
        batches = list(inputs)
        assert [batch.names for batch in batches] == [NAMES[:2], NAMES[2:4], NAMES[4:]]
        found = torch.cat([batch.inputs for batch in batches])
        assert torch.equal(found, torch.stack([torch.tensor(pixels(s)).permute(2, 0, 1) / 255 for s in SEEDS]))


def test_pixels_are_normalised_for_the_model_and_not_for_the_eye(folder):
    (batch,) = Inputs(folder, Preparation(mean=MEAN, std=STD))
    for i, seed in enumerate(SEEDS):
        for c in range(3):
            plain = pixels(seed)[:, :, c] / 255
            np.testing.assert_allclose(batch.inputs[i, c], (plain - MEAN[c]) / STD[c], atol=1e-6)
            np.testing.assert_allclose(batch.images[i, c], plain, atol=1e-6)


def test_images_are_squashed_as_those_of_data_sets_are(folder):
    (batch,) = Inputs(folder, Preparation(size=(4, 3)))
    whole = torch.tensor(pixels(SEEDS[0])).permute(2, 0, 1) / 255
    sample = PartsSample(whole, torch.tensor(0), torch.zeros(1, 2), torch.zeros(4), torch.tensor(0))
    assert batch.inputs.shape == (5, 3, 4, 3)
    assert torch.equal(batch.inputs[0], resized(sample, (4, 3)).image)


@pytest.mark.parametrize("given", [{"mean": (0.5,)}, {"std": (0.25,)}, {"mean": (0.5,), "std": (0.25,)}])
def test_one_number_means_grey(given, tmp_path):
    grey = save(tmp_path / "g.png", pixels(0, channels=1))
    (batch,) = Inputs(tmp_path, Preparation(**given))
    assert batch.inputs.shape == batch.images.shape == (1, 1, 6, 8)
    mean, std = given.get("mean", (0,))[0], given.get("std", (1,))[0]
    np.testing.assert_allclose(batch.inputs[0, 0], (grey / 255 - mean) / std, atol=1e-6)
    np.testing.assert_allclose(batch.images[0, 0], grey / 255, atol=1e-6)


def test_palettes_transparency_and_grey_become_rgb(tmp_path):
    Image.fromarray(pixels(0)).quantize(8).save(tmp_path / "a.png")
    Image.fromarray(pixels(0, channels=4)).save(tmp_path / "b.png")
    Image.fromarray(pixels(0, channels=1)).save(tmp_path / "c.png")
    (batch,) = Inputs(tmp_path)
    assert batch.inputs.shape == (3, 3, 6, 8)
    assert torch.equal(batch.inputs[1], torch.tensor(pixels(0, channels=4)[:, :, :3]).permute(2, 0, 1) / 255)
    assert torch.equal(batch.inputs[2, 0], batch.inputs[2, 2])


def test_one_image(folder):
    (batch,) = Inputs(folder / "top.png")
    assert batch.names == ("top.png",) and torch.equal(batch.inputs[0], torch.tensor(pixels(3)).permute(2, 0, 1) / 255)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_read_the_same(folder):
    (folder / "finch" / "broken.png").write_bytes(b"")
    alone, several = (list(Inputs(folder, batch_size=2, workers=workers, skip_damaged=True)) for workers in (0, 2))
    assert [b.names for b in alone] == [b.names for b in several]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(alone, several, strict=True))


def test_a_part_of_the_batches_is_read_alone(folder, monkeypatch):
    inputs = Inputs(folder, batch_size=2)
    whole, opened = list(inputs), []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(Path(path).name), open_image(path))[1])
    batches = Batches(inputs.loader(), 2, lambda rows: (inputs.batch(rows), None))
    assert batches.examples == 5
    (second,) = [part.inputs for part in batches.share(1, 2)]
    assert second.names == whole[1].names and torch.equal(second.inputs, whole[1].inputs)
    # The first batch is every process's, to compare the data; the third is another's.
    assert sorted(opened) == sorted(Path(name).name for name in whole[0].names + whole[1].names)


def test_the_global_generator_is_not_drawn_from(folder):
    before = torch.get_rng_state()
    list(Inputs(folder))
    assert torch.equal(torch.get_rng_state(), before)


def truncated(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def damaged(folder):
    """Returns the folder with four damaged images among the five good ones."""
    save(folder / "crow" / "cut.jpg", pixels(7, 64, 64))
    truncated(folder / "crow" / "cut.jpg")
    save(folder / "a-cut.png", pixels(8, 64, 64))
    truncated(folder / "a-cut.png")
    (folder / "finch" / "text.jpg").write_text("<html>not found</html>")
    (folder / "zero.png").write_bytes(b"")
    return folder


DAMAGED = ("a-cut.png", "crow/cut.jpg", "finch/text.jpg", "zero.png")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_image_is_named(folder, name):
    damaged(folder)
    for other in set(DAMAGED) - {name}:
        (folder / other).unlink()
    with pytest.raises(
        DatasetError, match=rf"the image '{name}' in .*images.* cannot be read \(.+\); .*--skip-damaged"
    ):
        list(Inputs(folder, batch_size=3))


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_damaged_images_are_left_out_if_asked(folder, batch_size, caplog):
    inputs = Inputs(damaged(folder), batch_size=batch_size, skip_damaged=True)
    with caplog.at_level(logging.WARNING, "captum_xnn"):
        for _ in range(2):
            batches = list(inputs)
    assert sum((batch.names for batch in batches), ()) == NAMES
    found = torch.cat([batch.inputs for batch in batches])
    assert torch.equal(found, torch.stack([torch.tensor(pixels(s)).permute(2, 0, 1) / 255 for s in SEEDS]))
    assert inputs.skipped == DAMAGED
    (told,) = caplog.messages
    assert told == f"skipped 4 damaged of 9 images: {', '.join(DAMAGED)}"


def test_nothing_but_damaged_images(tmp_path):
    (tmp_path / "a.png").write_text("")
    with pytest.raises(DatasetError, match=r"0 of 1 images in .* can be read"):
        list(Inputs(tmp_path, skip_damaged=True))


def test_sizes_that_differ(folder):
    save(folder / "finch" / "wide.png", pixels(0, 6, 9))
    with pytest.raises(DatasetError, match=r"in size: \[3, 6, 8\] \(.*\), \[3, 6, 9\] \(finch/wide.png\).*--size"):
        list(Inputs(folder))
    (batch,) = Inputs(folder, Preparation(size=(6, 8)))
    assert len(batch.inputs) == 6


def test_folders_without_images(tmp_path):
    with pytest.raises(DatasetError, match=r"has no images among its 0 files; file names must end in one of"):
        Inputs(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DatasetError, match="no images among its 1 files"):
        Inputs(tmp_path)
    with pytest.raises(DatasetError, match=r"folder or file of inputs .*nowhere.* does not exist; check the path"):
        Inputs(tmp_path / "nowhere")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DatasetError, match=r"a.csv' is not .* image \(.jpg, .*\) or an array \(.npy, .npz, .pt\)"):
        Inputs(tmp_path / "a.csv")


def test_links_to_folders_are_followed_and_circles_end(folder, tmp_path, monkeypatch):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "birds").symlink_to(folder / "finch")
    (folder / "finch" / "round").symlink_to(folder / "finch")
    seen, realpath = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda place: seen.append(place) or realpath(place))
    assert Inputs(tmp_path / "linked").names == ("birds/a.PNG", "birds/b.png")
    assert len(seen) == 3  # linked, birds and, once, round


def test_a_transform_replaces_the_rest(folder):
    seen = []

    def transform(image):
        seen.append((image.mode, image.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255 * 2 - 1

    preparation = Preparation(size=(2, 2), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), transform=transform)
    (batch,) = Inputs(folder, preparation)
    assert seen == [("RGB", (8, 6))] * 5
    np.testing.assert_allclose(batch.inputs[0], pixels(SEEDS[0]).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(batch.images[0], pixels(SEEDS[0]).transpose(2, 0, 1) / 255, atol=1e-6)


def test_transforms_that_fail(folder):
    def fails(image):
        raise KeyError("mode")

    with pytest.raises(ValueError, match=r"the transform raised KeyError \('mode'\) for 'crow/c.png'"):
        list(Inputs(folder, Preparation(transform=fails), skip_damaged=True))
    with pytest.raises(TypeError, match="the transform returned ndarray instead of a tensor"):
        list(Inputs(folder, Preparation(transform=np.array)))


@pytest.mark.parametrize("kind", ["npy", "npz", "pt"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_arrays_come_as_they_are(kind, dtype, tmp_path):
    values = (np.random.default_rng(0).random((5, 3, 4, 4)) * 9).astype(dtype)
    path = tmp_path / f"inputs.{kind}"
    {"npy": np.save, "npz": np.savez, "pt": lambda p, v: torch.save(torch.tensor(v), p)}[kind](path, values)
    inputs = Inputs(path, Preparation(mean=MEAN, std=STD), batch_size=2)
    found = torch.cat([batch.inputs for batch in inputs])
    assert found.dtype == (torch.int64 if dtype is np.int64 else torch.float32)
    np.testing.assert_array_equal(found, values.astype(np.float32))
    assert inputs.names == ("0", "1", "2", "3", "4") and next(iter(inputs)).names == ("0", "1")


def test_arrays_are_shown_without_normalisation(tmp_path):
    plain = torch.rand(2, 3, 4, 4)
    scale = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    torch.save((plain - scale[0]) / scale[1], tmp_path / "inputs.pt")
    (batch,) = Inputs(tmp_path / "inputs.pt", Preparation(mean=MEAN, std=STD))
    torch.testing.assert_close(batch.images, plain)
    torch.save(torch.rand(2, 7), tmp_path / "rows.pt")
    assert next(iter(Inputs(tmp_path / "rows.pt"))).images is None


@pytest.mark.parametrize(
    ("shape", "preparation", "shown"),
    [
        ((2, 3, 4, 4), Preparation(mean=(0.5,)), True),
        ((2, 1, 4, 4), Preparation(mean=MEAN), False),
        ((2, 2, 4, 4), Preparation(), False),
        ((2, 3, 4), Preparation(), False),
        ((2, 3, 4, 4), Preparation(), True),
    ],
)
def test_what_can_be_shown(shape, preparation, shown):
    assert (preparation.displayable(torch.rand(shape)) is not None) == shown


def test_images_to_show_stay_within_bounds():
    shown = Preparation(mean=(0.5,), std=(1.0,)).displayable(torch.tensor([[[[-9.0, 9.0, 0.25]]]]))
    assert shown.flatten().tolist() == [0.0, 1.0, 0.75]


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("bomb"),)


def test_arrays_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("two.npz", a=np.zeros(3), b=np.zeros(3))
    np.save("one.npy", np.float32(3))
    np.save("empty.npy", np.zeros((0, 3)))
    np.save("objects.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    Path("pickle.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"weight": torch.zeros(3)}, "dict.pt")
    Path("text.npy").write_text("text")
    np.save("cut.npy", np.zeros((100, 3)))
    truncated(Path("cut.npy"))
    for name, said in (
        ("two.npz", "it holds 2 arrays: a, b"),
        ("one.npy", r"has shape \(\)"),
        ("empty.npy", r"has shape \(0, 3\)"),
        ("objects.npy", "cannot be read as an array"),
        ("pickle.pt", "cannot be read as an array"),
        ("dict.pt", "it holds a dict"),
        ("text.npy", "cannot be read as an array"),
        ("cut.npy", "cannot be read as an array"),
    ):
        with pytest.raises(DatasetError, match=rf"{name}.*{said}.*save one array"):
            Inputs(name)
    assert not Path("bomb").exists()


def test_sizes_and_channels():
    assert as_size("SIZE", 5) == (5, 5) and as_size("SIZE", (5, 6)) == (5, 6)
    assert as_channels("STD", np.array([0.5, 1, 2])) == (0.5, 1.0, 2.0)
    for wrong in (True, -1, 2.0, "3", [], [1, 2, 3]):
        with pytest.raises(ValueError, match=r"SIZE is .*; give one number of pixels such as 224, or height and width"):
            as_size("SIZE", wrong)
    for wrong in ("0.5", [0.1, 0.2], [True, 0, 0], None, ["a", "b", "c"]):
        with pytest.raises(ValueError, match=r"STD is .*; give one number such as 0.5 for each of 1 or 3 channels"):
            as_channels("STD", wrong)
    with pytest.raises(ValueError, match="have different numbers of channels"):
        Preparation(mean=(0.5,), std=STD)
    with pytest.raises(ValueError, match=r"std is .*; give numbers above 0"):
        Preparation(std=(0.0,))


@pytest.mark.parametrize("kind", ["16 bits", "float to 1", "float to 255", "32 bits", "8 in 32 bits"])
def test_deep_pixels_keep_their_brightness(kind, tmp_path):
    """PIL's own conversion makes nearly all of them white, or black."""
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    made = {
        "16 bits": lambda: Image.fromarray((ramp * 65535).astype(np.uint16)),
        "float to 1": lambda: Image.fromarray(ramp.astype(np.float32)),
        "float to 255": lambda: Image.fromarray((ramp * 255).astype(np.float32)),
        "32 bits": lambda: Image.fromarray((ramp * 65535).astype(np.int32)),
        "8 in 32 bits": lambda: Image.fromarray((ramp * 255).round().astype(np.int32)),
    }[kind]()
    made.save(tmp_path / "ramp.tiff")
    (batch,) = Inputs(tmp_path)
    for channel in batch.inputs[0]:
        assert np.abs(channel.numpy() - ramp).max() <= (0.5 / 255 + 1e-6 if kind == "8 in 32 bits" else 1 / 65535)
    (batch,) = Inputs(tmp_path, Preparation(transform=lambda image: torch.from_numpy(np.array(image)) / 255))
    assert np.abs(batch.inputs[0, ..., 0].numpy() - ramp).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "LAB", "YCbCr", "P", "LA", "L", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_pixels_is_read(mode, channels, tmp_path):
    """A white image stays white, in as many channels as the model takes."""
    Image.new("RGB", (4, 4), (255, 255, 255)).convert("L" if mode == "LA" else "RGB").convert(mode).save(
        tmp_path / ("white.png" if mode in ("RGBA", "LA", "P") else "white.tiff")
    )
    (batch,) = Inputs(tmp_path, Preparation(mean=channels * (0.0,), std=channels * (1.0,)))
    assert batch.inputs.shape == (1, channels, 4, 4)
    assert float(batch.inputs.min()) > 0.98


def test_twelve_bits_in_a_file_of_sixteen_keep_all_their_levels(tmp_path):
    """As radiographs have them: of 4,096 levels, 8 bits would leave 17."""
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "scan.png")
    (batch,) = Inputs(tmp_path, Preparation(mean=(0.0,), std=(1.0,)))
    assert batch.inputs.shape == (1, 1, 64, 64) and len(batch.inputs.unique()) == 4096
    torch.testing.assert_close(batch.inputs.flatten(), torch.arange(4096) / 65535)


def test_a_dark_image_of_16_bits_stays_dark(tmp_path):
    """Its numbers would fit in 8 bits, and the file says that they have 16."""
    dark = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for name in ("dark.png", "dark.tiff"):
        Image.fromarray(dark).save(tmp_path / name)
    for batch in Inputs(tmp_path, batch_size=1):
        torch.testing.assert_close(batch.inputs[0, 0], torch.from_numpy(dark / 65535).float())


def test_pixels_of_an_unknown_range_are_refused_by_file_name(tmp_path):
    Image.fromarray(np.array([[-3.0, 900.0]], np.float32)).save(tmp_path / "depth.tiff")
    with pytest.raises(DatasetError, match=r"'depth.tiff'.*pixels from -3 to 900 in mode 'F'"):
        list(Inputs(tmp_path))


def test_photographs_stand_upright(tmp_path):
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    (batch,) = Inputs(tmp_path)
    assert batch.inputs.shape == (1, 3, 4, 2) and bool((batch.inputs[0, :, 0, 1] == 1).all())
