"""Write the explained model as a canonical network of modules, for methods of Captum that see only modules.

DeepLift, LRP and the guided methods replace the derivatives of modules of known types. They keep the plain derivative
of everything else, and are then silently wrong: for a functional ReLU, for the sum of a residual block, for a module
that runs twice, for two non-linearities in a row, for overlapping windows of a max-pooling (there DeepLift loses a
tenth of the sum in a ResNet-18). :func:`canonical` follows the model up to the explained layer with ``torch.fx``.
:mod:`captum_xnn.heatmaps._rewriting` then turns all of these into modules that run once each. Weights are shared, and
outputs are the same; a run on one example checks this.

``torch.fx`` cannot follow a model whose control flow depends on values. Such a model raises an error.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.heatmaps._network import ExplanationNetwork, with_every_input
from captum_xnn.heatmaps._rewriting import Function, Rewriting
from captum_xnn.layers._state import eager

__all__ = ["CanonicalNetwork", "Twins", "canonical"]


class CanonicalNetwork(nn.Module):
    """The explained model up to a layer, as modules that run once each, continued by the encoder of x-features.

    Args:
        network: The network that this one is the twin of.
        graph: The model up to the explained layer.
        functions: The functions left in the graph, by the names of their nodes.
        layers: Name in the graph of the last call of each module, by the module's name in the model.
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
        """Compute the x-features, (N, n).

        Args:
            inputs: All positional arguments of the model.
        """
        given = self.hold(inputs)
        Z = with_every_input(self.graph(*given), given)
        return self.xnn_encoder(Z if self.output_transform is None else self.output_transform(Z))

    def layer(self, name: str) -> nn.Module:
        """Return the module that stands for a layer of the model.

        Args:
            name: Dotted name of the layer.

        Raises:
            UnsupportedOperationError: If several modules stand for the layer.
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
        """List the modules that run, in order."""
        return [ran for ran in self.operations() if isinstance(ran, nn.Module)]

    def operations(self, after: nn.Module | None = None) -> list[nn.Module | Function]:
        """List the modules that run and the functions between them, in order.

        Args:
            after: A module of the graph; list only operations that depend on its output.
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

    def encoder_modules(self) -> list[nn.Module]:
        """List the leaf modules of the encoder."""
        encoder = self.xnn_encoder
        modules = encoder.modules() if isinstance(encoder, nn.Module) else ()
        return [m for m in modules if next(m.children(), None) is None]


class Twins:
    """Canonical networks, kept until the model changes: to follow a model takes as long as a few images.

    A change outside the model, such as a global setting that alters its result, is not noticed.

    Example:
        >>> from captum_xnn.models._srae import SRAE
        >>> network, twins = ExplanationNetwork(nn.Sequential(nn.ReLU()), "0", SRAE(4, 2, hidden=())), Twins()
        >>> x = torch.rand(1, 4)
        >>> twins.of(network, (x,)).graph is twins.of(network, (x,)).graph
        True
    """

    def __init__(self) -> None:
        self._twins: WeakKeyDictionary[nn.Module, dict[Any, tuple[list[Any], tuple[Any, ...]]]] = WeakKeyDictionary()

    def of(self, network: ExplanationNetwork, inputs: tuple[Any, ...]) -> CanonicalNetwork:
        """Return the canonical network of a network; reuse the graph of the same model.

        Args:
            network: From the model's inputs to its x-features.
            inputs: All positional arguments of the model, to compare the two with.

        Raises:
            UnsupportedOperationError: If the model cannot be followed, or the result differs.
        """
        twins, state = self._twins.setdefault(network.model, {}), _state(network.model)
        key = network.layer_name, repr([x for x in inputs if not isinstance(x, Tensor)])
        if key in twins and twins[key][0] == state:
            (_, (graph, functions, layers)) = twins[key]
            return CanonicalNetwork(network, graph, functions, layers)
        twin = canonical(network, inputs)
        twins[key] = state, (twin.graph, twin.functions, twin.layers)
        return twin


def _state(model: nn.Module) -> list[Any]:
    """List all that a model's computation depends on, except the values of tensors, which a twin shares."""
    found: list[Any] = []
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k != "training"}
        found.append((name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks)))
        found += [(k, v if isinstance(v, (bool, int, float, str)) else id(v)) for k, v in own.items()]
        found += [id(tensor) for kind in (module._parameters, module._buffers) for tensor in kind.values()]
    return found


