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
    r"go(?:es|ne)? on (?:from|with|in|to)\b",
    r"which (?:is|are) none",
    r"that (?:is|are) none",
    r"of which (?:each|neither|one|the first)",
    r"\b(?:is|are|been|be) told(?! (?:apart|from))",
    r"as it likes|as they like",
    r"which it would not",
    r"has not come to",
    r'"""Returns\b',
    r"expected .*\bgot\b",
    r"\bgot \{",
)
# Patterns of files, from the root, that people read. Pages that docs builds write are left out.
READ = ("captum_xnn/**/*.py", "captum_xnn/**/templates/*", "docs/**/*.rst", "docs/**/*.py", "*.md")
FILES = sorted(
    path
    for pattern in READ
    for path in ROOT.glob(pattern)
    if path.is_file() and not {"generated", "gallery", "tutorials", "_build"} & {*path.relative_to(ROOT).parts}
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
