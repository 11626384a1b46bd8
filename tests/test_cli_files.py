"""The command line on files: fit, explain and evaluate from end to end, the same bits again, and errors on one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import logits, pixels, seed_of, write
from PIL import Image

from captum_xnn import Recipe, XNNAttribution
from captum_xnn import __main__ as cli
from captum_xnn._files import replace_file
from captum_xnn.cli import _explain, _fit
from captum_xnn.cli._configuration import Configuration, tomllib
from captum_xnn.cli._inputs import Inputs, _Images
from captum_xnn.cli._model_files import load_model
from captum_xnn.models._srae import by_shape

# The tiny model's images do not all excite every x-feature.
# So small a model has neurons that only a bias excites.
pytestmark = [
    pytest.mark.filterwarnings("ignore:maps are zero"),
    pytest.mark.filterwarnings("ignore:probabilities sum to"),
]

FEW = 5  # pictures take a while
OPTIONS = [
    "--layer",
    "1",
    "--target",
    "all",
    "--n-features",
    "2",
    "--form",
    "srae",
    "--recipe",
    "steps=20",
    "beta=0.5",
    "--quiet",
]


def arguments(folder: Path, *more: str) -> list[str]:
    return ["fit", "--model", f"{folder}/net.py", "--data", f"{folder}/images", "--device", "cpu", *OPTIONS, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, its images, a few of them in few/images, and fitted explainers."""
    folder = write(tmp_path_factory.mktemp("files"))
    (folder / "few").mkdir()
    write(folder / "few", count=FEW)
    assert cli.main(arguments(folder, "--out", f"{folder}/xnn", "--seed", "3")) == 0
    return folder


def explainers(folder: Path) -> XNNAttribution:
    return XNNAttribution.load(folder / "xnn", load_model(f"{folder}/net.py").model)


def weights(folder: Path) -> bytes:
    (path,) = folder.glob("weights-*.safetensors")
    return path.read_bytes()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "explanations.jsonl").read_text().splitlines()]


def test_fit_learns_what_the_same_calls_in_python_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = load_model(f"{folder}/net.py")
    recipe = Recipe(steps=20, beta=0.5)
    inputs = Inputs(folder / "images", made.preparation)
    xnn = XNNAttribution(made.model, "1", 2, autoencoder=by_shape, recipe=recipe, seed=3)
    xnn.fit(inputs, [0, 1, 2], progress=False)
    assert weights(xnn.save(folder / "python")) == weights(folder / "xnn")


def test_the_saved_configuration_is_whole(folder: Path) -> None:
    read = tomllib.loads((folder / "xnn" / "config.toml").read_text())
    assert read["model"] == f"{folder}/net.py" and read["data"] == f"{folder}/images"
    assert (read["size"], read["mean"], read["std"]) == ([6, 6], [-0.1, 0.0, -0.1], [0.5, 0.25, 0.2])
    assert (read["targets"], read["layer"], read["seed"], read["n_features"]) == ("all", "1", 3, 2)
    assert (read["recipe"]["steps"], read["recipe"]["beta"], read["recipe"]["eta"]) == (20, 0.5, 1.0)


def test_fitting_again_from_the_saved_configuration_gives_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = f"{folder}/xnn/config.toml"
    assert cli.main(["fit", "--config", config, "--out", "again", "--quiet"]) == 0
    assert weights(tmp_path / "again") == weights(folder / "xnn")
    assert Configuration.read("again/config.toml", {"out": f"{folder}/xnn"}) == Configuration.read(config)
    first, again = (
        json.loads((place / "explainer.json").read_text()) for place in (folder / "xnn", tmp_path / "again")
    )
    assert first == again
    assert cli.main(["fit", "--config", config, "--out", "other", "--seed", "4", "--quiet"]) == 0
    assert weights(tmp_path / "other") != weights(folder / "xnn")


def test_without_another_place_it_goes_where_the_configuration_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes((folder / "xnn" / "config.toml").read_bytes())
    assert cli.main(["fit", "--config", str(tmp_path / "config.toml"), "--quiet"]) == 0
    assert weights(tmp_path) == weights(folder / "xnn")


def test_options_override_the_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text(
        f'model = "{folder}/net.py"\ndata = "{folder}/images"\nlayer = "3"\ntargets = [1]\njoint = true\nout = "a"\n'
        "n_features = 3\nskip_damaged = true\n[recipe]\nsteps = 9\neta = 0"
    )
    changed = ["--layer", "1", "--target", "0", "2", "--no-joint", "--no-skip-damaged", "--recipe", "steps=8"]
    assert cli.main(["fit", "--config", f"{tmp_path}/run.toml", *changed, "--quiet"]) == 0
    read = Configuration.read(tmp_path / "a" / "config.toml")
    assert (read.layer, read.targets, read.joint, read.skip_damaged) == ("1", (0, 2), False, False)
    assert (read.n_features, read.recipe) == (3, Recipe(steps=8, eta=0))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["0", "2"]


def test_joint_explainers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(folder, "--joint", "--target", "2", "0", "--out", str(tmp_path))) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("  2, 0")
    explained = ["explain", "--explainer", str(tmp_path), "--data", f"{folder}/few/images", "--out", f"{tmp_path}/why"]
    assert cli.main([*explained, "--quiet"]) == 0
    assert {line["target"] for line in lines(tmp_path / "why")} == {0, 2}


def test_all_means_the_classes_that_occur(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, count=8)
    for image in (tmp_path / "images").rglob("*.png"):
        if logits(seed_of(image.name)).argmax() == 1:
            image.unlink()
    assert cli.main(arguments(tmp_path, "--out", f"{tmp_path}/xnn")) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()[1:3]] == ["0", "2"]
    told = "explaining 2 of 3 classes; the model gives the other classes to none of the data"
    assert captured.err == f"captum-xnn: {told}\n"


