"""The modules that a value crosses in `fit`, `attribute` and `explain`: few enough to read, and named in the docs."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import captum_xnn
from captum_xnn import XNNAttribution

PACKAGE = Path(captum_xnn.__file__).parent
# The ground floor: tools that answer a question about a layer, a file or a process, and hand the value on to nobody.
GROUND = ("layers", "errors", "_files", "_distributed", "metrics")

FIT = {
    "attribution",
    "activations/_collecting",
    "activations/_batches",
    "activations/_activations",
    "training/_layer_fit",
    "training/_contributions",
    "training/_drops",
    "models/_contribution_groups",
    "models/_grouping",
    "explainer",
}
FIT_HELPERS = {"activations/_unpacking", "activations/_memmap"}
"""Each answers one question: the inputs of a batch, and the parts of activations that may lie on disk."""
ATTRIBUTE = {
    "attribution",
    "explainer",
    "heatmaps/_one_pass",
    "heatmaps/_numbers",
    "models/_contribution_groups",
    "heatmaps/_feature_maps",
    "heatmaps/_network",
    "heatmaps/_group_maps",
    "heatmaps/_layouts",
}
EXPLAIN = ATTRIBUTE | {"explanation"}


def crossed(call):
    """Return the modules above the ground whose code runs during a call; imports do not count."""
    found = set()

    def note(frame, event, _arg):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and frame.f_code.co_name != "<module>":
            found.add(str(path.relative_to(PACKAGE).with_suffix("")))

    gc.collect()  # generators of earlier calls end now and not while we look
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {name for name in found if name.split("/")[0] not in GROUND}


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 3)
    ).eval()
    images = torch.randn(60, 3, 16, 16)
    loader = DataLoader(TensorDataset(images, torch.zeros(60)), batch_size=20)
    fitted = XNNAttribution(model, "4", n_features=3).fit(loader, target=0, progress=False)
    return model, loader, images[:4], fitted


def test_fit_crosses_ten_modules(cnn):
    model, loader, _, _ = cnn
    xnn = XNNAttribution(model, "4", n_features=3)
    assert crossed(lambda: xnn.fit(loader, target=0, progress=False)) | {"explainer"} == FIT | FIT_HELPERS
    assert len(FIT) <= 10


def test_attribute_and_explain_cross_ten_modules(cnn):
    *_, images, xnn = cnn
    assert crossed(lambda: xnn.attribute(images, target=0)) == ATTRIBUTE
    # An Explanation is made by code that dataclasses wrote.
    assert crossed(lambda: xnn.explain(images, target=0)) | {"explanation"} == EXPLAIN
    assert len(EXPLAIN) <= 10


def test_the_architecture_page_names_them():
    page = (PACKAGE.parent / "docs" / "architecture.rst").read_text(encoding="utf-8")
    for title, names in (("Follow ``fit``", FIT | FIT_HELPERS), ("Follow ``attribute``", EXPLAIN)):
        way = page.split(f"{title}\n---")[1].split("\n---")[0]
        missing = [name for name in names if f"captum_xnn/{name}.py" not in way and f"`captum_xnn.{name}`" not in way]
        assert not missing, title


def test_every_equation_and_rule_is_where_the_architecture_page_says():
    page = (PACKAGE.parent / "docs" / "architecture.rst").read_text(encoding="utf-8")
    module, found = "", 0
    tables = (page.split(f"{title}\n---")[1].split("\n===")[2] for title in ("Equations", "Rules that have one place"))
    for line in "\n".join(tables).splitlines():
        names = re.findall(r"``([\w./]+)``", line)
        if names and names[0].endswith(".py"):
            module = (PACKAGE / names.pop(0)).read_text(encoding="utf-8")
        for name in names:
            *owner, function = name.split(".")
            assert all(f"class {part}" in module for part in owner), name
            assert f"def {function}(" in module, name
            found += 1
    assert found > 20


def test_the_architecture_page_lists_every_folder_and_names_files_that_exist():
    page = (PACKAGE.parent / "docs" / "architecture.rst").read_text(encoding="utf-8")
    places = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {name for name in places if f"``{name}/``" not in page} == set()
    named = re.findall(r"``(?:captum_xnn/)?([\w/]+\.py)``", page)
    missing = [name for name in named if not (PACKAGE / name).exists() and not (PACKAGE.parent / name).exists()]
    assert len(named) > 30 and not missing
