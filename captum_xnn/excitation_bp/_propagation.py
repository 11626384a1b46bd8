r"""Run a model with rules in its graph, and hand probabilities down the graph for any number of targets.

:func:`run` passes inputs through a model. :meth:`Run.winners` starts from a prior on the output and hands it down to
the inputs, or to the layer to stop at. The K targets of one run go down together, as one batch.

The marginal winning probability (MWP) starts from probability 1 at the target. The contrastive probability (c-MWP) is
the MWP minus the MWP of the target's opposite, whose last layer has the weights -W. The two differ only in that layer,
and all rules are linear in p. So the difference is taken at the input of that layer, and handed down once.

Reference:
    Zhang, Bargal, Lin, Brandt, Shen, Sclaroff, "Top-Down Neural Attention by Excitation Backprop", International
    Journal of Computer Vision, 2018, section 3.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from captum_xnn.errors import LayerNotReachedError, UnsupportedOperationError
from captum_xnn.excitation_bp._graph import Graph, Place, is_reached, last_weighted, skipped_cells, unruled
from captum_xnn.excitation_bp._kept_tensor import OverwrittenError
from captum_xnn.excitation_bp._rules import GATES, RULES, rectifies
from captum_xnn.excitation_bp._settings import Settings
from captum_xnn.excitation_bp._shares import accurate
from captum_xnn.excitation_bp._signals import Signals
from captum_xnn.layers._integers import refuse_integers
from captum_xnn.layers._lookup import unwrap
from captum_xnn.layers._state import eager, untouched
from captum_xnn.layers._targets import per_example, select_each

__all__ = ["Run", "Stop", "Winners", "one_hot", "propagate", "refuse_scripted", "run", "signals"]

# Probabilities go down scaled by a power of 2: float16 has no numbers below 6e-8, and float32 numbers below 1e-38 make
# convolutions a hundred times slower.
_SCALES = {torch.float16: 2.0**12, torch.float64: 1.0}
_SCALE = 2.0**20


# Sum of absolute probabilities that raises a warning. Their sum is 1, and a contrast has absolute values up to 2.
_CANCELLING = 5.0

_AT_EMBEDDING = "stop at the embedding: LayerExcitationBP(model, layer) or ExcitationMaps(layer)"


@dataclass(frozen=True)
class Stop:
    """The layer to stop at."""

    module: nn.Module
    name: str
    at_input: bool = False
    """Whether to stop at the layer's input instead of its output."""


@dataclass(frozen=True)
class Winners:
    """Winning probabilities of K targets."""

    p: tuple[Tensor, ...]
    """For each leaf (K, N, ...), in float32 or float64."""
    delta: Tensor
    """(K, N): 1, or 0 for the contrastive difference, minus the sum of p."""
    lost: Tensor
    """(K, N): the sum at the start minus the sum of p. An output without negative weights has no opposite, so its
    contrastive probabilities sum to 1 at the start."""
    reached: tuple[bool, ...]
    """For each leaf, whether the target depends on it. Some tensors of a layer may go nowhere."""


