"""Activations on disk: the same as in memory, whatever ended an earlier run, and no silence about what is wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from captum_xnn._files import replace_file
from captum_xnn.activations import Activations, collect, collect_part
from captum_xnn.activations import _store as module
from captum_xnn.activations._store import Store
from captum_xnn.errors import ModelMismatchError, StoreError

M, SHARD = 23, 5


def whole(*shape, seed=0):
    """Small integers: what a model makes of them is exact, however examples are put into batches."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


# No two are the same.
DATA = torch.cat([torch.arange(M).float()[:, None], whole(M, 3, seed=10)], 1)


class Counted(nn.Module):
    """A model that keeps outside of itself on which inputs it ran."""

    def __init__(self, seen):
        super().__init__()
        self.fc, self.relu, self.head = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(whole(*p.shape, seed=i))
        self.seen = seen

    def forward(self, x):
        self.seen.extend(x.detach().clone())
        return self.head(self.relu(self.fc(x)))

    def __repr__(self):
        return "Counted"


@pytest.fixture
def seen():
    return []


@pytest.fixture
def model(seen):
    return Counted(seen)


def numbers(seen):
    """Which examples the model saw, each counted as often."""
    return sorted(int((x == DATA).all(1).nonzero()[0]) for x in seen)


def into(folder, model, data=DATA, **settings):
    settings = {"batch_size": 4, "rows_per_shard": SHARD} | settings
    return collect(model, "relu", data, store=folder, **settings)


def same(found, model, data=DATA):
    expected = collect(model, "relu", data)
    return (
        torch.equal(found.Z[:], expected.Z)
        and torch.equal(found.y_hat[:], expected.y_hat)
        and found.layer == expected.layer
        and (found.Z.shape, found.Z.dtype) == (expected.Z.shape, expected.Z.dtype)
    )


class Broken(Dataset):
    """Examples of which one cannot be read, until it is repaired; keeps which were read."""

    def __init__(self, bad=None, error=None):
        self.bad, self.error, self.read = bad, error or ValueError("cannot read image 13"), []

    def __len__(self):
        return M

    def __getitem__(self, i):
        if i == self.bad:
            raise self.error
        self.read.append(i)
        return DATA[i], 0


# --- what is written


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 100])
@pytest.mark.parametrize("shard", [1, 5, 23, 24])
def test_a_store_holds_what_memory_would(model, tmp_path, batch_size, shard):
    assert same(into(tmp_path, model, batch_size=batch_size, rows_per_shard=shard), model)
    assert len(list(tmp_path.glob("Z-*.npy"))) == -(-M // shard)


@pytest.mark.parametrize(
    "kind", ["tensor", "tuple", "loader", "workers", "drop_last", "subset", "list", "generator", "unbatched"]
)
def test_data_of_every_kind(model, tmp_path, kind):
    pairs = TensorDataset(DATA, torch.arange(M))
    data = {
        "tensor": lambda: DATA,
        "tuple": lambda: (DATA,),
        "loader": lambda: DataLoader(pairs, 4),
        "workers": lambda: DataLoader(pairs, 4, num_workers=2),
        "drop_last": lambda: DataLoader(pairs, 4, drop_last=True),
        "subset": lambda: DataLoader(pairs, 4, sampler=list(range(20, 3, -2))),
        "list": lambda: list(DATA.split(6)),
        "generator": lambda: iter(DATA.split(6)),
        "unbatched": lambda: DataLoader(DATA.split(6), batch_size=None),
    }[kind]
    assert same(into(tmp_path, model, data()), model, data())


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(tmp_path, model, dtype):
    dtype = getattr(torch, dtype)
    model, data = model.to(dtype), DATA.to(dtype)
    found = into(tmp_path, model, data)
    assert same(found, model, data)
    on_disk = np.load(tmp_path / "Z-00000.npy")
    # NumPy has no bfloat16: float32 holds the same numbers
    assert str(on_disk.dtype) == ("float32" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))
    assert torch.equal(torch.from_numpy(on_disk).to(dtype), found.Z[:SHARD])
    described = json.loads((tmp_path / "store.json").read_text())["tables"]["Z"]
    assert described == {"dtype": str(dtype).removeprefix("torch."), "stored_as": str(on_disk.dtype), "shape": [6]}


