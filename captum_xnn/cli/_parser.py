"""Parser and commands: ``demo`` on digits; ``fit``, ``compare``, ``explain``, ``evaluate`` and ``report`` on files."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_xnn import __version__
from captum_xnn.errors import ExplainerFileError
from captum_xnn.study._cli import add_parsers as add_study

if TYPE_CHECKING:
    from torch import Tensor

    from captum_xnn.attribution import XNNAttribution
    from captum_xnn.cli._evaluation import Evaluation
    from captum_xnn.cli._inputs import Inputs
    from captum_xnn.cli._model_and_inputs import ModelAndInputs
    from captum_xnn.layers._targets import Target

__all__ = ["main"]

_MODELS = """A model is a Python file or module with a function load() that returns the trained model. It may also
define MEAN and STD of the channels and SIZE in pixels, or a function transform, and CLASSES. The command runs the file
as Python code: pass only files that you trust."""


_WIDEST = 40
"""Characters of the outputs of a joint explainer, or of a class's name, in a table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 1 after printing an error on stderr, or 130 after an interruption.

    Args:
        argv: Arguments; if None, the arguments of the process.

    Raises:
        SystemExit: With code 2 for wrong arguments, with code 0 for ``--help`` and ``--version``.
    """
    arguments = _parser().parse_args(argv)
    try:
        with _messages_on_stderr():
            said = arguments.run(arguments)
        from captum_xnn._distributed import speaks  # with torch, which --help and --version do without

        if speaks():
            print(said)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if arguments.traceback:
            raise
        print(f"captum-xnn: error: {_one_line(str(error), error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"captum-xnn: {_one_line('interrupted', error)}", file=sys.stderr)
        return 130
    return 0


def _one_line(text: str, error: BaseException) -> str:
    """Join an error's message and its notes, such as how to resume, on one line."""
    return " ".join("; ".join([text, *getattr(error, "__notes__", ())]).split())


@contextlib.contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Print warnings and the package's log as single lines on stderr, inside the context."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("captum-xnn: %(message)s"))
    log = logging.getLogger("captum_xnn")

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"captum-xnn: warning: {' '.join(str(message).split())}", file=sys.stderr)

    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        log.removeHandler(handler)


def _demo(arguments: argparse.Namespace) -> object:
    import torch

    from captum_xnn.cli._demo import run

    # The network and its layers are tiny: threads would wait for each other, on a busy machine without end.
    torch.set_num_threads(1)
    return run(arguments.out, digits=arguments.digits, seed=arguments.seed, progress=True)


