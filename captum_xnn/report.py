"""Reports: one self-contained HTML file of numbers and pictures, which opens offline and can be mailed.

Pictures are inlined as PNG, styles are inlined too, and nothing is loaded or run: the file forbids it to
itself by a content security policy. The template is ``templates/report.html`` beside this module; every text
is escaped.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

from matplotlib.figure import Figure

from captum_xnn.files import replace_file

__all__ = ["Illustration", "Section", "Table", "write_report"]


@dataclass(frozen=True)
class Illustration:
    """A picture in a report.

    Attributes:
        figure: Any matplotlib figure, such as those of :mod:`captum_xnn.visualize`.
        alt: What the picture shows, in a sentence for those who cannot see it.
        caption: Text below the picture.
    """

    figure: Figure
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table in a report.

    Attributes:
        header: One text per column.
        rows: Rows of as many cells each; the first cell names its row. Cells are written with ``str``: format
            numbers first.
        caption: Text above the table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report, under a heading of its own.

    Attributes:
        title: The heading.
        text: Plain text; an empty line starts a new paragraph.
        figures: Pictures below the text.
        table: A table below the pictures.
    """

    title: str
    text: str = ""
    figures: Sequence[Illustration] = ()
    table: Table | None = None


@dataclass(frozen=True)
class _Picture:
    """A picture as the template needs it; width and height in CSS pixels."""

    source: str
    width: int
    height: int


def write_report(
    path: str | os.PathLike[str],
    sections: Sequence[Section],
    *,
    title: str,
    summary: Sequence[tuple[str, str, str]],
    dpi: int = 144,
) -> Path:
    """Returns the path of the report it has written, one HTML file that needs no other.

    An older report of that name is replaced only once the new one is complete. Missing folders are made.

    Args:
        path: Where to write.
        sections: The parts below the summary, in order.
        title: The heading of the report and its name in the browser.
        summary: Rows of a label, a value with its unit, and what the value means, such as
            ``("F_reg, test", "0.31 logits", "mean |model - x-features|")``.
        dpi: Resolution of the pictures, in pixels per inch of the figures; 96 is one pixel of an ordinary
            screen.

    Raises:
        ImportError: If jinja2 is missing.
        ValueError: If a row of the summary or of a table has the wrong number of cells, or a picture has no
            alt text.

    Example:
        >>> import tempfile
        >>> from captum_xnn.visualize import show_contributions
        >>> figure = show_contributions([2.0, -0.5], bias=1.0, surrogate=2.5, prediction=2.6)
        >>> section = Section("Why", figures=[Illustration(figure, alt="2.5 is 1 + 2 - 0.5")])
        >>> summary = [("F_reg, test", "0.31 logits", "mean |model - x-features|")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_report(f"{folder}/finch.html", [section], title="Goldfinch", summary=summary)
        ...     path.name, "0.31 logits" in path.read_text(encoding="utf-8")
        ('finch.html', True)
    """
    _check(sections, summary)
    page = _render(sections, title, summary, dpi)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, page.encode())
    return target


def _check(sections: Sequence[Section], summary: Sequence[tuple[str, str, str]]) -> None:
    """Raises ValueError for what would make a crooked table or an unreadable picture."""
    for row in summary:
        if isinstance(row, str) or len(row) != 3:
            raise ValueError(
                f"expected summary rows of label, value and meaning, got {row!r}; "
                'write for example ("F_reg, test", "0.31 logits", "mean |model - x-features|")'
            )
    for section in sections:
        _check_table(section)
        for number, picture in enumerate(section.figures, start=1):
            if not picture.alt.strip():
                raise ValueError(
                    f"expected an alt text for picture {number} of section {section.title!r}, got "
                    f"{picture.alt!r}; say in a sentence what is to be seen"
                )


def _check_table(section: Section) -> None:
    """Raises ValueError where a row of the section's table is longer or shorter than the header."""
    if section.table is None:
        return
    for row in section.table.rows:
        if len(row) != len(section.table.header):
            raise ValueError(
                f"expected {len(section.table.header)} cells in each row of the table of section "
                f"{section.title!r}, got {list(row)!r}; fill what is missing with an empty text"
            )


def _render(sections: Sequence[Section], title: str, summary: Sequence[tuple[str, str, str]], dpi: int) -> str:
    """Returns the whole page."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            "expected jinja2 for write_report, got no such module; run `pip install captum-xnn[report]`"
        ) from error
    source = resources.files("captum_xnn").joinpath("templates", "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["paragraphs"] = _paragraphs
    environment.filters["picture"] = partial(_picture, dpi=dpi)
    return environment.from_string(source).render(sections=sections, title=title, summary=summary)


def _paragraphs(text: str) -> list[str]:
    """Returns the paragraphs of a text, which empty lines part."""
    return [part.strip() for part in "\n".join(map(str.strip, text.splitlines())).split("\n\n") if part.strip()]


def _picture(figure: Figure, dpi: int) -> _Picture:
    """Returns a figure as a data URI with the size of the figure's inches."""
    buffer = io.BytesIO()
    # Without the program's name and version, equal figures give equal files for longer.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return _Picture(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", width, height)
