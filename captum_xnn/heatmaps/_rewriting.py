"""Rewrite a traced graph so that methods of Captum see each operation as a module that runs once.

A graph is rewritten in this order:

1. A function becomes a module where a module does the same.
2. A module that runs twice, or in place, becomes a module of its own at each call. Weights stay shared.
3. A view separates two non-linearities in a row, because Captum would hook the tensor between them twice.
4. Overlapping windows of a max-pooling are laid side by side, because DeepLift keeps one value for each cell.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from captum_xnn.layers._forward_args import Sum

__all__ = ["Function", "Rewriting"]

# fmt: off
_NONLINEAR = (
    nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax, nn.MaxPool1d, nn.MaxPool2d,
    nn.MaxPool3d,
)
# fmt: on


class Function(NamedTuple):
    """A call of a function that has no module."""

    name: str
    signals: tuple[int | str, ...]
    """Positions or names of the arguments that depend on the model's inputs."""


class Rewriting:
    """Rewrites a graph in place. See the module's head for the steps.

    Args:
        graph: The graph to rewrite.
        modules: The model's modules by name. New modules are added.
        signals: Tensors that depend on the inputs, as nodes, with their number of dimensions.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], signals: dict[fx.Node, int]) -> None:
        self._graph, self._modules, self._signals = graph, modules, signals
        self._used: set[nn.Module] = set()
        self.functions: dict[str, Function] = {}
        """Functions that stay functions, by the names of their nodes."""
        self.layers: dict[str, str] = {}
        """Name in the graph of each module's last call, by the module's own name."""

    def run(self) -> None:
        """Rewrite the graph."""
        for node in list(self._graph.nodes):
            if node in self._signals:
                if node.op == "call_module":
                    self._rewrite_module(node)
                else:
                    self._rewrite_function(node)
        self._separate_nonlinearities()
        for node in list(self._graph.nodes):
            if node.op == "call_module" and isinstance(self._modules[str(node.target)], _POOLS):
                self._separate_windows(node)

    def _rewrite_module(self, node: fx.Node) -> None:
        """Drop a module without effect; give a repeated or in-place call a module of its own."""
        module = self._modules[str(node.target)]
        if not node.args and len(node.kwargs) == 1:  # Captum's hooks see no input passed by keyword
            node.args, node.kwargs = tuple(node.kwargs.values()), {}
        if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            self._graph.erase_node(node)
            return
        if isinstance(module, nn.Flatten):
            with self._graph.inserting_before(node):
                flat = self._graph.call_function(torch.flatten, (node.args[0], module.start_dim, module.end_dim))
            node.replace_all_uses_with(flat)
            self._graph.erase_node(node)
            return
        name = str(node.target)
        if module in self._used or getattr(module, "inplace", False):
            node.target = self._add(_copy_without_hooks(module), name)
        self._used.add(module)
        self.layers[name] = str(node.target)

    def _rewrite_function(self, node: fx.Node) -> None:
        """Replace a function by a module, if there is one; otherwise note the function."""
        key = node.target
        if key is F.dropout and not node.kwargs.get("training", True):
            node.replace_all_uses_with(node.all_input_nodes[0])
            self._graph.erase_node(node)
            return
        make = _relu if key in _CLAMPS and self._is_relu(node) else _MODULES.get(key)
        if make is not None and len(node.all_input_nodes) == 1:  # no other argument depends on the input
            args, kwargs = (node.args[1:], node.kwargs) if node.args else ((), _without(node.kwargs, "input"))
            signal = node.args[0] if node.args else node.kwargs["input"]
            module = make() if make is _relu else make(*args, **_without(kwargs, "inplace", "training", "_stacklevel"))
            new: tuple[Any, ...] = (signal,)
        elif key in _SUMS and not _without(node.kwargs, "input", "other") and self._adds_two_signals(node):
            module, new = Sum(), tuple(node.all_input_nodes) * (2 if len(node.all_input_nodes) == 1 else 1)
        elif key in _MEANS and self._averages_places(node):
            module, new = nn.AdaptiveAvgPool2d(1), (node.args[0],)
            if not node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2]):
                with self._graph.inserting_after(node):
                    flat = self._graph.call_method("flatten", (node, 1))
                node.replace_all_uses_with(flat, lambda user: user is not flat)
        else:
            if node.op in ("call_function", "call_method"):
                name = key if isinstance(key, str) else getattr(key, "__name__", str(key))
                arguments: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
                self.functions[node.name] = Function(name, tuple(at for at, x in arguments if self._depends(x)))
            return
        node.op, node.target = "call_module", self._add(module, node.name)
        node.args, node.kwargs = new, {}

    def _is_relu(self, node: fx.Node) -> bool:
        """Whether a clamp computes a ReLU."""
        names = ("input", "min", "max")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        low, high = given.get("min"), given.get("max")
        return isinstance(low, (int, float)) and low == 0 and high is None

    def _depends(self, argument: Any) -> bool:
        """Whether an argument is a tensor that depends on the inputs, or a list with such a tensor."""
        if isinstance(argument, (list, tuple)):
            return any(self._depends(x) for x in argument)
        return argument in self._signals if isinstance(argument, fx.Node) else False

    def _adds_two_signals(self, node: fx.Node) -> bool:
        """Whether both terms of a sum depend on the inputs."""
        terms = [*node.args, *node.kwargs.values()]
        return len(terms) == 2 and all(isinstance(x, fx.Node) and x in self._signals for x in terms)

    def _averages_places(self, node: fx.Node) -> bool:
        """Whether a mean runs over both spatial dimensions of feature maps (N, C, H, W)."""
        over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        has_known_arguments = not _without(node.kwargs, "dim", "keepdim") and node.args
        over_both = isinstance(over, (tuple, list)) and sorted(d % 4 for d in over if isinstance(d, int)) == [2, 3]
        return bool(has_known_arguments) and over_both and self._signals.get(node.args[0]) == 4  # type: ignore[arg-type]

    def _separate_nonlinearities(self) -> None:
        """Put a view between two non-linearities in a row."""
        for node in list(self._graph.nodes):
            if self._is_nonlinear(node):
                for before in node.all_input_nodes:
                    if self._is_nonlinear(before):
                        with self._graph.inserting_before(node):
                            node.replace_input_with(before, self._graph.call_method("view_as", (before, before)))

    def _separate_windows(self, node: fx.Node) -> None:
        """Lay the windows of a max-pooling side by side, if they overlap."""
        pool: Any = self._modules[str(node.target)]
        dims = 1 + _POOLS.index(type(pool)) if type(pool) in _POOLS else 0
        kernel, stride, padding, dilation = (
            n if isinstance(n, tuple) else (n,) * dims
            for n in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        )
        if (
            not dims
            or pool.return_indices
            or all(k <= s and d == 1 for k, s, d in zip(kernel, stride, dilation, strict=True))
        ):
            return
        with self._graph.inserting_before(node):
            arguments = (node.args[0], kernel, stride, padding, dilation, pool.ceil_mode)
            apart = self._graph.call_function(windows, arguments)
        node.args = (apart,)
        old, node.target = node.target, self._add(type(pool)(kernel, kernel), str(node.target))
        self.layers = {name: node.target if new == old else new for name, new in self.layers.items()}

    def _is_nonlinear(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._modules[str(node.target)], _NONLINEAR)

    def _add(self, module: nn.Module, like: str) -> str:
        """Add a module under a new name, and return the name."""
        name = next(n for i in itertools.count(1) if (n := f"{like.replace('.', '_')}__{i}") not in self._modules)
        self._modules[name] = module.eval()
        return name


def windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Lay the windows of a max-pooling side by side, so that a pooling with stride ``kernel`` gives the same result.

    Args:
        x: Input (N, C, ...) with a spatial dimension for each number of the other arguments.
        kernel: As in :class:`torch.nn.MaxPool2d`, and so on.
        stride: Steps between windows.
        padding: Cells added on both sides, which are never the maximum.
        dilation: Steps between cells of a window.
        ceil_mode: Whether a window may end outside of the input.

    Example:
        >>> windows(torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]]), (3,), (2,), (0,), (1,), False)
        tensor([[[1., 2., 3., 3., 4., 5.]]])
    """
    for dim, (k, step, pad, gap) in enumerate(zip(kernel, stride, padding, dilation, strict=True), start=2):
        size = x.shape[dim]
        span = gap * (k - 1) + 1
        count = (size + 2 * pad - span + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (count - 1) * step >= size + pad:
            count -= 1  # the last window may not start in the padding
        begins = torch.arange(count, device=x.device) * step - pad
        cells = (begins[:, None] + torch.arange(k, device=x.device) * gap).flatten()
        inside = (cells >= 0) & (cells < size)
        picked = x.index_select(dim, cells.clamp(0, size - 1))
        shape = [-1 if i == dim else 1 for i in range(x.dim())]
        x = picked.masked_fill(~inside.reshape(shape), torch.finfo(x.dtype).min / 4)
    return x


def _copy_without_hooks(module: nn.Module) -> nn.Module:
    """Copy a module with the same parameters, without hooks, and not in place."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, OrderedDict) and name.endswith("_hooks"):
            setattr(twin, name, OrderedDict())
    if "inplace" in vars(twin):
        vars(twin)["inplace"] = False
    return twin


def _without(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in names}


def _pool(make: Callable[..., nn.Module], *positional: str) -> Callable[..., nn.Module]:
    """Return a function that makes a pooling module of the arguments of a pooling function; their order differs."""

    def made(*args: Any, **kwargs: Any) -> nn.Module:
        return make(**dict(zip(positional, args, strict=False)), **kwargs)

    return made


def _relu() -> nn.Module:
    return nn.ReLU()


_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_MODULES: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"), _relu),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), nn.Sigmoid),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), nn.Tanh),
    **dict.fromkeys((torch.softmax, F.softmax, "softmax"), lambda dim=None, **_: nn.Softmax(dim)),
    F.leaky_relu: lambda negative_slope=0.01, *_: nn.LeakyReLU(negative_slope),
    F.elu: lambda alpha=1.0, *_: nn.ELU(alpha),
    F.softplus: nn.Softplus,
    F.max_pool1d: _pool(nn.MaxPool1d, *_MAX),
    F.max_pool2d: _pool(nn.MaxPool2d, *_MAX),
    F.max_pool3d: _pool(nn.MaxPool3d, *_MAX),
    F.avg_pool2d: _pool(nn.AvgPool2d, *_AVERAGE),
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
}
_CLAMPS = (
    torch.clamp, torch.clamp_, torch.clamp_min, torch.clamp_min_, torch.clip, "clamp", "clamp_", "clamp_min",
    "clamp_min_", "clip", "clip_",
)  # fmt: skip
_MEANS = (torch.mean, "mean")
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
