"""The rule of each function that a model may call. The table at the end lists the functions.

:mod:`captum_xnn.excitation_bp._shares` has the formula, and :mod:`captum_xnn.excitation_bp._operations` computes it.

- Affine operations (linear, convolutions, products with a constant) divide probability among their inputs by excitatory
  weights.
- Averages (pooling, mean, sum, resizing) divide it by their own positive weights. Bicubic resizing has negative weights
  and no rule.
- Activations, dropout, and normalisation with fixed statistics have one input for each output, and this input gets all.
  A negative scale directly behind an affine operation flips the sign of that output's weights.
- A sum of signals divides it in proportion to the signals, and loses it where the sum is 0. Constants get nothing.

The other operations have no accepted rule. These are our choices:

- Layer, group, instance and RMS norms pass everything, with their statistics held constant.
- A gate is constant, and the gated signal gets all. Two gates, or two other signals, get half each. If they differ in
  size in an elementwise product, the smaller factor is the gate.
- Attention weights are constant: queries and keys get nothing.
- The numerator of a quotient gets all.

Maxima, indexing, reshaping and joining need no entry: their derivative already routes probability to the right place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_xnn.excitation_bp._kept_tensor import KeptTensor
from captum_xnn.excitation_bp._operations import Attention, Convolution, Linear, Product
from captum_xnn.excitation_bp._shares import accurate, guarded, unbroadcast
from captum_xnn.excitation_bp._signals import Call, Rule, Signals, tensors_in

__all__ = ["GATES", "RULES", "rectifies"]


def _passing(mode: Signals, call: Call) -> Any:
    """Pass everything to the one input of each output."""
    x = call.args[0] if call.args else next(iter(call.kwargs.values()))
    if not mode.carries(x):
        return NotImplemented
    affine = mode.operation_of(x)
    if affine is None or _in_place(call, x) or len(tensors_in(call.args) + tensors_in(call.kwargs)) > 1:
        return _passed(mode, call, x)
    # Go straight to the input of the affine operation, so that one node serves both.
    return mode.apply_affine(call, affine, activated=True)


def _in_place(call: Call, x: Tensor) -> bool:
    """Whether a function overwrites its first argument x."""
    name = getattr(call.function, "__name__", "")
    named_so = call.function in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return bool(call.args) and call.args[0] is x and (named_so or call.kwargs.get("inplace") is True)


def _passed(mode: Signals, call: Call, x: Tensor) -> Tensor:
    """Compute a call whose probability all goes to the signal x."""
    if _in_place(call, x):
        # The probability of x keeps its way down.
        with torch.no_grad():
            call.function(x.detach(), *call.args[1:], **call.kwargs)
        return x
    shape = x.shape
    return mode.apply(call, lambda p: (unbroadcast(p, shape),), x)


def _dropout(mode: Signals, call: Call) -> Any:
    named = call.named("input", "p", "training", "inplace")
    active = named.get("training", True) and named.get("p", 0.5) > 0
    # Dropout without effect returns its input, and needs no rule.
    return _passing(mode, call) if active else NotImplemented


def _linear(mode: Signals, call: Call) -> Any:
    named = call.named("input", "weight", "bias")
    x, weight = named["input"], named["weight"]
    if not mode.carries(x) or mode.signal(weight):
        return NotImplemented
    return mode.apply_affine(call, Linear(mode.keep(x), weight.detach()))


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def _convolution(mode: Signals, call: Call, *, names: tuple[str, ...]) -> Any:
    named = call.named(*names)
    x, weight = named["input"], named["weight"].detach()
    if not mode.carries(x) or mode.signal(weight):
        return NotImplemented
    dims = weight.dim() - 2
    dilation = _each(named.get("dilation", 1), dims)
    padding = named.get("padding", 0)
    if x.dim() == dims + 1:
        one = x[None]
        mode.follow(one, x)
        rest = {k: v for k, v in named.items() if k != "input"}
        return _convolution(mode, Call(call.function, (one,), rest), names=names)[0]
    if isinstance(padding, str):
        ahead, behind = _string_padding(padding, tuple(weight.shape[2:]), dilation)
        padding = ahead
        if ahead != behind:
            x = F.pad(x, [n for pair in zip(ahead[::-1], behind[::-1], strict=True) for n in pair])
            mode.follow(x, named["input"])
            padding = (0,) * dims
    affine = Convolution(
        mode.keep(x),
        weight,
        stride=_each(named.get("stride", 1), dims),
        padding=_each(padding, dims),
        dilation=dilation,
        transposed=names is _CONV_TRANSPOSE,
        output_padding=_each(named.get("output_padding", 0), dims),
        groups=named.get("groups", 1),
    )
    return mode.apply_affine(call, affine)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """Repeat a number for each spatial dimension."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * dims if len(values) == 1 else values


