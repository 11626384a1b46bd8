"""Phrases that have made readers read a sentence twice do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BANNED = (
    r"whoever",
    r"nobody",
    r"slip of the pen",
    r"knows? better",
    r"go(?:es|ne)? on (?:from|with)",
    r"which (?:is|are) none",
    r"that (?:is|are) none",
    r"of which (?:each|neither|one|the first)",
    r"(?:is|are) told",
    r"as it likes|as they like",
    r"which it would not",
    r"has not come to",
    r'"""Returns\b',
    r"expected .*\bgot\b",
    r"\bgot \{",
)
FILES = sorted(
    path
    for folder, pattern in (("captum_xnn", "*.py"), ("docs", "*.rst"), (".", "README.md"), (".", "CONTRIBUTING.md"))
    for path in (ROOT / folder).rglob(pattern)
    if folder != "." or path.parent == ROOT
    if not {"generated", "gallery"} & {*path.parts}
)


@pytest.mark.parametrize("phrase", BANNED)
def test_phrases_that_confused_readers(phrase):
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(phrase, line)
    ]
    assert not found, f"rewrite {', '.join(found[:5])}; see CONTRIBUTING.md"
