"""Captum's private helpers, all imported here and nowhere else, as found in captum 0.9."""

from captum._utils.common import (
    _format_additional_forward_args,
    _format_output,
    _format_tensor_into_tuples,
    _is_tuple,
    _select_targets,
)
from captum._utils.typing import TargetType
from captum.log import log_usage

__all__ = [
    "TargetType",
    "format_forward_args",
    "format_output",
    "format_tensors",
    "is_tuple",
    "log_usage",
    "select_targets",
]

format_forward_args = _format_additional_forward_args
format_output = _format_output
format_tensors = _format_tensor_into_tuples
is_tuple = _is_tuple
select_targets = _select_targets
