"""The benchmarks run and count right; the figures themselves are theirs to print."""

import argparse
import itertools
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import nn

from captum_xnn.datasets._parts import PartsSample
from captum_xnn.training import Recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield


def test_collecting_is_timed_in_pairs():
    from benchmarks.speed import collecting

    ratios = collecting(images=8, repeats=2)
    assert len(ratios) == 2 and min(ratios) > 0


def test_fits_from_a_store_are_timed_in_pairs(monkeypatch, tmp_path, capsys):
    from benchmarks import store

    monkeypatch.setattr(store, "DIMENSIONS", 12)
    store.main(examples=300, steps=3, repeats=2, folder=tmp_path)
    printed = capsys.readouterr().out
    assert "fit of 300 x 12, 3 steps: store / memory median" in printed and "bar 1.5" in printed
    assert printed.count("128 random rows") == 4 and printed.count("a pass over") == 2


def test_figures_of_degeneration():
    from benchmarks.birds import split
    from benchmarks.degeneration import agreement, mean_correlation

    x = torch.randn(5000, 3)
    mixed = torch.stack([x[:, 0], x[:, 0] + x[:, 1], torch.zeros(5000)], 1)
    assert mean_correlation(mixed) == pytest.approx(0.5**0.5, abs=0.02)
    assert agreement(x, x[:, [2, 0, 1]]) == pytest.approx(1, abs=1e-5)
    labels = torch.arange(300) % 5
    train, test, positives = split(labels, 3)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(300)) and set(positives.tolist()) <= set(
        test.tolist()
    )
    assert labels[train[:50]].unique().tolist() == [3] and (labels[train[50:]] != 3).all()  # 50 of its 60
    assert len(positives) == 10 and (labels[positives] == 3).all()


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_the_loop_over_captum_does_the_same_work():
    from benchmarks import explaining
    from benchmarks.backend_speed import composed

    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    net = composed(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)), "1", x)
    for name, (ours, loop) in explaining.jobs(net, x).items():
        (maps,) = ours()
        assert maps.shape[:2] == (3, explaining.K)
        if name != "ExcitationBP":
            torch.testing.assert_close(maps, torch.stack(loop(), 1), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:probabilities sum to")
def test_excitation_speed(monkeypatch, capsys):
    from benchmarks import excitation_speed as speed

    names = ("saliency", "forward", "layer", "layer, MWP", "layer, K=5", "input", "input, MWP", "input, K=5")
    assert speed.ratios(dict(zip(names, (10, 4, 8, 5, 20, 16, 8, 40), strict=True))) == {
        "layer": 0.8,
        "input": 1.6,
        "layer / MWP": 1.6,
        "input / MWP": 2.0,
        "layer, K=5": 0.5,
        "input, K=5": 0.5,
        "further": 1.0,
    }

    def network(_name):
        return nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))

    monkeypatch.setattr(speed, "network", network)
    monkeypatch.setitem(speed.LAYERS, "vgg16", "1")
    speed.compare("vgg16", batch=1, repeats=2, device="cpu")
    printed = capsys.readouterr().out
    assert printed.count("bar") == len(speed.BARS["vgg16"])
    assert all(f"{ratio} " in printed for ratio in speed.BARS["vgg16"])
    if Path("/proc/self/clear_refs").exists():
        assert 0 <= speed.peak("vgg16", "layer", 1, "cpu") < 1000


@pytest.mark.slow
@pytest.mark.birds
def test_real_birds_do_not_degenerate(birds):
    """One class of twelve, through the public door: groups are exact, the learned form's x-features several."""
    from torch.utils.data import DataLoader, Subset, default_collate

    from benchmarks.birds import network
    from benchmarks.degeneration import mean_correlation
    from captum_xnn import SRAE, PaperSRAE, XNNAttribution
    from captum_xnn.datasets import CUB200
    from captum_xnn.metrics import effective_number

    model, normalise = network(birds / "cubnet" / "cubnet.py")
    images = CUB200(birds / "cub_200_2011_even", transform=normalise)
    few = images.labels.unique()[:12]
    label = int(few[4])
    rows = torch.isin(images.labels, few).nonzero()[:, 0].tolist()
    loader = DataLoader(Subset(images, rows), batch_size=32, collate_fn=lambda samples: default_collate(samples)[:2])
    exact = XNNAttribution(model, "relu6").fit(loader, target=label, progress=False).score(loader, label)
    assert exact.f_cls == 1 and exact.f_reg < 0.03
    xnn = XNNAttribution(model, "relu6", autoencoder=SRAE).fit(loader, target=label, progress=False)
    one = torch.stack([images[i].image for i in rows if images.labels[i] == label])
    explainer = xnn.explainer(label)
    with torch.no_grad():
        E = torch.cat([explainer.form.encode(xnn_activations(xnn, batch)) for batch in one.split(16)])
    several = effective_number(explainer.form.contributions(E).abs().mean(0, keepdim=True))
    printed = XNNAttribution(model, "relu6", autoencoder=PaperSRAE).fit(loader, target=label, progress=False)
    form = printed.explainer(label).form
    with torch.no_grad():
        own = torch.cat([form.encode(xnn_activations(printed, batch)) for batch in one.split(16)])
    assert several > 1.5 * effective_number(form.contributions(own).abs().mean(0, keepdim=True))  # Eq. 5 as printed
    assert (explainer.form.contributions(E).abs().mean(0) > 0.1).all()  # none is dead; in logits
    score = xnn.score(loader, label)
    assert score.f_cls >= 0.995 and score.f_reg < 0.2
    assert mean_correlation(E) < 0.6  # of one class alone, where they may well go together


def xnn_activations(xnn, batch):
    from captum_xnn.layers._lookup import find_layer
    from captum_xnn.layers._read import read_layer

    name, layer = find_layer(xnn.model, xnn.layer)
    return read_layer(xnn.model, layer, (batch,), name=name)[0]


class Pictures:
    """40 images of four classes: where a bright square is, is the class; the square is the first of two parts."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.labels = torch.arange(40) % 4
        self.images = torch.rand(40, 3, 32, 32, generator=g) * 0.3
        corners = torch.tensor([[4, 4], [20, 4], [4, 20], [20, 20]])[self.labels]
        for image, (x, y) in zip(self.images, corners.tolist(), strict=True):
            image[:, y : y + 8, x : x + 8] = 1
        self.points = torch.stack([corners + 4.0, torch.full((40, 2), float("nan"))], 1)
        self.boxes = torch.tensor([0.0, 0.0, 32.0, 32.0]).expand(40, 4)

    def __getitem__(self, i):
        return PartsSample(self.images[i], self.labels[i], self.points[i], self.boxes[i], torch.tensor(i))


@pytest.fixture(scope="module")
def few():
    """A small network that tells these pictures apart, as the birds' benchmarks take theirs."""
    from benchmarks.birds import Birds

    pictures = Pictures()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 12), nn.ReLU(),
        nn.Linear(12, 4),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(pictures.images), pictures.labels).backward()
        optimiser.step()
    with torch.no_grad():
        return Birds(model, "5", pictures, model[:6](pictures.images), model(pictures.images))


@pytest.fixture
def small(monkeypatch):
    """Makes the learned forms of explanation network small."""
    from benchmarks import one_vs_all

    monkeypatch.setattr(one_vs_all, "DIMENSIONS", 3)
    for name in ("SRAE", "NN"):
        monkeypatch.setitem(one_vs_all.METHODS, name, partial(one_vs_all.METHODS[name], hidden=(8,)))


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.usefixtures("small")
def test_table_1_on_small_pictures(few, tmp_path, monkeypatch):
    from benchmarks import birds, cub, one_vs_all
    from benchmarks.runs import interval, measured

    monkeypatch.setattr(birds, "POSITIVE_SHARE", 0.6)
    jobs = [{"method": m, "class": 2, "seed": 0} for m in ("SRAE", "NN", "1-Heatmap", "Lasso", "Z", "groups")]
    lines = measured(tmp_path, jobs, lambda job: cub.measure(few, job, maps_layer="1"))
    # Of the one visible part, or nowhere: a logarithm of 1, or of none.
    assert all(line["locality"] == pytest.approx(0, abs=1e-6) or math.isnan(line["locality"]) for line in lines)
    by = {line["method"]: line for line in lines}
    assert by["SRAE"]["f_cls"] == 1 and by["Lasso"]["train"] < 0.1  # the output is linear in this layer
    assert by["groups"]["f_cls"] == 1 and max(by["groups"]["train"], by["groups"]["test"]) < 1e-4  # and exact there
    assert 1 <= by["SRAE"]["eff"] <= 5 and "o1" not in by["1-Heatmap"] and "test" not in by["Z"]
    again = lines + [{**line, "class": 3, "train": line.get("train", math.nan) + 0.2} for line in lines]
    mean, half = interval(line["train"] for line in again if line["method"] == "NN")
    assert mean == pytest.approx(by["NN"]["train"] + 0.1)
    assert half == pytest.approx(12.706 * 0.1, rel=1e-3)  # Student's t of one degree of freedom
    difference = next(a for a in one_vs_all.advantages(again) if a["against"] == "NN")
    assert difference["test"] == pytest.approx(by["NN"]["test"] - by["SRAE"]["test"])
    text = one_vs_all.report(again, cub.PAPER)
    assert "| SRAE | 2 | " in text and "(0.0812)" in text and "| 1-Heatmap | 2 |" in text
    assert text.count("| SRAE |") == 1 and text.count("| NN | 2 |") == 2


def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    from benchmarks.runs import Column, measured, table

    jobs = [{"method": m, "class": c} for m in "ab" for c in (1, 2)]
    seen = []

    def measure(job):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(job)
        return {"value": len(seen) + 0.5, "none": math.nan}

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, jobs, measure)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"method": "b", "cla')
    lines = measured(tmp_path, jobs, lambda job: {"value": 9.5})
    assert [line["value"] for line in lines] == [1.5, 2.5, 3.5, 9.5] and lines[3]["class"] == 2
    assert measured(tmp_path, jobs, lambda job: pytest.fail("all is there"))[:3] == lines[:3]
    text = table(lines, "method", [Column("value", "Value", 1), Column("none", "None")], paper={"b": {"value": 7}})
    assert text.splitlines()[2:] == ["| a | 2 | 2.0 ± 6.4 |  |", "| b | 2 | 6.5 ± 38.1 (7) |  |"]


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.usefixtures("small")
def test_keep_top_on_small_pictures(few):
    from benchmarks import keep_top

    found = {
        kind: keep_top.measure(few, {"maps": kind, "class": 1, "seed": 0}, [64, 1024], "biharmonic")
        for kind in keep_top.MAPS
    }
    for line in found.values():  # with all pixels kept, the network sees the image as it is
        assert line["1024"] == line["original"] == 1 and line["images"] == 2
    advantage = keep_top.advantages([{"maps": k, "class": 1, "seed": 0, **line} for k, line in found.items()], [64])
    pairs = [
        ("groups", "SRAE"),
        ("groups", "1-Heatmap"),
        ("groups", "random"),
        ("SRAE", "1-Heatmap"),
        ("SRAE", "random"),
    ]
    assert [a["over"] for a in advantage] == [f"{one} less {other}" for one, other in pairs]
    assert [a["64"] for a in advantage] == [found[one]["64"] - found[other]["64"] for one, other in pairs]


def test_lasso_on_small_pictures(few):
    from benchmarks import lasso

    data = few.Z, few.y_hat
    tight, loose = (lasso.measure(data, data, 1, alpha) for alpha in (60.0, 0.2))
    assert tight["chosen"] < loose["chosen"] <= 12 and loose["train"] < tight["train"]


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.usefixtures("small")
def test_layer_by_layer_on_small_pictures(few):
    from benchmarks import conv_layers

    train, test = conv_layers.rows_of(few, 1, negatives=12)
    assert [int((few.images.labels[rows] == 1).sum()) for rows in (train, test)] == [8, 2]
    assert [len(train), len(test)] == [20, 5] and not set(train.tolist()) & set(test.tolist())
    lines = [
        conv_layers.measure(few, {"layer": at, "class": 1, "seed": 0}, negatives=12, hidden=[6], steps=200)
        for at in ("1", "5")
    ]
    assert all(line["train"] < 0.3 * line["spread"] for line in lines)


