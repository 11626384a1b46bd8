"""Report page: one self-contained HTML file that explains a model with cards and a gallery of images.

The file opens offline and can be mailed. It shows the faithfulness of the explanation, a card for each x-feature, and
all images with their heatmaps. The gallery shows all maps of one image on hover or focus, the map of one x-feature on
all images, or selected images side by side. The reader names x-features in the page and downloads the names as JSON.
The next report reads this file.

Safety:
    The page loads nothing. A content security policy forbids it, and allows the one script and the one style sheet by
    their checksums. The template escapes every text in the page. The data are JSON without ``<``, ``>``, ``&`` and
    ``'``. The script inserts text as plain text, never as HTML.

Size:
    Images are at most 200 pixels wide or high, maps at most 64.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from tqdm import tqdm

from captum_xnn._files import replace_file
from captum_xnn.activations._batches import as_batches
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._targets import Difference, Target, target_groups
from captum_xnn.patch_scores import PatchScores, patch_scores
from captum_xnn.plots._names import names_by_target, resolve_names
from captum_xnn.report._batches import are_images
from captum_xnn.report._cache import ReportCache, describe, identity
from captum_xnn.report._cards import (
    Card,
    CardStream,
    Example,
    annotated_places,
    count_examples,
    image_batches,
    outputs_of,
)
from captum_xnn.report._described import completed
from captum_xnn.report._gallery import Gallery, OutputNames, compare, decimals, rows_of_images, scaled, shown
from captum_xnn.report._options import ReportOptions
from captum_xnn.report._rows import CellsRun
from captum_xnn.report._thumbnails import displayable, overlay, photo
from captum_xnn.report._usual import UNUSUAL, mark_usual
from captum_xnn.report._verdict import (
    Stability,
    error,
    on_maps,
    on_stability,
    on_unexplained,
    stability,
    verdict,
)

if TYPE_CHECKING:  # XNNAttribution.report calls this module
    from captum_xnn.attribution import XNNAttribution

__all__ = ["write_report"]

_CROP = 112
_KEEP = 6
_BATCH = 64
_FINE = 0.01
# Images explained between two steps of the progress bar.
_AT_ONCE = 16

_log = logging.getLogger(__name__)
_ABSENT = "absent though the class is there"
_LEAST = "contributes least"
_CORRELATES = 3
_PLACES = 6
_DOTS = 400
_MARKS = {"good": "\N{CHECK MARK}", "fair": "~", "poor": "\N{BALLOT X}", "unknown": "?"}


def write_report(
    path: str | os.PathLike[str],
    xnn: XNNAttribution,
    images: Any,
    target: Any = None,
    options: ReportOptions | None = None,
) -> Path:
    """Write a report as one self-contained HTML file, and return its path.

    The new file overwrites an older one only once it is complete. Missing folders are created.

    Args:
        path: Path of the HTML file; ".html" is added to a name without it.
        xnn: Explanation of a model that takes one tensor of images, fitted for the targets.
        images: Images of the gallery: (N, C, H, W), an iterable of batches as ``xnn.fit`` takes them, or a data set.
            A data set's class names, file names and normalisation are used where the options leave them open.
        target: The explained output, or a list of outputs. Each gets cards and a gallery of the same images.
        options: Texts, names, data for the cards, and what to compute; the defaults if None.

    Raises:
        ImportError: If jinja2 or pillow is missing.
        NotFittedError: If a target was not fitted.
        ValueError: If the path is a folder, the inputs are not images, there is not one caption for each image, the
            names are of another layer, the names of classes do not fit the model's outputs, or the model gives the
            class to none of the data.
        TypeError: If ``names`` is neither a file nor a mapping from targets.

    Example:
        >>> import tempfile
        >>> from captum.attr import InputXGradient
        >>> from torch import nn
        >>> from captum_xnn import Recipe, XNNAttribution
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
        >>> images = torch.rand(60, 1, 8, 8)
        >>> target = int(model(images).argmax(1).mode().values)
        >>> xnn = XNNAttribution(model, "1", n_features=2, heatmap=InputXGradient, recipe=Recipe(steps=20))
        >>> xnn = xnn.fit(images, target, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_report(f"{folder}/why.html", xnn, images[:5], target, ReportOptions(title="Why?"))
        ...     path.name, "<h1>Why?</h1>" in path.read_text(encoding="utf-8")
        ('why.html', True)
    """
    _check_jinja2()
    options = options or ReportOptions()
    images = as_batches(images)
    options = replace(options, data=images if options.data is images else as_batches(options.data))
    if Path(path).is_dir():
        raise ValueError(f"the report cannot be written to {str(path)!r}, a folder; add a name such as report.html")
    written = Path(path)
    if written.suffix.lower() not in (".html", ".htm"):  # browsers open a page by the end of its name
        written = written.with_name(f"{written.name}.html")
    layer = find_layer(unwrap(xnn.model), xnn.layer)[0]
    targets = [t for group in target_groups(target, joint=False) for t in group]
    known = names_by_target(options.names, layer, targets)
    labels = [resolve_names(known.get(str(t), {}), xnn.explainer(t).form.n_features) for t in targets]
    _check_rereadable(images, "images")
    _check_rereadable(options.data, "data")
    content = _content(xnn, images, targets, completed(xnn, images, options))
    chapters = [{**chapter, "names": names} for chapter, names in zip(content["chapters"], labels, strict=True)]
    model = type(unwrap(xnn.model)).__name__
    page = {
        "id": identity(xnn, targets),
        "kind": content["kind"],
        "layer": layer,
        "names": known,
        "images": content["images"],
        "targets": content["targets"],
    }
    text = _render(
        "gallery.js" if content["kind"] == "images" else "rows.js",
        kind=content["kind"],
        title=f"{model} explained at {layer}" if options.title is None else options.title,
        model=model,
        layer=layer,
        features=_counts(len(chapter["cards"]) for chapter in chapters),
        unit=options.unit,
        chapters=chapters,
        notes=options.notes,
        images=len(content["images"]),
        page=page,
    )
    written.parent.mkdir(parents=True, exist_ok=True)
    # File names may hold bytes that are not valid text.
    replace_file(written, text.encode(errors="replace"))
    return written


def _content(xnn: XNNAttribution, images: Any, targets: Sequence[Target], options: ReportOptions) -> Any:
    """Compute all of the page that does not depend on names, title and notes, or read it from the cache."""
    computed = _computed if are_images(xnn, images) else _computed_rows
    if options.cache is None:
        return computed(xnn, images, targets, options)
    description = describe(xnn, images, targets, options)
    if description is None:
        _log.warning("the report is not kept in %s: a function in it cannot be compared", options.cache)
        return computed(xnn, images, targets, options)
    cache = ReportCache(options.cache)
    content = cache.read(description)
    if content is None:
        content = computed(xnn, images, targets, options)
        cache.write(description, content)
    return content


def _computed(xnn: XNNAttribution, images: Any, targets: Sequence[Target], options: ReportOptions) -> Any:
    """Compute images, rows and chapters, as JSON holds them."""
    run = _Run(xnn, images, targets, options)
    run.explain()
    gallery, shown_images = run.gallery, run.gallery.images(options.captions)
    captions = options.captions if options.data is None and options.data_captions is None else options.data_captions
    chapters = []
    for i, (t, rows) in enumerate(zip(targets, gallery.rows, strict=True)):
        stream, training = run.streams[i], xnn.explainer(t)
        cards = stream.cards()
        caption = _caption_of(captions, cards[0].examples, shown=options.data is None or options.data is images)
        score, spread, patches = stream.faithfulness.compute(), stream.faithfulness.spread(), run.patch_scores(t)
        unusual = mark_usual(rows, torch.cat(stream.own_contributions))
        chapters.append(
            {
                "key": str(t),
                "label": gallery.names.of(t),
                "score": {**score._asdict(), "spread": spread},
                "training": _training(training),
                "cards": [
                    _card(card, gallery.names, options.place_names, options.display or displayable, caption)
                    for card in cards
                ],
                "scatter": _scatter(rows, shown_images),
                "mean_outputs": _mean_outputs(rows),
                "unusual": None if unusual is None else _fields(unusual),
                "decimals": decimals(rows),
                # Whether the model gives the target to some images and not to others.
                "classes": gallery.classes and isinstance(t, int),
                "patches": None if patches is None else _fields(patches),
                "verdict": _fields(
                    verdict(
                        on_unexplained(score.f_reg, spread, score.examples, exact=training.is_exact, unit=options.unit),
                        on_stability(_stability(run.pairs[i])),
                        on_maps(patches),
                    )
                ),
            }
        )
    return _as_json("images", shown_images, gallery.rows, chapters)


def _counts(counts: Iterable[int]) -> str:
    """Format the range of the numbers of x-features, which differ where fits merged small groups."""
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _as_json(
    kind: str, shown: Sequence[Any], rows: Sequence[Sequence[Any]], chapters: Sequence[Mapping[str, Any]]
) -> Any:
    """Convert the content of a page as the cache does, so that pages with and without a cache are the same."""
    targets = [
        {**{name: chapter[name] for name in ("key", "label", "decimals", "classes")}, "rows": of}
        for chapter, of in zip(chapters, rows, strict=True)
    ]
    return json.loads(json.dumps({"kind": kind, "images": shown, "targets": targets, "chapters": chapters}))


def _computed_rows(xnn: XNNAttribution, inputs: Any, targets: Sequence[Target], options: ReportOptions) -> Any:
    """Compute the content of a page about texts or a table."""
    run = CellsRun(xnn, targets, options)
    run.explain(inputs)
    captioned = run.captioned(options.captions)
    chapters = []
    for rows, t in zip(run.found, targets, strict=True):
        score, spread = rows.faithfulness.compute(), rows.faithfulness.spread()
        training, patches = xnn.explainer(t), run.patch_scores(rows)
        cards, unusual = rows.cards(), mark_usual(rows.rows, torch.cat(rows.own))
        reasons = (
            on_unexplained(score.f_reg, spread, score.examples, exact=training.is_exact, unit=options.unit),
            on_stability(_stability(rows.pairs)),
            on_maps(patches, kind=run.kind),
        )
        chapters.append(
            {
                "key": str(t),
                "label": run.names.of(t),
                "score": {**score._asdict(), "spread": spread},
                "training": _training(training),
                "cards": cards,
                "scatter": _scatter(rows.rows, captioned),
                "mean_outputs": _mean_outputs(rows.rows),
                "unusual": None if unusual is None else _fields(unusual),
                "decimals": decimals(rows.rows),
                "classes": rows.classes,
                "patches": None if patches is None else _fields(patches),
                "verdict": _fields(verdict(*reasons)),
            }
        )
    return _as_json(run.kind, captioned, [rows.rows for rows in run.found], chapters)


def _stability(pairs: Sequence[tuple[Tensor, Tensor]]) -> Stability | None:
    """Compare the contributions of two fits, batch by batch; return None without a second fit."""
    if sum(len(first) for first, _ in pairs) < 2:
        return None
    return stability(*(torch.cat(some) for some in zip(*pairs, strict=True)))


def _training(explainer: Any) -> dict[str, Any]:
    """Return the facts of an explainer's fit that the page shows."""
    return {name: getattr(explainer, name) for name in ("is_exact", "f_reg", "examples", "positives", "floor")}


def _fields(value: Any) -> Any:
    """Convert named tuples to dicts."""
    if hasattr(value, "_asdict"):
        return {name: _fields(field) for name, field in value._asdict().items()}
    return [_fields(each) for each in value] if isinstance(value, tuple) else value


class _Run:
    """Explains the images of a report, and the data of its cards, in one pass over each."""

    def __init__(self, xnn: XNNAttribution, images: Any, targets: Sequence[Target], options: ReportOptions) -> None:
        self.xnn, self.images, self.targets, self.options = xnn, images, targets, options
        names = OutputNames.of_targets(options.class_names, xnn, targets)
        display = options.display or displayable
        self.gallery = Gallery(targets, names, display, options.patches)
        places = options.places or (annotated_places(len(options.place_names)) if options.place_names else None)
        self.streams = [CardStream(xnn, t, _KEEP, places, options.internal_batch_size, largest=_CROP) for t in targets]
        self.pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in targets]

    def explain(self) -> None:
        """Explain all images and data."""
        own = self.options.data is None or self.options.data is self.images
        for batch, images, rows in self._parts(self.images, "explaining images"):
            self._explain(batch, images, rows, own)
        if not own:
            for batch, images, rows in self._parts(self.options.data, "reading the data"):
                y_hat = outputs_of(self.xnn, images)
                for stream in self.streams:
                    stream.update(batch, images, y_hat, rows=rows)

    def _parts(self, data: Any, what: str) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield batches with a few of their images and the rows of these, and advance the progress bar."""
        size = self.options.internal_batch_size
        few = _AT_ONCE if size is None else min(size, _AT_ONCE)
        with tqdm(
            total=count_examples(data), desc=what, unit="image", disable=not self.options.progress, leave=False
        ) as bar:
            for batch, images in image_batches(self.xnn, data):
                for rows in torch.split(torch.arange(len(images)), few):
                    yield batch, images[rows], rows
                    bar.update(len(rows))

    def _explain(self, batch: Any, images: Tensor, rows: Tensor, own: bool) -> None:
        """Explain a few images. Add them to the cards if the report has no other data."""
        xnn, size = self.xnn, self.options.internal_batch_size
        y_hat = None
        for i, t in enumerate(self.targets):
            # No more images come at once than maps are drawn of, so the outputs are those of all of them.
            why, read = xnn._explain_and_read(images, t, internal_batch_size=size)
            if y_hat is None:
                y_hat = read
                self.gallery.add(images, y_hat)
            self.gallery.explain(i, images, why, xnn.one_heatmap(images, target=t, internal_batch_size=size))
            if self.options.against not in (None, t):
                against = self.options.against
                other = xnn.explain(images, t, against=against, internal_batch_size=size)
                one = xnn.one_heatmap(images, t, against=against, internal_batch_size=size)
                label = self.gallery.names.of(Difference(t, against))  # type: ignore[arg-type]
                made = rows_of_images(other, one, [True] * len(images))
                compare(self.gallery.rows[i][-len(images) :], made, label)
            if own:
                self.streams[i].update(batch, images, y_hat, why, rows=rows)
            if self.options.again is not None:
                again = self.options.again.contributions(images, t, internal_batch_size=size)
                self.pairs[i].append((why.contributions.cpu(), again.contributions.cpu()))

    def patch_scores(self, target: Target) -> PatchScores | None:
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


def _check_rereadable(data: Any, noun: str) -> None:
    """Raise if the data can be read only once, because a report reads them several times."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"a report reads its {noun} several times, but a {type(data).__name__} can be read only once; pass a "
            "tensor, a list of batches or a DataLoader"
        )


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


