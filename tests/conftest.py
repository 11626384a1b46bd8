"""Fixtures for all tests: fixed random numbers, torchvision, and the real birds where they are."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

# The models here are tiny: a second thread costs more than it does, unless asked for.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def torchvision():
    """The package, also where it was built for CUDA and torch was not: it imports if two operators are declared."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    library = None
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield importlib.import_module("torchvision")
    del library


@pytest.fixture(scope="session")
def birds():
    """The folder with cub_200_2011_even/ and cubnet/."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CAPTUM_XNN_BIRDS", beside))
    if not (folder / "cubnet").is_dir():
        pytest.skip("the real birds are not here; set CAPTUM_XNN_BIRDS to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def explained():
    """A small network of three classes with explainers of two of them, 90 images of which it is right, and target 1."""
    from captum.attr import InputXGradient

    from captum_xnn import Recipe, XNNAttribution
    from captum_xnn.models._srae import by_shape

    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(90) % 3
    images = 0.3 * torch.rand(90, 3, 24, 24, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        # Each class has a bar of its own, in one of its colours; class 2 has that of class 1 as well, paler.
        image[label, 4 + 6 * label : 8 + 6 * label, 3:21] += 0.6
        if label == 2:
            image[1, 10:14, 3:21] += 0.25
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = [torch.nn.Conv2d(3, 6, 5, stride=3), torch.nn.ReLU(), torch.nn.Flatten()]
        model = torch.nn.Sequential(*layers, torch.nn.Linear(6 * 49, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        optimiser = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(60):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    model.eval().requires_grad_(False)
    assert torch.equal(model(images).argmax(1), labels)
    xnn = XNNAttribution(
        model, "4", n_features=3, autoencoder=by_shape, heatmap=InputXGradient, recipe=Recipe(steps=100)
    )
    return xnn.fit(images, target=[1, 2], progress=False), images, 1


@pytest.fixture(scope="session")
def only_output():
    """An explainer of a small network with one output of about a thousandth, of two x-features, and 30 images."""
    from captum.attr import InputXGradient

    from captum_xnn import Recipe, XNNAttribution
    from captum_xnn.models._srae import by_shape

    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # all four channels are alive
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 1)
        )
        with torch.no_grad():
            model[3].weight.mul_(1e-2)
            model[3].bias.zero_()
    model.eval().requires_grad_(False)
    xnn = XNNAttribution(
        model, "1", n_features=2, autoencoder=by_shape, heatmap=InputXGradient, recipe=Recipe(steps=100)
    )
    return xnn.fit(images, progress=False), images
