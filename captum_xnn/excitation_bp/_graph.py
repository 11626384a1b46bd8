"""Autograd's graph of a forward pass, which probability goes down.

It also tells which operations have no rule, which weighted one comes last, and where it can be cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.excitation_bp._shares import Descent, Weighted, unbroadcast
from captum_xnn.excitation_bp._signals import LABEL, has_rule, is_route, route_name

__all__ = ["Graph", "Place", "Unruled", "cuts", "is_reached", "last_weighted", "topological", "unruled"]

Node = Any

Place = tuple[int, int]
"""A tensor in the graph, as the number of the operation that computed it and of its outputs."""


class Graph:
    """The operations that a tensor was computed by.

    Probability goes down it for K targets side by side: each operation serves all of them before the next one does.
    Autograd would take a pass for each target, and torch.vmap would repeat what operations have saved K times.

    Args:
        output: The tensor, with its graph.
    """

    def __init__(self, output: Tensor) -> None:
        self.nodes: list[Node] = topological([output.grad_fn])
        """From the output down, each before all that are reached from it."""
        self.root: Place = 0, output.output_nr
        """The output."""
        place = {node: i for i, node in enumerate(self.nodes)}
        self._below = [[(place.get(below, -1), slot) for below, slot in node.next_functions] for node in self.nodes]

    def place(self, edge: GradientEdge) -> Place | None:
        """Return where a tensor stands, None if nothing was computed from it.

        Args:
            edge: The operation that computed it, and the number of its output.
        """
        return (self.nodes.index(edge.node), edge.output_nr) if edge.node in self.nodes else None

    def descend(
        self,
        starts: Sequence[tuple[Place, list[Tensor]]],
        ends: Sequence[Place | None],
        descent: Descent,
        *,
        is_last: bool = False,
    ) -> list[list[Tensor] | None]:
        """Return what arrives at some places for each target, None where nothing can.

        Args:
            starts: Places, with the probabilities there for each target.
            ends: Places, none above another one.
            descent: What the operations' rules share.
            is_last: Whether the graph lets go of its operations, and what they keep, on the way.
        """
        wanted = {end for end in ends if end is not None}
        leading = self._leading(wanted)
        arrived: dict[Place, _Arrived] = {}
        for place, p in starts:
            arrived[place] = _joined(arrived.get(place), _Arrived(p, is_spent=False), descent)
        found: dict[Place, list[Tensor]] = {}
        with torch.no_grad():
            for i, node in enumerate(self.nodes):
                if is_last:
                    self.nodes[i] = None
                slots = range(len(node._input_metadata))
                given = {slot: arrived.pop((i, slot)) for slot in slots if (i, slot) in arrived}
                found.update(((i, slot), came.p) for slot, came in given.items() if (i, slot) in wanted)
                if not given or not leading[i]:
                    continue
                made = _handed_down(node, given, descent)
                for below, (child, _), came in zip(self._below[i], node.next_functions, made, strict=True):
                    if came is not None and below[0] >= 0 and (leading[below[0]] or below in wanted):
                        fitted = _fitted(came, child._input_metadata[below[1]])
                        arrived[below] = _joined(arrived.get(below), fitted, descent)
                del given, made
        return [None if end is None else found.get(end) for end in ends]

    def _leading(self, ends: Iterable[Place]) -> list[bool]:
        """Return which operations lie above any of the places."""
        at = {i for i, _ in ends}
        leading = [False] * len(self.nodes)
        for i in reversed(range(len(self.nodes))):
            leading[i] = any(below in at or (below >= 0 and leading[below]) for below, _ in self._below[i])
        return leading


class _Arrived(NamedTuple):
    """The probabilities of a tensor for each target."""

    p: list[Tensor]
    is_spent: bool
    """Whether nothing else uses their memory."""


def _joined(before: _Arrived | None, new: _Arrived, descent: Descent) -> _Arrived:
    """Return a sum, in the memory of one of its terms if that is spent."""
    if before is None:
        return new
    if new.is_spent and not before.is_spent:
        before, new = new, before
    pairs = list(zip(before.p, new.p, strict=True))
    sums = [x.add_(y) if before.is_spent else x + y for x, y in pairs]
    if new.is_spent:
        for y in new.p:
            descent.workspace.give(y)
    return _Arrived(sums, True)


def _handed_down(node: Node, given: dict[int, _Arrived], descent: Descent) -> list[_Arrived | None]:
    """Return what an operation gives to each of its inputs.

    Args:
        node: The operation.
        given: By number of its output, the probabilities.
        descent: What rules share.
    """
    kept = {_memory(came.p[0]) for came in given.values() if not came.is_spent}
    if has_rule(node):
        descent.is_spent = not kept
        targets = node.back(given[0].p)
    else:
        slots = [given[slot].p if slot in given else None for slot in range(len(node._input_metadata))]
        count = len(next(iter(given.values())).p)
        targets = [_derived(node, [None if p is None else p[k] for p in slots]) for k in range(count)]
        if _is_python(node):
            kept.update(_memory(x) for x in targets[0] if x is not None)  # who knows what else uses it
    memory = [None if x is None else _memory(x) for x in targets[0]]
    return [
        None
        if one[0] is None
        else _Arrived(list(one), one[0].is_contiguous() and place not in kept and memory.count(place) == 1)
        for place, one in zip(memory, zip(*targets, strict=True), strict=True)
    ]


def _is_python(node: Node) -> bool:
    """Return whether an operation is an autograd.Function."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _memory(x: Tensor) -> int:
    """Return where the memory is that a tensor is part of."""
    return x.untyped_storage().data_ptr()


