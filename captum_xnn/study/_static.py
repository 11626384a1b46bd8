"""Write the participant's page as a folder for any web server: answers stay in the browser until they are downloaded.

Every session has a file of its own under an unguessable name, and links name it. At the end a participant downloads a
JSON file and sends it; :func:`captum_xnn.study._export.export` merges such files. The folder contains neither the
model's answers nor the list of sessions and participants.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib import resources
from pathlib import Path

from captum_xnn._files import replace_file
from captum_xnn.study._prepared import MEDIA_FOLDER, PreparedStudy
from captum_xnn.study._protocol import public_step
from captum_xnn.study._server import POLICY, invite
from captum_xnn.study._store import ANSWERS_FILE, StudyStore

__all__ = ["write_static"]


def write_static(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, count: int, address: str = "."
) -> list[str]:
    """Write the page with new sessions, and return the link of each session.

    Earlier sessions in the folder stay, so sessions can be added later.

    Args:
        folder: The prepared study.
        out: Folder to write, for a web server.
        count: Number of sessions to add.
        address: Web address of the folder, for the links.

    Raises:
        ValueError: If the study is missing.
    """
    import jinja2

    study = PreparedStudy.read(folder)
    root = Path(out)
    for name in ("sessions", "assets", MEDIA_FOLDER):
        (root / name).mkdir(parents=True, exist_ok=True)
    templates = resources.files("captum_xnn.study") / "templates"
    for name in ("study.js", "study.css"):
        replace_file(root / "assets" / name, (templates / name).read_bytes())
    # Directives about frames have no effect in a page, and would appear on its console.
    policy = POLICY.replace("; frame-ancestors 'none'", "")
    page = jinja2.Environment(autoescape=True).from_string((templates / "page.html").read_text(encoding="utf-8"))
    text = page.render(title=study.facts["title"], mode="static", base="", assets="assets", policy=policy)
    replace_file(root / "index.html", text.encode())
    for name in study.facts["media"].values():
        shutil.copyfile(study.folder / MEDIA_FOLDER / name, root / MEDIA_FOLDER / name)
    with StudyStore(Path(folder) / ANSWERS_FILE) as store:
        tokens = invite(study, store, count)
        for token in tokens:
            participant = store.participant(token)
            assert participant is not None
            session = {"id": participant.id, "steps": [public_step(study, step) for step in participant.steps]}
            replace_file(root / "sessions" / f"{token}.json", json.dumps(session).encode())
    return [f"{address.rstrip('/')}/index.html?p={token}" for token in tokens]
