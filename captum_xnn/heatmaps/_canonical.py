"""A network's twin made of modules, for methods of Captum that see nothing but modules.

DeepLift, LRP and the guided methods replace the derivatives of modules of known types. What a model does by functions
they take as it is, and are wrong without a word: a functional ReLU, the sum of a residual block, a module that runs
twice, two non-linearities one right after the other, overlapping windows of a max-pooling (of which DeepLift loses a
tenth in a ResNet-18). :func:`canonical` follows the model up to the explained layer with ``torch.fx`` and writes all of
these as modules that run once each. Weights are shared, outputs are the same.

Models that decide by their values what to do next cannot be followed.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from captum.attr import Attribution
from torch import Tensor, fx, nn
from torch.nn import functional as F

from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._forward_args import DEEPLIFT_TYPES, LRP_TYPES, Sum
from captum_xnn.layers._state import eager

__all__ = ["CanonicalNetwork", "Twins", "canonical", "needs_modules", "refuse_unfit"]

# fmt: off
_NONLINEAR = (
    nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax, nn.MaxPool1d, nn.MaxPool2d,
    nn.MaxPool3d,
)
# fmt: on


class Function(NamedTuple):
    """What a model does by a function that stays one."""

    name: str
    signals: tuple[int | str, ...]
    """Which of its arguments depend on the model's inputs, by place or name."""


class CanonicalNetwork(nn.Module):
    """The explained model up to a layer, as modules that run once each, continued by the encoder of x-features.

    Args:
        network: What it is the twin of.
        graph: The model up to the explained layer.
        functions: What is left in it that is no module, by the names of its nodes.
        layers: Under which name the last call of each module of the model stands in the graph.
    """

    def __init__(
        self,
        network: ExplanationNetwork,
        graph: fx.GraphModule,
        functions: Mapping[str, Function],
        layers: dict[str, str],
    ) -> None:
        super().__init__()
        self.graph = graph
        self.functions = functions
        self.layers = layers
        self.xnn_encoder = network.xnn_encoder
        self.hold = network.hold
        self.output_transform = network.output_transform
        self.training = False

    def forward(self, *inputs: Any) -> Tensor:
        """Return the x-features, (N, n).

        Args:
            inputs: All positional arguments of the model.
        """
        Z = self.graph(*self.hold(inputs))
        return self.xnn_encoder(Z if self.output_transform is None else self.output_transform(Z))

    def layer(self, name: str) -> nn.Module:
        """Return the module that stands for a layer of the model.

        Args:
            name: The layer's dotted name.

        Raises:
            UnsupportedOperationError: If it is no single module here.
        """
        if name not in self.layers:
            around = next((other for other in self.layers if name.startswith(f"{other}.")), None)
            if around is not None:
                kind = type(self.graph.get_submodule(self.layers[around])).__name__
                raise UnsupportedOperationError(
                    f"layer {name!r} is a part of {around!r}, a {kind}, which this method takes as one operation; name "
                    f"{around!r}, or draw with LayerIntegratedGradients"
                )
            raise UnsupportedOperationError(
                f"layer {name!r} is not one operation that gives one tensor, as this method needs it; name the last "
                "layer in it or the next one behind it, or draw with LayerIntegratedGradients"
            )
        return self.graph.get_submodule(self.layers[name])

    def called(self) -> list[nn.Module]:
        """Return the modules that run, in order."""
        return [ran for ran in self.operations() if isinstance(ran, nn.Module)]

    def operations(self, after: nn.Module | None = None) -> list[nn.Module | Function]:
        """Return the modules that run and the functions between them, in order.

        Args:
            after: A module of the graph, to return only what depends on it.
        """
        behind: set[fx.Node] = set()
        found: list[nn.Module | Function] = []
        for node in self.graph.graph.nodes:
            module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if after is None or any(before in behind for before in node.all_input_nodes):
                behind.add(node)
                ran = self.functions.get(node.name) if module is None else module
                found += [] if ran is None else [ran]
            elif module is after:
                behind.add(node)
        return found


def needs_modules(method: type[Attribution]) -> bool:
    """Return whether a method of Captum replaces derivatives of modules.

    Args:
        method: A class of ``captum.attr``.

    Example:
        >>> from captum.attr import DeepLift, Saliency
        >>> needs_modules(DeepLift), needs_modules(Saliency)
        (True, False)
    """
    return any(
        base.__name__ in ("DeepLift", "LRP", "ModifiedReluGradientAttribution", "GuidedGradCam")
        for base in method.__mro__
    )


