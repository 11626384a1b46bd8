"""Imports point downward only, and importing the package brings nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import captum_xnn

HEAVY = ("torchvision", "sklearn", "skimage", "jinja2", "flask", "mlxtend", "pandas", "statsmodels", "waitress")
PACKAGE = Path(captum_xnn.__file__).parent

# Five layers from the bottom up; folders and files import from their own row and from lower ones. "" is the package
# itself, whose names are the public ones.
ROWS = (
    ("errors", "_files", "_distributed", "layers", "metrics", "datasets"),
    ("activations", "models", "excitation_bp", "plots"),
    ("training", "heatmaps"),
    # `report` stands beside `attribution`, as XNNAttribution.report calls it. It takes an XNNAttribution as an argument
    # and needs its name only in annotations: the walk leaves out what is imported for type checkers.
    ("explanation", "explainer", "_serialization", "attribution", "patch_scores", "report", "comparison"),
    ("cli", "study", "", "__main__"),
)
HEIGHT = {name: height for height, row in enumerate(ROWS) for name in row}
# Modules in the longest line of imports, from the explainer, or from the command line, to the ground.
LONGEST = {"attribution": 7, "__main__": 10}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        yield name, ast.parse(path.read_text())


def running(tree):
    """All nodes but those below ``if TYPE_CHECKING``."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from running(child)


def imported(tree):
    """All modules of the package that a module imports, also inside functions, but not for type checkers only."""
    for node in running(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "captum_xnn":
                yield name


def graph():
    """The modules that each module imports; a package stands for its __init__."""
    known = dict(modules())
    found = {}
    for name, tree in known.items():
        found[name] = set()
        for other in imported(tree):
            parts = other.split(".")[1:]
            while parts and ".".join(parts) not in known:
                parts.pop()
            found[name].add(".".join(parts))
    return found


def floor(name):
    return HEIGHT[name.split(".")[0]]


def test_every_module_has_its_row():
    missing = [name for name, _ in modules() if name.split(".")[0] not in HEIGHT]
    assert not missing, f"add {missing} to ROWS"


def test_imports_point_downward():
    upward = [
        f"{name or 'captum_xnn'} imports {other or 'captum_xnn'}"
        for name, others in graph().items()
        for other in others
        if floor(other) > floor(name)
    ]
    assert not upward


def test_imports_go_in_no_circle_and_are_not_deep():
    deep = {}
    known = graph()

    def depth(name, above=()):
        assert name not in above, f"a circle: {[*above[above.index(name) :], name]}"
        if name not in deep:
            deep[name] = 1 + max((depth(other, (*above, name)) for other in known[name]), default=0)
        return deep[name]

    assert {name: depth(name) for name in LONGEST} == LONGEST
    assert max(map(depth, known)) == LONGEST["__main__"]


def test_the_walk_sees_imports():
    code = "def f():\n from captum_xnn.models._losses import faithfulness\n from captum_xnn import attribution"
    assert set(imported(ast.parse(code))) == {"captum_xnn.models._losses.faithfulness", "captum_xnn.attribution"}
    assert set(imported(ast.parse("from captum_xnn import SRAE"))) == {"captum_xnn.SRAE"}
    assert not set(imported(ast.parse("if TYPE_CHECKING:\n from captum_xnn import attribution")))
    assert graph()["attribution"] >= {"report._page", "explanation"}


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import captum_xnn; captum_xnn.__version__", ("torch", "captum", "matplotlib", "numpy")),
        ("from captum_xnn import __main__; __main__._parser()", ("torch", "captum", "matplotlib", "numpy")),
        ("import captum_xnn; captum_xnn.study.StudyConfiguration", ("torch", "captum", "matplotlib", "numpy", *HEAVY)),
        ("import captum_xnn; captum_xnn.XNNAttribution, captum_xnn.metrics", HEAVY),
    ],
)
def test_importing_is_light(code, without):
    code = f"import sys; {code}; print([m for m in {without} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there_and_others_are_not():
    for name in captum_xnn.__all__:
        assert getattr(captum_xnn, name) is not None and name in dir(captum_xnn)
    with pytest.raises(AttributeError, match="'captum_xnn' has no attribute 'XNN'"):
        captum_xnn.XNN  # noqa: B018
