"""Configurations: what TOML says is what a run gets, written and read again, and every mistake is named."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_xnn import Recipe
from captum_xnn.cli._configuration import Configuration, targets_of, tomllib

FULL = Configuration(
    model="/nets/cub net.py:make",
    weights="/w.pt",
    layer="features.3",
    data='/images "new"/\\x',
    size=(120, 160),
    mean=(0.485, 0.456, 1e-05),
    std=(0.229, 1.0, 1e16),
    batch_size=3,
    workers=2,
    skip_damaged=True,
    targets=(46, "10-12", 7),
    classes="/names.txt",
    probabilities="log_softmax",
    joint=True,
    n_features=7,
    seed=12345678901234567890,
    device="cuda:1",
    out="/there",
    store="/there/store",
    checkpoint="/there/checkpoint",
    tensorboard="/there/curves",
    recipe=Recipe(
        batch_size=96, steps=7, beta=0.1, learning_rate=3e-4, weight_decay=0.25, patience=0.2, mixed_precision=True
    ),
)


def written(folder, text):
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "configuration", [FULL, Configuration(), Configuration(torchvision="vgg19", weights="/vgg.pt", targets="all")]
)
def test_written_and_read_again_is_the_same(configuration, tmp_path):
    assert Configuration.read(written(tmp_path, configuration.text())) == configuration


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(allow_nan=False, allow_infinity=False))
def test_any_text_and_number_survive(text, number):
    read = tomllib.loads(Configuration(layer=text, mean=(number,)).text())
    assert (read["layer"], read["mean"]) == (text, [number])


def test_what_is_written_has_every_setting_that_has_a_value(tmp_path):
    read = tomllib.loads(FULL.text())
    assert set(read) == set(vars(FULL)) - {"torchvision"}
    assert set(read["recipe"]) == set(vars(FULL.recipe))


def test_a_file_sets_what_it_names_and_leaves_the_rest(tmp_path):
    path = written(tmp_path, 'layer = "relu6"\ntargets = [1, "3-5"]\nsize = 32\n[recipe]\nsteps = 9')
    read = Configuration.read(path)
    assert read == Configuration(layer="relu6", targets=(1, "3-5"), size=(32, 32), recipe=Recipe(steps=9))


def test_options_override_one_by_one(tmp_path):
    path = written(tmp_path, 'layer = "a"\nseed = 1\njoint = true\n[recipe]\nsteps = 9\nbeta = 0.5')
    read = Configuration.read(path, {"seed": 2, "joint": False, "recipe": {"steps": 8}})
    assert read == Configuration(layer="a", seed=2, recipe=Recipe(steps=8, beta=0.5))


def test_a_model_replaces_one_of_the_other_kind(tmp_path):
    path = written(tmp_path, 'torchvision = "vgg19"\nweights = "v.pt"')
    assert Configuration.read(path, {"model": "/net.py"}) == Configuration(model="/net.py")
    path = written(tmp_path, 'model = "net.py"')
    assert Configuration.read(path, {"torchvision": "vgg19", "weights": "/v.pt"}) == Configuration(
        torchvision="vgg19", weights="/v.pt"
    )


def test_paths_count_from_the_file_and_those_of_options_from_here(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    path = written(tmp_path / "runs", 'model = "../net.py:make"\ndata = "images"\nout = "."\nweights = "/w.pt"')
    read = Configuration.read(os.path.relpath(path), {"data": "mine"})
    assert (read.model, read.data) == (f"{tmp_path}/net.py:make", f"{here}/mine")
    assert (read.out, read.weights) == (f"{tmp_path}/runs", "/w.pt")


@pytest.mark.parametrize("model", ["package.module:make", "module:load"])
def test_modules_are_no_paths(model, tmp_path):
    assert Configuration.read(written(tmp_path, f'model = "{model}"')).model == model


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert Configuration.read(None, {"data": "~/birds", "model": "~/net.py"}) == Configuration(
        data="/home/someone/birds", model="/home/someone/net.py"
    )


def test_the_results_folder_may_move(tmp_path):
    (tmp_path / "a").mkdir()
    Configuration(out=str(tmp_path / "a"), seed=4).write(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert Configuration.read(tmp_path / "b" / "config.toml") == Configuration(out=str(tmp_path / "b"), seed=4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_feature = 3", r"'n_feature' in .*run.toml is not one of the settings; near names: n_features"),
        ("zzz = 3", r"'zzz' in .* is not one of the settings; the settings are model, torchvision, .*recipe$"),
        ("[recipe]\nstep = 3", r"'step' in \[recipe\] of .*run.toml is not one .*; near names: steps"),
        ("recipe = 3", r"recipe in .*run.toml is 3, not a table; write \[recipe\]"),
        ('[recipe]\nsteps = "many"', r"recipe of .*run.toml is {'steps': 'many'}, and holds no numbers"),
        ("[recipe]\nsteps = 0", r"steps is 0; pass steps > 0.*run.toml"),
        ("n_features = 0", r"n_features is 0; give a whole number of at least 1 .*run.toml"),
        ("n_features = true", "n_features is True; give a whole number of at least 1"),
        ("seed = 1.5", "seed is 1.5; give a whole number of at least 0"),
        ("layer = 6", "layer is 6; give text"),
        ('layer = ""', "layer is ''; give text"),
        ('joint = "yes"', "joint is 'yes'; give true or false"),
        ("size = [1, 2, 3]", r"size is \[1, 2, 3\]; give one number of pixels such as 224, or height and width"),
        ("size = 0", "size is 0; give one number of pixels"),
        ("mean = [1, 2]", r"mean is \[1, 2\]; give one number such as 0.5 for each of 1 or 3 channels"),
        ('std = "0.5"', "std is '0.5'; give one number such as 0.5 for each of 1 or 3 channels"),
        ("targets = 1.5", "targets is 1.5; give a list of whole numbers and ranges"),
        ("targets = [-1]", "target -1 is not a whole number from 0, a range such as 10-19, or all"),
        ("targets = []", "the list of targets is empty"),
        ('layer = "a', "run.toml' is not valid TOML"),
    ],
)
def test_mistakes_are_named(text, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        Configuration.read(written(tmp_path, text))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the configuration .*none.toml.*; pass an existing TOML file"):
        Configuration.read(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"layer = '\xff'")
    with pytest.raises(ValueError, match=r"bytes.toml' is not valid TOML"):
        Configuration.read(tmp_path / "bytes.toml")


def test_mistakes_in_options_are_told_of_the_options():
    with pytest.raises(ValueError, match=r"'step' in \[recipe\] of the options is not"):
        Configuration.read(None, {"recipe": {"step": 3}})


@pytest.mark.parametrize(
    ("targets", "numbers"),
    [
        ([46, 112, 7], [46, 112, 7]),
        (["46", "3-5", 4], [46, 3, 4, 5]),
        ("7", [7]),
        ("0-2", [0, 1, 2]),
        (["5-5"], [5]),
        ("all", "all"),
        (None, None),
    ],
)
def test_targets(targets, numbers):
    assert targets_of(targets) == numbers


@pytest.mark.parametrize("wrong", [["5-3"], ["1-"], ["-1"], ["1.0"], ["all", 3], [True], [" 1"]])
def test_targets_that_are_none(wrong):
    with pytest.raises(ValueError, match="is not a whole number from 0"):
        targets_of(wrong)


CLASSES = ["European_Goldfinch", "American Goldfinch", "American_Crow", "crow", "7"]


@pytest.mark.parametrize(
    ("targets", "numbers"),
    [
        (["european goldfinch"], [0]),
        (["European_Goldfinch", 3], [0, 3]),
        ("European", [0]),
        (["crow"], [3]),  # a whole name counts before a part of one
        (["american  crow", "0-1"], [2, 0, 1]),
        (["7"], [7]),  # a number stays a number
    ],
)
def test_targets_by_name(targets, numbers):
    assert targets_of(targets, CLASSES) == numbers
    Configuration(targets=targets)  # the names are looked up when the model is there


@pytest.mark.parametrize(
    ("target", "classes", "said"),
    [
        ("goldfinch", CLASSES, r"may be any of European_Goldfinch \(0\), American Goldfinch \(1\); write more"),
        ("american", CLASSES, "may be any of"),
        ("goldfish", CLASSES, "no class 'goldfish' among its 5 classes"),
        ("euopean goldfinch", CLASSES, "near names: European_Goldfinch"),
        ("gold", CLASSES, "no class 'gold'"),  # only whole words
        ("goldfinch", None, "the names of the model's classes are not known; .* --classes FILE"),
    ],
)
def test_names_that_are_no_class(target, classes, said):
    with pytest.raises(ValueError, match=said):
        targets_of([target], classes)


@pytest.mark.parametrize(("given", "value"), [(12, 12), ("12", 12), ("names.txt", "names.txt")])
def test_classes(given, value):
    assert Configuration(classes=given).classes == value


@pytest.mark.parametrize("wrong", [0, -1, True, "", 1.5])
def test_wrong_classes(wrong):
    with pytest.raises(ValueError, match=r"classes is .*; give a whole number of at least 1"):
        Configuration(classes=wrong)


def test_all_in_a_list_is_all():
    assert Configuration(targets=["all"]).targets == "all"


def test_configurations_are_not_changed_by_reading(tmp_path):
    options = {"data": "mine", "recipe": {"steps": 3}}
    Configuration.read(written(tmp_path, "seed = 3"), options)
    assert options == {"data": "mine", "recipe": {"steps": 3}} and Path.cwd() != tmp_path


def test_a_mark_of_windows_editors_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b'\xef\xbb\xbflayer = "relu6"')
    assert Configuration.read(tmp_path / "run.toml").layer == "relu6"
