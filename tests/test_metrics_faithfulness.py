"""Hand-worked F_reg and F_cls."""

import pytest
import torch

from captum_xnn.metrics.faithfulness import f_cls, f_reg

OUTPUTS = torch.tensor([[1.0, 2.0, 0.0], [5.0, 1.0, 0.0], [0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])


def test_f_reg():
    assert f_reg(torch.tensor([1.0, -1.0, 4.0]), torch.tensor([0.0, 1.0, 4.0])) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="one shape"):
        f_reg(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="with examples"):
        f_reg(torch.zeros(0), torch.zeros(0))


def test_f_cls_replaces_one_output():
    # Class 0: kept below 2; kept above 1; 3.5 overtakes 3; 0.5 falls behind 1.
    assert f_cls(torch.tensor([1.9, 1.1, 3.5, 0.5]), OUTPUTS, 0) == 0.5
    assert f_cls(OUTPUTS[:, 2], OUTPUTS, 2) == 1.0


def test_f_cls_replaces_several_outputs():
    swapped = OUTPUTS[:, [1, 0]]
    assert f_cls(swapped, OUTPUTS, (0, 1)) == 0.25
    assert f_cls(OUTPUTS[:, [0, 1]], OUTPUTS, (0, 1)) == 1.0


def test_f_cls_needs_classes():
    with pytest.raises(ValueError, match="single output use f_reg"):
        f_cls(torch.zeros(3), torch.zeros(3, 1), 0)
