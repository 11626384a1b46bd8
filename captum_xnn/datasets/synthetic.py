"""Figures: drawn creatures whose classes are defined by the looks of some of their parts, so that reasons are known.

A figure has six parts on a cluttered ground, at places that vary, and stands mirrored half of the time. Each part has
one of four looks, an orange or a blue filling, plain or striped, or cannot be seen. A class is a conjunction of
*reasons*, each the look of one part::

    class 0    plain orange head, striped orange wing, plain orange belly

An image is of the class all of whose reasons it shows, or of none of them, which is the last label. No reason suffices:
each belongs to two classes, and *near misses*, which show all reasons of a class but one, are common. Crest and tail
are no class's reason. What an explanation ought to find, and where, is thus known for every image.
:mod:`captum_xnn.datasets.synthetic_models` has networks to explain.

Conventions:
    N images (3, 48, 48), float32 in [0, 1]. P = 6 parts, 4 looks, C classes; labels are 0 to C, and C is "none of
    them". A class has R reasons, in the order of its parts. Coordinates are x, y in pixels from the upper left corner
    of the image, so that the centre of the first pixel is at (0.5, 0.5), as in :mod:`captum_xnn.datasets.parts`.

Reference:
    Made for this library: the paper has no data whose reasons are known. Its questions to ask of them are those of
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "LOOKS",
    "PALETTE",
    "PARTS",
    "REASONS",
    "SIZE",
    "Figures",
    "concepts",
    "draw_figures",
    "labels_of",
    "reason_parts",
    "reasons_table",
    "template",
]

SIZE = 48
"""Height and width of the images in pixels."""

PALETTE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 0.5, 0.0), (0.0, 0.25, 1.0))
"""All colours of figures and clutter: black outlines, white stripes, orange and blue fillings. The ground has none."""

LOOKS = ("plain orange", "striped orange", "plain blue", "striped blue")
"""What a part can look like. Stripes are white, in every other row."""

PARTS = ("crest", "head", "wing", "belly", "foot", "tail")
"""Parts in the order of every dimension P."""

REASONS: tuple[Mapping[str, str], ...] = (
    {"head": "plain orange", "wing": "striped orange", "belly": "plain orange"},
    {"wing": "striped orange", "belly": "plain blue", "foot": "plain orange"},
    {"head": "striped blue", "wing": "striped blue", "belly": "striped blue"},
    {"head": "plain orange", "belly": "striped blue", "foot": "plain orange"},
    {"head": "striped blue", "belly": "plain orange"},
    {"wing": "striped blue", "belly": "plain blue"},
)
"""The classes. No image can be of two: any two ask for different looks of one part."""

_BLACK, _WHITE, _FILLINGS = 0, 1, (2, 3)

# Centre of each part from that of the figure, x and y, so far apart that parts do not meet whatever their jitter.
_PLACES = ((-15, -13), (-15, -2), (0, -11), (0, 0), (0, 10), (13, 1))
# Half widths of each part's rows from the top. Parts are symmetric: a mirrored figure has the same ones elsewhere.
_SHAPES = (
    (0, 1, 2, 3, 3),
    (2, 3, 4, 4, 4, 4, 4, 3, 2),
    (0, 2, 3, 4, 3, 2, 0),
    (4, 5, 6, 6, 6, 5, 4),
    (3, 3, 2, 2, 1),
    (1, 1, 1, 2, 2, 2, 2, 2, 1, 1, 1),
)
_JITTER = 2
_CLUTTER, _LARGEST_CLUTTER = 12, 7
_GROUND = (0.3, 0.65)


class Figures(NamedTuple):
    """Images with everything that is known of them."""

    images: Tensor
    """(N, 3, 48, 48) in [0, 1]."""
    labels: Tensor
    """Class from 0, or C for none of them, int64, (N,)."""
    points: Tensor
    """Centres of the parts (N, P, 2), x and y in pixels, NaN where invisible."""
    boxes: Tensor
    """Around the visible parts (N, 4), x0, y0, x1, y1 in pixels; zeros where there are none."""
    masks: Tensor
    """Pixels of each part with its outline (N, P, 48, 48), boolean. Parts do not overlap."""
    looks: Tensor
    """Number of each part's look (N, P), int64, -1 where invisible."""
    mirrored: Tensor
    """Whether the figure looks to the right, boolean, (N,)."""
    reasons: Tensor
    """The classes' table (C, P), int64: the look that a class asks for, -1 where any will do."""


