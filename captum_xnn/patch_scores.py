"""Measure on covered patches how distinct x-features are and how true their maps are, beside controls.

Conventions:
    N images, K x-features. Patches and measures are defined in :mod:`captum_xnn.metrics._patches`, and weighted by
    share of the contributions.

Controls:
    *Random groups* are K groups of the layer's dimensions, drawn by chance. They add up to the output as exactly as
    the default form does, and the same backend draws their maps. *Random maps* are smooth noise. *One heatmap* is the
    single map of the output, compared with the drops of the output.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from captum_xnn.layers._lookup import unwrap
from captum_xnn.layers._pixels import channels_first, image_channels
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Target, select
from captum_xnn.metrics._controls import random_maps, random_partition
from captum_xnn.metrics._overlap import Orthogonality
from captum_xnn.metrics._patches import drop_orthogonality, patch_agreement, patch_drops
from captum_xnn.models._contribution_groups import ContributionGroups

if TYPE_CHECKING:  # XNNAttribution.report calls the report, which calls this module
    from captum_xnn.attribution import XNNAttribution
    from captum_xnn.explainer import Explainer

__all__ = ["patch_scores"]

# Draws of each control; scores are means over the draws.
_DRAWS = 3


class PatchScores(NamedTuple):
    """Measures on covered patches, and their controls."""

    images: int
    """Images N that were covered."""
    agreement: float
    """Patch agreement of the x-features' maps, in [-1, 1]."""
    agreement_random_groups: float | None
    """Patch agreement of the maps of random groups; None where the layer's contributions cannot be computed."""
    agreement_random_maps: float
    """Patch agreement of noise in place of the x-features' maps. About 0."""
    agreement_one_heatmap: float
    """Patch agreement of the single map of the output with the drops of the output."""
    drops: Orthogonality
    """O1 and O2 of the x-features' drops; 0 is best."""
    drops_random_groups: Orthogonality | None
    """O1 and O2 of the drops of random groups; None as above."""


def patch_scores(
    xnn: XNNAttribution,
    images: Tensor,
    target: Target = None,
    *,
    grid: int = 4,
    seed: int = 0,
    internal_batch_size: int = 64,
) -> PatchScores:
    """Cover the patches of every image one by one, and measure x-features and maps beside their controls.

    Args:
        xnn: An attribution fitted to the target.
        images: (N, C, H, W), or channels last, on the model's device; images to which the model gives the class.
        target: None, int, or tuple of ints.
        grid: Patches along each side.
        seed: Seed of the controls.
        internal_batch_size: Images, and maps, in a batch.

    Raises:
        NotFittedError: If the target was not fitted.
        ValueError: If inputs are not images, or a side has fewer pixels than patches.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from torch import nn
        >>> from captum_xnn import XNNAttribution
        >>> model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 2))
        >>> data = torch.randn(80, 1, 8, 8)
        >>> xnn = XNNAttribution(model, "1", 2).fit(data, target=0, progress=False)
        >>> found = patch_scores(xnn, data[:4], target=0)
        >>> found.images, -1 <= found.agreement <= 1, found.drops_random_groups is None
        (4, True, False)
    """
    score = _Scorer(xnn, images, target, grid, internal_batch_size)
    own, drawn = score.beside_random(seed)
    one = channels_first(xnn.one_heatmap(images, target, internal_batch_size=internal_batch_size), images).sum(2)
    noise = [
        patch_agreement(random_maps(own.maps, seed=seed + i), own.drops, contributions=own.contributions)
        for i in range(_DRAWS)
    ]
    by_chance = [r.orthogonality() for r in drawn]
    return PatchScores(
        images=len(images),
        agreement=own.agreement(),
        agreement_random_groups=fmean(r.agreement() for r in drawn) if drawn else None,
        agreement_random_maps=fmean(noise),
        agreement_one_heatmap=patch_agreement(one, own.whole),
        drops=own.orthogonality(),
        drops_random_groups=Orthogonality(*map(fmean, zip(*by_chance, strict=True))) if by_chance else None,
    )


class _Scored(NamedTuple):
    """Contributions, maps and drops of one set of x-features on the images."""

    contributions: Tensor
    """(N, K)."""
    maps: Tensor
    """Maps (N, K, H, W), positive where the image drives the x-feature to its value."""
    drops: Tensor
    """Drops of the contributions, (N, K, P), times the sign of the contribution."""
    whole: Tensor
    """Drops of the output, (N, 1, P)."""

    def columns(self, first: int, after: int) -> _Scored:
        """Select the x-features from ``first`` to before ``after``."""
        some = slice(first, after)
        return _Scored(self.contributions[:, some], self.maps[:, some], self.drops[:, some], self.whole)

    def agreement(self) -> float:
        return patch_agreement(self.maps, self.drops, contributions=self.contributions)

    def orthogonality(self) -> Orthogonality:
        return drop_orthogonality(self.drops, contributions=self.contributions)


