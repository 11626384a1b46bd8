r"""DRSA as a form of explanation network: x-features along directions of the layer in place of its dimensions.

With slopes G of the path integral, an orthogonal subspace :math:`U_k` has the relevance

.. math:: E_k = \sum_p (U_k^\top a_p)^\top (U_k^\top G_p), \qquad a = Z - Z_0,

summed over the places p of feature maps and tokens. The last x-feature is the relevance outside all subspaces, so the
bias and the x-features sum to the model's output, as for :class:`~captum_xnn.models.ContributionGroups`.

Conventions:
    N examples, P places, D dimensions or channels of Z, K x-features, C explained outputs, R directions.

Reference:
    Chormai, Herrmann, Müller, Montavon, "Disentangled Explanations of Neural Network Predictions by Finding Relevant
    Subspaces", 2024. Path-integrated contributions in place of LRP, and the remainder as an x-feature, differ from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_xnn.models._contribution_groups import ContributionGroups, Integral
from captum_xnn.models.baselines._partitions import drsa, subspace_relevances

__all__ = ["DRSA"]


class DRSA(ContributionGroups):
    """Relevances of K - 1 orthogonal subspaces, and the remainder, in contributions that sum to the output exactly.

    A fit maximises DRSA's objective, which asks for relevance in different examples. It covers no patches, so it also
    serves inputs that cannot be covered. The subspaces come in the order of their mean relevance to positives, and the
    remainder comes last: the relevance outside all subspaces.

    Args:
        shape: Dimensions D of Z, or the shape (...) of one example.
        n_features: Number of x-features K, with the remainder.
        n_outputs: Explained outputs C. All share the subspaces.
        channels: Dimension of Z that holds D, as for ContributionGroups.
        size: Largest number of directions in a subspace. Where the layer has few dimensions, a subspace has D // K, so
            that the remainder has at least as many.
        steps: Largest number of steps of the gradient ascent.
        positives: Largest number of examples of the class to learn from.
        others: Largest number of further examples to learn from.
        intervals: First number of intervals of the path integral.
        most: Largest number of intervals.
        tolerance: As for ContributionGroups.

    Raises:
        ValueError: If a number is out of range, or there are fewer dimensions than x-features.

    Example:
        >>> from torch import nn
        >>> from captum_xnn import XNNAttribution
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> data = torch.randn(300, 6)
        >>> xnn = XNNAttribution(model, "1", n_features=3, autoencoder=DRSA).fit(data, target=0, progress=False)
        >>> why = xnn.explain(data[:4], target=0)
        >>> why.contributions.shape, bool((why.unexplained.abs() < 0.01).all())
        (torch.Size([4, 3]), True)
    """

    directions: Tensor
    divides_dimensions = False

    def __init__(
        self,
        shape: int | Sequence[int],
        n_features: int = 5,
        *,
        n_outputs: int = 1,
        channels: int | None = None,
        size: int = 8,
        steps: int = 50,
        positives: int = 30,
        others: int = 200,
        intervals: int = 8,
        most: int = 512,
        tolerance: float = 0.01,
    ) -> None:
        super().__init__(
            shape,
            n_features,
            n_outputs=n_outputs,
            channels=channels,
            positives=positives,
            others=others,
            intervals=intervals,
            most=most,
            tolerance=tolerance,
        )
        if size < 1 or steps < 0:
            raise ValueError(f"size is {size} and steps {steps}; pass size >= 1 and steps >= 0")
        D, subspaces = len(self.groups), n_features - 1
        if n_features > D:
            raise ValueError(f"n_features is {n_features}, but the layer has {D} dimensions; pass at most {D}")
        for name in ("grid", "covered", "strongest", "ridge", "balance"):  # of groups alone
            del self.config[name]
        self.config |= {"size": size, "steps": steps}
        self.width = min(size, D // n_features) if subspaces else 0
        member = torch.arange(subspaces, device="cpu").repeat_interleave(self.width)
        self.register_buffer("directions", torch.zeros(D, len(member), device="cpu"))
        self.groups = F.one_hot(torch.cat([member, torch.tensor([subspaces], device="cpu")]), n_features).to(
            self.groups
        )

    def factors(self, integral: Integral) -> tuple[Tensor, Tensor]:
        """Return activations minus their base, (N, P, D), and slopes, (C, N, P, D).

        Args:
            integral: Result of :meth:`integral`.
        """
        slopes = integral.slopes
        a = integral.Z.to(slopes) - self.base.to(slopes)
        return (
            a.movedim(self.channels, -1).flatten(1, -2) if a.dim() > 2 else a[:, None],
            slopes.movedim(self.channels + 1, -1).flatten(2, -2) if a.dim() > 2 else slopes[:, :, None],
        )

    @torch.no_grad()
    def learn(self, activations: Tensor, slopes: Tensor, positives: Tensor, *, seed: int) -> None:
        """Find the subspaces.

        Args:
            activations: Minus their base, (M, D).
            slopes: (M, D).
            positives: Which rows are positives, boolean, (M,).
            seed: Seed of the random start.

        Raises:
            ValueError: If a value is not finite.
        """
        subspaces = self.n_features - 1
        if not subspaces:
            return
        generator = torch.Generator().manual_seed(seed)
        U = drsa(activations, slopes, subspaces, size=self.width, steps=self.config["steps"], generator=generator)
        relevance = subspace_relevances(U, activations[positives], slopes[positives])[:, :-1].mean(0)
        U = U[relevance.argsort(descending=True, stable=True)]
        self.directions.copy_(U.transpose(0, 1).flatten(1))

    def contributions(self, integral: Integral) -> Tensor:
        """Compute contributions by direction, and the remainder, (C, N, R + 1).

        Args:
            integral: Result of :meth:`integral`.
        """
        a, slopes = self.factors(integral)
        U = self.directions.to(slopes)
        with torch.autocast(slopes.device.type, enabled=False):
            found = ((a @ U) * (slopes @ U)).sum(2)
        return torch.cat([found, (a * slopes).sum((2, 3))[..., None] - found.sum(2, keepdim=True)], 2)

    def slopes_of(self, slopes: Tensor, feature: int) -> Tensor:
        """Project slopes onto the subspace of one x-feature, (N, ...).

        Args:
            slopes: Slopes G of the output, (N, ...).
            feature: Index of the x-feature.
        """
        G, U = slopes.movedim(self.channels, -1), self.directions.to(slopes)
        with torch.autocast(slopes.device.type, enabled=False):
            if feature < self.n_features - 1:
                U = U[:, feature * self.width : (feature + 1) * self.width]
                return (G @ U @ U.T).movedim(-1, self.channels)
            return (G - G @ U @ U.T).movedim(-1, self.channels)