def canonical(network: ExplanationNetwork, inputs: tuple[Any, ...]) -> CanonicalNetwork:
    """Return a network's twin made of modules.

    Args:
        network: From the model's inputs to its x-features.
        inputs: All positional arguments of the model, to compare the two with.

    Raises:
        UnsupportedOperationError: If the model cannot be followed, or the twin does not compute the same.

    Example:
        >>> from captum_xnn.models._srae import SRAE
        >>> class Functional(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        ...
        ...     def forward(self, x):
        ...         return self.two(F.relu(self.one(x)) + x)
        >>> twin = canonical(ExplanationNetwork(Functional(), "two", SRAE(4, 2, hidden=())), (torch.rand(3, 4),))
        >>> [type(m).__name__ for m in twin.graph.modules() if not list(m.children())]
        ['Linear', 'ReLU', 'Addition_Module', 'Linear']
    """
    with torch.no_grad(), eager():
        return _same(CanonicalNetwork(network, *_followed(network, network.hold(inputs))), network, inputs)


class Twins:
    """Twins that are kept for the next call, until the model is another: following it takes as long as a few images.

    A model that computes otherwise by something outside of it, such as a global setting, is not noticed.

    Example:
        >>> from captum_xnn.models._srae import SRAE
        >>> network, twins = ExplanationNetwork(nn.Sequential(nn.ReLU()), "0", SRAE(4, 2, hidden=())), Twins()
        >>> x = torch.rand(1, 4)
        >>> twins.of(network, (x,)).graph is twins.of(network, (x,)).graph
        True
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, dict[Any, tuple[list[Any], tuple[Any, ...]]]] = WeakKeyDictionary()

    def of(self, network: ExplanationNetwork, inputs: tuple[Any, ...]) -> CanonicalNetwork:
        """Return a network's twin, in which the model up to the layer may be known already.

        Args:
            network: From the model's inputs to its x-features.
            inputs: All positional arguments of the model, to compare the two with.

        Raises:
            UnsupportedOperationError: If the model cannot be followed, or the twin does not compute the same.
        """
        known, state = self._known.setdefault(network.model, {}), _state(network.model)
        key = network.layer_name, repr([x for x in inputs if not isinstance(x, Tensor)])
        if key in known and known[key][0] == state:
            (_, (graph, functions, layers)) = known[key]
            return CanonicalNetwork(network, graph, functions, layers)
        twin = canonical(network, inputs)
        known[key] = state, (twin.graph, twin.functions, twin.layers)
        return twin


def _state(model: nn.Module) -> list[Any]:
    """Return what a model's computation depends on but the values of its tensors, which a twin shares."""
    found: list[Any] = []
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k != "training"}
        found.append((name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks)))
        found += [(k, v if isinstance(v, (bool, int, float, str)) else id(v)) for k, v in own.items()]
        found += [id(tensor) for kind in (module._parameters, module._buffers) for tensor in kind.values()]
    return found


def _same(twin: CanonicalNetwork, network: ExplanationNetwork, inputs: tuple[Any, ...]) -> CanonicalNetwork:
    """Return the twin, or raises where it does not compute what the network does."""
    wanted, made = network(*_copies(inputs)), twin(*_copies(inputs))
    size = float(wanted.abs().max().nan_to_num(0)) if wanted.numel() else 0.0
    if wanted.shape != made.shape or not torch.allclose(wanted, made, rtol=1e-4, atol=1e-5 * size, equal_nan=True):
        raise UnsupportedOperationError(
            f"expected a model that torch.fx can follow up to layer {network.layer_name!r}, got one that computes "
            "something else for these inputs than what was written down of it"
        )
    return twin


class _Tracer(fx.Tracer):
    """Follows a model, and notes what the explained layer returns."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self._layer, self._registered = layer, set(model.modules())
        self.result: Any = None

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what a module returns; one made in forward, as in ``nn.ReLU()(x)``, counts as its operations."""
        if m not in self._registered:
            return forward(*args, **kwargs)
        made = super().call_module(m, forward, args, kwargs)
        if m is self._layer:
            self.result = made
        return made


