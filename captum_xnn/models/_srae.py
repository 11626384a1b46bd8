r"""The Sparse Reconstruction Autoencoder: embeds a layer's activations Z into n x-features.

The encoder computes the x-features :math:`E = E_\theta(Z)`. The head approximates the model's output by
:math:`\bar y = v^T E + b`. The decoder reconstructs the dimensions of Z that the x-features account for.

Conventions:
    M examples, D dimensions of Z, n x-features, C explained outputs (1 unless several are explained jointly).

Differs from the paper:
    :class:`PaperSRAE` is Eq. 5 as printed. In the other forms the x-layer is linear. The x-features have mean 0 and
    standard deviation 1 over the training data. The head has a bias. A contribution :math:`v_i E_i` therefore compares
    an example with the average training example.
    See the page "How the training recipe was found".

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from captum_xnn._distributed import Ranks
from captum_xnn.models._base import Autoencoder, Dense, Loss, Reconstruction, Weights, check_sizes
from captum_xnn.models._objectives import RunningObjective

__all__ = ["SRAE", "ConvSRAE", "PaperSRAE", "by_shape"]


def _pointwise(sizes: Sequence[int]) -> nn.Sequential:
    layers = [m for i, o in pairwise(sizes) for m in (nn.Conv2d(i, o, 1), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class SRAE(Dense):
    r"""A Sparse Reconstruction Autoencoder on a layer that outputs one vector per example.

    .. math:: E = E_\theta(Z), \quad \bar y = v^T E + b, \quad \tilde Z = E^{-1}_{\tilde\theta}(E)

    Encoder D-800-100-n and decoder n-100-800-D with ReLU between their layers. Activations with more than two
    dimensions are flattened to (M, D).

    Args:
        shape: Dimensions D of Z, or the shape (...) of one example, to be flattened.
        n_features: x-features n. The paper uses 5 for one class and 7 for four.
        hidden: Sizes of the encoder's hidden layers. The decoder mirrors them. Empty makes both linear.
        n_outputs: Explained outputs C.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> import torch
        >>> srae = SRAE(2048, n_features=5)
        >>> made = srae(torch.rand(3, 2048))
        >>> made.E.shape, made.y_bar.shape, made.Z_tilde.shape
        (torch.Size([3, 5]), torch.Size([3, 1]), torch.Size([3, 2048]))

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 2.2, Fig. 2(a); sizes from section 4.2.
    """

    anchored = True

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Create the loss of Eq. 5 with running statistics.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return RunningObjective.of(weights, ranks)


class PaperSRAE(Dense):
    r"""A Sparse Reconstruction Autoencoder with Eq. 5 as printed: pass ``autoencoder=PaperSRAE``.

    .. math:: \min_{\theta, \tilde\theta, v} \frac1M \sum_i \lVert v^T E_\theta(Z^{(i)}) - \hat y^{(i)} \rVert^2
              + \beta \frac1{S_z} \sum_k \log(1 + q\,Q_k)
              + \eta \frac1{n(n-1)} \sum_l \sum_{l' \ne l}
              \Big(\frac{E_l^T E_{l'}}{\lVert E_l \rVert \lVert E_{l'} \rVert}\Big)^2

    It differs from :class:`SRAE` in six points:

    - x-features are rectified, as in the authors' code, and stay as learned.
    - v may have either sign, and the head has no bias.
    - The pull-away term has cosines, not correlations.
    - Z and the output stay in the model's units.
    - Training starts from random weights, without anchors. The recipe's ``pretraining`` and ``balance`` have no effect.
    - Weights do not decay, and the learning rate is the authors' 1e-3.

    It shares layers, batches with their share of positives, running statistics and the schedule with :class:`SRAE`.
    On real birds this form degenerates: x-features die, and one contributes most (benchmarks/degeneration.py).

    It takes the arguments of :class:`SRAE`.

    Example:
        >>> xnn = PaperSRAE(2048, n_features=5)
        >>> bool((xnn.encode(torch.randn(3, 2048)) >= 0).all()), xnn.head.bias
        (True, Parameter containing:
        tensor([0.]))

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, Eq. 5; sizes from section 4.2.
    """

    learning_rate = 1e-3
    weight_decay = 0.0
    standardised = False
    signed = False

    def __init__(
        self, shape: int | Sequence[int], n_features: int = 5, *, hidden: Sequence[int] = (800, 100), n_outputs: int = 1
    ) -> None:
        super().__init__(shape, n_features, hidden=hidden, n_outputs=n_outputs)
        self.encoder.append(nn.ReLU())
        nn.init.zeros_(self.head.bias.requires_grad_(False))

    def reset(self, generator: torch.Generator) -> None:
        r"""Draw new weights, v included, uniform in :math:`\pm 1/\sqrt{fan}`. The head's bias is 0.

        Args:
            generator: A CPU generator; the same seed gives the same weights on every device.
        """
        super().reset(generator)
        with torch.no_grad():
            bound, drawn = self.n_features**-0.5, torch.empty(self.head.weight.shape, device="cpu")
            self.head.weight.copy_(drawn.uniform_(-bound, bound, generator=generator))

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Create the loss of Eq. 5 as printed, with running statistics.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return RunningObjective.of(weights, ranks, centred=False)

    def _writers(self) -> tuple[nn.Module, ...]:
        return (self.encoder[-2],)


class ConvSRAE(Autoencoder):
    r"""A Sparse Reconstruction Autoencoder of 1x1 convolutions, on a layer that outputs feature maps.

    The encoder turns Z, (M, channels, H, W), into n maps. The decoder reconstructs Z from the maps. Each map is
    max-pooled and weighted by its own learned plane to give the x-feature: :math:`E_i = \sum_p u_{ip}\,
    \mathrm{pool}(\mathrm{map}_i)_p + c_i`. Max-pooling, planes and head together equal the paper's max-pooling layer
    and fully connected layer. In this form every x-feature stays one number with one contribution.

    Args:
        shape: (channels, H, W) of Z.
        n_features: x-features n.
        hidden: Channels of the encoder's hidden layers, mirrored in the decoder. The paper's MNIST network has none.
        n_outputs: Explained outputs C.
        pool: Size of the max-pooling window, in cells of Z, at most H and W. A window of H x W makes every x-feature
            independent of places.

    Raises:
        ValueError: If a size is below 1, or the window is larger than the maps.

    Example:
        >>> import torch
        >>> srae = ConvSRAE((16, 7, 7), n_features=5)
        >>> srae(torch.rand(3, 16, 7, 7)).E.shape, srae.maps(torch.rand(3, 16, 7, 7)).shape
        (torch.Size([3, 5]), torch.Size([3, 5, 7, 7]))

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021, section 4.4.
    """

    anchored = True
    learning_rate = 1e-2
    weight_decay = 0.1

    def __init__(
        self,
        shape: Sequence[int],
        n_features: int = 5,
        *,
        hidden: Sequence[int] = (),
        n_outputs: int = 1,
        pool: int = 2,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        check_sizes(
            channels=channels, height=height, width=width, n_features=n_features, n_outputs=n_outputs, pool=pool
        )
        if pool > min(height, width):
            raise ValueError(
                f"the pooling window is {pool}, larger than the maps of {height} x {width} cells; pass pool from 1 to "
                f"{min(height, width)}"
            )
        self.config = {
            "shape": list(shape),
            "n_features": n_features,
            "hidden": list(hidden),
            "n_outputs": n_outputs,
            "pool": pool,
        }
        sizes = (channels, *hidden, n_features)
        self.encoder = _pointwise(sizes)
        self.decoder = _pointwise(sizes[::-1])
        self.pool = nn.MaxPool2d(pool)
        self.planes = nn.Conv2d(n_features, n_features, (height // pool, width // pool), groups=n_features)
        self.head = nn.Linear(n_features, n_outputs)

    def maps(self, Z: Tensor) -> Tensor:
        """Compute the x-features' maps before pooling, shape (M, n, H, W), of Z, shape (M, channels, H, W)."""
        return self.encoder(Z)  # type: ignore[no-any-return]

    def shaped(self, Z: Tensor) -> Tensor:
        """Return feature maps Z, shape (M, channels, H, W), unchanged."""
        return Z

    def encode(self, Z: Tensor) -> Tensor:
        """Compute the x-features E, shape (M, n), of feature maps Z, shape (M, channels, H, W)."""
        return self._read(self.maps(Z))

    def _read(self, maps: Tensor) -> Tensor:
        return self.planes(self.pool(maps)).flatten(1)  # type: ignore[no-any-return]

    def forward(self, Z: Tensor) -> Reconstruction:
        """Compute x-features, approximated outputs and the reconstruction of feature maps Z, (M, channels, H, W)."""
        maps = self.maps(Z)
        E = self._read(maps)
        return Reconstruction(E, self.head(E), self.decoder(maps))

    @classmethod
    def minimised(cls, weights: Weights, ranks: Ranks) -> Loss:
        """Create the loss of Eq. 5 with running statistics.

        Args:
            weights: Settings of the terms.
            ranks: Processes that learn together.
        """
        return RunningObjective.of(weights, ranks)

    def _writers(self) -> tuple[nn.Module, ...]:
        return self.encoder[-1], self.planes

    def _readers(self) -> tuple[nn.Module, ...]:
        return (self.head,)

    def _readers_of_maps(self) -> tuple[nn.Module, ...]:
        return (self.decoder[0],)


def by_shape(shape: Sequence[int], n_features: int = 5, *, n_outputs: int = 1, channels: int = 1) -> SRAE | ConvSRAE:
    """Create a ConvSRAE for feature maps (C, H, W) of several cells, and an SRAE for every other shape.

    Args:
        shape: Shape (...) of one example of Z.
        n_features: x-features n.
        n_outputs: Explained outputs C.
        channels: The dimension of Z with channels, counted with the examples as 0. Maps (H, W, C) get an SRAE.

    Example:
        >>> type(by_shape((4, 3, 3))).__name__, type(by_shape((4, 1, 1))).__name__
        ('ConvSRAE', 'SRAE')
        >>> type(by_shape((3, 3, 4), channels=3)).__name__
        'SRAE'
    """
    if len(shape) == 3 and shape[1] > 1 and shape[2] > 1 and channels == 1:
        return ConvSRAE(shape, n_features, n_outputs=n_outputs)
    return SRAE(shape, n_features, n_outputs=n_outputs)
