r"""Randomisation checks: maps that stay the same under random weights do not explain the trained weights.

Redraw weights of the model, or of the explanation network (``xnn.explainer(target).form``), and compare the maps:

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> for layers in top_down(model):  # cascading: the last layer, the last two, ..., all
    ...     with randomised(model, seed=0, layers=layers):
    ...         print(layers)  # explain again here, and compare by similarity
    ('2',)
    ('2', '0')

Conventions:
    N images, K x-features, maps of H x W pixels. Similarities are in [-1, 1]. A similarity of 1 means that the map did
    not change; that speaks against the explanation.

Reference:
    Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim, "Sanity Checks for Saliency Maps", 2018.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from captum_xnn.layers._lookup import find_layer

__all__ = ["Similarity", "randomised", "similarity", "top_down"]

_Array = np.ndarray[Any, np.dtype[Any]]


class Similarity(NamedTuple):
    """Similarity of maps by two measures, each (N, K), in [-1, 1], float64."""

    spearman: Tensor
    """Rank correlation of the pixels."""
    ssim: Tensor
    """Structural similarity."""


def similarity(maps_a: Tensor, maps_b: Tensor) -> Similarity:
    """Compare maps pair by pair, independent of their scales.

    The structural similarity divides each map by its largest absolute value. Windows have 7 x 7 pixels, and are smaller
    on smaller maps. The data range is that of the pair. Two constant maps have rank correlation 1, because nothing
    changed; a constant map and any other have 0. If signs should not count, pass absolute values. The structural
    similarity is made for maps of one sign, and can be high for a map and its negative.

    Args:
        maps_a: (N, K, H, W), finite, at least 3 x 3 pixels.
        maps_b: Maps of the same shape.

    Raises:
        ValueError: If shapes differ, maps are smaller than 3 x 3 or not finite.

    Example:
        >>> maps = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> found = similarity(maps, 5 * maps)
        >>> round(float(found.spearman), 6), round(float(found.ssim), 6)
        (1.0, 1.0)

    Reference:
        Adebayo et al., 2018, section 3.
    """
    if maps_a.dim() != 4 or maps_a.shape != maps_b.shape or min(maps_a.shape[2:]) < 3:
        raise ValueError(
            f"maps are {tuple(maps_a.shape)} and {tuple(maps_b.shape)}; pass two of one shape (N, K, H, W), at least 3 "
            "x 3 pixels, and sum maps (N, K, C, H, W) over their channels with maps.sum(2)"
        )
    if not bool(maps_a.isfinite().all() and maps_b.isfinite().all()):
        raise ValueError("maps are NaN or infinite; redrawn weights may have overflowed: try another seed")
    a, b = (maps.detach().double().cpu().flatten(0, 1).numpy() for maps in (maps_a, maps_b))
    measured = ([measure(x, y) for x, y in zip(a, b, strict=True)] for measure in (_rank_correlation, _ssim))
    shape = maps_a.shape[:2]
    return Similarity(*(torch.tensor(m, dtype=torch.float64, device=maps_a.device).reshape(shape) for m in measured))


def _rank_correlation(a: _Array, b: _Array) -> float:
    from scipy.stats import rankdata

    ranks = [rankdata(x.ravel()) for x in (a, b)]
    x, y = (r - r.mean() for r in ranks)
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else float(not x.any() and not y.any())


def _ssim(a: _Array, b: _Array) -> float:
    from skimage import metrics

    a, b = (x / (np.abs(x).max() or 1.0) for x in (a, b))
    span = max(a.max(), b.max()) - min(a.min(), b.min())
    if span == 0:
        return 1.0
    shortest = min(a.shape)
    window = min(7, shortest - 1 + shortest % 2)  # odd
    measure: Any = metrics.structural_similarity
    return float(measure(a, b, win_size=window, data_range=span))


def top_down(module: nn.Module) -> list[tuple[str, ...]]:
    """List the cascade of layers to redraw: the last layer with parameters, the last two, and so on to all.

    Layers count in the order in which the module registered them. In most models that is the order of execution.

    Args:
        module: The model or the explanation network.

    Raises:
        ValueError: If the module has no parameters.

    Example:
        >>> top_down(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
        [('2',), ('2', '0')]

    Reference:
        Adebayo et al., 2018, section 4.1.
    """
    names = [name for name, part in module.named_modules() if _own(part)][::-1]
    if not names:
        raise ValueError(
            f"there is nothing to redraw in a {type(module).__name__} without parameters; pass a module that has some"
        )
    return [tuple(names[: count + 1]) for count in range(len(names))]


@contextmanager
def randomised(module: nn.Module, *, seed: int, layers: Sequence[str | nn.Module] | None = None) -> Iterator[nn.Module]:
    """Redraw a module's parameters inside a ``with`` block, and restore them bit for bit afterwards.

    A layer with ``reset_parameters`` is initialised by that method, running statistics included. The parameters of
    other layers are drawn from a normal distribution with the mean and standard deviation of each parameter. A
    parameter that is constant, or a single number, keeps its value. One seed gives a layer the same parameters,
    independent of the other chosen layers. Inside the block the module is the same object. An exception restores
    everything as well. The state of torch's random number generators does not change.

    Args:
        module: The model or the explanation network.
        seed: Seeds the new parameters.
        layers: The layers to redraw with all their submodules, as dotted names or modules; all layers if None. A
            cascade redraws the last layer, the last two, and so on.

    Raises:
        LayerNotFoundError: If a layer does not exist.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before = layer.weight.item()
        >>> with randomised(layer, seed=0):
        ...     print(layer.weight.item() == before)
        False
        >>> layer.weight.item() == before
        True

    Reference:
        Adebayo et al., 2018, section 4.
    """
    # The empty name is the module itself. A cascade ends with it if the module has parameters of its own.
    roots = [module] if layers is None else [find_layer(module, x)[1] if x != "" else module for x in layers]
    chosen = {part for root in roots for part in root.modules()}
    saved = [
        (tensors, name, tensor, None if tensor is None else tensor.detach().clone())
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for name, tensor in tensors.items()
    ]
    generator = torch.Generator().manual_seed(seed)
    try:
        for part in module.modules():
            layer_seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
            if part in chosen and _own(part):
                _redraw(part, layer_seed)
        with warnings.catch_warnings():  # an attribution's warning of the change, which is wanted here
            warnings.filterwarnings("ignore", ".* changed after the explainer of target")
            yield module
    finally:
        with torch.no_grad():
            for tensors, name, tensor, value in saved:
                cast(dict[str, Tensor | None], tensors)[name] = tensor
                if tensor is not None and value is not None:
                    tensor.copy_(value)


def _own(part: nn.Module) -> list[Tensor]:
    return list(part.parameters(recurse=False))


def _redraw(part: nn.Module, seed: int) -> None:
    """Redraw the parameters of one module."""
    cuda = sorted({p.get_device() for p in _own(part) if p.device.type == "cuda"})
    with torch.random.fork_rng(cuda), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
            return
        for p in _own(part):
            values = p.double()
            p.copy_(torch.randn_like(values) * values.std(correction=0) + values.mean())