def test_probabilities_at_the_points_of_parts():
    from benchmarks.part_probabilities import at_points

    maps = torch.zeros(1, 2, 4, 5)
    maps[0, 0, 1, 2], maps[0, 0, 3, 4], maps[0, 1, 0, 0] = 1, 3, 2
    points = torch.tensor([[[2.5, 1.5], [5.0, 4.0], [math.nan, math.nan]]])  # the second on the image's very edge
    assert at_points(maps, points).tolist() == [[[0.25, 0.75, 0], [0, 0, 0]]]


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.usefixtures("small")
def test_degenerate_examples_on_small_pictures(few, tmp_path, monkeypatch):
    from benchmarks import degenerate_examples
    from benchmarks.degenerate_examples import map_correlation

    same = torch.rand(3, 2, 5, 5)
    assert map_correlation(torch.cat([same, same], 1)) > map_correlation(same)
    assert map_correlation(same[:, :1].repeat(1, 3, 1, 1)) == pytest.approx(1)
    monkeypatch.setattr(few.images, "classes", {1: "one"}, raising=False)
    line = degenerate_examples.measure(few, {"method": "NN", "class": 1, "seed": 0}, tmp_path)
    assert 0 <= line["positive"] <= 3 and (tmp_path / "one-NN-0.png").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.usefixtures("small")
def test_randomisation_on_small_pictures(few, monkeypatch):
    from benchmarks import one_vs_all, randomisation

    def fitted(*arguments):
        *problem, seed = arguments
        xnn = fit_once(*problem, 0)
        if seed:  # the same in another order, which matching undoes
            xnn.reorder_features(torch.tensor([3, 1, 0, 4, 2]))
        return xnn

    fit_once = one_vs_all.fitted
    monkeypatch.setattr(one_vs_all, "fitted", fitted)
    assert randomisation.layers_to(few.model, "5") == [("4",), ("4", "0")]  # not the last one, 6
    found = randomisation.measure(few, {"class": 1}, steps=2, n_images=2)["found"]
    assert list(found) == [
        "network, 1 of 2 layers", "network, 2 of 2 layers", "explainer, 1 of 2 layers", "explainer, 2 of 2 layers",
        "another seed",
    ]  # fmt: skip
    assert found["network, 2 of 2 layers"]["ssim"] < 0.9
    assert found["another seed"]["spearman"] == pytest.approx(1, abs=1e-4)


def test_rotated_x_features_explain_the_same():
    from benchmarks.rotations import rotated, rotation_of_same_shares
    from captum_xnn import SRAE

    v = torch.tensor([0.5, 2.0, -1.0, 0.1])
    rotation = rotation_of_same_shares(v, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4))
    torch.testing.assert_close(rotation @ v, v)
    assert float((rotation - torch.eye(4)).abs().max()) > 0.3
    torch.manual_seed(0)
    srae, Z = SRAE(6, 4, hidden=(5,)), torch.rand(9, 6)
    other = rotated(srae, rotation)
    before, after = srae(Z), other(Z)
    torch.testing.assert_close(after.y_bar, before.y_bar)
    torch.testing.assert_close(after.Z_tilde, before.Z_tilde)
    torch.testing.assert_close(after.E, before.E @ rotation.T)


def test_a_run_under_other_settings_stops(tmp_path):
    """Rather than to put results of two layers, or two ways to draw maps, into one table."""
    from benchmarks.runs import measured, settings

    given = argparse.Namespace(layer="relu6", root=tmp_path, maps_layer=None, classes=2, out=tmp_path)
    jobs = [{"class": 1}]
    measured(tmp_path, jobs, lambda job: {"value": 1}, under=settings(given))
    given.classes, given.out = 3, tmp_path / "."
    again = measured(tmp_path, [*jobs, {"class": 2}], lambda job: {"value": 2}, under=settings(given))
    assert [line["value"] for line in again] == [1, 2]
    given.maps_layer = "pool"
    with pytest.raises(SystemExit, match="another --maps-layer: 'pool', where it was None; take another --out"):
        measured(tmp_path, jobs, lambda job: {}, under=settings(given))
    measured(tmp_path / "older", jobs, lambda job: {"value": 1})  # results of a run that kept no settings
    measured(tmp_path / "older", jobs, lambda job: pytest.fail("all is there"), under=settings(given))
    given.layer = "relu7"
    with pytest.raises(SystemExit, match="another --layer"):
        measured(tmp_path / "older", jobs, lambda job: {}, under=settings(given))


def test_activations_are_kept_whole_and_of_one_layer(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from benchmarks import runs

    made = SimpleNamespace(Z=torch.rand(3, 2), y_hat=torch.rand(3, 4))
    cache, of = tmp_path / "new" / "activations.pt", {"layer": "relu6", "size": 227}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.kept(cache, of, lambda: made)
    assert not cache.exists()
    runs.kept(cache, of, lambda: made)
    found = runs.kept(cache, of, lambda: pytest.fail("it is there"))
    assert torch.equal(found["Z"], made.Z) and torch.equal(found["y_hat"], made.y_hat) and len(found) == 2
    with pytest.raises(SystemExit, match=r"'relu7'.* in .*activations.pt, got those of .*'relu6'.*delete the file"):
        runs.kept(cache, of | {"layer": "relu7"}, lambda: made)
    torch.save({"Z": made.Z, "y_hat": made.y_hat}, tmp_path / "older.pt")
    assert torch.equal(runs.kept(tmp_path / "older.pt", of, lambda: pytest.fail("it is there"))["Z"], made.Z)
    assert runs.kept(None, of, lambda: made)["Z"] is made.Z


def test_infinite_figures_are_counted_and_json_is_json(tmp_path, capsys):
    """A method with degenerate x-features is not to be judged by the classes where it has none."""
    from benchmarks.runs import Column, measured, summary, table, write

    values = {"a": (1.0, math.inf, 3.0, math.nan), "b": (math.inf, math.inf), "c": (2.0,)}
    jobs = [{"method": m, "class": c} for m, of in values.items() for c in range(len(of))]
    measured(tmp_path, jobs, lambda job: {"o2": values[job["method"]][job["class"]]})
    lines = measured(tmp_path, jobs, lambda job: pytest.fail("all is there"))  # as they come from the file
    columns = [Column("o2", "O2", 1)]
    text = table(lines, "method", columns, paper={"a": {"o2": 2.5}})
    assert text.splitlines()[2:] == ["| a | 4 | 2.0 ± 12.7, 1 inf (2.5) |", "| b | 2 | 2 inf |", "| c | 1 | 2.0 |"]
    write(tmp_path, text, summary(lines, "method", columns))

    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    kept = json.loads((tmp_path / "table.json").read_text(), parse_constant=refuse)
    assert kept["a"]["infinite"] == {"o2": 1} and kept["b"]["o2"] == [None, None] and kept["c"]["o2"] == [2.0, None]
    assert text in capsys.readouterr().out and (tmp_path / "table.md").read_text() == text + "\n"


def test_table_2_on_small_places(few, tmp_path):
    """Rows: of the ten rooms as many as there are, others to fill up; never the same to train and to test on."""
    from benchmarks.places import ROOMS, Counts, drawn, split

    labels = torch.cat([torch.tensor(list(ROOMS.values())).repeat(7), torch.arange(365).repeat(2)])
    counts = Counts(train=(4, 30), test=(1, 10))
    rows = drawn(labels, counts)
    assert len(rows) == 10 * 5 + 40 == len(rows.unique())
    chosen = labels[rows]
    for room in ROOMS.values():
        assert int((chosen == room).sum()) >= 5
        train, test = split(chosen, room, counts)
        assert not set(train.tolist()) & set(test.tolist())
        own = [int((chosen[part] == room).sum()) for part in (train, test)]
        assert own[0] == 4 and own[1] >= 1 and [len(train) - own[0], len(test) - own[1]] == [30, 10]
        assert (chosen[train[:4]] == room).all()


def test_fewer_images_are_divided_in_proportion():
    from benchmarks.places import Counts, split, untested

    labels = torch.cat([torch.full((10,), 45), torch.arange(60) % 5])
    counts = Counts(train=(4000, 20_000), test=(1000, 4000))
    train, test = split(labels, 45, counts)
    assert not set(train.tolist()) & set(test.tolist()) and len(train) + len(test) == 70
    assert [int((labels[part] == 45).sum()) for part in (train, test)] == [8, 2]
    assert [len(train) - 8, len(test) - 2] == [50, 10] and untested(labels, 45, test) is None
    few = torch.cat([torch.full((4,), 45), torch.arange(60) % 5])
    test = split(few, 45, counts)[1]
    assert untested(few, 45, test) == "no images of the room"
    assert untested(few, 45, test[:0]) == "no images at all"
    assert untested(few, 45, torch.arange(4)) == "no images of other categories"


def test_rooms_are_those_of_both_data_sets():
    from benchmarks.places import known_rooms

    rooms, images = torch.tensor([45, 52, -1, 203]), torch.tensor([203, 45, 7, 352])
    assert known_rooms(rooms, images, None) == ["bathroom", "kitchen"]
    assert known_rooms(rooms, images, ["kitchen"]) == ["kitchen"]
    with pytest.raises(SystemExit, match=r"got bedroom; choose among bathroom, kitchen"):
        known_rooms(rooms, images, ["kitchen", "bedroom"])
    with pytest.raises(SystemExit, match="in both data sets, got none"):
        known_rooms(rooms, images[2:3], None)


class Rooms:
    """The same pictures as scenes: the bright square is object 1, all else object 3."""

    def __init__(self, pictures):
        self.pictures, self.labels = pictures, pictures.labels

    def __getitem__(self, i):
        from captum_xnn.datasets._places import SceneSample

        mask = torch.where(self.pictures.images[i][0] == 1, 1, 3)
        return SceneSample(self.pictures.images[i], self.labels[i], mask, torch.tensor(i))


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.usefixtures("small")
def test_table_2_measures_objects(few):
    from benchmarks.places import Counts, Scenes, measure

    of = Scenes(few.model, few.layer, few.Z, few.y_hat, few.images.labels, Rooms(few.images))
    counts = Counts(train=(6, 20), test=(2, 10), maps=4)
    jobs = ({"method": method, "class": 3, "seed": 0} for method in ("1-Heatmap", "SRAE"))
    one, xnn = (measure(of, job, counts, maps_layer="1") for job in jobs)
    assert all(0 <= line["locality"] <= math.log(2) for line in (one, xnn))  # two objects of three
    assert xnn["f_cls"] == 1 and xnn["test"] < few.y_hat[:, 3].std() and xnn["o1"] >= 0


def test_auroc_of_reasons():
    from benchmarks import synthetic

    g = torch.Generator().manual_seed(0)
    scores, shown = torch.randint(0, 6, (40, 3), generator=g), torch.rand(40, 2, generator=g) < 0.4
    found = synthetic.auroc(scores, shown)
    for k in range(3):
        for r in range(2):
            own, rest = scores[shown[:, r], k].tolist(), scores[~shown[:, r], k].tolist()
            wins = sum((a > b) + (a == b) / 2 for a in own for b in rest)
            assert float(found[k, r]) == pytest.approx(wins / len(own) / len(rest))


def test_reasons_are_matched_to_x_features():
    from benchmarks import synthetic

    shown = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    E = torch.stack([torch.zeros(2000), -1.0 * shown[:, 2], 2.0 * shown[:, 0] + 0.1 * shown[:, 1]], 1)
    chosen, own, others = synthetic.matched_auroc(E, shown)
    assert chosen.tolist() == [2, 0, 1]  # the second has what is left
    assert own.tolist() == [1, 0.5, 1] and others[2] < 0.53  # turned round, a reason is told as well
    assert synthetic.matched(E[:, 1:], shown).tolist() == [1, -1, 0]
    assert synthetic.matched_auroc(E[:, 1:], shown)[1].tolist() == [1, 0.5, 1]
    mixed = E[:, 1:] @ torch.tensor([[1.0, 2.0], [1.0, -1.0]])
    told = synthetic.read_out(mixed, shown[:, [0, 2]], mixed)
    assert synthetic.auroc(told, shown[:, [0, 2]]).diagonal().tolist() == [1, 1]


def test_maps_are_compared_with_the_parts_masks():
    from benchmarks import synthetic
    from captum_xnn.datasets import Figures

    figures = Figures.draw(20, members=1, near_misses=0, reasons=[{"head": "plain blue", "belly": "plain blue"}])
    maps = figures.masks[:, figures.reason_parts(0)].flip(1).float()  # x-feature 0 shows the belly
    right = synthetic.places(maps, figures, 0, torch.tensor([1, 0]))
    assert right["mass"] == pytest.approx(1) and right["pointing"] == 1
    area = figures.masks[:, [1, 3]].double().mean((2, 3))
    assert right["lift"] == pytest.approx(float((1 / area).mean()))
    assert synthetic.places(maps, figures, 0, torch.tensor([0, 1])) == {"mass": 0, "lift": 0, "pointing": 0}
    half = synthetic.places(maps, figures, 0, torch.tensor([1, -1]))  # only the head has an x-feature
    assert half["mass"] == pytest.approx(1) and half["lift"] == pytest.approx(float((1 / area[:, 0]).mean()))
    even = synthetic.places(torch.ones(20, 1, 48, 48), figures, 0, torch.tensor([0, 0]))
    assert even["lift"] == pytest.approx(1) and even["pointing"] == 0


def test_equation_5_at_the_reasons_themselves():
    """By one weighted covariance of reasons, layer and output: what reasons leave unexplained are Schur complements."""
    import numpy as np

    from benchmarks import synthetic

    of = synthetic.explained("exact", 500, 50, 3, 1)
    shown = of.train.figures.shown_reasons(1).numpy()
    Z, y, members = of.train.Z.numpy(), of.train.y_hat[:, 1:2].numpy(), (of.train.y_hat.argmax(1) == 1).numpy()
    share = members.mean()
    more = round(40 * (0.25 - share) / (1 - share))  # drawn from the members alone, so that a quarter of a batch is
    weights = (40 - more + more / share * members) / 40
    scaled = np.hstack([shown, Z / np.sqrt(Z.var(0, ddof=1).mean()), y / y.std(ddof=1)]).astype(float)
    C = np.cov(scaled.T, aweights=weights, ddof=0)
    left = np.diag(C[3:, 3:] - C[3:, :3] @ np.linalg.solve(C[:3, :3], C[:3, 3:]))
    pull_away = sum(C[i, j] ** 2 / C[i, i] / C[j, j] for i in range(3) for j in range(3) if i != j) / 6
    assert left[-1] == pytest.approx(0, abs=1e-6)  # this output is the sum of its reasons
    assert synthetic.loss_of_reasons(of, 1) == pytest.approx(np.log1p(left[:-1]).mean() + pull_away, rel=1e-4)


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.usefixtures("small")
def test_synthetic_figures_end_to_end(monkeypatch):
    from benchmarks import synthetic
    from benchmarks.runs import table

    monkeypatch.setattr(synthetic, "fit", partial(synthetic.fit, recipe=Recipe(steps=150)))
    monkeypatch.setattr(synthetic, "MAPS", 8)
    monkeypatch.setattr(synthetic, "READ", 100)
    lines = []
    for network in ("exact", "trained"):
        of = synthetic.explained(network, 300, 200, 0, 1)
        for n, method in (("reasons", "SRAE"), ("reasons", "1-Heatmap"), ("3", "SRAE"), ("reasons", "groups")):
            if (network, method) == ("trained", "groups"):
                continue  # the network gives nothing this class yet
            job = {"network": network, "seed": 0, "class": 4, "x_features": n, "method": method}
            lines.append({**job, **synthetic.measure(of, job)})
    assert lines[0]["accuracy"] == 1 and lines[0]["from_z"] == 1 and lines[0]["f_cls"] > 0.8
    assert lines[0]["f_reg"] < lines[0]["std"] and len(lines[0]["correlations"]) == 2
    assert len(lines[2]["correlations"]) == 3
    assert lines[1]["mass"] == pytest.approx(0.5, abs=1e-4) and "auroc" not in lines[1]  # half of it on each part
    groups = lines[3]  # on a layer that holds the reasons, and a linear rest
    assert groups["f_reg"] < 1e-5 and groups["found"] == groups["f_cls"] == groups["from_e"] == 1
    assert groups["mass"] == pytest.approx(1) and groups["pointing"] == 1 and "loss" not in groups
    text = table(synthetic.named(lines), "explained", synthetic.COLUMNS)
    kinds = [row.split("|")[1].strip() for row in text.splitlines()[2:]]
    assert kinds == [
        *(f"exact, {k}" for k in ("3 x-features, SRAE", *(f"reasons x-features, {m}" for m in ("SRAE", "groups")))),
        "exact, reasons x-features, 1-Heatmap", "trained, 3 x-features, SRAE", "trained, reasons x-features, SRAE",
        "trained, reasons x-features, 1-Heatmap",
    ]  # fmt: skip


def test_many_targets(tmp_path, capsys):
    import argparse
    import json

    from benchmarks import many_targets

    # By hand: 2 x 10 rows x 3 steps, forward and back through 4-6-2 and its mirror, and no gradient to Z.
    recipe = Recipe(steps=3, batch_size=10)
    assert many_targets.flops(4, (6,), 2, 100, recipe) == 2 * 30 * (2 * 3 * (24 + 12) - 24)
    given = argparse.Namespace(
        out=tmp_path, activations=None, examples=300, width=20, targets=3, few=2, rounds=1, steps=5, grow=False,
        device=torch.device("cpu"), mixed_precision=True,
    )  # fmt: skip
    many_targets.main(given)
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "many_targets.json").read_text())
    assert found["largest_difference"] < 1e-3 and len(found["ratios"]) == 1
    assert found["seconds_per_explainer"] == pytest.approx(found["seconds"] / 3)
    mixed = found["mixed_precision"]
    assert mixed["agreement"] > 0.9 and mixed["f_reg_test_mixed"] == pytest.approx(mixed["f_reg_test"], rel=0.1)


