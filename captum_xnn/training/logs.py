"""Histories of fits, as they come: to a file of JSON lines, or to TensorBoard.

Both are what ``XNNAttribution.fit(..., log=...)`` takes, a function of the target and a record. Nothing else is needed
to write one of your own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from captum_xnn.training.problem import Step

__all__ = ["JSONLines", "TensorBoard", "line"]


class JSONLines:
    """Writes a line for every record: the target, the step, and every term of the loss.

    Args:
        path: A file, made if need be; lines are added to what it holds.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "fit.jsonl"
        >>> JSONLines(path)(46, Step(0, 1.0, 0.5, 0.25))
        >>> print(path.read_text().strip())
        {"target": 46, "step": 0, "faithfulness": 1.0, "sparse_reconstruction": 0.5, "pull_away": 0.25}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __call__(self, target: Any, step: Step) -> None:
        """Adds a line.

        Args:
            target: The explained output, or the tuple of them.
            step: The record.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line(target, step))


def line(target: Any, step: Step) -> str:
    r"""Returns a record as a line of JSON, its end included.

    Args:
        target: The explained output, or the tuple of them.
        step: The record.

    Example:
        >>> line(46, Step(0, 1.0, 0.5, 0.25))
        '{"target": 46, "step": 0, "faithfulness": 1.0, "sparse_reconstruction": 0.5, "pull_away": 0.25}\n'
    """
    return json.dumps({"target": target, **step._asdict()}) + "\n"


class TensorBoard:
    """Writes every term of the loss as a curve for each target.

    Args:
        folder: Where TensorBoard looks, as in ``tensorboard --logdir``.

    Raises:
        ImportError: If TensorBoard is not installed.

    Example:
        >>> log = TensorBoard("runs/goldfinch")  # doctest: +SKIP
        >>> xnn.fit(loader, target=46, log=log)  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("expected the package tensorboard, found none; pip install tensorboard") from error
        self._writer = SummaryWriter(os.fspath(folder))

    def __call__(self, target: Any, step: Step) -> None:
        """Adds a point to each curve.

        Args:
            target: The explained output, or the tuple of them.
            step: The record.
        """
        for term, value in step._asdict().items():
            if term != "step":
                self._writer.add_scalar(f"{term}/{target}", value, step.step)
        self._writer.flush()
