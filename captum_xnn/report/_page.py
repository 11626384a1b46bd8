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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_xnn._files import replace_file
from captum_xnn.activations._batches import as_batches
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._targets import Difference, Target, one_target, single_target, targets_by_explainer
from captum_xnn.plots._names import names_by_target, resolve_names
from captum_xnn.report._cache import ReportCache, describe, identity
from captum_xnn.report._chapters import chapter
from captum_xnn.report._dataset_options import completed
from captum_xnn.report._image_cards import ImagesRun
from captum_xnn.report._inputs import are_images
from captum_xnn.report._options import ReportOptions
from captum_xnn.report._text_and_table_cards import CellsRun
from captum_xnn.report._verdict import format_error, two_digits

if TYPE_CHECKING:  # XNNAttribution.report calls this module
    from captum_xnn.attribution import XNNAttribution

__all__ = ["write_report"]

_log = logging.getLogger(__name__)
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
            names are of another layer, the names of classes do not fit the model's outputs, ``against`` is the only
            target, or the model gives the class to none of the data.
        TypeError: If ``names`` is neither a file nor a mapping from targets.

    Example:
        >>> import tempfile
        >>> import torch
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
    file = _html_file(path)
    if options.again is not None and not hasattr(options.again, "contributions"):
        raise TypeError(
            f"again is {options.again!r}, not a fitted XNNAttribution; fit a second one, on other data or with another "
            "seed, and pass it, or load it by XNNAttribution.load(folder, model)"
        )
    layer = find_layer(unwrap(xnn.model), xnn.layer)[0]
    targets = [t for (t,) in targets_by_explainer(target, joint=False)]
    if len(targets) == 1:
        one_target(targets[0], options.against)  # an output against itself is an error; among others it is left out
    against = single_target(options.against)
    assert not isinstance(against, Difference)  # only one_target makes those
    options = replace(options, against=against)
    all_names = names_by_target(options.names, layer, targets)
    names = [resolve_names(all_names.get(str(t), {}), xnn.explainer(t).form.n_features) for t in targets]
    _check_rereadable(images, "images")
    _check_rereadable(options.data, "data")
    content = _content(xnn, images, targets, completed(xnn, images, options))
    chapters = [{**chapter, "names": own} for chapter, own in zip(content["chapters"], names, strict=True)]
    data = {
        "id": identity(xnn, targets),
        "kind": content["kind"],
        "layer": layer,
        "names": all_names,
        "images": content["images"],
        "targets": content["targets"],
        "means": content["means"],
        "unit": options.unit,
    }
    text = _html(chapters, data, type(unwrap(xnn.model)).__name__, options)
    file.parent.mkdir(parents=True, exist_ok=True)
    # File names may hold bytes that are not valid text.
    replace_file(file, text.encode(errors="replace"))
    return file


def _html(chapters: Sequence[Mapping[str, Any]], data: Mapping[str, Any], model: str, options: ReportOptions) -> str:
    """Render the whole page.

    Args:
        chapters: Chapter of each target, with the names of its x-features.
        data: Data of the page's script.
        model: Name of the model's class.
        options: Title, notes and unit.
    """
    return _render(
        "gallery.js" if data["kind"] == "images" else "rows.js",
        kind=data["kind"],
        title=f"{model} explained at {data['layer']}" if options.title is None else options.title,
        model=model,
        layer=data["layer"],
        features=_counts(len(chapter["cards"]) for chapter in chapters),
        unit=options.unit,
        chapters=chapters,
        notes=options.notes,
        images=len(data["images"]),
        adds_up=all("parts" in row for target in data["targets"] for row in target["rows"]),
        page=data,
    )


def _html_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of a report, which ends in .html, as browsers open a page by the end of its name."""
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"the report cannot be written to {str(path)!r}, a folder; add a name such as report.html")
    return file if file.suffix.lower() in (".html", ".htm") else file.with_name(f"{file.name}.html")


def _content(xnn: XNNAttribution, images: Any, targets: Sequence[Target], options: ReportOptions) -> Any:
    """Compute all of the page that does not depend on names, title and notes, or read it from the cache."""
    if options.cache is None:
        return _computed(xnn, images, targets, options)
    description = describe(xnn, images, targets, options)
    if description is None:
        _log.warning("the report is not kept in %s: a function in it cannot be compared", options.cache)
        return _computed(xnn, images, targets, options)
    cache = ReportCache(options.cache)
    content = cache.read(description)
    if content is None:
        content = _computed(xnn, images, targets, options)
        cache.write(description, content)
    return content


def _computed(xnn: XNNAttribution, inputs: Any, targets: Sequence[Target], options: ReportOptions) -> Any:
    """Compute the examples of the page, and rows and chapter of each target, as JSON holds them."""
    run = (ImagesRun if are_images(xnn, inputs) else CellsRun)(xnn, inputs, targets, options)
    run.explain()
    shown = run.captioned()
    contents = list(run.contents())
    chapters = [chapter(of, shown, xnn.explainer(of.target), kind=run.kind, unit=options.unit) for of in contents]
    means = run.means() if isinstance(run, CellsRun) else None
    return _as_json(run.kind, shown, [of.rows for of in contents], chapters, means)


def _counts(counts: Iterable[int]) -> str:
    """Format the range of the numbers of x-features, which differ where fits merged small groups."""
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _as_json(
    kind: str,
    shown: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    chapters: Sequence[Mapping[str, Any]],
    means: Sequence[float] | None,
) -> Any:
    """Convert the content of a page as the cache does, so that pages with and without a cache are the same."""
    targets = [
        {**{name: chapter[name] for name in ("key", "label", "decimals", "classes")}, "rows": of}
        for chapter, of in zip(chapters, rows, strict=True)
    ]
    content = {"kind": kind, "images": shown, "targets": targets, "chapters": chapters, "means": means}
    return json.loads(json.dumps(content))


def _check_rereadable(data: Any, noun: str) -> None:
    """Raise if the data can be read only once, because a report reads them several times."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"a report reads its {noun} several times, but a {type(data).__name__} can be read only once; pass a "
            "tensor, a list of batches or a DataLoader"
        )


def _check_jinja2() -> None:
    """Raise before minutes of work if jinja2 is missing and the page could not be written."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a report needs jinja2, which is not installed; run `pip install captum-xnn[report]`"
        ) from error


def _render(script_file: str, **content: Any) -> str:
    """Render the whole page, with the script that draws its examples."""
    import jinja2
    from markupsafe import Markup

    folder = resources.files("captum_xnn.report") / "templates"
    page, style, *scripts = (
        (folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.css", "report.js", script_file)
    )
    script = "".join(scripts)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["paragraphs"] = _paragraphs
    environment.filters["signed"] = _signed
    environment.filters["format_error"] = format_error
    environment.filters["two_digits"] = two_digits
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
