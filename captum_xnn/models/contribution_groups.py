r"""x-features that are groups of path-integrated contributions: exact and additive, whatever the groups are.

The rest of the model f turns the layer's output Z into one logit. Its path-integrated contributions c_d
(:mod:`captum_xnn.models.path_integral`) say what each dimension adds to that logit, from a base :math:`Z_0`, the mean
over the training data, on. x-features are weighted groups of them,

.. math:: E_k = \sum_d a_{dk} c_d, \quad \sum_k a_{dk} = 1
          \quad\Rightarrow\quad f(Z_0) + \sum_k E_k = f(Z).

So x-features with their bias give the model's output back, whatever the groups a are: faithfulness is no achievement of
the fit. What is learned is a, D x K numbers that all examples share (:mod:`captum_xnn.models.grouping`).

Of feature maps, tokens and sequences, groups are of channels, shared by all places.

Conventions:
    N examples, D dimensions or channels of Z, K x-features, C explained outputs.

Differs from the paper:
    The x-features of the paper are those of a learned encoder, which imitates the model: see
    :class:`~captum_xnn.models.srae.SRAE`. Here nothing imitates. The encoder is the model's own rest.

Reference:
    Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017, for contributions.
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, for x-features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_xnn.layers.tail import Tail
from captum_xnn.models.path_integral import Integral, integrate
from captum_xnn.targets import Target

__all__ = ["ContributionGroups"]


class ContributionGroups(nn.Module):
    """Groups of path-integrated contributions, the default form of explanation network.

    Args:
        shape: Dimensions D of Z, or the shape (...) of one example.
        n_features: x-features K, at most: groups that add nothing are dropped.
        n_outputs: Explained outputs C, which share the groups.
        channels: The dimension of Z that groups are made of, counted with the examples as 0; 1 for vectors and feature
            maps (N, C, H, W), 2 for tokens (N, T, D), unless told otherwise.
        patches: Cells along each side of the grid in which images are covered to see what an x-feature loses.
        positives: Examples of the class to learn from, at most.
        others: Further examples to learn from, at most.
        balance: From 0 to 1: how far groups are drawn to equal sizes. 0 leaves sizes to the data.
        intervals: Intervals of the path integral to begin with.
        most: Intervals at most.
        tolerance: Standard deviations of the output that contributions may fail to add up to, before intervals double.

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

    def __init__(
        self,
        shape: int | Sequence[int],
        n_features: int = 5,
        *,
        n_outputs: int = 1,
        channels: int | None = None,
        patches: int = 8,
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
            "positives": positives,
            "others": others,
            "balance": balance,
            "intervals": intervals,
            "most": most,
            "tolerance": float(tolerance),
        }
        # Places of a grid have one base, as images may have other sizes; positions of tokens have one each.
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
        """Return the base: the mean of activations over examples, and over places where these share one.

        Args:
            parts: Activations (m, ...) part by part.
            count: Examples in all.
        """
        total: Tensor | None = None
        over = [i for i in range(1, self.base.dim() + 1) if self.base.shape[i - 1] == 1]
        for part in parts:
            some = part.double().mean(over, keepdim=True) if over else part.double()
            total = some.sum(0) if total is None else total + some.sum(0)
        assert total is not None
        return (total / count).reshape(self.base.shape)

    def by_channel(self, values: Tensor) -> Tensor:
        """Sum over places, and keep channels, (..., N, D).

        Args:
            values: One number for each number of Z, (..., N, ...Z).
        """
        after = self.base.dim() - self.channels
        ahead = self.channels - 1
        lead = values.dim() - self.base.dim()
        over = [*range(lead, lead + ahead), *range(values.dim() - after, values.dim())]
        return values.sum(over) if over else values

    def read_out(self, Z: Tensor, slopes: Tensor) -> Tensor:
        r"""Return x-features :math:`\sum_d a_{dk} G_d (Z_d - Z_{0,d})` with given slopes G, (N, K).

        Args:
            Z: Activations (N, ...).
            slopes: Slopes G of the same shape.
        """
        D, K = self.groups.shape
        own = slopes.movedim(self.channels, -1).reshape(len(Z), -1, D, 1) * self.groups.to(slopes)
        weight = own.reshape(len(Z), -1, K)
        flat = Z.to(slopes.dtype).movedim(self.channels, -1).reshape(len(Z), 1, -1)
        base = self.base.to(slopes).expand(slopes.shape).movedim(self.channels, -1).reshape(len(Z), 1, -1)
        # One affine operation, for which every backend has a rule; the base is its bias.
        return torch.baddbmm(-torch.bmm(base, weight), flat, weight)[:, 0]

    def integral(
        self,
        tail: Tail,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        targets: Sequence[Sequence[Target]],
        *,
        own: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Integral:
        """Integrate the model's rest from the base to the layer's output.

        Args:
            tail: The model's rest.
            inputs: Tensors (N, ...), on the model's device.
            additional: Further arguments of the model.
            targets: For each explained output the target of every example.
            own: The model's own outputs, (C, N).
            scale: Standard deviations of the outputs, (C,) or (C, N), where they are not those that this explains.
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
        )

    def contributions(self, integral: Integral) -> Tensor:
        """Return contributions by channel, (C, N, D).

        Args:
            integral: What :meth:`integral` returned.
        """
        return self.by_channel(integral.contributions(self.base.to(integral.slopes)))

    def features(self, contributions: Tensor) -> Tensor:
        """Return x-features (..., K), in logits.

        Args:
            contributions: By channel, (..., D).
        """
        return contributions @ self.groups.to(contributions)

    def keep(self, columns: Tensor) -> None:
        """Keep some of the x-features, in this order.

        Args:
            columns: Their numbers; what the others hold has to be 0, or contributions no longer add up.
        """
        self.groups = self.groups[:, columns].clone()
        self.config["n_features"] = len(columns)

    def extra_repr(self) -> str:
        """Return what a printed model shows of this module."""
        return f"{math.prod(self.config['shape'])} numbers of Z, {self.groups.shape[0]} dimensions in {self.n_features}"
