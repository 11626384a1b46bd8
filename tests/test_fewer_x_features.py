"""Fits that keep fewer x-features than they were asked for say so, wherever a reader looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.__main__ import main

NET = """
import torch
from torch import nn

def load():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():  # of four dimensions two reach the outputs
        net[2].weight.copy_(torch.tensor([[1.0, -0.5, 0.0, 0.0], [-0.5, 1.0, 0.0, 0.0]]))
    return net.eval()
"""


def of_four_two_reach_the_output() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(80, 4)
    with torch.no_grad():
        model[2].weight[0, 2:] = 0
    return model, x


def test_explainer_keeps_the_number_it_was_asked_for(tmp_path: Path) -> None:
    model, x = of_four_two_reach_the_output()
    xnn = XNNAttribution(model, "1", 4).fit(x, positives=torch.ones(80).bool(), progress=False)
    explainer = xnn.explainer()
    left = explainer.form.n_features
    assert left < 4 and explainer.requested == 4
    assert explainer.shortfall.startswith(f"The fit was asked for 4 x-features and has {left}: ")
    xnn.n_features = left  # another number for later fits changes nothing about this one
    assert explainer.shortfall
    xnn.save(tmp_path)
    assert XNNAttribution.load(tmp_path, model).explainer().shortfall == explainer.shortfall
    xnn.fit(x, positives=torch.ones(80).bool(), progress=False)
    assert xnn.explainer().requested == left and xnn.explainer().shortfall == ""


def test_learned_forms_have_as_many_as_they_were_asked_for() -> None:
    model, x = of_four_two_reach_the_output()
    made = XNNAttribution(model, "1", 3, autoencoder=SRAE, recipe=Recipe(steps=5))
    made.fit(x, positives=torch.ones(80).bool(), progress=False)
    assert made.explainer().requested == 3 and made.explainer().shortfall == ""


def test_report_says_it(tmp_path: Path) -> None:
    model, x = of_four_two_reach_the_output()
    for n, said in ((4, True), (1, False)):
        xnn = XNNAttribution(model, "1", n).fit(x, positives=torch.ones(80).bool(), progress=False)
        text = xnn.report(x[:8], tmp_path / f"{n}.html").read_text(encoding="utf-8")
        assert ("The fit was asked for" in text) is said
        assert not said or xnn.explainer().shortfall in text


def test_command_line_says_it_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    torch.save(torch.randn(60, 4), tmp_path / "rows.pt")
    net, data, out = (str(tmp_path / name) for name in ("net.py", "rows.pt", "out"))

    def run(*words: str) -> list[str]:
        assert main([*words, "--data", data, "--quiet"]) == 0
        return capsys.readouterr().out.splitlines()

    fit: Any = ["fit", "--model", net, "--layer", "1", "--n-features", "4", "--target", "all", "--out", out]
    lines = run(*fit)
    assert lines[0].split()[-2:] == ["x-features", "positives"]
    said = [line for line in lines if "The fit was asked for 4 x-features" in line]
    assert said and lines[-1].startswith("Written: ") and lines[-1 - len(said) : -1] == said
    page = str(tmp_path / "page.html")
    again = run("report", "--explainer", out, "--out", page)
    assert again == [*said, f"Open this: {page}"]
