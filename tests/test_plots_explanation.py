"""Pictures: hand-worked scales, the order and texts of panels, and what is refused."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from captum_xnn import Explanation
from captum_xnn.plots import _explanation as visualize
from captum_xnn.plots import _panels as panels_module
from captum_xnn.plots import _waterfall as waterfall
from captum_xnn.plots import (
    contours,
    own_scale,
    show_contributions,
    show_explanation,
    show_gallery,
    write_names,
)
from captum_xnn.plots._colours import BLUES, LOWERS, NEUTRAL, ORANGES, RAISES
from captum_xnn.plots._panels import overlay, wrapped
from captum_xnn.plots._scales import shared_scale


def explanation(image: Any = None, maps: Any = None, contributions: Any = (1.0, 5.0, -2.0), **options: Any) -> Figure:
    contributions = np.asarray(contributions, dtype=float)
    image = np.eye(6) if image is None else image
    maps = np.ones((len(contributions), 6, 6)) if maps is None else maps
    total = 0.5 + contributions.sum()
    terms = {"bias": 0.5, "surrogate": total, "prediction": total + 0.25}
    return show_explanation(image, maps, contributions, **(terms | options))


def panels(figure: Figure) -> list[Axes]:
    return figure.axes[1:-1]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def pixels(figure: Figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


# Scales


def test_shared_scale_spreads_each_contribution_over_its_map() -> None:
    maps = np.array([[[1.0, 3.0]], [[10.0, 10.0]]])
    # 8 logits as 2 + 6 per pixel, -4 as -2 and -2; the largest, 6, is full colour.
    np.testing.assert_allclose(shared_scale(maps, [8.0, -4.0]), [[[2 / 6, 1.0]], [[-2 / 6, -2 / 6]]])


def test_shared_scale_ignores_the_units_of_each_map() -> None:
    maps, contributions = np.random.default_rng(0).random((3, 5, 5)), [3.0, 1.0, -2.0]
    rescaled = maps * np.array([1e-6, 1.0, 1e6])[:, None, None]
    np.testing.assert_allclose(shared_scale(rescaled, contributions), shared_scale(maps, contributions))


def test_own_scale_stretches_each_map_by_itself() -> None:
    maps = np.array([[[1.0, 4.0]], [[2.0, -1.0]]])
    np.testing.assert_allclose(own_scale(maps, [8.0, -0.1]), [[[0.25, 1.0]], [[-1.0, 0.5]]])


@pytest.mark.parametrize("scale", [shared_scale, own_scale])
def test_scales_sum_channels_and_permute_with_the_features(scale: Any) -> None:
    maps = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    contributions = torch.tensor([2.0, -1.0, 0.5, 3.0])
    shown, order = scale(maps, contributions), [2, 0, 3, 1]
    np.testing.assert_allclose(shown, scale(maps.sum(1), contributions))
    np.testing.assert_allclose(shown[order], scale(maps[order], contributions[order]))


@pytest.mark.parametrize("scale", [shared_scale, own_scale])
def test_one_extreme_pixel_does_not_decide_the_scale(scale: Any) -> None:
    maps = np.ones((1, 20, 20))
    maps[0, 0, 0] = 1e6
    shown = scale(maps, [1.0])
    assert shown[0, 0, 0] == 1.0  # clipped
    np.testing.assert_allclose(shown[0, 1:], 1.0)  # 399 of 400 pixels keep their full colour


@pytest.mark.parametrize("scale", [shared_scale, own_scale])
def test_map_of_a_single_pixel_is_still_seen(scale: Any) -> None:
    maps = np.zeros((1, 50, 50))
    maps[0, 7, 7] = 1e-12
    assert scale(maps, [2.0])[0, 7, 7] == 1.0


@pytest.mark.parametrize("scale", [shared_scale, own_scale])
def test_dead_features_and_empty_maps_are_zero_on_every_scale(scale: Any) -> None:
    maps = np.stack([np.zeros((2, 2)), np.ones((2, 2)), np.ones((2, 2))])
    shown = scale(maps, [1.0, 0.0, 3.0])
    assert not shown[:2].any()
    np.testing.assert_array_equal(shown[2], 1.0)
    assert not scale(np.zeros((2, 2, 2)), [0.0, 0.0]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_and_gradients_are_accepted(dtype: torch.dtype) -> None:
    maps = torch.tensor([[[1.0, 3.0]]], dtype=dtype, requires_grad=True)
    np.testing.assert_allclose(shared_scale(maps, torch.tensor([2.0], dtype=dtype)), [[[1 / 3, 1.0]]])


# One explanation


def test_panels_stand_in_order_of_contribution_with_their_numbers() -> None:
    figure = explanation(contributions=[1.0, 5.0, -2.0])
    assert [axes.get_title() for axes in panels(figure)] == ["x-feature 2", "x-feature 1", "x-feature 3"]
    assert [texts(axes) for axes in panels(figure)] == [["+5.00"], ["+1.00"], ["\N{MINUS SIGN}2.00"]]


def test_equal_contributions_keep_their_numbering() -> None:
    figure = explanation(contributions=[1.0, 1.0, 1.0])
    assert [axes.get_title() for axes in panels(figure)] == ["x-feature 1", "x-feature 2", "x-feature 3"]


def test_names_are_in_the_numbering_of_the_explainer() -> None:
    figure = explanation(contributions=[1.0, 5.0, -2.0], names=["legs", "wing $2$", "branch"])
    assert [axes.get_title() for axes in panels(figure)] == ["wing $2$", "legs", "branch"]
    figure.draw_without_rendering()  # a dollar sign in a name is not mathematics


def test_each_panel_holds_the_map_of_its_own_feature() -> None:
    maps = np.zeros((3, 6, 6))
    for k in range(3):
        maps[k, k, k] = 1.0
    figure = explanation(maps=maps, contributions=[1.0, 5.0, -2.0])
    marked = [np.argwhere(np.asarray(axes.images[1].get_array())[:, :, 3] > 0).tolist() for axes in panels(figure)]
    assert marked == [[[1, 1]], [[0, 0]], [[2, 2]]]


def test_small_contributions_look_fainter_on_the_shared_scale_only() -> None:
    def opacity(figure: Figure) -> list[float]:
        return [float(np.asarray(axes.images[1].get_array())[:, :, 3].max()) for axes in panels(figure)]

    shared, own = (
        explanation(contributions=[9.0, 1.0]),
        explanation(contributions=[9.0, 1.0], scale=own_scale),
    )
    assert opacity(shared)[0] > 2 * opacity(shared)[1] > 0
    assert opacity(own)[0] == opacity(own)[1]


def test_signs_have_two_colours_in_text_and_map() -> None:
    raises, lowers = panels(explanation(contributions=[2.0, -2.0]))
    assert raises.texts[0].get_color() != lowers.texts[0].get_color()
    red, _, blue, _ = np.asarray(raises.images[1].get_array())[0, 0]
    assert red > blue
    red, _, blue, _ = np.asarray(lowers.images[1].get_array())[0, 0]
    assert blue > red


def test_prediction_stands_above_the_image_with_the_target() -> None:
    figure = explanation(contributions=[10.0, 1.8], target_name="goldfinch")
    assert figure.axes[0].get_title() == "goldfinch"
    assert texts(figure.axes[0]) == ["model 12.6, x-features 12.3"]


def test_dead_feature_says_no_contribution_and_an_empty_map_says_so() -> None:
    maps = np.stack([np.ones((6, 6)), np.zeros((6, 6)), np.ones((6, 6))])
    figure = explanation(maps=maps, contributions=[4.0, 2.0, 0.0])
    assert [len(axes.images) for axes in panels(figure)] == [2, 1, 1]
    assert [texts(axes) for axes in panels(figure)] == [
        ["+4.00"],
        ["empty map", "+2.00"],
        ["no contribution", "0.00"],
    ]


def test_all_dead_features_still_make_a_picture() -> None:
    figure = explanation(maps=np.zeros((2, 6, 6)), contributions=[0.0, 0.0])
    assert all("no contribution" in texts(axes) for axes in panels(figure))
    figure.draw_without_rendering()


@pytest.mark.parametrize("n_features", [1, 5, 6, 10, 12])
def test_no_text_is_cut_off_and_no_panel_overlaps_another(n_features: int) -> None:
    names = ["a rather long name of an x-feature"] * n_features
    figure = explanation(contributions=np.linspace(-3, 5, n_features), names=names, title="Title")
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert box is not None and box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.shrunk(0.98, 0.98).overlaps(other) for other in boxes[:i] if other is not None)


def test_maps_coarser_than_the_image_are_stretched_over_it() -> None:
    figure = explanation(image=np.zeros((1, 8, 12)), maps=np.ones((1, 1, 2, 3)), contributions=[1.0])
    background, coloured = panels(figure)[0].images
    assert list(background.get_extent()) == list(coloured.get_extent()) == [0, 12, 8, 0]
    assert np.asarray(coloured.get_array()).shape == (2, 3, 4)


def test_normalised_image_is_stretched_and_keeps_its_order() -> None:
    image = np.random.default_rng(0).normal(size=(3, 6, 6))
    shown = pixels(explanation(image=image)).transpose(2, 0, 1)
    assert shown.min() == 0 and shown.max() == 1
    np.testing.assert_array_equal(np.argsort(shown, axis=None), np.argsort(image, axis=None))


def test_image_within_zero_and_one_and_bytes_are_shown_as_they_are() -> None:
    image = np.linspace(0.2, 0.6, 36).reshape(6, 6)
    np.testing.assert_allclose(pixels(explanation(image=image))[:, :, 1], image)
    low = torch.full((3, 6, 6), 51, dtype=torch.uint8)
    np.testing.assert_allclose(pixels(explanation(image=low)), 0.2)


def test_constant_image_out_of_range_becomes_grey() -> None:
    np.testing.assert_array_equal(pixels(explanation(image=np.full((6, 6), -3.0))), 0.5)


def test_notebooks_get_a_png_and_pyplot_does_not_know_the_figure() -> None:
    for module in (visualize, panels_module, waterfall):
        imports = [
            ast.unparse(n)
            for n in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        assert not [line for line in imports if "pyplot" in line]
    before = pyplot.get_fignums()
    figure = show_contributions([1.0], bias=0, surrogate=1, prediction=1)
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert pyplot.get_fignums() == before


# The sum


def bars(axes: Axes) -> list[tuple[float, float]]:
    return [(bar.get_x(), bar.get_width()) for bar in axes.patches if isinstance(bar, Rectangle)]


def test_waterfall_starts_each_bar_where_the_last_one_ended() -> None:
    axes = show_contributions([1.0, 5.0, -2.0], bias=0.5, surrogate=4.5, prediction=4.0).axes[0]
    # bias, three contributions, the x-features' sum from zero, what it lacks, and the model's output from zero.
    assert bars(axes) == [(0, 0.5), (0.5, 5.0), (5.5, 1.0), (6.5, -2.0), (0, 4.5), (4.5, -0.5), (0, 4.0)]
    rows = ["bias", "x-feature 2", "x-feature 1", "x-feature 3", "x-features", "unexplained", "model"]
    assert [label.get_text() for label in axes.get_yticklabels()] == rows
    minus = "\N{MINUS SIGN}"
    assert texts(axes) == ["+0.50", "+5.00", "+1.00", f"{minus}2.00", "4.50", f"{minus}0.50", "4.00"]
    colours = [text.get_color() for text in axes.texts]
    assert colours[1:4] == [RAISES, RAISES, LOWERS]


@pytest.mark.parametrize("seed", range(5))
def test_waterfall_goes_from_zero_to_the_real_prediction(seed: int) -> None:
    generator = np.random.default_rng(seed)
    contributions, bias, residual = generator.normal(0, 3, 7), *generator.normal(0, 2, 2)
    surrogate = bias + contributions.sum()
    for largest in (None, 3):
        axes = show_contributions(
            contributions, bias=bias, surrogate=surrogate, prediction=surrogate + residual, largest=largest
        ).axes[0]
        steps = bars(axes)
        *terms, (zero, total), (start, step), (model_zero, model) = steps
        assert zero == model_zero == 0 and start == pytest.approx(surrogate) == total
        assert start + step == pytest.approx(surrogate + residual) == model
        end = 0.0
        for left, width in terms:
            assert left == pytest.approx(end)
            end = left + width
        assert end == pytest.approx(surrogate)


def test_what_is_not_shown_is_one_bar_of_the_waterfall() -> None:
    figure = explanation(contributions=[1.0, 5.0, -2.0, 0.3], largest=2)
    assert [axes.get_title() for axes in panels(figure)] == ["x-feature 2", "x-feature 3"]
    labels = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert labels == ["bias", "x-feature 2", "x-feature 3", "2 others", "x-features", "unexplained", "model"]
    assert bars(figure.axes[-1])[3] == pytest.approx((3.5, 1.3))
    all_of_them = explanation(contributions=[1.0, 5.0, -2.0, 0.3], largest=9)
    assert len(panels(all_of_them)) == 4 and "others" not in str(all_of_them.axes[-1].get_yticklabels())


def test_what_lowers_is_hatched_for_those_who_see_no_colours() -> None:
    axes = show_contributions([1.0, -2.0], bias=0, surrogate=-1, prediction=-1).axes[0]
    hatched = [bool(bar.get_hatch()) for bar in axes.patches if isinstance(bar, Rectangle)]
    assert hatched == [False, False, True, False, True, False]  # the last but one is what stays unexplained


def test_waterfall_of_an_explanation_is_the_waterfall_alone() -> None:
    alone = show_contributions([1.0, 5.0, -2.0], bias=0.5, surrogate=4.5, prediction=4.75).axes[0]
    assert texts(explanation(contributions=[1.0, 5.0, -2.0]).axes[-1]) == texts(alone)


@pytest.mark.parametrize(
    ("largest", "text"), [(1234.5, "+1234.5"), (63.103, "+63.1"), (6.3, "+6.30"), (0.031, "+0.0310")]
)
def test_numbers_have_three_digits_of_the_largest(largest: float, text: str) -> None:
    figure = show_contributions([largest], bias=0.0, surrogate=largest, prediction=0.0)
    assert texts(figure.axes[0])[1] == text


def test_negative_number_that_rounds_to_zero_has_no_sign() -> None:
    figure = show_contributions([50.0, -0.001], bias=0.0, surrogate=50.0, prediction=50.0)
    assert texts(figure.axes[0])[1:3] == ["+50.0", "0.0"]


def test_unit_is_written_at_the_axis() -> None:
    assert show_contributions([1.0], bias=0, surrogate=1, prediction=1).axes[0].get_xlabel() == "logits"
    figure = show_contributions([1.0], bias=0, surrogate=1, prediction=1, unit="kg")
    assert figure.axes[0].get_xlabel() == "kg"


def test_terms_that_do_not_add_up_are_refused_unless_by_rounding() -> None:
    with pytest.raises(ValueError, match=r"bias and contributions sum to 1 \+ 2 = 3, and the surrogate is 9; pass"):
        show_contributions([2.0], bias=1.0, surrogate=9.0, prediction=9.0)
    terms = torch.tensor([100.3, -98.7, 0.013]).bfloat16()
    show_contributions(terms, bias=0.0, surrogate=terms.sum(), prediction=1.0)


# Styles


def blob(sign: float = 1.0, size: int = 20) -> np.ndarray:
    """A round hill in the middle, of height 1."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return sign * np.exp(-(x**2 + y**2) / (0.03 * size**2))


