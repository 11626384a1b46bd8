"""Fixtures for all tests: fixed random numbers, torchvision, and the real birds where they are."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

# The models here are tiny: a second thread costs more than it does.
torch.set_num_threads(1)


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
