"""Fits of groups from contributions that are kept: the same numbers, without the model, and after an interruption."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from captum_xnn import XNNAttribution
from captum_xnn.activations import Activations, collect
from captum_xnn.errors import CheckpointError
from captum_xnn.models import ContributionGroups
from captum_xnn.training import Checkpoint

IMAGES = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    made.extend([nn.Linear(32, 9), nn.ReLU(), nn.Linear(9, 4)])
    with torch.no_grad():
        y = made(IMAGES)
        made[-1].bias -= y.mean(0)  # so that every class has images
    return made


def explained(model, n_features=3, layer="1"):
    return XNNAttribution(model, layer, n_features)


def groups(xnn, targets):
    return [xnn.explainer(target).form.state_dict() for target in targets]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def never(_module, _inputs):
    raise AssertionError("the model ran")


@pytest.mark.parametrize("layer", ["1", "4"])
def test_a_later_fit_from_the_store_does_not_run_the_model(model, tmp_path, layer):
    """Neither to the same number of x-features nor to another; the numbers are those of a fit from the data."""
    targets = [0, 2]
    first = explained(model, layer=layer).fit(IMAGES, targets, store=tmp_path, progress=False)
    expected = [explained(model, K, layer).fit(IMAGES, targets, progress=False) for K in (3, 2)]
    assert_same(groups(first, targets), groups(expected[0], targets))
    with model.register_forward_pre_hook(never):
        found = Activations.open(tmp_path)
        for K, wanted in zip((3, 2), expected, strict=True):
            again = explained(model, K, layer).fit(found, targets, progress=False)
            assert_same(groups(again, targets), groups(wanted, targets))
            assert again.explainer(2).f_reg == wanted.explainer(2).f_reg


def test_a_store_is_asked_for_what_it_does_not_keep(model, tmp_path):
    explained(model).fit(IMAGES, 0, store=tmp_path, progress=False)
    found = Activations.open(tmp_path)
    with pytest.raises(
        ValueError, match=r"no contributions to output 1, 3 are kept beside .*fit\(loader, target, store"
    ):
        explained(model).fit(found, [0, 1, 3], progress=False)
    with pytest.raises(ValueError, match="no contributions to output 0 are kept"):  # of other examples
        explained(model).fit(found, 0, positives=torch.arange(60) < 7, progress=False)
    kept = list((tmp_path / "contributions").iterdir())
    more = explained(model).fit(IMAGES, [0, 1, 3], store=tmp_path, progress=False)
    assert len(list((tmp_path / "contributions").iterdir())) == len(kept) + 2
    again = explained(model).fit(Activations.open(tmp_path), [0, 1, 3], progress=False)
    assert_same(groups(more, [0, 1, 3]), groups(again, [0, 1, 3]))


def test_contributions_of_another_model_are_not_taken(model, tmp_path):
    explained(model).fit(IMAGES, 0, checkpoint=tmp_path, progress=False)
    with torch.no_grad():
        model[4].weight += 0.05 * torch.randn(9, 32)
    found = explained(model).fit(IMAGES, 0, checkpoint=tmp_path, progress=False)
    assert_same(groups(found, [0]), groups(explained(model).fit(IMAGES, 0, progress=False), [0]))


@pytest.mark.parametrize("change", ["outputs", "order"])
def test_contributions_of_the_same_base_and_scale_are_not_taken(model, tmp_path, change):
    """An output of the other sign has the same weights and deviation, and reordered data have the same mean."""
    everything = torch.ones(len(IMAGES), dtype=torch.bool)

    def fitted(is_changed, folder):
        sign = -1 if is_changed and change == "outputs" else 1
        data = IMAGES[torch.arange(len(IMAGES)).roll(20)] if is_changed and change == "order" else IMAGES
        xnn = XNNAttribution(model, "1", 3, prediction_transform=lambda output: sign * output)
        xnn.autoencoder = partial(ContributionGroups, positives=9, others=20)
        return groups(xnn.fit(data, 0, positives=everything, checkpoint=folder, progress=False), [0])

    first = fitted(False, tmp_path)
    expected = fitted(True, None)
    with pytest.raises(AssertionError):
        assert_same(first, expected)
    assert_same(fitted(True, tmp_path), expected)


def test_a_store_that_was_collected_before(model, tmp_path):
    """Activations that know their inputs keep contributions beside themselves."""
    found = collect(model, "1", IMAGES, store=tmp_path)
    expected = explained(model).fit(found, 0, progress=False)
    with model.register_forward_pre_hook(never):
        assert_same(
            groups(explained(model).fit(Activations.open(tmp_path), 0, progress=False), [0]), groups(expected, [0])
        )


def test_damaged_contributions_are_named(model, tmp_path):
    explained(model).fit(IMAGES, 0, store=tmp_path, progress=False)
    (file,) = (tmp_path / "contributions").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=file.name):
        explained(model).fit(Activations.open(tmp_path), 0, progress=False)


class Cut(Exception):
    pass


def test_a_fit_that_was_cut_off_goes_on(model, tmp_path, monkeypatch):
    """Outputs that were done are not read again."""
    monkeypatch.setattr("captum_xnn.training._contributions._TARGETS", 1)
    expected = explained(model).fit(IMAGES, range(4), progress=False)
    written = []
    write = Checkpoint.write

    def cut(self, key, state):
        if len(written) == 2:
            raise Cut
        written.append(key)
        write(self, key, state)

    monkeypatch.setattr(Checkpoint, "write", cut)
    with pytest.raises(Cut):
        explained(model).fit(IMAGES, range(4), checkpoint=tmp_path, progress=False)
    rest = []
    monkeypatch.setattr(Checkpoint, "write", lambda self, key, state: (rest.append(key), write(self, key, state)))
    found = explained(model).fit(IMAGES, range(4), checkpoint=tmp_path, progress=False)
    assert_same(groups(found, range(4)), groups(expected, range(4)))
    assert len(rest) == 2 and not {*rest} & {*written}


@pytest.mark.parametrize("at_once", [1, 3])
def test_outputs_read_in_parts_are_those_read_together(model, monkeypatch, at_once):
    expected = explained(model).fit(IMAGES, range(4), progress=False)
    monkeypatch.setattr("captum_xnn.training._contributions._TARGETS", at_once)
    found = explained(model).fit(IMAGES, range(4), progress=False)
    for a, b in zip(groups(found, range(4)), groups(expected, range(4)), strict=True):
        torch.testing.assert_close(a["groups"], b["groups"], rtol=1e-4, atol=1e-5)
