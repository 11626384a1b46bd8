r"""A forward pass in which every operation gets its rule for handing probability down.

The model runs as it is, under a mode that sees each function it calls. Where a function has a rule, its result is put
into autograd's graph with that rule in place of the derivative, and probability goes down the graph as gradients would.
Functions without a rule of their own run as they are, and autograd's graph tells later
(:mod:`captum_xnn.excitation_bp._graph`) whether their derivative only routes, as that of indexing does.

A *signal* is a tensor that was computed from the model's inputs; all others are constants, such as weights, masks and
position tables, and take no share. The layer to stop at is cut off: its output becomes a leaf of the graph. Above it
signals *carry* probability; below it, and beside it, nothing is recorded.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from captum_xnn.excitation_bp._settings import Settings
from captum_xnn.excitation_bp._shares import Affine, Descent, Kept, Weighted

__all__ = [
    "LABEL",
    "ROUTES",
    "Call",
    "Rule",
    "RuleNode",
    "Signal",
    "Signals",
    "has_rule",
    "is_route",
    "route_name",
    "tensors_in",
]

LABEL = "captum_xnn"
"""Key in the metadata of autograd's nodes under which the operation and its module are named."""

Back = Callable[[Sequence[Tensor]], Sequence[Sequence[Tensor | None]]]
"""Return the probabilities of an operation's signals for each target, from those of its output."""

# Nodes of autograd's graph whose derivative hands probability down rightly: copies, selections, rearrangements, and
# maxima, whose winner takes all.
# fmt: off
ROUTES = frozenset(
    {
        "AccumulateGrad", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Alias", "Amax", "Amin", "AsStrided", "Cat",
        "Chunk", "Clone", "ConstantPadNd", "Constant_Pad_Nd", "CopyBackwards", "CopySlices", "Cummax", "Cummin",
        "Diagonal", "Expand", "Flip",
        "FractionalMaxPool2D", "FractionalMaxPool3D", "Gather", "Im2Col", "Index", "IndexSelect", "MaskedFill",
        "MaskedSelect", "Max", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "MaxUnpool2D", "MaxUnpool3D",
        "Maximum", "Min", "Minimum", "Movedim", "Narrow", "NativeChannelShuffle", "Permute", "PixelShuffle",
        "PixelUnshuffle", "ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D", "Repeat", "RepeatInterleave",
        "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D", "ReshapeAlias", "Roll", "Rot90", "Select",
        "SelectScatter", "Slice", "SliceScatter", "Sort", "Split", "SplitWithSizes", "Squeeze", "Stack", "T",
        "ToCopy", "Topk", "Transpose", "Tril", "Triu", "Unbind", "Unfold", "UnsafeSplit", "UnsafeView",
        "Unsqueeze", "View", "ViewAsReal", "Where",
    }
)
# fmt: on


def route_name(node: Any) -> str:
    """Return the name of a node of autograd's graph without its ending.

    Args:
        node: What ``grad_fn`` holds.

    Example:
        >>> route_name(torch.ones(1, requires_grad=True)[0].grad_fn)
        'Select'
    """
    return node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")  # type: ignore[no-any-return]


def is_route(node: Any) -> bool:
    """Return whether the derivative of a node of autograd's graph hands probability down rightly.

    Args:
        node: What ``grad_fn`` holds.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> is_route(x[0].grad_fn), is_route((2 * x).grad_fn)
        (True, False)
    """
    name = route_name(node)
    return name in ROUTES or (name == "IndexPut" and not node._saved_accumulate)


class Signal(NamedTuple):
    """What is known of a tensor that was computed from the inputs."""

    source: int
    """0 where some of it comes from the inputs beside the layer to stop at, else the number of that layer's call."""
    gate: bool = False
    """Whether it weights others, as what comes out of a sigmoid or softmax does."""
    affine: Weighted | None = None
    """The operation of which it is the output, but for positive factors and what is added."""
    is_positive: bool = False
    """Whether it is known to have no negative elements."""
    version: int = 0
    """Of the tensor when this was known."""


