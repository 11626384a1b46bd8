"""JSON files that this package reads: each damage has an error of the format's class with problem and remedy."""

import os

import pytest

from captum_xnn._files import Format, read_json
from captum_xnn.errors import StoreError

FORMAT = Format("toys", {"kind": "toy"}, ("schema", 2), ("colour", "size"), StoreError, "make a new toy")
WHOLE = '{"kind": "toy", "schema": 2, "colour": "red", "size": 3, "more": null}'


def test_all_entries_are_read(tmp_path):
    path = tmp_path / "toy.json"
    for text in (WHOLE, "\ufeff" + WHOLE):  # with the mark that editors on Windows put in front
        path.write_text(text, encoding="utf-8")
        assert FORMAT.read(path) == {"kind": "toy", "schema": 2, "colour": "red", "size": 3, "more": None}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WHOLE[:20], r"toy.json' is cut short, or is not JSON \(Unterminated.*\); make a new toy"),
        ("", r"is cut short, or is not JSON"),
        (b"\xff\xfe\x00", r"is cut short, or is not JSON"),
        ("[" * 100_000, r"is cut short, or is not JSON"),
        ("[1]", r"toy.json' is JSON, but does not describe toys, which have 'kind': 'toy' and 'schema': 2; make a new"),
        (WHOLE.replace('"toy"', '"game"'), r"does not describe toys"),
        (WHOLE.replace('"schema": 2, ', ""), r"does not describe toys"),
        (WHOLE.replace("2", "3"), r"has schema 3 instead of 2, as another version .* Otherwise make a new toy"),
        (WHOLE.replace("2", "true"), r"has schema True instead of 2"),
        (WHOLE.replace("colour", "color").replace("size", "sise"), r"toy.json' lacks colour, size; make a new toy"),
    ],
)
def test_each_damage_has_its_error(tmp_path, data, message):
    path = tmp_path / "toy.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(StoreError, match=message):
        FORMAT.read(path)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "nowhere" / "toy.json", tmp_path / "file" / "toy.json"):
        with pytest.raises(StoreError, match=r"(nowhere|file)' has no toy.json; make a new toy"):
            FORMAT.read(path)
    with pytest.raises(StoreError, match=rf"cannot be read \({os.strerror(21)}\); make a new toy"):
        FORMAT.read(tmp_path)  # a folder


def test_json_of_any_kind(tmp_path):
    (tmp_path / "list.json").write_text("[1, 2]")
    assert read_json(tmp_path / "list.json", StoreError, "") == [1, 2]