def _derived(node: Any, p: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return what autograd's own node makes of p, for each of the nodes that come next."""
    if not _is_python(node):
        made = node(*p)
        return made if isinstance(made, tuple) else (made,)
    # One written in Python: no None for it, and its results are for all arguments, also for those that are no tensors.
    filled = [
        torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if x is None else x
        for x, meta in zip(p, node._input_metadata, strict=True)
    ]
    made = node.apply(*filled)
    made = made if isinstance(made, tuple) else (made,)
    taken = iter([x for x, needed in zip(made, node.needs_input_grad, strict=False) if needed])
    return [None if below is None else next(taken) for below, _ in node.next_functions]


def _fitted(came: _Arrived, meta: Any) -> _Arrived:
    """Return probabilities in the shape and dtype of the tensor they are for, as autograd's engine does."""
    if came.p[0].shape == tuple(meta.shape) and came.p[0].dtype == meta.dtype:
        return came
    return _Arrived([unbroadcast(p, meta.shape).to(meta.dtype) for p in came.p], False)


class Unruled(NamedTuple):
    """An operation that handed probability down by its derivative, for want of a rule."""

    operation: str
    module: str


def topological(roots: Iterable[Node]) -> list[Node]:
    """Return the nodes that can be reached, each before all that are reached from it.

    Args:
        roots: Nodes of autograd's graph.
    """
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while stack:
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(below, False) for below, _ in node.next_functions]
    return order[::-1]


def unruled(nodes: Iterable[Node]) -> list[Unruled]:
    """Return the operations among some nodes that have no rule, each once.

    Args:
        nodes: Nodes of autograd's graph.

    Raises:
        UnsupportedOperationError: If there are nodes of functions that the mode did not see.
    """
    found: dict[Unruled, None] = {}
    for node in nodes:
        if has_rule(node) or is_route(node):
            continue
        name = route_name(node)
        if LABEL in node.metadata:
            if node.metadata[LABEL] is not None:
                found[Unruled(*node.metadata[LABEL])] = None
        elif _is_python(node) and not name.startswith("Checkpoint"):
            found[Unruled(f"{name}.apply", "the model")] = None
        else:
            raise UnsupportedOperationError(
                f"expected a model whose operations are called from Python in this thread, found {name} that was not; "
                "scripted and traced parts, checkpointed parts and parts that run in other threads cannot be seen. "
                "Use the module that was scripted, and turn checkpointing off"
            )
    return list(found)


def last_weighted(nodes: Sequence[Node]) -> list[Node]:
    """Return the operations with weights that come last: no other one lies between them and the target.

    Where several stand side by side all of them are returned, but none that another one of them is computed from.

    Args:
        nodes: All nodes from the target down, in topological order.
    """
    last: list[Node] = []
    below: set[Node] = set()
    for node in nodes:
        if node not in below:
            if not (has_rule(node) and isinstance(node.affine, Weighted)):
                continue
            last.append(node)
        below.update(n for n, _ in node.next_functions)
    return last


def is_reached(leaves: Sequence[Tensor], nodes: Iterable[Node]) -> bool:
    """Return whether any leaf is among the nodes.

    Args:
        leaves: Leaves of the graph.
        nodes: Nodes from the target down.
    """
    ids = {id(leaf) for leaf in leaves}
    return any(id(getattr(node, "variable", None)) in ids for node in nodes)


def cuts(nodes: Sequence[Node], leaves: Sequence[Tensor]) -> set[Node]:
    """Return the nodes that every path to any of the leaves crosses.

    Args:
        nodes: All nodes from the target down, in topological order.
        leaves: Leaves of the graph.
    """
    ids = {id(leaf) for leaf in leaves}
    ends = {node for node in nodes if id(getattr(node, "variable", None)) in ids}
    leading = set(ends)
    for node in reversed(nodes):
        if any(below in leading for below, _ in node.next_functions):
            leading.add(node)
    ahead = 0  # the furthest place that an edge from the nodes so far leads to
    order = [node for node in nodes if node in leading]
    place = {node: i for i, node in enumerate(order)}
    found = set()
    for i, node in enumerate(order):
        if ahead <= i:
            found.add(node)
        ahead = max([ahead, *(place[below] for below, _ in node.next_functions if below in place)])
        if node in ends:
            ahead = len(order)
    return found
