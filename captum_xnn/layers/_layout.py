"""Find out how a layer's output is laid out: which dimension holds channels, which token belongs to which cell.

The shape alone is ambiguous: (N, 8, 8, 64) may be eight channels or eight rows, and 55 tokens may be 6 x 9 cells and a
class token, or 5 x 11 cells. So the functions here test the model. They change one channel, or one cell, in the output
of an earlier module with a known layout, and look for the change in the layer's output.

Conventions:
    N examples, T tokens, D dimensions of a token, cells (h, w) of an image.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.layers._grid import Cells, has_channels_last
from captum_xnn.layers._lookup import hookable
from captum_xnn.layers._pixels import first_image, image_channels, repeated
from captum_xnn.layers._read import EveryCall, OutputTransform, not_reached, read_layer
from captum_xnn.layers._state import eager, untouched

__all__ = ["channel_dimension", "refuse_examples_second", "token_cells"]

# Most earlier modules to try, from the last one back.
_ATTEMPTS = 8
# Most tensors behind a module to try as its tokens: (N, D, T) may look like (N, T, D).
_TOKENS = 3

# Modules with channels in dimension 1, and the dimensions of their output.
_FIRST = {
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d), 3),
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), 3),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d), 4),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), 4),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.InstanceNorm3d), 5),
}
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)


class _Call(NamedTuple):
    """One call of a module in a forward pass."""

    module: nn.Module
    number: int
    """0 for the module's first call."""


def channel_dimension(
    model: nn.Module,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    *,
    name: str = "layer",
    output_transform: OutputTransform | None = None,
) -> int:
    """Find the dimension of a layer's output that holds channels, counted with the examples as 0.

    The function changes one channel in the output of the last module with a known channel dimension (convolution,
    linear layer, norm, ...). The change should stay in one channel of the layer's output, and spread over several
    places. Otherwise the function tries earlier modules.

    If no module decides, the shape does. With three dimensions per example, the last one holds channels if the first
    two have the image's ratio; else the first one does. With two dimensions per example, the last one holds channels,
    unless a 1-D convolution, pooling or batch norm runs after all modules with channels last.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model; the first example is used.
        name: Name of the layer in errors.
        output_transform: Turns the layer's raw output into one tensor (N, ...).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(2))
        >>> image = torch.rand(1, 3, 32, 32)
        >>> channel_dimension(model, model[1], (image,)), channel_dimension(model, model[2], (image,))
        (1, 1)
        >>> class Last(nn.Module):
        ...     def forward(self, maps):
        ...         return maps.permute(0, 2, 3, 1)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Last())  # (N, 8, 8, 8)
        >>> channel_dimension(model, model[1], (image,))
        3
    """
    with torch.inference_mode(False), untouched(model), torch.no_grad():
        run = _run(model, layer, repeated(inputs, 1), name, output_transform)
        shape = run.Z.shape
        if len(shape) < 3:
            return 1
        tried = isinstance(inputs[0], Tensor) and not isinstance(output_transform, EveryCall)
        for call, dimension in run.calls_with_channels[::-1][:_ATTEMPTS] if tried else ():
            found = _channels_by_change(model, layer, repeated(inputs, 3), call, dimension, output_transform)
            if found is not None:
                return found
    if output_transform is not None:
        return 2 if len(shape) == 3 else 1
    return _channels_by_shape(model, run, inputs)


class _Run(NamedTuple):
    """The layer's output in one forward pass, and the earlier calls that show where channels are."""

    Z: Tensor
    calls_with_channels: list[tuple[_Call, int]]
    """Calls of modules whose output has channels in a known dimension, and that dimension."""


def _run(
    model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], name: str, output_transform: OutputTransform | None
) -> _Run:
    """Run the model; return the layer's output and the earlier modules with channels in a known dimension."""
    calls: list[tuple[_Call, int]] = []
    ends = [0]
    count = _CallNumbers()

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        first = _first_tensor(output)
        dimension = None if first is None else _channels_of(module, first)
        number = count(module)
        if dimension is not None and number >= 0:
            calls.append((_Call(module, number), dimension))

    handles = [m.register_forward_hook(note) for m in hookable(model, layer)]
    handles.append(layer.register_forward_hook(lambda *_: ends.append(len(calls))))
    try:
        Z, _ = read_layer(model, layer, inputs, name=name, output_transform=output_transform)
    finally:
        for handle in handles:
            handle.remove()
    return _Run(Z, calls[: ends[-1]])


