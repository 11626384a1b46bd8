"""Thumbnails: pictures decode to what was shown, maps to the colours of pictures, crops lie around the mass."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from captum_xnn.report._thumbnails import crop_box, displayable, overlay, photo


def decoded(uri: str, form: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert head == f"data:image/{form};base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_ranges_are_stretched_once_for_all_channels_and_unit_images_kept() -> None:
    unit = torch.rand(3, 4, 5)
    assert torch.equal(displayable(unit), unit)
    image = torch.randn(3, 4, 5)
    expected = (image - image.min()) / (image.max() - image.min())
    assert torch.allclose(displayable(image), expected)
    assert displayable(torch.full((1, 2, 2), 200, dtype=torch.uint8)).unique().tolist() == pytest.approx([200 / 255])
    assert displayable(torch.full((1, 2, 2), 7.0)).unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(2, 4, 4), r"an image is \(2, 4, 4\), not \(1, H, W\) or \(3, H, W\)"),
        (torch.zeros(4, 4), "put the channels first"),
        (torch.full((1, 2, 2), torch.nan), "contains NaN or infinity"),
    ],
)
def test_what_is_no_image_is_refused(image: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        displayable(image)


def test_small_photo_keeps_every_pixel() -> None:
    image = torch.randint(0, 256, (3, 20, 30)) / 255
    pixels = np.asarray(decoded(photo(image), "png"))
    assert np.array_equal(pixels, (image * 255).round().byte().permute(1, 2, 0).numpy())
    grey = torch.randint(0, 256, (1, 28, 28)) / 255
    assert np.array_equal(np.asarray(decoded(photo(grey), "png")), (grey[0] * 255).round().byte().numpy())


def test_large_photo_is_scaled_with_its_aspect_and_colours() -> None:
    image = torch.zeros(3, 300, 600)
    image[0, :, :300], image[2, :, 300:] = 1, 1
    picture = decoded(photo(image), "jpeg")
    assert picture.size == (200, 100)
    pixels = np.asarray(picture).astype(int)
    assert np.abs(pixels[:, 20] - [255, 0, 0]).max() < 12
    assert np.abs(pixels[:, 180] - [0, 0, 255]).max() < 12


def test_overlay_has_the_opacity_and_colours_of_visualize() -> None:
    from captum_xnn.plots._colours import LOWERS, RAISES

    values = torch.linspace(-1, 1, 63).reshape(7, 9)
    pixels = np.asarray(decoded(overlay(values), "png").convert("RGBA")).reshape(63, 4).astype(int)
    sizes = values.abs().flatten().numpy()
    assert np.abs(pixels[:, 3] - 255 * np.minimum(1, 1.15 * sizes**0.65)).max() <= 1
    raises, lowers = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (RAISES, LOWERS))
    # The strongest pixels have about the hue of the numbers: red before green before blue, and the other way round.
    assert np.array_equal(np.argsort(pixels[62, :3]), np.argsort(raises))
    assert np.array_equal(np.argsort(pixels[0, :3]), np.argsort(lowers))
    assert pixels[62, 0] > pixels[62, 2] + 100 and pixels[0, 2] > pixels[0, 0] + 100
    assert pixels[31, 3] == 0


def test_overlay_is_averaged_down_to_its_size() -> None:
    shown = torch.zeros(128, 64)
    shown[:64] = 1
    picture = decoded(overlay(shown), "png").convert("RGBA")
    assert picture.size == (32, 64)
    opacity = np.asarray(picture)[:, :, 3]
    assert (opacity[:32] == 255).all() and (opacity[32:] == 0).all()


@pytest.mark.parametrize("shown", [torch.zeros(1, 3, 3), torch.full((3, 3), 1.5), torch.full((3, 3), torch.nan)])
def test_what_is_no_map_on_a_scale_is_refused(shown: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"is not \(H, W\) in \[-1, 1\]"):
        overlay(shown)


def test_crop_is_a_square_around_the_middle_of_the_mass() -> None:
    heat = torch.zeros(40, 60)
    heat[10:30, 20:40] = 1
    # 0.6 of the mass lies between 0.2 and 0.8 of 200 pixels, 120 pixels; a tenth more is 132, above the least, 40.
    assert crop_box(heat, (400, 600), least=0.1) == (234, 134, 366, 266)
    # With a coarser map of the same, the same pixels of the image.
    assert crop_box(heat[::10, ::10], (400, 600), least=0.1) == (234, 134, 366, 266)
    # A tenth of that image is too small to see anything.
    assert crop_box(heat, (40, 60), least=0.1) == (21, 11, 39, 29)


def test_crop_ignores_negative_parts_stays_inside_and_follows_flips() -> None:
    heat = torch.zeros(20, 20)
    heat[0, 0] = 1
    assert crop_box(heat, (200, 200), least=0.5) == (0, 0, 100, 100)
    assert crop_box(heat.flip(1), (200, 200), least=0.5) == (100, 0, 200, 100)
    negative = (torch.arange(400).reshape(20, 20) > 200).float()
    assert crop_box(heat - negative, (200, 200), least=0.5) == (0, 0, 100, 100)


def test_crop_of_an_empty_map_is_the_image() -> None:
    assert crop_box(torch.zeros(5, 5), (30, 20)) == (0, 0, 20, 30)
    assert crop_box(-torch.ones(5, 5), (30, 20)) == (0, 0, 20, 30)


def test_crop_of_an_even_map_is_the_middle() -> None:
    x0, y0, x1, y1 = crop_box(torch.ones(10, 10), (100, 100))
    assert (x1 - x0, y1 - y0) == (66, 66)
    assert (x0, y0) == (17, 17)
