"""Captum's private helpers as of captum 0.9. No other module imports them."""

from captum._utils.common import (
    _format_additional_forward_args,
    _format_tensor_into_tuples,
    _verify_select_neuron,
)
from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR
from captum.attr._core.lrp import SUPPORTED_LAYERS_WITH_RULES, SUPPORTED_NON_LINEAR_LAYERS
from captum.attr._utils.custom_modules import Addition_Module
from captum.log import log_usage

__all__ = [
    "DEEPLIFT_TYPES",
    "LRP_TYPES",
    "Sum",
    "format_forward_args",
    "format_tensors",
    "log_usage",
    "select_neuron",
]

format_forward_args = _format_additional_forward_args
format_tensors = _format_tensor_into_tuples
DEEPLIFT_TYPES = frozenset(SUPPORTED_NON_LINEAR)
LRP_TYPES = frozenset({*SUPPORTED_LAYERS_WITH_RULES, *SUPPORTED_NON_LINEAR_LAYERS})
Sum = Addition_Module
select_neuron = _verify_select_neuron
