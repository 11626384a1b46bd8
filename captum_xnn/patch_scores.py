"""Measure on covered patches how distinct x-features are and how true their maps are, beside controls.

A patch is a square of an image, a token of a text, or a column of a table.

Conventions:
    N examples, K x-features. Patches and measures are defined in :mod:`captum_xnn.metrics._patches`, and weighted by
    share of the contributions.

Controls:
    *Random groups* are K groups of the layer's dimensions, drawn by chance. They add up to the output as exactly as
    the default form does, and the same backend draws their maps. *Random maps* are noise, smooth on images. *One
    heatmap* is the single map of the output, compared with the drops of the output.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._embeddings import covered_token, lengths_of
from captum_xnn.layers._forward_args import format_forward_args
from captum_xnn.layers._layout import channel_dimension
from captum_xnn.layers._lookup import unwrap
from captum_xnn.layers._pixels import channels_first, image_channels
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Target, select
from captum_xnn.metrics._controls import random_maps, random_partition
from captum_xnn.metrics._overlap import Orthogonality
from captum_xnn.metrics._patches import (
    drop_orthogonality,
    drops_of_patches,
    elements_of_patches,
    identified_maps,
    mean_by_share,
    patch_correlations,
    patch_cover,
)
from captum_xnn.models._contribution_groups import ContributionGroups

if TYPE_CHECKING:  # XNNAttribution.report calls the report, which calls this module
    from captum_xnn.attribution import XNNAttribution
    from captum_xnn.explainer import Explainer

__all__ = ["patch_scores"]

# Draws of each control; scores are means over the draws.
_DRAWS = 3


class PatchScores(NamedTuple):
    """Measures on covered patches, and their controls."""

    examples: int
    """Examples N that were covered."""
    agreement: float
    """Patch agreement of the x-features' maps, in [-1, 1]."""
    agreement_random_groups: float | None
    """Patch agreement of the maps of random groups; None where the layer's contributions cannot be computed."""
    agreement_random_maps: float
    """Patch agreement of noise in place of the x-features' maps. About 0."""
    agreement_one_heatmap: float
    """Patch agreement of the single map of the output with the drops of the output."""
    identified: float
    """Share of maps that fit the drops of their own x-feature best, from 0 to 1; NaN for a single x-feature."""
    identified_random_groups: float | None
    """The same of random groups, as many as there are x-features; None as above. About 1 / K at least."""
    movement: float
    """Size of the x-features' drops in multiples of the size of their sum, at least 1. More than 1 is cancelling, and
    x-features that cancel are easily told apart: read it beside ``identified``."""
    drops: Orthogonality
    """O1 and O2 of the x-features' drops; 0 is best."""
    drops_random_groups: Orthogonality | None
    """O1 and O2 of the drops of random groups; None as above."""


class CoveredBatch(NamedTuple):
    """Examples of one shape to cover."""

    inputs: tuple[Tensor, ...]
    """Inputs of the model; the first is covered: images (N, C, H, W) or (N, H, W, C), or tokens or rows (N, L, ...)."""
    additional: tuple[Any, ...] | None = None
    """Further arguments of the model."""
    lengths: Sequence[int] | None = None
    """Number of tokens in each text; padding after them is not covered. None leaves out ids of the embedding's
    ``padding_idx`` at the end."""

    @property
    def first(self) -> Tensor:
        """The input that is covered."""
        return self.inputs[0]


