"""Every package of an extra is imported by code of the library: an extra without code is a promise without a part."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from captum_xnn.cli._configuration import tomllib

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
