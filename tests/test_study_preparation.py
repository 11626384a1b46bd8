"""What prepare draws and renders: balance, disjoint batches, sums that add up, nothing that gives classes away."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from study_made import SETTINGS, made, material

from captum_xnn import OneHeatmap
from captum_xnn.study import Arm, DatasetSettings, StudyConfiguration, prepare
from captum_xnn.study._prepared import PreparedStudy


@pytest.fixture(scope="module")
def study(explained: Any, tmp_path_factory: pytest.TempPathFactory) -> PreparedStudy:
    return made(tmp_path_factory.mktemp("study"), explained)


def media(study: PreparedStudy, key: str) -> list[dict[str, Any]]:
    return list(json.loads((study.folder / "media" / study.media(key)).read_text())["images"])


def pixels(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA"))


def test_batches_are_disjoint_and_balanced_by_the_models_answers(study: PreparedStudy, explained: Any) -> None:
    xnn, images, _ = explained
    says = xnn.model(images).argmax(1).tolist()
    for dataset in study.datasets.values():
        shown = [image for batch in dataset.batches for image in batch]
        assert len(shown) == len(set(shown)) == 15
        more = Counter()
        for batch in dataset.batches:
            given = Counter(dataset.given(batch))
            assert sorted(given.values()) == [2, 3]
            more[max(given, key=lambda c: given[c])] += 1
        assert sorted(more.values()) == [1, 2]  # the class with one more changes
        for image in dataset.images.values():
            assert image["given"] == says[row_of(image)] == image["label"]


def signed(uri: str) -> np.ndarray:
    """What a map shows: red above 0, blue below, the more opaque the farther."""
    drawn = pixels(uri).astype(float)
    return np.array(drawn[..., 3] * np.sign(drawn[..., 0] - drawn[..., 2])).ravel()


def row_of(facts: Any) -> int:
    return int(facts["source"].removeprefix("bar ").removesuffix(".png"))


def test_numbers_add_up_and_maps_have_the_signs_of_contributions(study: PreparedStudy, explained: Any) -> None:
    xnn, images, _ = explained
    dataset = study.datasets["gulls"]
    for image in dataset.images.values():
        assert image["bias"] + sum(image["contributions"]) == pytest.approx(image["surrogate"], abs=1e-4)
    for shown in media(study, "gulls/1/xnn/sort"):
        facts = dataset.images[shown["id"]]
        contributions = np.array(facts["contributions"])
        shares = [m["c"] for m in shown["maps"]]
        np.testing.assert_allclose(shares, contributions / abs(contributions).sum(), atol=1e-4)
        row = row_of(facts)
        raw = xnn.attribute(images[row : row + 1], target=facts["given"])[0].sum(1)
        why = xnn.explain(images[row : row + 1], target=facts["given"])
        for k, m in enumerate(shown["maps"]):
            # A gradient's map pulls the x-feature up where positive: it speaks for a negative value where negative.
            expected = raw[k] * np.sign(float(why.features[0, k])) * np.sign(contributions[k])
            assert np.corrcoef(signed(m["src"]), expected.numpy().ravel())[0, 1] > 0.8


def test_the_single_map_is_that_of_the_answers_own_output(study: PreparedStudy, explained: Any) -> None:
    xnn, images, _ = explained
    dataset = study.datasets["cells"]
    shown = media(study, "cells/0/single:InputXGradient/sort")[0]
    facts = dataset.images[shown["id"]]
    row = row_of(facts)
    heat = OneHeatmap(xnn.model, xnn.heatmap).attribute(images[row : row + 1], target=facts["given"])[0, 0].sum(0)
    (only,) = shown["maps"]
    assert "c" not in only
    assert np.corrcoef(signed(only["src"]), heat.numpy().ravel())[0, 1] > 0.8


def test_backends_with_settings_of_their_own_are_named_by_the_stage(explained: Any, tmp_path: Path) -> None:
    from captum.attr import LayerGradCam

    from captum_xnn.heatmaps import FromCaptum

    xnn, images, _ = explained
    grad_cam = FromCaptum(LayerGradCam, layer="0")
    one = replace(SETTINGS, datasets=SETTINGS.datasets[:1], arms=(Arm("a", ("single:Cam",)),), out=str(tmp_path))
    study = prepare(one, [material(explained)], heatmaps={"Cam": grad_cam})
    dataset = study.datasets["gulls"]
    for shown in media(study, "gulls/0/single:Cam/sort"):
        facts = dataset.images[shown["id"]]
        row = row_of(facts)
        heat = OneHeatmap(xnn.model, grad_cam).attribute(images[row : row + 1], target=facts["given"])[0, 0].sum(0)
        assert np.corrcoef(signed(shown["maps"][0]["src"]), heat.numpy().ravel())[0, 1] > 0.8
    with pytest.raises(ValueError, match=r"'Cam' does not exist.*near names"):
        prepare(one, [material(explained)])


def test_backends_in_the_file_are_those_of_python(explained: Any, tmp_path: Path) -> None:
    from captum.attr import IntegratedGradients, LayerGradCam, NoiseTunnel

    from captum_xnn.heatmaps import FromCaptum

    given = {
        "Cam": {"method": "LayerGradCam", "layer": "0"},
        "Path": {"method": "IntegratedGradients", "n_steps": 3, "method_": None},
        "Noise": {"method": "NoiseTunnel", "attribution_method": "IntegratedGradients", "n_steps": 3, "nt_samples": 2},
    }
    arms = (Arm("a", tuple(f"single:{name}" for name in given)),)
    one = replace(SETTINGS, datasets=SETTINGS.datasets[:1], arms=arms, out=str(tmp_path / "s"), backends=given)
    with pytest.raises(
        ValueError, match="settings do not fit the backend 'Path': IntegratedGradients has no setting 'method_'"
    ):
        prepare(one, [material(explained)])
    given["Path"].pop("method_")
    torch.manual_seed(0)
    from_file = prepare(one, [material(explained)])
    own = {
        "Cam": FromCaptum(LayerGradCam, layer="0"),
        "Path": FromCaptum(IntegratedGradients, n_steps=3),
        "Noise": FromCaptum(NoiseTunnel, attribution_method=IntegratedGradients, n_steps=3, nt_samples=2),
    }
    torch.manual_seed(0)
    from_python = prepare(replace(one, backends={}, out=str(tmp_path / "p")), [material(explained)], heatmaps=own)
    shown = [media(from_file, f"gulls/0/single:{name}/sort") for name in given]
    assert shown == [media(from_python, f"gulls/0/single:{name}/sort") for name in given]
    assert len({m["maps"][0]["src"] for images in shown for m in images}) == 15  # no two alike
    assert from_file.facts["backends"] == given


def test_stages_show_no_maps_but_their_own(study: PreparedStudy) -> None:
    assert all(shown["maps"] == [] for shown in media(study, "gulls/0/none/sort"))
    assert {len(shown["maps"]) for shown in media(study, "gulls/0/xnn/sort")} == {3}


def test_media_tell_no_class_no_name_and_no_number(study: PreparedStudy) -> None:
    for path in (study.folder / "media").iterdir():
        text = path.read_text()
        for told in ("given", "label", "bar ", "green", "contributions", "prediction", "gulls", "cells"):
            assert told not in text
        assert path.name.startswith("m-") and len(path.name) == 23


def test_the_same_seed_gives_the_same_study(study: PreparedStudy, explained: Any, tmp_path: Path) -> None:
    again = made(tmp_path, explained)
    assert again.facts == study.facts
    for name in study.facts["media"].values():
        assert (tmp_path / "media" / name).read_bytes() == (study.folder / "media" / name).read_bytes()


def test_too_few_images_are_told_with_their_number(explained: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the model gives class \d to 30 images of 'gulls', and .* need 4\d"):
        made(tmp_path, explained, batches=9, batch_images=10)


def test_a_study_that_has_begun_is_not_prepared_again(explained: Any, tmp_path: Path) -> None:
    made(tmp_path, explained)
    (tmp_path / "answers.sqlite").touch()
    with pytest.raises(ValueError, match="a study has begun in"):
        made(tmp_path, explained)


def test_hostile_names_of_files_are_kept_as_text(explained: Any, tmp_path: Path) -> None:
    found = material(explained)
    evil = tuple(f"=cmd|'/C calc'!A{i}<script>\udcff" for i in range(len(found.names)))
    one = replace(SETTINGS, datasets=SETTINGS.datasets[:1], out=str(tmp_path))
    study = prepare(one, [replace(found, names=evil)])
    assert all(i["source"].startswith("=cmd|") for i in study.datasets["gulls"].images.values())
    PreparedStudy.read(tmp_path)


def test_distinction_shows_maps_of_every_class_and_prediction_none_on_new_images(
    explained: Any, tmp_path: Path
) -> None:
    arms = (Arm("d", ("xnn",), "distinction"), Arm("p", ("none", "xnn"), "prediction"), Arm("a", ("xnn",), "agreement"))
    study = made(tmp_path, explained, arms=arms)
    dataset = study.datasets["gulls"]
    for shown in media(study, "gulls/0/xnn/distinction"):
        own, other = shown["options"] if dataset.images[shown["id"]]["given"] == 1 else shown["options"][::-1]
        assert own != other
        assert own == next(s for s in media(study, "gulls/0/xnn/agreement") if s["id"] == shown["id"])["maps"]
    assert all("maps" not in shown for shown in media(study, "gulls/0/xnn/prediction"))
    assert all(len(shown["maps"]) == 3 for shown in media(study, "gulls/examples/xnn/prediction"))
    assert all(shown["maps"] == [] for shown in media(study, "gulls/examples/none/prediction"))
    for shown in media(study, "gulls/0/xnn/agreement"):
        assert dataset.classes[shown["says"]] == dataset.images[shown["id"]]["given"]
    in_batches = {image for batch in dataset.batches for image in batch}
    assert len(dataset.examples) == 4 and not in_batches & set(dataset.examples)


def test_agreement_needs_true_classes(explained: Any, tmp_path: Path) -> None:
    one = replace(SETTINGS, datasets=SETTINGS.datasets[:1], arms=(Arm("a", ("xnn",), "agreement"),), out=str(tmp_path))
    with pytest.raises(ValueError, match="'gulls' has no true classes"):
        prepare(one, [material(explained, labels=False)])


def test_x_features_of_a_joint_explainer_are_the_same_for_all_classes(explained: Any, tmp_path: Path) -> None:
    from captum.attr import InputXGradient

    from captum_xnn import Recipe, XNNAttribution

    xnn, images, _ = explained
    joint = XNNAttribution(xnn.model, "4", n_features=2, heatmap=InputXGradient, recipe=Recipe(steps=50))
    joint.fit(images, target=(1, 2), joint=True, progress=False)
    one = replace(SETTINGS, datasets=SETTINGS.datasets[:1], out=str(tmp_path))
    study = prepare(one, [replace(material(explained), xnn=joint)])
    for image in study.datasets["gulls"].images.values():
        row = row_of(image)
        why = joint.explain(images[row : row + 1], target=[image["given"]])
        torch.testing.assert_close(torch.tensor(image["contributions"]), why.contributions[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"datasets": []}, "the study has no data set"),
        ({"titel": "x"}, "near names: title"),
        ({"batches": 2}, "ask for at least 3 batches"),
        ({"arms": [{"name": "a b", "stages": ["xnn"]}]}, "letters and digits"),
        ({"arms": [{"name": "a", "stages": ["xn"]}]}, "stages of arm 'a' are"),
        ({"arms": [{"name": "a", "stages": ["none"], "task": "distinction"}]}, "leave it out"),
        ({"arms": [{"name": "a", "stages": ["none"], "task": "guess"}]}, "task of arm 'a' is 'guess'"),
        ({"datasets": [{"name": "a", "explainer": "e", "data": "d", "classes": [1]}]}, "two or more outputs"),
        ({"datasets": [{"name": "a"}]}, "missing 3 required"),
        ({"seed": "x"}, "seed is 'x'; write a whole number"),
        ({"exclusions": {"min_practice_purity": 80}}, "min_practice_purity of the exclusions is 80"),
        ({"exclusions": {"min_trial_seconds": "5"}}, "min_trial_seconds of the exclusions is '5'"),
        ({"exclusions": {"failed_attention": 1}}, "must be true or false"),
        ({"backends": {"Cam": {"layer": "0"}}}, "not the name of a class; write method"),
        ({"backends": {"Cam": "LayerGradCam"}}, "write a table"),
        ({"backends": {"Grad-CAM": {"method": "LayerGradCam"}}}, "letters and digits"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], said: str) -> None:
    gulls = {"name": "gulls", "explainer": "e", "data": "d", "classes": [1, 2]}
    with pytest.raises(ValueError, match=said):
        StudyConfiguration.of({"datasets": [gulls], **settings})


def test_a_file_is_read_and_its_paths_count_from_it(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(
        'consent = """One.\n\nTwo."""\nheatmaps = ["Saliency"]\n[[datasets]]\nname = "gulls"\nexplainer = "e"\n'
        'data = "/abs"\nclasses = [1, 2]\n[exclusions]\nmin_practice_purity = 0.8\n'
    )
    found = StudyConfiguration.read(tmp_path / "study.toml", {"out": None})
    assert found.datasets == (DatasetSettings("gulls", str(tmp_path / "e"), "/abs", (1, 2)),)
    assert found.consent == ("One.", "Two.") and found.out == str(tmp_path / "study")
    assert found.arms == (Arm("Saliency", ("none", "single:Saliency", "xnn")),)
    assert found.exclusions.min_practice_purity == 0.8 and found.exclusions.failed_attention
