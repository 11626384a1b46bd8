"""How large a report of many images is, how long it takes to open, and how fast a heatmap is on all images.

A page of pictures much like photographs, noise at several scales of 224 x 224 pixels, is written and opened in headless
Chromium. Opening is from the request to the first picture of the gallery that is decoded and drawn; a toggle is from
the click to the next frame after all that the click changes is drawn, once for each x-feature. Printed are the best and
the median of several rounds on the clock, which depends on what else the machine does, and the median that the page's
own thread computes.

With ``--maps``, a ResNet-18 with random weights is explained instead: a report of the images, in turns with the maps
that it shows (five x-features and the 1-Heatmap of each image), and the ratio of their seconds of the processor. A
report should take at most 1.5 times its maps.

    python -m benchmarks.report_speed --images 500 --out DIR
    python -m benchmarks.report_speed --maps --images 300 --rounds 3 --out DIR
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from captum.attr import InputXGradient
from torch import Tensor, nn

from captum_xnn import Recipe, XNNAttribution
from captum_xnn.report._page import write_report

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def found() -> tuple[str, str] | None:
    """Returns Chromium and its driver, None where either is missing."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def chromium(width: int = 1400, height: int = 900) -> Iterator[Any]:
    """Returns headless Chromium with a window of so many CSS pixels and a new profile, as a Selenium driver."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    programs = found()
    if programs is None:
        raise SystemExit("expected chromium and chromedriver, got none; `apt-get install chromium chromium-driver`")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = programs[0]
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(programs[1]))
        try:
            resize(driver, width, height)
            yield driver
        finally:
            driver.quit()


def resize(driver: Any, width: int, height: int) -> None:
    """Gives the window a size that windows on a screen may not have, such as 360 pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def pictures(n: int) -> Tensor:
    """Returns pictures (n, 3, 224, 224) in [0, 1] that compress about as photographs do."""
    generator = torch.Generator().manual_seed(0)
    made = torch.zeros(n, 3, 224, 224)
    for size, weight in ((4, 1.0), (16, 0.6), (56, 0.35), (224, 0.12)):
        noise = torch.rand(n, 3, size, size, generator=generator) - 0.5
        made += weight * nn.functional.interpolate(noise, (224, 224), mode="bilinear")
    return (made + 0.5).clamp(0, 1)


def write(folder: Path, n: int) -> Path:
    """Returns a report of n images, on a network that nobody trained."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4)
    ).eval()
    images = pictures(n)
    with torch.no_grad():
        target = int(model(images).argmax(1).mode().values)
    xnn = XNNAttribution(model, "3", heatmap=InputXGradient, recipe=Recipe(steps=50))
    xnn.fit(images, target, progress=False)
    return write_report(folder / f"report-{n}.html", xnn, list(images.split(32)), target)


OPENED = """
const done = arguments[0];
function ready() {
  const photo = document.querySelector(".item .photo");
  if (document.documentElement.dataset.ready && photo && photo.complete && photo.naturalWidth)
    requestAnimationFrame(() => setTimeout(() => done(performance.now())));
  else setTimeout(ready, 5);
}
ready();
"""

TOGGLED = """
const [k, done] = arguments, button = document.querySelector(`#toggles [data-map="${k}"]`);
requestAnimationFrame(() => setTimeout(() => {
  const start = performance.now();
  button.click();
  const shown = [...document.querySelectorAll(".item .over")].filter((image) => !image.hidden);
  Promise.all(shown.map((image) => image.decode())).then(() =>
    requestAnimationFrame(() => setTimeout(() => done([performance.now() - start, shown.length]))));
}));
"""


class Seconds(NamedTuple):
    """How long something took."""

    clock: float
    computing: float
    """By the page's own thread."""


def computed(driver: Any) -> float:
    """Returns the seconds that the page's thread has computed so far."""
    metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))


def opening(driver: Any, page: Path) -> Seconds:
    """Returns how long the page takes until the first picture of its gallery is drawn."""
    driver.set_script_timeout(60)
    driver.get("about:blank")
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    before, start = computed(driver), time.perf_counter()
    driver.get(page.resolve().as_uri())
    driver.execute_script("document.getElementById('gallery').scrollIntoView()")
    driver.execute_async_script(OPENED)
    return Seconds(time.perf_counter() - start, computed(driver) - before)


def toggling(driver: Any, k: int) -> tuple[Seconds, int]:
    """Returns how long a toggle of an opened page takes, and how many maps it draws at once."""
    before = computed(driver)
    milliseconds, maps = driver.execute_async_script(TOGGLED, k)
    return Seconds(milliseconds / 1000, computed(driver) - before), maps


def measure(page: Path, rounds: int) -> tuple[list[Seconds], list[Seconds], int]:
    """Returns the times to open and to toggle, and how many maps a toggle drew at once."""
    opened, toggled, drawn = [], [], 0
    for _ in range(rounds):
        with chromium() as driver:
            opened.append(opening(driver, page))
            for k in range(5):
                seconds, maps = toggling(driver, k)
                toggled.append(seconds)
                drawn = max(drawn, maps)
    return opened, toggled, drawn


def beside_maps(folder: Path, n: int, rounds: int) -> list[tuple[float, float]]:
    """Returns in every round the seconds of the processor for a report of n images, and for its maps alone."""
    from functools import partial

    from benchmarks.excitation_speed import network
    from captum_xnn.models import ContributionGroups

    images = pictures(n)
    everything = torch.ones(len(images[:8]), dtype=torch.bool)
    few = partial(ContributionGroups, positives=2, others=2, grid=4)
    model = network("resnet18")
    with torch.no_grad():
        target = int(model(images[:8]).argmax(1).mode().values)
    xnn = XNNAttribution(model, "layer4", autoencoder=few).fit(images[:8], target, positives=everything, progress=False)
    xnn.explain(images[:2], target)  # what is made once is made before
    found = []
    for _ in range(rounds):
        start = time.process_time()
        for part in images.split(16):
            xnn.attribute(part, target)
            xnn.one_heatmap(part, target)
        middle = time.process_time()
        write_report(folder / f"resnet18-{n}.html", xnn, images, target)
        found.append((time.process_time() - middle, middle - start))
    return found


def compare(images: int, rounds: int, out: Path) -> None:
    """Prints how long a report takes beside its maps."""
    turns = beside_maps(out, images, rounds)
    report, maps = (statistics.median(each) for each in zip(*turns, strict=True))
    ratio = statistics.median(a / b for a, b in turns)
    print(
        f"{images} images, ResNet-18: the report takes {report:.1f} s, its maps {maps:.1f} s, ratio {ratio:.2f} "
        f"(median of {rounds}, bar 1.5)"
    )


def main(images: int, rounds: int, out: Path, maps: bool = False) -> None:
    """Prints the figures."""
    out.mkdir(parents=True, exist_ok=True)
    if maps:
        compare(images, rounds, out)
        return
    page = write(out, images)
    opened, toggled, drawn = measure(page, rounds)
    print(f"{images} images, 5 x-features: {page.stat().st_size / 1e6:.1f} MB")
    for what, seconds in (("opens in", opened), (f"a toggle ({drawn} maps in and near the window)", toggled)):
        clock, computing = ([1000 * s for s in each] for each in zip(*seconds, strict=True))
        print(
            f"{what}: {min(clock):.0f} ms at best, {statistics.median(clock):.0f} ms median, of which the page's "
            f"thread computes {statistics.median(computing):.0f} ms"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--maps", action="store_true", help="compare a report with its maps")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the page to")
    main(**vars(parser.parse_args()))