def patch_scores(
    xnn: XNNAttribution,
    inputs: Tensor | tuple[Tensor, ...],
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    against: Target = None,
    grid: int = 4,
    fill: Tensor | float | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    internal_batch_size: int = 64,
) -> PatchScores:
    """Cover the patches of every example one by one, and measure x-features and maps beside their controls.

    A patch takes away little, so the tolerance of the path integral, 0.01 standard deviations of the output, shows in
    the scores. On six fits to a small network of drawn images, with 10 images each, the drops have a relative error of
    0.03 to 0.13. Compared with a tolerance of 1e-5, patch agreement and identified maps differ by up to 0.04, and O1 of
    drops by up to 0.02. The agreement of a single x-feature also differs from that of the 1-Heatmap, its equal where
    :class:`~captum_xnn.heatmaps.GradientMaps` draws both.

    A finer integral costs too much to be the default. With a tolerance of 0.003, patch scores take 1.1 to 2.9 times as
    long on that network, and 2.3 times in the middle of a ResNet-18; with 0.001, 1.2 to 7.9 times and 6 times. At the
    last block of a ResNet-18 they take no longer. To compare small differences, fit with
    ``autoencoder=partial(ContributionGroups, tolerance=1e-4)``; patch scores then take up to 15 times as long.

    Args:
        xnn: An attribution fitted to the target.
        inputs: Images (N, C, H, W), or channels last; or texts or rows of a table (N, L, ...). On the model's device.
            Pass examples to which the model gives the class. Of a tuple, the first tensor is covered. The patches of a
            signal (N, C, L) are its C channels.
        target: None, int, or tuple of ints.
        additional_forward_args: Further positional arguments of the model.
        against: The output to subtract, as ``explain`` takes it. Contributions, maps and drops are then of the
            difference: why the target rather than this output.
        grid: Patches along each side of an image.
        fill: Values of a covered patch. By default the mean colour of each image, the mean of each column over the
            examples, or, for ids of tokens, the mean embedding. Pass the id of padding or of unknown words to put that
            in a token's place.
        lengths: Number of tokens in each text; padding after them is not covered. By default, padding is what has the
            id ``padding_idx`` of the embedding at the end of a text.
        seed: Seed of the controls.
        internal_batch_size: Examples, and maps, in a batch.

    Raises:
        NotFittedError: If the target was not fitted.
        ValueError: If a side of an image has fewer pixels than patches, if inputs have a single patch or are volumes
            (N, C, D, H, W), or if ids come without a fill and go into no ``nn.Embedding``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from torch import nn
        >>> from captum_xnn import XNNAttribution
        >>> model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 2))
        >>> data = torch.randn(80, 1, 8, 8)
        >>> xnn = XNNAttribution(model, "1", 2).fit(data, target=0, progress=False)
        >>> found = patch_scores(xnn, data[:4], target=0)
        >>> found.examples, -1 <= found.agreement <= 1, found.drops_random_groups is None
        (4, True, False)
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    batch = CoveredBatch(given, format_forward_args(additional_forward_args), lengths)
    return patch_scores_of(
        xnn, [batch], target, against=against, grid=grid, fill=fill, seed=seed, internal_batch_size=internal_batch_size
    )


def patch_scores_of(
    xnn: XNNAttribution,
    batches: Sequence[CoveredBatch],
    target: Target = None,
    *,
    against: Target = None,
    grid: int = 4,
    fill: Tensor | float | None = None,
    seed: int = 0,
    controls: bool = True,
    contributions: ContributionGroups | None = None,
    internal_batch_size: int = 64,
) -> PatchScores:
    """Compute :func:`patch_scores` over batches of examples, such as texts of several lengths.

    Args:
        xnn: As in :func:`patch_scores`.
        batches: At least one batch.
        target: As in :func:`patch_scores`.
        against: As in :func:`patch_scores`.
        grid: As in :func:`patch_scores`.
        fill: As in :func:`patch_scores`.
        seed: As in :func:`patch_scores`.
        controls: Whether to draw random groups and the 1-Heatmap. Without them, their fields are None and NaN.
        contributions: Form with the base of random groups' contributions. None takes that of the explainer, or, beside
            a learned network, the mean activation of the first batch.
        internal_batch_size: As in :func:`patch_scores`.
    """
    scorer = _Scorer(xnn, batches, target, against, grid, _filled(fill, batches), internal_batch_size)
    own, drawn = scorer.score_beside_random_groups(seed, contributions) if controls else (scorer.score(xnn), [])
    noise = [own.agreement_of(random_maps(own.maps, seed=seed + i)) for i in range(_DRAWS)]
    by_chance = [r.orthogonality() for r in drawn]
    return PatchScores(
        examples=len(own.contributions),
        agreement=own.agreement(),
        agreement_random_groups=fmean(r.agreement() for r in drawn) if drawn else None,
        agreement_random_maps=fmean(noise),
        agreement_one_heatmap=own.whole_output().agreement_of(scorer.one_heatmaps()) if controls else float("nan"),
        identified=own.identified(),
        identified_random_groups=fmean(r.identified() for r in drawn) if drawn else None,
        movement=own.movement(),
        drops=own.orthogonality(),
        drops_random_groups=Orthogonality(*map(fmean, zip(*by_chance, strict=True))) if by_chance else None,
    )


def one_heatmap_agreement(
    xnn: XNNAttribution,
    batches: Sequence[CoveredBatch],
    target: Target = None,
    *,
    grid: int = 4,
    fill: Tensor | float | None = None,
    internal_batch_size: int = 64,
) -> float:
    """Compute the patch agreement of the 1-Heatmap, the single map of the output. No fit is needed.

    Args:
        xnn: As in :func:`patch_scores`; it may be unfitted.
        batches: At least one batch.
        target: As in :func:`patch_scores`.
        grid: As in :func:`patch_scores`.
        fill: As in :func:`patch_scores`.
        internal_batch_size: As in :func:`patch_scores`.
    """
    scorer = _Scorer(xnn, batches, target, None, grid, _filled(fill, batches), internal_batch_size)
    return scorer.score_output().agreement_of(scorer.one_heatmaps())


def _filled(fill: Tensor | float | None, batches: Sequence[CoveredBatch]) -> Tensor | float | None:
    """Return the mean of each column over all batches of a table that comes without a fill; else the fill."""
    rows = [batch.first for batch in batches]
    if fill is not None or not all(x.dim() == 2 and x.is_floating_point() for x in rows):
        return fill
    return patch_cover(torch.cat(rows), None)[0]


class _Scored(NamedTuple):
    """Contributions, maps and drops of one set of x-features on the examples."""

    contributions: Tensor
    """(N, K)."""
    maps: Tensor
    """Maps (N, K, H, W) or (N, K, L), positive where the input drives the x-feature to its value."""
    drops: Tensor
    """Drops of the contributions, (N, K, P), times the sign of the contribution; 0 at padding."""
    whole: Tensor
    """Drops of the output, (N, 1, P)."""
    lengths: tuple[int, ...]
    """Number of patches of each example."""

    def columns(self, first: int, after: int) -> _Scored:
        """Select the x-features from ``first`` to before ``after``."""
        some = slice(first, after)
        return self._replace(
            contributions=self.contributions[:, some], maps=self.maps[:, some], drops=self.drops[:, some]
        )

    def whole_output(self) -> _Scored:
        """Take the output as the only x-feature; its maps are not known."""
        return self._replace(contributions=torch.ones_like(self.whole[:, :, 0]), drops=self.whole)

    def agreement(self) -> float:
        return self.agreement_of(self.maps)

    def agreement_of(self, maps: Tensor) -> float:
        """Compute the patch agreement of other maps in place of the x-features' own."""
        return mean_by_share(self._for_each(patch_correlations, maps), self.contributions)

    def identified(self) -> float:
        """Compute the share of maps that fit the drops of their own x-feature best."""
        found = self._for_each(identified_maps, self.maps)
        return float(found.double().mean()) if found.shape[1] > 1 else float("nan")

    def movement(self) -> float:
        """Compute the size of the drops in multiples of the size of their sum."""
        side = torch.where(self.contributions < 0, -1, 1).to(self.drops)
        of_sum = (self.drops * side[:, :, None]).sum(1).abs().sum()
        return float(self.drops.abs().sum() / of_sum) if of_sum > 0 else float("nan")

    def _for_each(self, compute: Callable[[Tensor, Tensor], Tensor], maps: Tensor) -> Tensor:
        """Compute a number (N, K) of maps and drops, without the padding of shorter texts."""
        if maps.dim() == 4:
            return compute(maps, self.drops)
        ends = enumerate(self.lengths)
        return torch.cat([compute(maps[i : i + 1, :, :n], self.drops[i : i + 1, :, :n]) for i, n in ends])

    def orthogonality(self) -> Orthogonality:
        return drop_orthogonality(self.drops, contributions=self.contributions)


