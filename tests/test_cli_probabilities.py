"""Models that end with a softmax or sigmoid on the command line: refused with advice, and explained by their logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from captum_xnn.__main__ import main
from captum_xnn.layers._logits import LOGITS_OF

NET = """
import torch
from torch import nn
from torch.nn import functional


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Linear(6, 3)

    def logits(self, x):
        return self.last(self.act(self.first(x)).mean((2, 3)))

    def forward(self, x):
        y = self.logits(x)
        return END


def load():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.last.weight *= 20
        net.last.bias -= net.logits(torch.rand(60, 3, 6, 6, generator=torch.Generator().manual_seed(1))).mean(0)
    return net.eval()
"""
ENDS = {
    "softmax": "functional.softmax(y, 1)",
    "log_softmax": "y.log_softmax(1)",
    "sigmoid": "torch.sigmoid(y)",
    "logits": "y",
}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    images = torch.rand(60, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    torch.save(images, tmp_path / "images.pt")
    torch.save(images[:6], tmp_path / "few.pt")  # pictures take long
    for name, end in ENDS.items():
        (tmp_path / f"{name}.py").write_text(NET.replace("END", end), encoding="utf-8")

    def run(*words: str) -> tuple[int, str, str]:
        data = "few.pt" if words[0] == "explain" else "images.pt"
        code = main([*words, "--data", str(tmp_path / data), "--quiet"])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def fit(folder: Path, net: str, *more: str) -> list[str]:
    out = str(folder / f"explainers {net}")
    return ["fit", "--model", str(folder / f"{net}.py"), "--layer", "act", "--target", "0", "1", "--out", out, *more]


def numbers(folder: Path, net: str, run: Any) -> dict[str, np.ndarray]:
    code, _, err = run("explain", "--explainer", str(folder / f"explainers {net}"), "--out", str(folder / f"why {net}"))
    assert code == 0, err
    lines = [json.loads(line) for line in (folder / f"why {net}" / "explanations.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    return {name: np.array([line[name] for line in lines]) for name in ("target", "prediction", "surrogate")}


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("net", ["softmax", "log_softmax"])
def test_probabilities_are_refused_or_warned_of_with_the_option_to_pass(net: str, run: Any, tmp_path: Path) -> None:
    code, _, err = run(*fit(tmp_path, net))
    assert f"(on the command line: --probabilities {net})" in err
    assert (code == 1) is (net == "softmax"), "functional softmax is seen by its values"


@pytest.mark.parametrize("net", ["softmax", "log_softmax"])
def test_logits_behind_a_softmax_are_explained(net: str, run: Any, tmp_path: Path) -> None:
    code, _, err = run(*fit(tmp_path, net, "--probabilities", net))
    assert code == 0 and err == ""
    assert f'probabilities = "{net}"' in (tmp_path / f"explainers {net}" / "config.toml").read_text()
    found = numbers(tmp_path, net, run)  # the option is in config.toml
    namespace: dict[str, Any] = {}
    exec((tmp_path / "logits.py").read_text(), namespace)
    logits = namespace["load"]()(torch.load(tmp_path / "few.pt")).detach()
    expected = logits - logits.mean(1, keepdim=True)
    best = expected[:, :2].argmax(1)
    assert found["target"].tolist() == best.tolist()
    np.testing.assert_allclose(found["prediction"], expected[range(6), best], atol=1e-4)
    np.testing.assert_allclose(found["surrogate"], found["prediction"], atol=0.02)


@pytest.mark.parametrize("form", ["groups", "srae"])
def test_evaluate_measures_the_logits_that_were_fitted(form: str, run: Any, tmp_path: Path) -> None:
    """The sigmoid of the outputs is explained by the same numbers as the outputs themselves."""
    more = ["--form", form, *(["--recipe", "steps=30"] if form == "srae" else [])]
    entries = {}
    for net, options in (("sigmoid", ["--probabilities", "sigmoid"]), ("logits", [])):
        assert run(*fit(tmp_path, net, *more, *options))[0] == 0
        explainers = tmp_path / f"explainers {net}"
        assert run("evaluate", "--explainer", str(explainers))[0] == 0
        entries[net] = json.loads((explainers / "evaluation.json").read_text())["targets"]
    for ours, wanted in zip(entries["sigmoid"], entries["logits"], strict=True):
        for name in ("f_reg", "f_cls", "effective"):
            assert ours[name] == pytest.approx(wanted[name], rel=2e-3, abs=1e-5)


def test_report_of_probabilities_is_kept(run: Any, tmp_path: Path) -> None:
    assert run(*fit(tmp_path, "softmax", "--probabilities", "softmax"))[0] == 0
    page = ["report", "--explainer", str(tmp_path / "explainers softmax"), "--out", str(tmp_path / "page.html")]
    code, _, err = run(*page)
    assert code == 0, err
    assert "not kept" not in err
    assert list((tmp_path / "explainers softmax" / "report-cache").glob("*/content.json"))


def test_other_words_are_refused(run: Any, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('probabilities = "softmin"')
    code, _, err = run(*fit(tmp_path, "logits", "--config", str(tmp_path / "run.toml")))
    assert code == 1 and 'probabilities is \'softmin\'; give "softmax", "log_softmax" or "sigmoid"' in err


def test_functions_invert_their_probabilities() -> None:
    y = 3 * torch.randn(50, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    centred = y - y.mean(1, keepdim=True)
    torch.testing.assert_close(LOGITS_OF["softmax"](functional.softmax(y, 1)), centred)
    torch.testing.assert_close(LOGITS_OF["log_softmax"](y.log_softmax(1)), centred)
    torch.testing.assert_close(LOGITS_OF["sigmoid"](torch.sigmoid(y)), y, rtol=1e-4, atol=1e-4)
    certain = LOGITS_OF["softmax"](torch.tensor([[1.0, 0.0]]))
    assert certain.isfinite().all() and certain[0, 0] > 40
