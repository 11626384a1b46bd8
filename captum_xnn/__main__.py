"""Run the command line: ``captum-xnn``, or ``python -m captum_xnn``.

Each command runs in a module of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from captum_xnn.cli._parser import make_parser
from captum_xnn.study._cli import add_parsers as add_study

__all__ = ["main"]


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


def _parser() -> argparse.ArgumentParser:
    runs = {
        "demo": _demo,
        "layers": _layers,
        "fit": _fit,
        "compare": _compare,
        "explain": _explain,
        "report": _report,
        "evaluate": _evaluate,
    }
    return make_parser(runs, add_study)


# The modules of the commands import torch, which --help and --version do without.


def _demo(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli._demo import run_demo

    return run_demo(arguments)


def _layers(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli._layers import run_layers

    return run_layers(arguments)


def _fit(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli._fit import run_fit

    return run_fit(arguments)


def _compare(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli._compare import run_comparison

    return run_comparison(arguments)


def _explain(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli._explain import run_explain

    return run_explain(arguments)


def _report(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli._report import run_report

    return run_report(arguments)


def _evaluate(arguments: argparse.Namespace) -> str:
    from captum_xnn.cli._evaluation import run_evaluation

    return run_evaluation(arguments)


if __name__ == "__main__":
    sys.exit(main())
