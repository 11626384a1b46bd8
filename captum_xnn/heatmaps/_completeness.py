r"""Check the completeness of DeepLift: attributions sum to the difference of the x-feature from its baseline.

DeepLift treats operations without a rule as linear and gives no message. Where this matters, the sum is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_xnn.errors import UnsupportedOperationError
from captum_xnn.layers._forward_args import format_tensors

__all__ = ["refuse_incomplete"]

# Largest share of the attributions' sum that may be missing.
_TOLERANCE = 0.01
# Largest difference, relative to the sum of absolute attributions: where attributions cancel, rounding is that large.
_CANCELLING = 1e-4
# Largest difference in units of the last place of the largest output: the difference of two outputs is that inexact.
_ROUNDINGS = 64


def refuse_incomplete(method: str, attributions: Any, outputs: Tensor, target: Tensor) -> None:
    """Raise where attributions do not sum to the difference of the x-feature from its value at the baselines.

    DeepLift runs inputs and baselines as one batch. The Shap forms run each input with all baselines, and average.

    Args:
        method: Name of the method.
        attributions: A tensor (R, ...) or a tuple of them, for R pairs of example and x-feature.
        outputs: All x-features at the inputs, then at the baselines.
        target: The x-feature of each row, (R,).

    Raises:
        UnsupportedOperationError: If the sum is off by more than rounding explains.
    """
    rows = len(target)
    at_inputs, at_baselines = outputs.double().reshape(2, rows, -1, outputs.shape[1]).mean(2)
    wanted = (at_inputs - at_baselines).gather(1, target[:, None])[:, 0]
    parts = format_tensors(attributions)
    each = torch.cat([a.detach().double().reshape(rows, -1) for a in parts], 1)
    if not bool(each.isfinite().all()):
        return  # the caller warns about this
    off, size = float((each.sum(1) - wanted).abs().mean()), float(each.sum(1).abs().mean())
    eps = max(torch.finfo(x.dtype).eps for x in (outputs, *parts))  # x-features may be finer than the model
    rounding = _ROUNDINGS * eps * float(outputs.abs().amax())
    if off > _TOLERANCE * (off + size) and off > max(rounding, _CANCELLING * float(each.abs().sum(1).mean())):
        raise UnsupportedOperationError(
            f"attributions of {method} should sum to the x-feature's difference from the baseline, and are "
            f"{off / (off + size):.0%} off: {method} treats non-linearities without a rule, such as GELU, attention "
            "and layer norm, as linear, and also functions such as x.relu() where torch.fx cannot follow the model. "
            "Use IntegratedGradients or the default heatmap"
        )
