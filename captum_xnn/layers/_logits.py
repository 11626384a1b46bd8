"""Guess from a model's outputs whether they are logits.

Contributions add up to the output, so the output should be a sum of evidence, as a logit is. A probability is not such
a sum: a softmax mixes all classes, and a sigmoid saturates.

Conventions:
    N examples, C classes; outputs are (N,), (N, C), or (N, ...) with classes in dimension 1 or in the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LOGITS_OF", "OutputRange", "no_logits"]

# Fewer outputs than this, or closer ones, may lie between 0 and 1 by chance.
_ENOUGH = 10
_WIDE = 0.7


def _of_softmax(y: Tensor) -> Tensor:
    """Turn probabilities (N, C) after a softmax into logits less their mean. A probability of 0 stays finite."""
    return _of_log_softmax(y.clamp(min=torch.finfo(y.dtype).tiny).log())


def _of_log_softmax(y: Tensor) -> Tensor:
    """Turn log-probabilities (N, C) into logits less their mean."""
    return y - y.mean(1, keepdim=True)


def _of_sigmoid(y: Tensor) -> Tensor:
    """Turn probabilities after a sigmoid into logits."""
    return torch.logit(y, eps=1e-6)


LOGITS_OF = {"softmax": _of_softmax, "log_softmax": _of_log_softmax, "sigmoid": _of_sigmoid}
"""Functions that turn outputs into logits, by the function whose values the outputs are."""


class OutputRange:
    """Collects, part by part, the marks of outputs after a softmax, log_softmax or sigmoid: their range and sums.

    Example:
        >>> seen = OutputRange()
        >>> seen.add(torch.tensor([[0.3, 0.7], [0.9, 0.1]]))
        >>> seen.sum_to_one
        {1}
    """

    def __init__(self) -> None:
        self.low, self.high, self.examples = float("inf"), float("-inf"), 0
        self.sum_to_one: set[int] | None = None
        """Dimensions over which probabilities sum to 1; None before the first part."""
        self.exponentials_sum_to_one: set[int] | None = None
        """Dimensions over which exponentials of the outputs sum to 1; None before the first part."""

    def add(self, outputs: Tensor) -> None:
        """Add the outputs of some examples.

        Args:
            outputs: (n, ...).
        """
        if not outputs.numel():
            return
        low, high = outputs.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.examples += len(outputs)
        tolerance = 1e-2 if outputs.dtype in (torch.float16, torch.bfloat16) else 1e-4
        classes = {d for d in (1, outputs.dim() - 1) if 0 < d < outputs.dim() and outputs.shape[d] > 1}
        if self.sum_to_one is None or self.exponentials_sum_to_one is None:
            self.sum_to_one = self.exponentials_sum_to_one = classes
        positive = self.low >= 0
        self.sum_to_one = {
            d
            for d in self.sum_to_one & classes
            if positive and bool(((outputs.double().sum(d) - 1).abs() < tolerance).all())
        }
        self.exponentials_sum_to_one = {
            d
            for d in self.exponentials_sum_to_one & classes
            if self.high <= tolerance and bool((outputs.double().logsumexp(d).abs() < tolerance).all())
        }


def no_logits(seen: OutputRange) -> str | None:
    """Say why outputs do not seem to be logits, and the remedy; None if they may well be logits.

    Args:
        seen: Range and sums of all outputs.

    Example:
        >>> seen = OutputRange()
        >>> seen.add(torch.linspace(-1, 1, 20)[:, None])
        >>> print(no_logits(seen))
        None
    """
    for d in sorted(seen.sum_to_one or ()):
        return (
            "outputs are non-negative and sum to 1 in every example, as after a softmax; contributions to a "
            "probability mix all classes. Explain the model without its last softmax, or pass "
            f"prediction_transform=lambda y: y.log() - y.log().mean({d}, keepdim=True), its logits less their mean "
            "(on the command line: --probabilities softmax)"
        )
    for d in sorted(seen.exponentials_sum_to_one or ()):
        return (
            "exponentials of the outputs sum to 1 in every example, as after a log_softmax; contributions to a "
            "log-probability mix all classes. Explain the model without its last log_softmax, or pass "
            f"prediction_transform=lambda y: y - y.mean({d}, keepdim=True), its logits less their mean "
            "(on the command line: --probabilities log_softmax)"
        )
    if seen.examples >= _ENOUGH and seen.low >= 0 and seen.high <= 1 and seen.high - seen.low > _WIDE:
        return (
            f"all outputs lie between 0 and 1 ({seen.low:.2g} to {seen.high:.2g}), and may be probabilities after a "
            "sigmoid, whose contributions saturate. If so, explain the model without its sigmoid, or pass "
            "prediction_transform=functools.partial(torch.logit, eps=1e-6) (on the command line: --probabilities "
            "sigmoid); if they are a measured quantity, all is "
            "well"
        )
    return None
