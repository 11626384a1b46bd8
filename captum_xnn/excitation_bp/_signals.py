r"""A forward pass that records, for each operation, the rule by which it hands probability down.

The model runs unchanged, under a mode that sees each function that the model calls. If a function has a rule,
autograd's graph gets that rule in place of the derivative. Probability then goes down the graph as gradients would. A
function without a rule keeps its derivative. :mod:`captum_xnn.excitation_bp._graph` later checks in autograd's graph
whether this derivative only routes, as the derivative of indexing does.

A *signal* is a tensor computed from the model's inputs. All other tensors are constants, such as weights, masks and
position tables, and get no share. The output of the layer to stop at becomes a leaf of the graph. Signals above the
leaf *carry* probability. Below it, and beside it, nothing is recorded.
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

from captum_xnn.excitation_bp._kept_tensor import KeptTensor
from captum_xnn.excitation_bp._settings import Settings
from captum_xnn.excitation_bp._shares import Affine, Descent, Weighted
from captum_xnn.excitation_bp._workspace import Workspace

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
"""Key in the metadata of autograd's nodes. Its value names the operation and its module."""

Back = Callable[[Sequence[Tensor]], Sequence[Sequence[Tensor | None]]]
"""A function from the probabilities of an operation's output to those of its signals, for each target."""

# Nodes of autograd's graph whose derivative is the right rule: copies, selections, rearrangements, and maxima, whose
# winner takes all.
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
    """Whether the derivative of a node of autograd's graph is the right rule for probability.

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
    """Facts about a tensor computed from the inputs."""

    source: int
    """0 if some path from the inputs bypasses the layer to stop at, else the number of that layer's call."""
    gate: bool = False
    """Whether the tensor weights other signals, as the output of a sigmoid or softmax does."""
    affine: Weighted | None = None
    """The operation with this output, up to positive factors and added constants."""
    is_positive: bool = False
    """Whether the tensor is known to have no negative elements."""
    version: int = 0
    """Version of the tensor at which these facts hold."""


class RuleNode(torch.autograd.Function):
    """A node of autograd's graph that hands probability down by a rule."""

    back: Back
    affine: Affine | None

    @staticmethod
    def forward(ctx: Any, value: Callable[[], Tensor], back: Back, affine: Affine | None, *signals: Tensor) -> Tensor:
        """Compute the value, a function of the signals."""
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
        """Compute the probabilities of the signals; autograd calls this for in-place operations on part of a tensor."""
        return None, None, None, *ctx.back([p])[0]


