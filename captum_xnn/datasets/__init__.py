"""Data sets to explain models on: public ones, each with the conventions of its official layout, and drawn figures."""

from captum_xnn.datasets._cub import CUB200
from captum_xnn.datasets._digits import load_digits, load_mnist
from captum_xnn.datasets._figures import Figures
from captum_xnn.datasets._funnybirds import FunnyBirds
from captum_xnn.datasets._places import ADE20KScenes, Places365

__all__ = ["CUB200", "ADE20KScenes", "Figures", "FunnyBirds", "Places365", "load_digits", "load_mnist"]
