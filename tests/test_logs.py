"""Histories of fits as lines of JSON and as curves."""

import json
import sys
import types

import pytest

from captum_xnn.training import JSONLines, TensorBoard
from captum_xnn.training._history import Record


def test_lines_are_added_and_hold_every_term(tmp_path):
    path = tmp_path / "new" / "fit.jsonl"
    for target, step in ((46, Record(0, 1.0, 0.5, 0.25)), ((0, 2), Record(12, 0.1, 0.2, 0.3))):
        JSONLines(path)(target, step)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"target": 46, "step": 0, "faithfulness": 1.0, "sparse_reconstruction": 0.5, "pull_away": 0.25},
        {"target": [0, 2], "step": 12, "faithfulness": 0.1, "sparse_reconstruction": 0.2, "pull_away": 0.3},
    ]


def test_tensorboard_gets_a_curve_for_each_term_and_target(tmp_path, monkeypatch):
    points = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            points.append((self.folder, name, value, step))

        def flush(self):
            points.append("flushed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    TensorBoard(tmp_path)(46, Record(7, 1.0, 0.5, 0.25))
    assert points == [
        (str(tmp_path), "faithfulness/46", 1.0, 7),
        (str(tmp_path), "sparse_reconstruction/46", 0.5, 7),
        (str(tmp_path), "pull_away/46", 0.25, 7),
        "flushed",
    ]


def test_a_missing_tensorboard_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="package tensorboard is not installed; run `pip install tensorboard`"):
        TensorBoard(tmp_path)