def refuse_unfit(method: type[Attribution], twin: CanonicalNetwork, layer: nn.Module | None = None) -> None:
    """Raise if a method of Captum silently lacks a rule for something in a network.

    Args:
        method: A class of ``captum.attr``.
        twin: A network made of modules.
        layer: The module of it that a form of DeepLift explains; only what follows is looked at.

    Raises:
        UnsupportedOperationError: If so, naming it.
    """
    bases = {base.__name__ for base in method.__mro__}
    if "LRP" in bases:
        unfit = [_name(x) for x in twin.operations() if not _has_lrp_rule(x)]
    elif "DeepLift" in bases:
        encoder = twin.xnn_encoder.modules() if isinstance(twin.xnn_encoder, nn.Module) else ()
        ran = [*twin.operations(layer), *(m for m in encoder if next(m.children(), None) is None)]
        unfit = [_name(x) for x in ran if not _is_linear(x) and type(x) not in DEEPLIFT_TYPES]
    else:
        names = [_name(x) for x in twin.operations()]
        refused = _RECTIFIERS if "ReLU" in names else _RECTIFIERS | _SQUASHES
        unfit = [name for name in names if name.lower().rstrip("_") in refused]
    if unfit:
        would = "which it would take for linear" if "DeepLift" in bases else "whose plain gradient it would take"
        raise UnsupportedOperationError(
            f"expected operations that {method.__name__} has a rule for, got {', '.join(dict.fromkeys(unfit))}, "
            f"{would}; use IntegratedGradients or the default heatmap"
        )


def _name(ran: nn.Module | Function) -> str:
    return ran.name if isinstance(ran, Function) else type(ran).__name__


def _has_lrp_rule(ran: nn.Module | Function) -> bool:
    if isinstance(ran, Function):
        return ran.name in _ROUTES
    return type(ran) in LRP_TYPES or hasattr(ran, "rule")


def _is_linear(ran: nn.Module | Function) -> bool:
    """Whether an operation is linear in all that depends on the model's inputs, but for a constant."""
    if isinstance(ran, nn.Module):
        return isinstance(ran, _LINEAR) or getattr(ran, "linear", False) is True
    if ran.name in _PRODUCTS:
        return len(ran.signals) == 1
    return ran.name in _ROUTES or ran.name in _TERMS or (ran.name in _QUOTIENTS and ran.signals == (0,))


# Functions that hand on what is given to their results.
_ROUTES = frozenset(
    {
        "cat", "chunk", "clone", "concat", "contiguous", "expand", "flatten", "getitem", "movedim", "permute",
        "reshape", "split", "squeeze", "stack", "transpose", "unbind", "unflatten", "unsqueeze", "view",
        "view_as", "windows",
    }
)  # fmt: skip
_TERMS = frozenset(
    {
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "add", "add_", "avg_pool1d", "avg_pool2d",
        "avg_pool3d", "iadd", "interpolate", "isub", "mean", "neg", "pad", "roll", "sub", "sub_", "sum",
    }
)  # fmt: skip
_PRODUCTS = frozenset({"conv1d", "conv2d", "conv3d", "imul", "linear", "matmul", "mul", "mul_"})
_QUOTIENTS = frozenset({"div", "div_", "itruediv", "truediv"})
_LINEAR = (
    nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd, nn.Upsample, nn.PixelShuffle, nn.Unflatten, nn.Flatten, nn.Identity,
    nn.modules.dropout._DropoutNd, Sum,
)  # fmt: skip
# What stands in the place of a ReLU, or holds one that no hook sees.
_RECTIFIERS = frozenset(
    {
        "celu", "clamp", "clamp_min", "clip", "elu", "gelu", "glu", "hardswish", "hardtanh", "leaky_relu", "leakyrelu",
        "maximum", "mish", "prelu", "relu6", "rrelu", "selu", "silu", "softplus", "threshold", "transformer",
        "transformerdecoder", "transformerdecoderlayer", "transformerencoder", "transformerencoderlayer",
    }
)  # fmt: skip
# What gates beside ReLUs are made of, and networks without ReLUs.
_SQUASHES = frozenset({"gru", "hardsigmoid", "logsigmoid", "lstm", "rnn", "sigmoid", "softsign", "tanh"})


