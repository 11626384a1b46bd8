"""The page on human studies: its commands are understood, and its settings are a study."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from captum_xnn import __main__ as cli
from captum_xnn.study import StudyConfiguration

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "study.rst").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"\.\. code-block:: {language}\n\n((?:   .*\n|\n)+)", PAGE)
    return [re.sub(r"(?m)^   ", "", block) for block in found]


def test_commands_are_understood() -> None:
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines() if line]
    commands = [line for line in lines if line[0] == "captum-xnn"]
    assert {line[2] for line in commands} == {
        "demo", "prepare", "serve", "static", "simulate", "export", "analyse", "withdraw",
    }  # fmt: skip
    for line in commands:
        assert cli._parser().parse_args(line[1:]).run


def test_settings_are_a_study(tmp_path: Path) -> None:
    study, arms, consent = blocks("toml")
    (tmp_path / "study.toml").write_text(consent + study + arms)
    found = StudyConfiguration.read(tmp_path / "study.toml")
    assert [d.name for d in found.datasets] == ["gulls", "cells"] and len(found.consent) == 4
    assert found.arms[0].stages == ("none", "single:DeepLift") and found.exclusions.min_trial_seconds == 5
    (tmp_path / "study.toml").write_text(study)
    assert [arm.stages for arm in StudyConfiguration.read(tmp_path / "study.toml").arms] == [
        ("none", f"single:{name}", "xnn") for name in ("ExcitationMaps", "Cam")
    ]


def test_pictures_are_there() -> None:
    for name in re.findall(r"image:: (\S+)", PAGE):
        assert (ROOT / "docs" / name).is_file()
