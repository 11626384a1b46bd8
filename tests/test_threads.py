"""Fits of small models use one thread, because several wait for each other; large models keep theirs."""

import pytest
import torch
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.activations import collect
from captum_xnn.layers._threads import one_thread_if_small, pass_flops


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Counting(nn.Module):
    """A model that counts torch's threads at each call."""

    def __init__(self, width):
        super().__init__()
        self.first, self.last, self.seen = nn.Linear(6, width), nn.Linear(width, 3), []

    def forward(self, x):
        self.seen.append((len(x), torch.get_num_threads()))
        return self.last(torch.relu(self.first(x)))


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("form", "width"), [(None, 16), (SRAE, 16)])
def test_fits_of_small_models_use_one_thread(form, width):
    model = Counting(width)
    xnn = XNNAttribution(model, "first", n_features=2, autoencoder=form, recipe=Recipe(steps=3) if form else None)
    xnn.fit(torch.randn(100, 6, generator=torch.Generator().manual_seed(0)), target=0, progress=False)
    assert {threads for _, threads in model.seen} == {1}
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_models_of_large_products_keep_their_threads(tmp_path):
    model = Counting(400_000)
    collect(model, "last", torch.randn(64, 6))
    collect(model, "last", torch.randn(64, 6), store=tmp_path)
    assert {threads for rows, threads in model.seen if rows == 64} == {3}


def test_the_number_comes_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="in between"), one_thread_if_small(1.0):
        raise RuntimeError("in between")
    assert torch.get_num_threads() == before


def test_no_pass_is_called_smaller_than_it_is():
    """Counts by hand: a convolution that keeps the size of its image, a layer on vectors, and one on tokens."""
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert pass_flops(conv, torch.zeros(2, 3, 10, 10)) >= 2 * 2 * 8 * 27 * 100
    line = nn.Linear(5, 7, bias=False)
    assert pass_flops(line, (torch.zeros(4, 5), "text")) == 2 * 4 * 35
    assert pass_flops(line, (torch.zeros(4, 9, 5),)) >= 2 * 4 * 9 * 35
    tokens = nn.Embedding(20, 5)
    assert pass_flops(nn.Sequential(tokens, line), torch.zeros(4, 9, dtype=torch.long)) >= 2 * 4 * 9 * 35
    assert pass_flops(line, (None,)) == 0
