"""Explain the images of a report: the gallery with all maps, and the cards of x-features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from captum_xnn.layers._pixels import channels_by_size, channels_first
from captum_xnn.layers._targets import Target, predicted_classes
from captum_xnn.patch_scores import PatchScores, patch_scores
from captum_xnn.report._cards import (
    Card,
    CardStream,
    Example,
    annotated_places,
    count_examples,
    image_batches,
)
from captum_xnn.report._examples import (
    ExampleExplanations,
    TargetContent,
    captioned,
    compare,
    explain_examples,
    numbers_of,
    scaled,
    strengths,
)
from captum_xnn.report._inputs import model_outputs
from captum_xnn.report._output_names import OutputNames
from captum_xnn.report._thumbnails import displayable, overlay, photo, shown

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.attribution import XNNAttribution
    from captum_xnn.explanation import Explanation
    from captum_xnn.report._options import ReportOptions

__all__ = ["Gallery", "ImagesRun"]

_CROP = 112
_KEEP = 6
_BATCH = 64
# Images explained between two steps of the progress bar.
_AT_ONCE = 16
_ABSENT = "absent though the class is there"
_LEAST = "contributes least"
# Share of the mean contribution below which an x-feature counts as absent from an image.
_GONE = 0.5
_CORRELATES = 3
_PLACES = 6


class Gallery:
    """Collects the page's data of each image, batch by batch, without keeping the tensors."""

    def __init__(
        self,
        targets: Sequence[Target],
        names: OutputNames,
        display: Callable[[Tensor], Tensor],
        patches: int,
    ) -> None:
        self.targets, self.names, self.display, self.patches = targets, names, display, patches
        self.covered: dict[Target, Tensor] = {t: torch.empty(0, device="cpu") for t in targets}
        self.photos: list[dict[str, Any]] = []
        self.rows: list[list[dict[str, Any]]] = [[] for _ in targets]
        self.classes = False
        self.given: list[int | None] = []

    def add(self, images: Tensor, y_hat: Tensor) -> None:
        """Add images (N, C, H, W) and the model's outputs for them, (N, ...)."""
        predicted = predicted_classes(y_hat)
        self.classes = predicted is not None
        self.given = [None] * len(y_hat) if predicted is None else predicted.tolist()
        for image, c in zip(images, self.given, strict=True):
            predicted_class = "" if c is None else self.names.of(c)
            height, width = image.movedim(channels_by_size(image[None]) - 1, 0).shape[1:]
            src = photo(shown(self.display, image))
            self.photos.append({"src": src, "predicted_class": predicted_class, "width": width, "height": height})

    def add_explanations(self, i: int, images: Tensor, explanations: ExampleExplanations) -> None:
        """Add the explanations of the last images for the i-th target."""
        target = self.targets[i]
        positives = [c is None or not isinstance(target, int) or c == target for c in self.given]
        rows = list(rows_of_images(explanations.why, explanations.one_heatmaps, positives))
        if explanations.against is not None:
            against = rows_of_images(explanations.against, explanations.one_heatmaps_against, [True] * len(images))
            compare(rows, against, self.names.of(explanations.against.target[0]))
        self.rows[i].extend(rows)
        held = self.covered[target]
        more = images[positives][: self.patches - len(held)]
        self.covered[target] = torch.cat([held.to(more), more]) if len(held) else more


def rows_of_images(why: Explanation, one_heatmaps: Tensor, positives: Sequence[bool]) -> Iterator[dict[str, Any]]:
    """Yield the numbers and maps of each image for one target.

    Args:
        why: Explanation of the images.
        one_heatmaps: Their 1-Heatmaps.
        positives: Whether the model gives the target to each of them.
    """
    assert isinstance(why.inputs, Tensor)  # because images are a single tensor
    heat, single = (channels_first(m, why.inputs).sum(2).cpu() for m in (why.directed_maps(), one_heatmaps.detach()))
    for i, given in enumerate(positives):
        contributions = why.contributions[i].detach().double().cpu()
        maps = scaled(heat[i], contributions)
        yield {
            **numbers_of(why, i, given),
            "maps": [overlay(m) for m in maps],
            "one": overlay(scaled(single[i], torch.ones(1, device="cpu"))[0]),
            "strength": [round(s, 3) for s in strengths(maps, contributions)],
        }