def contour_lines(axes: Axes) -> list[ContourSet]:
    return [lines for lines in axes.collections if isinstance(lines, ContourSet)]


def test_contours_go_round_the_map_and_leave_the_image_its_colours() -> None:
    image = np.random.default_rng(0).random((3, 20, 20))
    figure = explanation(image=image, maps=blob()[None], contributions=[1.0], scale=own_scale, style=contours)
    panel = panels(figure)[0]
    np.testing.assert_allclose(np.asarray(panel.images[0].get_array()), image.transpose(1, 2, 0))
    (lines,) = contour_lines(panel)
    assert list(lines.levels) == [0.25, 0.5, 0.75]
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        radius = np.hypot(*(path.vertices - 10).T)
        # exp(-r^2 / 12) = level, smoothed by a third of a pixel
        np.testing.assert_allclose(radius, np.sqrt(-12 * np.log(level)), atol=0.35)


def test_contours_of_what_lowers_are_dashed_and_blue() -> None:
    maps = np.concatenate([blob(), blob(-1)], axis=1)[None]
    axes = explanation(image=np.zeros((20, 40)), maps=maps, contributions=[1.0], scale=own_scale, style=contours).axes[
        1
    ]
    raises, lowers = contour_lines(axes)
    assert all(path.vertices[:, 0].max() < 20 for path in raises.get_paths())
    assert all(path.vertices[:, 0].min() > 20 for path in lowers.get_paths())
    (_, solid), (_, dashed) = raises.get_linestyle()[0], lowers.get_linestyle()[0]
    assert solid is None and dashed is not None
    np.testing.assert_allclose(raises.get_edgecolor(), [ORANGES(level) for level in (0.25, 0.5, 0.75)])
    np.testing.assert_allclose(lowers.get_edgecolor(), [BLUES(level) for level in (0.25, 0.5, 0.75)])