def test_every_image_is_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first batch, on which the model is tried, and whose layer shows at the end where its channels are."""
    read: list[int] = []
    fetch = _Images.__getitem__

    def noting(images: _Images, index: int) -> Any:
        read.append(index)
        return fetch(images, index)

    monkeypatch.setattr(_Images, "__getitem__", noting)
    line = arguments(folder, "--out", f"{tmp_path}/xnn", "--store", f"{tmp_path}/store", "--batch-size", "10")
    assert cli.main(line) == 0
    assert read[:10] == list(range(10)) and read[10:70] == list(range(60)) and read[70:] == list(range(10))


def test_interrupted_while_collecting_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch, stop = _Images.__getitem__, [35]

    def interrupted(images: _Images, index: int) -> Any:
        if index == stop[0]:
            raise KeyboardInterrupt
        return fetch(images, index)

    monkeypatch.setattr(_Images, "__getitem__", interrupted)
    monkeypatch.setattr("captum_xnn.activations._store._SHARD_ROWS", 10)
    line = arguments(folder, "--out", f"{tmp_path}/xnn", "--store", f"{tmp_path}/store", "--batch-size", "10")
    assert cli.main(line) == 130
    said = capsys.readouterr().err
    assert said.startswith("captum-xnn: interrupted; 3 finished shards of activations stay in ") and "resumes" in said
    stop[0] = -1
    assert cli.main([*line, "--seed", "3"]) == 0
    assert weights(tmp_path / "xnn") == weights(folder / "xnn")


def test_explain_writes_numbers_maps_and_pictures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "why"
    command = [
        "explain",
        "--explainer",
        f"{folder}/xnn",
        "--data",
        f"{folder}/few/images",
        "--out",
        str(out),
        "--quiet",
    ]
    assert cli.main([*command, "--batch-size", "2"]) == 0
    assert capsys.readouterr().out == (
        f"{FEW} inputs explained. Written: {out}/explanations.jsonl, with pictures/ and maps/\n"
    )
    (batch,) = Inputs(folder / "few" / "images", load_model(f"{folder}/net.py").preparation)
    assert [line["name"] for line in lines(out)] == list(batch.names)
    xnn = explainers(folder)
    for line, image in zip(lines(out), batch.inputs, strict=True):
        own = logits(seed_of(line["name"]))
        assert line["target"] == own.argmax()
        assert line["prediction"] == pytest.approx(own.max(), abs=1e-5)
        assert line["bias"] + sum(line["contributions"]) == pytest.approx(line["surrogate"], abs=1e-5)
        why = xnn.explain(image[None], line["target"])
        assert line["contributions"] == pytest.approx(why.contributions[0].tolist(), abs=1e-5)
        assert line["features"] == pytest.approx(why.features[0].tolist(), abs=1e-5)
        maps = np.load(out / line["maps"])
        np.testing.assert_allclose(maps, why.maps[0], atol=1e-5)
    first = lines(out)[0]
    assert (first["maps"], first["picture"]) == ("maps/even/000.npy", "pictures/even/000.png")
    assert len(list((out / "pictures").rglob("*.png"))) == FEW
    with Image.open(out / first["picture"]) as picture:
        assert picture.size[0] > 600


def test_pictures_show_the_image_itself(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(_explain, "_write_picture", lambda path, why, i, title, _: shown.append((why.inputs[i], title)))
    image = folder / "images" / "odd" / "001.png"
    command = ["explain", "--explainer", f"{folder}/xnn", "--data", str(image), "--out", str(tmp_path), "--quiet"]
    assert cli.main([*command, "--target", "2"]) == 0
    ((pixels, title),) = shown
    np.testing.assert_allclose(pixels, np.array(Image.open(image)).transpose(2, 0, 1) / 255, atol=1e-6)
    assert title == "001.png: blue"


def test_named_targets_and_another_heatmap(folder: Path, tmp_path: Path) -> None:
    command = ["explain", "--explainer", f"{folder}/xnn", "--data", f"{folder}/few/images", "--out", str(tmp_path)]
    assert cli.main([*command, "--target", "1-2", "--heatmap", "InputXGradient", "--quiet"]) == 0
    from captum.attr import InputXGradient

    xnn = explainers(folder).with_heatmap(InputXGradient)
    (batch,) = Inputs(folder / "few" / "images", load_model(f"{folder}/net.py").preparation)
    for line, image in zip(lines(tmp_path), batch.inputs, strict=True):
        assert line["target"] == 1 + logits(seed_of(line["name"]))[1:].argmax()
        np.testing.assert_allclose(
            np.load(tmp_path / line["maps"]), xnn.attribute(image[None], line["target"])[0], atol=1e-5
        )


def test_evaluate_prints_a_table_and_writes_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--explainer", f"{folder}/xnn", "--data", f"{folder}/images", "--quiet"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["target", "class", "F_reg", "F_cls", "effective", "positives"]
    assert out[-1] == f"60 inputs. Written: {folder}/xnn/evaluation.json"
    written = json.loads((folder / "xnn" / "evaluation.json").read_text())
    xnn = explainers(folder)
    (batch,) = Inputs(folder / "images", load_model(f"{folder}/net.py").preparation)
    for row, entry in zip(out[1:4], written["targets"], strict=True):
        score = xnn.score(batch.inputs, entry["target"])
        assert (entry["f_reg"], entry["f_cls"]) == pytest.approx((score.f_reg, score.f_cls), abs=1e-6)
        assert row.split() == [
            str(entry["target"]),
            ["red", "green", "blue"][entry["target"]],
            f"{entry['f_reg']:.4f}",
            f"{entry['f_cls']:.4f}",
            f"{entry['effective']:.4f}",
            str(entry["positives"]),
        ]
    assert sum(entry["positives"] for entry in written["targets"]) == 60


def test_evaluate_with_maps(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--explainer", f"{folder}/xnn", "--data", f"{folder}/images", "--quiet", "--target", "2"]
    assert cli.main([*command, "--maps", "3", "--out", f"{tmp_path}/new/e.json"]) == 0
    header, row = capsys.readouterr().out.splitlines()[:2]
    (entry,) = json.loads((tmp_path / "new" / "e.json").read_text())["targets"]
    assert header.split()[-4:] == ["O1", "O2", "O1_weighted", "O2_weighted"]
    assert row.split()[-4] == f"{entry['o1']:.4f}" and row.split()[-2] == f"{entry['o1_weighted']:.4f}"


def test_evaluate_with_patches(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--explainer", f"{folder}/xnn", "--data", f"{folder}/images", "--quiet", "--target", "2"]
    assert cli.main([*command, "--patches", "3", "--out", f"{tmp_path}/e.json"]) == 0
    header, row = capsys.readouterr().out.splitlines()[3:5]
    of = json.loads((tmp_path / "e.json").read_text())["targets"][0]["patches"]
    assert header.split("  ")[0] == "target" and "random groups" in header
    figures = [of["agreement"], of["agreement_random_groups"], of["agreement_random_maps"], of["agreement_one_heatmap"]]
    figures += [of["identified"], of["identified_random_groups"], of["movement"], of["drops"]["o1"]]
    figures += [of["drops_random_groups"]["o1"]]
    assert row.split() == ["2", "blue", "3", *(f"{figure:.4f}" for figure in figures)]


def test_numbers_that_json_has_not(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from captum_xnn.cli import _evaluation as evaluation

    result = evaluation.Evaluation(0, "a", 1.0, None, None, 0, 5, 0.0, float("inf"))
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: [result])
    command = ["evaluate", "--explainer", f"{folder}/xnn", "--data", f"{folder}/images", "--maps", "--quiet"]
    assert cli.main([*command, "--out", f"{tmp_path}/e.json"]) == 0
    assert "Infinity" not in (tmp_path / "e.json").read_text()


def test_targets_of_the_configuration_do_not_hide_others_that_were_fitted(folder: Path, tmp_path: Path) -> None:
    explainers(folder).save(tmp_path)
    Configuration(model=f"{folder}/net.py", targets=[0], device="cpu").write(tmp_path)
    assert cli.main(["evaluate", "--explainer", str(tmp_path), "--data", f"{folder}/images", "--quiet"]) == 0
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["targets"]) == 3


def test_a_folder_from_python_needs_the_model_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explainers(folder).save(tmp_path)
    command = ["evaluate", "--explainer", str(tmp_path), "--data", f"{folder}/images", "--quiet"]
    assert cli.main(command) == 1
    assert "no model is given; pass either --model FILE.py" in capsys.readouterr().err
    assert cli.main([*command, "--model", f"{folder}/net.py"]) == 0


def test_arrays_are_explained_too(folder: Path, tmp_path: Path) -> None:
    (batch,) = Inputs(folder / "few" / "images", load_model(f"{folder}/net.py").preparation)
    torch.save(batch.inputs, tmp_path / "inputs.pt")
    command = ["explain", "--explainer", f"{folder}/xnn", "--quiet", "--out"]
    assert cli.main([*command, f"{tmp_path}/a", "--data", f"{tmp_path}/inputs.pt"]) == 0
    assert cli.main([*command, f"{tmp_path}/b", "--data", f"{folder}/few/images"]) == 0
    same = ("target", "prediction", "contributions")
    one, other = ([[line[key] for key in same] for line in lines(tmp_path / name)] for name in "ab")
    assert one == other and [line["name"] for line in lines(tmp_path / "a")] == list(map(str, range(FEW)))


def test_damaged_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, count=3)
    (tmp_path / "images" / "odd" / "a.png").write_text("not an image")
    command = ["explain", "--explainer", f"{folder}/xnn", "--data", f"{tmp_path}/images", "--out", f"{tmp_path}/why"]
    assert cli.main([*command, "--quiet"]) == 1
    assert "the image 'odd/a.png' in " in one_line(capsys)
    assert cli.main([*command, "--quiet", "--skip-damaged"]) == 0
    assert len(lines(tmp_path / "why")) == 3
    assert capsys.readouterr().err == "captum-xnn: skipped 1 damaged of 4 images: odd/a.png\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only there names are any bytes")
def test_names_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, count=1)
    (image,) = (tmp_path / "images").rglob("*.png")
    os.rename(image, os.fsencode(tmp_path / "images") + b"/a\xff$x$.png")
    command = ["explain", "--explainer", f"{folder}/xnn", "--data", f"{tmp_path}/images", "--out", f"{tmp_path}/why"]
    assert cli.main([*command, "--quiet"]) == 0
    (line,) = lines(tmp_path / "why")
    assert os.fsencode(line["name"]) == b"a\xff$x$.png" and (tmp_path / "why" / line["picture"]).is_file()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("captum-xnn: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--layer", "2.conv"], "Sequential has no layer '2.conv'; near names"),
        (["--target", "3"], "target 3 is outside the model's outputs (3,)"),
        (["--target", "3-1"], "target '3-1' is not a whole number from 0, a range such as 10-19, or all"),
        (["--n-features", "0"], "n_features is 0; give a whole number of at least 1"),
        (["--recipe", "step=3"], "'step' in [recipe] of the options is not one of the settings of the recipe; near"),
        (["--data", "nowhere"], "the folder or file of inputs "),
        (["--model", "nowhere.py"], "nowhere.py': FileNotFoundError"),
        (["--torchvision", "vgg19"], "two models are given"),
        (["--device", "abacus"], "device 'abacus' is not available"),
        (["--size", "1", "2", "3"], "is [1, 2, 3]; give one number of pixels such as 224, or height and width"),
        (["--mean", "0.5"], "have different numbers of channels"),
        (["--out", "taken"], "taken' cannot be made (a file has this name); pass another folder"),
        (["--data", "bytes.npy"], "uint8 (1, 3, 4, 4) (RuntimeError: "),
        (["--data", "bytes.npy"], "save the array as the model takes it, such as array.astype('float32') / 255"),
        (["--data", "table.npy"], "save the array in the shape (M, ...) that the model takes"),
        (["--data", "words.npy"], "words.npy' cannot be read as an array (it holds <U1, not numbers)"),
        (["--data", "sparse.pt"], "cannot be read as an array (it holds a tensor of layout torch.sparse_coo"),
        (["--config", "none.toml"], "cannot read the configuration 'none.toml'"),
    ],
)
def test_each_mistake_is_one_line(
    change: list[str],
    said: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    np.save(tmp_path / "bytes.npy", np.zeros((5, 3, 4, 4), np.uint8))
    np.save(tmp_path / "table.npy", np.zeros((5, 4)))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    torch.save(torch.eye(4).to_sparse(), tmp_path / "sparse.pt")
    assert cli.main(arguments(folder, "--out", "new", *change)) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("captum-xnn: error: ") and said in captured.err
    assert not list(tmp_path.rglob("explainer.json")) and (tmp_path / "taken").read_text() == "mine"


def test_a_target_that_is_none_is_told_before_the_data_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(XNNAttribution, "fit", lambda *_, **__: pytest.fail("it fits"))
    assert cli.main(arguments(folder, "--target", "0", "3", "--out", str(tmp_path))) == 1
    assert "target 3 is outside the model's outputs (3,)" in one_line(capsys)


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ("--layer", "setting 'layer' is missing; pass --layer NAME"),
        ("--target", "no targets given for a model"),
    ],
)
def test_what_is_left_out_is_asked_for(
    left_out: str, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(folder, "--out", str(tmp_path))
    at = command.index(left_out)
    assert cli.main(command[:at] + command[at + 2 :]) == 1
    assert said in one_line(capsys)
    assert cli.main(arguments(folder)) == 1
    assert "setting 'out' is missing; pass --out DIR" in one_line(capsys)


def test_explainers_of_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = (folder / "net.py").read_text().replace("bias.zero_()", "bias.fill_(1)")
    (tmp_path / "net.py").write_text(changed)
    command = ["--explainer", f"{folder}/xnn", "--data", f"{folder}/images", "--model", f"{tmp_path}/net.py"]
    assert cli.main(["evaluate", *command, "--quiet"]) == 1
    assert "the model differs" in one_line(capsys)
    assert cli.main(["evaluate", *command[:1], f"{tmp_path}/none", *command[2:], "--quiet"]) == 1
    assert f"has no explainer.json; fit explainers first, by captum-xnn fit --out {tmp_path}/none ..." in one_line(
        capsys
    )
    assert not (tmp_path / "none").exists()
    assert cli.main(["evaluate", "--explainer", f"{tmp_path}/none", "--data", f"{folder}/images"]) == 1
    assert "has no explainer.json" in one_line(capsys)
    assert cli.main(["explain", *command, "--heatmap", "DeepLIFT", "--out", str(tmp_path)]) == 1
    assert "near names: DeepLift" in one_line(capsys)


MODELS = """
import sys
import torch
from torch import nn


