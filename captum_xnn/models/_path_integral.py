r"""Path-integrated contributions of each dimension of a layer to one output of the model.

For the layer's output Z, a base :math:`Z_0` and the rest of the model f,

.. math:: c_d = (Z_d - Z_{0,d}) \int_0^1 \frac{\partial f}{\partial Z_d}\bigl(Z_0 + t (Z - Z_0)\bigr)\, dt,
          \qquad \sum_d c_d = f(Z) - f(Z_0).

The sum is exact for every f with gradients almost everywhere. The trapezoid rule computes the integral from points that
include both ends. Where the sum is still off, the number of intervals doubles, and all earlier points are reused. Each
output of each example takes its own number of intervals, independent of the rest of the batch. A remaining difference
is not spread over the dimensions. It counts as the example's ``unexplained``.

The choice of the trapezoid rule rests on measurements. ReLUs and max-pooling make f piecewise linear. Gauss-Legendre
quadrature converges no faster there and cannot reuse points.

Conventions:
    N examples, Z (N, ...), C explained outputs.

Reference:
    Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017, Eq. 1, taken at a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.layers._batching import rows_of
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._targets import Target

__all__ = ["Integral", "decides", "integrate"]

# Roundings of the largest output that the output may be off by when a layer gets its own output back.
_ROUNDINGS = 32


class Integral(NamedTuple):
    """Path integral of a batch."""

    Z: Tensor
    """The layer's output, (N, ...)."""
    slopes: Tensor
    """Mean derivative of each output along the path, (C, N, ...). Times Z - base it is the contribution."""
    start: Tensor
    """Outputs at the base, (C, N)."""
    end: Tensor
    """Outputs at Z, (C, N)."""
    intervals: Tensor
    """Number of intervals for each output of each example, (C, N)."""

    def contributions(self, base: Tensor) -> Tensor:
        """Compute the contributions of all numbers of Z, (C, N, ...).

        Args:
            base: Base of the path, of a shape that expands to Z.
        """
        return self.slopes * (self.Z.to(self.slopes) - base.to(self.slopes))


def integrate(
    tail: Tail,
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    base: Tensor,
    targets: Sequence[Sequence[Target]],
    *,
    tolerance: Tensor,
    intervals: int = 8,
    most: int = 512,
    own: Tensor | None = None,
    Z: Tensor | None = None,
) -> Integral:
    """Integrate the gradient of outputs along the straight path from a base to the layer's output.

    Args:
        tail: The rest of the model.
        inputs: Tensors (N, ...), on the model's device.
        additional: Further arguments of the model.
        base: Start of the paths, of a shape that expands to Z.
        targets: For each of C outputs the target of every example.
        tolerance: Largest accepted difference between the sum of contributions and the change of the output, (C,) or
            (C, N).
        intervals: First number of intervals.
        most: Largest number of intervals.
        own: The model's own outputs, (C, N), to compare with the outputs at the end of the path.
        Z: The layer's own output, (N, ...), if known. The modules before the layer then do not run again. Used only
            with ``own``, because a comparison must show that no other value bypasses the layer.

    Raises:
        ValueError: If the output has no gradients at the layer, or if the model's output changes when the layer's own
            output is put back.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> made = integrate(Tail(model, "0"), (x,), None, torch.zeros(4), [[0] * 5], tolerance=torch.tensor([1e-3]))
        >>> torch.allclose(made.contributions(torch.zeros(4)).sum(2), made.end - made.start, atol=0.05)
        True
    """
    n = len(inputs[0])
    ts = torch.linspace(0, 1, intervals + 1, dtype=torch.float32)
    weights = torch.ones_like(ts)
    weights[[0, -1]] = 0.5
    Z = None if own is None else Z
    found = tail.along(inputs, additional, base, ts, weights, targets, Z=Z)
    if Z is not None and own is not None and tail.alone is not False:
        if _differs(found.y, own):
            tail.alone = False
        elif n > 1:  # a single example stands in for itself, and proves nothing
            tail.alone = True
        if tail.alone is False:
            found = tail.along(inputs, additional, base, ts, weights, targets)
    if own is not None and _differs(found.y, own):
        if tail.repeat():
            found = tail.along(inputs, additional, base, ts, weights, targets)
        if _differs(found.y, own):
            raise ValueError(
                f"the model's output changes when layer {tail.name!r} gets its own output back, by up to "
                f"{float((found.y[:, -1] - own.to(found.y)).abs().max()):.3g}: rows of a batch depend on each "
                "other, or the model draws random numbers; explain one example at a time, or fit with autoencoder=SRAE"
            )
    made = Integral(
        found.Z,
        found.gradient / intervals,
        found.y[:, 0].clone(),
        found.y[:, -1].clone(),
        torch.full((len(targets), n), intervals),
    )
    going = torch.ones(len(targets), n, dtype=torch.bool)
    while intervals < most and bool((going := going & _off(made, base, tolerance)).any()):
        rows = going.any(0).nonzero()[:, 0]
        x, more = rows_of(inputs, additional, rows)
        middles = (torch.arange(intervals, dtype=torch.float32) + 0.5) / intervals
        some = [[of[i] for i in rows.tolist()] for of in targets]
        known = None if Z is None else found.Z[rows.to(found.Z.device)]
        new = tail.along(x, more, base, middles, torch.ones_like(middles), some, Z=known)
        halved = (made.slopes[:, rows.to(made.slopes.device)] + new.gradient / intervals) / 2
        made.slopes[going.to(made.slopes.device)] = halved[going[:, rows].to(halved.device)]
        intervals *= 2
        made.intervals[going] = intervals
    return made


def decides(
    tail: Tail,
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    targets: Sequence[Sequence[Target]],
    Z: Tensor,
    own: Tensor,
) -> bool:
    """Whether the layer's output alone gives the model's outputs, whatever the inputs of the first example are.

    Args:
        tail: The rest of the model.
        inputs: Tensors (N, ...). Only the first example is used.
        additional: Further arguments of the model.
        targets: For each of C outputs the target of every example.
        Z: The layer's output, (N, ...).
        own: The model's outputs, (C, N).
    """
    one = torch.ones(1)
    found = tail.along(inputs, additional, torch.zeros_like(Z[:1])[0], one, one, targets, Z=Z)
    return tail.alone is not False and not _differs(found.y, own)


def _differs(y: Tensor, own: Tensor) -> bool:
    """Whether outputs at the end of the paths are others than the model's own, by more than rounding.

    Args:
        y: Outputs on the paths, (C, S, N). Their range is the unit to measure in.
        own: The model's own outputs, (C, N).
    """
    share = 1e-3 if y.dtype in (torch.float32, torch.float64) else 5e-2
    eps, y = torch.finfo(y.dtype).eps, y.double()
    own = own.to(y)
    unit = y.amax((1, 2)) - y.amin((1, 2))
    rounding = _ROUNDINGS * eps * y.abs().amax((1, 2))
    allowed = share * (unit[:, None] + own.abs()) + rounding[:, None]
    return not bool(((y[:, -1] - own).abs() <= allowed).all())


def _off(made: Integral, base: Tensor, tolerance: Tensor) -> Tensor:
    """Mark contributions that do not sum to the change of the output, (C, N)."""
    total = made.contributions(base).flatten(2).sum(2)
    off = (total - (made.end - made.start).to(total)).abs() > tolerance.to(total).reshape(len(total), -1)
    return off.cpu()
