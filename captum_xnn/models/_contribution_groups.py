r"""x-features as groups of path-integrated contributions: exact and additive for any groups.

The rest of the model, f, turns the layer's output Z into one logit. Path-integrated contributions :math:`c_d`
(:mod:`captum_xnn.models._path_integral`) state how much each dimension adds to that logit, counted from a base
:math:`Z_0`, the mean over the training data. x-features are weighted sums of contributions,

.. math:: E_k = \sum_d a_{dk} c_d, \quad \sum_k a_{dk} = 1
          \quad\Rightarrow\quad f(Z_0) + \sum_k E_k = f(Z).

The bias and the x-features sum to the model's output for any groups a. Faithfulness therefore says nothing about the
fit. A fit learns only a, D x K numbers shared by all examples (:mod:`captum_xnn.models._grouping`).

For feature maps, tokens and sequences, a group consists of channels. All places share the groups.

Conventions:
    N examples, D dimensions or channels of Z, K x-features, C explained outputs.

Differs from the paper:
    In the paper a learned encoder computes the x-features and imitates the model: see
    :class:`~captum_xnn.models.SRAE`. Here nothing imitates the model. The encoder is the model's own rest.

Reference:
    Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017, for contributions.
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, for x-features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_xnn.layers._tail import Tail
from captum_xnn.layers._targets import Target
from captum_xnn.models._path_integral import Integral, integrate

__all__ = ["ContributionGroups"]


class ContributionGroups(nn.Module):
    """Groups of path-integrated contributions, the default form of explanation network.

    Args:
        shape: Dimensions D of Z, or the shape (...) of one example.
        n_features: Largest number of x-features K. Groups that add nothing are merged into others.
        n_outputs: Explained outputs C. All share the groups.
        channels: Dimension of Z to group, counted with the examples as 0. The default is 1 for vectors and feature
            maps (N, C, H, W), and 2 for tokens (N, T, D).
        patches: Patches along each side of the grid in which images are covered to measure drops.
        covered: ``"images"`` covers pixels. That takes one forward pass of the model for every patch. ``"maps"``
            covers cells of the last feature maps that every path to the layer crosses, or pixels without such
            maps. The default covers pixels of images up to 64 x 64, and maps of larger ones.
        positives: Largest number of examples of the class to learn from.
        others: Largest number of further examples to learn from.
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
        patches: int = 8,
        covered: Literal["maps", "images"] | None = None,
        positives: int = 30,
        others: int = 200,
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
            "patches": patches,
            "positives": positives,
            "intervals": intervals,
            "most": most,
        }
        for name, value in counts.items():
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name} is {value}; pass a whole number of at least 1")
        if covered not in ("maps", "images", None):
            raise ValueError(f"covered is {covered!r}; pass 'maps', 'images', or None to choose by the size of images")
        if not 0 <= balance < math.inf or not 0 < tolerance < math.inf:
            raise ValueError(f"balance is {balance} and tolerance {tolerance}; pass balance >= 0 and tolerance > 0")
        channels = (2 if len(sizes) == 2 else 1) if channels is None else channels % (len(sizes) + 1)
        if not 1 <= channels <= len(sizes):
            raise ValueError(f"channels is {channels}; pass a dimension of Z, 1 to {len(sizes)}")
        self.channels = channels
        self.config: dict[str, Any] = {
            "shape": list(sizes),
            "n_features": n_features,
            "n_outputs": n_outputs,
            "channels": channels,
            "patches": patches,
            "covered": covered,
            "positives": positives,
            "others": others,
            "balance": balance,
            "intervals": intervals,
            "most": most,
            "tolerance": float(tolerance),
        }
        # All places of a grid share one base, because images may differ in size. Each token position has its own.
        places = [size if len(sizes) == 2 or i + 1 == channels else 1 for i, size in enumerate(sizes)]
        self.register_buffer("base", torch.zeros(places))
        self.register_buffer("groups", torch.zeros(sizes[channels - 1], n_features))
        self.register_buffer("scale", torch.ones(n_outputs))

    @property
    def n_features(self) -> int:
        """Number of x-features K."""
        return self.groups.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the groups."""
        return self.groups.dtype

    def mean_of(self, parts: Sequence[Tensor] | Any, count: int) -> Tensor:
        """Compute the base: the mean of activations over examples, and over places that share a base.

        Args:
            parts: Activations (m, ...), part by part.
            count: Number of all examples.
        """
        total: Tensor | None = None
        over = [i for i in range(1, self.base.dim() + 1) if self.base.shape[i - 1] == 1]
        for part in parts:
            some = part.double().mean(over, keepdim=True) if over else part.double()
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
        own = [self.slopes_of(slopes, k) for k in range(self.n_features)]
        weight = torch.stack([G.movedim(self.channels, -1).reshape(len(Z), -1) for G in own], 2)
        flat = Z.to(slopes.dtype).movedim(self.channels, -1).reshape(len(Z), 1, -1)
        base = self.base.to(slopes).expand(slopes.shape).movedim(self.channels, -1).reshape(len(Z), 1, -1)
        # One affine operation, because every backend has a rule for it. The base becomes its bias.
        return torch.baddbmm(-torch.bmm(base, weight), flat, weight)[:, 0]

    def slopes_of(self, slopes: Tensor, feature: int) -> Tensor:
        r"""Compute the slopes of one x-feature, :math:`a_{dk} G_d`, (N, ...).

        Args:
            slopes: Slopes G of the output, (N, ...).
            feature: Number of the x-feature.
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
        own: Tensor | None = None,
        Z: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Integral:
        """Integrate the model's rest from the base to the layer's output.

        Args:
            tail: The model's rest.
            inputs: Tensors (N, ...), on the model's device.
            additional: Further arguments of the model.
            targets: For each explained output the target of every example.
            own: The model's own outputs, (C, N).
            Z: The layer's own output, (N, ...), if known. Used with ``own``.
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
            own=own,
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
        return contributions @ self.groups.to(contributions)

    def keep(self, columns: Tensor) -> None:
        """Keep only some x-features, in the given order.

        Args:
            columns: Numbers of the x-features. The groups of all others must be 0, or contributions no longer add up.
        """
        self.groups = self.groups[:, columns].clone()
        self.config["n_features"] = len(columns)

    def extra_repr(self) -> str:
        """Return the text that a printed model shows for this module."""
        return f"{math.prod(self.config['shape'])} numbers of Z, {self.groups.shape[0]} dimensions in {self.n_features}"