def test_feature_maps_and_a_single_output(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 1), nn.Flatten(0))
    images = torch.randn(7, 1, 6, 6)
    found, expected = collect(model, "1", images, store=tmp_path, rows_per_shard=3), collect(model, "1", images)
    assert (found.Z.shape, found.y_hat.shape) == ((7, 3, 4, 4), (7,))
    assert torch.equal(found.Z[:], expected.Z) and torch.equal(found.y_hat[:], expected.y_hat)


def test_numpy_reads_the_files_as_memory_maps(model, tmp_path):
    into(tmp_path, model)
    maps = [np.load(file, mmap_mode="r") for file in sorted(tmp_path.glob("Z-*.npy"))]
    assert all(isinstance(values, np.memmap) for values in maps)
    assert torch.equal(torch.from_numpy(np.concatenate(maps)), collect(model, "relu", DATA).Z)


def test_the_manifest_says_what_it_is(model, tmp_path):
    found = into(tmp_path, model)
    manifest = json.loads((tmp_path / "store.json").read_text())
    assert (manifest["schema"], manifest["rows"], manifest["rows_per_shard"]) == (module.SCHEMA, M, SHARD)
    assert manifest["fingerprint"] == found.fingerprint and manifest["fingerprint"]["layer"] == "relu"
    assert set(manifest["fingerprint"]["tensors"]) == set(model.state_dict())
    entry = json.loads((tmp_path / "shard-00004.json").read_text())
    assert entry["rows"] == M % SHARD
    assert entry["files"]["Z"] == {"name": "Z-00004.npy", "sha256": module.file_checksum(tmp_path / "Z-00004.npy")}
    assert not list(tmp_path.glob(".*"))  # no drafts


def test_shards_are_of_moderate_size(tmp_path):
    """4,096 examples, or as many as are 64 MiB: 100 floats of 4 bytes and a table of 1,048,476."""
    about = {"fingerprint": {"layer": "fc"}}
    small = Store.create(tmp_path / "a", about, {"Z": torch.zeros(2, 100), "y_hat": torch.zeros(2)})
    large = Store.create(tmp_path / "b", about, {"Z": torch.zeros(2, 100), "y_hat": torch.zeros(2, (1 << 20) - 100)})
    assert (small.rows_per_shard, large.rows_per_shard) == (4096, 16)


# --- going on


def test_a_second_call_runs_nothing(model, seen, tmp_path):
    into(tmp_path, model)
    seen.clear()
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.npy")}
    data = Broken()
    assert same(into(tmp_path, model, DataLoader(data, 4)), Counted([]))
    assert not seen
    assert sorted(data.read) == [0, 1, 2, 3]  # to see that they are the same data
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.npy")} == times


@pytest.mark.parametrize("error", [ValueError("cannot read image 13"), KeyboardInterrupt()])
def test_what_was_finished_stays_when_the_loader_raises(model, seen, tmp_path, error):
    with pytest.raises(type(error)) as raised:
        into(tmp_path, model, DataLoader(Broken(13, error), 4))
    if hasattr(raised.value, "__notes__"):
        assert raised.value.__notes__ == [
            f"2 finished shards of activations stay in {tmp_path}; the same call resumes from there"
        ]
    with pytest.raises(StoreError, match=r"does not hold 5 whole shards: shard 2 is not collected yet; shard 3"):
        Activations.open(tmp_path)
    seen.clear()
    data = Broken()
    assert same(into(tmp_path, model, DataLoader(data, 4)), Counted([]))
    assert numbers(seen) == list(range(8, M))  # whole batches: two examples of the second shard are among them
    assert sorted(data.read) == [0, 1, 2, 3, *range(8, M)]


def test_iterables_are_read_again_but_the_model_is_not_run(model, seen, tmp_path):
    def batches(until):
        for first in range(0, M, 4):
            if first == until:
                raise ConnectionError("lost")
            yield DATA[first : first + 4]

    with pytest.raises(ConnectionError, match="lost"):
        into(tmp_path, model, batches(12))
    with pytest.raises(StoreError, match="never read to their end; collect again"):
        Activations.open(tmp_path)
    seen.clear()
    assert same(into(tmp_path, model, batches(None)), Counted([]))
    assert numbers(seen) == list(range(8, M))


