"""Which pixels stay, what the others become, and the accuracy that is left: by loops, by stencil and by hand."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from captum_xnn.metrics import keep_top_accuracy
from captum_xnn.metrics._keeping import biharmonic, combined, constant, keep_top, mean_colour, telea, top_pixels


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some(*shape, share=0.5, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


# --- combined


def test_combined_by_loops():
    maps, contributions = drawn(3, 4, 2, 5), drawn(3, 4, seed=1)
    contributions[:, 0], contributions[:, 1] = 1.5, -1.5
    made = combined(maps, contributions)
    for n in range(3):
        for h in range(2):
            for w in range(5):
                wanted = 0.0
                for k in range(4):
                    mass = sum(max(x, 0) for x in maps[n, k].flatten().tolist())
                    wanted += max(float(contributions[n, k]), 0) * max(float(maps[n, k, h, w]), 0) / mass
                assert float(made[n, h, w]) == pytest.approx(wanted, rel=1e-12)


def test_combined_does_not_depend_on_scales_of_maps_or_the_order_of_features():
    maps, contributions = drawn(2, 3, 4, 4).abs(), drawn(2, 3, seed=1).abs()
    made = combined(maps, contributions)
    scale = torch.tensor([1e-3, 7.0, 100.0], dtype=torch.float64)[:, None, None]
    assert torch.allclose(combined(maps * scale, contributions), made, rtol=1e-12)
    assert torch.allclose(combined(maps[:, [2, 0, 1]], contributions[:, [2, 0, 1]]), made, rtol=1e-12)
    assert torch.allclose(made.sum((1, 2)), contributions.sum(1), rtol=1e-12)


def test_combined_of_degenerate_maps_and_contributions():
    maps = torch.zeros(3, 2, 1, 2)
    maps[0, 1] = torch.tensor([1.0, 3.0])  # a dead x-feature beside it, with the larger contribution
    maps[1] = torch.tensor([[[4.0, 0.0]], [[0.0, 2.0]]])  # nothing speaks for the class: both count alike
    contributions = torch.tensor([[5.0, 2.0], [-1.0, -3.0], [1.0, 1.0]])
    assert combined(maps, contributions).tolist() == [[[0.5, 1.5]], [[1.0, 1.0]], [[0.0, 0.0]]]
    with pytest.raises(
        ValueError, match=r"maps are \(2, 3, 4\) and contributions \(2, 3\), not .*; pass both from one explanation"
    ):
        combined(torch.zeros(2, 3, 4), torch.zeros(2, 3))
    with pytest.raises(
        ValueError, match=r"maps are \(2, 3, 4, 4\) and contributions \(2, 4\), not \(N, K, H, W\) and \(N, K\)"
    ):
        combined(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4))


# --- top_pixels


@pytest.mark.parametrize("n", [0, 1, 7, 29, 30])
def test_top_pixels_by_sorting_in_python(n):
    maps = torch.randint(0, 6, (20, 5, 6), generator=torch.Generator().manual_seed(0)).float()  # with many ties
    kept = top_pixels(maps, n)
    assert kept.dtype == torch.bool and kept.sum((1, 2)).tolist() == [n] * 20
    for one, mask in zip(maps, kept, strict=True):
        values = one.flatten().tolist()
        wanted = sorted(range(30), key=lambda i, values=values: (-values[i], i))[:n]
        assert mask.flatten().nonzero()[:, 0].tolist() == sorted(wanted)


def test_top_pixels_of_a_constant_map_are_the_first():
    assert top_pixels(torch.zeros(1, 2, 3), 4).int().tolist() == [[[1, 1, 1], [1, 0, 0]]]
    assert top_pixels(torch.zeros(0, 2, 3), 0).shape == (0, 2, 3)


def test_top_pixels_keep_more_as_n_grows():
    maps = torch.randint(0, 9, (4, 6, 6), generator=torch.Generator().manual_seed(1)).float()
    for n in range(36):
        assert not (top_pixels(maps, n) & ~top_pixels(maps, n + 1)).any()


def test_top_pixels_errors():
    with pytest.raises(ValueError, match="n is 7, and maps of 2 x 3 have 6 pixels"):
        top_pixels(torch.zeros(1, 2, 3), 7)
    with pytest.raises(ValueError, match="n is -1, and maps of 2 x 3 have 6 pixels"):
        top_pixels(torch.zeros(1, 2, 3), -1)
    with pytest.raises(ValueError, match="finite: False"):
        top_pixels(torch.full((1, 2, 3), torch.nan), 1)
    with pytest.raises(ValueError, match=r"maps are \(1, 2, 3, 4\), finite: True"):
        top_pixels(torch.zeros(1, 2, 3, 4), 1)


# --- fills


def test_constant_and_mean_fill_by_hand():
    image = torch.tensor([[[1.0, 3.0, 9.0]], [[0.0, 0.0, 5.0]]])
    kept = torch.tensor([[True, True, False]])
    assert constant([7.0, -7.0])(image, kept).tolist() == [[[1.0, 3.0, 7.0]], [[0.0, 0.0, -7.0]]]
    assert constant(4.0)(image, kept).tolist() == [[[1.0, 3.0, 4.0]], [[0.0, 0.0, 4.0]]]
    assert mean_colour(image, kept).tolist() == [[[1.0, 3.0, 2.0]], [[0.0, 0.0, 0.0]]]


def test_biharmonic_solves_the_biharmonic_equation():
    """The Laplacian of the Laplacian, in loops, is 0 at lost pixels that are two away from the border."""
    x, y = torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="xy")
    image = torch.stack([torch.sin(x / 4) + y / 9, 100 + x * y], 0).double()
    kept = torch.ones(10, 10, dtype=torch.bool)
    kept[3:6, 4:7] = False
    made = biharmonic(torch.where(kept, image, -1e9), kept)  # what was lost cannot be seen

    def laplacian(f, i, j):
        return f(i - 1, j) + f(i + 1, j) + f(i, j - 1) + f(i, j + 1) - 4 * f(i, j)

    for channel, scale in zip(made, (1, 100), strict=True):
        for i, j in (~kept).nonzero().tolist():
            twice = laplacian(lambda a, b, c=channel: laplacian(lambda p, q: float(c[p, q]), a, b), i, j)
            assert abs(twice) < 1e-9 * scale
    assert torch.equal(made[:, kept], image[:, kept])
    assert torch.allclose(made[1], image[1], rtol=1e-9)  # x y is biharmonic itself


FILLS = [biharmonic, mean_colour, telea]


def needs(fill):
    if fill is telea:
        pytest.importorskip("cv2")


@pytest.mark.parametrize("fill", FILLS)
def test_fills_do_not_depend_on_the_normalisation(fill):
    needs(fill)
    image, kept = torch.rand(3, 12, 14, dtype=torch.float64), some(12, 14, share=0.3)
    scale = torch.tensor([4.0, 0.01, 3e4], dtype=torch.float64)[:, None, None]
    shift = torch.tensor([-2.0, 5.0, 1e3], dtype=torch.float64)[:, None, None]
    made = fill(image, kept)
    assert torch.allclose((fill(image * scale + shift, kept) - shift) / scale, made, atol=1e-4)
    assert made.amin() >= image[:, kept].amin() - 1e-9 and made.amax() <= image[:, kept].amax() + 1e-9


@pytest.mark.parametrize("fill", FILLS)
def test_fills_do_not_see_what_is_lost(fill):
    needs(fill)
    image, kept = torch.rand(2, 9, 9), some(9, 9)
    assert torch.equal(fill(torch.where(kept, image, torch.nan), kept), fill(image, kept))


@pytest.mark.parametrize("fill", FILLS)
def test_fills_at_both_ends(fill):
    needs(fill)
    image = torch.rand(2, 6, 7)
    assert torch.equal(fill(image, torch.ones(6, 7, dtype=torch.bool)), image)
    assert torch.equal(fill(image, torch.zeros(6, 7, dtype=torch.bool)), torch.zeros(2, 6, 7))
    one = torch.zeros(6, 7, dtype=torch.bool)
    one[2, 3] = True  # all there is to go by is one colour
    assert torch.allclose(fill(image, one), image[:, 2, 3][:, None, None].expand(2, 6, 7))


@pytest.mark.parametrize("fill", FILLS)
def test_fills_follow_a_ramp(fill):
    """Nearer to what was lost than the mean colour is."""
    needs(fill)
    image = (torch.arange(16.0) / 15).expand(1, 16, 16).contiguous()
    kept = some(16, 16, share=0.4)
    error = float((fill(image, kept) - image).abs().mean())
    assert error > 0.1 if fill is mean_colour else error < 0.05


def test_telea_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"cv2 is not installed; run `pip install captum-xnn\[inpainting\]`"):
        telea(torch.rand(1, 4, 4), some(4, 4))


# --- keep_top


@pytest.mark.parametrize("fill", [biharmonic, mean_colour, constant(-3.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kept_pixels_stay_bit_for_bit(fill, dtype):
    images, masks = torch.randn(3, 2, 8, 8).to(dtype), some(3, 8, 8)
    before = images.clone()
    made = keep_top(images, masks, fill)
    chosen = masks[:, None].expand_as(images)
    assert made.dtype == dtype and torch.equal(made[chosen], images[chosen]) and torch.equal(images, before)
    assert made.isfinite().all() and not torch.equal(made, images)
    single = torch.cat([keep_top(images[i : i + 1], masks[i : i + 1], fill) for i in range(3)])
    assert torch.equal(single, made)


def test_keep_top_holds_a_fill_to_its_pixels():
    images, masks = torch.ones(1, 1, 1, 2), torch.tensor([[[True, False]]])
    assert keep_top(images, masks, lambda image, kept: torch.full_like(image, 8)).tolist() == [[[[1.0, 8.0]]]]


def test_keep_top_errors():
    with pytest.raises(ValueError, match=r"images are \(1, 3, 4, 4\) and masks \(1, 4, 5\) of torch\.bool"):
        keep_top(torch.zeros(1, 3, 4, 4), some(1, 4, 5))
    with pytest.raises(
        ValueError, match=r"images are \(1, 3, 4, 4\) and masks \(1, 4, 4\) of torch\.float32; .* made by top_pixels"
    ):
        keep_top(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4))


# --- accuracy


class Brightest(nn.Module):
    """Takes the row with the most light for the class; a dropout would disturb it outside of eval mode."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.99)
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.drop(x.sum((1, 3)))