def reasons_table(reasons: Sequence[Mapping[str, str]] = REASONS) -> Tensor:
    """Returns classes as a table (C, P), int64: the look that a class asks of each part, -1 where any will do.

    Args:
        reasons: For each class, looks by part.

    Raises:
        ValueError: If there is no class, a name is unknown, or an image could be of two classes.

    Example:
        >>> reasons_table([{"head": "plain orange", "tail": "striped blue"}])
        tensor([[-1,  0, -1, -1, -1,  3]])
    """
    if not reasons:
        raise ValueError("expected at least one class, got none; leave reasons= out to have six")
    table = torch.full((len(reasons), len(PARTS)), -1)
    for row, asked in zip(table, reasons, strict=True):
        for part, look in asked.items():
            if part not in PARTS or look not in LOOKS:
                raise ValueError(f"expected parts {PARTS} and looks {LOOKS}, got {part!r}: {look!r}; rename it")
            row[PARTS.index(part)] = LOOKS.index(look)
    for a, b in combinations(range(len(table)), 2):
        if not bool(((table[a] != table[b]) & (table[a] >= 0) & (table[b] >= 0)).any()):
            raise ValueError(
                f"expected classes of which an image can be one only, got {a} and {b}, which contradict each other "
                "nowhere; let them ask for different looks of one part"
            )
    return table


def labels_of(looks: Tensor, reasons: Tensor) -> Tensor:
    """Returns the class all of whose reasons an image shows, or C where there is none, int64, (N,).

    Args:
        looks: (N, P), -1 where invisible.
        reasons: (C, P), as :func:`reasons_table` makes it.

    Example:
        >>> labels_of(torch.tensor([[-1, 0, 2], [1, 0, -1]]), torch.tensor([[-1, 0, 2], [0, -1, 3]]))
        tensor([0, 2])
    """
    shown = ((looks[:, None] == reasons) | (reasons < 0)).all(2)
    return torch.where(shown.any(1), shown.int().argmax(1), len(reasons))


def reason_parts(figures: Figures, label: int) -> Tensor:
    """Returns the parts whose look makes a class, ascending, int64, (R,).

    ``figures.masks[:, parts]`` says where the reasons are, if an image shows them.

    Args:
        figures: Of which the table counts.
        label: The class, 0 to C - 1.

    Raises:
        ValueError: If there is no such class; "none of them" has no reasons.

    Example:
        >>> [PARTS[part] for part in reason_parts(draw_figures(1), 4)]
        ['head', 'belly']
    """
    if not 0 <= label < len(figures.reasons):
        raise ValueError(
            f"expected a class from 0 to {len(figures.reasons) - 1}, got {label}; pass one that has reasons"
        )
    return (figures.reasons[label] >= 0).nonzero()[:, 0]


def concepts(figures: Figures, label: int) -> Tensor:
    """Returns which of a class's reasons each image shows, boolean, (N, R), in the order of :func:`reason_parts`.

    An image is of the class where all are shown.

    Args:
        figures: The images.
        label: The class, 0 to C - 1.

    Raises:
        ValueError: If there is no such class.

    Example:
        >>> figures = draw_figures(500)
        >>> torch.equal(concepts(figures, 4).all(1), figures.labels == 4)
        True
    """
    parts = reason_parts(figures, label)
    return figures.looks[:, parts] == figures.reasons[label, parts]


def template(part: int) -> Tensor:
    """Returns a part in each look, as numbers of colours in :data:`PALETTE`, int64, (4, h, w); -1 outside of it.

    Height and width are odd, and the middle pixel is the part's point.

    Args:
        part: Its number in :data:`PARTS`.

    Example:
        >>> template(PARTS.index("foot"))[LOOKS.index("striped orange")]
        tensor([[ 0,  0,  0,  0,  0,  0,  0],
                [ 0,  1,  1,  1,  1,  1,  0],
                [-1,  0,  2,  2,  2,  0, -1],
                [-1,  0,  1,  1,  1,  0, -1],
                [-1, -1,  0,  0,  0, -1, -1]])
    """
    half = torch.tensor(_SHAPES[part])
    width = int(half.max())
    mask = torch.arange(-width, width + 1).abs() <= half[:, None]
    wide = F.pad(mask, (1, 1, 1, 1))
    inner = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    odd = (torch.arange(len(half)) % 2 == 1)[:, None]
    fillings = [torch.where(odd, stripe, colour) for colour in _FILLINGS for stripe in (colour, _WHITE)]
    return torch.stack([torch.where(mask, torch.where(inner, filling, _BLACK), -1) for filling in fillings])


