"""Patches against plain loops and SciPy's rank correlation, what must not count, and what chance scores."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from captum_xnn.metrics import orthogonality, patch_agreement, patch_drops
from captum_xnn.metrics._controls import random_maps, random_partition
from captum_xnn.metrics._overlap import contribution_shares
from captum_xnn.metrics._patches import (
    blurred,
    drop_orthogonality,
    identified_maps,
    map_identification,
    patch_bounds,
    patch_correlations,
    patch_masks,
    rank_correlation,
)
from captum_xnn.training._drops import Grid


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("height", "width", "grid"), [(8, 8, 4), (7, 10, 3), (5, 5, 5), (3, 9, 1), (13, 4, 4)])
def test_patches_part_the_image(height, width, grid):
    masks = patch_masks(height, width, grid)
    assert masks.shape == (grid**2, height, width) and masks.dtype == torch.bool
    assert bool((masks.sum(0) == 1).all())
    for number, mask in enumerate(masks):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert int(mask.sum()) == len(rows) * len(columns)  # a rectangle
        assert len(rows) in (height // grid, -(-height // grid)) and len(columns) in (width // grid, -(-width // grid))
        after = [other for other in masks[number + 1 :] if bool((other.nonzero() <= mask.nonzero()[-1]).all())]
        assert not after  # in reading order
    assert masks[0, 0, 0] and masks[-1, -1, -1] and masks[grid - 1, 0, -1]


@pytest.mark.parametrize(("height", "width", "grid"), [(10, 7, 3), (227, 227, 4), (14, 9, 8)])
def test_a_fit_and_a_measure_cover_the_same_patches(height, width, grid):
    made = [(top, bottom, left, right) for (top, bottom), (left, right) in Grid(height, width, grid).regions]
    marked = [mask.nonzero() for mask in patch_masks(height, width, grid)]
    assert [(*places.amin(0).tolist(), *(places.amax(0) + 1).tolist()) for places in marked] == [
        (top, left, bottom, right) for top, bottom, left, right in made
    ]
    assert [end - start for start, end in patch_bounds(10, 3)] == [3, 3, 4]  # groups were learned from these


@pytest.mark.parametrize("grid", [0, 4])
def test_a_grid_finer_than_the_image_is_refused(grid):
    with pytest.raises(ValueError, match=f"grid is {grid} for images of 3 x 8 pixels; pass 1 to 3"):
        patch_masks(3, 8, grid)


@pytest.fixture
def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 5 * 7, 3)
    ).double()


def covered_by_hand(image, fill, grid, i, j):
    """Patch (i, j) of an image whose sides the grid may not divide."""
    image = image.clone()
    H, W = image.shape[1:]
    for y in range(H):
        for x in range(W):
            if H * i // grid <= y < H * (i + 1) // grid and W * j // grid <= x < W * (j + 1) // grid:
                image[:, y, x] = fill[:, y, x]
    return image


@pytest.mark.parametrize("kind", ["mean colour", "number", "colour", "blurred"])
def test_drops_written_as_loops(network, kind):
    images = rand(3, 2, 7, 9)
    fills = {
        "mean colour": (None, images.mean((2, 3), keepdim=True).expand_as(images)),
        "number": (0.25, torch.full_like(images, 0.25)),
        "colour": (torch.tensor([0.1, 0.9])[:, None, None], torch.tensor([0.1, 0.9])[:, None, None].expand(3, 2, 7, 9)),
        "blurred": (blurred(images, 1.5), blurred(images, 1.5)),
    }
    fill, values = fills[kind]
    drops = patch_drops(network, images, grid=2, fill=fill)
    assert drops.shape == (3, 3, 4) and not drops.requires_grad
    for n in range(3):
        for p in range(4):
            hand = covered_by_hand(images[n], values[n].double(), 2, p // 2, p % 2)
            wanted = network(images[n : n + 1]) - network(hand[None])
            torch.testing.assert_close(drops[n, :, p], wanted[0].detach(), rtol=1e-10, atol=1e-10)


def test_batches_are_the_whole_and_bound_what_is_run_at_once(network):
    images, sizes = rand(3, 2, 7, 9), []

    def counted(batch):
        sizes.append(len(batch))
        return network(batch)

    drops = patch_drops(counted, images, grid=3, batch_size=4)
    assert max(sizes) == 4 and sum(sizes) == 3 * (9 + 1)
    torch.testing.assert_close(drops, patch_drops(network, images, grid=3, batch_size=1000))


def test_drops_of_a_sum_are_the_pixels_themselves():
    """Worked by hand: 4 x 4 pixels, covered by 0."""
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    drops = patch_drops(lambda x: x.sum((2, 3)), image, grid=2, fill=0.0)
    assert drops.tolist() == [[[0 + 1 + 4 + 5, 2 + 3 + 6 + 7, 8 + 9 + 12 + 13, 10 + 11 + 14 + 15]]]


def test_drops_of_columns_and_tokens_written_as_loops():
    x, W = rand(6, 5), rand(5, 3)

    def number(x):
        return (x @ W).square()

    hidden = torch.stack([torch.cat([x[:, :p], x.mean(0)[p].expand(6, 1), x[:, p + 1 :]], 1) for p in range(5)])
    expected = number(x)[:, :, None] - torch.stack([number(h) for h in hidden], 2)
    assert torch.allclose(patch_drops(number, x, batch_size=4), expected, atol=1e-6)

    ids, E = torch.tensor([[3, 1, 2], [2, 2, 0]]), rand(4, 3)
    drops = patch_drops(lambda ids: E[ids].prod(1), ids, fill=0)
    for n in range(2):
        for p in range(3):
            some = [0 if i == p else int(ids[n, i]) for i in range(3)]
            assert torch.allclose(drops[n, :, p], E[ids[n]].prod(0) - E[some].prod(0), atol=1e-6)

    embedded = rand(2, 3, 4)
    drops = patch_drops(lambda x: x.sum(2).square(), embedded)
    changed = embedded.clone()
    changed[:, 1] = embedded.mean((0, 1))
    assert torch.allclose(drops[..., 1], embedded.sum(2).square() - changed.sum(2).square(), atol=1e-6)


def test_agreement_over_tokens_is_scipys_rank_correlation():
    maps, drops, own = rand(4, 2, 7), rand(4, 2, 7), rand(4, 2)
    pairs = [[spearmanr(maps[n, k], drops[n, k]).statistic for k in range(2)] for n in range(4)]
    assert patch_agreement(maps, drops) == pytest.approx(np.mean(pairs))
    share = own.abs() / own.abs().sum(1, keepdim=True)
    expected = float((share * torch.tensor(pairs)).sum() / 4)
    assert patch_agreement(maps, drops, contributions=own) == pytest.approx(expected, abs=1e-6)


def test_equal_words_tie_though_their_drops_round():
    maps, drops = torch.tensor([[[3.0, 3.0, 1.0, 0.0]]]), torch.tensor([[[2.0, 2.0, 1.0, 0.5]]])
    off = torch.tensor([[[1e-7, -1e-7, 0.0, 0.0]]])
    assert patch_agreement(maps + off, drops - off) == patch_agreement(maps, drops) == pytest.approx(1)


def test_contributions_that_need_gradients_turn_them_on():
    def path(images):
        with torch.enable_grad():
            x = images.requires_grad_()
            (slope,) = torch.autograd.grad(x.square().sum(), x)
        return (slope * images).sum((2, 3))

    images = torch.ones(2, 1, 4, 4)
    assert patch_drops(path, images, grid=2, fill=0.0).tolist() == [[[8.0] * 4]] * 2
    assert not images.requires_grad


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x: x.sum((1, 2, 3)), r"contributions are \(2,\) for 2 examples; return \(2, K\),"),
        (lambda x: x.sum((2, 3))[:1], r"contributions are \(1, 1\) for 2 examples"),
        (lambda x: x.sum((2, 3)) / 0, "contributions are NaN or infinite"),
    ],
)
def test_other_contributions_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        patch_drops(given, torch.ones(2, 1, 4, 4), grid=2)


def test_other_images_and_fills_are_refused(network):
    with pytest.raises(ValueError, match=r"inputs are \(7,\) and batch_size is 64; pass images"):
        patch_drops(network, torch.ones(7))
    with pytest.raises(ValueError, match=r"inputs of torch\.int64 are ids, which have no mean; pass fill="):
        patch_drops(network, torch.ones(7, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"fill is \(2,\), and does not broadcast to \(1, 2, 7, 9\); pass a colour"):
        patch_drops(network, rand(1, 2, 7, 9), fill=torch.zeros(2))


def test_blur_is_scipys():
    images = rand(2, 3, 12, 9)
    wanted = gaussian_filter(images.numpy(), (0, 0, 2.0, 2.0), mode="nearest", truncate=4)
    np.testing.assert_allclose(blurred(images, 2.0).numpy(), wanted, rtol=1e-10)
    with pytest.raises(ValueError, match="sigma is 0 pixels"):
        blurred(images, 0)


@pytest.mark.parametrize("values", [10**6, 4])  # 4 values make ties
def test_rank_correlation_is_scipys(values):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(values, (2, 3, 5, 16), generator=g).double()
    found = rank_correlation(a, b)
    for i in range(3):
        for j in range(5):
            assert float(found[i, j]) == pytest.approx(spearmanr(a[i, j], b[i, j]).statistic, abs=1e-12)


def test_rank_correlation_of_constants_is_0():
    a = rand(3, 8)
    assert rank_correlation(a, torch.full((3, 8), 0.3)).tolist() == [0, 0, 0]
    nearly = 0.1 + torch.linspace(0, 1e-8, 8).expand(3, 8)  # less than single precision tells apart
    assert rank_correlation(a.float(), nearly.float()).tolist() == [0, 0, 0]
    assert rank_correlation(torch.tensor([5]), torch.tensor([7])).tolist() == 0
    with pytest.raises(ValueError, match=r"tensors are \(3, 8\) and \(8,\)"):
        rank_correlation(a, a[0])
    with pytest.raises(ValueError, match="values are NaN or infinite"):
        rank_correlation(a, a / 0)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_agreement_written_as_loops(channels):
    maps, drops, contributions = (
        rand(4, 2, *channels, 9, 10) - 0.5,
        rand(4, 2, 9, seed=1) - 0.5,
        rand(4, 2, seed=2) - 0.5,
    )
    masks = patch_masks(9, 10, 3)
    flat = maps.sum(2) if channels else maps
    rho = np.zeros((4, 2))
    for n in range(4):
        for k in range(2):
            rho[n, k] = spearmanr([float(flat[n, k][m].mean()) for m in masks], drops[n, k]).statistic
    np.testing.assert_allclose(patch_correlations(maps, drops), rho, atol=1e-12)
    assert patch_agreement(maps, drops) == pytest.approx(rho.mean())
    size = contributions.abs().numpy()
    share = size / size.sum(1, keepdims=True)
    wanted = (share * rho).sum() / share.sum()
    assert patch_agreement(maps, drops, contributions=contributions) == pytest.approx(wanted)
    np.testing.assert_allclose(share, contribution_shares(contributions))


def test_agreement_worked_by_hand():
    """Patches of mass 3, 1, 2, 0 against drops that order two neighbours the other way: 1 - 6 * 2 / (4 * 15) = 0.8."""
    maps = torch.tensor([[[[3.0, 1.0], [2.0, 0.0]]]]).repeat_interleave(3, 2).repeat_interleave(2, 3)
    drops = torch.tensor([[[9.0, 3.0, 2.0, -1.0]]])
    assert patch_agreement(maps, drops) == pytest.approx(0.8)
    assert patch_agreement(-maps, drops) == pytest.approx(-0.8)


def test_scales_and_monotone_changes_do_not_count():
    maps, drops = rand(3, 2, 4, 4), rand(3, 2, 16, seed=1) - 0.5
    wanted = patch_agreement(maps, drops)
    for changed in (1e-30 * maps, 1e30 * maps, maps**3, maps.exp(), (1e-30 * maps.float())):  # a pixel is a patch
        assert patch_agreement(changed, drops) == pytest.approx(wanted, abs=1e-12)
    assert patch_agreement(maps, 5 * drops**3) == pytest.approx(wanted, abs=1e-12)
    assert patch_agreement(maps * torch.tensor([1e-6, 1e6])[:, None, None], drops) == pytest.approx(wanted)


def test_constant_maps_and_drops_agree_with_nothing():
    maps, drops = rand(2, 3, 7, 7), rand(2, 3, 9, seed=1)
    maps[:, 0] = 0.1  # patches of 4, 6 and 9 pixels
    drops[:, 1] = 0
    found = patch_correlations(maps, drops)
    assert found[:, :2].tolist() == [[0, 0], [0, 0]] and bool((found[:, 2] != 0).all())
    shares = torch.tensor([[2.0, 0, 0], [2.0, 0, 0]])
    assert patch_agreement(maps, drops, contributions=shares) == 0
    assert np.isnan(patch_agreement(maps, drops, contributions=torch.zeros(2, 3)))


def test_equal_patches_tie_though_their_means_round():
    """Fifteen patches of one value, of 81, 90 and 100 pixels: no order among them, and so a perfect agreement."""
    masks = patch_masks(37, 37, 4)
    maps = torch.where(masks[15], 0.9, torch.full((1, 1, 37, 37), 0.7, dtype=torch.float64))
    drops = (torch.arange(16) == 15).double()[None, None]
    assert patch_agreement(maps, drops) == pytest.approx(1)


def test_drops_as_maps_are_the_ceiling():
    """A map made by covering the same patches agrees by construction, also where it is enlarged."""
    drops = rand(2, 3, 16) - 0.5
    maps = drops.unflatten(2, (4, 4)).repeat_interleave(3, 2).repeat_interleave(5, 3)
    assert patch_agreement(maps, drops) == pytest.approx(1)


def test_random_maps_agree_by_chance():
    drops = rand(40, 5, 16) - 0.5
    maps = torch.zeros(40, 5, 32, 32)
    found = torch.tensor([patch_agreement(random_maps(maps, seed=s), drops) for s in range(20)])
    error = 15**-0.5 / 200**0.5  # of the mean of 200 independent rank correlations
    assert float(found.abs().max()) < 4 * error and float(found.mean().abs()) < 4 * error / 20**0.5


def test_random_maps_are_smooth_independent_and_the_same_by_seed():
    like = torch.zeros(6, 4, 20, 30, dtype=torch.float64)
    maps = random_maps(like, seed=3)
    assert maps.shape == like.shape and maps.dtype == like.dtype and float(maps.min()) >= 0
    assert torch.equal(maps, random_maps(like, seed=3)) and not torch.equal(maps, random_maps(like, seed=4))
    neighbours = (maps[..., 1:] - maps[..., :-1]).std() / maps.std()
    assert float(neighbours) < 0.5
    each = torch.corrcoef(maps.flatten(0, 1).flatten(1))
    each.fill_diagonal_(0)
    assert float(each.abs().mean()) < 0.2  # 49 points
    tokens = random_maps(torch.zeros(6, 4, 30), seed=3)  # tokens have no neighbours
    assert tokens.shape == (6, 4, 30) and torch.equal(tokens, random_maps(torch.zeros(6, 4, 30), seed=3))
    assert float(torch.corrcoef(tokens.flatten(0, 1)).fill_diagonal_(0).abs().mean()) < 0.3
    assert float(tokens.std(2).min()) > 0.1
    with pytest.raises(
        ValueError, match=r"maps are \(6, 4, 20, 30\) of torch\.int64, not floating-point \(N, K, H, W\)"
    ):
        random_maps(like.long(), seed=0)


def test_random_partitions():
    a = random_partition(23, 5, torch.Generator().manual_seed(0))
    assert bool((a.sum(1) == 1).all()) and set(a.unique().tolist()) == {0, 1}
    assert sorted(a.sum(0).tolist()) == [4, 4, 5, 5, 5]
    assert torch.equal(a, random_partition(23, 5, torch.Generator().manual_seed(0)))
    drawn = torch.stack([random_partition(4, 2, torch.Generator().manual_seed(s)) for s in range(200)])
    assert 0.35 < float(drawn[:, 0, 0].mean()) < 0.65  # no dimension belongs to a group
    with pytest.raises(ValueError, match="cannot split 3 dimensions into 4 groups; ask for 1 to 3"):
        random_partition(3, 4, torch.Generator())


def test_orthogonality_of_drops():
    """Drops of either sign count alike; x-features on patches of their own overlap less than by chance."""
    drops, contributions = rand(5, 3, 16) - 0.5, rand(5, 3, seed=1)
    for given in (None, contributions):
        wanted = orthogonality(drops.abs().reshape(5, 3, 4, 4), contributions=given)
        assert drop_orthogonality(drops, contributions=given) == pytest.approx(wanted)
        assert drop_orthogonality(-7 * drops, contributions=given) == pytest.approx(wanted)
    same = drops[:, :1].expand(-1, 3, -1)
    assert drop_orthogonality(same).o1 == pytest.approx(3 - 3**0.5)
    own = torch.zeros(4, 3, 16)
    own[:, [0, 1, 2], [2, 7, 11]] = 1
    assert drop_orthogonality(own).o1 < 0.01 < 1 < drop_orthogonality(same).o1
    with pytest.raises(ValueError, match=r"drops are \(5, 16\), not \(N, K, P\)"):
        drop_orthogonality(drops[:, 0])


@pytest.mark.parametrize(
    ("maps", "drops", "message"),
    [
        (
            (2, 3, 8, 8),
            (2, 3, 10),
            r"maps are \(2, 3, 8, 8\) and drops \(2, 3, 10\), not \(N, K, H, W\) and \(N, K, P\) with P a",
        ),
        (
            (2, 3, 8, 8),
            (2, 2, 16),
            r"maps are \(2, 3, 8, 8\) and drops \(2, 2, 16\), not \(N, K, H, W\) and \(N, K, P\) with P a",
        ),
        (
            (3, 8, 8),
            (3, 16),
            r"maps are \(3, 8, 8\) and drops \(3, 16\), not \(N, K, H, W\) and \(N, K, P\) with P a square",
        ),
        ((2, 3, 3, 8), (2, 3, 16), "grid is 4 for images of 3 x 8 pixels; pass 1 to 3"),
        ((0, 3, 8, 8), (0, 3, 16), r"maps are \(0, 3, 8, 8\), without any x-feature"),
    ],
)
def test_other_shapes_are_refused(maps, drops, message):
    with pytest.raises(ValueError, match=message):
        patch_agreement(torch.ones(maps), torch.ones(drops))
    with pytest.raises(ValueError, match=r"contributions are \(2, 2\), not \(2, 3\) with one for each map"):
        patch_agreement(torch.ones(2, 3, 8, 8), torch.ones(2, 3, 16), contributions=torch.ones(2, 2))


def test_identified_maps_are_those_of_loops_over_numpy():
    maps, drops = rand(6, 4, 8, 8), rand(6, 4, 16, seed=1)
    drops += 0.5 * torch.nn.functional.avg_pool2d(maps, 2).flatten(2)
    found = identified_maps(maps, drops)
    for n in range(6):
        for k in range(4):
            means = [float(maps[n, k, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean()) for r in range(4) for c in range(4)]
            fit = [np.corrcoef(means, drops[n, j])[0, 1] for j in range(4)]
            assert bool(found[n, k]) == (int(np.argmax(fit)) == k and fit[k] > 0)
    assert map_identification(maps, drops) == pytest.approx(float(found.double().mean()))
    assert 0 < found.double().mean() < 1


def test_identification_ignores_units_and_numbering_and_sees_signs():
    maps, drops = rand(5, 3, 9), rand(5, 3, 9, seed=1) * 0.3
    drops += maps
    value = map_identification(maps, drops)
    assert value > 0.8
    scaled = map_identification(maps * torch.tensor([1.0, 30.0, 1e-6])[:, None] + 7, 0.01 * drops - 3)
    assert scaled == value
    order = torch.tensor([2, 0, 1])
    assert map_identification(maps[:, order], drops[:, order]) == value
    assert map_identification(maps[:, order], drops) < 0.3
    assert map_identification(-maps, drops) == 0


def test_maps_that_fit_no_better_than_others_are_not_identified():
    maps = rand(4, 3, 9)
    alike = maps[:, :1].expand(4, 3, 9) * torch.tensor([1.0, 2.0, 0.1])[:, None]
    assert map_identification(alike, alike) == 0  # copies of one map with copies of one drop
    dead = maps.clone()
    dead[:, 1] = 0.25
    assert identified_maps(dead, dead).tolist() == [[True, False, True]] * 4
    assert np.isnan(map_identification(maps[:, :1], maps[:, :1]))
    # The first map contradicts its own drops less than the others', and is not identified for it.
    shown = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    lost = torch.tensor([[[1.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]]])
    assert identified_maps(shown, lost).tolist() == [[False, True]]


def test_identification_of_noise_is_chance_and_uneven_shares_do_not_help():
    noise, drops = rand(400, 5, 16), rand(400, 5, 16, seed=1)
    assert map_identification(noise, drops) < 0.25  # chance is .2, less maps that contradict all drops
    uneven = torch.cat([drops[:, :1], 1e-3 * drops[:, 1:2].expand(400, 4, 16)], 1)
    assert map_identification(uneven, uneven) == pytest.approx(0.2)


def test_random_directions_that_cancel_are_identified():
    """What the docs warn of: maps and drops of two copies of the output can be told apart by what cancels."""
    whole, taken = rand(50, 1, 16), rand(50, 2, 16, seed=1)
    copies = torch.cat([whole, whole], 1)
    turned = copies + 5 * (taken[:, :1] - 0.5) * torch.tensor([1.0, -1.0])[:, None]
    assert map_identification(copies, copies) == 0
    assert map_identification(turned, turned) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_identification_refuses_numbers_that_are_not_finite(bad):
    maps = rand(1, 2, 4)
    broken = maps.clone()
    broken[0, 0, 0] = bad
    for pair in ((maps, broken), (broken, maps)):
        with pytest.raises(ValueError, match="values are NaN or infinite"):
            map_identification(*pair)
    with pytest.raises(ValueError, match="without any x-feature; pass at least one example"):
        map_identification(maps[:0], maps[:0])
