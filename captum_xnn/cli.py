"""The command line: ``captum-xnn demo`` shows what the package does, ``captum-xnn report`` explains your images."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_xnn import __version__

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after saying on stderr what went wrong.

    Args:
        argv: Arguments; those of the process, if None.

    Raises:
        SystemExit: With code 2, after wrong arguments; with 0, after ``--help`` and ``--version``.
    """
    arguments = _parser().parse_args(argv)
    import torch

    # The demonstration's network is tiny: threads would wait for each other, without end where the machine is busy.
    if arguments.command == "demo":
        torch.set_num_threads(1)

    try:
        print(_report(arguments) if arguments.command == "report" else _demo(arguments))
    except (ImportError, OSError, ValueError) as error:
        print(f"captum-xnn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("captum-xnn: interrupted", file=sys.stderr)
        return 130
    return 0


def _demo(arguments: argparse.Namespace) -> Any:
    from captum_xnn import demo

    return demo.run(arguments.out, digits=arguments.digits, seed=arguments.seed, progress=True)


def _report(arguments: argparse.Namespace) -> str:
    from captum_xnn import XNNAttribution
    from captum_xnn.report import write_report

    model = runpy.run_path(str(arguments.model))
    images = _Folder(arguments.images, arguments.size, model.get("MEAN"), model.get("STD"))
    xnn = XNNAttribution.load(arguments.explainer, model["load"]())
    targets = [target for _, explained in xnn.explainers_ for target in explained]
    path = write_report(
        arguments.out,
        xnn,
        images,
        targets if arguments.target is None else arguments.target,
        captions=[str(file.relative_to(arguments.images)) for file in images.files],
        class_names=arguments.classes and json.loads(arguments.classes.read_text(encoding="utf-8")),
        names=arguments.names,
        title=arguments.title,
        display=images.display,
        progress=True,
    )
    return f"Open this: {path}"


class _Folder:
    """Batches of all images below a folder, in the order of their names."""

    def __init__(self, folder: Path, size: int | None, mean: Any, std: Any) -> None:
        import torch

        self.files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"})
        if not self.files:
            raise ValueError(f"expected .jpg, .png or .webp images below {str(folder)!r}, got none; pass their folder")
        self.size = size
        self.mean, self.std = (
            torch.tensor(v if given is None else given).reshape(-1, 1, 1) for given, v in ((mean, [0.0]), (std, [1.0]))
        )

    def display(self, image: Tensor) -> Tensor:
        """Returns an image without its normalisation."""
        return (image * self.std + self.mean).clamp(0, 1)

    def _read(self, file: Path) -> Tensor:
        import numpy as np
        import torch
        from PIL import Image

        with Image.open(file) as image:
            pixels = image.convert("RGB")
            if self.size is not None:
                pixels = pixels.resize((self.size, self.size))
            return (torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255 - self.mean) / self.std

    def __iter__(self) -> Iterator[Tensor]:
        import torch

        for i in range(0, len(self.files), 32):
            yield torch.stack([self._read(file) for file in self.files[i : i + 32]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("captum-xnn", description="Explains networks by a few learned x-features.")
    parser.add_argument("--version", action="version", version=f"captum-xnn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a small network on real digits and explain it",
        description="Trains a small network on 4,000 real digits, explains it at two layers, and writes pictures, the "
        "explainers and a page to open in a browser. Takes one to three minutes and needs no download.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", default="xnn-demo", metavar="DIR", help="folder to write to")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random")
    demo.add_argument(
        "--digits", type=int, nargs="+", choices=range(10), default=[4, 7, 3], metavar="DIGIT", help="digits to explain"
    )
    report = commands.add_parser(
        "report",
        help="explain a folder of images by a saved explainer, as one page",
        description="Writes one HTML page that explains what a model says of the images in a folder: how faithful the "
        "explanation is, what each x-feature is, and all heatmaps.",
    )
    report.add_argument("explainer", type=Path, help="folder that XNNAttribution.save wrote")
    report.add_argument("images", type=Path, help="folder of images")
    report.add_argument("--model", type=Path, required=True, help="Python file with load(), and MEAN and STD of inputs")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="page to write (report.html)")
    report.add_argument("--target", type=int, nargs="+", help="outputs to explain (all that the explainer has)")
    report.add_argument("--size", type=int, help="height and width to which images are squashed")
    report.add_argument("--classes", type=Path, metavar="JSON", help="list of the names of the model's outputs")
    report.add_argument("--names", type=Path, metavar="JSON", help="names of x-features, as a report exports them")
    report.add_argument("--title", help="heading of the page")
    return parser
