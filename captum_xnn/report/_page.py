"""Report page: one self-contained HTML file that explains a model with concept cards and a gallery of images.

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
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from tqdm import tqdm

from captum_xnn._serialization import replace_file
from captum_xnn._targets import Target, predicted_classes, target_groups
from captum_xnn.activations import collect
from captum_xnn.attribution import Faithfulness, XNNAttribution
from captum_xnn.errors import NamesFileError
from captum_xnn.explanation import Explanation
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._pixels import channels_first
from captum_xnn.patch_scores import PatchScores, patch_scores
from captum_xnn.plots._explanation import own_scale
from captum_xnn.plots._names import Names, by_number, read_names, resolve_names
from captum_xnn.report._cards import ConceptCard, Example, PlacesOfMaps, concept_cards, image_batches
from captum_xnn.report._thumbnails import displayable, overlay, photo

__all__ = ["write_report"]

ClassNames = Mapping[int, str] | Sequence[str]

_CROP = 112
_ABSENT = "absent though the class is there"
_LEAST = "contributes least"
_CORRELATES = 3
_PLACES = 6
_DOTS = 400


def write_report(
    path: str | os.PathLike[str],
    xnn: XNNAttribution,
    images: Any,
    target: Any = None,
    *,
    data: Any = None,
    captions: Sequence[str] | None = None,
    data_captions: Sequence[str] | None = None,
    class_names: ClassNames | None = None,
    names: str | os.PathLike[str] | Mapping[Any, Names] | None = None,
    title: str | None = None,
    notes: Sequence[tuple[str, str]] = (),
    places: PlacesOfMaps | None = None,
    place_names: Sequence[str] = (),
    display: Callable[[Tensor], Tensor] = displayable,
    patches: int = 0,
    internal_batch_size: int | None = None,
    progress: bool = False,
) -> Path:
    """Write a report as one self-contained HTML file, and return its path.

    The new file overwrites an older one only once it is complete. Missing folders are created.

    Args:
        path: Path of the HTML file.
        xnn: Explanation of a model that takes one tensor of images, fitted for the targets.
        images: Images of the gallery, (N, C, H, W) or an iterable of batches, as ``xnn.fit`` takes them.
        target: The explained output, or a list of outputs. Each gets cards and a gallery of the same images.
        data: Data set for faithfulness and cards, as ``xnn.fit`` takes it; ``images`` if None.
        captions: Caption of each image, such as its file name.
        data_captions: Caption of each image of ``data``, for the cards. If ``data`` is None, ``captions`` are used.
        class_names: Names of the model's outputs: a list in order, or a mapping by number.
        names: Names of x-features: a file that a report exported or :func:`captum_xnn.plots.write_names` wrote,
            or a mapping from targets to names.
        title: Heading of the page and its title in the browser.
        notes: Extra sections, each a heading and plain text. Empty lines separate paragraphs.
        places: Function that computes the share of maps on annotated parts or objects; see
            :func:`captum_xnn.report.concept_cards`.
        place_names: Names of these parts or objects, in order.
        display: Function that turns an image (C, H, W), as the model takes it, into an image in [0, 1], for example
            by undoing the normalisation.
        patches: Number of positives to cover patch by patch, for the measures of
            :func:`captum_xnn.patch_scores.patch_scores`. Each image takes 16 explanations.
        internal_batch_size: Number of maps computed at once; smaller values need less memory.
        progress: Whether to show progress bars.

    Raises:
        ImportError: If jinja2 or pillow is missing.
        NotFittedError: If a target was not fitted.
        ValueError: If the path is a folder, the inputs are not images, there is not one caption for each image, the
            names are of another layer, or the model gives the class to none of the data.
        TypeError: If ``names`` is neither a file nor a mapping from targets.

    Example:
        >>> import tempfile
        >>> from captum.attr import InputXGradient
        >>> from torch import nn
        >>> from captum_xnn import Recipe
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
        >>> images = torch.rand(60, 1, 8, 8)
        >>> target = int(model(images).argmax(1).mode().values)
        >>> xnn = XNNAttribution(model, "1", n_features=2, heatmap=InputXGradient, recipe=Recipe(steps=20))
        >>> xnn = xnn.fit(images, target, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_report(f"{folder}/why.html", xnn, images[:5], target, title="Why?")
        ...     path.name, "<h1>Why?</h1>" in path.read_text(encoding="utf-8")
        ('why.html', True)
    """
    _check_jinja2()
    if Path(path).is_dir():
        raise ValueError(f"the report cannot be written to {str(path)!r}, a folder; add a name such as report.html")
    layer = find_layer(unwrap(xnn.model), xnn.layer)[0]
    targets = [t for group in target_groups(target, joint=False) for t in group]
    known = _read_names(names, layer, targets)
    labels = [resolve_names(known.get(str(t), {}), xnn.n_features) for t in targets]
    if data is None:
        data, data_captions = images, captions if data_captions is None else data_captions
    _check_rereadable(images, "images")
    _check_rereadable(data, "data")
    gallery = _Gallery(xnn, targets, _ClassNames(class_names), display, patches, internal_batch_size)
    for _, batch in tqdm(image_batches(xnn, images), "gallery", disable=not progress, leave=False):
        gallery.update(batch)
    shown = gallery.images(captions)
    chapters = []
    for t, rows, called in zip(targets, gallery.rows, labels, strict=True):
        cards = concept_cards(xnn, data, t, places=places, internal_batch_size=internal_batch_size, progress=progress)
        caption = _caption_of(data_captions, cards[0].examples, shown=data is images)
        chapters.append(
            _Chapter(
                key=str(t),
                label=gallery.class_names.of(t),
                score=xnn.score(data, t),
                training=xnn.explainer(t),
                cards=[_card(card, gallery.class_names, place_names, display, caption) for card in cards],
                scatter=_scatter(rows, shown),
                mean_outputs=_mean_outputs(rows),
                names=called,
                decimals=_decimals(rows),
                classes=gallery.classes and isinstance(t, int),
                patches=gallery.patch_scores(t),
            )
        )
    model = type(unwrap(xnn.model)).__name__
    page = {
        "layer": layer,
        "features": xnn.n_features,
        "names": known,
        "images": shown,
        "targets": [
            {"key": c.key, "label": c.label, "decimals": c.decimals, "classes": c.classes, "rows": rows}
            for c, rows in zip(chapters, gallery.rows, strict=True)
        ],
    }
    text = _render(
        title=f"{model} explained at {layer}" if title is None else title,
        model=model,
        layer=layer,
        features=xnn.n_features,
        chapters=chapters,
        notes=notes,
        images=len(shown),
        page=page,
    )
    written = Path(path)
    written.parent.mkdir(parents=True, exist_ok=True)
    # File names may hold bytes that are not valid text.
    replace_file(written, text.encode(errors="replace"))
    return written


def _check_rereadable(data: Any, noun: str) -> None:
    """Raise if the data can be read only once, because a report reads them several times."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"a report reads its {noun} several times, but a {type(data).__name__} can be read only once; pass a "
            "tensor, a list of batches or a DataLoader"
        )


