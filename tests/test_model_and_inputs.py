"""Opening a model with its inputs: what the configuration names, tried at once."""

import numpy as np
import pytest
import torch
from captum.attr import DeepLift
from command_line import logits, seed_of, write

from captum_xnn import Recipe, XNNAttribution
from captum_xnn.cli._configuration import Configuration
from captum_xnn.cli._model_and_inputs import ModelAndInputs, heatmap_named
from captum_xnn.errors import NotFittedError
from captum_xnn.heatmaps import ExcitationMaps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("opened"))


def configuration(folder, **settings):
    return Configuration(**{"model": f"{folder}/net.py", "data": f"{folder}/images", "device": "cpu", **settings})


def test_model_and_inputs_belong_together(folder):
    opened = ModelAndInputs.of(configuration(folder, batch_size=25))
    assert opened.output_shape == (3,) and opened.device == torch.device("cpu")
    for batch in opened.inputs:
        expected = np.stack([logits(seed_of(name)) for name in batch.names])
        np.testing.assert_allclose(opened.outputs(batch.inputs), expected, atol=1e-5)


def test_the_configuration_goes_before_the_file_and_is_completed_by_it(folder):
    opened = ModelAndInputs.of(configuration(folder, size=(4, 5), std=(1.0, 1.0, 1.0)))
    (batch,) = opened.inputs
    assert batch.inputs.shape == (60, 3, 4, 5)
    assert opened.configuration == configuration(folder, size=(4, 5), std=(1.0, 1.0, 1.0), mean=(-0.1, 0.0, -0.1))
    assert ModelAndInputs.of(configuration(folder)).configuration.size == (6, 6)


def test_targets_and_the_highest_of_them(folder):
    opened = ModelAndInputs.of(configuration(folder, targets=(2, 0)))
    xnn = XNNAttribution(opened.model, "3", 2, recipe=Recipe(steps=3)).fit(opened.inputs, [0, 1, 2], progress=False)
    assert opened.targets(xnn) == [2, 0]
    assert ModelAndInputs.of(configuration(folder)).targets(xnn) == [0, 1, 2]
    (batch,) = opened.inputs
    expected = [2 if logits(seed_of(name))[2] > logits(seed_of(name))[0] else 0 for name in batch.names]
    assert opened.highest(batch.inputs, [2, 0]) == expected and set(expected) == {0, 2}
    assert opened.highest(batch.inputs, [None]) is None
    only = XNNAttribution(opened.model, "3", 2, recipe=Recipe(steps=3)).fit(opened.inputs, [0], progress=False)
    with pytest.raises(
        NotFittedError,
        match=r"target 2 has no explainer \(blue; fitted: 0 \(red\)\); fit it first, by captum-xnn fit --target 2",
    ):
        opened.targets(only)


def test_names_of_outputs(folder):
    opened = ModelAndInputs.of(configuration(folder))
    assert [opened.name_of(t) for t in (0, 2, 3, (1, 2), None)] == [
        "red",
        "blue",
        "target 3",
        "target (1, 2)",
        "the output",
    ]


def test_arrays_come_in_the_dtype_of_the_model(folder):
    (folder / "double.py").write_text((folder / "net.py").read_text().replace("return net", "return net.double()"))
    np.save(folder / "inputs.npy", np.ones((4, 3, 6, 6), "float32"))
    opened = ModelAndInputs.of(configuration(folder, model=f"{folder}/double.py", data=f"{folder}/inputs.npy"))
    (batch,) = opened.inputs
    assert batch.inputs.dtype == torch.float64 and opened.outputs(batch.inputs).dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": None}, "setting 'data' is missing; pass --data FOLDER"),
        ({"model": None}, "no model is given; pass either --model FILE.py or --torchvision NAME"),
        ({"torchvision": "vgg19"}, "two models are given"),
        ({"model": None, "torchvision": "vgg19"}, "setting 'weights' is missing; pass --weights FILE"),
        ({"device": "cuda:99"}, r"device 'cuda:99' is not available \(.*\); use cpu or auto"),
        ({"device": "abacus"}, r"device 'abacus' is not available"),
        ({"mean": (0.5,), "std": (0.5,)}, r"the model fails on inputs torch.float32 \(1, 1, 6, 6\) .*--size"),
    ],
)
def test_what_is_missing_or_does_not_fit(settings, said, folder):
    with pytest.raises(ValueError, match=said):
        ModelAndInputs.of(configuration(folder, **settings))


def test_models_that_return_no_tensor(folder):
    (folder / "pairs.py").write_text(
        "from torch import nn\nclass Pair(nn.Module):\n def forward(self, x):\n  return x, x\nload = Pair"
    )
    with pytest.raises(TypeError, match="the model returns a tuple, not one tensor; let load"):
        ModelAndInputs.of(configuration(folder, model=f"{folder}/pairs.py"))


def test_heatmaps_by_name():
    assert isinstance(heatmap_named("ExcitationMaps"), ExcitationMaps) and heatmap_named("DeepLift") is DeepLift
    with pytest.raises(ValueError, match=r"heatmap 'DeepLIFT' does not exist; .*near names: DeepLift, "):
        heatmap_named("DeepLIFT")
