"""Figures: drawn creatures with classes defined by the looks of some parts, so the true reasons are known.

A figure has six parts at varying places on a cluttered background. Half of the figures are mirrored. A part has one of
four looks: an orange or a blue filling, plain or striped. It may also be invisible. A class is a conjunction of
*reasons*; each reason is the look of one part::

    class 0    plain orange head, striped orange wing, plain orange belly

An image belongs to a class if it shows all reasons of the class. An image of no class has the last label. No reason
suffices by itself: each belongs to two classes, and *near misses* are common. A near miss shows all reasons of a class
but one. The looks of crest and tail are reasons of no class. An explanation should find the reasons of an image at
their places; both are known for every image. :meth:`Figures.exact_network` and :meth:`Figures.trained_network` make
networks to explain.

Conventions:
    N images (3, 48, 48), float32 in [0, 1]. P = 6 parts, 4 looks, C classes. Labels are 0 to C; C means no class.
    A class has R reasons, in the order of its parts. Coordinates are x, y in pixels from the upper left corner of the
    image, so the centre of the first pixel is at (0.5, 0.5), as in :mod:`captum_xnn.datasets._parts`.

Reference:
    Made for this library, because the paper has no data with known reasons. The figures let you ask the questions of
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_xnn.datasets._figure_parts import LOOKS, PALETTE, PARTS, SHAPES, SIZE, template
from captum_xnn.datasets._networks import exact_network, figures_cnn, folded, train

__all__ = ["REASONS", "Figures", "labels_of", "reasons_table"]

REASONS: tuple[Mapping[str, str], ...] = (
    {"head": "plain orange", "wing": "striped orange", "belly": "plain orange"},
    {"wing": "striped orange", "belly": "plain blue", "foot": "plain orange"},
    {"head": "striped blue", "wing": "striped blue", "belly": "striped blue"},
    {"head": "plain orange", "belly": "striped blue", "foot": "plain orange"},
    {"head": "striped blue", "belly": "plain orange"},
    {"wing": "striped blue", "belly": "plain blue"},
)
"""The classes. No image can be of two classes, because any two ask for different looks of one part."""

# Centre of each part from the figure's centre, x and y. They are far enough apart that jittered parts never touch.
_PLACES = ((-15, -13), (-15, -2), (0, -11), (0, 0), (0, 10), (13, 1))
_JITTER = 2
_CLUTTER, _LARGEST_CLUTTER = 12, 7
_GROUND = (0.3, 0.65)


def reasons_table(reasons: Sequence[Mapping[str, str]] = REASONS) -> Tensor:
    """Turn classes into a table (C, P), int64: the look that a class asks of each part, -1 for any look.

    Args:
        reasons: For each class, its looks by part.

    Raises:
        ValueError: If there is no class, a name is unknown, or an image could be of two classes.

    Example:
        >>> reasons_table([{"head": "plain orange", "tail": "striped blue"}])
        tensor([[-1,  0, -1, -1, -1,  3]])
    """
    if not reasons:
        raise ValueError("reasons is an empty list; describe at least one class, or leave reasons= out to have six")
    table = torch.full((len(reasons), len(PARTS)), -1)
    for row, asked in zip(table, reasons, strict=True):
        for part, look in asked.items():
            if part not in PARTS or look not in LOOKS:
                raise ValueError(
                    f"the reason {part!r}: {look!r} does not exist; the parts are {PARTS} and the looks {LOOKS}"
                )
            row[PARTS.index(part)] = LOOKS.index(look)
    for a, b in combinations(range(len(table)), 2):
        if not bool(((table[a] != table[b]) & (table[a] >= 0) & (table[b] >= 0)).any()):
            raise ValueError(
                f"an image could be of both class {a} and class {b}; let them ask for different looks of one part"
            )
    return table


def labels_of(looks: Tensor, reasons: Tensor) -> Tensor:
    """Find the class of each image, the one with all reasons shown, or C for no class, int64, (N,).

    Args:
        looks: (N, P), -1 where invisible.
        reasons: (C, P), from :func:`reasons_table`.

    Example:
        >>> labels_of(torch.tensor([[-1, 0, 2], [1, 0, -1]]), torch.tensor([[-1, 0, 2], [0, -1, 3]]))
        tensor([0, 2])
    """
    shown = ((looks[:, None] == reasons) | (reasons < 0)).all(2)
    return torch.where(shown.any(1), shown.int().argmax(1), len(reasons))


@dataclass(frozen=True, eq=False)
class Figures:
    """Images with their labels, parts and reasons.

    Example:
        >>> figures = Figures.draw(50)
        >>> figures.images.shape, bool((figures.exact_network()(figures.images).argmax(1) == figures.labels).all())
        (torch.Size([50, 3, 48, 48]), True)
    """

    PARTS: ClassVar[tuple[str, ...]] = PARTS
    """Parts in the order of every dimension P: crest, head, wing, belly, foot and tail."""
    LOOKS: ClassVar[tuple[str, ...]] = LOOKS
    """The looks of a part: "plain orange", "striped orange", "plain blue" and "striped blue"."""

    images: Tensor
    """(N, 3, 48, 48) in [0, 1]."""
    labels: Tensor
    """Class from 0, or C for no class, int64, (N,)."""
    points: Tensor
    """Centres of the parts (N, P, 2), x and y in pixels, NaN where invisible."""
    boxes: Tensor
    """Boxes around the visible parts (N, 4), x0, y0, x1, y1 in pixels; zeros if no part is visible."""
    masks: Tensor
    """Pixels of each part with its outline (N, P, 48, 48), boolean. Parts do not overlap."""
    looks: Tensor
    """Number of each part's look (N, P), int64, -1 where invisible."""
    mirrored: Tensor
    """Whether the figure looks to the right, boolean, (N,)."""
    reasons: Tensor
    """The classes' table (C, P), int64: the look that a class asks of each part, -1 for any look."""

    @classmethod
    def draw(
        cls,
        n: int,
        *,
        seed: int = 0,
        reasons: Sequence[Mapping[str, str]] = REASONS,
        members: float = 0.45,
        near_misses: float = 0.35,
        hidden: float = 0.1,
    ) -> Figures:
        """Draw N figures: members of classes, near misses, and figures with independent random looks.

        A near miss shows all reasons of a random class but one. The part of that reason has another look or is hidden.
        A near miss may belong to another class. With ``members=0, near_misses=0`` reasons are independent of each
        other.

        Args:
            n: Number of images N.
            seed: The same seed gives the same images.
            reasons: The classes, each as looks by part.
            members: Share of images that show all reasons of a random class, in [0, 1].
            near_misses: Share of near misses, in [0, 1].
            hidden: Probability that a part is invisible, if its look is free, in [0, 1].

        Raises:
            ValueError: If n is below 1, a share is out of range, or :func:`reasons_table` rejects the classes.

        Example:
            >>> figures = Figures.draw(1000)
            >>> figures.images.shape, figures.points.shape, figures.masks.shape
            (torch.Size([1000, 3, 48, 48]), torch.Size([1000, 6, 2]), torch.Size([1000, 6, 48, 48]))
            >>> shown = figures.shown_reasons(0).sum(1)
            >>> bool((shown == 2).sum() > (shown == 3).sum())
            True
        """
        if n < 1 or not min(members, near_misses, hidden) >= 0 or members + near_misses > 1 or hidden > 1:
            raise ValueError(
                f"n={n}, members={members}, near_misses={near_misses} and hidden={hidden} draw no figures; pass n from "
                "1 on, hidden in [0, 1], and members and near_misses from 0 on with a sum of at most 1"
            )
        generator = torch.Generator().manual_seed(seed)
        table = reasons_table(reasons)
        looks = _looks(n, table, members, near_misses, hidden, generator)
        images = _ground(n, generator)
        mirrored = torch.rand(n, generator=generator) < 0.5
        centres = _centres(mirrored, generator)
        masks = torch.zeros(n, len(PARTS), SIZE, SIZE, dtype=torch.bool)
        for part in range(len(PARTS)):
            _stamp(images, masks[:, part], centres[:, part], looks[:, part], template(part))
        points = torch.where(looks[:, :, None] >= 0, centres + 0.5, torch.nan)
        return cls(images, labels_of(looks, table), points, _boxes(masks), masks, looks, mirrored, table)

    def reason_parts(self, label: int) -> Tensor:
        """List the parts whose looks define a class, ascending, int64, (R,).

        ``figures.masks[:, parts]`` marks the pixels of these parts; they are the places of the reasons that an image
        shows.

        Args:
            label: The class, 0 to C - 1.

        Raises:
            ValueError: If the class does not exist. Label C has no reasons.

        Example:
            >>> [Figures.PARTS[part] for part in Figures.draw(1).reason_parts(4)]
            ['head', 'belly']
        """
        if not 0 <= label < len(self.reasons):
            raise ValueError(
                f"class {label} does not exist; pass one from 0 to {len(self.reasons) - 1}, as images of no class have "
                "no reasons"
            )
        return (self.reasons[label] >= 0).nonzero()[:, 0]

    def shown_reasons(self, label: int) -> Tensor:
        """Find the reasons of a class that each image shows, boolean, (N, R), in the order of :meth:`reason_parts`.

        An image is of the class if it shows all of them.

        Args:
            label: The class, 0 to C - 1.

        Raises:
            ValueError: If the class does not exist.

        Example:
            >>> figures = Figures.draw(500)
            >>> torch.equal(figures.shown_reasons(4).all(1), figures.labels == 4)
            True
        """
        parts = self.reason_parts(label)
        return self.looks[:, parts] == self.reasons[label, parts]

    def changed(self, part: int, *, seed: int = 0) -> Figures:
        """Draw the same figures with another random look of one part: pairs that differ in nothing else.

        An invisible part stays invisible. Labels follow the new looks.

        Args:
            part: Index of the part in :attr:`PARTS`.
            seed: The same seed gives the same looks.

        Raises:
            ValueError: If the part does not exist.

        Example:
            >>> figures = Figures.draw(50)
            >>> pixels = (figures.changed(1).images != figures.images).any(1)
            >>> bool((pixels & ~figures.masks[:, 1]).any())
            False
        """
        if not 0 <= part < len(PARTS):
            raise ValueError(f"part {part} does not exist; pass a number from 0 to {len(PARTS) - 1}, one of {PARTS}")
        turn = torch.randint(1, len(LOOKS), (len(self.looks),), generator=torch.Generator().manual_seed(seed))
        looks, images, masks = self.looks.clone(), self.images.clone(), self.masks.clone()
        looks[:, part] = torch.where(looks[:, part] >= 0, (looks[:, part] + turn) % len(LOOKS), -1)
        centres = (self.points[:, part] - 0.5).nan_to_num().long()
        _stamp(images, masks[:, part], centres, looks[:, part], template(part))
        return replace(self, images=images, masks=masks, looks=looks, labels=labels_of(looks, self.reasons))

    def exact_network(self) -> nn.Sequential:
        r"""Build a network, set by hand, that classifies every figure correctly; its layer ``Z`` has a known meaning.

        Neuron :math:`4 p + l` of Z, (N, 24), is 1 where part p is shown in look l, else 0. The output of a class is the
        number of its reasons that the image shows, minus :math:`R - \tfrac{1}{2}`. The output for no class is 0.
        """
        return exact_network(self.reasons)

    def trained_network(self, *, epochs: int = 6, seed: int = 0, progress: bool = False) -> nn.Sequential:
        """Train a small convolutional network on these figures from labels alone, and return it in eval mode.

        Its dense layer is ``relu4``, (N, 64). Trained on 6,000 figures, it classifies 98 % of others correctly. It
        trains with batch norm, and folds batch norm into the convolutions afterwards.

        Args:
            epochs: Passes over the figures.
            seed: Seeds weights and batches.
            progress: Whether to show a progress bar.

        Example:
            >>> cnn = Figures.draw(64).trained_network(epochs=1)
            >>> cnn(torch.zeros(2, 3, 48, 48)).shape
            torch.Size([2, 7])
        """
        generator = torch.Generator().manual_seed(seed)
        cnn = figures_cnn(len(self.reasons) + 1, generator)
        return folded(
            train(
                cnn,
                self.images,
                self.labels,
                epochs=epochs,
                rate=1e-2,
                pct_start=0.15,
                generator=generator,
                progress=progress,
            )
        )


