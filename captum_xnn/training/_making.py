"""Make the explanation networks of a layer, in the layer's shape."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from captum_xnn.activations._activations import Activations
from captum_xnn.activations._batches import Batches
from captum_xnn.layers._read import EveryCall
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._numbers import Form
from captum_xnn.models._srae import ConvSRAE

__all__ = ["MakeForm", "is_exact", "maker", "warn_of_size"]

MakeForm = Callable[..., Form]
"""Makes a form from ``(shape of Z, n_features, n_outputs=...)``."""

# Weights of an explanation network, in all and for each example, above which a fit warns of its size.
_MANY, _MANY_EACH = 20_000_000, 1000


def is_exact(make: MakeForm | None) -> bool:
    """Whether a user's choice of form divides contributions that add up by construction.

    Args:
        make: A class of forms, a partial of it, or a function. None makes groups.

    Example:
        >>> is_exact(None), is_exact(partial(ContributionGroups, patches=4)), is_exact(ConvSRAE)
        (True, True, False)
    """
    form = _class_of(make)
    return form is None or (isinstance(form, type) and issubclass(form, ContributionGroups))


def _class_of(make: MakeForm | None) -> MakeForm | None:
    return make.func if isinstance(make, partial) else make


def maker(make: MakeForm | None, found: Activations, reader: Reader) -> MakeForm:
    """Return the function that makes the forms of a layer. If it has a parameter ``channels``, find and bind its value.

    Args:
        make: A class of forms, a partial of it, or a function. None makes groups of contributions.
        found: Activations of the layer.
        reader: Reader of the layer.

    Raises:
        ValueError: If the layer has channels last, and the form needs them first.
    """
    made = make or ContributionGroups
    bound = isinstance(made, partial) and "channels" in made.keywords
    shape = tuple(found.Z.shape[1:])
    if bound or found.source is None or len(shape) < 2 or isinstance(reader.output_transform, EveryCall):
        return made
    if "channels" in inspect.signature(made).parameters:
        return partial(made, channels=_channels(found, reader))
    if _class_of(made) is ConvSRAE and _channels(found, reader) != 1:
        raise ValueError(
            f"layer {found.layer!r} gives {shape} values per example with channels last, and ConvSRAE takes "
            "(channels, H, W); pass output_transform=lambda output: output.movedim(-1, 1), or autoencoder=SRAE"
        )
    return made


def _channels(found: Activations, reader: Reader) -> int:
    """Find the dimension of Z that holds channels, from the first batch of the data."""
    assert found.source is not None
    first = Batches(found.source.data, 2, found.source.unpack).first()
    assert first is not None  # as activations were collected from it
    inputs, additional = first.on(reader.device)
    return reader.channels((*inputs, *additional))


def warn_of_size(make: Callable[[], nn.Module], found: Activations) -> None:
    """Warn of a network with far more weights than examples can teach, before it takes the memory.

    Args:
        make: Makes the network.
        found: Activations that it will learn from.
    """
    shape, examples = tuple(found.Z.shape[1:]), len(found.Z)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            weights = sum(p.numel() for p in make().parameters())
    except Exception:
        return  # a form of the user's own, which may want real numbers
    if weights <= max(_MANY, _MANY_EACH * examples):
        return
    warnings.warn(
        f"the explanation network of layer {found.layer!r} has {weights / 1e6:.0f} million weights for {examples} "
        f"examples, about {16 * weights / 1e9:.1f} GB while it learns, as Z has {shape} numbers per example; leave "
        "autoencoder= out (groups of contributions weigh channels only), read one token or the mean, as in "
        "output_transform=lambda output: output[:, 0], or pass autoencoder=ConvSRAE for feature maps",
        stacklevel=levels_up(),
    )
