r"""Cards: one x-feature over a whole data set.

A heatmap shows where an x-feature is on one image. A card shows the images on which the x-feature is strongest, cropped
around its map. It also shows images of the class that lack the x-feature, its share of the class's contributions, and
its correlations with other x-features and outputs. A reader can name the x-feature from its card, and check a name
against it.

Conventions:
    M examples of a data set, K x-features, C outputs of the model, P parts. Contributions are :math:`v_i E_i`, in
    logits. Positives are the examples to which the model itself gives the class, as in training. If the outputs are not
    classes, all examples are positives. An x-feature below the average training example has a negative value. The sign
    of its mean over the positives decides whether high or low values mean "present".

Memory:
    The data are streamed. The pass keeps images of the examples that are among the first ``keep`` of some list, at most
    5 K keep images, with their maps. Maps of all other positives are drawn for their masses and parts, and then
    dropped. Maps of kept examples of other classes are drawn at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_xnn.layers._pixels import channels_by_size, channels_first
from captum_xnn.layers._targets import Target, grouped, positives_of, predicted_classes, select, single_target
from captum_xnn.metrics._faithfulness import FaithfulnessStream
from captum_xnn.metrics._localisation import object_probabilities, part_probabilities
from captum_xnn.metrics._overlap import contribution_shares
from captum_xnn.metrics._typicality import UNUSUAL
from captum_xnn.report._inputs import model_outputs
from captum_xnn.report._thumbnails import crop_box
from captum_xnn.report._typicality import usual_of

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.attribution import XNNAttribution
    from captum_xnn.explainer import Explainer
    from captum_xnn.explanation import Explanation

__all__ = ["Card", "Example", "PlacesOfMaps", "annotated_places", "feature_cards", "image_batches"]

PlacesOfMaps = Callable[[Any, Tensor, Tensor], Tensor]
"""Function of a batch, the rows (n,) of some of its examples, and their non-negative maps (n, K, H, W). It returns the
share of each map that lies on each place, (n, K, P)."""

_BATCH = 64


@dataclass(frozen=True, eq=False)
class Example:
    """One example on a card."""

    number: int
    """Row of the example in the data, 0-based."""
    image: Tensor
    """Image as the model takes it, (C, H, W)."""
    heat: Tensor
    """The x-feature's map (h, w), positive where the image drives the x-feature to its value."""
    feature: float
    """E_i, in the unit of ``Explanation.features``."""
    contribution: float
    """v_i E_i, in logits."""
    map_share: float | None
    """The x-feature's share of the mass of all maps of the image, in [0, 1]; None for examples of other classes."""
    prediction: float
    """The model's output, in logits."""
    given: int | None
    """The class that the model gives; None if its outputs are not classes."""
    crop: tuple[int, ...]
    """Box around the map's mass: x0, y0, x1, y1 in pixels of the image."""
    usual: float | None = None
    """Share of the positives whose contributions are at least as far from the class's mean
    (:func:`captum_xnn.metrics.typicality`). None for examples of other classes, and with fewer than 20 positives."""
    unusual: bool = False
    """Whether the contributions are farther from those of the other positives than one in a thousand would be by
    chance."""


@dataclass(frozen=True, eq=False)
class Card:
    """One x-feature of a target over a data set. Lists of examples begin with the strongest."""

    target: Target
    """The explained output."""
    feature: int
    """Index of the x-feature."""
    fires: tuple[Example, ...]
    """Examples from all data with the most extreme E_i, at the end of its range that means "present"."""
    contributes: tuple[Example, ...]
    """Positives with the largest contribution, counted in the direction of the x-feature's mean contribution."""
    fills: tuple[Example, ...]
    """Positives on which the x-feature has the largest share of the maps' mass."""
    absent: tuple[Example, ...]
    """Positives with the smallest contribution, counted in the same direction, the smallest first. The class is there,
    but the x-feature is absent or has the opposite sign."""
    share: float
    """The x-feature's share of the absolute contributions to the positives, in [0, 1]; the K shares sum to 1."""
    contribution: float
    """Mean contribution to the positives, in logits."""
    deviation: float
    """Standard deviation of the contribution to the positives, in logits."""
    feature_correlations: Tensor
    """Correlations of E_i with each of the K x-features over all examples, (K,): 1 with itself, 0 for constants."""
    output_correlations: Tensor
    """Correlations of the contribution with each of the model's C outputs over all examples, (C,); 0 for constants."""
    places: Tensor | None
    """Mean share of its maps on each part or object over the positives, (P,). The shares sum to 1, or are all 0 if the
    maps touch no place. None without annotations."""
    examples: int
    """Number of examples M of the data set."""
    positives: int
    """Number of positives."""


