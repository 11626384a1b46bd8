"""The participant's page in a real browser: all tasks, mouse, touch and keys, reloads, lost connections, tabs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import all_of, emulate, one, undisturbed, until
from study_browser import answer, click, forward, images, key, kind, opened, placed, ready, saved
from study_made import made

from benchmarks.report_speed import chromium, found, resize
from captum_xnn.study import Arm

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(found() is None, reason="chromium and chromedriver are not installed"),
]
pytest.importorskip("selenium")
pytest.importorskip("flask")
waitress = pytest.importorskip("waitress")

from captum_xnn.study._server import invite, make_app  # noqa: E402
from captum_xnn.study._store import ANSWERS_FILE, StudyStore  # noqa: E402

ARMS = (
    Arm("one", ("none", "single", "xnn")),
    Arm("two", ("none", "single:InputXGradient", "single:Saliency", "xnn")),
    Arm("agree", ("single", "xnn"), "agreement"),
    Arm("tell", ("single", "xnn"), "distinction"),
    Arm("guess", ("none", "xnn"), "prediction"),
)
EVIL = "</script><img src=x onerror=\"document.title='owned'\"><b>'&" + "w" * 80


class Gates:
    """Holds requests whose path ends in a closed gate's name, and counts all that came."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.open = {name: threading.Event() for name in ("claim", "events", "answer")}
        self.came: dict[str, int] = dict.fromkeys(self.open, 0)
        for gate in self.open.values():
            gate.set()

    def __call__(self, environ: Any, start: Any) -> Any:
        name = environ["PATH_INFO"].rpartition("/")[2]
        if name in self.open:
            self.came[name] += 1
            assert self.open[name].wait(60)
        return self.app(environ, start)

    @contextmanager
    def closed(self, name: str) -> Iterator[None]:
        """Holds requests of one kind meanwhile."""
        self.open[name].clear()
        try:
            yield
        finally:
            self.open[name].set()


class Site:
    """A study that is served in a thread."""

    def __init__(self, folder: Path, explained: Any, **settings: Any) -> None:
        self.study = made(folder, explained, **settings)
        self.store = StudyStore(folder / ANSWERS_FILE)
        self.gates = Gates(make_app(self.study, self.store))
        self.server = waitress.create_server(self.gates, host="127.0.0.1", port=0, threads=8)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def link(self, arm: str | None = None) -> str:
        """The link of a new participant, of one arm if it matters."""
        while True:
            (token,) = invite(self.study, self.store, 1)
            if arm in (None, self.store.participant(token).plan["arm"]):
                return f"http://127.0.0.1:{self.server.effective_port}/s/{token}"

    def participant(self, link: str) -> Any:
        return self.store.participant(link.rpartition("/")[2])

    def close(self) -> None:
        self.server.close()
        self.store.close()


@pytest.fixture(scope="module")
def site(explained: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    running = Site(
        tmp_path_factory.mktemp("site"), explained, arms=ARMS, batches=4, batch_images=4, title="Bars & more"
    )
    yield running
    running.close()


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def driver(started: Any) -> Iterator[Any]:
    """The browser. No test may leave a word on its console or ask anything of another host."""
    with undisturbed(started, 1280, "http://127.0.0.1:", forgiven="ERR_INTERNET_DISCONNECTED"):
        yield started


def offline(driver: Any, is_off: bool) -> None:
    conditions = {"offline": is_off, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


def come_to(driver: Any, link: str, wanted: str, with_maps: bool = False) -> None:
    """Walks a session to a step of a kind, with x-features if it matters."""
    opened(driver, link)
    while kind(driver) != wanted or (with_maps and len(all_of(driver, "[data-map]")) < 2):
        answer(driver)


@pytest.mark.parametrize("arm", [arm.name for arm in ARMS])
def test_a_whole_session_in_every_arm(driver: Any, site: Site, arm: str) -> None:
    link = site.link(arm)
    opened(driver, link)
    seen = [kind(driver)]
    while seen[-1] != "end":
        seen.append(answer(driver))
        assert len(seen) < 40
    participant = site.participant(link)
    assert seen[:-1] == [step["kind"] for step in participant.steps]
    assert participant.finished and len(site.store.answers(participant.id)) == len(participant.steps)
    assert participant.id in one(driver, "main").text
    assert all(a["at"] > 0 for a in site.store.answers(participant.id).values())
    driver.get(link)
    assert "has been used" in one(driver, "main").text
    # A used link is answered with 410, which the console tells.
    assert all("410" in entry["message"] for entry in driver.get_log("browser"))


def centre(driver: Any, element: Any) -> tuple[int, int]:
    box = driver.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]", element
    )
    return int(box[0]), int(box[1])


