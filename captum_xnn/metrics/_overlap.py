r"""Orthogonality: do the maps of different x-features fall on different regions (O1 and O2)?

Conventions:
    N images, K x-features, maps (N, K, H, W). All sums are in double precision. Maps of tokens, input features or
    volumes are treated alike: a place takes the part of a pixel.

    The K maps of an image are vectors of H W pixels. C is the sum over images of their covariances over the pixels,
    :math:`C_{ij} = \sum_m \sum_{xy} (a^m_{ixy} - \bar a^m_i)(a^m_{jxy} - \bar a^m_j)`. P holds the correlations
    computed from C. Images with stronger maps count more. Scaling an x-feature's maps by one number in all images
    changes nothing.

Metrics:
    ``O1``: :math:`\lVert P \rVert_F - \sqrt K`, from 0 to :math:`K - \sqrt K`.
    ``O2``: :math:`-\log\det P`, from 0; infinite where a map is a linear combination of others.

Weighted by contribution:
    A dead x-feature still has a map. The map is constant and overlaps with no other, so it improves O1 and O2. In the
    weighted form x-feature i counts by :math:`t_i = w_i / \max_j w_j`, where w is its mean share of the contributions.
    Its correlations are multiplied by :math:`\sqrt{t_i t_j}`, and :math:`\sum_i t_i` replaces K. Equal shares give
    the plain form, and a share of 0 leaves an x-feature out. A single x-feature that contributes everything is
    perfectly orthogonal, so read the metric beside the effective number
    (:func:`captum_xnn.metrics.effective_number`).

Left open by the paper, and decided here:
    The paper does not say how to aggregate C over the data set. Here covariances are taken within each image, so
    images with strong maps do not correlate the maps of all x-features. A map without variance in any image
    correlates with no other. A constant map's rounding errors do not count as variance.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_xnn.metrics._shapes import over_channels

__all__ = ["Orthogonality", "OrthogonalityStream", "contribution_shares", "orthogonality"]


class Orthogonality(NamedTuple):
    """The metrics O1 and O2; 0 is best."""

    o1: float
    """Frobenius norm of the correlations, minus that of the unit matrix."""
    o2: float
    """Minus the logarithm of the correlations' determinant."""


def orthogonality(maps: Tensor, *, contributions: Tensor | None = None) -> Orthogonality:
    """Compute O1 and O2 of the maps of some images.

    Args:
        maps: Maps as ``explain`` gives them, of any scale and sign: (N, K, C, H, W) of images, which are summed over
            channels, (N, K, H, W), or (N, K, ...) of tokens, input features or volumes.
        contributions: (N, K), in logits; for the weighted form.

    Raises:
        ValueError: If shapes do not fit, values are not finite, or there are no images.

    Example:
        >>> maps = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]])
        >>> o1, o2 = orthogonality(maps)
        >>> round(o1, 4), round(o2, 4)  # each map is 0 in three of four pixels, so they correlate by -1/3
        (0.0765, 0.1178)

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2.
    """
    stream = OrthogonalityStream()
    stream.update(maps, contributions=contributions)
    return stream.compute()