def draw_figures(
    n: int,
    *,
    seed: int = 0,
    reasons: Sequence[Mapping[str, str]] = REASONS,
    members: float = 0.45,
    near_misses: float = 0.35,
    hidden: float = 0.1,
) -> Figures:
    """Returns figures: members of classes, near misses, and others whose looks are drawn independently.

    A near miss shows all reasons of a random class but one, whose part has another look or is hidden; it may be of
    another class. With ``members=0, near_misses=0`` reasons are independent of each other.

    Args:
        n: Number of images N.
        seed: The same seed gives the same images.
        reasons: The classes, for each of them looks by part.
        members: Share of images that are made members of a random class, in [0, 1].
        near_misses: Share of near misses, in [0, 1].
        hidden: Probability with which a part that is free to have any look is invisible.

    Raises:
        ValueError: If shares are none, or classes are not as :func:`reasons_table` takes them.

    Example:
        >>> figures = draw_figures(1000)
        >>> figures.images.shape, figures.points.shape, figures.masks.shape
        (torch.Size([1000, 3, 48, 48]), torch.Size([1000, 6, 2]), torch.Size([1000, 6, 48, 48]))
        >>> shown = concepts(figures, 0).sum(1)
        >>> bool((shown == 2).sum() > (shown == 3).sum())
        True
    """
    if n < 1 or not min(members, near_misses, hidden) >= 0 or members + near_misses > 1 or hidden > 1:
        raise ValueError(
            f"expected images, and shares whose sum is at most 1, got n={n}, members={members}, "
            f"near_misses={near_misses} and hidden={hidden}; the defaults are a good start"
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
    return Figures(images, labels_of(looks, table), points, _boxes(masks), masks, looks, mirrored, table)


def _looks(
    n: int, table: Tensor, members: float, near_misses: float, hidden: float, generator: torch.Generator
) -> Tensor:
    """Returns the looks of each figure's parts, (N, P)."""
    looks = torch.randint(len(LOOKS), (n, len(PARTS)), generator=generator)
    looks[torch.rand(looks.shape, generator=generator) < hidden] = -1
    kind = torch.rand(n, 1, generator=generator)
    asked = table[torch.randint(len(table), (n,), generator=generator)]
    made = torch.where((asked >= 0) & (kind < members + near_misses), asked, looks)
    # What a near miss loses: one of the class's reasons, at random.
    lost = torch.where(asked >= 0, torch.rand(asked.shape, generator=generator), -1).argmax(1, keepdim=True)
    other = (made.gather(1, lost) + torch.randint(1, len(LOOKS), (n, 1), generator=generator)) % len(LOOKS)
    other[torch.rand(other.shape, generator=generator) < hidden] = -1
    return torch.where((kind >= members) & (kind < members + near_misses), made.scatter(1, lost, other), made)


def _ground(n: int, generator: torch.Generator) -> Tensor:
    """Returns clouds with rectangles of the figures' own colours in front, (N, 3, H, W)."""
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
    """Returns the middle pixel of each part, x and y, (N, P, 2), such that all parts are inside of the image."""
    places = torch.tensor(_PLACES).repeat(len(mirrored), 1, 1)
    places[mirrored] *= torch.tensor([-1, 1])
    reach = torch.tensor([[max(shape), len(shape) // 2] for shape in _SHAPES]) + _JITTER
    low = -(places - reach).amin(1)
    room = SIZE - (places + reach).amax(1) - low
    at = low + (torch.rand(low.shape, generator=generator) * room).long()
    return at[:, None] + places + torch.randint(-_JITTER, _JITTER + 1, places.shape, generator=generator)


def _stamp(images: Tensor, masks: Tensor, centres: Tensor, looks: Tensor, numbers: Tensor) -> None:
    """Draws one part of all figures that show it, in place, and marks its pixels."""
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
    """Returns the smallest box around all parts of each figure, (N, 4)."""
    seen = masks.any(1)
    sides = []
    for hit in (seen.any(1), seen.any(2)):
        end = SIZE - hit.flip(1).int().argmax(1)
        sides.append((hit.int().argmax(1), torch.where(hit.any(1), end, 0)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1).float()
