"""Refuse operations for which a method of Captum silently lacks a rule.

DeepLift, LRP and the guided methods replace the derivatives of modules of known types. For every other operation they
keep the plain gradient and give no message, so their result is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

from captum.attr import Attribution
from torch import nn

from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.heatmaps._rewriting import Function
from captum_xnn.layers._forward_args import DEEPLIFT_TYPES, LRP_TYPES, Sum

__all__ = ["needs_modules", "refuse_unfit"]


def needs_modules(method: type[Attribution]) -> bool:
    """Whether a method of Captum replaces derivatives of modules.

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


def refuse_unfit(
    method: type[Attribution], operations: Iterable[nn.Module | Function], encoder: Iterable[nn.Module] = ()
) -> None:
    """Raise if a method of Captum has no rule for one of the operations.

    Args:
        method: A class of ``captum.attr``.
        operations: Modules and functions that the canonical network runs. A form of DeepLift that explains a layer
            needs rules only for the operations behind it.
        encoder: Leaf modules of the explanation network, to which DeepLift applies its rules as well.

    Raises:
        UnsupportedOperationError: If a rule is missing; the error names the operations.
    """
    bases = {base.__name__ for base in method.__mro__}
    instead = "and would silently use the plain gradient"
    if "LRP" in bases:
        unfit = [_name(x) for x in operations if not _has_lrp_rule(x)]
    elif "DeepLift" in bases:
        instead = "and would silently treat them as linear"
        ran = [*operations, *encoder]
        unfit = [_name(x) for x in ran if not _is_linear(x) and type(x) not in DEEPLIFT_TYPES]
    else:
        names = [_name(x) for x in operations]
        refused = _RECTIFIERS if "ReLU" in names else _RECTIFIERS | _SQUASHES
        unfit = [name for name in names if name.lower().rstrip("_") in refused]
    if unfit:
        raise UnsupportedOperationError(
            f"{method.__name__} has no rule for {', '.join(dict.fromkeys(unfit))}, {instead}; use IntegratedGradients "
            "or the default heatmap"
        )


def _name(ran: nn.Module | Function) -> str:
    return ran.name if isinstance(ran, Function) else type(ran).__name__


def _has_lrp_rule(ran: nn.Module | Function) -> bool:
    if isinstance(ran, Function):
        return ran.name in _ROUTES
    return type(ran) in LRP_TYPES or hasattr(ran, "rule")


def _is_linear(ran: nn.Module | Function) -> bool:
    """Whether an operation is linear, up to a constant, in all arguments that depend on the model's inputs."""
    if isinstance(ran, nn.Module):
        return isinstance(ran, _LINEAR) or getattr(ran, "linear", False) is True
    if ran.name in _PRODUCTS:
        return len(ran.signals) == 1
    return ran.name in _ROUTES or ran.name in _TERMS or (ran.name in _QUOTIENTS and ran.signals == (0,))


# Functions that rearrange or select numbers.
_ROUTES = frozenset(
    {
        "cat", "chunk", "clone", "concat", "contiguous", "expand", "flatten", "getitem", "movedim", "permute",
        "reshape", "split", "squeeze", "stack", "transpose", "unbind", "unflatten", "unsqueeze", "view",
        "view_as", "windows",
    }
)  # fmt: skip
# Functions that are linear in all their arguments.
_TERMS = frozenset(
    {
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "add", "add_", "avg_pool1d", "avg_pool2d",
        "avg_pool3d", "iadd", "interpolate", "isub", "mean", "neg", "pad", "roll", "sub", "sub_", "sum",
    }
)  # fmt: skip
# Functions that are linear if only one argument depends on the inputs.
_PRODUCTS = frozenset({"conv1d", "conv2d", "conv3d", "imul", "linear", "matmul", "mul", "mul_"})
# Functions that are linear in their first argument.
_QUOTIENTS = frozenset({"div", "div_", "itruediv", "truediv"})
_LINEAR = (
    nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd, nn.Upsample, nn.PixelShuffle, nn.Unflatten, nn.Flatten, nn.Identity,
    nn.modules.dropout._DropoutNd, Sum,
)  # fmt: skip
# Operations in the place of a ReLU, and modules with a ReLU inside that no hook sees.
_RECTIFIERS = frozenset(
    {
        "celu", "clamp", "clamp_min", "clip", "elu", "gelu", "glu", "hardswish", "hardtanh", "leaky_relu", "leakyrelu",
        "maximum", "mish", "prelu", "relu6", "rrelu", "selu", "silu", "softplus", "threshold", "transformer",
        "transformerdecoder", "transformerdecoderlayer", "transformerencoder", "transformerencoderlayer",
    }
)  # fmt: skip
# Non-linearities of gates beside ReLUs. In a network without ReLUs they are the rectifiers.
_SQUASHES = frozenset({"gru", "hardsigmoid", "logsigmoid", "lstm", "rnn", "sigmoid", "softsign", "tanh"})
