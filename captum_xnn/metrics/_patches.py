r"""Patches: cover the patches of an input one after the other, and compare the drops with the maps.

Conventions:
    N examples, K x-features with contributions (N, K) in logits. A **patch** is a piece of an input. An image (C, H, W)
    has P = g x g patches, numbered in reading order. A text (L,) or (L, E) has a patch for each of its L tokens. A row
    of a table (L,) has a patch for each of its L columns. A **drop** is the contribution in the whole input minus that
    in the input with one patch covered, (N, K, P), in logits. It is positive where the patch adds to the contribution.

Metrics:
    ``patch_agreement``: Spearman rank correlation over the patches between the drops and the map, mean over images and
    x-features, from -1 to 1. Chance is 0.
    ``map_identification``: Share of x-features whose map fits their own drops better than the drops of every other
    x-feature in the example, from 0 to 1. Chance is 1 / K.
    ``drop_orthogonality``: O1 and O2 (:mod:`captum_xnn.metrics._overlap`) of the drops in absolute value, in
    place of the maps. 0 if every x-feature depends on patches of its own.

How to read them:
    Occlusion covers the same patches, so its maps agree by construction. Treat its patch agreement as a ceiling, not
    as a rival. Patch agreement does not show whether x-features differ: a single x-feature that equals the whole
    output can reach any value, and random groups, each a small copy of the output, share that value. Map
    identification asks what patch agreement leaves open: whether the maps of one example can be told apart by what
    they claim. x-features that cancel are easily told apart, also random directions: read it beside
    ``PatchScores.movement``. The orthogonality of drops uses no maps, so no heatmap method can flatter it. Random
    groups of dimensions do not look distinct either, because their drops come from the same patches. A dead x-feature
    does look distinct: use the weighted form. Print random maps and random groups
    (:mod:`captum_xnn.metrics._controls`) beside both metrics, as :func:`captum_xnn.patch_scores.patch_scores` does.

Fill:
    The model never saw inputs with covered patches, so the drops depend on the fill. The default for an image is its
    mean colour; it needs no knowledge of the data. For normalised images, 0 is the mean colour of the data. The default
    for a table is the mean of each column. Ids of tokens have no mean: pass the id of padding or of unknown words.
    :func:`captum_xnn.patch_scores.patch_scores` can also put the mean embedding in the token's place.

Reference:
    Hesse, Schaub-Meyer, Roth, "Benchmarking the Attribution Quality of Vision Models", 2024. Their score IDSDS rates
    maps of whole outputs, with models trained on covered patches. Here it rates maps of each x-feature, with the model
    unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_xnn.metrics._overlap import Orthogonality, contribution_shares, orthogonality
from captum_xnn.metrics._shapes import over_channels

__all__ = [
    "blurred",
    "drop_orthogonality",
    "drops_of_patches",
    "elements_of_patches",
    "identified_maps",
    "map_identification",
    "mean_by_share",
    "mean_colours",
    "patch_agreement",
    "patch_bounds",
    "patch_correlations",
    "patch_cover",
    "patch_drops",
    "patch_masks",
    "rank_correlation",
    "refuse_channels_last",
]

# Correlations, or deviations in units of the values, that differ by less count as equal: sums in other orders.
_SAME = 1e-9


def patch_bounds(size: int, patches: int) -> list[tuple[int, int]]:
    """Compute the start and end of each patch along one side, in pixels.

    Args:
        size: Pixels along the side.
        patches: Patches along the side, at most one per pixel.

    Example:
        >>> patch_bounds(10, 3)
        [(0, 3), (3, 6), (6, 10)]
    """
    patches = min(patches, size)
    edges = [size * i // patches for i in range(patches + 1)]
    return list(pairwise(edges))


def patch_masks(height: int, width: int, grid: int = 4) -> Tensor:
    """Mark the pixels of each patch, (P, H, W), bool; every pixel belongs to exactly one patch.

    :func:`patch_bounds` cuts the sides. Where the grid does not divide a side evenly, patches differ by one pixel.

    Args:
        height: H in pixels.
        width: W in pixels.
        grid: Patches along each side.

    Raises:
        ValueError: If a side has fewer pixels than patches.

    Example:
        >>> patch_masks(3, 2, 2).sum((1, 2))
        tensor([1, 1, 2, 2])
    """
    if not 1 <= grid <= min(height, width):
        raise ValueError(f"grid is {grid} for images of {height} x {width} pixels; pass 1 to {min(height, width)}")
    masks = torch.zeros(grid, grid, height, width, dtype=torch.bool, device="cpu")
    for i, (top, bottom) in enumerate(patch_bounds(height, grid)):
        for j, (left, right) in enumerate(patch_bounds(width, grid)):
            masks[i, j, top:bottom, left:right] = True
    return masks.flatten(0, 1)


def refuse_channels_last(images: Tensor) -> None:
    """Raise where images are plainly (N, H, W, C), by their shape.

    Args:
        images: Images, which should be (N, C, H, W).

    Example:
        >>> refuse_channels_last(torch.zeros(1, 28, 28, 3))
        Traceback (most recent call last):
        ...
        ValueError: images are (1, 28, 28, 3), with channels last; pass them with channels first, as in
        images.permute(0, 3, 1, 2), and permute them back where they go into the model
    """
    if images.dim() == 4 and images.shape[3] in (1, 3, 4) and min(images.shape[1:3]) > 4:
        raise ValueError(
            f"images are {tuple(images.shape)}, with channels last; pass them with channels first, as in "
            "images.permute(0, 3, 1, 2), and permute them back where they go into the model"
        )


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Blur images by a Gaussian, as a fill for :func:`patch_drops`; border pixels repeat beyond the border.

    Args:
        images: (N, C, H, W).
        sigma: Standard deviation in pixels.

    Raises:
        ValueError: If sigma is not positive.

    Example:
        >>> image = torch.zeros(1, 1, 5, 5)
        >>> image[0, 0, 2, 2] = 1
        >>> bool(blurred(image, 0.5)[0, 0].argmax() == 12)
        True
    """
    if not sigma > 0:
        raise ValueError(
            f"sigma is {sigma} pixels; pass sigma > 0, such as an eighth of the image's side, to hide most detail"
        )
    at = torch.arange(-round(4 * sigma), round(4 * sigma) + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum())[None, None]
    pad = len(at) // 2
    refuse_channels_last(images)
    n, channels, height, width = images.shape
    # A Gaussian separates: blur the rows, then the columns, as one-dimensional signals.
    along = F.pad(images.reshape(-1, 1, width), (pad, pad), mode="replicate")
    done = F.conv1d(along, kernel).reshape(n, channels, height, width).transpose(2, 3)
    along = F.pad(done.reshape(-1, 1, height), (pad, pad), mode="replicate")
    return F.conv1d(along, kernel).reshape(n, channels, width, height).transpose(2, 3).contiguous()


