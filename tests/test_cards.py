"""Cards: the same as from all numbers and maps at once, whatever the batches, in bounded memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from torch import nn
from torch.utils.data import default_collate

from captum_xnn import Recipe, XNNAttribution
from captum_xnn.datasets._parts import PartsSample
from captum_xnn.datasets._places import SceneSample
from captum_xnn.explainer import Explainers
from captum_xnn.metrics import part_probabilities, typicality
from captum_xnn.models._srae import by_shape
from captum_xnn.report._cards import Card, CardStream, _Moments, annotated_places, feature_cards
from captum_xnn.report._thumbnails import crop_box

KEEP = 4


@pytest.fixture(scope="module")
def everything(explained):
    """All numbers and maps at once."""
    xnn, images, target = explained
    why = xnn.explain(images, target=target)
    heat = why.directed_maps().sum(2)
    y_hat = xnn.model(images)
    mass = heat.clamp(min=0).double().sum((2, 3))
    return SimpleNamespace(
        E=why.features.double(),
        vE=why.contributions.double(),
        heat=heat,
        y_hat=y_hat,
        own=(y_hat.argmax(1) == target).nonzero()[:, 0],
        map_shares=mass / mass.sum(1, keepdim=True),
    )


@pytest.fixture(scope="module")
def cards(explained):
    xnn, images, target = explained
    return feature_cards(xnn, images, target, keep=KEEP)


def numbers(examples) -> list[int]:
    return [e.number for e in examples]


def first(values, rows, k, *, sign=1.0) -> list[int]:
    """The rows with the largest values of one x-feature, by Python's sort."""
    return sorted(rows.tolist(), key=lambda row: -sign * float(values[row, k]))[:KEEP]


def test_lists_are_those_of_a_sort_of_all_numbers(cards: tuple[Card, ...], everything) -> None:
    a = everything
    everyone = torch.arange(len(a.E))
    for k, card in enumerate(cards):
        assert (card.feature, card.target, card.examples, card.positives) == (k, 1, 90, 30)
        present = 1.0 if a.vE[a.own, k].mean() >= 0 else -1.0
        assert numbers(card.contributes) == first(a.vE, a.own, k, sign=present)
        assert numbers(card.absent) == first(a.vE, a.own, k, sign=-present)
        assert numbers(card.fires) == first(a.E, everyone, k, sign=1.0 if a.E[a.own, k].mean() >= 0 else -1.0)
        # Shares of maps that are drawn in batches agree to rounding, so their values are compared.
        best = torch.tensor([a.map_shares[row, k] for row in first(a.map_shares, a.own, k)])
        shares = torch.tensor([e.map_share for e in card.fills], dtype=torch.float64)
        assert torch.allclose(shares, best, atol=1e-6)


def test_examples_have_their_own_numbers_image_and_map(cards: tuple[Card, ...], everything, explained) -> None:
    _, images, _ = explained
    a = everything
    for k, card in enumerate(cards):
        for e in (*card.fires, *card.contributes, *card.fills, *card.absent):
            assert torch.equal(e.image, images[e.number])
            assert e.feature == pytest.approx(float(a.E[e.number, k]), abs=1e-5)
            assert e.contribution == pytest.approx(float(a.vE[e.number, k]), abs=1e-5)
            assert e.prediction == pytest.approx(float(a.y_hat[e.number, 1]), abs=1e-5)
            assert e.given == int(a.y_hat[e.number].argmax())
            assert torch.allclose(e.heat, a.heat[e.number, k], atol=1e-6)
            assert e.crop == crop_box(e.heat, (24, 24))
            if e.number in a.own.tolist():
                assert e.map_share == pytest.approx(float(a.map_shares[e.number, k]), abs=1e-5)
            else:
                assert e.map_share is None


def test_shares_means_and_deviations_are_those_of_the_class(cards: tuple[Card, ...], everything) -> None:
    own = everything.vE[everything.own].numpy()
    size = np.abs(own).sum(0)
    for k, card in enumerate(cards):
        assert card.share == pytest.approx(size[k] / size.sum())
        assert card.contribution == pytest.approx(own[:, k].mean(), abs=1e-5)
        assert card.deviation == pytest.approx(own[:, k].std(), abs=1e-5)


def test_correlations_are_numpys(cards: tuple[Card, ...], everything) -> None:
    a = everything
    E, vE, y_hat = a.E.numpy(), a.vE.numpy(), a.y_hat.numpy()
    for k, card in enumerate(cards):
        for j in range(3):
            assert float(card.feature_correlations[j]) == pytest.approx(np.corrcoef(E[:, k], E[:, j])[0, 1], abs=1e-5)
            assert float(card.output_correlations[j]) == pytest.approx(
                np.corrcoef(vE[:, k], y_hat[:, j])[0, 1], abs=1e-5
            )


def test_sign_of_an_x_feature_means_nothing(cards: tuple[Card, ...], explained) -> None:
    xnn, images, target = explained
    explainer = xnn.explainer(target)
    turned = copy.deepcopy(explainer.form)
    last = [module for module in turned.encoder.modules() if isinstance(module, nn.Linear)][-1]
    for tensor in (last.weight, last.bias):
        tensor.data.neg_()
    turned.head.weight.data.neg_()
    other = copy.copy(xnn)
    other.explainers_ = Explainers({(explainer.layer, explainer.targets): replace(explainer, form=turned)})
    for card, flipped in zip(cards, feature_cards(other, images, target, keep=KEEP), strict=True):
        assert [e.feature for e in flipped.fires] == pytest.approx([-e.feature for e in card.fires], abs=1e-5)
        for name in ("fires", "contributes", "fills", "absent"):
            assert numbers(getattr(flipped, name)) == numbers(getattr(card, name)), name
        assert flipped.share == pytest.approx(card.share)
        assert torch.allclose(flipped.output_correlations, card.output_correlations, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 90])
