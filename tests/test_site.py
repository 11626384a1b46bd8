"""The built site: headings, descriptions, links, other hosts, names, widths and the search.

sphinx-build -W docs docs/_build
CAPTUM_XNN_SITE=docs/_build pytest -q -m 'slow or browser' tests/test_site.py
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
from browser import all_of, asks_only, one, until
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


# Words whose contrast with what is behind them is below that of WCAG AA, with the contrast.
FAINT = """
const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * linear(c[i] / 255), 0);
const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255, 1]);
};
const walk = document.createTreeWalker(document.querySelector('.bd-main'), NodeFilter.SHOW_TEXT);
const found = {};
while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, style = getComputedStyle(e), text = walk.currentNode.textContent.trim();
    const unseen = !e.checkVisibility({visibilityProperty: true}) || +style.opacity < 1;
    if (!text || unseen || e.closest('script, style, svg, iframe, math, .search-button__kbd-shortcut')) continue;
    const back = behind(e), [a, b] = [light(over(rgba(style.color), back)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && +style.fontWeight >= 700;
    if (ratio < (large ? 3 : 4.5)) found[`${style.color} on ${back}`] = `${ratio.toFixed(2)}: ${text.slice(0, 40)}`;
}
return found;
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
    asks_only(driver, address)


@in_chromium
def test_no_page_is_clipped_or_asks_another_host(driver: Any, address: str) -> None:
    wrong = {}
    for name in pages():
        with quiet(driver, address):
            driver.get(f"{address}/{name}")
            until(lambda: driver.execute_script("return document.readyState") == "complete")
            clipped = driver.execute_script(CLIPPED)
            if clipped:  # pictures and fonts may arrive after the page is complete
                time.sleep(1)
                clipped = driver.execute_script(CLIPPED)
        if clipped:
            wrong[name] = clipped
    assert not wrong


def main_pages() -> list[str]:
    """The pages that people wrote, without those of single names and of source code."""
    return [name for name in pages() if name.split("/")[0] not in ("_modules", "generated")]


@in_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_all_screens_and_can_be_read_in_both_themes(driver: Any, address: str, scheme: str) -> None:
    """Nothing makes a page wider than the screen, and every word differs enough from what is behind it."""
    wrong: dict[str, Any] = {}
    with quiet(driver, address):
        driver.get(f"{address}/index.html")
        driver.execute_script(f"localStorage.mode = '{scheme}'; localStorage.theme = '{scheme}'")
        for name in main_pages():
            driver.get(f"{address}/{name}")
            until(lambda: driver.execute_script("return document.readyState") == "complete")
            assert driver.execute_script("return document.documentElement.dataset.theme") == scheme
            faint = driver.execute_script(FAINT)
            if faint:
                wrong[name] = faint
            for width in (360, 768, 1280, 1920):
                resize(driver, width, 900)
                over = driver.execute_script(
                    "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
                )  # fmt: skip
                if over > 1:
                    wrong[f"{name} at {width}"] = f"{over} pixels too wide"
    assert not wrong


@in_chromium
def test_a_page_without_a_section_has_no_empty_sidebar(driver: Any, address: str) -> None:
    empty = []
    for name in main_pages():
        driver.get(f"{address}/{name}")
        sidebar = all_of(driver, "#pst-primary-sidebar .sidebar-primary-items__start")
        if sidebar and sidebar[0].is_displayed() and not all_of(driver, "#pst-primary-sidebar nav.bd-links a"):
            empty.append(name)
    assert not empty


@in_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_names_in_tables_of_contents_stay_whole(driver: Any, address: str, width: int) -> None:
    broken = {}
    for name in ("api.html", "generated/captum_xnn.models.html"):
        driver.get(f"{address}/{name}")
        resize(driver, width, 900)
        split = driver.execute_script(
            "return [...document.querySelectorAll('table.autosummary td:first-child code span, nav.bd-links li > a')]"
            ".filter(e => e.offsetParent && !/\\s/.test(e.textContent.trim()) && e.getClientRects().length > 1)"
            ".map(e => e.textContent)"
        )
        if split:
            broken[name] = split
    assert not broken


@in_chromium
def test_the_search_finds_reports(driver: Any, address: str) -> None:
    with quiet(driver, address):
        driver.get(f"{address}/search.html?q=report")
        until(lambda: all_of(driver, "#search-results li"))
        until(lambda: '="report.html' in one(driver, "#search-results").get_attribute("innerHTML"))