def _looks(
    n: int, table: Tensor, members: float, near_misses: float, hidden: float, generator: torch.Generator
) -> Tensor:
    """Draw the looks of each figure's parts, (N, P)."""
    looks = torch.randint(len(LOOKS), (n, len(PARTS)), generator=generator)
    looks[torch.rand(looks.shape, generator=generator) < hidden] = -1
    kind = torch.rand(n, 1, generator=generator)
    asked = table[torch.randint(len(table), (n,), generator=generator)]
    made = torch.where((asked >= 0) & (kind < members + near_misses), asked, looks)
    # A near miss loses one of the class's reasons, at random.
    lost = torch.where(asked >= 0, torch.rand(asked.shape, generator=generator), -1).argmax(1, keepdim=True)
    other = (made.gather(1, lost) + torch.randint(1, len(LOOKS), (n, 1), generator=generator)) % len(LOOKS)
    other[torch.rand(other.shape, generator=generator) < hidden] = -1
    return torch.where((kind >= members) & (kind < members + near_misses), made.scatter(1, lost, other), made)


def _ground(n: int, generator: torch.Generator) -> Tensor:
    """Draw the background: clouds, with rectangles in the figures' own colours in front, (N, 3, H, W)."""
    low, high = _GROUND
    clouds = torch.rand(n, 3, 6, 6, generator=generator) * (high - low) + low
    images = F.interpolate(clouds, (SIZE, SIZE), mode="bilinear", align_corners=True)
    numbers = torch.randint(len(PALETTE), (n, _CLUTTER, 1, 1), generator=generator, dtype=torch.int8)
    first = torch.randint(-1, SIZE - 1, (n, _CLUTTER, 2, 1), generator=generator)
    last = first + torch.randint(_LARGEST_CLUTTER, first.shape, generator=generator)
    at = torch.arange(SIZE)
    x, y = ((at >= first) & (at <= last)).unbind(2)
    clutter = torch.full((n, SIZE, SIZE), -1, dtype=torch.int8)
    for i in range(_CLUTTER):
        clutter = torch.where(y[:, i, :, None] & x[:, i, None], numbers[:, i], clutter)
    covered = clutter >= 0
    images.movedim(1, 3)[covered] = torch.tensor(PALETTE)[clutter[covered].long()]
    return images


