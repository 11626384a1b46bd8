"""Pictures of texts: words in the colours of the x-features that they drive, on lines that words fill one by one.

Conventions:
    N texts, K x-features, L tokens at most. A contribution is spread over the tokens of its text in proportion to its
    map, so the parts of a text's tokens add up to the sizes of its contributions. A word's colour says which x-feature
    has the largest part there, and not whether the part raises or lowers the output.
    Widths are measured by the renderer, in points. A word's box holds the word, so boxes that do not overlap hold words
    that do not overlap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple, cast, final

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch

from captum_xnn.plots._colours import FEATURES, INK
from captum_xnn.plots._names import Names, resolve_names
from captum_xnn.plots._numbers import Array, Numbers, examples_of, finite, table_of
from captum_xnn.plots._picture import Picture

__all__ = ["show_tokens"]

_SIZE, _SMALL = 10.0, 7.0
# Points: the edge of the figure, the height of a line, between boxes, and between the edge of a box and its word.
_EDGE, _LINE, _GAP, _PAD = 8.0, 19.0, 3.0, 2.5
# Points between texts, and above the legend.
_APART = 7.0
# Hinting rounds the widths of letters to pixels, so that words become wider at some resolutions. Without it they keep
# their widths up to half a percent.
_LETTERS: Any = {"text.hinting": "no_hinting"}
_WIDER = 1.005
# Weaker parts get neither a number nor a line below the word; they are hardly coloured.
_VISIBLE = 0.15
# The deepest colour still lets the word be read.
_DEEPEST = 0.5


@final
class _Texts(Picture):
    """A figure whose words have the same widths at every resolution."""

    def draw(self, renderer: Any) -> None:
        with rc_context(_LETTERS):
            super().draw(renderer)


class _Word(NamedTuple):
    """A word to draw, or an entry of the legend."""

    text: str
    width: float
    """Width of its box, in points."""
    text_width: float
    number: str = ""
    """Number of the x-feature, drawn small behind the word."""
    colour: str | None = None
    strength: float = 0.0
    lowers: bool = False
    bold: bool = False


class _Line(NamedTuple):
    """Words that go on below each other only where they do not fit beside each other."""

    words: list[_Word]
    above: float = 0.0
    """Free space above, in points."""


class _Placed(NamedTuple):
    """A word at its place, in points from the upper left corner of the picture."""

    word: _Word
    left: float
    middle: float


def show_tokens(
    tokens: Sequence[Sequence[str]],
    maps: Numbers,
    contributions: Numbers,
    *,
    names: Names | None = None,
    title: str | None = None,
    row_names: Sequence[str] | None = None,
    width: float = 8.0,
) -> Figure:
    """Draw texts whose words have the colour and the number of the x-feature that they drive most.

    A word's colour is as deep as its part of the contribution, compared with the largest part in all texts. A dashed
    line below a word says that the part lowers the output. Long texts take several lines. A word that is wider than the
    figure is shortened.

    Args:
        tokens: N lists of words, without padding.
        maps: Attribution maps (N, K, L) or (N, K, L, ...); dimensions after the tokens, such as those of embeddings,
            are summed. Values beyond the tokens of a text are left out.
        contributions: Contributions (N, K) in logits.
        names: Names of the x-features: a list, a mapping from their numbers, or the file that a report exports.
        title: Text above the picture.
        row_names: N texts, each written above its words.
        width: Width of the figure in inches.

    Raises:
        ValueError: If a shape does not fit, a value is not finite, or the figure is narrower than 2 inches.

    Example:
        >>> maps = np.array([[[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]]])
        >>> figure = show_tokens([["a", "dull", "plot"]], maps, [[4.0, -1.0]])
        >>> [text.get_text() for text in figure.axes[0].texts][:6]
        ['a', '2', 'dull', '1', 'plot', '1']
    """
    if width < 2:
        raise ValueError(f"width is {width} inches; pass at least 2, or words have no room")
    table = table_of(contributions)
    parts = _parts(tokens, maps, table)
    labels = resolve_names(names, table.shape[1])
    measure = _Measure(72 * width - 2 * _EDGE)
    lines: list[_Line] = [] if title is None else [_Line([measure.word(title, bold=True)])]
    heads = [""] * len(table) if row_names is None else _checked(row_names, len(table))
    for words, head, of in zip(tokens, heads, parts, strict=True):
        if head:
            lines.append(_Line([measure.word(head, bold=True)], above=_APART))
        coloured = [_coloured(measure, word, of[:, j]) for j, word in enumerate(words)]
        lines.append(_Line(coloured, above=0.0 if head else _APART))
    entries = [_entry(measure, label, k) for k, label in enumerate(labels)]
    lines.append(_Line([*entries, measure.word("lowers the output", lowers=True)], above=2 * _APART))
    return _drawn(lines, measure.limit, width)


def _checked(row_names: Sequence[str], n_texts: int) -> list[str]:
    """Check the N texts above the words."""
    if isinstance(row_names, str) or len(row_names) != n_texts:
        raise ValueError(f"row_names is {row_names!r} for N = {n_texts} texts; pass a list with one text for each")
    return [str(name) for name in row_names]


def _parts(tokens: Sequence[Sequence[str]], maps: Numbers, table: Array) -> list[Array]:
    """Spread each contribution over the tokens of its text, relative to the largest part of all texts: N of (K, L)."""
    array = finite(examples_of(maps, len(table), "maps"), "maps")
    n_texts, n_features = table.shape
    if array.shape[1] != n_features:
        raise ValueError(
            f"maps are {array.shape}, not (N, K, L) or (N, K, L, ...) for K = {n_features} contributions; give one map "
            "for each contribution"
        )
    flat = array.reshape(*array.shape[:3], -1).sum(3)
    if isinstance(tokens, str) or any(isinstance(words, str) for words in tokens) or len(tokens) != n_texts:
        raise ValueError(
            f"tokens are {len(tokens)} texts for N = {n_texts} examples with contributions; pass a list with the words "
            "of each text, as in [text.split() for text in texts]"
        )
    parts = []
    for i, words in enumerate(tokens):
        if not 0 < len(words) <= flat.shape[2]:
            raise ValueError(
                f"text {i} has {len(words)} words, and the maps have {flat.shape[2]} tokens; pass the words of each "
                "text without padding"
            )
        own = flat[i, :, : len(words)]
        mass = np.abs(own).sum(1)
        parts.append(own * (table[i] / np.where(mass > 0, mass, 1.0))[:, None])
    largest = max(float(np.abs(of).max()) for of in parts)
    return [of / largest if largest > 0 else of for of in parts]


def _coloured(measure: _Measure, word: str, parts: Array) -> _Word:
    """Give a word the colour of the x-feature with the largest part (K,)."""
    k = int(np.abs(parts).argmax())
    strength = float(np.abs(parts[k]))
    visible = strength > _VISIBLE
    return measure.word(
        word,
        number=str(k + 1) if visible else "",
        colour=FEATURES[k % len(FEATURES)],
        strength=strength,
        lowers=visible and bool(parts[k] < 0),
    )


def _entry(measure: _Measure, label: str, k: int) -> _Word:
    """Make the legend's entry of an x-feature; a name is followed by its number."""
    number = "" if label == f"x-feature {k + 1}" else str(k + 1)
    return measure.word(label, number=number, colour=FEATURES[k % len(FEATURES)], strength=1.0)


