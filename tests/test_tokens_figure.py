"""Pictures of texts: no word lies on another one at any resolution, and colours say what the maps say."""

from __future__ import annotations

import io
import itertools
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from captum_xnn import Explanation
from captum_xnn.plots import show_tokens
from captum_xnn.plots._colours import BLUES, FEATURES, LOWERS, ORANGES, RAISES

# Narrow and wide letters, short words and words wider than the figure, and what matplotlib reads as mathematics.
WORDS = [
    "a",
    "i" * 40,
    "W" * 30,
    "w" * 300,
    "gripping",
    "$x_2$",
    "##ing",
    "Donaudampfschifffahrtskapitän",
    "—",
    "  ",
    "A V",
]


class Drawn(NamedTuple):
    """A text as the renderer drew it, in pixels."""

    text: str
    left: float
    right: float
    baseline: float


def drawn(figure: Figure, dpi: float, monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    found: list[Drawn] = []
    real = RendererAgg.draw_text

    def draw_text(
        self: Any, gc: Any, x: float, y: float, s: str, prop: Any, angle: float, *more: Any, **some: Any
    ) -> Any:
        width = self.get_text_width_height_descent(s, prop, ismath=False)[0]
        found.append(Drawn(s, x, x + width, y))
        return real(self, gc, x, y, s, prop, angle, *more, **some)

    monkeypatch.setattr(RendererAgg, "draw_text", draw_text)
    figure.savefig(io.BytesIO(), dpi=dpi)
    return found


def many(seed: int, K: int = 7) -> dict[str, Any]:
    choose = random.Random(seed)
    tokens = [[choose.choice(WORDS) for _ in range(n)] for n in (1, 9, 40)]
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, K, 40, 5, generator=generator) ** 3
    return {"tokens": tokens, "maps": maps, "contributions": 3 * torch.randn(3, K, generator=generator)}


