"""What processes tell each other, in three real ones; and what a rank is alone."""

import os

import pytest
import torch
from torch import multiprocessing

from captum_xnn._distributed import ALONE, Ranks, launched, speaks
from captum_xnn.activations._collecting import collect_together
from captum_xnn.models._base import Reconstruction
from captum_xnn.models._objectives import RunningObjective

WORLD = 3
M, D, K = 12, 4, 2


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(ranks, weight):
    """The terms of Eq. 5 of two batches, one after the other, and the gradient of the latter in an encoder's weight."""
    running = RunningObjective(beta=0.7, eta=0.3, rho=0.4, ranks=ranks)
    for seed in (1, 2):
        rows = ranks.part(torch.arange(M))
        Z, y, marked = (drawn(M, n, seed=10 * seed + n)[rows] for n in (D, 1, 3))
        E = Z @ weight
        made = Reconstruction(E, E.sum(1, keepdim=True), E @ drawn(K, D, seed=5))
        terms = running(made, Z, y, weight=marked[:, 0].square())
    weight.grad = None
    terms.total.backward()
    ranks.average(weight.grad)
    return torch.stack(list(terms)).detach(), weight.grad


def found_by(ranks):
    own = torch.tensor([1.0, 10.0, 100.0])[ranks.rank] * torch.ones(2)
    averaged = own.clone()
    ranks.average(averaged)
    given = own.clone().requires_grad_()
    ranks.mean(given).square().sum().backward()
    terms, gradient = objective(ranks, drawn(D, K, seed=7).requires_grad_())
    ranks.wait()
    return {
        "rank": (ranks.rank, ranks.world, ranks.first),
        "part": ranks.part(torch.arange(14).reshape(2, 7)).tolist(),
        "average": averaged.tolist(),
        "mean": ranks.mean(own).tolist(),
        "gradient of the mean": given.grad.tolist(),
        "same": ranks.same(own.clone()).tolist(),
        "same of a view": ranks.same((own[:1] * torch.ones(3, 4))[:, ::2]).tolist(),
        "all_of": ranks.all_of(("who", ranks.rank)),
        "terms": terms,
        "gradient": gradient,
    }


def process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD)
    torch.save(found_by(Ranks.here()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_what_three_processes_tell_each_other(tmp_path):
    multiprocessing.start_processes(process, (str(tmp_path),), WORLD, start_method="spawn")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    alone = objective(ALONE, drawn(D, K, seed=7).requires_grad_())
    for rank, one in enumerate(found):
        assert one["rank"] == (rank, 3, rank == 0)
        assert one["average"] == one["mean"] == [37.0, 37.0]
        # The derivative of sum(mean^2) in the mean: those of the weights are averaged afterwards.
        assert one["gradient of the mean"] == [74.0, 74.0]
        assert one["same"] == [1.0, 1.0] and one["same of a view"] == [[1.0, 1.0]] * 3
        assert one["all_of"] == [("who", 0), ("who", 1), ("who", 2)]
        # Eq. 5 and its gradient are those of one process that sees all rows.
        torch.testing.assert_close(one["terms"], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one["gradient"], alone[1], rtol=1e-12, atol=1e-12)
    assert [one["part"][1] for one in found] == [[7, 10, 13], [8, 11], [9, 12]]


def test_alone():
    values = torch.tensor([1.0, 2.0])
    ALONE.average(values)
    assert ALONE.first and ALONE.mean(values) is values is ALONE.same(values)
    assert values.tolist() == [1.0, 2.0] and ALONE.all_of(3) == [3]


def test_one_process_of_torchrun_speaks(monkeypatch):
    assert speaks()
    monkeypatch.setitem(os.environ, "RANK", "1")  # as other launchers set it as well
    assert speaks()
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    assert not speaks()
    monkeypatch.setitem(os.environ, "RANK", "0")
    assert speaks()


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            RuntimeError("[gloo/pair.cc:553] Connection closed by peer"),
            r"another process was lost \(\[gloo/pair.cc:553\] Conn.*stay",
        ),
        (torch.distributed.DistNetworkError("Connection reset"), r"was lost \(Connection reset\); look for the"),
        (RuntimeError("out of memory"), "^out of memory$"),
        (ValueError("expected gloo"), "^expected gloo$"),
    ],
)
def test_a_process_that_lost_another_says_so(raised, told, monkeypatch):
    ended = []
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: ended.append(True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(type(raised) if told.startswith("^") else RuntimeError, match=told), launched() as many:
        assert many
        raise raised
    assert ended == [True]


# --- collecting


class Other(Ranks):
    """The second of two processes, of which the first says what it is told to say."""

    says = None

    def all_of(self, own):
        return [own if type(self).says is None else type(self).says(own), own]


def collected(data, model=None, **settings):
    model = model or torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    return collect_together(model, "1", data, ranks=Other(1, 2), **settings)


def test_processes_that_are_not_alike_are_refused(monkeypatch):
    data = torch.rand(10, 4)
    for what, other in (("model", "another"), ("data", (9, "0"))):
        monkeypatch.setattr(Other, "says", lambda own, changed={what: other}: (own[0], {**own[1], **changed}))
        with pytest.raises(ValueError, match=f"not all processes have the same {what}"):
            collected(data, batch_size=5)
    monkeypatch.setattr(Other, "says", None)
    assert len(collected(data, batch_size=5).Z) == 10  # the second half, twice


def test_of_data_in_no_order_processes_would_take_some_twice():
    loader = torch.utils.data.DataLoader(torch.rand(10, 4), 5, shuffle=True)
    with pytest.raises(ValueError, match=r"in a new order every time, with a RandomSampler"):
        collected(loader)


def test_what_another_process_takes_is_not_loaded():
    loaded = []

    class Noting(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            loaded.append(i)
            return torch.full((4,), float(i))

    collected(torch.utils.data.DataLoader(Noting(), 2))
    # The first batch is compared between processes; of the others every second is this one's.
    assert loaded == [0, 1, 2, 3, 6, 7]


def test_no_data():
    with pytest.raises(ValueError, match="the data have no examples to collect activations from"):
        collected(iter([]))