def _read_names(
    names: str | os.PathLike[str] | Mapping[Any, Names] | None, layer: str, targets: Sequence[Target]
) -> dict[str, dict[int, str]]:
    """Read names by target and x-feature, from a mapping or from a file that a report on this layer exported."""
    if names is None:
        return {}
    if isinstance(names, Mapping):
        known = {str(target): by_number(given, target, layer) for target, given in names.items()}
    elif isinstance(names, (str, os.PathLike)):
        file = read_names(names)
        if file.layer != layer:
            raise NamesFileError(
                f"the names are of x-features of layer {file.layer!r}, but the explained layer is {layer!r}; pass the "
                "file that a report on this explainer exported"
            )
        known = file.names
    else:
        raise TypeError(
            f"a report takes names of x-features by target, got a {type(names).__name__}; "
            f"write {{{targets[0]}: ['golden feather']}}, or pass the file that a report exported"
        )
    # For a model with one output, target None and target 0 are the same.
    for key, same in (("None", "0"), ("0", "None")):
        if key in map(str, targets) and key not in known and same in known:
            known[key] = known.pop(same)
    return known


def _caption_of(captions: Sequence[str] | None, examples: int, *, shown: bool) -> Callable[[int], str]:
    """Return a function from the row of an image in the data to its caption."""
    if captions is None:
        # If the gallery shows other images than the data, its numbers mean other images.
        of = "" if shown else " of the data"
        return lambda number: f"image {number + 1}{of}"
    if isinstance(captions, str) or len(captions) != examples:
        raise ValueError(
            f"got {len(captions)} data_captions for {examples} images of the data; pass one for each image, such as "
            "its file name, or none at all"
        )
    return lambda number: str(captions[number])