def test_the_size_of_batches_may_change(model, seen, tmp_path):
    with pytest.raises(ValueError, match="image 13"):
        into(tmp_path, model, DataLoader(Broken(13), 4))
    seen.clear()
    assert same(into(tmp_path, model, DataLoader(Broken(), 2)), Counted([]))
    assert numbers(seen) == list(range(10, M))


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import test_store as t

    model = t.Counted([])
    for k in range(1, 60):
        folder = Path({folder!r}) / str(k)
        child = os.fork()
        if not child:
            calls = 0
            def dying(real):
                def call(*arguments):
                    global calls
                    calls += 1
                    if calls == k:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments)
                return call
            for name in ("fsync", "replace"):
                setattr(os, name, dying(getattr(os, name)))
            t.into(folder, t.Counted([]), rows_per_shard=12)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            break
        # whatever is said to be done is whole
        store = t.Store.open(folder) if t.Store.exists(folder) else None
        done = [i for i in range(2) if store and store.begun(i)]
        assert all(store.damage(i) is None for i in done), k
        seen = []
        assert t.same(t.into(folder, t.Counted(seen), rows_per_shard=12), model), k
        again = [i for i in done if set(range(i * 12, min(i * 12 + 12, t.M))) <= set(t.numbers(seen))]
        assert not again, (k, again)
        assert not list(folder.glob(".Z*")) + list(folder.glob(".y*")) + list(folder.glob(".shard*"))
    print(k)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_point_of_writing(tmp_path):
    """kill -9 right before every fsync and every move of a file into place, one after the other."""
    code = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * (1 + 3 * 2) + 1  # a manifest, and three files for each shard


SLOW = """
    import sys
    sys.path.insert(0, {tests!r})
    import time, torch
    torch.set_num_threads(1)
    import test_store as t

    def batches():
        for batch in t.DATA.split(1):
            time.sleep(0.05)
            yield batch
    print("begins", flush=True)
    t.into({folder!r}, t.Counted([]), batches())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and file locks")
def test_a_second_process_is_told_and_a_killed_one_leaves_no_lock(model, seen, tmp_path):
    code = textwrap.dedent(SLOW).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    running = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "shard-00001.json").exists() and running.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(StoreError, match=r"another process already collects into .* as rank 0; wait"):
            into(tmp_path, model)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
    assert running.returncode == -signal.SIGKILL
    done = len(list(tmp_path.glob("shard-*.json")))
    assert 2 <= done < 5
    seen.clear()
    assert same(into(tmp_path, model), Counted([]))
    assert not set(range(done * SHARD - 4)) & set(numbers(seen))


# --- a disk that fills


def test_a_full_disk(model, seen, tmp_path, monkeypatch):
    written = []

    def full(path, *data):
        if path.name == "y_hat-00002.npy":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path.name)
        replace_file(path, *data)

    monkeypatch.setattr(module, "replace_file", full)
    with pytest.raises(OSError, match=r"no room for shard 2 .*finished shards stay: make room and") as raised:
        into(tmp_path, model)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "y_hat-00002.npy"))
    assert written[-1] == "Z-00002.npy"
    monkeypatch.undo()
    seen.clear()
    assert same(into(tmp_path, model), Counted([]))
    assert numbers(seen) == list(range(8, M))


LIMITED = """
    import resource, sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    import test_store as t

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100_000))
    try:
        t.into({folder!r}, t.Counted([]))
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on processes")
def test_a_real_limit_on_files(tmp_path):
    code = textwrap.dedent(LIMITED).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "no room for the manifest" in done.stdout and "store.json" in done.stdout, done.stderr
    assert not list(tmp_path.glob(".*")) and not Store.exists(tmp_path)


# --- damage


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def cut_in_the_head(file):
    file.write_bytes(file.read_bytes()[:40])


def lengthened(file):
    file.write_bytes(file.read_bytes() + b"1234")