def _followed(
    network: ExplanationNetwork, inputs: tuple[Any, ...]
) -> tuple[fx.GraphModule, dict[str, Function], dict[str, str]]:
    """Return the model up to the explained layer, rewritten, the functions left in it, and new names of modules."""
    tracer = _Tracer(network.model, network.layer)
    try:
        graph = tracer.trace(network.model, concrete_args=_fixed_arguments(network.model, inputs))
        end = next(node for node in graph.nodes if node.op == "output")
        if network.layer is not network.model:
            if tracer.result is None:
                raise RuntimeError("a layer inside of one that is taken as a whole")
            graph.erase_node(end)
            graph.output(tracer.create_arg(tracer.result))
    except Exception as error:  # whatever the model's own code raises when it meets no tensors
        raise UnsupportedOperationError(
            f"expected a model that torch.fx can follow up to layer {network.layer_name!r}, got {error}; use "
            "IntegratedGradients or the default heatmap, which need no modules"
        ) from error
    for node in reversed(graph.nodes):  # what comes after the layer, and assertions
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    modules = dict(network.model.named_modules())
    rewriting = _Rewriting(graph, modules, _carriers(network.model, graph, inputs))
    rewriting.run()
    graph.lint()
    return fx.GraphModule(_root(network.model, graph, modules), graph), rewriting.functions, rewriting.layers