def test_batches_make_no_difference(cards: tuple[Card, ...], explained, size: int) -> None:
    xnn, images, target = explained
    labels = torch.zeros(len(images))
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    for card, other in zip(cards, feature_cards(xnn, batches, target, keep=KEEP), strict=True):
        assert numbers(other.contributes) == numbers(card.contributes)
        assert numbers(other.fires) == numbers(card.fires)
        assert other.share == pytest.approx(card.share, abs=1e-6)  # float32, in sums of another order
        assert torch.allclose(other.output_correlations, card.output_correlations, atol=1e-9)


def test_images_are_kept_of_listed_examples_only(explained) -> None:
    xnn, images, target = explained
    stream = CardStream(xnn, target, 2, None, None)
    for batch in images.repeat(3, 1, 1, 1).split(10):
        stream.update(batch, batch)
        assert len(stream.kept) <= 5 * 3 * 2
        # No image is a view that keeps its whole batch in memory.
        assert all(kept.image.untyped_storage().nbytes() == images[0].nbytes for kept in stream.kept.values())


def test_correlations_of_far_and_constant_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    columns = torch.cat([columns + 1e6, torch.full((50, 1), 3.1, dtype=torch.float64)], 1)
    moments = _Moments()
    for part in columns.split(8):
        moments.update(part)
    found = moments.correlations()
    assert float(found[0, 1]) == pytest.approx(np.corrcoef(columns[:, :2].T.numpy())[0, 1], abs=1e-8)
    assert found[2].tolist() == [0, 0, 0]


def annotated(images: torch.Tensor) -> list[PartsSample]:
    points = torch.tensor([[4.0, 12.0], [20.0, 12.0]])
    box = torch.tensor([2.0, 8.0, 22.0, 16.0])
    samples = [
        PartsSample(image, torch.tensor(0), points, box, torch.tensor(i)) for i, image in enumerate(images.unbind())
    ]
    return [default_collate(samples[i : i + 16]) for i in range(0, len(samples), 16)]


def test_parts_are_the_mean_over_the_class(explained, everything) -> None:
    xnn, images, target = explained
    batches = annotated(images)
    own = everything.own
    points, box = (torch.cat([getattr(b, name) for b in batches])[own] for name in ("points", "box"))
    S = part_probabilities(everything.heat[own].clamp(min=0), points, box).mean(0)
    for k, card in enumerate(feature_cards(xnn, batches, target, keep=1, places=annotated_places(2))):
        assert card.places is not None
        assert torch.allclose(card.places, S[k] / S[k].sum(), atol=1e-6)
        # The class's bar lies in the box: its parts have most of what is not context.
        assert float(card.places.sum()) == pytest.approx(1)


def test_outputs_that_are_no_classes_have_all_examples() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 1))
    images = torch.rand(40, 1, 4, 4)
    xnn = XNNAttribution(
        model, "2", n_features=2, autoencoder=by_shape, heatmap=InputXGradient, recipe=Recipe(steps=20)
    )
    cards = feature_cards(xnn.fit(images, progress=False), images, keep=3)
    assert [card.positives for card in cards] == [40, 40]
    assert cards[0].contributes[0].given is None


def test_class_that_is_never_given_is_told(explained) -> None:
    xnn, images, _ = explained
    with pytest.raises(ValueError, match="the model gives class 1 to none of the 30 examples"):
        feature_cards(xnn, images[::3], 1)


def test_inputs_that_are_no_images_are_told(explained) -> None:
    xnn, images, _ = explained
    with pytest.raises(ValueError, match=r"a batch is \(90, 1728\), and cards need batches of images \(N, C, H, W\)"):
        feature_cards(xnn, [images.flatten(1)], 1)
    with pytest.raises(ValueError, match="a tuple of 3 means several inputs of a model"):
        feature_cards(xnn, images.split(32), 1)
    with pytest.raises(ValueError, match="keep=0 leaves no examples on the cards"):
        feature_cards(xnn, images, 1, keep=0)


def test_examples_of_the_class_say_how_usual_they_are(explained, cards, everything) -> None:
    xnn, images, target = explained
    found = typicality(everything.vE[everything.own])
    shares = dict(zip(everything.own.tolist(), found.share.tolist(), strict=True))
    far = {number for number, chance in zip(shares, found.chance.tolist(), strict=True) if chance < 0.001}
    for card in cards:
        for example in (*card.fires, *card.contributes, *card.fills, *card.absent):
            assert example.usual == (pytest.approx(shares[example.number]) if example.number in shares else None)
            assert example.unusual == (example.number in far)
    few = feature_cards(xnn, images[everything.own[:19]], target, keep=KEEP)
    assert all(example.usual is None for card in few for example in card.contributes)


def test_places_come_from_the_samples_of_a_data_set() -> None:
    maps, rows = torch.rand(2, 3, 4, 6), torch.tensor([1, 0])
    masks = torch.randint(0, 3, (2, 4, 6))
    scenes = SceneSample(torch.zeros(2, 3, 4, 6), torch.zeros(2), masks, torch.arange(2))
    found = annotated_places(2)(scenes, rows, maps)
    for n, k, o in ((n, k, o) for n in range(2) for k in range(3) for o in range(2)):
        own = maps[n, k].double()
        assert float(found[n, k, o]) == pytest.approx(float(own[masks[1 - n] == o + 1].sum() / own.sum()), abs=1e-6)
    with pytest.raises(ValueError, match=r"place_names has 2 names, and the batches of the data are list without"):
        annotated_places(2)([torch.zeros(2, 3, 4, 6)], rows, maps)
