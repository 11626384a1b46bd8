"""Pictures: hand-worked scales, the order and texts of panels, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from captum_xnn.visualize import own_scale, shared_scale, show_contributions, show_explanation, show_gallery


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


def test_notebooks_get_a_png_and_pyplot_is_not_imported() -> None:
    code = (
        "import sys, importlib.util as u;"
        "spec = u.spec_from_file_location('visualize', sys.argv[1]); module = u.module_from_spec(spec);"
        "sys.modules['visualize'] = module; spec.loader.exec_module(module);"
        "figure = module.show_contributions([1.0], bias=0, surrogate=1, prediction=1);"
        "assert figure._repr_png_().startswith(b'\\x89PNG');"
        "assert 'matplotlib.pyplot' not in sys.modules and 'captum_xnn' not in sys.modules"
    )
    module = sys.modules[show_explanation.__module__]
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(module.__file__)], check=True, timeout=120)


# The sum


def test_waterfall_starts_each_bar_where_the_last_one_ended() -> None:
    axes = show_contributions([1.0, 5.0, -2.0], bias=0.5, surrogate=4.5, prediction=4.0).axes[0]
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches if isinstance(bar, Rectangle)]
    assert bars == [(0, 0.5), (0.5, 5.0), (5.5, 1.0), (6.5, -2.0), (0, 4.5)]
    rows = ["bias", "x-feature 2", "x-feature 1", "x-feature 3", "x-features", "model"]
    assert [label.get_text() for label in axes.get_yticklabels()] == rows
    assert texts(axes) == ["+0.50", "+5.00", "+1.00", "\N{MINUS SIGN}2.00", "4.50", "4.00"]
    diamond = axes.lines[-1]
    assert diamond.get_marker() == "D"
    np.testing.assert_array_equal(diamond.get_xydata(), [[4.0, 5.0]])


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
    with pytest.raises(ValueError, match=r"expected bias \+ contributions = surrogate, got 1 \+ 2 = 3 .* of 9; pass"):
        show_contributions([2.0], bias=1.0, surrogate=9.0, prediction=9.0)
    terms = torch.tensor([100.3, -98.7, 0.013]).bfloat16()
    show_contributions(terms, bias=0.0, surrogate=terms.sum(), prediction=1.0)


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
    with pytest.raises(ValueError, match=rf"expected finite {noun}, got 1 of {size} values NaN or infinite; look for"):
        show_explanation(**arrays, bias=0.0, surrogate=2.0, prediction=2.0)
    with pytest.raises(ValueError, match="expected finite prediction"):
        show_contributions([1.0], bias=0.0, surrogate=1.0, prediction=bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((6, 6, 3))}, r"expected an image .* got shape \(6, 6, 3\); .* channels first"),
        (
            {"image": np.zeros((1, 3, 6, 6))},
            r"expected an image .* got shape \(1, 3, 6, 6\); pick one example",
        ),
        (
            {"maps": np.ones((4, 6, 6))},
            r"expected maps .* K = 3 contributions, got shape \(4, 6, 6\); pick one",
        ),
        ({"maps": np.ones((3, 36))}, r"expected maps .* got shape \(3, 36\); pick one"),
        (
            {"contributions": np.ones((2, 3))},
            r"expected contributions \(K,\) .* got shape \(2, 3\); pick one",
        ),
        ({"contributions": []}, r"expected contributions \(K,\) .* got shape \(0,\); pick one"),
        ({"names": ["a"]}, r"expected one name for each of K = 3 .* got \['a'\]; give a list"),
        ({"names": "abc"}, r"expected one name for each of K = 3 .* got 'abc'; give a list"),
        (
            {"prediction": [1.0, 2.0]},
            r"expected one number as prediction, got shape \(2,\); pick one example",
        ),
        (
            {"scale": lambda m, c: m * 7},
            r"expected scale to return maps \(3, 6, 6\) in \[-1, 1\], got .* up to 7 .*; div",
        ),
        ({"scale": lambda m, c: m[0]}, r"expected scale to return maps \(3, 6, 6\) .* got shape \(6, 6\)"),
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
            r"expected contributions \(N, K\) .* got shape \(3,\); give every example a row",
        ),
        (
            {"images": np.zeros((5, 4, 4))},
            r"expected images of the N = 2 .* got shape \(5, 4, 4\); put the examples",
        ),
        (
            {"maps": np.ones((3, 2, 4, 4))},
            r"expected maps of the N = 2 .* got shape \(3, 2, 4, 4\); put the examples",
        ),
        ({"maps": np.ones((2, 2, 4, 4))}, r"expected maps .* K = 3 contributions, got shape \(2, 4, 4\)"),
        (
            {"feature_order": [3]},
            r"expected feature_order .* from 0 to 2, got \[3\]; in arguments they are counted",
        ),
        ({"feature_order": []}, r"expected feature_order .* got \[\]"),
        ({"row_names": ["a"]}, r"expected one text for each of N = 2 examples, got \['a'\]; give a list"),
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
