"""Data sets to explain models on, each with the conventions of its official layout."""

from captum_xnn.datasets._cub import CUB200
from captum_xnn.datasets._digits import Digits, load_digits, load_mnist
from captum_xnn.datasets._funnybirds import FunnyBirds
from captum_xnn.datasets._parts import PartsSample, collate
from captum_xnn.datasets._places import ADE20KScenes, Places365
from captum_xnn.datasets._synthetic import LOOKS, PARTS, Figures, draw_figures, reason_parts
from captum_xnn.datasets._synthetic_models import exact_network, trained_network

__all__ = [
    "CUB200",
    "LOOKS",
    "PARTS",
    "ADE20KScenes",
    "Digits",
    "Figures",
    "FunnyBirds",
    "PartsSample",
    "Places365",
    "collate",
    "draw_figures",
    "exact_network",
    "load_digits",
    "load_mnist",
    "reason_parts",
    "trained_network",
]