def test_a_form_without_a_history_is_measured_on_the_figures(monkeypatch):
    from benchmarks import synthetic

    monkeypatch.setattr(synthetic, "MAPS", 8)
    of = synthetic.explained("exact", 300, 200, 0, 1)
    job = {"network": "exact", "seed": 0, "class": 4, "x_features": "reasons", "method": "RandomEncoder"}
    line = synthetic.measure(of, job)
    assert "loss" not in line and line["f_reg"] > 0.1 and line["from_z"] == 1


def test_agreement_of_maps():
    from benchmarks.seeds import agreement

    maps = torch.rand(2, 3, 4, 4)
    assert agreement(maps, 2 * maps + 1) == pytest.approx(1, abs=1e-5)
    assert agreement(maps, -maps) == pytest.approx(-1, abs=1e-5)
    constant = maps.clone()
    constant[:, 0] = 1
    assert agreement(maps, constant) == pytest.approx(2 / 3, abs=1e-5)


def test_maps_that_differ_by_chance_are_one_map_on_average():
    from benchmarks.seeds import mean_maps
    from captum_xnn.metrics import orthogonality

    generator = torch.Generator().manual_seed(0)
    common = torch.rand(6, 1, 8, 8, generator=generator).expand(6, 3, 8, 8)
    seeds = [common * torch.rand(6, 3, 8, 8, generator=generator) for _ in range(200)]
    assert orthogonality(seeds[0]).o1 < 0.5 and orthogonality(mean_maps(seeds)).o1 > 1.2
    weighted = [3.0 * seeds[0], torch.zeros_like(seeds[0])]  # the scale of a map is nothing, an empty map stays empty
    assert torch.allclose(mean_maps(weighted) * 2, seeds[0] / seeds[0].sum((2, 3), keepdim=True))