class RuleNode(torch.autograd.Function):
    """A node of autograd's graph that hands probability down by a rule."""

    back: Back
    affine: Affine | None

    @staticmethod
    def forward(ctx: Any, value: Callable[[], Tensor], back: Back, affine: Affine | None, *signals: Tensor) -> Tensor:
        """Return the value, a function of the signals."""
        ctx.back, ctx.affine = back, affine
        versions = [x._version for x in signals]
        y = value()
        for x, version in zip(signals, versions, strict=True):
            if x._version != version:
                ctx.mark_dirty(x)
            elif y is x:
                return y.clone()
        return y

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Tensor | None, ...]:
        """Return the probabilities of the signals, for an operation on part of a tensor in place."""
        return None, None, None, *ctx.back([p])[0]


def has_rule(node: Any) -> bool:
    """Return whether a node of autograd's graph hands probability down by a rule.

    Args:
        node: What ``grad_fn`` holds.
    """
    return getattr(node, "_forward_cls", None) is RuleNode


Rule = Callable[["Signals", "Call"], Any]


@dataclass(slots=True)
class Call:
    """A function that the model calls, with its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """Return what the function returns."""
        return self.function(*self.args, **self.kwargs)

    def named(self, *names: str) -> dict[str, Any]:
        """Return the arguments by name.

        Args:
            names: Names of the positional parameters.
        """
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts.

    Args:
        values: Anything.

    Example:
        >>> len(tensors_in([torch.zeros(1), {"x": (torch.ones(1), 2)}]))
        2
    """
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else ():
        # Most arguments are numbers, of which none is looked into. This runs for every call of the model.
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            found.append(value)
        elif kind is not int and kind is not float and kind is not bool and value is not None:
            found += tensors_in(value)
    return found


def _results(call: Call, y: Any) -> list[Tensor]:
    """Return the tensors that a call returned or, as ``x[i] = y`` does, wrote to."""
    return tensors_in(call.args[:1] if call.function is Tensor.__setitem__ else y)