class Squeezed(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze()


def one():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 1))


def squeezed():
    return Squeezed(4, 3)


def pixels():
    return nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)))


def leaves():
    sys.exit(2)


def double():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.ReLU(), nn.Linear(4, 3)).double()
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("one", "outputs are (1,), and --target all needs classes; leave --target out"),
        ("squeezed", "output for 1 input has shape (3,), without a row for the input; return (N, ...) for any N"),
        ("pixels", "output for one input has shape (2, 3), and commands explain outputs (N,) or (N, C); let load()"),
        ("leaves", "SystemExit (2, line 26 of"),
    ],
)
def test_each_unusual_model_is_one_line(
    function: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(MODELS)
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(20, 4)))
    command = ["fit", "--model", f"{tmp_path}/net.py:{function}", "--data", f"{tmp_path}/table.npy", "--layer", "0"]
    assert cli.main([*command, "--target", "all", "--out", f"{tmp_path}/xnn", "--quiet"]) == 1
    assert said in one_line(capsys)


def test_a_model_in_double_precision_reads_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(MODELS)
    (tmp_path / "images").mkdir()
    draw = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8)).save(tmp_path / "images" / f"{i:02d}.png")
    model = ["--model", f"{tmp_path}/net.py:double", "--data", f"{tmp_path}/images"]
    assert cli.main(["fit", *model, "--layer", "2", "--target", "all", "--out", f"{tmp_path}/xnn", "--quiet"]) == 0
    assert (
        cli.main(
            [
                "explain",
                "--explainer",
                f"{tmp_path}/xnn",
                "--data",
                f"{tmp_path}/images/00.png",
                "--out",
                f"{tmp_path}/why",
            ]
        )
        == 0
    )
    image = torch.from_numpy(np.asarray(Image.open(tmp_path / "images" / "00.png")).transpose(2, 0, 1) / 255)
    net = load_model(f"{tmp_path}/net.py:double").model
    (line,) = lines(tmp_path / "why")
    said = line["bias"] + sum(line["contributions"])
    assert said == pytest.approx(net(image[None])[0, line["target"]].item(), abs=1e-6)


