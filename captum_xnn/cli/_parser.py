"""Arguments of the commands, and the parser that reads them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from captum_xnn import __version__

__all__ = ["Run", "make_parser"]

Run = Callable[[argparse.Namespace], str]
"""Runs a command, and returns the text to print."""

_MODELS = """A model is a Python file or module with a function load() that returns the trained model. It may also
define MEAN and STD of the channels and SIZE in pixels, or a function transform, and CLASSES. The command runs the file
as Python code: pass only files that you trust."""


def _pair(text: str) -> tuple[str, Any]:
    """Parse ``steps=500`` to a name and a value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE; write it like steps=500")
    try:
        return name, None if value == "none" else json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the value in {text!r} is not a number; write it like steps=500") from error


def make_parser(runs: Mapping[str, Run], add_study: Callable[[Any], None]) -> argparse.ArgumentParser:
    """Make the parser of all commands. Parsed arguments have the command's function as ``run``.

    Args:
        runs: The function of each command, by name.
        add_study: Adds the command ``study`` to the sub-parsers.
    """
    parser = argparse.ArgumentParser("captum-xnn", description="Explain neural networks by a few learned x-features.")
    parser.add_argument("--version", action="version", version=f"captum-xnn {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    adding: dict[str, Callable[[Any], argparse.ArgumentParser]] = {
        "demo": _add_demo,
        "layers": _add_layers,
        "fit": _add_fit,
        "compare": _add_compare,
        "explain": _add_explain,
        "report": _add_report,
        "evaluate": _add_evaluate,
    }
    for name, add in adding.items():
        add(commands).set_defaults(run=runs[name])
    add_study(commands)
    return parser


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="train a small network on real digits and explain it",
        description="Train a small network on 4,000 real digits, explain it at two layers, and write pictures, the "
        "explainers and reports to open in a browser. The demo takes one to three minutes and needs no download.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="xnn-demo", metavar="DIR", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--digits", type=int, nargs="+", choices=range(10), default=[4, 7, 3], metavar="DIGIT", help="digits to explain"
    )
    return parser


def _add_layers(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "layers",
        help="list the layers of your model, and recommend one to explain",
        description="List the layers of a model with type and output shape, and recommend layers to explain. One image "
        "of random numbers runs through the model, or the first input of --data. A torchvision model needs no weights.",
        epilog=_MODELS,
    )
    _add_inputs(parser, required=False)
    return parser


def _add_fit(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "fit",
        help="learn x-features of your model from your images",
        description="Learn x-features of a model's outputs from images, without labels, and save them with the "
        "complete configuration. Options override the configuration file. The same command resumes an interrupted fit. "
        "Several processes can share one fit: torchrun --nproc-per-node 2 -m captum_xnn fit ...",
        epilog=_MODELS,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings, such as config.toml of an earlier fit")
    parser.add_argument("--out", metavar="DIR", help="folder to save to; overwrites explainers in it")
    parser.add_argument("--store", metavar="DIR", help="store activations in DIR, to save memory and to use them again")
    parser.add_argument("--checkpoint", metavar="DIR", help="folder for checkpoints (in --out until the fit is done)")
    parser.add_argument("--tensorboard", metavar="DIR", help="folder for loss curves in TensorBoard's format")
    parser.add_argument("--layer", metavar="NAME", help="dotted name of the layer to explain")
    parser.add_argument("--n-features", type=int, metavar="K", help="number of x-features of each explainer (5)")
    parser.add_argument(
        "--form",
        choices=["groups", "drsa", "srae"],
        help="groups of contributions or DRSA's subspaces, which add up exactly, or the learned SRAE (groups)",
    )
    parser.add_argument(
        "--joint", action=argparse.BooleanOptionalAction, help="explain all targets with the same x-features"
    )
    parser.add_argument("--seed", type=int, help="seed of the fits (0)")
    parser.add_argument(
        "--recipe", type=_pair, nargs="+", metavar="NAME=VALUE", help="settings of gradient descent, such as steps=500"
    )
    _add_inputs(parser, required=False)
    return parser


def _add_compare(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="compare methods on your model and data, as a table",
        description="Fit several methods on four fifths of the data, and measure them on the rest: faithfulness, patch "
        "agreement, overlap of drops and maps, stability and cost, with controls and intervals. No labels are used.",
        epilog=_MODELS,
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="table to write: .md (Markdown), .tex (LaTeX) or .csv"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="columns of the table and panels of the figure, such as f_reg agreement",
    )
    parser.add_argument("--figure", metavar="FILE", help="figure to write as well: .png, .pdf or .svg")
    parser.add_argument("--layer", required=True, metavar="NAME", help="dotted name of the layer to explain")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME",
        help='methods, the one in use first, such as groups SRAE "random groups" 1-Heatmap NMF NN',
    )  # fmt: skip
    _add_heatmap(parser)
    parser.add_argument("--test", metavar="DATA", help="other data to measure on, in place of a fifth of --data")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="repeats with other seeds and folds (1)")
    parser.add_argument("--images", type=int, default=16, metavar="N", help="images of each class to cover (16)")
    parser.add_argument(
        "--masks",
        metavar="FILE",
        help="known parts of the images: .npy (M, H, W), with the number of the part at each pixel, 0 outside of parts",
    )
    parser.add_argument("--n-features", type=int, metavar="K", help="number of x-features of each method (5)")
    parser.add_argument("--seed", type=int, help="seed of data, fits and controls (0)")
    parser.add_argument(
        "--recipe", type=_pair, nargs="+", metavar="NAME=VALUE", help="settings of gradient descent, such as steps=500"
    )
    _add_inputs(parser, required=True)
    return parser