def _string_padding(
    padding: str, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Compute the padding before and behind each dimension."""
    if padding == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    ahead = tuple(t // 2 for t in total)
    return ahead, tuple(t - a for t, a in zip(total, ahead, strict=True))


def _averaging(mode: Signals, call: Call) -> Any:
    """Divide by the weights of pooling, mean, sum or resizing; autograd computes the transposed operation."""
    x = call.args[0] if call.args else call.kwargs.get("input")
    bicubic = any(isinstance(v, str) and v == "bicubic" for v in (*call.args, *call.kwargs.values()))
    if not isinstance(x, Tensor) or not mode.carries(x) or bicubic:
        return NotImplemented
    a = accurate(x.detach())
    a = a.clone() if mode.settings.negative == "raw" else a.clamp(min=0)
    factor = a.detach()  # a itself becomes the result of a node, and a node that holds its own result is never freed
    active = mode.apply(lambda: a, lambda p: (p * factor,), x)
    with torch.autocast(x.device.type, enabled=False):
        rest = {k: v for k, v in call.kwargs.items() if k != "input"}
        Z = call.function(active, *call.args[1:], **rest)
    mode.accept_derivative(Z, active)
    signed = mode.settings.negative == "raw"
    return mode.apply(call, lambda p: (guarded(p.to(Z.dtype), Z.detach(), signed=signed),), Z)


@dataclass(frozen=True)
class _Multiply:
    """A product of two factors, and the transposed product for either factor."""

    forward: Callable[[Tensor, Tensor], Tensor]
    transposed_left: Callable[[Tensor, Tensor], Tensor]
    """Function of s, in the product's shape, and the right factor."""
    transposed_right: Callable[[Tensor, Tensor], Tensor]
    """Function of s, in the product's shape, and the left factor."""
    is_matrix: bool = False


_MATMUL = _Multiply(torch.matmul, lambda s, right: s @ right.mT, lambda s, left: left.mT @ s, is_matrix=True)


def _product(mode: Signals, call: Call) -> Any:
    """Apply the rule of a matrix product. With a constant or attention weights it is affine in the other factor."""
    left, right = call.args[:2]
    return _factors(mode, call, left, right, _MATMUL) if min(left.dim(), right.dim()) > 1 else NotImplemented


def _added_product(mode: Signals, call: Call) -> Any:
    """Apply the rule of a matrix product plus a bias."""
    bias, left, right = call.args[:3]
    if mode.signal(bias) or call.kwargs.get("alpha", 1) <= 0:
        return NotImplemented
    return _factors(mode, call, left, right, _MATMUL)


def _einsum(mode: Signals, call: Call) -> Any:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return NotImplemented
    inputs, _, out = equation.replace(" ", "").partition("->")
    one, other = inputs.split(",")
    # Each index must occur once per term and in two terms, or the transposed product is no einsum of two factors.
    repeated = any(len(set(part)) < len(part) for part in (one, other, out))
    if repeated or set(one) - set(other + out) or set(other) - set(one + out):
        return NotImplemented
    multiply = _Multiply(
        partial(torch.einsum, f"{one},{other}->{out}"),
        partial(torch.einsum, f"{out},{other}->{one}"),
        partial(torch.einsum, f"{out},{one}->{other}"),
    )
    return _factors(mode, call, operands[0], operands[1], multiply)


def _factors(mode: Signals, call: Call, left: Tensor, right: Tensor, multiply: _Multiply) -> Any:
    """Choose the factor that gets the probability; the other factor acts as weights."""
    signals = mode.signal(left), mode.signal(right)
    if signals[0] and signals[1] and signals[0].gate == signals[1].gate:
        return _halved(mode, call, left, right, multiply)
    signal_is_left = signals[0] is not None and not (signals[1] and signals[0].gate)
    x, weight = (left, right) if signal_is_left else (right, left)
    if not mode.carries(x):
        return NotImplemented
    if signals[0] and signals[1] and bool((weight >= 0).all()):
        side = _side(mode.keep(x), weight.detach(), multiply, signal_is_left)
        return mode.apply_affine(call, Attention(side.a, lambda: side.weight, side.forward, side.transposed))
    if multiply.is_matrix and signal_is_left and right.dim() == 2:
        return mode.apply_affine(call, Linear(mode.keep(x), weight.detach().T))
    return mode.apply_affine(call, _side(mode.keep(x), weight.detach(), multiply, signal_is_left))


def _side(x: KeptTensor, weight: Tensor, multiply: _Multiply, is_left: bool) -> Product:
    """Write a product as an operation on x, with the other factor as weights."""
    if is_left:
        return Product(x, weight, forward=multiply.forward, transposed=multiply.transposed_left)
    return Product(x, weight, forward=lambda a, w: multiply.forward(w, a), transposed=multiply.transposed_right)


def _halved(mode: Signals, call: Call, left: Tensor, right: Tensor, multiply: _Multiply) -> Tensor:
    """Give each factor half. Each half is divided with the other factor as weights."""
    sides = (
        _side(mode.keep(left), right.detach(), multiply, True),
        _side(mode.keep(right), left.detach(), multiply, False),
    )
    descent = mode.descent

    def back(p: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        return list(zip(*(side.winners([one / 2 for one in p], descent) for side in sides), strict=True))

    return mode.apply_at_once(call, back, left, right)


def _attention(mode: Signals, call: Call) -> Any:
    named = call.named("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    query, key, value = named["query"], named["key"], named["value"]
    if not mode.carries(value):
        return NotImplemented
    if named.get("enable_gqa"):
        repeats = query.shape[-3] // value.shape[-3]
        key, repeated = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        mode.follow(repeated, value)
        value = repeated
    q, k = query.detach(), key.detach()
    mask, causal, scale = named.get("attn_mask"), named.get("is_causal", False), named.get("scale")
    weights = partial(_attention_weights, q, k, None if mask is None else mask.detach(), causal, scale)
    return mode.apply_affine(call, Attention(mode.keep(value), weights, lambda v, A: A @ v, lambda s, A: A.mT @ s))


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    scores = accurate(q) @ accurate(k).mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _adding(mode: Signals, call: Call, *, subtracting: bool = False) -> Any:
    named = call.named("input", "other", "alpha")
    a, b = named["input"], named["other"]
    factor = named.get("alpha", 1) * (-1 if subtracting else 1)
    signals = [x for x in (a, b) if mode.signal(x)]
    if len(signals) == 1:
        if isinstance(a, Tensor) and a is not signals[0] and call.function in _IN_PLACE:
            shape = b.shape  # a signal written into a constant makes the constant a part of the graph
            return mode.apply(call, lambda p: (None, unbroadcast(p, shape)), a, b)
        turned = signals[0] is b and factor < 0
        return _scaled(mode, call, signals[0], -1 if turned else 1)
    return _adding_signals(mode, call, a, b, factor)


# A sum cancels if the mean absolute share of a term is above this; without cancelling it is at most 1.
_LARGE = 1.5


def _adding_signals(mode: Signals, call: Call, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Divide in proportion to the two terms of a sum."""
    shares: list[Tensor] = []
    excitatory = mode.settings.add == "excitatory"

    def value() -> Tensor:
        terms = [accurate(a.detach()), accurate(b.detach())]
        if factor != 1:
            terms[1] = terms[1] * factor
        if excitatory:
            terms = [t.clamp(min=0) for t in terms]
        total = terms[0] + terms[1]
        share = terms[0] / total
        # The other share is 1 minus this share, unless some sum is 0. This runs for every block of a ResNet.
        size = float(torch.linalg.vector_norm(share, 1))
        mode.cancels |= size > _LARGE * share.numel()
        if math.isfinite(size):
            shares.append(share)
        else:
            shares.extend((t / total).nan_to_num_(0, 0, 0) for t in terms)
        y: Tensor = call()
        return y

    shapes, descent = (a.shape, b.shape), mode.descent

    def back(p: Tensor) -> list[Tensor]:
        p = p.to(shares[0].dtype)
        one = torch.mul(p, shares[0], out=descent.workspace.take(shares[0]))
        if len(shares) == 2:
            return [unbroadcast(x, shape) for x, shape in zip((one, p * shares[1]), shapes, strict=True)]
        other = p.sub_(one) if descent.is_spent else p - one
        return [unbroadcast(x, shape) for x, shape in zip((one, other), shapes, strict=True)]

    return mode.apply(value, back, a, b)


def _multiplying(mode: Signals, call: Call) -> Any:
    named = call.named("input", "other")
    a, b = named["input"], named["other"]
    signals = mode.signal(a), mode.signal(b)
    if not (signals[0] and signals[1]):
        return _scaled(mode, call, *((a, b) if signals[0] else (b, a)))
    if a is b:
        return _passed(mode, call, a) if mode.carries(a) else NotImplemented
    gates = (signals[0].gate, signals[1].gate)
    if gates[0] == gates[1]:
        gates = (a.numel() < b.numel(), b.numel() < a.numel())
    if gates[0] != gates[1]:
        signal = b if gates[0] else a
        return _passed(mode, call, signal) if mode.carries(signal) else NotImplemented
    shapes = a.shape, b.shape
    return mode.apply(call, lambda p: [unbroadcast(p / 2, shape) for shape in shapes], a, b)


def _dividing(mode: Signals, call: Call) -> Any:
    named = call.named("input", "other")
    a, b = named["input"], named["other"]
    if not mode.signal(b):
        return _scaled(mode, call, a, b)
    numerator = a if mode.signal(a) else b
    return _passed(mode, call, numerator) if mode.carries(numerator) else NotImplemented


def _scaled(mode: Signals, call: Call, x: Tensor, factor: Any) -> Any:
    """Pass everything to a signal times a constant; a negative factor flips the affine operation directly below it."""
    if not mode.carries(x):
        return NotImplemented
    affine = None if mode.settings.batch_norm == "pass" else mode.operation_of(x)
    if affine is None:
        return _passed(mode, call, x)
    sign, in_place = torch.as_tensor(factor, device=x.device).detach(), _in_place(call, x)
    if bool((sign > 0).all()):
        if in_place or not _fits(sign, x):
            y = _passed(mode, call, x)
            if in_place:
                mode.attach(y, affine)
            return y
    else:
        affine = affine.turned(sign, x.shape)
    return mode.apply_affine(call, affine, *([x] if in_place else []))


def _fits(factor: Tensor, x: Tensor) -> bool:
    """Whether x times the factor has the shape of x."""
    pairs = zip(factor.shape[::-1], x.shape[::-1], strict=False)
    return factor.dim() <= x.dim() and all(n in (1, m) for n, m in pairs)


def _batch_norm(mode: Signals, call: Call, *, names: tuple[str, ...]) -> Any:
    named = call.named(*names)
    x, gamma = named["input"], named.get("weight")
    return _scaled(mode, call, x, 1 if gamma is None else gamma.reshape(-1, *[1] * (x.dim() - 2)))


def _negating(mode: Signals, call: Call) -> Any:
    return _scaled(mode, call, call.args[0], -1)


def _subtracting_from(mode: Signals, call: Call) -> Any:
    """Pass everything to the signal in a constant minus a signal."""
    x, other = call.args[:2]
    if mode.signal(other) or not mode.signal(x) or call.kwargs.get("alpha", 1) <= 0:
        return NotImplemented
    return _scaled(mode, call, x, -1)


def _gated_linear_unit(mode: Signals, call: Call) -> Any:
    named = call.named("input", "dim")
    x = named["input"]
    if not mode.carries(x):
        return NotImplemented
    signal = x.chunk(2, named.get("dim", -1))[0]
    mode.follow(signal, x)
    return _passed(mode, call, signal)


def _functions(*names: str, owners: Iterable[Any] = (torch, Tensor, F, torch._C._nn)) -> list[Any]:
    """Collect the functions of these names from all places where torch keeps them; older versions lack some."""
    return [getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)]


def _both(*names: str) -> list[str]:
    """Add the names of the in-place forms."""
    return [n for name in names for n in (name, f"{name}_")]


_ACTIVATIONS = _both(
    "relu",
    "relu6",
    "hardtanh",
    "leaky_relu",
    "rrelu",
    "prelu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "softplus",
    "softsign",
    "sigmoid",
    "logsigmoid",
    "hardsigmoid",
    "hardswish",
    "tanh",
    "tanhshrink",
    "hardshrink",
    "softshrink",
    "threshold",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clip",
    "abs",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "square",
    "pow",
    "reciprocal",
    "erf",
    "sin",
    "cos",
    "softmax",
    "log_softmax",
    "nan_to_num",
)
_NORMS = (
    "layer_norm",
    "group_norm",
    "instance_norm",
    "rms_norm",
    "local_response_norm",
)
_AVERAGES = (
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "mean",
    "sum",
    "nansum",
    "nanmean",
    "cumsum",
    "interpolate",
    "upsample",
    "upsample_nearest",
    "upsample_bilinear",
    "grid_sample",
    "fold",
)
_GATES = ("sigmoid", "hardsigmoid", "softmax", "tanh")
_DROPOUTS = (
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
)


def _table(*rows: tuple[Rule, list[Any]]) -> dict[Any, Rule]:
    return {function: rule for rule, functions in rows for function in functions}


RULES: dict[Any, Rule] = _table(
    (_passing, _functions(*_ACTIVATIONS, *_NORMS)),
    (_dropout, _functions(*_both(*_DROPOUTS))),
    (_linear, _functions("linear")),
    (partial(_convolution, names=_CONV), _functions("conv1d", "conv2d", "conv3d", owners=(torch,))),
    (
        partial(_convolution, names=_CONV_TRANSPOSE),
        _functions("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", owners=(torch,)),
    ),
    (_averaging, _functions(*_AVERAGES)),
    (_product, _functions("matmul", "mm", "bmm", "mv", "__matmul__")),
    (_added_product, _functions("addmm", "baddbmm", "addmv")),
    (_einsum, _functions("einsum")),
    (_attention, _functions("scaled_dot_product_attention")),
    (_adding, _functions("add", "add_", "__add__", "__radd__", "__iadd__")),
    (partial(_adding, subtracting=True), _functions("sub", "sub_", "subtract", "__sub__", "__isub__")),
    (_subtracting_from, _functions("rsub", "__rsub__")),
    (_multiplying, _functions("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")),
    (_dividing, _functions("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__")),
    (_negating, _functions("neg", "neg_", "negative", "__neg__")),
    (partial(_batch_norm, names=("input", "running_mean", "running_var", "weight")), [F.batch_norm]),
    (partial(_batch_norm, names=("input", "weight")), [torch.batch_norm]),
    (_gated_linear_unit, _functions("glu")),
)
"""The rule of each function."""

GATES = frozenset(_functions(*_both(*_GATES)))
"""Functions whose results weight other signals."""

_RECTIFIERS = frozenset(_functions(*_both("relu", "relu6", "sigmoid", "hardsigmoid"), "softmax"))
# Clamping functions, with the name of their lower bound.
_CLAMPS = {
    **dict.fromkeys(_functions(*_both("clamp", "clip", "clamp_min")), "min"),
    **dict.fromkeys(_functions(*_both("hardtanh")), "min_val"),
}


def rectifies(call: Call) -> bool:
    """Whether the results of a call are never negative.

    Args:
        call: A function with its arguments.

    Example:
        >>> rectifies(Call(torch.relu, (), {})), rectifies(Call(F.hardtanh, (torch.zeros(1), 0, 6), {}))
        (True, True)
    """
    bound = _CLAMPS.get(call.function)
    if bound is None:
        return call.function in _RECTIFIERS
    least = call.named("input", bound).get(bound)
    return isinstance(least, (int, float)) and least >= 0


_IN_PLACE = frozenset(
    _functions("add_", "sub_", "mul_", "div_", "neg_", "__iadd__", "__isub__", "__imul__", "__itruediv__")
)