@torch.no_grad()
def patch_drops(
    contributions: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    grid: int = 4,
    fill: Tensor | float | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Cover every patch of every example, and compute the drop of each x-feature's contribution, (N, K, P).

    Args:
        contributions: Computes the contributions (n, K) of a batch of inputs (n, ...), or its logit (n, 1). It runs
            without gradients. If it needs them, it must turn them on itself with ``torch.enable_grad``.
        inputs: Images (N, C, H, W), or tokens or rows of a table (N, L) or (N, L, E).
        grid: Patches along each side of an image.
        fill: Values of a covered patch: a number, or a tensor that broadcasts to the inputs, such as
            blurred copies of them. By default the mean colour of each image, or the mean of each column over the
            examples; of embeddings (N, L, E), the mean over examples and tokens.
        batch_size: Examples in one call. In all, N (P + 1) examples run; at most ``batch_size`` covered examples are
            in memory at once.

    Raises:
        ValueError: If shapes do not fit, contributions are not finite, or ids of tokens come without a fill.

    Example:
        >>> drops = patch_drops(lambda x: x.sum((2, 3)), torch.ones(1, 1, 4, 4), grid=2, fill=0.0)
        >>> drops
        tensor([[[4., 4., 4., 4.]]])
        >>> patch_drops(lambda x: x.sum(1, keepdim=True), torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        tensor([[[-1.,  0.]],
        <BLANKLINE>
                [[ 1.,  0.]]])
    """
    if inputs.dim() not in (2, 3, 4) or not len(inputs) or batch_size < 1:
        raise ValueError(
            f"inputs are {tuple(inputs.shape)} and batch_size is {batch_size}; pass images (N, C, H, W), or tokens or "
            "rows (N, L) or (N, L, E), also for a single example, and batch_size > 0"
        )
    refuse_channels_last(inputs)
    cover = patch_cover(inputs, fill)
    masks = elements_of_patches(inputs, grid)

    def covered(rows: Tensor, patches: Tensor) -> Tensor:
        return torch.where(masks[patches], cover[rows], inputs[rows])

    def values(x: Tensor, _rows: Tensor, _patches: Tensor | None) -> Tensor:
        return contributions(x)

    marks = torch.ones(len(inputs), len(masks), dtype=torch.bool, device="cpu")
    return drops_of_patches(values, inputs, covered, marks, batch_size=batch_size)


def patch_cover(inputs: Tensor, fill: Tensor | float | None) -> Tensor:
    """Compute the values of covered patches, in the shape of the inputs.

    Args:
        inputs: As :func:`patch_drops` takes them.
        fill: As :func:`patch_drops` takes it.

    Raises:
        ValueError: If the fill does not broadcast to the inputs, or ids of tokens or a single row of a table come
            without one.
    """
    if fill is None and inputs.dim() == 2 and len(inputs) == 1 and inputs.is_floating_point():
        raise ValueError(
            f"inputs are 1 row of {inputs.shape[1]} columns, and the mean of each column over 1 row is its own value, "
            "so nothing would be covered; pass fill=, such as the mean of each column over the training data"
        )
    if fill is not None:
        cover = torch.as_tensor(fill, device=inputs.device).to(inputs)
    elif inputs.dim() == 4 and (inputs.is_floating_point() or inputs.dtype == torch.uint8):
        cover = mean_colours(inputs)
    elif inputs.is_floating_point():
        cover = inputs.mean(tuple(range(inputs.dim() - 1)), keepdim=True)
    else:
        raise ValueError(
            f"inputs of {inputs.dtype} are ids, which have no mean; pass fill=, the id of padding or of unknown words"
        )
    try:
        return cover.expand_as(inputs)
    except RuntimeError as error:
        raise ValueError(
            f"fill is {tuple(cover.shape)}, and does not broadcast to {tuple(inputs.shape)}; pass a colour as (C, 1, 1)"
        ) from error


def mean_colours(images: Tensor) -> Tensor:
    """Compute the mean colour of each image, (N, C, 1, 1), in the dtype of the images; bytes are rounded.

    Args:
        images: (N, C, H, W).

    Example:
        >>> mean_colours(torch.tensor([[[[0, 255, 255]]]], dtype=torch.uint8))
        tensor([[[[170]]]], dtype=torch.uint8)
    """
    if images.is_floating_point():
        return images.mean((2, 3), keepdim=True)
    return images.double().mean((2, 3), keepdim=True).round().to(images.dtype)


def elements_of_patches(inputs: Tensor, grid: int) -> Tensor:
    """Mark the elements of each patch, bool, in a shape that broadcasts to (P, *inputs.shape[1:]).

    Args:
        inputs: As :func:`patch_drops` takes them.
        grid: Patches along each side of an image.
    """
    if inputs.dim() == 4:
        return patch_masks(inputs.shape[2], inputs.shape[3], grid)[:, None].to(inputs.device)
    L = inputs.shape[1]
    return torch.eye(L, dtype=torch.bool, device=inputs.device).reshape(L, L, *[1] * (inputs.dim() - 2))


@torch.no_grad()
def drops_of_patches(
    values: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    inputs: Tensor,
    covered: Callable[[Tensor, Tensor], Tensor],
    marks: Tensor,
    *,
    batch_size: int,
) -> Tensor:
    """Compute the drops of the marked patches, (N, K, P); 0 for all others.

    Args:
        values: Computes contributions (n, K) from inputs (n, ...), the numbers (n,) of their examples, and those of
            their covered patches; None for whole inputs.
        inputs: The examples (N, ...).
        covered: Covers a patch of each of some examples: from their numbers (n,) and the patches' to inputs (n, ...).
        marks: Patches to cover, bool (N, P); others, such as padding, belong to no example.
        batch_size: Examples in one call.
    """
    every = torch.arange(len(inputs), device=inputs.device)
    whole = torch.cat([_checked(values(inputs[rows], rows, None), rows) for rows in torch.split(every, batch_size)])
    drops = whole.new_zeros(len(inputs), marks.shape[1], whole.shape[1])
    for pairs in torch.split(marks.to(inputs.device).nonzero(), batch_size):
        rows, patches = pairs.T
        drops[rows, patches] = whole[rows] - _checked(values(covered(rows, patches), rows, patches), rows)
    return drops.transpose(1, 2)


def _checked(found: Tensor, rows: Tensor) -> Tensor:
    """Return the contributions of some examples after checking them."""
    found = found.detach()
    if found.dim() != 2 or len(found) != len(rows):
        raise ValueError(
            f"contributions are {tuple(found.shape)} for {len(rows)} examples; return ({len(rows)}, K), and give a "
            "single logit a second dimension of 1"
        )
    if not bool(found.isfinite().all()):
        raise ValueError("contributions are NaN or infinite; check whether the fit diverged")
    return found


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Compute Spearman's rank correlation over the last dimension, (...), float64; 0 where either input is constant.

    Equal values share the mean of their ranks.

    Args:
        a: (..., P).
        b: Of the same shape.

    Raises:
        ValueError: If shapes differ or values are not finite.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 10.0, 100.0]))
        tensor(1., dtype=torch.float64)

    Reference:
        Spearman, "The Proof and Measurement of Association between Two Things", 1904.
    """
    if a.shape != b.shape or not a.dim() or not a.shape[-1]:
        raise ValueError(
            f"tensors are {tuple(a.shape)} and {tuple(b.shape)}; pass two of one shape (..., P), with their dimensions "
            "in the same order"
        )
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise ValueError("values are NaN or infinite; check the images that have them")
    x, y = (_centred_ranks(values.detach()) for values in (a, b.to(a.device)))
    size = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return ((x * y).sum(-1) / torch.where(size > 0, size, 1)).clamp(-1, 1)


def _centred_ranks(values: Tensor) -> Tensor:
    """Compute ranks minus their mean, float64; ties share their mean rank. 0 if values differ by rounding alone."""
    rounding = 4 * torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
    x = values.double().contiguous()
    extent = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    ordered = x.sort(-1).values
    smaller, not_larger = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    rank = (smaller + not_larger - x.shape[-1]) / 2.0  # the mean of ranks 1 to P is (P + 1) / 2
    return torch.where(extent > rounding * x.abs().amax(-1, keepdim=True), rank.double(), 0)


def patch_correlations(maps: Tensor, drops: Tensor) -> Tensor:
    """Compute the rank correlation over patches of each map with its x-feature's drops, (N, K), in [-1, 1], float64.

    The map's value of a patch is its mean over the patch. For patches of one size, the sum gives the same order.

    Args:
        maps: (N, K, H, W) of images, or (N, K, C, H, W) to sum over channels; (N, K, L) of tokens or columns. Signs
            count: a map should be positive where the input adds to the contribution.
        drops: (N, K, P). P is a square number for images, and L for tokens or columns.

    Raises:
        ValueError: If shapes do not fit, or values are not finite.

    Example:
        >>> maps = torch.tensor([[[[4.0, 3.0], [2.0, 1.0]]]])
        >>> patch_correlations(maps, torch.tensor([[[0.5, 0.4, 0.1, -0.2]]]))
        tensor([[1.]], dtype=torch.float64)
    """
    value = _patch_means(maps, drops)
    if over_channels(maps).dim() == 3:
        # The same word twice has the same drop, but for rounding: such words tie.
        return rank_correlation(_rounded(value), _rounded(drops.to(maps.device)))
    size = value.abs().amax(2, keepdim=True)
    # In double precision, sums over equal patches differ in their last bits. In single precision they tie.
    return rank_correlation((value / torch.where(size > 0, size, 1)).float(), drops.to(maps.device))


def _patch_means(maps: Tensor, drops: Tensor) -> Tensor:
    """Compute the mean of each map over each patch, (N, K, P), float64, after checking that shapes fit."""
    maps = over_channels(maps)
    if maps.dim() == 3 and maps.shape == drops.shape:
        return maps.detach().double()
    grid = round(drops.shape[-1] ** 0.5) if drops.dim() == 3 else 0
    if maps.dim() != 4 or drops.dim() != 3 or maps.shape[:2] != drops.shape[:2] or grid**2 != drops.shape[2]:
        raise ValueError(
            f"maps are {tuple(maps.shape)} and drops {tuple(drops.shape)}, not (N, K, H, W) and (N, K, P) with P a "
            "square number, or (N, K, L) and (N, K, L); pass the drops from patch_drops for the same examples and "
            "x-features"
        )
    masks = patch_masks(maps.shape[2], maps.shape[3], grid).to(maps.device).double().flatten(1)
    return maps.detach().double().flatten(2) @ (masks / masks.sum(1, keepdim=True)).T


def _rounded(values: Tensor) -> Tensor:
    """Round to five decimals of the largest absolute value along the last dimension."""
    size = values.detach().double().abs().amax(-1, keepdim=True)
    return (values.detach().double() / torch.where(size > 0, size, 1)).round(decimals=5)


def patch_agreement(maps: Tensor, drops: Tensor, *, contributions: Tensor | None = None) -> float:
    r"""Compute how well the maps rank the patches as the drops do, in [-1, 1]; chance is 0.

    It asks: does the x-feature's contribution fall when a place that its map shows is covered? It needs no annotation.
    The module's head says how to read it.

    .. math:: \sum_{nk} t_{nk} \, \rho(\mathrm{drops}_{nk}, \mathrm{map}_{nk}) \Big/ \sum_{nk} t_{nk}

    t is the x-feature's share of the contributions in the example (``contribution_shares``), or 1 without
    contributions. A constant map or constant drops count as 0. The result is NaN if no x-feature contributes in any
    example.

    Maps without signs, such as c-MWP, show the evidence for the x-feature's sign (``Explanation.directed_maps`` directs
    signed maps in the same way). Direct the drops as well: ``drops * contributions.sign()[:, :, None]``.

    Args:
        maps: (N, K, H, W) of images, or (N, K, C, H, W) to sum over channels; (N, K, L) of tokens or columns. Sum maps
            of embeddings (N, K, L, E) with ``maps.sum(3)``.
        drops: (N, K, P), from :func:`patch_drops`.
        contributions: (N, K), in logits; for the mean weighted by share.

    Raises:
        ValueError: If shapes do not fit, there are no maps, or values are not finite.

    Example:
        >>> maps = torch.tensor([[[[4.0, 3.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
        >>> drops = torch.tensor([[[0.5, 0.4, 0.1, -0.2], [0.0, 1.0, 0.0, 0.0]]])
        >>> patch_agreement(maps, drops), patch_agreement(maps, drops, contributions=torch.tensor([[3.0, -1.0]]))
        (0.5, 0.75)

    Reference:
        Hesse et al., "Benchmarking the Attribution Quality of Vision Models", 2024, for whole outputs.
    """
    found = patch_correlations(maps, drops)
    if not found.numel():
        raise ValueError(f"maps are {tuple(maps.shape)}, without any x-feature; pass at least one example")
    return float(found.mean()) if contributions is None else mean_by_share(found, contributions)


def map_identification(maps: Tensor, drops: Tensor) -> float:
    r"""Compute how often a map fits the drops of its own x-feature best, from 0 to 1; chance is 1 / K.

    It asks: can one tell from a map which of the K x-features it belongs to? Random groups of dimensions can hardly
    pass, because each is a small copy of the output. Random directions whose contributions cancel can: what they add
    to one x-feature and take from another has a place, but is no reason.

    .. math:: \frac{1}{NK} \sum_{nk} \bigl[\, r(\mathrm{map}_{nk}, \mathrm{drops}_{nk}) >
              \max_{j \ne k} r(\mathrm{map}_{nk}, \mathrm{drops}_{nj}) \,\bigr]

    r is Pearson's correlation over patches, and not that of ranks: an x-feature with a place of its own has drops near
    0 at all other places, and their order is noise. Every x-feature counts alike. A mean by share of the contributions
    would reward a division that leaves nearly everything to one x-feature. A map that its own drops contradict, a
    constant map and constant drops count as not identified. The result is NaN for a single x-feature.

    Args:
        maps: As in :func:`patch_agreement`.
        drops: As in :func:`patch_agreement`.

    Raises:
        ValueError: If shapes do not fit, there are no maps, or values are not finite.

    Example:
        >>> maps = torch.tensor([[[[4.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 1.0]]]])
        >>> drops = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
        >>> map_identification(maps, drops)  # the second map, too, shows the place of the first x-feature
        0.5

    Reference:
        Not in the paper.
    """
    found = identified_maps(maps, drops)
    if not found.numel():
        raise ValueError(f"maps are {tuple(maps.shape)}, without any x-feature; pass at least one example")
    return float(found.double().mean()) if found.shape[1] > 1 else float("nan")


def identified_maps(maps: Tensor, drops: Tensor) -> Tensor:
    """Find the maps that fit the drops of their own x-feature best, bool (N, K).

    Args:
        maps: As in :func:`patch_agreement`.
        drops: As in :func:`patch_agreement`.

    Raises:
        ValueError: If shapes do not fit, or values are not finite.

    Example:
        >>> identified_maps(torch.eye(2)[None], torch.eye(2)[None].flip(1))
        tensor([[False, False]])
    """
    value, lost = _patch_means(maps, drops), drops.detach().double().to(maps.device)
    if not bool(value.isfinite().all() and lost.isfinite().all()):
        raise ValueError("values are NaN or infinite; check the images that have them")
    fit = _centred_unit(value) @ _centred_unit(lost).transpose(1, 2)  # of each map with each x-feature's drops
    own = fit.diagonal(dim1=1, dim2=2)
    others = fit.masked_fill(torch.eye(fit.shape[1], dtype=torch.bool, device=fit.device), -torch.inf).amax(2)
    return (own > others + _SAME) & (own > _SAME)


def _centred_unit(values: Tensor) -> Tensor:
    """Subtract the mean over patches and divide by the norm; 0 if values differ by rounding alone."""
    centred = values - values.mean(-1, keepdim=True)
    size = centred.norm(dim=-1, keepdim=True)
    varies = size > _SAME * values.norm(dim=-1, keepdim=True)
    return torch.where(varies, centred / torch.where(varies, size, 1), 0)


def mean_by_share(found: Tensor, contributions: Tensor) -> float:
    """Average a number of each x-feature in each example, weighted by its share of the contributions.

    Args:
        found: (N, K).
        contributions: (N, K), in logits.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> mean_by_share(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, -1.0]]))
        0.75
    """
    if contributions.shape != found.shape:
        raise ValueError(
            f"contributions are {tuple(contributions.shape)}, not {tuple(found.shape)} with one for each map; pass "
            "Explanation.contributions of the same examples"
        )
    share = contribution_shares(contributions).to(found.device)
    total = share.sum()
    return float((share * found).sum() / total) if total > 0 else float("nan")


def drop_orthogonality(drops: Tensor, *, contributions: Tensor | None = None) -> Orthogonality:
    """Compute O1 and O2 of the x-features' drops in absolute value; 0 is best, and O2 can be infinite.

    It asks: do the x-features depend on different places of the input? It uses no heatmap method.

    Args:
        drops: (N, K, P), from :func:`patch_drops`.
        contributions: (N, K), in logits; for the weighted form. Dead x-features cannot improve that form.

    Raises:
        ValueError: If shapes do not fit, or values are not finite.

    Example:
        >>> drops = torch.tensor([[[2.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]])
        >>> round(drop_orthogonality(drops).o1, 4)  # both lose by the same patch
        0.5858

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2, for maps.
    """
    if drops.dim() != 3:
        raise ValueError(f"drops are {tuple(drops.shape)}, not (N, K, P); pass the drops from patch_drops")
    return orthogonality(drops.abs()[:, :, None], contributions=contributions)
