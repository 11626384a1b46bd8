"""Run a model, and check its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._nested import picks
from captum_xnn.layers._state import untouched

if TYPE_CHECKING:
    from captum_xnn.layers._read import OutputTransform

__all__ = ["checked", "one_tensor", "outputs_of", "run_model"]


def run_model(model: nn.Module, arguments: tuple[Any, ...], prediction_transform: OutputTransform | None = None) -> Any:
    """Run a model without gradients and leave it as it was; return its output, unchecked.

    Args:
        model: A plain module.
        arguments: All positional arguments of the model. Tensors are copied to the model's device.
        prediction_transform: Turns the model's raw output into one tensor (N, ...).
    """
    device = next((p.device for p in model.parameters()), None)
    copies = [a.to(device or a.device, copy=True) if isinstance(a, Tensor) else a for a in arguments]
    with torch.inference_mode(False), untouched(model), torch.no_grad():
        output = model(*copies)
        return output if prediction_transform is None else prediction_transform(output)


def outputs_of(
    model: nn.Module, arguments: tuple[Any, ...], prediction_transform: OutputTransform | None = None
) -> Tensor:
    """Compute all outputs of a model, (N, ...), without gradients, and leave the model as it was.

    Args:
        model: A plain module.
        arguments: All positional arguments of the model. Tensors are copied to the model's device.
        prediction_transform: Turns the model's raw output into one tensor (N, ...).

    Raises:
        TypeError: If the model's output is no tensor.

    Example:
        >>> outputs_of(nn.Dropout(), (torch.ones(1, 2),), lambda output: 2 * output)
        tensor([[2., 2.]])
    """
    return one_tensor(run_model(model, arguments, prediction_transform))


def one_tensor(output: Any, fix: str | None = None) -> Tensor:
    """Return the output of a model, which should be a tensor.

    Args:
        output: The model's output.
        fix: What to do about another output, for the error; by default pass ``prediction_transform``.

    Raises:
        TypeError: If the output is no tensor.
    """
    if isinstance(output, Tensor):
        return output
    fix = fix or f"pass prediction_transform=, a function that picks the logits, such as `{picks(output)}`"
    raise TypeError(f"the model returns a {type(output).__name__}, not one tensor; {fix}")


def checked(Z: Tensor, y_hat: Any, name: str, first: int = 0) -> tuple[Tensor, Tensor]:
    """Check that both tensors are finite and belong to the same examples; return them unchanged.

    Args:
        Z: Output of the layer, (N, ...).
        y_hat: Output of the model; should be a tensor (N, ...).
        name: Name of the layer in errors.
        first: Index of the first example, for errors.

    Raises:
        TypeError: If the model's output is no tensor, or has complex numbers.
        ValueError: If rows do not match, or anything is NaN or infinite.
    """
    y_hat = one_tensor(y_hat)
    if y_hat.dim() == 0 or len(Z) != len(y_hat):
        rows = len(y_hat) if y_hat.dim() else "no"
        raise ValueError(
            f"layer {name!r} gives {len(Z)} rows and the model gives {rows} rows for the same examples; if examples "
            "are not the layer's first dimension, move them there in output_transform=; if the layer sees only some "
            "examples, as an expert behind a router, choose a layer behind it"
        )
    for what, values in ((f"layer {name!r}", Z), ("the model", y_hat)):
        if values.is_complex():
            raise TypeError(
                f"the output of {what} has complex numbers, {values.dtype}, and only real numbers can be explained; "
                "choose a layer with real numbers, or make the model's output real by prediction_transform=, such as "
                "lambda output: output.abs()"
            )
        bad = ~torch.isfinite(values)[:, None].flatten(1).all(1)
        if bool(bad.any()):
            every = len(values) > 1 and bool(bad.all())
            where = f"in all {len(values)} examples from" if every else "in"
            look = "the weights and the inputs" if every else "this example's inputs"
            raise ValueError(
                f"the output of {what} is NaN or infinite {where} example {first + int(bad.nonzero()[0])}; look for "
                f"NaN in {look}, or run the model in float32 if it overflows in half precision"
            )
    return Z, y_hat