class _Known:
    """What is known of tensors, by identity, as long as they live. A WeakKeyDictionary takes ten times as long."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Signal]] = {}

    def __setitem__(self, tensor: Tensor, signal: Signal) -> None:
        self._entries[id(tensor)] = weakref.ref(tensor), signal

    def get(self, tensor: Tensor) -> Signal | None:
        entry = self._entries.get(id(tensor))
        # An id may have passed to another tensor.
        return entry[1] if entry is not None and entry[0]() is tensor else None


class Signals(TorchFunctionMode):
    """The mode under which a model runs.

    Args:
        settings: Choices of the method.
        rules: Rules by function; a rule may return NotImplemented, which is as if there were none.
        gates: Functions whose results weight others.
        rectifies: Whether the results of a call are never negative.
        module: The model, whose layers messages name.
        copied: Whether to keep copies of all that shares are computed from, for models that overwrite it.
    """

    def __init__(
        self,
        settings: Settings,
        rules: Mapping[Any, Rule],
        gates: frozenset[Any],
        rectifies: Callable[[Call], bool],
        module: nn.Module | None,
        *,
        copied: bool = False,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.descent = Descent(settings.negative)
        self.cancels = False
        """Whether the model has sums of terms that nearly cancel, whose signed shares are large."""
        self._rules, self._gates, self._rectifies = rules, gates, rectifies
        self._module, self._copied = module, copied
        self._known = _Known()
        self._opened: list[Any] = []

    def leaf(self, tensor: Tensor, source: int) -> tuple[Tensor, Tensor]:
        """Return a leaf of the graph with the tensor's values, and the tensor that replaces it in the model.

        Args:
            tensor: An input, or the output of the layer to stop at.
            source: See :class:`Signal`.
        """
        leaf = tensor.detach().requires_grad_()
        with torch.enable_grad():
            given = leaf.clone()  # what the model may modify in place
        self._known[given] = Signal(source)
        return leaf, given

    def forget(self) -> None:
        """Drops what is known of tensors, and the tensors that this keeps alive."""
        self._known = _Known()

    def mark(self, tensor: Tensor) -> Tensor:
        """Return an input, which is a signal from now on.

        Args:
            tensor: An input of the model.
        """
        self._known[tensor] = Signal(0)
        return tensor

    def carries(self, value: Any) -> bool:
        """Return whether a value is a signal that probability can be handed to.

        Args:
            value: Any argument of a function.
        """
        return isinstance(value, Tensor) and value.requires_grad and self._known.get(value) is not None

    def signal(self, value: Any) -> Signal | None:
        """Return what is known of a value, if it is a signal.

        Args:
            value: Any argument of a function.
        """
        return self._known.get(value) if isinstance(value, Tensor) else None

    def keep(self, tensor: Tensor) -> Kept:
        """Return a tensor kept for computing shares.

        Args:
            tensor: An argument of a function.
        """
        return Kept(tensor, copied=self._copied, is_positive=self.is_positive(tensor))

    def is_positive(self, tensor: Tensor) -> bool:
        """Return whether a tensor is known to have no negative elements, whatever the input.

        Args:
            tensor: Any tensor of the forward pass.
        """
        known = self._known.get(tensor)
        return known is not None and known.is_positive and known.version == tensor._version

    def follow(self, tensor: Tensor, signal: Tensor) -> None:
        """Takes a tensor for a signal, as another one is of which a rule computed it.

        Args:
            tensor: Part of the signal, or its copy.
            signal: The signal.
        """
        known = self._known.get(signal)
        assert known is not None
        self._known[tensor] = Signal(known.source, known.gate)

    def fresh(self, y: Tensor) -> Weighted | None:
        """Return the weighted operation of which y is the output, if y and the operation's input are as they were.

        Args:
            y: A signal.
        """
        known = self._known.get(y)
        if known is None or known.affine is None or y._version != known.version or not known.affine.a.intact:
            return None
        return known.affine

    def apply(
        self, value: Callable[[], Tensor], back: Callable[[Tensor], Sequence[Tensor | None]], *signals: Tensor
    ) -> Tensor:
        """Return a value that hands probability down to signals by a rule.

        Args:
            value: Computes it.
            back: Returns the probabilities of the signals from that of the value.
            signals: What it is computed from.
        """
        return self.apply_at_once(value, lambda p: [back(one) for one in p], *signals)

    def apply_at_once(self, value: Callable[[], Tensor], back: Back, *signals: Tensor) -> Tensor:
        """Return a value that hands probability down to signals by a rule for all targets at once.

        Args:
            value: Computes it.
            back: Returns the probabilities of the signals for each target.
            signals: What it is computed from.
        """
        return RuleNode.apply(value, back, None, *signals)  # type: ignore[no-any-return,no-untyped-call]

    def apply_affine(
        self, value: Callable[[], Tensor], affine: Affine, *besides: Tensor, activated: bool = False
    ) -> Tensor:
        """Return the value of an affine operation, which hands probability down to its input.

        Args:
            value: Computes it.
            affine: The operation.
            besides: Signals that it may modify, which take nothing.
            activated: Whether an activation has made the value, so that no later scale belongs to the operation.
        """
        # Not this mode itself: it knows tensors that hold this node, and nothing would free them.
        descent, nothing = self.descent, (None,) * len(besides)

        def back(p: Sequence[Tensor]) -> list[tuple[Tensor | None, ...]]:
            return [(won, *nothing) for won in affine.winners(p, descent)]

        y: Tensor = RuleNode.apply(value, back, affine, affine.a.tensor, *besides)  # type: ignore[no-untyped-call]
        if isinstance(affine, Weighted) and not activated:
            self.attach(y, affine)
        return y

    def attach(self, y: Tensor, affine: Weighted) -> None:
        """Takes a signal for the output of a weighted operation, up to positive factors and what is added.

        Args:
            y: The signal.
            affine: The operation.
        """
        known = self._known.get(affine.a.tensor)
        self._known[y] = Signal(known.source if known else 0, affine=affine, version=y._version)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what the function returns, with its rule in the graph."""
        call = Call(func, args, kwargs or {})
        given, signals = [], []
        for x in tensors_in(args) + tensors_in(kwargs) if kwargs else tensors_in(args):
            known = self._known.get(x)
            if known is not None:
                given.append(x)
                signals.append(known)
        if not given:
            return self._open(call, types)
        carries = given[0].requires_grad or (len(given) > 1 and any(x.requires_grad for x in given))
        with torch.set_grad_enabled(carries):
            y = self._ruled(call, types, given) if carries else func(*args, **call.kwargs)
        results = _results(call, y)
        if results:
            first, others = signals[0], signals[1:]
            source = min(first.source, *(s.source for s in others)) if others else first.source
            gate = func in self._gates or (first.gate and all(s.gate for s in others))
            is_positive = self._rectifies(call) or (
                func in _KEEP_SIGN and first.is_positive and all(s.is_positive for s in others)
            )
            self._note(results, source, gate, is_positive)
        return y

    def _ruled(self, call: Call, types: Any, given: Sequence[Tensor]) -> Any:
        """Return what a function of signals returns, with its rule, or else its derivative, in the graph."""
        rule = self._rules.get(call.function)
        y = NotImplemented if rule is None else rule(self, call)
        if y is NotImplemented:
            below = {x.grad_fn for x in given}
            y = self._open(call, types)
            self._label(_results(call, y), below, call)
        return y

    def _open(self, call: Call, types: Any) -> Any:
        """Return what a function returns, run under this mode again where it is written in Python."""
        if call.function in self._opened or _redispatch is None:
            return call()
        self._opened.append(call.function)
        try:
            with self:
                return _redispatch(call.function, types, call.args, call.kwargs)
        finally:
            self._opened.pop()

    def _note(self, results: Sequence[Tensor], source: int, gate: bool, is_positive: bool) -> None:
        """Takes down what is known of a function's results."""
        for result in results:
            version, known = result._version, self._known.get(result)
            if known is not None:
                if known.affine is not None and known.version == version:
                    continue
                source = min(source, known.source)
            self._known[result] = Signal(source, gate, None, is_positive, version)
            base = result._base
            if base is not None and self._known.get(base) is None:
                self._known[base] = Signal(source)  # a constant, part of which was overwritten

    def vouch(self, y: Tensor, x: Tensor) -> None:
        """Takes the derivative of y by x, two tensors of a rule, for part of that rule.

        Args:
            y: What a rule computed from x.
            x: The tensor.
        """
        for node in _between([y], {x.grad_fn}):
            node.metadata[LABEL] = None

    def _label(self, results: Sequence[Tensor], below: set[Any], call: Call) -> None:
        """Names the nodes of a function that ran with its own derivative, for messages."""
        nodes = [node for node in _between(results, below) if not is_route(node)]
        if nodes:
            label = getattr(call.function, "__name__", repr(call.function)), self._running()
            for node in nodes:
                node.metadata.setdefault(LABEL, label)

    @cached_property
    def _names(self) -> dict[int, str]:
        """Names of the model's modules, by id."""
        return {} if self._module is None else {id(m): name for name, m in self._module.named_modules()}

    def _running(self) -> str:
        """Return the name of the module that is running."""
        frame = sys._getframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self._names:
                return self._names[id(owner)] or type(owner).__name__
            frame = frame.f_back  # type: ignore[assignment]
        return "the model"


def _between(results: Sequence[Tensor], below: set[Any]) -> list[Any]:
    """Return the nodes of autograd's graph from some results down to other nodes, without rules and these."""
    found = []
    todo = [y.grad_fn for y in results]
    while todo:
        node = todo.pop()
        if node is not None and node not in below and not has_rule(node):
            below = {*below, node}
            found.append(node)
            todo += [n for n, _ in node.next_functions]
    return found


# Functions that return elements of their inputs, or averages of them.
_KEEP_SIGN = frozenset(
    {
        F.max_pool1d,
        F.max_pool2d,
        F.max_pool3d,
        F.avg_pool1d,
        F.avg_pool2d,
        F.avg_pool3d,
        F.adaptive_avg_pool1d,
        F.adaptive_avg_pool2d,
        F.adaptive_avg_pool3d,
        F.adaptive_max_pool2d,
        F.dropout,
        torch.cat,
        torch.flatten,
        Tensor.flatten,
        Tensor.view,
        Tensor.reshape,
    }
)

_redispatch = getattr(torch.overrides, "redispatch_function", None)
