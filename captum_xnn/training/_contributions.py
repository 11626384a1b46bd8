"""Fit groups of contributions: choose examples, compute their contributions with the model, learn the groups.

A few hundred examples are enough, because a fit learns only the groups. It uses some positives of each target, and
other examples shared by all targets. If positives are images, their patches are also covered, one at a time. This gives
the drop of every dimension's contribution (:mod:`captum_xnn.training._drops`). Where cells of feature maps are covered,
the patches that cost the output most are then covered in the image itself.

A fit can keep these contributions on disk, in one file for each explainer. A later fit with another number of
x-features, or a resumed fit, then skips the model.

Conventions:
    M examples, T explainers of C outputs each, D dimensions or channels of Z, K x-features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_xnn._distributed import ALONE, Ranks
from captum_xnn.activations._activations import ChosenRows, Source
from captum_xnn.activations._batches import Batches, Picked, refuse_changed, refuse_lack
from captum_xnn.activations._memmap import Rows, chunks
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._pixels import image_channels
from captum_xnn.layers._state import untouched
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._targets import Target
from captum_xnn.layers._threads import one_thread_if_small, pass_flops
from captum_xnn.models._contribution_groups import ContributionGroups, Integral, layer_decides
from captum_xnn.models._grouping import Drops, learn_groups
from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._drops import (
    CellCovering,
    CoveredImages,
    Covering,
    Grid,
    MapCovering,
    PixelCovering,
    all_drops,
    channels_of,
    images_among,
    strongest,
)
from captum_xnn.training._map_covers import CoveredMaps, has_cells, maps_before

__all__ = ["SMALL", "Evidence", "fit_groups"]

_LOG = logging.getLogger(__name__)

# Rows in one batch of the model's rest, and most bytes of their feature maps.
_ROWS, _BYTES = 64, 1 << 26
# Largest number of outputs in one pass for gradients. Memory holds the contributions of as many.
_TARGETS = 16
SMALL = 64 * 64
"""Most pixels of an image whose patches are covered in the image itself; larger images have feature maps covered."""
# Learning groups takes about this many small matrix products for each large one.
_SMALL_PRODUCTS = 100
# Largest difference, as a share of their norm, of values and of gradients that a model gives for images stored in two
# ways. Rounding at the kinks of ReLUs changes the gradients of early layers by a percent, and by ten in half precision.
_VALUES, _HALF_VALUES, _GRADIENTS = 1e-3, 2e-2, 0.3
# Patches along each side of an image whose pixels are covered after its feature maps.
_PIXEL_GRID = 4
# Settings that change how groups are learned, but not the contributions they are learned from.
_LEARNED = ("n_features", "ridge", "balance")


class Evidence(NamedTuple):
    """Contributions and drops from which the groups of one explainer are learned."""

    positives: Tensor
    """Contributions to the outputs in positives, (C, P, D)."""
    others: Tensor
    """Contributions to the outputs in other examples, (C, O, D)."""
    covers: tuple[Drops, ...]
    """Drops of positives for each covered patch, (C, P, patches, D) and (P, patches, D), for each way to cover patches;
    empty without images."""
    unexplained: Tensor
    """Difference between the change of the output and the sum of contributions, for all examples, (C, P + O)."""

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Evidence:
        """Make the evidence that a checkpoint keeps."""
        return cls(**{**state, "covers": tuple(Drops(*drops) for drops in state["covers"])})

    def state(self) -> dict[str, Any]:
        """Return all tensors, for a checkpoint."""
        return {**self._asdict(), "covers": [list(drops) for drops in self.covers]}


def fit_groups(
    forms: Sequence[ContributionGroups],
    tail: Tail,
    Z: Tensor | Rows,
    ys: Sequence[Tensor],
    source: Source | None,
    targets: Sequence[tuple[Target, ...]],
    *,
    marks: Sequence[Tensor | None],
    checkpoints: Sequence[Checkpoint] = (),
    model: Any = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[Evidence]:
    """Fit groups of contributions in place, one explainer after another. Yield the evidence for each.

    Args:
        forms: One for each of T explainers, all with the same settings.
        tail: The model's rest.
        Z: Activations of all examples, (M, ...).
        ys: For each explainer the outputs of all examples, (M, C).
        source: Source of the examples' inputs, in the order of Z. None if ``checkpoints`` has all contributions.
        targets: For each explainer its targets.
        marks: For each explainer a boolean (M,) of positives.
        checkpoints: Folders to search for contributions. The first one also takes new contributions.
        model: Values that identify model and layer, as JSON can hold them. Used with ``checkpoints``.
        progress: Whether to show a progress bar.
        ranks: Processes that share the work.

    Raises:
        ValueError: If Z or an output does not vary, if the output does not depend on the layer, or if contributions
            are missing and ``source`` is None.
        CheckpointError: If a file in ``checkpoints`` is damaged or cannot be written.
    """
    first = forms[0]
    config = first.config
    with torch.no_grad():
        base = first.mean_of(chunks(Z), len(Z))
        for form, y in zip(forms, ys, strict=True):
            form.base.copy_(base)
            form.scale.copy_(y.double().std(0))
    chosen = ChosenRows.choose(marks, len(Z), config["positives"], config["others"])
    reader = _EvidenceReader(tail, _Collected(Z, ys), source, chosen, checkpoints, model, ranks)
    at_once = max(1, _TARGETS // len(targets[0]))
    with closing(
        tqdm(desc=f"contributions at {tail.name}", unit=" examples", disable=not progress, leave=False)
    ) as bar:
        for i in range(0, len(forms), at_once):
            some = range(i, min(i + at_once, len(forms)))
            for t, evidence in zip(some, reader.evidence(forms, targets, some, bar), strict=True):
                tail.check_contributions(torch.cat([evidence.positives, evidence.others], 1))
                _learn(forms[t], evidence)
                yield evidence


class _Collected(NamedTuple):
    """Activations and outputs of all examples, collected before."""

    Z: Tensor | Rows
    """Activations of all examples, (M, ...)."""
    ys: Sequence[Tensor]
    """For each explainer its outputs, (M, C)."""


class _EvidenceReader(NamedTuple):
    """Reads contributions from checkpoints, or else computes them with the model."""

    tail: Tail
    collected: _Collected
    source: Source | None
    chosen: ChosenRows
    checkpoints: Sequence[Checkpoint]
    model: Any
    ranks: Ranks

    def evidence(
        self,
        forms: Sequence[ContributionGroups],
        targets: Sequence[tuple[Target, ...]],
        explainers: range,
        bar: tqdm[Any],
    ) -> list[Evidence]:
        """Read or compute the evidence for some explainers."""
        keys = {t: self._key(forms[t], targets[t], t) if self.checkpoints else "" for t in explainers}
        evidence = {t: self._from_checkpoints(key) for t, key in keys.items()}
        kept = self.ranks.all_of([e is not None for e in evidence.values()])  # for each process
        missing = [t for t, kept_by in zip(explainers, zip(*kept, strict=True), strict=True) if not all(kept_by)]
        if missing:
            for t, new_evidence in zip(missing, self._compute(forms, targets, missing, bar), strict=True):
                evidence[t] = new_evidence
                if self.checkpoints and self.ranks.first:
                    self.checkpoints[0].write(keys[t], new_evidence.state())
        return [of_explainer for of_explainer in evidence.values() if of_explainer is not None]

    def _key(self, form: ContributionGroups, targets: tuple[Target, ...], t: int) -> str:
        """Compute the name of the file that keeps contributions, from everything that they depend on."""
        settings = [(name, value) for name, value in form.config.items() if name not in _LEARNED]
        rows = [self.chosen.positives[t], self.chosen.others]
        # The outputs tell other data with the same mean, and models that only their code tells apart.
        outputs = [self.collected.ys[t][some] for some in rows]
        parts = [self.model, targets, settings, form.base, form.scale, rows, outputs]
        return Checkpoint.key(["contributions of positives and others", *parts])

    def _from_checkpoints(self, key: str) -> Evidence | None:
        """Read the evidence that a checkpoint keeps under a key; None if no checkpoint has it."""
        for checkpoint in self.checkpoints:
            state = checkpoint.read(key, torch.device("cpu"))
            if state is not None:
                return Evidence.of_state(state)
        return None

    def _compute(
        self,
        forms: Sequence[ContributionGroups],
        targets: Sequence[tuple[Target, ...]],
        missing: list[int],
        bar: tqdm[Any],
    ) -> list[Evidence]:
        """Run the model, and compute the evidence that no checkpoint has."""
        if self.source is None:
            unknown = ", ".join(str(target) for t in missing for target in targets[t])
            beside = ""
            if self.checkpoints:
                beside = f"no contributions to output {unknown} are kept beside these activations: "
            raise ValueError(
                f"{beside}contributions need the inputs again, but these activations do not say which inputs they come "
                "from; pass the data themselves, as in fit(loader, target, store=...), to keep contributions in the "
                "store, or fit with autoencoder=SRAE"
            )
        chosen = ChosenRows([self.chosen.positives[t] for t in missing], self.chosen.others)
        self.tail.forget()
        collected = self.collected._replace(ys=[self.collected.ys[t] for t in missing])
        collector = _EvidenceCollector(
            [forms[t] for t in missing], self.tail, [targets[t] for t in missing], chosen, collected, self.ranks
        )
        source = self.source

        def each(wanted: Tensor) -> Iterator[Picked]:
            batches = Batches(source.data, _ROWS, source.unpack)
            collector.batch_size = batches.largest_batch or _ROWS
            # Several processes share batches, so there should be many.
            for number, picked in enumerate(batches.picked(wanted, least=_ROWS if self.ranks.world == 1 else 1)):
                if number % self.ranks.world == self.ranks.rank:
                    with one_thread_if_small(pass_flops(self.tail.model, picked.inputs)):
                        yield picked
                bar.update(len(picked.rows))

        with torch.inference_mode(False), untouched(self.tail.model):
            for picked in each(torch.cat(chosen.positives)):
                collector.add_positives(picked)
            if not collector.add_others_from_activations():
                for picked in each(chosen.others):
                    collector.add_others(picked)
        return collector.evidence()


@torch.no_grad()
def _learn(form: ContributionGroups, evidence: Evidence) -> None:
    """Compute the groups of a form from its evidence, ordered by mean contribution to positives."""
    scale = form.scale[:, None, None].to(evidence.positives)
    positives, others = ((c / scale).flatten(0, 1) for c in (evidence.positives, evidence.others))
    covers = [
        Drops(
            (drops.contributions / scale[..., None]).flatten(0, 1),
            drops.activations.expand(len(scale), *drops.activations.shape).flatten(0, 1),
        )
        for drops in evidence.covers
    ]
    rows = sum(drops.contributions.shape[:2].numel() for drops in covers) or len(positives) + len(others)
    with one_thread_if_small(2.0 * rows**2 * positives.shape[1] / _SMALL_PRODUCTS):
        a = learn_groups(
            positives,
            others,
            covers,
            form.config["n_features"],
            ridge=form.config["ridge"],
            balance=form.config["balance"],
        )
    E = evidence.positives[0].double() @ a.double()
    order = E.mean(0).argsort(descending=True, stable=True)
    form.groups = a[:, order].to(form.groups)
    if a.shape[1] < form.config["n_features"]:
        _LOG.info("%d of %d x-features were left after merging", a.shape[1], form.config["n_features"])
    form.config["n_features"] = a.shape[1]


class _Measured(NamedTuple):
    """Contributions and drops of one example."""

    contributions: Tensor
    """Contributions to the outputs, (C, D)."""
    unexplained: Tensor
    """Difference between the change of each output and the sum of its contributions, (C,)."""
    covers: tuple[Drops, ...] = ()
    """Drops for each patch covered in maps, and for each patch covered in pixels, (C, patches, D) and (patches, D).
    There may be 0 patches. Empty for other examples."""


class _EvidenceCollector:
    """Collects the contributions of the chosen examples, batch by batch."""

    def __init__(
        self,
        forms: Sequence[ContributionGroups],
        tail: Tail,
        targets: Sequence[tuple[Target, ...]],
        chosen: ChosenRows,
        collected: _Collected,
        ranks: Ranks,
    ) -> None:
        self.forms, self.tail, self.targets = forms, tail, targets
        self.chosen, self.collected, self.ranks = chosen, collected, ranks
        self.outputs = len(targets[0])
        self.device = next((p.device for p in tail.model.parameters()), torch.device("cpu"))
        self.maps: dict[torch.Size, nn.Module | None] = {}
        """For each shape of an image, the module whose feature maps are covered; None without such a module."""
        self.map_bytes: int | None = None
        """Bytes of the maps of one example, once they were covered."""
        self.one_positive: tuple[tuple[Tensor, ...], tuple[Any, ...] | None] | None = None
        """Inputs and further arguments of one positive, once a positive was run."""
        self.dtype: torch.dtype | None = None
        """Dtype of the layer's output, once a positive was run."""
        self.positives: dict[tuple[int, int], _Measured] = {}
        """Numbers of positives, by explainer and row, for the outputs of that explainer."""
        self.others: dict[int, _Measured] = {}
        """Numbers of other examples, by row, for the outputs of all explainers."""
        self.batch_size = _ROWS
        """Number of examples for which the memory of the model's passes is known to suffice."""
        self.channels: int | None = None
        """The dimension of images that holds channels, from the first batch."""
        self.is_channels_last: dict[torch.Size, bool] = {}
        """For each shape of an image, whether its channels lie side by side in memory."""

    def _inputs(self, picked: Picked) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
        """Return inputs and further arguments, with the channels of images side by side in memory if possible.

        Most convolutions on a CPU are faster then.
        """
        inputs, additional = picked.on(self.device)
        if self.channels is None:
            self.channels = image_channels(self.tail.model, (*inputs, *(additional or ())))
        at = images_among(inputs, channels=self.channels)
        if at is None or self._channels_of(inputs, at) != 1 or self.device.type != "cpu":
            return inputs, additional
        images = inputs[at].contiguous(memory_format=torch.channels_last)
        side_by_side = (*inputs[:at], images, *inputs[at + 1 :])
        shape = images.shape[1:]
        if shape not in self.is_channels_last:
            self.is_channels_last[shape] = self._gives_the_same(inputs, side_by_side, additional)
        return side_by_side if self.is_channels_last[shape] else inputs, additional

    def _gives_the_same(
        self, inputs: tuple[Tensor, ...], others: tuple[Tensor, ...], additional: tuple[Any, ...] | None
    ) -> bool:
        """Whether the model gives the same values and gradients for images that lie otherwise in memory.

        Code that views maps as vectors, or that asks how they lie, may fail or give other values. Some of it does so
        with several examples only.
        """
        two = torch.tensor([0, min(1, len(inputs[0]) - 1)], device="cpu")
        targets = [[target] * 2 for target in self.targets[0]]
        middle, one = torch.full((1,), 0.5, device="cpu"), torch.ones(1, device="cpu")
        points = []
        for given in (inputs, others):
            x, more = rows_of(given, additional, two)
            try:
                points.append(self.tail.fresh().along(x, more, self.forms[0].base, middle, one, targets))
            except Exception:  # of any class, by the model's own code
                return False
        plain, other = points
        share = _VALUES if plain.Z.dtype in (torch.float32, torch.float64) else _HALF_VALUES
        most = (share, _GRADIENTS, share)
        return all(bool((b - a).norm() <= of_norm * a.norm()) for a, b, of_norm in zip(plain, other, most, strict=True))

    def add_positives(self, picked: Picked) -> None:
        """Compute the contributions of the positives among some examples, and their drops."""
        inputs, additional = self._inputs(picked)
        pairs = [(t, row) for t, p in enumerate(self.chosen.positives) for row in picked.among(p).tolist()]
        first = 0
        while first < len(pairs):
            last = first + self._rows_at_once()
            self._add_pairs(pairs[first:last], picked.rows, inputs, additional)
            first = last

    def _rows_at_once(self) -> int:
        """Return how many positives to run at once: as many as in a batch of the data, or more with small passes.

        If the layer's output alone decides the output, the modules before the layer run on few images at a time, and
        more positives fit in memory.
        """
        if not self.tail.layer_decides:
            return min(_ROWS, self.batch_size)
        return _ROWS if self.map_bytes is None else max(1, min(_ROWS, max(self.batch_size, _BYTES // self.map_bytes)))

    def add_others(self, picked: Picked) -> None:
        """Compute the contributions of the other examples among some examples."""
        inputs, additional = self._inputs(picked)
        for rows in torch.split(picked.among(self.chosen.others), min(_ROWS, self.batch_size)):
            x, more = rows_of(inputs, additional, torch.searchsorted(picked.rows, rows))
            self._add_others(rows, x, more, None)

    def add_others_from_activations(self) -> bool:
        """Compute the contributions of other examples from their activations alone.

        The modules before the layer then run on one positive only, and the inputs of other examples are not read.
        Return False if the output depends on more than the layer's activations.
        """
        # Activations that were kept in a smaller dtype than the layer gives are not exact.
        is_exact = self.collected.Z[:1].dtype == self.dtype
        sure = bool(self.tail.layer_decides) and self.one_positive is not None and is_exact
        if not all(self.ranks.all_of(sure)):
            return False
        assert self.one_positive is not None
        for rows in torch.split(self.chosen.others[self.ranks.rank :: self.ranks.world], _ROWS):
            x, more = rows_of(*self.one_positive, torch.zeros(len(rows), dtype=torch.long, device="cpu"))
            Z = self.collected.Z[rows].to(self.device)
            with one_thread_if_small(pass_flops(self.tail.model, x)):
                sure = sure and self._layer_decides(Z, rows, x, more)
                if sure:
                    self._add_others(rows, x, more, Z)
        return all(self.ranks.all_of(sure))

    def _layer_decides(
        self, Z: Tensor, rows: Tensor, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None
    ) -> bool:
        """Whether activations alone give the outputs of some other examples."""
        targets = [[target] * len(rows) for target in self.targets[0]]
        return layer_decides(self.tail, inputs, additional, targets, Z, self.collected.ys[0][rows].T)

    def _add_others(
        self, rows: Tensor, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, Z: Tensor | None
    ) -> None:
        """Compute the contributions of some other examples to the outputs of all explainers."""
        if not len(rows):
            return
        flat = [target for of in self.targets for target in of]
        ys = torch.cat([y[rows.to(y.device)] for y in self.collected.ys], 1).T
        contributions = []
        unexplained = []
        for i in range(0, len(flat), _TARGETS):
            targets = [[target] * len(rows) for target in flat[i : i + _TARGETS]]
            scale = torch.cat([form.scale for form in self.forms])[i : i + _TARGETS]
            y = self.tail.outputs(inputs, additional, targets) if Z is None else ys[i : i + _TARGETS]
            integral = self.forms[0].integral(self.tail, inputs, additional, targets, predictions=y, Z=Z, scale=scale)
            contributions.append(self.forms[0].contributions(integral).cpu())
            unexplained.append(_unexplained(integral, contributions[-1]))
        c, off = torch.cat(contributions), torch.cat(unexplained)
        for i, row in enumerate(rows.tolist()):
            self.others[row] = _Measured(c[:, i], off[:, i])

    def _add_pairs(
        self,
        pairs: Sequence[tuple[int, int]],
        numbers: Tensor,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
    ) -> None:
        """Compute the contributions of some positives, each to the outputs of its explainer, and their drops."""
        rows = torch.tensor([row for _, row in pairs], device="cpu")
        x, more = rows_of(inputs, additional, torch.searchsorted(numbers, rows))
        targets = [[self.targets[t][c] for t, _ in pairs] for c in range(self.outputs)]
        scale = torch.stack([self.forms[t].scale for t, _ in pairs], 1)
        at = images_among(x, channels=self.channels or 1)
        covered_maps = None if at is None or not self._covers_maps(x, at) else self._covered_maps(x, more, at)
        Z = self.tail.activations(x, more) if covered_maps is None else covered_maps.Z
        y = self._outputs(Z, pairs, x, more, targets)
        self.one_positive, self.dtype = rows_of(x, more, torch.tensor([0], device="cpu")), Z.dtype
        if self.tail.layer_decides and self.tail.prefix is None:
            self.tail.keep_prefix(*self.one_positive)
        integral = self.forms[0].integral(self.tail, x, more, targets, predictions=y, Z=Z, scale=scale)
        # After the integral, which found the layer's last call.
        refuse_changed(self.collected.Z[rows].to(integral.Z.device), integral.Z, rows)
        contributions = self.forms[0].contributions(integral).cpu()
        unexplained = _unexplained(integral, contributions)
        none = Drops(contributions[:, :, None][:, :, :0], contributions[0, :, None][:, :0])
        covers = (none, none)
        if at is not None:
            maps, pixels = self._covers(x, more, targets, integral, at, covered_maps, scale)
            covers = (maps or none, pixels or none)
        for i, pair in enumerate(pairs):
            of_pair = tuple(Drops(drops.contributions[:, i], drops.activations[i]) for drops in covers)
            self.positives[pair] = _Measured(contributions[:, i], unexplained[:, i], of_pair)

    def _outputs(
        self,
        Z: Tensor,
        pairs: Sequence[tuple[int, int]],
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        targets: Sequence[Sequence[Target]],
    ) -> Tensor:
        """Return the model's outputs, (C, N): those that were collected, if Z is still the same."""
        before = self.collected.Z[torch.tensor([row for _, row in pairs], device="cpu")].to(Z.device)
        if before.dtype == Z.dtype and before.shape == Z.shape and _close(before, Z):
            return torch.stack([self.collected.ys[t][row] for t, row in pairs], 1)
        return self.tail.outputs(inputs, additional, targets)

    def _channels_of(self, inputs: tuple[Tensor, ...], at: int) -> int:
        """Return the dimension of images that holds channels."""
        return channels_of(inputs, at, self.channels or 1)

    def _covers_maps(self, inputs: tuple[Tensor, ...], at: int) -> bool:
        """Whether to cover feature maps rather than images."""
        covered = self.forms[0].config["covered"]
        if covered is not None:
            return bool(covered == "maps")
        return inputs[at].movedim(self._channels_of(inputs, at), 1).shape[2:].numel() > SMALL

    def _covered_maps(
        self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, at: int
    ) -> CoveredMaps | None:
        """Find the feature maps before the layer, and make their covers; None without such maps."""
        shape = inputs[at].shape[1:]
        if shape not in self.maps:
            self.maps[shape] = maps_before(self.tail, inputs, additional, at)
        maps = self.maps[shape]
        if maps is None:
            return None
        covered = CoveredMaps(self.tail, maps, inputs, additional)
        self.map_bytes = covered.whole[0].numel() * covered.whole.element_size()
        return covered

    def _covers(
        self,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        targets: Sequence[Sequence[Target]],
        integral: Integral,
        at: int,
        covered_maps: CoveredMaps | None,
        scale: Tensor,
    ) -> tuple[Drops | None, Drops | None]:
        """Cover patches of maps, and then pixels of the strongest patches; or else pixels alone.

        Returns:
            Drops of patches covered in maps, and of those covered in pixels.
        """
        form = self.forms[0]
        n, grid, count = len(inputs[0]), form.config["grid"], form.config["strongest"]
        channels = self._channels_of(inputs, at)

        def pixels(grid: int) -> Covering:
            images = CoveredImages(inputs, at, grid, channels=channels)
            return PixelCovering(form, integral, images, self.tail, additional, targets)

        covering: Covering
        if self._covers_maps(inputs, at) and has_cells(integral.Z, form.channels):
            covering = CellCovering(form, integral, grid)
        elif covered_maps is not None:
            cells = Grid(covered_maps.whole.shape[2], covered_maps.whole.shape[3], grid)
            activations = partial(covered_maps.activations, cells.regions)
            covering = MapCovering(form, integral, cells, activations, covered_maps.at_once)
        else:
            return None, all_drops(pixels(grid), n)
        drops = all_drops(covering, n)
        if not count:
            return drops, None
        again = pixels(_PIXEL_GRID)
        pairs = strongest(drops, covering.grid, again.grid, count, scale)
        return drops, all_drops(again, n, pairs)

    def evidence(self) -> list[Evidence]:
        """Gather the numbers of all processes to the evidence for each explainer."""
        positives: dict[tuple[int, int], _Measured] = {}
        others: dict[int, _Measured] = {}
        for mine in self.ranks.all_of((self.positives, self.others)):
            positives |= mine[0]
            others |= mine[1]
        wanted = torch.cat([*self.chosen.positives, self.chosen.others])
        refuse_lack(len(positives) + len(others), wanted)
        evidence = []
        for t, chosen in enumerate(self.chosen.positives):
            own = [positives[t, row] for row in chosen.tolist()]
            outputs = slice(t * self.outputs, (t + 1) * self.outputs)
            rest = [
                _Measured(others[row].contributions[outputs], others[row].unexplained[outputs])
                for row in self.chosen.others.tolist()
            ]
            ways = [_stacked(way) for way in zip(*(measured.covers for measured in own), strict=True)]
            contributions = torch.stack([measured.contributions for measured in own], 1)
            evidence.append(
                Evidence(
                    contributions,
                    torch.stack([measured.contributions for measured in rest], 1) if rest else contributions[:, :0],
                    tuple(way for way in ways if way.activations.shape[1]),
                    torch.stack([measured.unexplained for measured in [*own, *rest]], 1),
                )
            )
        return evidence


def _stacked(images: Sequence[Drops]) -> Drops:
    """Stack the drops of images, (C, patches, D) and (patches, D) each, to (C, P, patches, D) and (P, patches, D).

    Images of different sizes may have different numbers of patches. Missing patches get drops of 0, which never count.
    """
    most = max(len(drops.activations) for drops in images)
    contributions, activations = (
        [nn.functional.pad(x, (0, 0, 0, most - x.shape[-2])) for x in of_images]
        for of_images in zip(*images, strict=True)
    )
    return Drops(torch.stack(contributions, 1), torch.stack(activations))


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def _unexplained(integral: Integral, contributions: Tensor) -> Tensor:
    """Compute the change of the output minus the sum of contributions, (C, N)."""
    return (integral.end - integral.start).to(contributions) - contributions.sum(2)
