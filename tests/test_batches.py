"""Batches with the number of their first example, of which only those wanted are loaded."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from captum_xnn import XNNAttribution
from captum_xnn.activations import collect
from captum_xnn.activations._batches import Batches, as_they_come, first_inputs, repeatable
from captum_xnn.activations._unpacking import first_of_batch

X = torch.arange(22.0).reshape(11, 2)


class Seen(Dataset):
    def __init__(self):
        self.read = []

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.read.append(i)
        return X[i], i


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, range(len(X)), strict=True))


class Own(DataLoader):
    """A loader that may do anything in its iteration."""

    def __iter__(self):
        yield from DataLoader(self.dataset, self.batch_size)


def numbered(data, wanted=lambda first, after: True, batch_size=4):
    return [(b.first, b.rows, b.inputs) for b in Batches(data, batch_size, first_of_batch).where(wanted)]


def expected(sizes):
    return list(zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, X.split(sizes), strict=True))


def same(found, wanted):
    return [b[:2] for b in found] == [b[:2] for b in wanted] and all(
        torch.equal(a[2], b[2]) for a, b in zip(found, wanted, strict=True)
    )


KINDS = {
    "tensor": lambda: X,
    "loader": lambda: DataLoader(Seen(), 4),
    "stream": lambda: DataLoader(Stream(), 4),
    "own": lambda: Own(Seen(), 4),
    "list": lambda: list(X.split(4)),
    "generator": lambda: iter(X.split(4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_batches(kind):
    assert same(numbered(KINDS[kind]()), expected([4, 4, 3]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_and_those_wanted(kind):
    indexed = kind in ("tensor", "loader")
    assert Batches(KINDS[kind](), 4, first_of_batch).examples == (11 if indexed else None)
    found = numbered(KINDS[kind](), lambda first, after: (first, after) == (8, 11))
    assert same(found, [expected([4, 4, 3])[i] for i in ((0, 2) if indexed else (0, 1, 2))])


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_at_the_first_takes_nothing_away(kind):
    batches = Batches(KINDS[kind](), 4, first_of_batch)
    assert torch.equal(batches.first().inputs, X[:4]) and batches.first() is batches.first()
    assert same([b[:3] for b in batches.where(lambda first, after: True)], expected([4, 4, 3]))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_processes_take_turns(kind, world):
    turns = expected([4, 4, 3])
    for rank in range(world):
        batches = Batches(KINDS[kind](), 4, first_of_batch)
        assert same([b[:3] for b in batches.share(rank, world)], turns[rank::world])
        assert batches.examples == 11


def test_what_is_not_wanted_is_not_read():
    data = Seen()
    numbered(DataLoader(data, 4), lambda first, after: first == 8)
    assert data.read == [0, 1, 2, 3, 8, 9, 10]


def test_batches_of_any_size_and_order():
    batches = BatchSampler([4, 3, 2, 7, 0], 2, drop_last=False)
    found = numbered(DataLoader(Seen(), batch_sampler=batches), lambda first, after: first == 4)
    assert [b[:2] for b in found] == [(0, 2), (4, 1)]
    assert torch.equal(found[0][2], X[[4, 3]]) and torch.equal(found[1][2], X[[0]])


def test_batches_are_made_as_the_loader_makes_them():
    loader = DataLoader(Seen(), 4, collate_fn=lambda rows: torch.stack([x for x, _ in rows]) * 2)
    assert torch.equal(torch.cat([b[2] for b in numbered(loader)]), 2 * X)


def test_several_inputs():
    ((first, rows, inputs), *_) = numbered((X, X + 1), batch_size=5)
    assert (first, rows) == (0, 5) and torch.equal(inputs[1], X[:5] + 1)
    with pytest.raises(ValueError, match=r"inputs differ in their number of examples, with shapes"):
        Batches((X, X[:10]), 4, first_of_batch)
    with pytest.raises(TypeError, match="the data are of type int; pass a tensor, a tuple of tensors or an iterable"):
        Batches(3, 4, first_of_batch)


def test_no_data():
    for data in (X[:0], [], iter([]), DataLoader(X[:0])):
        assert Batches(data, 4, first_of_batch).first() is None
        assert numbered(data) == []


def test_inputs_are_told_apart():
    made = first_inputs(X, 3)
    assert made == first_inputs(X[2:], 1) == first_inputs((X[3:], "text"), 0)
    assert made != first_inputs(X + 1e-5, 3) and made != first_inputs(X, 4)
    assert first_inputs((X, X), 3) != first_inputs((X, X + 1), 3)
    assert first_inputs(X.bfloat16(), 3) == first_inputs(X.bfloat16(), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_picked_examples(kind):
    wanted = torch.tensor([10, 0, 5, 5, 3, 9])
    found = list(Batches(KINDS[kind](), 4, first_of_batch).picked(wanted))
    numbers = torch.cat([p.rows for p in found])
    alone = kind in ("tensor", "loader")  # others load whole batches
    assert numbers.tolist() == ([0, 3, 5, 9, 10] if alone else list(range(11)))
    assert all(torch.equal(p.inputs, X[p.rows]) and len(p.rows) <= 4 for p in found)
    assert all(torch.equal(p.on(torch.device("cpu"))[0][0], X[p.rows]) for p in found)
    assert list(Batches(X, 4, first_of_batch).picked(wanted[:0])) == []


def test_picked_examples_of_small_batches_come_in_larger_ones_that_fit_in_memory(monkeypatch):
    """The first batch is as large as the loader's; a loader that pads keeps its batches."""
    wanted = torch.tensor([10, 0, 5, 3, 9, 7, 8])
    for least, room, sizes in ((4, 4, [2, 4, 1]), (1, 4, [2, 2, 2, 1]), (64, 3, [2, 3, 2]), (64, 1, [2, 2, 2, 1])):
        monkeypatch.setattr("captum_xnn.activations._batches._BYTES", room * X[0].numel() * X.element_size())
        data = Seen()
        found = list(Batches(DataLoader(data, 2), 2, first_of_batch).picked(wanted, least=least))
        assert [len(p.rows) for p in found] == sizes
        assert all(torch.equal(p.inputs, X[p.rows]) for p in found)
        assert data.read == torch.cat([p.rows for p in found]).tolist() == [0, 3, 5, 7, 8, 9, 10]
    padding = DataLoader(Seen(), 2, collate_fn=lambda examples: (torch.stack([x for x, _ in examples]),))
    assert [len(p.rows) for p in Batches(padding, 2, first_of_batch).picked(wanted, least=64)] == [2] * 5 + [1]