class _ClassNames:
    """Names of the model's outputs."""

    def __init__(self, names: ClassNames | None) -> None:
        self.names = {} if names is None else dict(names if isinstance(names, Mapping) else enumerate(names))

    def of(self, target: Target) -> str:
        """Return the name of an output, or its number if it has no name."""
        if target is None:
            return "the output"
        return str(self.names[target]) if target in self.names else f"class {target}"


class _Gallery:
    """Collects the page's data of each image, batch by batch, without keeping the tensors."""

    def __init__(
        self,
        xnn: XNNAttribution,
        targets: Sequence[Target],
        class_names: _ClassNames,
        display: Callable[[Tensor], Tensor],
        patches: int,
        internal_batch_size: int | None,
    ) -> None:
        self.xnn, self.targets, self.class_names, self.display = xnn, targets, class_names, display
        self.patches, self.internal_batch_size = patches, internal_batch_size
        self.covered: dict[Target, Tensor] = {t: torch.empty(0) for t in targets}
        self.photos: list[dict[str, Any]] = []
        self.rows: list[list[dict[str, Any]]] = [[] for _ in targets]
        self.classes = False

    def update(self, images: Tensor) -> None:
        """Add images (N, C, H, W)."""
        xnn = self.xnn
        y_hat = collect(
            xnn.model,
            xnn.layer,
            images,
            output_transform=xnn.output_transform,
            prediction_transform=xnn.prediction_transform,
        ).y_hat[:]
        predicted = predicted_classes(y_hat)
        self.classes = classes = predicted is not None
        given = [None] * len(y_hat) if predicted is None else predicted.tolist()
        for image, c in zip(images, given, strict=True):
            says = self.class_names.of(c) if classes else ""
            height, width = image.shape[1:]
            self.photos.append(
                {"src": photo(_shown(self.display, image)), "says": says, "width": width, "height": height}
            )
        for target, rows in zip(self.targets, self.rows, strict=True):
            why = xnn.explain(images, target=target, internal_batch_size=self.internal_batch_size)
            one = xnn.one_heatmap(images, target=target, internal_batch_size=self.internal_batch_size)
            own = [not classes or not isinstance(target, int) or c == target for c in given]
            rows.extend(_rows(why, one, own))
            held = self.covered[target]
            more = images[own][: self.patches - len(held)]
            self.covered[target] = torch.cat([held.to(more), more]) if len(held) else more

    def patch_scores(self, target: Target) -> PatchScores | None:
        """Compute the patch measures on the first positives of a target; return None if there are no positives."""
        images = self.covered[target]
        if not len(images):
            return None
        return patch_scores(self.xnn, images, target, internal_batch_size=self.internal_batch_size or 64)

    def images(self, captions: Sequence[str] | None) -> list[dict[str, Any]]:
        """Return all images with their captions."""
        n = len(self.photos)
        if captions is None:
            captions = [f"image {i + 1}" for i in range(n)]
        if not n or isinstance(captions, str) or len(captions) != n:
            raise ValueError(
                f"got {n} images and {len(captions)} captions; pass at least one image, and one caption for each "
                "(such as its file name) or none at all"
            )
        return [{**shown, "caption": str(caption)} for shown, caption in zip(self.photos, captions, strict=True)]


