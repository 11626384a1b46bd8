"""Names of x-features: every form in which they come, the file that the report's page exports, and what is refused."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captum_xnn.errors import NamesFileError
from captum_xnn.plots import write_names
from captum_xnn.plots._names import names_by_target, read_names, resolve_names

# As the page writes it, to the letter.
EXPORTED = (
    '{"captum_xnn": "names", "version": 1, "layer": "relu6", '
    '"names": {"46": {"0": "golden feather", "1": "red forehead"}}}'
)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    path = tmp_path / "names.json"
    path.write_text(EXPORTED)
    return path


def changed(path: Path, **entries: Any) -> Path:
    path.write_text(json.dumps(json.loads(EXPORTED) | entries))
    return path


# Every form


def test_without_names_x_features_are_numbered_from_one() -> None:
    assert resolve_names(None, 3) == ["x-feature 1", "x-feature 2", "x-feature 3"]


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b", "c"],
        ("a", "b", "c"),
        np.array(["a", "b", "c"]),
        {0: "a", 1: "b", 2: "c"},
        {"2": "c", "1": "b", "0": "a"},
        {np.int64(0): "a", "1": "b", 2: "c"},
    ],
)
def test_lists_and_mappings_name_in_the_numbering_of_the_explainer(names: Any) -> None:
    assert resolve_names(names, 3) == ["a", "b", "c"]


@pytest.mark.parametrize("names", [["", "b"], [" \n", "b"], {1: "b"}, {"1": "b", "0": ""}])
def test_what_has_no_name_or_an_empty_one_keeps_its_number(names: Any) -> None:
    assert resolve_names(names, 3) == ["x-feature 1", "b", "x-feature 3"]


def test_names_stand_on_one_line_and_keep_all_else() -> None:
    assert resolve_names(["red\n  forehead\t ", '<b>"$x$" & \u7fbd</b>'], 2) == [
        "red forehead",
        '<b>"$x$" & \u7fbd</b>',
    ]


# The file


@pytest.mark.parametrize("as_path", [str, Path])
def test_the_exported_file_names_the_x_features_of_its_target(exported: Path, as_path: Any) -> None:
    names = resolve_names(as_path(exported), 3, target=46, layer="relu6")
    assert names == ["golden feather", "red forehead", "x-feature 3"]
    assert read_names(exported) == ("relu6", {"46": {0: "golden feather", 1: "red forehead"}})


def test_the_file_is_written_to_the_letter(tmp_path: Path, exported: Path) -> None:
    path = write_names(tmp_path / "new" / "n.json", {46: {1: "red forehead", "0": "golden feather"}}, layer="relu6")
    assert json.dumps(json.loads(path.read_text(encoding="utf-8"))) == EXPORTED
    assert list(path.parent.iterdir()) == [path]  # nothing half-written stays
    write_names(path, {46: exported, (1, 2): ["", "\u7fbd"]}, layer="relu6")
    assert json.loads(path.read_text(encoding="utf-8"))["names"] == {
        "46": {"0": "golden feather", "1": "red forehead"},
        "(1, 2)": {"1": "\u7fbd"},
    }
    assert resolve_names(path, 2, target=(1, 2)) == ["x-feature 1", "\u7fbd"]
    assert resolve_names(path, 2, target=46)[0] == "golden feather"


@pytest.mark.parametrize(("key", "target"), [("None", 0), ("0", None), ("None", None), ("0", 0)])
def test_the_only_output_of_a_model_is_none_or_zero(exported: Path, key: str, target: Any) -> None:
    assert resolve_names(changed(exported, names={key: {"0": "a"}, "7": {"0": "b"}}), 1, target=target) == ["a"]


def test_without_a_target_a_file_of_one_target_is_unambiguous(exported: Path) -> None:
    assert resolve_names(exported, 2) == ["golden feather", "red forehead"]
    two = changed(exported, names={"46": {"0": "a"}, "7": {"0": "b"}})
    with pytest.raises(
        NamesFileError, match=r".*names\.json' has names of 46, 7, and the x-features are of target None; name them"
    ):
        resolve_names(two, 2)


def test_a_byte_order_mark_is_no_error(exported: Path) -> None:
    exported.write_bytes(b"\xef\xbb\xbf" + EXPORTED.encode())
    assert resolve_names(exported, 1 + 1, target=46) == ["golden feather", "red forehead"]


# What is refused


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "b", "c"], ValueError, r"name 'c' is for number 2, and the x-features are 0 to 1; pass"),
        ({5: "a"}, ValueError, "name 'a' is for number 5, and the x-features are 0 to 1"),
        ({-1: "a"}, ValueError, "name 'a' is for number -1, and the x-features are 0 to 1"),
        ({"first": "a"}, ValueError, r"'first' is not the index of an x-feature, counted from 0; write"),
        ({0.5: "a"}, ValueError, r"0.5 is not the index of an x-feature, counted from 0"),
        ([None, "a"], TypeError, "the name None is not a string; write ''"),
        ({"46": {"0": "a"}}, TypeError, r"the name \{'0': 'a'\} is not a string"),
    ],
)
def test_wrong_names_are_refused(names: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        resolve_names(names, 2)


def test_a_file_of_another_layer_or_target_is_refused(exported: Path) -> None:
    with pytest.raises(
        NamesFileError, match=r".*names\.json' has names of layer 'relu6', and the x-features are of layer 'fc7'; pass"
    ):
        resolve_names(exported, 2, target=46, layer="fc7")
    with pytest.raises(
        NamesFileError, match=r"'.*names\.json' has names of 46, and the x-features are of target 7; name them in"
    ):
        resolve_names(exported, 2, target=7, layer="relu6")
    with pytest.raises(ValueError, match=r"name 'red forehead' is for number 1, and the x-features are 0 to 0"):
        resolve_names(exported, 1, target=46)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"captum_xnn": "explainer"},
            r"does not describe names, which have 'captum_xnn': 'names' and 'version': 1; export",
        ),
        ({"version": 2}, r"has version 2 instead of 1, as another version of captum_xnn wrote it; use that version"),
        ({"version": None}, r"has version None instead of 1"),
        ({"version": True}, r"has version True instead of 1"),
        ({"layer": 6}, r"has the layer 6 and names .*, and not names by target; export"),
        (
            {"names": ["golden feather"]},
            r"has the layer 'relu6' and names \['golden feather'\], and not names",
        ),
        (
            {"names": {"46": ["golden feather"]}},
            r"target 46 in '.*names\.json' has \['golden feather'\], and not names by the index of the",
        ),
        (
            {"names": {"46": {"0": 7}}},
            r"target 46 in '.*names\.json' has \{'0': 7\}, and not names by the index of the x-feature",
        ),
        (
            {"names": {"46": {"one": "a"}}},
            "'one' is not the index of an x-feature, counted from 0; .*; check target 46",
        ),
    ],
)
def test_other_json_is_refused(exported: Path, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(NamesFileError, match=message):
        read_names(changed(exported, **entries))


@pytest.mark.parametrize("data", [b"", b"{", EXPORTED[:60].encode(), b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_is_refused(exported: Path, data: bytes) -> None:
    exported.write_bytes(data)
    with pytest.raises(NamesFileError, match=r"names.json' is cut short, or is not JSON \(.*; export"):
        read_names(exported)


def test_other_json_types_are_refused(exported: Path) -> None:
    exported.write_text('["golden feather"]')
    with pytest.raises(NamesFileError, match="is JSON, but does not describe names"):
        read_names(exported)


def test_a_missing_file_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(NamesFileError, match=r"there is no JSON file of names at 'golden feather'; .* a list"):
        resolve_names("golden feather", 2)
    with pytest.raises(NamesFileError, match=r"cannot be read \(.*\); .* a list"):
        resolve_names(tmp_path, 2)
    with pytest.raises(NamesFileError, match="there is no JSON file of names at 'spot, spot"):
        resolve_names("spot, " * 1000, 2)  # longer than a path may be


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_names_may_come_through_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(EXPORTED,), daemon=True)
    writer.start()
    assert read_names(pipe).names == {"46": {0: "golden feather", 1: "red forehead"}}
    writer.join()


def test_names_without_their_target_are_refused_with_what_to_write(tmp_path: Path) -> None:
    said = r"names are given by target here, and 'spot' is no list.*write \{1: \{0: 'spot'\}\}, where 0 is x-feature 1"
    with pytest.raises(TypeError, match=said):
        names_by_target({0: "spot"}, "relu6", [1])
    with pytest.raises(TypeError, match="names are given by target here"):
        write_names(tmp_path / "names.json", {0: "spot"}, layer="relu6")
    assert not (tmp_path / "names.json").exists()
    # A file may hold the names of a target, and a file that is missing is an error about the file.
    path = write_names(tmp_path / "names.json", {1: {0: "spot"}}, layer="relu6")
    assert names_by_target({1: str(path)}, "relu6", [1]) == {"1": {0: "spot"}}
    with pytest.raises(NamesFileError, match="there is no JSON file"):
        names_by_target({1: "missing.json"}, "relu6", [1])