def changed(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def swapped(file):
    file.write_bytes((file.parent / file.name.replace("3", "1")).read_bytes())


def other_shape(file):
    np.save(file, np.zeros((SHARD, 2), np.float32))


DAMAGE = [
    (cut, "Z-00003.npy", r"shard 3 has Z-00003.npy with 241 bytes instead of 248: it was cut short"),
    (cut_in_the_head, "Z-00003.npy", "shard 3 has Z-00003.npy, whose beginning cannot be read"),
    (lengthened, "y_hat-00003.npy", "shard 3 has y_hat-00003.npy with 192 bytes instead of 188"),
    (changed, "Z-00003.npy", "shard 3 has Z-00003.npy with another checksum"),
    (swapped, "y_hat-00003.npy", "shard 3 has y_hat-00003.npy with another checksum"),
    (other_shape, "Z-00003.npy", r"shard 3 has Z-00003.npy with shape \(5, 2\) instead of \(5, 6\)"),
    (Path.unlink, "y_hat-00003.npy", "shard 3 lacks y_hat-00003.npy"),
    (Path.unlink, "shard-00003.json", "shard 3 is not collected yet"),
    (cut, "shard-00003.json", "shard 3 is described by shard-00003.json, which is damaged"),
    (lambda file: file.write_text("[]"), "shard-00003.json", "shard 3 is described by .* which is damaged"),
    (lambda file: edit(rows=4)(file), "shard-00003.json", "shard 3 has 4 examples instead of 5"),
    (lambda file: edit(store="?")(file), "shard-00003.json", "shard 3 is of another model or other data than"),
]


@pytest.mark.parametrize(("damage", "name", "text"), DAMAGE)
def test_damage_is_told_and_that_shard_alone_is_made_again(model, seen, tmp_path, caplog, damage, name, text):
    into(tmp_path, model)
    others = {file: file.stat().st_mtime_ns for file in tmp_path.glob("Z-*.npy") if "3" not in file.name}
    damage(tmp_path / name)
    with pytest.raises(StoreError, match=f"does not hold 5 whole shards: {text}.*; collect again with the same"):
        Activations.open(tmp_path)
    seen.clear()
    assert same(into(tmp_path, model), Counted([]))
    assert numbers(seen) == list(range(12, 20))  # the batches of examples 15 to 19
    assert {file: file.stat().st_mtime_ns for file in others} == others
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == ("not collected" not in text) and all("shard 3 in" in line for line in told)
    assert same(Activations.open(tmp_path), Counted([]))


def test_without_checksums_sizes_are_compared(model, tmp_path):
    into(tmp_path, model)
    changed(tmp_path / "Z-00003.npy")
    Activations.open(tmp_path, checksums=False)
    cut(tmp_path / "Z-00003.npy")
    with pytest.raises(StoreError, match="cut short"):
        Activations.open(tmp_path, checksums=False)


def test_many_damaged_shards_are_counted(model, tmp_path):
    into(tmp_path, model)
    for file in tmp_path.glob("Z-*.npy"):
        changed(file)
    with pytest.raises(StoreError, match=r"shard 0 has .*; shard 1 has .*; shard 2 has .* and 2 more; collect again"):
        Activations.open(tmp_path)


def edit(**entries):
    def change(file):
        manifest = json.loads(file.read_text()) | entries
        file.write_text(json.dumps({k: v for k, v in manifest.items() if v != "drop"}))

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Path.unlink, r"has no store.json; pass the folder"),
        (cut, r"store.json' is cut short, or is not JSON .*; pass the folder"),
        (
            lambda file: file.write_text("[1, 2]"),
            "is JSON, but does not describe activations, which have 'kind': .*; pass the folder",
        ),
        (lambda file: file.write_text('{"schema": 1}'), "does not describe activations"),
        (edit(schema=99), r"has schema 99 instead of 1, as another version .* collect into another folder"),
        (edit(tables={}), r"the manifest .* lacks entries; delete it and collect anew"),
        (edit(rows_per_shard="drop"), "lacks entries"),
        (edit(fingerprint=None), "lacks entries"),
    ],
)
def test_manifests_that_are_not_ours(model, tmp_path, change, text):
    into(tmp_path, model)
    change(tmp_path / "store.json")
    with pytest.raises(StoreError, match=text):
        Activations.open(tmp_path)
    if (tmp_path / "store.json").exists():
        with pytest.raises(StoreError, match=text):  # and nobody writes over it
            into(tmp_path, model)


# --- another model, layer or data