class _CallNumbers:
    """Numbers the calls of each module in the thread that made the object. Calls in other threads get -1."""

    def __init__(self) -> None:
        self.seen: dict[nn.Module, int] = {}
        self.thread = threading.get_ident()

    def __call__(self, module: nn.Module) -> int:
        if threading.get_ident() != self.thread:
            return -1
        self.seen[module] = self.seen.get(module, -1) + 1
        return self.seen[module]


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _channels_of(module: nn.Module, output: Tensor) -> int | None:
    """Return the dimension of a module's output that holds its channels; None for modules of an unknown kind."""
    for kind, dimensions in _FIRST.items():
        if isinstance(module, kind):
            return 1 if output.dim() == dimensions else None
    if isinstance(module, nn.GroupNorm):
        return 1
    if isinstance(module, nn.LayerNorm) and type(module).forward is not nn.LayerNorm.forward:
        return 1 if output.dim() == 4 else None  # LayerNorm2d of several libraries: channels first
    return output.dim() - 1 if isinstance(module, _LAST) and output.dim() > 1 else None


def _channels_by_change(
    model: nn.Module,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    call: _Call,
    dimension: int,
    output_transform: OutputTransform | None,
) -> int | None:
    """Change one channel; find the dimension of the layer's output in which the change stays at one index, or None.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: Three times the same example.
        call: The call whose output is changed, up in the second row and down in the third, as a ReLU passes one sign.
        dimension: Dimension of the channels in that output.
        output_transform: Transform of the layer's output.
    """

    def change(output: Tensor) -> Tensor:
        step = _large_step(output)
        channel = output.select(dimension, output.shape[dimension] // 2)  # a view
        channel[1] += step
        channel[2] -= step
        return output

    try:
        with _ChangedOutput(call, change):
            Z, _ = read_layer(model, layer, inputs, output_transform=output_transform)
    except Exception:
        return None  # the model's own code may fail on the change
    if len(Z) != 3:
        return None
    moved = _moved(Z[1:], Z[:1]).any(0)
    indices = moved.nonzero()
    if not len(indices):
        return None
    confined = [i for i in range(moved.dim()) if bool((indices[:, i] == indices[0, i]).all())]
    of_several = [i for i in confined if moved.shape[i] > 1]
    found = of_several or confined
    return found[0] + 1 if len(found) == 1 else None


class _ChangedOutput:
    """A context in which one call of a module returns a changed output.

    Args:
        call: The call.
        change: Gets a copy of the first tensor that the module returns, and returns the tensor to take its place.
    """

    def __init__(self, call: _Call, change: Callable[[Tensor], Tensor]) -> None:
        self.call, self.change, self.call_number = call, change, _CallNumbers()

    def __enter__(self) -> None:
        self.handle = self.call.module.register_forward_hook(self._replace)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _replace(self, module: nn.Module, _inputs: Any, output: Any) -> Any:
        if self.call_number(module) != self.call.number:
            return None
        first = _first_tensor(output)
        assert first is not None
        changed = self.change(first.clone())
        if isinstance(output, Tensor):
            return changed
        rest = [changed, *output[1:]]
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def _large_step(output: Tensor) -> Tensor:
    """Compute a step that is large beside the values of a tensor."""
    return 1 + 3 * output.float().abs().amax().to(output.dtype)


def _moved(Z: Tensor, before: Tensor) -> Tensor:
    """Mark where rows differ from another row by more than rounding, (N, ...)."""
    off = (Z.double() - before.double()).abs().nan_to_num(nan=torch.inf)
    rounding = 1e-2 if Z.dtype in (torch.float16, torch.bfloat16) else 1e-5
    most = float(off[off.isfinite()].max()) if bool(off.isfinite().any()) else 0.0
    return off > rounding * most


def _channels_by_shape(model: nn.Module, run: _Run, inputs: tuple[Any, ...]) -> int:
    """Choose the dimension with channels by the shape of a layer's output and by the modules that ran before it."""
    shape = run.Z.shape
    if len(shape) == 4:
        at = first_image(inputs)
        image = None if at is None else inputs[at].movedim(image_channels(model, inputs), 1)
        return 3 if has_channels_last(shape, image) else 1
    if len(shape) != 3:
        return 1
    first = tuple(kind for kind, dimensions in _FIRST.items() if dimensions == 3)
    modules = [call.module for call, _ in run.calls_with_channels if isinstance(call.module, (*first, *_LAST))]
    return 1 if modules and isinstance(modules[-1], first) else 2


def refuse_examples_second(Z: Tensor, examples: int, name: str) -> None:
    """Raise where a layer's output does not have one row per example.

    Args:
        Z: The layer's output on some examples.
        examples: Number of examples.
        name: Name of the layer.

    Example:
        >>> refuse_examples_second(torch.zeros(5, 1, 8), 1, "encoder")
        Traceback (most recent call last):
        ...
        ValueError: layer 'encoder' gives shape (5, 1, 8) for 1 example, so its examples do not come first; choose a
        layer with a row for each example, such as one after the transpose
    """
    if not Z.dim() or len(Z) != examples:
        raise ValueError(
            f"layer {name!r} gives shape {tuple(Z.shape)} for {examples} example{'s' * (examples != 1)}, so its "
            "examples do not come first; choose a layer with a row for each example, such as one after the transpose"
        )


class _CellsOrTokens(NamedTuple):
    """Cells of an image, or tokens, in a forward pass."""

    call: _Call
    shape: tuple[int, ...]
    """(height, width) of cells, or (T,) of tokens."""
    argument: int | None = None
    """Index of the module's argument that holds the tokens; None if the module returns them."""


def token_cells(model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], *, name: str = "layer") -> Cells | None:
    """Find which of a layer's tokens (N, T, D) belongs to which cell of the image; None if the model does not show it.

    The cells are the output of a convolution (or ``nn.Unfold``) before the layer, usually the patch embedding. The
    function numbers the cells, and runs a batch with one row for each binary digit of these numbers. In each row it
    changes the cells whose number has this digit. The rows in which a token changes spell the number of its cell.
    Tokens that never change are class and register tokens.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model; the first example is used.
        name: Name of the layer in errors.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer.
        ValueError: If the layer's output is not (N, T, D).

    Example:
        >>> class Tokens(nn.Module):
        ...     def forward(self, cells):
        ...         return torch.cat([torch.zeros(len(cells), 1, 4), cells.flatten(2).mT], 1)
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), Tokens(), nn.LayerNorm(4))
        >>> cells = token_cells(model, model[2], (torch.rand(1, 3, 16, 24),))
        >>> cells.height, cells.width, cells.tokens
        (2, 3, tensor([1, 2, 3, 4, 5, 6]))
    """
    with torch.inference_mode(False), untouched(model), torch.no_grad():
        Z, layouts = _cells_and_tokens(model, layer, repeated(inputs, 1), name)
        if Z.dim() != 3:
            raise ValueError(
                f"layer {name!r} gives shape {tuple(Z.shape)}, but tokens are (N, T, D); name another layer"
            )
        refuse_examples_second(Z, 1, name)
        T = Z.shape[1]
        attempts = 0
        for i in reversed(range(len(layouts))):
            source = layouts[i]
            if len(source.shape) != 2 or source.shape[0] * source.shape[1] > T:
                continue
            behind = [layout for layout in layouts[i + 1 :] if layout.shape == (T,)]
            for tokens in behind[:_TOKENS]:
                positions = _positions_of_cells(model, inputs, source, tokens)
                if positions is not None:
                    return Cells(*source.shape, positions)
            attempts += bool(behind)
            if attempts == _ATTEMPTS:
                break
    return None


