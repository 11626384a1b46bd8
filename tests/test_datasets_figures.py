"""Figures: every pixel, label and place is what looks and table say, written a second time as pictures and loops."""

import math

import pytest
import torch

from captum_xnn.datasets import Figures
from captum_xnn.datasets._figure_parts import LOOKS, PARTS, template
from captum_xnn.datasets._figures import REASONS, labels_of, reasons_table

# Outlines "#" and fillings "o"; white instead in the odd rows of striped parts.
PICTURES = {
    "crest": "...#... ..#o#.. .#ooo#. #ooooo# #######",
    "head": "..#####.. .#ooooo#. #ooooooo# #ooooooo# #ooooooo# #ooooooo# #ooooooo# .#ooooo#. ..#####..",
    "wing": "....#.... ..##o##.. .#ooooo#. #ooooooo# .#ooooo#. ..##o##.. ....#....",
    "belly": "..#########.. .#ooooooooo#. #ooooooooooo# #ooooooooooo# #ooooooooooo# .#ooooooooo#. ..#########..",
    "foot": "####### #ooooo# .#ooo#. .#ooo#. ..###..",
    "tail": ".###. .#o#. .#o#. #ooo# #ooo# #ooo# #ooo# #ooo# .#o#. .#o#. .###.",
}
FILLINGS = {"orange": [1.0, 0.5, 0.0], "blue": [0.0, 0.25, 1.0]}
# Of each part's point from the belly's, in a figure that looks to the left.
OFFSETS = {
    "crest": (-15, -13), "head": (-15, -2), "wing": (0, -11), "belly": (0, 0), "foot": (0, 10), "tail": (13, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def figures():
    return Figures.draw(300, seed=3)


def pixel(kind, row, look):
    """The colour of one pixel of a picture."""
    texture, colour = look.split()
    if kind == "#":
        return [0.0, 0.0, 0.0]
    return [1.0, 1.0, 1.0] if texture == "striped" and row % 2 else FILLINGS[colour]


def test_every_pixel_of_a_part(figures):
    seen = set()
    for i in range(100):
        for p, part in enumerate(PARTS):
            mask = torch.zeros(48, 48, dtype=torch.bool)
            if figures.looks[i, p] < 0:
                assert figures.points[i, p].isnan().all() and not figures.masks[i, p].any()
                continue
            rows, look = PICTURES[part].split(), LOOKS[figures.looks[i, p]]
            x, y = figures.points[i, p].tolist()
            left, top = int(x - 0.5) - len(rows[0]) // 2, int(y - 0.5) - len(rows) // 2
            for r, row in enumerate(rows):
                for c, kind in enumerate(row):
                    if kind != ".":
                        mask[top + r, left + c] = True
                        assert figures.images[i, :, top + r, left + c].tolist() == pixel(kind, r, look)
            assert torch.equal(figures.masks[i, p], mask)
            assert mask[int(y), int(x)]  # the point lies on its part
            seen.add((part, look))
    assert len(seen) == len(PARTS) * len(LOOKS)


def test_ground_is_clouds_and_clutter_of_the_figures_own_colours(figures):
    outside = figures.images.movedim(1, 3)[~figures.masks.any(1)]
    cloud = ((outside >= 0.3) & (outside <= 0.65)).all(1)
    clutter = {tuple(colour) for colour in outside[~cloud].unique(dim=0).tolist()}
    assert clutter == {(0, 0, 0), (1, 1, 1), *map(tuple, FILLINGS.values())}
    assert 0.7 < cloud.double().mean() < 0.95  # 12 rectangles of 4 x 4 pixels on average
    assert outside[cloud].std(0).min() > 0.03
    assert figures.images.dtype == torch.float32 and figures.images.is_contiguous()


def test_labels_by_loops(figures):
    for looks, label in zip(figures.looks.tolist(), figures.labels.tolist(), strict=True):
        shown = {part: LOOKS[look] for part, look in zip(PARTS, looks, strict=True) if look >= 0}
        classes = [c for c, asked in enumerate(REASONS) if all(shown.get(p) == look for p, look in asked.items())]
        assert classes == ([label] if label < len(REASONS) else [])
    assert set(figures.labels.tolist()) == set(range(7))


def test_concepts_by_loops(figures):
    for label, asked in enumerate(REASONS):
        parts = [p for p in PARTS if p in asked]
        assert [PARTS[p] for p in figures.reason_parts(label)] == parts
        found = figures.shown_reasons(label)
        assert found.shape == (300, len(parts))
        for i in range(100):
            looks = figures.looks[i].tolist()
            assert found[i].tolist() == [LOOKS.index(asked[p]) == looks[PARTS.index(p)] for p in parts]


def test_no_reason_suffices():
    table = reasons_table()
    for row in table:
        for part in (row >= 0).nonzero()[:, 0]:
            assert int((table[:, part] == row[part]).sum()) >= 2
    assert (table[:, [PARTS.index("crest"), PARTS.index("tail")]] < 0).all()


def test_points_and_boxes_by_loops(figures):
    for i in range(100):
        pixels = figures.masks[i].any(0).nonzero()
        (y0, x0), (y1, x1) = pixels.amin(0).tolist(), (pixels.amax(0) + 1).tolist()
        assert figures.boxes[i].tolist() == [x0, y0, x1, y1]
    assert int(figures.masks.sum(1).max()) == 1  # parts do not overlap
    for p in range(len(PARTS)):
        seen = figures.looks[:, p] >= 0
        x = (torch.arange(48) + 0.5).expand(48, 48)
        mask = figures.masks[seen, p].float()
        middle = (mask * x).sum((1, 2)) / mask.sum((1, 2))
        assert torch.allclose(figures.points[seen, p, 0], middle)  # symmetric about the point


def test_figures_are_mirrored_and_moved():
    figures = Figures.draw(1000, seed=1, hidden=0, members=0, near_misses=0)
    assert 0.45 < figures.mirrored.double().mean() < 0.55
    belly = figures.points[:, PARTS.index("belly")]
    side = torch.where(figures.mirrored, -1, 1)
    for p, part in enumerate(PARTS):
        x, y = OFFSETS[part]
        off = figures.points[:, p] - belly - torch.stack([side * x, torch.full_like(side, y)], 1)
        reach = 0 if part == "belly" else 4  # two pixels of the part, two of the belly
        assert off.amin(0).tolist() == [-reach, -reach] and off.amax(0).tolist() == [reach, reach]
    assert figures.boxes.amin(0)[:2].tolist() == [0, 0] and figures.boxes.amax(0)[2:].tolist() == [48, 48]


def test_near_misses_lack_one_reason():
    figures = Figures.draw(1000, seed=2, members=0, near_misses=1)
    shown = [figures.shown_reasons(c) for c in range(6)]
    lacking = torch.stack([s.shape[1] - s.sum(1) for s in shown], 1)
    assert (lacking == 1).any(1).all()
    assert (figures.labels == 6).double().mean() > 0.8  # a few are of another class
    lost = (shown[0].sum(1) == 2).nonzero()[:, 0]
    each = (~shown[0][lost]).double().mean(0)
    assert each.min() > 0.2  # whichever reason it is
    looks = figures.looks[lost][:, figures.reason_parts(0)][~shown[0][lost]]
    assert 0.02 < (looks == -1).double().mean() < 0.25 and len(looks.unique()) == 5  # another look, or none
    usual = Figures.draw(1000, seed=2)
    near = torch.stack([usual.shown_reasons(c).sum(1) + 1 == usual.shown_reasons(c).shape[1] for c in range(6)], 1).any(
        1
    )
    assert (near & (usual.labels == 6)).double().mean() > 0.25


def test_members_and_the_rest():
    members = Figures.draw(900, seed=2, members=1, near_misses=0)
    assert members.labels.bincount(minlength=7).tolist()[6] == 0
    assert members.labels.bincount().min() > 110
    free = Figures.draw(3000, seed=2, members=0, near_misses=0)
    # A share of 0.9 / 4 each, and reasons independent of each other, within four standard errors.
    table = torch.stack([free.looks == look for look in range(4)], 2).double()
    assert (table.mean(0) - 0.225).abs().max() < 4 * math.sqrt(0.225 * 0.775 / 3000)
    shown = free.shown_reasons(0).double().T
    assert (shown.corrcoef() - torch.eye(3)).abs().max() < 4 / math.sqrt(3000)


def test_hidden_parts():
    nothing = Figures.draw(20, hidden=1, members=0, near_misses=0)
    assert (nothing.looks == -1).all() and (nothing.labels == 6).all()
    assert (nothing.boxes == 0).all() and nothing.points.isnan().all() and not nothing.masks.any()
    assert (Figures.draw(500, hidden=0).looks >= 0).all()
    share = (Figures.draw(1500, hidden=0.3, members=0, near_misses=0).looks < 0).double().mean()
    assert share == pytest.approx(0.3, abs=0.02)


def test_seeds():
    one, again, other = Figures.draw(20, seed=5), Figures.draw(20, seed=5), Figures.draw(20, seed=6)
    for name, a in vars(one).items():
        assert torch.equal(a.nan_to_num(-1) if a.is_floating_point() else a, getattr(again, name).nan_to_num(-1))
    assert not torch.equal(one.images, other.images) and not torch.equal(one.looks, other.looks)
    state = torch.get_rng_state()
    Figures.draw(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_of_ones_own():
    figures = Figures.draw(400, reasons=[{"tail": "plain blue"}, {"tail": "striped blue", "crest": "plain blue"}])
    blue = figures.looks[:, PARTS.index("tail")] == LOOKS.index("plain blue")
    assert torch.equal(figures.labels == 0, blue) and set(figures.labels.tolist()) == {0, 1, 2}
    assert figures.reasons.tolist() == [[-1, -1, -1, -1, -1, 2], [2, -1, -1, -1, -1, 3]]


def test_label_is_of_all_reasons():
    table = torch.tensor([[0, 1, -1], [1, -1, -1]])
    looks = torch.tensor([[0, 1, 3], [0, 0, 3], [1, 1, 1], [-1, 1, 0], [0, -1, -1]])
    assert labels_of(looks, table).tolist() == [0, 2, 1, 2, 2]


def test_templates_have_a_middle():
    for p in range(len(PARTS)):
        numbers = template(p)
        assert numbers.shape[1] % 2 == numbers.shape[2] % 2 == 1
        assert torch.equal(numbers, numbers.flip(2)) and (numbers[:, numbers.shape[1] // 2] >= 0).any(1).all()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="reasons is an empty list; describe at least one class"):
        reasons_table([])
    with pytest.raises(ValueError, match="the reason 'beak': 'plain blue' does not exist; the parts are"):
        reasons_table([{"beak": "plain blue"}])
    with pytest.raises(ValueError, match="the reason 'head': 'green' does not exist; the parts are"):
        reasons_table([{"head": "green"}])
    with pytest.raises(ValueError, match="an image could be of both class 0 and class 2"):
        reasons_table([{"head": "plain blue"}, {"head": "plain orange"}, {"tail": "plain blue"}])
    for wrong in ({"n": 0}, {"n": 3, "members": 0.9}, {"n": 3, "near_misses": -0.1}, {"n": 3, "hidden": 1.5}):
        with pytest.raises(ValueError, match=r"n=.* draw no figures; pass n from 1 on, .* with a sum of at most 1"):
            Figures.draw(**wrong)
    for label in (6, -1):
        with pytest.raises(ValueError, match=f"class {label} does not exist; pass one from 0 to 5"):
            Figures.draw(1).shown_reasons(label)


def test_a_changed_part_has_another_look_and_nothing_else_changes(figures):
    looks = set()
    for part in range(len(PARTS)):
        other = figures.changed(part, seed=5)
        shown, rest = figures.looks[:, part] >= 0, [p for p in range(len(PARTS)) if p != part]
        assert torch.equal(other.looks[:, rest], figures.looks[:, rest])
        assert torch.equal(other.looks[:, part] == figures.looks[:, part], ~shown)
        assert torch.equal(other.masks, figures.masks)
        differ = (other.images != figures.images).any(1)
        assert not bool((differ & ~figures.masks[:, part]).any()) and torch.equal(differ.any((1, 2)), shown)
        # The network by hand reads the new looks, and the labels follow them.
        Z = figures.exact_network()[:-1](other.images).reshape(-1, len(PARTS), len(LOOKS))
        assert torch.equal(Z[shown, part].argmax(1), other.looks[shown, part])
        assert torch.equal(other.labels, labels_of(other.looks, figures.reasons))
        looks |= set(((other.looks - figures.looks)[shown, part] % len(LOOKS)).tolist())
    assert looks == {1, 2, 3} and torch.equal(figures.changed(2, seed=1).looks, figures.changed(2, seed=1).looks)
    with pytest.raises(ValueError, match="part 6 does not exist; pass a number from 0 to 5"):
        figures.changed(6)