def test_another_model_or_layer(model, tmp_path):
    found = into(tmp_path, model)
    found.check(model, "relu")
    other = Counted([])
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    for again in (lambda: into(tmp_path, other), lambda: found.check(other, "relu")):
        with pytest.raises(ModelMismatchError, match=r"head\.weight has other values.*into another folder"):
            again()
    for again in (lambda: collect(model, "fc", DATA, store=tmp_path), lambda: found.check(model, "fc")):
        with pytest.raises(ModelMismatchError, match="layer is fc, was relu"):
            again()
    with pytest.raises(ModelMismatchError, match="layer is fc, was relu"):
        collect(model, "relu", DATA).check(model, "fc")  # in memory only the layer is known
    collect(model, "relu", DATA).check(other, "relu")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (DATA + 1e-3, r"was begun with other data: the inputs differ in example 0; pass the same data"),
        (DATA.flip(0), "inputs differ in example 0"),
        (DATA[:-1], r"begun with 23 examples, and these data have 22; pass the same data"),
        (torch.cat([DATA, DATA]), r"begun with 23 examples, .* have 46"),
        (list(DATA[:22].split(4)), r"begun with 23 examples, .* have 22"),
        (list(torch.cat([DATA[:10], DATA[10:].flip(0)]).split(4)), "inputs differ in example 10"),
    ],
)
def test_other_data(model, tmp_path, data, text):
    into(tmp_path, model)
    with pytest.raises(StoreError, match=text):
        into(tmp_path, model, data)
    assert same(Activations.open(tmp_path), model)


def test_shards_of_another_model_are_never_taken_for_ones_of_this(model, seen, tmp_path):
    """A folder whose manifest was deleted begins anew."""
    into(tmp_path, model)
    (tmp_path / "store.json").unlink()
    other_seen = []
    other = Counted(other_seen)
    with torch.no_grad():
        other.head.bias += 1
    assert same(into(tmp_path, other, batch_size=M), other)
    trials = [0, M - 1] * 3  # two examples by themselves, with gradients, and to count the layer's calls
    assert numbers(other_seen[: 2 * M + 6]) == sorted([*range(M)] * 2 + trials)  # once for the layer's shape


def test_other_settings(model, tmp_path):
    into(tmp_path, model)
    assert same(into(tmp_path, model, rows_per_shard=None), model)
    with pytest.raises(StoreError, match=f"begun with rows_per_shard={SHARD}, .* has 7; leave it out"):
        into(tmp_path, model, rows_per_shard=7)
    with pytest.raises(StoreError, match=r"begun with transforms \[\], .* has \['prediction_transform'\]"):
        into(tmp_path, model, prediction_transform=lambda y: y[:, :2])
    (tmp_path / "shard-00001.json").unlink()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(StoreError, match=r"in float32, .* in torch.bfloat16"):
        into(tmp_path, model)


def test_another_transform_of_the_same_shape(model, seen, tmp_path):
    """The manifest knows only that there is one; what it makes of the first examples tells it from another."""

    def positive(z):
        return z.clamp(min=0)

    into(tmp_path, model, output_transform=positive)
    for transform, off in ((lambda z: 2 * positive(z), 1.0), (lambda z: 1.2 * positive(z), 0.2)):
        most = collect(model, "relu", DATA[:4]).Z.max()
        with pytest.raises(StoreError, match=f"transforms: Z differs by up to {float(most * off):.3g}; pass the same"):
            into(tmp_path, model, output_transform=transform)
    seen.clear()
    found = into(tmp_path, model, output_transform=lambda z: z.relu() * 1.001)  # as on another device
    assert numbers(seen) == [0, 1, 2, 3]
    assert torch.equal(found.Z[:], collect(model, "relu", DATA).Z)
    found = found.Z[:]
    # A first shard that is damaged tells nothing.
    np.save(tmp_path / "Z-00000.npy", np.full((SHARD, 6), 99.0, np.float32))
    assert torch.equal(into(tmp_path, model, output_transform=positive).Z[:], found)


def test_loaders_that_shuffle_or_share(model, tmp_path):
    data = TensorDataset(DATA)
    for sampler in (
        torch.utils.data.RandomSampler(data),
        torch.utils.data.SubsetRandomSampler(range(9)),
        torch.utils.data.WeightedRandomSampler([1.0] * M, 9),
    ):
        with pytest.raises(ValueError, match=f"a new order every time, with a {type(sampler).__name__}"):
            into(tmp_path, model, DataLoader(data, 4, sampler=sampler))
    batches = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(data), 4, drop_last=False)
    with pytest.raises(ValueError, match="pass a loader with shuffle=False"):
        into(tmp_path, model, DataLoader(data, batch_sampler=batches))
    part = DistributedSampler(data, num_replicas=2, rank=0, shuffle=False)
    with pytest.raises(ValueError, match="each of 2 processes only a share of the examples, with a DistributedSampler"):
        into(tmp_path, model, DataLoader(data, 4, sampler=part))
    assert not list(tmp_path.iterdir())


