"""Autograd's graph of a forward pass, along which probability goes down.

The functions here also find operations without a rule, the last operations with weights, and nodes that every path
crosses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.excitation_bp._operations import Convolution, Turned
from captum_xnn.excitation_bp._shares import Descent, Weighted, unbroadcast
from captum_xnn.excitation_bp._signals import LABEL, has_rule, is_route, route_name

__all__ = [
    "Graph",
    "Place",
    "Unruled",
    "cuts",
    "is_reached",
    "last_weighted",
    "skipped_cells",
    "topological",
    "unruled",
]

Node = Any

Place = tuple[int, int]
"""A tensor in the graph: the number of the operation that computed it, and the number of that operation's output."""


class Graph:
    """The operations that computed a tensor.

    Probability goes down the graph for K targets side by side: each operation serves all targets before the next
    operation starts. Autograd would take a pass for each target. ``torch.vmap`` would repeat the saved tensors of
    operations K times.

    Args:
        output: The tensor, with its graph.
    """

    def __init__(self, output: Tensor) -> None:
        self.nodes: list[Node] = topological([output.grad_fn])
        """All operations from the output down. Each comes before all operations that it depends on."""
        self.root: Place = 0, output.output_nr
        """Place of the output."""
        place = {node: i for i, node in enumerate(self.nodes)}
        self._below = [[(place.get(below, -1), slot) for below, slot in node.next_functions] for node in self.nodes]

    def place(self, edge: GradientEdge) -> Place | None:
        """Find the place of a tensor; None if the output does not depend on it.

        Args:
            edge: The operation that computed the tensor, and the number of that operation's output.
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
        """Hand probability down; return the probabilities that arrive at some places for each target.

        Args:
            starts: Places, with the probabilities there for each target.
            ends: Places. No end may depend on another end. For an end without a path to it the result is None.
            descent: State that the rules of all operations share.
            is_last: Whether to free each operation and its saved tensors on the way.
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
                handed_down = _handed_down(node, given, descent)
                for below, (child, _), came in zip(self._below[i], node.next_functions, handed_down, strict=True):
                    if came is not None and below[0] >= 0 and (leading[below[0]] or below in wanted):
                        fitted = _fitted(came, child._input_metadata[below[1]])
                        arrived[below] = _joined(arrived.get(below), fitted, descent)
                del given, handed_down
        return [None if end is None else found.get(end) for end in ends]

    def _leading(self, ends: Iterable[Place]) -> list[bool]:
        """Whether each operation depends on one of the places."""
        at = {i for i, _ in ends}
        leading = [False] * len(self.nodes)
        for i in reversed(range(len(self.nodes))):
            leading[i] = any(below in at or (below >= 0 and leading[below]) for below, _ in self._below[i])
        return leading


class _Arrived(NamedTuple):
    """Probabilities that have arrived at a tensor, for each target."""

    p: list[Tensor]
    is_spent: bool
    """Whether no other tensor uses their memory, so that it may be overwritten."""


def _joined(before: _Arrived | None, new: _Arrived, descent: Descent) -> _Arrived:
    """Add probabilities, in the memory of a spent term if there is one."""
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
    """Divide the probabilities of an operation's outputs among its inputs.

    Args:
        node: The operation.
        given: Probabilities by index of the output.
        descent: State that the rules share.
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
            kept.update(_memory(x) for x in targets[0] if x is not None)  # its memory may be used elsewhere
    memory = [None if x is None else _memory(x) for x in targets[0]]
    return [
        None
        if of_targets[0] is None
        else _Arrived(
            list(of_targets), of_targets[0].is_contiguous() and address not in kept and memory.count(address) == 1
        )
        for address, of_targets in zip(memory, zip(*targets, strict=True), strict=True)
    ]


def _is_python(node: Node) -> bool:
    """Whether an operation is an ``autograd.Function``."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _memory(x: Tensor) -> int:
    """Return the address of the memory that holds a tensor."""
    return x.untyped_storage().data_ptr()


def _derived(node: Any, p: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Apply the derivative of autograd's own node to p; return a result for each of the next nodes."""
    if not _is_python(node):
        results = node(*p)
        return results if isinstance(results, tuple) else (results,)
    # A node written in Python takes no None, and gives results for all arguments, even for those that are not tensors.
    filled = [
        torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if x is None else x
        for x, meta in zip(p, node._input_metadata, strict=True)
    ]
    results = node.apply(*filled)
    results = results if isinstance(results, tuple) else (results,)
    taken = iter([x for x, needed in zip(results, node.needs_input_grad, strict=False) if needed])
    return [None if below is None else next(taken) for below, _ in node.next_functions]


def _fitted(came: _Arrived, meta: Any) -> _Arrived:
    """Bring probabilities to the shape and dtype of their tensor, as autograd's engine does."""
    if came.p[0].shape == tuple(meta.shape) and came.p[0].dtype == meta.dtype:
        return came
    return _Arrived([unbroadcast(p, meta.shape).to(meta.dtype) for p in came.p], False)


class Unruled(NamedTuple):
    """An operation without a rule, which hands probability down by its derivative."""

    operation: str
    module: str


def topological(roots: Iterable[Node]) -> list[Node]:
    """List the nodes below some roots, each node before all nodes that it depends on.

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
    """List the operations without a rule among some nodes, each once.

    Args:
        nodes: Nodes of autograd's graph.

    Raises:
        UnsupportedOperationError: If a node belongs to a function that the mode did not see.
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
                f"excitation backprop cannot see {name}, as it was not called from Python in this thread; this holds "
                "for scripted and traced parts, checkpointed parts, and parts that run in other threads. Use the "
                "module that was scripted, and turn checkpointing off"
            )
    return list(found)


def last_weighted(nodes: Sequence[Node]) -> list[Node]:
    """List the last operations with weights: no other operation with weights lies between them and the target.

    Several operations may stand side by side. The list has no operation that another one in it depends on.

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


def skipped_cells(nodes: Iterable[Node]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Find the grids of which strided convolutions skip cells.

    Args:
        nodes: Nodes of autograd's graph.

    Returns:
        By height and width of the grid, the stride along each dimension; 1 where no cell is skipped.
    """
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for node in nodes:
        affine = node.affine if has_rule(node) else None
        affine = affine.straight if isinstance(affine, Turned) else affine
        if isinstance(affine, Convolution) and max(affine.skips) > 1:
            grid = tuple(affine.a.tensor.shape[2:])
            found[grid] = tuple(map(max, affine.skips, found.get(grid, affine.skips)))
    return found


def is_reached(leaves: Sequence[Tensor], nodes: Iterable[Node]) -> bool:
    """Whether the target depends on any of the leaves.

    Args:
        leaves: Leaves of the graph.
        nodes: Nodes from the target down.
    """
    ids = {id(leaf) for leaf in leaves}
    return any(id(getattr(node, "variable", None)) in ids for node in nodes)


def cuts(nodes: Sequence[Node], leaves: Sequence[Tensor]) -> set[Node]:
    """Find the nodes that every path from the target to any leaf crosses.

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
    ahead = 0  # the furthest position that an edge from the nodes so far leads to
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
