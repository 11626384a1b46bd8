"""Cache of reports: the computed part of a page, so that names, notes or a title are changed in seconds.

An entry is a folder with ``manifest.json`` and ``content.json``. The manifest describes all that the content depends
on: the model and its outputs on the first inputs, the explainers, the backend, the inputs and the data with their
appearance, and the options. Entries are found by the checksum of this description. After a change of an input,
a weight or an option, the content is computed anew. If a part cannot be described, such as a function, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from captum_xnn._files import read_json, replace_file
from captum_xnn.layers._fingerprint import checksum, fingerprint
from captum_xnn.layers._logits import LOGITS_OF
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._targets import Target
from captum_xnn.report._cards import count_examples, image_batches
from captum_xnn.report._inputs import are_images, displayed, model_outputs, row_batches, texts_of
from captum_xnn.report._thumbnails import displayable, shown

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.attribution import XNNAttribution
    from captum_xnn.report._options import ReportOptions

__all__ = ["VAGUE", "ReportCache", "describe", "identity"]

_MANIFEST, _CONTENT = "manifest.json", "content.json"
# Entries that are kept; the oldest are deleted.
_MOST = 4
_FORMAT = 11
# Settings of a backend whose text does not show all of them.
VAGUE = r" at 0x|<lambda>|tensor\(|\.\.\."

_log = logging.getLogger(__name__)


class ReportCache:
    """Entries in one folder.

    Args:
        folder: The folder; made when the first entry is written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def read(self, description: Mapping[str, Any]) -> Any:
        """Return the content of an entry; None if there is none or it is damaged.

        Args:
            description: What the content depends on, from :func:`describe`.
        """
        folder = self.folder / _key(description)
        try:
            if read_json(folder / _MANIFEST, ValueError, "") != _plain(description):
                return None
            content = read_json(folder / _CONTENT, ValueError, "")
            os.utime(folder / _MANIFEST)
        except (OSError, ValueError):
            return None
        return (
            content if isinstance(content, dict) and {"kind", "images", "targets", "chapters"} <= set(content) else None
        )

    def write(self, description: Mapping[str, Any], content: Any) -> None:
        """Write an entry, and delete the oldest ones. A folder that cannot be written to is a warning only.

        Args:
            description: What the content depends on.
            content: Anything that JSON can hold.
        """
        folder = self.folder / _key(description)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / _CONTENT, json.dumps(content).encode(errors="replace"))
            replace_file(folder / _MANIFEST, json.dumps(description, indent=1).encode(errors="replace"))
            manifests = sorted(self.folder.glob(f"*/{_MANIFEST}"), key=lambda file: -file.stat().st_mtime_ns)
            for old in manifests[_MOST:]:
                if re.fullmatch("[0-9a-f]{16}", old.parent.name):
                    shutil.rmtree(old.parent, ignore_errors=True)
        except OSError as error:
            _log.warning("the report is not kept in %s (%s): the next one is computed anew", self.folder, error)


def identity(xnn: XNNAttribution, targets: Sequence[Target]) -> str:
    """Compute a checksum of the explainers of some targets, 16 hexadecimal digits.

    Args:
        xnn: The explainers.
        targets: Fitted targets.
    """
    layer = find_layer(unwrap(xnn.model), xnn.layer)[0]
    weights = [
        (str(t), name, checksum(tensor))
        for t in targets
        for name, tensor in xnn.explainer(t).form.state_dict().items()
        if isinstance(tensor, Tensor)
    ]
    return _digest(layer, weights)


def describe(
    xnn: XNNAttribution, inputs: Any, targets: Sequence[Target], options: ReportOptions
) -> dict[str, Any] | None:
    """Describe all that the computed part of a report depends on; return None if a part cannot be described.

    Args:
        xnn: The explainers.
        inputs: Inputs of the report.
        targets: Explained outputs.
        options: Options of the report.
    """
    backend = repr(xnn.heatmap)
    # Those of the command line have names.
    probabilities = next((name for name, made in LOGITS_OF.items() if made is xnn.prediction_transform), None)
    functions = (options.places, xnn.output_transform, None if probabilities else xnn.prediction_transform)
    # Checksums leave out annotations.
    if options.place_names or any(f is not None for f in functions) or re.search(VAGUE, backend):
        return None
    model = unwrap(xnn.model)
    layer = find_layer(model, xnn.layer)[0]
    of = fingerprint(model, layer)
    own = options.data is None or options.data is inputs
    names = options.class_names
    return {
        "format": _FORMAT,
        "version": _version(),
        "model": {
            "class": of["model_class"],
            "functions": of["functions"],
            "tensors": _digest(sorted(of["tensors"].items())),
        },
        "layer": layer,
        "explainers": identity(xnn, targets),
        "heatmap": backend,
        "probabilities": probabilities,
        "targets": [str(t) for t in targets],
        "inputs": _contents(xnn, inputs, options),
        "data": None if own else _contents(xnn, options.data, replace(options, tokens=None)),
        "again": None if options.again is None else identity(options.again, targets),
        "options": {
            "captions": None if options.captions is None else [str(caption) for caption in options.captions],
            "data_captions": None if options.data_captions is None else [str(c) for c in options.data_captions],
            "class_names": sorted(map(list, names.items())) if isinstance(names, Mapping) else names and list(names),
            "against": None if options.against is None else str(options.against),
            "patches": options.patches,
            "unit": options.unit,
            "fill": options.fill.tolist() if isinstance(options.fill, Tensor) else options.fill,
            "internal_batch_size": options.internal_batch_size,
        },
    }


def _contents(xnn: XNNAttribution, data: Any, options: ReportOptions) -> str:
    """Compute a checksum of all inputs, of their appearance, and of the model's outputs for the first two."""
    digest = hashlib.blake2b(digest_size=8)
    if not are_images(xnn, data):
        return _rows(xnn, data, options, digest)
    display = options.display or displayable
    total, first = count_examples(data), True
    with tqdm(total=total, desc="comparing", unit="image", disable=not options.progress, leave=False) as bar:
        for _, images in image_batches(xnn, data):
            if first:
                digest.update(checksum(model_outputs(xnn, images[:2])).encode())
            first = False
            for image in images:
                digest.update(f"{tuple(image.shape)} {image.dtype} {checksum(image)}".encode())
                digest.update(checksum(shown(display, image)).encode())
            bar.update(len(images))
    return digest.hexdigest()


def _rows(xnn: XNNAttribution, data: Any, options: ReportOptions, digest: Any) -> str:
    """Add all texts or rows of a table, with the words of their cells, to a checksum."""
    first = 0
    for batch in row_batches(xnn, data):
        if not first:
            digest.update(checksum(model_outputs(xnn, *batch.arguments)[:2]).encode())
        for part in batch.arguments:
            text = f"{tuple(part.shape)} {part.dtype} {checksum(part)}" if isinstance(part, Tensor) else repr(part)
            digest.update(text.encode(errors="replace"))
        digest.update(repr(texts_of(batch, first, options.tokens, options.input_names)).encode(errors="replace"))
        if options.display is not None and options.tokens is None and batch.first.dim() == 2:
            digest.update(checksum(displayed(batch.first, options.display)).encode())
        first += len(batch.first)
    return str(digest.hexdigest())


def _version() -> str:
    try:
        return metadata.version("captum-xnn")
    except metadata.PackageNotFoundError:  # a copy of the sources that was not installed
        return "unknown"


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(errors="replace"), digest_size=8).hexdigest()


def _plain(description: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(description).encode(errors="replace"))


def _key(description: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(_plain(description), sort_keys=True).encode(), digest_size=8).hexdigest()