def test_faint_maps_have_fewer_contours_and_say_when_there_is_none() -> None:
    maps = np.stack([blob(), blob(), blob()])
    figure = explanation(image=np.zeros((20, 20)), maps=maps, contributions=[10.0, 6.0, 0.5], style=contours)
    assert [len(lines.levels) for panel in panels(figure) for lines in contour_lines(panel)] == [3, 2]
    assert texts(panels(figure)[2]) == ["below 25%", "+0.5"]


def test_contours_are_closed_at_the_edge_of_the_image() -> None:
    figure = explanation(image=np.zeros((4, 8)), maps=np.ones((1, 4, 8)), contributions=[1.0], style=contours)
    (lines,) = contour_lines(panels(figure)[0])
    for path in lines.get_paths():
        x, y = path.vertices.T
        assert 0 <= x.min() < 0.5 and 7.5 < x.max() <= 8 and 0 <= y.min() < 0.5 and 3.5 < y.max() <= 4
        assert path.vertices[0].tolist() == path.vertices[-1].tolist()


def test_coarse_contours_lie_where_the_map_does() -> None:
    coarse = np.zeros((3, 4))
    coarse[1, 3] = 1.0
    figure = explanation(
        image=np.zeros((90, 120)), maps=coarse[None], contributions=[1.0], scale=own_scale, style=contours
    )
    (lines,) = contour_lines(panels(figure)[0])
    x, y = lines.get_paths()[1].vertices.T  # cell [1, 3] has its middle at x = 105, y = 45
    assert y.mean() == pytest.approx(45, abs=1) and x.min() > 85 and x.max() > 105