def _fit(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli import _commands
    from captum_xnn.cli._configuration import CONFIGURATION_FILE, Configuration

    configuration = Configuration.read(arguments.config, _settings(arguments))
    opened, xnn = _commands.fit(configuration, progress=not arguments.quiet)
    rows = [
        [*_targets_cells(opened, e.targets), f"{e.f_reg:.4f}", "" if e.positives is None else str(e.positives)]
        for e in xnn.explainers_.values()
    ]
    written = f"Written: {configuration.out} (explainers, history, and {CONFIGURATION_FILE} to fit them again)"
    return "\n".join([_table([*_targets_header(opened), "F_reg, training", "positives"], rows), "", written])


def _targets_header(opened: ModelAndInputs) -> list[str]:
    """Return the headings of the columns that say which outputs are explained."""
    return ["target"] if opened.model_file.classes is None else ["target", "class"]


def _targets_cells(opened: ModelAndInputs, targets: Sequence[Target]) -> list[str]:
    """Return the indices of some outputs, and their names if the model's classes have names."""
    from captum_xnn.explanation import middle_cut

    cells = [", ".join(map(str, targets))]
    if opened.model_file.classes is not None:
        cells.append(", ".join(map(opened.name_of, targets)))
    return [middle_cut(cell, _WIDEST) for cell in cells]


def _layers(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli._configuration import Configuration
    from captum_xnn.cli._layers import listed

    return listed(Configuration.read(None, _settings(arguments)))


def _compare(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli._comparing import compared
    from captum_xnn.cli._configuration import Configuration

    settings = _settings(arguments)
    settings.pop("out")
    return compared(Configuration.read(None, settings), arguments)


def _explain(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli import _commands

    opened, xnn = _model_and_explainers(arguments)
    folder = Path(arguments.out)
    explained = _commands.explain(
        opened,
        xnn,
        opened.targets(xnn),
        folder,
        names=arguments.names,
        against=arguments.against,
        progress=not arguments.quiet,
    )
    return f"{explained} inputs explained. Written: {folder / _commands.EXPLANATIONS_FILE}, with pictures/ and maps/"


def _evaluate(arguments: argparse.Namespace) -> str:
    from captum_xnn._files import replace_file
    from captum_xnn.cli import _commands
    from captum_xnn.cli._evaluation import evaluate

    path = Path(arguments.explainer, "evaluation.json") if arguments.out is None else Path(arguments.out)
    opened, xnn = _model_and_explainers(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    quiet = arguments.quiet
    targets = opened.targets(xnn)
    against = None if arguments.against is None else _commands.compared(opened, targets, arguments.against)
    found = evaluate(
        opened,
        xnn,
        targets,
        maps=arguments.maps,
        patches=arguments.patches,
        against=against,
        progress=not quiet,
    )
    entries = [_finite(result._asdict()) for result in found]
    content = {"data": arguments.data, **({} if against is None else {"against": against}), "targets": entries}
    replace_file(path, json.dumps(content, indent=1).encode())
    columns = {"F_reg": "f_reg", "F_cls": "f_cls", "effective": "effective", "positives": "positives"}
    if arguments.maps:
        columns |= {"O1": "o1", "O2": "o2", "O1_weighted": "o1_weighted", "O2_weighted": "o2_weighted"}
    rows = [
        [*_targets_cells(opened, [r.target]), *(_number(getattr(r, name)) for name in columns.values())] for r in found
    ]
    tables = [_table([*_targets_header(opened), *columns], rows)]
    if arguments.patches:
        tables += ["", _patches_table(opened, found)]
    return "\n".join([*tables, "", f"{found[0].inputs} inputs. Written: {path}"])


def _finite(value: Any) -> Any:
    """Convert a value for JSON: named tuples to dicts, and infinite numbers, which O2 may be, to null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if value == math.inf else value


def _patches_table(opened: ModelAndInputs, found: Sequence[Evaluation]) -> str:
    """Format a table of the measures on covered patches, each followed by its controls."""
    header = [
        *_targets_header(opened),
        "inputs",
        "agreement",
        "random groups",
        "random maps",
        "1-Heatmap",
        "identified",
        "random groups",
        "movement",
        "O1 of drops",
        "random groups",
    ]
    rows = []
    for result in found:
        of = result.patches
        if of is not None:
            by_chance = None if of.drops_random_groups is None else of.drops_random_groups.o1
            figures = [of.agreement, of.agreement_random_groups, of.agreement_random_maps, of.agreement_one_heatmap]
            figures += [of.identified, of.identified_random_groups, of.movement, of.drops.o1, by_chance]
            rows.append([*_targets_cells(opened, [result.target]), str(of.examples), *map(_number, figures)])
    return _table(header, rows)


class _ReadNames(Sequence[str]):
    """Names of the inputs without the damaged images, which are known once the inputs have been read."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def _names(self) -> list[str]:
        skipped = set(self.inputs.skipped)
        return [name for name in self.inputs.names if name not in skipped]

    def __len__(self) -> int:
        return len(self._names())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __getitem__(self, index: Any) -> Any:
        return self._names()[index]


def _report(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli import _commands
    from captum_xnn.report import ReportOptions
    from captum_xnn.report._page import write_report

    opened, xnn = _model_and_explainers(arguments)
    targets = opened.targets(xnn)
    against = arguments.against

    def shown(image: Tensor) -> Tensor:
        images = opened.inputs.preparation.displayable(image[None])
        if images is None:
            raise ValueError(f"inputs are {tuple(image.shape)}, and this report needs images; pass a folder of images")
        return images[0]

    first = next(iter(opened.inputs)).inputs
    tokens = opened.inputs.preparation.tokens
    if tokens is None and not first.is_floating_point():
        raise ValueError(
            f"the inputs are ids {tuple(first.shape)}, whose words are not known; define tokens(ids) in the model's "
            "file, which returns the words of one text without padding"
        )
    options = ReportOptions(
        captions=_ReadNames(opened.inputs),
        tokens=tokens,
        class_names=opened.model_file.classes,
        names=arguments.names,
        title=arguments.title,
        display=shown,
        against=None if against is None else _commands.compared(opened, targets, against),
        patches=arguments.patches,
        again=None if arguments.again is None else opened.explainers(arguments.again),
        internal_batch_size=opened.configuration.batch_size,
        cache=Path(arguments.explainer, "report-cache") if arguments.cache else None,
        progress=not arguments.quiet,
    )
    path = write_report(arguments.out, xnn, opened.inputs, targets, options)
    return f"Open this: {path}"


def _model_and_explainers(arguments: argparse.Namespace) -> tuple[ModelAndInputs, XNNAttribution]:
    """Open the model, its inputs and the explainers that a command's arguments name.

    The configuration beside the explainers gives the model and the conversion of images to inputs, unless options
    override it. Data and targets come from the options.
    """
    from captum_xnn import _serialization
    from captum_xnn.cli._configuration import CONFIGURATION_FILE, Configuration
    from captum_xnn.cli._model_and_inputs import ModelAndInputs, heatmap_named

    heatmap = None if arguments.heatmap is None else heatmap_named(arguments.heatmap)
    if not _serialization.is_saved(arguments.explainer):
        raise ExplainerFileError(
            f"{arguments.explainer!r} has no explainer.json; fit explainers first, by captum-xnn fit --out "
            f"{arguments.explainer} ..., or pass the folder that they were saved to"
        )
    _serialization.read(arguments.explainer)  # so that a damaged folder raises its own error before the model is loaded
    beside = Path(arguments.explainer, CONFIGURATION_FILE)
    settings = {"targets": "all", **_settings(arguments)}
    settings.pop("out", None)
    opened = ModelAndInputs.of(Configuration.read(beside if beside.is_file() else None, settings))
    return opened, opened.explainers(arguments.explainer, heatmap)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that are settings of a configuration."""
    from dataclasses import fields

    from captum_xnn.cli._configuration import Configuration

    given = {f.name: value for f in fields(Configuration) if (value := getattr(arguments, f.name, None)) is not None}
    if "recipe" in given:
        given["recipe"] = dict(given["recipe"])
    return given


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows under a header, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, *rows]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def _pair(text: str) -> tuple[str, Any]:
    """Parse ``steps=500`` to a name and a value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE; write it like steps=500")
    try:
        return name, None if value == "none" else json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the value in {text!r} is not a number; write it like steps=500") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("captum-xnn", description="Explain neural networks by a few learned x-features.")
    parser.add_argument("--version", action="version", version=f"captum-xnn {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a small network on real digits and explain it",
        description="Train a small network on 4,000 real digits, explain it at two layers, and write pictures, the "
        "explainers and reports to open in a browser. The demo takes one to three minutes and needs no download.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--out", default="xnn-demo", metavar="DIR", help="folder to write to")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random")
    demo.add_argument(
        "--digits", type=int, nargs="+", choices=range(10), default=[4, 7, 3], metavar="DIGIT", help="digits to explain"
    )
    layers = commands.add_parser(
        "layers",
        help="list the layers of your model, and recommend one to explain",
        description="List the layers of a model with type and output shape, and recommend layers to explain. One image "
        "of random numbers runs through the model, or the first input of --data. A torchvision model needs no weights.",
        epilog=_MODELS,
    )
    layers.set_defaults(run=_layers)
    _add_inputs(layers, required=False)
    _fit_parser(commands)
    _compare_parser(commands)
    explain = _on_explainers(
        commands,
        "explain",
        "explain images: pictures, maps and numbers",
        "Write a picture (pictures/) and the maps (maps/, .npy) of each image, and the numbers of all images to "
        "explanations.jsonl. Of the fitted targets, or of those in --target, the one with the highest output is "
        "explained.",
    )
    explain.set_defaults(run=_explain)
    explain.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    explain.add_argument("--names", metavar="FILE", help="file of x-feature names that a report exported")
    _add_against(explain)
    report = _on_explainers(
        commands,
        "report",
        "explain a folder of images on one page",
        "Write one HTML page that explains a model's outputs for images: the faithfulness of the explanation, a card "
        "for each x-feature, and all heatmaps. The page needs no other file and no network connection.",
    )
    report.set_defaults(run=_report)
    report.add_argument("--out", default="report.html", metavar="FILE", help="page to write (report.html)")
    report.add_argument("--names", metavar="FILE", help="file of x-feature names that a report exported")
    _add_against(report)
    report.add_argument(
        "--again", metavar="DIR", help="explainers of the same targets from another fit, to see if x-features return"
    )
    report.add_argument(
        "--cache", action=argparse.BooleanOptionalAction, default=True,
        help="keep maps beside the explainers, so that a report with other names takes seconds (the default)",
    )  # fmt: skip
    report.add_argument("--title", help="heading of the page")
    report.add_argument(
        "--patches", type=int, nargs="?", const=4, default=0, metavar="N",
        help="cover patches of N images of each class (4), to check the maps: patch agreement and O1 of drops",
    )  # fmt: skip
    evaluate = _on_explainers(
        commands,
        "evaluate",
        "measure explainers on images",
        "Print F_reg, F_cls and the effective number of x-features for each target, and write them as JSON.",
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("--out", metavar="FILE", help="JSON file to write (evaluation.json beside the explainers)")
    _add_against(evaluate)
    evaluate.add_argument(
        "--maps", type=int, nargs="?", const=100, default=0, metavar="N",
        help="draw maps of at most N images of each class (100), for O1 and O2",
    )  # fmt: skip
    evaluate.add_argument(
        "--patches", type=int, nargs="?", const=10, default=0, metavar="N",
        help="cover patches of at most N images of each class (10), for patch agreement and O1 of drops with controls",
    )  # fmt: skip
    add_study(commands)
    return parser


def _fit_parser(commands: Any) -> None:
    fit = commands.add_parser(
        "fit",
        help="learn x-features of your model from your images",
        description="Learn x-features of a model's outputs from images, without labels, and save them with the "
        "complete configuration. Options override the configuration file. The same command resumes an interrupted fit. "
        "Several processes can share one fit: torchrun --nproc-per-node 2 -m captum_xnn fit ...",
        epilog=_MODELS,
    )
    fit.set_defaults(run=_fit)
    fit.add_argument("--config", metavar="FILE", help="TOML file of settings, such as config.toml of an earlier fit")
    fit.add_argument("--out", metavar="DIR", help="folder to save to; overwrites explainers in it")
    fit.add_argument("--store", metavar="DIR", help="store activations in DIR, to save memory and to use them again")
    fit.add_argument("--checkpoint", metavar="DIR", help="folder for checkpoints (in --out until the fit is done)")
    fit.add_argument("--tensorboard", metavar="DIR", help="folder for loss curves in TensorBoard's format")
    fit.add_argument("--layer", metavar="NAME", help="dotted name of the layer to explain")
    fit.add_argument("--n-features", type=int, metavar="K", help="number of x-features of each explainer (5)")
    fit.add_argument(
        "--form",
        choices=["groups", "drsa", "srae"],
        help="groups of contributions or DRSA's subspaces, which add up exactly, or the learned SRAE (groups)",
    )
    fit.add_argument(
        "--joint", action=argparse.BooleanOptionalAction, help="explain all targets with the same x-features"
    )
    fit.add_argument("--seed", type=int, help="seed of the fits (0)")
    fit.add_argument(
        "--recipe", type=_pair, nargs="+", metavar="NAME=VALUE", help="settings of gradient descent, such as steps=500"
    )
    _add_inputs(fit, required=False)


def _compare_parser(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare methods on your model and data, as a table",
        description="Fit several methods on four fifths of the data, and measure them on the rest: faithfulness, patch "
        "agreement, overlap of drops and maps, stability and cost, with controls and intervals. No labels are used.",
        epilog=_MODELS,
    )
    compare.set_defaults(run=_compare)
    compare.add_argument(
        "--out", required=True, metavar="FILE", help="table to write: .md (Markdown), .tex (LaTeX) or .csv"
    )
    compare.add_argument("--figure", metavar="FILE", help="figure to write as well: .png, .pdf or .svg")
    compare.add_argument("--layer", required=True, metavar="NAME", help="dotted name of the layer to explain")
    compare.add_argument(
        "--methods", nargs="+", metavar="NAME",
        help='methods, the one in use first, such as groups SRAE "random groups" 1-Heatmap NMF NN',
    )  # fmt: skip
    compare.add_argument("--test", metavar="DATA", help="other data to measure on, in place of a fifth of --data")
    compare.add_argument("--repeats", type=int, default=1, metavar="N", help="repeats with other seeds and folds (1)")
    compare.add_argument("--images", type=int, default=16, metavar="N", help="images of each class to cover (16)")
    compare.add_argument(
        "--masks",
        metavar="FILE",
        help="known parts of the images: .npy (M, H, W), with the part of each pixel from 1, or 0",
    )
    compare.add_argument("--n-features", type=int, metavar="K", help="number of x-features of each method (5)")
    compare.add_argument("--seed", type=int, help="seed of data, fits and controls (0)")
    compare.add_argument(
        "--recipe", type=_pair, nargs="+", metavar="NAME=VALUE", help="settings of gradient descent, such as steps=500"
    )
    _add_inputs(compare, required=True)


def _on_explainers(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    """Add the parser of a command on saved explainers, for :func:`_model_and_explainers`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"Without --model or --torchvision, config.toml beside the explainers names the model. {_MODELS}",
    )
    parser.add_argument("--explainer", required=True, metavar="DIR", help="folder of explainers, saved by fit")
    parser.add_argument(
        "--heatmap",
        metavar="NAME",
        help="backend that draws maps, in place of the form's own: ExcitationMaps, or a class in captum.attr, also at "
        "a layer, as LayerGradCam:layer4",
    )
    _add_inputs(parser, required=True)
    return parser


def _add_against(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", metavar="T", help="output to compare with, a number or a name: explains why not this one"
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
