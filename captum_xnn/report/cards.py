r"""Concept cards: what one x-feature is, over a whole data set.

A heatmap shows where an x-feature is on one image. A card shows the images on which it is strongest, cut out around its
map, images of the class that lack it, how much of the class it explains, and what it goes together with. These are what
a name can be given by, and checked against.

Conventions:
    M examples of a data set, K x-features, C outputs of the model, P parts. Contributions are :math:`v_i E_i`, in
    logits. The class's examples are those that the model itself gives the class, as in training; where its outputs are
    no classes, all examples are. An x-feature below the average training example has a negative value, and which of its
    ends means "present" is told by the class: the sign of its mean over the class's examples.

Memory:
    The data are streamed. Images are kept of examples that are among the ``keep`` first of some list, at most
    5 K keep of them, and maps are drawn of these at the end. Maps of all of the class's examples are drawn for their
    masses and parts, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from captum_xnn.activations import collect
from captum_xnn.attribution import XNNAttribution
from captum_xnn.datasets.parts import PartsSample
from captum_xnn.explainer import Explainer
from captum_xnn.metrics.localisation import object_probabilities, part_probabilities
from captum_xnn.metrics.overlap import contribution_shares
from captum_xnn.report.thumbnails import crop_box
from captum_xnn.targets import Target, grouped, select, single_target

__all__ = ["ConceptCard", "Example", "PlacesOfMaps", "concept_cards", "image_batches", "on_objects", "on_parts"]

PlacesOfMaps = Callable[[Any, Tensor, Tensor], Tensor]
"""From a batch, the rows (n,) of some of its examples, and their maps (n, K, H, W) that are not negative, to what each
map has of each place, (n, K, P)."""

_BATCH = 64


@dataclass(frozen=True, eq=False)
class Example:
    """One example on a card."""

    number: int
    """Its place in the data, 0-based."""
    image: Tensor
    """As the model takes it, (C, H, W)."""
    heat: Tensor
    """The x-feature's map (h, w), positive where the image drives it to the value it has."""
    feature: float
    """E_i, in standard deviations from the average training example."""
    contribution: float
    """v_i E_i, in logits."""
    map_share: float | None
    """The x-feature's part of the mass of all maps of the image, in [0, 1]; None for examples of other classes."""
    prediction: float
    """What the model gives, in logits."""
    given: int | None
    """The class that the model gives; None where its outputs are no classes."""
    crop: tuple[int, ...]
    """Around the map's mass: x0, y0, x1, y1 in pixels of the image."""


@dataclass(frozen=True, eq=False)
class ConceptCard:
    """What one x-feature of a target is, over a data set. Lists begin with the strongest example."""

    target: Target
    feature: int
    """Which x-feature, 0-based."""
    fires: tuple[Example, ...]
    """Of all examples, those whose E_i is farthest to the class's side."""
    contributes: tuple[Example, ...]
    """Of the class's examples, those to whose output it contributes most, of the sign of its mean contribution."""
    fills: tuple[Example, ...]
    """Of the class's examples, those on which it has the largest share of the maps' mass."""
    absent: tuple[Example, ...]
    """Of the class's examples, those to which it contributes least, the least first: it is absent, or against its
    habit, though the class is there."""
    share: float
    """Of the absolute contributions over the class, in [0, 1]; the K of them sum to 1."""
    contribution: float
    """Mean over the class, in logits."""
    deviation: float
    """Standard deviation of the contribution over the class, in logits."""
    feature_correlations: Tensor
    """With each of the K x-features over all examples, (K,), 1 with itself; 0 where one is constant."""
    output_correlations: Tensor
    """Of the contribution with each of the model's C outputs over all examples, (C,); 0 where one is constant."""
    places: Tensor | None
    """What its maps have of each part or object, mean over the class, (P,), summing to 1 unless they have none; None
    without annotations."""
    examples: int
    """Of the data set, M."""
    positives: int
    """Those of the class."""


def on_parts(batch: PartsSample, rows: Tensor, maps: Tensor) -> Tensor:
    """Returns what each map has of each part and, last, of the context, (n, K, P + 1), for data sets with parts.

    Args:
        batch: From a loader with :func:`captum_xnn.datasets.parts.collate`.
        rows: (n,), which of its examples.
        maps: (n, K, H, W), not negative, of the size of its images.

    Example:
        >>> from captum_xnn.datasets.parts import collate
        >>> points, box = torch.tensor([[0.5, 0.5]]), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> one = PartsSample(torch.zeros(3, 1, 2), torch.tensor(0), points, box, torch.tensor(0))
        >>> on_parts(collate([one]), torch.tensor([0]), torch.tensor([[[[1.0, 3.0]]]]))
        tensor([[[0.2500, 0.7500]]], dtype=torch.float64)
    """
    return part_probabilities(maps, batch.points[rows], batch.box[rows])