def _cells_and_tokens(
    model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], name: str
) -> tuple[Tensor, list[_CellsOrTokens]]:
    """Run one example; return the layer's output, and the cells and tokens up to it in the order of the pass."""
    layouts: list[_CellsOrTokens] = []
    ends: list[tuple[int, Any]] = []
    entered, left = _CallNumbers(), _CallNumbers()

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        call = _Call(module, entered(module))
        layouts.extend(_CellsOrTokens(call, (a.shape[1],), i) for i, a in enumerate(arguments) if _are_tokens(a))

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        call = _Call(module, left(module))
        first = _first_tensor(output)
        cells = None if first is None else _cells_of(module, first, arguments)
        if cells is not None:
            layouts.append(_CellsOrTokens(call, cells))
        if _are_tokens(first):
            assert first is not None
            layouts.append(_CellsOrTokens(call, (first.shape[1],)))

    modules = hookable(model, layer)
    handles = [m.register_forward_pre_hook(enter) for m in modules]
    handles += [m.register_forward_hook(leave) for m in modules]
    handles.append(layer.register_forward_hook(lambda _m, _i, output: ends.append((len(layouts), output))))
    try:
        with eager():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not ends:
        raise not_reached(model, name)
    count, output = ends[-1]
    Z = _first_tensor(output)
    if Z is None:
        raise ValueError(
            f"layer {name!r} gives a {type(output).__name__}, but tokens are one tensor; name another layer"
        )
    return Z, layouts[:count]