class _Scorer(NamedTuple):
    """Scores x-features, and random groups in their place, on the same examples."""

    xnn: XNNAttribution
    batches: Sequence[CoveredBatch]
    target: Target
    against: Target
    grid: int
    fill: Tensor | float | None
    batch_size: int

    def score(self, xnn: XNNAttribution) -> _Scored:
        """Compute contributions, maps and drops of the x-features of one explainer."""
        return _joined([self._score_batch(xnn, batch) for batch in self.batches])

    def one_heatmaps(self) -> Tensor:
        """Draw the single map of the output of each example, (N, 1, H, W) or (N, 1, L)."""
        return _padded_and_joined([
            _of_places(
                _first(
                    self.xnn.one_heatmap(
                        batch.inputs,
                        self.target,
                        batch.additional,
                        against=self.against,
                        internal_batch_size=self.batch_size,
                    )
                ),
                batch.first,
            )
            for batch in self.batches
        ])  # fmt: skip

    def _score_batch(self, xnn: XNNAttribution, batch: CoveredBatch) -> _Scored:
        why = xnn.explain(
            batch.inputs, self.target, batch.additional, against=self.against, internal_batch_size=self.batch_size
        )

        def numbers(inputs: tuple[Tensor, ...], more: Any) -> Tensor:
            explained = xnn.contributions(inputs, self.target, more, against=self.against)
            return torch.cat([explained.contributions, explained.prediction[:, None]], 1)

        drops = self._drops(numbers, batch)
        side = torch.where(why.contributions < 0, -1, 1).to(drops)
        maps = _of_places(_first(why.directed_maps()), batch.first)
        lengths = self._lengths(batch) or [drops.shape[2]] * len(batch.first)
        return _Scored(why.contributions, maps, drops[:, :-1] * side[:, :, None], drops[:, -1:], tuple(lengths))

    def score_output(self) -> _Scored:
        """Compute the drops of the output, as those of an only x-feature; its maps are not known."""
        return _joined([self._score_output_of_batch(batch) for batch in self.batches])

    def _score_output_of_batch(self, batch: CoveredBatch) -> _Scored:
        xnn = self.xnn
        reader = xnn._reader()

        def numbers(inputs: tuple[Tensor, ...], more: Any) -> Tensor:
            copies = tuple(a.clone() if isinstance(a, Tensor) else a for a in (*inputs, *(more or ())))
            with untouched(reader.model), torch.no_grad():
                return select(reader.run(copies)[1], self.target)[:, None]

        drops = self._drops(numbers, batch)
        lengths = self._lengths(batch) or [drops.shape[2]] * len(batch.first)
        return _Scored(torch.ones_like(drops[:, :, 0]), torch.zeros_like(drops), drops, drops, tuple(lengths))

    def _drops(self, compute: Callable[[tuple[Tensor, ...], Any], Tensor], batch: CoveredBatch) -> Tensor:
        """Compute the drops of some numbers of an example, (N, numbers, P)."""
        last = self._channels(batch)
        first = batch.first.movedim(last, 1) if last != 1 else batch.first
        is_image = first.dim() == 4 and (first.is_floating_point() or first.dtype == torch.uint8)
        embedded = self.fill is None and not first.is_floating_point() and not is_image
        cover = first if embedded else patch_cover(first, self.fill)
        masks = elements_of_patches(first, self.grid)
        self._refuse_single_patch(batch, len(masks))
        marks = torch.ones(len(first), len(masks), dtype=torch.bool, device="cpu")
        lengths = self._lengths(batch)
        if lengths is not None:
            marks = torch.arange(len(masks), device="cpu") < torch.tensor(lengths, device="cpu")[:, None]

        def covered(rows: Tensor, patches: Tensor) -> Tensor:
            return first[rows] if embedded else torch.where(masks[patches], cover[rows], first[rows])

        def numbers(x: Tensor, rows: Tensor) -> Tensor:
            others, more = rows_of(batch.inputs, batch.additional, rows)
            x = x.movedim(1, last).contiguous() if last != 1 else x
            return compute((x, *others[1:]), more)

        def values(x: Tensor, rows: Tensor, patches: Tensor | None) -> Tensor:
            if patches is None or not embedded:
                return numbers(x, rows)
            values_of_patches = []
            order = patches.argsort(stable=True)
            for some in torch.split(order, torch.unique(patches, return_counts=True)[1].tolist()):
                with covered_token(unwrap(self.xnn.model), x[some], int(patches[some[0]])):
                    values_of_patches.append(numbers(x[some], rows[some]))
            return torch.cat(values_of_patches)[order.argsort()]

        return drops_of_patches(values, first, covered, marks, batch_size=self.batch_size)

    def _refuse_single_patch(self, batch: CoveredBatch, patches: int) -> None:
        """Raise if inputs are volumes, or have one patch only, as signals of one channel have."""
        shape = tuple(batch.first.shape)
        if len(shape) == 4 and patches == 1:
            raise ValueError(f"grid is {self.grid}, and a single patch cannot be compared with others; pass grid >= 2")
        is_volume = len(shape) == 5 and image_channels(unwrap(self.xnn.model), batch.inputs) == 1
        if is_volume or (len(shape) > 2 and patches == 1):
            raise ValueError(
                f"inputs are {shape}, and their dimension 1 holds channels in place of patches; explain a module whose "
                "inputs have patches there, such as moments of a signal or slices of a volume, and whose forward puts "
                "the channels back, as in model(x.transpose(1, 2))"
            )

    def _lengths(self, batch: CoveredBatch) -> Sequence[int] | None:
        """Return the number of patches of each example; None if all have the same."""
        if batch.lengths is not None or batch.first.is_floating_point() or batch.first.dim() != 2:
            return batch.lengths
        return lengths_of(unwrap(self.xnn.model), (*batch.inputs, *(batch.additional or ())))

    def _channels(self, batch: CoveredBatch) -> int:
        """Find the dimension of images that holds channels; 1 for other inputs."""
        return image_channels(unwrap(self.xnn.model), batch.inputs) if batch.first.dim() == 4 else 1

    def score_beside_random_groups(
        self, seed: int, contributions: ContributionGroups | None
    ) -> tuple[_Scored, list[_Scored]]:
        """Score the x-features and each draw of random groups; no draws where contributions cannot be computed."""
        explainer = self.xnn.explainer(self.target, against=self.against)
        form = explainer.form
        if isinstance(form, ContributionGroups) and form.divides_dimensions:  # both sum the same contributions
            K = form.n_features
            every = self._score_groups(explainer, form, [form.groups], K, seed)
            return every.columns(0, K), _draws(every, K)
        own = self.score(self.xnn)
        K = own.contributions.shape[1]
        try:
            divided = contributions or _groups(self.xnn, self.batches[0], explainer)
            every = self._score_groups(explainer, divided, [], K, seed)
        except ValueError:
            return own, []
        return own, _draws(every, 0)

    def _score_groups(
        self, explainer: Explainer, form: ContributionGroups, first: list[Tensor], K: int, seed: int
    ) -> _Scored:
        """Score the groups ``first``, followed by all draws of random groups, in one pass."""
        D = len(form.groups)
        some = [random_partition(D, min(K, D), torch.Generator().manual_seed(seed + i)) for i in range(_DRAWS)]
        joined = copy.deepcopy(form)
        joined.groups = torch.cat([*first, *(a.to(form.groups) for a in some)], 1)
        joined.config["n_features"] = joined.groups.shape[1]
        other = copy.copy(self.xnn)
        other.explainers_ = self.xnn.explainers_.only(replace(explainer, form=joined))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a random group may well have an empty map
            return self.score(other)


