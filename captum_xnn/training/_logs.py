"""Loggers for the records of a running fit: to a file of JSON lines, or to TensorBoard.

Pass a logger to ``XNNAttribution.fit(..., log=...)``. Any function of a target and a record can be a logger.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from captum_xnn.training._history import Record

__all__ = ["JSONLines", "TensorBoard", "line"]


class JSONLines:
    """Write a line for every record: the target, the step, and every term of the loss.

    Args:
        path: File to append lines to. Created if missing.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "fit.jsonl"
        >>> JSONLines(path)(46, Record(0, 1.0, 0.5, 0.25))
        >>> print(path.read_text().strip())
        {"target": 46, "step": 0, "faithfulness": 1.0, "sparse_reconstruction": 0.5, "pull_away": 0.25}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __call__(self, target: Any, record: Record) -> None:
        """Append a line.

        Args:
            target: The explained output, or a tuple of several.
            record: The record.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line(target, record))


def line(target: Any, record: Record) -> str:
    r"""Format a record as a line of JSON with a line break.

    Args:
        target: The explained output, or a tuple of several.
        record: The record.

    Example:
        >>> line(46, Record(0, 1.0, 0.5, 0.25))
        '{"target": 46, "step": 0, "faithfulness": 1.0, "sparse_reconstruction": 0.5, "pull_away": 0.25}\n'
    """
    return json.dumps({"target": target, **record._asdict()}) + "\n"


class TensorBoard:
    """Write every term of the loss as a curve for each target.

    Args:
        folder: Folder of TensorBoard, as in ``tensorboard --logdir``.

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
            raise ImportError("the package tensorboard is not installed; run `pip install tensorboard`") from error
        self._writer = SummaryWriter(os.fspath(folder))

    def __call__(self, target: Any, record: Record) -> None:
        """Add a point to each curve.

        Args:
            target: The explained output, or a tuple of several.
            record: The record.
        """
        for term, value in record._asdict().items():
            if term != "step":
                self._writer.add_scalar(f"{term}/{target}", value, record.step)
        self._writer.flush()
