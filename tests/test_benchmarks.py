"""The benchmarks run and count right; the figures themselves are theirs to print."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from captum_xnn.datasets.parts import PartsSample
from captum_xnn.problem import Recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_collecting_is_timed_in_pairs():
    from speed import collecting

    ratios = collecting(images=8, repeats=2)
    assert len(ratios) == 2 and min(ratios) > 0


def test_figures_of_degeneration():
    from degeneration import agreement, mean_correlation, split

    x = torch.randn(5000, 3)
    mixed = torch.stack([x[:, 0], x[:, 0] + x[:, 1], torch.zeros(5000)], 1)
    assert mean_correlation(mixed) == pytest.approx(0.5**0.5, abs=0.02)
    assert agreement(x, x[:, [2, 0, 1]]) == pytest.approx(1, abs=1e-5)
    rows = split(torch.arange(300) % 5, 3)
    assert sorted(torch.cat([rows.train, rows.test]).tolist()) == list(range(300))
    assert (torch.arange(300) % 5)[rows.train[:50]].unique().tolist() == [3]


@pytest.mark.filterwarnings("ignore:expected probabilities that sum to 1")
def test_excitation_speed(monkeypatch, capsys):
    import excitation_speed as speed

    names = ("saliency", "forward", "layer", "layer, MWP", "layer, K=5", "input", "input, MWP", "input, K=5")
    assert speed.ratios(dict(zip(names, (10, 4, 8, 5, 20, 16, 8, 40), strict=True))) == {
        "layer": 0.8,
        "input": 1.6,
        "layer / MWP": 1.6,
        "input / MWP": 2.0,
        "layer, K=5": 0.5,
        "input, K=5": 0.5,
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
    """One class of twelve, through the public door: several, distinct, faithful x-features."""
    from birds import LAYER, BirdImages, network
    from degeneration import mean_correlation
    from torch.utils.data import DataLoader, Subset

    from captum_xnn import XNNAttribution
    from captum_xnn.metrics.sparsity import effective_number

    model, mean, std = network(birds)
    images = BirdImages(birds, mean, std)
    few = sorted(set(images.labels))[:12]
    rows = [i for i, label in enumerate(images.labels) if label in few]
    loader = DataLoader(Subset(images, rows), batch_size=32)
    xnn = XNNAttribution(model, LAYER).fit(loader, target=few[4], progress=False)
    one = torch.stack([images[i][0] for i in rows if images.labels[i] == few[4]])
    explainer = xnn.explainer(few[4])
    with torch.no_grad():
        E = torch.cat([explainer.srae.encode(xnn_activations(xnn, batch)) for batch in one.split(16)])
    assert effective_number(explainer.srae.contributions(E).abs().mean(0, keepdim=True)) > 3
    score = xnn.score(loader, few[4])
    assert score.f_cls >= 0.995 and score.f_reg < 0.2
    assert mean_correlation(E) < 0.6  # of one class alone, where they may well go together


def xnn_activations(xnn, batch):
    from captum_xnn.host import find_layer, read_layer

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


@pytest.mark.filterwarnings("ignore:expected")
def test_table_1_on_small_pictures(monkeypatch):
    import cub

    monkeypatch.setattr(cub, "POSITIVE_SHARE", 0.6)
    monkeypatch.setattr(cub, "DIMENSIONS", 3)
    for name in ("SRAE", "NN"):
        monkeypatch.setitem(cub.METHODS, name, partial(cub.METHODS[name], hidden=(8,)))
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
        of = cub.Explained(model, "5", pictures, model[:6](pictures.images), model(pictures.images))
    train, test, positives = cub.split(pictures.labels, 2)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(40)) and (pictures.labels[positives] == 2).all()
    assert int((pictures.labels[train] == 2).sum()) == 6 and set(positives.tolist()) <= set(test.tolist())
    lines = []
    for method in ("SRAE", "NN", "1-Heatmap", "Lasso", "Z"):
        found = cub.measure(method, of, 2, 0, "1")
        lines.append({"method": method, "class": 2, "seed": 0, **found})
        # Of the one visible part, or nowhere: a logarithm of 1, or of none.
        assert found["locality"] == pytest.approx(0, abs=1e-6) or math.isnan(found["locality"])
    by = {line["method"]: line for line in lines}
    assert by["SRAE"]["f_cls"] == 1 and by["Lasso"]["train"] < 0.1  # the output is linear in this layer
    assert 1 <= by["SRAE"]["eff"] <= 5 and "o1" not in by["1-Heatmap"] and "test" not in by["Z"]
    again = lines + [{**line, "class": 3, "train": line.get("train", math.nan) + 0.2} for line in lines]
    mean, half = cub.summary(again)["NN"]["train"]
    assert mean == pytest.approx(by["NN"]["train"] + 0.1)
    assert half == pytest.approx(12.706 * 0.1, rel=1e-3)  # Student's t of one degree of freedom
    text = cub.table(again)
    assert "| SRAE | 2 | " in text and "(0.0812)" in text and "| 1-Heatmap | 2 |" in text


def test_auroc_of_reasons():
    import synthetic

    g = torch.Generator().manual_seed(0)
    scores, shown = torch.randint(0, 6, (40, 3), generator=g), torch.rand(40, 2, generator=g) < 0.4
    found = synthetic.auroc(scores, shown)
    for k in range(3):
        for r in range(2):
            own, rest = scores[shown[:, r], k].tolist(), scores[~shown[:, r], k].tolist()
            wins = sum((a > b) + (a == b) / 2 for a in own for b in rest)
            assert float(found[k, r]) == pytest.approx(wins / len(own) / len(rest))


def test_reasons_are_matched_to_x_features():
    import synthetic

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
    import synthetic

    from captum_xnn.datasets.synthetic import draw_figures, reason_parts

    figures = draw_figures(20, members=1, near_misses=0, reasons=[{"head": "plain blue", "belly": "plain blue"}])
    maps = figures.masks[:, reason_parts(figures, 0)].flip(1).float()  # x-feature 0 shows the belly
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
    import synthetic

    of = synthetic.explained("exact", 500, 50, 3, 1)
    shown = synthetic.concepts(of.train.figures, 1).numpy()
    Z, y, members = of.train.Z.numpy(), of.train.y_hat[:, 1:2].numpy(), (of.train.y_hat.argmax(1) == 1).numpy()
    share = members.mean()
    weights = np.where(members, 0.25 / share, 0.75 / (1 - share))  # a quarter of each batch
    scaled = np.hstack([shown, Z / np.sqrt(Z.var(0, ddof=1).mean()), y / y.std(ddof=1)]).astype(float)
    C = np.cov(scaled.T, aweights=weights, ddof=0)
    left = np.diag(C[3:, 3:] - C[3:, :3] @ np.linalg.solve(C[:3, :3], C[:3, 3:]))
    pull_away = sum(C[i, j] ** 2 / C[i, i] / C[j, j] for i in range(3) for j in range(3) if i != j) / 6
    assert left[-1] == pytest.approx(0, abs=1e-6)  # this output is the sum of its reasons
    assert synthetic.loss_of_reasons(of, 1) == pytest.approx(np.log1p(left[:-1]).mean() + pull_away, rel=1e-4)


@pytest.mark.filterwarnings("ignore:expected")
def test_synthetic_figures_end_to_end(monkeypatch, tmp_path, capsys):
    import json

    import synthetic

    monkeypatch.setitem(synthetic.METHODS, "SRAE", partial(synthetic.METHODS["SRAE"], hidden=(8,)))
    monkeypatch.setattr(synthetic, "fit", partial(synthetic.fit, recipe=Recipe(steps=150)))
    monkeypatch.setattr(synthetic, "MAPS", 8)
    arguments = {
        "networks": ["exact", "trained"], "classes": [4], "x_features": ["reasons", "3"], "train": 300, "test": 200,
        "epochs": 1, "out": tmp_path,
    }  # fmt: skip
    synthetic.main(methods=["SRAE", "1-Heatmap"], seeds=1, **arguments)
    first = (tmp_path / "results.jsonl").read_text()
    synthetic.main(methods=["SRAE", "1-Heatmap"], seeds=1, **arguments)
    assert (tmp_path / "results.jsonl").read_text() == first  # nothing is measured twice
    lines = [json.loads(line) for line in first.splitlines()]
    kinds = [(line["network"], line["x_features"], line["method"]) for line in lines]
    each = [("reasons", "SRAE"), ("reasons", "1-Heatmap"), ("3", "SRAE")]
    assert kinds == [(name, *kind) for name in ("exact", "trained") for kind in each]
    assert lines[0]["accuracy"] == 1 and lines[0]["from_z"] == 1 and lines[0]["f_cls"] > 0.8
    assert lines[0]["f_reg"] < lines[0]["std"] and len(lines[0]["correlations"]) == 2
    assert len(lines[2]["correlations"]) == 3
    assert lines[1]["mass"] == pytest.approx(0.5, abs=1e-4) and "auroc" not in lines[1]  # half of it on each part
    again = lines + [{**line, "seed": 1, "o1": line.get("o1", math.nan) + 0.2} for line in lines]
    mean, half = synthetic.summary(again)[1]["o1"]
    assert mean == pytest.approx(lines[0]["o1"] + 0.1) and half == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert "| exact | reasons | SRAE | 2 | " in synthetic.table(again)
    assert (tmp_path / "table.md").read_text() == synthetic.table(lines) + "\n"
