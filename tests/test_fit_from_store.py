"""A fit from activations on disk is the fit from memory, number by number, and stays within a limit on memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from captum_xnn import SRAE, ConvSRAE, Recipe, XNNAttribution
from captum_xnn.activations import Activations, collect
from captum_xnn.activations import _memmap as module
from captum_xnn.activations._memmap import Rows
from captum_xnn.errors import ModelMismatchError, StoreError
from captum_xnn.models._base import encode_all
from captum_xnn.models._scaling import scaling
from captum_xnn.models._srae import by_shape
from captum_xnn.models.baselines import CAE, NMF, NN, Lasso, RandomEncoder, SingleDimensions
from captum_xnn.training._anchors import anchors
from captum_xnn.training._fitting import fit

QUICK = Recipe(steps=40)


@pytest.fixture(autouse=True)
def many_parts(monkeypatch):
    """Parts of 40 rows of 10 numbers, so that there are several of each table."""
    monkeypatch.setattr(module, "_CHUNK", 1600)


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 3))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


DATA = torch.randn(210, 5, generator=torch.Generator().manual_seed(7))
TEST = torch.randn(90, 5, generator=torch.Generator().manual_seed(8))


def on_disk(folder, table, size=64):
    folder.mkdir(exist_ok=True)
    files = []
    for i, part in enumerate(table.split(size)):
        files.append(folder / f"{i:03d}.npy")
        np.save(files[-1], part.numpy())
    return Rows(files)


def explained(model, layer="1", **settings):
    settings = {"autoencoder": partial(SRAE, hidden=(6,)), "recipe": QUICK} | settings
    return XNNAttribution(model, layer, 2, **settings)


def same(a, b):
    """Whether two XNNAttributions learned the same numbers."""
    assert a.explainers_.keys() == b.explainers_.keys()
    for key, one in a.explainers_.items():
        other = b.explainers_[key]
        mine, theirs = one.form.state_dict(), other.form.state_dict()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine), key
        assert (one.f_reg, one.history, one.positives, one.examples, one.floor) == (
            other.f_reg,
            other.history,
            other.positives,
            other.examples,
            other.floor,
        )
    return True


# --- the parts of a fit


@pytest.mark.parametrize("shape", [(10,), (4, 3, 2)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_scaling_is_that_of_the_whole(tmp_path, shape, offset):
    Z = torch.rand(150, *shape) + offset
    y = torch.rand(150, 2)
    over = [d for d in range(Z.dim()) if d != 1]
    for found in (scaling(Z, y), scaling(on_disk(tmp_path, Z), y)):
        torch.testing.assert_close(found.Z_mean, Z.double().mean(over).float())
        torch.testing.assert_close(found.Z_std[0], Z.double().var(over).mean().sqrt().float(), rtol=1e-5, atol=0)
        assert found.Z_std.shape == (shape[0],)
        assert torch.equal(found.y_std, y.std(0))


@pytest.mark.parametrize("outputs", [1, 3])
def test_anchors_are_those_of_partial_least_squares_by_deflation(tmp_path, outputs):
    """Written again as textbooks have it: a direction, its score, and all that it explains taken out of Z."""
    Z = torch.rand(300, 10, dtype=torch.float64) + 5
    y = torch.randn(300, outputs, dtype=torch.float64) + Z[:, :outputs]
    w = torch.rand(300, dtype=torch.float64)
    w = w / w.sum()
    left, r, scores = Z - w @ Z, y - w @ y, []
    for _ in range(4):
        direction = torch.linalg.svd(left.T @ (w[:, None] * r), full_matrices=False)[0][:, 0]
        t = left @ direction
        t = t / ((w * t) @ t).sqrt()
        left = left - t[:, None] * ((w * t) @ left)
        r = r - t[:, None] * ((w * t) @ r)
        scores.append(t)
    T = torch.stack(scores, 1)
    T = T - T.mean(0)
    for table in (Z, on_disk(tmp_path, Z)):
        made = anchors(table, y, 4, weight=w)
        # the same span: anchors are a rotation of the whitened scores
        torch.testing.assert_close(T @ torch.linalg.lstsq(T, made.E).solution, made.E)
        torch.testing.assert_close(made.E.T @ made.E / 300, torch.eye(4, dtype=torch.float64))
    assert torch.equal(anchors(Z, y, 4, weight=w).E, made.E)


FORMS = [partial(SRAE, hidden=(6,)), NN, CAE, RandomEncoder, SingleDimensions, partial(Lasso, alpha=0.01), NMF]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_learns_the_same_from_disk(tmp_path, form):
    Z = torch.rand(210, 10)
    y = 3 * Z[:, :1] - 2 * Z[:, 1:2]
    positives = y[:, 0] > 1.5
    made = []
    for table in (Z, on_disk(tmp_path, Z)):
        torch.manual_seed(0)
        xnn = form(10, 2)
        history = fit(xnn, table, y, positives=positives, recipe=QUICK)
        made.append((xnn.state_dict(), history, encode_all(xnn, table, batch_size=64)))
    (a, history, E), (b, again, E_again) = made
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert history == again and torch.equal(E, E_again)


def test_feature_maps_learn_the_same_from_disk(tmp_path):
    Z = torch.rand(100, 3, 4, 4)
    y = Z[:, :1].amax((2, 3))
    made = []
    for table in (Z, on_disk(tmp_path, Z, 30)):
        xnn = ConvSRAE((3, 4, 4), 2)
        fit(xnn, table, y, recipe=QUICK)
        made.append(xnn.state_dict())
    assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])


def test_what_cannot_be_learned_from(tmp_path):
    Z = torch.ones(9, 4)
    with pytest.raises(ValueError, match="activations are the same for every example; check"):
        fit(SRAE(4, 2, hidden=()), on_disk(tmp_path, Z), torch.rand(9, 1))
    with pytest.raises(ValueError, match="needs at least two examples, not 1; pass more data"):
        fit(SRAE(4, 2, hidden=()), on_disk(tmp_path / "one", Z[:1]), torch.rand(1, 1))


# --- through the front door


@pytest.mark.parametrize("kind", ["one", "several", "joint", "positives", "conv", "double", "bfloat16", "single"])
def test_fit_with_a_store_is_fit_without(model, tmp_path, kind):
    layer, target, settings, of_fit, data = "1", 0, {}, {}, DATA
    if kind == "several":
        target = [0, 2]
    elif kind == "joint":
        target, of_fit = (0, 2), {"joint": True}
    elif kind == "positives":
        of_fit = {"positives": DATA[:, 0] > 1}
    elif kind == "conv":
        model = nn.Sequential(nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.Flatten())
        model.append(nn.Linear(24, 3))
        layer, settings = "2", {"autoencoder": by_shape}
    elif kind in ("double", "bfloat16"):
        dtype = getattr(torch, kind)
        model, data = model.to(dtype), DATA.to(dtype)
    elif kind == "single":
        model[2], target, of_fit = nn.Linear(10, 1), None, {}
    memory = explained(model, layer, **settings).fit(data, target, progress=False, **of_fit)
    disk = explained(model, layer, **settings).fit(data, target, store=tmp_path, progress=False, **of_fit)
    assert same(memory, disk)
    again = explained(model, layer, **settings).fit(Activations.open(tmp_path), target, progress=False, **of_fit)
    assert same(memory, again)


def test_score_from_a_store(model, tmp_path):
    xnn = explained(model).fit(DATA, 0, progress=False)
    expected = xnn.score(TEST, 0)
    found = [xnn.score(TEST, 0, store=tmp_path), xnn.score(Activations.open(tmp_path), 0)]
    for score in [*found, xnn.score(collect(model, "1", TEST), 0)]:
        assert score.f_reg == pytest.approx(expected.f_reg, rel=1e-5)
        assert (score.f_cls, score.examples) == (expected.f_cls, 90)
    explainer = xnn.explainer(0)
    with torch.no_grad():
        y_hat, y_bar = model(TEST), explainer.form(model[:2](TEST)).y_bar[:, 0]
    replaced = torch.cat([y_bar[:, None], y_hat[:, 1:]], 1)
    assert expected.f_cls == pytest.approx(float((replaced.argmax(1) == y_hat.argmax(1)).double().mean()))


def test_activations_are_taken_without_running_the_model(model, tmp_path):
    found = collect(model, "1", DATA, store=tmp_path)
    xnn = explained(model)
    expected = explained(model).fit(DATA, 0, progress=False)

    def never(_module, _inputs):
        raise AssertionError("the model ran")

    with model.register_forward_pre_hook(never):
        xnn.fit(found, 0, progress=False)
        lazy = explained(model, train_data=found)
        lazy.explainer(0)
    assert same(xnn, expected) and same(lazy, expected)


def test_activations_of_another_shape_are_refused_by_score(model):
    xnn, found = explained(model).fit(DATA, 0, progress=False), collect(model, "1", TEST)
    with pytest.raises(ModelMismatchError, match=r"layer '1' gives \(9,\) values per example, and gave 10"):
        xnn.score(Activations(found.Z[:, :9], found.y_hat, "1"), 0)


def test_activations_of_something_else(model, tmp_path):
    found = collect(model, "1", DATA, store=tmp_path)
    with pytest.raises(ModelMismatchError, match="layer is 0, was 1"):
        explained(model, "0").fit(found, 0)
    fitted = explained(model).fit(found, 0, progress=False)
    with pytest.raises(StoreError, match="was begun with other data"):
        fitted.score(TEST, 0, store=tmp_path)
    with torch.no_grad():
        model[2].bias[0] += 1
    with pytest.raises(ModelMismatchError, match=r"2\.bias has other values"):
        explained(model).fit(found, 0)
    with pytest.raises(ModelMismatchError, match=r"2\.bias has other values"):
        explained(model).fit(DATA, 0, store=tmp_path)
    with pytest.raises(ValueError, match="the data are activations that were collected already"):
        explained(model).fit(found, 0, store=tmp_path)


def test_warnings_and_errors_of_outputs_are_as_in_memory(model, tmp_path):
    softmax = nn.Sequential(*model, nn.Softmax(1))
    with pytest.raises(ValueError, match="outputs are non-negative and sum to 1"):
        explained(softmax).fit(DATA, 0, store=tmp_path / "a", progress=False)
    model[2].bias.data[1] = -1000
    with pytest.raises(ValueError, match="the model gives class 1 to none of 210 examples"):
        explained(model).fit(DATA, 1, store=tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match=r"target 3 is outside the model's outputs \(3,\)"):
        explained(model).fit(DATA, 3, store=tmp_path / "b", progress=False)


# --- memory


LIMITED = """
    import resource, sys
    from functools import partial
    import torch
    torch.set_num_threads(1)
    from torch import nn
    from captum_xnn import Recipe, SRAE, XNNAttribution
    from captum_xnn.activations import Activations

    folder, kind, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
    network = partial(SRAE, hidden=(20,))
    def explained(width, steps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
        return XNNAttribution(model, "1", 3, recipe=Recipe(steps=steps), autoencoder=network)
    def batches(count, size):
        g = torch.Generator().manual_seed(1)
        for _ in range(count):
            yield torch.randn(size, 8, generator=g)
    def memory(name):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10

    explained(16, 3).fit(batches(2, 64), 0, progress=False)  # what the libraries load at their first use
    limit = memory("VmData") + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    count = 10 * limit // (512 * 4096 * 4) + 1
    xnn = explained(4096, 60)
    try:
        if kind == "collect":
            xnn.fit(batches(count, 512), 0, store=folder, progress=False)
            print(xnn.explainer(0).examples, round(xnn.explainer(0).f_reg, 4), xnn.score(Activations.open(folder), 0))
        else:
            found = Activations.open(folder, checksums=False)
            xnn.fit(found._replace(Z=found.Z[:]), 0, progress=False)
    except (MemoryError, RuntimeError) as error:
        print("no memory:", error)
    print("limit", limit)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs limits on memory")
def test_a_store_ten_times_larger_than_the_limit_on_memory(tmp_path):
    """Collecting, fitting, and scoring with 320 MiB beside what the libraries take (data of their own, 300 to 400 MB,
    which differs between machines), from a store ten times as large as both together."""

    def run(kind):
        command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path), kind, str(320 << 20)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = run("collect")
    size = sum(file.stat().st_size for file in tmp_path.glob("Z-*.npy"))
    assert "no memory" not in told and "Faithfulness(" in told, told
    assert size >= 10 * int(told.split()[-1])
    assert int(told.split()[0]) * 4096 * 4 + 128 * len(list(tmp_path.glob("Z-*.npy"))) == size
    assert "no memory" in run("memory")
