r"""x-features as groups of path-integrated contributions: exact and additive for any groups.

The rest of the model, f, turns the layer's output Z into one logit. The contribution of a dimension states how much it
adds to that logit, counted from a base :math:`Z_0`, the mean over the training data:

.. math:: c_d = (Z_d - Z_{0,d}) \int_0^1 \frac{\partial f}{\partial Z_d}\bigl(Z_0 + t (Z - Z_0)\bigr)\, dt,
          \qquad \sum_d c_d = f(Z) - f(Z_0).

The sum is exact for every f with gradients almost everywhere. x-features are weighted sums of contributions,

.. math:: E_k = \sum_d a_{dk} c_d, \quad \sum_k a_{dk} = 1
          \quad\Rightarrow\quad f(Z_0) + \sum_k E_k = f(Z).

The bias and the x-features sum to the model's output for any groups a. Faithfulness therefore says nothing about the
fit. A fit learns only a, D x K numbers shared by all examples (:mod:`captum_xnn.models._grouping`).

For feature maps, tokens and sequences, a group consists of channels. All places share the groups.

The trapezoid rule computes the integral from points that include both ends. Where the sum is still off, the number of
intervals doubles, and all earlier points are reused. Each output of each example takes its own number of intervals,
independent of the rest of the batch. A remaining difference is not spread over the dimensions. It counts as the
example's ``unexplained``. The choice of the trapezoid rule rests on measurements: ReLUs and max-pooling make f
piecewise linear, and Gauss-Legendre quadrature converges no faster there and cannot reuse points.

Conventions:
    N examples, Z (N, ...), D dimensions or channels of Z, K x-features, C explained outputs.

Differs from the paper:
    In the paper a learned encoder computes the x-features and imitates the model: see
    :class:`~captum_xnn.models.SRAE`. Here nothing imitates the model. The encoder is the model's own rest.

Reference:
    Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017, Eq. 1, taken at a layer.
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, for x-features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from captum_xnn.layers._targets import Target

if TYPE_CHECKING:  # an integral gets the model's rest, and makes none
    from captum_xnn.layers._tail import Points, Tail

__all__ = ["ContributionGroups", "Integral", "integrate", "layer_decides"]

# Rounding errors, of the largest output, by which outputs may differ when a layer gets its own output back.
_ROUNDINGS = 32
# Share of the path from the base within which points become no denser: float32 resolves little more.
_NEAR = 1e-6
# Share of the change of the output. Where contributions miss more, points close to the base are tried.
_MISSED = 0.02


class ContributionGroups(nn.Module):
    """Groups of path-integrated contributions, the default form of explanation network.

    Args:
        shape: Dimensions D of Z, or the shape (...) of one example.
        n_features: Largest number of x-features K. Groups that add nothing are merged into others.
        n_outputs: Explained outputs C. All share the groups.
        channels: Dimension of Z to group, counted with the examples as 0. The default is 1 for vectors and feature
            maps (N, C, H, W), and 2 for tokens (N, T, D).
        grid: Patches along each side of an image, which are covered to measure drops.
        covered: ``"images"`` covers pixels. That takes one forward pass of the model for every patch. ``"maps"``
            covers cells of the last feature maps that every path to the layer crosses, or pixels without such
            maps. The default covers pixels of images up to 64 x 64, and maps of larger ones.
        strongest: Number of patches of each image whose pixels are covered too, where maps are covered. Of a 4 x 4
            grid, they are the patches in which covered cells lower the output most. 0 covers maps only.
        positives: Largest number of examples of the class to learn from.
        others: Largest number of further examples to learn from.
        ridge: Lambda of the regression that makes groups of images (:mod:`captum_xnn.models._grouping`). A larger one
            makes groups vary less with the examples, but they overlap more.
        balance: Pull of the groups towards equal sizes, from 0 to 1. 0 leaves sizes to the data.
        intervals: First number of intervals of the path integral.
        most: Largest number of intervals.
        tolerance: Largest accepted difference between the sum of contributions and the change of the output, in
            standard deviations of the output. Above it the intervals double.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> from captum_xnn import XNNAttribution
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> data = torch.randn(300, 6)
        >>> xnn = XNNAttribution(model, "1", n_features=3).fit(data, target=0, progress=False)
        >>> why = xnn.explain(data[:4], target=0)
        >>> bool((why.unexplained.abs() < 0.01).all())
        True
    """

    base: Tensor
    groups: Tensor
    scale: Tensor
    divides_dimensions = True
    """Whether rows of ``groups`` are the dimensions of Z, so that other groups of dimensions can take their place."""

    def __init__(
        self,
        shape: int | Sequence[int],
        n_features: int = 5,
        *,
        n_outputs: int = 1,
        channels: int | None = None,
        grid: int = 8,
        covered: Literal["maps", "images"] | None = None,
        strongest: int = 3,
        positives: int = 30,
        others: int = 200,
        ridge: float = 1.0,
        balance: float = 0.0,
        intervals: int = 8,
        most: int = 512,
        tolerance: float = 0.01,
    ) -> None:
        super().__init__()
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        counts = {
            "n_features": n_features,
            "n_outputs": n_outputs,
            "grid": grid,
            "positives": positives,
            "intervals": intervals,
            "most": most,
        }
        for name, value in counts.items():
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name} is {value}; pass a whole number of at least 1")
        if not isinstance(strongest, int) or not 0 <= strongest < 2**31:
            raise ValueError(f"strongest is {strongest!r}; pass a whole number, or 0 to cover maps only")
        if covered not in ("maps", "images", None):
            raise ValueError(f"covered is {covered!r}; pass 'maps', 'images', or None to choose by the size of images")
        if not 0 <= balance < math.inf or not 0 < tolerance < math.inf:
            raise ValueError(f"balance is {balance} and tolerance {tolerance}; pass balance >= 0 and tolerance > 0")
        if not 0 < ridge < math.inf:
            raise ValueError(f"ridge is {ridge}; pass a number above 0")
        channels = (2 if len(sizes) == 2 else 1) if channels is None else channels % (len(sizes) + 1)
        if not 1 <= channels <= len(sizes):
            raise ValueError(f"channels is {channels}; pass a dimension of Z, 1 to {len(sizes)}")
        self.channels = channels
        self.config: dict[str, Any] = {
            "shape": list(sizes),
            "n_features": n_features,
            "n_outputs": n_outputs,
            "channels": channels,
            "grid": grid,
            "covered": covered,
            "strongest": strongest,
            "positives": positives,
            "others": others,
            "ridge": float(ridge),
            "balance": balance,
            "intervals": intervals,
            "most": most,
            "tolerance": float(tolerance),
        }
        # All places of a grid share one base, because images may differ in size. Each token position has its own.
        base_shape = [size if len(sizes) == 2 or i + 1 == channels else 1 for i, size in enumerate(sizes)]
        self.register_buffer("base", torch.zeros(base_shape, device="cpu"))
        self.register_buffer("groups", torch.zeros(sizes[channels - 1], n_features, device="cpu"))
        self.register_buffer("scale", torch.ones(n_outputs, device="cpu"))

    @property
    def n_features(self) -> int:
        """Number of x-features K."""
        return self.groups.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the groups."""
        return self.groups.dtype

    def mean_of(self, chunks: Sequence[Tensor] | Any, count: int) -> Tensor:
        """Compute the base: the mean of activations over examples, and over places that share a base.

        Args:
            chunks: Activations (m, ...), chunk by chunk.
            count: Number of all examples.
        """
        total: Tensor | None = None
        over = [i for i in range(1, self.base.dim() + 1) if self.base.shape[i - 1] == 1]
        for chunk in chunks:
            some = chunk.double().mean(over, keepdim=True) if over else chunk.double()
            total = some.sum(0) if total is None else total + some.sum(0)
        assert total is not None
        return (total / count).reshape(self.base.shape)

    def by_channel(self, values: Tensor) -> Tensor:
        """Sum over places and keep channels, (..., N, D).

        Args:
            values: One value for each number of Z, (..., N, ...Z).
        """
        after = self.base.dim() - self.channels
        ahead = self.channels - 1
        lead = values.dim() - self.base.dim()
        over = [*range(lead, lead + ahead), *range(values.dim() - after, values.dim())]
        return values.sum(over) if over else values

    def read_out(self, Z: Tensor, slopes: Tensor) -> Tensor:
        r"""Compute x-features :math:`\sum_d a_{dk} G_d (Z_d - Z_{0,d})` from given slopes G, (N, K).

        Args:
            Z: Activations (N, ...).
            slopes: Slopes G of the same shape.
        """
        by_feature = [self.slopes_of(slopes, k) for k in range(self.n_features)]
        weight = torch.stack([G.movedim(self.channels, -1).reshape(len(Z), -1) for G in by_feature], 2)
        flat = Z.to(slopes.dtype).movedim(self.channels, -1).reshape(len(Z), 1, -1)
        base = self.base.to(slopes).expand(slopes.shape).movedim(self.channels, -1).reshape(len(Z), 1, -1)
        # One affine operation, because every backend has a rule for it. The base becomes its bias.
        return torch.baddbmm(-torch.bmm(base, weight), flat, weight)[:, 0]

    def slopes_of(self, slopes: Tensor, feature: int) -> Tensor:
        r"""Compute the slopes of one x-feature, :math:`a_{dk} G_d`, (N, ...).

        Args:
            slopes: Slopes G of the output, (N, ...).
            feature: Index of the x-feature.
        """
        shape = [-1 if d == self.channels else 1 for d in range(slopes.dim())]
        return slopes * self.groups[:, feature].to(slopes).reshape(shape)

    def integral(
        self,
        tail: Tail,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        targets: Sequence[Sequence[Target]],
        *,
        predictions: Tensor | None = None,
        Z: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Integral:
        """Integrate the model's rest from the base to the layer's output.

        Args:
            tail: The model's rest.
            inputs: Tensors (N, ...), on the model's device.
            additional: Further arguments of the model.
            targets: For each explained output the target of every example.
            predictions: The model's own outputs, (C, N).
            Z: The layer's own output, (N, ...), if known. Used with ``predictions``.
            scale: Standard deviations of the outputs, (C,) or (C, N). None takes the standard deviations from the fit.
        """
        scale = self.scale if scale is None else scale
        return integrate(
            tail,
            inputs,
            additional,
            self.base,
            targets,
            tolerance=self.config["tolerance"] * scale,
            intervals=self.config["intervals"],
            most=self.config["most"],
            predictions=predictions,
            Z=Z,
        )

    def contributions(self, integral: Integral) -> Tensor:
        """Compute contributions by channel, (C, N, D).

        Args:
            integral: Result of :meth:`integral`.
        """
        return self.by_channel(integral.contributions(self.base.to(integral.slopes)))

    def features(self, contributions: Tensor) -> Tensor:
        """Compute x-features (..., K), in logits.

        Args:
            contributions: Contributions by channel, (..., D).
        """
        with torch.autocast(contributions.device.type, enabled=False):
            return contributions @ self.groups.to(contributions)

    def keep(self, columns: Tensor) -> None:
        """Keep only some x-features, in the given order.

        Args:
            columns: Indices of the x-features. The groups of all others must be 0, or contributions no longer add up.
        """
        self.groups = self.groups[:, columns].clone()
        self.config["n_features"] = len(columns)

    def extra_repr(self) -> str:
        """Return the text that a printed model shows for this module."""
        return f"{math.prod(self.config['shape'])} numbers of Z, {self.groups.shape[0]} dimensions in {self.n_features}"


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
    predictions: Tensor | None = None,
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
        predictions: The model's own outputs, (C, N), to compare with the outputs at the end of the path.
        Z: The layer's own output, (N, ...), if known. The modules before the layer then do not run again. Used only
            with ``predictions``, because a comparison must show that no other value bypasses the layer.

    Raises:
        ValueError: If the output has no gradients at the layer, or if the model's output changes when the layer's own
            output is put back.

    Example:
        >>> from captum_xnn.layers._tail import Tail
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> tail, base = Tail(model, "0"), torch.zeros(4)
        >>> integral = integrate(tail, (x,), None, base, [[0] * 5], tolerance=torch.tensor([1e-3]))
        >>> torch.allclose(integral.contributions(base).sum(2), integral.end - integral.start, atol=0.05)
        True
    """
    path = _Path(tail, inputs, additional, base, targets)
    Z = None if predictions is None else Z
    first = path.first_points(intervals, predictions, Z)
    integral = Integral(
        first.Z,
        first.gradient / intervals,
        first.y[:, 0].clone(),
        first.y[:, -1].clone(),
        torch.full((len(targets), len(inputs[0])), intervals, device="cpu"),
    )
    unconverged = torch.ones(len(targets), len(inputs[0]), dtype=torch.bool, device="cpu")
    while intervals < most and bool((unconverged := unconverged & _incomplete(integral, base, tolerance)).any()):
        path.halve_intervals(integral, unconverged, intervals, is_Z_known=Z is not None)
        intervals *= 2
        integral.intervals[unconverged] = intervals
    unconverged = (
        unconverged
        & _incomplete(integral, base, tolerance)
        & _incomplete(integral, base, _MISSED * (integral.end - integral.start).abs())
    )
    if bool(unconverged.any()):
        path.integrate_near_base(integral, unconverged, intervals, is_Z_known=Z is not None)
    return integral


class _Path(NamedTuple):
    """Straight paths from a base to the layer's output, one for each example."""

    tail: Tail
    inputs: tuple[Tensor, ...]
    additional: tuple[Any, ...] | None
    base: Tensor
    targets: Sequence[Sequence[Target]]

    def points(self, ts: Tensor, weights: Tensor, Z: Tensor | None = None) -> Points:
        """Evaluate outputs and gradients at places ``ts`` on all paths."""
        return self.tail.along(self.inputs, self.additional, self.base, ts, weights, self.targets, Z=Z)

    def first_points(self, intervals: int, predictions: Tensor | None, Z: Tensor | None) -> Points:
        """Evaluate the first points, both ends included, and check that the outputs at the end are the model's own.

        If Z is known, the modules before the layer run on one example only. Where the outputs then differ, something
        bypasses the layer, and all examples run.
        """
        ts = torch.linspace(0, 1, intervals + 1, dtype=torch.float32, device="cpu")
        weights = torch.ones_like(ts)
        weights[[0, -1]] = 0.5
        points = self.points(ts, weights, Z)
        if predictions is None:
            return points
        if Z is not None and self.tail.layer_decides is not False:
            if _differs(points.y, predictions):
                self.tail.layer_decides = False
            elif len(self.inputs[0]) > 1:  # a single example stands in for itself, and proves nothing
                self.tail.layer_decides = True
            if self.tail.layer_decides is False:
                points = self.points(ts, weights)
        if not _differs(points.y, predictions):
            return points
        if self.tail.repeat_inputs():
            points = self.points(ts, weights)
        if _differs(points.y, predictions):
            largest = float((points.y[:, -1] - predictions.to(points.y)).abs().max())
            raise ValueError(
                f"the model's output changes when layer {self.tail.name!r} gets its own output back, by up to "
                f"{largest:.3g}: rows of a batch depend on each other, or the model draws random numbers; explain one "
                "example at a time, or fit with autoencoder=SRAE"
            )
        return points

    def halve_intervals(self, integral: Integral, unconverged: Tensor, intervals: int, *, is_Z_known: bool) -> None:
        """Add the middle of each interval to the slopes of some outputs of some examples, in place.

        Args:
            integral: The integral so far.
            unconverged: The outputs and examples that need more points, boolean (C, N).
            intervals: Number of intervals so far.
            is_Z_known: Whether the layer's output was known before the model ran.
        """
        rows = unconverged.any(0).nonzero()[:, 0]
        targets = [[of[i] for i in rows.tolist()] for of in self.targets]
        # Dense: a forward pass for each example, and a backward pass for each output. Sparse: both for each pair.
        is_sparse = is_Z_known and 2 * int(unconverged.sum()) < (1 + len(targets)) * len(rows)
        if is_sparse:
            outputs, rows = unconverged.nonzero().T
            targets = [[self.targets[c][i] for c, i in zip(outputs.tolist(), rows.tolist(), strict=True)]]
        middles = (torch.arange(intervals, dtype=torch.float32, device="cpu") + 0.5) / intervals
        ones = torch.ones_like(middles)
        Z = integral.Z[rows.to(integral.Z.device)] if is_Z_known else None
        new = self.tail.along(self.inputs, self.additional, self.base, middles, ones, targets, Z=Z, rows=rows)
        gradient = new.gradient[0] if is_sparse else new.gradient[unconverged[:, rows].to(new.gradient.device)]
        at = unconverged.to(integral.slopes.device)
        integral.slopes[at] = (integral.slopes[at] + gradient / intervals) / 2

    def integrate_near_base(self, integral: Integral, unconverged: Tensor, intervals: int, *, is_Z_known: bool) -> None:
        """Integrate again with points that are dense close to the base; keep results whose error is ten times smaller.

        The base of feature maps has one number per channel, so the variance over places is 0 there. The derivative of
        an instance norm then reaches 1 / sqrt(eps), within a small part of the first interval.

        Args:
            integral: The integral so far, improved in place.
            unconverged: The outputs and examples to integrate again, boolean (C, N).
            intervals: Number of intervals.
            is_Z_known: Whether the layer's output was known before the model ran.
        """
        rows = unconverged.any(0).nonzero()[:, 0]
        targets = [[of[i] for i in rows.tolist()] for of in self.targets]
        ts = _near_base(intervals)
        steps = ts.diff()
        weights = torch.zeros_like(ts)
        weights[:-1] += steps / 2
        weights[1:] += steps / 2
        at = rows.to(integral.slopes.device)
        Z = integral.Z[at] if is_Z_known else None
        new = self.tail.along(self.inputs, self.additional, self.base, ts, weights, targets, Z=Z, rows=rows)
        before = Integral(
            integral.Z[at],
            integral.slopes[:, at],
            integral.start[:, at],
            integral.end[:, at],
            integral.intervals[:, rows],
        )
        after = before._replace(Z=new.Z, slopes=new.gradient)
        better = unconverged[:, rows] & (_sum_error(after, self.base) < _sum_error(before, self.base) / 10).cpu()
        where = torch.zeros_like(unconverged)
        where[:, rows] = better
        integral.slopes[where.to(integral.slopes.device)] = after.slopes[better.to(after.slopes.device)]
        integral.intervals[where] = len(steps)


def _near_base(intervals: int) -> Tensor:
    """Make points t in [0, 1]: half of them even, half with a density in proportion to 1 / (t + eps)."""
    t = np.append(0, np.logspace(-12, 0, 4001))
    count = (t + np.log1p(t / _NEAR) / math.log1p(1 / _NEAR)) / 2
    return torch.from_numpy(np.interp(np.linspace(0, 1, intervals + 1), count, t)).float()


def layer_decides(
    tail: Tail,
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...] | None,
    targets: Sequence[Sequence[Target]],
    Z: Tensor,
    predictions: Tensor,
) -> bool:
    """Whether the layer's output alone decides the model's outputs: run Z with other inputs, and compare.

    Args:
        tail: The rest of the model.
        inputs: Tensors (N, ...). The first example stands in for all.
        additional: Further arguments of the model.
        targets: For each of C outputs the target of every example.
        Z: The layer's output, (N, ...).
        predictions: The model's outputs, (C, N).
    """
    one = torch.ones(1, device="cpu")
    points = tail.along(inputs, additional, torch.zeros_like(Z[:1])[0], one, one, targets, Z=Z)
    return tail.layer_decides is not False and not _differs(points.y, predictions)


