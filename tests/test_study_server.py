"""The running study over HTTP: links, states, pictures, forged requests, many at once, and a server that is killed."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import sqlite3
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from study_made import answer_to, made

pytest.importorskip("flask")
pytest.importorskip("waitress")

from captum_xnn.study._server import POLICY, invite, make_app, serve
from captum_xnn.study._store import ANSWERS_FILE, StudyStore


@pytest.fixture(scope="module")
def study(explained: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made(tmp_path_factory.mktemp("study"), explained)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StudyStore]:
    with StudyStore(tmp_path / ANSWERS_FILE) as opened:
        yield opened


@pytest.fixture
def client(study: Any, store: StudyStore) -> Any:
    return make_app(study, store).test_client()


def moved(name: str, step: int, image: str = "x") -> dict[str, Any]:
    return {"id": name, "step": step, "kind": "move", "at": 1, "data": {"to": [[image, 1]]}}


def contents(store: StudyStore) -> list[Any]:
    connection = sqlite3.connect(store.path)
    try:
        return [connection.execute(f"SELECT * FROM {t}").fetchall() for t in ("participants", "events", "answers")]
    finally:
        connection.close()


def test_a_whole_session_shows_each_step_once_and_ends(study: Any, store: StudyStore, client: Any) -> None:
    (token,) = invite(study, store, 1)
    page = client.get(f"/s/{token}")
    assert page.status_code == 200 and b"Bars" in page.data
    state = client.post(f"/s/{token}/claim", json={"tab": "t"}).get_json()
    steps = store.participant(token).steps
    kinds = []
    while "now" in state:
        now, number = state["now"], state["step"]
        kinds.append(now["kind"])
        if "media" in now:
            got = client.get(f"/s/{token}/media/{now['media']}").get_json()
            assert sorted(i["id"] for i in got["images"]) == sorted(now["order"])
        body = {"tab": "t", "step": number, "data": answer_to(steps[number]), "at": 5}
        state = client.post(f"/s/{token}/answer", json=body).get_json()
    part = ["intro", "sort", "sort", "confidence"]
    assert kinds == ["consent", "background", "practice", *part * 3, "final"]
    used = client.get(f"/s/{token}")
    assert used.status_code == 410 and b"has been used" in used.data


def test_moves_come_back_with_the_state(study: Any, store: StudyStore, client: Any) -> None:
    (token,) = invite(study, store, 1)
    client.post(f"/s/{token}/claim", json={"tab": "t"})
    sent = [moved("1", 0), moved("2", 0)]
    assert client.post(f"/s/{token}/events", json={"tab": "t", "events": sent}).get_json() == {"saved": 2}
    assert client.post(f"/s/{token}/events", json={"tab": "t", "events": sent}).get_json() == {"saved": 0}
    state = client.post(f"/s/{token}/claim", json={"tab": "u"}).get_json()
    assert [e["id"] for e in state["events"]] == ["1", "2"]
    late = client.post(f"/s/{token}/events", json={"tab": "t", "events": [moved("3", 0)]})
    assert late.status_code == 409
    assert late.get_json()["error"] == "the session continues in another window, which has taken over"


def test_unknown_used_and_forged_links_get_a_plain_page_and_change_nothing(
    study: Any, store: StudyStore, client: Any
) -> None:
    (token,) = invite(study, store, 1)
    client.post(f"/s/{token}/claim", json={"tab": "t"})
    for step, plan in enumerate(store.participant(token).steps):
        client.post(f"/s/{token}/answer", json={"tab": "t", "step": step, "data": answer_to(plan), "at": 1})
    before = contents(store)
    forged = [token[:-1], token + "A", token.swapcase(), "' OR 1=1 --", "%00", "..%2f..", "é", "x" * 5000]
    for bad in [token, *forged]:
        page = client.get(f"/s/{bad}")
        assert page.status_code == (410 if bad == token else 404)
        assert b"<script" not in page.data and page.mimetype == "text/html"
        for path, body in (
            ("claim", {"tab": "z"}),
            ("events", {"tab": "t", "events": [moved("9", 1)]}),
            ("answer", {"tab": "t", "step": 0, "data": {"agreed": True}, "at": 1}),
            ("withdraw", {"tab": "t", "id": store.participants()[0].id}),
        ):
            answered = client.post(f"/s/{bad}/{path}", json=body)
            assert answered.status_code in (404, 200 if (bad, path) == (token, "claim") else 404)
    assert contents(store) == before


def test_malformed_requests_are_refused_and_change_nothing(study: Any, store: StudyStore, client: Any) -> None:
    (token,) = invite(study, store, 1)
    client.post(f"/s/{token}/claim", json={"tab": "t"})
    before = contents(store)
    for path in ("claim", "events", "answer", "withdraw"):
        for body in (b"", b"{", b"[]", b'{"tab": 3}', b'{"tab": ""}', b'{"tab": "t", "events": 3}'):
            sent = client.post(f"/s/{token}/{path}", data=body, content_type="application/json")
            claims = path == "claim" and b'"t"' in body
            assert sent.status_code in ((200,) if claims else (400, 404))
        deep = b'{"tab": "t", "events": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        assert client.post(f"/s/{token}/{path}", data=deep, content_type="application/json").status_code == 400
        assert client.post(f"/s/{token}/{path}", data="tab=t").status_code == 400
        assert client.get(f"/s/{token}/{path}").status_code in (404, 405)
    too_long = client.post(f"/s/{token}/events", data=b"x" * 600_000, content_type="application/json")
    assert too_long.status_code in (400, 413)
    assert contents(store) == before


def test_only_pictures_of_the_step_at_hand_are_given(study: Any, store: StudyStore, client: Any) -> None:
    first, second = invite(study, store, 2)
    for token in (first, second):
        client.post(f"/s/{token}/claim", json={"tab": "t"})
        for step in range(4):
            data = answer_to(store.participant(token).steps[step])
            client.post(f"/s/{token}/answer", json={"tab": "t", "step": step, "data": data, "at": 1})
    for token in (first, second):
        participant = store.participant(token)
        own = participant.steps[participant.step]["media"]
        for name in study.facts["media"].values():
            assert client.get(f"/s/{token}/media/{name}").status_code == (200 if name == own else 404)
    for name in ("../study.json", "..%2fstudy.json", "study.json", "%2e%2e/answers.sqlite"):
        assert client.get(f"/s/{first}/media/{name}").status_code == 404


def test_two_participants_never_see_each_others_data(study: Any, store: StudyStore, client: Any) -> None:
    tokens = invite(study, store, 2)
    for token in tokens:
        client.post(f"/s/{token}/claim", json={"tab": "t"})
        client.post(f"/s/{token}/events", json={"tab": "t", "events": [moved("same", 0, token[:8])]})
    for token, other in (tokens, tokens[::-1]):
        said = client.post(f"/s/{token}/claim", json={"tab": "t"}).get_data(as_text=True)
        assert token[:8] in said and other[:8] not in said
        assert store.participant(other).id not in said
        # Nor may one delete the other.
        body = {"tab": "t", "id": store.participant(other).id}
        assert client.post(f"/s/{token}/withdraw", json=body).status_code == 404
    assert len(store.participants()) == 2


def test_withdrawing_on_the_page_deletes_ones_own_rows(study: Any, store: StudyStore, client: Any) -> None:
    first, second = invite(study, store, 2)
    client.post(f"/s/{first}/claim", json={"tab": "t"})
    own = store.participant(first).id
    assert client.post(f"/s/{first}/withdraw", json={"tab": "t", "id": own}).get_json() == {"withdrawn": True}
    assert client.get(f"/s/{first}").status_code == 404 and client.get(f"/s/{second}").status_code == 200


def test_pages_carry_a_policy_without_other_hosts_or_inline_code(study: Any, store: StudyStore, client: Any) -> None:
    (token,) = invite(study, store, 1)
    for path in ("/", f"/s/{token}", "/s/no", "/assets/study.js", "/assets/study.css", "/assets/other", "/nowhere"):
        answered = client.get(path)
        assert answered.headers["Content-Security-Policy"] == POLICY
        assert answered.headers["Referrer-Policy"] == "no-referrer"
        assert answered.headers["X-Content-Type-Options"] == "nosniff"
        assert answered.headers["Cache-Control"] == "no-store"
        assert "Set-Cookie" not in answered.headers
        if answered.mimetype == "text/html":
            assert " style=" not in answered.text and "http:" not in answered.text and "https:" not in answered.text
    assert "unsafe" not in POLICY and "http" not in POLICY and "*" not in POLICY


def test_neither_address_nor_browser_is_stored(study: Any, store: StudyStore, client: Any) -> None:
    (token,) = invite(study, store, 1)
    options = {"headers": {"User-Agent": "WALRUS"}, "environ_base": {"REMOTE_ADDR": "203.0.113.77"}}
    client.post(f"/s/{token}/claim", json={"tab": "t"}, **options)
    client.post(f"/s/{token}/events", json={"tab": "t", "events": [moved("1", 0)]}, **options)
    client.post(f"/s/{token}/answer", json={"tab": "t", "step": 0, "data": {"agreed": True}, "at": 1}, **options)
    on_disk = b"".join(path.read_bytes() for path in store.path.parent.iterdir())
    assert b"WALRUS" not in on_disk and b"203.0.113" not in on_disk


def test_hostile_titles_stay_text(explained: Any, tmp_path: Path) -> None:
    evil = "</title><script>alert(1)</script>\"'"
    study = made(tmp_path / "study", explained, title=evil, consent=(evil,))
    with StudyStore(tmp_path / ANSWERS_FILE) as store:
        client = make_app(study, store).test_client()
        (token,) = invite(study, store, 1)
        for path in ("/", f"/s/{token}", "/s/no"):
            assert "<script>alert" not in client.get(path).text
        assert client.post(f"/s/{token}/claim", json={"tab": "t"}).get_json()["now"]["paragraphs"] == [evil]


class Running:
    """A server in a process of its own, which may be killed at any moment."""

    def __init__(self, folder: Path, links: int = 0) -> None:
        read, write = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(read)
            try:
                serve(folder, port=0, links=links, announce=lambda *told: os.write(write, json.dumps(told).encode()))
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            self.address, self.links = json.loads(pipe.read1(1 << 20))
        self.port = int(self.address.rpartition(":")[2])

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


class Visitor:
    """A connection that asks as the page does."""

    def __init__(self, port: int, token: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.token = token

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def ask(self, path: str, **body: Any) -> Any:
        self.connection.request(
            "POST", f"/s/{self.token}/{path}", json.dumps({"tab": "t", **body}), {"Content-Type": "application/json"}
        )
        answered = self.connection.getresponse()
        text = answered.read()
        if answered.status != 200:
            raise OSError(f"{answered.status}: {text[:200]!r}")
        return json.loads(text)


forking = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


@posix
@forking
def test_it_listens_on_this_machine_alone_and_ends_cleanly(explained: Any, tmp_path: Path) -> None:
    made(tmp_path, explained)
    server = Running(tmp_path, links=2)
    try:
        assert server.address.startswith("http://127.0.0.1:") and len(server.links) == 2
        token = server.links[0].rpartition("/")[2]
        with Visitor(server.port, token) as visitor:
            assert visitor.ask("claim")["step"] == 0
    finally:
        server.kill()


@posix
@forking
@pytest.mark.slow
def test_fifty_at_once_are_answered_quickly_and_lose_nothing(explained: Any, tmp_path: Path) -> None:
    study = made(tmp_path, explained)
    server = Running(tmp_path, links=50)
    took: list[float] = []
    failed: list[str] = []

    def take_part(link: str, seed: int) -> None:
        pace = random.Random(seed)
        visitor = Visitor(server.port, link.rpartition("/")[2])

        def timed(path: str, **body: Any) -> Any:
            start = time.perf_counter()
            found = visitor.ask(path, **body)
            took.append(time.perf_counter() - start)
            return found

        try:
            time.sleep(pace.uniform(0, 1))
            state = timed("claim")
            while "now" in state:
                step, now = state["step"], state["now"]
                for i, image in enumerate(now.get("order", [])):
                    time.sleep(pace.uniform(0.1, 0.5))  # still several times as fast as people sort
                    timed("events", events=[moved(f"{step}-{i}", step, image)])
                data = answer_to({**now, "datasets": [d["name"] for d in now.get("datasets", [])],
                                  "agents": [a["name"] for a in now.get("agents", [])]})  # fmt: skip
                state = timed("answer", step=step, data=data, at=1)
        except Exception as error:
            failed.append(repr(error))
        visitor.connection.close()

    try:
        threads = [threading.Thread(target=take_part, args=(link, i)) for i, link in enumerate(server.links)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.kill()
    assert not failed
    with StudyStore(tmp_path / ANSWERS_FILE) as store:
        for participant in store.participants():
            assert participant.finished and len(store.answers(participant.id)) == len(participant.steps)
            sent = sum(len(s.get("order", [])) for s in participant.steps)
            assert len(store.events(participant.id)) == sent == 36
    print(f"{len(took)} answers, median {1000 * statistics.median(took):.1f} ms, worst {1000 * max(took):.0f} ms")
    assert statistics.median(took) < 0.1
    assert study.folder == tmp_path


@posix
@forking
@pytest.mark.slow
def test_killed_thirty_times_it_keeps_every_acknowledged_answer(explained: Any, tmp_path: Path) -> None:
    made(tmp_path, explained)
    server = Running(tmp_path, links=8)
    tokens = [link.rpartition("/")[2] for link in server.links]
    server.kill()
    pace = random.Random(0)
    acknowledged: dict[str, set[str]] = {token: set() for token in tokens}
    steps = dict.fromkeys(tokens, 0)

    def take_part(port: int, token: str, round_number: int) -> None:
        visitor = Visitor(port, token)
        try:
            state = visitor.ask("claim")
            number = 0
            while True:
                name = f"{round_number}-{number}"
                visitor.ask("events", events=[moved(name, 0)])
                acknowledged[token].add(name)
                number += 1
                if number == 8 and state["step"] < 12:  # now and then a whole step
                    now = state["now"]
                    data = answer_to({**now, "datasets": [d["name"] for d in now.get("datasets", [])]})
                    state = visitor.ask("answer", step=state["step"], data=data, at=1)
                    steps[token] = state["step"]
        except (OSError, http.client.HTTPException):
            visitor.connection.close()  # killed

    for round_number in range(30):
        server = Running(tmp_path)
        threads = [threading.Thread(target=take_part, args=(server.port, t, round_number)) for t in tokens]
        for thread in threads:
            thread.start()
        time.sleep(pace.uniform(0.05, 0.6))
        server.kill()
        for thread in threads:
            thread.join()
    with StudyStore(tmp_path / ANSWERS_FILE) as store:
        for token in tokens:
            participant = store.participant(token)
            assert participant is not None
            stored = [event["id"] for event in store.events(participant.id)]
            assert acknowledged[token] <= set(stored) and len(stored) == len(set(stored))
            assert participant.step >= steps[token]
            assert sorted(store.answers(participant.id)) == list(range(participant.step))
    assert sum(map(len, acknowledged.values())) > 300
    connection = sqlite3.connect(tmp_path / ANSWERS_FILE)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_links_made_by_two_processes_at_once_have_slots_of_their_own(
    study: Any, store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = StudyStore.free_slots
    raced = []

    def slow(self: StudyStore, count: int) -> list[int]:
        found = free(self, count)
        if not raced:
            raced.append(1)
            invite(study, store, 2)  # takes the same slots first
        return found

    monkeypatch.setattr(StudyStore, "free_slots", slow)
    assert len(invite(study, store, 3)) == 3
    assert [p.slot for p in store.participants()] == [0, 1, 2, 3, 4]
