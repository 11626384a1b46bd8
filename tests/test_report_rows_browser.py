"""Pages about texts and tables in a browser: colours, toggles, sorting, names, and no sideways scrolling."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import all_of, emulate, one, undisturbed
from test_report_browser import choose, opened, signed, text, texts
from test_report_rows import EVIL, WORDS, Reads
from torch import nn

from benchmarks.report_speed import chromium, found, resize
from captum_xnn import XNNAttribution
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.plots._colours import FEATURES
from captum_xnn.plots._sentence import sentence

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(found() is None, reason="chromium and chromedriver are not installed"),
]
pytest.importorskip("selenium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from captum.attr import IntegratedGradients, LayerIntegratedGradients, Saliency

    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(1)
    ids = torch.randint(0, 5, (60, 7))
    backend = FromCaptum(LayerIntegratedGradients, layer="embedding", n_steps=4)
    xnn = XNNAttribution(Reads().eval(), "act", 3, heatmap=backend).fit(ids, target=1, progress=False)
    words = [[WORDS[i] if i else EVIL + "w" * 60 for i in row] for row in ids[:12].tolist()]
    classes = ["bad", "good"]
    read = xnn.report(ids[:12], folder / "texts.html", 1, tokens=words, class_names=classes, title="Texts")
    data = torch.randn(80, 14)
    model = nn.Sequential(nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 1)).eval()
    two = XNNAttribution(model, "1", 2, heatmap=FromCaptum(IntegratedGradients, baselines=data.mean(0, keepdim=True)))
    two.fit(data, progress=False)
    names = [f"input feature {i}" for i in range(13)] + [EVIL]
    gradients = two.with_heatmap(FromCaptum(Saliency, abs=False))
    return {
        "texts": read,
        "table": two.report(data[:6], folder / "table.html", input_names=names),
        "gradients": gradients.report(data[:6], folder / "gradients.html", input_names=names),
        "risk": two.report(data[:6], folder / "risk.html", input_names=names, unit="log-odds"),
    }


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(autouse=True)
def quiet(driver: Any) -> Iterator[None]:
    with undisturbed(driver, 1280, "file:"):
        yield
        driver.execute_script("localStorage.clear()")


def strengths(driver: Any, item: int) -> list[tuple[str, str]]:
    """Class and strength of each token of an example."""
    return [
        (a, b)
        for a, b in driver.execute_script(
            "return [...document.querySelectorAll('.example')[arguments[0]].querySelectorAll('.token')].map("
            "(t) => [t.className.replace('token ', '').replace(' down', ''), t.style.getPropertyValue('--strength')])",
            item,
        )
    ]


def percent(value: float) -> str:
    return f"{int(100 * min(1, abs(value)) ** 0.65 + 0.5)}%"


def test_words_have_the_colour_of_their_strongest_x_feature(driver: Any, pages: dict[str, Path]) -> None:
    data = opened(driver, pages["texts"])
    rows = data["targets"][0]["rows"]
    for i in (0, 5, 11):
        expected = []
        for j in range(7):
            values = [rows[i]["maps"][k][j] * rows[i]["strength"][k] for k in range(3)]
            k = max(range(3), key=lambda k: abs(values[k]))
            expected.append((f"x{k}", percent(values[k])))
        assert strengths(driver, i) == expected
    one(driver, "#toggles [data-map='2']").click()
    signs = {1: "raises", -1: "lowers", 0: "even"}
    for i in (0, 5):
        values = rows[i]["maps"][2]
        assert strengths(driver, i) == [(signs[(v > 0) - (v < 0)], percent(v)) for v in values]
    one(driver, "#toggles [data-map='one']").click()
    assert [b for _, b in strengths(driver, 3)] == [percent(v) for v in rows[3]["one"]]
    pressed = [b.get_attribute("data-map") for b in all_of(driver, "#toggles [aria-pressed='true']")]
    assert pressed == ["one"]
    # Words are texts, whatever they hold.
    assert any(EVIL in word for word in texts(driver, ".token")) and driver.title == "Texts"


def test_colours_of_x_features_are_no_signs_and_dashes_mark_what_lowers(driver: Any, pages: dict[str, Path]) -> None:
    data = opened(driver, pages["texts"])
    colours = driver.execute_script(
        "return [...Array(6).keys()].map((k) => getComputedStyle(document.documentElement).getPropertyValue(`--x${k}`))"
    )
    assert tuple(colours) == FEATURES
    rows = data["targets"][0]["rows"]
    lower = 0
    for i in (0, 5, 11):
        expected = []
        for j in range(7):
            values = [rows[i]["maps"][k][j] * rows[i]["strength"][k] for k in range(3)]
            expected.append(max(values, key=abs) < -0.15)
        found = driver.execute_script(
            "return [...document.querySelectorAll('.example')[arguments[0]].querySelectorAll('.token')].map("
            "(t) => getComputedStyle(t).textDecorationStyle === 'dashed' && t.classList.contains('down'))",
            i,
        )
        assert found == expected
        lower += sum(expected)
    assert lower > 0
    assert "no sign" in text(driver, "#key") and "dashed line" in text(driver, ".reading ol")
    one(driver, "[data-name-input='1:1']").send_keys("praise")
    # Words have numbers, so a name keeps its own.
    assert texts(driver, "#toggles button")[1:4] == ["x-feature 1", "2 praise", "x-feature 3"]
    one(driver, "#toggles [data-map='1']").click()
    assert text(driver, "#key") == "praise: orange raises the number, blue lowers it."
    assert not texts(driver, ".token.down")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out_and_words_can_be_read_on_them(driver: Any, pages: dict[str, Path], scheme: str) -> None:
    emulate(driver, scheme)
    opened(driver, pages["texts"])
    driver.execute_script(
        "document.querySelectorAll('.example')[0].querySelectorAll('.token').forEach((t, k) => {"
        "t.className = `token x${k % 6}`; t.style.setProperty('--strength', '100%'); })"
    )
    # A canvas turns any notation of a colour into numbers.
    pixels = driver.execute_script(
        """
        const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const rgb = (...layers) => {
          for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
          return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const of = (node, what) => getComputedStyle(node)[what];
        const card = of(document.querySelector(".example"), "backgroundColor");
        const page = of(document.body, "backgroundColor"), root = getComputedStyle(document.documentElement);
        const words = [...document.querySelector(".example").querySelectorAll(".token")].slice(0, 6);
        return [words.map((w) => [rgb(of(w, "color")), rgb(card, of(w, "backgroundColor"))]),
                words.map((_, k) => rgb(root.getPropertyValue(`--x${k}`))), [rgb(card), rgb(page)]];
        """
    )
    words, dots, grounds = pixels
    assert len(words) == 6
    assert min(contrast(ink, ground) for ink, ground in words) >= 4.5
    assert min(contrast(dot, ground) for dot in dots for ground in grounds) >= 3


def contrast(one: list[float], other: list[float]) -> float:
    """The ratio of luminances by WCAG."""

    def luminance(colour: list[float]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return high / low


def lines_of(driver: Any, item: int, part: str) -> list[list[str]]:
    """The cells of a part of an example's table."""
    return list(
        driver.execute_script(
            "return [...document.querySelectorAll('.example')[arguments[0]].querySelectorAll(`${arguments[1]} tr`)]"
            ".map((line) => [...line.children].map((cell) => cell.textContent))",
            item,
            part,
        )
    )


def test_parts_of_inputs_add_up_to_contributions(driver: Any, pages: dict[str, Path]) -> None:
    data = opened(driver, pages["table"])
    row, example = data["targets"][0]["rows"][2], data["images"][2]
    parts = row["parts"]
    order = sorted(range(14), key=lambda j: -sum(abs(of[j]) for of in parts))
    (head,) = lines_of(driver, 2, "thead")
    assert head == ["input", "value", "average", "together", "x-feature 1", "x-feature 2"]
    lines = lines_of(driver, 2, "tbody")
    assert [line[0] for line in lines] == [example["cells"][j] for j in order[:12]]
    for line, j in zip(lines, order, strict=False):
        expected = [parts[0][j] + parts[1][j], parts[0][j], parts[1][j]]
        assert line[3:] == [signed(value, data, more=1) for value in expected]
        assert [float(text.replace("\N{MINUS SIGN}", "-")) for text in line[1:3]] == pytest.approx(
            [example["values"][j], data["means"][j]], rel=5e-4
        )
    ends = {line[0]: line[1:] for line in lines_of(driver, 2, "tfoot")}
    others = [sum(of[j] for j in order[12:]) for of in parts]
    rest = [c - sum(of) for c, of in zip(row["c"], parts, strict=True)]
    for title, values in (("2 other inputs", others), ("no single input", rest), ("sum: the contribution", row["c"])):
        assert ends.pop(title) == [signed(value, data, more=1) for value in (sum(values), *values)]
    assert not ends
    total = signed(sum(row["c"]), data)
    assert f"logits = bias {row['bias']:.{data['targets'][0]['decimals']}f}".replace("-", "\N{MINUS SIGN}") in text(
        driver, ".example:nth-child(3) .numbers"
    )
    assert f"x-features {total}, unexplained" in text(driver, ".example:nth-child(3) .numbers")
    one(driver, "#toggles [data-map='1']").click()
    assert lines_of(driver, 2, "thead") == [["input", "value", "average", "x-feature 2"]]
    assert [line[3] for line in lines_of(driver, 2, "tbody")] == [signed(parts[1][j], data, more=1) for j in order[:12]]


def test_whole_numbers_keep_their_digits(driver: Any, pages: dict[str, Path]) -> None:
    opened(driver, pages["table"])
    given = [1987, 12345678, 123456.7, 63.5465, 0.0012346, -2.5, 0]
    expected = ["1987", "12345678", "123457", "63.55", "0.001235", "\N{MINUS SIGN}2.5", "0"]
    assert driver.execute_script("return arguments[0].map(formatted)", given) == expected


def test_contributions_are_spread_by_maps_of_another_unit(driver: Any, pages: dict[str, Path]) -> None:
    data = opened(driver, pages["gradients"])
    row = data["targets"][0]["rows"][2]
    assert "parts" not in row
    weight = [sum(abs(row["maps"][k][j] * row["strength"][k]) for k in range(2)) for j in range(14)]
    order = sorted(range(14), key=lambda j: -weight[j])[:12]
    lines = lines_of(driver, 2, "tbody")
    assert [line[0] for line in lines] == [data["images"][2]["cells"][j] for j in order]
    for k in range(2):
        mass = sum(map(abs, row["maps"][k]))
        parts = [v / mass * abs(row["c"][k]) if mass else 0.0 for v in row["maps"][k]]
        assert [line[3 + k] for line in lines] == [signed(parts[j], data, more=1) for j in order]
    assert not lines_of(driver, 2, "tfoot")
    assert "and 2 more inputs with less" in text(driver, "#examples")


@pytest.mark.parametrize("which", ["texts", "table"])
def test_sorting_names_and_sentences(driver: Any, pages: dict[str, Path], which: str) -> None:
    data = opened(driver, pages[which])
    rows, label = data["targets"][0]["rows"], data["targets"][0]["label"]
    key = data["targets"][0]["key"]
    one(driver, f"[data-name-input='{key}:0']").send_keys("praise")
    names = ["praise", *(f"x-feature {k + 1}" for k in range(1, len(rows[0]["c"])))]
    expected = [
        sentence(
            r["c"],
            names,
            target_name=label,
            surrogate=r["sum"],
            prediction=r["prediction"],
            is_positive=r["is_positive"] if data["targets"][0]["classes"] else None,
        ).replace("-", "\N{MINUS SIGN}")
        for r in rows
    ]
    assert [said.replace("-", "\N{MINUS SIGN}") for said in texts(driver, ".example .why")] == expected
    choose(driver, "#sort", "0")
    captions = [image["caption"] for image in data["images"]]
    ranked = sorted(range(len(rows)), key=lambda i: -rows[i]["c"][0])
    assert texts(driver, ".example .caption") == [captions[i] for i in ranked]
    kept = json.loads(str(one(driver, "#names-json").get_property("value")))
    assert kept["names"] == {key: {"0": "praise"}}
    opened(driver, pages[which])
    assert "praise" in text(driver, "#toggles")


@pytest.mark.parametrize("which", ["texts", "table"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_scrolls_sideways(driver: Any, pages: dict[str, Path], which: str, width: int) -> None:
    resize(driver, width, 740)
    for scheme in ("light", "dark"):
        emulate(driver, scheme)
        opened(driver, pages[which])
        wide = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1]


class Unequal(nn.Module):
    """Class 0 reads one channel of the hidden layer, class 1 reads four: a fit of four x-features keeps 1 and 4."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.head = first, nn.ReLU(), nn.Linear(4, 2)
        self.head.weight.data = torch.tensor([[1.0, 0.0, 0.0, 0.0], [-1.0, -0.8, -1.2, -0.9]])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.first(inputs)).flatten(1))


@pytest.mark.parametrize("kind", ["images", "table"])
def test_each_class_has_as_many_x_features_as_its_fit_kept(driver: Any, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    images = kind == "images"
    data = torch.randn(90, 1, 8, 8) if images else torch.randn(90, 6)
    pooled = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = Unequal(pooled if images else nn.Linear(6, 4))
    with torch.no_grad():
        model.head.bias -= model(data).median(0).values  # so that each class is the highest for some
    xnn = XNNAttribution(model.eval(), "act", 1 if images else 4).fit(data, target=0, progress=False)
    xnn.n_features = 4  # no group of these images is small enough to be merged
    xnn.fit(data, target=1, progress=False)
    kept = [xnn.explainer(t).form.n_features for t in (0, 1)]
    assert kept == [1, 4]
    page = xnn.report(data[:8], tmp_path / "unequal.html", [0, 1], class_names=["one", "four"])
    opened(driver, page)
    assert text(driver, ".facts div:nth-child(3)") == "x-features1 to 4"
    for index, count in ((0, 1), (1, 4), (0, 1)):
        choose(driver, "#target", str(index))
        assert len(texts(driver, "#toggles button")) == 1 + count  # the 1-Heatmap, or all x-features
        assert len(all_of(driver, "#sort option")) == 3 + count
        assert sum(node.is_displayed() for node in all_of(driver, ".card")) == count
        if count == 4:
            one(driver, "#toggles [data-map='3']").click()
            choose(driver, "#sort", "3")
    # Neither the map nor the order of an x-feature that this class lacks stays chosen.
    pressed = [b.get_attribute("data-map") for b in all_of(driver, "#toggles [aria-pressed='true']")]
    assert pressed == ([] if images else ["all"])
    assert one(driver, "#sort").get_property("value") == "given"
    shown = one(driver, "main").text
    assert "undefined" not in shown and "NaN" not in shown


def test_log_odds_have_their_probability(driver: Any, pages: dict[str, Path]) -> None:
    data = opened(driver, pages["risk"])
    shown = texts(driver, ".example .numbers")
    assert len(shown) == 6
    for row, numbers in zip(data["targets"][0]["rows"], shown, strict=True):
        chance = torch.tensor(row["prediction"], dtype=torch.float64).sigmoid().item()
        assert numbers.startswith(f"{100 * chance:.{int(not 0.1 <= chance <= 0.9)}f} %: ")
        assert " log-odds = bias " in numbers
    assert "0 log-odds are 50 %" in text(driver, ".reading")
    opened(driver, pages["table"])
    assert not any("%" in numbers for numbers in texts(driver, ".example .numbers"))
