"""The public names, frozen: adding or removing one is a decision, and a line in the changelog."""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import captum_xnn

NAMES = {
    "": (
        "ContributionGroups ConvSRAE ExcitationBP Explainer Explanation LayerExcitationBP NeuronExcitationBP "
        "OneHeatmap PaperSRAE Recipe SRAE XNNAttribution __version__ compare"
    ),
    "attribution": "XNNAttribution",
    "explanation": "Explanation",
    "explainer": "Explainer Explainers",
    "patch_scores": "patch_scores",
    "cli": "Configuration ModelAndInputs",
    "comparison": "compare",
    "activations": "Activations collect collect_part",
    "datasets": "ADE20KScenes CUB200 Figures FunnyBirds Places365 load_digits load_mnist",
    "errors": (
        "CheckpointError DatasetError ExplainerFileError LayerNotFoundError LayerNotReachedError "
        "ModelMismatchError NamesFileError NotFittedError StoreError UnsupportedOperationError"
    ),
    "excitation_bp": "ExcitationBP LayerExcitationBP NeuronExcitationBP",
    "heatmaps": "ContributionMaps ExcitationMaps FromCaptum GradientMaps Heatmap OneHeatmap",
    "layers": "EveryCall",
    "metrics": (
        "classification_faithfulness deletion drop_orthogonality effective_number insertion keep_top_accuracy locality "
        "matched_features object_probabilities orthogonality paired_test part_probabilities patch_agreement "
        "patch_drops pointing_accuracy randomised regression_faithfulness selectivity similarity typicality"
    ),
    "models": "Autoencoder ContributionGroups ConvSRAE PaperSRAE SRAE",
    "models.baselines": "CAE DRSA Lasso NMF NN RandomDecoder RandomEncoder SAE SingleDimensions",
    "plots": "contours own_scale show_contributions show_explanation show_gallery show_tokens write_names",
    "report": "ReportOptions",
    "study": "Arm DatasetSettings Exclusions Material StudyConfiguration prepare",
    "training": "Checkpoint JSONLines Recipe TensorBoard choose_n tune",
}
FILES = ("attribution", "errors", "explainer", "explanation", "patch_scores")


@pytest.mark.parametrize("folder", NAMES)
def test_public_names(folder):
    module = importlib.import_module(f"captum_xnn.{folder}".rstrip("."))
    assert sorted(module.__all__) == sorted(NAMES[folder].split())
    assert all(getattr(module, name) is not None for name in module.__all__)


@pytest.mark.parametrize("folder", [folder for folder in NAMES if folder and folder not in FILES])
def test_no_name_hides_a_module(folder):
    module = importlib.import_module(f"captum_xnn.{folder}")
    assert not {found.name for found in pkgutil.iter_modules(module.__path__)} & {*module.__all__}


def test_every_module_is_an_attribute_of_the_package():
    """Asks the package's function: the attributes themselves are set by earlier imports in this process."""
    modules = [name for name in NAMES if name and "." not in name]
    assert sorted(captum_xnn._MODULES) == sorted(modules)
    for module in modules:
        assert captum_xnn.__getattr__(module) is importlib.import_module(f"captum_xnn.{module}")


def test_every_module_without_an_underscore_is_frozen():
    found = {
        name for _, name, _ in pkgutil.walk_packages(captum_xnn.__path__, "captum_xnn.") if not re.search(r"\._", name)
    }
    assert found == {f"captum_xnn.{name}" for name in NAMES if name}


def test_the_changelog_names_what_can_be_imported():
    text = (Path(__file__).parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    named = {tuple(found) for found in re.findall(r"`(?:captum_xnn\.)?([a-z_]+)\.(\w+)", text) if found[0] in NAMES}
    assert ("metrics", "locality") in named
    known = {(folder, name) for folder, names in NAMES.items() for name in [*names.split(), "baselines"]}
    assert not named - known


def test_messages_name_no_private_module():
    """Docstrings may; an error or a warning sends people to what they can import."""
    found = []
    for path in sorted(Path(captum_xnn.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        told = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        docs = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        found += [
            f"{path.name}:{node.lineno}"
            for node in told
            if id(node) not in docs and re.search(r"captum_xnn\.[\w.]*\b_[a-z]\w*\.?[A-Za-z]", node.value)
        ]
    assert not found
