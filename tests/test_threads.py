"""Small fits use one thread, and leave the number of threads as it was."""

import pytest
import torch

from captum_xnn.models import SRAE
from captum_xnn.models._objectives import RunningObjective
from captum_xnn.training import Recipe
from captum_xnn.training._fitting import fit
from captum_xnn.training._threads import one_thread_if_small


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("flops", "threads"), [(1e6, 1), (1e12, 3)])
def test_only_small_work_has_one_thread(three_threads, flops, threads):
    with one_thread_if_small(flops):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("width", "threads"), [(8, 1), (6000, 3)])
def test_steps_of_a_small_form_have_one_thread(three_threads, monkeypatch, width, threads):
    # 128 examples times 6 operations for each of 2 (40 + 1) width weights: 4e8 at a width of 6000
    seen, call = [], RunningObjective.__call__
    monkeypatch.setattr(
        RunningObjective, "__call__", lambda *a, **k: seen.append(torch.get_num_threads()) or call(*a, **k)
    )
    Z = torch.rand(60, 40, generator=torch.Generator().manual_seed(0))
    fit(SRAE(40, 2, hidden=(width,)), Z, Z[:, :1], recipe=Recipe(steps=2, batch_size=128))
    assert seen == [threads] * 2 and torch.get_num_threads() == 3


def test_threads_come_back_after_an_error(three_threads):
    with pytest.raises(KeyError), one_thread_if_small(1):
        raise KeyError
    assert torch.get_num_threads() == 3
