"""The how-to pages: their examples run as they stand there, and their commands are understood."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest

from captum_xnn import __main__ as cli

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = (
    "attention_mask",
    "choose_k",
    "choose_layer",
    "compare_methods",
    "read_metrics",
    "models_that_need_care",
    "names_and_sharing",
    "report",
    "reproducible",
    "scale",
    "tune",
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:maps are zero")
def test_examples_of_the_page_give_what_it_says(page):
    found = doctest.testfile(str(DOCS / f"{page}.rst"), module_relative=False, optionflags=FLAGS)
    assert found.attempted > 5 and found.failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_code_is_run(page):
    text = (DOCS / f"{page}.rst").read_text(encoding="utf-8")
    assert "code-block:: python" not in text and not re.search(r"(?m)^(?!\.\. ).*::$", text)
    for block in re.findall(r"\.\. code-block:: sh\n\n((?:   .*\n|\n)+)", text):
        for line in filter(None, map(str.strip, block.splitlines())):
            command = shlex.split(line.replace("torchrun --nproc-per-node 4 -m captum_xnn", "captum-xnn"))
            assert command[0] == "captum-xnn" and cli._parser().parse_args(command[1:]).run


def test_layers_by_architecture_are_those_that_the_command_recommends():
    from test_cli_layers import KNOWN

    rows = re.findall(r"\* - (.+)\n     - (.+)\n     -(.*)\n", (DOCS / "choose_layer.rst").read_text(encoding="utf-8"))
    named = {kind.strip(): (places.strip("` "), vector.strip("` ") or None) for kind, places, vector in rows}
    families = {
        "resnet18": "ResNet, ResNeXt", "vgg11": "VGG, AlexNet", "densenet121": "DenseNet",
        "efficientnet_b0": "EfficientNet", "convnext_tiny": "ConvNeXt", "mobilenet_v3_small": "MobileNet v3",
        "vit_b_16": "ViT (B/16)", "swin_t": "Swin",
    }  # fmt: skip
    assert {name: named[family] for name, family in families.items()} == KNOWN
