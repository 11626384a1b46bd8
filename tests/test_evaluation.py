"""Evaluation: the numbers are those of the metrics, each target for itself."""

import math

import pytest
import torch
from captum.attr import InputXGradient
from command_line import logits, seed_of, write

from captum_xnn import Recipe, XNNAttribution
from captum_xnn.cli._configuration import Configuration
from captum_xnn.cli._evaluation import evaluate
from captum_xnn.cli._model_and_inputs import ModelAndInputs
from captum_xnn.layers._targets import Difference
from captum_xnn.metrics import effective_number, orthogonality
from captum_xnn.models._srae import by_shape
from captum_xnn.patch_scores import patch_scores


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("evaluation"))
    return ModelAndInputs.of(
        Configuration(model=f"{folder}/net.py", data=f"{folder}/images", device="cpu", batch_size=7)
    )


@pytest.fixture(scope="module")
def xnn(opened):
    return XNNAttribution(opened.model, "1", 2, autoencoder=by_shape, recipe=Recipe(steps=20)).fit(
        opened.inputs, [2, 0], progress=False
    )


@pytest.fixture(scope="module")
def everything(opened):
    """All inputs, and the class that the model gives each, by hand."""
    batches = list(opened.inputs)
    names = [name for batch in batches for name in batch.names]
    return torch.cat([batch.inputs for batch in batches]), torch.tensor([logits(seed_of(n)).argmax() for n in names])


def test_faithfulness_is_that_of_score(opened, xnn, everything):
    for result in evaluate(opened, xnn, [0, 2], progress=False):
        score = xnn.score(everything[0], result.target)
        assert (result.f_reg, result.f_cls, result.inputs) == pytest.approx((*score[:2], 60), abs=1e-6)
        assert (result.o1, result.o2) == (None, None)


def test_effective_number_is_that_of_the_positives(opened, xnn, everything):
    inputs, classes = everything
    for result in evaluate(opened, xnn, [0, 2], progress=False):
        why = xnn.explain(inputs[classes == result.target], result.target)
        expected = effective_number(why.contributions.abs().mean(0, keepdim=True))
        assert result.effective == pytest.approx(float(expected), rel=1e-5)
        assert result.positives == int((classes == result.target).sum()) > 0
        assert result.name == opened.name_of(result.target)


@pytest.mark.parametrize("most", [4, 100])
def test_orthogonality_is_that_of_the_first_positives(opened, xnn, everything, most):
    inputs, classes = everything
    results = evaluate(opened, xnn, [2, 0], maps=most, progress=False)
    assert [result.target for result in results] == [2, 0]
    for result in results:
        why = xnn.explain(inputs[classes == result.target][:most], result.target)
        maps = why.maps.sum(2)
        o1, o2 = orthogonality(maps)
        weighted = orthogonality(maps, contributions=why.contributions)
        assert result.o1_weighted == pytest.approx(weighted.o1, rel=1e-3)
        assert result.o2_weighted == pytest.approx(weighted.o2, abs=1e-4)
        assert result.o1_weighted != pytest.approx(o1, rel=1e-2)
        assert result.o1 == pytest.approx(o1, abs=1e-5)
        assert result.o2 == pytest.approx(o2, abs=1e-4) or (math.isinf(result.o2) and math.isinf(o2))


def test_patches_are_covered_in_the_first_positives(opened, xnn, everything):
    inputs, classes = everything
    for result in evaluate(opened, xnn, [2, 0], patches=3, progress=False):
        expected = patch_scores(xnn, inputs[classes == result.target][:3], result.target, internal_batch_size=7)
        assert result.patches == expected
        assert (result.o1, result.patches.examples) == (None, 3)


def test_a_class_without_positives(opened, tmp_path, everything):
    write(tmp_path, count=12)
    (tmp_path / "images" / "odd").rename(tmp_path / "odd")
    xnn = XNNAttribution(opened.model, "3", 2, autoencoder=by_shape, recipe=Recipe(steps=3)).fit(
        everything[0], [0, 1], progress=False
    )
    for image in (tmp_path / "images" / "even").glob("*.png"):
        if logits(seed_of(image.name)).argmax() == 1:
            image.unlink()
    fewer = ModelAndInputs.of(Configuration(model=f"{tmp_path}/net.py", data=f"{tmp_path}/images", device="cpu"))
    zero, one = evaluate(
        fewer, XNNAttribution.load(xnn.save(tmp_path / "xnn"), fewer.model), [0, 1], maps=2, progress=False
    )
    assert (one.positives, one.effective, one.o1, one.o2) == (0, None, None, None)
    assert one.f_cls is not None and zero.o1 is not None


def test_outputs_that_are_no_classes(tmp_path):
    (tmp_path / "net.py").write_text("import torch\ntorch.manual_seed(0)\nload = lambda: torch.nn.Sequential("
                                     "torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 1))")  # fmt: skip
    torch.save(torch.randn(50, 4), tmp_path / "inputs.pt")
    opened = ModelAndInputs.of(Configuration(model=f"{tmp_path}/net.py", data=f"{tmp_path}/inputs.pt", device="cpu"))
    xnn = XNNAttribution(opened.model, "1", 2, autoencoder=by_shape, recipe=Recipe(steps=5)).fit(
        opened.inputs, progress=False
    )
    (result,) = evaluate(opened, xnn, [None], progress=False)
    assert (result.f_cls, result.positives, result.target) == (None, 50, None)
    assert result.f_reg == pytest.approx(xnn.explainer().f_reg, abs=1e-6)
    xnn = xnn.with_heatmap(InputXGradient)
    (checked,) = evaluate(opened, xnn, [None], maps=3, patches=5, progress=False)
    data = torch.load(tmp_path / "inputs.pt")
    why = xnn.explain(data[:3])
    assert checked.o1_weighted == pytest.approx(orthogonality(why.maps, contributions=why.contributions).o1, abs=1e-5)
    expected = patch_scores(xnn, data[:5], fill=data.mean(0))
    assert checked.patches.agreement == pytest.approx(expected.agreement, abs=1e-6) and checked.patches.examples == 5


def test_differences_are_measured_as_such(opened, everything):
    inputs, classes = everything
    xnn = XNNAttribution(opened.model, "1", 2).fit(opened.inputs, [0, 2], progress=False)
    (result,) = evaluate(opened, xnn, [0, 2], maps=5, patches=3, against=2, progress=False)
    assert (result.target, result.name, result.f_cls) == (0, opened.name_of(Difference(0, 2)), None)
    y = opened.model(inputs).detach()
    made = xnn.contributions(inputs, 0, against=2)
    assert result.f_reg == pytest.approx(float((made.surrogate - (y[:, 0] - y[:, 2])).abs().mean()), abs=1e-6)
    own = inputs[classes == 0]
    maps = xnn.explain(own[:5], 0, against=2).maps.sum(2)
    assert result.o1 == pytest.approx(orthogonality(maps).o1, abs=1e-5)
    wanted = patch_scores(xnn, own[:3], 0, against=2)
    assert result.patches.agreement == pytest.approx(wanted.agreement, abs=1e-5)
    assert result.patches.drops == pytest.approx(wanted.drops, abs=1e-4)
