r"""Locality: over how many parts, or objects, an x-feature's maps spread.

Conventions:
    N images, K x-features, maps (N, K, H, W) that are not negative. P parts are points (N, P, 2) of x and y in pixels,
    NaN where a part is invisible. Boxes (N, 4) are x0, y0, x1, y1 in pixels. The origin is the corner of the image, so
    the centre of the first pixel is at (0.5, 0.5). A pixel is in a box if its centre is, upper ends excluded.

Method (Algorithm 1):
    Every pixel in the box belongs to the nearest visible part, or to the first of several at the same distance. The
    weight of that pixel for the part is :math:`1 - \bar d`, where the distance is divided by the largest one in this
    image's box. Pixels outside the box belong to the context with weight 1. The map gives probabilities of pixels.
    :math:`S_p = \sum_{ij} P(p | ij) P(ij)` is then the share of an x-feature's map on each part. The locality of an
    x-feature is the entropy of the mean of S over the images, in nats. The exponential of the entropy is about the
    number of parts. Less is more local.

Left open by the paper, and decided here:
    The distance is divided by the largest distance from any pixel of the box to its part, one number for each image.
    Pixels at the far ends of large parts then count least, as the paper intends. Invisible parts have no pixels. If all
    parts are invisible, pixels in the box belong to no part. If two parts share one point, the first gets all its
    pixels. A map of zeros has no share of any part or of the context, and does not count in the mean. Make signed maps
    non-negative first: ``maps.clamp(min=0)`` keeps the evidence for the x-feature.

Weighted by contribution:
    An x-feature that contributes nothing still has maps, and the plain mean counts them. In the weighted form each
    image counts by the x-feature's share of the contributions there. The mean over x-features counts each by its mean
    share (:func:`mean_locality`).

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2 and
    appendix, Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_xnn.metrics._overlap import contribution_shares
from captum_xnn.metrics._shapes import over_channels

__all__ = ["locality", "mean_locality", "object_probabilities", "part_probabilities", "pixel_probabilities"]


def pixel_probabilities(maps: Tensor) -> Tensor:
    """Divide maps by their sums, (N, K, H, W), in single precision or better; a map of zeros stays zeros.

    Args:
        maps: (N, K, H, W), or (N, K, C, H, W) to sum over channels; not negative.

    Raises:
        ValueError: If values or their sums are not finite, or values are negative.

    Example:
        >>> pixel_probabilities(torch.tensor([[[[1.0, 3.0]]]]))
        tensor([[[[0.2500, 0.7500]]]])
    """
    maps = over_channels(maps)
    if maps.dim() != 4:
        raise ValueError(
            f"maps are {tuple(maps.shape)}, not (N, K, H, W) or (N, K, C, H, W); pass the maps of explain for images"
        )
    if not bool((maps >= 0).all()) or bool(maps.isinf().any()):
        raise ValueError(
            f"maps have values from {float(maps.min()):.3g} to {float(maps.max()):.3g}; pass finite ones that are not "
            "negative, as maps.clamp(min=0), which keeps the evidence for each x-feature"
        )
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # a half holds no more than 65,504
    total = maps.sum((2, 3), keepdim=True, dtype=torch.float64).to(maps.dtype)
    if bool(total.isinf().any()):
        raise ValueError(f"the maps have sums beyond the range of {maps.dtype}; divide them by a large number first")
    return maps / torch.where(total > 0, total, 1)


def part_probabilities(maps: Tensor, points: Tensor, boxes: Tensor) -> Tensor:
    """Compute the share of each map on each part and, last, on the context, (N, K, P + 1), in double precision.

    Rows sum to at most 1, because pixels far from their part count for little.

    Args:
        maps: (N, K, H, W) or (N, K, C, H, W), not negative, of any scale.
        points: Places of the parts (N, P, 2), x and y in pixels, NaN where invisible. They may lie outside the box.
        boxes: (N, 4), x0, y0, x1, y1 in pixels.

    Raises:
        ValueError: If shapes do not fit, maps have negative values, or a box is not finite or ends before it begins.

    Example:
        >>> maps = torch.tensor([[[[1.0, 0.0, 0.0, 1.0]]]])  # one row of four pixels
        >>> points = torch.tensor([[[0.5, 0.5], [2.5, 0.5], [torch.nan, torch.nan]]])
        >>> part_probabilities(maps, points, torch.tensor([[0.0, 0.0, 3.0, 1.0]]))
        tensor([[[0.5000, 0.0000, 0.0000, 0.5000]]], dtype=torch.float64)

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, Algorithm 1.
    """
    N, P = len(maps), points.shape[1] if points.dim() == 3 else -1
    if points.shape != (N, P, 2) or boxes.shape != (N, 4):
        raise ValueError(
            f"points are {tuple(points.shape)} and boxes {tuple(boxes.shape)} for {N} images; pass x and y of each "
            f"part ({N}, P, 2), and x0, y0, x1, y1 of each image ({N}, 4)"
        )
    wrong = ~boxes.isfinite().all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"box {boxes[i].tolist()} of image {i} ends before it begins; pass x0, y0, x1, y1. If boxes are x, y, "
            "width, height, add the first two numbers to the last two"
        )
    probabilities = pixel_probabilities(maps)
    found = maps.new_zeros(N, maps.shape[1], P + 1, dtype=torch.float64)
    for image, own, box, into in zip(probabilities, points.to(maps.device), boxes.tolist(), found, strict=True):
        rows, columns = _inside(box[1], box[3], image.shape[1]), _inside(box[0], box[2], image.shape[2])
        inside = image[:, rows, columns]
        mass = inside.sum((1, 2), dtype=torch.float64)
        into[:, P] = (image.sum((1, 2), dtype=torch.float64) - mass).clamp(min=0)
        visible = own.isfinite().all(1).nonzero()[:, 0]
        if len(visible) and inside.numel():
            nearest, weight = _parts(own[visible].float(), rows, columns)
            belongs = torch.zeros(weight.numel(), len(visible), device=maps.device)
            belongs.scatter_(1, nearest.reshape(-1, 1), weight.reshape(-1, 1))
            into[:, visible] = (inside.flatten(1).float() @ belongs).double()
    return found


def _inside(low: float, high: float, size: int) -> slice:
    """Select the pixels whose centres lie from one coordinate up to another."""
    first, last = (min(max(-int(-(edge - 0.5) // 1), 0), size) for edge in (low, high))
    return slice(first, max(first, last))


def _parts(points: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """Assign every pixel of a box to its nearest part, and compute its weight, both (h, w)."""
    y, x = (torch.arange(s.start, s.stop, device=points.device) + 0.5 for s in (rows, columns))
    square = (y - points[:, 1:]) ** 2
    squared, nearest = (square[:, :, None] + ((x - points[:, :1]) ** 2)[:, None]).min(0)
    distance = squared.sqrt_()
    return nearest, 1 - distance / distance.max().clamp_min(torch.finfo(distance.dtype).tiny)


def object_probabilities(maps: Tensor, masks: Tensor, *, objects: int | None = None) -> Tensor:
    r"""Compute the share of each map on each object, :math:`S_o = \sum_{ij \in o} P(ij)`, (N, K, O), double precision.

    Args:
        maps: (N, K, H, W), or (N, K, C, H, W) to sum over channels; not negative.
        masks: The object of each pixel, integers (N, H, W) from 1 to O, 0 for no object. If objects overlap, boolean
            (N, O, H, W).
        objects: The number of objects O. Needed if masks are integers and their largest value is below O.

    Raises:
        ValueError: If shapes do not fit, maps have negative values, or a mask has an index above ``objects``.

    Example:
        >>> maps, masks = torch.tensor([[[[1.0, 2.0, 1.0]]]]), torch.tensor([[[0, 2, 2]]])
        >>> object_probabilities(maps, masks)
        tensor([[[0.0000, 0.7500]]], dtype=torch.float64)

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2 (Places).
    """
    size = (len(maps), *maps.shape[2:])
    if (
        (*masks.shape[:1], *masks.shape[-2:]) != size
        or masks.dim() != (4 if masks.dtype == torch.bool else 3)
        or (masks.is_floating_point())
    ):
        raise ValueError(
            f"masks are {masks.dtype} {tuple(masks.shape)}; pass integers {size} or booleans ({size[0]}, O, {size[1]}, "
            f"{size[2]}), resized to the maps without interpolation"
        )
    p = pixel_probabilities(maps).double().flatten(2)
    if masks.dtype == torch.bool:
        return p @ masks.flatten(2).double().transpose(1, 2)
    highest = int(masks.max()) if masks.numel() else 0
    O = highest if objects is None else objects  # noqa: E741
    if highest > O or bool((masks < 0).any()):
        raise ValueError(f"masks hold objects from {int(masks.min())} to {highest}, and objects is {O}; raise objects=")
    found = p.new_zeros(*p.shape[:2], O + 1)
    return found.scatter_add_(2, masks.flatten(1)[:, None].expand_as(p).long(), p)[..., 1:]


def locality(probabilities: Tensor, *, contributions: Tensor | None = None) -> Tensor:
    r"""Compute the entropy of each x-feature's mean probabilities of parts, (K,), in nats.

    An x-feature with no share of any part or object in any image gets NaN, for instance if all its maps are zeros.

    .. math:: H = -\sum_p h_p \log h_p, \quad h_p = \bar S_p / \sum_p \bar S_p, \quad
              \bar S_p = \sum_m w_m S^m_p / \sum_m w_m

    Args:
        probabilities: (N, K, P), from :func:`part_probabilities` or :func:`object_probabilities`.
        contributions: (N, K), in logits. They weight each image by the x-feature's share of the contributions. Without
            them all images count equally.

    Raises:
        ValueError: If shapes do not fit, or values are not finite.

    Example:
        >>> locality(torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.0, 0.0]]]))
        tensor([0.0000, 0.6931], dtype=torch.float64)

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2, :math:`H_n`.
    """
    S = probabilities.double()
    if S.dim() != 3 or not bool(S.isfinite().all()):
        raise ValueError(
            f"probabilities are {tuple(S.shape)}, finite: {bool(S.isfinite().all())}; pass finite ones (N, K, P), the "
            "result of part_probabilities or object_probabilities"
        )
    if contributions is not None:
        if contributions.shape != S.shape[:2]:
            raise ValueError(
                f"contributions are {tuple(contributions.shape)} and probabilities {tuple(S.shape)}; pass "
                "Explanation.contributions (N, K) of the same images"
            )
        S = S * contribution_shares(contributions).to(S.device)[:, :, None]
    total = S.sum(0)
    h = total / total.sum(1, keepdim=True)
    entropy: Tensor = torch.special.entr(h).sum(1)
    return torch.where(total.sum(1) > 0, entropy, torch.nan)


def mean_locality(probabilities: Tensor, *, contributions: Tensor | None = None) -> float:
    """Compute the mean locality of the x-features, in nats: plain, or weighted by their mean shares of contributions.

    An x-feature without a locality, such as one whose maps are all zeros, does not count.

    Args:
        probabilities: (N, K, P).
        contributions: (N, K), in logits; for the weighted form.

    Example:
        >>> probabilities = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
        >>> plain = mean_locality(probabilities)
        >>> weighted = mean_locality(probabilities, contributions=torch.tensor([[9.0, -1.0]]))
        >>> round(plain, 4), round(weighted, 4)
        (0.3466, 0.0693)
    """
    H = locality(probabilities, contributions=contributions)
    weight = torch.ones_like(H) if contributions is None else contribution_shares(contributions).to(H).mean(0)
    counts = ~H.isnan() & (weight > 0)
    return float((H[counts] * weight[counts]).sum() / weight[counts].sum()) if bool(counts.any()) else float("nan")