class ImagesRun:
    """Explains the images of a report, and the data of its cards, in one pass over each."""

    kind = "images"

    def __init__(self, xnn: XNNAttribution, images: Any, targets: Sequence[Target], options: ReportOptions) -> None:
        self.xnn, self.images, self.targets, self.options = xnn, images, targets, options
        names = OutputNames.of_targets(options.class_names, xnn, targets)
        self.display = options.display or displayable
        self.gallery = Gallery(targets, names, self.display, options.patches)
        places = options.places or (annotated_places(len(options.place_names)) if options.place_names else None)
        self.streams = [CardStream(xnn, t, _KEEP, places, options.internal_batch_size, largest=_CROP) for t in targets]
        self.contributions: list[list[tuple[Tensor, Tensor]]] = [[] for _ in targets]
        """Contributions by this fit and by another one, for each target, batch by batch."""

    @property
    def _own(self) -> bool:
        """Whether the report has no other data than its images."""
        return self.options.data is None or self.options.data is self.images

    def explain(self) -> None:
        """Explain all images and data."""
        for batch, images, rows in self._parts(self.images, "explaining images"):
            self._explain(batch, images, rows)
        if not self._own:
            for batch, images, rows in self._parts(self.options.data, "reading the data"):
                y_hat = model_outputs(self.xnn, images)
                for stream in self.streams:
                    stream.update(batch, images, y_hat, rows=rows)

    def captioned(self) -> list[dict[str, Any]]:
        """Return all images with their captions."""
        return captioned(self.gallery.photos, self.options.captions, "image")

    def contents(self) -> Iterator[TargetContent]:
        """Yield rows, cards and figures of each target."""
        options, gallery = self.options, self.gallery
        captions = options.data_captions
        if options.data is None and captions is None:
            captions = options.captions
        for i, (t, stream) in enumerate(zip(self.targets, self.streams, strict=True)):
            cards = stream.cards()
            caption = _caption_of(captions, cards[0].examples, shown=self._own)
            yield TargetContent(
                target=t,
                label=gallery.names.of(t),
                classes=gallery.classes and isinstance(t, int),
                rows=gallery.rows[i],
                cards=[_card(card, gallery.names, options.place_names, self.display, caption) for card in cards],
                faithfulness=stream.faithfulness,
                positive_contributions=torch.cat(stream.positive_contributions),
                contributions=self.contributions[i],
                patches=self._patch_scores(t),
            )

    def _parts(self, data: Any, what: str) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield batches with a few of their images and the rows of these, and advance the progress bar."""
        size = self.options.internal_batch_size
        few = _AT_ONCE if size is None else min(size, _AT_ONCE)
        with tqdm(
            total=count_examples(data), desc=what, unit="image", disable=not self.options.progress, leave=False
        ) as bar:
            for batch, images in image_batches(self.xnn, data):
                for rows in torch.split(torch.arange(len(images), device="cpu"), few):
                    yield batch, images[rows], rows
                    bar.update(len(rows))

    def _explain(self, batch: Any, images: Tensor, rows: Tensor) -> None:
        """Explain a few images. Add them to the cards if the report has no other data."""
        y_hat = None
        for i, t in enumerate(self.targets):
            explanations = explain_examples(self.xnn, images, t, self.options)
            if y_hat is None:
                # No more images come at once than maps are drawn of, so the outputs are those of all of them.
                y_hat = explanations.y_hat
                self.gallery.add(images, y_hat)
            self.gallery.add_explanations(i, images, explanations)
            if self._own:
                self.streams[i].update(batch, images, y_hat, explanations.why, rows=rows)
            if explanations.contributions is not None:
                self.contributions[i].append(explanations.contributions)

    def _patch_scores(self, target: Target) -> PatchScores | None:
        """Compute the patch measures on the first positives of a target; return None if there are no positives."""
        images = self.gallery.covered[target]
        if not len(images):
            return None
        with tqdm(total=1, desc="covering patches", disable=not self.options.progress, leave=False) as bar:
            found = patch_scores(
                self.xnn,
                images,
                target,
                fill=self.options.fill,
                internal_batch_size=self.options.internal_batch_size or _BATCH,
            )
            bar.update()
        return found


def _caption_of(captions: Sequence[str] | None, count: int, *, shown: bool) -> Callable[[int], str]:
    """Return a function from the row of an image in the data to its caption."""
    if captions is None:
        # If the gallery shows other images than the data, its numbers mean other images.
        of = "" if shown else " of the data"
        return lambda number: f"image {number + 1}{of}"
    if isinstance(captions, str) or len(captions) != count:
        raise ValueError(
            f"there are {len(captions)} data_captions for {count} images of the data; pass one for each image, such as "
            "its file name, or none at all"
        )
    return lambda number: str(captions[number])


def _card(
    card: Card,
    class_names: OutputNames,
    place_names: Sequence[str],
    display: Callable[[Tensor], Tensor],
    caption: Callable[[int], str],
) -> dict[str, Any]:
    """Convert a card for the template; equal lists of images are merged into one."""
    lists: dict[tuple[int, ...], tuple[list[str], Sequence[Example]]] = {}
    target = card.target
    classes = isinstance(target, int) and any(e.given is not None for e in card.absent)
    gone = all(e.contribution / card.contribution < _GONE for e in card.absent if card.contribution)
    absent = _ABSENT if classes and gone else _LEAST
    for label, examples in (
        ("contributes most", card.contributes),
        ("largest share of the map", card.fills),
        ("strongest in all data", card.fires),
        (absent, card.absent),
    ):
        lists.setdefault(tuple(e.number for e in examples), ([], examples))[0].append(label)
    return {
        "feature": card.feature,
        "share": card.share,
        "contribution": card.contribution,
        "deviation": card.deviation,
        "examples": card.examples,
        "positives": card.positives,
        "lists": [
            (
                " and ".join(labels),
                [_cut(e, target, class_names, display, caption, whole=absent in labels) for e in examples],
            )
            for labels, examples in lists.values()
        ],
        "features": _strongest(card.feature_correlations, leave_out=card.feature),
        "outputs": [(class_names.of(c), r) for c, r in _strongest(card.output_correlations)],
        "places": _places(card.places, place_names),
    }


def _cut(
    example: Example,
    target: Target,
    class_names: OutputNames,
    display: Callable[[Tensor], Tensor],
    caption: Callable[[int], str],
    *,
    whole: bool,
) -> dict[str, Any]:
    """Crop an image and its map around the map's mass. Keep them whole where the x-feature is absent."""
    image = shown(display, example.image)
    height, width = image.shape[1:]
    x0, y0, x1, y1 = (0, 0, width, height) if whole else example.crop
    heat = scaled(example.heat[None], torch.tensor([example.contribution], device="cpu"))[0]
    rows, columns = (
        slice(low * len_map // len_image, max(-(-high * len_map // len_image), low * len_map // len_image + 1))
        for low, high, len_map, len_image in ((y0, y1, heat.shape[0], height), (x0, x1, heat.shape[1], width))
    )
    return {
        "photo": photo(image[:, y0:y1, x0:x1], size=_CROP),
        "map": overlay(heat[rows, columns], size=40),
        "caption": caption(example.number),
        "contribution": example.contribution,
        "other": "" if example.given in (None, target) else class_names.of(example.given),
        "unusual": example.unusual,
        "small": max(y1 - y0, x1 - x0) <= 64,
    }


def _strongest(correlations: Tensor, *, leave_out: int | None = None) -> list[tuple[int, float]]:
    """Return the strongest correlations with their indices, leaving out correlations below 0.05 in size."""
    order = correlations.abs().argsort(descending=True, stable=True).tolist()
    found = [(i, float(correlations[i])) for i in order if i != leave_out and abs(float(correlations[i])) >= 0.05]
    return found[:_CORRELATES]


def _places(places: Tensor | None, names: Sequence[str]) -> list[tuple[str, float]]:
    """Return the parts or objects that hold the largest shares of the maps."""
    if places is None:
        return []
    # Parts have the context as their last place. Data sets of parts have no name for it.
    called = [*names, "context"] if len(names) == len(places) - 1 else list(names)
    called += [f"place {p + 1}" for p in range(len(called), len(places))]
    order = places.argsort(descending=True, stable=True).tolist()[:_PLACES]
    return [(called[p], float(places[p])) for p in order if float(places[p]) > 0]
