"""Fixtures for all tests: fixed random numbers, and the real birds where they are."""

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
def birds():
    """The folder with cub_200_2011_even/ and cubnet/."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CAPTUM_XNN_BIRDS", beside))
    if not (folder / "cubnet").is_dir():
        pytest.skip("the real birds are not here; set CAPTUM_XNN_BIRDS to the folder that holds them")
    return folder
