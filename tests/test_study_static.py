"""The page without a server: a folder for any web server, whose downloaded answers are merged by the export."""

from __future__ import annotations

import html
import http.server
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser import one, until
from study_browser import answer, click, images, key, kind, opened, placed, ready, saved
from study_made import made

from benchmarks.report_speed import chromium, found

pytest.importorskip("flask")

from captum_xnn.study._export import export
from captum_xnn.study._static import write_static
from captum_xnn.study._store import ANSWERS_FILE, StudyStore


def test_the_folder_holds_everything_but_what_the_model_answers(explained: Any, tmp_path: Path) -> None:
    study = made(tmp_path / "study", explained, heatmaps=("InputXGradient", "Saliency"))
    links = write_static(study.folder, tmp_path / "site", count=3, address="https://example.org/study/")
    assert len(set(links)) == 3 and all(x.startswith("https://example.org/study/index.html?p=") for x in links)
    page = html.unescape((tmp_path / "site" / "index.html").read_text())
    assert "default-src 'none'" in page and "unsafe" not in page and "://" not in page
    sessions = list((tmp_path / "site" / "sessions").iterdir())
    assert {f"https://example.org/study/index.html?p={path.stem}" for path in sessions} == set(links)
    for path in (tmp_path / "site").rglob("*.json"):
        text = path.read_text()
        for told in ("given", "label", "surrogate", "contributions", "arm", "cell", "source"):
            assert f'"{told}":' not in text and "bar " not in text
    with StudyStore(study.folder / ANSWERS_FILE) as store:
        for path in sessions:
            session, participant = json.loads(path.read_text()), store.participant(path.stem)
            assert session["id"] == participant.id
            assert [s["kind"] for s in session["steps"]] == [s["kind"] for s in participant.steps]
            for step in session["steps"]:
                assert "media" not in step or (tmp_path / "site" / "media" / step["media"]).is_file()
    more = write_static(study.folder, tmp_path / "site", count=2)
    assert len(list((tmp_path / "site" / "sessions").iterdir())) == 5 and not set(more) & set(links)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "site").mkdir()
    handler = partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.browser
@pytest.mark.skipif(found() is None, reason="chromium and chromedriver are not installed")
def test_a_session_without_a_server_survives_reloads_and_is_merged(explained: Any, tmp_path: Path, site: str) -> None:
    study = made(tmp_path / "study", explained)
    link, other = write_static(study.folder, tmp_path / "site", count=2, address=site)
    with chromium() as driver:
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        opened(driver, link)
        while kind(driver) != "sort":
            answer(driver)
        names = images(driver)
        key(driver, names[0], "2")
        key(driver, names[1], "1")
        click(driver, "#undo")
        driver.get(link)
        until(lambda: ready(driver) is not None)
        assert placed(driver) == {**dict.fromkeys(names, 0), names[0]: 2}
        # A second session in the same browser is one of its own.
        assert opened(driver, other) == "consent"
        assert opened(driver, link) == "sort"
        chosen = dict(zip(names, (2, 1, 2, 1, 2), strict=True))
        answer(driver, lambda image: chosen[image])
        while kind(driver) != "end":
            answer(driver)
        one(driver, "#download").click()
        file = until(lambda: next(iter(tmp_path.glob("answers-*.json")), None))
        until(lambda: file.stat().st_size > 0)
        driver.get(f"{site}/index.html")
        until(lambda: "does not work" in one(driver, "main").text)
        assert driver.get_log("browser") == []
    out = export(study.folder, tmp_path / "export", answers=[file])
    (path,) = (out / "data").glob("*-placements_data.csv")
    rows = [line.split(",") for line in path.read_text().splitlines()]
    column = {name: i for i, name in enumerate(rows[0])}
    first = {r[column["image"]]: int(r[column["answer"]]) for r in rows[1:6]}
    assert first == chosen
    (path,) = (out / "data").glob("*-participants_data.csv")
    assert path.read_text().splitlines()[1].startswith("p001,")


@pytest.mark.browser
@pytest.mark.skipif(found() is None, reason="chromium and chromedriver are not installed")
def test_a_browser_that_keeps_nothing_is_told_and_loses_nothing_once_it_does(
    explained: Any, tmp_path: Path, site: str
) -> None:
    study = made(tmp_path / "study", explained)
    link, other = write_static(study.folder, tmp_path / "site", count=2, address=site)
    full = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
    with chromium() as driver:
        opened(driver, link)
        while kind(driver) != "sort":
            answer(driver)
        names = images(driver)
        driver.execute_script(f"window.keeps = Storage.prototype.setItem; {full}")
        key(driver, names[0], "2")
        until(lambda: "can keep no more" in one(driver, "#status").text)
        driver.execute_script("Storage.prototype.setItem = window.keeps")
        until(lambda: "All saved" in one(driver, "#status").text)
        driver.get(link)
        until(lambda: ready(driver) is not None)
        assert placed(driver)[names[0]] == 2
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": full})
        driver.get(other)
        until(lambda: "keeps no answers" in one(driver, "main").text)
        assert driver.get_log("browser") == []


@pytest.mark.browser
@pytest.mark.skipif(found() is None, reason="chromium and chromedriver are not installed")
def test_of_two_tabs_without_a_server_the_later_goes_on(explained: Any, tmp_path: Path, site: str) -> None:
    study = made(tmp_path / "study", explained)
    (link,) = write_static(study.folder, tmp_path / "site", count=1, address=site)
    with chromium() as driver:
        opened(driver, link)
        while kind(driver) != "sort":
            answer(driver)
        names = images(driver)
        key(driver, names[0], "1")
        saved(driver)
        first = driver.current_window_handle
        driver.switch_to.new_window("tab")
        opened(driver, link)
        key(driver, names[1], "2")
        saved(driver)
        driver.switch_to.window(first)
        driver.execute_script("record('toggle', {map: null})")
        until(lambda: one(driver, "#ask").is_displayed())
        click(driver, "#ask .go")
        until(lambda: not one(driver, "#ask").is_displayed())
        assert placed(driver) == {**dict.fromkeys(names, 0), names[0]: 1, names[1]: 2}
        assert driver.get_log("browser") == []
