"""Imports point downward only, and importing the package brings nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import captum_xnn

PACKAGE = Path(captum_xnn.__file__).parent

# From the bottom up; a module imports from lower rows only. "" is the package itself, whose names are the public ones.
ROWS = (
    (
        "_compat",
        "covering",
        "errors",
        "grouping",
        "targets",
        "logits",
        "datasets",
        "metrics.faithfulness",
        "rows",
        "ranks",
    ),
    (
        "files",
        "directions",
        "metrics.concepts",
        "metrics.controls",
        "metrics.pointing",
        "metrics.sparsity",
        "metrics.stability",
    ),
    ("names", "metrics.orthogonality", "metrics.paired", "metrics.purity"),
    ("sentence", "metrics.locality", "metrics.patches"),
    ("panels", "metrics.selectivity", "datasets.parts", "datasets.digits", "datasets.synthetic"),
    ("waterfall", "datasets.cub", "datasets.funnybirds", "datasets.places", "datasets.synthetic_models"),
    ("visualize", "thumbnails"),
    ("losses", "anchors", "host", "explanation", "excitation_bp.shares", "batches", "checkpoints"),
    ("problem", "tail", "layout", "unpacking"),
    ("metrics.keep_top", "metrics.randomisation", "probe"),
    ("metrics", "store"),
    ("autoencoder", "activations", "excitation_bp.signals", "path_integral"),
    ("descent", "logs", "contribution_groups"),
    ("training", "network", "contribution_fit", "excitation_bp.rules", "excitation_bp.graph"),
    ("srae", "canonical", "contribution_network", "excitation_bp.propagation"),
    ("excitation_bp.attribution", "excitation_bp.stopping", "baselines.least_squares", "baselines.partitions"),
    ("excitation_bp", "baselines.learned", "baselines.nmf", "baselines.selection"),
    ("baselines",),
    ("explainer", "heatmaps", "tuning"),
    ("drawing",),
    ("one_heatmap",),
    ("attribution", "inputs"),
    ("cards",),
    ("report",),
    ("configuration", "model_files"),
    ("opened",),
    ("evaluation", "commands", "study", "study.configuration", "study.prepared"),
    ("study.preparation", "study.protocol"),
    ("study.store",),
    ("study.server", "study.export", "study.analysis"),
    ("study.static", "study.simulation", "study.figures"),
    ("study.findings",),
    ("",),
    ("demo",),
    ("study.demo",),
    ("study.cli",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {module: height for height, row in enumerate(ROWS) for module in row}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        yield name, ast.parse(path.read_text())


def imported(tree):
    """All modules of the package that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "captum_xnn":
                while parts[1:] and ".".join(parts[1:]) not in HEIGHT:
                    parts.pop()
                yield ".".join(parts[1:])


def test_every_module_has_its_row():
    missing = [name for name, _ in modules() if name not in HEIGHT]
    assert not missing, f"add {missing} to ROWS"


def test_imports_point_downward():
    upward = [
        f"{name or 'captum_xnn'} imports {other or 'captum_xnn'}"
        for name, tree in modules()
        for other in imported(tree)
        if HEIGHT[other] >= HEIGHT[name]
    ]
    assert not upward


def test_the_walk_sees_imports():
    code = "def f():\n from captum_xnn.losses import faithfulness\n from captum_xnn import host"
    found = set(imported(ast.parse(code)))
    assert found == {"losses", "host"}
    assert set(imported(ast.parse("from captum_xnn import SRAE"))) == {""}
    assert set(imported(ast.parse("import captum_xnn"))) == {""}


def test_importing_is_light():
    heavy = ("torchvision", "sklearn", "skimage", "jinja2", "flask", "mlxtend", "pandas", "statsmodels", "waitress")
    code = f"import sys, captum_xnn; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
