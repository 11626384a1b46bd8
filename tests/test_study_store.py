"""The database: acknowledged once it is on the disk, each event once, one window at a time, nothing personal."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from captum_xnn.study._store import MovedError, StudyStore, UnknownLinkError, new_id

SORT = {"kind": "sort", "order": ["a", "b"], "groups": 2}
FINAL = {"kind": "final", "agents": []}
PLAN = {"steps": [{"kind": "consent"}, SORT, FINAL]}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StudyStore]:
    with StudyStore(tmp_path / "answers.sqlite") as opened:
        yield opened


def moved(name: str, step: int = 1) -> dict[str, Any]:
    return {"id": name, "step": step, "kind": "move", "at": 5, "data": {"to": [["a", 1]]}}


def test_a_session_from_link_to_end(store: StudyStore) -> None:
    (token,) = store.invite([PLAN])
    claimed = store.claim(token, "tab")
    assert claimed is not None and claimed.step == 0
    assert store.answer(token, "tab", 0, {"agreed": True}, 10).step == 1
    assert store.record(token, "tab", [moved("1"), moved("2")]) == 2
    after = store.answer(token, "tab", 1, {"groups": {"a": 1, "b": 2}}, 20, [moved("2"), moved("3")])
    assert after.step == 2 and after.finished is None
    done = store.answer(token, "tab", 2, {"agents": {}, "difficulty": 3, "comments": "\u2603"}, 30)
    assert done.finished is not None
    assert [e["id"] for e in store.events(done.id)] == ["1", "2", "3"]
    found = store.answers(done.id)
    assert [found[i]["at"] for i in range(3)] == [10, 20, 30] and found[2]["data"]["comments"] == "\u2603"
    for call in (lambda: store.record(token, "tab", [moved("4")]), lambda: store.answer(token, "tab", 2, {}, 1)):
        with pytest.raises(UnknownLinkError):
            call()
    assert store.claim(token, "other").finished is not None  # type: ignore[union-attr]
    assert store.participant(token).tab == "tab"  # type: ignore[union-attr]


def test_the_first_answer_to_a_step_counts_and_none_comes_before_its_turn(store: StudyStore) -> None:
    (token,) = store.invite([PLAN])
    store.claim(token, "tab")
    with pytest.raises(ValueError, match="the answer is to step 1, and the participant is at step 0"):
        store.answer(token, "tab", 1, {"groups": {"a": 1, "b": 1}}, 1)
    store.answer(token, "tab", 0, {"agreed": True}, 1)
    store.answer(token, "tab", 1, {"groups": {"a": 1, "b": 1}}, 1)
    again = store.answer(token, "tab", 1, {"groups": {"a": 2, "b": 2}}, 1)
    assert again.step == 2
    assert store.answers(again.id)[1]["data"] == {"groups": {"a": 1, "b": 1}}


def test_a_wrong_answer_stores_nothing_not_even_its_events(store: StudyStore) -> None:
    (token,) = store.invite([PLAN])
    store.claim(token, "tab")
    with pytest.raises(ValueError, match="did not consent"):
        store.answer(token, "tab", 0, {"agreed": False}, 1, [moved("1", 0)])
    participant = store.participant(token)
    assert participant is not None and participant.step == 0 and store.events(participant.id) == []


def test_only_the_window_that_claimed_last_may_answer(store: StudyStore) -> None:
    (token,) = store.invite([PLAN])
    store.claim(token, "first")
    store.claim(token, "second")
    with pytest.raises(MovedError):
        store.record(token, "first", [moved("1")])
    with pytest.raises(MovedError):
        store.answer(token, "first", 0, {"agreed": True}, 1)
    assert store.answer(token, "second", 0, {"agreed": True}, 1).step == 1


@pytest.mark.parametrize(
    "event",
    [
        None,
        {**moved("1"), "kind": "steal"},
        {**moved("1"), "id": ""},
        {**moved("1"), "id": "x" * 65},
        {**moved("1"), "at": -1},
        {**moved("1"), "at": 1.5},
        {**moved("1"), "step": True},
        {**moved("1"), "data": "x" * 7000},
    ],
)
def test_malformed_events_are_refused_with_all_that_came_along(store: StudyStore, event: Any) -> None:
    (token,) = store.invite([PLAN])
    store.claim(token, "tab")
    with pytest.raises(ValueError, match=r"events? (must be|needs|has)"):
        store.record(token, "tab", [moved("0"), event])
    assert store.events(store.participant(token).id) == []  # type: ignore[union-attr]


def test_threads_lose_nothing_and_one_bad_request_harms_no_other(store: StudyStore) -> None:
    tokens = store.invite([PLAN] * 20)
    refused = []

    def work(token: str) -> None:
        store.claim(token, "tab")
        for i in range(25):
            store.record(token, "tab", [moved(str(i))])
            try:
                store.answer(token, "tab", 0, {"agreed": False}, 1)
            except ValueError:
                refused.append(1)

    threads = [threading.Thread(target=work, args=(token,)) for token in tokens]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 500
    assert [len(store.events(p.id)) for p in store.participants()] == [25] * 20


def test_another_process_may_add_participants_meanwhile(store: StudyStore) -> None:
    (first,) = store.invite([PLAN])
    store.claim(first, "tab")
    with StudyStore(store.path) as other:
        (second,) = other.invite([PLAN])
        assert other.withdraw(other.participants()[0].id)
    assert store.participant(first) is None
    assert store.claim(second, "tab").slot == 1  # type: ignore[union-attr]
    with pytest.raises(UnknownLinkError):
        store.record(first, "tab", [moved("1")])


def test_what_was_acknowledged_is_on_the_disk_already(store: StudyStore) -> None:
    (token,) = store.invite([PLAN])
    store.claim(token, "tab")
    assert store.record(token, "tab", [moved("1")]) == 1
    with sqlite3.connect(store.path) as other:
        assert other.execute("SELECT id FROM events").fetchall() == [("1",)]
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()


def test_withdrawing_deletes_every_trace_from_the_file(store: StudyStore) -> None:
    first, second = store.invite([PLAN] * 2)
    for token, secret in ((first, "ELEPHANT"), (second, "OSTRICH")):
        store.claim(token, "tab")
        store.answer(token, "tab", 0, {"agreed": True}, 1)
        store.answer(token, "tab", 1, {"groups": {"a": 1, "b": 1}}, 1, [{**moved("1"), "data": secret * 40}])
        store.answer(token, "tab", 2, {"agents": {}, "difficulty": 3, "comments": secret * 300}, 1)
    gone = store.participant(first)
    assert gone is not None and store.withdraw(gone.id) and not store.withdraw(gone.id)
    assert store.participant(first) is None and store.answers(gone.id) == {} and store.events(gone.id) == []
    assert len(store.answers(store.participant(second).id)) == 3  # type: ignore[union-attr]
    on_disk = b"".join(path.read_bytes() for path in store.path.parent.iterdir())
    assert b"ELEPHANT" not in on_disk and gone.id.encode() not in on_disk and b"OSTRICH" in on_disk
    assert store.fact("withdrawn") == "1"
    assert store.free_slots(2) == [0, 2]


def test_tokens_are_not_in_the_file(store: StudyStore) -> None:
    tokens = store.invite([PLAN] * 3)
    for token in tokens:
        store.claim(token, "tab")
    on_disk = b"".join(path.read_bytes() for path in store.path.parent.iterdir())
    assert all(token.encode() not in on_disk for token in tokens)
    assert len(set(tokens)) == 3 and all(len(token) >= 32 for token in tokens)
    assert len({new_id() for _ in range(1000)}) == 1000


def test_a_participant_is_stored_without_anything_personal(store: StudyStore) -> None:
    rows = sqlite3.connect(store.path).execute("SELECT name FROM pragma_table_info('participants')").fetchall()
    assert {name for (name,) in rows} == {"id", "token", "slot", "plan", "step", "tab", "started", "finished"}