def test_mouse_touch_and_keys_drag_to_groups(driver: Any, site: Site) -> None:
    from selenium.webdriver import ActionChains

    link = site.link("one")
    come_to(driver, link, "sort")
    first, second, third, fourth = images(driver)
    tile = {name: one(driver, f"[data-image='{name}']") for name in images(driver)}
    pile = {g: one(driver, f"[data-group='{g}']") for g in (0, 1, 2)}
    driver.execute_script("document.querySelector('.board').scrollIntoView({block: 'center'})")
    # With a mouse.
    ActionChains(driver).click_and_hold(tile[first]).move_by_offset(20, 20).move_to_element(pile[2]).release().perform()
    assert placed(driver)[first] == 2
    # With a finger, after holding.
    at, to = centre(driver, tile[second]), centre(driver, pile[1])
    touch(driver, "touchStart", at)
    until(lambda: driver.execute_script("return document.body.classList.contains('dragging')"))
    touch(driver, "touchMove", ((at[0] + to[0]) // 2, (at[1] + to[1]) // 2))
    touch(driver, "touchMove", to)
    touch(driver, "touchEnd", None)
    until(lambda: placed(driver)[second] == 1)
    # With keys.
    key(driver, third, "2")
    assert placed(driver) == {first: 2, second: 1, third: 2, fourth: 0}
    # A swipe moves nothing.
    at = centre(driver, tile[fourth])
    touch(driver, "touchStart", at)
    touch(driver, "touchMove", (at[0], at[1] - 60))
    touch(driver, "touchEnd", None)
    # Nor does a drag that ends nowhere, or one that Escape ends.
    ActionChains(driver).click_and_hold(tile[fourth]).move_by_offset(20, 20).move_to_element(
        one(driver, "h1")
    ).release().perform()
    assert placed(driver) == {first: 2, second: 1, third: 2, fourth: 0}
    saved(driver)
    participant = site.participant(link)
    moves = [e["data"]["to"] for e in site.store.events(participant.id, participant.step) if e["kind"] == "move"]
    assert moves == [[[first, 2]], [[second, 1]], [[third, 2]]]
    # Undone, taken back and sorted anew.
    click(driver, "#undo")
    assert placed(driver)[third] == 0
    key(driver, first, "0")
    assert placed(driver)[first] == 0
    assert one(driver, "#next").get_attribute("aria-disabled") == "true"
    click(driver, "#next")
    assert "3 images are still to be sorted" in one(driver, ".done .error").text
    assert kind(driver) == "sort"


def touch(driver: Any, what: str, at: tuple[int, int] | None) -> None:
    points = [] if at is None else [{"x": at[0], "y": at[1]}]
    driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": what, "touchPoints": points})


def test_selected_images_move_together_by_button_and_by_drag(driver: Any, site: Site) -> None:
    from selenium.webdriver import ActionChains

    come_to(driver, site.link("one"), "sort")
    names = images(driver)
    for name in names[:2]:
        one(driver, f"[data-image='{name}']").click()
    one(driver, "[data-group='1'] .here").click()
    assert [placed(driver)[name] for name in names] == [1, 1, 0, 0]
    for name in names[2:]:
        one(driver, f"[data-image='{name}']").click()
    ActionChains(driver).click_and_hold(one(driver, f"[data-image='{names[2]}']")).move_by_offset(
        15, 15
    ).move_to_element(one(driver, "[data-group='2']")).release().perform()
    assert [placed(driver)[name] for name in names] == [1, 1, 2, 2]
    click(driver, "#undo")
    assert [placed(driver)[name] for name in names] == [1, 1, 0, 0]


def test_reload_in_the_middle_loses_nothing(driver: Any, site: Site) -> None:
    link = site.link("one")
    come_to(driver, link, "sort")
    names = images(driver)
    for name, group in zip(names[:3], "212", strict=True):
        key(driver, name, group)
    click(driver, "#undo")
    before = placed(driver)
    # At once: what was not yet sent is kept in the browser.
    driver.get(link)
    until(lambda: ready(driver) is not None)
    assert kind(driver) == "sort" and placed(driver) == before
    assert driver.execute_script("return clock()") > 0
    click(driver, "#undo")
    assert placed(driver)[names[1]] == 0
    participant = site.participant(link)
    saved(driver)
    events = site.store.events(participant.id, participant.step)
    assert [e["kind"] for e in events if e["kind"] in ("move", "undo")] == ["move"] * 3 + ["undo"] * 2
    assert len({e["id"] for e in events}) == len(events)


def test_filled_in_answers_survive_a_reload(driver: Any, site: Site) -> None:
    link = site.link("one")
    come_to(driver, link, "final")
    driver.execute_script("document.querySelectorAll('fieldset')[0].querySelectorAll('input')[4].click()")
    one(driver, "#comments").send_keys("hello")
    # At once: a text is kept when the page goes, however lately it was typed.
    driver.get(link)
    until(lambda: ready(driver) is not None)
    chosen = driver.execute_script("return document.querySelector('fieldset :checked').value")
    assert chosen == "4" and one(driver, "#comments").get_property("value") == "hello"
    click(driver, "#next")
    assert "still open" in one(driver, ".error").text and kind(driver) == "final"


def test_the_longest_comment_in_any_script_is_accepted(driver: Any, site: Site) -> None:
    link = site.link("one")
    come_to(driver, link, "final")
    participant = site.participant(link)
    text = "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 5000
    driver.execute_script(
        "const box = document.querySelector('#comments'); box.value = arguments[0];"
        "box.dispatchEvent(new Event('input'))",
        text,
    )
    until(lambda: [e for e in site.store.events(participant.id) if e["kind"] == "fill"])
    saved(driver)
    assert answer(driver) == "end"
    assert site.store.answers(participant.id)[len(participant.steps) - 1]["data"]["comments"] == text


def test_nothing_changes_on_the_page_while_an_answer_is_on_its_way(driver: Any, site: Site) -> None:
    link = site.link("one")
    come_to(driver, link, "sort")
    names = images(driver)
    for name in names:
        key(driver, name, "1")
    still(driver, site, link)
    with site.gates.closed("answer"):
        click(driver, "#next")
        until(lambda: "Saving" in one(driver, "#next").text)
        key(driver, names[0], "2")
        assert set(placed(driver).values()) == {1}
        # Who withdraws meanwhile has withdrawn, though the answer then finds no participant.
        click(driver, "#withdraw")
        click(driver, "#withdraw-yes")
        until(lambda: kind(driver) == "withdrawn")
    until(lambda: any("404" in entry["message"] for entry in driver.get_log("browser")))
    time.sleep(0.3)
    assert "You have withdrawn" in one(driver, "main").text and site.participant(link) is None


def test_a_lost_connection_is_told_and_nothing_is_lost(driver: Any, site: Site) -> None:
    link = site.link("one")
    come_to(driver, link, "sort")
    names = images(driver)
    saved(driver)
    driver.execute_cdp_cmd("Network.enable", {})
    offline(driver, True)
    try:
        for name in names:
            key(driver, name, "1")
        until(lambda: "No connection" in one(driver, "#status").text)
        click(driver, "#next")
        time.sleep(0.3)
        assert kind(driver) == "sort" and "Saving" in one(driver, "#next").text
    finally:
        offline(driver, False)
    until(lambda: kind(driver) == "sort" and set(images(driver)) != set(names))
    participant = site.participant(link)
    stored = site.store.answers(participant.id)[participant.step - 1]["data"]
    assert stored == {"groups": dict.fromkeys(names, 1)}
    events = site.store.events(participant.id, participant.step - 1)
    assert sum(e["kind"] == "move" for e in events) == 4


@contextmanager
def second_tab(driver: Any) -> Iterator[tuple[str, str]]:
    """Opens another tab and returns both; closes it and leaves only refusals on the console."""
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    resize(driver, 1280, 900)
    second = driver.current_window_handle
    try:
        yield first, second
    finally:
        driver.switch_to.window(second)
        driver.close()
        driver.switch_to.window(first)
    assert all("409" in entry["message"] for entry in driver.get_log("browser"))


def told(driver: Any) -> None:
    """Waits until the page says that the session goes on elsewhere."""
    until(lambda: one(driver, "#ask").is_displayed() and "another window" in one(driver, "#ask").text)


def still(driver: Any, site: Site, link: str) -> None:
    """Waits until the page has nothing more to send, not even the look at the image that has the focus."""
    image = driver.execute_script("return document.activeElement.dataset.image")
    participant = site.participant(link)

    def looked() -> bool:
        events = site.store.events(participant.id, participant.step)
        return any(e["kind"] == "inspect" and e["data"]["image"] == image for e in events)

    until(looked)
    saved(driver)


def test_the_later_of_two_tabs_goes_on_and_the_other_is_told(driver: Any, site: Site) -> None:
    link = site.link("one")
    come_to(driver, link, "sort")
    names = images(driver)
    key(driver, names[0], "1")
    still(driver, site, link)
    with second_tab(driver) as (first, second):
        opened(driver, link)
        assert placed(driver)[names[0]] == 1
        key(driver, names[1], "2")
        still(driver, site, link)
        with site.gates.closed("events"):  # so that the page learns of the other tab after the move, however slow it is
            driver.switch_to.window(first)
            key(driver, names[2], "2")
            assert placed(driver) == {names[0]: 1, names[1]: 0, names[2]: 2, names[3]: 0}
        told(driver)
        click(driver, "#ask .go")
        until(lambda: placed(driver).get(names[1]) == 2)
        # The move that the first tab had not been able to send is not lost.
        assert placed(driver) == {names[0]: 1, names[1]: 2, names[2]: 2, names[3]: 0}
        saved(driver)
        driver.switch_to.window(second)
        driver.execute_script("record('toggle', {map: null})")
        told(driver)
    participant = site.participant(link)
    moves = [e["data"]["to"] for e in site.store.events(participant.id, participant.step) if e["kind"] == "move"]
    assert moves == [[[names[0], 1]], [[names[1], 2]], [[names[2], 2]]]


def test_a_tab_that_takes_over_sends_nothing_before_and_everything_after(driver: Any, site: Site) -> None:
    link = site.link("one")
    come_to(driver, link, "sort")
    names = images(driver)
    saved(driver)
    with second_tab(driver) as (first, second):
        opened(driver, link)
        saved(driver)
        with site.gates.closed("events"):
            driver.switch_to.window(first)
            key(driver, names[0], "1")
        told(driver)
        # Requests of this tab alone: the other one tells when it is put away.
        sends = "return performance.getEntriesByType('resource').filter((e) => e.name.endsWith('/events')).length"
        before, claims = driver.execute_script(sends), site.gates.came["claim"]
        with site.gates.closed("claim"):
            # A move's own timer may still run when the session is taken over; what it sends would be refused.
            driver.execute_script("later(100); document.querySelector('#ask .go').click()")
            until(lambda: site.gates.came["claim"] > claims)
            time.sleep(0.6)
            assert one(driver, "#ask").is_displayed() and "Loading" in one(driver, "#ask .go").text
            assert driver.execute_script(sends) == before
        until(lambda: not one(driver, "#ask").is_displayed())
        assert placed(driver)[names[0]] == 1
        key(driver, names[1], "2")
        saved(driver)
        participant = site.participant(link)
        moves = [e["data"]["to"] for e in site.store.events(participant.id, participant.step) if e["kind"] == "move"]
        assert moves == [[[names[0], 1]], [[names[1], 2]]]
        driver.switch_to.window(second)
        driver.execute_script("record('toggle', {map: null})")
        told(driver)


def test_maps_are_toggled_on_all_images_seen_on_hover_and_compared(driver: Any, site: Site) -> None:
    from selenium.webdriver import ActionChains

    link = site.link("one")
    come_to(driver, link, "sort", with_maps=True)
    participant = site.participant(link)
    name = participant.steps[participant.step]["media"]
    shown = {i["id"]: i for i in json.loads((site.study.folder / "media" / name).read_text())["images"]}
    names = images(driver)
    click(driver, "[data-map='1']")
    overs = driver.execute_script("return [...document.querySelectorAll('.tile .over')].map((o) => o.src)")
    assert overs == [shown[i]["maps"][1]["src"] for i in names]
    values = [e.text for e in all_of(driver, ".tile .value")]
    signed = [f"{shown[i]['maps'][1]['c']:+.2f}".replace("-", "\N{MINUS SIGN}") for i in names]
    assert values == [v if float(v.replace("\N{MINUS SIGN}", "-")) else "0.00" for v in signed]
    classes = [e.get_attribute("class") for e in all_of(driver, ".tile .value")]
    assert classes == [f"value {'lowers' if shown[i]['maps'][1]['c'] < 0 else 'raises'}" for i in names]
    click(driver, "[data-map='1']")
    assert not any(o.is_displayed() for o in all_of(driver, ".tile .over"))

    ActionChains(driver).move_to_element(one(driver, f"[data-image='{names[2]}']")).perform()
    maps = driver.execute_script("return [...document.querySelectorAll('#peek .maps .over')].map((o) => o.src)")
    assert maps == [m["src"] for m in shown[names[2]]["maps"]]

    for i in (names[3], names[0]):
        one(driver, f"[data-image='{i}']").click()
    one(driver, "#compare-open").click()
    table = driver.execute_script(
        "return [...document.querySelectorAll('#compare tbody tr')].slice(1)"
        ".map((row) => [...row.querySelectorAll('.over')].map((o) => o.src))"
    )
    assert table == [[shown[i]["maps"][k]["src"] for i in (names[0], names[3])] for k in range(3)]
    one(driver, "#compare .shown .button").click()
    assert [row.is_displayed() for row in all_of(driver, "#compare tbody tr")] == [True, False, True, True]
    one(driver, "#compare-close").click()
    time.sleep(0.5)
    saved(driver)
    kinds = {e["kind"] for e in site.store.events(participant.id, participant.step)}
    assert {"open", "toggle", "select", "compare", "inspect"} <= kinds


def test_a_map_lies_on_all_of_its_photo_and_on_nothing_else(driver: Any, explained: Any, tmp_path: Path) -> None:
    # Where the photo is drawn in its square, and where the map is: left, top, width and height.
    script = """
    return [...document.querySelectorAll(arguments[0])].filter((f) => f.checkVisibility()).map((frame) => {
      const [photo, over] = [".photo", ".over"].map((s) => frame.querySelector(s));
      const box = photo.getBoundingClientRect(), scale = Math.min(box.width / photo.naturalWidth, box.height / photo.naturalHeight);
      const [w, h] = [photo.naturalWidth * scale, photo.naturalHeight * scale];
      const b = over.getBoundingClientRect();
      return [[box.x + (box.width - w) / 2, box.y + (box.height - h) / 2, w, h], [b.x, b.y, b.width, b.height]];
    });
    """  # noqa: E501
    site = Site(tmp_path, explained, arms=(Arm("one", ("xnn",)),), shapes=((16, 40), (40, 16)))
    try:
        come_to(driver, site.link(), "sort")
        shapes = set()
        for _ in range(2):
            click(driver, "[data-map]")
            driver.execute_script("document.querySelector('.tile').click()")
            click(driver, "#compare-open")
            for selector in (".tile .frame", "#peek .maps li:not(.of-image) .frame", "#compare .frame:has(.over)"):
                boxes = driver.execute_script(script, selector)
                assert boxes
                for photo, over in boxes:
                    assert over == pytest.approx(photo, abs=0.6), selector
                    shapes.add(round(photo[2] / photo[3], 1))
            click(driver, "#compare-close")
            answer(driver)
        assert shapes == {2.5, 0.4}
    finally:
        site.close()


def test_the_first_stage_shows_no_map(driver: Any, site: Site) -> None:
    come_to(driver, site.link("one"), "sort")
    assert not all_of(driver, "[data-map]") and not all_of(driver, ".legend")
    driver.execute_script("document.querySelector('.tile').focus()")
    assert not all_of(driver, "#peek .over")


def test_withdrawing_asks_first_and_deletes(driver: Any, site: Site) -> None:
    link = site.link("one")
    come_to(driver, link, "background")
    click(driver, "#withdraw")
    click(driver, "#ask .plain")
    assert site.participant(link) is not None
    click(driver, "#withdraw")
    click(driver, "#withdraw-yes")
    until(lambda: "You have withdrawn" in one(driver, "main").text)
    assert site.participant(link) is None


# Every text against what lies behind it, by the formula of WCAG 2; those that are switched off are exempt there.
POOR = """
const lum = (c) => {
  const p = c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * p[0] + 0.7152 * p[1] + 0.0722 * p[2];
};
const behind = (node) => getComputedStyle(node).backgroundColor;
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.textContent.trim();
  const own = walker.currentNode.parentElement;
  if (!text || !own.checkVisibility() || own.closest("[disabled], noscript, .sr, .skip")) continue;
  let node = own;
  while (node && behind(node) === "rgba(0, 0, 0, 0)") node = node.parentElement;
  const both = [lum(getComputedStyle(own).color), lum(behind(node || document.body))];
  const [low, high] = both.sort((a, b) => a - b);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < 4.5) found.push([text.slice(0, 40), own.className, Math.round(ratio * 100) / 100]);
}
return found;
"""
# The border of every control against what lies on both sides of it, unless the control itself stands out.
FAINT = """
const lum = (c) => {
  const p = c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * p[0] + 0.7152 * p[1] + 0.0722 * p[2];
};
const ratio = (a, b) => { const [low, high] = [lum(a), lum(b)].sort((x, y) => x - y); return (high + 0.05) / (low + 0.05); };
const behind = (node) => {
  while (node && getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") node = node.parentElement;
  return getComputedStyle(node || document.body).backgroundColor;
};
return [...document.querySelectorAll("main .button, main .plain, main .option, main textarea, dialog .plain")]
  .filter((e) => e.checkVisibility() && !e.matches("[aria-disabled=true], :disabled"))
  .map((e) => [e.outerHTML.slice(0, 60), Math.min(...[behind(e), behind(e.parentElement)].map((ground) =>
    Math.max(ratio(getComputedStyle(e).borderTopColor, ground), ratio(behind(e), behind(e.parentElement)))))])
  .filter(([, least]) => least < 3);
"""  # noqa: E501
EDGES = "const box = arguments[0].getBoundingClientRect(); return [box.left, box.right]"
UNNAMED = """
return [...document.querySelectorAll("button, input, textarea, select, a[href], summary, img")]
  .filter((e) => e.checkVisibility() && !(e.tagName === "IMG" ? e.hasAttribute("alt")
    : e.getAttribute("aria-label") || (e.labels && e.labels.length) || e.textContent.trim()))
  .map((e) => e.outerHTML.slice(0, 90));
"""


@pytest.mark.parametrize("arm", ["one", "agree", "tell", "guess"])
def test_every_step_is_readable_named_and_never_scrolls_sideways(driver: Any, site: Site, arm: str) -> None:
    opened(driver, site.link(arm))
    while kind(driver) != "end":
        if all_of(driver, "[data-map]"):
            click(driver, "[data-map]")
        if all_of(driver, ".tile[data-image]"):
            driver.execute_script("document.querySelector('.tile').click()")
        step = kind(driver)
        assert driver.execute_script(UNNAMED) == [], step
        for scheme in ("light", "dark"):
            emulate(driver, scheme)
            for width in (1280, 768, 360, 320):
                resize(driver, width, 800)
                time.sleep(0.15)  # colours fade
                wide = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
                assert wide[0] <= wide[1], (step, width, wide)
                for tool in all_of(driver, "#undo, #compare-open"):
                    left, right = driver.execute_script(EDGES, tool)
                    assert 0 <= left < right <= width, (step, width, left, right)
            assert driver.execute_script(POOR) == [], (step, scheme)
            assert driver.execute_script(FAINT) == [], (step, scheme)
        resize(driver, 1280, 900)
        answer(driver)


def test_tab_reaches_everything_and_focus_is_seen(driver: Any, site: Site) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    come_to(driver, site.link("one"), "sort", with_maps=True)
    key(driver, images(driver)[0], "1")
    driver.execute_script("document.querySelector('.tile').click(); document.querySelector('h1').focus()")
    reached = []
    for _ in range(60):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        focused = driver.switch_to.active_element
        if focused.tag_name == "body" or focused in reached:
            break
        reached.append(focused)
        outline = driver.execute_script(
            "const s = getComputedStyle(arguments[0]); return [s.outlineStyle, parseFloat(s.outlineWidth)]", focused
        )
        assert outline[0] != "none" and outline[1] >= 2, focused.get_attribute("outerHTML")[:90]
    wanted = [e for e in all_of(driver, "main button, main summary, footer button") if e.is_displayed()]
    assert [e.get_attribute("outerHTML")[:90] for e in wanted if e not in reached] == []


def test_a_session_by_keys_alone(driver: Any, site: Site) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    come_to(driver, site.link("one"), "sort")
    names = images(driver)
    driver.execute_script("document.querySelector('h1').focus()")
    while not driver.execute_script("return document.activeElement.matches('.tile')"):
        ActionChains(driver).send_keys(Keys.TAB).perform()
    ActionChains(driver).send_keys("1", "2", "1", "2").perform()  # each goes on to the next image
    assert placed(driver) == dict(zip(names, (1, 2, 1, 2), strict=True))
    ActionChains(driver).send_keys("z").perform()
    assert placed(driver)[names[3]] == 0
    ActionChains(driver).send_keys("2", Keys.SPACE, "c").perform()
    assert one(driver, "#compare").is_displayed()
    ActionChains(driver).send_keys(Keys.ESCAPE).perform()
    assert not one(driver, "#compare").is_displayed()
    while not driver.execute_script("return document.activeElement.id === 'next'"):
        ActionChains(driver).send_keys(Keys.TAB).perform()
    forward(driver, lambda: ActionChains(driver).send_keys(Keys.ENTER).perform())


@pytest.mark.parametrize("arm", [arm.name for arm in ARMS])
def test_who_works_on_the_pages_has_the_scores_that_were_put_in(
    driver: Any, explained: Any, tmp_path: Path, arm: str
) -> None:
    from captum_xnn.study._analysis import read_export, scored
    from captum_xnn.study._export import export

    (chosen,) = [one for one in ARMS if one.name == arm]
    site = Site(tmp_path / "study", explained, arms=(chosen,), batches=4)
    try:
        facts = {name: f for d in site.study.datasets.values() for name, f in d.images.items()}
        kinds = {name: f["given"] for name, f in facts.items()}  # outputs 1 and 2
        kinds |= {image["id"]: image["given"] + 1 for image in site.study.facts["practice_batch"]["images"]}
        # Of the ratings 2 and 3 say that the model is right, which it always is.
        right = {name: 3 if chosen.task == "agreement" else f["given"] - 1 for name, f in facts.items()}
        for person in (
            {"groups": lambda image: kinds[image], "choices": lambda image: right[image]},
            {"groups": lambda image: 1, "choices": lambda image: 1},
        ):
            opened(driver, site.link())
            while kind(driver) != "end":
                answer(driver, **person)
        trials = scored(read_export(export(site.study.folder, tmp_path / "export")))
        assert len(trials) == 2 * 2 * len(chosen.stages)
        assert {t.score for t in trials if t.participant == "p001"} == {1.0}
        others = {t.score for t in trials if t.participant == "p002"}
        # All in one group: of five images of two classes three are of one. Always kind B: two or three are right.
        assert others == ({0.6} if chosen.task == "sort" else {0.0} if chosen.task == "agreement" else {0.4, 0.6})
    finally:
        site.close()


def test_hostile_texts_stay_text(driver: Any, explained: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    from study_made import SETTINGS

    datasets = tuple(replace(d, title=EVIL) for d in SETTINGS.datasets)
    site = Site(tmp_path, explained, datasets=datasets, title=EVIL, consent=(EVIL,), contact=EVIL)
    try:
        link = site.link()
        opened(driver, link)
        assert driver.title == EVIL and EVIL in one(driver, "main").text
        while kind(driver) != "end":
            if kind(driver) == "final":
                one(driver, "#comments").send_keys(EVIL)
            wide = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
            assert wide[0] <= wide[1]
            answer(driver)
        assert driver.title == EVIL
        participant = site.participant(link)
        last = site.store.answers(participant.id)[len(participant.steps) - 1]
        assert last["data"]["comments"] == EVIL
    finally:
        site.close()


def test_the_policy_stops_what_did_not_come_with_the_page(driver: Any, site: Site) -> None:
    opened(driver, site.link())
    driver.execute_script("""
        const script = document.createElement("script");
        script.textContent = "document.title = 'owned'";
        document.body.append(script);
        const image = document.createElement("img");
        image.src = "https://example.org/x.png";
        document.body.append(image);
    """)
    said: list[str] = []
    until(lambda: said.extend(e["message"] for e in driver.get_log("browser")) or len(said) >= 2)
    assert all("Content Security Policy" in message for message in said)
    assert driver.title != "owned"
    driver.get_log("performance")
    opened(driver, site.link())
