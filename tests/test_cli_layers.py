"""``captum-xnn layers``: shapes as hooks read them, and recommended layers that hold what the output needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from captum_xnn import XNNAttribution
from captum_xnn.__main__ import main
from captum_xnn.cli._layers import Recommended, list_layers, recommend, table

# The layers that docs/choose_layer.rst names, and those that it names for vectors.
KNOWN = {
    "resnet18": ("layer4", "avgpool"),
    "vgg11": ("avgpool", "classifier.5"),
    "densenet121": ("features", None),
    "efficientnet_b0": ("features", "classifier.0"),
    "convnext_tiny": ("features", "classifier.1"),
    "mobilenet_v3_small": ("features", "classifier.2"),
    "vit_b_16": ("encoder.layers.encoder_layer_10", None),
    "swin_t": ("permute", "flatten"),
}


class Bert(nn.Module):
    """Reads the first token of the last of three blocks, as classifiers of texts do."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(20, 8)
        self.layer = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
        self.pooler, self.tanh, self.head = nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)

    def forward(self, ids):
        h = self.embeddings(ids)
        for block in self.layer:
            h = block(h)
        return self.head(self.tanh(self.pooler(h[:, 0])))


class Recurrent(nn.Module):
    """Reads the last state of an LSTM."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
        self.hidden, self.relu, self.head = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.relu(self.hidden(self.lstm(self.embedding(ids))[0][:, -1])))


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_recommended_layers_of_torchvision(torchvision, name):
    from captum_xnn.cli._layers import _torchvision

    model, image = _torchvision(name, None), torch.rand(1, 3, 224, 224)
    assert recommend(model, image) == Recommended(*KNOWN[name])
    # All that the output needs passes through the layer: with its output exchanged, another image gives the same.
    layer = dict(model.named_modules())[KNOWN[name][0]]
    kept = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output.clone()))
    with torch.no_grad():
        y = model(image)
        handle.remove()
        layer.register_forward_hook(lambda _module, _inputs, output: kept[0])
        assert torch.equal(model(torch.rand(1, 3, 224, 224)), y)


def test_texts():
    ids = torch.arange(12)[None]
    model = Bert()
    assert recommend(model, ids) == Recommended("layer.1", "tanh")
    assert recommend(model.requires_grad_(False), ids) == Recommended("layer.1", "tanh")
    rows = {row.name: row for row in list_layers(Recurrent(), ids)}
    assert rows["lstm"].several and rows["lstm"].shape == (1, 12, 8)
    assert recommend(Recurrent(), ids) == Recommended(None, "relu")


def test_a_layer_that_something_passes_by_is_not_recommended():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, x):
            h = self.first(x).relu()
            return self.head((h + self.second(h)).mean((2, 3)))

    assert recommend(Around(), torch.rand(1, 1, 8, 8)) == Recommended("first", None)


def test_a_layer_that_runs_twice_is_not_recommended():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.relu(self.conv(self.relu(self.conv(x)))).mean((2, 3)))

    model = Twice()
    assert recommend(model, torch.rand(1, 4, 8, 8)) == Recommended(None, None)
    assert "No layer is recommended" in table(list_layers(model, torch.rand(1, 4, 8, 8)), Recommended(None, None))


def test_shapes_are_those_of_hooks():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    model.train()
    image, shapes = torch.rand(1, 3, 8, 8), {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _m, _i, output, name=name: shapes.update({name: tuple(output.shape)}))
    model(image)
    before = {name: len(module._forward_hooks) for name, module in model.named_children()}
    assert {row.name: row.shape for row in list_layers(model, image)} == shapes
    assert recommend(model, image) == Recommended("2", "3")
    assert before == {name: len(module._forward_hooks) for name, module in model.named_children()}
    assert model.training and image.grad is None and not image.requires_grad


def test_the_command_names_a_layer_that_fit_takes(tmp_path: Path, capsys):
    code = """
from torch import nn

SIZE, MEAN, STD = 12, 0.5, 0.25

def load():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""
    (tmp_path / "net.py").write_text(code)
    assert main(["layers", "--model", f"{tmp_path}/net.py"]) == 0
    said = capsys.readouterr().out
    assert "*  1      ReLU               4 x 10 x 10" in said
    (name,) = [line.split()[2].rstrip(":") for line in said.splitlines() if "places that matter" in line]
    scope: dict = {}
    exec(code, scope)
    XNNAttribution(scope["load"](), name, 2).fit(torch.rand(40, 1, 12, 12), target=0, progress=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--torchvision NAME"),
        (["--model", "{}/net.py"], "pass --size 224"),
        (["--model", "{}/net.py", "--size", "8"], "the model fails on an input (1, 3, 8, 8)"),
    ],
)
def test_errors_say_what_to_do(tmp_path, capsys, arguments, said):
    (tmp_path / "net.py").write_text("from torch import nn\nload = lambda: nn.Linear(5, 2)")
    assert main(["layers", *(a.format(tmp_path) for a in arguments)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("classes", ["12", "names"])
def test_a_fine_tuned_head_has_its_own_classes(torchvision, classes, tmp_path, capsys):
    if classes == "names":
        (tmp_path / "names.txt").write_text("\n".join("abcdefghijkl"))
        classes = f"{tmp_path}/names.txt"
    assert main(["layers", "--torchvision", "resnet18", "--classes", classes, "--size", "64"]) == 0
    assert re.search(r"fc +Linear +12\n", capsys.readouterr().out)


def test_a_table_has_no_layer_with_places():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    told = table(list_layers(model, torch.rand(3, 4)), recommend(model, torch.rand(3, 4)))
    assert told.endswith("* --layer 1: the last hidden layer")
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 2))
    told = table(list_layers(model.eval(), torch.rand(3, 1, 8, 8)), recommend(model, torch.rand(3, 1, 8, 8)))
    assert "* --layer 4: the last hidden layer; maps are drawn at an earlier layer with places" in told
