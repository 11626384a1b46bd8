"""Forms learned by gradient descent on other objectives than the SRAE's, and forms with random parts.

Conventions:
    M examples, D dimensions of Z, n x-features, C explained outputs. Z is flattened to (M, D).

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from captum_xnn._distributed import Ranks
from captum_xnn.models._base import Dense, Loss, TrainingExamples, Weights
from captum_xnn.models._objectives import PlainObjective, RunningObjective
from captum_xnn.models._scaling import scaling
from captum_xnn.models.baselines._least_squares import read_out

__all__ = ["CAE", "NN", "SAE", "RandomDecoder", "RandomEncoder"]


class NN(Dense):
    """A fully connected network D-800-100-n with a linear head, learned for faithfulness alone.

    The form uses steps, batches and learning rate from the recipe, but not beta, eta, q and pre-training.

    It takes the arguments of :class:`~captum_xnn.models.SRAE`.

    Example:
        >>> import torch
        >>> from captum_xnn.training._fitting import fit
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> y = Z[:, :1] * Z[:, 1:2]
        >>> network = NN(8, n_features=2, hidden=(16,))
        >>> history = fit(network, Z, y)
        >>> float((network(Z).y_bar - y).abs().mean().detach()) < 0.05
        True

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2: NN (no reconstruction).
    """

    has_linear_decoder = True

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Create the loss of faithfulness.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return PlainObjective(1.0, 0.0, ranks)

    def solve(self, examples: TrainingExamples) -> None:
        """Fit a linear decoder by least squares, to show how well the x-features reconstruct Z.

        Args:
            examples: Data that the network learned from.
        """
        read_out(self, self.decoder[-1], examples, examples.Z)


class SAE(Dense):
    r"""A stacked autoencoder D-800-100-n-100-800-D with a linear head, learned for faithfulness and reconstruction.

    .. math:: L = L_{FS} + \beta \frac1{S_z} \sum_k Q_k

    This is Eq. 5 without the pull-away term and without the logarithm that makes the reconstruction sparse. The form
    uses beta, steps, batches and learning rate from the recipe.

    The paper does not say whether its SAE was first trained layer by layer. Here all layers learn at once.

    It takes the arguments of :class:`~captum_xnn.models.SRAE`.

    Example:
        >>> import torch
        >>> from captum_xnn.training._fitting import fit
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> history = fit(SAE(8, n_features=2, hidden=(16,)), Z, Z[:, :1])
        >>> history[-1].sparse_reconstruction < history[0].sparse_reconstruction
        True

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2: SAE, "with faithfulness loss and
        traditional reconstruction loss (no sparsity term)".
    """

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Create the loss of faithfulness and plain reconstruction.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return PlainObjective(1.0, weights.beta, ranks)


class CAE(Dense):
    r"""A classic autoencoder D-800-100-n-100-800-D, learned for reconstruction alone, with a head by least squares.

    .. math:: L = \frac1{S_z} \sum_k Q_k

    The paper does not say how its CAE predicts the output. Here the best linear head does. Without hidden layers the
    x-features span the first n principal components. The form uses steps, batches and learning rate from the recipe.

    It takes the arguments of :class:`~captum_xnn.models.SRAE`.

    Example:
        >>> import torch
        >>> from captum_xnn.training._fitting import fit
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> history = fit(CAE(8, n_features=2, hidden=(16,)), Z, Z[:, :1])
        >>> history[-1].sparse_reconstruction < history[0].sparse_reconstruction
        True

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.2: CAE, "with only traditional
        reconstruction loss and without faithfulness loss".
    """

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Create the loss of plain reconstruction.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return PlainObjective(0.0, 1.0, ranks)

    def solve(self, examples: TrainingExamples) -> None:
        """Fit the head by least squares.

        Args:
            examples: Data that the network learned from.
        """
        read_out(self, self.head, examples, examples.y)


class RandomDecoder(Dense):
    """An SRAE with a random decoder that does not learn: a control for the gain from learning to reconstruct.

    Layers, recipe, anchors and Eq. 5 are the SRAE's.

    It takes the arguments of :class:`~captum_xnn.models.SRAE`.

    Example:
        >>> import torch
        >>> from captum_xnn.training._fitting import fit
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> history = fit(RandomDecoder(8, n_features=2, hidden=(16,)), Z, Z[:, :1])
        >>> history[-1].faithfulness < history[0].faithfulness
        True

    Reference:
        Not in the paper. "Sanity Checks for Sparse Autoencoders: Do SAEs Beat Random Baselines?", arXiv 2602.14111.
        The sparse autoencoders tested there do not.
    """

    anchored = True

    def __init__(
        self, shape: int | Sequence[int], n_features: int = 5, *, hidden: Sequence[int] = (800, 100), n_outputs: int = 1
    ) -> None:
        super().__init__(shape, n_features, hidden=hidden, n_outputs=n_outputs)
        self.decoder.requires_grad_(False)

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Create the loss of Eq. 5 with running statistics.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return RunningObjective.of(weights, ranks)


class RandomEncoder(Dense):
    """A random network D-800-100-n with a head by least squares: a control for the gain from learning.

    It takes the arguments of :class:`~captum_xnn.models.SRAE`.

    Example:
        >>> import torch
        >>> from captum_xnn.training._fitting import fit
        >>> Z = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
        >>> fit(RandomEncoder(8, n_features=2), Z, Z[:, :1])
        []

    Reference:
        Not in the paper. "Sanity Checks for Sparse Autoencoders: Do SAEs Beat Random Baselines?", arXiv 2602.14111.
    """

    has_linear_decoder = True

    def solve(self, examples: TrainingExamples) -> None:
        """Fit the head and a linear decoder.

        Args:
            examples: Data to learn from.
        """
        self.fold(scaling(examples.Z, examples.y))
        read_out(self, self.head, examples, examples.y)
        read_out(self, self.decoder[-1], examples, examples.Z)