def _fixed_arguments(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Return the model's arguments that are no tensors, by name, so that its code may decide by them."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    given = {p.name: x for p, x in zip(parameters, inputs, strict=False) if not isinstance(x, Tensor)}
    rest = {p.name: p.default for p in parameters[len(inputs) :] if p.default is not p.empty}
    return {**given, **rest}


def _root(model: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Return all modules and tensors that a graph refers to, by name."""
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            found[node.target] = modules[node.target]
        elif node.op == "get_attr":
            found[node.target] = operator.attrgetter(node.target)(model)
    return found


class _Carriers(fx.Interpreter):
    """Runs a graph and notes the dimensions of nodes that are tensors."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.dims: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if isinstance(made, Tensor):
            self.dims[n] = made.dim()
        return made


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs that a model may overwrite."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def _carriers(model: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> dict[fx.Node, int]:
    """Return the nodes that are tensors and depend on the inputs, with their number of dimensions."""
    interpreter = _Carriers(model, graph)
    interpreter.run(*_copies(inputs))
    depending: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(before in depending for before in node.all_input_nodes):
            depending.add(node)
    return {node: dims for node, dims in interpreter.dims.items() if node in depending}


class _Rewriting:
    """Writes functions as modules, modules that run twice as two, and takes apart non-linearities that touch.

    Args:
        graph: Is changed.
        modules: The model's modules by name; new ones are added.
        carriers: Nodes that are tensors and depend on the inputs, with their number of dimensions.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], carriers: dict[fx.Node, int]) -> None:
        self._graph, self._modules, self._carriers = graph, modules, carriers
        self._used: set[nn.Module] = set()
        self.functions: dict[str, Function] = {}
        """Functions that stay what they are, by the names of their nodes."""
        self.layers: dict[str, str] = {}
        """The new name of each module's last call."""

    def run(self) -> None:
        """Rewrites the graph."""
        for node in list(self._graph.nodes):
            if node in self._carriers:
                if node.op == "call_module":
                    self._called(node)
                else:
                    self._replaced(node)
        self._separate()
        for node in list(self._graph.nodes):
            if node.op == "call_module" and isinstance(self._modules[str(node.target)], _POOLS):
                self._spread(node)

    def _called(self, node: fx.Node) -> None:
        """A module: left out without effect, or of its own."""
        module = self._modules[str(node.target)]
        if not node.args and len(node.kwargs) == 1:  # by keyword, where Captum's hooks see no input
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
            node.target = self._added(_twin(module), name)
        self._used.add(module)
        self.layers[name] = str(node.target)

    def _replaced(self, node: fx.Node) -> None:
        """A function, which becomes a module where there is one."""
        key = node.target
        if key is F.dropout and not node.kwargs.get("training", True):
            node.replace_all_uses_with(node.all_input_nodes[0])
            self._graph.erase_node(node)
            return
        make = _relu if key in _CLAMPS and self._rectifies(node) else _MODULES.get(key)
        if make is not None and len(node.all_input_nodes) == 1:  # no other argument depends on the input
            args, kwargs = (node.args[1:], node.kwargs) if node.args else ((), _without(node.kwargs, "input"))
            signal = node.args[0] if node.args else node.kwargs["input"]
            module = make() if make is _relu else make(*args, **_without(kwargs, "inplace", "training", "_stacklevel"))
            new: tuple[Any, ...] = (signal,)
        elif key in _SUMS and not _without(node.kwargs, "input", "other") and self._joins(node):
            module, new = Sum(), tuple(node.all_input_nodes) * (2 if len(node.all_input_nodes) == 1 else 1)
        elif key in _MEANS and self._over_places(node):
            module, new = nn.AdaptiveAvgPool2d(1), (node.args[0],)
            if not node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2]):
                with self._graph.inserting_after(node):
                    flat = self._graph.call_method("flatten", (node, 1))
                node.replace_all_uses_with(flat, lambda user: user is not flat)
        else:
            if node.op in ("call_function", "call_method"):
                name = key if isinstance(key, str) else getattr(key, "__name__", str(key))
                places: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
                self.functions[node.name] = Function(name, tuple(at for at, x in places if self._depends(x)))
            return
        node.op, node.target = "call_module", self._added(module, node.name)
        node.args, node.kwargs = new, {}

    def _rectifies(self, node: fx.Node) -> bool:
        """Whether a clamp is a ReLU by another name."""
        names = ("input", "min", "max")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        low, high = given.get("min"), given.get("max")
        return isinstance(low, (int, float)) and low == 0 and high is None

    def _depends(self, argument: Any) -> bool:
        """Whether an argument is, or holds, a tensor that depends on the inputs."""
        if isinstance(argument, (list, tuple)):
            return any(self._depends(x) for x in argument)
        return argument in self._carriers if isinstance(argument, fx.Node) else False

    def _joins(self, node: fx.Node) -> bool:
        """Whether a sum is one of two signals."""
        terms = [*node.args, *node.kwargs.values()]
        return len(terms) == 2 and all(isinstance(x, fx.Node) and x in self._carriers for x in terms)

    def _over_places(self, node: fx.Node) -> bool:
        """Whether a mean is that over the places of feature maps."""
        over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        known = not _without(node.kwargs, "dim", "keepdim") and node.args
        places = isinstance(over, (tuple, list)) and sorted(d % 4 for d in over if isinstance(d, int)) == [2, 3]
        return bool(known) and places and self._carriers.get(node.args[0]) == 4  # type: ignore[arg-type]

    def _separate(self) -> None:
        """Puts a view between two non-linearities, as Captum would hook that tensor twice."""
        for node in list(self._graph.nodes):
            if self._is_nonlinear(node):
                for before in node.all_input_nodes:
                    if self._is_nonlinear(before):
                        with self._graph.inserting_before(node):
                            node.replace_input_with(before, self._graph.call_method("view_as", (before, before)))

    def _spread(self, node: fx.Node) -> None:
        """Writes overlapping pooling windows as ones side by side: Captum's DeepLift keeps one value for each cell."""
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
            spread = self._graph.call_function(windows, arguments)
        node.args = (spread,)
        old, node.target = node.target, self._added(type(pool)(kernel, kernel), str(node.target))
        self.layers = {name: node.target if new == old else new for name, new in self.layers.items()}

    def _is_nonlinear(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._modules[str(node.target)], _NONLINEAR)

    def _added(self, module: nn.Module, like: str) -> str:
        """Return the name of a module that is new."""
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
    """Return the windows of a max-pooling side by side, so that a pooling of stride ``kernel`` does the same.

    Args:
        x: Input (N, C, ...) with a spatial dimension for each number of the other arguments.
        kernel: As in :class:`torch.nn.MaxPool2d`, and so on.
        stride: Steps between windows.
        padding: Cells added on both sides, which never win.
        dilation: Steps between the cells of a window.
        ceil_mode: Whether a window may end outside.

    Example:
        >>> windows(torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]]), (3,), (2,), (0,), (1,), False)
        tensor([[[1., 2., 3., 3., 4., 5.]]])
    """
    for dim, (k, step, pad, gap) in enumerate(zip(kernel, stride, padding, dilation, strict=True), start=2):
        size = x.shape[dim]
        span = gap * (k - 1) + 1
        count = (size + 2 * pad - span + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (count - 1) * step >= size + pad:
            count -= 1  # a window that would start in the padding at the end
        begins = torch.arange(count, device=x.device) * step - pad
        places = (begins[:, None] + torch.arange(k, device=x.device) * gap).flatten()
        inside = (places >= 0) & (places < size)
        picked = x.index_select(dim, places.clamp(0, size - 1))
        shape = [-1 if i == dim else 1 for i in range(x.dim())]
        x = picked.masked_fill(~inside.reshape(shape), torch.finfo(x.dtype).min / 4)
    return x


def _twin(module: nn.Module) -> nn.Module:
    """Return a module with the same parameters, without hooks, and not in place."""
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
    """Return a maker of pooling modules from a function's arguments, whose order differs."""

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
