"""The running study: one page for each participant's link, and the requests that the page makes.

Routes, all below ``/s/TOKEN``:
    ``GET /`` the page; ``POST /claim`` makes the window the one that answers and returns its state; ``POST /events``
    stores moves; ``POST /answer`` stores a step's answer and returns the next step; ``GET /media/NAME`` gives the
    pictures of the current step, no others; ``POST /withdraw`` deletes the participant.

Safety:
    Requests with unknown, used or forged tokens get a plain page and change nothing. No request is logged, and no
    address or browser is stored. The content security policy allows only the page's own script and style, and pictures
    as data.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from captum_xnn.study._prepared import PreparedStudy
from captum_xnn.study._protocol import plan, public_step
from captum_xnn.study._store import ANSWERS_FILE, MovedError, Participant, StudyStore, UnknownLinkError

try:
    import flask
except ImportError as error:
    raise ImportError("a study needs flask, which is not installed; run `pip install captum-xnn[study]`") from error

__all__ = ["POLICY", "THREADS", "invite", "make_app", "serve", "state_of"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of every page."""
THREADS = 8
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_LARGEST = 512 * 1024
_ASSETS = {"study.js": "text/javascript", "study.css": "text/css"}

_log = logging.getLogger(__name__)


def invite(study: PreparedStudy, store: StudyStore, count: int) -> list[str]:
    """Add participants in the next free slots, and return the token of each participant's link.

    Args:
        study: The prepared study.
        store: Its database.
        count: Number of participants.
    """
    for attempt in range(5):
        slots = store.free_slots(count)
        try:
            return store.invite([plan(study, slot) for slot in slots], slots=slots)
        except sqlite3.IntegrityError:  # another process took a slot meanwhile
            if attempt == 4:
                raise
    raise AssertionError("unreachable")


def state_of(study: PreparedStudy, store: StudyStore, participant: Participant) -> dict[str, Any]:
    """Return the state that a page needs to show a participant's current step.

    Args:
        study: The prepared study.
        store: Its database.
        participant: The participant.
    """
    steps = participant.steps
    state: dict[str, Any] = {"id": participant.id, "step": participant.step, "steps": len(steps)}
    if participant.step < len(steps):
        state["now"] = public_step(study, steps[participant.step])
        state["events"] = store.events(participant.id, participant.step)
    return state


