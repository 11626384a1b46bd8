"""Forms of explanation network, each fitted to one class against all others, with their faithfulness and maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn import SRAE
from captum_xnn.autoencoder import Autoencoder
from captum_xnn.baselines import CAE, NMF, NN, SAE, Lasso, RandomDecoder, RandomEncoder, SingleDimensions
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.host import find_layer, trace
from captum_xnn.metrics.faithfulness import f_cls, f_reg
from captum_xnn.metrics.sparsity import effective_number
from captum_xnn.network import ExplanationNetwork
from captum_xnn.training import encode_all, fit

N_FEATURES, DIMENSIONS, SEED = 5, 20, 2021


def some_dimensions(shape: Any, n_features: int, *, n_outputs: int, label: int) -> Autoencoder:
    """Returns dimensions of Z drawn at random, of which the paper takes all."""
    del n_features
    width = math.prod(shape)
    drawn = torch.randperm(width, generator=torch.Generator().manual_seed(SEED + label))[:DIMENSIONS].tolist()
    return SingleDimensions(shape, len(drawn), dimensions=drawn, n_outputs=n_outputs)


METHODS: dict[str, Callable[..., Any] | None] = {
    "SRAE": SRAE,
    "NN": NN,
    "SAE": SAE,
    "Lasso": Lasso,
    "CAE": CAE,
    "Z": some_dimensions,
    "1-Heatmap": None,
    "RandomEncoder": RandomEncoder,
    "RandomDecoder": RandomDecoder,
    "single dimensions": SingleDimensions,
    "NMF": NMF,
}
"""The paper's methods in its order, then what it lacks; a single heatmap is drawn of the output itself."""


def fitted(method: str, Z: Tensor, y_hat: Tensor, label: int, seed: int, *, n: int = N_FEATURES) -> Autoencoder:
    """Returns an explanation network of one class, learned from activations (M, ...) and all outputs (M, classes)."""
    make = METHODS[method]
    assert make is not None
    if method == "Z":
        make = partial(make, label=label)
    xnn: Autoencoder = make(tuple(Z.shape[1:]), n, n_outputs=1)
    fit(xnn, Z, y_hat[:, label : label + 1], positives=y_hat.argmax(1) == label, seed=seed)
    return xnn.requires_grad_(False)


@torch.no_grad()
def faithfulness(xnn: Autoencoder, Z: Tensor, y_hat: Tensor, label: int) -> dict[str, float]:
    """Returns F_reg and F_cls."""
    y_bar = xnn.head(encode_all(xnn, Z))[:, 0]
    return {"f_reg": f_reg(y_bar, y_hat[:, label]), "f_cls": f_cls(y_bar, y_hat, label)}


def effective(contributions: Tensor) -> float:
    """Returns the effective number of x-features with contributions (N, n): of their mean absolute values."""
    return float(effective_number(contributions.abs().mean(0, keepdim=True)))


def excitation_maps(
    xnn: Autoencoder, model: nn.Module, layer: str, images: Tensor, *, maps_layer: str | None = None
) -> Tensor:
    """Returns the maps of all x-features (N, K, H, W) by the default backend."""
    module = find_layer(model, layer)[1]
    network = ExplanationNetwork(model, layer, xnn, trace=trace(model, module, (images[:1],)))
    (maps,) = ExcitationMaps(maps_layer)(network, (images,), range(xnn.n_features), internal_batch_size=20)
    return maps[:, :, 0]
