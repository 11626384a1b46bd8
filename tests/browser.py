"""Pages in Chromium: waiting, finding, themes, and a check that a page neither complains nor asks other hosts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.report_speed import resize


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Waits for what the page does, such as drawing what has come near, and returns it."""
    end = time.monotonic() + seconds
    while True:
        try:
            found = condition()
        except Exception:  # what is being replaced cannot be asked
            found = None
        if found:
            return found
        assert time.monotonic() < end, "the page never came to it"
        time.sleep(0.03)


def one(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def all_of(driver: Any, selector: str) -> list[Any]:
    return list(driver.find_elements("css selector", selector))


def emulate(driver: Any, scheme: str) -> None:
    """Makes the system's theme light or dark."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@contextmanager
def undisturbed(driver: Any, width: int, *hosts: str, forgiven: str | None = None) -> Iterator[None]:
    """Gives a light window of a width, in which pages leave no word on the console and ask nothing of other hosts.

    Addresses begin with one of the hosts, or hold the data themselves. Words with the forgiven text do not count.
    """
    resize(driver, width, 900)
    emulate(driver, "light")
    driver.get_log("browser"), driver.get_log("performance")
    yield
    words = [entry for entry in driver.get_log("browser") if forgiven is None or forgiven not in entry["message"]]
    assert words == []
    asks_only(driver, *hosts)


def asks_only(driver: Any, *hosts: str) -> None:
    """Checks that since the log was last read something was asked of the hosts, and nothing of others.

    Chromium's own pages do not count: the empty tab that it starts with fetches its icons when it likes.
    """
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith((*hosts, "data:", "blob:", "chrome:"))] == []
    assert any(url.startswith(hosts) for url in asked)
