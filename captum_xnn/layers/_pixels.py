"""Find out how images given to a model are laid out: (N, C, H, W), or channels last as (N, H, W, C).

The shape alone is ambiguous, and only the model knows: it may permute its input before the first convolution. So
:func:`image_channels` changes one slice of the image along each dimension, and looks at the input of the model's first
convolution. A changed channel reaches every row and column there. A changed row of pixels reaches only a few rows.

Conventions:
    N examples; images (N, C, H, W) or (N, H, W, C), volumes and videos with one dimension more.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._state import eager, untouched

__all__ = ["channels_by_size", "channels_first", "first_image", "image_channels", "repeated"]

# Most convolutions whose input is looked at.
_ATTEMPTS = 4
# Numbers of channels that images have, where only the shape tells.
_COLOURS = (1, 3, 4)
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


class _SeenEnough(BaseException):
    """Ends a pass; not an Exception, so that no handler in the model swallows it."""


def first_image(values: tuple[Any, ...]) -> int | None:
    """Find the first image or volume among some arguments, a tensor of four or five dimensions; None without one.

    Args:
        values: Arguments of a model.

    Example:
        >>> first_image((torch.zeros(1, 2), torch.zeros(1, 3, 8, 8)))
        1
    """
    return next((i for i, x in enumerate(values) if isinstance(x, Tensor) and x.dim() in (4, 5)), None)


def channels_by_size(image: Tensor) -> int:
    """Find the dimension of an image that holds channels by its shape alone: the last of (N, 28, 28, 3), else 1.

    Args:
        image: Images or volumes.

    Example:
        >>> channels_by_size(torch.zeros(1, 28, 28, 3)), channels_by_size(torch.zeros(1, 3, 28, 28))
        (3, 1)
    """
    sizes = image.shape[1:]
    return image.dim() - 1 if sizes[-1] in _COLOURS and min(sizes[:-1]) > max(_COLOURS) else 1


def channels_first(maps: Tensor, image: Tensor) -> Tensor:
    """Move the channels of an image's maps to where (N, K, C, H, W) has them; leave all other maps as they are.

    Args:
        maps: Maps (N, K, ...) of images; those of a layer have one channel, in the place where the images have theirs.
        image: The images (N, C, H, W) or (N, H, W, C).

    Example:
        >>> image = torch.zeros(1, 9, 9, 3)
        >>> [channels_first(torch.zeros(1, 2, 9, 9, C), image).shape for C in (1, 3)]
        [torch.Size([1, 2, 1, 9, 9]), torch.Size([1, 2, 3, 9, 9])]
    """
    if maps.dim() != image.dim() + 1 or image.dim() != 4:
        return maps
    of_layer = maps.shape[2:] == (*image.shape[1:3], 1)
    return (
        maps.movedim(-1, 2)
        if of_layer or (maps.shape[2:] == image.shape[1:] and channels_by_size(image) == 3)
        else maps
    )


def image_channels(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Find the dimension of the first image among the inputs that holds channels, counted with the examples as 0.

    If the model has no convolution, or none shows it, the shape decides.

    Args:
        model: A plain module.
        inputs: All positional arguments of the model; the first example is used.

    Example:
        >>> class Last(nn.Module):
        ...     def forward(self, x):
        ...         return x.permute(0, 3, 1, 2)
        >>> image_channels(nn.Sequential(Last(), nn.Conv2d(2, 4, 3)), (torch.rand(1, 9, 9, 2),))
        3
        >>> image_channels(nn.Sequential(nn.Conv2d(9, 4, 1)), (torch.rand(1, 9, 9, 2),))
        1
    """
    at = first_image(inputs)
    if at is None:
        return 1
    found = (
        _channels_by_convolutions(model, inputs, at) if all(isinstance(x, Tensor) for x in inputs[: at + 1]) else None
    )
    return channels_by_size(inputs[at]) if found is None else found