IMAGES = torch.zeros(4, 1, 3, 3)
for _i, _row in enumerate((0, 1, 2, 2)):
    IMAGES[_i, 0, _row] = torch.tensor([0.0, 2.0, 1.0])
LABELS = torch.tensor([0, 1, 2, 0])  # the last one is wrong whatever is kept


@pytest.mark.parametrize("n, wanted", [(0, 0.5), (1, 0.75), (2, 0.75), (9, 0.75)])
def test_accuracy_by_hand(n, wanted):
    """With nothing kept the images are black, row 0 is taken, and two labels say so."""
    model = Brightest().train()
    found = keep_top_accuracy(model, IMAGES, IMAGES[:, 0], LABELS, n, fill=0.0, batch_size=3)
    assert found == wanted and model.sizes == [3, 1] and model.training and model.drop.training
    assert keep_top_accuracy(model, IMAGES, IMAGES[:, 0], LABELS, n, fill=0.0, batch_size=1) == wanted


def test_accuracy_falls_with_maps_that_point_elsewhere():
    for n in range(1, 7):  # six pixels are outside of the bright row
        blind = keep_top_accuracy(Brightest(), IMAGES, -IMAGES[:, 0], LABELS, n, fill=0.0)
        assert blind == 0.5
    assert keep_top_accuracy(Brightest(), IMAGES, -IMAGES[:, 0], LABELS, 9, fill=0.0) == 0.75


