"""Data are read twice, for activations and for contributions: loaders of every kind, and data that change between."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.models.baselines import DRSA

FORMS = {"groups": None, "subspaces": DRSA, "learned": partial(SRAE, hidden=(4,))}
X = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def explainer(form):
    return XNNAttribution(network(), "1", 3, autoencoder=FORMS[form], recipe=Recipe(steps=10))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, range(len(X)), strict=True))


class Shuffled(IterableDataset):
    """Another order in every run."""

    runs = 0

    def __iter__(self):
        self.runs += 1
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(self.runs))
        return iter([(X[i], 0) for i in order])


class Augmented(Dataset):
    """Other noise in every run, from a generator of its own."""

    generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + 0.5 * torch.randn(6, generator=self.generator), 0


class Once:
    """Has no more batches when it is read again, and does not say so."""

    def __init__(self):
        self.batches = iter([X[:40], X[40:]])

    def __iter__(self):
        return self.batches


LOADERS = {
    "stream": lambda: DataLoader(Stream(), 16),
    "shuffle": lambda: DataLoader(TensorDataset(X), 16, shuffle=True),
    "generator": lambda: (batch for batch in X.split(16)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_give_the_numbers_of_their_tensors(form, kind):
    wanted = explainer(form).fit(X, 0, progress=False)
    xnn = explainer(form)
    xnn.fit(LOADERS[kind](), 0, progress=False)
    score = xnn.score(LOADERS[kind](), 0)
    assert score.examples == 80
    if form == "learned" and kind == "shuffle":
        return  # learns from the examples in the loader's order
    made = xnn.contributions(X[:4], 0).contributions
    torch.testing.assert_close(made, wanted.contributions(X[:4], 0).contributions)
    assert score.f_reg == pytest.approx(wanted.score(X, 0).f_reg, rel=1e-4, abs=1e-6)  # DRSA errs by rounding alone


CHANGING = {"order": lambda: DataLoader(Shuffled(), 16), "augmentation": lambda: DataLoader(Augmented(), 16)}


@pytest.mark.parametrize("form", ["groups", "subspaces"])
@pytest.mark.parametrize("kind", CHANGING)
def test_data_that_change_between_readings_are_refused(form, kind):
    with pytest.raises(
        ValueError, match=r"the data changed: example \d+ gives other values .*; pass the same examples"
    ):
        explainer(form).fit(CHANGING[kind](), 0, progress=False)
    with pytest.raises(ValueError, match=r"the data changed"):
        explainer(form).fit(X, 0, progress=False).score(CHANGING[kind](), 0)
    explainer("learned").fit(CHANGING[kind](), 0, progress=False)  # reads once


@pytest.mark.parametrize("form", ["groups", "subspaces"])
def test_data_that_end_early_are_refused(form):
    with pytest.raises(ValueError, match=r"ended early when they were read again: 0 of \d+ .*list\(batches\)"):
        explainer(form).fit(Once(), 0, progress=False)
    xnn = explainer(form).fit(list(Once()), 0, progress=False)  # as the error advises
    with pytest.raises(ValueError, match=r"ended early when they were read again: 0 of 80"):
        xnn.score(Once(), 0)


def test_a_store_of_other_data_is_noticed_by_the_activations(tmp_path):
    """The first example is the same, and so is its checksum."""
    other = torch.cat([X[:1], X[1:].flip(0)])
    explainer("learned").fit(X, 0, store=tmp_path / "store", progress=False)
    with pytest.raises(ValueError, match=r"the data changed: example \d+ .*a store of other data"):
        explainer("groups").fit(other, 0, store=tmp_path / "store", progress=False)