@pytest.fixture(scope="module")
def two_parts():
    """Pictures with two squares, each at one of two places: both places are the class. Every square can be removed."""
    from benchmarks.funnybirds import GRID, Read
    from captum_xnn.metrics._patches import patch_masks

    g = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 4
    ground = torch.rand(48, 3, 32, 32, generator=g) * 0.3
    masks = torch.zeros(48, 2, 32, 32, dtype=torch.bool)
    for i, label in enumerate(labels.tolist()):
        masks[i, 0, 4:12, 4 + 16 * (label % 2) :][:, :8] = True
        masks[i, 1, 20:28, 4 + 16 * (label // 2) :][:, :8] = True
    images = torch.where(masks.any(1)[:, None], 1, ground)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(inplace=True), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 12), nn.ReLU(),
        nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    model.requires_grad_(False)
    seen = {
        "train": images[:32], "test": images[32:],
        "taken": torch.stack([torch.where(masks[32:, p, None], ground[32:], images[32:]) for p in range(2)], 1),
        "covered": torch.stack([torch.where(m, 0, images[32:]) for m in patch_masks(32, 32, GRID)], 1),
    }  # fmt: skip
    read = {
        name: tuple(net(x.flatten(0, -4)).reshape(*x.shape[:-3], -1) for net in (model[:6], model))
        for name, x in seen.items()
    }
    return Read(
        model, "5", "1", read["train"], labels[:32], read["test"], labels[32:], read["taken"], read["covered"][0],
        lambda rows: images[32:][rows], lambda rows: masks[32:][rows], images[:32],
    )  # fmt: skip


def test_contributions_of_dimensions_are_complete_and_exact_behind_a_linear_layer(two_parts):
    from benchmarks import funnybirds

    Z, y_hat = two_parts.test
    base = two_parts.train[0].mean(0)
    job = funnybirds.Job(two_parts, 2, 0)
    torch.testing.assert_close(job.rest(Z), y_hat[:, 2])  # the rest of the model is row-wise
    c = funnybirds.contributions_of_dimensions(job.rest, Z, base)
    bias = job.rest(base[None])
    assert float((c.sum(1) + bias - y_hat[:, 2]).abs().mean()) < 0.02 * float(y_hat[:, 2].std())  # of kinks
    weights = torch.randn(12)
    linear = funnybirds.contributions_of_dimensions(lambda rows: rows @ weights + 3, Z, base)
    torch.testing.assert_close(linear, (Z - base) * weights, atol=1e-5, rtol=1e-5)
    squares = funnybirds.contributions_of_dimensions(lambda rows: rows.square().sum(1), Z, base)
    torch.testing.assert_close(squares, Z**2 - base**2, atol=1e-4, rtol=1e-4)


def test_gradient_maps_are_those_of_autograd_and_add_up(two_parts):
    from benchmarks import funnybirds

    job, images = funnybirds.Job(two_parts, 1, 0), two_parts.images([0, 1, 5])
    groups = funnybirds.METHODS["random groups"](job)
    maps = funnybirds.gradient_maps(two_parts, groups, images)
    A = two_parts.model[:2](images).requires_grad_()
    base = two_parts.train[0].mean(0)
    given = funnybirds.contributions_of_dimensions(job.rest, two_parts.model[2:6](A), base)
    (gradient,) = torch.autograd.grad(given.sum(), A)
    cells = (gradient * A).detach().sum(1, keepdim=True)
    wanted = nn.functional.interpolate(cells, (32, 32), mode="bilinear")
    assert maps.shape == (3, 5, 32, 32) and float(wanted.abs().max()) > 0
    torch.testing.assert_close(maps.sum(1, keepdim=True), wanted, atol=1e-5, rtol=1e-4)
    assert not two_parts.model[1]._forward_hooks and not two_parts.model[5]._forward_hooks


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.usefixtures("small")
def test_parts_and_patches_judge_every_method(two_parts, tmp_path, monkeypatch):
    from benchmarks import funnybirds
    from benchmarks.runs import measured, table

    monkeypatch.setattr(funnybirds, "N_FEATURES", 3)  # few dimensions are alive in pictures of one class
    jobs = [{"method": m, "class": c, "seed": 0} for c in (1, 2) for m in funnybirds.METHODS]
    lines = measured(tmp_path, jobs, partial(funnybirds.measure, two_parts))
    by = {(line["method"], line["class"]): line for line in lines}
    for label in (1, 2):
        exact = ("groups", "random groups", "spectral clusters")
        one, groups = by["1-Heatmap", label], [by[m, label] for m in exact]
        spread = float(two_parts.test[1][:, label].std())
        assert one["birds"] == 4 and one["f_reg"] < 1e-4 and all(line["f_reg"] < 0.02 * spread for line in groups)
        assert one["selectivity"] == one["whole"] and one["movement"] == 1 and one["o1"] == 0
        # Of exact forms the parts move the sum as they move the logit.
        assert all(line["whole"] == pytest.approx(one["whole"], abs=0.02) for line in groups)
        assert all(line["sd_area"] == 0 for line in [one, *groups])  # both parts have 64 pixels
        assert all(line["part_drops"] == one["part_drops"] for line in groups) and "patches_mwp" not in groups[0]
        assert one["patches"] > 0.4 > abs(one["patches_chance"])  # the squares are what the network looks at
        assert by["SRAE", label]["f_reg"] < spread and -1 <= by["SRAE", label]["patches_mwp"] <= 1
    kinds = funnybirds.within(lines)
    assert [line["method"] for line in kinds] == list(funnybirds.METHODS) and kinds[0]["within_area"] == 0
    assert "nan" not in table(lines, "method", funnybirds.COLUMNS)
    assert funnybirds.measure(two_parts._replace(labels=two_parts.labels * 0 + 9), jobs[0]) == {"birds": 0}


NETWORK = """
import torch
from torch import nn
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
def load():
    torch.manual_seed(0)
    pooled = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    net = nn.Sequential(*pooled, nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None]), net[0].bias.zero_()
        net[4].weight.abs_(), net[4].bias.zero_()
        net[4].weight[0] = torch.tensor([1.0] * 4 + [0.0] * 8)  # red, which the second class alone has
        net[6].weight.mul_(0.1), net[6].bias.copy_(torch.tensor([0.5, 0.0]))
        net[6].weight[1, 0] = 3
    return net.requires_grad_(False).eval()
"""


def test_funnybirds_from_a_folder_resumes(tmp_path, capsys, monkeypatch):
    from test_datasets_funnybirds import write

    from benchmarks import funnybirds

    monkeypatch.setattr(funnybirds, "N_FEATURES", 2)
    (tmp_path / "net.py").write_text(NETWORK)
    given = argparse.Namespace(
        root=write(tmp_path / "birds", small=True), file=tmp_path / "net.py", layer="5", maps_layer="1", classes=2,
        methods=["1-Heatmap", "random groups"], seeds=2, limits=False, out=tmp_path / "out",
    )  # fmt: skip
    funnybirds.main(given)
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (given.out / "results.jsonl").read_text().splitlines()]
    assert [line["birds"] for line in lines] == [1, 1, 2, 2] * 2 and "1-Heatmap | 4 |" in printed
    assert all(line["importances_area"] == [[n + 1.0, 2 * n + 2, 2 * n + 2, n + 1, 2 * n + 2] for n in ns]
               for line, ns in zip(lines, [[1], [1], [3, 5], [3, 5]] * 2, strict=True))  # fmt: skip
    # Taking a part away changes the blue channel alone, by one more for each later part.
    assert all(
        sorted(map(abs, row), reverse=True) == pytest.approx(list(map(abs, reversed(row))))
        for row in lines[0]["part_drops"]
    )
    monkeypatch.setattr(funnybirds, "collect", None)
    monkeypatch.setattr(funnybirds, "METHODS", {"1-Heatmap": None, "random groups": None})
    funnybirds.main(given)  # runs nothing again
    assert capsys.readouterr().out == printed
    given.limits = True
    funnybirds.main(given)
    assert f"{funnybirds.LIMITS[2]} | 4 |" in capsys.readouterr().out


def test_limits_of_selectivity_by_hand(two_parts):
    from benchmarks import funnybirds
    from captum_xnn.metrics import selectivity

    # Two birds, three dimensions, two parts. Alone, dimension 2 is moved by both parts, mostly by the first. It takes
    # away from group 1 what the first part does there: together they are moved by the second part alone.
    changes = torch.tensor([[[4.0, 0.0], [-3.0, 1.0], [3.0, 2.0]]] * 2).double()
    start = changes.sum(0).abs().argmax(1)
    assert start.tolist() == [0, 0, 0]
    groups = funnybirds.searched(changes, start)
    own = torch.stack([changes[:, groups == k].sum(1) for k in range(2)], 1)
    every = [
        selectivity(torch.stack([changes[:, torch.tensor(g) == k].sum(1) for k in range(2)], 1)).share
        for g in itertools.product(range(2), repeat=3)
    ]
    assert selectivity(own).share == max(every) == 1
    found = [funnybirds.limit(two_parts, {"method": m, "class": 1, "seed": 0}) for m in funnybirds.LIMITS]
    assert all(line["whole"] == pytest.approx(found[0]["whole"]) for line in found)
    assert found[1]["selectivity"] <= found[2]["selectivity"] and found[0]["movement"] >= found[1]["movement"]
    whole = funnybirds.METHODS["1-Heatmap"](funnybirds.Job(two_parts, 1, 0))
    rows = (two_parts.labels == 1).nonzero()[:, 0]
    drops = whole.contributions(two_parts.test[0][rows])[:, 0, None] - torch.stack(
        [whole.contributions(Z[rows])[:, 0] for Z in two_parts.taken[0].transpose(0, 1)], 1
    )
    assert found[0]["whole"] == pytest.approx(selectivity(drops[:, None]).share, abs=0.02)
    # Each dimension by the part that moves it most, written again.
    rest, base = funnybirds.Job(two_parts, 1, 0).rest, two_parts.train[0].mean(0)
    c = funnybirds.contributions_of_dimensions(rest, two_parts.test[0][rows], base)
    lost = [c - funnybirds.contributions_of_dimensions(rest, two_parts.taken[0][rows, p], base) for p in range(2)]
    first = lost[0].sum(0).abs() >= lost[1].sum(0).abs()
    both = torch.stack([torch.stack([of[:, own].sum(1) for of in lost], 1) for own in (first, ~first)], 1)
    assert found[1]["selectivity"] == pytest.approx(selectivity(both).share)