def test_accuracy_takes_any_function_and_no_gradients():
    weight = torch.ones(1, requires_grad=True)

    def model(x):
        assert not (x * weight).requires_grad
        return x.sum((1, 3))

    assert keep_top_accuracy(model, IMAGES[:1], IMAGES[:1, 0], LABELS[:1], 3) == 1.0


def test_accuracy_errors():
    with pytest.raises(ValueError, match="N > 0 images"):
        keep_top_accuracy(Brightest(), IMAGES[:0], IMAGES[:0, 0], LABELS[:0], 1)
    with pytest.raises(
        ValueError, match=r"images are \(4, 1, 3, 3\), maps \(3, 3, 3\) and labels \(4,\); pass one map"
    ):
        keep_top_accuracy(Brightest(), IMAGES, IMAGES[:3, 0], LABELS, 1)
    with pytest.raises(ValueError, match=r"images are \(4, 1, 3, 3\), maps \(4, 3, 3\) and labels \(4, 1\)"):
        keep_top_accuracy(Brightest(), IMAGES, IMAGES[:, 0], LABELS[:, None], 1)


def test_photograph_is_recovered_better_by_better_fills():
    """On a real picture biharmonic inpainting of 5 % of the pixels is nearer than their mean colour, and than black."""
    from skimage.data import astronaut
    from skimage.transform import resize

    image = torch.from_numpy(resize(astronaut(), (96, 96)).astype(np.float32)).permute(2, 0, 1)[None]
    kept = top_pixels(torch.rand(1, 96, 96), 460)
    errors = [
        float((keep_top(image, kept, fill) - image).abs().mean()) for fill in (biharmonic, mean_colour, constant(0.0))
    ]
    assert errors[0] < 0.5 * errors[1] < 0.5 * errors[2]