def _are_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and len(value) == 1 and value.is_floating_point()


def _cells_of(module: nn.Module, output: Tensor, arguments: tuple[Any, ...]) -> tuple[int, int] | None:
    """Return the height and width of a module's cells; None if its output has no cells."""
    if isinstance(module, nn.Unfold) and arguments and isinstance(arguments[0], Tensor):
        return _unfolded(module, arguments[0])
    if output.dim() != 4 or _channels_of(module, output) != 1 or output.shape[2] * output.shape[3] < 2:
        return None
    return output.shape[2], output.shape[3]


def _unfolded(module: nn.Unfold, image: Tensor) -> tuple[int, int]:
    """Compute the height and width of the grid of patches that nn.Unfold cuts out."""

    def along(i: int) -> int:
        kernel, dilation, padding, stride = (
            value if isinstance(value, int) else value[i]
            for value in (module.kernel_size, module.dilation, module.padding, module.stride)
        )
        return int((image.shape[2 + i] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)

    return along(0), along(1)


def _positions_of_cells(
    model: nn.Module, inputs: tuple[Any, ...], source: _CellsOrTokens, tokens: _CellsOrTokens
) -> Tensor | None:
    """Find the position of the token that changes with each cell, (h * w,); None unless each cell has exactly one.

    Cells are numbered from 1. Row 0 of a batch is unchanged. Row b + 1 changes the cells whose number has binary digit
    b set. The rows in which a token changes are therefore the digits of its cell's number.
    """
    count = source.shape[0] * source.shape[1]
    digits = count.bit_length()
    numbers = torch.arange(1, count + 1, device="cpu")
    masks = (numbers >> torch.arange(digits, device="cpu")[:, None] & 1).bool()  # (digits, h * w)
    values = _tokens_of_changed_cells(model, inputs, source, tokens, masks)
    if values is None or len(values) != digits + 1:
        return None
    moved = _moved(values[1:], values[:1]).any(2).cpu()  # (digits, T)
    cell_numbers = (moved.long() << torch.arange(digits, device="cpu")[:, None]).sum(0)
    positions = (cell_numbers > 0).nonzero()[:, 0]
    if len(positions) != count or not torch.equal(cell_numbers[positions].sort().values, numbers):
        return None
    return positions[cell_numbers[positions].argsort()]


def _tokens_of_changed_cells(
    model: nn.Module, inputs: tuple[Any, ...], source: _CellsOrTokens, tokens: _CellsOrTokens, masks: Tensor
) -> Tensor | None:
    """Run the model with cells changed, and return the tokens, (R, T, D); None if the model fails before them.

    Args:
        model: A plain module.
        inputs: Arguments of one example.
        source: The call that gives the cells.
        tokens: The call that takes or gives the tokens.
        masks: The cells to change in each row of the batch after the first, boolean (R - 1, h * w).
    """
    seen: list[Tensor] = []
    call_number = _CallNumbers()

    def change(output: Tensor) -> Tensor:
        cells = output.flatten(2)  # (R, D, h * w), also of nn.Unfold
        noise = torch.randn(
            cells.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
        )
        noise = noise.to(cells) * _large_step(cells)
        for b, mask in enumerate(masks):
            cells[b + 1] += noise[:, None] * mask.to(cells.device)
        return cells.reshape(output.shape)

    def note(module: nn.Module, arguments: Any, output: Any = None) -> None:
        if call_number(module) == tokens.call.number:
            found = _first_tensor(output) if tokens.argument is None else arguments[tokens.argument]
            assert found is not None
            seen.append(found.clone())

    with _ChangedOutput(source.call, change):
        module = tokens.call.module
        handle = (
            module.register_forward_hook(note) if tokens.argument is None else module.register_forward_pre_hook(note)
        )
        try:
            with eager():
                model(*repeated(inputs, len(masks) + 1))
        except Exception:
            if not seen:
                return None  # the model's own code may fail on the change
        finally:
            handle.remove()
    return seen[0] if seen else None