class _Measure:
    """Measures words by the renderer, and shortens those that are wider than a line."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.renderer = cast(Any, RendererAgg)(1, 1, 72)  # a pixel is a point

    def word(
        self,
        text: str,
        *,
        number: str = "",
        colour: str | None = None,
        strength: float = 0.0,
        lowers: bool = False,
        bold: bool = False,
    ) -> _Word:
        """Measure a word with its number."""
        text = " ".join(text.split()) or "\N{OPEN BOX}"
        room = self.limit - 2 * _PAD - self._number(number)
        if self.width(text, bold=bold) > room:
            dots = "\N{HORIZONTAL ELLIPSIS}"
            kept = bisect_right(range(1, len(text)), room, key=lambda n: self.width(f"{text[:n]}{dots}", bold=bold))
            text = f"{text[: max(kept, 1)]}{dots}"
        inside = self.width(text, bold=bold)
        return _Word(text, inside + 2 * _PAD + self._number(number), inside, number, colour, strength, lowers, bold)

    def width(self, text: str, *, bold: bool = False, size: float = _SIZE) -> float:
        """Return the width of a text in points."""
        font = FontProperties(size=size, weight="bold" if bold else "normal")
        with rc_context(_LETTERS):
            return _WIDER * float(self.renderer.get_text_width_height_descent(text, font, ismath=False)[0])

    def _number(self, number: str) -> float:
        return self.width(number, size=_SMALL) + 1.0 if number else 0.0


def _placed(lines: Sequence[_Line], limit: float) -> tuple[list[_Placed], float]:
    """Place words from left to right and line by line; return the height of all lines, too."""
    placed, top = [], 0.0
    for words, above in lines:
        left, top = 0.0, top + above
        for word in words:
            if left and left + word.width > limit:
                left, top = 0.0, top + _LINE
            placed.append(_Placed(word, left, top + _LINE / 2))
            left += word.width + _GAP
        top += _LINE
    return placed, top


def _drawn(lines: Sequence[_Line], limit: float, width: float) -> Figure:
    """Draw lines of words into a figure that is as high as they are."""
    placed, inner = _placed(lines, limit)
    height = inner + 2 * _EDGE
    figure = _Texts(figsize=(width, height / 72))
    FigureCanvasAgg(figure)
    figure.set_facecolor("white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, 72 * width), ylim=(height, 0))
    axes.axis("off")
    for word, left, middle in placed:
        _draw(axes, word, _EDGE + left, _EDGE + middle)
    return figure


def _draw(axes: Axes, word: _Word, left: float, middle: float) -> None:
    """Draw a word's box, letters, number and line."""
    low, high = middle - 0.42 * _LINE, middle + 0.42 * _LINE
    if word.colour is not None:
        box = FancyBboxPatch(
            (left, low), word.width, high - low, boxstyle="round,pad=0,rounding_size=2.5", linewidth=0,
            facecolor=word.colour, alpha=_DEEPEST * word.strength**0.65,
        )  # fmt: skip
        axes.add_patch(box)
    weight = "bold" if word.bold else "normal"
    axes.text(
        left + _PAD, middle, word.text, fontsize=_SIZE, fontweight=weight, color=INK, va="center_baseline",
        parse_math=False,
    )  # fmt: skip
    if word.number:
        axes.text(
            left + _PAD + word.text_width + 1.0, middle + 2.0, word.number, fontsize=_SMALL, color=INK,
            va="center_baseline", parse_math=False,
        )  # fmt: skip
    if word.lowers:
        ends = [left + _PAD, left + _PAD + word.text_width]
        axes.plot(ends, [high - 2.0] * 2, color=INK, linewidth=1.0, dashes=(2.5, 1.5), solid_capstyle="butt")
