"""Read the outputs of a model, alone or together with one of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._prefix import Prefix
from captum_xnn.layers._read import OutputTransform, read_layer
from captum_xnn.layers._state import untouched
from captum_xnn.layers._tail import Tail

__all__ = ["Reader", "checked", "one_tensor", "outputs_of", "run_model"]


@dataclass(frozen=True)
class Reader:
    """Reads one layer of a model, and the model's outputs.

    Call it within :func:`captum_xnn.layers._state.untouched`.

    Example:
        >>> reader = Reader.of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), "0")
        >>> Z, y_hat = reader.read((torch.ones(5, 2),))
        >>> Z.shape, y_hat.shape
        (torch.Size([5, 3]), torch.Size([5, 1]))
    """

    model: nn.Module
    """A plain module."""
    name: str
    """Dotted name of the layer."""
    layer: nn.Module
    output_transform: OutputTransform | None = None
    """Turns the layer's raw output into one tensor (N, ...)."""
    prediction_transform: OutputTransform | None = None
    """Turns the model's raw output into one tensor (N, ...)."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layer: str | nn.Module,
        output_transform: OutputTransform | None = None,
        prediction_transform: OutputTransform | None = None,
    ) -> Reader:
        """Make a reader of a user's model.

        Args:
            model: The model; wrappers such as DataParallel are removed.
            layer: The layer, by dotted name or as a module.
            output_transform: Turns the layer's raw output into one tensor (N, ...).
            prediction_transform: Turns the model's raw output into one tensor (N, ...).

        Raises:
            LayerNotFoundError: If the model has no such layer.
            TypeError: If the model is not a module, or is scripted.
        """
        plain = unwrap(model)
        return cls(plain, *find_layer(plain, layer), output_transform, prediction_transform)

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def run(self, arguments: tuple[Any, ...]) -> tuple[Tensor, Any]:
        """Run the model; return the outputs of layer and model, unchecked.

        Args:
            arguments: All positional arguments of the model. The model may change them in place.
        """
        Z, output = read_layer(
            self.model, self.layer, arguments, name=self.name, output_transform=self.output_transform
        )
        return Z, output if self.prediction_transform is None else self.prediction_transform(output)

    def read(self, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Run the model; return the outputs of layer and model, (N, ...) each.

        Args:
            arguments: All positional arguments of the model. The model may change them in place.

        Raises:
            TypeError: If the model's output is no tensor.
            ValueError: If rows do not match, or anything is NaN or infinite.
        """
        return checked(*self.run(arguments), self.name)

    def tail(self, prefix: Prefix | None = None) -> Tail:
        """Make the rest of the model.

        Args:
            prefix: Outputs of the modules up to the layer for the one example that the tail is called with.

        Raises:
            ValueError: If ``output_transform`` joins all calls of the layer; contributions need a single call.
        """
        return Tail(
            self.model,
            self.layer,
            output_transform=self.output_transform,
            prediction_transform=self.prediction_transform,
            prefix=prefix,
        )


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
    fix = fix or (
        "pass prediction_transform=, a function that picks the logits, such as `lambda output: output['logits']`"
    )
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
            f"layer {name!r} gives {len(Z)} rows and the model gives {rows} rows for the same examples; where the "
            "layer's examples do not come first, reshape its output in output_transform=, and where it sees some of "
            "the examples only, as an expert behind a router, choose a layer behind it"
        )
    for what, values in ((f"layer {name!r}", Z), ("the model", y_hat)):
        if values.is_complex():
            raise TypeError(
                f"the output of {what} has complex numbers, {values.dtype}, and explanations are of real ones; choose "
                "a layer with real numbers, or turn the model's output into some by prediction_transform=, such as "
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