def _first(maps: Tensor | tuple[Tensor, ...]) -> Tensor:
    return maps[0] if isinstance(maps, tuple) else maps


def _of_places(maps: Tensor, inputs: Tensor) -> Tensor:
    """Sum maps over channels or embeddings, (N, K, H, W) or (N, K, L)."""
    if inputs.dim() == 4:
        return channels_first(maps, inputs).sum(2)
    return maps.flatten(3).sum(3) if maps.dim() > 3 else maps


def _padded_and_joined(batches: Sequence[Tensor]) -> Tensor:
    """Join tensors (n, K, L) of several lengths, with zeros after the shorter ones; join others as they are."""
    if len(batches) == 1 or batches[0].dim() != 3:
        return torch.cat(list(batches))
    longest = max(batch.shape[2] for batch in batches)
    return torch.cat([F.pad(batch, (0, longest - batch.shape[2])) for batch in batches])


def _joined(batches: Sequence[_Scored]) -> _Scored:
    """Join the scores of batches."""
    contributions, maps, drops, whole, lengths = zip(*batches, strict=True)
    return _Scored(
        torch.cat(contributions),
        _padded_and_joined(maps),
        _padded_and_joined(drops),
        _padded_and_joined(whole),
        tuple(n for of_batch in lengths for n in of_batch),
    )


