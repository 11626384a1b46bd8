"""Every package of an extra is imported by code of the library: an extra without code is a promise without a part."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from captum_xnn import XNNAttribution
from captum_xnn.cli._configuration import tomllib
from captum_xnn.models.baselines import NMF, Lasso
from captum_xnn.models.baselines._dictionaries import craft
from captum_xnn.models.baselines._partitions import nmf_partition

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Import names of packages that have another name on an index.
IMPORTED = {"scikit-learn": "sklearn", "opencv-python-headless": "cv2", "pillow": "PIL"}
# For work on the library, and not for users of it.
TOOLS = {"docs", "test"}


def imports() -> set[str]:
    found = set()
    for path in (ROOT / "captum_xnn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name == "import_module" and isinstance(node.args[0].value, str):
                    found.add(node.args[0].value.split(".")[0])
    return found


@pytest.mark.parametrize("extra", sorted({*EXTRAS} - TOOLS))
def test_packages_of_an_extra_are_imported(extra: str) -> None:
    names = [requirement.split(">")[0].split("[")[0].strip() for requirement in EXTRAS[extra]]
    packages = [name for name in names if name != "captum-xnn"]
    assert packages and {IMPORTED.get(name, name) for name in packages} <= imports()


@pytest.mark.parametrize("form", [Lasso, NMF], ids=lambda form: form.__name__)
def test_form_without_scikit_learn_names_its_extra(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sklearn", "sklearn.decomposition", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, module, None)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    xnn = XNNAttribution(model, "1", 2, autoencoder=form)
    with pytest.raises(ImportError, match=r"needs scikit-learn, .* run `pip install captum-xnn\[baselines\]`"):
        xnn.fit(torch.randn(40, 4), progress=False)


def test_functions_without_scikit_learn_name_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    for call in (lambda: craft(torch.rand(20, 6), 2), lambda: nmf_partition(torch.rand(20, 6), 2)):
        with pytest.raises(ImportError, match=r"captum-xnn\[baselines\]"):
            call()


@pytest.mark.parametrize("page", ["README.md", "docs/index.rst"])
def test_the_first_command_installs_the_extras_that_the_page_needs(page: str) -> None:
    """A reader who has pasted it can run the other commands of the README."""
    (extras,) = re.findall(r"pip install .*\[([\w,]+)\]' && .*captum-xnn demo", (ROOT / page).read_text("utf-8"))
    needed = {"vision"} if "--torchvision" in (ROOT / "README.md").read_text("utf-8") else set()
    assert {"demo"} | needed == set(extras.split(","))
