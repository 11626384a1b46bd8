"""Division of the data of a comparison into training and held-out examples.

Conventions:
    M examples. P known parts of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_xnn.activations._activations import Activations, Outputs
from captum_xnn.comparison._selected_rows import SelectedRows
from captum_xnn.layers._targets import Target

__all__ = ["FOLDS", "Split", "Splits", "Subset", "Values", "as_marks"]

# One of so many parts of the data is held out; each repeat holds out another.
FOLDS = 5

Values = dict[str, float | None]


class Subset(NamedTuple):
    """Some rows of collected activations, with the inputs of the same rows."""

    whole: Activations
    rows: Tensor

    def activations(self, some: Tensor | None = None) -> Activations:
        """Return the activations of these rows, or of some of them given by boolean marks, with their inputs."""
        rows = self.rows if some is None else self.rows[some]
        source = self.whole.source
        assert source is not None  # made by _collected
        return self.whole._replace(
            Z=self.whole.Z[rows], y_hat=self.whole.y_hat[rows], source=SelectedRows(source, rows).as_source()
        )

    def inputs(self, rows: Tensor, device: torch.device) -> Iterator[tuple[Any, Any]]:
        """Yield inputs and additional arguments of some rows of the data, batch by batch."""
        assert self.whole.source is not None
        return SelectedRows(self.whole.source, rows).on(device)


class Split(NamedTuple):
    """One division into training and held-out examples."""

    train: Subset
    halves: tuple[Tensor, Tensor]
    """Boolean marks of the training examples in each half."""
    test: Subset
    shown: dict[Target, Tensor]
    """Rows of the data for maps and patches of each target."""
    controls: dict[tuple[Target, int], Values]
    """Values of random groups for each target and number of groups. Methods with as many x-features share them."""


@dataclass(frozen=True)
class Splits:
    """Data with a fold for each example."""

    activations: Activations
    fold: Tensor
    """Number of the fold of each example, (M,)."""
    classes: Tensor | None
    test: Activations | None
    test_classes: Tensor | None
    targets: Sequence[Target]
    images: int
    size: float
    """Mean absolute value of the explained outputs."""

    @classmethod
    def of(
        cls, activations: Activations, test: Activations | None, targets: Sequence[Target], *, images: int, seed: int
    ) -> Splits:
        """Draw the folds. Examples of each class are spread evenly over them.

        Args:
            activations: Activations of the data, with their source.
            test: Activations of other data to measure on, or None to hold out folds.
            targets: The explained targets.
            images: Largest number of examples for maps and patches of a target.
            seed: Seed of the draw.

        Raises:
            ValueError: If folds would lack examples, or positives of a class.
        """
        outputs = Outputs.of(activations, targets)
        classes = outputs.classes
        _check_enough(activations, classes, targets)
        order = torch.randperm(len(activations.Z), generator=torch.Generator().manual_seed(seed), device="cpu")
        if classes is not None:
            order = order[classes[order].argsort(stable=True)]
        fold = torch.empty(len(order), dtype=torch.long, device="cpu")
        # Two folds for each part, so that the training examples have halves with examples of each class.
        fold[order] = torch.arange(len(order), device="cpu") % (2 * FOLDS)
        test_classes = None if test is None else Outputs.of(test, targets).classes
        size = float(outputs.y.double().abs().mean())
        return cls(activations, fold, classes, test, test_classes, targets, images, size)

    def split(self, repeat: int) -> Split:
        """Return the division of a repeat."""
        everything = torch.arange(len(self.fold), device="cpu")
        if self.test is None:
            held = self.fold % FOLDS == repeat
            train, test, classes = everything[~held], Subset(self.activations, everything[held]), self.classes
        else:
            train, test = everything, Subset(self.test, torch.arange(len(self.test.Z), device="cpu"))
            classes = self.test_classes
        first = self.fold[train] < FOLDS
        shown = {}
        for target in self.targets:
            rows = test.rows
            if classes is not None and isinstance(target, int):
                rows = rows[classes[rows] == target]
            shown[target] = rows[: self.images]
        return Split(Subset(self.activations, train), (first, ~first), test, shown, {})


def _check_enough(activations: Activations, classes: Tensor | None, targets: Sequence[Target]) -> None:
    """Raise where folds would lack examples, or positives of a class."""
    counts: dict[int | None, int] = {None: len(activations.Z)}
    if classes is not None:
        counts |= {t: int((classes == t).sum()) for t in targets if isinstance(t, int)}
    for target, count in counts.items():
        if count < 2 * FOLDS:
            which = "there are" if target is None else f"the model gives class {target} to"
            raise ValueError(
                f"{which} only {count} examples, and a comparison needs {2 * FOLDS}, to fit on halves and to hold out "
                "others; pass more data, or other targets"
            )


def as_marks(masks: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """Convert masks of parts, a tensor or an array, to bool (M, P, H, W)."""
    masks = torch.from_numpy(masks) if isinstance(masks, np.ndarray) else masks
    if masks.dtype == torch.bool and masks.dim() == 4:
        return masks
    if masks.dim() != 3 or masks.is_floating_point() or masks.dtype == torch.bool:
        raise ValueError(
            f"masks are {masks.dtype} {tuple(masks.shape)}; pass integers from 1 to P for parts and 0 for the "
            "rest, (M, H, W), or boolean (M, P, H, W)"
        )
    if not masks.numel() or int(masks.max()) < 1:
        raise ValueError(
            f"masks {tuple(masks.shape)} mark no part, as all values are below 1; pass integers from 1 to P for parts "
            "and 0 for the rest"
        )
    return masks[:, None] == torch.arange(1, int(masks.max()) + 1, device=masks.device)[:, None, None]
