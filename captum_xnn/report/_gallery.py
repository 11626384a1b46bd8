"""Gallery of a report: the photo, the numbers and the maps of each image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from captum_xnn.explanation import Contributions, Explanation
from captum_xnn.layers._pixels import channels_by_size, channels_first
from captum_xnn.layers._targets import Difference, Target, predicted_classes
from captum_xnn.plots._explanation import own_scale
from captum_xnn.report._thumbnails import displayable, overlay, photo

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.attribution import XNNAttribution

__all__ = [
    "ClassNames",
    "Gallery",
    "OutputNames",
    "compare",
    "decimals",
    "numbers_of",
    "rows_of_images",
    "scaled",
    "short",
    "shown",
    "strengths",
]

ClassNames = Mapping[int, str] | Sequence[str]


class OutputNames:
    """Names of the model's outputs.

    Args:
        names: Names of classes, if they are known.
        classes: Whether an output without a name is a class.
    """

    def __init__(self, names: ClassNames | None, *, classes: bool = True) -> None:
        pairs: Any = () if names is None else names.items() if isinstance(names, Mapping) else enumerate(names)
        self.names: dict[Any, str] = dict(pairs)
        self.classes = classes

    @classmethod
    def of_targets(cls, names: ClassNames | None, xnn: XNNAttribution, targets: Sequence[Target]) -> OutputNames:
        """Give outputs without a name the word "class" where a fit found classes.

        Args:
            names: Names of classes, if they are known.
            xnn: The explainers.
            targets: Fitted targets.
        """
        return cls(names, classes=any(xnn.explainer(t).positives is not None for t in targets))

    def of(self, target: Target) -> str:
        """Return the name of an output, or its number if it has no name."""
        if target is None:
            only = self.names.get(None, next(iter(self.names.values())) if len(self.names) == 1 else "the output")
            return str(only)
        if isinstance(target, Difference):
            return f"{self.of(target.target)} rather than {self.of(target.against)}"
        if target in self.names:
            return str(self.names[target])
        return f"class {target}" if self.classes and isinstance(target, int) else f"output {target}"


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
        self.covered: dict[Target, Tensor] = {t: torch.empty(0) for t in targets}
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
            says = "" if c is None else self.names.of(c)
            height, width = image.movedim(channels_by_size(image[None]) - 1, 0).shape[1:]
            src = photo(shown(self.display, image))
            self.photos.append({"src": src, "says": says, "width": width, "height": height})

    def explain(self, i: int, images: Tensor, why: Explanation, one: Tensor) -> None:
        """Add the explanations and the 1-Heatmaps of the last images for the i-th target."""
        target = self.targets[i]
        own = [c is None or not isinstance(target, int) or c == target for c in self.given]
        self.rows[i].extend(rows_of_images(why, one, own))
        held = self.covered[target]
        more = images[own][: self.patches - len(held)]
        self.covered[target] = torch.cat([held.to(more), more]) if len(held) else more

    def images(self, captions: Sequence[str] | None) -> list[dict[str, Any]]:
        """Return all images with their captions."""
        n = len(self.photos)
        if captions is None:
            captions = [f"image {i + 1}" for i in range(n)]
        if not n or isinstance(captions, str) or len(captions) != n:
            raise ValueError(
                f"there are {n} images and {len(captions)} captions; pass at least one image, and one caption for each "
                "(such as its file name) or none at all"
            )
        return [{**shown, "caption": str(caption)} for shown, caption in zip(self.photos, captions, strict=True)]


def shown(display: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Apply the user's display function to an image, and check the result."""
    return displayable(display(image.detach().cpu()))


def rows_of_images(why: Explanation, one: Tensor, own: Sequence[bool]) -> Iterator[dict[str, Any]]:
    """Yield the numbers and maps of each image for one target.

    Args:
        why: Explanation of the images.
        one: Their 1-Heatmaps.
        own: Whether the model gives the target to each of them.
    """
    assert isinstance(why.inputs, Tensor)  # because images are a single tensor
    heat, single = (channels_first(m, why.inputs).sum(2).cpu() for m in (why.directed_maps(), one.detach()))
    for i, given in enumerate(own):
        contributions = why.contributions[i].detach().double().cpu()
        maps = scaled(heat[i], contributions)
        yield {
            **numbers_of(why, i, given),
            "maps": [overlay(m) for m in maps],
            "one": overlay(scaled(single[i], torch.ones(1))[0]),
            "strength": [round(s, 3) for s in strengths(maps, contributions)],
        }


def numbers_of(why: Explanation | Contributions, index: int, own: bool) -> dict[str, Any]:
    """Return the numbers of one example, short enough for the page."""
    return {
        "c": [short(v) for v in why.contributions[index].detach().double().tolist()],
        "e": [short(v) for v in why.features[index].tolist()],
        "bias": short(float(why.bias[index])),
        "sum": short(float(why.surrogate[index])),
        "says": short(float(why.prediction[index])),
        "own": own,
    }


def compare(rows: Sequence[dict[str, Any]], made: Iterable[Mapping[str, Any]], label: str) -> None:
    """Add to each row the numbers and maps of a difference of two outputs, for a second sentence and other maps.

    Args:
        rows: Rows of some examples.
        made: Rows of the difference for the same examples.
        label: Name of the difference.
    """
    kept = ("c", "bias", "sum", "says", "maps", "one", "strength")
    for row, of in zip(rows, made, strict=True):
        row["rather"] = {"label": label, **{name: of[name] for name in kept}}


def scaled(maps: Tensor, contributions: Tensor) -> Tensor:
    """Scale each of the maps (K, H, W) to [-1, 1] by itself, multiplied by the sign of its contribution."""
    return torch.from_numpy(own_scale(maps, contributions)).float()


def strengths(maps: Tensor, contributions: Tensor) -> list[float]:
    """Compute the strength of each map on a shared scale, in [0, 1]: its contribution spread over its pixels."""
    mass = maps.double().abs().sum((1, 2))
    density = torch.where(mass > 0, contributions.abs() / torch.where(mass > 0, mass, 1), 0)
    largest = density.max()
    return (density / largest).tolist() if largest > 0 else density.tolist()


def short(value: float) -> float:
    """Round a number to six significant digits, to keep the page small."""
    return float(f"{value:.6g}")


def decimals(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of decimals that shows three digits of the largest contribution or output."""
    largest = max(abs(v) for row in rows for v in (*row["c"], row["says"]))
    return int(min(max(2 - np.floor(np.log10(largest)), 1), 6)) if largest > 0 else 1