def _channels_by_convolutions(model: nn.Module, inputs: tuple[Any, ...], at: int) -> int | None:
    """Find the dimension of channels by the inputs of the first convolutions; None if they do not tell.

    The first two rows are the example as it is, and in each other row one slice is changed, along each dimension.
    """
    tries, found = 0, None
    thread = threading.get_ident()
    dimensions = range(1, inputs[at].dim())
    given = list(repeated(inputs, len(dimensions) + 2))
    if given[at].dtype != torch.uint8 and not given[at].is_floating_point():
        return None

    def note(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal tries, found
        if threading.get_ident() == thread and arguments and isinstance(arguments[0], Tensor):
            found = _channels_of_convolution_input(arguments[0], inputs[at].dim())
            tries += 1
            if found is not None or tries == _ATTEMPTS:
                raise _SeenEnough

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, _CONVOLUTIONS)]
    try:
        with torch.inference_mode(False), untouched(model), torch.no_grad(), eager():
            for row, d in enumerate(dimensions, 2):
                part = given[at][row].select(d - 1, given[at].shape[d] // 2)  # a view
                part += 128 if part.dtype == torch.uint8 else 1 + 3 * part.float().abs().amax().to(part.dtype)
            if handles:
                model(*given)
    except _SeenEnough:
        pass
    except Exception:
        return None  # the model's own code may fail on the change
    finally:
        for handle in handles:
            handle.remove()
    return found


def _channels_of_convolution_input(X: Tensor, dimensions: int) -> int | None:
    """Find the dimension of an image that holds channels, by the input of a convolution; None if it stays unclear.

    Args:
        X: Input of a convolution, on the rows that :func:`_channels_by_convolutions` describes; an example may have
            several rows, as frames of a video do.
        dimensions: Dimensions of the image.
    """
    rows = dimensions + 1
    if X.dim() not in (4, 5) or len(X) % rows or not X.is_floating_point():
        return None
    off = X.reshape(rows, -1, *X.shape[1:]).double()
    off = (off[1:] - off[:1]).abs().nan_to_num(nan=torch.inf)
    most = off.flatten(1).amax(1)
    if bool(most[0] > 1e-5 * most.amax()) or not bool(most.isfinite().all()):
        return None  # rows are no examples, or examples differ by chance
    # Normalisation over the image changes all pixels a little.
    for least in (1e-5, 0.5):
        moved = off[1:] > least * most[1:].reshape(-1, *[1] * (off.dim() - 1))  # (dimensions, frames, C, H, W)
        wide = [d for d, pixels in enumerate(moved, 1) if _fills(pixels.any(0).any(0))]
        narrow = [d for d in wide if moved.shape[2] > 1 and int(moved[d - 1].any(0).flatten(1).any(1).sum()) == 1]
        for candidates in (wide, narrow):
            if len(candidates) == 1:
                return candidates[0]
    return None


def _fills(pixels: Tensor) -> bool:
    """Whether marked pixels are in at least half of the rows, columns and slices."""
    sides = range(pixels.dim())
    return all(float(pixels.movedim(d, 0).flatten(1).any(1).double().mean()) >= 0.5 for d in sides)


def repeated(inputs: tuple[Any, ...], times: int) -> tuple[Any, ...]:
    """Copy all arguments of a model, with the first example repeated.

    Args:
        inputs: All positional arguments; tensors (N, ...) come first.
        times: Number of rows.

    Example:
        >>> repeated((torch.tensor([[1.0], [2.0]]), "same"), 2)
        (tensor([[1.],
                [1.]]), 'same')
    """
    many = 0
    while many < len(inputs) and isinstance(inputs[many], Tensor):
        many += 1
    if not many:
        return inputs
    x, more = rows_of(inputs[:many], inputs[many:], torch.zeros(times, dtype=torch.long, device="cpu"))
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in (*x, *(more or ())))