def _centres(mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the middle pixel of each part, x and y, (N, P, 2), with all parts inside the image."""
    centres = torch.tensor(_PLACES).repeat(len(mirrored), 1, 1)
    centres[mirrored] *= torch.tensor([-1, 1])
    reach = torch.tensor([[max(shape), len(shape) // 2] for shape in SHAPES]) + _JITTER
    low = -(centres - reach).amin(1)
    room = SIZE - (centres + reach).amax(1) - low
    at = low + (torch.rand(low.shape, generator=generator) * room).long()
    return at[:, None] + centres + torch.randint(-_JITTER, _JITTER + 1, centres.shape, generator=generator)


def _stamp(images: Tensor, masks: Tensor, centres: Tensor, looks: Tensor, numbers: Tensor) -> None:
    """Draw one part in place, on all figures that show it, and mark its pixels."""
    height, width = numbers.shape[1:]
    visible = (looks >= 0).nonzero()[:, 0]
    rows = (centres[visible, 1, None] - height // 2 + torch.arange(height))[:, :, None]
    columns = (centres[visible, 0, None] - width // 2 + torch.arange(width))[:, None]
    drawn = numbers[looks[visible]]
    mask = drawn >= 0
    at = [index.expand(drawn.shape)[mask] for index in (visible[:, None, None], rows, columns)]
    masks[at[0], at[1], at[2]] = True
    images.movedim(1, 3)[at[0], at[1], at[2]] = torch.tensor(PALETTE)[drawn[mask]]


def _boxes(masks: Tensor) -> Tensor:
    """Compute the smallest box around all parts of each figure, (N, 4)."""
    seen = masks.any(1)
    sides = []
    for hit in (seen.any(1), seen.any(2)):
        end = SIZE - hit.flip(1).int().argmax(1)
        sides.append((hit.int().argmax(1), torch.where(hit.any(1), end, 0)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1).float()