def test_a_loader_loads_picked_examples_alone_unless_it_pads():
    read = []
    for join in (None, list, lambda examples: (torch.stack([x for x, _ in examples]),)):
        data = Seen()
        loader = DataLoader(data, 4, collate_fn=join)
        picked = list(Batches(loader, 4, first_of_batch if join is not list else unpacked).picked(torch.tensor([9, 1])))
        assert all(torch.equal(p.inputs, X[p.rows]) for p in picked)
        read.append(data.read)
    assert read == [[1, 9], [1, 9], [0, 1, 2, 3, 8, 9, 10]]


def unpacked(examples):
    return torch.stack([x for x, _ in examples]), None


def test_a_data_set_gives_the_batches_of_its_loader():
    data, state = Seen(), torch.get_rng_state()
    made = numbered(data)
    assert torch.equal(state, torch.get_rng_state())
    for (a, n, x), (b, m, y) in zip(made, numbered(DataLoader(Seen(), 4)), strict=True):
        assert (a, n) == (b, m) and torch.equal(x, y)
    skipping = Seen()
    numbered(skipping, lambda first, after: first == 8)
    assert skipping.read == [0, 1, 2, 3, 8, 9, 10]
    assert [len(x) for x, _ in repeatable(data)] == [11]


class Only(Seen):
    """Examples that are an input alone."""

    def __getitem__(self, i):
        return X[i]


@pytest.mark.parametrize("kind", [Seen, Only])
def test_fit_and_score_and_collect_take_a_data_set(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1)).requires_grad_(False)
    found = collect(model, "1", kind(), batch_size=3)
    torch.testing.assert_close(found.Z, model[:2](X))
    made = [XNNAttribution(model, "1", 2).fit(data, progress=False) for data in (X, kind())]
    inputs = X[:3]
    torch.testing.assert_close(made[0].explain(inputs).contributions, made[1].explain(inputs).contributions)
    assert made[0].score(X).f_reg == pytest.approx(made[0].score(kind()).f_reg, abs=1e-5)


def test_examples_that_are_dicts_become_batches_of_dicts():
    class Named(Seen):
        def __getitem__(self, i):
            return {"input": X[i], "label": i}

    assert set(next(iter(repeatable(Named())))) == {"input", "label"}
    assert len(next(iter(repeatable(Named())))["input"]) == 11


class Odd(Dataset):
    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([(Fraction(1), 0)], "gives a Fraction as an example's input; give it a transform to tensors"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 1)], r"of the shapes \(2,\), \(3,\), which cannot be stacked"),
    ],
)
def test_a_data_set_that_cannot_be_batched_says_why(examples, said):
    with pytest.raises(TypeError, match=said):
        collect(nn.Sequential(nn.Linear(2, 1)), "0", Odd(examples))


def test_batches_as_they_come_leave_out_empty_ones():
    batches = [torch.zeros(3, 1), torch.zeros(0, 1), torch.zeros(2, 1)]
    found = as_they_come(batches, 4, lambda batch: (batch, None))
    assert [len(inputs) for inputs, _ in found] == [3, 2]
    assert list(as_they_come(torch.zeros(0, 1), 4, lambda batch: (batch, None))) == []
