r"""One forward pass of the model with the graph from a layer, or from the inputs, to the model's output.

The pass gives the explained layer's output Z, the model's outputs, and the gradients of groups of contributions.

Conventions:
    N examples, K x-features to draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._hooks import hooked
from captum_xnn.layers._outputs import checked
from captum_xnn.layers._pixels import repeated
from captum_xnn.layers._prefix import Prefix
from captum_xnn.layers._read import UnfitError
from captum_xnn.layers._state import eager, untouched
from captum_xnn.layers._tail import Tail, frozen
from captum_xnn.layers._targets import Target, select_each
from captum_xnn.layers._trace import Tracer
from captum_xnn.models._contribution_groups import ContributionGroups

if TYPE_CHECKING:  # a reading gets its reader, and makes none
    from captum_xnn.layers._reader import Reader

__all__ = ["Pass", "Reading"]


class Pass(NamedTuple):
    """A forward pass with its graph."""

    tail: Tail
    """The rest of the model behind the explained layer."""
    start_layer: nn.Module | None
    """The layer at which the graph begins; None for the inputs."""
    leaves: list[Tensor]
    """Output of that layer at its last call before the explained layer, or all inputs, (N, ...)."""
    Z: Tensor
    """The explained layer's output, (N, ...)."""
    y_hat: Any
    """The model's output, after ``prediction_transform``."""
    prefix: Prefix | None
    """Outputs of the modules up to the explained layer, for a single example."""

    @classmethod
    def of(
        cls,
        tail: Tail,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...],
        start_layer: nn.Module | None,
        tracer: Tracer | None = None,
    ) -> Pass | None:
        """Run the model once; return None where one pass does not suffice for the gradients of groups.

        One pass does not suffice with an ``output_transform``, with integer inputs, for an explained layer that runs
        several times, or for a layer that returns no tensor. If the layer at which the graph begins runs several times,
        its last call before the explained layer counts, as in Captum.

        Args:
            tail: The rest of the model behind the explained layer.
            inputs: Tensors (N, ...).
            additional: Further arguments of the model.
            start_layer: The layer at which the graph begins; None for the inputs.
            tracer: Notes the modules that run.
        """
        if tail.output_transform is not None:
            return None
        if start_layer is None and not all(x.is_floating_point() for x in inputs):
            return None
        x, more = rows_of(
            inputs, additional, torch.arange(len(inputs[0]), device="cpu")
        )  # copies: a model may work in place
        leaves = [] if start_layer is not None else [value.detach().requires_grad_() for value in x]
        given = tuple(leaf.clone() for leaf in leaves) if start_layer is None else tuple(value.detach() for value in x)
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for context in (untouched(tail.model), frozen(tail.model), torch.enable_grad(), eager()):
                stack.enter_context(context)
            if start_layer is not None:
                stack.enter_context(_cut(start_layer, leaves, seen))
            stack.enter_context(_kept(tail.layer, seen))
            prefix = Prefix(tail.model, tail.layer) if len(x[0]) == 1 else None
            if prefix is not None:
                stack.enter_context(prefix.kept())
            if tracer is not None:  # last, so that it notes the tensors that the model uses
                stack.enter_context(tracer.noting())
            try:
                output = tail.model(*given, *(more or ()))
            except UnfitError:
                return None
        if len(seen) != 1 or not leaves:
            return None
        with torch.enable_grad():  # the gradients of x-features go through the transform, too
            y_hat = output if tail.prediction_transform is None else tail.prediction_transform(output)
        return cls(tail, start_layer, leaves, seen[0], y_hat, prefix)

    def gradients(
        self, form: ContributionGroups, target: Target, features: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Compute the gradients of x-features at the leaves: a backward pass to Z, and one from Z for each x-feature.

        Args:
            form: The groups.
            target: The explained output.
            features: Indices of the K x-features.

        Returns:
            For each leaf its values (N, ...) and gradients (N, K, ...). None if a backward pass runs the layer again.
        """
        tail = self.tail
        with ExitStack() as stack:
            # Checkpoints run modules again in the backward pass.
            for context in (untouched(tail.model), frozen(tail.model), torch.enable_grad(), eager()):
                stack.enter_context(context)
            stack.enter_context(_refused([tail.layer] if self.start_layer is None else [tail.layer, self.start_layer]))
            y = select_each(self.y_hat, [target] * len(self.Z))
            try:
                return _gradients(form, y, self.Z, self.leaves, features)
            except UnfitError:
                return None
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                return None  # the pass changed buffers of the model, and they have been restored


class Reading(NamedTuple):
    """The outputs of a layer and of the model, and notes of the modules that ran."""

    Z: Tensor
    """The layer's output, (N, ...)."""
    y_hat: Tensor
    """The model's outputs, (N, ...)."""
    tracer: Tracer
    graph_pass: Pass | None
    """The pass that read both, if it had a graph."""

    @property
    def prefix(self) -> Prefix | None:
        """Outputs of the modules up to the layer, for a single example."""
        return None if self.graph_pass is None else self.graph_pass.prefix

    @classmethod
    def of(
        cls,
        reader: Reader,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        start_layer: nn.Module | None,
    ) -> Reading:
        """Read a layer and the model's outputs.

        If the pass has the graph that maps need, the model does not run again for them. The start layer comes from an
        earlier call. :class:`~captum_xnn.heatmaps.GradientMaps` takes the pass only if it draws at the same layer.

        Args:
            reader: Reader of the explained layer.
            inputs: Tensors (N, ...). The model may change them in place.
            additional: Further arguments of the model.
            start_layer: The layer at which the graph should begin; None reads without a graph.

        Raises:
            TypeError: If the model's output is no tensor.
            ValueError: If rows do not match, or anything is NaN or infinite.
        """
        more = additional or ()
        first = repeated((*inputs, *more), 1)  # a copy, before the model may change the arguments
        if start_layer is not None and reader.output_transform is None:
            tracer = Tracer(reader.model, reader.layer, first, name=reader.name)
            try:
                graph_pass = Pass.of(reader.tail(), inputs, more, start_layer, tracer)
            except RuntimeError:  # this model does not run with gradients
                graph_pass = None
            if graph_pass is not None and graph_pass.Z.dim() > 1:
                y_hat = graph_pass.y_hat.detach() if isinstance(graph_pass.y_hat, Tensor) else graph_pass.y_hat
                return cls(*checked(graph_pass.Z.detach().clone(), y_hat, reader.name), tracer, graph_pass)
        tracer = Tracer(reader.model, reader.layer, first, name=reader.name)
        with untouched(reader.model), tracer.noting():
            Z, y_hat = reader.read((*inputs, *more))
        return cls(Z, y_hat, tracer, None)


def _gradients(
    form: ContributionGroups, y: Tensor, Z: Tensor, leaves: list[Tensor], features: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Take a backward pass to Z, and one from Z to the leaves for each x-feature, as in :class:`GradientMaps`."""
    g = torch.autograd.grad(y.sum(), Z, retain_graph=True, allow_unused=True)[0]
    g = torch.zeros_like(Z) if g is None else g
    g = g.to(torch.promote_types(Z.dtype, form.dtype))
    found: list[list[Tensor]] = [[] for _ in leaves]
    for k in features:
        grads = torch.autograd.grad(Z, leaves, form.slopes_of(g, k).to(Z), retain_graph=True, allow_unused=True)
        for own, grad, leaf in zip(found, grads, leaves, strict=True):
            own.append(torch.zeros_like(leaf) if grad is None else grad)
    return [(leaf.detach(), torch.stack(own, 1)) for leaf, own in zip(leaves, found, strict=True)]


@contextmanager
def _cut(layer: nn.Module, leaves: list[Tensor], seen: list[Tensor]) -> Iterator[None]:
    """Cut the graph behind each call of a layer, and keep the output of the last one as the only leaf.

    Args:
        layer: The layer.
        leaves: List that receives the leaf.
        seen: Outputs of the explained layer. Calls behind it do not count.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if seen:
            return None
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise UnfitError
        leaves[:] = [output.detach().requires_grad_()]
        return leaves[0].clone()  # a model may work in place, and a leaf forbids that

    with hooked([layer], hook):
        yield


@contextmanager
def _refused(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Raise UnfitError if one of these modules runs in this context, as a checkpoint does in a backward pass."""

    def hook(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        raise UnfitError

    with hooked(modules, hook):
        yield


@contextmanager
def _kept(layer: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Keep the output of the explained layer, and give the model a copy."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if seen or not isinstance(output, Tensor) or not output.requires_grad:
            raise UnfitError
        seen.append(output)
        return output.clone()

    with hooked([layer], hook):
        yield