def _shown(display: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Apply the user's display function to an image, and check the result."""
    return displayable(display(image.detach().cpu()))


def _rows(why: Explanation, one: Tensor, own: Sequence[bool]) -> Iterator[dict[str, Any]]:
    """Yield the numbers and maps of each image for one target."""
    assert isinstance(why.inputs, Tensor)  # because images are a single tensor
    heat, single = (channels_first(m, why.inputs).sum(2).cpu() for m in (why.directed_maps(), one.detach()))
    for i, given in enumerate(own):
        contributions = why.contributions[i].detach().double().cpu()
        maps = _scaled(heat[i], contributions)
        yield {
            "c": [_short(v) for v in contributions.tolist()],
            "e": [_short(v) for v in why.features[i].tolist()],
            "bias": _short(float(why.bias[i])),
            "sum": _short(float(why.surrogate[i])),
            "says": _short(float(why.prediction[i])),
            "own": given,
            "maps": [overlay(m) for m in maps],
            "one": overlay(_scaled(single[i], torch.ones(1))[0]),
            "strength": [round(s, 3) for s in _strengths(maps, contributions)],
        }


def _scaled(maps: Tensor, contributions: Tensor) -> Tensor:
    """Scale each of the maps (K, H, W) to [-1, 1] by itself, multiplied by the sign of its contribution."""
    return torch.from_numpy(own_scale(maps, contributions)).float()


def _strengths(maps: Tensor, contributions: Tensor) -> list[float]:
    """Compute the strength of each map on a shared scale, in [0, 1]: its contribution spread over its pixels."""
    mass = maps.double().abs().sum((1, 2))
    density = torch.where(mass > 0, contributions.abs() / torch.where(mass > 0, mass, 1), 0)
    largest = density.max()
    return (density / largest).tolist() if largest > 0 else density.tolist()


def _short(value: float) -> float:
    """Round a number to six significant digits, to keep the page small."""
    return float(f"{value:.6g}")


def _decimals(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of decimals that shows three digits of the largest contribution or output."""
    largest = max(abs(v) for row in rows for v in (*row["c"], row["says"]))
    return int(min(max(2 - np.floor(np.log10(largest)), 1), 6)) if largest > 0 else 1


@dataclass(frozen=True)
class _Chapter:
    """The page's content about one target."""

    key: str
    label: str
    score: Faithfulness
    training: Any
    cards: Sequence[Mapping[str, Any]]
    scatter: Mapping[str, Any]
    mean_outputs: tuple[float, float] | None
    names: Sequence[str]
    decimals: int
    classes: bool
    """Whether the target is a class, so that the model gives it to some images and not to others."""
    patches: PatchScores | None


def _mean_outputs(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Compute the mean outputs for positives and for other images; None if either group is empty."""
    own, others = ([row["says"] for row in rows if row["own"] is wanted] for wanted in (True, False))
    return (sum(own) / len(own), sum(others) / len(others)) if own and others else None


def _card(
    card: ConceptCard,
    class_names: _ClassNames,
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
    class_names: _ClassNames,
    display: Callable[[Tensor], Tensor],
    caption: Callable[[int], str],
    *,
    whole: bool,
) -> dict[str, Any]:
    """Crop an image and its map around the map's mass, or keep them whole so the reader sees what is absent."""
    image = _shown(display, example.image)
    height, width = image.shape[1:]
    x0, y0, x1, y1 = (0, 0, width, height) if whole else example.crop
    heat = _scaled(example.heat[None], torch.tensor([example.contribution]))[0]
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
    # on_parts adds the context as the last place. Data sets of parts have no name for it.
    called = [*names, "context"] if len(names) == len(places) - 1 else list(names)
    called += [f"place {p + 1}" for p in range(len(called), len(places))]
    order = places.argsort(descending=True, stable=True).tolist()[:_PLACES]
    return [(called[p], float(places[p])) for p in order if float(places[p]) > 0]


def _scatter(rows: Sequence[Mapping[str, Any]], images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay out dots of residuals against predictions, and ticks, in the coordinates of a 480 x 240 drawing."""
    left, right, top, bottom = 52.0, 468.0, 12.0, 200.0
    x, y = [row["says"] for row in rows], [row["says"] - row["sum"] for row in rows]
    reach = max(*(abs(v) for v in y), 1e-9)
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
            "write_report needs jinja2, which is not installed; run `pip install captum-xnn[report]`"
        ) from error


def _render(**content: Any) -> str:
    """Render the whole page."""
    import jinja2
    from markupsafe import Markup

    folder = resources.files("captum_xnn.report") / "templates"
    page, style, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.css", "report.js")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["paragraphs"] = _paragraphs
    environment.filters["signed"] = _signed
    return environment.from_string(page).render(
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
