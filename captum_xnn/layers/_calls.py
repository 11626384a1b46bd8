"""Count how often a layer runs in one forward pass, and test whether its last call suffices."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._read import EveryCall, OutputTransform, not_reached
from captum_xnn.layers._state import devices_of, eager

__all__ = ["calls_of"]


def calls_of(
    model: nn.Module,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    *,
    name: str = "layer",
    output_transform: OutputTransform | None = None,
    prediction_transform: OutputTransform | None = None,
) -> int:
    """Count the calls of a layer in one forward pass; raise where only the last of several would be explained.

    Calls in a row are fine: the earlier calls reach the output through the last one. Calls side by side, as in Siamese
    towers, are not: the last call does not depend on the others. To tell the two apart, the model runs a second time.
    All calls but the last get noise, and the last call returns its output of the first pass.

    Args:
        model: A plain module.
        layer: One of its submodules.
        inputs: All positional arguments of the model; a few examples are enough. They are copied.
        name: Name of the layer in errors.
        output_transform: Transform of the layer's output. With :class:`EveryCall`, any number of calls is fine.
        prediction_transform: Turns the model's raw output into the tensor that is explained.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer.
        ValueError: If the model's output depends on an earlier call other than through the last one.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> calls_of(nn.Sequential(layer, nn.ReLU(), layer), layer, (torch.ones(3, 2),))
        2
    """
    hook = _CallHook()
    handle = layer.register_forward_hook(hook)
    try:
        with torch.no_grad(), eager():
            usual = _outputs(model, inputs, prediction_transform)
            calls = hook.count
            if not calls:
                raise not_reached(model, name)
            if calls == 1 or layer is model or isinstance(output_transform, EveryCall):
                return calls
            hook.disturb_next_pass()
            try:
                disturbed = _outputs(model, inputs, prediction_transform)
            except Exception:
                return calls  # the model's own code may fail on noise, and the test then says nothing
    finally:
        handle.remove()
    if hook.count == calls and not all(map(_is_close, usual, disturbed)):
        raise ValueError(
            f"layer {name!r} runs {calls} times side by side in a forward pass, as in the towers of a Siamese network "
            "or an encoder of frames, and only the last call would be explained; explain all calls with "
            "output_transform=captum_xnn.layers.EveryCall(), or explain a layer that runs once after they are "
            "joined"
        )
    return calls


class _CallHook:
    """Counts the calls of a layer in this thread, and disturbs all but the last one in a second pass."""

    def __init__(self) -> None:
        self.count = 0
        """Calls in the present pass."""
        self.calls: int | None = None
        """Calls in the first pass; None before it has ended."""
        self.last: Any = None
        """A copy of the layer's output at the last call of the first pass."""
        self.thread = threading.get_ident()

    def disturb_next_pass(self) -> None:
        """Add noise to all calls but the last in the next pass; the last returns its output of the first pass."""
        self.calls, self.count = self.count, 0

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if threading.get_ident() != self.thread:
            return None
        self.count += 1
        if self.calls is None:
            self.last = _mapped(torch.clone, output)
            return None
        return self.last if self.count == self.calls else _mapped(_noisy, output)


def _outputs(model: nn.Module, inputs: tuple[Any, ...], prediction_transform: OutputTransform | None) -> list[Tensor]:
    """Run the model on copies of the inputs, with the same random numbers in each run; list the output's tensors."""
    copies = tuple(_mapped(torch.clone, x) for x in inputs)
    with torch.random.fork_rng(devices_of(model.parameters())):
        torch.manual_seed(0)
        output = model(*copies)
    return _tensors(output if prediction_transform is None else prediction_transform(output))


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change all tensors in a nested value; return the new value."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = _mapped(change, item)
        return changed
    if isinstance(value, (tuple, list)):
        items = [_mapped(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _tensors(value: Any) -> list[Tensor]:
    """List all tensors in a nested value."""
    found: list[Tensor] = []
    _mapped(lambda x: found.append(x) or x, value)  # type: ignore[func-returns-value]
    return found


def _noisy(x: Tensor) -> Tensor:
    """Add noise with the standard deviation of the tensor."""
    if not x.is_floating_point() or not x.numel():
        return x.clone()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu").to(x)
    std = x.double().std(correction=0).to(x)
    return x + noise * torch.where(std > 0, std, torch.ones_like(std))


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = 1e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return torch.allclose(a, b, tolerance, tolerance * float(a.abs().amax()) if a.numel() else 0, equal_nan=True)
