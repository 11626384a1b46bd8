"""Rows on disk give what a tensor gives, whatever is asked for, and an error where a file changed meanwhile."""

import pickle
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from captum_xnn.activations import _memmap as module
from captum_xnn.activations._memmap import Rows, chunks, each, head


def written(folder, table, sizes):
    files = []
    for i, part in enumerate(torch.split(table, sizes)):
        files.append(folder / f"{i:03d}.npy")
        np.save(files[-1], part.numpy())
    return files


@pytest.fixture
def table():
    return torch.randn(23, 3, 2)


@pytest.fixture
def rows(table, tmp_path):
    return Rows(written(tmp_path, table, [7, 1, 9, 6]))


def test_any_rows_are_those_of_the_tensor(rows, table):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        numbers = torch.randint(23, (40,), generator=generator)
        assert torch.equal(rows[numbers], table[numbers])
    mask = torch.rand(23, generator=generator) < 0.5
    assert torch.equal(rows[mask], table[mask])
    for chosen in (slice(None), slice(5, 9), slice(-4, None), slice(20, 90), slice(9, 5), slice(1, 20, 3)):
        assert torch.equal(rows[chosen], table[chosen])
    assert torch.equal(rows[torch.arange(6, 18)], table[6:18])  # across three files
    assert rows[torch.tensor([], dtype=torch.int64)].shape == (0, 3, 2)


@pytest.mark.parametrize("size", [1, 4, 7, 23, 100])
def test_split_is_that_of_the_tensor(rows, table, size):
    mine, theirs = list(rows.split(size)), list(table.split(size))
    assert [len(part) for part in mine] == [len(part) for part in theirs]
    assert torch.equal(torch.cat(mine), table)


def test_shape_dtype_and_device(rows, table):
    assert (rows.shape, rows.dtype, rows.device, rows.dim(), len(rows)) == (
        table.shape,
        table.dtype,
        table.device,
        3,
        23,
    )


def test_functions_are_applied_to_what_is_read(rows, table):
    mapped = rows.map(lambda z: z.flatten(1)).map(lambda z: (2 * z).double())
    assert (mapped.shape, mapped.dtype) == ((23, 6), torch.float64)
    numbers = torch.tensor([22, 0, 7])
    assert torch.equal(mapped[numbers], 2 * table.flatten(1)[numbers].double())
    assert rows.shape == table.shape  # the original is as it was
    assert torch.equal(each(rows, torch.neg)[:], each(table, torch.neg))


def test_what_is_read_is_the_readers_own(rows, table):
    rows[:].zero_()
    assert torch.equal(rows[:], table)


def test_chunks_are_the_same_of_both_kinds(rows, table, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 4 * 6 * 5)
    assert [len(chunk) for chunk in chunks(rows)] == [len(chunk) for chunk in chunks(table)] == [5, 5, 5, 5, 3]
    # whatever dtype they are read in
    assert [len(chunk) for chunk in chunks(rows.map(torch.Tensor.double))] == [5, 5, 5, 5, 3]
    assert all(torch.equal(a, b) for a, b in zip(chunks(rows), chunks(table), strict=True))


def test_more_files_than_may_be_open(table, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_OPEN", 2)
    rows = Rows(written(tmp_path, table, 1))
    order = torch.randperm(23)
    assert torch.equal(rows[order], table[order])
    assert len(rows._files.open) == 2


def test_files_are_closed_with_the_rows(table, tmp_path):
    rows = Rows(written(tmp_path, table, 9))
    rows[:]
    handles = list(rows._files.open.values())
    mapped = rows.map(torch.neg)
    del rows
    assert not any(handle.closed for handle in handles)  # the mapped ones read the same files
    del mapped
    assert all(handle.closed for handle in handles)


def test_threads_and_forked_processes_read_at_the_same_time(rows, table):
    wrong = []

    def read(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            numbers = torch.randint(23, (5,), generator=generator)
            if not torch.equal(rows[numbers], table[numbers]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Reading(torch.utils.data.Dataset):
    """Reads a row from files that were open before the loader's workers were forked."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[torch.tensor([i])][0]


@pytest.mark.filterwarnings("ignore:.*fork")  # newer Pythons warn of it
def test_workers_of_a_loader(rows, table):
    rows[:]
    loader = DataLoader(Reading(rows), batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), table)


def test_pickled(rows, table):
    assert torch.equal(pickle.loads(pickle.dumps(rows))[:], table)


def test_numbers_out_of_range(rows):
    for numbers in ([23], [-1], [0, 99]):
        with pytest.raises(IndexError, match="row indices must be from 0 to 22, not"):
            rows[torch.tensor(numbers)]


def test_a_file_cut_short_after_it_was_opened(rows, tmp_path):
    file = tmp_path / "002.npy"
    file.write_bytes(file.read_bytes()[:-10])
    assert len(rows[torch.tensor([0, 8])]) == 2  # what is still there
    with pytest.raises(OSError, match=r"002\.npy has \d+ bytes instead of \d+, as it was cut short since"):
        rows[torch.tensor([16])]


def test_files_that_do_not_belong_together(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((2, 4), np.float32))
    np.save(tmp_path / "c.npy", np.zeros((2, 3), np.float64))
    np.save(tmp_path / "f.npy", np.asfortranarray(np.zeros((2, 3))))
    np.save(tmp_path / "scalar.npy", np.float64(1))
    for other in ("b.npy", "c.npy"):
        with pytest.raises(ValueError, match="one shape and dtype, and these 2 files have 2 kinds"):
            Rows([tmp_path / "a.npy", tmp_path / other])
    with pytest.raises(ValueError, match="these 0 files have 0 kinds"):
        Rows([])
    for other in ("f.npy", "scalar.npy"):
        with pytest.raises(ValueError, match="does not hold rows of numbers in C order"):
            head(tmp_path / other)
