"""Explanations that a folder holds already, so that pictures with other names need no new maps.

``explain`` writes the numbers and maps of each input. Beside the maps, a file describes what they depend on: the model,
the explainers, the backend, the targets, and a checksum of each input. If all of this is the same, the next ``explain``
into the folder reads numbers and maps from there, and draws the pictures only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_xnn._files import read_json, replace_file
from captum_xnn.attribution import XNNAttribution
from captum_xnn.cli._inputs import Batch
from captum_xnn.explanation import Explanation
from captum_xnn.layers._fingerprint import checksum, fingerprint
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._targets import Difference, Target, select
from captum_xnn.report._cache import VAGUE, identity

__all__ = ["KeptExplanations", "described"]

_FORMAT = 1
_FILE = "maps/kept.json"
_NUMBERS = ("features", "contributions", "bias", "surrogate", "prediction")


def described(xnn: XNNAttribution, targets: Sequence[Target], against: int | None) -> str | None:
    """Compute a checksum of all that explanations depend on, apart from the inputs.

    Args:
        xnn: The explainers.
        targets: Explained outputs.
        against: Output to compare with.

    Returns:
        16 hexadecimal digits, or None if the text of the backend does not show all of its settings.
    """
    backend, model = repr(xnn.heatmap), unwrap(xnn.model)
    if re.search(VAGUE, backend):
        return None
    layer = find_layer(model, xnn.layer)[0]
    parts = (_FORMAT, fingerprint(model, layer), identity(xnn, targets), backend, [*map(str, targets)], against)
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


class KeptExplanations:
    """Explanations in a folder.

    Args:
        folder: The folder that ``explain`` writes to.
        description: What the explanations to come depend on, from :func:`described`. With None nothing is read.
        numbers: Name of the file of numbers in the folder.
    """

    def __init__(self, folder: Path, description: str | None, numbers: str) -> None:
        self.folder, self.description = folder, description
        self.inputs: dict[str, str] = {}
        """Checksum of each input of this run, by name."""
        self._old: Mapping[str, str] = {}
        self._lines: dict[str, Any] = {}
        try:
            kept = read_json(folder / _FILE, ValueError, "")
            if description is not None and kept["description"] == description:
                lines = map(json.loads, (folder / numbers).read_text().splitlines())
                self._old, self._lines = kept["inputs"], {line["name"]: line for line in lines}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no earlier explanations, or damaged ones
        if not self._lines:  # an interruption may leave new maps beside old numbers
            (folder / _FILE).unlink(missing_ok=True)

    def explanation(self, batch: Batch, layer: str, outputs: Tensor) -> Explanation | None:
        """Return the explanation of a batch; None unless the folder holds that of every input.

        Args:
            batch: The inputs.
            layer: Dotted name of the explained layer.
            outputs: The model's outputs for the first input, (1, ...), to notice a model that computes something else.
        """
        sums = dict(zip(batch.names, map(checksum, batch.inputs), strict=True))
        self.inputs |= sums
        lines = [self._lines.get(name) for name in batch.names]
        if any(line is None or self._old.get(name) != sums[name] for name, line in zip(sums, lines, strict=True)):
            return None
        try:
            return self._read(lines, batch, layer, outputs)
        except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError):
            return None

    def _read(self, lines: Sequence[Any], batch: Batch, layer: str, outputs: Tensor) -> Explanation | None:
        """Read numbers and maps; return None if the model's output has changed."""
        targets = tuple(_target(line) for line in lines)
        numbers = {key: torch.tensor([line[key] for line in lines], dtype=torch.float64) for key in _NUMBERS}
        now = float(select(outputs.double().cpu(), targets[0])[0])
        if abs(now - float(numbers["prediction"][0])) > 1e-3 * (1 + abs(now)):
            return None
        maps = torch.stack([torch.from_numpy(np.load(self.folder / line["maps"])) for line in lines])
        own = tuple(line["is_positive"] for line in lines) if all("is_positive" in line for line in lines) else None
        return Explanation(inputs=batch.inputs, maps=maps, target=targets, layer=layer, is_positive=own, **numbers)

    def write(self) -> None:
        """Describe the explanations that the folder now holds."""
        if self.description is None:
            (self.folder / _FILE).unlink(missing_ok=True)
            return
        (self.folder / _FILE).parent.mkdir(parents=True, exist_ok=True)
        content = {"description": self.description, "inputs": self.inputs}
        replace_file(self.folder / _FILE, json.dumps(content).encode(errors="replace"))


def _target(line: Mapping[str, Any]) -> Target:
    """Read the target of a line; raise ValueError for a tuple, which JSON does not hold as such."""
    target, against = line["target"], line.get("against")
    if not all(value is None or type(value) is int for value in (target, against)):
        raise ValueError("the target is no single output")
    return target if against is None else Difference(target, against)
