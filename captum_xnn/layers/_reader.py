"""Reader: reads one layer of a model together with the model's outputs, and makes the rest of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers._arguments import copied
from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._outputs import checked
from captum_xnn.layers._prefix import Prefix
from captum_xnn.layers._probe import refuse_whole_arguments
from captum_xnn.layers._read import OutputTransform, read_layer
from captum_xnn.layers._state import untouched
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._targets import Target, select

__all__ = ["Reader"]

_FEW = 2
"""Number of examples that show the shape of the model's outputs. Some models squeeze the output of a single one."""


@dataclass(frozen=True)
class Reader:
    """Reads one layer of a model, and the model's outputs.

    Call :meth:`run` and :meth:`read` within :func:`captum_xnn.layers._state.untouched`.

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

    def refuse_targets(
        self, targets: Iterable[Target], inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None
    ) -> None:
        """Raise for a target out of range, from the shape of the outputs of two examples.

        Args:
            targets: The explained outputs.
            inputs: Tensors (N, ...).
            additional: Further arguments of the model.

        Raises:
            ValueError: If the model has no such output.
        """
        with torch.inference_mode(False), torch.no_grad(), untouched(self.model):
            some, more = rows_of(inputs, additional, torch.arange(len(inputs[0]), device="cpu")[:_FEW])
            _, y_hat = self.read((*some, *(more or ())))
        for target in targets:
            select(y_hat, target)

    def refuse_whole(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None) -> None:
        """Raise if an additional argument has as many rows as there are examples, but belongs to the whole batch.

        Args:
            inputs: Tensors (N, ...).
            additional: Further arguments of the model.

        Raises:
            ValueError: As :func:`captum_xnn.layers._probe.refuse_whole_arguments`.
        """

        def read(x: tuple[Any, ...], more: tuple[Any, ...]) -> tuple[Tensor, Any]:
            copies, others = copied(x, more)
            with untouched(self.model):
                return self.run((*copies, *(others or ())))

        with torch.inference_mode(False), torch.no_grad():
            refuse_whole_arguments(read, inputs, additional or ())

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