def make_app(study: PreparedStudy, store: StudyStore) -> flask.Flask:
    """Return the application, which any WSGI server runs.

    Args:
        study: The prepared study.
        store: Its database.
    """
    app = flask.Flask("captum_xnn.study", static_folder=None, template_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = _LARGEST
    app.after_request(_secured)
    _add_pages(app, study, store)
    _add_requests(app, study, store)
    _add_errors(app, study)
    return app


def _secured(response: flask.Response) -> flask.Response:
    response.headers.update(_HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _add_pages(app: flask.Flask, study: PreparedStudy, store: StudyStore) -> None:
    """Register the pages that people see, with their script and style."""

    @app.get("/")
    def root() -> flask.Response:
        return _plain(study, "A study", "To take part, open the link that you were given.", 200)

    @app.get("/assets/<name>")
    def asset(name: str) -> flask.Response:
        if name not in _ASSETS:
            return _unknown(study)
        return flask.Response(_template(name), mimetype=_ASSETS[name])

    @app.get("/s/<token>")
    def page(token: str) -> flask.Response:
        participant = store.participant(token)
        if participant is None:
            return _unknown(study)
        if participant.finished is not None:
            return _plain(study, "This link has been used", "Your answers are complete and safe. Thank you.", 410)
        shown = flask.render_template_string(
            _template("page.html"), title=study.facts["title"], mode="server", base=f"/s/{token}", assets="/assets"
        )
        return flask.Response(shown, mimetype="text/html")


def _add_requests(app: flask.Flask, study: PreparedStudy, store: StudyStore) -> None:
    """Register the requests that the page makes."""

    @app.post("/s/<token>/claim")
    def claim(token: str) -> flask.Response:
        participant = store.claim(token, _sent()["tab"])
        if participant is None:
            return _problem("unknown link", 404)
        return flask.jsonify(state_of(study, store, participant))

    @app.post("/s/<token>/events")
    def events(token: str) -> flask.Response:
        given = _sent()
        return flask.jsonify(saved=store.record(token, given["tab"], _listed(given.get("events"))))

    @app.post("/s/<token>/answer")
    def answer(token: str) -> flask.Response:
        given = _sent()
        listed = _listed(given.get("events", []))
        participant = store.answer(
            token, given["tab"], given.get("step", -1), given.get("data"), given.get("at", -1), listed
        )
        return flask.jsonify(state_of(study, store, participant))

    @app.get("/s/<token>/media/<name>")
    def media(token: str, name: str) -> flask.Response:
        participant = store.participant(token)
        if participant is None or participant.finished is not None:
            return _problem("unknown link", 404)
        step = participant.steps[participant.step]
        path = study.media_path(name)
        if path is None or name not in (step.get("media"), step.get("examples")):
            return _problem("no such pictures in this step", 404)
        return flask.Response(path.read_bytes(), mimetype="application/json")

    @app.post("/s/<token>/withdraw")
    def withdraw(token: str) -> flask.Response:
        given = _sent()
        participant = store.participant(token)
        if participant is None or participant.finished is not None or given.get("id") != participant.id:
            return _problem("unknown link", 404)
        store.withdraw(participant.id)
        return flask.jsonify(withdrawn=True)


def _add_errors(app: flask.Flask, study: PreparedStudy) -> None:
    """Register the answers to requests that fail."""

    @app.errorhandler(UnknownLinkError)
    def gone(_: UnknownLinkError) -> flask.Response:
        return _problem("unknown link", 404)

    @app.errorhandler(MovedError)
    def moved(error: MovedError) -> flask.Response:
        return _problem(str(error), 409)

    @app.errorhandler(ValueError)
    @app.errorhandler(RecursionError)  # JSON that is nested deeply
    def refused(error: Exception) -> flask.Response:
        return _problem(str(error), 400)

    @app.errorhandler(404)
    def missing(_: Exception) -> flask.Response:
        return _unknown(study)


def _plain(study: PreparedStudy, title: str, said: str, code: int) -> flask.Response:
    page = flask.render_template_string(_template("plain.html"), title=title, said=said, study=study.facts["title"])
    return flask.Response(page, code, mimetype="text/html")


def _unknown(study: PreparedStudy) -> flask.Response:
    said = "Please check that you opened the whole link that you were given, or ask for a new one."
    return _plain(study, "This link does not work", said, 404)


def _problem(said: str, code: int) -> flask.Response:
    response = flask.jsonify(error=said)
    response.status_code = code
    return response


def _sent() -> Mapping[str, Any]:
    """Return the body of the request, which names its window."""
    given = flask.request.get_json(silent=True)
    if not isinstance(given, Mapping) or not isinstance(given.get("tab"), str) or not given["tab"]:
        raise ValueError("the body must be a JSON object with the window's name")
    return given


def _listed(events: Any) -> list[Any]:
    if not isinstance(events, list):
        raise ValueError("events must be a list")
    return events


def serve(
    folder: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    links: int = 0,
    announce: Any = None,
) -> None:
    """Run a study until it is interrupted.

    Args:
        folder: A prepared study.
        host: Address to listen at; by default only this machine can connect.
        port: Port; 0 takes any free port.
        links: Number of participants to add first.
        announce: Called with the address and the new links once the server listens.
    """
    try:
        import waitress
    except ImportError as error:
        raise ImportError(
            "serving a study needs waitress, which is not installed; run `pip install captum-xnn[study]`"
        ) from error
    study = PreparedStudy.read(folder)
    with StudyStore(Path(folder) / ANSWERS_FILE) as store:
        app = make_app(study, store)
        # One connection of each browser and some to spare; waitress logs no requests.
        server = waitress.create_server(app, host=host, port=port, threads=THREADS, connection_limit=500)
        if host not in ("127.0.0.1", "localhost", "::1"):
            _log.warning("the study is open to other machines without encryption; put a proxy with HTTPS before it")
        address = f"http://{f'[{host}]' if ':' in host else host}:{server.effective_port}"
        addresses = [f"{address}/s/{token}" for token in invite(study, store, links)]
        if announce is not None:
            announce(address, addresses)
        try:
            server.run()
        finally:
            server.close()


@cache
def _template(name: str) -> str:
    return (resources.files("captum_xnn.study") / "templates" / name).read_text(encoding="utf-8")
