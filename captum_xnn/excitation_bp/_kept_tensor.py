"""Keep tensors of the forward pass, to compute shares from them later."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ["KeptTensor", "OverwrittenError"]


class OverwrittenError(RuntimeError):
    """Raised if the model has overwritten a tensor that shares are computed from."""


class KeptTensor:
    """A tensor of the forward pass, kept to compute shares from it.

    Args:
        tensor: The tensor, with its graph.
        copied: Whether to keep a copy, which the model cannot overwrite.
        is_positive: Whether the tensor is known to have no negative elements, so that nothing looks for them.
    """

    def __init__(self, tensor: Tensor, *, copied: bool = False, is_positive: bool = False) -> None:
        self.tensor = tensor
        # The tensor's present place in the graph: an in-place operation moves the tensor to another place.
        self.edge = _edge(tensor) if tensor.requires_grad else None
        self.is_positive = is_positive
        self._value = tensor.detach().clone() if copied else tensor.detach()
        self._version = self._value._version

    @property
    def intact(self) -> bool:
        """Whether the model has left the tensor unchanged."""
        return self._value._version == self._version

    @property
    def value(self) -> Tensor:
        """The tensor, without its graph."""
        if not self.intact:
            raise OverwrittenError("a tensor that shares are computed from was modified in place")
        return self._value


def _edge(tensor: Tensor) -> GradientEdge:
    """Return the place of a tensor in autograd's graph."""
    node = tensor.grad_fn
    return get_gradient_edge(tensor) if node is None else GradientEdge(node, tensor.output_nr)
