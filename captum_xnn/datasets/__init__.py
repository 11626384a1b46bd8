"""Data sets to explain models on, each with the conventions of its official layout."""

from captum_xnn.datasets.cub import CUB200
from captum_xnn.datasets.digits import Digits, load_digits, load_mnist
from captum_xnn.datasets.funnybirds import FunnyBirds, FunnyBirdsSample
from captum_xnn.datasets.parts import PartsSample
from captum_xnn.datasets.places import ADE20KScenes, Places365
from captum_xnn.datasets.synthetic import Figures, draw_figures

__all__ = [
    "CUB200",
    "ADE20KScenes",
    "Digits",
    "Figures",
    "FunnyBirds",
    "FunnyBirdsSample",
    "PartsSample",
    "Places365",
    "draw_figures",
    "load_digits",
    "load_mnist",
]