def test_rows_that_are_not_those_of_the_inputs(model, tmp_path):
    def without_bad(examples):
        return torch.stack([x for x in examples if x is not DATA[9]][: 3 if len(examples) == 4 else None])

    with pytest.raises(ValueError, match="layer 'relu' gives 3 rows for 4 examples from example 0 on"):
        into(tmp_path, model, DataLoader(DATA, 4, collate_fn=without_bad))
    with pytest.raises(TypeError, match=r"inputs \(str\) contain no tensor with a row for each example"):
        into(tmp_path / "b", model, ["words"], unpack=lambda batch: (batch, None))


def test_nothing_to_collect(model, tmp_path):
    for data in (DATA[:0], [], DataLoader(TensorDataset(DATA[:0]), 4)):
        with pytest.raises(ValueError, match="the data have no examples to collect activations from"):
            into(tmp_path, model, data)
    assert not Store.exists(tmp_path)


def test_nan_stops_before_its_shard(model, tmp_path):
    data = DATA.clone()
    data[11] = torch.nan
    with pytest.raises(ValueError, match="is NaN or infinite in example 11"):
        into(tmp_path, model, data)
    assert sorted(file.name for file in tmp_path.glob("shard-*")) == ["shard-00000.json"]


# --- several processes


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1)])
@pytest.mark.parametrize("kind", ["tensor", "generator"])
def test_ranks_share_the_shards(model, seen, tmp_path, order, kind):
    for done, rank in enumerate(order):
        if done:
            with pytest.raises(StoreError, match="is not collected yet"):
                Activations.open(tmp_path)
        seen.clear()
        data = DATA if kind == "tensor" else iter(DATA.split(1))
        folder = collect_part(
            model, "relu", data, tmp_path, rank=rank, world_size=len(order), batch_size=1, rows_per_shard=SHARD
        )
        probe = [0, 0] if not done else []  # of the first to come: the shape of the layer's output, and its calls
        mine = [i for i in range(M) if i // SHARD % len(order) == rank]
        assert numbers(seen) == sorted(probe + mine)
    assert same(Activations.open(folder), Counted([]))


def test_ranks_at_the_same_time(model, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; torch.set_num_threads(1);"
        "import test_store as t; t.collect_part(t.Counted([]), 'relu', t.DATA, sys.argv[1], rank=int(sys.argv[2]),"
        "world_size=2, batch_size=4, rows_per_shard=2)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(rank)], cwd=Path(__file__).parents[1])
        for rank in range(2)
    ]
    assert [process.wait() for process in running] == [0, 0]
    assert same(Activations.open(tmp_path), model)


def test_a_rank_lost_is_made_up_for_by_any_number(model, seen, tmp_path):
    collect_part(model, "relu", DATA, tmp_path, rank=0, world_size=2, batch_size=1, rows_per_shard=SHARD)
    seen.clear()
    assert same(into(tmp_path, model, batch_size=1), Counted([]))
    assert numbers(seen) == [*range(5, 10), *range(15, 20)]


def test_a_rank_with_other_data(model, seen, tmp_path):
    """Although none of the shards that are its own to do have been begun."""
    collect_part(model, "relu", DATA, tmp_path, rank=0, world_size=2, rows_per_shard=SHARD)
    seen.clear()
    with pytest.raises(StoreError, match="inputs differ in example 0"):
        collect_part(model, "relu", DATA + 1e-3, tmp_path, rank=1, world_size=2)
    assert not seen


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_none(model, tmp_path, rank):
    with pytest.raises(ValueError, match=f"rank is {rank}, and there are 2 processes; pass each its own rank, 0 to 1"):
        collect_part(model, "relu", DATA, tmp_path, rank=rank, world_size=2)


def test_the_model_is_as_it_was(model, tmp_path):
    model.train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    into(tmp_path, model)
    assert model.training and not model.relu._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
