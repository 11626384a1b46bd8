"""Reader: reads one layer of a model together with the model's outputs, and makes the rest of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._outputs import checked
from captum_xnn.layers._prefix import Prefix
from captum_xnn.layers._read import OutputTransform, read_layer
from captum_xnn.layers._tail import Tail

__all__ = ["Reader"]


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
