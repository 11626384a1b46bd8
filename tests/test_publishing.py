"""Files that a package index and a host of repositories read: versions agree, and addresses lead somewhere there."""

from __future__ import annotations

import re
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


def test_the_readme_names_pages_that_exist():
    for name in re.findall(r"`(docs/[^`*]+?\.rst)`", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name