def _differs(y: Tensor, predictions: Tensor) -> bool:
    """Whether outputs at the end of the paths differ from the model's own by more than rounding.

    Args:
        y: Outputs on the paths, (C, S, N). Their range is the unit to measure in.
        predictions: The model's own outputs, (C, N).
    """
    share = 1e-3 if y.dtype in (torch.float32, torch.float64) else 5e-2
    eps, y = torch.finfo(y.dtype).eps, y.double()
    predictions = predictions.to(y)
    unit = y.amax((1, 2)) - y.amin((1, 2))
    rounding = _ROUNDINGS * eps * y.abs().amax((1, 2))
    allowed = share * (unit[:, None] + predictions.abs()) + rounding[:, None]
    return not bool(((y[:, -1] - predictions).abs() <= allowed).all())


def _incomplete(integral: Integral, base: Tensor, tolerance: Tensor) -> Tensor:
    """Mark where completeness fails: contributions miss the change of the output by more than a tolerance, (C, N)."""
    error = _sum_error(integral, base)
    return (error > tolerance.to(error).reshape(len(error), -1)).cpu()


def _sum_error(integral: Integral, base: Tensor) -> Tensor:
    """Compute by how much contributions miss the change of the output, (C, N)."""
    total = integral.contributions(base).flatten(2).sum(2)
    return (total - (integral.end - integral.start).to(total)).abs()