def on_objects(objects: int) -> PlacesOfMaps:
    """Returns a function that gives what each map has of each object, for data sets with masks of objects.

    Args:
        objects: How many there are; masks hold integers up to it, and 0 for none.

    Example:
        >>> from captum_xnn.datasets.places import SceneSample
        >>> mask = torch.tensor([[[0, 2]]])
        >>> batch = SceneSample(torch.zeros(1, 3, 1, 2), torch.zeros(1), mask, torch.zeros(1))
        >>> on_objects(2)(batch, torch.tensor([0]), torch.tensor([[[[1.0, 3.0]]]]))
        tensor([[[0.0000, 0.7500]]], dtype=torch.float64)
    """

    def places(batch: Any, rows: Tensor, maps: Tensor) -> Tensor:
        return object_probabilities(maps, batch.mask[rows].to(maps.device), objects=objects)

    return places


def concept_cards(
    xnn: XNNAttribution,
    data: Any,
    target: Any = None,
    *,
    keep: int = 6,
    places: PlacesOfMaps | None = None,
    internal_batch_size: int | None = None,
    progress: bool = False,
) -> tuple[ConceptCard, ...]:
    """Returns a card for each x-feature of a target, in their own order, from one pass over a data set.

    Args:
        xnn: With a fitted explainer of the target, for a model that takes one tensor of images.
        data: Images (M, C, H, W), or an iterable of batches such as a DataLoader, as ``xnn.fit`` takes them.
        target: None, int, or tuple of ints.
        keep: Examples in each list of a card.
        places: Says what maps have of parts or objects, where these are annotated: :func:`on_parts` or
            :func:`on_objects`. It is given the batches that data yield.
        internal_batch_size: Maps computed at once, which bounds the memory.
        progress: Whether to show a progress bar.

    Raises:
        NotFittedError: If the target was not fitted.
        ValueError: If there are no images, or none that the model gives the class.

    Example:
        >>> from captum.attr import InputXGradient
        >>> from torch import nn
        >>> from captum_xnn import Recipe
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
        >>> images = torch.rand(60, 1, 8, 8)
        >>> xnn = XNNAttribution(model, "1", n_features=2, heatmap=InputXGradient, recipe=Recipe(steps=20))
        >>> target = int(model(images).argmax(1).mode().values)
        >>> cards = concept_cards(xnn.fit(images, target, progress=False), images, target, keep=4)
        >>> [card.feature for card in cards], len(cards[0].contributes), round(sum(card.share for card in cards), 6)
        ([0, 1], 4, 1.0)
    """
    if keep < 1:
        raise ValueError(f"expected to keep at least one example, got keep={keep}; 6 fill a row of a report")
    target = single_target(target)
    stream = _Stream(xnn, target, keep, places, internal_batch_size)
    for batch, images in tqdm(image_batches(xnn, data), "cards", disable=not progress, leave=False):
        stream.update(batch, images)
    return stream.cards()


