"""Files that a package index and a host of repositories read: versions agree, and addresses lead somewhere there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from captum_xnn import __version__

ROOT = Path(__file__).resolve().parents[1]


def test_versions_agree():
    assert re.search(r"(?m)^version: (.+)$", (ROOT / "CITATION.cff").read_text())[1] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_the_page_on_an_index_has_no_relative_address():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (changed,) = settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    page = re.sub(changed["pattern"], changed["replacement"], text)
    assert len(page) < len(text)
    addresses = re.findall(r"\]\(([^)]*)\)", page)
    assert addresses and all(address.startswith("https://") for address in addresses)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="a source package has no .ci")
def test_a_release_has_the_addresses_of_its_repository(tmp_path):
    import tomllib

    source, site, tag = "https://host.example/us/xnn", "https://us.example/xnn/", "v1.2.3"
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, ROOT / ".ci/address", source, site, tag]
    subprocess.run(command, cwd=tmp_path, check=True)
    before = tomllib.loads((ROOT / "pyproject.toml").read_text())
    after = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    urls = after["project"].pop("urls")
    assert urls["Documentation"] == site and urls["Source"] == source and tag in urls["Changelog"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    hooks = after["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    (changed,) = hooks.pop("substitutions")
    page = re.sub(changed["pattern"], changed["replacement"], readme)
    (picture,) = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", page)
    assert picture.startswith(f"{source}/raw/{tag}/docs/") and (ROOT / picture.split(f"{tag}/")[1]).is_file()
    before["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"].pop("substitutions")
    assert after == before
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode and "already" in again.stderr


def test_the_readme_names_pages_that_exist():
    for name in re.findall(r"`(docs/[^`*]+?\.rst)`", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name
