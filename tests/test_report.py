"""Reports: every number is there, nothing is loaded, and an older report survives a failure."""

from __future__ import annotations

import base64
import os
import stat
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from captum_xnn.report import Illustration, Section, Table, write_report
from captum_xnn.visualize import show_contributions

SUMMARY = [
    ("F_reg, test", "0.31 logits", "mean |model - x-features|"),
    ("F_cls, test", "98.7 %", "examples that keep their class"),
]
# Elements that HTML never closes.
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a report holds: elements with attributes, visible text, and what is left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data.strip())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def picture() -> Figure:
    return show_contributions([2.0, -0.5], bias=1.0, surrogate=2.5, prediction=2.6)


def sections() -> list[Section]:
    return [
        Section(
            "Examples",
            "First paragraph\nstill the first.\n\n \nSecond.",
            [Illustration(picture(), "A sum", "Two terms")],
        ),
        Section("Features", table=Table(["x-feature", "locality"], [["wing", 1.97], ["head", "2.04"]], "In nats")),
    ]


def written(folder: Path, parts: list[Section] | None = None, **options: Any) -> tuple[str, Page]:
    settings: dict[str, Any] = {"title": "Goldfinch", "summary": SUMMARY} | options
    text = write_report(folder / "report.html", sections() if parts is None else parts, **settings).read_text("utf-8")
    return text, Page(text)


def test_report_shows_every_number_and_text(tmp_path: Path) -> None:
    _, page = written(tmp_path)
    assert page.open == []
    expected = {
        "Goldfinch",
        "Examples",
        "Features",
        "Two terms",
        "In nats",
        "wing",
        "1.97",
        "head",
        "2.04",
        "Second.",
    }
    assert expected | {text for row in SUMMARY for text in row} <= set(page.text)
    assert "First paragraph\nstill the first." in page.text


def test_report_loads_and_runs_nothing(tmp_path: Path) -> None:
    text, page = written(tmp_path)
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base", "form"}
    addresses = [a[key] for _, a in page.elements for key in ("src", "href", "srcset") if a.get(key)]
    assert addresses and all(str(address).startswith(("data:image/png;base64,", "#")) for address in addresses)
    policies = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_pictures_are_inlined_with_alt_text_and_size(tmp_path: Path) -> None:
    figure = picture()
    _, page = written(tmp_path, [Section("One", figures=[Illustration(figure, "A sum")])], dpi=96)
    (image,) = page.named("img")
    assert image["alt"] == "A sum"
    png = base64.b64decode(str(image["src"]).partition(",")[2])
    assert png.startswith(b"\x89PNG")
    # The header of a PNG holds width and height at byte 16, four bytes each; at 96 dpi they are CSS pixels.
    size = [int.from_bytes(png[i : i + 4], "big") for i in (16, 20)]
    shown = [int(str(image["width"])), int(str(image["height"]))]
    assert all(abs(a - b) <= 1 for a, b in zip(size, shown, strict=True))


def test_headings_are_nested_and_regions_point_to_headings(tmp_path: Path) -> None:
    _, page = written(tmp_path, sections() * 2)
    assert [tag for tag, _ in page.elements if tag in {"h1", "h2", "h3"}] == ["h1"] + ["h2"] * 6
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(ids)
    assert {str(a["href"])[1:] for a in page.named("a")} == {f"section-{n}" for n in range(1, 5)}


def test_markup_in_any_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    part = Section(evil, evil, [Illustration(picture(), evil, evil)], Table([evil], [[evil]], evil))
    text, page = written(tmp_path, [part] * 4, title=evil, summary=[(evil, evil, evil)])
    assert "<script" not in text and not page.named("script")
    assert page.named("img")[0]["alt"] == evil
    assert evil in page.text


def test_equal_reports_are_equal_files(tmp_path: Path) -> None:
    assert written(tmp_path)[0] == written(tmp_path)[0]


def test_report_without_sections_or_summary_is_complete(tmp_path: Path) -> None:
    _, page = written(tmp_path, [], summary=[])
    assert page.text == ["Goldfinch", "Goldfinch"]
    assert page.open == []


def test_folders_are_made_and_only_the_report_is_left(tmp_path: Path) -> None:
    path = write_report(str(tmp_path / "a" / "b" / "r.html"), sections(), title="T", summary=SUMMARY)
    assert [p.name for p in path.parent.iterdir()] == ["r.html"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are posix")
def test_report_is_as_readable_as_any_other_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    path = write_report(tmp_path / "r.html", [], title="T", summary=SUMMARY)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


class Unpaintable(Figure):
    def savefig(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no ink")


def test_old_report_survives_a_picture_that_cannot_be_drawn(tmp_path: Path) -> None:
    old, _ = written(tmp_path)
    with pytest.raises(RuntimeError, match="no ink"):
        written(tmp_path, [Section("New", figures=[Illustration(Unpaintable(), "none")])])
    assert (tmp_path / "report.html").read_text("utf-8") == old
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_old_report_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = written(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path, [], title="New")
    assert (tmp_path / "report.html").read_text("utf-8") == old
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_missing_jinja2_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"expected jinja2 .* run `pip install captum-xnn\[report\]`"):
        written(tmp_path)


@pytest.mark.parametrize(
    ("parts", "summary", "message"),
    [
        (
            [],
            [("F_reg", "0.31")],
            r"expected summary rows of label, value and meaning, got \('F_reg', '0.31'\); write",
        ),
        ([], ["abc"], r"expected summary rows .* got 'abc'; write"),
        (
            [Section("S", table=Table(["a", "b"], [["1"]]))],
            [],
            r"expected 2 cells in each row of the table of section 'S', got \['1'\]; fill",
        ),
        (
            [Section("S", figures=[Illustration(Figure(), " ")])],
            [],
            r"expected an alt text for picture 1 of section 'S', got ' '; say",
        ),
    ],
)
def test_crooked_tables_and_missing_alt_texts_are_refused(
    tmp_path: Path, parts: list[Section], summary: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        written(tmp_path, parts, summary=summary)
    assert not list(tmp_path.iterdir())