@dataclass(frozen=True)
class Run:
    """A forward pass with its graph, ready for probabilities."""

    output: Tensor
    """The model's output."""
    graph: Graph
    """The graph, with rules in place of derivatives."""
    leaves: tuple[Tensor, ...]
    """The inputs, or the output of the layer to stop at."""
    is_cut: bool
    """Whether every path to the output goes through the leaves, so that their probabilities sum to 1."""
    mode: Signals
    """The mode under which the model ran."""
    skipped: dict[tuple[int, ...], tuple[int, ...]]
    """Strides of convolutions that skip cells, by height and width of the grid that they read."""

    def winners(self, prior: Tensor) -> Winners:
        """Compute the winning probabilities of the leaves. This uses up the graph.

        Args:
            prior: Probabilities of the output for K targets, (K, N, ...), which sum to 1 for each target and example.

        Raises:
            UnsupportedOperationError: If an operation cannot be seen, or has no rule and ``strict`` is set.
            ValueError: If the target does not depend on the leaves, or no layer has weights to contrast.
        """
        self._check()
        scale = min(_SCALES.get(dtype, _SCALE) for dtype in self._dtypes())
        starts = [(self.graph.root, list(prior.to(self.output.dtype) * scale))]
        if self.mode.settings.contrastive:
            starts = self._contrasted(starts)
        ends = [self.graph.place(get_gradient_edge(leaf)) for leaf in self.leaves]
        try:
            arrived = self.graph.descend(starts, ends, self.mode.descent, is_last=True)
        except CheckpointError as error:
            raise UnsupportedOperationError(
                "excitation backprop cannot see the checkpointed parts of the model, which run a second time; turn "
                "checkpointing off"
            ) from error
        p = [
            torch.stack([accurate(one) for one in found]) / scale
            if found is not None
            else accurate(leaf.new_zeros(len(prior), *leaf.shape))
            for found, leaf in zip(arrived, self.leaves, strict=True)
        ]
        mass = _mass(p)
        start = _mass([torch.stack(one) for _, one in starts]) / scale
        delta = (0 if self.mode.settings.contrastive else 1) - mass
        return Winners(tuple(p), delta, start - mass, tuple(found is not None for found in arrived))

    def _dtypes(self) -> set[torch.dtype]:
        """Collect the dtypes of all tensors on the way: a float32 encoder may follow a float16 model."""
        inner = (made.dtype for node in self.graph.nodes for made in node._input_metadata)
        return {self.output.dtype, *(leaf.dtype for leaf in self.leaves), *inner}

    def _contrasted(self, starts: Sequence[tuple[Place, list[Tensor]]]) -> list[tuple[Place, list[Tensor]]]:
        """Compute the probabilities of the inputs of the last weighted operations by W, minus those by -W."""
        last = last_weighted(self.graph.nodes)
        if not last:
            raise ValueError(
                "there are no weights to contrast between the target and the layer to stop at; stop at an earlier "
                "layer or set contrastive=False"
            )
        ends, descent = [self.graph.place(GradientEdge(node, 0)) for node in last], self.mode.descent
        arrived = self.graph.descend(starts, ends, descent)
        descent.is_spent = False
        found = []
        for node, p in zip(last, arrived, strict=True):
            a = node.affine.a
            place = None if a.edge is None else self.graph.place(a.edge)
            if place is not None and p is not None:
                p = [accurate(one) for one in p]
                sides = node.affine.winners(p, descent), node.affine.opposite().winners(p, descent)
                difference = [(x - y).to(a.value.dtype) for x, y in zip(*sides, strict=True)]
                found.append((place, difference))
        return found

    def _check(self) -> None:
        """Raise or warn where probability cannot reach the leaves by rules alone."""
        if not is_reached(self.leaves, self.graph.nodes):
            raise ValueError(
                "the target does not depend on the inputs, or on the layer to stop at; choose a layer that the model "
                "runs before the target, or remove detach and numpy between them"
            )
        found = unruled(self.graph.nodes)
        if not found:
            return
        listed = ", ".join(f"{operation} in {module!r}" for operation, module in found)
        if self.mode.settings.strict:
            raise UnsupportedOperationError(
                f"excitation backprop has no rule for {listed}; strict=False takes their gradient instead"
            )
        warnings.warn(
            f"excitation backprop has no rule for {listed} and takes their gradient, so the sum of probabilities may "
            "change. Stop at a layer behind them, or pass strict=True for an error",
            stacklevel=4,
        )


def _mass(p: Sequence[Tensor]) -> Tensor:
    """Sum probabilities (K, N, ...) over all dimensions but K and N."""
    return torch.stack([accurate(x).unsqueeze(-1).flatten(2).sum(2) for x in p]).sum(0)


