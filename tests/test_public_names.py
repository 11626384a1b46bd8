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
        "ContributionGroups ConvSRAE ExcitationBP Explainer Explanation Faithfulness LayerExcitationBP "
        "NeuronExcitationBP OneHeatmap PaperSRAE Recipe SRAE XNNAttribution __version__ compare"
    ),
    "cli": "Configuration Opened main",
    "comparison": "DEFAULT_METHODS MethodComparison compare",
    "activations": "Activations collect collect_part",
    "datasets": (
        "ADE20KScenes CUB200 Digits Figures FunnyBirds LOOKS PARTS PartsSample Places365 collate draw_figures "
        "exact_network load_digits load_mnist reason_parts trained_network"
    ),
    "errors": (
        "CheckpointError DatasetError ExplainerFileError LayerNotFoundError LayerNotReachedError "
        "ModelMismatchError NamesFileError NotFittedError StoreError UnsupportedOperationError"
    ),
    "excitation_bp": "ExcitationBP LayerExcitationBP NeuronExcitationBP stopping_layer total_mass",
    "heatmaps": "DefaultMaps ExcitationMaps FromCaptum GradientMaps Heatmap OneHeatmap TokenGrid",
    "layers": "EveryCall",
    "metrics": (
        "Faithfulness Orthogonality biharmonic blurred classification_faithfulness clustering_purity combined "
        "constant deletion drop_orthogonality effective_number insertion keep_top keep_top_accuracy locality "
        "matched_features mean_locality object_probabilities orthogonality paired_test part_probabilities "
        "patch_agreement patch_drops pointing_accuracy random_maps randomised regression_faithfulness selectivity "
        "similarity surrogate_score telea top_down typicality"
    ),
    "models": "Autoencoder ContributionGroups ConvSRAE PaperSRAE SRAE",
    "models.baselines": "CAE Lasso NMF NN RandomDecoder RandomEncoder SAE SingleDimensions",
    "plots": (
        "contours overlay own_scale read_names shared_scale show_contributions show_explanation show_gallery "
        "write_names"
    ),
    "report": "ConceptCard Example PlacesOfMaps ReportOptions concept_cards on_objects on_parts write_report",
    "training": "Checkpoint JSONLines Recipe TensorBoard Tuning choose_n tune tune_alpha",
}


@pytest.mark.parametrize("folder", NAMES)
def test_public_names(folder):
    module = importlib.import_module(f"captum_xnn.{folder}".rstrip("."))
    assert sorted(module.__all__) == sorted(NAMES[folder].split())
    assert all(getattr(module, name) is not None for name in module.__all__)


@pytest.mark.parametrize("folder", [folder for folder in NAMES if folder not in ("", "errors")])
def test_no_name_hides_a_module(folder):
    module = importlib.import_module(f"captum_xnn.{folder}")
    assert not {found.name for found in pkgutil.iter_modules(module.__path__)} & {*module.__all__}


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