def annotated_places(count: int) -> PlacesOfMaps:
    """Return the function that computes the share of each map on the annotated places of its image.

    Samples with ``points`` and ``box`` (:class:`~captum_xnn.datasets.CUB200`) give P parts and, last, the context.
    Samples with a ``mask`` (:class:`~captum_xnn.datasets.ADE20KScenes`) give P objects.

    Args:
        count: Number of parts or objects P. Masks hold 1 to P, and 0 where there is no object.

    Example:
        >>> from captum_xnn.datasets._parts import PartsSample
        >>> from captum_xnn.datasets._places import SceneSample
        >>> row, maps = torch.tensor([0]), torch.tensor([[[[1.0, 3.0]]]])
        >>> points, box = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        >>> birds = PartsSample(torch.zeros(1, 3, 1, 2), torch.zeros(1), points, box, torch.zeros(1))
        >>> annotated_places(1)(birds, row, maps)
        tensor([[[0.2500, 0.7500]]], dtype=torch.float64)
        >>> scenes = SceneSample(torch.zeros(1, 3, 1, 2), torch.zeros(1), torch.tensor([[[0, 2]]]), torch.zeros(1))
        >>> annotated_places(2)(scenes, row, maps)
        tensor([[[0.0000, 0.7500]]], dtype=torch.float64)
    """

    def places(batch: Any, rows: Tensor, maps: Tensor) -> Tensor:
        if hasattr(batch, "points"):
            return part_probabilities(maps, batch.points[rows], batch.box[rows])
        if hasattr(batch, "mask"):
            return object_probabilities(maps, batch.mask[rows].to(maps.device), objects=count)
        raise ValueError(
            f"place_names has {count} names, and the batches of the data are {type(batch).__name__} without points or "
            "masks; pass data with annotations, such as CUB200, or a function of your own as places="
        )

    return places


def feature_cards(
    xnn: XNNAttribution,
    data: Any,
    target: Any = None,
    *,
    keep: int = 6,
    places: PlacesOfMaps | None = None,
    internal_batch_size: int | None = None,
    progress: bool = False,
) -> tuple[Card, ...]:
    """Make a card for each x-feature of a target, in the order of the x-features, in one pass over a data set.

    Args:
        xnn: Explanation of a model that takes one tensor of images, fitted for the target.
        data: Images (M, C, H, W), or an iterable of batches such as a DataLoader, as ``xnn.fit`` takes them.
        target: None, int, or tuple of ints.
        keep: Number of examples in each list of a card.
        places: Function that computes the share of maps on parts or objects, such as :func:`annotated_places`. It
            receives the batches that ``data`` yields.
        internal_batch_size: Number of maps computed at once; smaller values need less memory.
        progress: Whether to show a progress bar.

    Raises:
        NotFittedError: If the target was not fitted.
        ValueError: If there are no images, or the model gives the class to none of them.

    Example:
        >>> from captum.attr import InputXGradient
        >>> from torch import nn
        >>> from captum_xnn import Recipe, XNNAttribution
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
        >>> images = torch.rand(60, 1, 8, 8)
        >>> xnn = XNNAttribution(model, "1", n_features=2, heatmap=InputXGradient, recipe=Recipe(steps=20))
        >>> target = int(model(images).argmax(1).mode().values)
        >>> cards = feature_cards(xnn.fit(images, target, progress=False), images, target, keep=4)
        >>> [card.feature for card in cards], len(cards[0].contributes), round(sum(card.share for card in cards), 6)
        ([0, 1], 4, 1.0)
    """
    if keep < 1:
        raise ValueError(f"keep={keep} leaves no examples on the cards; pass at least 1 (6 fill a row of a report)")
    target = single_target(target)
    stream = CardStream(xnn, target, keep, places, internal_batch_size)
    for batch, images in tqdm(image_batches(xnn, data), "cards", disable=not progress, leave=False):
        stream.update(batch, images)
    return stream.cards()