class _Scorer(NamedTuple):
    """Scores x-features, and random groups in their place, on the same images."""

    xnn: XNNAttribution
    images: Tensor
    target: Target
    grid: int
    batch_size: int

    def of(self, xnn: XNNAttribution) -> _Scored:
        """Compute contributions, maps and drops of the x-features of one explainer."""
        why = xnn.explain(self.images, self.target, internal_batch_size=self.batch_size)
        numbers, images = self._numbers(xnn), self.images
        if images.dim() == 4 and (last := self._channels()) != 1:
            first = numbers
            images, numbers = images.movedim(last, 1), lambda x: first(x.movedim(1, last).contiguous())
        drops = patch_drops(numbers, images, grid=self.grid, batch_size=self.batch_size)
        side = torch.where(why.contributions < 0, -1, 1).to(drops)
        maps = channels_first(why.directed_maps(), self.images).sum(2)
        return _Scored(why.contributions, maps, drops[:, :-1] * side[:, :, None], drops[:, -1:])

    def _channels(self) -> int:
        """Find the dimension of the images that holds channels."""
        return image_channels(unwrap(self.xnn.model), (self.images,))

    def beside_random(self, seed: int) -> tuple[_Scored, list[_Scored]]:
        """Score the x-features and each draw of random groups; no draws where contributions cannot be computed."""
        explainer = self.xnn.explainer(self.target)
        form = explainer.form
        if isinstance(form, ContributionGroups):  # x-features and random groups sum the same contributions
            K = form.n_features
            every = self._drawn(explainer, form, [form.groups], K, seed)
            return every.columns(0, K), _draws(every, K)
        own = self.of(self.xnn)
        K = own.contributions.shape[1]
        try:
            every = self._drawn(explainer, _groups(self.xnn, self.images, explainer), [], K, seed)
        except ValueError:
            return own, []
        return own, _draws(every, 0)

    def _drawn(self, explainer: Explainer, form: ContributionGroups, first: list[Tensor], K: int, seed: int) -> _Scored:
        """Score the groups ``first``, followed by all draws of random groups, in one pass."""
        D = len(form.groups)
        some = [random_partition(D, min(K, D), torch.Generator().manual_seed(seed + i)) for i in range(_DRAWS)]
        joined = copy.deepcopy(form)
        joined.groups = torch.cat([*first, *(a.to(form.groups) for a in some)], 1)
        joined.config["n_features"] = joined.groups.shape[1]
        other = copy.copy(self.xnn)
        other.explainers_ = {(explainer.layer, explainer.targets): replace(explainer, form=joined)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a random group may well have an empty map
            return self.of(other)

    def _numbers(self, xnn: XNNAttribution) -> Callable[[Tensor], Tensor]:
        """Make a function that computes contributions and output of a batch, (n, K + 1)."""

        def numbers(x: Tensor) -> Tensor:
            made = xnn.contributions(x, self.target)
            return torch.cat([made.contributions, made.prediction[:, None]], 1)

        return numbers


def _draws(every: _Scored, first: int) -> list[_Scored]:
    """Split the columns from ``first`` on into the draws of random groups."""
    size = (every.contributions.shape[1] - first) // _DRAWS
    return [every.columns(first + i * size, first + (i + 1) * size) for i in range(_DRAWS)]


def _groups(xnn: XNNAttribution, images: Tensor, explainer: Explainer) -> ContributionGroups:
    """Make a form of groups to compare with a learned form; its base is the mean activation of the images."""
    reader = Reader.of(xnn.model, xnn.layer, xnn.output_transform, xnn.prediction_transform)
    with untouched(reader.model), torch.no_grad():
        Z, y_hat = reader.run((images,))
    shape, channels = tuple(Z.shape[1:]), reader.channels((images,))
    form = ContributionGroups(shape, n_outputs=len(explainer.targets), channels=channels).to(Z)
    form.base = form.mean_of([Z], len(Z)).to(Z)
    form.scale = torch.stack([select(y_hat, t) for t in explainer.targets]).std(1, correction=0).to(Z)
    return form
