"""The command line: ``captum-xnn demo`` shows what the package does, on real digits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from captum_xnn import __version__

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

    from captum_xnn import demo

    # The network and its layers are tiny: threads would wait for each other, without end where the machine is busy.
    torch.set_num_threads(1)

    try:
        result = demo.run(arguments.out, digits=arguments.digits, seed=arguments.seed, progress=True)
    except (ImportError, OSError, ValueError) as error:
        print(f"captum-xnn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("captum-xnn: interrupted", file=sys.stderr)
        return 130
    print(result)
    return 0


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
    return parser