def image_batches(xnn: XNNAttribution, data: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yield each batch unchanged, together with its images (N, C, H, W).

    Args:
        xnn: Its ``unpack`` finds the images in a batch.
        data: Images (M, C, H, W), or an iterable of batches.

    Raises:
        ValueError: If a batch holds anything but one tensor of images for the model.
    """
    if isinstance(data, tuple):
        raise ValueError(
            f"a tuple of {len(data)} means several inputs of a model, but cards and reports need images (M, C, H, W) "
            "or a list or loader of batches; pass list(data) if its items are batches"
        )
    batches: Iterable[Any] = torch.split(data, _BATCH) if isinstance(data, Tensor) else data
    for batch in batches:
        images, additional = (batch, None) if isinstance(data, Tensor) else xnn.unpack(batch)
        if isinstance(images, tuple) and len(images) == 1:
            images = images[0]
        if not isinstance(images, Tensor) or images.dim() != 4 or additional is not None:
            given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"a batch is {given}, and cards need batches of images (N, C, H, W) as the model's only input; wrap a "
                "model with further inputs so that it takes images alone"
            )
        yield batch, images


def count_examples(data: Any) -> int | None:
    """Count the examples of a data set without reading it; return None if it does not say.

    Example:
        >>> count_examples(torch.zeros(5, 3, 8, 8)), count_examples([torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8)])
        (5, 3)
    """
    if isinstance(data, Tensor):
        return len(data)
    if isinstance(data, (list, tuple)) and all(isinstance(batch, Tensor) for batch in data):
        return sum(map(len, data))
    for where in (getattr(data, "names", None), getattr(data, "dataset", None)):
        if isinstance(where, Sized):
            return len(where)
    return None


class _Kept(NamedTuple):
    """An example kept during the pass, with each x-feature's numbers (K,)."""

    image: Tensor
    features: Tensor
    contributions: Tensor
    map_shares: Tensor | None
    prediction: float
    given: int | None
    heat: Tensor | None
    """Maps (K, h, w); None if they have not been drawn yet."""


