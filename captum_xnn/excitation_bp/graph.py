"""What autograd's graph tells of a forward pass: operations without a rule, the last weighted operation, and cuts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.excitation_bp.shares import Weighted
from captum_xnn.excitation_bp.signals import LABEL, has_rule, is_route, route_name

__all__ = ["Unruled", "cuts", "is_reached", "last_weighted", "topological", "unruled"]

Node = Any


class Unruled(NamedTuple):
    """An operation that handed probability down by its derivative, for want of a rule."""

    operation: str
    module: str


def topological(roots: Iterable[Node]) -> list[Node]:
    """Returns the nodes that can be reached, each before all that are reached from it.

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
    """Returns the operations among some nodes that have no rule, each once.

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
        elif isinstance(node, torch.autograd.function.BackwardCFunction) and not name.startswith("Checkpoint"):
            found[Unruled(f"{name}.apply", "the model")] = None
        else:
            raise UnsupportedOperationError(
                f"expected a model whose operations are called from Python in this thread, found {name} that was not; "
                "scripted and traced parts, checkpointed parts and parts that run in other threads cannot be seen. "
                "Use the module that was scripted, and turn checkpointing off"
            )
    return list(found)


def last_weighted(nodes: Sequence[Node]) -> list[Node]:
    """Returns the operations with weights that come last: no other one lies between them and the target.

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
    """Returns whether any leaf is among the nodes.

    Args:
        leaves: Leaves of the graph.
        nodes: Nodes from the target down.
    """
    ids = {id(leaf) for leaf in leaves}
    return any(id(getattr(node, "variable", None)) in ids for node in nodes)


def cuts(nodes: Sequence[Node], leaves: Sequence[Tensor]) -> set[Node]:
    """Returns the nodes that every path to any of the leaves crosses.

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
