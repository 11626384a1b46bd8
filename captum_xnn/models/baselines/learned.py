"""Forms whose x-features are learned by gradient descent, for other ends than the SRAE's, and those left as drawn.

Conventions:
    M examples, D dimensions of Z, n x-features, C explained outputs. Z is flattened to (M, D).

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from captum_xnn.distributed import Ranks
from captum_xnn.models.base import Dense, Examples, Loss, Weights
from captum_xnn.models.baselines.least_squares import read_out
from captum_xnn.models.objectives import PlainObjective, RunningObjective
from captum_xnn.models.scaling import scaling

__all__ = ["CAE", "NN", "SAE", "RandomDecoder", "RandomEncoder"]


class NN(Dense):
    """A fully connected network D-800-100-n with a linear head, learned for faithfulness alone.

    Of the recipe it takes steps, batches and learning rate; beta, eta, q and pre-training do not concern it.

    Arguments are those of :class:`~captum_xnn.models.srae.SRAE`.

    Example:
        >>> import torch
        >>> from captum_xnn.training import fit
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> y = Z[:, :1] * Z[:, 1:2]
        >>> network = NN(8, n_features=2, hidden=(16,))
        >>> history = fit(network, Z, y)
        >>> float((network(Z).y_bar - y).abs().mean().detach()) < 0.05
        True

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2: NN (no reconstruction).
    """

    def __init__(
        self, shape: int | Sequence[int], n_features: int = 5, *, hidden: Sequence[int] = (800, 100), n_outputs: int = 1
    ) -> None:
        super().__init__(shape, n_features, hidden=hidden, decoding=(), n_outputs=n_outputs)

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Returns faithfulness.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return PlainObjective(1.0, 0.0, ranks)

    def solve(self, examples: Examples) -> None:
        """Fit a linear decoder by least squares, to show what the x-features still tell of Z.

        Args:
            examples: What the network learned from.
        """
        read_out(self, self.decoder[-1], examples, examples.Z)


class SAE(Dense):
    r"""A stacked autoencoder D-800-100-n-100-800-D with a linear head, learned for faithfulness and reconstruction.

    .. math:: L = L_{FS} + \beta \frac1{S_z} \sum_k Q_k

    Eq. 5 without the logarithm, which makes the reconstruction sparse, and without the pull-away term. Of the recipe it
    takes beta, steps, batches and learning rate.

    The paper does not say whether its SAE was trained layer by layer first. Here all layers learn at once.

    Arguments are those of :class:`~captum_xnn.models.srae.SRAE`.

    Example:
        >>> import torch
        >>> from captum_xnn.training import fit
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> history = fit(SAE(8, n_features=2, hidden=(16,)), Z, Z[:, :1])
        >>> history[-1].sparse_reconstruction < history[0].sparse_reconstruction
        True

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2: SAE, "with faithfulness loss and
        traditional reconstruction loss (no sparsity term)".
    """

    def __init__(
        self, shape: int | Sequence[int], n_features: int = 5, *, hidden: Sequence[int] = (800, 100), n_outputs: int = 1
    ) -> None:
        super().__init__(shape, n_features, hidden=hidden, n_outputs=n_outputs)

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Returns faithfulness and plain reconstruction.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return PlainObjective(1.0, weights.beta, ranks)


class CAE(Dense):
    r"""A classic autoencoder D-800-100-n-100-800-D, learned for reconstruction alone; then a head by least squares.

    .. math:: L = \frac1{S_z} \sum_k Q_k

    The paper does not say how its CAE predicts the output. Here it does so as well as a linear head can. Without hidden
    layers its x-features span the first n principal components.
    Of the recipe it takes steps, batches and learning rate.

    Arguments are those of :class:`~captum_xnn.models.srae.SRAE`.

    Example:
        >>> import torch
        >>> from captum_xnn.training import fit
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> history = fit(CAE(8, n_features=2, hidden=(16,)), Z, Z[:, :1])
        >>> history[-1].sparse_reconstruction < history[0].sparse_reconstruction
        True

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2: CAE, "with only traditional
        reconstruction loss and without faithfulness loss".
    """

    def __init__(
        self, shape: int | Sequence[int], n_features: int = 5, *, hidden: Sequence[int] = (800, 100), n_outputs: int = 1
    ) -> None:
        super().__init__(shape, n_features, hidden=hidden, n_outputs=n_outputs)

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Returns plain reconstruction.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return PlainObjective(0.0, 1.0, ranks)

    def solve(self, examples: Examples) -> None:
        """Fit the head by least squares.

        Args:
            examples: What the network learned from.
        """
        read_out(self, self.head, examples, examples.y)


class RandomDecoder(Dense):
    """An SRAE whose decoder stays as drawn, as a control: what does learning to reconstruct add?

    All else is the SRAE's: layers, recipe, anchors, Eq. 5.

    Arguments are those of :class:`~captum_xnn.models.srae.SRAE`.

    Example:
        >>> import torch
        >>> from captum_xnn.training import fit
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> history = fit(RandomDecoder(8, n_features=2, hidden=(16,)), Z, Z[:, :1])
        >>> history[-1].faithfulness < history[0].faithfulness
        True

    Reference:
        Not in the paper. "Sanity Checks for Sparse Autoencoders: Do SAEs Beat Random Baselines?", arXiv 2602.14111,
        whose sparse autoencoders do not.
    """

    anchored = True

    def __init__(
        self, shape: int | Sequence[int], n_features: int = 5, *, hidden: Sequence[int] = (800, 100), n_outputs: int = 1
    ) -> None:
        super().__init__(shape, n_features, hidden=hidden, n_outputs=n_outputs)
        self.decoder.requires_grad_(False)

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Returns Eq. 5, with running statistics.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return RunningObjective.of(weights, ranks)


class RandomEncoder(Dense):
    """A random network D-800-100-n as drawn, with a head by least squares, as a control: what does learning add?

    Arguments are those of :class:`~captum_xnn.models.srae.SRAE`.

    Example:
        >>> import torch
        >>> from captum_xnn.training import fit
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> fit(RandomEncoder(8, n_features=2), Z, Z[:, :1])
        []

    Reference:
        Not in the paper. "Sanity Checks for Sparse Autoencoders: Do SAEs Beat Random Baselines?", arXiv 2602.14111.
    """

    def __init__(
        self, shape: int | Sequence[int], n_features: int = 5, *, hidden: Sequence[int] = (800, 100), n_outputs: int = 1
    ) -> None:
        super().__init__(shape, n_features, hidden=hidden, decoding=(), n_outputs=n_outputs)

    def solve(self, examples: Examples) -> None:
        """Fit the head and a linear decoder.

        Args:
            examples: What to be faithful to.
        """
        self.fold(scaling(examples.Z, examples.y))
        read_out(self, self.head, examples, examples.y)
        read_out(self, self.decoder[-1], examples, examples.Z)