class _Top:
    """The largest values of every x-feature with their examples' rows; of equal values, the earlier comes first."""

    def __init__(self, K: int, keep: int) -> None:
        self.keep = keep
        self.values = torch.empty(K, 0, dtype=torch.float64, device="cpu")
        self.numbers = torch.empty(K, 0, dtype=torch.int64, device="cpu")

    def update(self, values: Tensor, numbers: Tensor) -> None:
        """Add values (n, K) of examples with these row indices (n,)."""
        values = torch.cat([self.values, values.double().T], 1)
        numbers = torch.cat([self.numbers, numbers.expand(len(values), -1)], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        self.values, self.numbers = values.gather(1, order), numbers.gather(1, order)


class _Moments:
    """Running means and co-moments of D columns, merged batch by batch without loss of digits."""

    count = 0
    mean: Tensor
    products: Tensor

    def update(self, columns: Tensor) -> None:
        """Add rows (n, D)."""
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
        """Compute the matrix of correlations, (D, D); 0 for constant columns."""
        norm = self.products.diagonal().sqrt()
        # Rounding leaves a constant column with up to this share of its size.
        live = norm > 1e-7 * self.mean.abs() * self.count**0.5
        scale = torch.where(live, 1 / torch.where(live, norm, 1), 0)
        return (scale[:, None] * self.products * scale).clamp(-1, 1)


class CardStream:
    """Collects a data set batch by batch and makes cards from it."""

    def __init__(
        self,
        xnn: XNNAttribution,
        target: Target,
        keep: int,
        places: PlacesOfMaps | None,
        internal_batch_size: int | None,
        *,
        largest: int | None = None,
    ) -> None:
        self.largest = largest
        self.xnn, self.target, self.places, self.internal_batch_size = xnn, target, places, internal_batch_size
        self.explainer: Explainer = xnn.explainer(target)
        K = self.explainer.form.n_features
        # High or low values may mean "present". Only the whole data tell, so both ends are kept.
        names = ("E high", "E low", "vE high", "vE low", "map share")
        self.tops = {name: _Top(K, keep) for name in names}
        self.kept: dict[int, _Kept] = {}
        self.moments, self.positive_moments = _Moments(), _Moments()
        self.positive_contributions: list[Tensor] = []
        """Contributions of the positives, (n, K), batch by batch."""
        self.positive_numbers: list[int] = []
        """Row indices of the positives."""
        self.size = torch.zeros(K, dtype=torch.float64, device="cpu")
        """Sum over the positives of the size of contributions."""
        self.features = torch.zeros(K, dtype=torch.float64, device="cpu")
        """Sum over the positives of x-features."""
        self.place_sums: Tensor | None = None
        self.faithfulness = FaithfulnessStream(target)

    def update(
        self,
        batch: Any,
        images: Tensor,
        y_hat: Tensor | None = None,
        why: Explanation | None = None,
        *,
        rows: Tensor | None = None,
    ) -> None:
        """Add images of a batch.

        Args:
            batch: The batch, for the places of maps.
            images: Some of its images, (n, C, H, W).
            y_hat: The model's outputs for them, (n, ...), if known.
            why: Their explanation, if known. Otherwise only the maps that the cards need are drawn.
            rows: Rows (n,) of the images in the batch; all rows if None.
        """
        start = self.moments.count
        y_hat = model_outputs(self.xnn, images) if y_hat is None else y_hat.cpu()
        explained = why or self.xnn.contributions(images, self.target, internal_batch_size=self.internal_batch_size)
        E, contributions = explained.features.double().cpu(), explained.contributions.double().cpu()
        self.faithfulness.update(explained.surrogate.cpu(), explained.prediction.cpu(), y_hat)
        numbers = torch.arange(start, start + len(E), device="cpu")
        self.moments.update(torch.cat([E, contributions, y_hat.double().flatten(1)], 1))
        self.tops["E high"].update(E, numbers)
        self.tops["E low"].update(-E, numbers)
        classes = predicted_classes(y_hat)
        given = [None] * len(y_hat) if classes is None else classes.tolist()
        marked = positives_of(classes, [self.target])
        positives = torch.arange(len(E), device="cpu") if marked is None else marked.nonzero()[:, 0]
        shares: dict[int, Tensor] = {}
        heat: dict[int, Tensor] = {}
        if why is not None:
            heat = dict(enumerate(channels_first(why.directed_maps(), images).sum(2)))
        elif len(positives):
            heat = dict(zip(positives.tolist(), self._heat(images[positives]), strict=True))
        if len(positives):
            mass = torch.stack([heat[row] for row in positives.tolist()]).clamp(min=0)
            map_shares = self._map_shares(batch, mass, positives if rows is None else rows[positives])
            self._add_positives(numbers[positives], E[positives], contributions[positives], map_shares)
            shares = dict(zip(numbers[positives].tolist(), map_shares, strict=True))
        wanted = set(torch.cat([top.numbers.flatten() for top in self.tops.values()]).tolist())
        self.kept = {number: kept for number, kept in self.kept.items() if number in wanted}
        predictions = select(y_hat, self.target).tolist()
        for row, number in enumerate(numbers.tolist()):
            if number in wanted:
                # Copies: a slice would keep the whole batch in memory.
                image = images[row].detach().cpu().clone()
                drawn = self._small(heat[row]) if row in heat else None
                self.kept[number] = _Kept(
                    image, E[row], contributions[row], shares.get(number), predictions[row], given[row], drawn
                )

    def _add_positives(self, numbers: Tensor, E: Tensor, contributions: Tensor, map_shares: Tensor) -> None:
        """Add the numbers of positives: their rows (n,), and (n, K) for the x-features."""
        self.positive_moments.update(contributions)
        self.positive_contributions.append(contributions)
        self.positive_numbers.extend(numbers.tolist())
        self.size += contributions.abs().sum(0)
        self.features += E.sum(0)
        self.tops["vE high"].update(contributions, numbers)
        self.tops["vE low"].update(-contributions, numbers)
        self.tops["map share"].update(map_shares, numbers)

    def _small(self, heat: Tensor) -> Tensor:
        """Copy maps (K, h, w), averaged to the largest size that the cards need."""
        heat = heat.detach().cpu()
        side = max(heat.shape[1:])
        if self.largest is None or side <= self.largest:
            return heat.clone()
        wanted = [max(1, round(size * self.largest / side)) for size in heat.shape[1:]]
        return nn.functional.interpolate(heat[None].float(), wanted, mode="area")[0]

    def _map_shares(self, batch: Any, mass: Tensor, rows: Tensor) -> Tensor:
        """Compute each x-feature's share of the maps' mass, (n, K), and add the maps' shares on the places."""
        if self.places is not None:
            found = self.places(batch, rows, mass).double().sum(0).cpu()
            self.place_sums = found if self.place_sums is None else self.place_sums + found
        return contribution_shares(mass.double().sum((2, 3)).cpu())

    def _heat(self, images: Tensor) -> Tensor:
        """Draw directed maps summed over their channels, (n, K, h, w)."""
        why = self.xnn.explain(images, target=self.target, internal_batch_size=self.internal_batch_size)
        return channels_first(why.directed_maps(), images).sum(2)

    def cards(self) -> tuple[Card, ...]:
        """Make the cards of all x-features."""
        if not self.positive_moments.count:
            raise ValueError(
                f"the model gives class {self.target} to none of the {self.moments.count} examples; pass data with "
                "images of the class"
            )
        heat, usual = self._kept_heat(), self._usual()
        K, n = len(self.size), self.positive_moments.count
        correlations = self.moments.correlations()
        total = float(self.size.sum())
        deviation = (self.positive_moments.products.diagonal() / n).clamp(min=0).sqrt()
        cards = []
        for k in range(K):
            ends = ("vE high", "vE low") if self.positive_moments.mean[k] >= 0 else ("vE low", "vE high")
            lists = ("E high" if self.features[k] >= 0 else "E low", ends[0], "map share", ends[1])
            fires, contributes, fills, absent = (self._examples(name, k, heat, usual) for name in lists)
            cards.append(
                Card(
                    target=self.target,
                    feature=k,
                    fires=fires,
                    contributes=contributes,
                    fills=fills,
                    absent=absent,
                    share=float(self.size[k]) / total if total else 0.0,
                    contribution=float(self.positive_moments.mean[k]),
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
        """Draw the maps (K, h, w) of the kept examples, by row index."""
        heat = {number: kept.heat for number, kept in self.kept.items() if kept.heat is not None}
        missing = [number for number in self.kept if number not in heat]
        for _, rows in grouped(tuple(self.kept[number].image.shape) for number in missing):
            numbers = [missing[row] for row in rows]
            for some in (numbers[i : i + _BATCH] for i in range(0, len(numbers), _BATCH)):
                drawn = self._heat(torch.stack([self.kept[number].image for number in some]))
                heat.update(zip(some, map(self._small, drawn), strict=True))
        return heat

    def _usual(self) -> dict[int, tuple[float, bool]]:
        """Compute share, and whether it is unusual, of each positive by row index; empty with too few positives."""
        found = usual_of(torch.cat(self.positive_contributions))
        if found is None:
            return {}
        marks = zip(found.share.tolist(), (found.chance < UNUSUAL).tolist(), strict=True)
        return dict(zip(self.positive_numbers, marks, strict=True))

    def _examples(
        self, name: str, k: int, heat: dict[int, Tensor], usual: dict[int, tuple[float, bool]]
    ) -> tuple[Example, ...]:
        examples = []
        for number in self.tops[name].numbers[k].tolist():
            kept, heat_of_k = self.kept[number], heat[number][k]
            share, unusual = usual.get(number, (None, False))
            height, width = kept.image.movedim(channels_by_size(kept.image[None]) - 1, 0).shape[1:]
            examples.append(
                Example(
                    number=number,
                    image=kept.image,
                    heat=heat_of_k,
                    feature=float(kept.features[k]),
                    contribution=float(kept.contributions[k]),
                    map_share=None if kept.map_shares is None else float(kept.map_shares[k]),
                    prediction=kept.prediction,
                    given=kept.given,
                    crop=crop_box(heat_of_k, (height, width)),
                    usual=share,
                    unusual=unusual,
                )
            )
        return tuple(examples)

    def _places(self, k: int) -> Tensor | None:
        if self.place_sums is None:
            return None
        total = self.place_sums[k].sum()
        return self.place_sums[k] / torch.where(total > 0, total, 1)