def test_overlay_is_the_default_and_any_function_is_a_style() -> None:
    maps = blob()[None]
    arguments = {"image": np.zeros((20, 20)), "maps": maps, "contributions": [1.0]}
    plain, same = explanation(**arguments), explanation(**arguments, style=overlay)
    for one, other in zip(plain.axes[1].images, same.axes[1].images, strict=True):
        np.testing.assert_array_equal(np.asarray(one.get_array()), np.asarray(other.get_array()))
    seen = []
    explanation(**arguments, style=lambda axes, image, shown: seen.append((axes, image.shape, shown.shape)))
    assert [shapes for _, *shapes in seen] == [[(20, 20, 3), (20, 20)]]


def luminance(colour: Any) -> float:
    """Relative luminance as WCAG has it."""
    channels = np.asarray(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_stronger_is_darker_in_grey_and_never_lighter_than_the_faded_image() -> None:
    darkest_ground = luminance(np.asarray(explanation(image=np.zeros((6, 6))).axes[1].images[0].get_array())[0, 0])
    for colours in (ORANGES, BLUES):
        light = [luminance(colours(level)) for level in np.linspace(0, 1, 11)]
        assert np.all(np.diff(light) < 0)
        assert light[0] < darkest_ground


def test_texts_in_colour_are_legible_on_white() -> None:
    for colour in (RAISES, LOWERS, NEUTRAL):
        assert 1.05 / (luminance(colour) + 0.05) > 4.5


def test_the_two_colours_are_apart_for_the_colour_blind() -> None:
    # Deuteranopia and protanopia by Machado, Oliveira, Fernandes, "A Physiologically-based Model for Simulation of
    # Color Vision Deficiency", 2009, Table 1; on linear RGB. Then the distance in CIELAB.
    from skimage.color import rgb2lab

    seen = {
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
    }
    for matrix in seen.values():

        def simulated(colour: Any, matrix: Any = matrix) -> np.ndarray:
            channels = np.asarray(to_rgb(colour))
            linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
            mixed = np.clip(np.asarray(matrix) @ linear, 0, 1)
            return np.asarray(rgb2lab(np.where(mixed <= 0.0031308, 12.92 * mixed, 1.055 * mixed ** (1 / 2.4) - 0.055)))

        for one, other in [(RAISES, LOWERS), *((ORANGES(x), BLUES(x)) for x in (0.2, 0.6, 1.0))]:
            assert np.linalg.norm(simulated(one) - simulated(other)) > 50  # 2.3 is the least that can be noticed


# True colours


def test_normalised_image_gets_its_colours_back() -> None:
    image = np.random.default_rng(0).random((3, 6, 6))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (image - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    np.testing.assert_allclose(pixels(explanation(image=normalised, mean=mean, std=std)), image.transpose(1, 2, 0))
    np.testing.assert_allclose(
        pixels(explanation(image=torch.from_numpy((image - 0.5) / 0.25), mean=0.5, std=0.25)), image.transpose(1, 2, 0)
    )


def test_noise_beyond_black_and_white_is_cut_off_rather_than_stretched() -> None:
    image = np.full((6, 6), 0.5)
    image[0, 0], image[5, 5] = 1.2, -0.1
    shown = pixels(explanation(image=(image - 0.5) / 0.2, mean=0.5, std=0.2))[:, :, 0]
    assert shown[0, 0] == 1 and shown[5, 5] == 0 and shown[2, 2] == pytest.approx(0.5)


def test_gallery_has_true_colours_and_one_heatmaps_too() -> None:
    images = np.random.default_rng(0).random((2, 3, 4, 4))
    ones = np.zeros((2, 1, 3, 4, 4))
    ones[0, :, :, 1, 2], ones[1] = 5.0, 0.0
    figure = show_gallery(
        (images - 0.5) / 0.2, np.ones((2, 2, 4, 4)), [[1.0, 2.0], [3.0, 4.0]], mean=0.5, std=0.2, one_heatmaps=ones
    )
    np.testing.assert_allclose(pixels(figure), images[0].transpose(1, 2, 0))
    assert [axes.get_title() for axes in figure.axes[:4]] == ["image", "1-Heatmap", "x-feature 2", "x-feature 1"]
    assert np.argwhere(np.asarray(figure.axes[1].images[1].get_array())[:, :, 3] > 0).tolist() == [[1, 2]]
    assert texts(figure.axes[5]) == ["empty map"]


# The 1-Heatmap


def test_one_heatmap_stands_beside_the_image_on_its_own_scale() -> None:
    one = np.zeros((3, 6, 6))
    one[:, 1, 4], one[0, 2, 2] = 1e-3, -1e-3  # summed over channels: 0.003 and -0.001
    figure = explanation(contributions=[1.0, 5.0], one_heatmap=one)
    titles = ["image", "1-Heatmap", "x-feature 2", "x-feature 1", "bias + contributions"]
    assert [axes.get_title() for axes in figure.axes] == titles
    drawn = np.asarray(figure.axes[1].images[1].get_array())
    assert drawn[1, 4, 3] == 1.0 and drawn[1, 4, 0] > drawn[1, 4, 2]  # full, orange
    assert 0 < drawn[2, 2, 3] < 1.0 and drawn[2, 2, 2] > drawn[2, 2, 0]  # fainter, blue
    assert np.argwhere(drawn[:, :, 3] > 0).tolist() == [[1, 4], [2, 2]]
    for shape in ((1, 1, 6, 6), (1, 6, 6), (6, 6)):
        again = explanation(contributions=[1.0, 5.0], one_heatmap=one.sum(0).reshape(shape))
        np.testing.assert_allclose(np.asarray(again.axes[1].images[1].get_array()), drawn)


# Where to draw


def test_explanations_take_the_places_of_axes_side_by_side() -> None:
    whole, places = pyplot.subplots(2, 1, figsize=(12, 6))
    try:
        for i, place in enumerate(places):
            assert explanation(contributions=[1.0, 5.0], axes=place, title=f"example {i}") is whole
        titles = [axes.get_title() for axes in whole.axes]
        assert titles == 2 * ["image", "x-feature 2", "x-feature 1", "bias + contributions"]
        whole.draw_without_rendering()
        upper, lower = (whole.axes[i].get_window_extent() for i in (0, 4))
        assert upper.y0 > lower.y1
        boxes = [axes.get_tightbbox() for axes in whole.axes]
        assert not any(a.shrunk(0.98, 0.98).overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    finally:
        pyplot.close(whole)


def test_figures_and_subfigures_are_filled() -> None:
    whole = Figure(figsize=(14, 4))
    left, right = whole.subfigures(1, 2)
    assert explanation(contributions=[1.0], axes=left) is whole
    gallery = show_gallery(np.zeros((1, 4, 4)), np.ones((1, 2, 4, 4)), [[1.0, 2.0]], axes=right)
    assert gallery is whole
    assert [axes.get_title() for axes in right.axes] == ["image", "x-feature 2", "x-feature 1"]
    assert explanation(axes=Figure()).axes[0].get_title() == "image"


def test_a_waterfall_is_drawn_into_the_axes_themselves() -> None:
    whole, places = pyplot.subplots(1, 2)
    try:
        drawn = show_contributions([1.0], bias=0.5, surrogate=1.5, prediction=2.0, axes=places[1], title="second")
        assert drawn is whole and list(whole.axes) == list(places)
        assert not places[0].patches and bars(places[1]) == [(0, 0.5), (0.5, 1.0), (0, 1.5), (1.5, 0.5), (0, 2.0)]
        assert places[1].get_title() == "second"
    finally:
        pyplot.close(whole)


def test_other_places_are_refused() -> None:
    whole, places = pyplot.subplots(1, 2)
    try:
        with pytest.raises(TypeError, match=r"axes is a ndarray; pass an Axes, .* and of several pick one"):
            explanation(axes=places)
        free = whole.add_axes((0.1, 0.1, 0.5, 0.5))
        with pytest.raises(ValueError, match=r"these axes belong to no grid; make them with"):
            explanation(axes=free)
    finally:
        pyplot.close(whole)


# Names that are long or strange, images that are tall or wide


@pytest.mark.parametrize("shape", [(60, 10), (10, 60), (1, 1)])
@pytest.mark.parametrize("style", [overlay, contours])
def test_extreme_images_leave_all_texts_in_place(shape: tuple[int, int], style: Any) -> None:
    names = ["x" * 70, "a name of many short words " * 4, "\\alpha_{2} $"]
    figure = explanation(
        image=np.zeros(shape), maps=np.ones((3, *shape)), names=names, style=style, one_heatmap=np.ones(shape)
    )
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box is not None and box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1


@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        ("wing", 1, "wing"),
        ("a long name", 1, "a long …"),
        ("a long name", 2, "a long\nname"),
        ("abcdefghijklmnop", 1, "abcdefgh …"),
        ("abcdefghijklmnop", 2, "abcdefghij\nklmnop"),
        ("one two three four five six", 2, "one two\nthree …"),
    ],
)
def test_names_are_wrapped_and_cut(name: str, lines: int, expected: str) -> None:
    assert wrapped(name, 10, lines) == expected


def test_large_numbers_leave_room_for_the_next_panel() -> None:
    figure = explanation(contributions=[-12345.0, 1.0])
    assert texts(figure.axes[0]) == ["model \N{MINUS SIGN}12343.2"]


# Of an explanation


def images_explained(**changes: Any) -> Explanation:
    contributions = torch.tensor([[1.0, 5.0], [2.0, -1.0]])
    surrogate = contributions.sum(1) + 0.5
    parts: dict[str, Any] = {
        "inputs": torch.randn(2, 3, 6, 6),
        "maps": torch.rand(2, 2, 3, 6, 6),
        "features": torch.ones(2, 2),
        "contributions": contributions,
        "bias": torch.tensor([0.5, 0.5]),
        "surrogate": surrogate,
        "prediction": surrogate + 0.25,
        "target": (46, 46),
        "layer": "relu6",
    }
    return Explanation(**(parts | changes))


def test_an_explanation_shows_its_one_heatmap_and_names_from_the_file(tmp_path: Path) -> None:
    ones = torch.zeros(2, 1, 3, 6, 6)
    ones[1, 0, :, 2, 3] = 1
    why = images_explained(one_heatmap=ones)
    path = write_names(tmp_path / "names.json", {46: {1: "red forehead"}}, layer="relu6")
    figure = why.show(1, names=path, style=overlay)
    titles = ["image", "1-Heatmap", "x-feature 1", "red forehead", "bias + contributions"]
    assert [axes.get_title() for axes in figure.axes] == titles
    assert np.argwhere(np.asarray(figure.axes[1].images[1].get_array())[:, :, 3] > 0).tolist() == [[2, 3]]
    gallery = why.gallery(names=["golden feather"])
    assert [axes.get_title() for axes in gallery.axes[:4]] == ["image", "1-Heatmap", "x-feature 2", "golden feather"]
    assert "1-Heatmap" not in [axes.get_title() for axes in images_explained().show(0).axes]
    given = images_explained().show(0, one_heatmap=torch.ones(6, 6))
    assert given.axes[1].get_title() == "1-Heatmap"


def test_a_file_of_another_layer_is_no_names_for_a_picture(tmp_path: Path) -> None:
    path = write_names(tmp_path / "names.json", {46: ["a"]}, layer="fc7")
    for draw in (images_explained().show, images_explained().gallery):
        with pytest.raises(
            ValueError, match=r".*names\.json' has names of layer 'fc7', and the x-features are of layer 'relu6'"
        ):
            draw(names=path)


def test_a_gallery_of_targets_with_different_names_is_refused(tmp_path: Path) -> None:
    path = write_names(tmp_path / "names.json", {46: ["a"], 7: ["b"]}, layer="relu6")
    why = images_explained(target=(46, 7))
    with pytest.raises(ValueError, match=r"targets 46, 7 have different names for the same x-feature; pick"):
        why.gallery(names=path)
    assert why.gallery([1], names=path).axes[1].get_title() == "b"


# Galleries


def test_gallery_has_the_same_feature_in_each_column() -> None:
    contributions = np.array([[1.0, 5.0, 3.0], [9.0, 7.0, -6.0]])  # means 5, 6, -1.5
    figure = show_gallery(np.zeros((2, 1, 4, 4)), np.ones((2, 3, 1, 4, 4)), contributions, names=["a", "b", "c"])
    assert [axes.get_title() for axes in figure.axes] == ["image", "b", "a", "c", "", "", "", ""]
    numbers = [texts(axes)[-1] for axes in figure.axes if axes not in (figure.axes[0], figure.axes[4])]
    assert numbers == ["+5.00", "+1.00", "+3.00", "+7.00", "+9.00", "\N{MINUS SIGN}6.00"]


def test_gallery_shows_the_features_asked_for() -> None:
    figure = show_gallery(
        torch.zeros(2, 3, 4, 4),
        torch.ones(2, 3, 4, 4),
        torch.ones(2, 3),
        feature_order=[2, 0],
        row_names=["x", "y"],
    )
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "x-feature 3", "x-feature 1"]
    assert [figure.axes[0].get_ylabel(), figure.axes[3].get_ylabel()] == ["x", "y"]


