"""The parts of drawn figures: their names, looks, colours and shapes.

Conventions:
    P = 6 parts, 4 looks, h x w pixels of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LOOKS", "PALETTE", "PARTS", "SHAPES", "SIZE", "template"]

SIZE = 48
"""Height and width of the images in pixels."""

PALETTE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 0.5, 0.0), (0.0, 0.25, 1.0))
"""All colours of figures and clutter: black outlines, white stripes, orange and blue fillings.

The background has other colours.
"""

LOOKS = ("plain orange", "striped orange", "plain blue", "striped blue")
"""The looks of a part. Stripes are white, in every other row."""

PARTS = ("crest", "head", "wing", "belly", "foot", "tail")
"""Parts in the order of every dimension P."""

# Half widths of each part's rows, from the top. Parts are symmetric: mirroring a figure only moves them.
SHAPES = (
    (0, 1, 2, 3, 3),
    (2, 3, 4, 4, 4, 4, 4, 3, 2),
    (0, 2, 3, 4, 3, 2, 0),
    (4, 5, 6, 6, 6, 5, 4),
    (3, 3, 2, 2, 1),
    (1, 1, 1, 2, 2, 2, 2, 2, 1, 1, 1),
)
_BLACK, _WHITE, _FILLINGS = 0, 1, (2, 3)


def template(part: int) -> Tensor:
    """Draw a part in each look, as numbers of colours in :data:`PALETTE`, int64, (4, h, w); -1 outside the part.

    Height and width are odd, and the middle pixel is the part's point.

    Args:
        part: Number of the part in :data:`PARTS`.

    Example:
        >>> template(PARTS.index("foot"))[LOOKS.index("striped orange")]
        tensor([[ 0,  0,  0,  0,  0,  0,  0],
                [ 0,  1,  1,  1,  1,  1,  0],
                [-1,  0,  2,  2,  2,  0, -1],
                [-1,  0,  1,  1,  1,  0, -1],
                [-1, -1,  0,  0,  0, -1, -1]])
    """
    half = torch.tensor(SHAPES[part])
    width = int(half.max())
    mask = torch.arange(-width, width + 1).abs() <= half[:, None]
    wide = F.pad(mask, (1, 1, 1, 1))
    inner = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    odd = (torch.arange(len(half)) % 2 == 1)[:, None]
    fillings = [torch.where(odd, stripe, colour) for colour in _FILLINGS for stripe in (colour, _WHITE)]
    return torch.stack([torch.where(mask, torch.where(inner, filling, _BLACK), -1) for filling in fillings])
