r"""Orthogonality: whether the maps of different x-features fall on different regions (O1 and O2).

Conventions:
    N images, K x-features, maps (N, K, H, W). All sums are in double precision.

    The K maps of an image are vectors of H W pixels. C is the sum over images of their covariances over the pixels,
    :math:`C_{ij} = \sum_m \sum_{xy} (a^m_{ixy} - \bar a^m_i)(a^m_{jxy} - \bar a^m_j)`, and P the correlations that
    it gives. Maps count as strongly as they are: scaling an x-feature's maps in all images changes nothing.

Metrics:
    ``O1``: :math:`\lVert P \rVert_F - \sqrt K`, from 0 to :math:`K - \sqrt K`.
    ``O2``: :math:`-\log\det P`, from 0; infinite where a map is a linear combination of others.

Weighted by contribution:
    A dead x-feature still has a map, which is constant and overlaps with nothing: it makes O1 and O2 better. In the
    weighted form x-feature i counts by :math:`t_i = w_i / \max_j w_j`, with its mean share w of the contributions:
    its correlations are multiplied by :math:`\sqrt{t_i t_j}`, and K is replaced by :math:`\sum_i t_i`. With equal
    shares that is the plain form, and a share of 0 leaves an x-feature out. One x-feature that does everything is
    perfectly orthogonal, so read it beside the effective number
    (:func:`captum_xnn.metrics.sparsity.effective_number`).

What the paper leaves open:
    How C is aggregated over the data set: here within images, so that images with strong maps do not correlate the
    maps of all x-features. A map of no variance in any image is correlated with none; what is left of a constant
    map by rounding is no variance.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Orthogonality", "OrthogonalityStream", "contribution_shares", "orthogonality"]


class Orthogonality(NamedTuple):
    """Both metrics; 0 is best."""

    o1: float
    """Frobenius norm of the correlations, less that of the unit matrix."""
    o2: float
    """Minus the logarithm of the correlations' determinant."""


def orthogonality(maps: Tensor, *, contributions: Tensor | None = None) -> Orthogonality:
    """Returns O1 and O2 of the maps of some images.

    Args:
        maps: (N, K, H, W), of any scale and sign.
        contributions: (N, K), in logits; for the weighted form.

    Raises:
        ValueError: If shapes do not fit, values are not finite, or there are no images.

    Example:
        >>> maps = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]])
        >>> o1, o2 = orthogonality(maps)
        >>> round(o1, 4), round(o2, 4)  # both maps are 0 elsewhere, which correlates them by -1/3
        (0.0765, 0.1178)

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2.
    """
    stream = OrthogonalityStream()
    stream.update(maps, contributions=contributions)
    return stream.compute()


class OrthogonalityStream:
    """O1 and O2 of maps that come batch by batch, in memory of K x K numbers.

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
        """Adds images.

        Args:
            maps: (N, K, H, W).
            contributions: (N, K), in all batches or in none.

        Raises:
            ValueError: If shapes do not fit each other or earlier ones, or values are not finite.
        """
        known = None if self.covariance is None else len(self.covariance)
        if maps.dim() != 4 or known not in (None, maps.shape[1]):
            raise ValueError(
                f"expected maps (N, {'K' if known is None else known}, H, W), got {tuple(maps.shape)}; sum over the "
                "channels of maps (N, K, C, H, W) first"
            )
        if self.images and (self.shares is None) != (contributions is None):
            raise ValueError("expected contributions with every batch or with none; pass them always, or never")
        if not all(bool(image.isfinite().all()) for image in maps):  # one at a time, for the memory
            raise ValueError("expected finite maps, got NaN or infinite values; look at the images that have them")
        if contributions is not None:
            if contributions.shape != maps.shape[:2]:
                raise ValueError(
                    f"expected contributions {tuple(maps.shape[:2])}, one for each map, got "
                    f"{tuple(contributions.shape)}; pass those of Explanation.contributions"
                )
            total = contribution_shares(contributions).sum(0)
            self.shares = total if self.shares is None else self.shares + total
        rounding = 4 * torch.finfo(maps.dtype).eps if maps.is_floating_point() else 0.0
        for image in maps.detach():  # one at a time, as double precision takes twice the room
            flat = image.double().flatten(1)
            centred = flat - flat.mean(1, keepdim=True)
            varies = centred.norm(dim=1) > rounding * flat.norm(dim=1)
            centred = torch.where(varies[:, None], centred, 0)
            own = centred @ centred.T
            self.covariance = own if self.covariance is None else self.covariance + own
        self.images += len(maps)

    def correlations(self) -> Tensor:
        """Returns P, (K, K); of a map without variance, a row of the unit matrix."""
        if self.covariance is None:
            raise ValueError("expected maps of at least one image, got none; call update first")
        deviation = self.covariance.diagonal().sqrt()
        varies = deviation > 0
        P = self.covariance / torch.where(varies, deviation, 1).outer(torch.where(varies, deviation, 1))
        P = P.clamp(-1, 1)
        P.fill_diagonal_(1)
        return P

    def compute(self) -> Orthogonality:
        """Returns both metrics of all images seen, weighted if they came with contributions.

        Raises:
            ValueError: If none were seen.
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
    r"""Returns :math:`|v_i E_i| / \sum_j |v_j E_j|` for each image, (N, K), in double precision; 0 where all are 0.

    Args:
        contributions: (N, K), in logits.

    Raises:
        ValueError: If they are not finite.

    Example:
        >>> contribution_shares(torch.tensor([[3.0, -1.0], [0.0, 0.0]]))
        tensor([[0.7500, 0.2500],
                [0.0000, 0.0000]], dtype=torch.float64)
    """
    size = contributions.detach().double().abs()
    if not bool(size.isfinite().all()):
        raise ValueError(
            "expected finite contributions, got NaN or infinite values; look whether the explainer's fit diverged"
        )
    total = size.sum(1, keepdim=True)
    return size / torch.where(total > 0, total, 1)