def _draws(every: _Scored, first: int) -> list[_Scored]:
    """Split the columns from ``first`` on into the draws of random groups."""
    size = (every.contributions.shape[1] - first) // _DRAWS
    return [every.columns(first + i * size, first + (i + 1) * size) for i in range(_DRAWS)]


def _groups(xnn: XNNAttribution, batch: CoveredBatch, explainer: Explainer) -> ContributionGroups:
    """Make a form of groups of dimensions to compare with another form.

    Its base is that of an exact form. For a learned network, it is the mean activation of the examples.
    """
    reader = xnn._reader()
    with untouched(reader.model), torch.no_grad():
        arguments = (*batch.inputs, *(batch.additional or ()))
        Z, y_hat = reader.run(arguments)
    shape, transform = tuple(Z.shape[1:]), xnn.output_transform
    channels = channel_dimension(reader.model, reader.layer, arguments, name=reader.name, output_transform=transform)
    form = ContributionGroups(shape, n_outputs=len(explainer.targets), channels=channels).to(Z)
    if isinstance(explainer.form, ContributionGroups):
        form.base, form.scale = explainer.form.base, explainer.form.scale
        return form
    form.base = form.mean_of([Z], len(Z)).to(Z)
    form.scale = torch.stack([select(y_hat, t) for t in explainer.targets]).std(1, correction=0).to(Z)
    return form