class LinearBirds:
    """Birds of five parts, each a row of 8 pixels in the colour of its variant. The background is black."""

    part_names = ("beak", "eye", "foot", "tail", "wing")
    classes = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 1], [2, 0, 0, 2, 2], [1, 1, 1, 1, 1]])

    def __init__(self):
        self.labels = torch.tensor([0, 0, 3])

    def __len__(self):
        return 3

    def picture(self, index, without=None):
        image = torch.zeros(3, 8, 8)
        for p, variant in enumerate(self.classes[self.labels[index]].tolist()):
            image[variant, p] = 0.0 if self.part_names[p] == without else 1.0
        return image

    def __getitem__(self, index):
        from captum_xnn.datasets._funnybirds import FunnyBirdsSample

        return FunnyBirdsSample(self.picture(index), self.labels[index], torch.tensor(index))

    def without(self, index, part):
        return self.picture(index, part)

    def masks(self, index):
        return torch.eye(8)[:5, :, None].expand(5, 8, 8).bool()

    def network(self):
        """Sums the parts of each class, with weights from 1 to 5."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False))
        with torch.no_grad():
            weight = model[1].weight.zero_().view(5, 3, 8, 8)
            for c, variants in enumerate(self.classes.tolist()):
                for p, variant in enumerate(variants):
                    weight[c, variant, p] = 1 + p
        return model


def test_maps_of_a_difference_know_the_parts_of_a_linear_network(tmp_path):
    """Contributions of parts are drops, so the map of the difference makes no mistake, and area knows nothing."""
    from benchmarks import against
    from benchmarks.runs import measured

    birds = LinearBirds()
    model = birds.network()
    assert sorted(against.pairs_of(birds.classes, 0, 0)) == [(1, 2)]  # class 3 shares a part with each
    lines = measured(tmp_path, [{"bird": i} for i in range(3)], partial(against.measure, model, birds))
    assert [line["right"] for line in lines] == [True] * 3
    found = {name: [line for line in against.rows_of(lines) if line["map"] == name] for name in against.ROWS}
    mean = {
        name: {key: fmean(line[key] for line in of if key in line) for key in ("sd", "sensitivity")}
        for name, of in found.items()
    }
    assert mean["against"] == mean["true drops"] == {"sd": pytest.approx(1), "sensitivity": 1}
    assert mean["one class"]["sd"] < 0.9 and mean["one class"]["sensitivity"] == 1
    assert mean["area"] == {"sd": 0, "sensitivity": 0}  # every part has 8 pixels
    for line in lines:
        assert line["importances"][0] == pytest.approx(line["importances"][3], abs=1e-5)


def test_the_map_of_a_linear_network_knows_what_its_parts_add(tmp_path, monkeypatch):
    from captum.attr import InputXGradient

    from benchmarks import part_effects
    from benchmarks.runs import measured
    from captum_xnn.heatmaps import FromCaptum, GradientMaps

    birds = LinearBirds()
    model = birds.network()
    few = {"gradient x activation (default form)": GradientMaps, "IxG": partial(FromCaptum, InputXGradient)}
    monkeypatch.setattr(part_effects, "MAPS", few)
    lines = measured(tmp_path, [{"bird": i} for i in range(3)], partial(part_effects.measure, model, birds))
    for line in lines:
        assert line["right"] and line["drops"] == pytest.approx([8, 16, 24, 32, 40])
        for name in few:  # without feature maps, the default form draws input x gradient
            assert line["importances"][name] == pytest.approx(line["drops"], abs=1e-5)
        assert line["importances"]["*area*"] == [8] * 5
    found = part_effects.rows_of(lines)
    mean = {name: fmean(row["sd"] for row in found if row["map"] == name and "sd" in row) for name in [*few, "*area*"]}
    assert mean == {**dict.fromkeys(few, pytest.approx(1)), "*area*": 0}


def test_a_covered_part_gets_the_colours_around_it():
    from benchmarks.part_effects import AROUND, covered

    image = torch.zeros(3, 40, 40)
    image[0, :20], image[1, 20:] = 1.0, 1.0  # red above green
    image[:, 8:12, 18:22] = 5.0
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, 8:12, 18:22] = True
    mean, around = covered(image, mask).values()
    torch.testing.assert_close(mean[0, :, 10, 20], image.mean((1, 2)))
    assert mean[0, 0, 10, 18 - AROUND] == image.mean((1, 2))[0] and mean[0, 0, 10, 17 - AROUND] == 1  # a rim, no more
    torch.testing.assert_close(around[0, :, 10, 20], torch.tensor([1.0, 0, 0]), atol=0.15, rtol=0)  # red, mostly
    assert torch.equal(around[0, :, 30], image[:, 30])


def test_the_simulated_study_prints_the_papers_means_beside_its_own(tmp_path, capsys):
    pytest.importorskip("flask")
    pytest.importorskip("statsmodels")
    from benchmarks import human_study

    human_study.main(participants=4, out=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("cub  none    paper 0.560  found 0.") and len(lines) == 12
    assert (tmp_path / "findings" / "figure4_sort.svg").is_file()


@pytest.fixture
def squares(few):
    """A class of the small pictures, as the benchmark of contributions takes it."""
    from benchmarks.contributions import Problem
    from captum_xnn import SRAE
    from captum_xnn.activations import collect

    train, test = few.images.images[:28], few.images.images[28:]
    found = collect(few.model, few.layer, train)
    return Problem(few.model, few.layer, 2, found, test, partial(SRAE, hidden=(8,)))


CONTRIBUTIONS = argparse.Namespace(
    networks=["small"], classes=1, curve=False, tradeoff=False, exactness=False, one_fit=False,
    no_halves=False, no_learned=False,
    root=None, file=None, activations=None, negatives=12, examples=300, epochs=1, test=12, images=3,
)  # fmt: skip


def test_halves_share_negatives_alone(squares):
    from benchmarks.contributions import halved
    from captum_xnn.activations import collect

    rows = {tuple(row): i for i, row in enumerate(squares.train.Z.tolist())}
    positives = set(squares.positives.tolist())
    kept = [{rows[tuple(row)] for row in part.train.Z.tolist()} for part in halved(squares)]
    assert kept[0] | kept[1] == set(range(28)) and kept[0] & kept[1] == set(range(28)) - positives
    assert 0 <= len(kept[0] & positives) - len(kept[1] & positives) <= 1
    for part in halved(squares):
        assert len(part.train.Z) == 28 - len(squares.positives) + len(part.positives)
        again = collect(part.model, part.layer, part.train.source.data)  # inputs go with their activations
        torch.testing.assert_close((again.Z, again.y_hat), (part.train.Z, part.train.y_hat))


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
def test_ways_to_divide_the_same_contributions(squares, tmp_path, capsys, monkeypatch):
    """The library's way gives the groups of a fit, and random groups overlap more than they do."""
    from benchmarks import grouping
    from benchmarks.contributions import Network, agreement, fitted
    from captum_xnn import ContributionGroups

    _, seen = grouping.seen_by_fit(squares)
    own, drops = seen.positives.double(), seen.covers[0].contributions.double()
    a = grouping.with_ridge(1.0)(seen)
    expected = fitted(squares, ContributionGroups)[0].explainer(2).form.groups
    assert agreement(own @ a, own @ expected.double())["halves"] == pytest.approx(1)
    torch.testing.assert_close(grouping.soft(seen).sum(1), torch.ones(len(a)).double())
    live = drops.flatten(0, 1).abs().sum(0) > 0  # silent dimensions are shared evenly
    assert (grouping.one_each(seen) != 0).sum(1)[live].eq(1).all()
    monkeypatch.setattr(grouping, "NETWORKS", {"small": Network(lambda given: [2], lambda given, label: squares)})
    given = argparse.Namespace(**vars(CONTRIBUTIONS), out=tmp_path)
    grouping.main(given)
    assert capsys.readouterr().out.count("small, ") == len(grouping.WAYS)
    found = json.loads((tmp_path / "results.jsonl").read_text())["ways"]
    assert found["as it is (ridge 1, hardened)"]["o1"] < found["random groups"]["o1"]


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
def test_contributions_of_a_class_by_both_forms(squares, tmp_path, capsys, monkeypatch):
    from benchmarks import contributions
    from benchmarks.runs import measured

    of = contributions.Network(lambda given: [2], lambda given, label: squares)
    monkeypatch.setattr(contributions, "NETWORKS", {"small": of})
    monkeypatch.setattr(contributions, "fitted", _few_steps(contributions.fitted))
    given = argparse.Namespace(**vars(CONTRIBUTIONS), out=tmp_path / "forms")
    contributions.main(given)
    printed = capsys.readouterr().out
    found = json.loads((given.out / "results.jsonl").read_text())["methods"]
    groups, chance, srae = (found[name] for name in ("groups", "random groups", "SRAE"))
    # The rest is linear: no interval more than the first, and no error, whatever the groups.
    assert groups["f_reg"] == pytest.approx(chance["f_reg"], abs=1e-6) and groups["f_reg"] < 1e-4 < srae["f_reg"]
    assert groups["intervals"] == 8 and groups["f_cls"] == 1 and groups["std"] == srae["std"]
    assert groups["patches_one"] == chance["patches_one"] == pytest.approx(_agreement_of_the_output(squares))
    assert groups["halves"] > groups["mixed"] and "halves" not in chance
    assert "small, random groups | 1 | " in printed and printed.count("small, ") == 6
    monkeypatch.setattr(contributions, "measure", None)
    contributions.main(given)  # measures nothing again
    assert capsys.readouterr().out == printed
    given.out, given.exactness = tmp_path / "exactness", True
    contributions.main(given)
    exact = json.loads((given.out / "results.jsonl").read_text())["methods"]["any groups"]
    assert (exact["intervals"], exact["std"]) == (8, groups["std"]) and exact["f_reg"] < 1e-4
    given.out, given.tradeoff, given.exactness = tmp_path / "tradeoff", True, False
    contributions.main(given)
    mixed = measured(given.out, [], None)[0]["points"]
    assert mixed["groups"]["o1"] == pytest.approx(groups["o1"]) and mixed["random groups"]["o1"] == chance["o1"]
    steps = [mixed[f"{share:.2f} shared"] for share in contributions.SHARED[1:]]
    assert sorted(step["o1"] for step in steps) == [step["o1"] for step in steps] and steps[0]["o1"] > groups["o1"]
    given.out, given.curve, given.tradeoff = tmp_path / "curve", True, False
    contributions.main(given)
    points = measured(given.out, [], None)[0]["points"]
    assert len(points) == len(contributions.POINTS) and points["60 positives, 8 x 8"]["same"] == pytest.approx(1)
    assert points["30 positives, 8 x 8"]["o1"] == pytest.approx(points["60 positives, 8 x 8"]["o1"])  # there are seven
    assert points["30 positives, 4 x 4"]["o1"] != points["60 positives, 8 x 8"]["o1"]
    assert points["5 positives, 8 x 8"]["same"] < 1
    assert 0 < points["5 positives, 8 x 8"]["o1_finer"] != points["5 positives, 8 x 8"]["o1"]
    given.one_fit = True
    contributions.main(given)
    assert f"small: 1 explainers in one fit of {len(squares.train.y_hat)} examples: " in capsys.readouterr().out
    large = contributions.points(squares._replace(test=torch.zeros(1, 3, 65, 64)))
    first, *_ = large.values()
    assert first == {}  # the default
    for settings in large.values():
        contributions.ContributionGroups(4, **settings)


@pytest.mark.filterwarnings("ignore:maps are zero")
def test_backends_are_judged_as_the_default_is(squares, tmp_path, capsys, monkeypatch):
    from benchmarks import backends, contributions
    from benchmarks.runs import measured

    of = contributions.Network(lambda given: [2], lambda given, label: squares)
    monkeypatch.setattr(contributions, "NETWORKS", {"small": of})
    monkeypatch.setattr(backends, "NETWORKS", {"small": of})
    more = {"no_learned": True, "no_halves": True, "out": tmp_path / "forms"}
    contributions.main(argparse.Namespace(**{**vars(CONTRIBUTIONS), **more}))
    forms = measured(tmp_path / "forms", [], None)[0]["methods"]
    names = [backends.DEFAULT, "excitation backprop (c-MWP)", "Occlusion", "DeepLift"]
    given = argparse.Namespace(**{**vars(CONTRIBUTIONS), "backends": names, "out": tmp_path / "backends"})

    def broken(_images):
        def draw(*_arguments, **_settings):
            raise ValueError("no such rule\nmore")

        return draw

    monkeypatch.setitem(backends.BACKENDS, "DeepLift", broken)
    capsys.readouterr()
    backends.main(given)
    found = measured(given.out, [], None)[0]["backends"]
    groups, chance = forms["groups"], forms["random groups"]
    known = {
        "groups": groups["patches"],
        "random": chance["patches"],
        "one": groups["patches_one"],
        "identified": groups["identified"],
    }
    assert {key: found[backends.DEFAULT][key] for key in known} == pytest.approx(known, abs=1e-5)
    assert found["chance"]["groups"] == pytest.approx(groups["patches_chance"], abs=1e-5)
    assert found["Occlusion"]["groups"] > 0.8 > found[backends.DEFAULT]["groups"]  # it covers what the measure covers
    assert found["DeepLift"] == {"failed": "no such rule"}
    printed = capsys.readouterr().out
    assert "small, DeepLift: no such rule" in printed and "| DeepLift |  |" in printed


