"""A participant who works on the pages of a study in Chromium, as a person would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from browser import one, until


def click(driver: Any, selector: str) -> None:
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


def kind(driver: Any) -> str:
    return str(driver.execute_script("return document.documentElement.dataset.step"))


def ready(driver: Any) -> str | None:
    return driver.execute_script("return document.documentElement.dataset.ready")


def opened(driver: Any, link: str) -> str:
    """Opens a link and waits for its first step."""
    driver.get(link)
    until(lambda: ready(driver) is not None)
    return kind(driver)


def saved(driver: Any) -> None:
    until(lambda: driver.execute_script("return document.getElementById('status').dataset.state") == "saved")


def forward(driver: Any, done: Callable[[], Any]) -> str:
    """Does something that ends a step, and returns the next step's kind."""
    before = ready(driver)
    done()
    until(lambda: ready(driver) != before or kind(driver) == "over")
    return kind(driver)


def images(driver: Any) -> list[str]:
    """Ids of all images, in the order of the page."""
    return list(driver.execute_script("return [...document.querySelectorAll('.tile')].map((t) => t.dataset.image)"))


def placed(driver: Any) -> dict[str, int]:
    """Where every image is."""
    script = (
        "return Object.fromEntries([...document.querySelectorAll('.tile')]"
        ".map((t) => [t.dataset.image, Number(t.closest('.pile').dataset.group)]))"
    )
    return dict(driver.execute_script(script))


def key(driver: Any, image: str, pressed: str) -> None:
    """Presses a key on an image."""
    from selenium.webdriver import ActionChains

    driver.execute_script("document.querySelector(`[data-image='${arguments[0]}']`).focus()", image)
    ActionChains(driver).send_keys(pressed).perform()


def answer(
    driver: Any, groups: Callable[[str], int] = lambda image: 1, choices: Callable[[str], int] = lambda image: 1
) -> str:
    """Completes the step that is open, and returns the next step's kind. Choices count from 0, groups from 1."""
    now = kind(driver)
    if now == "consent":
        click(driver, "#agree")
    elif now in ("practice", "sort"):
        for image in images(driver):
            key(driver, image, str(groups(image)))
    elif now in ("agree", "distinguish", "predict"):
        for image in driver.execute_script("return state.now.order"):
            click(driver, f"#choice-{choices(image)}")
            if one(driver, "#next").text == "Done":
                break
            click(driver, "#next")
    elif now in ("confidence", "final"):
        driver.execute_script(
            "document.querySelectorAll('fieldset').forEach((set) => {"
            " const inputs = set.querySelectorAll('input'); if (inputs.length) inputs[1].click(); })"
        )
    return forward(driver, lambda: click(driver, "#next"))