def test_gallery_scales_each_row_by_itself() -> None:
    figure = show_gallery(np.zeros((2, 4, 4)), np.ones((2, 1, 4, 4)), [[100.0], [0.1]])
    strong, weak = (np.asarray(figure.axes[i].images[1].get_array()) for i in (1, 3))
    np.testing.assert_array_equal(strong, weak)


# What is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["image", "maps", "contributions"])
def test_values_that_are_not_finite_are_refused(where: str, bad: float) -> None:
    arrays: dict[str, Any] = {"image": np.eye(6), "maps": np.ones((2, 6, 6)), "contributions": np.ones(2)}
    arrays[where].flat[0] = bad
    noun = "pixels of the image" if where == "image" else where
    size = arrays[where].size
    with pytest.raises(ValueError, match=rf"1 of {size} values of {noun} are NaN or infinite; look for"):
        show_explanation(**arrays, bias=0.0, surrogate=2.0, prediction=2.0)
    with pytest.raises(ValueError, match="values of prediction are NaN or infinite"):
        show_contributions([1.0], bias=0.0, surrogate=1.0, prediction=bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((6, 6, 3))}, r"image is \(6, 6, 3\), not .* channels first"),
        (
            {"image": np.zeros((1, 3, 6, 6))},
            r"image is \(1, 3, 6, 6\), not .*; pick one example",
        ),
        (
            {"maps": np.ones((4, 6, 6))},
            r"maps are \(4, 6, 6\), not .* K = 3 contributions; pick one",
        ),
        ({"maps": np.ones((3, 36))}, r"maps are \(3, 36\), not .*; pick one"),
        (
            {"contributions": np.ones((2, 3))},
            r"contributions are \(2, 3\), not \(K,\) of one example; pick one",
        ),
        ({"contributions": []}, r"contributions are \(0,\), not \(K,\) of one example; pick one"),
        ({"names": ["a", "b", "c", "d"]}, "name 'd' is for number 3, and the x-features are 0 to 2; pass at most"),
        ({"names": "abc"}, "there is no JSON file of names at 'abc'"),
        ({"largest": 0}, "largest is 0; pass at least 1, or leave it out"),
        ({"one_heatmap": np.ones((2, 3, 6, 6))}, r"one_heatmap is \(2, 3, 6, 6\), not \(H, W\) or .*; pick"),
        ({"one_heatmap": np.full((6, 6), np.nan)}, r"36 of 36 values of .*one_heatmap are NaN"),
        ({"mean": 0.5}, r"mean and std go together, but one of them is None; pass both"),
        ({"mean": (0.5, 0.5), "std": 1.0}, r"mean is \(0\.5, 0\.5\) and std is 1\.0 for 1 channels; pass both as"),
        ({"mean": 0.5, "std": 0.0}, r"mean is 0.5 and std is 0.0 .* with std > 0"),
        (
            {"mean": 127.0, "std": 58.0},
            r"mean and std bring the image to values from 127 to 185, not to \[0, 1\]; .* divide the ones for bytes",
        ),
        (
            {"prediction": [1.0, 2.0]},
            r"prediction has shape \(2,\), and is not one number; pick one example",
        ),
        (
            {"scale": lambda m, c: m * 7},
            r"scale returns .* up to 7 in size, not maps \(3, 6, 6\) in \[-1, 1\]; div",
        ),
        ({"scale": lambda m, c: m[0]}, r"scale returns shape \(6, 6\) .* not maps \(3, 6, 6\)"),
    ],
)
def test_wrong_arguments_say_what_was_expected_what_came_and_what_to_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explanation(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"contributions": np.ones(3)},
            r"contributions are \(3,\), not \(N, K\) .*; give every example a row",
        ),
        (
            {"images": np.zeros((5, 4, 4))},
            r"images are \(5, 4, 4\) for N = 2 .*; put the examples",
        ),
        (
            {"maps": np.ones((3, 2, 4, 4))},
            r"maps are \(3, 2, 4, 4\) for N = 2 .*; put the examples",
        ),
        ({"maps": np.ones((2, 2, 4, 4))}, r"maps are \(2, 4, 4\), not .* K = 3 contributions"),
        (
            {"feature_order": [3]},
            r"feature_order is \[3\]; list x-features from 0 to 2. Arguments count them",
        ),
        ({"feature_order": []}, r"feature_order is \[\]; list"),
        ({"row_names": ["a"]}, r"row_names is \['a'\] for N = 2 examples; pass a list"),
    ],
)
def test_wrong_gallery_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "images": np.zeros((2, 4, 4)),
        "maps": np.ones((2, 3, 4, 4)),
        "contributions": np.ones((2, 3)),
    }
    with pytest.raises(ValueError, match=message):
        show_gallery(**(arguments | changes))