def image_batches(xnn: XNNAttribution, data: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yields batches as they come, each with its images (N, C, H, W).

    Args:
        xnn: Says by its ``unpack`` what in a batch the images are.
        data: Images (M, C, H, W), or an iterable of batches.

    Raises:
        ValueError: If the model takes anything else.
    """
    if isinstance(data, tuple):
        raise ValueError(
            f"expected images (M, C, H, W) or a list or loader of batches, got a tuple of {len(data)}, which stands "
            "for the several inputs of a model; pass list(data) if these are batches"
        )
    batches: Iterable[Any] = torch.split(data, _BATCH) if isinstance(data, Tensor) else data
    for batch in batches:
        images, additional = (batch, None) if isinstance(data, Tensor) else xnn.unpack(batch)
        if isinstance(images, tuple) and len(images) == 1:
            images = images[0]
        if not isinstance(images, Tensor) or images.dim() != 4 or additional is not None:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"expected batches of images (N, C, H, W) and nothing else for the model, got {got}; cards and reports "
                "show images: wrap a model with further inputs so that it takes images alone"
            )
        yield batch, images


class _Kept(NamedTuple):
    """What is remembered of an example, with each x-feature's numbers (K,)."""

    image: Tensor
    features: Tensor
    contributions: Tensor
    map_shares: Tensor | None
    prediction: float
    given: int | None


class _Top:
    """The largest values of every x-feature with the numbers of their examples, of two equal ones the earlier."""

    def __init__(self, K: int, keep: int) -> None:
        self.keep = keep
        self.values = torch.empty(K, 0, dtype=torch.float64)
        self.numbers = torch.empty(K, 0, dtype=torch.int64)

    def update(self, values: Tensor, numbers: Tensor) -> None:
        """Takes up values (n, K) of examples with these numbers (n,)."""
        values = torch.cat([self.values, values.double().T], 1)
        numbers = torch.cat([self.numbers, numbers.expand(len(values), -1)], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        self.values, self.numbers = values.gather(1, order), numbers.gather(1, order)


class _Moments:
    """Means and products of deviations of columns that come batch by batch, merged without loss of digits."""

    count = 0
    mean: Tensor
    products: Tensor

    def update(self, columns: Tensor) -> None:
        """Takes up rows (n, D)."""
        n, mean = len(columns), columns.mean(0)
        deviations = columns - mean
        products = deviations.T @ deviations
        if self.count:
            apart = mean - self.mean
            total = self.count + n
            products = self.products + products + torch.outer(apart, apart) * (self.count * n / total)
            mean = self.mean + apart * (n / total)
        self.count, self.mean, self.products = self.count + n, mean, products

    def correlations(self) -> Tensor:
        """Returns the matrix of correlations, (D, D); 0 where a column is constant."""
        norm = self.products.diagonal().sqrt()
        # By rounding, a constant column is left with this much of its size.
        live = norm > 1e-7 * self.mean.abs() * self.count**0.5
        scale = torch.where(live, 1 / torch.where(live, norm, 1), 0)
        return (scale[:, None] * self.products * scale).clamp(-1, 1)


class _Stream:
    """Takes up a data set batch by batch and makes cards of it."""

    def __init__(
        self,
        xnn: XNNAttribution,
        target: Target,
        keep: int,
        places: PlacesOfMaps | None,
        internal_batch_size: int | None,
    ) -> None:
        self.xnn, self.target, self.places, self.internal_batch_size = xnn, target, places, internal_batch_size
        self.explainer: Explainer = xnn.explainer(target)
        K = self.explainer.form.n_features
        # Either end may be the one that the class has, which is known at the end only.
        names = ("E high", "E low", "vE high", "vE low", "map share")
        self.tops = {name: _Top(K, keep) for name in names}
        self.kept: dict[int, _Kept] = {}
        self.moments, self.own = _Moments(), _Moments()
        self.size = torch.zeros(K, dtype=torch.float64)
        self.features = torch.zeros(K, dtype=torch.float64)
        self.place_sums: Tensor | None = None

    def update(self, batch: Any, images: Tensor) -> None:
        """Takes up one batch."""
        start = self.moments.count
        E, contributions, y_hat = self._numbers(images)
        numbers = torch.arange(start, start + len(E))
        self.moments.update(torch.cat([E, contributions, y_hat.double().flatten(1)], 1))
        self.tops["E high"].update(E, numbers)
        self.tops["E low"].update(-E, numbers)
        given = y_hat.argmax(1).tolist() if y_hat.dim() == 2 and y_hat.shape[1] > 1 else [None] * len(y_hat)
        own = self._of_class(given)
        shares: dict[int, Tensor] = {}
        if len(own):
            self.own.update(contributions[own])
            self.size += contributions[own].abs().sum(0)
            self.features += E[own].sum(0)
            self.tops["vE high"].update(contributions[own], numbers[own])
            self.tops["vE low"].update(-contributions[own], numbers[own])
            map_shares = self._map_shares(batch, images, own)
            self.tops["map share"].update(map_shares, numbers[own])
            shares = dict(zip(numbers[own].tolist(), map_shares, strict=True))
        wanted = set(torch.cat([top.numbers.flatten() for top in self.tops.values()]).tolist())
        self.kept = {number: kept for number, kept in self.kept.items() if number in wanted}
        predictions = select(y_hat, self.target).tolist()
        for row, number in enumerate(numbers.tolist()):
            if number in wanted:
                # A copy: a slice would keep the whole batch in memory.
                image = images[row].detach().cpu().clone()
                self.kept[number] = _Kept(
                    image, E[row], contributions[row], shares.get(number), predictions[row], given[row]
                )

    def _numbers(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x-features (N, K) and contributions (N, K), in double precision, and the model's outputs."""
        xnn = self.xnn
        found = collect(
            xnn.model,
            xnn.layer,
            images,
            output_transform=xnn.output_transform,
            prediction_transform=xnn.prediction_transform,
        )
        made = xnn.contributions(images, self.target, internal_batch_size=self.internal_batch_size)
        return made.features.double().cpu(), made.contributions.double().cpu(), found.y_hat[:]

    def _of_class(self, given: list[int | None]) -> Tensor:
        """Returns the rows of the examples that the model gives the class, of all where there are no classes."""
        classes = isinstance(self.target, int)
        return torch.tensor([i for i, c in enumerate(given) if not classes or c is None or c == self.target]).long()

    def _map_shares(self, batch: Any, images: Tensor, own: Tensor) -> Tensor:
        """Returns each x-feature's part of the maps' mass, (n, K), after adding what they have of the places."""
        heat = self._heat(images[own]).clamp(min=0)
        if self.places is not None:
            found = self.places(batch, own, heat).double().sum(0).cpu()
            self.place_sums = found if self.place_sums is None else self.place_sums + found
        return contribution_shares(heat.double().sum((2, 3)).cpu())

    def _heat(self, images: Tensor) -> Tensor:
        """Returns directed maps summed over their channels, (n, K, h, w)."""
        why = self.xnn.explain(images, target=self.target, internal_batch_size=self.internal_batch_size)
        return why.directed_maps().sum(2)

    def cards(self) -> tuple[ConceptCard, ...]:
        """Returns the cards of all x-features."""
        if not self.own.count:
            raise ValueError(
                f"expected examples that the model gives class {self.target}, got none of {self.moments.count}; pass "
                "data with images of the class"
            )
        heat = self._kept_heat()
        K, n = len(self.size), self.own.count
        correlations = self.moments.correlations()
        total = float(self.size.sum())
        deviation = (self.own.products.diagonal() / n).clamp(min=0).sqrt()
        cards = []
        for k in range(K):
            ends = ("vE high", "vE low") if self.own.mean[k] >= 0 else ("vE low", "vE high")
            lists = ("E high" if self.features[k] >= 0 else "E low", ends[0], "map share", ends[1])
            fires, contributes, fills, absent = (self._examples(name, k, heat) for name in lists)
            cards.append(
                ConceptCard(
                    target=self.target,
                    feature=k,
                    fires=fires,
                    contributes=contributes,
                    fills=fills,
                    absent=absent,
                    share=float(self.size[k]) / total if total else 0.0,
                    contribution=float(self.own.mean[k]),
                    deviation=float(deviation[k]),
                    feature_correlations=correlations[k, :K],
                    output_correlations=correlations[K + k, 2 * K :],
                    places=self._places(k),
                    examples=self.moments.count,
                    positives=n,
                )
            )
        return tuple(cards)

    def _kept_heat(self) -> dict[int, Tensor]:
        """Returns the maps (K, h, w) of the kept examples by their numbers."""
        heat: dict[int, Tensor] = {}
        for _, rows in grouped(tuple(kept.image.shape) for kept in self.kept.values()):
            numbers = [list(self.kept)[row] for row in rows]
            for some in (numbers[i : i + _BATCH] for i in range(0, len(numbers), _BATCH)):
                drawn = self._heat(torch.stack([self.kept[number].image for number in some]))
                heat.update(zip(some, drawn.cpu(), strict=True))
        return heat

    def _examples(self, name: str, k: int, heat: dict[int, Tensor]) -> tuple[Example, ...]:
        made = []
        for number in self.tops[name].numbers[k].tolist():
            kept, own = self.kept[number], heat[number][k]
            height, width = kept.image.shape[1:]
            made.append(
                Example(
                    number=number,
                    image=kept.image,
                    heat=own,
                    feature=float(kept.features[k]),
                    contribution=float(kept.contributions[k]),
                    map_share=None if kept.map_shares is None else float(kept.map_shares[k]),
                    prediction=kept.prediction,
                    given=kept.given,
                    crop=crop_box(own, (height, width)),
                )
            )
        return tuple(made)

    def _places(self, k: int) -> Tensor | None:
        if self.place_sums is None:
            return None
        total = self.place_sums[k].sum()
        return self.place_sums[k] / torch.where(total > 0, total, 1)
