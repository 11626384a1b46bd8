"""Hand-worked F_reg and F_cls."""

import pytest
import torch

from captum_xnn.metrics import classification_faithfulness, regression_faithfulness
from captum_xnn.metrics._faithfulness import Faithfulness, FaithfulnessStream, error_floor

OUTPUTS = torch.tensor([[1.0, 2.0, 0.0], [5.0, 1.0, 0.0], [0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])


def test_f_reg():
    assert regression_faithfulness(torch.tensor([1.0, -1.0, 4.0]), torch.tensor([0.0, 1.0, 4.0])) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"surrogate is \(2,\) and prediction .* pass both in the same shape"):
        regression_faithfulness(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="with at least one example"):
        regression_faithfulness(torch.zeros(0), torch.zeros(0))


def test_f_cls_replaces_one_output():
    # Class 0: kept below 2; kept above 1; 3.5 overtakes 3; 0.5 falls behind 1.
    assert classification_faithfulness(OUTPUTS, torch.tensor([1.9, 1.1, 3.5, 0.5]), 0) == 0.5
    assert classification_faithfulness(OUTPUTS, OUTPUTS[:, 2], 2) == 1.0


def test_f_cls_replaces_several_outputs():
    swapped = OUTPUTS[:, [1, 0]]
    assert classification_faithfulness(OUTPUTS, swapped, (0, 1)) == 0.25
    assert classification_faithfulness(OUTPUTS, OUTPUTS[:, [0, 1]], (0, 1)) == 1.0


def test_f_cls_needs_classes():
    with pytest.raises(ValueError, match="single output use regression_faithfulness"):
        classification_faithfulness(torch.zeros(3, 1), torch.zeros(3), 0)


def test_f_reg_in_halves_is_averaged_in_double_precision():
    """bfloat16 has 8 bits, and no half holds 100,000."""
    made = torch.arange(3000).remainder(8).to(torch.bfloat16)
    assert regression_faithfulness(made, torch.zeros_like(made)) == 3.5
    far = torch.full((4,), 50000.0, dtype=torch.float16)
    assert regression_faithfulness(far, -far) == pytest.approx(100000, rel=1e-3)


def test_f_cls_of_nan_is_no_agreement():
    """argmax takes a NaN for the largest number, and so an explainer that diverged for a perfect one."""
    nan = torch.nan
    assert classification_faithfulness(OUTPUTS[1:2], torch.tensor([nan]), 0) == 0
    assert classification_faithfulness(OUTPUTS, torch.tensor([1.0, nan, nan, 2.0]), 0) == 0.5
    assert classification_faithfulness(torch.tensor([[nan, 1.0]]), torch.tensor([0.0]), 1) == 0


@pytest.mark.parametrize(
    ("surrogate", "target", "told"),
    [
        (torch.zeros(4), 3, r"targets are \[3\]"),
        (torch.zeros(4), -1, r"targets are \[-1\]"),
        (torch.zeros(4, 2), (1, 1), r"targets are \[1, 1\]"),
        (torch.zeros(3), 1, r"surrogate is \(3,\) for 4 examples and 1 targets"),
        (torch.zeros(4, 3), 1, r"surrogate is \(4, 3\) for 4 examples and 1 targets"),
        (torch.zeros(8), (0, 1), r"surrogate is \(8,\) for 4 examples and 2 targets"),
    ],
)
def test_f_cls_tells_what_does_not_fit(surrogate, target, told):
    with pytest.raises(ValueError, match=told):
        classification_faithfulness(OUTPUTS, surrogate, target)
    with pytest.raises(ValueError, match="for 0 examples and 1 targets; pass at least one example"):
        classification_faithfulness(OUTPUTS[:0], torch.zeros(0), 1)


def test_a_stream_gives_the_figures_of_all_its_batches():
    # As above, the class stays in rows 0 and 1.
    surrogate, prediction = torch.tensor([1.9, 1.1, 3.5, 0.5]), OUTPUTS[:, 0]
    whole, stream = FaithfulnessStream(0), FaithfulnessStream(0)
    whole.update(surrogate, prediction, OUTPUTS)
    for rows in (slice(0, 1), slice(1, 1), slice(1, 4)):
        stream.update(surrogate[rows], prediction[rows], OUTPUTS[rows])
    found = stream.compute()
    assert found.f_reg == pytest.approx((0.9 + 3.9 + 3.5 + 1.5) / 4) and (found.f_cls, found.examples) == (0.5, 4)
    assert found == Faithfulness.of(surrogate, prediction, OUTPUTS.split([1, 3]), 0)
    assert whole.compute() == Faithfulness.of(surrogate, prediction, [OUTPUTS], 0)
    # The mean is 2: the predictions 1, 5, 0 and 2 are 1, 3, 2 and 0 away from it.
    assert stream.mean_deviation() == whole.mean_deviation() == 1.5


def test_f_cls_of_a_stream_needs_classes():
    for target, outputs in ((None, OUTPUTS[:, :1]), ((0, 0), OUTPUTS[:, None]), (0, None)):
        stream = FaithfulnessStream(target)
        stream.update(OUTPUTS[:, 0], OUTPUTS[:, 0], outputs)
        assert stream.compute() == (0.0, None, 4)
    for figure in (FaithfulnessStream(0).compute, FaithfulnessStream(0).mean_deviation):
        with pytest.raises(ValueError, match="there are no examples, and faithfulness is a mean over them"):
            figure()


def test_error_floor_is_what_the_best_x_features_leave():
    """The best n x-features with a linear head are the outputs' first n principal components."""
    scales = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.double)
    y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double) * scales
    centred = y - y.mean(0)
    U, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    for n in range(6):
        best = U[:, :n] * S[:n] @ Vh[:n]
        assert error_floor(y, n) == pytest.approx(float(((centred - best) ** 2).sum(1).mean()), abs=1e-12)
    assert error_floor(y[:, :1], 1) == 0
    assert error_floor(y[:, :1], 0) == pytest.approx(float(y[:, 0].var(correction=0)))
    with pytest.raises(ValueError, match="two examples or more"):
        error_floor(y[:1], 1)


def test_metrics_are_at_hand():
    """Each public name is that of one of the modules, under the same name."""
    import importlib
    import pkgutil

    from captum_xnn import metrics

    modules = [importlib.import_module(f"captum_xnn.metrics.{m.name}") for m in pkgutil.iter_modules(metrics.__path__)]
    places = {name: module for module in modules for name in module.__all__}
    assert sum(len(module.__all__) for module in modules) == len(places)  # no name twice
    assert all(getattr(metrics, name) is getattr(places[name], name) for name in metrics.__all__)
