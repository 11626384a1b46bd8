"""The answers of a study, in SQLite: an answer is acknowledged once it is on the disk.

Durability:
    The database is in WAL mode with ``synchronous=FULL``: a commit returns after the disk has the data. One thread
    writes. It commits the requests of many participants together, so fifty requests wait for one disk write, not fifty.
    A request is answered after that commit. Every event has its own id. A page that got no answer sends its events
    again, and the store keeps each only once.

Privacy:
    Rows belong to a random id. Of a link's token only the SHA-256 is stored. There is no column for a name, an address
    or a browser. Withdrawing deletes a participant's rows and overwrites them in the file (``secure_delete``).
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from captum_xnn.study._protocol import EVENTS, check_answer

__all__ = ["ANSWERS_FILE", "MovedError", "Participant", "StudyStore", "UnknownLinkError", "new_id"]

ANSWERS_FILE = "answers.sqlite"
"""Name of the database in the folder of a study."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS participants (
    id TEXT PRIMARY KEY,
    token BLOB NOT NULL UNIQUE,
    slot INTEGER NOT NULL UNIQUE,
    plan TEXT NOT NULL,
    step INTEGER NOT NULL DEFAULT 0,
    tab TEXT,
    started INTEGER,
    finished INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    participant TEXT NOT NULL REFERENCES participants ON DELETE CASCADE,
    id TEXT NOT NULL,
    step INTEGER NOT NULL,
    kind TEXT NOT NULL,
    at INTEGER NOT NULL,
    data TEXT NOT NULL,
    UNIQUE (participant, id)
) STRICT;
CREATE TABLE IF NOT EXISTS answers (
    participant TEXT NOT NULL REFERENCES participants ON DELETE CASCADE,
    step INTEGER NOT NULL,
    at INTEGER NOT NULL,
    saved INTEGER NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (participant, step)
) STRICT;
"""

# No look-alikes: no I, L, O, U, 0, 1.
_LETTERS = "23456789ABCDEFGHJKMNPQRSTVWXYZ"
_TOGETHER = 200
# What one participant may store: a page of a study sends a few hundred events.
_MOST_EVENTS = 20000
_LONGEST = 6000
# A comment of 5000 characters, each six in JSON at most, with its name.
_LONGEST_TEXT = 6 * 5000 + 100
_DAY = 86_400_000
_LATEST = 2**53

T = TypeVar("T")


class UnknownLinkError(LookupError):
    """Raised where a token belongs to no session, or to a finished session."""


class MovedError(RuntimeError):
    """Raised where a page sends answers after another window has taken over the session."""


@dataclass(frozen=True)
class Participant:
    """One participant, as the database knows them."""

    id: str
    slot: int
    plan: Mapping[str, Any]
    step: int
    """Number of the step they are at; that of all steps once they are done."""
    tab: str | None
    finished: int | None

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """All steps."""
        return list(self.plan["steps"])


def new_id() -> str:
    """Return a random id such as ``K7QX-29FD-MB3T``, of 58 bits.

    Example:
        >>> len(new_id())
        14
    """
    return "-".join("".join(secrets.choice(_LETTERS) for _ in range(4)) for _ in range(3))


class StudyStore:
    """The database of a study, for many threads of one process. Other processes may open it at the same time.

    Args:
        path: The file; created if missing.

    Raises:
        ValueError: If the file is no database.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, StudyStore(f"{folder}/answers.sqlite") as store:
        ...     (token,) = store.invite([{"steps": [{"kind": "consent"}]}])
        ...     store.participant(token).step, store.participant("forged")
        (0, None)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._guard = threading.Lock()
        self._closed = False
        try:
            self._connection().executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            for opened in self._opened:
                opened.close()
            raise ValueError(
                f"the database of answers {str(self.path)!r} cannot be opened ({error}); restore it from a "
                "backup, or name the folder of another study"
            ) from error
        self._jobs: queue.SimpleQueue[tuple[Callable[[sqlite3.Connection], Any], Future[Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="answers", daemon=True)
        self._writer.start()

    def __enter__(self) -> StudyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write all waiting events, and close the file."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._writer.join()
            with self._guard:
                for connection in self._opened:
                    connection.close()
                self._opened.clear()

    def fact(self, name: str) -> str | None:
        """Return a fact about the study, such as how many withdrew.

        Args:
            name: The fact.
        """
        row = self._connection().execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def invite(
        self, plans: Sequence[Mapping[str, Any]], *, slots: Sequence[int] | None = None, tokens: Sequence[str] = ()
    ) -> list[str]:
        """Add participants, and return the token of each participant's link. Tokens are stored nowhere.

        Args:
            plans: A plan for each participant, from :func:`captum_xnn.study._protocol.plan`.
            slots: Slot of each plan; None takes the next slots.
            tokens: Tokens to use; if empty, new random tokens.
        """
        new_tokens = list(tokens) or [secrets.token_urlsafe(24) for _ in plans]

        def work(connection: sqlite3.Connection) -> None:
            first = connection.execute("SELECT coalesce(max(slot) + 1, 0) FROM participants").fetchone()[0]
            for i, (given, token) in enumerate(zip(plans, new_tokens, strict=True)):
                slot = first + i if slots is None else slots[i]
                connection.execute(
                    "INSERT INTO participants (id, token, slot, plan) VALUES (?, ?, ?, ?)",
                    (new_id(), _digest(token), slot, json.dumps(given)),
                )

        self._write(work)
        return new_tokens

    def free_slots(self, count: int) -> list[int]:
        """Return the smallest free slots, including the slots of people who withdrew.

        Args:
            count: Number of slots.
        """
        taken = {row[0] for row in self._connection().execute("SELECT slot FROM participants")}
        found: list[int] = []
        slot = 0
        while len(found) < count:
            if slot not in taken:
                found.append(slot)
            slot += 1
        return found

    def participant(self, token: str) -> Participant | None:
        """Return the participant of a link; None if the token is unknown.

        Args:
            token: The token in the link, any text.
        """
        return _participant(self._connection(), token)

    def participants(self) -> list[Participant]:
        """Return all participants by slot."""
        rows = self._connection().execute(f"SELECT {_COLUMNS} FROM participants ORDER BY slot")
        return [_from_row(row) for row in rows]

    def claim(self, token: str, tab: str) -> Participant | None:
        """Let only this window send answers from now on, and return its participant.

        Args:
            token: Token of the link.
            tab: Random name that the window chose for itself.
        """

        def work(connection: sqlite3.Connection) -> Participant | None:
            connection.execute(
                "UPDATE participants SET tab = ?, started = coalesce(started, ?) WHERE token = ? AND finished IS NULL",
                (tab[:64], _now(), _digest(token)),
            )
            return _participant(connection, token)

        return self._write(work)

    def record(self, token: str, tab: str, events: Sequence[Any]) -> int:
        """Store each event once, and return the number of new events.

        Args:
            token: Token of the link.
            tab: The window that sends them.
            events: Events, each with ``id``, ``step``, ``kind``, ``at`` (milliseconds within the step) and ``data``.

        Raises:
            UnknownLinkError: If the token is unknown or its session is over.
            MovedError: If another window has claimed the session.
            ValueError: If an event is malformed.
        """
        checked = [_checked(event) for event in events]

        def work(connection: sqlite3.Connection) -> int:
            participant = _active(connection, token, tab)
            return _insert(connection, participant, checked)

        return self._write(work)

    def answer(self, token: str, tab: str, step: int, data: Any, at: int, events: Sequence[Any] = ()) -> Participant:
        """Store the answer to a step, and move the participant to the next step.

        An answer to an earlier step changes nothing: the first one counts.

        Args:
            token: Token of the link.
            tab: The window that sends it.
            step: Index of the step.
            data: The answer, of any kind.
            at: Milliseconds that the participant spent on the step.
            events: Events that were not stored yet.

        Raises:
            UnknownLinkError: If the token is unknown or its session is over.
            MovedError: If another window has claimed the session.
            ValueError: If the data are not an answer to the step, or the participant has not reached the step.
        """
        checked = [_checked(event) for event in events]

        def work(connection: sqlite3.Connection) -> Participant:
            participant = _active(connection, token, tab)
            _insert(connection, participant, checked)
            if type(step) is not int or step > participant.step:
                raise ValueError(
                    f"the answer is to step {str(step)[:20]}, and the participant is at step {participant.step}"
                )
            if step == participant.step:
                found = check_answer(participant.steps[step], data)
                _insert_answer(connection, participant, step, found, at)
            after = _participant(connection, token)
            assert after is not None
            return after

        return self._write(work)

    def load(
        self, token: str, answers: Sequence[Mapping[str, Any]], events: Sequence[Any], started: int
    ) -> Participant:
        """Store a whole session that a page without a server gathered.

        Args:
            token: Token of the session's link.
            answers: Answers in the order of the steps, each with ``at`` and ``data``.
            events: All events.
            started: Start of the session, in milliseconds since 1970.

        Raises:
            UnknownLinkError: If the token is unknown.
            ValueError: If anything is malformed, or the session is stored already.
        """
        checked = [_checked(event) for event in events]
        if not 0 <= started < _LATEST:
            raise ValueError(f"the time {str(started)[:20]} is not in milliseconds since 1970")

        def work(connection: sqlite3.Connection) -> Participant:
            participant = _participant(connection, token)
            if participant is None:
                raise UnknownLinkError("the answers are those of an unknown link, not of this study")
            if participant.step or participant.finished:
                raise ValueError(f"the session of {participant.id} is stored already")
            connection.execute("UPDATE participants SET started = ? WHERE id = ?", (int(started), participant.id))
            _insert(connection, participant, checked)
            for step, answer in enumerate(answers[: len(participant.steps)]):
                found = check_answer(participant.steps[step], answer.get("data"))
                _insert_answer(connection, participant, step, found, answer.get("at", 0))
            after = _participant(connection, token)
            assert after is not None
            return after

        return self._write(work)

    def events(self, participant: str, step: int | None = None) -> list[dict[str, Any]]:
        """Return a participant's events in order.

        Args:
            participant: Id of the participant.
            step: Index of a step; None takes all steps.
        """
        rows = self._connection().execute(
            "SELECT id, step, kind, at, data FROM events WHERE participant = ? AND step = coalesce(?, step) "
            "ORDER BY number",
            (participant, step),
        )
        return [{"id": i, "step": s, "kind": k, "at": at, "data": json.loads(d)} for i, s, k, at, d in rows]

    def answers(self, participant: str) -> dict[int, dict[str, Any]]:
        """Return a participant's answers by step, each with ``data``, ``at`` and ``saved``.

        Args:
            participant: Id of the participant.
        """
        rows = self._connection().execute(
            "SELECT step, data, at, saved FROM answers WHERE participant = ? ORDER BY step", (participant,)
        )
        return {step: {"data": json.loads(data), "at": at, "saved": saved} for step, data, at, saved in rows}

    def withdraw(self, participant: str) -> bool:
        """Delete everything of a participant, and return whether there was one.

        Args:
            participant: Id of the participant.
        """

        def work(connection: sqlite3.Connection) -> bool:
            found = connection.execute("DELETE FROM participants WHERE id = ?", (participant,)).rowcount > 0
            if found:
                connection.execute(
                    "INSERT INTO facts VALUES ('withdrawn', '1') "
                    "ON CONFLICT (name) DO UPDATE SET value = CAST(CAST(value AS INTEGER) + 1 AS TEXT)"
                )
            return found

        found = self._write(work)
        if found:
            # Until a checkpoint, the log beside the database still holds the rows.
            self._connection().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return found

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            with self._guard:
                self._opened.append(connection)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")
            self._local.connection = connection
        return connection

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do the work, and return its result after the commit."""
        done: Future[T] = Future()
        if self._closed:
            raise RuntimeError("the database is closed")
        self._jobs.put((work, done))
        return done.result()

    def _write_all(self) -> None:
        connection = self._connection()
        while True:
            job = self._jobs.get()
            jobs = []
            last = job is None
            while job is not None:
                jobs.append(job)
                if len(jobs) >= _TOGETHER or self._jobs.empty():
                    break
                job = self._jobs.get()
                last = last or job is None
            _commit(connection, jobs)
            if last:
                return


def _commit(
    connection: sqlite3.Connection, jobs: Sequence[tuple[Callable[[sqlite3.Connection], Any], Future[Any]]]
) -> None:
    """Do some jobs in one transaction. A job that raises undoes its own writes only."""
    results: list[tuple[Future[Any], Any, BaseException | None]] = []
    try:
        with _transaction(connection):
            for work, done in jobs:
                connection.execute("SAVEPOINT job")
                try:
                    results.append((done, work(connection), None))
                except Exception as error:
                    connection.execute("ROLLBACK TO job")
                    results.append((done, None, error))
                connection.execute("RELEASE job")
    except Exception as error:  # a full disk, or another process that holds the lock: no participant was saved
        results = [(done, None, error) for _, done in jobs]
    for done, result, failure in results:
        if failure is None:
            done.set_result(result)
        else:
            done.set_exception(failure)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


_COLUMNS = "id, slot, plan, step, tab, finished"


def _from_row(row: Sequence[Any]) -> Participant:
    return Participant(row[0], row[1], json.loads(row[2]), row[3], row[4], row[5])


def _participant(connection: sqlite3.Connection, token: str) -> Participant | None:
    row = connection.execute(f"SELECT {_COLUMNS} FROM participants WHERE token = ?", (_digest(token),)).fetchone()
    return None if row is None else _from_row(row)


def _active(connection: sqlite3.Connection, token: str, tab: str) -> Participant:
    participant = _participant(connection, token)
    if participant is None or participant.finished is not None:
        raise UnknownLinkError("this link is not in use")
    if participant.tab != tab:
        raise MovedError("the session continues in another window, which has taken over")
    return participant


def _checked(event: Any) -> tuple[str, int, str, int, str]:
    """Check an event, and return its columns."""
    if not isinstance(event, Mapping):
        raise ValueError("events must be objects")
    name, step, kind, at = (event.get(key) for key in ("id", "step", "kind", "at"))
    if not isinstance(name, str) or not 0 < len(name) <= 64 or kind not in EVENTS:
        raise ValueError("an event needs an id and a known kind")
    if type(step) is not int or not 0 <= step < 1000 or type(at) is not int or not 0 <= at < 100 * _DAY:
        raise ValueError("an event needs a step and a time in milliseconds")
    data = json.dumps(event.get("data"), allow_nan=False).replace("\\u0000", "")
    longest = _LONGEST_TEXT if kind == "fill" else _LONGEST
    if len(data) > longest:
        raise ValueError(f"an event has {len(data)} characters; the store takes at most {longest}")
    return name, step, kind, at, data


def _insert(
    connection: sqlite3.Connection, participant: Participant, events: Sequence[tuple[str, int, str, int, str]]
) -> int:
    if not events:
        return 0
    stored = connection.execute("SELECT count(*) FROM events WHERE participant = ?", (participant.id,)).fetchone()[0]
    if stored + len(events) > _MOST_EVENTS:
        raise ValueError(f"a participant has more than {_MOST_EVENTS} events")
    before = connection.total_changes
    connection.executemany(
        "INSERT OR IGNORE INTO events (participant, id, step, kind, at, data) VALUES (?, ?, ?, ?, ?, ?)",
        [(participant.id, *event) for event in events],
    )
    return connection.total_changes - before


def _insert_answer(
    connection: sqlite3.Connection, participant: Participant, step: int, data: Mapping[str, Any], at: Any
) -> None:
    if type(at) is not int or not 0 <= at < 100 * _DAY:
        raise ValueError("the time must be in milliseconds")
    now = _now()
    connection.execute(
        "INSERT INTO answers (participant, step, at, saved, data) VALUES (?, ?, ?, ?, ?)",
        (participant.id, step, at, now, json.dumps(data, allow_nan=False)),
    )
    done = step + 1 == len(participant.steps)
    connection.execute(
        "UPDATE participants SET step = ?, finished = ? WHERE id = ?", (step + 1, now if done else None, participant.id)
    )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _now() -> int:
    return time.time_ns() // 1_000_000