def signals(settings: Settings, module: nn.Module | None = None, *, copied: bool = False) -> Signals:
    """Make the mode under which a model runs, with the rules of all functions.

    Args:
        settings: Settings of excitation backprop.
        module: The module that runs, if any. Messages name its layers.
        copied: Whether to keep copies of all tensors needed later.
    """
    return Signals(settings, RULES, GATES, rectifies, module, copied=copied)


def run(
    forward: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...],
    mode: Signals,
    *,
    stop: Stop | None = None,
) -> Run:
    """Run a model with rules in its graph.

    Args:
        forward: The model, or a function of its arguments that returns one tensor.
        inputs: Tensors (N, ...), which the model may modify.
        additional: Further arguments; they get no share.
        mode: A new mode from :func:`signals`.
        stop: The layer to stop at; the inputs if None.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer to stop at.
        TypeError: If the inputs to stop at are not floating-point tensors.
        ValueError: If no tensor to stop at has a row for each example.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if stop is None:
            refuse_integers(inputs, "excitation backprop", _AT_EMBEDDING)
            pairs = [mode.leaf(x, 0) for x in inputs]
            leaves, given = [leaf for leaf, _ in pairs], [x for _, x in pairs]
            calls = [0]
        else:
            leaves, given, calls = [], [mode.mark(x.detach()) for x in inputs], [0]
            stack.enter_context(_stopping(mode, stop, leaves, calls))
        with mode:
            output = forward(*given, *additional)
    if stop is not None and not leaves:
        raise LayerNotReachedError(
            f"the forward pass did not call layer {stop.name!r} with a floating-point tensor; choose a layer that runs "
            "for these inputs"
        )
    if not isinstance(output, Tensor) or output.dim() == 0:
        kind = "one number for all examples" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise TypeError(
            f"the model returns {kind} instead of one tensor with a row for each example; wrap it in a module that "
            "picks the tensor to explain"
        )
    rows = tuple(leaf for leaf in leaves if leaf.dim() > 0 and len(leaf) == len(output))
    if not rows:
        raise ValueError(
            f"the layer to stop at has outputs of shape {[tuple(x.shape) for x in leaves]}, without a row for each of "
            f"{len(output)} examples; stop at another layer"
        )
    signal = mode.signal(output)
    mode.forget()
    is_cut = signal is not None and signal.source == calls[0]
    graph = Graph(output)
    return Run(output.detach(), graph, rows, is_cut, mode, skipped_cells(graph.nodes))


def propagate(
    forward: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...],
    settings: Settings,
    prior: Callable[[Tensor], Tensor],
    *,
    module: nn.Module | None = None,
    stop: Stop | None = None,
    tolerance: float = 1e-3,
) -> tuple[Run, Winners]:
    """Run a model and compute the winning probabilities for a prior; leave model and inputs unchanged.

    Args:
        forward: The model, or a function of its arguments that returns one tensor.
        inputs: Tensors (N, ...).
        additional: Further arguments; they get no share.
        settings: Settings of excitation backprop.
        prior: Function from the output to its probabilities (K, N, ...).
        module: The module that runs, if any.
        stop: The layer to stop at; the inputs if None.
        tolerance: Probability that may be lost without a warning. Rounding loses less, even in half precision.

    Raises:
        LayerNotReachedError: If the forward pass never calls the layer to stop at.
        TypeError: If the inputs to stop at are not floating-point tensors.
        UnsupportedOperationError: If an operation cannot be seen, or has no rule and ``strict`` is set.
        ValueError: If the target does not depend on the leaves, or no layer has weights to contrast.
    """

    def ran(copied: bool) -> tuple[Run, Winners]:
        copies = tuple(x.detach().clone() for x in inputs)
        others = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in additional)
        done = run(forward, copies, others, signals(settings, module, copied=copied), stop=stop)
        with torch.autocast(done.output.device.type, enabled=False):
            return done, done.winners(prior(done.output))

    with torch.inference_mode(False), _at_rest(module):
        try:
            done, winners = ran(copied=False)
        except OverwrittenError:
            # The model overwrites tensors that shares are computed from. Models that are not in training may do this.
            done, winners = ran(copied=True)
    if done.is_cut:
        _warn_of_loss(winners.lost, tolerance)
    if done.mode.cancels and settings.negative != "raw":
        _warn_of_cancelling(winners.p)
    return done, winners


@contextmanager
def _at_rest(module: nn.Module | None) -> Iterator[None]:
    """Keep a module unchanged, in evaluation mode and not compiled."""
    with nullcontext() if module is None else untouched(module), eager():
        yield


def refuse_scripted(forward: Any) -> None:
    """Raise if a model, or a part of it, does not run as Python code.

    Args:
        forward: The model, or a function.

    Raises:
        TypeError: If the model, or a part of it, is scripted or traced.
    """
    parts = unwrap(forward).modules() if isinstance(forward, nn.Module) else [forward]
    for part in parts:
        if isinstance(part, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            raise TypeError(
                f"excitation backprop needs a model that runs as Python code, and cannot see operations of a "
                f"{type(part).__name__}; use the module or function that was scripted or traced"
            )


def one_hot(output: Tensor, target: Any) -> Tensor:
    """Put probability 1 on the target of each example, (N, ...).

    Args:
        output: Output of the model (N, ...).
        target: The target, as everywhere in Captum.

    Example:
        >>> one_hot(torch.zeros(2, 3), [0, 2])
        tensor([[1., 0., 0.],
                [0., 0., 1.]])
    """
    if not len(output):
        return torch.zeros_like(output)
    leaf = output.detach().requires_grad_()
    with torch.enable_grad():
        chosen = select_each(leaf, per_example(target, len(leaf)))
    return torch.autograd.grad(chosen.sum(), leaf)[0]


def _warn_of_loss(lost: Tensor, tolerance: float) -> None:
    """Warn where more probability than the tolerance is lost."""
    worst = float(lost.flatten()[lost.abs().argmax()]) if lost.numel() else 0.0
    if abs(worst) > tolerance:
        warnings.warn(
            f"probabilities sum to {1 - worst:.3f} where they arrive, not to 1. The rest was lost at neurons without "
            "an active child, at constants such as a class token, or at operations without a rule. Stop at a later "
            "layer, or get the loss of each example with return_convergence_delta=True",
            stacklevel=5,
        )


def _warn_of_cancelling(p: Sequence[Tensor]) -> None:
    """Warn where shares of opposite signs are much larger than the probability that they divide."""
    size = _mass([one.abs() for one in p])
    most = float(size.amax()) if size.numel() else 0.0
    if most > _CANCELLING:
        warnings.warn(
            f"winning probabilities of opposite signs cancel: their absolute values sum to {most:.3g} in one example, "
            "but they divide a probability of 1. Sums of nearly opposite terms cause this, such as f(a) - f(b) in "
            "Siamese networks, and sometimes residual sums. Pass add='excitatory', or stop at a layer behind them",
            stacklevel=5,
        )


@contextmanager
def _stopping(mode: Signals, stop: Stop, leaves: list[Tensor], calls: list[int]) -> Iterator[None]:
    """Cut the graph at the last call of a layer, and put its leaves into a list."""
    thread = threading.get_ident()

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            leaf, given = mode.leaf(value, calls[0])
            leaves.append(leaf)
            return given
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)(cut(v) for v in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((k, cut(v)) for k, v in value.items())
        return value

    def on_call(_module: nn.Module, args: Any, output: Any = None) -> Any:
        if threading.get_ident() != thread:
            return None
        calls[0] += 1
        leaves.clear()
        return cut(args if stop.at_input else output)

    register = stop.module.register_forward_pre_hook if stop.at_input else stop.module.register_forward_hook
    handle = register(on_call)
    try:
        yield
    finally:
        handle.remove()