def test_combined_tells_contributions_that_are_not_finite():
    """A NaN is not above 0, and all x-features would count alike."""
    with pytest.raises(ValueError, match="contributions are NaN or infinite"):
        combined(torch.ones(1, 2, 3, 3), torch.tensor([[1.0, torch.nan]]))


def test_maps_of_x_features_are_mixed_by_contributions():
    """The x-feature with the larger contribution decides which pixel stays: by hand, one row of three pixels."""
    images = torch.tensor([[[[9.0, 0.0, 3.0]]], [[[9.0, 0.0, 3.0]]]])
    maps = torch.tensor([[[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]]]).expand(2, -1, -1, -1)
    contributions = torch.tensor([[2.0, 1.0], [-2.0, 1.0]])

    def model(x):
        return x[:, 0, 0]

    given = {"contributions": contributions, "fill": 0.0}
    assert keep_top_accuracy(model, images, maps, torch.tensor([0, 2]), 1, **given) == 1
    assert keep_top_accuracy(model, images, maps, torch.tensor([2, 0]), 1, **given) == 0
    with pytest.raises(ValueError, match=r"maps are \(2, 2, 1, 3\).* pass finite maps \(N, H, W\), or the maps"):
        keep_top_accuracy(model, images, maps, torch.tensor([0, 2]), 1, fill=0.0)


def test_a_fill_has_a_name():
    images, masks = torch.rand(2, 3, 12, 12), torch.rand(2, 12, 12) < 0.5
    assert torch.equal(keep_top(images, masks, "biharmonic"), keep_top(images, masks, biharmonic))
    with pytest.raises(ValueError, match="fill 'telia' does not exist; pass 'biharmonic', 'telea', a colour or a"):
        keep_top(images, masks, "telia")