def _mean_outputs(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Compute the mean outputs for positives and for other images; None if either group is empty."""
    own, others = ([row["says"] for row in rows if row["own"] is wanted] for wanted in (True, False))
    return (sum(own) / len(own), sum(others) / len(others)) if own and others else None


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
    absent = _ABSENT if classes else _LEAST
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
    heat = scaled(example.heat[None], torch.tensor([example.contribution]))[0]
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
        "unusual": example.usual is not None and example.usual < UNUSUAL,
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


def _scatter(rows: Sequence[Mapping[str, Any]], images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay out dots of residuals against predictions, and ticks, in the coordinates of a 480 x 240 drawing."""
    left, right, top, bottom = 52.0, 468.0, 12.0, 200.0
    x, y = [row["says"] for row in rows], [row["says"] - row["sum"] for row in rows]
    # Errors below a percent of the outputs' range look small, as they are.
    reach = max(*(abs(v) for v in y), _FINE * (max(x) - min(x)), 1e-9)
    x_ticks, y_ticks = _ticks(min(x), max(x), 6), _ticks(-reach, reach, 5)
    low, high = min(x_ticks[0], *x), max(x_ticks[-1], *x)
    size = max(-y_ticks[0], y_ticks[-1], reach)

    def across(v: float) -> float:
        return float(round(left + (right - left) * (v - low) / (high - low), 1))

    def up(v: float) -> float:
        return float(round((top + bottom) / 2 - (bottom - top) / 2 * v / size, 1))

    step = -(-len(rows) // _DOTS)
    return {
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "x": [(across(v), f"{v:g}".replace("-", "\N{MINUS SIGN}")) for v in x_ticks],
        "y": [(up(v), f"{v:g}".replace("-", "\N{MINUS SIGN}")) for v in y_ticks],
        "dots": [(across(x[i]), up(y[i]), rows[i]["own"], images[i]["caption"], y[i]) for i in range(0, len(x), step)],
        "left_out": step > 1,
    }


def _ticks(low: float, high: float, bins: int) -> list[float]:
    """Return round numbers that cover a range."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return [float(v) for v in MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _check_jinja2() -> None:
    """Raise before minutes of work if jinja2 is missing and the page could not be written."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a report needs jinja2, which is not installed; run `pip install captum-xnn[report]`"
        ) from error


def _render(parts: str, **content: Any) -> str:
    """Render the whole page, with the script that draws its examples."""
    import jinja2
    from markupsafe import Markup

    folder = resources.files("captum_xnn.report") / "templates"
    page, style, *scripts = (
        (folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.css", "report.js", parts)
    )
    script = "".join(scripts)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["paragraphs"] = _paragraphs
    environment.filters["signed"] = _signed
    environment.filters["error"] = error
    return environment.from_string(page).render(
        marks=_MARKS,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_checksum(style)}'; script-src '{_checksum(script)}'; "
        "base-uri 'none'; form-action 'none'",
        **content,
    )


def _checksum(text: str) -> str:
    """Compute the source expression that allows exactly this text in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _signed(value: float, decimals: int = 2) -> str:
    """Format a number with its sign, using the typographic minus; a number that rounds to zero has no sign."""
    text = f"{value:+.{decimals}f}"
    return (text if float(text) else text[1:]).replace("-", "\N{MINUS SIGN}")


def _paragraphs(text: str) -> Iterable[str]:
    """Split a text into paragraphs at empty lines."""
    return [part.strip() for part in "\n".join(map(str.strip, text.splitlines())).split("\n\n") if part.strip()]
