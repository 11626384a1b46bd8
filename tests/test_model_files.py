"""Models from Python files, modules and torchvision: loaded as the user wrote it, and every mistake is named."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from captum_xnn.cli._inputs import Preparation
from captum_xnn.cli._model_files import IMAGENET_MEAN, IMAGENET_STD, load_model, load_torchvision, read_classes

NET = """
from dataclasses import dataclass
import torch
from torch import nn
from beside import WIDTH

MEAN, STD, SIZE, CLASSES = torch.tensor([0.5, 0.4, 0.3]), [0.5, 0.25, 0.2], 12, ["finch", "crow", 3]


@dataclass
class Settings:
    width: "int" = WIDTH


def load():
    import later
    return nn.Sequential(nn.Dropout(), nn.Linear(Settings().width, later.OUTPUTS)).train()


def other():
    return nn.Linear(1, 1)


ready = nn.Linear(2, 2)
number = 3
wrong = lambda: {"model": 1}


def fails():
    raise KeyError("weights\\nof the net")
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "beside.py").write_text("WIDTH = 7")
    (tmp_path / "later.py").write_text("OUTPUTS = 4")
    yield tmp_path
    for name in ("beside", "later", "net", "captum_xnn_model_net"):
        sys.modules.pop(name, None)


def test_a_file_with_what_lies_beside_it(folder):
    path = list(sys.path)
    made = load_model(f"{folder}/net.py")
    assert (made.model[1].in_features, made.model[1].out_features) == (7, 4)
    assert not any(module.training for module in made.model.modules())
    assert made.preparation.size == (12, 12)
    assert made.preparation.mean == pytest.approx((0.5, 0.4, 0.3)) and made.preparation.std == (0.5, 0.25, 0.2)
    assert made.classes == ("finch", "crow", "3")
    assert sys.path == path


def test_another_function_and_a_finished_model(folder):
    assert load_model(f"{folder}/net.py:other").model.in_features == 1
    assert load_model(f"{folder}/net.py:ready").model.in_features == 2


def test_a_module_in_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert load_model("net:load").model[1].in_features == 7
    assert load_model("net.py").model[1].in_features == 7
    assert load_model("torch.nn:Identity").preparation == Preparation()


def test_a_file_may_be_called_like_a_package(folder):
    (folder / "torch.py").write_text("import torch.nn\ndef load():\n    return torch.nn.Identity()")
    assert isinstance(load_model(f"{folder}/torch.py").model, nn.Identity)
    assert sys.modules["torch"] is torch


def test_a_transform(folder):
    (folder / "net.py").write_text("import torch\nload = torch.nn.Identity\ndef transform(image):\n    return 5")
    assert load_model(f"{folder}/net.py").preparation.transform(None) == 5


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("resnet18", "the model 'resnet18' is not FILE.py, FILE.py:function or package.module:function"),
        ("{}/none.py", r"cannot run .*none.py': FileNotFoundError \(no file .*none.py"),
        ("no_such_module:load", r"cannot run 'no_such_module': ModuleNotFoundError"),
        ("{}/net.py:lod", r"lod in .*net.py' is missing; define lod\(\)"),
        ("{}/net.py:number", r"number in .*net.py' is int, not a function"),
        ("{}/net.py:wrong", r"wrong\(\) of .*net.py' returned dict instead of a torch.nn.Module"),
        ("{}/net.py:fails", r"cannot run fails\(\) of .*: KeyError \(.*of the net.*, line 30 of .*net.py\)"),
    ],
)
def test_mistakes_in_naming_a_model(source, said, folder):
    path = list(sys.path)
    with pytest.raises(ValueError, match=said):
        load_model(source.format(folder))
    assert sys.path == path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("SIZE = 2.5", "SIZE is 2.5; give one number of pixels"),
        ("MEAN = 1, 2", r"MEAN is \(1, 2\); give one number such as 0.5 for each of 1 or 3 channels"),
        ("STD = 0.5, 0.0, 1", r"std is \(0.5, 0.0, 1.0\); give numbers above 0"),
        ("MEAN = [0.5]", "have different numbers of channels"),
        ("transform = 3", "transform in .* is 3, not a function"),
        ("import nothing_like_it", "line 44 of .*net.py"),
        ("def f(:", r"SyntaxError \(.*line 32\)\)"),
    ],
)
def test_mistakes_in_a_file(line, said, folder):
    (folder / "net.py").write_text(f"{NET}\n{line}" if "import" not in line else "\n" * 43 + line)
    with pytest.raises(ValueError, match=rf"(?s){said}") as error:
        load_model(f"{folder}/net.py")
    assert "net.py" in str(error.value)


def test_torchvision_with_weights_from_a_file(torchvision, tmp_path):
    torch.manual_seed(3)
    model = torchvision.models.squeezenet1_1(num_classes=1000).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 224, 224)
    for name in ("w.pt", "w.safetensors"):
        made = load_torchvision("squeezenet1_1", tmp_path / name)
        assert torch.equal(made.model(x), model(x))
        assert made.preparation == Preparation((224, 224), IMAGENET_MEAN, IMAGENET_STD)
    assert len(made.classes) == 1000 and made.classes[11] == "goldfinch"  # 11 is the goldfinch in ImageNet
    with pytest.raises(ValueError, match=r"w.pt' does not hold weights of squeezenet1_0 \(Error\(s\) in"):
        load_torchvision("squeezenet1_0", tmp_path / "w.pt")


def test_mistakes_with_torchvision(torchvision, tmp_path):
    with pytest.raises(ValueError, match=r"torchvision has no image classifier 'squeezenet'"):
        load_torchvision("squeezenet", tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"cannot read the weights .*w.pt' \(No such file"):
        load_torchvision("squeezenet1_1", tmp_path / "w.pt")
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_text("text")
        with pytest.raises(ValueError, match=rf"{name}' does not hold weights of squeezenet1_1"):
            load_torchvision("squeezenet1_1", tmp_path / name)


def test_torchvision_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"'squeezenet1_1' needs torchvision, .*pip install captum-xnn\[vision\]"):
        load_torchvision("squeezenet1_1", "w.pt")


def test_nothing_is_loaded_from_torchvision_for_other_models(folder):
    code = f"import sys; from captum_xnn.cli._model_files import *; load_model('{folder}/net.py'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torchvision" not in done.stdout.split()


def test_fine_tuned_head_has_as_many_outputs_as_classes(torchvision, tmp_path):
    model = torchvision.models.get_model("squeezenet1_1", num_classes=12)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    made = load_torchvision("squeezenet1_1", tmp_path / "w.pt", 12)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(made.model(images), model.eval()(images)) and made.model(images).shape == (2, 12)
    assert made.classes is None
    with pytest.raises(ValueError, match="--classes N if it has N classes"):
        load_torchvision("squeezenet1_1", tmp_path / "w.pt")


def test_classes_from_a_file_and_from_folders(tmp_path):
    (tmp_path / "names.txt").write_text("\ufefffinch\n\n  crow \nérable\n", encoding="utf-8")
    assert read_classes(tmp_path / "names.txt") == ("finch", "crow", "érable")
    for name in ("b", "a", ".hidden"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / "file.txt").write_text("x")
    assert read_classes(tmp_path / "data") == ("a", "b")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no names of classes"):
        read_classes(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"cannot read the classes .*none.*No such file"):
        read_classes(tmp_path / "none")
