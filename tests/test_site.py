"""The built site: headings, descriptions, links, other hosts, names, widths and the search.

sphinx-build -W docs docs/_build
CAPTUM_XNN_SITE=docs/_build pytest -q -m 'slow or browser' tests/test_site.py
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
from browser import all_of, one, until
from test_public_names import NAMES

from benchmarks.report_speed import chromium, found, resize

SITE = Path(os.environ.get("CAPTUM_XNN_SITE", "docs/_build")).resolve()
pytestmark = pytest.mark.skipif(not (SITE / "objects.inv").is_file(), reason="no built site; set CAPTUM_XNN_SITE")


def in_chromium(test: Any) -> Any:
    """Mark a test that opens pages in Chromium."""
    absent = pytest.mark.skipif(found() is None, reason="chromium and chromedriver are not installed")
    return pytest.mark.browser(absent(test))


# Elements that fetch, with the attribute that names the address. Links to other hosts are no fetches.
FETCHES = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
LOADING = {"stylesheet", "preload", "icon", "modulepreload"}
SKIPPED = ("_static", "_downloads", "_images", "_sources", "reports")


class Page(HTMLParser):
    """Headings, texts, addresses and anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings, self.title, self.description = 0, "", ""
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.headings += tag == "h1"
        self._in_title |= tag == "title" and not self.title
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "meta" and given.get("name") == "description":
            self.description = given["content"]
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and LOADING & {*given.get("rel", "").split()}:
            self.fetched.append(given["href"])
        if FETCHES.get(tag) in given:
            self.fetched.append(given[FETCHES[tag]])

    def handle_endtag(self, tag: str) -> None:
        self._in_title &= tag != "title"

    def handle_data(self, data: str) -> None:
        self.title += data if self._in_title else ""


@functools.cache
def pages() -> dict[str, Page]:
    paths = [path for path in sorted(SITE.rglob("*.html")) if path.relative_to(SITE).parts[0] not in SKIPPED]
    return {path.relative_to(SITE).as_posix(): Page(path.read_text(encoding="utf-8")) for path in paths}


def is_elsewhere(address: str) -> bool:
    return bool(re.match(r"(?i)(?:[a-z][a-z0-9+.-]*:)?//", address))


@pytest.mark.slow
def test_every_page_has_one_heading_a_title_and_a_description() -> None:
    assert len(pages()) > 40
    wrong = {n: (p.headings, p.title, p.description) for n, p in pages().items()}
    assert not {n: v for n, v in wrong.items() if v[0] != 1 or len(v[1]) < 5 or not 20 <= len(v[2]) <= 300}


@pytest.mark.slow
def test_no_link_leads_nowhere() -> None:
    dead = []
    for name, page in pages().items():
        for link in page.links:
            address, anchor = urldefrag(link)
            if is_elsewhere(link) or re.match(r"(?i)[a-z]+:", link) or link == "#":
                continue
            place = (SITE / name).parent / unquote(address.split("?")[0]) if address else SITE / name
            place = place / "index.html" if place.is_dir() else place
            inside = place.resolve().relative_to(SITE).as_posix() if place.exists() else None
            known = pages().get(inside or "")
            if inside is None or (anchor and known is not None and unquote(anchor) not in known.anchors):
                dead.append((name, link))
    assert not dead


@pytest.mark.slow
def test_nothing_is_fetched_from_another_host() -> None:
    fetched = {(name, address) for name, page in pages().items() for address in page.fetched if is_elsewhere(address)}
    for path in SITE.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        elsewhere = re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^)"']+)""", text)
        fetched |= {(path.relative_to(SITE).as_posix(), address) for address in elsewhere}
    assert not fetched


@pytest.mark.slow
def test_every_public_name_is_documented() -> None:
    data = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split(" ")[0] for line in zlib.decompress(data).decode().splitlines()}
    everywhere = {name.rpartition(".")[2] for name in documented if name.startswith("captum_xnn.")}
    missing = [
        f"captum_xnn.{folder}.{name}" if folder else name
        for folder, names in NAMES.items()
        for name in names.split()
        if (f"captum_xnn.{folder}.{name}" not in documented if folder else name not in everywhere | {"__version__"})
    ]
    assert not missing


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    pytest.importorskip("selenium")
    with chromium() as opened:
        yield opened


# Tables, code and formulas whose content is wider than they are, with their widths.
CLIPPED = """
return [...document.querySelectorAll('article table, article pre, article .math-block, article img')].filter(e => {
    const box = e.closest('.pst-scrollable-table-container') || e;
    return e.offsetParent && (box.scrollWidth > box.clientWidth + 1
        || e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
}).map(e => `${e.tagName} ${e.scrollWidth} > ${e.clientWidth}: ${e.textContent.slice(0, 60)}`);
"""


@contextmanager
def quiet(driver: Any, address: str) -> Iterator[None]:
    """Give a window of 1280 pixels, in which pages report no error and ask nothing of other hosts.

    The theme reports each first visit, on which no mode is stored yet, as an error.
    """
    resize(driver, 1280, 900)
    driver.get_log("browser"), driver.get_log("performance")
    yield
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in errors if "Got invalid theme mode: ." not in message] == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@in_chromium
def test_no_page_is_clipped_or_asks_another_host(driver: Any, address: str) -> None:
    wrong = {}
    for name in pages():
        with quiet(driver, address):
            driver.get(f"{address}/{name}")
            until(lambda: driver.execute_script("return document.readyState") == "complete")
            clipped = driver.execute_script(CLIPPED)
        if clipped:
            wrong[name] = clipped
    assert not wrong


@in_chromium
def test_the_search_finds_reports(driver: Any, address: str) -> None:
    with quiet(driver, address):
        driver.get(f"{address}/search.html?q=report")
        until(lambda: all_of(driver, "#search-results li"))
        until(lambda: "report_and_share.html" in one(driver, "#search-results").get_attribute("innerHTML"))