def test_divisions_between_groups_and_none():
    from benchmarks.contributions import divisions

    made = divisions(torch.tensor([[1.5, -0.5], [0.2, 0.8]]))
    torch.testing.assert_close(made["groups"], torch.tensor([[1.5, -0.5], [0.2, 0.8]]))
    torch.testing.assert_close(made["0.50 shared"], torch.tensor([[1.0, 0.0], [0.35, 0.65]]))
    torch.testing.assert_close(made["no negative weights"], torch.tensor([[1.0, 0.0], [0.2, 0.8]]))
    torch.testing.assert_close(made["one group each"], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def _agreement_of_the_output(of):
    """By one patch after the other, autograd, and another library's rank correlation."""
    from scipy.stats import spearmanr

    images = of.test[of.model(of.test).argmax(1) == of.label][:3]
    A = of.model[:3](images).detach().requires_grad_()  # the last feature maps
    y = of.model[3:](A)[:, of.label]
    (gradient,) = torch.autograd.grad(y.sum(), A)
    enlarged = nn.functional.interpolate((gradient * A).sum(1, keepdim=True), (32, 32), mode="bilinear")
    found = []
    for image, one, own in zip(images, nn.functional.avg_pool2d(enlarged, 8).detach(), y.tolist(), strict=True):
        lost = []
        for i in range(16):
            covered = image.clone()
            covered[:, 8 * (i // 4) :, 8 * (i % 4) :][:, :8, :8] = image.mean((1, 2))[:, None, None]
            lost.append(own - of.model(covered[None])[0, of.label].item())
        found.append(spearmanr(one.flatten(), lost).statistic)
    return sum(found) / len(found)


def _few_steps(fitted):
    def few(of, form):
        from captum_xnn.attribution import XNNAttribution

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("benchmarks.contributions.XNNAttribution", partial(XNNAttribution, recipe=Recipe(steps=100)))
            return fitted(of, form)

    return few


def test_contributions_of_dimensions_divide_as_the_explainer_divides(squares):
    from benchmarks.contributions import by_dimension, fitted
    from captum_xnn.models import ContributionGroups

    xnn, _ = fitted(squares, ContributionGroups)
    form = xnn.explainer(2).form
    exact, made = by_dimension(squares, form, squares.test), xnn.contributions(squares.test, 2)
    torch.testing.assert_close(exact.c @ form.groups, made.contributions, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exact.bias + exact.c.sum(1), squares.model(squares.test)[:, 2].detach())


def test_birds_are_explained_at_feature_maps_from_some_of_the_images(few, monkeypatch):
    from benchmarks import contributions

    monkeypatch.setattr(contributions, "_birds", lambda root, file: (few.model, few.images))
    assert contributions.bird_classes(argparse.Namespace(**{**vars(CONTRIBUTIONS), "classes": 4})) == [0, 1, 2, 3]
    of = contributions.of_birds("1", CONTRIBUTIONS, 1)
    assert of.train.Z.shape == (20, 8, 16, 16) and of.test.shape == (5, 3, 32, 32)  # 8 of 10, and 12 others
    part = next(contributions.halved(of))
    again = torch.cat([batch.image for batch in part.train.source.data])
    torch.testing.assert_close(few.model[:2](again), part.train.Z)
    assert torch.equal(part.positives, (few.model(again).argmax(1) == 1).nonzero()[:, 0])


def test_texts_tell_their_topic_by_two_of_its_words():
    from benchmarks.contributions import draw_texts

    words, topics = draw_texts(200, torch.Generator().manual_seed(0))
    for text, topic in zip(words.tolist(), topics.tolist(), strict=True):
        said = [word // 3 for word in text if word < 12]
        assert sorted(said.count(t) for t in range(4)) == [0, 0, 1, 2] and said.count(topic) == 2
        assert len({word for word in text if word // 3 == topic}) == 2


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.parametrize("name", ["digits-pool2", "figures-by-hand", "inside-a-block", "vision-transformer", "tabular"])
def test_small_networks_are_explained_to_the_tolerance(name):
    """Sum of contributions and bias, by the groups' own tolerance, at layers of every kind."""
    from benchmarks import contributions
    from captum_xnn.models import ContributionGroups

    of = contributions.NETWORKS[name].of(CONTRIBUTIONS, 0)
    own = of.train.y_hat.argmax(1)
    label = int(own[of.train.y_hat.std(0)[own] > 0].mode().values)  # of a network that has hardly learned
    of = of._replace(label=label)
    form = contributions.fitted(of, partial(ContributionGroups, positives=3, others=20))[0].explainer(label).form
    exact = contributions.by_dimension(of, form, of.test[:6])
    y = of.model(of.test[:6])[:, label].detach()
    assert float((exact.bias + exact.c.sum(1) - y).abs().max()) <= 0.0101 * float(form.scale)
    assert (float(exact.bias.std()) > 1e-3) == (name == "inside-a-block")  # something crosses the layer


def test_fits_are_timed_alone_and_beside_another_process(monkeypatch):
    from benchmarks import fit_speed

    made = fit_speed.fits(examples=80, dimensions=6, steps=3, repeats=1, size=50)
    assert set(made) == set(fit_speed.FORMS) and all(min(figures) > 0 for figures in made.values())
    with fit_speed.competitor(1, 50):
        pass
    monkeypatch.setattr("captum_xnn.datasets._digits.Digits.trained_network", untrained)
    lines = fit_speed.on_digits((fit_speed.Choice(16, 8, 4), fit_speed.Choice(8, 8, 4)), digits=(1,), examples=500)
    assert [line["choice"] for line in lines] == [f"batches of {size}, width 8, 4 steps" for size in (16, 8)]
    assert lines[0]["error_ratio"] == lines[0]["time_ratio"] == 1
    assert lines[1]["error_ratio"] == lines[1]["error"] / lines[0]["error"] != 1


def untrained(digits, seed):
    from captum_xnn.datasets._networks import digits_cnn

    cnn = digits_cnn(torch.Generator().manual_seed(seed))
    cnn.fc2.bias.data[1] += 0.05  # some images have digit 1
    return cnn


@pytest.fixture
def two_problems(two_parts, monkeypatch):
    """The classes of pictures of two squares, with their parts, as the scoreboard takes them."""
    from benchmarks import changed_parts, one_vs_all, rivals, scoreboard
    from captum_xnn.training import Recipe

    monkeypatch.setattr(rivals, "N_FEATURES", 3)
    monkeypatch.setattr(one_vs_all, "fit", partial(one_vs_all.fit, recipe=Recipe(steps=20)))
    for name, value in {"STEPS": 5, "FACE_STEPS": 3, "DRSA_STEPS": 3, "DRSA_SIZE": 2, "ACTIVE": 4}.items():
        monkeypatch.setattr(rivals, name, value)

    def problem(label):
        rows = (two_parts.labels == label).nonzero()[:, 0]
        masks = two_parts.masks(rows)
        taken = two_parts.taken[0][rows], two_parts.taken[1][rows, :, label], masks
        covered, Z = two_parts.covered[rows], two_parts.test[0][rows]
        images, y = two_parts.images(rows), two_parts.test[1][rows, label]

        def places(maps):
            return torch.einsum("nkhw,nphw->nkp", maps.double(), masks.double())

        pairs = changed_parts.of_birds(Z, taken[0])
        return scoreboard.Problem(two_parts, label, images, Z, y, covered, places, taken, pairs=pairs)

    return problem


@pytest.mark.filterwarnings("ignore:maps are zero")
@pytest.mark.usefixtures("small")
def test_pairs_of_two_parts_find_groups_of_one_part_each(two_problems, monkeypatch):
    """Groups made by hand, a part for each, carry all changes; the whole output carries one part alone."""
    from benchmarks import pairs, rivals, scoreboard

    monkeypatch.setattr(scoreboard, "ENOUGH", scoreboard.Missed(1, 1))  # pairs take 12 nodes
    network = scoreboard.Network("FunnyBirds", [1], two_problems)
    case = pairs.of_funnybirds(network, 1)
    of = case.pairs
    job = {"network": "FunnyBirds", "class": 1, "seed": 0}
    methods = ("groups", "whole output", "random groups")
    found = {m: pairs.measure(lambda *_: case, {**job, "method": m}) for m in methods}
    assert found["whole output"]["share"] == pytest.approx(0.5) and found["whole output"]["movement"] == pytest.approx(
        1
    )
    assert all(0 <= line[key] <= 1 for line in found.values() for key in ("share", "most", "selectivity"))
    # A reading of the first part's own change is an explanation that only the matching x-feature moves in.
    fit = rivals.Fit(case.read, 1, 0, case.read.train[0].float().mean(0))
    first = (of.changed[:, 0] - of.Z).abs().sum(1)
    assert bool((first > 0).all())

    def by_hand(Z, G):
        without = [(Z[:, None] - of.changed[:, p]).abs().sum(2).amin(1) < 1e-6 for p in (0, 1)]
        return torch.stack([(~w).float() for w in without], 1)

    line = pairs.judged(of, by_hand, fit)
    one = of._replace(Z=of.Z[:1], changed=of.changed[:1], differs=of.differs[:1])
    assert of.enough and not one.enough
    problem = two_problems(1)
    by = scoreboard.Slopes.of(problem)
    for method in ("random groups", "groups"):  # the scoreboard asks the same
        line_there = scoreboard.measure(problem, by, {**job, "method": method}, False)
        assert line_there["share"] == pytest.approx(found[method]["share"])
    assert "share" not in scoreboard.measure(problem._replace(pairs=one), by, {**job, "method": "groups"}, False)
    assert line["share"] == line["most"] == line["selectivity"] == 1 and line["share_by_chance"] < 0.9
    assert pairs.measure(lambda *_: None, {**job, "method": "groups"}) == {"pairs": 0}


def test_parts_that_are_no_reasons_take_no_part_in_the_share():
    """Both parts move x-feature 0. As reasons they could not both have it; one of them alone has it whole."""
    from benchmarks.changed_parts import Pairs

    Z, changed = torch.ones(3, 2), torch.tensor([0.0, 1.0]).expand(3, 2, 2)
    both = Pairs(Z, changed, torch.ones(3, 2, dtype=torch.bool), torch.tensor([True, True]))
    changes = both.changes(both.every)
    assert changes.tolist() == [[[1.0, 0.0], [1.0, 0.0]]] * 3
    assert both.share(changes, 0).share == 0.5
    assert both._replace(counts=torch.tensor([True, False])).share(changes, 0).share == 1
    one_pair = torch.tensor([[True, True], [True, False], [True, False]])
    assert not both._replace(differs=one_pair).enough
    assert both._replace(differs=one_pair, counts=torch.tensor([True, False])).enough


def test_pairs_of_figures_run_and_resume(tmp_path):
    from benchmarks import pairs

    given = argparse.Namespace(
        funnybirds=None,
        classes=1,
        classes_funnybirds=1,
        seeds=1,
        examples=300,
        methods=["random groups"],
        tables=None,
        out=tmp_path,
    )
    of = pairs.of_figures("exact", 300, 0, 0).pairs
    # The layer by hand has a neuron for each look of each part: a pair moves two of one part, and reasons are the
    # parts of the class.
    moved = (of.changed - of.Z[:, None]).abs().reshape(len(of.Z), 6, 6, 4).sum(3)
    assert torch.equal(moved.round(), 2.0 * of.differs[:, :, None] * torch.eye(6)) and of.counts.tolist() == [
        False, True, True, True, False, False,
    ]  # fmt: skip
    pairs.main(given)
    lines = (tmp_path / "results.jsonl").read_text()
    assert '"network": "by hand"' in lines and '"network": "trained"' in lines
    assert (tmp_path / "pairs_by_hand.inc").read_text().startswith(".. list-table::")
    pairs.main(given)
    assert (tmp_path / "results.jsonl").read_text() == lines


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero", "ignore:Objective did not converge")
@pytest.mark.usefixtures("small")
def test_rivals_explain_the_same_output(two_problems):
    """Contributions of exact methods sum to the output; what x-features are of the layer sums to it for most."""
    from benchmarks import rivals, scoreboard

    of = two_problems(1)
    by = scoreboard.Slopes.of(of)
    fit = of.fit(0)
    exact = ("groups", "single dimensions", "spectral groups", "NMF of contributions", "PRCA", "DRSA")
    for name, make in (rivals.METHODS | rivals.CONTROLS).items():
        made = make(fit)
        E = made.contributions(*by.images)
        every = torch.ones(E.shape, dtype=torch.bool)
        assert float(made.part(of.Z, ~every).abs().max()) < 1e-4  # nothing kept, nothing left
        if name in (*exact, "random groups", "whole output"):
            assert float((E.sum(1) + made.bias - of.y).abs().max()) < 0.05 * float(of.read.test[1][:, 1].std()), name
            torch.testing.assert_close(made.part(of.Z, every), of.Z - of.base, atol=1e-4, rtol=1e-4)
        if name not in ("SRAE", "NN", "SAE", "CAE", "random encoder"):  # whose decoders are not linear
            one = torch.zeros_like(every)
            one[:, 0] = True
            both = made.part(of.Z, one) + made.part(of.Z, ~one)
            torch.testing.assert_close(both, made.part(of.Z, every), atol=1e-3, rtol=1e-3)
    sizes = rivals.uneven_groups(fit).part(of.base.expand(3, -1) + 1, torch.eye(3).bool()).sum(1)
    assert sizes.round().tolist() == [1, 1, len(of.base) - 2]
    assert [len(half.of.train[0]) for half in (of.fit(0, 0), of.fit(0, 1))] == [16, 16]


def test_removal_curves_of_a_linear_output(two_problems, monkeypatch):
    """Behind a linear layer, the logit falls by what leaves and rises by what enters."""
    from benchmarks import rivals, scoreboard

    of = two_problems(2)
    D = of.Z.shape[1]
    weights = torch.linspace(0.5, 2, D)
    monkeypatch.setattr(rivals, "rest_of_model", lambda model, layer, images, label, Z: Z @ weights)
    a = nn.functional.one_hot(torch.arange(D) % 3, 3).float()
    made = rivals._divided(a, of.fit(0))
    E = made.contributions(of.Z, weights.expand(of.Z.shape))
    torch.testing.assert_close(E, ((of.Z - of.base) * weights) @ a)
    found = scoreboard.curves(of, made, E)
    ordered = E.sort(1, descending=True).values.double()
    entered = torch.cat([torch.zeros(len(E), 1), ordered.cumsum(1)], 1) / ordered.sum(1, keepdim=True)
    entered = entered.clamp(0, 1)
    assert found["insertion"] == pytest.approx(float(torch.trapezoid(entered).mean() / 3), abs=1e-5)
    left = (1 - entered).clamp(0, 1)
    assert found["deletion"] == pytest.approx(float(torch.trapezoid(left).mean() / 3), abs=1e-5)


def test_removal_curves_of_a_falling_logit_take_what_lowers_it_first(two_problems, monkeypatch):
    """Of the opposite logit all contributions and changes turn round, and the curves stay."""
    from benchmarks import rivals, scoreboard

    of = two_problems(2)
    D = of.Z.shape[1]
    a = nn.functional.one_hot(torch.arange(D) % 3, 3).float()
    found = []
    for weights in (torch.linspace(0.5, 2, D), -torch.linspace(0.5, 2, D)):
        monkeypatch.setattr(rivals, "rest_of_model", lambda model, layer, images, label, Z, w=weights: Z @ w)
        made = rivals._divided(a, of.fit(0))
        found.append(scoreboard.curves(of, made, made.contributions(of.Z, weights.expand(of.Z.shape))))
    assert found[0] == pytest.approx(found[1]) and found[0]["insertion"] > 0.5 > found[0]["deletion"]


def test_a_branch_around_the_layer_stops_the_scoreboard(two_problems):
    """The rest of the model would run behind a stand-in image, whose branch belongs to none of the others."""
    from benchmarks import scoreboard

    class Around(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) + 30 * x.mean((1, 2, 3))[:, None]

    of = two_problems(1)
    scoreboard.check_rest(of, of.fit(0).rest)
    images, test = of.images, of.read.images(range(len(of.read.labels)))
    model = Around(of.read.model)
    read = of.read._replace(model=model, layer="model.5", test=(of.read.test[0], model(test)))
    around = of._replace(read=read, y=model(images)[:, 1])
    with pytest.raises(SystemExit, match=r"layer 'model.5' alone, got .*a branch goes around .*choose a layer through"):
        scoreboard.Slopes.of(around)
    one = around._replace(images=images[:1], Z=of.Z[:1], y=around.y[:1], covered=of.covered[:1])
    with pytest.raises(SystemExit, match="a branch goes around"):  # also where the stand-in is the one image
        scoreboard.Slopes.of(one._replace(read=read._replace(images=lambda rows: images[:1])))


def test_work_in_place_behind_the_layer_leaves_its_activations(two_problems):
    from benchmarks import scoreboard

    of = two_problems(1)
    layers = list(of.read.model)
    layers[5] = nn.ReLU(inplace=True)
    model = nn.Sequential(*layers)
    test = model[:5](of.read.images(range(len(of.read.labels))))
    before = test.clone()
    rest = of._replace(read=of.read._replace(model=model, layer="4")).fit(0).rest
    torch.testing.assert_close(rest(test), of.read.test[1][:, 1])
    assert torch.equal(test, before) and bool((test < 0).any())
    assert scoreboard.slopes_of(rest, test, test.mean(0)).shape == test.shape


def test_nodes_are_doubled_until_drops_by_patches_are_right(two_problems):
    """A steep kink needs more than 12 nodes; a linear logit needs 12, with the same values as before."""
    from benchmarks import scoreboard

    of = two_problems(1)
    weights = torch.linspace(-1, 1, of.Z.shape[1])
    middle = float(((of.Z @ weights).mean() + of.base @ weights) / 2)

    def kinked(Z):
        return 50 * (Z @ weights - middle).relu()

    def linear(Z):
        return Z @ weights

    moved = 0.05 * torch.randn(len(of.Z), 16, of.Z.shape[1], generator=torch.Generator().manual_seed(0))
    of = of._replace(y=kinked(of.Z), covered=of.Z[:, None] + moved)  # less than the kink's error at 12 nodes
    assert scoreboard.nodes_of(of, linear) == 12
    nodes = scoreboard.nodes_of(of, kinked)
    assert nodes > 12 and scoreboard.missed(of, kinked, nodes).within(scoreboard.FINE)
    drops = (kinked(of.Z)[:, None] - kinked(of.covered)).double()
    contributions = [
        ((Z - of.base) * scoreboard.slopes_of(kinked, Z, of.base, 12)).sum(-1) for Z in (of.Z, of.covered.flatten(0, 1))
    ]
    off = contributions[0][:, None] - contributions[1].reshape(drops.shape) - drops
    found = scoreboard.missed(of, kinked, 12)
    assert found.drops == pytest.approx(float(off.norm() / drops.norm()), rel=1e-4) and found.drops > 0.06
    torch.testing.assert_close(
        scoreboard.slopes_of(kinked, of.Z, of.base, 12), scoreboard.slopes_of(kinked, of.Z, of.base), rtol=0, atol=0
    )


def test_maps_and_measures_take_the_nodes_of_the_class(two_problems, monkeypatch):
    from benchmarks import rivals, scoreboard

    of = two_problems(1)
    monkeypatch.setattr(scoreboard, "ENOUGH", scoreboard.Missed(0, 0))
    monkeypatch.setattr(scoreboard, "FINE", scoreboard.Missed(0, 0))
    taken = []

    def counted(rest, Z, base, nodes=12):
        taken.append(nodes)
        return rivals.slopes_of(rest, Z, base, nodes)

    monkeypatch.setattr(scoreboard, "slopes_of", counted)
    monkeypatch.setattr(scoreboard, "MOST_NODES", 48)
    by = scoreboard.Slopes.of(of)
    assert by.nodes == 48
    taken.clear()
    scoreboard.judged(of, rivals.random_groups(of.fit(0)), by, 0)
    assert taken == [48]


@pytest.mark.filterwarnings("ignore:probabilities sum to", "ignore:maps are zero")
@pytest.mark.usefixtures("small")
def test_the_scoreboard_ranks_and_resumes(two_problems, tmp_path, monkeypatch, capsys):
    from benchmarks import scoreboard

    monkeypatch.setattr(scoreboard, "networks", lambda given: [scoreboard.Network("two parts", [1, 2], two_problems)])
    few = ["groups", "NN", "spectral groups", "PRCA", "CRAFT", "TopK SAE"]
    given = argparse.Namespace(
        classes=2, seeds=1, methods=[*few, *scoreboard.CONTROLS], halves=1, quick=False,
        tables=tmp_path / "docs", pictures=tmp_path / "docs", out=tmp_path / "out", examples=10, report=False, again=[],
    )  # fmt: skip
    scoreboard.main(given)
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (given.out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 12 and not any("failed" in line for line in lines)
    by = {line["method"]: line for line in lines if line["class"] == 1}
    for name in ("groups", "random groups", "PRCA", "spectral groups"):  # the same sums, so the same sum of maps
        assert by[name]["sd"] == by["whole output"]["sd"] and by[name]["importances"][0] == pytest.approx(
            by["whole output"]["importances"][0], rel=1e-3, abs=1e-3
        )
    assert by["CRAFT"]["f_reg"] > 5 * by["groups"]["f_reg"] and by["TopK SAE"]["x_features"] == 4
    assert 0 <= by["groups"]["selectivity"] <= 1 and "o1" not in by["whole output"] and "f_reg" not in by["1-Heatmap"]
    table = json.loads((given.out / "table.json").read_text())
    asked = len(scoreboard.columns_of(lines)) - 1 - len(scoreboard.FLATTERED) + 1  # less eff, and within
    assert table["ranks"]["groups"]["asked"] == asked
    assert all(0 < line["overlap"] <= 1 + 1e-9 for line in by.values() if "overlap" in line)
    assert "halves" in by["PRCA"] and not any("halves" in line for line in lines if line["class"] == 2)
    lacking = "groups, NN, spectral groups, PRCA, CRAFT, TopK SAE, random groups, uneven random groups, random encoder"
    assert f"halves, class 2: not measured for {lacking}. `--again METHOD ...` measures" in printed
    assert "halves, class 1" not in printed
    assert set(table["ranks"]) == {*few, *scoreboard.CONTROLS} and "a map has no x-features" in printed
    assert (given.tables / "scoreboard_two_parts.inc").read_text().startswith(".. list-table::")
    assert "mean rank over measures" in (given.pictures / "scoreboard_ranks.svg").read_text()
    assert "random groups" in (given.pictures / "scoreboard_overlap.svg").read_text()
    monkeypatch.setattr(scoreboard, "measure", None)
    scoreboard.main(given)  # measures nothing again
    with (given.out / "results.jsonl").open("a") as file:
        file.write('{"network": "two parts", "cla')  # as a kill leaves it
    assert capsys.readouterr().out == printed
    given.report = True
    scoreboard.main(given)
    assert capsys.readouterr().out == printed
    given.report, given.again = True, []
    with pytest.raises(SystemExit, match=r"expected results in .*nowhere.results.jsonl, got none; measure without"):
        scoreboard.main(argparse.Namespace(**{**vars(given), "out": tmp_path / "nowhere"}))
    assert not (tmp_path / "nowhere").exists()
    given.report, given.again = False, ["groups"]
    monkeypatch.setattr(scoreboard, "measure", lambda of, by, job, halves: {"f_reg": 7.0, "patches": 0.5})
    with (given.out / "results.jsonl").open("a") as file:
        file.write('{"network": "two parts", "cla')
    scoreboard.main(given)
    anew = [json.loads(line) for line in (given.out / "results.jsonl").read_text().splitlines()]
    assert len(anew) == len(lines) and {line["f_reg"] for line in anew if line["method"] == "groups"} == {7.0}
    assert [line for line in anew if line["method"] != "groups"] == [ln for ln in lines if ln["method"] != "groups"]
    given.methods = ["NN"]  # what is not measured anew stays
    scoreboard.main(given)
    assert [json.loads(line) for line in (given.out / "results.jsonl").read_text().splitlines()] == anew
    given.examples = 20
    given.methods = ["groups"]
    with pytest.raises(SystemExit, match="another --examples"):  # before anything is taken out
        scoreboard.main(given)
    assert [json.loads(line) for line in (given.out / "results.jsonl").read_text().splitlines()] == anew


def test_ranks_share_ties_and_leave_out_what_was_not_asked():
    from benchmarks import scoreboard

    lines = [
        {"method": "groups", "class": 1, "seed": 0, "f_reg": 0.1, "patches": 0.5},
        {"method": "PRCA", "class": 1, "seed": 0, "f_reg": 0.1, "patches": 0.7},
        {"method": "CRAFT", "class": 1, "seed": 0, "f_reg": 0.3},
        {"method": "random groups", "class": 1, "seed": 0, "f_reg": 0.0, "patches": 0.9},
    ]
    found = {line["method"]: line for line in scoreboard.ranks(lines)}
    assert found["groups"] | {"class": 1, "seed": 0} == {
        "method": "groups", "class": 1, "seed": 0, "f_reg": 2.5, "patches": 3.0, "mean": 2.75, "all": 2.75, "asked": 2,
    }  # fmt: skip
    assert [found[name]["mean"] for name in ("PRCA", "CRAFT", "random groups")] == [2.25, 4, 1]
    order = [row[0] for row in scoreboard.rank_cells({"net": lines})[1]]
    assert order == ["PRCA", "groups", "CRAFT", "*random groups*"]
    second = [{**line, "class": 2, "patches": line.get("patches", 0.6)} for line in lines]  # CRAFT is asked: 4 and 3
    head, rows, figures = scoreboard.rank_cells({"net": [*lines, *second], "other": lines})
    behind = dict(zip([row[0] for row in rows], [row[head.index("behind groups")] for row in rows], strict=True))
    assert [figures[name]["behind"][0] for name in ("PRCA", "CRAFT")] == [(-0.75 + -0.5) / 2, (0.75 + 1.25) / 2]
    # classes of "net" are behind by -0.5 and -1, and by 1.25 and 0.25; the interval is that of two values, by t
    assert figures["PRCA"]["behind"][1] == pytest.approx(12.706 * 0.25 / 2, rel=1e-4)
    assert behind["groups"] == "" and behind["CRAFT"] == "1.0 ± 3.2"
    assert scoreboard.rank_cells({"net": lines[1:]})[2]["PRCA"]["behind"] is None
    head, rows, _ = scoreboard.cells(lines)
    assert head == ["method", "F_reg", "patches"]
    assert rows[0] == ["groups", "**0.100**", "0.50"] and rows[1] == ["PRCA", "**0.100**", "**0.70**"]
    assert rows[2] == ["CRAFT", "0.300", ""] and rows[3] == ["*random groups*", "0.000", "0.90"]


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """Options of a scoreboard of a network in a file, with a folder of images."""
    import numpy as np
    from PIL import Image

    from benchmarks import rivals

    monkeypatch.setattr(rivals, "N_FEATURES", 2)
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "pictures").mkdir()
    values = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    values[::2, ..., 0] = 0  # without red, which the second class has
    for i, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    return argparse.Namespace(
        model=str(tmp_path / "net.py"), images=tmp_path / "pictures", layer="5", most=100, classes=2, seeds=1, halves=2,
        methods=["groups", "TopK SAE", "random groups", "1-Heatmap"], quick=False, tables=None, pictures=None,
        out=tmp_path / "out", report=False, again=[],
    )  # fmt: skip


def test_a_model_that_the_scoreboard_cannot_take_stops_it(own_model, tmp_path):
    """Each with one sentence that says what to change, by no option that the script lacks."""
    from PIL import Image

    from benchmarks import scoreboard

    def stopped(match, network=NETWORK, **changed):
        (tmp_path / "net.py").write_text(network)
        with pytest.raises(SystemExit, match=match) as found:
            scoreboard.main(argparse.Namespace(**{**vars(own_model), **changed}))
        assert not {"--size", "--skip-damaged", "--probabilities", "prediction_transform"} & set(
            re.findall(r"--[\w-]+|prediction_transform", str(found.value))
        )

    layers = "nn.Sequential(*pooled, nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)"
    for last, why in {
        "nn.Softmax(1)": "as after a softmax; .*without its last softmax: let load",
        "nn.LogSoftmax(1)": "as after a log_softmax; .*without its last log_softmax: let load",
        "nn.Hardsigmoid()": "after a sigmoid, whose .*without its sigmoid: let load",
    }.items():
        steep = NETWORK.replace(f"{layers})", f"{layers}, {last})").replace("3\n    return", "30\n    return")
        stopped(why, steep.replace("[0.5, 0.0]", "[0.5, -20.0]"))
    one = NETWORK.replace("return net.", "return First(net).") + (
        "class First(nn.Sequential):\n    def forward(self, x):\n        return self[0](x)[:, 0]\n"
    )
    stopped(r"expected outputs \(N, classes\) of .*net.py, got \(40,\); let its model return logits", one, layer="0.5")
    stopped("another layer'", layer="another layer")
    stopped("no file|does not exist|cannot run", model=str(tmp_path / "nowhere.py"))
    stopped(r"expected at least 10 images .* got \(8, 3, 16, 16\); add images", most=8)
    Image.new("RGB", (8, 8)).save(own_model.images / "small.png")
    stopped("differ in size: .*; set SIZE in the model's file")
    (own_model.images / "small.png").write_bytes(b"no image")
    stopped("'small.png' in .* cannot be read .*; replace it$")


def test_a_run_with_another_model_stops(own_model, tmp_path, monkeypatch):
    from benchmarks import scoreboard

    own_model.methods = ["random groups"]
    scoreboard.main(own_model)
    before = (own_model.out / "results.jsonl").read_text()
    monkeypatch.setattr(scoreboard, "measure", lambda *_: pytest.fail("all is there"))
    scoreboard.main(own_model)
    (tmp_path / "net.py").write_text(NETWORK.replace("[0.5, 0.0]", "[0.5, 0.01]"))
    own_model.again = ["random groups"]
    with pytest.raises(SystemExit, match=r"another --model: '.*net.py, weights \w+', where it was '.*, weights"):
        scoreboard.main(own_model)
    assert (own_model.out / "results.jsonl").read_text() == before


def test_a_scoreboard_without_figures_says_why(own_model, tmp_path):
    from benchmarks import scoreboard

    for file in own_model.images.iterdir():
        if int(file.stem) % 2 and file.stem != "1":  # the second class has one image, to learn from or to measure on
            file.unlink()
    (tmp_path / "net.py").write_text(NETWORK)
    network = scoreboard.networks(own_model)[0]
    assert network.classes == [0, 1] and network.of(0) is not None and network.of(1) is None
    lines = [{"network": "net", "class": 1, "seed": 0, "method": "groups", "empty": network.why_empty}]
    with pytest.raises(
        SystemExit, match=r"nothing was measured.*\nnet, class 1: the model gives it to none of 17 images"
    ):
        scoreboard.report(lines, own_model.out, None, None)
    lines.append({"network": "net", "class": 0, "seed": 0, "method": "CRAFT", "failed": "expected no negative numbers"})
    with pytest.raises(SystemExit, match="net, class 0, CRAFT: expected no negative numbers\nAdd images or methods"):
        scoreboard.report(lines, own_model.out, None, None)


def test_options_of_the_scoreboard_are_checked(capsys):
    from benchmarks import scoreboard

    assert scoreboard.arguments(["--out", "x", "--methods", "groups", "DRSA", "--again", "DRSA"]).again == ["DRSA"]
    for options, why in {
        "--methods group": "invalid choice: 'group'",
        "--again group": "invalid choice: 'group'",
        "--methods DRSA --again groups": "argument --again: groups not among --methods; add it there",
        "--seeds 0": "--seeds: expected at least 1, got 0",
        "--classes 0": "--classes: expected at least 1, got 0",
        "--most 9": "--most: expected at least 10, got 9",
        "--halves -1": "--halves: expected at least 0, got -1",
    }.items():
        with pytest.raises(SystemExit):
            scoreboard.arguments(["--out", "x", *options.split()])
        assert why in capsys.readouterr().err


def test_the_scoreboard_of_a_model_of_ones_own(own_model, monkeypatch, capsys):
    """A folder of images and a file with a network suffice; the classes are those it gives most often."""
    from benchmarks import rivals, scoreboard

    given = own_model
    monkeypatch.setattr(rivals, "STEPS", 5)
    scoreboard.main(given)
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (given.out / "results.jsonl").read_text().splitlines()]
    assert sorted(line["class"] for line in lines) == [0] * 4 + [1] * 4
    found = {line["method"]: line for line in lines[:4]}
    assert found["groups"]["f_reg"] < 1e-3 and "net, 2 classes" in printed  # the output is linear behind the layer
    assert found["groups"]["f_reg"] == pytest.approx(found["random groups"]["f_reg"], abs=1e-5)
    given.layer = None
    with pytest.raises(SystemExit, match="needs --images FOLDER and --layer NAME"):
        scoreboard.networks(given)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.filterwarnings("ignore:maps are zero")
def test_the_script_for_a_gpu_on_small_sizes(tmp_path, capsys):
    from benchmarks import gpu

    reads = gpu.waits(lambda: [float(torch.ones(1)) for _ in range(3)], torch.device("cpu"))
    assert reads["aten::_local_scalar_dense"] == 3
    torch.manual_seed(0)
    options = "--device cpu --batch 2 --pixels 16 --layer 2 --targets 1 3 --steps 4 --examples 300 --width 12"
    given = gpu.arguments().parse_args([*options.split(), "--repeats", "1", "--out", str(tmp_path)])
    given.network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    ).eval()
    found = gpu.main(given)
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert found["fits of 3"][0]["targets"] == 3 and found["explaining"]["Saliency"]["to_captum"] > 0
    # On a CPU AdamW reads the counter of each of the 14 tensors of weights; nothing else waits in a step. Of
    # the four further maps none waits; all maps together may wait once more than a single one.
    assert set(found["waits"]["a step of a fit"].values()) == {14.0}
    assert max(n for kind in ("groups", "SRAE") for n in found["waits"][f"a further map, {kind}"].values()) <= 0.25


def test_growth_is_measured_once_for_each_size(tmp_path):
    from benchmarks import growth

    usual = {"images": 40, "size": 16, "width": 8, "targets": 1, "n": 2}
    found = growth.lines({"images": (40, 60)}, usual, tmp_path)
    assert [line["images"] for line in found] == [40, 60] and all(line["fit"] > 0 for line in found)
    assert growth.lines({"images": (40, 60)}, usual, tmp_path) == found  # nothing is measured twice
    assert growth.table(found).count("* -") == 3
    growth.draw([growth.USUAL | {"fit": 1.0, "memory": 0.0, "explain": 0.1}], tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().count("<path") > 10
    model, x = growth.material(40, 16, 8, 12)
    assert len(model(x).argmax(1).unique()) >= 10  # classes of images


@pytest.mark.slow
def test_the_command_fits_every_class(tmp_path):
    from benchmarks import fit_command

    fit_command.prepare(tmp_path, 60, 12)
    found = fit_command.measure(tmp_path)
    assert found["fitted"] == 12 and found["clock"] > 0
    assert found["processor"] > 0.5 and 100 < found["peak"] < 4096  # torch alone has more than 100 MiB


@pytest.mark.slow
@pytest.mark.usefixtures("torchvision")
def test_the_command_and_the_script_explain_alike(tmp_path):
    from benchmarks import explain_command

    explain_command.prepare(tmp_path, 2)
    told = {}
    for name, command in explain_command.commands(2, "out").items():
        assert explain_command.seconds(command, tmp_path) > 0
        lines = (tmp_path / "out" / "explanations.jsonl").read_text().splitlines()
        told[name] = [json.loads(line) for line in lines]
        shutil.rmtree(tmp_path / "out")
    for one, other in zip(told["command"], told["script"], strict=True):
        assert one["contributions"] == pytest.approx(other["contributions"], abs=1e-4)
        assert one["surrogate"] == pytest.approx(other["surrogate"], abs=1e-4) and one["name"] == other["name"]
    line = explain_command.line("all", [(2.0, 1.0), (3.0, 2.0), (4.0, 4.0)])
    assert "command 3.00 (2.00 to 4.00)" in line and "ratio 1.50 (1.00 to 2.00)" in line


def test_pictures_show_what_the_tables_say(tmp_path):
    from benchmarks import pictures
    from benchmarks.scoreboard import list_table

    head = ["method", "share", "chance"]
    rows = [["groups", "**0.90 ± 0.10**", "0.25"], ["*random*", "0.30", "0.25 ± 0.01"]]
    path = tmp_path / "some.inc"
    path.write_text(list_table(head, [*rows, ["empty", "", ""]]))
    assert pictures.read_table(path) == (head, [*rows, ["empty", "", ""]])
    found = pictures.dots(path, "share", chance=True)
    assert found == [("groups", 0.9, 0.1, False, 0.25), ("random", 0.3, 0.0, True, 0.25)]
    assert pictures.dots(path, "share", ["random"]) == [("random", 0.3, 0.0, True, None)]
    (axis,) = pictures.dot_plot({"some": found}, "share", mark=0.5).axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    assert [x for x, _ in lines] == [[0.8, 1.0], [0.9], [0.25], [0.3, 0.3], [0.3], [0.25], [0.5, 0.5]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["random", "groups"]
    assert lines[1][1] == [1] and lines[4][1] == [0]  # the first row is the highest


def test_pictures_of_the_docs_can_be_drawn(tmp_path):
    from benchmarks import pictures

    given = argparse.Namespace(tables=ROOT / "docs" / "tables", pictures=tmp_path)
    pictures.main(given)
    names = {f"evaluation_{name}" for name in ("unexplained", "selectivity", "pairs", "parts")}
    assert {path.stem for path in tmp_path.iterdir()} == names
    text = (tmp_path / "evaluation_pairs.svg").read_text()
    assert "groups" in text and "trained" in text
    pictures.main(given)
    assert (tmp_path / "evaluation_pairs.svg").read_text() == text
