"""The page on the command line: its commands run as they stand there, in order, on its model and its configuration."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from command_line import write

from captum_xnn import XNNAttribution
from captum_xnn import __main__ as cli
from captum_xnn.cli._inputs import Inputs
from captum_xnn.cli._model_files import load_model

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "command_line.rst").read_text()


def blocks(language):
    found = re.findall(rf"\.\. code-block:: {language}\n\n((?:   .*\n|\n)+)", PAGE)
    return [re.sub(r"(?m)^   ", "", block) for block in found]


COMMANDS = [shlex.split(line) for block in blocks("sh") for line in block.splitlines() if line]


def test_the_page_has_what_the_test_takes_from_it():
    assert len(blocks("python")) == 2 and len(blocks("toml")) == 1
    assert [command[1] for command in COMMANDS] == ["fit", "fit", "fit", "fit", "explain", "evaluate"]


def test_commands_are_understood():
    for command in COMMANDS:
        assert command[0] == "captum-xnn" and cli._parser().parse_args(command[1:])


def prepared(folder):
    """Makes the page's model, whose classes halve the images, and its images, in a folder."""
    write(folder, count=40)
    (folder / "images" / "even").rename(folder / "train")
    (folder / "images" / "odd").rename(folder / "images" / "test")
    (folder / "train").rename(folder / "images" / "train")
    (folder / "net.py").write_text(blocks("python")[0])
    (folder / "run.toml").write_text(blocks("toml")[0])
    made = load_model(f"{folder}/net.py:network")
    (batch,) = Inputs(folder / "images" / "train", made.preparation)
    with torch.no_grad():
        first, second = made.model(batch.inputs).T
        made.model[-1].bias[0] -= (first - second).median() + 1e-4
    torch.save(made.model.state_dict(), folder / "weights.pt")


def bits(folder):
    (path,) = Path(folder).glob("weights-*.safetensors")
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:maps are zero")
def test_the_page_is_true(tmp_path, monkeypatch):
    prepared(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        if "--torchvision" not in command:
            assert cli.main(command[1:]) == 0, command
    assert bits("again") == bits("explainers")
    xnn = XNNAttribution.load("explainers", load_model("net.py").model)
    assert (xnn.recipe.steps, xnn.recipe.beta, xnn.seed) == (600, 0.5, 1)
    assert len(list(Path("why", "pictures").rglob("*.png"))) == len(list(Path("why", "maps").rglob("*.npy"))) == 20
    assert Path("explainers", "evaluation.json").is_file()
    exec(blocks("python")[1], {})