def canonical(network: ExplanationNetwork, inputs: tuple[Any, ...]) -> CanonicalNetwork:
    """Write a network as one made of modules.

    Args:
        network: From the model's inputs to its x-features.
        inputs: All positional arguments of the model, to compare the two with.

    Raises:
        UnsupportedOperationError: If the model cannot be followed, or the result differs.

    Example:
        >>> from torch.nn import functional as F
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
        twin = CanonicalNetwork(network, *_traced(network, network.hold(inputs)))
        _refuse_other_outputs(twin, network, inputs)
        return twin


def _traced(
    network: ExplanationNetwork, inputs: tuple[Any, ...]
) -> tuple[fx.GraphModule, dict[str, Function], dict[str, str]]:
    """Trace the model up to the explained layer and rewrite it; return graph, functions left, and names of layers."""
    tracer = _Tracer(network.model, network.layer)
    try:
        graph = tracer.trace(network.model, concrete_args=_fixed_arguments(network.model, inputs))
        end = next(node for node in graph.nodes if node.op == "output")
        if network.layer is not network.model:
            if tracer.result is None:
                raise RuntimeError("the layer is inside of a module that torch.fx takes as a whole")
            graph.erase_node(end)
            graph.output(tracer.create_arg(tracer.result))
    except Exception as error:  # the model's own code may raise anything when it gets proxies in place of tensors
        raise UnsupportedOperationError(
            f"torch.fx cannot follow the model up to layer {network.layer_name!r}: {error}; use IntegratedGradients "
            "or the default heatmap, which need no modules"
        ) from error
    for node in reversed(graph.nodes):  # operations behind the layer, and assertions
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    modules = dict(network.model.named_modules())
    rewriting = Rewriting(graph, modules, _signals(network.model, graph, inputs))
    rewriting.run()
    graph.lint()
    return fx.GraphModule(_root(network.model, graph, modules), graph), rewriting.functions, rewriting.layers


class _Tracer(fx.Tracer):
    """Follows a model, and keeps the result of the explained layer."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self._layer, self._registered = layer, set(model.modules())
        self.result: Any = None

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a module. A module made in forward, as in ``nn.ReLU()(x)``, is traced as its operations."""
        if m not in self._registered:
            return forward(*args, **kwargs)
        output = super().call_module(m, forward, args, kwargs)
        if m is self._layer:
            self.result = output
        return output


def _fixed_arguments(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Return the arguments of the model that are not tensors, by name, so that control flow may depend on them."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    given = {p.name: x for p, x in zip(parameters, inputs, strict=False) if not isinstance(x, Tensor)}
    rest = {p.name: p.default for p in parameters[len(inputs) :] if p.default is not p.empty}
    return {**given, **rest}


def _signals(model: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> dict[fx.Node, int]:
    """Find the tensors that depend on the inputs, as nodes, with their number of dimensions."""
    interpreter = _Dimensions(model, graph)
    interpreter.run(*_copies(inputs))
    depending: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(before in depending for before in node.all_input_nodes):
            depending.add(node)
    return {node: dims for node, dims in interpreter.dims.items() if node in depending}


class _Dimensions(fx.Interpreter):
    """Runs a graph, and notes the number of dimensions of each tensor."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.dims: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if isinstance(output, Tensor):
            self.dims[n] = output.dim()
        return output


def _root(model: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Collect all modules and tensors that a graph refers to, by name."""
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            found[node.target] = modules[node.target]
        elif node.op == "get_attr":
            found[node.target] = operator.attrgetter(node.target)(model)
    return found


def _refuse_other_outputs(twin: CanonicalNetwork, network: ExplanationNetwork, inputs: tuple[Any, ...]) -> None:
    """Raise where the twin does not compute the outputs of the network."""
    outputs, outputs_of_twin = network(*_copies(inputs)), twin(*_copies(inputs))
    size = float(outputs.abs().max().nan_to_num(0)) if outputs.numel() else 0.0
    if outputs.shape != outputs_of_twin.shape or not torch.allclose(
        outputs, outputs_of_twin, rtol=1e-4, atol=1e-5 * size, equal_nan=True
    ):
        raise UnsupportedOperationError(
            f"torch.fx cannot follow the model up to layer {network.layer_name!r}: the traced operations give another "
            "result for these inputs; use IntegratedGradients or the default heatmap, which need no modules"
        )


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the inputs, because a model may overwrite them."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)
