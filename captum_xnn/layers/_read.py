"""Read the output of one layer in a forward pass.

A forward hook reads it and is registered for one forward pass only. A hook that is registered earlier fires before
Captum's own hook, and makes DeepLift and the guided methods silently wrong at that layer. Running the model past the
layer makes LRP silently wrong. :func:`run_to_layer` therefore leaves the model by a private exception at the layer's
last call. :func:`read_layer` runs the whole model and also returns its output. :func:`read_with_graph` does so where
only the part before the layer is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.errors import LayerNotReachedError
from captum_xnn.layers._hooks import hooked
from captum_xnn.layers._nested import picks
from captum_xnn.layers._state import eager

__all__ = [
    "EveryCall",
    "OutputTransform",
    "UnfitError",
    "WithGraph",
    "naming_inputs",
    "not_reached",
    "read_layer",
    "read_with_graph",
    "run_to_layer",
]

OutputTransform = Callable[[Any], Tensor]


class EveryCall:
    """An ``output_transform`` that explains all calls of a layer in one forward pass, not only the last.

    It is for a layer that runs side by side on several inputs or on parts of one input: the towers of a Siamese
    network, an encoder of frames, a head over pyramid levels. Outputs (N, ...) of one shape become Z of shape
    (N, calls, ...). Outputs of several shapes are flattened and joined.

    Args:
        transform: Turns the raw output of each call into one tensor (N, ...).

    Example:
        >>> EveryCall().joined([torch.zeros(2, 3), torch.ones(2, 3)]).shape
        torch.Size([2, 2, 3])
        >>> EveryCall().joined([torch.zeros(2, 3), torch.ones(2, 4, 4)]).shape
        torch.Size([2, 19])
    """

    def __init__(self, transform: OutputTransform | None = None) -> None:
        self.transform = transform

    def __call__(self, output: Any) -> Tensor:
        """Turn the raw output of one call into a tensor.

        Args:
            output: The layer's raw output.
        """
        made: Tensor = output if self.transform is None else self.transform(output)
        return made

    def joined(self, outputs: Sequence[Any]) -> Tensor:
        """Join the outputs of all calls to Z.

        Args:
            outputs: Raw outputs of the layer, in the order of its calls.
        """
        parts = [_as_tensor(output, "of every call", self) for output in outputs]
        if len({part.shape for part in parts}) == 1:
            return torch.stack(parts, 1)
        return torch.cat([part.flatten(1) for part in parts], 1)


class _LayerReached(BaseException):
    """Carries the layer's output out of the model. Not an Exception, so that no handler in the model swallows it."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _as_tensor(output: Any, name: str, transform: OutputTransform | None) -> Tensor:
    """Turn the layer's raw output into the tensor Z with examples first; raise where it is not such a tensor."""
    Z = output if transform is None else transform(output)
    if not isinstance(Z, Tensor):
        kind = type(Z).__name__
        keys = f" with keys {', '.join(map(str, Z))}" if isinstance(Z, dict) else ""
        raise TypeError(
            f"layer {name!r} returns a {kind}{keys}, not one tensor; pass output_transform=, a function that picks or "
            f"builds the tensor, such as `{picks(Z)}`"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(Z):
        raise ValueError(
            f"layer {name!r} runs within torch.func, such as vmap, which hides the examples from it; choose a layer "
            "outside of the function that torch.func transforms"
        )
    if Z.dim() < 2:
        raise ValueError(
            f"layer {name!r} returns shape {tuple(Z.shape)}, without a row for each example; where the inputs are one "
            "example, add the batch dimension with x[None], else choose another layer or reshape its output in "
            "output_transform="
        )
    return Z


# Errors of torch and Python that say what went wrong, but not in which call. Classes of the user's own stay.
_PLAIN = (RuntimeError, TypeError, ValueError, IndexError)


@contextmanager
def naming_inputs(model: nn.Module, inputs: tuple[Any, ...], plain: Sequence[BaseException] = ()) -> Iterator[None]:
    """Name the inputs in errors that the model's own code raises in this context.

    Args:
        model: A plain module.
        inputs: All positional arguments of the model.
        plain: Errors that name the cause already; they stay as they are.

    Raises:
        Exception: Of the class of the model's error.

    Example:
        >>> with naming_inputs(nn.Linear(3, 1), (torch.zeros(2, 3, dtype=torch.float64),)):
        ...     raise RuntimeError("mat1 and mat2 must have the same dtype")
        Traceback (most recent call last):
        ...
        RuntimeError: Linear fails on inputs float64 (2, 3): mat1 and mat2 must have the same dtype; convert input 0 to
        the dtype of the weights, as in inputs.to(torch.float32)
    """
    try:
        yield
    except _PLAIN as error:
        if type(error) not in _PLAIN or any(error is known for known in plain):
            raise
        given = ", ".join(map(_described, inputs))
        text = " ".join(str(error).split())
        raise type(error)(f"{type(model).__name__} fails on inputs {given}: {text}; {_fix(model, inputs)}") from error


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _fix(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Say what to change in the arguments of a model that fails on them."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    for i, x in enumerate(inputs):
        if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() and x.dtype != dtype:
            return f"convert input {i} to the dtype of the weights, as in inputs.to({dtype})"
    fix = (
        "pass the arguments with which forward runs by itself: a single example as x[None], and all but the inputs as "
        "additional_forward_args"
    )
    if len(inputs) > 1:
        return fix
    return f"{fix}; if forward takes a list of tensors, explain a module whose forward(self, *tensors) makes the list"


def read_layer(
    model: nn.Module,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    *,
    name: str = "layer",
    output_transform: OutputTransform | None = None,
) -> tuple[Tensor, Any]:
    """Run the model once; return a copy of the layer's output Z at its last call, and the model's output.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model.
        name: Name of the layer in errors.
        output_transform: Turns the layer's raw output into one tensor (N, ...). With :class:`EveryCall` Z holds all
            calls.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer.
        TypeError: If the layer's output is not a tensor and there is no output_transform.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))
        >>> read_layer(model, model[0], (torch.tensor([[-1.0, 2.0]]),))
        (tensor([[-1.,  2.]]), tensor([[0., 2.]]))
    """
    seen: list[Tensor] = []
    plain: list[BaseException] = []
    every = isinstance(output_transform, EveryCall)

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        try:
            Z = _as_tensor(output, name, output_transform)
        except Exception as error:
            plain.append(error)
            raise
        # A copy, because the next operation may be in place.
        seen[:] = [*(seen if every else ()), Z.clone()]

    with hooked([layer], keep), eager(), naming_inputs(model, inputs, plain):
        output = model(*inputs)
    if not seen:
        raise not_reached(model, name)
    return (EveryCall().joined(seen) if every else seen[0]), output


class UnfitError(Exception):
    """Ends a pass that does not suffice, because a layer runs twice or returns no tensor."""


class WithGraph(NamedTuple):
    """The results of one forward pass."""

    Z: Tensor
    """The layer's output, (N, ...), with its graph."""
    values: Tensor
    """The same numbers without a graph."""
    output: Any
    """The model's output, without a graph."""


def read_with_graph(model: nn.Module, layer: nn.Module, inputs: tuple[Any, ...], *, name: str = "layer") -> WithGraph:
    """Run the model once; record it as far as the layer, and compute its output without gradients and modes.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model.
        name: Name of the layer in errors.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer.
        UnfitError: If the layer runs twice, or returns no tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> read = read_with_graph(model, model[1], (torch.ones(4, 2),))
        >>> read.Z.requires_grad, read.values.requires_grad, read.output.requires_grad, read.output.shape
        (True, False, False, torch.Size([4, 1]))
    """
    seen: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as behind:

        def cut(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if seen or not isinstance(output, Tensor):
                raise UnfitError
            behind.enter_context(torch.no_grad())
            behind.enter_context(torch._C.DisableTorchFunction())  # also of modes, such as that of excitation backprop
            values = output.detach().clone()
            seen.append((output, values))
            return values.clone()  # the next operation may be in place

        with hooked([layer], cut), eager(), naming_inputs(model, inputs):
            output = model(*inputs)
    if not seen:
        raise not_reached(model, name)
    return WithGraph(*seen[0], output)


def run_to_layer(
    model: nn.Module,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    *,
    calls: int = 1,
    name: str = "layer",
    output_transform: OutputTransform | None = None,
) -> Tensor:
    """Run the model up to the layer; return the layer's output Z with its graph.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model.
        calls: How often the forward pass calls the layer; it ends at the last call. See :func:`trace`.
        name: Name of the layer in errors.
        output_transform: Turns the layer's raw output into one tensor (N, ...).

    Raises:
        LayerNotReachedError: If the forward pass calls the layer fewer than ``calls`` times.

    Example:
        >>> model = nn.Sequential(nn.ReLU(), nn.Linear(3, 1))  # the second layer would fail, and never runs
        >>> run_to_layer(model, model[0], (torch.tensor([[-1.0, 2.0]]),))
        tensor([[0., 2.]])
    """
    count = 0
    every = output_transform if isinstance(output_transform, EveryCall) else None
    earlier: list[Tensor] = []

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal count
        count += 1
        if every is not None:
            earlier.append(_as_tensor(output, name, every).clone())  # the next operation may be in place
        if count == calls:
            raise _LayerReached(output)

    # A copy of leaves: a model may work in place on its inputs, which leaves that take gradients do not allow.
    given = tuple(x.clone() if isinstance(x, Tensor) and x.requires_grad and x.is_leaf else x for x in inputs)
    try:
        with hooked([layer], leave), eager():
            model(*given)
    except _LayerReached as reached:
        return EveryCall().joined(earlier) if every else _as_tensor(reached.output, name, output_transform)
    raise not_reached(model, name)


def not_reached(model: nn.Module, name: str) -> LayerNotReachedError:
    """Make the error for a layer that the forward pass never calls.

    Args:
        model: A plain module.
        name: Name of the layer.
    """
    return LayerNotReachedError(
        f"layer {name!r} never ran in the forward pass of {type(model).__name__}; choose a layer that runs for these "
        "inputs (attention projections, for one, are used as weights and not called)"
    )