class OrthogonalityStream:
    """Compute O1 and O2 of maps batch by batch; memory holds K x K numbers.

    Example:
        >>> maps, stream = torch.rand(6, 3, 8, 8), OrthogonalityStream()
        >>> for batch in maps.split(4):
        ...     stream.update(batch)
        >>> bool(abs(stream.compute().o2 - orthogonality(maps).o2) < 1e-9)
        True
    """

    def __init__(self) -> None:
        self.covariance: Tensor | None = None
        """(K, K), summed over the images seen."""
        self.shares: Tensor | None = None
        """Shares of the contributions (K,), summed over the images seen; None without contributions."""
        self.images = 0

    def update(self, maps: Tensor, *, contributions: Tensor | None = None) -> None:
        """Add a batch of images.

        Args:
            maps: (N, K, ...), as :func:`orthogonality` takes them.
            contributions: (N, K). Pass them with every batch or never.

        Raises:
            ValueError: If shapes do not fit each other or earlier ones, or values are not finite.
        """
        known = None if self.covariance is None else len(self.covariance)
        maps = over_channels(maps)
        if maps.dim() < 3 or known not in (None, maps.shape[1]):
            raise ValueError(
                f"maps are {tuple(maps.shape)}, not (N, {'K' if known is None else known}, ...); pass the maps of "
                "explain, with a dimension of x-features after that of examples"
            )
        if self.images and (self.shares is None) != (contributions is None):
            raise ValueError("some batches came with contributions and some without; pass them always, or never")
        if not all(bool(image.isfinite().all()) for image in maps):  # one at a time, for the memory
            raise ValueError("maps are NaN or infinite; check the images that have them")
        if contributions is not None:
            if contributions.shape != maps.shape[:2]:
                raise ValueError(
                    f"contributions are {tuple(contributions.shape)}, not {tuple(maps.shape[:2])} with one for each "
                    "map; pass Explanation.contributions of the same images"
                )
            total = contribution_shares(contributions).sum(0)
            self.shares = total if self.shares is None else self.shares + total
        rounding = 4 * torch.finfo(maps.dtype).eps if maps.is_floating_point() else 0.0
        for image in maps.detach():  # one at a time, because double precision takes twice the memory
            flat = image.double().flatten(1)
            centred = flat - flat.mean(1, keepdim=True)
            varies = centred.norm(dim=1) > rounding * flat.norm(dim=1)
            centred = torch.where(varies[:, None], centred, 0)
            own = centred @ centred.T
            self.covariance = own if self.covariance is None else self.covariance + own
        self.images += len(maps)

    def correlations(self) -> Tensor:
        """Compute P, (K, K); a map without variance gets a row of the unit matrix."""
        if self.covariance is None:
            raise ValueError("there are no maps yet: orthogonality needs at least one image; call update() first")
        deviation = self.covariance.diagonal().sqrt()
        varies = deviation > 0
        P = self.covariance / torch.where(varies, deviation, 1).outer(torch.where(varies, deviation, 1))
        P = P.clamp(-1, 1)
        P.fill_diagonal_(1)
        return P

    def compute(self) -> Orthogonality:
        """Compute both metrics over all images so far, weighted if they came with contributions.

        Raises:
            ValueError: If there are no images yet.
        """
        P = self.correlations()
        count = torch.ones(len(P), dtype=P.dtype, device=P.device)
        if self.shares is not None:
            largest = self.shares.max()
            count = self.shares.to(P) / largest if largest > 0 else torch.zeros_like(count)
        off = P * count.sqrt().outer(count.sqrt())
        off.fill_diagonal_(0)
        K = count.sum()
        weighted = off + torch.eye(len(P), dtype=P.dtype, device=P.device)
        smallest = float(torch.linalg.eigvalsh(weighted)[0])
        singular = smallest <= len(P) * torch.finfo(P.dtype).eps * 8
        o2 = float("inf") if singular else -float(torch.linalg.slogdet(weighted).logabsdet)
        return Orthogonality(float((K + (off**2).sum()).sqrt() - K.sqrt()), max(0.0, o2))


def contribution_shares(contributions: Tensor) -> Tensor:
    r"""Compute :math:`|v_i E_i| / \sum_j |v_j E_j|` for each image, (N, K), in double precision; 0 where all are 0.

    Args:
        contributions: (N, K), in logits.

    Raises:
        ValueError: If contributions are not finite.

    Example:
        >>> contribution_shares(torch.tensor([[3.0, -1.0], [0.0, 0.0]]))
        tensor([[0.7500, 0.2500],
                [0.0000, 0.0000]], dtype=torch.float64)
    """
    size = contributions.detach().double().abs()
    if not bool(size.isfinite().all()):
        raise ValueError("contributions are NaN or infinite; check whether the explainer's fit diverged")
    total = size.sum(1, keepdim=True)
    return size / torch.where(total > 0, total, 1)