def test_arrays_in_the_other_byte_order(tmp_path: Path) -> None:
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "swapped.npy", numbers.astype(numbers.dtype.newbyteorder("S")))
    (batch,) = Inputs(tmp_path / "swapped.npy")
    assert batch.inputs.tolist() == numbers.tolist()


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_results_that_cannot_be_written_fail_before_the_work(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"captum_xnn.cli._{'evaluation' if command == 'evaluate' else command}.{command}", pytest.fail)
    (tmp_path / "table.md").mkdir()
    source = ["--explainer", f"{folder}/xnn"] if command == "evaluate" else [*arguments(folder)[1:3], "--layer", "1"]
    command_line = [command, *source, "--data", f"{folder}/images", "--target", "0"]
    assert cli.main([*command_line, "--out", f"{tmp_path}/table.md"]) == 1
    assert "table.md' is a folder, and a file is to be written; add the name of a file" in one_line(capsys)
    if command == "compare":
        assert cli.main([*command_line, "--out", f"{tmp_path}/x.md", "--figure", f"{tmp_path}/x.figure"]) == 1
        assert "x.figure' has an unknown ending; end the figure's name in .png, .pdf, .svg" in one_line(capsys)


def test_patches_of_a_single_row_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(MODELS)
    table = np.random.default_rng(0).normal(size=(20, 4))
    np.save(tmp_path / "table.npy", table)
    np.save(tmp_path / "row.npy", table[:1])
    fit = ["fit", "--model", f"{tmp_path}/net.py:one", "--data", f"{tmp_path}/table.npy", "--layer", "0"]
    assert cli.main([*fit, "--out", f"{tmp_path}/xnn", "--n-features", "1", "--quiet"]) == 0
    capsys.readouterr()
    evaluate = ["evaluate", "--explainer", f"{tmp_path}/xnn", "--data", f"{tmp_path}/row.npy", "--quiet"]
    assert cli.main([*evaluate, "--patches"]) == 1
    assert "--data is 1 row, and" in one_line(capsys)
    assert cli.main(evaluate) == 0


