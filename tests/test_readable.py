"""What a reader sees in a terminal fits on a screen, and metrics take maps in the shape that ``explain`` gives."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from captum_xnn import Explanation, XNNAttribution
from captum_xnn.metrics import orthogonality, part_probabilities, patch_agreement, pointing_accuracy
from captum_xnn.metrics._keeping import combined
from captum_xnn.metrics._localisation import pixel_probabilities
from captum_xnn.metrics._overlap import OrthogonalityStream


def explained(n: int, K: int) -> Explanation:
    contributions = torch.randn(n, K)
    bias = torch.zeros(n)
    total = bias + contributions.sum(1)
    return Explanation(
        inputs=torch.rand(n, 3, 64, 64), maps=torch.rand(n, K, 1, 64, 64), features=contributions,
        contributions=contributions, bias=bias, surrogate=total, prediction=total + 0.1, target=(46,) * n,
        layer="relu6",
    )  # fmt: skip


@pytest.mark.parametrize(("n", "K"), [(1, 1), (3, 5), (10, 5), (500, 64)])
def test_repr_is_one_screen(n: int, K: int) -> None:
    why = explained(n, K)
    lines = repr(why).splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) <= 120
    assert lines[0].startswith(f"Explanation of {n} example") and "'relu6'" in lines[0] and f"{K} x-feature" in lines[0]
    # The number in front is the index that `show` takes; x-features count from 1, as in pictures.
    assert [int(line.split(":")[0]) for line in lines[1:11]] == [*range(min(n, 10))]
    assert (f"... and {n - 10} more" in lines[-1]) == (n > 10)
    whole = f"  0: {why.sentence(index=0)}"
    assert lines[1] == whole or (len(whole) > 118 and whole.startswith(lines[1].removesuffix("...")))
    assert "x-feature 0" not in repr(why) + str(why)


def test_repr_cuts_a_long_line_between_words_and_a_long_layer_in_its_middle() -> None:
    why = replace(explained(1, 64), layer="encoder." + "blocks." * 30 + "attention")
    head, line = repr(why).splitlines()
    assert len(head) <= 120 and "'encoder.block" in head and "attention'" in head
    assert len(line) <= 118 and line.endswith(" ...")
    words = line.removesuffix(" ...").split(" ")
    assert words[-1] in f"  0: {why.sentence(0)}".split(" ")


@pytest.mark.parametrize("shape", [(12,), (7, 5)])
def test_repr_of_tokens_and_tables_names_the_shape_of_the_maps(shape: tuple[int, ...]) -> None:
    maps = torch.rand(2, 3, *shape)
    why = replace(explained(2, 3), inputs=torch.rand(2, *shape), maps=maps)
    assert f"3 x-features, maps {tuple(maps.shape)}" in repr(why).splitlines()[0]
    both = replace(why, inputs=(torch.rand(2, *shape), torch.rand(2, 4)), maps=(maps, torch.rand(2, 3, 4)))
    assert repr(both).splitlines()[0].endswith(f"maps {tuple(maps.shape)} and (2, 3, 4)")


def test_repr_of_the_attribution_lists_its_explainers_on_one_screen() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12))
    xnn = XNNAttribution(model, "1", n_features=2)
    assert repr(xnn).splitlines() == [
        "XNNAttribution of a Sequential at layer '1': 2 x-features for each explainer",
        "  not fitted: call fit(data, target=...)",
    ]
    everything = torch.ones(40, dtype=torch.bool)
    xnn.fit(torch.randn(40, 6), target=range(12), positives=everything, progress=False)
    lines = repr(xnn).splitlines()
    assert lines[1] == "  target 0: ContributionGroups, 2 x-features, fitted on 40 examples"
    assert len(lines) == 7 and lines[-1] == "  ... and 7 more"


def test_repr_never_raises() -> None:
    why = explained(2, 3)
    assert "prediction +inf" in repr(replace(why, prediction=torch.tensor([math.inf, 1.0])))


def test_numbers_of_str_are_the_indices_of_show() -> None:
    why = explained(3, 2)
    assert str(why).splitlines() == [f"{i}: {why.describe(i)}" for i in range(3)]
    assert re.match(r"target 46: prediction [+-]\d", why.describe(1))


def test_metrics_take_maps_of_images_with_channels() -> None:
    maps, contributions = torch.rand(4, 3, 2, 16, 16), torch.rand(4, 3)
    flat = maps.sum(2)
    points, boxes = 16 * torch.rand(4, 2, 2), torch.tensor([[0.0, 0.0, 16.0, 16.0]]).expand(4, 4)
    drops = torch.randn(4, 3, 16)
    pairs: list[Any] = [
        (orthogonality(maps), orthogonality(flat)),
        (pixel_probabilities(maps), pixel_probabilities(flat)),
        (part_probabilities(maps, points, boxes), part_probabilities(flat, points, boxes)),
        (pointing_accuracy(maps, points, 4), pointing_accuracy(flat, points, 4)),
        (combined(maps, contributions), combined(flat, contributions)),
        (patch_agreement(maps, drops), patch_agreement(flat, drops)),
    ]
    for with_channels, without in pairs:
        assert torch.equal(torch.as_tensor(with_channels), torch.as_tensor(without))


@pytest.mark.parametrize("shape", [(7,), (7, 12), (2, 3, 4, 5)])
def test_orthogonality_takes_maps_of_tokens_features_and_volumes(shape: tuple[int, ...]) -> None:
    maps = torch.rand(6, 3, *shape, dtype=torch.float64)
    flat = maps.flatten(2)
    centred = flat - flat.mean(2, keepdim=True)
    C = torch.einsum("nip,njp->ij", centred, centred)
    P = C / C.diagonal().sqrt().outer(C.diagonal().sqrt())
    found = orthogonality(maps)
    assert found.o1 == pytest.approx(float((P**2).sum().sqrt()) - math.sqrt(3))
    assert found.o2 == pytest.approx(-float(torch.linalg.slogdet(P).logabsdet))
    stream = OrthogonalityStream()
    for some in maps.split(4):
        stream.update(some)
    assert stream.compute() == pytest.approx(found)


def test_orthogonality_refuses_maps_without_places() -> None:
    with pytest.raises(ValueError, match=r"maps are \(4, 3\), not \(N, K, \.\.\.\)"):
        orthogonality(torch.rand(4, 3))


def test_orthogonality_of_what_a_model_of_tables_gives() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    data = torch.randn(200, 6)
    xnn = XNNAttribution(model, "1", 3).fit(data, 0, progress=False)
    why = xnn.explain(data[:8], 0)
    assert isinstance(why.maps, torch.Tensor) and why.maps.shape == (8, 3, 6)
    assert orthogonality(why.maps, contributions=why.contributions).o1 >= 0