@pytest.mark.parametrize("dpi", [40, 72, 110, 300])
@pytest.mark.parametrize("width", [2.0, 8.0])
def test_no_word_lies_on_another_or_outside_at_any_resolution(
    dpi: float, width: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = show_tokens(
        **many(dpi), names=["a name " * 30, "short"], title="A title " * 40, row_names=["W" * 200, "", "b"], width=width
    )
    found = drawn(figure, dpi, monkeypatch)
    assert len(found) > 60
    end = figure.get_figwidth() * dpi
    for text in found:
        assert text.left >= 0 and text.right <= end, text
    lines: dict[float, list[Drawn]] = {}
    for text in found:
        lines.setdefault(round(text.baseline * 72 / dpi / 12), []).append(text)
    for line in lines.values():
        line.sort(key=lambda text: text.left)
        for one, other in itertools.pairwise(line):
            assert one.right <= other.left + 0.5, (one, other)  # half a pixel: texts begin on whole pixels


@pytest.mark.parametrize("dpi", [72, 110])
def test_boxes_hold_their_words_and_do_not_overlap(dpi: float, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = show_tokens(**many(3), names=["short", "a longer name"])
    found = drawn(figure, dpi, monkeypatch)
    figure.set_dpi(dpi)
    FigureCanvasAgg(figure).draw()
    height = figure.get_figheight() * dpi
    boxes = [p.get_window_extent() for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch)]
    for i, one in enumerate(boxes):
        assert one.y0 >= 0 and one.y1 <= height and one.x0 >= 0
        for other in boxes[:i]:
            apart = one.x1 <= other.x0 + 1e-6 or other.x1 <= one.x0 + 1e-6
            assert apart or one.y1 <= other.y0 + 1e-6 or other.y1 <= one.y0 + 1e-6
    held = 0
    for text in found:
        middle = height - text.baseline
        inside = [box for box in boxes if box.y0 < middle < box.y1 and box.x0 <= text.left < box.x1]
        held += len(inside)
        assert all(text.right <= box.x1 + 0.5 for box in inside), text
    assert held > 50


def boxes_of(figure: Figure) -> list[tuple[tuple[float, ...], float]]:
    return [(to_rgb(box.get_facecolor()), box.get_alpha()) for box in figure.axes[0].patches]


def test_words_have_the_colour_of_the_x_feature_with_the_largest_part() -> None:
    # Contributions 8 and -4 spread over the words: parts 2, 6, 0 and -1, -1, -2.
    maps = [[[1.0, 3.0, 0.0], [2.0, 2.0, 4.0]]]
    figure = show_tokens([["one", "two", "three"]], maps, [[8.0, -4.0]], names=["dull"])
    expected = [(0, 2 / 6), (0, 1.0), (1, 2 / 6)]
    found = boxes_of(figure)
    for (colour, alpha), (k, part) in zip(found[:3], expected, strict=True):
        assert colour == to_rgb(FEATURES[k])
        assert alpha == pytest.approx(0.5 * part**0.65)
    texts = [text.get_text() for text in figure.axes[0].texts]
    # A name is followed by the number of its x-feature, like the words that drive it.
    assert texts == ["one", "1", "two", "1", "three", "2", "dull", "1", "x-feature 2", "lowers the output"]
    assert len(figure.axes[0].lines) == 2, "one line below the word that lowers the output, and one in the legend"
    under = figure.axes[0].lines[0].get_xdata()
    assert min(under) == pytest.approx(figure.axes[0].texts[4].get_position()[0])


def test_parts_compare_between_texts_and_padding_counts_for_nothing() -> None:
    maps = np.array([[[1.0, 1.0, 0.0, 9.0]], [[0.0, 3.0, 1.0, 9.0]]])  # the last token is padding
    contributions = [[2.0], [8.0]]
    figure = show_tokens([["a", "b"], ["c", "d", "e"]], maps, contributions)
    alphas = [alpha for _, alpha in boxes_of(figure)][:5]
    parts = np.array([1.0, 1.0, 0.0, 6.0, 2.0]) / 6
    np.testing.assert_allclose(alphas, 0.5 * parts**0.65)
    # Values of embeddings are summed, and the scale of a map does not matter.
    split = np.stack([maps - 5, np.full_like(maps, 5.0)], -1) * 100
    assert boxes_of(show_tokens([["a", "b"], ["c", "d", "e"]], split, contributions)) == boxes_of(figure)


def test_explanation_shows_its_tokens() -> None:
    def one(values: list[float]) -> Tensor:
        return torch.tensor([values])

    maps = torch.tensor([[[[1.0, 0.0], [2.0, 1.0]], [[-3.0, 0.0], [1.0, 0.0]]]])
    why = Explanation(
        inputs=torch.tensor([[4, 7]]), maps=maps, features=one([1.0, -2.0]), contributions=one([4.0, -2.0]),
        surrogate=torch.tensor([2.5]), prediction=torch.tensor([2.5]), bias=torch.tensor([0.5]), target=(1,),
        layer="pool",
    )  # fmt: skip
    found = boxes_of(why.show_tokens([["bad", "film"]]))
    assert found == boxes_of(show_tokens([["bad", "film"]], why.directed_maps(), why.contributions))
    # The second x-feature is below the average: its map is turned, and its part on the first word, -1.5, lowers.
    assert found[0][0] == to_rgb(FEATURES[1]) and found[1][0] == to_rgb(FEATURES[0])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokens": ["a text", "b"]}, "words of each text"),
        ({"tokens": [["a"]]}, "1 texts for N = 2"),
        ({"tokens": [["a"], ["b", "c", "d"]]}, "text 1 has 3 words, and the maps have 2 tokens"),
        ({"tokens": [["a"], []]}, "text 1 has 0 words"),
        ({"maps": np.ones((2, 3, 2))}, "for K = 1 contributions"),
        ({"maps": np.full((2, 1, 2), np.nan)}, "NaN or infinite"),
        ({"contributions": [1.0, 2.0]}, "not \\(N, K\\)"),
        ({"row_names": ["only one"]}, "for N = 2 texts"),
        ({"width": 1.0}, "pass at least 2"),
    ],
)
def test_wrong_arguments_say_what_to_pass(changed: dict[str, Any], said: str) -> None:
    given = {"tokens": [["a"], ["b", "c"]], "maps": np.ones((2, 1, 2)), "contributions": [[1.0], [2.0]]}
    with pytest.raises(ValueError, match=said):
        show_tokens(**(given | changed))


def lab(colour: str) -> np.ndarray:
    from skimage.color import rgb2lab

    return np.asarray(rgb2lab(np.array([[to_rgb(colour)]])))[0, 0]


def test_no_colour_of_an_x_feature_looks_like_a_sign_or_like_red_or_green() -> None:
    signs = [RAISES, LOWERS, "#ff9d5c", "#7cc0f5", "#d62728", "#2ca02c"]
    signs += [tuple(ramp(value)[:3]) for ramp in (ORANGES, BLUES) for value in (0.3, 0.6, 1.0)]
    for colour in FEATURES:
        for sign in signs:
            assert np.linalg.norm(lab(colour) - lab(sign)) > 25, (colour, sign)
    for i, one in enumerate(FEATURES):
        for other in FEATURES[:i]:
            assert np.linalg.norm(lab(one) - lab(other)) > 20, (one, other)
