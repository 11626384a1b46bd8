"""Texts on the command line: the model's file encodes lines and names tokens; maps are drawn at the embedding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import LayerIntegratedGradients
from command_line import write
from test_report import Page

from captum_xnn import XNNAttribution
from captum_xnn import __main__ as cli
from captum_xnn.cli import Configuration, ModelAndInputs
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.patch_scores import patch_scores

NET = """
import torch
from torch import nn

CLASSES = ("bad", "good")
WORDS = ["<pad>", "the", "great", "film", "awful", "slow"]


def encode(text):
    ids = [WORDS.index(word) for word in text.split()]
    return ids + [0] * (6 - len(ids))


def tokens(ids):
    return [WORDS[i] for i in ids.tolist() if i]


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.act, self.out = nn.Embedding(6, 8, padding_idx=0), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, ids):
        return self.out(self.act(self.embedding(ids)).sum(1))


def load():
    torch.manual_seed(1)
    return Reads()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "net.py").write_text(NET)
    draw = np.random.default_rng(0)
    words = ["the", "great", "film", "awful", "slow"]
    lines = [" ".join(draw.choice(words, draw.integers(3, 7))) for _ in range(60)]
    (folder / "texts.txt").write_text("\n".join(lines[:30]) + "\n\n" + "\n".join(lines[30:]) + "\n")
    command = ["fit", "--model", f"{folder}/net.py", "--layer", "act", "--data", f"{folder}/texts.txt"]
    assert cli.main([*command, "--target", "0", "1", "--n-features", "2", "--out", f"{folder}/xnn", "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> tuple[XNNAttribution, torch.Tensor, list[list[str]]]:
    opened = ModelAndInputs.of(Configuration.read(folder / "xnn" / "config.toml", {"device": "cpu"}))
    heatmap = FromCaptum(LayerIntegratedGradients, layer="embedding")
    xnn = XNNAttribution.load(folder / "xnn", opened.model, heatmap=heatmap)
    texts = [line.split() for line in (folder / "texts.txt").read_text().splitlines() if line]
    words = ["<pad>", "the", "great", "film", "awful", "slow"]
    ids = torch.tensor([[words.index(w) for w in t] + [0] * (6 - len(t)) for t in texts])
    return xnn, ids, texts


def test_lines_are_explained_as_in_python(folder: Path, by_hand: tuple, tmp_path: Path) -> None:
    xnn, ids, texts = by_hand
    command = ["explain", "--explainer", f"{folder}/xnn", "--data", f"{folder}/texts.txt", "--quiet"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "explanations.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == texts
    assert [line["name"] for line in lines][29:31] == ["line 30", "line 32"]  # an empty line is between them
    targets = xnn.model(ids).argmax(1)
    why = xnn.explain(ids, targets)
    for i in (0, 31, 59):
        assert lines[i]["target"] == int(targets[i])
        assert lines[i]["contributions"] == pytest.approx(why.contributions[i].tolist(), abs=1e-5)
        assert np.allclose(np.load(tmp_path / lines[i]["maps"]), why.maps[i], atol=1e-5)


def test_report_and_patches_of_texts(folder: Path, by_hand: tuple, tmp_path: Path) -> None:
    xnn, ids, texts = by_hand
    command = ["--explainer", f"{folder}/xnn", "--data", f"{folder}/texts.txt", "--target", "1", "--quiet"]
    assert cli.main(["report", *command, "--patches", "4", "--out", f"{tmp_path}/r.html"]) == 0
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    assert page.data["kind"] == "texts" and [image["cells"] for image in page.data["images"]] == texts
    own = (xnn.model(ids).argmax(1) == 1).nonzero()[:4, 0]
    found = patch_scores(xnn, ids[own], 1, lengths=[len(texts[i]) for i in own])
    text = " ".join(page.text).replace("\N{MINUS SIGN}", "-")
    assert f"rank the words of 4 texts in the order of these drops with a correlation of {found.agreement:.2f}" in text
    assert cli.main(["evaluate", *command, "--patches", "4", "--out", f"{tmp_path}/e.json"]) == 0
    (entry,) = json.loads((tmp_path / "e.json").read_text())["targets"]
    assert entry["patches"]["agreement"] == pytest.approx(found.agreement, abs=1e-6)


def test_methods_are_compared_on_texts(folder: Path, tmp_path: Path) -> None:
    """Maps are drawn at the embedding, where ids have gradients; another backend can be named."""
    command = ["compare", "--model", f"{folder}/net.py", "--layer", "act", "--data", f"{folder}/texts.txt", "--quiet"]
    command += ["--methods", "groups", "1-Heatmap", "--target", "1", "--n-features", "2", "--images", "3"]
    assert cli.main([*command, "--out", f"{tmp_path}/table.csv"]) == 0
    header, groups, one = (tmp_path / "table.csv").read_text().splitlines()[:3]
    assert ",agreement," in header and groups.startswith("groups") and one.startswith("1-Heatmap")
    assert cli.main([*command, "--heatmap", "DeepLfit", "--out", f"{tmp_path}/other.csv"]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("def encode", "def code"),
            "texts.txt' holds texts, and the model's file has no encode(); define encode(text)",
        ),
        (("ids + [0] * (6 - len(ids))", "ids"), "the texts differ in length: "),
        (("ids + [0] * (6 - len(ids))", "[ids]"), "for line 1; return those of one text, (L,)"),
        (("WORDS.index(word)", "WORDS[word]"), "encode() raised TypeError"),
    ],
)
def test_texts_that_cannot_be_read(
    change: tuple[str, str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NET.replace(*change))
    command = ["fit", "--model", f"{tmp_path}/net.py", "--layer", "act", "--data", f"{folder}/texts.txt"]
    assert cli.main([*command, "--target", "0", "--out", f"{tmp_path}/xnn"]) == 1
    assert said in capsys.readouterr().err


def test_a_report_of_ids_needs_words(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(NET.replace("def tokens", "def words"))
    command = ["--explainer", f"{folder}/xnn", "--model", f"{tmp_path}/net.py", "--data", f"{folder}/texts.txt"]
    assert cli.main(["report", *command, "--out", f"{tmp_path}/r.html"]) == 1
    assert "whose words are not known; define tokens(ids) in the model's file" in capsys.readouterr().err


def test_groups_have_the_maps_of_python(tmp_path: Path) -> None:
    """Without --heatmap, commands draw the maps that Python draws by default."""
    folder = write(tmp_path)
    command = ["--model", f"{folder}/net.py", "--data", f"{folder}/images", "--quiet", "--device", "cpu"]
    assert cli.main(["fit", *command, "--layer", "1", "--target", "0", "--out", f"{folder}/xnn"]) == 0
    for image in sorted((folder / "images").glob("*/*.png"))[4:]:  # each takes a picture
        image.unlink()
    assert cli.main(["explain", *command[2:], "--explainer", f"{folder}/xnn", "--out", f"{folder}/why"]) == 0
    opened = ModelAndInputs.of(Configuration.read(folder / "xnn" / "config.toml", {"device": "cpu"}))
    (batch,) = opened.inputs
    why = XNNAttribution.load(folder / "xnn", opened.model).explain(batch.inputs, 0)
    lines = [json.loads(line) for line in (folder / "why" / "explanations.jsonl").read_text().splitlines()]
    for i in (0, 3):
        assert np.allclose(np.load(folder / "why" / lines[i]["maps"]), why.maps[i], atol=1e-6)


def test_methods_of_a_layer_take_its_name() -> None:
    from captum_xnn.cli._model_and_inputs import heatmap_named

    assert repr(heatmap_named("LayerGradCam:layer4")) == "FromCaptum(LayerGradCam, layer='layer4')"
    assert heatmap_named("ExcitationMaps:layer4").layer == "layer4"
    with pytest.raises(ValueError, match="near names: LayerGradCam"):
        heatmap_named("LayerGradCAM:layer4")


def test_only_line_feeds_end_a_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "texts.txt").write_bytes("the\u2028great\x0cfilm\r\nawful\x85film".encode())
    opened = ModelAndInputs.of(Configuration(model=f"{tmp_path}/net.py", data=f"{tmp_path}/texts.txt"))
    (batch,) = opened.inputs
    assert batch.names == ("line 1", "line 2")
    assert batch.inputs[:, :4].tolist() == [[1, 2, 3, 0], [4, 3, 0, 0]]


def test_layers_of_a_model_of_texts_asks_for_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layers", "--model", f"{folder}/net.py"]) == 1
    assert "the model reads texts, and none are given; pass --data texts.txt" in capsys.readouterr().err