def test_names_as_long_as_files_may_have(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".npy")
    replace_file(path, b"whole")
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["fit", "--seed", "x"], "invalid int value"),
        (["fit", "--recipe", "steps"], "'steps' is not NAME=VALUE; write it like steps=500"),
        (["fit", "--recipe", "steps=many"], "the value in 'steps=many' is not a number"),
        (["fit", "--lair", "3"], "unrecognized arguments"),
        (["explain", "--data", "x", "--out", "y"], "the following arguments are required: --explainer"),
        (["explain", "--explainer", "x", "--out", "y"], "the following arguments are required: --data"),
        (["evaluate", "--explainer", "x"], "the following arguments are required: --data"),
    ],
)
def test_wrong_usage_gives_code_2(command: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(command)
    assert said in capsys.readouterr().err


def test_an_interruption_keeps_what_is_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_picture = _explain._write_picture

    def interrupted(path: Path, why: Any, index: int, title: str, names: Any) -> None:
        if path.name == "004.png":
            raise KeyboardInterrupt
        write_picture(path, why, index, title, names)

    monkeypatch.setattr(_explain, "_write_picture", interrupted)
    command = ["explain", "--explainer", f"{folder}/xnn", "--data", f"{folder}/images", "--out", str(tmp_path)]
    assert cli.main([*command, "--quiet"]) == 130
    assert capsys.readouterr().err == "captum-xnn: interrupted\n"
    assert [line["name"] for line in lines(tmp_path)] == ["even/000.png", "even/002.png"]
    assert len(list((tmp_path / "pictures").rglob("*"))) == 3


def test_an_interrupted_fit_leaves_the_old_explainers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(arguments(folder, "--out", str(tmp_path))) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(XNNAttribution, "fit", interrupted)
    assert cli.main(arguments(folder, "--out", str(tmp_path), "--seed", "9")) == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_traceback_shows_where(folder: Path) -> None:
    with pytest.raises(ValueError, match="setting 'out' is missing"):
        cli.main(["--traceback", *arguments(folder)])


def test_warnings_are_lines_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    def warned(*_: Any, **__: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("expected\n more", stacklevel=1)
        raise ValueError("expected no warning")

    monkeypatch.setattr(_fit, "fit", warned)
    assert cli.main(arguments(folder)) == 1
    assert capsys.readouterr().err == ("captum-xnn: warning: expected more\ncaptum-xnn: error: expected no warning\n")


@pytest.mark.parametrize("command", ["fit", "explain", "evaluate"])
def test_help_says_that_the_model_file_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert "The command runs the file as Python code" in " ".join(capsys.readouterr().out.split())


def test_as_a_module_in_processes_of_their_own(folder: Path, tmp_path: Path) -> None:
    def run(*more: str) -> str:
        command = [sys.executable, "-m", "captum_xnn", *more]
        # Sums are rounded by the number of threads, which another test of this process may have set.
        threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=threads).stdout

    fit = arguments(folder, "--seed", "3")
    assert "F_reg, training" in run(*fit, "--out", str(tmp_path))
    assert weights(tmp_path) == weights(folder / "xnn")
    assert "60 inputs. Written" in run("evaluate", "--explainer", str(tmp_path), "--data", f"{folder}/images")


@pytest.mark.parametrize("due", [False, True])
def test_history_store_and_curves(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, due: bool) -> None:
    """A fit that was cut off goes on, and its history is whole; nothing of the checkpoints stays.

    Also if another was cut off there, and whether or not there was time for a checkpoint.
    """
    from captum_xnn.training._trainer import Trainer

    take, out, store = Trainer._take, tmp_path / "out", tmp_path / "store"

    def cut(trainer: Trainer, *given: Any) -> None:
        if trainer.step == 40:
            raise KeyboardInterrupt
        take(trainer, *given)

    monkeypatch.setattr(Trainer, "_take", cut)
    monkeypatch.setattr("captum_xnn.training._checkpoint.Checkpoint.due", lambda _: due)
    line = arguments(folder, "--out", str(out), "--store", str(store), "--recipe", "steps=60")
    assert cli.main([*line, "--seed", "1"]) == 130
    assert cli.main(line) == 130
    assert (out / "checkpoint").is_dir() == due and not (out / "explainer.json").exists()
    monkeypatch.setattr(Trainer, "_take", take)
    assert cli.main(line) == 0
    whole = tmp_path / "whole"
    assert cli.main([*line, "--out", str(whole), "--store", str(tmp_path / "other")]) == 0
    weights = [next(path.glob("weights-*")).read_bytes() for path in (out, whole)]
    assert weights[0] == weights[1]
    history = [(path / "history.jsonl").read_text() for path in (out, whole)]
    assert history[0] == history[1] and len(set(history[0].splitlines())) == 3 * 60
    assert not (out / "checkpoint").exists()
    assert np.load(next(store.rglob("*.npy"))).ndim >= 1


@pytest.mark.slow
def test_processes_of_torchrun_do_it_together_and_one_of_them_speaks(folder: Path, tmp_path: Path) -> None:
    def run(count: int) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += ["-m", "captum_xnn", *arguments(folder, "--out", f"{tmp_path}/{count}", "--batch-size", "10")]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=threads).stdout

    said = [run(count) for count in (1, 2)]
    assert [text.count("Written") for text in said] == [1, 1]
    model, x = load_model(f"{folder}/net.py").model, torch.rand(9, 3, 6, 6)
    one, two = (XNNAttribution.load(tmp_path / str(count), model) for count in (1, 2))
    assert list(one.explainers_) == list(two.explainers_) == [("1", (t,)) for t in range(3)]
    for t in range(3):
        a, b = (xnn.explain(x, target=t).features for xnn in (one, two))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_what_else_is_in_the_folder_stays(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "checkpoint" / "model.pth"
    mine.parent.mkdir()
    mine.write_text("weeks of training")
    assert cli.main(arguments(folder, "--out", str(tmp_path))) == 0
    assert mine.read_text() == "weeks of training"
    assert [path.name for path in mine.parent.iterdir()] == ["model.pth"]


def test_report_of_a_folder_of_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted, page = tmp_path / "fitted", tmp_path / "why.html"
    assert cli.main(arguments(folder, "--out", str(fitted))) == 0
    (tmp_path / "few").mkdir()
    write(tmp_path / "few", count=6)
    (tmp_path / "names.json").write_text(
        json.dumps({"captum_xnn": "names", "version": 1, "layer": "1", "names": {"0": {"0": "redness"}}})
    )
    line = ["report", "--explainer", str(fitted), "--data", str(tmp_path / "few" / "images"), "--out", str(page)]
    line += ["--target", "0", "--title", "Why red?", "--heatmap", "InputXGradient", "--quiet"]
    capsys.readouterr()
    assert cli.main([*line, "--names", str(tmp_path / "names.json")]) == 0
    assert capsys.readouterr().out == f"Open this: {page}\n"
    text = page.read_text("utf-8")
    assert "<h1>Why red?</h1>" in text and "redness" in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    seeds, below = [0, 2, 4, 1, 3, 5], tmp_path / "few" / "images"
    names = [path.relative_to(below).as_posix() for path in sorted(below.rglob("*")) if path.is_file()]
    assert [image["caption"] for image in data["images"]] == names
    (target,) = data["targets"]
    assert target["label"] == "red"
    assert [row["prediction"] for row in target["rows"]] == pytest.approx([logits(seed)[0] for seed in seeds], abs=1e-3)
    # Without a damaged image the others keep their names and numbers, whatever its place.
    damaged = sorted(path for path in below.rglob("*") if path.is_file())[2]
    damaged.write_bytes(b"no image")
    assert cli.main([*line, "--skip-damaged"]) == 0
    page_without = json.loads(page.read_text("utf-8").split('id="data">')[1].split("</script>")[0])
    assert [image["caption"] for image in page_without["images"]] == names[:2] + names[3:]
    left = [row["prediction"] for row in page_without["targets"][0]["rows"]]
    assert left == pytest.approx([logits(seed)[0] for seed in seeds[:2] + seeds[3:]], abs=1e-3)
    assert cli.main([*line[:-1], "--data", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_groups_of_contributions_are_the_default_form(folder: Path, tmp_path: Path) -> None:
    """They give the model's outputs back, from the command line as from Python."""
    line = [
        argument for argument in arguments(folder, "--out", f"{tmp_path}/xnn") if argument not in ("--form", "srae")
    ]
    assert cli.main(line) == 0
    manifest = json.loads((tmp_path / "xnn" / "explainer.json").read_text())
    assert {entry["class"] for entry in manifest["explainers"]} == {"ContributionGroups"}
    made = load_model(f"{folder}/net.py")
    inputs = next(iter(Inputs(folder / "images", made.preparation))).inputs
    xnn = XNNAttribution.load(tmp_path / "xnn", made.model)
    for target in (0, 1, 2):
        why = xnn.contributions(inputs, target)
        with torch.no_grad():
            y_hat = made.model(inputs)[:, target]
        assert float((why.bias + why.contributions.sum(1) - y_hat).abs().mean()) < 0.01 * float(y_hat.std())


def test_explain_takes_the_names_of_a_report(folder: Path, tmp_path: Path) -> None:
    from captum_xnn.plots import write_names

    names = write_names(tmp_path / "names.json", {0: ["warm sky"]}, layer="1")
    run = ["explain", "--explainer", f"{folder}/xnn", "--data", f"{folder}/few/images", "--device", "cpu", "--quiet"]
    assert cli.main([*run, "--out", f"{tmp_path}/named", "--names", str(names)]) == 0
    assert cli.main([*run, "--out", f"{tmp_path}/plain"]) == 0
    changed = 0
    for named, plain in zip(lines(tmp_path / "named"), lines(tmp_path / "plain"), strict=True):
        mine = named["target"] == 0
        assert named["sentence"] == (
            plain["sentence"].replace("x-feature 1", "warm sky") if mine else plain["sentence"]
        )
        pictures = [(tmp_path / kind / named["picture"]).read_bytes() for kind in ("named", "plain")]
        assert (pictures[0] != pictures[1]) == mine
        changed += "warm sky" in named["sentence"]
    assert changed


def test_explain_with_names_into_the_same_folder_draws_no_map_anew(
    folder: Path, groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum_xnn.plots import write_names

    names = write_names(tmp_path / "names.json", {0: ["warm sky"], 2: ["night"]}, layer="1")
    data = tmp_path / "data"
    shutil.copytree(folder / "few" / "images", data)
    again = ["explain", "--explainer", f"{groups}", "--device", "cpu", "--quiet", "--data", f"{data}", "--out"]
    against = ["--against", "blue"]
    for more, others in (([], [["--heatmap", "DeepLift"], ["--target", "0"], against]), (against, [[]])):
        assert cli.main([*again, f"{tmp_path}/kept", *more]) == 0
        plain = lines(tmp_path / "kept")
        with monkeypatch.context() as blocked:
            blocked.setattr(XNNAttribution, "explain", None)
            assert cli.main([*again, f"{tmp_path}/kept", *more, "--names", str(names)]) == 0
            for other in others:  # other maps, other outputs
                with pytest.raises(TypeError, match="not callable"):
                    cli.main(["--traceback", *again, f"{tmp_path}/kept", *other])
        found = lines(tmp_path / "kept")
        assert [{**line, "sentence": ""} for line in found] == [{**line, "sentence": ""} for line in plain]
        assert any("warm sky" in line["sentence"] for line in found)
        assert cli.main([*again, f"{tmp_path}/fresh", *more, "--names", str(names)]) == 0
        for line in lines(tmp_path / "fresh"):
            assert line in found
            for file in (line["picture"], line["maps"]):
                assert (tmp_path / "kept" / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()
        shutil.rmtree(tmp_path / "fresh")
    changed = next(data.rglob("*.png"))
    Image.fromarray(pixels(7)).save(changed)
    with monkeypatch.context() as blocked:
        blocked.setattr(XNNAttribution, "explain", None)
        with pytest.raises(TypeError, match="not callable"):
            cli.main(["--traceback", *again, f"{tmp_path}/kept", *against])


def test_explain_refuses_names_of_another_layer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from captum_xnn.plots import write_names

    names = write_names(tmp_path / "names.json", {0: ["sky"]}, layer="3")
    run = ["explain", "--explainer", f"{folder}/xnn", "--data", f"{folder}/few/images", "--device", "cpu", "--quiet"]
    assert cli.main([*run, "--out", f"{tmp_path}/out", "--names", str(names)]) == 1
    assert "of layer '3', but the explained layer is '1'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def groups(folder: Path) -> Path:
    """Groups of contributions to two of three outputs."""
    fit = arguments(folder, "--form", "groups", "--target", "0", "2", "--out", f"{folder}/groups")
    steps = fit.index("--recipe")
    assert cli.main([*fit[:steps], *fit[steps + 3 :]]) == 0
    return folder / "groups"


def test_explain_against_another_output(folder: Path, groups: Path, tmp_path: Path) -> None:
    """The highest fitted output but the one to compare with; numbers add up to the difference of both."""
    run = ["explain", "--explainer", f"{groups}", "--data", f"{folder}/few/images", "--device", "cpu", "--quiet"]
    made = load_model(f"{folder}/net.py")
    inputs = next(iter(Inputs(folder / "few" / "images", made.preparation))).inputs
    with torch.no_grad():
        y_hat = made.model(inputs)
    names = made.classes or [f"target {i}" for i in range(3)]
    for against in (1, 2):
        assert cli.main([*run, "--against", str(against), "--out", f"{tmp_path}/{against}"]) == 0
        for line, y in zip(lines(tmp_path / str(against)), y_hat, strict=True):
            target = 0 if against == 2 or y[0] > y[2] else 2
            assert (line["target"], line["against"]) == (target, against)
            assert line["prediction"] == pytest.approx(float(y[target] - y[against]), abs=1e-4)
            assert line["bias"] + sum(line["contributions"]) == pytest.approx(line["surrogate"], abs=1e-4)
            assert f"{names[target]} rather than {names[against]}" in line["sentence"]
            assert (tmp_path / str(against) / line["picture"]).is_file()


def test_report_against_another_output(folder: Path, groups: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    run = ["report", "--explainer", f"{groups}", "--data", f"{folder}/few/images", "--device", "cpu", "--quiet"]
    assert cli.main([*run, "--target", "0", "--against", "1", "--out", f"{tmp_path}/report.html"]) == 0
    text = (tmp_path / "report.html").read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    labels = {row["rather"]["label"] for target in data["targets"] for row in target["rows"]}
    assert len(labels) == 1 and " rather than " in labels.pop()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--against", "0", "--target", "0"], "the only target is --against 0 itself"),
        (["--against", "7"], "target 7 is outside the model's outputs"),
        (["--against", "0-1"], "--against is '0-1', and not one output; pass the index"),
        (["--against", "all"], "--against is 'all', and not one output; pass the index"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "report"])
def test_commands_refuse_what_they_cannot_compare(
    folder: Path,
    groups: Path,
    tmp_path: Path,
    command: str,
    more: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = [command, "--explainer", f"{groups}", "--data", f"{folder}/few/images", "--device", "cpu", "--quiet"]
    assert cli.main([*run, "--out", f"{tmp_path}/out", *more]) == 1
    assert said in one_line(capsys)


def test_second_report_with_names_explains_nothing_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum_xnn.plots import write_names

    shutil.copytree(folder / "xnn", tmp_path / "xnn")
    run = ["report", "--explainer", f"{tmp_path}/xnn", "--data", f"{folder}/few/images", "--device", "cpu", "--quiet"]
    assert cli.main([*run, "--out", f"{tmp_path}/first.html"]) == 0
    names = write_names(tmp_path / "names.json", {0: ["warm sky"]}, layer="1")
    with monkeypatch.context() as blocked:
        blocked.setattr(XNNAttribution, "_explain_and_read", None)
        assert cli.main([*run, "--out", f"{tmp_path}/named.html", "--names", str(names)]) == 0
    assert cli.main([*run, "--out", f"{tmp_path}/anew.html", "--names", str(names), "--no-cache"]) == 0
    assert (tmp_path / "named.html").read_text() == (tmp_path / "anew.html").read_text()
    assert "warm sky" in (tmp_path / "named.html").read_text()


def test_output_names_have_one_suffix_unless_two_inputs_would_share_one() -> None:
    assert _explain._stems(["a/x.png", "b/x.jpg", "7"]) == {"a/x.png": "a/x", "b/x.jpg": "b/x", "7": "7"}
    assert _explain._stems(["x.png", "X.jpg", "y.v2.png"]) == {"x.png": "x.png", "X.jpg": "X.jpg", "y.v2.png": "y.v2"}
    third = ["x.jpg", "x.png", "x.jpg.png"]
    assert _explain._stems(third) == {name: name for name in third}


def test_class_is_named_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["explain", "--explainer", f"{folder}/xnn", "--data", f"{folder}/few/images", "--device", "cpu", "--quiet"]
    assert cli.main([*run, "--out", f"{tmp_path}/a", "--target", "Green"]) == 0
    assert {line["target"] for line in lines(tmp_path / "a")} == {1}
    (tmp_path / "names.txt").write_text("sky red\nsea green\nnight blue\n")
    named = ["--classes", f"{tmp_path}/names.txt"]
    assert cli.main([*run, "--out", f"{tmp_path}/b", "--target", "night", *named]) == 0
    found = lines(tmp_path / "b")
    assert {line["target"] for line in found} == {2} and all("night blue" in line["sentence"] for line in found)
    assert cli.main([*run, "--out", f"{tmp_path}/c", "--target", "gren"]) == 1
    assert "no class 'gren' among its 3 classes; near names: green" in capsys.readouterr().err
    assert cli.main([*run, "--out", f"{tmp_path}/d", "--classes", "3"]) == 1
    assert "is for --torchvision" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("sky red\nsea green\n")
    assert cli.main([*run, "--out", f"{tmp_path}/e", *named]) == 1
    assert "2 class names (sky red, sea green) were given for a model with 3 outputs" in capsys.readouterr().err


def test_fit_of_a_class_that_the_model_never_gives(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, greens = tmp_path / "data", 0
    data.mkdir()
    for path in sorted((folder / "images").rglob("*.png")):
        if int(logits(seed_of(f"/{path.name}")).argmax()) == 1:
            shutil.copy(path, data)
            greens += 1
    run = ["fit", "--model", f"{folder}/net.py", "--layer", "1", "--data", f"{data}", "--device", "cpu", "--quiet"]
    assert cli.main([*run, "--target", "blue", "--out", f"{tmp_path}/a"]) == 1
    said = one_line(capsys)
    assert f"the model gives class 2 (blue) to none of the {greens} inputs; it gives 1 (green) to {greens}. Add" in said
    assert "--target" in said and "torch.ones" not in said
    assert cli.main([*run, "--target", "1", "2", "--joint", "--out", f"{tmp_path}/b"]) == 0


def test_fit_prints_names_beside_numbers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(folder, "--out", f"{tmp_path}/a", "--quiet")) == 0
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines()[:4])
    assert header[:2] == ["target", "class"]
    assert [row[:2] for row in rows] == [["0", "red"], ["1", "green"], ["2", "blue"]]


def test_report_compares_with_another_fit(folder: Path, tmp_path: Path) -> None:
    assert cli.main(arguments(folder, "--out", f"{tmp_path}/again", "--seed", "4")) == 0
    run = ["report", "--explainer", f"{folder}/xnn", "--data", f"{folder}/few/images", "--device", "cpu", "--quiet"]
    run += ["--no-cache", "--target", "green", "--out"]
    assert cli.main([*run, f"{tmp_path}/r.html", "--again", f"{tmp_path}/again"]) == 0
    assert "The x-features of a second fit correlate with these by" in (tmp_path / "r.html").read_text()
    assert cli.main([*run, f"{tmp_path}/plain.html"]) == 0
    assert "x-features of a second fit correlate" not in (tmp_path / "plain.html").read_text()