def _add_explain(commands: Any) -> argparse.ArgumentParser:
    parser = _on_explainers(
        commands,
        "explain",
        "explain images: pictures, maps and numbers",
        "Write a picture (pictures/) and the maps (maps/, .npy) of each image, and the numbers of all images to "
        "explanations.jsonl. The command explains the target with the highest output, of all fitted targets or of "
        "those in --target.",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--names", metavar="FILE", help="file of x-feature names that a report exported")
    _add_against(parser)
    return parser


def _add_report(commands: Any) -> argparse.ArgumentParser:
    parser = _on_explainers(
        commands,
        "report",
        "explain a folder of images on one page",
        "Write one HTML page that explains a model's outputs for images: the faithfulness of the explanation, a card "
        "for each x-feature, and all heatmaps. The page needs no other file and no network connection.",
    )
    parser.add_argument("--out", default="report.html", metavar="FILE", help="page to write (report.html)")
    parser.add_argument("--names", metavar="FILE", help="file of x-feature names that a report exported")
    _add_against(parser)
    parser.add_argument(
        "--again", metavar="DIR", help="explainers of the same targets from another fit, to see if x-features return"
    )
    parser.add_argument(
        "--cache", action=argparse.BooleanOptionalAction, default=True,
        help="keep maps beside the explainers, so that a report with other names takes seconds (the default)",
    )  # fmt: skip
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument(
        "--patches", type=int, nargs="?", const=4, default=0, metavar="N",
        help="cover patches of N images of each class (4), to check the maps: patch agreement and O1 of drops",
    )  # fmt: skip
    return parser


def _add_evaluate(commands: Any) -> argparse.ArgumentParser:
    parser = _on_explainers(
        commands,
        "evaluate",
        "measure explainers on images",
        "Print F_reg, F_cls and the effective number of x-features for each target, and write them as JSON.",
    )
    parser.add_argument("--out", metavar="FILE", help="JSON file to write (evaluation.json beside the explainers)")
    _add_against(parser)
    parser.add_argument(
        "--maps", type=int, nargs="?", const=100, default=0, metavar="N",
        help="draw maps of at most N images of each class (100), for O1 and O2",
    )  # fmt: skip
    parser.add_argument(
        "--patches", type=int, nargs="?", const=10, default=0, metavar="N",
        help="cover patches of at most N images of each class (10), for patch agreement and O1 of drops with controls",
    )  # fmt: skip
    return parser


def _on_explainers(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    """Add the parser of a command on saved explainers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"Without --model or --torchvision, config.toml beside the explainers names the model. {_MODELS}",
    )
    parser.add_argument("--explainer", required=True, metavar="DIR", help="folder of explainers, saved by fit")
    _add_heatmap(parser)
    _add_inputs(parser, required=True)
    return parser


def _add_heatmap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--heatmap",
        metavar="NAME",
        help="backend that draws maps, in place of the form's own: ExcitationMaps, or a class in captum.attr, also at "
        "a layer, as LayerGradCam:layer4",
    )


def _add_against(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        metavar="T",
        help="output to subtract, an index or a name: explains why the target, not this output",
    )


def _add_inputs(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the options that name a model, targets and data."""
    parser.add_argument(
        "--target",
        dest="targets",
        nargs="+",
        metavar="T",
        help="outputs to explain: 46 112 7, ranges such as 10-19, names of classes, or all",
    )
    parser.add_argument("--model", metavar="FILE.py[:FUNCTION]", help="model, or package.module:function; see below")
    parser.add_argument("--torchvision", metavar="NAME", help="torchvision model instead of --model, with --weights")
    parser.add_argument("--weights", metavar="FILE", help="state dict of the torchvision model (torch or safetensors)")
    parser.add_argument(
        "--classes", metavar="N|FILE|DIR",
        help="classes of a fine-tuned torchvision model: their number, a file with a name on each line, or a folder "
        "with a sub-folder for each; a file or folder also names the outputs of --model",
    )  # fmt: skip
    parser.add_argument(
        "--probabilities",
        choices=["softmax", "log_softmax", "sigmoid"],
        help="function at the end of a model that gives probabilities: their logits are explained",
    )
    parser.add_argument("--device", help="auto (the GPU if there is one, else the CPU), cpu, cuda:1, ...")
    parser.add_argument(
        "--data",
        required=required,
        help="folder of images, flat or with sub-folders; one image; .txt with a text on each line; or .npy, .npz, .pt",
    )
    parser.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS", help="height and width of images, or one number"
    )
    parser.add_argument("--mean", type=float, nargs="+", help="mean of each channel, for values in [0, 1]")
    parser.add_argument("--std", type=float, nargs="+", help="standard deviation of each channel")
    parser.add_argument("--batch-size", type=int, metavar="N", help="inputs in a batch (64)")
    parser.add_argument("--workers", type=int, metavar="N", help="extra processes that read images (0)")
    parser.add_argument("--skip-damaged", action=argparse.BooleanOptionalAction, help="skip damaged images")
    parser.add_argument("--quiet", action="store_true", help="hide progress bars")
