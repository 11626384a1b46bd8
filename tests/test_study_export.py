"""The exported folder: every answer is there, every column described, and no text is a formula or somebody's id."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from study_made import answer_to, made

from benchmarks.human_study import by_hand

pytest.importorskip("flask")

from captum_xnn.study._export import COLUMNS, export, guarded, load_answers, unguarded
from captum_xnn.study._prepared import PreparedStudy
from captum_xnn.study._server import invite
from captum_xnn.study._store import ANSWERS_FILE, StudyStore

EVIL = '=HYPERLINK("http://x","y")\n<script>alert(1)</script>'


def read(folder: Path, table: str) -> list[dict[str, str]]:
    (path,) = (folder / "data").glob(f"study-*_description-{table}_data.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def answered(explained: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedStudy, Path, list[Any]]:
    """A study with one who finished, one who stopped, one who never came, and one who withdrew; and its export."""
    folder = tmp_path_factory.mktemp("study")
    study = made(folder, explained, title="Bars, =1+1")
    with StudyStore(folder / ANSWERS_FILE) as store:
        tokens = invite(study, store, 4)
        for person, (token, last) in enumerate(zip(tokens, (99, 6, 0, 99), strict=True)):
            steps = store.participant(token).steps
            if last:
                store.claim(token, "t")
            for number, step in enumerate(steps[:last]):
                events = [
                    {"id": f"{number}m", "step": number, "kind": "move", "at": 1500, "data": {"to": [[i, 2], [i, 1]]}}
                    for i in step.get("order", [])[:1]
                ]
                odd = {"id": f"{number}o", "step": number, "kind": "fill", "at": 9, "data": {"value": "=evil"}}
                draft = {**odd, "id": f"{number}d", "data": {"name": "comments", "value": "I am Jane Doe"}}
                forged = [
                    {**odd, "id": f"{number}f{i}", "kind": kind, "data": data}
                    for i, (kind, data) in enumerate((
                        ("inspect", {"image": "=1+1"}), ("compare", {"images": ["@SUM(1)", "\t=2"]}),
                        ("move", {"to": [["+3", "-4"]]}), ("select", {"image": {"=5": 1}, "on": "=6"}),
                    ))
                ]  # fmt: skip
                sent = [*events, odd, draft, *(forged if step["kind"] == "consent" else ())]
                store.answer(token, "t", number, answer_to(step, comments=EVIL), 30_000 + person, sent)
        people = store.participants()
        store.withdraw(people[3].id)
    out = export(folder, folder / "export")
    return study, out, people


def test_names_of_files_and_description_are_those_of_psych_ds(answered: Any) -> None:
    _, out, _ = answered
    files = sorted(path.name for path in (out / "data").iterdir())
    assert files == sorted(f"study-bars11_description-{table}_data.csv" for table in COLUMNS)
    # The expression of the specification, with keywords that it knows.
    rule = r"([a-z]+-[a-zA-Z0-9]+)(_[a-z]+-[a-zA-Z0-9]+)*_data\.csv"
    assert all(
        re.fullmatch(rule, name) and {"study", "description"} == set(re.findall(r"([a-z]+)-", name)) for name in files
    )
    described = json.loads((out / "dataset_description.json").read_text())
    assert described["@type"] == "Dataset" and described["@context"] == "https://schema.org/"
    assert described["name"] and described["description"]
    named = {variable["name"]: variable for variable in described["variableMeasured"]}
    for table, columns in COLUMNS.items():
        with next((out / "data").glob(f"*-{table}_data.csv")).open(newline="") as file:
            header = next(csv.reader(file))
        assert header == list(columns) and set(header) <= set(named)
    assert all(len(v["description"]) > 10 and v["@type"] == "PropertyValue" for v in named.values())
    assert len(named) == len(described["variableMeasured"])
    in_files = {name for columns in COLUMNS.values() for name in columns}
    assert set(named) == in_files


def test_files_keep_to_the_written_rules_of_psych_ds(answered: Any) -> None:
    _, out, _ = answered
    # Rules of psych-ds.github.io/psych-DS: a README, data/ with CSV files in UTF-8 of as many cells in every row as the
    # header has, headers that are unique and not empty, and a description whose context is schema.org.
    assert (out / "README.md").read_text().startswith("Answers of a human study")
    described = json.loads((out / "dataset_description.json").read_bytes().decode("utf-8"))
    required = {"@context", "@type", "name", "description", "variableMeasured"}
    assert required <= set(described) and re.fullmatch(r"https?://schema\.org/?", described["@context"])
    assert all(isinstance(described[name], str) and described[name].strip() for name in required - {"variableMeasured"})
    variables = {v if isinstance(v, str) else v["name"] for v in described["variableMeasured"]}
    files = list(out.rglob("*.csv"))
    assert files and all(path.parent == out / "data" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not content.startswith(b"\xef\xbb\xbf") and b"\0" not in content
        header, *rows = csv.reader(content.decode("utf-8").splitlines(keepends=True), strict=True)
        assert rows and all(header) and len(set(header)) == len(header) and set(header) <= variables
        assert {len(row) for row in rows} == {len(header)}, path.name


def test_every_answer_is_there_once(answered: Any) -> None:
    study, out, people = answered
    participants = read(out, "participants")
    assert [(p["participant"], p["finished"]) for p in participants] == [("p001", "1"), ("p002", "0")]
    done = [
        [s for s in people[0].steps if s["kind"] == "sort"],
        [s for s in people[1].steps[:6] if s["kind"] == "sort"],
    ]
    trials = read(out, "trials")
    assert [t["participant"] for t in trials] == ["p001"] * 6 + ["p002"] * len(done[1])
    assert [(t["stage"], t["heatmap"], t["dataset"], int(t["batch"])) for t in trials[:6]] == [
        (*(s["stage"].partition(":")[::2]), s["dataset"], s["batch"]) for s in done[0]
    ]
    assert [float(t["seconds"]) for t in trials[:6]] == [30.0] * 6
    placements = read(out, "placements")
    assert len(placements) == 5 * len(trials) and {p["answer"] for p in placements} == {"1"}
    for row in placements:
        facts = study.datasets[row["dataset"]].images[row["image"]]
        assert int(row["given"]) == facts["given"] and int(row["label"]) == facts["label"]
        assert study.datasets[row["dataset"]].classes[int(row["given_place"])] == facts["given"]
    ratings = [r for r in read(out, "ratings") if r["participant"] == "p001"]
    assert sorted(r["question"] for r in ratings) == sorted(
        ["confidence"] * 6 + ["attention", "difficulty"] + ["performance"] * 2
    )
    assert {r["said"] for r in ratings if r["question"] == "confidence"} == {"Mediocre"}
    moves = [e for e in read(out, "events") if (e["participant"], e["event"]) == ("p001", "move") and e["step"] != "0"]
    assert len(moves) == 2 * 7 and {e["seconds"] for e in moves} == {"1.5"}


def test_contributions_sum_with_the_bias_to_the_surrogate(answered: Any) -> None:
    _, out, _ = answered
    contributions = read(out, "contributions")
    for image in read(out, "images"):
        own = [c for c in contributions if c["image"] == image["image"]]
        total = float(image["bias"]) + sum(float(c["contribution"]) for c in own)
        assert total == pytest.approx(float(image["surrogate"]), abs=1e-4)
        assert sum(abs(float(c["share"])) for c in own) == pytest.approx(1)


def test_texts_are_no_formulas_and_stay_whole(answered: Any) -> None:
    _, out, _ = answered
    (first, _) = read(out, "participants")
    assert first["comments"] == "'" + EVIL
    # Drafts of comments are left out: somebody may have taken their name back.
    assert {e["value"] for e in read(out, "events") if e["event"] == "fill"} == {"'=evil", ""}
    assert not any("Jane" in path.read_text() for path in out.rglob("*.*"))
    for path in (out / "data").iterdir():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                for cell in row:
                    if cell[:1] in tuple("=+-@\t\r"):
                        float(cell)  # numbers alone may begin so


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\t=1", "\r=1", " =1", "\n=1", "\N{FULLWIDTH EQUALS SIGN}1"])
def test_what_a_spreadsheet_would_run_is_guarded(text: str) -> None:
    assert guarded(text) == f"'{text}"
    assert guarded(f"a{text}") == f"a{text}"


def test_hostile_names_of_files_stay_text(tmp_path: Path) -> None:
    study = by_hand(tmp_path)
    evil = ["=cmd|' /C calc'!A0.png", "@SUM(1+1).png", '",=1,"\n=2.png', "<script>x.png", "-2+3.png"]
    for dataset in study.facts["datasets"]:
        for i, image in enumerate(dataset["images"]):
            image["source"] = evil[i % 5]
    study.write()
    out = export(tmp_path, tmp_path / "export")
    shown = [row["source"] for row in read(out, "images")]
    assert {unguarded(name) for name in shown} == set(evil)
    assert all(name[0] not in "=+-@" for name in shown)


def test_ids_for_withdrawal_are_not_exported_and_those_who_withdrew_are_gone(answered: Any) -> None:
    _, out, people = answered
    everything = "".join(p.read_text() for p in out.rglob("*") if p.is_file())
    assert not any(person.id in everything for person in people)
    assert "p004" not in everything
    assert json.loads((out / "materials" / "design.json").read_text())["withdrawn"] == 1


def test_answers_of_a_static_study_are_merged_once_and_forged_ones_left_out(explained: Any, tmp_path: Path) -> None:
    study = made(tmp_path / "study", explained)
    sent = tmp_path / "sent"
    sent.mkdir()
    with StudyStore(study.folder / ANSWERS_FILE) as store:
        tokens = invite(study, store, 3)
        whole = [{"data": answer_to(s), "at": 1000} for s in store.participant(tokens[0]).steps]
        event = {"id": "1", "step": 4, "kind": "move", "at": 3, "data": {"to": []}}
        good = {"captum_xnn": "answers", "version": 1, "session": tokens[0], "started": 5, "events": [event]}
        (sent / "a.json").write_text(json.dumps({**good, "answers": whole}))
        (sent / "b.json").write_text(json.dumps({**good, "answers": whole}))
        (sent / "c.json").write_text(json.dumps({**good, "session": "forged", "answers": whole}))
        bad = [*whole[:4], {"data": {"groups": {}}, "at": 1}]
        (sent / "d.json").write_text(json.dumps({**good, "session": tokens[1], "answers": bad}))
        (sent / "h.json").write_text(json.dumps({**good, "session": tokens[2], "answers": whole, "started": 10**30}))
        deep = "[" * 100_000 + "]" * 100_000
        for name, text in (("e", "{"), ("f", "[]"), ("g", '{"captum_xnn": "answers", "version": 1}'), ("i", deep)):
            (sent / f"{name}.json").write_text(text)
        loaded, left_out = load_answers(store, [sent])
        assert loaded == 1
        assert [told[:6] for told in left_out] == [f"{name}.json" for name in "bcdefghi"]
        assert "stored already" in left_out[0] and "unknown link" in left_out[1] and "group for every" in left_out[2]
        # Of a damaged file nothing is stored.
        assert store.answers(store.participant(tokens[1]).id) == {}
    out = export(study.folder, tmp_path / "export", answers=[sent])
    assert [p["participant"] for p in read(out, "participants")] == ["p001"]