def has_rule(node: Any) -> bool:
    """Whether a node of autograd's graph hands probability down by a rule.

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
        """Call the function."""
        return self.function(*self.args, **self.kwargs)

    def named(self, *names: str) -> dict[str, Any]:
        """Return the arguments by name.

        Args:
            names: Names of the positional parameters.
        """
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


def tensors_in(values: Any) -> list[Tensor]:
    """List the tensors in nested lists, tuples and dicts.

    Args:
        values: Any value.

    Example:
        >>> len(tensors_in([torch.zeros(1), {"x": (torch.ones(1), 2)}]))
        2
    """
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else ():
        # Skip numbers, which most arguments are: this runs for every call of the model.
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            found.append(value)
        elif kind is not int and kind is not float and kind is not bool and value is not None:
            found += tensors_in(value)
    return found


def _results(call: Call, y: Any) -> list[Tensor]:
    """List the tensors that a call returned; for ``x[i] = y``, the tensor that it wrote to."""
    return tensors_in(call.args[:1] if call.function is Tensor.__setitem__ else y)


class _SignalTable:
    """Signals by identity, as long as the tensors live. A WeakKeyDictionary takes ten times as long."""

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
        settings: Settings of excitation backprop.
        rules: Rules by function. A rule that returns NotImplemented counts as no rule.
        gates: Functions whose results weight other signals.
        rectifies: Function that says whether the results of a call are never negative.
        module: The model. Messages name its layers.
        copied: Whether to copy the tensors that shares are computed from, for models that overwrite them.
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
        self.descent = Descent(settings.negative, Workspace())
        self.cancels = False
        """Whether the model has sums of nearly cancelling terms, which have large signed shares."""
        self._rules, self._gates, self._rectifies = rules, gates, rectifies
        self._module, self._copied = module, copied
        self._table = _SignalTable()
        self._opened: list[Any] = []

    def leaf(self, tensor: Tensor, source: int) -> tuple[Tensor, Tensor]:
        """Make a leaf of the graph with the tensor's values; return it and the tensor that replaces it in the model.

        Args:
            tensor: An input, or the output of the layer to stop at.
            source: See :class:`Signal`.
        """
        leaf = tensor.detach().requires_grad_()
        with torch.enable_grad():
            given = leaf.clone()  # a copy that the model may modify in place
        self._table[given] = Signal(source)
        return leaf, given

    def forget(self) -> None:
        """Forget all signals, and free the tensors that they keep alive."""
        self._table = _SignalTable()

    def mark(self, tensor: Tensor) -> Tensor:
        """Mark an input as a signal, and return it.

        Args:
            tensor: An input of the model.
        """
        self._table[tensor] = Signal(0)
        return tensor

    def carries(self, value: Any) -> bool:
        """Whether a value is a signal that carries probability.

        Args:
            value: Any argument of a function.
        """
        return isinstance(value, Tensor) and value.requires_grad and self._table.get(value) is not None

    def signal(self, value: Any) -> Signal | None:
        """Return the facts about a value; None if it is not a signal.

        Args:
            value: Any argument of a function.
        """
        return self._table.get(value) if isinstance(value, Tensor) else None

    def keep(self, tensor: Tensor) -> KeptTensor:
        """Keep a tensor, to compute shares from it later.

        Args:
            tensor: An argument of a function.
        """
        return KeptTensor(tensor, copied=self._copied, is_positive=self.is_positive(tensor))

    def is_positive(self, tensor: Tensor) -> bool:
        """Whether a tensor is known to have no negative elements for any input.

        Args:
            tensor: Any tensor of the forward pass.
        """
        signal = self._table.get(tensor)
        return signal is not None and signal.is_positive and signal.version == tensor._version

    def follow(self, tensor: Tensor, source: Tensor) -> None:
        """Mark a tensor that a rule computed from a signal as a signal too.

        Args:
            tensor: A part of the signal, or its copy.
            source: The signal.
        """
        signal = self._table.get(source)
        assert signal is not None
        self._table[tensor] = Signal(signal.source, signal.gate)

    def operation_of(self, y: Tensor) -> Weighted | None:
        """Return the weighted operation with output y; None if y or the operation's input has been overwritten.

        Args:
            y: A signal.
        """
        signal = self._table.get(y)
        if signal is None or signal.affine is None or y._version != signal.version or not signal.affine.a.intact:
            return None
        return signal.affine

    def apply(
        self, value: Callable[[], Tensor], back: Callable[[Tensor], Sequence[Tensor | None]], *signals: Tensor
    ) -> Tensor:
        """Compute a value that hands probability down to signals by a rule.

        Args:
            value: Function that computes the value.
            back: Function from the probability of the value to those of the signals.
            signals: The signals that the value is computed from.
        """
        return self.apply_at_once(value, lambda p: [back(one) for one in p], *signals)

    def apply_at_once(self, value: Callable[[], Tensor], back: Back, *signals: Tensor) -> Tensor:
        """Compute a value that hands probability down to signals by a rule for all targets at once.

        Args:
            value: Function that computes the value.
            back: Function from the probabilities of the value, for each target, to those of the signals.
            signals: The signals that the value is computed from.
        """
        return RuleNode.apply(value, back, None, *signals)  # type: ignore[no-any-return,no-untyped-call]

    def apply_affine(
        self, value: Callable[[], Tensor], affine: Affine, *besides: Tensor, activated: bool = False
    ) -> Tensor:
        """Compute the value of an affine operation, which hands probability down to its input.

        Args:
            value: Function that computes the value.
            affine: The operation.
            besides: Signals that the operation may modify; they get no share.
            activated: Whether the value is the output of an activation, so that a later scale does not belong to the
                operation.
        """
        # The closure must not hold this mode, which holds tensors that hold this node: nothing would free them.
        descent, nothing = self.descent, (None,) * len(besides)

        def back(p: Sequence[Tensor]) -> list[tuple[Tensor | None, ...]]:
            return [(won, *nothing) for won in affine.winners(p, descent)]

        y: Tensor = RuleNode.apply(value, back, affine, affine.a.tensor, *besides)  # type: ignore[no-untyped-call]
        if isinstance(affine, Weighted) and not activated:
            self.attach(y, affine)
        return y

    def attach(self, y: Tensor, affine: Weighted) -> None:
        """Mark a signal as the output of a weighted operation, up to positive factors and added constants.

        Args:
            y: The signal.
            affine: The operation.
        """
        signal = self._table.get(affine.a.tensor)
        self._table[y] = Signal(signal.source if signal else 0, affine=affine, version=y._version)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, with its rule in the graph."""
        call = Call(func, args, kwargs or {})
        given, signals = [], []
        for x in tensors_in(args) + tensors_in(kwargs) if kwargs else tensors_in(args):
            signal = self._table.get(x)
            if signal is not None:
                given.append(x)
                signals.append(signal)
        if not given:
            return self._look_inside(call, types)
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
        """Call a function of signals, with its rule in the graph, or else its derivative."""
        rule = self._rules.get(call.function)
        y = NotImplemented if rule is None else rule(self, call)
        if y is NotImplemented:
            below = {x.grad_fn for x in given}
            y = self._look_inside(call, types)
            self._label(_results(call, y), below, call)
        return y

    def _look_inside(self, call: Call, types: Any) -> Any:
        """Call a function under this mode again, so that the mode sees inside functions written in Python."""
        if call.function in self._opened or _redispatch is None:
            return call()
        self._opened.append(call.function)
        try:
            with self:
                return _redispatch(call.function, types, call.args, call.kwargs)
        finally:
            self._opened.pop()

    def _note(self, results: Sequence[Tensor], source: int, gate: bool, is_positive: bool) -> None:
        """Record the facts about the results of a function."""
        for result in results:
            version, signal = result._version, self._table.get(result)
            if signal is not None:
                if signal.affine is not None and signal.version == version:
                    continue
                source = min(source, signal.source)
            self._table[result] = Signal(source, gate, None, is_positive, version)
            base = result._base
            if base is not None and self._table.get(base) is None:
                self._table[base] = Signal(source)  # a constant with an overwritten part

    def accept_derivative(self, y: Tensor, x: Tensor) -> None:
        """Mark the derivative of y by x, both computed in a rule, as a part of that rule.

        Args:
            y: Tensor that the rule computed from x.
            x: The tensor.
        """
        for node in _between([y], {x.grad_fn}):
            node.metadata[LABEL] = None

    def _label(self, results: Sequence[Tensor], below: set[Any], call: Call) -> None:
        """Name the nodes of a function that ran with its own derivative, for messages."""
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
    """List the nodes of autograd's graph between some results and nodes below them, except nodes with rules."""
    found = []
    todo = [y.grad_fn for y in results]
    while todo:
        node = todo.pop()
        if node is not None and node not in below and not has_rule(node):
            below = {*below, node}
            found.append(node)
            todo += [n for n, _ in node.next_functions]
    return found


# Functions that return elements or averages of their inputs, so that nonnegative inputs give nonnegative results.
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
